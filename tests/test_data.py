import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.io
from conftest import changed

import data


def write_annotations(path, sizes, boxes):
    """Write a COCO file: sizes {image id: (w, h)}, boxes [(image id, (w, h), iscrowd)]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(
            {
                "images": [
                    {"id": i, "file_name": f"{i}.jpg", "width": w, "height": h}
                    for i, (w, h) in sizes.items()
                ],
                "annotations": [
                    {
                        "id": n,
                        "image_id": i,
                        "category_id": 1,
                        "bbox": [0, 0, *box],
                        "iscrowd": crowd,
                    }
                    for n, (i, box, crowd) in enumerate(boxes)
                ],
                "categories": [{"id": 1, "name": "thing"}],
            }
        )
    )
    return path


def make_index(n, seed=0):
    rng = np.random.default_rng(seed)
    widths, heights = rng.integers(100, 640, (2, n))
    return data.CocoIndex(
        np.arange(n), np.array([f"{i}.jpg" for i in range(n)]), widths, heights, np.ones(n, bool)
    )


# ---- the index


def test_usable_images_are_those_of_the_recipe(tmp_path):
    path = write_annotations(
        tmp_path / "a.json",
        {i: (100, 100) for i in (9, 1, 2, 3, 4, 5, 6, 7, 8)},
        [
            (1, (5, 5), 0),
            (2, (50, 60), 1),
            (3, (1, 50), 0),
            (3, (50, 1), 0),
            (3, (0, 0), 1),
            (4, (1, 9), 0),
            (4, (1.01, 1.01), 0),
            (6, (0.5, 0.5), 1),
            (7, (1, 1), 0),
            (7, (3, 2), 1),
            (8, (-4, 9), 0),
        ],
    )
    index = data.parse_annotations(path)
    assert index.ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert index.ids[index.usable].tolist() == [
        1,
        2,
        4,
        7,
    ]  # an object, a crowd, one of two, a crowd
    assert index.names[0] == "1.jpg" and (index.widths == 100).all()


def test_aspect_ratio_groups_on_and_beside_every_edge():
    edges = 2 ** np.linspace(-1, 1, 7)
    heights = np.full(7, 10_000.0)
    assert data.aspect_ratio_groups(edges * heights, heights).tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert data.aspect_ratio_groups(
        np.nextafter(edges * heights, 0) * (1 - 1e-12), heights
    ).tolist() == [0, 1, 2, 3, 4, 5, 6]
    widths, heights = (
        np.array([100, 200, 640, 480, 427, 500]),
        np.array([300, 100, 480, 640, 640, 500]),
    )
    # 1/3 | exactly 2 | 1.33 | 0.75 | 0.667 | exactly 1
    assert data.aspect_ratio_groups(widths, heights).tolist() == [0, 7, 5, 2, 2, 4]


def test_index_is_cached_and_the_cache_is_used(tmp_path, monkeypatch):
    path = write_annotations(tmp_path / "a.json", {1: (10, 20), 2: (30, 40)}, [(2, (5, 5), 0)])
    first = data.load_index(path)
    assert (tmp_path / "a.index.npz").is_file()
    monkeypatch.setattr(data, "parse_annotations", lambda path: pytest.fail("parsed again"))
    second = data.load_index(path)
    for name in data.CocoIndex.__annotations__:
        assert getattr(first, name).tolist() == getattr(second, name).tolist()
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []


def test_changed_annotations_and_damaged_caches_are_noticed(tmp_path):
    path = write_annotations(tmp_path / "a.json", {1: (10, 20)}, [(1, (5, 5), 0)])
    data.load_index(path)
    stat = path.stat()
    path.write_text(path.read_text().replace('"width": 10', '"width": 11'))  # the same size
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert data.load_index(path).widths.tolist() == [11]
    cache = tmp_path / "a.index.npz"
    for raw in (b"", cache.read_bytes()[:100], b"junk"):
        cache.write_bytes(raw)
        assert data.load_index(path).widths.tolist() == [11]


def test_cache_moves_elsewhere_when_the_data_folder_is_read_only(tmp_path, monkeypatch):
    path = write_annotations(tmp_path / "data" / "a.json", {1: (10, 20)}, [(1, (5, 5), 0)])
    (tmp_path / "data" / "a.index.npz").mkdir()  # stands in for read-only, also for root
    (tmp_path / "data" / "a.index.npz" / "x").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data.load_index(path)
    assert len(list((tmp_path / "cache" / "ghnd").glob("*.npz"))) == 1
    monkeypatch.setattr(data, "parse_annotations", lambda path: pytest.fail("parsed again"))
    assert data.load_index(path).ids.tolist() == [1]


def test_split_takes_usable_images_for_training_and_all_for_validation(dataset):
    train, folder = data.load_split(dataset, "train")
    content = json.loads((dataset / "annotations" / "instances_train2017.json").read_text())
    annotated = {a["image_id"] for a in content["annotations"]}
    assert set(train.ids.tolist()) == annotated and len(annotated) < len(content["images"])
    assert folder == dataset / "train2017"
    assert len(data.load_split(dataset, "val")[0]) == 11
    assert data.load_split(dataset, "val", 5)[0].ids.tolist() == [1, 2, 3, 4, 5]


# ---- images


def test_images_are_uint8_rgb_and_flipped_on_demand(dataset):
    index, folder = data.load_split(dataset, "train")
    images = data.CocoImages(index, folder)
    for position in range(len(images)):
        image, flipped = images[position, False], images[position, True]
        assert image.dtype == torch.uint8
        assert image.shape == (3, index.heights[position], index.widths[position])
        assert torch.equal(flipped, image.flip(-1)) and not torch.equal(flipped, image)
    grey = data.read_image(folder / "000000000008.jpg")
    assert (
        torchvision.io.decode_image(
            torchvision.io.read_file(str(folder / "000000000008.jpg"))
        ).shape[0]
        == 1
    )
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])


def test_missing_and_corrupt_images_are_named(dataset, tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.jpg is missing"):
        data.read_image(tmp_path / "gone.jpg")
    whole = next((dataset / "train2017").iterdir()).read_bytes()
    for raw in (b"", b"text", whole[:100]):
        (tmp_path / "bad.jpg").write_bytes(raw)
        with pytest.raises(ValueError, match="bad.jpg cannot be decoded"):
            data.read_image(tmp_path / "bad.jpg")


# ---- batches


def test_batches_fill_up_in_order_and_left_overs_are_filled_from_what_was_seen():
    groups = [0, 1, 0, 1, 0, 1, 0, 1, 1, 0, 0]
    # 0: 0 2 4 | 6 9 10; 1: 1 3 5 | 7 8: three full batches, none missing
    assert data.group_batches(range(11), groups, 3) == [[0, 2, 4], [1, 3, 5], [6, 9, 10]]
    # 0: 0 2 4 6 | 9 10; 1: 1 3 5 7 | 8: the larger left-over comes first, filled with 0 and 2
    assert data.group_batches(range(11), groups, 4) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert data.group_batches([*range(11), 0], [*groups], 4)[-1] == [9, 10, 0, 0]
    groups = [0, 0, 0, 1, 1, 1, 2, 2]
    assert data.group_batches(range(8), groups, 4) == [[0, 1, 2, 0], [3, 4, 5, 3]]


def test_a_group_too_small_to_fill_its_batch_is_repeated():
    assert data.group_batches([5, 7, 9, 11], {5: 0, 7: 1, 9: 2, 11: 3}, 4) == [[5, 5, 5, 5]]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_an_epoch_is_shared_out_whole_and_by_group(world_size):
    index = make_index(500)
    groups = data.aspect_ratio_groups(index.widths, index.heights)
    seen, lengths = Counter(), set()
    for rank in range(world_size):
        batches = data.GroupedBatches(index, 4, rank, world_size)
        batches.epoch = 3
        listed = list(batches)
        lengths.add(len(listed))
        assert len(listed) == len(batches) == -(-500 // world_size) // 4
        for batch in listed:
            assert len(batch) == 4 and len({groups[image] for image, _ in batch}) == 1
        seen.update(image for batch in listed for image, _ in batch)
    assert len(lengths) == 1
    assert len(seen) > 500 - 8 * 3 * world_size  # at most 3 left over in each group are not seen


def test_order_and_flips_are_functions_of_seed_epoch_and_image():
    index = make_index(300)

    def epoch(seed, epoch, rank=0, world_size=1):
        batches = data.GroupedBatches(index, 4, rank, world_size, seed)
        batches.epoch = epoch
        return [key for batch in batches for key in batch]

    assert epoch(0, 2) == epoch(0, 2)
    assert epoch(0, 2) != epoch(0, 3) and epoch(0, 2) != epoch(1, 2)
    flips = dict(epoch(0, 2))
    assert flips.items() >= dict(epoch(0, 2, 1, 3)).items() - {
        (i, f) for i, f in epoch(0, 2, 1, 3) if i not in flips
    }
    assert 0.4 < np.mean(list(flips.values())) < 0.6
    assert 0.3 < np.mean([flips[i] != flip for i, flip in epoch(0, 3) if i in flips]) < 0.7


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_give_the_images_of_the_batches(dataset, workers):
    index, folder = data.load_split(dataset, "train")
    images, batches = data.CocoImages(index, folder), data.GroupedBatches(index, 3, 0, 1)
    loader = data.train_loader(images, batches, workers, pin=False)
    for epoch in (0, 1):
        batches.epoch = epoch
        wanted = list(batches)
        loaded = list(loader)
        assert len(loaded) == len(wanted) == len(loader)
        for keys, batch in zip(wanted, loaded):
            assert isinstance(batch, list) and all(
                torch.equal(images[k], i) for k, i in zip(keys, batch)
            )


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_validation_images_are_shared_without_gaps_or_doubles(dataset, world_size, monkeypatch):
    index, folder = data.load_split(dataset, "val")
    images, sizes = data.CocoImages(index, folder), []
    for rank in range(world_size):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        shapes = [tuple(image.shape) for image in data.val_loader(images, 0, pin=False)]
        assert shapes == [
            (3, index.heights[i], index.widths[i]) for i in range(rank, len(index), world_size)
        ]
        sizes.append(len(shapes))
    assert sum(sizes) == len(index)


# ---- the demo data set


def test_demo_dataset_is_coco_and_reproducible(tmp_path):
    for name in ("a", "b"):
        data.write_demo_dataset(tmp_path / name, train=9, val=2)
    files = [p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()]
    assert len(files) == 13
    assert all(
        (tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files
    )
    content = json.loads((tmp_path / "a" / "annotations" / "instances_train2017.json").read_text())
    sizes = {i["id"]: (i["width"], i["height"]) for i in content["images"]}
    assert content["annotations"]
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        image_w, image_h = sizes[annotation["image_id"]]
        assert w > 1 and h > 1 and x >= 0 and y >= 0 and x + w <= image_w and y + h <= image_h
    for path in (tmp_path / "a" / "train2017").iterdir():
        assert data.read_image(Path(path)).shape[0] == 3


# ---- broken annotation files


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"images": [{"id": 1', "no whole JSON file"),
        ("\x00\xff", "no whole JSON file"),
        ("[]", "not a COCO instances file"),
        ('{"images": []}', "needs images, annotations and categories"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": []}', "KeyError: 'file_name'"),
        (
            '{"images": [], "annotations": [{"image_id": 1, "caption": "x"}], "categories": []}',
            "KeyError: 'bbox'",
        ),
        ('{"images": 3, "annotations": [], "categories": []}', "TypeError"),
    ],
)
def test_broken_annotation_files_are_named(tmp_path, text, message):
    path = tmp_path / "instances.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=f"instances.json.*{message}"):
        data.load_index(path)
    assert list(tmp_path.iterdir()) == [path]


def test_missing_folders_and_empty_data_are_named(own_dataset, tmp_path):
    with pytest.raises(
        FileNotFoundError, match="instances_train2017.json is missing; --data-dir must hold"
    ):
        data.load_split(tmp_path / "nowhere", "train")
    (own_dataset / "val2017").rename(own_dataset / "elsewhere")
    with pytest.raises(FileNotFoundError, match="val2017/ is missing"):
        data.load_split(own_dataset, "val")
    changed(
        own_dataset / "annotations" / "instances_train2017.json", lambda c: c["annotations"].clear()
    )
    with pytest.raises(ValueError, match="no images to use in its train2017"):
        data.load_split(own_dataset, "train")
