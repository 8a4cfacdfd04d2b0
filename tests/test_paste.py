"""The pieces that README offers for pasting work with nothing but their file's import lines."""

import ast
import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import same

import data
import evaluate
import losses
import models
import train

PIXELS = (torch.arange(3 * 50 * 71).reshape(3, 50, 71) % 251).to(torch.uint8)
IMAGE = PIXELS / 255
PATH = Path("checkpoint.pt")
BOX = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4], "area": 16, "iscrowd": 0}
VAL = {"images": [{"id": 1}], "categories": [{"id": 1}], "annotations": [BOX]}


@pytest.fixture(scope="module")
def teacher(teachers):
    return models.load_teacher("fasterrcnn", teachers["fasterrcnn"], 64, 96)


@pytest.mark.parametrize("module, names, use", [
    (losses, "at_least_float32 squared_errors squared_norms ghnd_loss",
     lambda m, student, teacher: m.ghnd_loss([IMAGE] * 4, [IMAGE**2] * 4)),
    (models, "MakeBottleneck Bottleneck check_bottleneck build_student",
     lambda m, student, teacher: m.build_student(teacher).state_dict()),
    (models, "fold_frozen_bn training_bodies",
     lambda m, *pair: [dict(body(IMAGE[None])) for body in m.training_bodies(*pair)]),
    (models, "HEADER MAGIC MAX_BYTES MAX_MASK_PIXELS DTYPES quantize dequantize split Head Tail "
     "check_bottleneck padded_size unpack detect_from_maps",
     lambda m, student, teacher: m.Tail(student).detect(m.split(student)[0].compress(IMAGE))),
    (models, "save_checkpoint load_checkpoint",
     lambda m, *_: (m.save_checkpoint({"x": IMAGE}, PATH), m.load_checkpoint(PATH))),
    (data, "ImageInfo Images aspect_ratio_groups group_batches GroupedBatches", lambda m, *_: list(
        m.GroupedBatches([m.ImageInfo(i, "", 90 + i, 150) for i in range(60)], 4, 1, 2))),
    (evaluate, "METRICS Results make_coco results_of_type load_results coco_metrics",
     lambda m, *_: m.coco_metrics(m.make_coco(VAL), [BOX | {"score": 0.5}], [1], "bbox")),
    (train, "Criterion train_step", lambda m, student, teacher: m.train_step(
        *models.training_bodies(student, teacher), teacher.transform, [[PIXELS]],
        torch.optim.SGD(student.backbone.body.layer1.parameters(), lr=0.0)))])
def test_a_piece_works_alone(module, names, use, teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree = ast.parse(inspect.getsource(module))
    tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)
                 or getattr(node, "name", ast.unparse(node).split(" ")[0]) in names.split()]
    pasted = {"__name__": "pasted"}
    exec(compile(tree, module.__file__, "exec"), pasted)
    assert set(names.split()) <= pasted.keys()
    results = []
    for piece in (SimpleNamespace(**pasted), module):
        torch.manual_seed(0)
        results.append(use(piece, models.build_student(teacher), teacher))
    assert same(*results)
