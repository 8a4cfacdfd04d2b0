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

# Detectors look at few places, since 1,000 take seconds, and find something there.
FEW = {"rpn_post_nms_top_n_test": 40, "box_detections_per_img": 10, "box_score_thresh": 0.0}


@pytest.fixture(autouse=True)
def fast_detectors(monkeypatch, checkpoints):
    """Build detectors with FEW here; with one thread, as in the processes that tests start."""
    for arch in ARCHS:
        assert checkpoints[arch]  # all tests share them, so they are made before
    monkeypatch.setattr(models, "build_detector", partial(models.build_detector, **FEW))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def annotation_file(folder):
    return folder / "annotations" / "instances_val2017.json"


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
    """Return a detector of boxes near most annotations, scores often tied, and of some junk.

    It knows an image by the sum of its pixels, and finds the same in it on every process.
    """
    infos = {data.read_image(val.folder / info.file_name).sum().item(): info for info in val.images}

    def predict(image):
        info = infos[(image * 255).round().byte().sum().item()]
        rng = np.random.default_rng(info.id)
        annotations = val.coco.imgToAnns[info.id] if info.id % 5 else []
        annotations = [a for a in annotations for _ in range(rng.integers(2, 12))]
        boxes = torch.tensor([a["bbox"] for a in annotations]).reshape(-1, 4)
        boxes = (boxes + torch.from_numpy(rng.normal(0, 6, boxes.shape))).clamp(min=2)
        boxes[:, 2:] += boxes[:, :2]
        masks = torch.full((len(boxes), 1, info.height, info.width), 0.5)  # is not above a half
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.int()):
            mask[:, y0:y1, x0:x1] = 1
        labels = [a["category_id"] if rng.random() < 0.8 else rng.integers(1, 91)
                  for a in annotations]
        return {"boxes": boxes, "labels": torch.tensor(labels), "masks": masks,
                "scores": torch.from_numpy(rng.random(len(boxes)).round(1))}

    return predict


# ---- results and metrics -------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_results_are_those_of_the_plain_detector(arch, dataset, teachers):
    """Detection for detection those of torchvision's own forward, boxes and masks one by one."""
    teacher = models.load_teacher(arch, teachers[arch], **SIZES)
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

    edit_json(annotation_file(own_dataset), spread)
    file = tmp_path / "r.json"
    job = finish(evaluate_random_results, own_dataset, file, world_size=processes)
    printed = [json.loads(line) for line in job.out.splitlines() if line.startswith("{")]
    for iou_type, saved in (("bbox", file), ("segm", file.with_suffix(".segm.json"))):
        wanted = plain_metrics(annotation_file(own_dataset), saved, iou_type, limit=9)
        assert [metrics[iou_type] for metrics in printed] == [wanted] * processes
        assert 0.05 < wanted["AP"] < 0.9
        results = json.loads(saved.read_text())
        assert all(("bbox" in result) == (iou_type == "bbox") for result in results)
    assert len({str(result) for result in results}) == len(results)  # nothing was found twice
    ids = [result["image_id"] for result in results]
    assert ids == sorted(ids) and len(set(ids)) == 8  # in the set's order, whoever had them


def test_a_detector_agrees_with_itself_and_less_with_others(dataset):
    val = evaluate.ValSet(dataset, models.build_detector("maskrcnn"))
    _, results = evaluate.evaluate(random_predict(val), val, CPU)
    before = json.dumps(results)
    own = evaluate.agreement(val, results, results)
    assert own["bbox"]["AP"] == own["segm"]["AP"] == 1
    assert evaluate.agreement(val, [], results)["segm"]["AP"] == 0
    moved = [{**r, "bbox": [r["bbox"][0] + 9, *r["bbox"][1:]]} for r in results]
    assert 0 < evaluate.agreement(val, moved, results)["bbox"]["AP"] < 0.9
    empty = encode(np.zeros((9, 9)))
    for change in ({"score": 0.49}, {"bbox": [5, 5, 0, 9], "segmentation": empty}):
        metrics = evaluate.agreement(val, results, [{**r, **change} for r in results])
        assert metrics["bbox"]["AP"] == metrics["segm"]["AP"] == -1  # there is nothing to find
    assert json.dumps(results) == before  # loadRes writes into what it gets


# ---- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [SIZES, {"min_size": 330, "max_size": 330}])
def test_a_jpeg_row_is_the_teacher_on_what_pillow_recompresses(
        sizes, dataset, teachers, monkeypatch):
    """And what it finds in a resized photo is in the pixels of the whole one, as torchvision's."""
    teacher = models.load_teacher("maskrcnn", teachers["maskrcnn"], **sizes)
    val, photos, found, file_sizes = evaluate.ValSet(dataset, teacher, 2), [], [], []
    monkeypatch.setattr(evaluate, "to_coco", lambda _, detections: found.append(detections) or [])
    hook = teacher.transform.register_forward_pre_hook(lambda module, args: photos.extend(args[0]))
    row = evaluate.measure_jpeg(teacher, 30, val, CPU, workers=0)
    hook.remove()
    for info, photo, detections in zip(val.images, photos, found, strict=True):
        picture = Image.open(val.folder / info.file_name).convert("RGB")
        if sizes == SIZES:
            scale = min(96 / min(picture.size), 160 / max(picture.size))
            size = [round(scale * side) for side in picture.size]
            picture = picture.resize(size, Image.Resampling.BILINEAR)
            [resized] = teacher.transform([photo])[0].image_sizes
            assert scale < 1 and list(resized) == size[::-1]  # the transform resizes no more
        picture.save(file := io.BytesIO(), "JPEG", quality=30, optimize=True)
        file_sizes.append(len(file.getvalue()))
        assert torch.equal(photo, pil_to_tensor(Image.open(file)) / 255)
        with torch.inference_mode():
            [wanted] = teacher([photo])
        zoom = torch.tensor([info.width / picture.width, info.height / picture.height] * 2)
        assert torch.allclose(detections["boxes"], wanted["boxes"] * zoom)
        assert all(torch.equal(detections[name], wanted[name]) for name in ("labels", "scores"))
        assert detections["masks"].shape == (10, 1, info.height, info.width)
        assert sizes == SIZES or torch.equal(detections["masks"], wanted["masks"])
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
        assert row["head_seconds"] > 0 and row["tail_seconds"] > 0
        head, _ = models.split(student, bits)
        payloads = [head.compress(data.read_image(path) / 255) for path in paths]
        assert row["payload_bytes"] == sum(map(len, payloads)) / 2
    weights = sum(parameter.numel() for parameter in student.parameters())
    assert summary["head"] == {"parameters": 158_400, "student_parameters": weights}
    assert summary["file_bytes"] == sum(path.stat().st_size for path in paths) / 2
    for sent in ("student, 8-bit", "student, 1-bit", "teacher, JPEG 50"):
        assert f"\n{sent:18} AP bbox 0." in out
    job = finish(main_with_fast_detectors, *flags, world_size=2)
    shared = json.loads(job.out.splitlines()[-1])
    for row in [*summary["rate"], *shared["rate"]]:
        del row["head_seconds"], row["tail_seconds"]
    assert shared == summary


def test_teacher_and_student_are_printed_and_drawn(dataset, tmp_path, flags, call, monkeypatch):
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", Mock())
    pictures, file = tmp_path / "pictures", tmp_path / "r.json"
    _, out, _ = call(evaluate.main, *flags(
        "maskrcnn", "--limit-val", 1, "--pictures", pictures, "--save-detections", file))
    summary = json.loads(out.splitlines()[-1])
    assert list(summary)[:3] == ["teacher", "student", "agreement"]
    assert "not the teacher" not in out and "published AP" not in out
    assert all(f"{x:.4f}" in out for x in summary["agreement"]["segm"].values())
    for iou_type, saved in (("bbox", file), ("segm", file.with_suffix(".segm.json"))):
        wanted = plain_metrics(annotation_file(dataset), saved, iou_type, limit=1)
        assert summary["student"][iou_type] == wanted and len(json.loads(saved.read_text())) == 10
    picture = Image.open(pictures / "compared_1.jpg")
    bare = Image.open(dataset / "val2017" / "000000000001.jpg")
    zoom = picture.height // bare.height
    assert picture.size == (zoom * 3 * bare.width, zoom * bare.height)
    texts = [call.args[1] for call in ImageDraw.ImageDraw.text.call_args_list]
    annotations, teacher, student = map(texts.index, ("annotations", "teacher", "student"))
    assert 0 < annotations < teacher - 1
    assert student == teacher + 1  # untrained, it is sure of nothing


def test_a_failure_in_the_last_pass_leaves_what_was_finished(tmp_path, flags, call, monkeypatch):
    def predictor(student):
        return lambda image: {"boxes": torch.tensor([[5, 5, 9, 9]]), "labels": torch.tensor([2]),
                              "scores": torch.tensor([0.5])}

    failing = Mock(side_effect=InputError("the disk is gone"))
    monkeypatch.setattr(evaluate, "measure_jpeg", failing)
    flags = flags("fasterrcnn", "--limit-val", 1, "--bits", 4, "--jpeg", 50)
    status, out, err = call(evaluate.main, *flags, "--save-detections", tmp_path / "r.json",
                            predictor=predictor)
    assert status == 1 and err == "evaluate.py: error: the disk is gone\n"
    assert "agreement bbox" in out
    assert out.splitlines()[-1].startswith("student, 4-bit     AP bbox 0.")
    assert json.loads((tmp_path / "r.json").read_text()) == [
        {"image_id": 1, "category_id": 2, "bbox": [5, 5, 4, 4], "score": 0.5}]


def test_teacher_eps_alone_is_not_ignored(flags, call):
    status, _, err = call(evaluate.main, *flags("fasterrcnn")[:-2], "--teacher-eps", 1e-5)
    assert status == 1 and "--teacher-eps is for the weights in --teacher-ckpt" in err


@pytest.mark.parametrize("name", "ckpt data_dir teacher_ckpt save_detections pictures".split())
def test_a_tilde_in_a_path_is_the_home_folder(name, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    args = evaluate.parse_args(["--ckpt=x", f"--{name.replace('_', '-')}=~/sub/x"])
    assert getattr(args, name) == Path("/home/me/sub/x")


@pytest.mark.parametrize("name, text", [
    ("Füchse", "Füchse 0.75"), ("猫", "category 3 0.75"), ("", "category 3 0.75")])
def test_names_in_pictures_are_those_that_the_font_can_draw(name, text, monkeypatch):
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", Mock())
    val = Mock(iou_types=("bbox",), coco=Mock(cats={3: {"name": name}}))
    result = {"category_id": 3, "bbox": [2, 2, 9, 9], "score": 0.75}
    evaluate.draw_panel(torch.zeros(3, 30, 40, dtype=torch.uint8), [result], "title", val)
    texts = [call.args[1] for call in ImageDraw.ImageDraw.text.call_args_list]
    assert texts == [text, "title"]


@pytest.mark.parametrize("arch, text", [
    ("fasterrcnn", "published AP: teacher bbox 0.370, student bbox 0.359"),
    ("maskrcnn", "published AP: teacher bbox 0.379, segm 0.346, student bbox 0.369, segm 0.336")])
def test_published_figures_are_printed_for_cocos_val2017_alone(
        arch, text, tmp_path, call, monkeypatch):
    student = models.build_student(models.build_detector(arch))
    metrics = {"bbox": dict.fromkeys(evaluate.METRICS, 0.5)}
    monkeypatch.setattr(models, "load_student", lambda *args: (student, {"arch": arch} | SIZES))
    monkeypatch.setattr(evaluate, "evaluate", lambda *args: (metrics, []))
    (tmp_path / "x").touch()
    for images, classes in ((5000, 91), (4999, 91), (5001, 91), (5000, 90)):
        is_coco = (images, classes) == (5000, 91)
        val = Mock(images=images * [data.ImageInfo(1, "x", 9, 9)], folder=tmp_path, classes=classes)
        monkeypatch.setattr(evaluate, "ValSet", lambda *args: val)
        _, out, _ = call(evaluate.main, "--ckpt", "x", "--device", "cpu", "--workers", 0)
        assert (text in out.splitlines()) == ("published" in out) == is_coco
        summary = json.loads(out.splitlines()[-1])
        assert list(summary) == ["student", "file_bytes", "rate", "jpeg", "head"]
