import contextlib
import io
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ARCHS, CPU, SIZE_FLAGS, SIZES, edit_json, encode
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.models import get_model_weights

import data
import distributed
import evaluate
import models


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
                is_near = rng.random() < 0.8
                mask = np.zeros((image["height"], image["width"]))
                mask[int(y):int(y + h), int(x):int(x + w)] = 1
                results.append({
                    "image_id": image_id, "bbox": [x, y, w, h], "segmentation": encode(mask),
                    "category_id": annotation["category_id"] if is_near else int(rng.integers(1, 91)),
                    "score": round(float(rng.random()), 1)})
    return results


@pytest.fixture(scope="module")
def val(dataset):
    """A ValSet for boxes and masks."""
    return evaluate.ValSet(dataset, models.build_detector("maskrcnn"))


# ---- results -------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_results_are_those_of_the_plain_detector(arch, dataset, teachers):
    """Detection for detection those of torchvision's own forward, boxes and masks one by one."""
    teacher = models.load_teacher(arch, teachers[arch], **SIZES)
    val = evaluate.ValSet(dataset, teacher, 3)
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
    assert results == wanted and len(results) > 30


def test_masks_are_cut_at_a_half_and_encoded_one_by_one():
    masks = torch.rand(7, 1, 53, 38, generator=torch.Generator().manual_seed(0))
    masks[3] = 0
    masks[4] = 0.5  # is not above it
    masks[5] = 1
    detections = {"boxes": torch.rand(7, 4), "labels": torch.arange(1, 8),
                  "scores": torch.rand(7), "masks": masks}
    results = evaluate.to_coco(42, detections)
    assert [r["segmentation"] for r in results] == [encode(mask > 0.5) for mask in masks[:, 0]]
    areas = coco_mask.area([r["segmentation"] for r in results]).tolist()
    assert areas[3:6] == [0, 0, 53 * 38] and 0 < areas[0] < 53 * 38
    json.dumps(results)
    assert evaluate.to_coco(42, {name: values[:0] for name, values in detections.items()}) == []


# ---- metrics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_metrics_are_those_of_plain_pycocotools(dataset, val, tmp_path, iou_type):
    results = random_results(val.coco)
    assert len(results) > 100 and len({r["image_id"] for r in results}) < len(val.images)
    metrics = evaluate.coco_metrics(
        val.coco, results, [info.id for info in val.images], iou_type)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(evaluate.results_of_type(results, iou_type)))
    assert metrics == plain_metrics(annotation_file(dataset), path, iou_type)
    assert 0.1 < metrics["AP"] < 0.9 and tuple(metrics) == evaluate.METRICS


def metrics_of_80_categories():
    """Print coco_metrics of random results; the command line names the data set."""
    distributed.set_up("cpu")
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(sys.argv[1])
    image_ids = sorted(coco.getImgIds())
    metrics = evaluate.coco_metrics(coco, random_results(coco), image_ids, "bbox")
    distributed.write_line(sys.stdout, json.dumps(metrics))


def test_categories_shared_out_give_the_very_same_metrics(own_dataset, tmp_path, finish):
    """Their order counts: it decides how the means over 80 of them are rounded."""
    path = annotation_file(own_dataset)

    def spread(content):
        content["categories"] = [{"id": i, "name": str(i)} for i in range(80, 0, -1)]
        for i, annotation in enumerate(content["annotations"] * 3):
            content["annotations"] += [annotation | {"id": i + 1000, "category_id": 1 + i % 80}]

    edit_json(path, spread)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(path)
    results = tmp_path / "results.json"
    results.write_text(json.dumps(evaluate.results_of_type(random_results(coco), "bbox")))
    wanted = plain_metrics(path, results, "bbox")
    job = finish(metrics_of_80_categories, path, world_size=3)
    assert [json.loads(line) for line in job.out.splitlines()] == [wanted] * 3
    assert 0.05 < wanted["AP"] < 0.9


def test_a_detector_that_finds_nothing_scores_zero(val):
    def predict(image):
        return {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "scores": torch.zeros(0)}

    metrics, results = evaluate.evaluate(predict, val, CPU)
    assert results == [] and list(metrics) == ["bbox", "segm"] and metrics["bbox"]["AP"] == 0
    assert set(metrics["bbox"].values()) <= {0.0, -1.0}


@pytest.mark.parametrize("arch", ARCHS)
def test_the_teacher_agrees_with_itself(arch, dataset, teachers):
    teacher = models.load_teacher(arch, teachers[arch], **SIZES)
    val = evaluate.ValSet(dataset, teacher, 4)
    _, results = evaluate.evaluate(evaluate.whole(teacher), val, CPU)
    before = json.dumps(results)
    own = evaluate.agreement(val, results, results)
    assert tuple(own) == val.iou_types and all(values["AP"] == 1 for values in own.values())
    moved = [{**r, "bbox": [r["bbox"][0] + 9, *r["bbox"][1:]]} for r in results]
    assert 0 < evaluate.agreement(val, moved, results)["bbox"]["AP"] < 0.9
    uncertain = [{**r, "score": 0.49} for r in results]
    assert evaluate.agreement(val, results, uncertain)["bbox"]["AP"] == -1  # there is nothing to find
    flat = [{**r, "bbox": [*r["bbox"][:2], 0, 9]} for r in results]
    assert evaluate.agreement(val, results, flat)["bbox"]["AP"] == -1
    assert json.dumps(results) == before  # loadRes writes into what it gets


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def run_evaluate(dataset, checkpoints, finish):
    """A function that runs the command: (its line of JSON, all that it printed)."""

    def run_evaluate(*flags, arch="maskrcnn", world_size=None):
        job = finish(evaluate.main, "--ckpt", checkpoints[arch], "--data-dir", dataset,
                     *SIZE_FLAGS, *flags, world_size=world_size)
        return json.loads(job.out.splitlines()[-1]), job.out

    return run_evaluate


def test_rates_have_the_accuracy_of_torchdistills_quantizer(
        dataset, checkpoints, teachers, run_evaluate):
    from torchdistill.common.tensor_util import dequantize_tensor, quantize_tensor
    flags = ("--limit-val", 2, "--bits", 8, 1, "--jpeg", 90, 2, "--teacher-ckpt",
             teachers["fasterrcnn"])
    summary, out = run_evaluate(*flags, arch="fasterrcnn")
    assert "AP published" not in out  # of other images
    student, _ = models.load_student(checkpoints["fasterrcnn"], **SIZES)
    models.to_device(student, CPU)
    val = evaluate.ValSet(dataset, student, 2)
    torch.set_num_threads(1)  # as in the processes that are run
    for bits, row in zip((8, 1), summary["rate"], strict=True):
        hook = student.backbone.body.layer1.encoder.register_forward_hook(
            lambda module, args, z, bits=bits: dequantize_tensor(quantize_tensor(z, bits)))
        metrics, _ = evaluate.evaluate(evaluate.whole(student), val, CPU)
        hook.remove()
        assert row["bits"] == bits and row["metrics"] == metrics
        assert row["head_seconds"] > 0 and row["tail_seconds"] > 0
    torch.set_num_threads(2)
    assert "student, 8 bits" in out and "student, 1 bit " in out
    eight, one = summary["rate"]
    assert 26 < one["payload_bytes"] < eight["payload_bytes"] < 3 * 60 * 60
    files = [(val.folder / info.file_name).stat().st_size for info in val.images]
    assert summary["file_bytes"] == pytest.approx(sum(files) / 2)
    assert summary["head"]["parameters"] == 158_400

    fine, coarse, small_fine, small_coarse = summary["jpeg"]
    assert [row["quality"] for row in summary["jpeg"]] == [90, 2, 90, 2]
    assert [row["is_resized"] for row in summary["jpeg"]] == [False, False, True, True]
    # The files were written by Pillow at quality 90 too, but with standard Huffman tables.
    assert 0.8 < fine["payload_bytes"] / summary["file_bytes"] < 0.95
    assert coarse["payload_bytes"] < 0.7 * fine["payload_bytes"]
    assert small_fine["payload_bytes"] < 0.7 * fine["payload_bytes"]
    assert "teacher, resized JPEG 2" in out

    shared, _ = run_evaluate(*flags, arch="fasterrcnn", world_size=2)
    for row in [*summary["rate"], *shared["rate"]]:
        del row["head_seconds"], row["tail_seconds"]
    assert shared == summary


class NoteImages:
    """A teacher that notes its images, and finds one box that is the image."""

    def __init__(self, **sizes):
        self.seen = []
        self.transform = models.build_detector("fasterrcnn", **sizes).transform

    def __call__(self, images):
        self.seen += images
        [(_, height, width)] = [image.shape for image in images]
        return [{"boxes": torch.tensor([[0.0, 0, width, height]]), "labels": torch.tensor([1]),
                 "scores": torch.tensor([0.9]), "masks": torch.ones(1, 1, height, width)}]


@pytest.mark.parametrize("is_resized", [False, True])
def test_the_teacher_gets_what_pillow_recompresses(is_resized, val, monkeypatch):
    """And what it finds in a resized image is told in the pixels of the whole one."""
    teacher, found = NoteImages(**SIZES), []
    monkeypatch.setattr(evaluate, "to_coco", lambda image_id, detections: found.append(detections) or [])
    row = evaluate.measure_jpeg(teacher, 30, is_resized, val, CPU, workers=0)
    sizes = []
    for info, image, detections in zip(val.images, teacher.seen, found, strict=True):
        picture = Image.open(val.folder / info.file_name).convert("RGB")
        if is_resized:
            scale = min(96 / min(picture.size), 160 / max(picture.size))
            picture = picture.resize(
                [round(scale * side) for side in picture.size], Image.Resampling.BILINEAR)
            resized = teacher.transform([torch.zeros(3, picture.height, picture.width)])[0]
            assert resized.image_sizes == [(picture.height, picture.width)]  # it leaves it so
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=30, optimize=True)
        sizes.append(len(file.getvalue()))
        wanted = np.array(Image.open(file)).transpose(2, 0, 1)
        assert torch.equal((image * 255).round().byte(), torch.from_numpy(wanted))
        torch.testing.assert_close(
            detections["boxes"], torch.tensor([[0.0, 0, info.width, info.height]]))
        assert detections["masks"].shape == (1, 1, info.height, info.width)
    assert row["payload_bytes"] == np.mean(sizes) and row["quality"] == 30


@pytest.mark.parametrize("processes", [None, 5])
def test_metrics_are_the_same_on_any_number_of_processes(
        processes, dataset, tmp_path, run_evaluate, one_process):
    summary, _ = run_evaluate("--limit-val", 5, "--save-detections", tmp_path / "r.json",
                              world_size=processes)
    one_process.append(summary)
    assert summary == one_process[0]
    for iou_type, file in (("bbox", "r.json"), ("segm", "r.segm.json")):
        wanted = plain_metrics(annotation_file(dataset), tmp_path / file, iou_type, limit=5)
        assert summary["student"][iou_type] == wanted
    images = [r["image_id"] for r in json.loads((tmp_path / "r.json").read_text())]
    assert images == sorted(images) and len(set(images)) > 1  # in the set's order, whoever saw them


@pytest.fixture(scope="module")
def one_process():
    """What the command gave on one process, and then on others."""
    return []


def test_teacher_student_and_agreement_are_printed_and_drawn(
        dataset, checkpoints, teachers, tmp_path, call, monkeypatch):
    """In pictures of three panels: annotations, teacher, student."""
    monkeypatch.setattr(evaluate, "COCO_VAL_IMAGES", 1)
    content = models.load_checkpoint(checkpoints["maskrcnn"])
    content["config"] = {"bottleneck_channels": 3, "is_recipe": True, **SIZES}
    torch.save(content, tmp_path / "student.pt")
    status, out, err = call(
        evaluate.main, "--ckpt", tmp_path / "student.pt", "--data-dir", dataset, "--device", "cpu",
        "--teacher-ckpt", teachers["maskrcnn"], "--limit-val", 1, "--pictures", tmp_path / "pictures")
    assert status == 0, err
    summary = json.loads(out.splitlines()[-1])
    assert list(summary) == ["teacher", "student", "agreement"]
    assert "not the teacher" not in out
    numbers = (f"{x:.4f}" for x in summary["agreement"]["segm"].values())
    for text in ("AP published", "0.379", "0.346", "0.369", "0.336", *numbers):
        assert text in out
    assert len(list((tmp_path / "pictures").iterdir())) == 1
    for path in (tmp_path / "pictures").iterdir():
        picture = data.read_image(path).float()
        bare = Image.open(dataset / "val2017" / path.name).convert("RGB")
        zoom = picture.shape[1] // bare.height
        assert picture.shape == (3, zoom * bare.height, zoom * 3 * bare.width)
        panels = picture.chunk(3, dim=2)
        for i, j in ((0, 1), (1, 2), (0, 2)):
            assert (panels[i] - panels[j]).abs().mean() > 1


def test_pictures_of_one_stem_in_several_folders(val, tmp_path):
    folders = {"cam1": (255, 0, 0), "cam2": (0, 0, 255)}
    images = []
    for i, (folder, colour) in enumerate(folders.items()):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (40, 30), colour).save(tmp_path / folder / "0001.png")
        images.append(data.ImageInfo(i, f"{folder}/0001.png", 40, 30))
    mine = evaluate.ValSet.__new__(evaluate.ValSet)
    mine.images, mine.folder, mine.iou_types = images, tmp_path, ("bbox",)
    mine.coco = evaluate.make_coco({"images": [], "annotations": [], "categories": []})
    evaluate.draw_pictures(mine, [], [], tmp_path / "pictures")
    for folder, colour in folders.items():
        picture = Image.open(tmp_path / "pictures" / folder / "0001.png.jpg")
        assert np.allclose(picture.getpixel((300, 100)), colour, atol=4)
        assert picture.width == 2 * 15 * 40  # no column of annotations where there are none


def test_published_figures_are_the_published_ones():
    students = {arch: figures["student"] for arch, figures in evaluate.PUBLISHED_AP.items()}
    assert students == {"fasterrcnn": {"bbox": 0.359}, "maskrcnn": {"bbox": 0.369, "segm": 0.336}}
    for arch, published in evaluate.PUBLISHED_AP.items():
        weights = get_model_weights(f"{arch}_resnet50_fpn").COCO_V1
        metrics = weights.meta["_metrics"]["COCO-val2017"]
        assert math.isclose(published["teacher"]["bbox"], metrics["box_map"] / 100)
        assert math.isclose(published["teacher"].get("segm", 0), metrics.get("mask_map", 0) / 100)


def test_published_figures_stand_beside_published_students_only(
        checkpoints, teachers, monkeypatch):
    monkeypatch.setattr(evaluate, "COCO_VAL_IMAGES", 7)
    val, fewer = (SimpleNamespace(images=[None] * images) for images in (7, 6))
    student, config = models.load_student(checkpoints["fasterrcnn"])
    _, other_size = models.load_student(checkpoints["fasterrcnn"], min_size=600)
    assert evaluate.published_ap(student, config, val) == evaluate.PUBLISHED_AP["fasterrcnn"]
    assert evaluate.published_ap(student, config, fewer) == {}
    assert evaluate.published_ap(student, other_size, val) == {}

    ours = {"bottleneck_channels": 3}
    for content, is_published in (
            ({}, True), ({"config": {"train": {}}}, True),  # torchdistill's
            ({"config": ours | {"is_recipe": True}}, True),
            ({"config": ours | {"is_recipe": False}}, False), ({"config": ours}, False)):
        config = models.read_config(content, "file.pt") | {"arch": "fasterrcnn"}
        assert bool(evaluate.published_ap(student, config, val)) == is_published

    foreign = models.Bottleneck()
    foreign.encoder[7] = torch.nn.Conv2d(64, 3, kernel_size=2, padding=1)  # with a bias
    teacher = models.load_teacher("fasterrcnn", teachers["fasterrcnn"])
    config = {"arch": "fasterrcnn", "is_recipe": True}
    assert evaluate.published_ap(models.build_student(teacher, foreign), config, val) == {}
