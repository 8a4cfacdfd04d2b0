"""COCO without its labels: which images, in which batches, their bytes. Also the demo data set."""

import contextlib
import hashlib
import itertools
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.io
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler
from torchvision.datasets.folder import pil_loader
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

import distributed

# ---- the index: all that training needs of 450 MB of annotations ---------------------------------
# An array of records, the images of one annotation file by ascending id: id, name (of the file,
# below the image folder), width, height (pixels), usable (has an annotation to train with).
Index = np.recarray


@contextlib.contextmanager
def reading(annotation_file: Path) -> Iterator[None]:
    """Turn whatever the block raises into a ValueError that names the annotation file."""
    try:
        yield
    except Exception as error:  # each kind of damage has its own
        raise ValueError(f"{annotation_file} is not a whole COCO instances file "
                         f"({type(error).__name__}: {error})") from error


def parse_annotations(annotation_file: Path) -> Index:
    """Read a COCO instances file into an Index. Raises ValueError, naming it, if it is broken.

    An image is usable when it has an annotation, crowd or not, whose box has a width and a height
    of more than 1 pixel (torchvision references, _has_valid_annotation).
    """
    with reading(annotation_file):
        content = json.loads(annotation_file.read_bytes())
        usable = {a["image_id"] for a in content["annotations"] if min(a["bbox"][2:]) > 1}
        images = {image["id"]: image for image in content["images"]}  # of two with one id, the last
        columns = zip(*((i, images[i]["file_name"], images[i]["width"], images[i]["height"],
                         i in usable) for i in sorted(images)), strict=True)
        kinds = (np.int64, str, np.int64, np.int64, bool)
        index = np.rec.fromarrays(
            [np.array(column, kind) for column, kind in zip(columns, kinds, strict=True)],
            names="id, name, width, height, usable")
        if min(index.width.min(), index.height.min()) < 1:
            raise ValueError("an image has no width or no height")
        return index


def load_index(annotation_file: Path) -> Index:
    """Index an annotation file, or take the index that was cached in torch.hub's folder before."""
    if not annotation_file.is_file():
        raise FileNotFoundError(f"{annotation_file} is missing; --data-dir must hold annotations/, "
                                "train2017/ and val2017/ as COCO does")
    stat = annotation_file.stat()
    key = f"1 {annotation_file.resolve()} {stat.st_size} {stat.st_mtime_ns}"  # 1: format's version
    digest = hashlib.sha256(key.encode()).hexdigest()
    cache = Path(torch.hub.get_dir(), f"ghnd_index_{digest[:16]}.npy")
    with contextlib.suppress(Exception):  # not there, or torn
        return np.load(cache).view(Index)
    index = parse_annotations(annotation_file)
    with contextlib.suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.save(cache, index)
    return index


def load_split(data_dir: Path, split: str, limit: int | None = None) -> tuple[Index, Path]:
    """Return the first `limit` images of "train" (usable ones) or "val" (all), and their folder.

    Raises FileNotFoundError or ValueError, naming the path, also where an image is not there.
    """
    folder = data_dir / f"{split}2017"
    annotation_file = data_dir / "annotations" / f"instances_{split}2017.json"
    index = distributed.from_main(load_index, annotation_file)
    index = (index[index.usable] if split == "train" else index)[:limit]
    if len(index) == 0:
        raise ValueError(f"{data_dir} has no images to use in its {split}2017 annotations")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}/ is missing; --data-dir must hold COCO's images")
    present = set(os.listdir(folder))
    missing = [name for name in index.name.tolist()
               if name not in present and not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(f"image {folder / missing[0]} is missing, the first of "
                                f"{len(missing)} that {annotation_file.name} names")
    return index, folder

# ---- images --------------------------------------------------------------------------------------
def read_image(path: Path) -> Tensor:
    """Decode a JPEG or PNG file to RGB, (3, h, w) uint8; greyscale is repeated on the 3 channels.

    By torchvision or, for the day when its decoders are gone, by Pillow, with the same pixels.
    """
    if not path.is_file():
        raise FileNotFoundError(f"image {path} is missing")
    try:
        if hasattr(torchvision.io, "decode_image"):
            return torchvision.io.decode_image(str(path), torchvision.io.ImageReadMode.RGB)
        return pil_to_tensor(pil_loader(path))
    except Exception as error:  # either has its own kinds for as many kinds of damage
        raise ValueError(f"image {path} cannot be decoded: {str(error).splitlines()[0]}") from error


class CocoImages(Dataset):
    """Images alone: nothing in GHND's loss reads a label. Indexed by (position, flip)."""
    def __init__(self, index: Index, folder: Path) -> None:
        self.names, self.folder = index.name, folder

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, key: tuple[int, bool]) -> Tensor:
        position, flip = key
        image = read_image(self.folder / self.names[position])  # (3, h, w) uint8
        return image.flip(-1) if flip else image

# ---- batches -------------------------------------------------------------------------------------
def aspect_ratio_groups(widths: np.ndarray, heights: np.ndarray, k: int = 3) -> np.ndarray:
    """Group images by width / height: (N,) ints from 0 to 2k + 1.

    The bins are 2 ** linspace(-1, 1, 2k + 1); an edge is in the upper group (torchvision
    references, create_aspect_ratio_groups).
    """
    return np.searchsorted(2 ** np.linspace(-1, 1, 2 * k + 1), widths / heights, side="right")


def group_batches(order: Iterable[int], groups: Sequence[int], batch_size: int) -> list[list[int]]:
    """Cut an order of images into batches of one group each, in the order in which they fill up.

    Left-over groups, largest first, are filled up from what was first seen in them, repeated if
    need be, until there are len(order) // batch_size batches (torchvision, GroupedBatchSampler).
    """
    batches, pending, seen = [], defaultdict(list), defaultdict(list)
    for image in order:
        group = groups[image]
        pending[group].append(image)
        seen[group].append(image)
        if len(pending[group]) == batch_size:
            batches.append(pending.pop(group))
            pending[group] = []  # last in the dict again: it decides between equal left-overs
    missing = sum(map(len, seen.values())) // batch_size - len(batches)
    for group in sorted(pending, key=lambda group: len(pending[group]), reverse=True)[:missing]:
        fill = itertools.islice(itertools.cycle(seen[group]), batch_size - len(pending[group]))
        batches.append(pending[group] + list(fill))
    return batches


class GroupedBatches(Sampler):
    """This process's batches of (position, flip), a function of (seed, epoch, rank) alone.

    The order is DistributedSampler's; flips follow from seed, epoch and image. Set `epoch` before
    each pass, and `skip`, the number of batches to leave out, to take up an epoch in its midst.
    """
    def __init__(self, index: Index, batch_size: int, rank: int, world_size: int,
                 seed: int = 0) -> None:
        self.groups = aspect_ratio_groups(index.width, index.height).tolist()
        self.shuffle = DistributedSampler(range(len(index)), world_size, rank, seed=seed)
        self.batch_size, self.seed, self.epoch, self.skip = batch_size, seed, 0, 0

    def __len__(self) -> int:
        return len(self.shuffle) // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        self.shuffle.set_epoch(self.epoch)
        flips = np.random.default_rng((self.seed, self.epoch)).random(len(self.groups)) < 0.5
        for batch in group_batches(self.shuffle, self.groups, self.batch_size)[self.skip:]:
            yield [(image, bool(flips[image])) for image in batch]


def make_loader(index: Index, folder: Path, workers: int, **batching: Any) -> DataLoader:
    """Load images in workers, which leave signals to this process and may be stuck for 10 min."""
    return DataLoader(CocoImages(index, folder), num_workers=workers, **batching,
                      timeout=600 if workers else 0, worker_init_fn=distributed.ignore_signals,
                      pin_memory=torch.cuda.is_initialized())


def train_loader(
    index: Index, folder: Path, batch_size: int, seed: int, workers: int
) -> DataLoader:
    """Load this process's GroupedBatches, as lists of uint8 images, in workers that stay alive."""
    batches = GroupedBatches(
        index, batch_size, distributed.rank(), distributed.world_size(), seed)
    return make_loader(index, folder, workers, batch_sampler=batches, collate_fn=list,
                       persistent_workers=workers > 0)


def val_loader(index: Index, folder: Path, workers: int) -> DataLoader:
    """Load this process's share of the images, positions rank, rank + world, ..., one by one."""
    mine = range(distributed.rank(), len(index), distributed.world_size())
    return make_loader(index, folder, min(workers, len(mine)), batch_size=None,
                       sampler=[(position, False) for position in mine])

# ---- the demo data set ---------------------------------------------------------------------------
def write_demo_dataset(data_dir: Path, train: int = 128, val: int = 8, seed: int = 0) -> None:
    """Draw a small data set in COCO's layout: real JPEG files of coloured boxes and ellipses.

    Sizes and orientations vary; every 8th image is greyscale and every 7th has no annotation.
    """
    rng = np.random.default_rng(seed)
    angles = np.arange(16) * np.pi / 8
    for split, count in (("train", train), ("val", val)):
        folder = data_dir / f"{split}2017"
        folder.mkdir(parents=True, exist_ok=True)
        images, annotations = [], []
        for i in range(1, count + 1):
            w, h = sorted(rng.integers(160, 320, 2).tolist(), reverse=bool(rng.random() < 0.75))
            xy = np.stack(np.meshgrid(np.arange(w), np.arange(h)), axis=-1)  # (h, w, 2)
            picture = 128 + 60 * np.sin(xy @ rng.normal(size=(2, 3)) / 60)   # (h, w, 3), 0 to 255
            for _ in range(int(rng.integers(1, 5)) if i % 7 else 0):
                half, category = rng.uniform(12, 50, 2), int(rng.integers(1, 3))
                centre = rng.uniform(half, np.array([w, h]) - half - 1)
                norm = {1: np.inf, 2: 2}[category]  # whose unit ball is a square, a circle
                inside = np.linalg.norm((xy - centre) / half, norm, axis=-1, keepdims=True) <= 1
                picture = np.where(inside, rng.uniform(0, 255, 3), picture)
                outline = np.stack([np.cos(angles), np.sin(angles)], axis=1)
                outline = outline / np.linalg.norm(outline, norm, axis=1, keepdims=True)
                annotations.append({
                    "id": len(annotations) + 1, "image_id": i, "category_id": category,
                    "bbox": [*(centre - half), *(2 * half)], "area": 4 * half.prod(), "iscrowd": 0,
                    "segmentation": [(centre + half * outline).flatten().tolist()]})
            name = f"{i:012d}.jpg"
            images.append({"id": i, "file_name": name, "width": w, "height": h})
            pixels = picture.astype(np.uint8)
            pixels = to_pil_image(pixels if i % 8 else pixels.mean(-1, keepdims=True).astype("u1"))
            pixels.save(folder / name, quality=90)
        categories = [{"id": 1, "name": "box"}, {"id": 2, "name": "ellipse"}]
        file = data_dir / "annotations" / f"instances_{split}2017.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(
            {"images": images, "annotations": annotations, "categories": categories}))
