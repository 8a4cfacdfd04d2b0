"""COCO's images: which ones are trained on, in which batches, and their pixels."""

import itertools
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler
from torchvision.transforms.functional import pil_to_tensor

import distributed
from distributed import InputError

# ---- annotation files ----------------------------------------------------------------------------


class ImageInfo(NamedTuple):
    """What an annotation file says of an image."""

    id: int
    file_name: str  # below the image folder
    width: int      # pixels
    height: int


def read_instances(annotation_file: Path) -> dict[str, Any]:
    """Read a COCO instances file and check all that training reads of it: images and boxes.

    Raises InputError, naming the file and the entry, if anything there cannot be right: pycocotools
    and torchvision would compute with it without a word.
    """
    if not annotation_file.is_file():
        raise InputError(f"{annotation_file} is missing; --data-dir must hold annotations/, "
                         "train2017/ and val2017/ as COCO does")
    try:
        content = json.loads(annotation_file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{annotation_file} is not whole: {error}") from error
    for group in ("images", "annotations"):
        entries = content.get(group) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise InputError(f"{annotation_file} is no COCO instances file: it has no list of "
                             f"objects named {group!r}")

    check_ids(annotation_file, "images", content["images"])
    for i, image in enumerate(content["images"]):
        if not is_below_folder(image.get("file_name")):
            raise entry_error(annotation_file, "images", i, image, "file_name",
                              "a path below the image folder")
        for field in ("width", "height"):
            if type(image.get(field)) is not int or image[field] < 1:
                raise entry_error(
                    annotation_file, "images", i, image, field, "a whole number of pixels")

    for i, annotation in enumerate(content["annotations"]):
        if type(annotation.get("image_id")) is not int:
            raise entry_error(
                annotation_file, "annotations", i, annotation, "image_id", "a whole number")
        box = annotation.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(map(is_coordinate, box)):
            raise entry_error(
                annotation_file, "annotations", i, annotation, "bbox", "four finite numbers")
    return content


def check_ids(annotation_file: Path, group: str, entries: list[dict[str, Any]]) -> None:
    """Raise InputError if the ids of a file's images or categories are no integers, or repeated."""
    place_of = {}
    for i, entry in enumerate(entries):
        if type(entry.get("id")) is not int:  # isinstance would take true for a number
            raise entry_error(annotation_file, group, i, entry, "id", "a whole number")
        if entry["id"] in place_of:
            unique = f"unique: {group}[{place_of[entry['id']]}] has it too"
            raise entry_error(annotation_file, group, i, entry, "id", unique)
        place_of[entry["id"]] = i


def is_below_folder(name: object) -> bool:
    """Return whether a name stays below the folder to which it is appended."""
    if not isinstance(name, str):
        return False
    path = PurePath(name)
    return not path.is_absolute() and ".." not in path.parts


def is_coordinate(x: object) -> bool:
    """Return whether x is a number that can be a position in pixels: not NaN, not infinite."""
    return type(x) in (int, float) and -1e9 < x < 1e9


def entry_error(
    annotation_file: Path, group: str, i: int, entry: dict[str, Any], field: str, expected: str
) -> InputError:
    """Return an error that names a wrong field of an entry, by place and id."""
    value = "missing"
    if field in entry:
        value = json.dumps(entry[field])[:80]
    return InputError(f"{annotation_file}: {group}[{i}], with id {entry.get('id')!r}: its {field} "
                      f"is {value}, not {expected}")


def image_infos(content: dict[str, Any]) -> list[ImageInfo]:
    """Return all images of a checked annotation file, by ascending id."""
    infos = [ImageInfo(image["id"], image["file_name"], image["width"], image["height"])
             for image in content["images"]]
    return sorted(infos)


def read_train_images(annotation_file: Path) -> list[ImageInfo]:
    """Return the images to train on, by ascending id. Raises InputError as read_instances does.

    They are those with an annotation, crowd or not, whose box has a width and a height of more
    than 1 pixel (torchvision's references, _has_valid_annotation). The loss reads no label, but the
    published students saw these images alone.
    """
    content = read_instances(annotation_file)
    usable_ids = set()
    for annotation in content["annotations"]:
        _, _, width, height = annotation["bbox"]
        if width > 1 and height > 1:
            usable_ids.add(annotation["image_id"])
    images = image_infos(content)
    usable = [image for image in images if image.id in usable_ids]
    if len(usable) < len(images):
        distributed.log(f"{annotation_file}: {len(images) - len(usable)} of {len(images)} images "
                        "left out, since they have no box of more than a pixel")
    return usable


def load_train_split(
    data_dir: Path, max_size: int, limit: int | None = None
) -> tuple[list[ImageInfo], Path]:
    """Return the first `limit` images to train on, and their folder, on every process.

    Raises InputError, naming the file, where something is missing or check_images finds a fault.
    """
    annotation_file = data_dir / "annotations" / "instances_train2017.json"
    images = distributed.on_main(read_train_images, annotation_file)[:limit]
    folder = data_dir / "train2017"
    distributed.on_main(check_images, images, folder, max_size)
    return images, folder


def check_images(images: Sequence[ImageInfo], folder: Path, max_size: int) -> None:
    """Raise InputError if there are no images, one has no file, or one is too thin to be resized.

    max_size: of the detector's transform, which resizes the longer side to at most so many pixels.
    """
    if not images:
        raise InputError(f"there are no images to use in {folder}, says its annotation file")
    if not folder.is_dir():
        raise InputError(f"{folder}/ is missing; --data-dir must hold COCO's images")
    present = set(os.listdir(folder))  # one call, where asking for each of 117,000 files is slow
    for image in images:
        path = folder / image.file_name
        if image.file_name not in present and not path.exists():  # it may be in a subfolder
            raise InputError(f"image {path} is missing")
        long_side, short_side = max(image.width, image.height), min(image.width, image.height)
        # Resized, the shorter side has short_side * max_size / long_side pixels, rounded down, and
        # what should be 1 may come out as 0.9999.
        if short_side * max_size <= long_side:
            raise InputError(f"image {path} is too thin: of {image.width} x {image.height} pixels, "
                             f"none is left when its longer side is resized to {max_size}")


# ---- images --------------------------------------------------------------------------------------


def read_image(path: Path) -> Tensor:
    """Decode an image file to RGB, (3, h, w) uint8, as Pillow converts it. EXIF is not applied.

    Of 16-bit colours Pillow takes the upper 8 bits.
    Raises InputError, naming the file, if it is broken, animated, or grey of more than 8 bits.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # "I;16" and the like; convert would clip them
                raise InputError(f"image {path} has more than 8 bits a value (mode {image.mode})")
            # Some cameras append a preview to a photo (MPO); its first image is the photo.
            if getattr(image, "is_animated", False) and image.format != "MPO":
                raise InputError(f"image {path} is an animation of {image.n_frames} pictures")
            return pil_to_tensor(image.convert("RGB")).contiguous()
    except InputError:
        raise
    except Exception as error:  # each decoder raises exceptions of its own
        raise InputError(f"image {path} cannot be decoded: {error}") from error


class CocoImages(Dataset):
    """Images alone, since nothing in GHND's loss reads a label. Indexed by (position, flip).

    Gives (3, h, w) uint8, flipped left to right or not. An InputError is given instead of being
    raised, because a DataLoader wraps what its workers raise into a dozen lines: see `iterate`.
    """

    def __init__(self, images: Sequence[ImageInfo], folder: Path) -> None:
        self.images = images
        self.folder = folder

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, bool]) -> Tensor | InputError:
        position, flip = key
        info = self.images[position]
        path = self.folder / info.file_name
        try:
            image = read_image(path)
        except InputError as error:
            return error
        _, height, width = image.shape
        if (width, height) != (info.width, info.height):
            return InputError(
                f"image {path} has {width} x {height} pixels, but {info.width} x {info.height} in "
                "the annotation file (a photo that EXIF turns must be saved upright)")
        return image.flip(-1) if flip else image


def iterate(loader: Iterable[Any]) -> Iterator[Any]:
    """Yield a loader's images or lists of images, and raise the first InputError among them."""
    for batch in loader:
        images = batch if isinstance(batch, list) else [batch]
        for image in images:
            if isinstance(image, InputError):
                raise image
        yield batch


# ---- batches -------------------------------------------------------------------------------------


def aspect_ratio_groups(widths: Sequence[int], heights: Sequence[int], k: int = 3) -> np.ndarray:
    """Group images by width / height: (N,) ints from 0 to 2k + 1.

    The bins are 2 ** linspace(-1, 1, 2k + 1), and a ratio on an edge belongs to the upper group
    (torchvision's references, create_aspect_ratio_groups).
    """
    edges = 2 ** np.linspace(-1, 1, 2 * k + 1)
    return np.searchsorted(edges, np.divide(widths, heights), side="right")


def group_batches(order: Iterable[int], groups: Sequence[int], batch_size: int) -> list[list[int]]:
    """Cut an order of images into len(order) // batch_size batches, each of one group.

    Batches come in the order in which they fill up. At the end, left-over groups are filled up
    from the images that came first in them, the largest left-over first, until there are enough
    batches. This is the GroupedBatchSampler of torchvision's references in 2020, except that theirs
    fails where a group has too few images for one batch, whereas here the images are repeated.
    """
    batches = []
    left_over = defaultdict(list)  # group -> images that wait for their batch to fill up
    seen = defaultdict(list)       # group -> all its images so far
    for image in order:
        group = groups[image]
        left_over[group].append(image)
        seen[group].append(image)
        if len(left_over[group]) == batch_size:
            batches.append(left_over[group])
            # Taken out and put in again, the group is the dict's last. That order decides between
            # left-overs of equal size below, as in the original.
            del left_over[group]
            left_over[group] = []

    total = sum(len(members) for members in seen.values())
    missing = total // batch_size - len(batches)
    by_size = sorted(left_over, key=lambda group: len(left_over[group]), reverse=True)
    for group in by_size[:missing]:
        fill = itertools.cycle(seen[group])
        still_free = batch_size - len(left_over[group])
        batches.append(left_over[group] + list(itertools.islice(fill, still_free)))
    return batches


class GroupedBatches(Sampler):
    """This process's batches of (position, flip), which depend on seed, epoch and rank alone.

    The order is a DistributedSampler's; whether an image is flipped depends on seed, epoch and
    image. So an epoch can be taken up in the middle without any stored random state.

    epoch: to be set before each pass.
    first_batch: to be set as well, to leave out the batches before it.
    """

    def __init__(
        self,
        images: Sequence[ImageInfo],
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int = 0,
    ) -> None:
        widths = [image.width for image in images]
        heights = [image.height for image in images]
        self.groups = aspect_ratio_groups(widths, heights).tolist()
        self.order = DistributedSampler(range(len(images)), world_size, rank, seed=seed)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self.first_batch = 0

    def __len__(self) -> int:
        """Return the number of batches in a whole epoch."""
        return len(self.order) // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        self.order.set_epoch(self.epoch)
        random = np.random.default_rng((self.seed, self.epoch))
        flips = (random.random(len(self.groups)) < 0.5).tolist()
        batches = group_batches(self.order, self.groups, self.batch_size)
        for batch in batches[self.first_batch:]:
            yield [(position, flips[position]) for position in batch]


# ---- loaders -------------------------------------------------------------------------------------


def train_loader(
    images: Sequence[ImageInfo],
    folder: Path,
    batch_size: int,
    seed: int,
    workers: int,
    device: torch.device,
) -> DataLoader:
    """Return a loader of this process's GroupedBatches, as lists of uint8 images (3, h, w)."""
    distributed.on_main(check_shared_memory, images, batch_size, workers)
    batches = GroupedBatches(
        images, batch_size, distributed.rank(), distributed.world_size(), seed)
    return DataLoader(
        CocoImages(images, folder),
        batch_sampler=batches,
        collate_fn=list,  # the images differ in size
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )


def val_loader(
    images: Sequence[ImageInfo], folder: Path, workers: int, device: torch.device
) -> DataLoader:
    """Return a loader of this process's share of the images, at rank, rank + world_size, ..."""
    distributed.on_main(check_shared_memory, images, 1, workers)
    share = range(distributed.rank(), len(images), distributed.world_size())
    return DataLoader(
        CocoImages(images, folder),
        sampler=[(position, False) for position in share],
        batch_size=None,  # single images
        num_workers=min(workers, len(share)),
        pin_memory=device.type == "cuda",
    )


def check_shared_memory(images: Sequence[ImageInfo], batch_size: int, workers: int) -> None:
    """Raise InputError if /dev/shm cannot hold what the workers have ready: they would hang."""
    shared_memory = Path("/dev/shm")
    if workers == 0 or not shared_memory.is_dir():
        return
    largest = max(3 * image.width * image.height for image in images)
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    batches_ready = 2 * workers + 1  # a DataLoader's prefetch_factor is 2; one batch is in use
    needed = processes_here * batches_ready * batch_size * largest
    free = shutil.disk_usage(shared_memory).free
    if free < needed:
        raise InputError(
            f"/dev/shm has {free / 2**20:.0f} MiB free, and loading in {workers} workers may take "
            f"{needed / 2**20:.0f}; give --workers 0, or start docker with a larger --shm-size")
