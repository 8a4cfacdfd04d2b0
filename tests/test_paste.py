"""Pieces that a paper may need are cut out of their files, and work with these files' imports."""

import ast
import contextlib
import io

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

# What is cut out together, to work with nothing but its file's import lines.
PIECES = {
    "loss": ("losses.py", "at_least_float32 squared_errors ghnd_loss squared_norms"),
    "student": ("models.py", "MakeBottleneck Bottleneck make_bottleneck check_bottleneck build_student"),
    "bodies": ("models.py", "fold_frozen_bn training_bodies"),
    "split": ("models.py", "Header HEADER_FORMAT MAGIC MAX_BYTES MAX_PIXELS DTYPES quantize "
                           "dequantize split Head Tail padded_size unpack check_bottleneck"),
    "checkpoints": ("models.py", "save_checkpoint part_file load_checkpoint"),
    "batches": ("data.py", "ImageInfo aspect_ratio_groups group_batches GroupedBatches"),
    "metrics": ("evaluate.py", "METRICS Results results_of_type make_coco load_results "
                               "coco_metrics"),
    "loop": ("train.py", "Experiment LOG_EVERY SAVE_EVERY Run share_step train_epoch"),
}


def defined_names(node):
    """Return the names that a top-level statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []


def cut_out(piece):
    """Run the source of a piece alone, after its file's imports; return what it defines, by name."""
    file, names = PIECES[piece]
    source = (ROOT / file).read_text()
    cut, found = [], []
    for node in ast.parse(source).body:
        is_wanted = set(defined_names(node)) & set(names.split())
        if is_wanted or isinstance(node, ast.Import | ast.ImportFrom):
            found += defined_names(node)
            first = min(n.lineno for n in [node, *getattr(node, "decorator_list", [])])
            cut.append("\n".join(source.splitlines()[first - 1:node.end_lineno]))
    assert sorted(found) == sorted(names.split())
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
    pasted = cut_out("loss")
    loss, errors = pasted["ghnd_loss"]([torch.ones(1, 2)] * 2, [torch.zeros(1, 2)] * 2, (1, 3))
    assert loss.item() == 8 and errors.tolist() == [2, 2]
    assert pasted["squared_norms"]([torch.ones(2, 3)]).tolist() == [6]


def test_the_student(teacher, student):
    pasted = cut_out("student")
    torch.manual_seed(0)
    assert same(pasted["build_student"](teacher).state_dict(), student.state_dict())

    theirs = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None).train()  # all is trainable
    student = pasted["build_student"](theirs)
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in student.named_parameters()
                       if name.startswith(("backbone.body.conv1.", "backbone.body.layer1."))}
    assert not student.training and not theirs.training


def test_the_training_bodies(teacher, student):
    pasted = cut_out("bodies")
    x = random(1, 3, 64, 64)
    folded = pasted["fold_frozen_bn"](teacher.backbone.body)
    torch.testing.assert_close(folded(x), teacher.backbone.body(x), rtol=1e-4, atol=1e-4)
    found = pasted["training_bodies"](student, teacher)
    for body, wanted in zip(found, models.training_bodies(student, teacher), strict=True):
        assert same(dict(body(x)), dict(wanted(x)))


def test_head_bytes_and_tail(student):
    head, tail = cut_out("split")["split"](student, 8)
    theirs = models.split(student, 8)
    image = random(3, 90, 131)
    payload = head.compress(image)
    assert payload == theirs[0].compress(image)
    assert same(tail.detect(payload), theirs[1].detect(payload))


def test_checkpoints(tmp_path, checkpoints):
    pasted = cut_out("checkpoints")
    content = pasted["load_checkpoint"](checkpoints["fasterrcnn"])
    pasted["save_checkpoint"](content, tmp_path / "x.pt")
    assert same(pasted["load_checkpoint"](tmp_path / "x.pt"), content)


def test_batches():
    pasted = cut_out("batches")
    images = [pasted["ImageInfo"](i, f"{i}.jpg", 100 + i, 150) for i in range(60)]
    batches = pasted["GroupedBatches"](images, 4, rank=1, world_size=2, seed=3)
    assert list(batches) == list(data.GroupedBatches(images, 4, 1, 2, 3)) != []


def test_coco_metrics(dataset):
    pasted = cut_out("metrics")
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(dataset / "annotations" / "instances_val2017.json")
    results = [{"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"],
                "score": 0.5} for a in coco.anns.values() if not a["iscrowd"]]
    args = (coco, results, sorted(coco.getImgIds()), "bbox")
    assert pasted["coco_metrics"](*args) == evaluate.coco_metrics(*args)
    assert pasted["coco_metrics"](*args)["AP"] == 1


def test_the_recipe_and_its_loop(teacher, student, dataset):
    pasted = cut_out("loop")
    assert pasted["Experiment"]("maskrcnn").__dict__ == train.MASKRCNN.__dict__
    experiment = pasted["Experiment"]("fasterrcnn", images_per_step=4, **SIZES)
    images, folder = data.load_train_split(dataset, 160, limit=4)
    loader = data.train_loader(images, folder, 4, 0, 0, torch.device("cpu"))
    run = pasted["Run"](student, *train.build_optimizer(student, experiment))
    bodies = models.training_bodies(student, teacher)
    records = list(pasted["train_epoch"](
        experiment, run, *bodies, teacher.transform, loader))
    keys = next(iter(loader.batch_sampler))
    batch = teacher.transform([data.CocoImages(images, folder)[key] / 255 for key in keys])[0]
    torch.manual_seed(0)
    bodies = models.training_bodies(models.build_student(teacher), teacher)
    bodies[0].train()
    maps = [list(body(batch.tensors).values()) for body in bodies]
    loss, _ = losses.ghnd_loss(*maps)
    assert [r["step"] for r in records] == [1] and run.step == 1
    assert np.isclose(records[0]["loss"], loss.item(), rtol=1e-5)
