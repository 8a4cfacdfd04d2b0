"""COCO without its labels: which images, in which batches, their bytes. Also the demo data set.

    python data.py ~/datasets/coco2017        # check that every image is there and can be read
"""

import contextlib
import hashlib
import itertools
import json
import os
import time
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.io
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

import distributed
from distributed import log

TIMEOUT = 600  # seconds to wait for an image; a worker that is stuck would go unnoticed otherwise

# ---- the index: all that training needs of 450 MB of annotations ---------------------------------


@dataclass(frozen=True)
class CocoIndex:
    """The images of one annotation file, by ascending id."""

    ids: np.ndarray      # (N,) int64
    names: np.ndarray    # (N,) str, file names below the image folder
    widths: np.ndarray   # (N,) int64, pixels, as the annotation file says
    heights: np.ndarray  # (N,) int64
    usable: np.ndarray   # (N,) bool, has an annotation to train with

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, keep: Any) -> "CocoIndex":
        """Select images by anything that indexes an array: a slice, positions, a mask."""
        return CocoIndex(**{name: values[keep] for name, values in asdict(self).items()})


def load_index(annotation_file: Path) -> CocoIndex:
    """Index an annotation file, on the main process alone, or take the cached index of last time.

    The cache lies beside the file, or in the user's cache folder where that cannot be written, and
    counts only while the file's size and modification time are those it was made from.
    Raises FileNotFoundError or ValueError, naming the file, if it is missing or is not COCO's.
    """
    return distributed.broadcast(_load_index(annotation_file) if distributed.is_main() else None)


def _load_index(annotation_file: Path) -> CocoIndex:
    if not annotation_file.is_file():
        raise FileNotFoundError(f"{annotation_file} is missing; --data-dir must hold annotations/, "
                                "train2017/ and val2017/ as COCO does")
    stat = annotation_file.stat()
    fingerprint = np.array([1, stat.st_size, stat.st_mtime_ns])  # 1: the version of this format
    name = hashlib.sha256(str(annotation_file.resolve()).encode()).hexdigest()[:16]
    user_cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ghnd"
    caches = [annotation_file.with_suffix(".index.npz"), user_cache / f"{name}.npz"]
    for cache in caches:
        with contextlib.suppress(  # whatever a damaged zip file raises
                OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile):
            with np.load(cache, allow_pickle=False) as stored:
                if np.array_equal(stored["fingerprint"], fingerprint):
                    return CocoIndex(**{key: stored[key] for key in CocoIndex.__annotations__})
    index = parse_annotations(annotation_file)
    for cache in caches:
        with contextlib.suppress(OSError):
            cache.parent.mkdir(parents=True, exist_ok=True)
            with distributed.replacing(cache) as file:
                np.savez(file, fingerprint=fingerprint, **asdict(index))
            break
    return index


def read_json(annotation_file: Path) -> dict[str, Any]:
    """Read a COCO instances file. Raises ValueError, naming it, if it is broken or another kind."""
    try:
        content = json.loads(annotation_file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{annotation_file} is no whole JSON file ({error})") from error
    needed = {"images", "annotations", "categories"}
    if not isinstance(content, dict) or not needed <= content.keys():
        raise ValueError(f"{annotation_file} is not a COCO instances file: "
                         "it needs images, annotations and categories")
    return content


@contextlib.contextmanager
def entries_of(annotation_file: Path) -> Iterator[None]:
    """Raise ValueError, naming the file, where an entry is not as the block takes it to be."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{annotation_file} is not a COCO instances file: an entry lacks a proper "
                         f"field ({type(error).__name__}: {error})") from error


def parse_annotations(annotation_file: Path) -> CocoIndex:
    """Read a COCO instances file and keep what CocoIndex holds.

    An image is usable when it has an annotation, crowd or not, and not all of its boxes have a
    width or a height of at most 1 pixel (torchvision references, _has_valid_annotation).
    """
    content = read_json(annotation_file)
    with entries_of(annotation_file):
        usable = {a["image_id"] for a in content["annotations"] if min(a["bbox"][2:]) > 1}
        images = {image["id"]: image for image in content["images"]}  # of two with one id, the last
        images = [images[i] for i in sorted(images)]
        return CocoIndex(
            ids=np.array([image["id"] for image in images], dtype=np.int64),
            names=np.array([image["file_name"] for image in images], dtype=str),
            widths=np.array([image["width"] for image in images], dtype=np.int64),
            heights=np.array([image["height"] for image in images], dtype=np.int64),
            usable=np.array([image["id"] in usable for image in images], dtype=bool),
        )


def read_val_annotations(annotation_file: Path) -> dict[str, Any]:
    """Read a COCO instances file for COCOeval, which needs more of it than training does.

    Raises ValueError, naming the file, where an entry lacks a field.
    """
    content = read_json(annotation_file)
    fields = itemgetter("id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation")
    with entries_of(annotation_file):
        for annotation in content["annotations"]:
            fields(annotation)
        for category in content["categories"]:
            category["id"]
    return content


def load_split(data_dir: Path, split: str, limit: int | None = None) -> tuple[CocoIndex, Path]:
    """Return the images of "train" (usable ones) or "val" (all), and the folder they lie in.

    limit: take only the first so many. Raises FileNotFoundError or ValueError, naming the path,
    also where an image is not in the folder: better now than after an epoch.
    """
    folder = data_dir / f"{split}2017"
    annotation_file = data_dir / "annotations" / f"instances_{split}2017.json"
    index = load_index(annotation_file)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}/ is missing; --data-dir must hold COCO's images")
    index = (index[index.usable] if split == "train" else index)[:limit]
    if len(index) == 0:
        raise ValueError(f"{data_dir} has no images to use in its {split}2017 annotations")
    if distributed.is_main():
        present = set(os.listdir(folder))
        missing = [name for name in index.names.tolist()
                   if name not in present and not (folder / name).exists()]
        if missing:
            raise FileNotFoundError(
                f"image {folder / missing[0]} is missing, the first of {len(missing)} that "
                f"{annotation_file.name} names")
    return index, folder


# ---- images --------------------------------------------------------------------------------------


def read_image(path: Path) -> Tensor:
    """Decode a JPEG or PNG file to RGB, (3, h, w) uint8; greyscale is repeated on the 3 channels.

    Raises FileNotFoundError or ValueError, naming the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"image {path} is missing")
    try:
        return torchvision.io.decode_image(
            torchvision.io.read_file(str(path)), torchvision.io.ImageReadMode.RGB
        )
    except RuntimeError as error:
        raise ValueError(f"image {path} cannot be decoded: {str(error).splitlines()[0]}") from error


class CocoImages(Dataset):
    """Images alone: nothing in GHND's loss reads a label. Indexed by (position, flip)."""

    def __init__(self, index: CocoIndex, folder: Path) -> None:
        self.names, self.folder = index.names, folder

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, key: tuple[int, bool]) -> Tensor:
        position, flip = key
        image = read_image(self.folder / self.names[position])  # (3, h, w) uint8
        return image.flip(-1) if flip else image


# ---- batches -------------------------------------------------------------------------------------


def aspect_ratio_groups(widths: np.ndarray, heights: np.ndarray, k: int = 3) -> np.ndarray:
    """Group images by width / height: (N,) ints from 0 to 2k + 1.

    The bins are 2 ** linspace(-1, 1, 2k + 1), a ratio on an edge falls in the upper group
    (torchvision references, create_aspect_ratio_groups).
    """
    return np.searchsorted(2 ** np.linspace(-1, 1, 2 * k + 1), widths / heights, side="right")


def group_batches(order: Iterable[int], groups: Sequence[int], batch_size: int) -> list[list[int]]:
    """Cut an order of images into batches of one group each, in the order in which they fill up.

    Left-over groups, largest first, are filled up from the images first seen in the same group,
    until there are len(order) // batch_size batches (torchvision references, GroupedBatchSampler,
    which fails where a group has too few images to fill its batch; here they are repeated).
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

    The order is DistributedSampler's; whether an image is flipped follows from seed, epoch and the
    image, not from the process or worker that loads it. Set `epoch` before each pass, and `start`,
    the batches to leave out, to take up an epoch again in its midst.
    """

    def __init__(self, index: CocoIndex, batch_size: int, rank: int, world_size: int,
                 seed: int = 0) -> None:
        self.groups = aspect_ratio_groups(index.widths, index.heights).tolist()
        self.shuffle = DistributedSampler(range(len(index)), world_size, rank, seed=seed)
        self.batch_size, self.seed, self.epoch, self.start = batch_size, seed, 0, 0

    def __len__(self) -> int:
        return len(self.shuffle) // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        self.shuffle.set_epoch(self.epoch)
        flips = np.random.default_rng((self.seed, self.epoch)).random(len(self.groups)) < 0.5
        batches = group_batches(self.shuffle, self.groups, self.batch_size)
        for batch in batches[self.start:]:
            yield [(image, bool(flips[image])) for image in batch]


def train_loader(
    images: CocoImages, batches: GroupedBatches, workers: int, pin: bool
) -> DataLoader:
    """Load batches as lists of uint8 images, in workers that live as long as the loader."""
    return DataLoader(images, batch_sampler=batches, collate_fn=list, num_workers=workers,
                      pin_memory=pin, persistent_workers=workers > 0,
                      worker_init_fn=distributed.ignore_signals, timeout=TIMEOUT if workers else 0)


def val_loader(images: CocoImages, workers: int, pin: bool) -> DataLoader:
    """Load this process's share of the images, positions rank, rank + world, ..., one by one."""
    mine = range(distributed.rank(), len(images), distributed.world_size())
    workers = min(workers, len(mine))
    return DataLoader(images, sampler=[(position, False) for position in mine], batch_size=None,
                      num_workers=workers, pin_memory=pin,
                      worker_init_fn=distributed.ignore_signals, timeout=TIMEOUT if workers else 0)


# ---- the demo data set ---------------------------------------------------------------------------


def write_demo_dataset(data_dir: Path, train: int = 128, val: int = 8, seed: int = 0) -> None:
    """Draw a small data set in COCO's layout: real JPEG files of coloured boxes and ellipses.

    Sizes and orientations vary; every 8th image is greyscale and every 7th has no annotation.
    """
    rng = np.random.default_rng(seed)
    (data_dir / "annotations").mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("val", val)):
        (data_dir / f"{split}2017").mkdir(exist_ok=True)
        content = {"images": [], "annotations": [], "categories": [
            {"id": 1, "name": "box"}, {"id": 2, "name": "ellipse"}]}
        for i in range(1, count + 1):
            w, h = sorted(rng.integers(160, 320, 2).tolist(), reverse=bool(rng.random() < 0.75))
            picture, shapes = _draw(rng, h, w, shapes=0 if i % 7 == 0 else int(rng.integers(1, 5)))
            if i % 8 == 0:
                picture = picture.mean(0, keepdims=True)
            name = f"{i:012d}.jpg"
            torchvision.io.write_jpeg(torch.from_numpy(picture.astype(np.uint8)),
                                      str(data_dir / f"{split}2017" / name), quality=90)
            content["images"].append({"id": i, "file_name": name, "width": w, "height": h})
            for category, corners in shapes:
                (x0, y0), (x1, y1) = corners.min(0).tolist(), corners.max(0).tolist()
                content["annotations"].append({
                    "id": len(content["annotations"]) + 1, "image_id": i, "category_id": category,
                    "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": 0,
                    "segmentation": [corners.flatten().tolist()]})
        (data_dir / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


def _draw(rng: np.random.Generator, h: int, w: int, shapes: int) -> tuple[np.ndarray, list]:
    """Return a (3, h, w) picture in 0..255 and its shapes as (category, (corners, 2) x and y)."""
    y, x = np.mgrid[:h, :w]
    tilt = rng.normal(size=(3, 2, 1, 1))
    picture = 128 + 60 * np.sin(tilt[:, 0] * x / 60 + tilt[:, 1] * y / 60)
    drawn = []
    for _ in range(shapes):
        half = rng.uniform(12, 50, 2)
        centre = rng.uniform(half, np.array([w, h]) - half - 1)
        category = int(rng.integers(1, 3))
        angles = np.arange(16) * np.pi / 8 if category == 2 else (np.arange(4) + 0.5) * np.pi / 2
        radii = half if category == 2 else np.sqrt(2) * half
        drawn.append((category, centre + radii * np.stack([np.cos(angles), np.sin(angles)], 1)))
        dx, dy = np.abs(x - centre[0]) / half[0], np.abs(y - centre[1]) / half[1]
        inside = np.maximum(dx, dy) <= 1 if category == 1 else dx**2 + dy**2 <= 1
        picture = np.where(inside, rng.uniform(0, 255, (3, 1, 1)), picture)
    return picture, drawn


# ---- checking a data set -------------------------------------------------------------------------


class Problems(Dataset):
    """For each image what is wrong with its file, or an empty string."""

    def __init__(self, index: CocoIndex, folder: Path) -> None:
        self.index, self.folder = index, folder

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int) -> str:
        path = self.folder / self.index.names[position]
        try:
            height, width = read_image(path).shape[1:]
        except (OSError, ValueError) as error:
            return str(error)
        wanted = int(self.index.widths[position]), int(self.index.heights[position])
        return "" if (width, height) == wanted else (
            f"image {path} is {width} x {height} pixels, its annotations say {wanted[0]} x "
            f"{wanted[1]}")


def check_split(data_dir: Path, split: str, workers: int) -> int:
    """Read every image that "train" or "val" names, log what is wrong, return how many are."""
    annotation_file = data_dir / "annotations" / f"instances_{split}2017.json"
    try:
        index = load_index(annotation_file)
        if split == "val":
            read_val_annotations(annotation_file)
    except (OSError, ValueError) as error:
        log(str(error))
        return 1
    if not (data_dir / f"{split}2017").is_dir():
        log(f"{data_dir / f'{split}2017'}/ is missing")
        return 1
    problems = Problems(index, data_dir / f"{split}2017")
    loader = DataLoader(problems, batch_size=32, collate_fn=list, num_workers=workers,
                        worker_init_fn=distributed.ignore_signals)
    seen, wrong, reported = 0, 0, time.monotonic()
    for messages in loader:
        for message in filter(None, messages):
            log(message)
        seen, wrong = seen + len(messages), wrong + sum(map(bool, messages))
        if time.monotonic() - reported > 5:
            reported = time.monotonic()
            log(f"{split}2017: {seen} of {len(index)} images read, {wrong} with problems")
    log(f"{split}2017: {len(index)} images, {int(index.usable.sum())} of them to train with, "
        f"{wrong or 'none'} with problems")
    return wrong


def path(text: str) -> Path:
    """Parse a path, for argparse; in --flag=~/x, bash leaves the ~ as it is."""
    return Path(text).expanduser()


def main() -> None:
    parser = distributed.Parser(description="Check a folder in COCO's layout.")
    parser.add_argument("data_dir", type=path, metavar="DIR",
                        help="with train2017/, val2017/ and annotations/")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N",
                        help="processes that read images, 0 for none (%(default)s)")
    args = parser.parse_args()
    wrong = sum(check_split(args.data_dir, split, args.workers)
                for split in ("train", "val"))
    if wrong:
        raise ValueError(f"{wrong} problems, listed above")


if __name__ == "__main__":
    with distributed.session():
        main()
