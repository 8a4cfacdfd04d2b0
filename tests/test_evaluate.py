import argparse
import contextlib
import io
import json
import math

import numpy as np
import pytest
import torch
from conftest import SIZE_FLAGS, SIZES, changed, figures_of, run
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.models.detection.roi_heads import paste_masks_in_image

import data
import evaluate
import models

CPU = torch.device("cpu")


def plain_figures(annotation_file, results, kind):
    """The figures as pycocotools' own documentation has them: one process, all images, files only."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(annotation_file))
        evaluation = COCOeval(coco, coco.loadRes(str(results)), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


def random_results(coco, kind, seed=0):
    """Results near the annotations of most images, with their scores tied now and then, and some junk."""
    rng, results = np.random.default_rng(seed), []
    for image_id in coco.getImgIds():
        image = coco.imgs[image_id]
        for annotation in coco.imgToAnns[image_id] if image_id % 5 else []:
            for _ in range(rng.integers(2, 24)):
                x, y, w, h = np.array(annotation["bbox"]) + rng.normal(0, 6, 4)
                x, y = max(x, 0), max(y, 0)
                w, h = max(min(w, image["width"] - x), 2), max(min(h, image["height"] - y), 2)
                category = (
                    annotation["category_id"] if rng.random() < 0.8 else int(rng.integers(1, 91))
                )
                mask = np.zeros((image["height"], image["width"]), np.uint8, order="F")
                mask[int(y) : int(y + h), int(x) : int(x + w)] = 1
                rle = coco_mask.encode(mask)
                results.append(
                    {
                        "image_id": image_id,
                        "category_id": category,
                        "bbox": [x, y, w, h],
                        "score": round(float(rng.random()), 1),
                        "segmentation": {**rle, "counts": rle["counts"].decode()},
                    }
                )
    return results


def test_masks_are_encoded_as_pycocotools_encodes_each(dataset):
    torch.manual_seed(0)
    h, w = 53, 38
    boxes = torch.cat([torch.rand(60, 2) * torch.tensor([30, 44]), torch.rand(60, 2) * 40], 1)
    boxes[:, 2:] = torch.minimum(boxes[:, :2] + boxes[:, 2:], torch.tensor([w, h]))
    boxes = torch.cat(
        [
            boxes,
            torch.tensor(
                [[0, 0, w, h], [0, 0, w, 9], [5, 0, 9, h], [0, h - 1, w, h], [3, 3, 3, 3]]
            ),
        ]
    )
    n = len(boxes)  # anywhere, then: all, the top, whole columns, the last row, nothing
    probabilities = torch.rand(n, 1, 28, 28)
    probabilities[60:64] = torch.tensor([1, 1, 0.9, 1]).reshape(
        4, 1, 1, 1
    )  # solid, to the very edges
    probabilities[7] = 0
    output = {
        "boxes": boxes,
        "labels": torch.arange(1, n + 1),
        "scores": torch.rand(n),
        "masks": paste_masks_in_image(probabilities, boxes, (h, w)),
    }
    results = evaluate.to_coco(42, output)
    assert len(results) == n
    for i, result in enumerate(results):
        assert result["image_id"] == 42 and result["category_id"] == i + 1
        assert result["score"] == output["scores"][i].item()
        x0, y0, x1, y1 = boxes[i]
        assert result["bbox"] == [x0.item(), y0.item(), (x1 - x0).item(), (y1 - y0).item()]
        wanted = coco_mask.encode(
            np.asfortranarray((output["masks"][i, 0] > 0.5).numpy().astype(np.uint8))
        )
        assert result["segmentation"] == {"size": [h, w], "counts": wanted["counts"].decode()}
    areas = coco_mask.area([result["segmentation"] for result in results])
    assert areas[7] == 0 and areas[60] > 0.9 * h * w and 0 < areas[0] < h * w
    json.dumps(results)
    nothing = {key: value[:0] for key, value in output.items()}
    assert evaluate.to_coco(42, nothing) == []


def test_masks_that_touch_every_edge_are_encoded_alike():
    rng = np.random.default_rng(0)
    masks = np.kron(rng.random((40, 3, 4)), np.ones((1, 5, 6))).astype(
        np.float32
    )  # blocks: whole columns too
    masks[0], masks[1], masks[2, :, 3] = 1, 0, 1
    everywhere = np.tile(np.array([0, 0, 24, 15], np.float32), (40, 1))
    ours = evaluate.encode_masks(masks, everywhere)
    wanted = coco_mask.encode(np.asfortranarray((masks > 0.5).transpose(1, 2, 0).astype(np.uint8)))
    assert ours == [{**rle, "counts": rle["counts"].decode()} for rle in wanted]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_figures_are_those_of_plain_pycocotools(dataset, tmp_path, kind):
    val = evaluate.ValSet(dataset)
    results = random_results(val.coco, kind)
    assert len(results) > 200 and len({r["image_id"] for r in results}) < len(val.index)
    figures = evaluate.coco_figures(val.coco, results, val.index.ids.tolist(), kind)
    keep = {"bbox": "segmentation", "segm": "bbox"}[kind]
    (tmp_path / "results.json").write_text(
        json.dumps([{k: v for k, v in r.items() if k != keep} for r in results])
    )
    annotation_file = dataset / "annotations" / "instances_val2017.json"
    assert figures == plain_figures(annotation_file, tmp_path / "results.json", kind)
    assert 0.1 < figures[0] < 0.9 and len(figures) == len(evaluate.FIGURES) == 12


def test_categories_shared_out_give_the_very_same_figures(own_dataset, tmp_path, monkeypatch):
    """Their order counts: it decides how the means over 80 of them are rounded."""
    annotation_file = own_dataset / "annotations" / "instances_val2017.json"

    def spread(content):
        content["categories"] = [{"id": i, "name": str(i)} for i in range(80, 0, -1)]
        for i, annotation in enumerate(content["annotations"] * 3):
            content["annotations"] += [annotation | {"id": i + 1000, "category_id": 1 + i % 80}]

    changed(annotation_file, spread)
    val = evaluate.ValSet(own_dataset)
    results = random_results(val.coco, "bbox")
    (tmp_path / "results.json").write_text(json.dumps(evaluate.of_kind(results, "bbox")))
    common = (val.coco, results, val.index.ids.tolist(), "bbox")
    gathered = [[], [], []]
    monkeypatch.setattr("distributed.world_size", lambda: len(gathered))
    for rank, mine in enumerate(gathered):
        monkeypatch.setattr("distributed.rank", lambda rank=rank: rank)
        monkeypatch.setattr("distributed.gather", lambda v, mine=mine: mine.append(v) or [v])
        evaluate.coco_figures(*common)
    assert [share.shape[2] for share, _ in gathered] == [27, 27, 26]
    monkeypatch.setattr("distributed.gather", lambda value: [mine.pop(0) for mine in gathered])
    figures = evaluate.coco_figures(*common)
    assert figures == plain_figures(annotation_file, tmp_path / "results.json", "bbox")
    assert 0.05 < figures[0] < 0.9


def test_limit_counts_the_first_images_only(dataset):
    val, some = evaluate.ValSet(dataset), evaluate.ValSet(dataset, 4)
    results = random_results(val.coco, "bbox")
    of_some = [r for r in results if r["image_id"] in some.index.ids]
    assert len(some.images) == 4
    figures = evaluate.coco_figures(some.coco, of_some, some.index.ids.tolist(), "bbox")
    assert figures != evaluate.coco_figures(val.coco, of_some, val.index.ids.tolist(), "bbox")
    assert figures[0] > 0


class Fake(torch.nn.Module):
    """A detector that finds nothing, or the same few boxes everywhere."""

    def __init__(self, boxes):
        super().__init__()
        self.boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        self.roi_heads = torch.nn.Module()
        self.roi_heads.has_mask = lambda: False
        self.transform = argparse.Namespace(image_mean=[0.0], image_std=[1.0])

    def forward(self, images):
        assert (
            len(images) == 1
            and images[0].dtype == torch.float32
            and 0 <= images[0].min() <= images[0].max() <= 1
        )
        n = len(self.boxes)
        return [{"boxes": self.boxes, "labels": torch.ones(n, dtype=int), "scores": torch.ones(n)}]


def test_a_detector_that_finds_nothing_scores_zero(dataset):
    val = evaluate.ValSet(dataset)
    figures = evaluate.evaluate(Fake([]), val, CPU, 0)
    assert (
        list(figures) == ["bbox"]
        and set(figures["bbox"]) <= {0.0, -1.0}
        and figures["bbox"][0] == 0
    )
    x, y, w, h = next(a["bbox"] for a in val.coco.dataset["annotations"] if a["category_id"] == 1)
    assert evaluate.evaluate(Fake([[x, y, x + w, y + h]]), val, CPU, 0)["bbox"][6] > 0


@pytest.mark.parametrize("arch, kinds", [("fasterrcnn", ["bbox"]), ("maskrcnn", ["bbox", "segm"])])
def test_a_detectors_saved_results_give_its_figures(arch, kinds, dataset, teachers, tmp_path):
    teacher = models.load_teacher(arch, teachers[arch], **SIZES)
    figures = evaluate.evaluate(
        teacher, evaluate.ValSet(dataset), CPU, 0, save_to=tmp_path / "r.json"
    )
    assert list(figures) == kinds and figures["bbox"][0] > 0
    files = {"bbox": tmp_path / "r.json", "segm": tmp_path / "r.segm.json"}
    for kind in kinds:
        assert figures[kind] == plain_figures(
            dataset / "annotations" / "instances_val2017.json", files[kind], kind
        )
    assert len(json.loads(files["bbox"].read_text())) > 300
    assert files["segm"].exists() == (arch == "maskrcnn")


def test_original_way_gives_the_same_results(dataset, teachers):
    """torchvision's detector on a Pillow-like float image, boxes and masks taken one by one."""
    teacher = models.load_teacher("maskrcnn", teachers["maskrcnn"], **SIZES)
    val = evaluate.ValSet(dataset, 3)
    results = evaluate.detect(teacher, val, CPU, 0, "")
    assert len(results) > 30
    for image_id, name in zip(val.index.ids.tolist(), val.index.names):
        image = data.read_image(dataset / "val2017" / name).float().div(255)
        found = [result for result in results if result["image_id"] == image_id]
        with torch.no_grad():
            output = teacher([image])[0]
        assert len(found) == len(output["boxes"]) > 0
        for result, box, mask in zip(found, output["boxes"], output["masks"]):
            np.testing.assert_allclose(result["bbox"][:2], box[:2].tolist(), atol=1e-3)
            wanted = coco_mask.encode(np.asfortranarray((mask[0] > 0.5).numpy().astype(np.uint8)))
            mine = coco_mask.decode(result["segmentation"])
            assert np.mean(mine != coco_mask.decode(wanted)) < 1e-3


def run_evaluate(dataset, checkpoints, *flags, nproc=None):
    return run(
        "evaluate.py",
        "--ckpt",
        checkpoints["maskrcnn"],
        "--data-dir",
        dataset,
        *SIZE_FLAGS,
        *flags,
        nproc=nproc,
        env={"OMP_NUM_THREADS": "1"},  # as torchrun sets it: the number may change the last bits
    )


def test_command_prints_the_figures_of_teacher_and_student(dataset, checkpoints, teachers):
    process = run_evaluate(
        dataset, checkpoints, "--teacher", "--teacher-ckpt", teachers["maskrcnn"], "--limit-val", 4
    )
    figures = figures_of(process)
    assert list(figures) == ["teacher", "student"] and figures["teacher"]["bbox"][0] > 0
    assert figures["teacher"] != figures["student"]
    for text in (
        "published",
        "0.379",
        "0.346",
        "0.369",
        "0.336",
        *(f"{x:.4f}" for x in figures["teacher"]["bbox"]),
    ):
        assert text in process.stdout


@pytest.fixture(scope="module")
def figures_of_one_process(dataset, checkpoints):
    return figures_of(run_evaluate(dataset, checkpoints))


@pytest.mark.parametrize("nproc", [2, 3, 5])
def test_figures_are_the_same_on_any_number_of_processes(
    nproc, dataset, checkpoints, tmp_path, figures_of_one_process
):
    process = run_evaluate(
        dataset, checkpoints, "--save-detections", tmp_path / "r.json", nproc=nproc
    )
    figures = figures_of(process)
    assert figures == figures_of_one_process
    for kind, file in (("bbox", "r.json"), ("segm", "r.segm.json")):
        assert figures["student"][kind] == plain_figures(
            dataset / "annotations" / "instances_val2017.json", tmp_path / file, kind
        )
    images = [r["image_id"] for r in json.loads((tmp_path / "r.json").read_text())]
    assert (
        images == sorted(images) and len(set(images)) > 1
    )  # in the data set's order, whoever saw them


def test_reported_figures_are_the_published_ones():
    assert {arch: r["student"] for arch, r in evaluate.REPORTED.items()} == {
        "fasterrcnn": {"bbox": 0.359},
        "maskrcnn": {"bbox": 0.369, "segm": 0.336},
    }
    for arch, reported in evaluate.REPORTED.items():
        metrics = models.COCO_V1[arch].meta["_metrics"]["COCO-val2017"]
        assert math.isclose(reported["teacher"]["bbox"], metrics["box_map"] / 100)
        assert math.isclose(reported["teacher"].get("segm", 0), metrics.get("mask_map", 0) / 100)
