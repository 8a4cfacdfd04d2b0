import json
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import CPU, edit_json, same
from PIL import Image

import data
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
    with pytest.raises(InputError, match=f"image {folder / images[6].file_name} is missing"):
        data.load_train_split(own_dataset, 1333)
    folder.rename(own_dataset / "elsewhere")
    with pytest.raises(InputError, match="train2017/ is missing"):
        data.load_train_split(own_dataset, 1333)
    file = own_dataset / "annotations" / "instances_train2017.json"
    edit_json(file, lambda content: content["annotations"].clear())
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
    photo, preview = (Image.new("RGB", size, "red") for size in ((40, 30), (8, 6)))
    photo.save(tmp_path / "x.jpg", "MPO", save_all=True, append_images=[preview])
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
    first, *others = [Image.new("RGB", (9, 9), (80 * i, 0, 0)) for i in range(3)]
    for kind in ("GIF", "WEBP", "PNG"):
        first.save(path, kind, save_all=True, append_images=others)
        yield path, "an animation of "


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
    error = data.CocoImages([swapped], folder)[0, False]
    assert isinstance(error, InputError)
    for text in (f"{folder / swapped.file_name} has {swapped.height} x {swapped.width} pixels",
                 f"{swapped.width} x {swapped.height} in the annotation file", "EXIF"):
        assert text in str(error)


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


@pytest.mark.parametrize("method", [None, "fork", "spawn", "forkserver"])
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
        assert same(list(data.iterate(loader)), [[dataset[key] for key in b] for b in wanted])

    for info in images:  # an error reaches the loop as it is, not wrapped by a worker
        (folder / info.file_name).write_bytes(b"damaged")
    loader.batch_sampler.first_batch = 0
    with pytest.raises(InputError) as error:
        next(data.iterate(loader))
    assert str(error.value).startswith("image ") and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_validation_images_are_shared_without_gaps_or_doubles(dataset, world_size, monkeypatch):
    content = data.read_instances(dataset / "annotations" / "instances_val2017.json")
    images, shapes = data.image_infos(content), {}
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    for rank in range(world_size):
        monkeypatch.setenv("RANK", str(rank))
        loader = data.val_loader(images, dataset / "val2017", 0, CPU)
        loaded = [tuple(image.shape) for image in data.iterate(loader)]
        shapes |= dict(zip(range(rank, len(images), world_size), loaded, strict=True))
    assert shapes == {i: (3, info.height, info.width) for i, info in enumerate(images)}


def test_a_small_shared_memory_is_noticed_at_the_start(monkeypatch):
    images = [data.ImageInfo(i, "x.jpg", 640, 480) for i in range(9)]
    usage = data.shutil.disk_usage("/")._replace(free=64 * 2**20)
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(InputError, match="/dev/shm has 64 MiB free, .* take 95; give --workers 0"):
        data.check_shared_memory(images, 4, workers=4)
    data.check_shared_memory(images, 4, workers=0)
    data.check_shared_memory(images, 1, workers=4)
