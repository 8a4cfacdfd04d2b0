import json
import os
import shutil

import numpy as np
import pytest
import torch
import torchvision.io
from conftest import changed, same

import data


def make_index(n):
    widths, heights = np.random.default_rng(0).integers(100, 640, (2, n))
    return np.rec.fromarrays([np.arange(n), widths, heights], names="id, width, height")


# ---- the index -----------------------------------------------------------------------------------
def test_usable_images_are_those_of_the_recipe(tmp_path):
    images = [dict(id=i, file_name=f"{i}.jpg", width=100 + i, height=50 + i)
              for i in (9, 1, 2, 3, 4, 5, 6, 7, 8)]
    annotations = [dict(image_id=i, bbox=[0, 0, w, h], iscrowd=crowd) for i, w, h, crowd in [
        (1, 5, 5, 0), (2, 50, 60, 1), (3, 1, 50, 0), (3, 50, 1, 0), (3, 0, 0, 1), (4, 1, 9, 0),
        (4, 1.01, 1.01, 0), (6, 0.5, 0.5, 1), (7, 1, 1, 0), (7, 3, 2, 1), (8, -4, 9, 0)]]
    (tmp_path / "a.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    assert data.parse_annotations(tmp_path / "a.json").tolist() == [
        (i, f"{i}.jpg", 100 + i, 50 + i, i in (1, 2, 4, 7)) for i in range(1, 10)]


def test_aspect_ratio_groups_on_and_beside_every_edge():
    edges, heights = 2 ** np.linspace(-1, 1, 7), np.full(7, 10_000.0)
    below = np.nextafter(edges * heights, 0) * (1 - 1e-12)
    assert data.aspect_ratio_groups(edges * heights, heights).tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert data.aspect_ratio_groups(below, heights).tolist() == [0, 1, 2, 3, 4, 5, 6]
    widths, heights = np.array([[100, 200, 640, 480, 427, 500], [300, 100, 480, 640, 640, 500]])
    assert data.aspect_ratio_groups(widths, heights).tolist() == [0, 7, 5, 2, 2, 4]


def test_index_is_cached_and_no_state_of_the_cache_does_harm(own_dataset, tmp_path, monkeypatch):
    parsed, parse = [], data.parse_annotations
    monkeypatch.setattr(data, "parse_annotations", lambda path: parsed.append(0) or parse(path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    path = own_dataset / "annotations" / "instances_val2017.json"
    first, second = data.load_index(path), data.load_index(path)
    assert len(parsed) == 1 and first.dtype == second.dtype and first.tolist() == second.tolist()
    assert isinstance(second, data.Index) and len(list(path.parent.iterdir())) == 2  # not there
    (cache,) = (tmp_path / "home" / "hub").iterdir()
    whole = cache.read_bytes()
    for torn in (b"", b"junk", whole[:5], whole[:100], whole[:-1]):
        cache.write_bytes(torn)
        assert data.load_index(path).tolist() == first.tolist() and cache.read_bytes() == whole
    stat = path.stat()
    path.write_text(path.read_text().replace('"width": 2', '"width": 1'))  # the same size
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert data.load_index(path).tolist() == parse(path).tolist() != first.tolist()
    shutil.rmtree(cache.parent)
    cache.parent.touch()  # as if it could not be written, also for root
    assert data.load_index(path).tolist() == parse(path).tolist() and len(parsed) == 8


@pytest.mark.parametrize("text, reason", [
    ('{"images": [{"id": 1', "JSONDecodeError: "), ("\x00\xff", "(JSON|Unicode)DecodeError: "),
    ("[]", "TypeError: "), ("{}", "KeyError: 'anno"), ('{"annotations": []}', "KeyError: 'images'"),
    ('{"annotations": [], "images": 3}', "TypeError: "),
    ('{"annotations": [], "images": []}', "ValueError: "),
    ('{"annotations": [], "images": [{"id": 1}]}', "KeyError: 'file_name'"),
    ('{"annotations": [{"image_id": 1, "caption": "x"}], "images": []}', "KeyError: 'bbox'"),
    ('{"annotations": [], "images": [{"id": 1, "file_name": "1", "width": 0, "height": 9}]}',
     "ValueError: an image has no width"),
    ('{"annotations": [], "images": [{"id": "a", "file_name": "1", "width": 1, "height": 9}]}',
     "ValueError: invalid literal")])
def test_broken_annotation_files_are_named(tmp_path, monkeypatch, text, reason):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    (tmp_path / "a.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=f"a.json is not a whole COCO instances file .{reason}"):
        data.load_index(tmp_path / "a.json")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]  # and no cache of it


def test_split_takes_what_is_usable_and_names_what_is_missing(dataset, own_dataset, tmp_path):
    train, folder = data.load_split(dataset, "train")
    file = own_dataset / "annotations" / "instances_train2017.json"
    annotated = {a["image_id"] for a in json.loads(file.read_text())["annotations"]}
    assert set(train.id.tolist()) == annotated and len(annotated) < 36
    assert folder == dataset / "train2017" and len(data.load_split(dataset, "val")[0]) == 11
    with pytest.raises(FileNotFoundError, match="instances_train2017.json is missing; --data-dir"):
        data.load_split(tmp_path / "nowhere", "train")
    for image in (6, 9):
        (own_dataset / "val2017" / f"{image:012d}.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="val2017/0+6.jpg is missing, the first of 2 that "):
        data.load_split(own_dataset, "val")
    assert data.load_split(own_dataset, "val", 5)[0].id.tolist() == [1, 2, 3, 4, 5]
    (own_dataset / "val2017").rename(own_dataset / "elsewhere")
    with pytest.raises(FileNotFoundError, match="val2017/ is missing"):
        data.load_split(own_dataset, "val")
    changed(file, lambda content: content["annotations"].clear())
    with pytest.raises(ValueError, match="no images to use in its train2017"):
        data.load_split(own_dataset, "train")


# ---- images --------------------------------------------------------------------------------------
@pytest.mark.parametrize("pillow", [False, True])
def test_images_are_rgb_flipped_and_named_if_broken(dataset, tmp_path, monkeypatch, pillow):
    index, folder = data.load_split(dataset, "train")
    grey, bad = folder / "000000000008.jpg", tmp_path / "bad.jpg"
    assert len(torchvision.io.decode_image(str(grey))) == 1
    if pillow:
        monkeypatch.delattr(torchvision.io, "decode_image")
    images = data.CocoImages(index, folder)
    for i, record in enumerate(index):
        image, flipped = images[i, False], images[i, True]
        assert image.dtype == torch.uint8 and image.shape == (3, record.height, record.width)
        assert torch.equal(flipped, image.flip(-1)) and not torch.equal(flipped, image)
    assert (data.read_image(grey) == data.read_image(grey)[0]).all()
    with pytest.raises(FileNotFoundError, match="bad.jpg is missing"):
        data.read_image(bad)
    for raw in (b"", b"text", grey.read_bytes()[:100], grey.read_bytes()[:-1000]):
        bad.write_bytes(raw)
        with pytest.raises(ValueError, match="bad.jpg cannot be decoded: .+"):
            data.read_image(bad)


# ---- batches -------------------------------------------------------------------------------------
@pytest.mark.parametrize("order, groups, batch_size, wanted", [
    (range(11), "01010101100", 3, [[0, 2, 4], [1, 3, 5], [6, 9, 10]]),  # none is missing
    (range(11), "01010101100", 4, [[0, 2, 4, 6], [1, 3, 5, 7]]),
    ([*range(11), 0], "01010101100", 4, [[0, 2, 4, 6], [1, 3, 5, 7], [9, 10, 0, 0]]),  # not 8
    (range(8), "00011122", 4, [[0, 1, 2, 0], [3, 4, 5, 3]]),
    ([5, 7, 9, 11], {5: 0, 7: 1, 9: 2, 11: 3}, 4, [[5, 5, 5, 5]])])  # too few to fill a batch
def test_batches_fill_up_in_order_then_from_what_was_seen(order, groups, batch_size, wanted):
    assert data.group_batches(order, groups, batch_size) == wanted


def epoch_of(index, seed, epoch, rank=0, world_size=1, skip=0):
    batches = data.GroupedBatches(index, 4, rank, world_size, seed)
    batches.epoch, batches.skip = epoch, skip
    assert len(list(batches)) == len(batches) - skip == -(-len(index) // world_size) // 4 - skip
    return list(batches)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_an_epoch_is_shared_out_whole_and_by_group(world_size):
    index, seen = make_index(500), set()
    groups = data.aspect_ratio_groups(index.width, index.height)
    for rank in range(world_size):
        batches = epoch_of(index, 0, 3, rank, world_size)
        for batch in batches:
            assert len(batch) == 4 and len({groups[image] for image, _ in batch}) == 1
        seen |= {image for batch in batches for image, _ in batch}
        for skip in (1, 7, len(batches)):
            assert epoch_of(index, 0, 3, rank, world_size, skip) == batches[skip:]
    assert len(seen) > 500 - 8 * 3 * world_size  # at most 3 left over in each group are not seen


def test_order_and_flips_are_functions_of_seed_epoch_and_image():
    index = make_index(300)
    first, later, share = ([key for batch in epoch_of(index, 0, *args) for key in batch]
                           for args in ((2,), (3,), (2, 1, 3)))
    assert epoch_of(index, 0, 2) == epoch_of(index, 0, 2) != epoch_of(index, 1, 2)
    flips = dict(first)
    assert first != later and all(flips[image] == flip for image, flip in share if image in flips)
    assert 0.4 < np.mean(list(flips.values())) < 0.6
    assert 0.3 < np.mean([flips[i] != flip for i, flip in later if i in flips]) < 0.7


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_give_the_images_of_this_processs_batches(dataset, workers, monkeypatch):
    index, folder = data.load_split(dataset, "train")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    images, loader = data.CocoImages(index, folder), data.train_loader(index, folder, 4, 7, workers)
    for epoch, skip in ((0, 0), (1, 2)):
        loader.batch_sampler.epoch, loader.batch_sampler.skip = epoch, skip
        wanted = epoch_of(index, 7, epoch, 1, 2, skip)
        assert same(list(loader), [[images[key] for key in batch] for batch in wanted]) and wanted


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_validation_images_are_shared_without_gaps_or_doubles(dataset, world_size, monkeypatch):
    index, folder = data.load_split(dataset, "val")
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    shapes = {}
    for rank in range(world_size):
        monkeypatch.setenv("RANK", str(rank))
        loaded = [tuple(image.shape) for image in data.val_loader(index, folder, 0)]
        shapes |= dict(zip(range(rank, len(index), world_size), loaded, strict=True))
    assert shapes == {i: (3, index.height[i], index.width[i]) for i in range(11)}


# ---- the demo data set ---------------------------------------------------------------------------
def test_demo_dataset_is_coco_and_reproducible(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        data.write_demo_dataset(folder, train=16, val=2)
    files = [{p.relative_to(f): p.read_bytes() for p in f.rglob("*.*")} for f in (a, b)]
    assert files[0] == files[1] and len(files[0]) == 20
    content = json.loads((a / "annotations" / "instances_train2017.json").read_text())
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    for annotation in content["annotations"]:
        low, size = box = np.array(annotation["bbox"]).reshape(2, 2)
        assert (box > [[0], [1]]).all() and (low + size < sizes[annotation["image_id"]]).all()
        points = np.array(annotation["segmentation"]).reshape(-1, 2)  # within its box, as large
        np.testing.assert_allclose([points.min(0), points.max(0)], [low, low + size])
    assert sizes.keys() - {a["image_id"] for a in content["annotations"]} == {7, 14}
    for i, (w, h) in sizes.items():
        pixels = data.read_image(a / "train2017" / f"{i:012d}.jpg")
        assert pixels.shape == (3, h, w) and (pixels == pixels[0]).all() == (i % 8 == 0)
