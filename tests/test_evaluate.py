import contextlib
import io
import json
import math

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
from distributed import InputError


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
    return evaluation.stats.tolist()


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
    assert 0.1 < metrics[0] < 0.9 and len(metrics) == len(evaluate.METRICS) == 12


def metrics_of_80_categories():
    """Print coco_metrics of random results; the command line names the data set."""
    import sys

    distributed.set_up("cpu")
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(sys.argv[1])
    image_ids = sorted(coco.getImgIds())
    print(json.dumps(evaluate.coco_metrics(coco, random_results(coco), image_ids, "bbox")))


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
    assert 0.05 < wanted[0] < 0.9


def test_a_detector_that_finds_nothing_scores_zero(val):
    def predict(image):
        return {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "scores": torch.zeros(0)}

    metrics, results = evaluate.evaluate(predict, val, CPU)
    assert results == [] and list(metrics) == ["bbox", "segm"] and metrics["bbox"][0] == 0
    assert set(metrics["bbox"]) <= {0.0, -1.0}


@pytest.mark.parametrize("arch", ARCHS)
def test_the_teacher_agrees_with_itself(arch, dataset, teachers):
    teacher = models.load_teacher(arch, teachers[arch], **SIZES)
    val = evaluate.ValSet(dataset, teacher, 4)
    _, results = evaluate.evaluate(evaluate.whole(teacher), val, CPU)
    before = json.dumps(results)
    own = evaluate.agreement(val, results, results)
    assert tuple(own) == val.iou_types and all(values[0] == 1 for values in own.values())
    moved = [{**r, "bbox": [r["bbox"][0] + 9, *r["bbox"][1:]]} for r in results]
    assert 0 < evaluate.agreement(val, moved, results)["bbox"][0] < 0.9
    uncertain = [{**r, "score": 0.49} for r in results]
    assert evaluate.agreement(val, results, uncertain)["bbox"][0] == -1  # there is nothing to find
    flat = [{**r, "bbox": [*r["bbox"][:2], 0, 9]} for r in results]
    assert evaluate.agreement(val, results, flat)["bbox"][0] == -1
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
        assert 26 < row["payload_bytes"] < row["raw_bytes"] + 40
        assert row["head_seconds"] > 0 and row["tail_seconds"] > 0
        assert f"student, {bits} bits" in out
    torch.set_num_threads(2)
    eight, one = summary["rate"]
    assert eight["payload_bytes"] > one["payload_bytes"] and eight["raw_bytes"] == one["raw_bytes"]
    files = [(val.folder / info.file_name).stat().st_size for info in val.images]
    assert eight["jpeg_bytes"] == pytest.approx(sum(files) / 2)
    assert summary["head"]["parameters"] == 158_400

    fine, coarse = summary["jpeg"]
    assert (fine["quality"], coarse["quality"]) == (90, 2)
    # The files were written by Pillow at quality 90, so that much is lost already.
    assert fine["payload_bytes"] == pytest.approx(eight["jpeg_bytes"], rel=0.05)
    assert coarse["payload_bytes"] < 0.7 * fine["payload_bytes"]
    assert len(coarse["metrics"]["bbox"]) == 12

    shared, _ = run_evaluate(*flags, arch="fasterrcnn", world_size=2)
    for row in [*summary["rate"], *shared["rate"]]:
        del row["head_seconds"], row["tail_seconds"]
    assert shared == summary


def test_the_teacher_gets_what_pillow_recompresses(val):
    seen = []

    def teacher(images):
        seen.extend(images)
        return [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "scores": torch.zeros(0)}]

    row = evaluate.measure_jpeg(teacher, 30, val, CPU, workers=0)
    sizes = []
    for info, image in zip(val.images, seen, strict=True):
        file = io.BytesIO()
        Image.open(val.folder / info.file_name).convert("RGB").save(file, "JPEG", quality=30)
        sizes.append(len(file.getvalue()))
        wanted = np.array(Image.open(file)).transpose(2, 0, 1)
        assert torch.equal((image * 255).round().byte(), torch.from_numpy(wanted))
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
    status, out, err = call(
        evaluate.main, "--ckpt", checkpoints["maskrcnn"], "--data-dir", dataset, *SIZE_FLAGS,
        "--teacher-ckpt", teachers["maskrcnn"], "--limit-val", 1, "--pictures", tmp_path)
    assert status == 0, err
    summary = json.loads(out.splitlines()[-1])
    assert list(summary) == ["teacher", "student", "agreement"]
    numbers = (f"{x:.4f}" for x in summary["agreement"]["segm"])
    for text in ("AP published", "0.379", "0.346", "0.369", "0.336", *numbers):
        assert text in out
    assert len(list(tmp_path.iterdir())) == 1
    for path in tmp_path.iterdir():
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
    evaluate.draw_pictures(mine, [], [], tmp_path / "pictures", 2)
    for folder, colour in folders.items():
        picture = Image.open(tmp_path / "pictures" / folder / "0001.png.jpg")
        assert np.allclose(picture.getpixel((300, 100)), colour, atol=4)
        assert picture.width == 2 * 15 * 40  # no column of annotations where there are none


def test_published_figures_are_the_published_ones():
    students = {arch: figures["student"] for arch, figures in evaluate.PUBLISHED.items()}
    assert students == {"fasterrcnn": {"bbox": 0.359}, "maskrcnn": {"bbox": 0.369, "segm": 0.336}}
    for arch, published in evaluate.PUBLISHED.items():
        weights = get_model_weights(f"{arch}_resnet50_fpn").COCO_V1
        metrics = weights.meta["_metrics"]["COCO-val2017"]
        assert math.isclose(published["teacher"]["bbox"], metrics["box_map"] / 100)
        assert math.isclose(published["teacher"].get("segm", 0), metrics.get("mask_map", 0) / 100)


# ---- annotation files: a figure is right, or an error names the entry ----------------------------


@pytest.fixture(scope="module")
def perfect(dataset):
    """Results that are the annotations themselves: on any right reading of them, AP is 1."""
    content = json.loads(annotation_file(dataset).read_text())
    coco = evaluate.make_coco(content)
    return [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"],
         "segmentation": encode(coco.annToMask(a)), "score": 0.5 + 0.001 * i}
        for i, a in enumerate(content["annotations"]) if not a["iscrowd"]]


def metrics_of(folder, results, iou_type):
    content = evaluate.read_annotations(annotation_file(folder), classes=91, masks=True)
    coco = evaluate.make_coco(content)
    image_ids = sorted(coco.getImgIds())
    return evaluate.coco_metrics(coco, results, image_ids, iou_type)


def drop(*fields):
    def edit(content):
        for annotation in content["annotations"]:
            for field in fields:
                if not (field == "iscrowd" and annotation["iscrowd"]):
                    del annotation[field]
    return edit


def renumber(*ids):
    def edit(content):
        for i, annotation in enumerate(content["annotations"]):
            annotation["id"] = ids[i] if i < len(ids) else i + len(ids)
    return edit


def add_strays(content):
    first = content["annotations"][0]
    content["annotations"] += [first | {"image_id": 999}, first | {"category_id": 77}]
    content["categories"].append({"id": 0, "name": "unused, as Roboflow writes it"})


def crowds_uncompressed(content):
    for annotation in content["annotations"]:
        if annotation["iscrowd"]:
            rle = annotation["segmentation"]
            rle["counts"] = evaluate.run_lengths(rle["counts"])


@pytest.mark.parametrize("edit", [
    lambda content: None, renumber(), renumber(5, 0), renumber(7, 7, 7, 7), drop("id"),
    drop("area"), drop("iscrowd"), drop("id", "area"), add_strays, crowds_uncompressed])
def test_what_can_be_repaired_gives_the_right_metrics(own_dataset, perfect, edit):
    edit_json(annotation_file(own_dataset), edit)
    for iou_type in ("bbox", "segm"):
        metrics = metrics_of(own_dataset, perfect, iou_type)
        assert metrics[0] == 1 and all(value in (1, -1) for value in metrics[:6])


@pytest.mark.parametrize("group, field, value, expected", [
    ("images", "id", "7", "a whole number"), ("images", "id", 1, "unique: images[0] has it too"),
    ("images", "file_name", None, "a path below the image folder"),
    ("images", "width", 0, "a whole number of pixels"),
    ("images", "height", 99.5, "a whole number of pixels"),
    ("categories", "id", "2", "a whole number"), ("categories", "id", 1, "unique: categories"),
    ("annotations", "image_id", "2", "a whole number"),
    ("annotations", "category_id", "2", "a whole number"),
    ("annotations", "category_id", 2.0, "a whole number"),
    ("annotations", "bbox", None, "four finite numbers"),
    ("annotations", "bbox", [], "four finite numbers"),
    ("annotations", "bbox", [float("nan")] * 4, "four finite numbers"),
    ("annotations", "bbox", [1, 2, -3, 4], "not negative"),
    ("annotations", "area", float("inf"), "a finite number"),
    ("annotations", "iscrowd", "no", "0 or 1"),
    ("annotations", "segmentation", [], "polygons"),
    ("annotations", "segmentation", [1, 2, 3, 4, 5, 6], "polygons"),
    ("annotations", "segmentation", [[1, 2, 3, 4]], "polygons"),
    ("annotations", "segmentation", [[1, 2, 3, 4, 5, 6, 7]], "polygons"),
    ("annotations", "segmentation", {"size": [9, 9], "counts": "0"}, "or an RLE of"),
    ("annotations", "segmentation", {"size": None, "counts": [3]}, "or an RLE of")])
def test_what_is_wrong_is_named_with_its_place(own_dataset, group, field, value, expected):
    path = annotation_file(own_dataset)
    entry_id = json.loads(path.read_text())[group][1]["id"]
    if field == "id":
        entry_id = value
    edit_json(path, lambda content: content[group][1].update({field: value}))
    with pytest.raises(InputError) as error:
        evaluate.read_annotations(path, classes=91, masks=True)
    message = str(error.value)
    assert message.startswith(f"{path}: {group}[1], with id {entry_id!r}: its {field} is ")
    assert expected in message


@pytest.mark.parametrize("classes, category", [(91, 0), (91, 91), (3, 3)])
def test_categories_that_the_detector_does_not_have_are_named(own_dataset, classes, category):
    def edit(content):
        content["categories"].append({"id": category, "name": "x"})
        content["annotations"][4]["category_id"] = category

    edit_json(annotation_file(own_dataset), edit)
    with pytest.raises(InputError, match=rf"annotations\[4\].*category_id is {category}, not one of "
                                         f"the detector's classes, 1 to {classes - 1}"):
        evaluate.read_annotations(annotation_file(own_dataset), classes, masks=False)


@pytest.mark.parametrize("counts, is_whole", [
    ([30, 20, 70], True), ([30, 20], False), ([30, 200], False), ([130, -10], False),
    ([30, 20, "70"], False), ("", False), ("abc", False), ("zzz", False), ("\x00", False)])
def test_run_lengths_must_cover_the_image(counts, is_whole):
    """pycocotools fills what runs do not cover with whatever is in memory."""
    rle = {"size": [10, 12], "counts": counts}
    assert evaluate.is_mask(rle, 10, 12) == is_whole
    if is_whole:
        assert evaluate.run_lengths(
            coco_mask.frPyObjects(rle, 10, 12)["counts"].decode()) == counts
    assert not evaluate.is_mask(rle, 12, 10)


def test_run_lengths_are_decoded_as_by_pycocotools():
    rng = np.random.default_rng(0)
    for density in (0, 0.01, 0.5, 1):
        mask = rng.random((37, 61)) < density
        text = encode(mask)["counts"]
        runs = evaluate.run_lengths(text)
        values = np.repeat(np.arange(len(runs)) % 2, runs).reshape(61, 37).T
        assert (values == mask).all()
        assert not evaluate.is_mask({"size": [37, 61], "counts": text[:-1]}, 37, 61)


VALUES = [None, "x", [], {}, -1, 0, 1e99, float("nan"), float("inf"), True, ...]  # ...: missing


@pytest.mark.parametrize("group, field", [
    *(("images", field) for field in ("id", "file_name", "width", "height")),
    *(("annotations", field) for field in (
        "id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation")),
    *(("categories", field) for field in ("id", "name"))])
def test_any_value_of_any_field_gives_metrics_of_pycocotools_or_is_named(
        group, field, own_dataset, perfect, tmp_path):
    path = annotation_file(own_dataset)
    whole = path.read_bytes()
    for value in VALUES:
        path.write_bytes(whole)

        def edit(content, value=value):
            content[group][0].pop(field)
            if value is not ...:
                content[group][0][field] = value

        edit_json(path, edit)
        try:
            content = evaluate.read_annotations(path, classes=91, masks=True)
        except InputError as error:
            assert f"{path}: {group}[0]" in str(error) and f"its {field} is " in str(error)
            continue
        coco = evaluate.make_coco(content)
        known = [r for r in perfect if r["image_id"] in coco.imgs]
        for iou_type in ("bbox", "segm"):
            repaired, results = tmp_path / "repaired.json", tmp_path / "results.json"
            repaired.write_text(json.dumps(content))
            results.write_text(json.dumps(evaluate.results_of_type(known, iou_type)))
            metrics = evaluate.coco_metrics(coco, known, sorted(coco.getImgIds()), iou_type)
            assert metrics == plain_metrics(repaired, results, iou_type)
