import contextlib
import io
import json
import sys
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ARCHS, CPU, SIZE_FLAGS, SIZES, edit_json, encode
from PIL import Image, ImageDraw
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.transforms.functional import pil_to_tensor

import data
import distributed
import evaluate
import models
from distributed import InputError

VAL = "annotations/instances_val2017.json"
# Detectors look at few places, since 1,000 take seconds, and find something there.
FEW = {"box_detections_per_img": 10, "box_score_thresh": 0.0}


@pytest.fixture(scope="module", autouse=True)
def fast_detectors(checkpoints):
    """Build detectors with FEW here; all tests share the checkpoints, so they are made before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "build_detector", partial(models.build_detector, **FEW))
        yield


@pytest.fixture(scope="module")
def loaded(teachers, fast_detectors):
    """For each architecture, its teacher."""
    return {arch: models.load_teacher(arch, teachers[arch], **SIZES) for arch in ARCHS}


def plain_metrics(annotation_file, results, iou_type, limit=None):
    """The metrics as pycocotools' own documentation has them: one process, files only."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(annotation_file))
        evaluation = COCOeval(coco, coco.loadRes(str(results)), iou_type)
        evaluation.params.imgIds = sorted(coco.getImgIds())[:limit]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(evaluate.METRICS, evaluation.stats.tolist()))


def random_predict(val):
    """Return a detector of boxes near most annotations; it knows an image by its size."""
    infos = {(info.height, info.width): info for info in val.images}

    def predict(image):
        info = infos[image.shape[1:]]
        rng = np.random.default_rng(info.id)
        annotations = info.id % 5 * val.coco.imgToAnns[info.id]  # of every 5th image none
        boxes = torch.tensor([a["bbox"] for a in annotations]).reshape(-1, 4)
        boxes = (boxes + torch.from_numpy(rng.normal(0, 6, boxes.shape))).clamp(min=2)
        boxes[:, 2:] += boxes[:, :2]
        masks = torch.full((len(boxes), 1, info.height, info.width), 0.5)  # is not above a half
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.int()):
            mask[:, y0:y1, x0:x1] = 1
        labels = torch.tensor([a["category_id"] for a in annotations])
        scores = torch.from_numpy(rng.random(len(boxes)).round(1))
        return {"boxes": boxes, "labels": labels, "scores": scores, "masks": masks}

    return predict


# ---- results and metrics -------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_results_are_those_of_the_plain_detector(arch, dataset, loaded):
    """Detection for detection those of torchvision's own forward, boxes and masks one by one."""
    teacher = loaded[arch]
    val = evaluate.ValSet(dataset, teacher, 2)
    _, results = evaluate.evaluate(evaluate.whole(teacher), val, CPU)
    wanted = []
    for info in val.images:
        with torch.inference_mode():
            output = teacher([data.read_image(val.folder / info.file_name) / 255])[0]
        for i, (x0, y0, x1, y1) in enumerate(output["boxes"]):
            wanted.append({"image_id": info.id, "category_id": output["labels"][i].item(),
                           "bbox": [x0.item(), y0.item(), (x1 - x0).item(), (y1 - y0).item()],
                           "score": output["scores"][i].item()})
            if "masks" in output:
                wanted[-1]["segmentation"] = encode(output["masks"][i, 0] > 0.5)
    assert results == wanted and len(results) == 20


def evaluate_random_results():
    """Print metrics of random_predict, and save its results; the command line names both places."""
    distributed.set_up("cpu")
    data_dir, file = map(Path, sys.argv[1:])
    val = evaluate.ValSet(data_dir, models.build_detector("maskrcnn"), limit=9)
    metrics, results = evaluate.evaluate(random_predict(val), val, CPU)
    distributed.on_main(evaluate.save_detections, results, val.iou_types, file)
    print(f"{json.dumps(metrics)}\n", end="", flush=True)


@pytest.mark.parametrize("processes", [1, 5])
def test_metrics_are_those_of_plain_pycocotools(processes, own_dataset, tmp_path, finish):
    """The order of categories counts: it decides how the means over 80 of them are rounded."""
    def spread(content):
        content["categories"] = [{"id": i, "name": str(i)} for i in range(80, 0, -1)]
        for i, annotation in enumerate(content["annotations"] * 3):
            content["annotations"] += [annotation | {"id": i + 1000, "category_id": 1 + i % 80}]

    edit_json(own_dataset / VAL, spread)
    file = tmp_path / "r.json"
    job = finish(evaluate_random_results, own_dataset, file, world_size=processes)
    printed = [json.loads(line) for line in job.out.splitlines() if line.startswith("{")]
    for iou_type, saved in (("bbox", file), ("segm", file.with_suffix(".segm.json"))):
        wanted = plain_metrics(own_dataset / VAL, saved, iou_type, limit=9)
        assert [metrics[iou_type] for metrics in printed] == [wanted] * processes
        assert 0.05 < wanted["AP"] < 0.9
        results = json.loads(saved.read_text())
        assert all(("bbox" in result) == (iou_type == "bbox") for result in results)
    assert len({str(result) for result in results}) == len(results)  # nothing was found twice
    ids = [result["image_id"] for result in results]
    assert ids == sorted(ids) and len(set(ids)) == 8  # in the set's order, whoever had them


def test_a_detector_agrees_with_itself_and_not_with_others(dataset, loaded):
    val = evaluate.ValSet(dataset, loaded["maskrcnn"])
    _, results = evaluate.evaluate(random_predict(val), val, CPU)
    before = json.dumps(results)
    own = evaluate.agreement(val, results, results)
    assert own["bbox"]["AP"] == own["segm"]["AP"] == 1
    assert evaluate.agreement(val, [], results)["segm"]["AP"] == 0
    empty = encode(np.zeros((9, 9)))
    for change in ({"score": 0.49}, {"bbox": [5, 5, 0, 9], "segmentation": empty}):
        metrics = evaluate.agreement(val, results, [{**r, **change} for r in results])
        assert metrics["bbox"]["AP"] == metrics["segm"]["AP"] == -1  # there is nothing to find
    assert json.dumps(results) == before  # loadRes writes into what it gets


# ---- the command ---------------------------------------------------------------------------------


def test_a_jpeg_row_is_the_teacher_on_what_pillow_recompresses(dataset, loaded, monkeypatch):
    """And what it finds in a photo that was resized is scaled to the whole one."""
    teacher = loaded["fasterrcnn"]
    monkeypatch.setattr(teacher.transform, "min_size", (200,))
    monkeypatch.setattr(teacher.transform, "max_size", 250)
    val, photos, found, file_sizes = evaluate.ValSet(dataset, teacher, 3), [], [], []
    monkeypatch.setattr(evaluate, "to_coco", lambda _, detections: found.append(detections) or [])
    hook = teacher.transform.register_forward_pre_hook(lambda module, args: photos.extend(args[0]))
    row = evaluate.measure_jpeg(teacher, 30, val, CPU, workers=0)
    hook.remove()
    for info, photo, detections in zip(val.images, photos, found, strict=True):
        picture = Image.open(val.folder / info.file_name).convert("RGB")
        scale = min(1, 200 / min(picture.size), 250 / max(picture.size))
        size = [round(scale * side) for side in picture.size]
        picture = picture.resize(size, Image.Resampling.BILINEAR)
        picture.save(file := io.BytesIO(), "JPEG", quality=30, optimize=True)
        file_sizes.append(len(file.getvalue()))
        assert torch.equal(photo, pil_to_tensor(Image.open(file)) / 255)
        with torch.inference_mode():
            [wanted] = teacher([photo])
        zoom = torch.tensor([info.width / picture.width, info.height / picture.height] * 2)
        assert torch.allclose(detections["boxes"], wanted["boxes"] * zoom)
        assert all(torch.equal(detections[name], wanted[name]) for name in ("labels", "scores"))
    assert photos[0].shape[2] == 206 and photos[2].shape[2] == 214  # resized from 307, and whole
    assert row["payload_bytes"] == np.mean(file_sizes) and row["quality"] == 30


@pytest.fixture
def flags(dataset, checkpoints, teachers):
    """A function that returns the flags for an architecture, and others."""
    return lambda arch, *others: [
        "--ckpt", checkpoints[arch], "--data-dir", dataset, *SIZE_FLAGS,
        "--teacher-ckpt", teachers[arch], *others]


def main_with_fast_detectors():
    models.build_detector = partial(models.build_detector, **FEW)
    evaluate.main()


def test_rates_have_the_accuracy_of_torchdistills_quantizer_on_1_and_2_processes(
        dataset, checkpoints, flags, call, finish):
    from torchdistill.common.tensor_util import dequantize_tensor, quantize_tensor
    flags = flags("fasterrcnn", "--limit-val", 2, "--bits", 8, 1, "--jpeg", 50)
    _, out, _ = call(evaluate.main, *flags)
    summary = json.loads(out.splitlines()[-1])
    student, _ = models.load_student(checkpoints["fasterrcnn"], **SIZES)
    val = evaluate.ValSet(dataset, models.to_device(student, CPU), 2)
    paths = [val.folder / info.file_name for info in val.images]
    for bits, row in zip((8, 1), summary["rate"], strict=True):
        hook = student.backbone.body.layer1.encoder.register_forward_hook(
            lambda module, args, z, bits=bits: dequantize_tensor(quantize_tensor(z, bits)))
        metrics, _ = evaluate.evaluate(evaluate.whole(student), val, CPU)
        hook.remove()
        assert row["bits"] == bits and row["metrics"] == metrics
        head, _ = models.split(student, bits)
        payloads = [head.compress(data.read_image(path) / 255) for path in paths]
        assert row["payload_bytes"] == sum(map(len, payloads)) / 2
    assert summary["head"]["parameters"] == 158_400
    assert summary["file_bytes"] == sum(path.stat().st_size for path in paths) / 2
    job = finish(main_with_fast_detectors, *flags, world_size=2)
    shared = json.loads(job.out.splitlines()[-1])
    for row in [*summary["rate"], *shared["rate"]]:
        del row["head_seconds"], row["tail_seconds"]
    assert shared == summary


def test_teacher_and_student_are_printed_and_drawn(dataset, tmp_path, flags, call, monkeypatch):
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", Mock())
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "r.json"
    _, out, _ = call(evaluate.main, *flags(
        "maskrcnn", "--limit-val", 1, "--pictures", "~/pictures", "--save-detections", "~/r.json"))
    summary = json.loads(out.splitlines()[-1])
    assert "not the teacher" not in out and "published" not in out
    assert all(f"{x:.4f}" in out for x in summary["agreement"]["segm"].values())
    for iou_type, saved in (("bbox", file), ("segm", file.with_suffix(".segm.json"))):
        wanted = plain_metrics(dataset / VAL, saved, iou_type, limit=1)
        assert summary["student"][iou_type] == wanted and len(json.loads(saved.read_text())) == 10
    picture = Image.open(tmp_path / "pictures" / "compared_1.jpg")
    assert picture.size == (3 * 2 * 307, 2 * 298)  # enlarged
    texts = [call.args[1] for call in ImageDraw.ImageDraw.text.call_args_list]
    annotations, teacher, student = map(texts.index, ("annotations", "teacher", "student"))
    assert 0 < annotations < teacher - 1
    assert student == teacher + 1  # untrained, it is sure of nothing


def test_a_failure_in_the_last_pass_leaves_what_was_finished(tmp_path, flags, call, monkeypatch):
    found = {"boxes": torch.tensor([[5, 5, 9, 9]]), "labels": torch.tensor([2]),
             "scores": torch.tensor([0.5])}
    monkeypatch.setattr(evaluate, "measure_jpeg", Mock(side_effect=InputError("no disk")))
    flags = flags("fasterrcnn", "--limit-val", 1, "--bits", 4, "--jpeg", 50)
    status, out, err = call(evaluate.main, *flags, "--save-detections", tmp_path / "r.json",
                            predictor=lambda student: lambda image: found)
    assert status == 1 and err == "evaluate.py: error: no disk\n"
    assert "agreement bbox" in out
    assert out.splitlines()[-1].startswith("student, 4-bit     AP bbox 0.")
    assert json.loads((tmp_path / "r.json").read_text()) == [
        {"image_id": 1, "category_id": 2, "bbox": [5, 5, 4, 4], "score": 0.5}]


def test_teacher_eps_alone_is_not_ignored(flags, call):
    status, _, err = call(evaluate.main, *flags("fasterrcnn")[:-2], "--teacher-eps", 1e-5)
    assert status == 1 and "--teacher-eps is for the weights in --teacher-ckpt" in err


def test_names_in_pictures_are_those_that_the_font_can_draw(monkeypatch):
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", Mock())
    categories = {3: {"name": "Füchse"}, 4: {"name": "猫"}, 5: {"name": ""}}
    val = Mock(iou_types=("bbox",), coco=Mock(cats=categories))
    results = [{"category_id": i, "bbox": [2, 2, 9, 9], "score": 0.75} for i in categories]
    evaluate.draw_panel(torch.zeros(3, 30, 40, dtype=torch.uint8), results, "title", val)
    texts = [call.args[1] for call in ImageDraw.ImageDraw.text.call_args_list]
    assert texts == ["Füchse 0.75", "category 4 0.75", "category 5 0.75", "title"]
