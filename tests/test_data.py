import contextlib
import io
import json
import re
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import CPU, edit_json, encode, same
from PIL import ExifTags, Image
from test_evaluate import VAL, plain_metrics

import data
import evaluate
from distributed import InputError

TRAIN = "annotations/instances_train2017.json"
PHOTO = "train2017/000000000003.jpg"
FEW = slice(2, 5)  # of a file's entries


def refused(message):
    """Expect an InputError that matches a message or, where it is None, none."""
    return pytest.raises(InputError, match=message) if message else contextlib.nullcontext()


def change(group="annotations", which=slice(None), **fields):
    """Return an edit that sets fields of a file's entries, by functions too; ... removes one."""
    def edit(content):
        for entry in content[group][which]:
            for field, value in fields.items():
                entry[field] = value(entry) if callable(value) else value
                if entry[field] is ...:
                    del entry[field]
    return edit


# ---- annotation files: a figure is right, or an error names the entry ----------------------------


def test_a_category_has_the_same_number_in_both_files(own_dataset):
    categories = {1: {"id": 1, "name": "ellipse"}, 2: {"id": 2, "name": "box"}}
    with refused(f"{TRAIN}: .* its id is 1, not .*2.* 'box'"):
        data.load_train_split(own_dataset, 1333, val_categories=categories)


@pytest.fixture(scope="module")
def perfect(dataset):
    """Results that are the annotations themselves: on any right reading of them, AP is 1."""
    coco = evaluate.make_coco(json.loads((dataset / VAL).read_text()))
    return [annotation | {"segmentation": encode(coco.annToMask(annotation)), "score": 0.5}
            for annotation in coco.dataset["annotations"] if not annotation["iscrowd"]]


def redraw(draw):
    """Return an edit that makes of each mask (h, w) another segmentation."""
    def edit(content):
        coco = evaluate.make_coco(content)
        for annotation in content["annotations"]:
            annotation["segmentation"] = draw(coco.annToMask(annotation))
    return edit


def add_stray(content):
    content["annotations"] += [content["annotations"][0] | {"image_id": 999, "category_id": 77}]
    content["categories"].append({"id": 0, "name": "unused, as Roboflow writes it"})


def runs_of(mask):
    """Return the lengths of a mask's runs, down its columns; the first run is of zeros."""
    pixels = mask.flatten(order="F").astype(int)
    changes = np.flatnonzero(np.diff(pixels, prepend=0)).tolist()
    return np.diff([0, *changes, len(pixels)]).tolist()


@pytest.mark.parametrize("edit", [
    change(), change(id=...), change(id=7), change(id=lambda a: a["id"] - 1), add_stray,
    change(area=...), change(iscrowd=lambda a: a["iscrowd"] or ...),
    redraw(lambda mask: {"size": list(mask.shape), "counts": runs_of(mask)})])
def test_what_can_be_repaired_gives_the_right_metrics(own_dataset, perfect, edit):
    edit_json(own_dataset / VAL, edit)
    coco = evaluate.make_coco(data.read_annotations(own_dataset / VAL, 3, masks=True))
    for iou_type in ("bbox", "segm"):
        metrics = evaluate.coco_metrics(coco, perfect, sorted(coco.getImgIds()), iou_type)
        assert metrics["AP"] == 1 and {metrics[x] for x in evaluate.METRICS[:6]} <= {1, -1}


@pytest.mark.parametrize("group, field, values, expected", [
    ("images", "id", ["7", 2**63], r"a whole number below 2\^63"), ("images", "id", [1], "unique"),
    ("images", "file_name", [None, "../a.jpg", "/a.jpg"], "a path below the image folder"),
    ("images", "file_name", ["000000000001.jpg", "./000000000001.jpg"], "listed once"),
    ("images", "width", [0, 99.5, 2**16], r"a whole number of pixels below 2\^16"),
    ("categories", "id", ["2", None], "a whole number"), ("categories", "id", [1], "unique"),
    ("annotations", "image_id", ["2"], "a whole number"),
    ("annotations", "category_id", ["2", 2.0, 0, 3, 9], "the id of one .*, from 1 to 3 .*add 1 "),
    ("annotations", "bbox", [None, [], [float("nan")] * 4, [0, 2**20 + 1, 5, 5]], "four finite"),
    ("annotations", "bbox", [[1, 2, -3, 4]], "not negative"),
    ("annotations", "area", [float("inf"), "9"], "a finite number"),
    ("annotations", "iscrowd", ["no"], "0 or 1"),
    ("annotations", "segmentation", [[], {"size": None, "counts": [3]}], "polygons .* an RLE ")])
def test_wrong_values_are_named_and_counted(group, field, values, expected, own_dataset):
    edit_json(own_dataset / VAL, lambda x: x["categories"].extend([{"id": 0}, {"id": 9}]))
    for value in values:
        edit_json(own_dataset / VAL, change(group, slice(1, 3), **{field: value}))
        with refused(rf"^{own_dataset / VAL}: {group}\[1\], with id .*: its {field} is .*, not "
                     f".*{expected}.*, and 1 more like it$"):
            data.read_annotations(own_dataset / VAL, classes=4, masks=True)


@pytest.mark.parametrize("group, field", [(group, field) for group, fields in {
    "images": "id file_name width height", "categories": "id name",
    "annotations": "id image_id category_id bbox area iscrowd segmentation ignore",
}.items() for field in fields.split()])
def test_any_value_of_any_field_gives_metrics_of_pycocotools_or_is_named(
        group, field, own_dataset, perfect, tmp_path):
    path, repaired, saved = own_dataset / VAL, tmp_path / "repaired.json", tmp_path / "results.json"
    whole = path.read_bytes()
    for value in (None, "x", [], {}, -1, 0, 1e99, float("nan"), float("inf"), True, ...):
        path.write_bytes(whole)
        edit_json(path, change(group, slice(1), **{field: value}))
        try:
            data.read_train_images(path, val_categories={1: {"id": 1, "name": "box"}})
            content = data.read_annotations(path, classes=91, masks=True)
        except InputError as error:
            wrong = rf"{group}\[0\].* its {field} is|.* its category_id is 1, not"  # in the list
            assert re.match(f"{path}: ({wrong})", str(error))
            continue
        coco = evaluate.make_coco(content)
        known = [r for r in perfect if r["image_id"] in coco.imgs]
        repaired.write_text(json.dumps(content))
        for iou_type in ("bbox", "segm"):
            saved.write_text(json.dumps(evaluate.results_of_type(known, iou_type)))
            metrics = evaluate.coco_metrics(coco, known, sorted(coco.getImgIds()), iou_type)
            assert metrics == plain_metrics(repaired, saved, iou_type)


@pytest.mark.parametrize("edit, lines, text, message", [
    (change(), 1, " 2 .*crowds", None), (add_stray, 2, " 18 .*left out", None),
    (change(which=FEW, ignore=1), 2, " 3 .*ignore", None),
    (change(which=FEW, bbox=[-50, 9, 70, 70], area=...), 2, " 3 .*their images", None),
    (change(which=FEW, bbox=[-1, -1, 99, 99], area=...), 1, "", None),
    (change(which=FEW, bbox=[9, 9, 0, 70], area=...), 2, " 3 .*no width or no height", None),
    (change(which=FEW, image_id=1, category_id=1, bbox=[9] * 4, area=...), 2, " 3 .*once", None),
    (lambda content: content["categories"].append({"id": 7}), 2, " id is 7, .* detector 2", None),
    (change(iscrowd=1), 0, "", "nothing to find"),
    (change(bbox=[0.1, 0.2, 0.5, 1]), 0, "", r"no box .* a pixel.* \[0.1, 0.2, 0.5, 1\]")])
def test_unlikely_things_are_counted_in_a_line(edit, lines, text, message, own_dataset, capsys):
    edit_json(own_dataset / VAL, edit)
    with refused(message and f"{VAL}: .*{message}"):
        data.read_annotations(own_dataset / VAL, 3, masks=False)
    logged = capsys.readouterr().out
    assert logged.count("\n") == lines and re.search(text, logged)


@pytest.mark.parametrize("mask, is_right", [
    ([[0, 0, 9, 0, 9, 9]], True), ([[-5, -5, 17, -5, 17, 14]], True), ([], False), (None, False),
    ([[0, 0, 9, 0, 1e6, 9]], False), ([[0, 0, 9, 0, 9, 1e6]], False), ([1, 2, 3, 4, 5, 6], False),
    ([[0, 0, 9, 0, 9, 5e8]], False), ([[1, 2, 3, 4]], False), ([[1, 2, 3, 4, 5, 6, 7]], False),
    ({"size": [10, 12], "counts": [50, 70]}, True), ({"size": [12, 10], "counts": [50, 70]}, False),
    ({"size": [10, 12], "counts": "hSPPP0"}, True),  # 120 in 30 bits, and below in 35
    *(({"size": [10, 12], "counts": counts}, False) for counts in (
        [30, 20], [130, -10], [30, 20, "70"], "", None, "hSPPPP0"))])
def test_masks_are_polygons_in_or_near_the_image_or_runs_that_cover_it(mask, is_right):
    assert data.is_mask(mask, 10, 12) == is_right


def test_compressed_runs_are_those_that_pycocotools_decodes():
    """Those that were cut, run on, have doubled backslashes, or are text of bytes, are refused."""
    rng = np.random.default_rng(0)
    masks = [rng.random((40, 31)) < share for share in (0, 0.01, 0.03, 0.5, 0.97, 0.99, 1)]
    texts = [encode(mask)["counts"] for mask in masks]
    assert any("\\" in text for text in texts)
    for mask, text in zip(masks, texts):
        assert data.decode_runs(text) == runs_of(mask) and data.is_mask(encode(mask), *mask.shape)
        for wrong in (text[:-1], text + "1", text + "o", text + " ", text + "\n", text + "é",
                      text.replace("\\", "\\\\"), f"b'{text}'"):
            rle = {"size": list(mask.shape), "counts": wrong}
            assert wrong == text or not data.is_mask(rle, *mask.shape)


def move(points_to):
    """Return an edit that moves the points (N, 2) of all polygons, which are not of crowds."""
    def moved(annotation):
        [polygon] = np.reshape(annotation["segmentation"], (1, -1, 2))
        return [points_to(polygon).flatten().tolist()]
    return change(which=slice(0, -2), segmentation=moved)


@pytest.mark.parametrize("masks, edit", [
    (True, redraw(lambda mask: encode(mask.flatten().reshape(mask.shape, order="F")))),  # by rows
    (True, redraw(lambda mask: encode(0 * mask))), (True, move(lambda points: 2 * points)),
    (True, move(lambda points: points / 300)), (True, move(lambda points: -points)),
    (True, move(lambda points: points[:, ::-1])),  # y before x
    (True, change(area=0)), (False, change(area=0)), (False, change(area=1e9))])
def test_masks_and_areas_must_fit_their_boxes(masks, edit, own_dataset, capsys):
    """If most do not, the file is refused; a few are told in a line that names the first."""
    path = own_dataset / VAL
    content = json.loads(path.read_text())
    edit_json(path, edit)
    with refused(f"{path}: 1[0-7] of 17 .* fit .* first, of image 1, has bbox"):
        data.read_annotations(path, 3, masks)
    wrong = content["annotations"][4] = json.loads(path.read_text())["annotations"][4]
    content["annotations"] += 20 * content["annotations"][:-2]  # more than 255 masks
    path.write_text(json.dumps(content))
    data.read_annotations(path, 3, masks)
    first = f"first, of image {wrong['image_id']}, has bbox {wrong['bbox']}"
    assert re.search(f" 21 of 317 .* fit .* {re.escape(first)}", capsys.readouterr().out)


# ---- images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("place, put, reason", [
    (TRAIN, None, "No such .*; --data-dir"), ("train2017", Path.touch, "Not a .*; --data-dir"),
    ("train2017", Path.mkdir, r"000000000001.jpg: No such .*, and \d\d more images$"),
    (PHOTO, Path.mkdir, "Is a directory$"), (PHOTO, Path.touch, "it is empty, or no file$"),
    *((TRAIN, lambda path, text=text: path.write_text(text), reason) for text, reason in [
        ('{"images": [3', "not whole"), ("[]", "'images'"), ('{"images": [3]}', "'images'")])])
def test_missing_and_other_files_are_named_with_the_reason(place, put, reason, own_dataset):
    path = own_dataset / place
    path.rename(own_dataset / "before")
    if put:
        put(path)
    with refused(f"{path}.*{reason}"):
        data.load_train_split(own_dataset, 1333)


def test_what_may_not_be_read_is_named_and_a_name_may_have_another_form(dataset, monkeypatch):
    images = [data.ImageInfo(1, "é1", 9, 9)]
    with refused("é1: No such file or directory; on disk, .* another Unicode form"):
        data.check_images(images, dataset, 1333)
    denied = Mock(side_effect=OSError(13, "not for you"))
    monkeypatch.setattr(data, "open", denied, raising=False)
    with refused("é1: not for you"):
        data.check_images(images, dataset, 1333)
    monkeypatch.setattr(data.os, "listdir", denied)
    with refused(f"{dataset / 'train2017'}: not for you"):
        data.load_train_split(dataset, 1333)


@pytest.mark.parametrize("width, height, message", [
    (500, 1, "too thin: of 500 x 1 pixels"), (1, 160, "too thin"), (1, 159, None),
    (13377, 13377, None), (13377, 13378, "13377 x 13378 .* Pillow reads at most 178,956,970")])
def test_images_of_impossible_sizes_are_named(width, height, message, tmp_path):
    (tmp_path / "x.jpg").write_text("not looked at")
    images = [data.ImageInfo(1, "x.jpg", width, height)]
    with refused(message and f"x.jpg .*{message}"):
        data.check_images(images, tmp_path, max_size=160)


def file_of(image, kind="JPEG", orientation=1):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(file := io.BytesIO(), kind, exif=exif)
    return file.getvalue()


COLOURS = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))


@pytest.mark.parametrize("content, message", [
    *((file_of(COLOURS.convert(mode), kind), None) for mode, kind in [
        ("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("P", "GIF")]),
    (file_of(COLOURS, orientation=0), None),
    *((file_of(COLOURS, orientation=i), f"has EXIF orientation {i}") for i in (2, 8)),
    (file_of(Image.fromarray(np.full((9, 9), 40_000, np.uint16)), "PNG"), "has more than 8 bits"),
    (file_of(Image.fromarray(np.full((9, 9), 0.5, np.float32)), "TIFF"), "has more than 8 bits"),
    *((content, "cannot be decoded") for content in (b"text", file_of(COLOURS)[:-500]))])
def test_an_image_is_what_pillow_makes_of_it_or_is_named(content, message, tmp_path):
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    with refused(message and f"image {path} {message}"):
        image = data.read_image(path)
        wanted = np.array(Image.open(path).convert("RGB")).transpose(2, 0, 1)
        assert image.is_contiguous() and same(image, torch.from_numpy(wanted))


def test_images_of_another_size_than_their_file_says_are_named(dataset):
    [image], folder = data.load_train_split(dataset, 1333, limit=1)
    with refused(f"image .*000001.jpg has .* pixels, but 9 x {image.height} in"):
        data.CocoImages([image._replace(width=9)], folder)[0, False]


# ---- batches and loaders -------------------------------------------------------------------------


@pytest.mark.parametrize("order, groups, batch_size, wanted", [
    (range(11), "01010101100", 3, [[0, 2, 4], [1, 3, 5], [6, 9, 10]]),  # none is missing
    (range(11), "01010101100", 4, [[0, 2, 4, 6], [1, 3, 5, 7]]),
    ([*range(11), 0], "01010101100", 4, [[0, 2, 4, 6], [1, 3, 5, 7], [9, 10, 0, 0]]),  # not 8
    (range(8), "00011122", 4, [[0, 1, 2, 0], [3, 4, 5, 3]]),
    (range(4), "0100", 2, [[0, 2], [1, 1]]),  # the group of 0 and 2 has begun anew, and is last
    ([5, 7, 9, 11], {5: 0, 7: 1, 9: 2, 11: 3}, 4, [[5, 5, 5, 5]])])  # too few to fill a batch
def test_batches_fill_up_in_order_then_from_what_was_seen(order, groups, batch_size, wanted):
    assert data.group_batches(order, groups, batch_size) == wanted


IMAGES = [data.ImageInfo(i, f"{i}.jpg", w, h) for i, (w, h) in enumerate(
    np.random.default_rng(0).integers(100, 640, (500, 2)).tolist())]


def batches_of(images, seed, epoch, rank=0, world_size=1, first_batch=0):
    batches = data.GroupedBatches(images, 4, rank, world_size, seed)
    batches.epoch, batches.first_batch = epoch, first_batch
    found = list(batches)
    assert len(batches) == len(found) + first_batch == -(-len(images) // world_size) // 4
    return found


@pytest.mark.parametrize("world_size", [1, 3])
def test_an_epoch_is_shared_out_whole_and_can_be_taken_up_anywhere(world_size):
    assert data.aspect_ratio_groups([320, 640, 1280], [640] * 3).tolist() == [1, 4, 7]  # upper ones
    seen = set()
    for rank in range(world_size):
        batches = batches_of(IMAGES, 0, 3, rank, world_size)
        seen.update(position for position, _ in sum(batches, []))
        for first in (1, len(batches)):
            assert batches_of(IMAGES, 0, 3, rank, world_size, first) == batches[first:]
    assert len(seen) > 500 - 8 * 3 * world_size  # at most 3 left over in each group are not seen


def test_order_and_flips_depend_on_seed_and_epoch():
    first, *others = [dict(sum(batches_of(IMAGES, *at), [])) for at in ((0, 2), (0, 3), (5, 2))]
    for other in others:  # of each image whether it is flipped, in the order of the epoch
        assert list(first) != list(other)
        assert 0.3 < np.mean([first[i] != other[i] for i in first.keys() & other]) < 0.7


@pytest.mark.parametrize("method", [None, "fork", "forkserver"])
def test_loaders_give_batches_or_images_under_every_start_method(method, dataset, monkeypatch):
    images, folder = data.load_train_split(dataset, 1333)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    photos, workers = data.CocoImages(images, folder), 2 if method else 0
    loader = data.train_loader(images, folder, 4, 7, workers, CPU)
    one_by_one = data.val_loader(images, folder, workers, CPU)
    loader.multiprocessing_context = one_by_one.multiprocessing_context = method
    for epoch, first_batch in ((0, 0), (1, 2)):
        loader.batch_sampler.epoch, loader.batch_sampler.first_batch = epoch, first_batch
        wanted = batches_of(images, 7, epoch, 1, 2, first_batch)
        assert same(list(loader), [[photos[key] for key in batch] for batch in wanted])
    assert same(list(one_by_one), [photos[i, False] for i in range(len(images))])


@pytest.mark.parametrize("length, free, workers, message", [
    (75, 16_588_800, 1, None), (76, 16_588_800, 1, "TMPDIR /xxx.* is too long"), (76, 0, 0, None),
    (75, 16_588_799, 1, "/dev/shm has 16 MiB free, .* 16 MiB; give --workers 0")])
def test_workers_that_would_hang_are_told(length, free, workers, message, monkeypatch):
    """Three processes have three batches of one image each at hand: at most the nine largest."""
    widths = [64, 6400] + 8 * [640]
    images = [data.ImageInfo(i, "x.jpg", width, 480) for i, width in enumerate(widths)]
    monkeypatch.setattr(data.tempfile, "gettempdir", lambda: "/".ljust(length, "x"))
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: Mock(free=free))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with refused(message):
        data.check_workers(images, 1, workers, batches_in_use=1)
