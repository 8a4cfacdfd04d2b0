import json
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import CPU, edit_json, encode, same
from drawn import load_example
from from_voc import convert
from PIL import Image
from pycocotools import mask as coco_mask
from test_evaluate import plain_metrics

import data
import evaluate
from distributed import InputError


def make_images(n):
    sizes = np.random.default_rng(0).integers(100, 640, (n, 2)).tolist()
    return [data.ImageInfo(i, f"{i}.jpg", w, h) for i, (w, h) in enumerate(sizes)]


# ---- annotation files ----------------------------------------------------------------------------


def test_images_to_train_on_are_those_of_the_recipe(tmp_path):
    images = [dict(id=i, file_name=f"{i}.jpg", width=100 + i, height=50 + i)
              for i in (9, 1, 2, 3, 4, 5, 6, 7, 8)]
    boxes = [(1, 5, 5, 0), (2, 50, 60, 1), (3, 1, 50, 0), (3, 50, 1, 0), (3, 0, 0, 1),
             (4, 1, 9, 0), (4, 1.01, 1.01, 0), (6, 0.5, 0.5, 1), (7, 1, 1, 0), (7, 3, 2, 1),
             (8, -4, 9, 0), (99, 9, 9, 0)]
    annotations = [dict(image_id=i, bbox=[0, 0, w, h], iscrowd=crowd) for i, w, h, crowd in boxes]
    path = tmp_path / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    assert data.read_train_images(path) == [
        (i, f"{i}.jpg", 100 + i, 50 + i) for i in (1, 2, 4, 7)]


@pytest.mark.parametrize("text, reason", [
    ('{"images": [{"id": 1', "is not whole: "), ("\x00\xff", "is not whole: "),
    ("[]", "no list of objects named 'images'"), ("{}", "no list of objects named 'images'"),
    ('{"images": [3], "annotations": []}', "no list of objects named 'images'"),
    ('{"images": [], "annotations": {}}', "no list of objects named 'annotations'")])
def test_files_that_are_no_instances_files_are_named(tmp_path, text, reason):
    path = tmp_path / "instances.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=f"{path} .*{reason}"):
        data.read_instances(path)


def test_what_is_missing_is_named(own_dataset, tmp_path):
    with pytest.raises(InputError, match="instances_train2017.json is missing; --data-dir"):
        data.load_train_split(tmp_path / "nowhere", 1333)
    images, folder = data.load_train_split(own_dataset, 1333)
    assert folder == own_dataset / "train2017" and 20 < len(images) < 36
    assert data.load_train_split(own_dataset, 1333, limit=5)[0] == images[:5]
    (folder / images[6].file_name).unlink()
    with pytest.raises(InputError, match=f"image {folder / images[6].file_name} is missing$"):
        data.load_train_split(own_dataset, 1333)
    (folder / images[6].file_name).symlink_to("gone.jpg")
    (folder / images[8].file_name).write_bytes(b"")
    with pytest.raises(InputError, match=f"{images[6].file_name} is missing, and 1 more images$"):
        data.load_train_split(own_dataset, 1333)
    (folder / images[6].file_name).unlink()
    (folder / images[6].file_name).mkdir()
    with pytest.raises(InputError, match=f"{images[6].file_name} is empty, or no file, and 1 more"):
        data.load_train_split(own_dataset, 1333)
    folder.rename(own_dataset / "elsewhere")
    with pytest.raises(InputError, match="train2017 is missing"):
        data.load_train_split(own_dataset, 1333)
    file = own_dataset / "annotations" / "instances_train2017.json"
    edit_json(file, lambda content: content["annotations"].clear())
    (own_dataset / "elsewhere").rename(folder)
    with pytest.raises(InputError, match="no images to use"):
        data.load_train_split(own_dataset, 1333)


@pytest.mark.parametrize("size, is_named", [
    ((500, 1), True), ((1, 500), True), ((160, 1), True), ((159, 1), False), ((319, 2), False)])
def test_images_of_which_resizing_would_leave_nothing_are_named(size, is_named, tmp_path):
    width, height = size
    Image.new("RGB", size).save(tmp_path / "thin.png")
    images = [data.ImageInfo(1, "thin.png", width, height)]
    if is_named:
        with pytest.raises(InputError, match="thin.png is too thin: of "):
            data.check_images(images, tmp_path, max_size=160)
    else:
        data.check_images(images, tmp_path, max_size=160)
        assert min(width, height) * 160 / max(width, height) >= 1


# ---- annotation files: a figure is right, or an error names the entry ----------------------------


VAL = "annotations/instances_val2017.json"


@pytest.fixture(scope="module")
def perfect(dataset):
    """Results that are the annotations themselves: on any right reading of them, AP is 1."""
    content = json.loads((dataset / VAL).read_text())
    coco = evaluate.make_coco(content)
    return [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"],
         "segmentation": encode(coco.annToMask(a)), "score": 0.5 + 0.001 * i}
        for i, a in enumerate(content["annotations"]) if not a["iscrowd"]]


def metrics_of(folder, results, iou_type):
    content = data.read_annotations(folder / VAL, classes=91, masks=True)
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
    content["annotations"] += [first | {"image_id": 999, "category_id": 77}]
    content["categories"].append({"id": 0, "name": "unused, as Roboflow writes it"})


def crowds_uncompressed(content):
    for annotation in content["annotations"]:
        if annotation["iscrowd"]:
            rle = annotation["segmentation"]
            pixels = coco_mask.decode(rle).flatten(order="F")
            changes = np.flatnonzero(np.diff(pixels, prepend=0)).tolist()  # runs begin with zeros
            rle["counts"] = np.diff([0, *changes, len(pixels)]).tolist()


@pytest.mark.parametrize("edit", [
    lambda content: None, renumber(), renumber(5, 0), renumber(7, 7, 7, 7), drop("id"),
    drop("area"), drop("iscrowd"), drop("id", "area"), add_strays, crowds_uncompressed])
def test_what_can_be_repaired_gives_the_right_metrics(own_dataset, perfect, edit):
    edit_json(own_dataset / VAL, edit)
    for iou_type in ("bbox", "segm"):
        metrics = metrics_of(own_dataset, perfect, iou_type)
        assert metrics["AP"] == 1
        assert all(metrics[name] in (1, -1) for name in evaluate.METRICS[:6])


@pytest.mark.parametrize("group, field, value, expected", [
    ("images", "id", "7", "a whole number"), ("images", "id", 2**63, "below 2^63"), ("images", "id", 1, "unique"),
    ("images", "file_name", None, "a path below the image folder"),
    ("images", "width", 0, "a whole number of pixels"),
    ("images", "height", 99.5, "a whole number of pixels"),
    ("categories", "id", "2", "a whole number"), ("categories", "id", 1, "unique"),
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
    path = own_dataset / VAL
    entry_id = json.loads(path.read_text())[group][1]["id"]
    if field == "id":
        entry_id = value
    edit_json(path, lambda content: content[group][1].update({field: value}))
    with pytest.raises(InputError) as error:
        data.read_annotations(path, classes=91, masks=True)
    message = str(error.value)
    assert message.startswith(f"{path}: {group}[1], with id {entry_id!r}: its {field} is ")
    assert expected in message


@pytest.mark.parametrize("classes, category", [(91, 0), (91, 91), (3, 3)])
def test_categories_that_the_detector_does_not_have_are_named(own_dataset, classes, category):
    def edit(content):
        content["categories"].append({"id": category, "name": "x"})
        content["annotations"][4]["category_id"] = category

    edit_json(own_dataset / VAL, edit)
    with pytest.raises(InputError, match=rf"annotations\[4\].*category_id is {category}, not one of "
                                         f"the detector's classes, 1 to {classes - 1}"):
        data.read_annotations(own_dataset / VAL, classes, masks=False)


@pytest.mark.parametrize("counts, is_whole", [
    ([30, 20, 70], True), ([30, 20], False), ([30, 200], False), ([130, -10], False),
    ([30, 20, "70"], False), (None, False)])
def test_run_lengths_must_cover_the_image(counts, is_whole):
    """pycocotools fills what runs do not cover with whatever is in memory."""
    assert data.is_mask({"size": [10, 12], "counts": counts}, [10, 12]) == is_whole
    assert not data.is_mask({"size": [12, 10], "counts": counts}, [10, 12])


VALUES = [None, "x", [], {}, -1, 0, 1e99, float("nan"), float("inf"), True, ...]  # ...: missing


@pytest.mark.parametrize("group, field", [
    *(("images", field) for field in ("id", "file_name", "width", "height")),
    *(("annotations", field) for field in (
        "id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation")),
    *(("categories", field) for field in ("id", "name"))])
def test_any_value_of_any_field_gives_metrics_of_pycocotools_or_is_named(
        group, field, own_dataset, perfect, tmp_path):
    path = own_dataset / VAL
    whole = path.read_bytes()
    for value in VALUES:
        path.write_bytes(whole)

        def edit(content, value=value):
            content[group][0].pop(field)
            if value is not ...:
                content[group][0][field] = value

        edit_json(path, edit)
        try:
            content = data.read_annotations(path, classes=91, masks=True)
        except InputError as error:
            message = str(error)
            if group == "categories" and "its category_id is 1, not one of the ids" in message:
                continue  # of the category that is no longer listed
            assert f"{path}: {group}[0]" in message and f"its {field} is " in message
            continue
        coco = evaluate.make_coco(content)
        known = [r for r in perfect if r["image_id"] in coco.imgs]
        for iou_type in ("bbox", "segm"):
            repaired, results = tmp_path / "repaired.json", tmp_path / "results.json"
            repaired.write_text(json.dumps(content))
            results.write_text(json.dumps(evaluate.results_of_type(known, iou_type)))
            metrics = evaluate.coco_metrics(coco, known, sorted(coco.getImgIds()), iou_type)
            assert metrics == plain_metrics(repaired, results, iou_type)


# What real exporters write: COCOeval would give wrong figures for it, or right ones that mislead.


def annotations_of(content):
    return content["annotations"]


def one_off(content):
    for annotation in content["annotations"]:
        annotation["category_id"] -= 1


def from_zero(content):
    for entry in content["annotations"]:
        entry["category_id"] -= 1
    for category in content["categories"]:
        category["id"] -= 1


def set_all(field, value):
    return lambda content: [a.update({field: value}) for a in content["annotations"]]


def move_all_images(content):
    for annotation in content["annotations"]:
        annotation["image_id"] += 1000


@pytest.mark.parametrize("edit, message", [
    (lambda c: c["images"][3].update(id=2**64), r"images\[3\].* its id is 18446744073709551616, not"),
    (one_off, r"category_id is 0, not one of the ids that the file's categories have \(1, 2\), and"),
    (from_zero, "category_id is 0, not one of the detector's .* add 1 to every category id.*, and "),
    (set_all("iscrowd", 1), r"all annotations are crowds \(iscrowd 1\)"),
    (set_all("segmentation", []), "has no masks: all .* segmentations are empty"),
    (set_all("bbox", [float("inf")] * 4), r"annotations\[0\].* not four finite numbers, and "),
    (move_all_images, "the file does not list the image of any annotation")])
def test_whole_files_that_cannot_be_right_are_refused_with_a_count(own_dataset, edit, message):
    edit_json(own_dataset / VAL, edit)
    count = len(json.loads((own_dataset / VAL).read_text())["annotations"])
    with pytest.raises(InputError, match=message) as error:
        data.read_annotations(own_dataset / VAL, classes=3, masks=True)
    assert str(error.value).startswith(str(own_dataset / VAL))
    if message.endswith(", and "):
        more = int(str(error.value).rpartition(", and ")[2].split()[0])
        assert 0 < more < count


def centres(content):
    for annotation in content["annotations"]:
        x, y, width, height = annotation["bbox"]
        annotation["bbox"] = [x + width / 2, y + height / 2, width, height]


def a_pixel_outside(content):
    for annotation in content["annotations"]:
        image = next(i for i in content["images"] if i["id"] == annotation["image_id"])
        annotation["bbox"] = [-1, -1, image["width"] + 2, image["height"] + 2]
        del annotation["area"]


@pytest.mark.parametrize("edit, text", [
    (lambda content: None, "2 of 20 annotations are crowds (iscrowd 1), which metrics ignore"),
    (centres, "boxes leave their images; the first is ["),
    (set_all("area", 0), "20 of 20 areas are far from those of box and mask"),
    (set_all("area", 1e9), "20 of 20 areas are far from those of box and mask"),
    (lambda content: content["categories"].append({"id": 7}),
     "the highest category id is 7, and that of the detector 2: is it the right --teacher-ckpt?"),
    (a_pixel_outside, ""), (drop("area"), "")])
def test_what_is_unlikely_is_told_in_a_line(own_dataset, edit, text, capsys):
    edit_json(own_dataset / VAL, edit)
    content = data.read_annotations(own_dataset / VAL, classes=3, masks=True)
    lines = capsys.readouterr().out.replace(str(len(content["annotations"])), "20").splitlines()
    assert any(text in line for line in lines)
    expected = 2 if text and "crowds" not in text else 1  # crowds are in the unspoilt file, too
    assert len(lines) == expected


# ---- images --------------------------------------------------------------------------------------


def palette_with_transparency(image):
    image = image.quantize(16)
    image.info["transparency"] = 3
    return image


def test_of_16_bit_colours_the_upper_bits_are_taken(tmp_path):
    def chunk(name, content):
        return (struct.pack(">I", len(content)) + name + content
                + struct.pack(">I", zlib.crc32(name + content)))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)  # a pixel of RGB with 16 bits a value
    pixel = struct.pack(">BHHH", 0, 40000, 300, 65535)
    path = tmp_path / "x.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
                     + chunk(b"IDAT", zlib.compress(pixel)) + chunk(b"IEND", b""))
    assert data.read_image(path).flatten().tolist() == [40000 >> 8, 300 >> 8, 65535 >> 8]


@pytest.mark.parametrize("name, convert", [
    ("x.jpg", lambda image: image), ("x.jpg", lambda image: image.convert("L")),
    ("x.jpg", lambda image: image.convert("CMYK")), ("x.png", lambda image: image.convert("1")),
    ("x.png", lambda image: image.convert("RGBA")), ("x.png", lambda image: image.convert("LA")),
    ("x.png", palette_with_transparency), ("x.gif", lambda image: image.convert("P")),
    ("x.webp", lambda image: image), ("x.bmp", lambda image: image)])
def test_images_of_all_kinds_are_what_pillow_makes_of_them(name, convert, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    convert(Image.fromarray(pixels)).save(tmp_path / name)
    wanted = np.array(Image.open(tmp_path / name).convert("RGB")).transpose(2, 0, 1)
    image = data.read_image(tmp_path / name)
    assert image.is_contiguous() and image.shape == (3, 40, 30)
    assert same(image, torch.from_numpy(wanted))


def test_a_photo_with_a_preview_is_the_photo(tmp_path):
    """And an animation is its first picture."""
    photo, preview = (Image.new("RGB", size, "red") for size in ((40, 30), (8, 6)))
    for kind in ("MPO", "GIF", "WEBP"):
        photo.save(tmp_path / "x.jpg", kind, save_all=True, append_images=[preview.resize((40, 30))])
        assert data.read_image(tmp_path / "x.jpg").shape == (3, 30, 40)


def broken_images(folder):
    """Yield files that are no image of 8 bits, and what is to be said of them."""
    path = folder / "x.jpg"
    yield path, "cannot be decoded: .*No such file"
    Image.effect_noise((60, 60), 90).save(path)
    whole = path.read_bytes()
    for raw in (b"", b"text", whole[:100], whole[:-1000]):
        path.write_bytes(raw)
        yield path, "cannot be decoded: "
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(path, "PNG")
    yield path, "more than 8 bits a value"
    Image.fromarray(np.full((9, 9), 0.5, np.float32)).save(path, "TIFF")
    yield path, "more than 8 bits a value"


def test_images_that_cannot_be_used_are_named(tmp_path):
    for path, reason in broken_images(tmp_path):
        with pytest.raises(InputError, match=f"image {path} .*{reason}"):
            data.read_image(path)


def test_dataset_flips_and_names_images_of_another_size(own_dataset):
    images, folder = data.load_train_split(own_dataset, 1333)
    dataset = data.CocoImages(images, folder)
    for i, info in enumerate(images):
        image, flipped = dataset[i, False], dataset[i, True]
        assert image.dtype == torch.uint8 and image.shape == (3, info.height, info.width)
        assert torch.equal(flipped, image.flip(-1)) and not torch.equal(flipped, image)
    swapped = images[0]._replace(width=images[0].height, height=images[0].width)
    with pytest.raises(InputError) as error:
        data.CocoImages([swapped], folder)[0, False]
    for text in (f"{folder / swapped.file_name} has {swapped.height} x {swapped.width} pixels",
                 f"{swapped.width} x {swapped.height} in the annotation file", "EXIF"):
        assert text in str(error.value)


# ---- batches -------------------------------------------------------------------------------------


def test_aspect_ratio_groups_on_and_beside_every_edge():
    edges, heights = 2 ** np.linspace(-1, 1, 7), np.full(7, 10_000.0)
    below = np.nextafter(edges * heights, 0) * (1 - 1e-12)
    assert data.aspect_ratio_groups(edges * heights, heights).tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert data.aspect_ratio_groups(below, heights).tolist() == [0, 1, 2, 3, 4, 5, 6]
    widths, heights = [100, 200, 640, 480, 427, 500], [300, 100, 480, 640, 640, 500]
    assert data.aspect_ratio_groups(widths, heights).tolist() == [0, 7, 5, 2, 2, 4]


@pytest.mark.parametrize("order, groups, batch_size, wanted", [
    (range(11), "01010101100", 3, [[0, 2, 4], [1, 3, 5], [6, 9, 10]]),  # none is missing
    (range(11), "01010101100", 4, [[0, 2, 4, 6], [1, 3, 5, 7]]),
    ([*range(11), 0], "01010101100", 4, [[0, 2, 4, 6], [1, 3, 5, 7], [9, 10, 0, 0]]),  # not 8
    (range(8), "00011122", 4, [[0, 1, 2, 0], [3, 4, 5, 3]]),
    ([5, 7, 9, 11], {5: 0, 7: 1, 9: 2, 11: 3}, 4, [[5, 5, 5, 5]])])  # too few to fill a batch
def test_batches_fill_up_in_order_then_from_what_was_seen(order, groups, batch_size, wanted):
    assert data.group_batches(order, groups, batch_size) == wanted


def batches_of(images, seed, epoch, rank=0, world_size=1, first_batch=0):
    batches = data.GroupedBatches(images, 4, rank, world_size, seed)
    batches.epoch = epoch
    batches.first_batch = first_batch
    found = list(batches)
    assert len(found) == len(batches) - first_batch
    assert len(batches) == -(-len(images) // world_size) // 4
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_an_epoch_is_shared_out_whole_and_by_group(world_size):
    images, seen = make_images(500), set()
    groups = data.aspect_ratio_groups([i.width for i in images], [i.height for i in images])
    for rank in range(world_size):
        batches = batches_of(images, 0, 3, rank, world_size)
        for batch in batches:
            assert len(batch) == 4 and len({groups[position] for position, _ in batch}) == 1
            seen.update(position for position, _ in batch)
        for first_batch in (1, 7, len(batches)):
            assert batches_of(images, 0, 3, rank, world_size, first_batch) == batches[first_batch:]
    assert len(seen) > 500 - 8 * 3 * world_size  # at most 3 left over in each group are not seen


def test_order_and_flips_are_functions_of_seed_epoch_and_image():
    images = make_images(300)
    first, later = batches_of(images, 0, 2), batches_of(images, 0, 3)
    assert batches_of(images, 0, 2) == first != later and first != batches_of(images, 1, 2)
    flips = dict(key for batch in first for key in batch)
    share = [key for batch in batches_of(images, 0, 2, 1, 3) for key in batch]
    assert all(flips[position] == flip for position, flip in share if position in flips)
    assert 0.4 < np.mean(list(flips.values())) < 0.6
    changed = [flips[position] != flip for batch in later for position, flip in batch
               if position in flips]
    assert 0.3 < np.mean(changed) < 0.7


# ---- loaders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [None, "fork", "spawn"])
def test_loader_gives_this_processs_batches_under_every_start_method(
        method, own_dataset, monkeypatch):
    images, folder = data.load_train_split(own_dataset, 1333)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    dataset = data.CocoImages(images, folder)
    workers = 2 if method else 0
    loader = data.train_loader(images, folder, 4, seed=7, workers=workers, device=CPU)
    if method:
        loader.multiprocessing_context = method
    for epoch, first_batch in ((0, 0), (1, 2)):
        loader.batch_sampler.epoch = epoch
        loader.batch_sampler.first_batch = first_batch
        wanted = batches_of(images, 7, epoch, 1, 2, first_batch)
        assert wanted
        assert same(list(loader), [[dataset[key] for key in b] for b in wanted])


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_validation_images_are_shared_without_gaps_or_doubles(dataset, world_size):
    content = data.read_instances(dataset / "annotations" / "instances_val2017.json")
    images, shapes = data.image_infos(content), {}
    for rank in range(world_size):
        share = images[rank::world_size]
        loader = data.val_loader(share, dataset / "val2017", 0, CPU)
        loaded = [tuple(image.shape) for image in loader]
        shapes |= dict(zip(range(rank, len(images), world_size), loaded, strict=True))
    assert shapes == {i: (3, info.height, info.width) for i, info in enumerate(images)}


def test_a_small_shared_memory_is_noticed_at_the_start(monkeypatch):
    images = [data.ImageInfo(i, "x.jpg", 640, 480) for i in range(9)]
    usage = data.shutil.disk_usage("/")._replace(free=64 * 2**20)
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(InputError, match="/dev/shm has 64 MiB free, .* need 95 MiB; give --workers 0"):
        data.check_shared_memory(images, 4, workers=4)
    data.check_shared_memory(images, 4, workers=0)
    data.check_shared_memory(images, 1, workers=4)


VOC = """<annotation><size><width>64</width><height>48</height></size>
<object><name>wolf</name><difficult>1</difficult>
<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>64</xmax><ymax>48</ymax></bndbox></object>
<object><name>bear</name><bndbox><xmin>11</xmin><ymin>21</ymin><xmax>30</xmax><ymax>21</ymax></bndbox>
</object></annotation>"""


def test_a_data_set_in_vocs_layout_is_converted(tmp_path):
    voc_dir = tmp_path / "voc"
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (voc_dir / folder).mkdir(parents=True)
    for name, split in (("a", "trainval"), ("b", "test")):
        (voc_dir / "Annotations" / f"{name}.xml").write_text(VOC)
        (voc_dir / "ImageSets" / "Main" / f"{split}.txt").write_text(name + "\n")
        Image.new("RGB", (64, 48)).save(voc_dir / "JPEGImages" / f"{name}.jpg")
    convert(voc_dir, tmp_path / "coco")
    images, _ = data.load_train_split(tmp_path / "coco", 64, None)
    assert [(info.file_name, info.width, info.height) for info in images] == [("a.jpg", 64, 48)]
    annotation_file, _ = data.split_paths(tmp_path / "coco", "val2017")
    content = data.read_annotations(annotation_file, 3, masks=False)
    assert content["categories"] == [{"id": 1, "name": "bear"}, {"id": 2, "name": "wolf"}]
    assert [(a["category_id"], a["bbox"], a["area"], a["iscrowd"]) for a in content["annotations"]
            ] == [(2, [0, 0, 64, 48], 3072, 1), (1, [10, 20, 20, 1], 20, 0)]


@pytest.mark.parametrize("flips", [(False, False), (True, False), (False, True), (True, True)])
def test_what_a_teacher_is_trained_on_is_flipped_with_its_image(dataset, flips):
    annotation_file, folder = data.split_paths(dataset, "train2017")
    content = data.read_annotations(annotation_file, 3, masks=True)
    coco = evaluate.make_coco(content)
    for info in data.image_infos(content)[:4]:
        image, target = load_example(coco, folder, info, (False, False), with_masks=True)
        flipped, flipped_target = load_example(coco, folder, info, flips, with_masks=True)
        axes = [axis for axis, is_flipped in zip((-1, -2), flips) if is_flipped]
        assert torch.equal(flipped.flip(axes), image)
        assert torch.equal(flipped_target["masks"].flip(axes), target["masks"])
        for box, mask in zip(flipped_target["boxes"], flipped_target["masks"]):
            rows, columns = mask.nonzero().T
            around = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (box - around).abs().max() <= 1
