"""Each piece that README offers is cut out of its file, and works with the imports README names."""

import ast
import contextlib
import io
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, SIZES, same
from pycocotools.coco import COCO
from torchvision.models.detection import maskrcnn_resnet50_fpn

import data
import evaluate
import losses
import models
import train

ROWS = re.findall(r"^\| (.+?) \| `(\w+\.py)`: (.+?) \| (.+?) \|$", (ROOT / "README.md").read_text(),
                  re.MULTILINE)
PIECES = {piece: (file, re.findall("`(.+?)`", names), re.findall("`(.+?)`", imports))
          for piece, file, names, imports in ROWS}


def defined_names(node):
    """Return the names that a top-level statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []


def cut_out(piece):
    """Run the source of a piece alone, after its imports; return what it defines, by name."""
    file, names, imports = PIECES[piece]
    source = (ROOT / file).read_text()
    lines = source.splitlines()
    cut = list(imports)
    found = []
    for node in ast.parse(source).body:
        if set(defined_names(node)) & set(names):
            found += defined_names(node)
            decorators = getattr(node, "decorator_list", [])
            first = min(n.lineno for n in [node, *decorators])
            cut.append("\n".join(lines[first - 1:node.end_lineno]))
    assert sorted(found) == sorted(names), f"README's row on {piece} names what is not there"
    module = {"__name__": "pasted"}
    exec(compile("\n\n".join(cut), f"<{piece}>", "exec"), module)
    return module


@pytest.fixture
def teacher(teachers):
    return models.load_teacher("fasterrcnn", teachers["fasterrcnn"], **SIZES)


@pytest.fixture
def student(teacher):
    torch.manual_seed(0)
    return models.build_student(teacher)


def random(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def test_the_loss():
    pasted = cut_out("the loss")
    loss, errors = pasted["ghnd_loss"]([torch.ones(1, 2)] * 2, [torch.zeros(1, 2)] * 2, (1, 3))
    assert loss.item() == 8 and errors.tolist() == [2, 2]


def test_its_relative_error():
    assert cut_out("its relative error")["squared_norms"]([torch.ones(2, 3)]).tolist() == [6]


def test_the_bottleneck():
    pasted = cut_out("the bottleneck")
    torch.manual_seed(1)
    bottleneck = pasted["Bottleneck"](3).eval()
    torch.manual_seed(1)
    assert same(bottleneck.state_dict(), models.Bottleneck(3).state_dict())
    assert bottleneck(random(1, 64, 8, 9)).shape == (1, 256, 8, 9)


def test_the_student(teacher, student):
    pasted = cut_out("the student of torchvision's ResNet-50 FPN detectors")
    torch.manual_seed(0)
    assert same(pasted["build_student"](teacher).state_dict(), student.state_dict())

    theirs = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None).train()  # all is trainable
    student = pasted["build_student"](theirs)
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in student.named_parameters()
                       if name.startswith(("backbone.body.conv1.", "backbone.body.layer1."))}
    assert not student.training and not theirs.training


def test_folded_frozen_batch_norm(teacher):
    folded = cut_out("folded FrozenBatchNorm2d")["fold_frozen_bn"](teacher.backbone.body)
    x = random(1, 3, 64, 64)
    torch.testing.assert_close(folded(x), teacher.backbone.body(x), rtol=1e-4, atol=1e-4)


def test_the_training_bodies(teacher, student):
    pasted = cut_out("the two bodies that training runs")
    found = pasted["training_bodies"](student, teacher)
    x = random(1, 3, 64, 64)
    for body, wanted in zip(found, models.training_bodies(student, teacher), strict=True):
        assert same(dict(body(x)), dict(wanted(x)))


def test_the_quantizer():
    pasted = cut_out("the quantizer")
    q, scale, zero_point = pasted["quantize"](torch.tensor([-1.0, 0.0, 2.0]), 8)
    assert q.tolist() == [0, 85, 255]
    torch.testing.assert_close(
        pasted["dequantize"](q, scale, zero_point), torch.tensor([-1.0, 0.0, 2.0]))


def test_head_bytes_and_tail(student):
    head, tail = cut_out("head, bytes and tail")["split"](student, 8)
    theirs = models.split(student, 8)
    image = random(3, 90, 131)
    payload = head.compress(image)
    assert payload == theirs[0].compress(image)
    assert same(tail.detect(payload), theirs[1].detect(payload))


def test_checkpoints(tmp_path, checkpoints):
    load = cut_out("checkpoints of strangers")["load_checkpoint"]
    content = load(checkpoints["fasterrcnn"])
    cut_out("checkpoints that are never torn")["save_checkpoint"](content, tmp_path / "x.pt")
    assert same(load(tmp_path / "x.pt"), content)


def test_batches():
    pasted = cut_out("batches as functions of seed, epoch and rank")
    images = [pasted["ImageInfo"](i, f"{i}.jpg", 100 + i, 150) for i in range(60)]
    batches = pasted["GroupedBatches"](images, 4, rank=1, world_size=2, seed=3)
    assert list(batches) == list(data.GroupedBatches(images, 4, 1, 2, 3)) != []


def test_coco_metrics(dataset):
    pasted = cut_out("COCO metrics on many processes")
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(dataset / "annotations" / "instances_val2017.json")
    results = [{"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"],
                "score": 0.5} for a in coco.anns.values() if not a["iscrowd"]]
    args = (coco, results, sorted(coco.getImgIds()), "bbox")
    assert pasted["coco_metrics"](*args) == evaluate.coco_metrics(*args)
    assert pasted["coco_metrics"](*args)[0] == 1


def test_the_recipe_and_its_loop(teacher, student, dataset):
    pasted = cut_out("the recipe and its loop")
    assert pasted["Experiment"]("maskrcnn").__dict__ == train.MASKRCNN.__dict__
    experiment = pasted["Experiment"]("fasterrcnn", images_per_step=4, **SIZES)
    images, folder = data.load_train_split(dataset, 160, limit=4)
    loader = data.train_loader(images, folder, 4, 0, 0, torch.device("cpu"))
    run = pasted["Run"](student, *train.build_optimizer(student, experiment))
    bodies = models.training_bodies(student, teacher)
    records = []
    pasted["train_epoch"](
        experiment, run, *bodies, teacher.transform, loader, records.append, lambda: None)
    keys = next(iter(loader.batch_sampler))
    batch = teacher.transform([data.CocoImages(images, folder)[key] / 255 for key in keys])[0]
    torch.manual_seed(0)
    bodies = models.training_bodies(models.build_student(teacher), teacher)
    bodies[0].train()
    maps = [list(body(batch.tensors).values()) for body in bodies]
    loss, _ = losses.ghnd_loss(*maps)
    assert [r["step"] for r in records] == [1] and run.step == 1
    assert np.isclose(records[0]["loss"], loss.item(), rtol=1e-5)


def test_every_row_of_readme_is_tested():
    source = (ROOT / "tests" / "test_paste.py").read_text()
    assert len(PIECES) == 13
    for piece in PIECES:
        assert f'cut_out("{piece}")' in source
