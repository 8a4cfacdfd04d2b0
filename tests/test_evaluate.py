import contextlib
import io
import json
import math
import time

import numpy as np
import pytest
import torch
from conftest import ARCHS, SIZE_FLAGS, SIZES, changed, finish
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.models import get_model_weights

import data
import evaluate
import models

CPU = torch.device("cpu")
MASKS = models.build_detector("maskrcnn")  # for whose kinds of results a ValSet is made ready
BOTH = ("bbox", "segm")


def plain_figures(annotation_file, results, kind):
    """The figures as pycocotools' own documentation has them: one process, all images, files only."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(annotation_file))
        evaluation = COCOeval(coco, coco.loadRes(str(results)), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


def encode(mask):
    """A mask (h, w) as pycocotools encodes it by itself, ready for JSON."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def random_results(coco, seed=0):
    """Results near the annotations of most images, scores tied now and then, and some junk."""
    rng, results = np.random.default_rng(seed), []
    for image_id in coco.getImgIds():
        image = coco.imgs[image_id]
        for annotation in coco.imgToAnns[image_id] if image_id % 5 else []:
            for _ in range(rng.integers(2, 24)):
                x, y, w, h = np.array(annotation["bbox"]) + rng.normal(0, 6, 4)
                x, y = max(x, 0), max(y, 0)
                w, h = max(min(w, image["width"] - x), 2), max(min(h, image["height"] - y), 2)
                near = rng.random() < 0.8
                mask = np.zeros((image["height"], image["width"]))
                mask[int(y) : int(y + h), int(x) : int(x + w)] = 1
                results.append({
                    "image_id": image_id, "bbox": [x, y, w, h], "segmentation": encode(mask),
                    "category_id": annotation["category_id"] if near else int(rng.integers(1, 91)),
                    "score": round(float(rng.random()), 1)})
    return results


def test_detections_become_the_results_of_torchvision_and_pycocotools():
    """Boxes anywhere, then: all, the top, whole columns, the last row, nothing."""
    torch.manual_seed(0)
    detector, resized, original = models.build_detector("maskrcnn"), (106, 76), (53, 38)
    h, w = resized
    boxes = torch.cat([torch.rand(60, 2) * torch.tensor([60, 88]), torch.rand(60, 2) * 80], 1)
    boxes[:, 2:] = torch.minimum(boxes[:, :2] + boxes[:, 2:], torch.tensor([w, h]))
    boxes = torch.cat([boxes, torch.tensor(
        [[0, 0, w, h], [0, 0, w, 18], [10, 0, 18, h], [0, h - 2, w, h], [3, 3, 3, 3]])])
    n = len(boxes)
    found = {"boxes": boxes, "labels": torch.arange(1, n + 1), "scores": torch.rand(n),
             "masks": torch.rand(n, 1, 28, 28)}
    found["masks"][60:64] = torch.tensor([1, 1, 0.9, 1]).reshape(4, 1, 1, 1)  # to the very edges
    found["masks"][7] = 0
    wanted = detector.transform.postprocess([dict(found)], [resized], [original])[0]
    results = evaluate.to_coco(42, detector, dict(found), resized, original)
    assert len(results) == n
    for i, result in enumerate(results):
        assert (result["image_id"], result["category_id"]) == (42, i + 1)
        assert result["score"] == found["scores"][i].item()
        x0, y0, x1, y1 = wanted["boxes"][i]
        assert result["bbox"] == [x0.item(), y0.item(), (x1 - x0).item(), (y1 - y0).item()]
        assert result["segmentation"] == encode(wanted["masks"][i, 0] > 0.5)
    areas = coco_mask.area([result["segmentation"] for result in results])
    assert areas[7] == 0 and areas[60] > 0.9 * 53 * 38 and 0 < areas[0] < 53 * 38
    json.dumps(results)
    nothing = {key: value[:0] for key, value in found.items()}
    assert evaluate.to_coco(42, detector, nothing, resized, original) == []


@pytest.mark.parametrize("arch", ARCHS)
def test_results_are_those_of_the_plain_detector(arch, dataset, teachers):
    """Detection for detection those of torchvision's own forward, boxes and masks one by one."""
    teacher = models.load_teacher(arch, teachers[arch], **SIZES)
    val = evaluate.ValSet(dataset, teacher, 5)
    _, results, sent = evaluate.evaluate(teacher, val, CPU, 0, "")
    assert sent.size == 0
    wanted = []
    for image_id, name in zip(val.index.id.tolist(), val.index.name):
        with torch.inference_mode():
            output = teacher([data.read_image(dataset / "val2017" / name) / 255])[0]
        for i, (x0, y0, x1, y1) in enumerate(output["boxes"]):
            wanted.append({"image_id": image_id, "category_id": output["labels"][i].item(),
                           "bbox": [x0.item(), y0.item(), (x1 - x0).item(), (y1 - y0).item()],
                           "score": output["scores"][i].item()})
            if "masks" in output:
                wanted[-1]["segmentation"] = encode(output["masks"][i, 0] > 0.5)
    assert results == wanted and len(results) > 30


@pytest.mark.parametrize("kind", BOTH)
def test_figures_are_those_of_plain_pycocotools(dataset, tmp_path, kind):
    val = evaluate.ValSet(dataset, MASKS)
    results = random_results(val.coco)
    assert len(results) > 200 and len({r["image_id"] for r in results}) < len(val.index)
    figures = evaluate.coco_figures(val.coco, results, val.index.id.tolist(), kind)
    drop = {"bbox": "segmentation", "segm": "bbox"}[kind]
    (tmp_path / "results.json").write_text(
        json.dumps([{k: v for k, v in r.items() if k != drop} for r in results]))
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
    val = evaluate.ValSet(own_dataset, MASKS)
    results = random_results(val.coco)
    (tmp_path / "results.json").write_text(json.dumps(evaluate.results_of_kind(results, "bbox")))
    common = (val.coco, results, val.index.id.tolist(), "bbox")
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


def test_a_detector_that_finds_nothing_scores_zero(dataset, teachers, monkeypatch):
    teacher = models.load_teacher("fasterrcnn", teachers["fasterrcnn"], **SIZES)
    teacher.roi_heads.score_thresh = 1.0
    val = evaluate.ValSet(dataset, teacher)
    figures, results, _ = evaluate.evaluate(teacher, val, CPU, 0, "")
    assert results == [] and list(figures) == ["bbox"] and set(figures["bbox"]) <= {0.0, -1.0}
    assert figures["bbox"][0] == 0


def test_results_of_four_images_at_a_time_are_made_beside_the_detector(dataset, monkeypatch):
    """While the detector, which takes no time here, sees a fifth; more would fill the memory."""
    detector, waiting, most = models.build_detector("fasterrcnn", **SIZES), [], []
    val = evaluate.ValSet(dataset, detector)

    def to_coco(image_id, *_):
        time.sleep(0.3 + 0.1 * (image_id % 3))
        waiting.pop()
        return [{"image_id": image_id, "category_id": 1, "bbox": [1, 1, 9, 9], "score": 0.5}]

    monkeypatch.setattr(evaluate, "to_coco", to_coco)
    monkeypatch.setattr(models, "detect", lambda *_: waiting.append(0) or most.append(
        len(waiting)) or ({}, (1, 1), (1, 1)))
    _, results, _ = evaluate.evaluate(detector, val, CPU, 0, "")
    assert [r["image_id"] for r in results] == val.index.id.tolist() and max(most) == 5


def run_evaluate(dataset, checkpoints, *flags, processes=None):
    run = finish(evaluate.main, "--ckpt", checkpoints["maskrcnn"], "--data-dir", dataset,
                 *SIZE_FLAGS, *flags, processes=processes)
    return json.loads(run.out.splitlines()[-1]), run.out


@pytest.mark.parametrize("arch", ARCHS)
def test_the_teacher_agrees_with_itself(arch, dataset, teachers):
    teacher = models.load_teacher(arch, teachers[arch], **SIZES)
    val = evaluate.ValSet(dataset, teacher, 4)
    _, results, _ = evaluate.evaluate(teacher, val, CPU, 0, "")
    own = evaluate.agreement(val, results, results)
    assert tuple(own) == val.kinds and all(figures[0] == 1 for figures in own.values())
    moved = [{**r, "bbox": [r["bbox"][0] + 9, *r["bbox"][1:]]} for r in results]
    assert 0 < evaluate.agreement(val, results, moved)["bbox"][0] < 0.9
    uncertain = [{**r, "score": 0.49} for r in results]
    assert evaluate.agreement(val, uncertain, results)["bbox"][0] == -1  # there is nothing to find


def test_pictures_show_what_was_found(dataset, checkpoints, teachers, tmp_path):
    run_evaluate(dataset, checkpoints, "--teacher-ckpt", teachers["maskrcnn"], "--limit-val", 2,
                 "--pictures", tmp_path / "pictures")
    files = sorted((tmp_path / "pictures").iterdir())
    assert len(files) == 2
    for file in files:
        both, bare = data.read_image(file), data.read_image(dataset / "val2017" / file.name)
        assert both.shape == (3, bare.shape[1], 2 * bare.shape[2])
        left, right = both.float().chunk(2, dim=2)
        assert (left - bare).abs().mean() > 10 and (left - right).abs().mean() > 1


def test_the_rate_table_has_the_accuracy_of_torchdistills_quantiser(dataset, checkpoints):
    from torchdistill.common.tensor_util import dequantize_tensor, quantize_tensor
    bits, more = (32, 8, 1), ("--limit-val", 3, "--bits", 32, 8, 1)
    summary, out = run_evaluate(dataset, checkpoints, *more)
    student, _ = models.load_student(checkpoints["maskrcnn"], **SIZES)
    val = evaluate.ValSet(dataset, student, 3)
    torch.set_num_threads(1)  # as in the processes that are run
    for number, row in zip(bits, summary["rate"], strict=True):
        def hook(module, args, z, number=number):
            return dequantize_tensor(quantize_tensor(z, number)) if number < 9 else z

        handle = student.backbone.body.layer1.encoder.register_forward_hook(hook)
        figures, _, _ = evaluate.evaluate(student, val, CPU, 0, "")
        handle.remove()
        assert row["bits"] == number and row["figures"] == figures
        values = row["raw_bytes"] / (4 if number == 32 else 1)
        assert values == summary["rate"][0]["raw_bytes"] / 4 and row["payload_bytes"] > 28
        assert row["head_seconds"] > 0 and row["tail_seconds"] > 0
        assert f"{number:4}{figures['bbox'][0]:9.4f}{figures['segm'][0]:9.4f}" in out
    torch.set_num_threads(2)
    sizes = [row["payload_bytes"] for row in summary["rate"]]
    assert sizes == sorted(sizes, reverse=True)
    assert summary["student"] == summary["rate"][0]["figures"]
    files = [(dataset / "val2017" / name).stat().st_size for name in val.index.name]
    assert summary["rate"][0]["jpeg_bytes"] == pytest.approx(sum(files) / 3)
    head = models.split(student)[0].network
    assert summary["head"] == {
        "parameters": sum(p.numel() for p in head.parameters()),
        "student_parameters": sum(p.numel() for p in student.parameters())}
    shared, _ = run_evaluate(dataset, checkpoints, *more, processes=2)
    for row in [*summary["rate"], *shared["rate"]]:
        del row["head_seconds"], row["tail_seconds"]
    assert shared == summary


def test_command_prints_the_figures_of_teacher_and_student(dataset, checkpoints, teachers):
    figures, out = run_evaluate(
        dataset, checkpoints, "--teacher", "--teacher-ckpt", teachers["maskrcnn"], "--limit-val", 3)
    assert figures["teacher"]["bbox"][0] > 0 and figures["teacher"] != figures["student"]
    numbers = (f"{x:.4f}" for x in figures["teacher"]["bbox"])
    for text in ("published", "0.379", "0.346", "0.369", "0.336", *numbers):
        assert text in out


@pytest.fixture(scope="module")
def figures_of_one_process(dataset, checkpoints):
    return run_evaluate(dataset, checkpoints)[0]


@pytest.mark.parametrize("processes", [2, 5])
def test_figures_are_the_same_on_any_number_of_processes(
        processes, dataset, checkpoints, tmp_path, figures_of_one_process):
    figures, _ = run_evaluate(
        dataset, checkpoints, "--save-detections", tmp_path / "r.json", processes=processes)
    assert figures == figures_of_one_process
    annotation_file = dataset / "annotations" / "instances_val2017.json"
    for kind, file in (("bbox", "r.json"), ("segm", "r.segm.json")):
        assert figures["student"][kind] == plain_figures(annotation_file, tmp_path / file, kind)
    images = [r["image_id"] for r in json.loads((tmp_path / "r.json").read_text())]
    assert images == sorted(images) and len(set(images)) > 1  # in the set's order, whoever saw them


def test_published_figures_are_the_published_ones():
    students = {arch: figures["student"] for arch, figures in evaluate.PUBLISHED.items()}
    assert students == {"fasterrcnn": {"bbox": 0.359}, "maskrcnn": {"bbox": 0.369, "segm": 0.336}}
    for arch, published in evaluate.PUBLISHED.items():
        weights = get_model_weights(f"{arch}_resnet50_fpn").COCO_V1
        metrics = weights.meta["_metrics"]["COCO-val2017"]
        assert math.isclose(published["teacher"]["bbox"], metrics["box_map"] / 100)
        assert math.isclose(published["teacher"].get("segm", 0), metrics.get("mask_map", 0) / 100)
