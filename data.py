"""Read and check COCO's annotation files; read its images; make the batches to train on."""

import contextlib
import gc
import itertools
import json
import os
import shutil
import signal
import stat
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler
from torchvision.transforms.functional import pil_to_tensor

import distributed
from distributed import InputError, log

Entry = dict[str, Any]                              # an image, annotation or category of a file
Rule = tuple[str, Callable[[Entry], bool], str]     # field, whether it is right, what is expected

# ---- annotation files ----------------------------------------------------------------------------


class ImageInfo(NamedTuple):
    """What an annotation file says of an image."""

    id: int
    file_name: str  # below the image folder
    width: int      # pixels
    height: int


# All that training reads of a file. Without these rules, pycocotools and torchvision would accept
# wrong values silently: of ids from 2^63 on, for example, numpy makes floats that no longer match.
# A rule may rely on those before it.
RULES: dict[str, list[Rule]] = {
    "images": [
        ("id", lambda image: is_id(image.get("id")), "a whole number below 2^63"),
        ("file_name", lambda image: is_below_folder(image.get("file_name")),
         "a path below the image folder"),
        ("width", lambda image: is_id(image.get("width")) and image["width"] > 0,
         "a whole number of pixels"),
        ("height", lambda image: is_id(image.get("height")) and image["height"] > 0,
         "a whole number of pixels"),
    ],
    "annotations": [
        ("image_id", lambda annotation: is_id(annotation.get("image_id")),
         "a whole number below 2^63"),
        ("bbox", lambda annotation: is_box(annotation.get("bbox")), "four finite numbers"),
    ],
}


def annotation_rules(
    classes: int, category_ids: set[int], mask_sizes: dict[int, list[int]] | None
) -> list[Rule]:
    """Return the rules for all that COCOeval reads of annotations, besides RULES.

    classes: of the detector, the background (0) included.
    mask_sizes: [height, width] of each image by id; None where masks are not evaluated.
    """
    listed = ", ".join(map(str, sorted(category_ids)[:20])) + ", ..." * (len(category_ids) > 20)
    rules = [
        ("category_id", lambda a: is_id(a.get("category_id")), "a whole number"),
        ("category_id", lambda a: a["category_id"] in category_ids,
         f"one of the ids that the file's categories have ({listed})"),
        ("category_id", lambda a: 1 <= a["category_id"] < classes,
         f"one of the detector's classes, 1 to {classes - 1} (0 is the background; where it is in "
         "use, add 1 to every category id)"),
        ("bbox", lambda a: min(a["bbox"][2:]) >= 0,
         "x, y, and a width and height that are not negative"),
        ("iscrowd", lambda a: a.get("iscrowd", 0) in (0, 1), "0 or 1"),
        ("area", lambda a: is_area(a.get("area", 0)), "a finite number of pixels"),
    ]
    if mask_sizes is not None:
        rules.append(
            ("segmentation", lambda a: is_mask(a.get("segmentation"), mask_sizes[a["image_id"]]),
             "polygons of three points or more, or an RLE of its image's height and width"))
    return rules


def is_id(x: object) -> bool:
    return type(x) is int and -2**63 <= x < 2**63  # isinstance would take True for a number


def is_coordinate(x: object) -> bool:
    return type(x) in (int, float) and -1e9 < x < 1e9  # no NaN and no infinity


def is_box(x: object) -> bool:
    return isinstance(x, list) and len(x) == 4 and all(map(is_coordinate, x))


def is_area(x: object) -> bool:
    return type(x) in (int, float) and 0 <= x < 1e18


def is_below_folder(x: object) -> bool:
    return isinstance(x, str) and not PurePath(x).is_absolute() and ".." not in PurePath(x).parts


def is_mask(x: object, size: list[int]) -> bool:
    """Return whether x is a mask in COCO's format for an image of this size, [height, width]."""
    if isinstance(x, list):  # pycocotools would take a "polygon" of four numbers for a box
        return len(x) > 0 and all(
            isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0
            and all(map(is_coordinate, polygon)) for polygon in x)
    if not isinstance(x, dict) or x.get("size") != size or not all(map(is_id, x["size"])):
        return False
    counts = x.get("counts")
    if isinstance(counts, list):
        # pycocotools fills what the runs do not cover with whatever is in memory.
        return all(is_id(run) and run >= 0 for run in counts) and sum(counts) == size[0] * size[1]
    return isinstance(counts, str)


def check(
    annotation_file: Path, group: str, entries: Iterable[tuple[int, Entry]], rules: Sequence[Rule]
) -> None:
    """Raise InputError, naming the first entry, if one or more of them break a rule.

    entries: of a group of the file ("images", ...), each with its position there.
    """
    entries = list(entries)
    for field, is_right, expected in rules:
        wrong = [(i, entry) for i, entry in entries if not is_right(entry)]
        if wrong:
            i, entry = wrong[0]
            value = json.dumps(entry[field])[:80] if field in entry else "missing"
            more = f", and {len(wrong) - 1:,} more like it" if len(wrong) > 1 else ""
            raise InputError(f"{annotation_file}: {group}[{i}], with id {entry.get('id')!r}: its "
                             f"{field} is {value}, not {expected}{more}")


def check_unique(annotation_file: Path, group: str, entries: Sequence[Entry]) -> None:
    """Raise InputError if two entries of a group have the same id."""
    first = {}
    for entry in entries:
        first.setdefault(entry["id"], entry)
    rule = ("id", lambda entry: first[entry["id"]] is entry, "unique")
    check(annotation_file, group, enumerate(entries), [rule])


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Keep the garbage collector from looking at millions of new objects again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def read_instances(annotation_file: Path) -> dict[str, Any]:
    """Read a COCO instances file, and check all that training reads of it: images and boxes.

    Raises InputError, naming the file and the entry, if anything there cannot be right.
    """
    try:
        content = json.loads(annotation_file.read_bytes())
    except OSError as error:
        raise InputError(f"{annotation_file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{annotation_file} is not whole: {error}") from error
    for group, rules in RULES.items():
        check_group(annotation_file, content, group)
        check(annotation_file, group, enumerate(content[group]), rules)
    check_unique(annotation_file, "images", content["images"])
    return content


def check_group(annotation_file: Path, content: object, group: str) -> None:
    """Raise InputError if a file has no list of objects of this name."""
    entries = content.get(group) if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{annotation_file} is no COCO instances file: it has no list of objects "
                         f"named {group!r}")


@without_garbage_collection()
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
        log(f"{annotation_file}: {len(images) - len(usable):,} of {len(images):,} images left out, "
            "since they have no box of more than a pixel")
    return usable


def image_infos(content: dict[str, Any]) -> list[ImageInfo]:
    """Return all images of a checked annotation file, by ascending id."""
    infos = [ImageInfo(image["id"], image["file_name"], image["width"], image["height"])
             for image in content["images"]]
    return sorted(infos)


@without_garbage_collection()
def read_annotations(annotation_file: Path, classes: int, masks: bool) -> dict[str, Any]:
    """Read a COCO instances file, and check and repair all that COCOeval reads of it.

    classes: of the detector, the background (0) included. masks: whether they are evaluated.
    Repaired: annotations are numbered from 1, since COCOeval takes id 0 for "no match"; a missing
    iscrowd is 0; a missing area is the mask's or the box's. Annotations of images that are not
    listed, as in subsets of COCO, are left out.
    Raises InputError, naming the file and the entry, if anything there cannot be right.
    """
    content = read_instances(annotation_file)
    check_group(annotation_file, content, "categories")
    categories = content["categories"]
    id_rule = ("id", lambda category: is_id(category.get("id")), "a whole number")
    check(annotation_file, "categories", enumerate(categories), [id_rule])
    check_unique(annotation_file, "categories", categories)

    sizes = {image["id"]: [image["height"], image["width"]] for image in content["images"]}
    kept = [(i, annotation) for i, annotation in enumerate(content["annotations"])
            if annotation["image_id"] in sizes]
    category_ids = {category["id"] for category in categories}
    annotations = [annotation for _, annotation in kept]
    if content["annotations"] and not annotations:
        raise InputError(f"{annotation_file}: the file does not list the image of any annotation")
    if annotations and all(annotation.get("iscrowd") == 1 for annotation in annotations):
        raise InputError(f"{annotation_file}: all annotations are crowds (iscrowd 1), so there is "
                         "nothing to find; single objects have iscrowd 0")
    if masks and annotations and not any(a.get("segmentation") for a in annotations):
        raise InputError(f"{annotation_file} has no masks: all {len(annotations):,} segmentations "
                         "are empty or missing, and the detector is a Mask R-CNN")
    if category_ids and max(category_ids) != classes - 1:
        log(f"{annotation_file}: the highest category id is {max(category_ids)}, and that of the "
            f"detector {classes - 1}: is it the right --teacher-ckpt?")
    rules = annotation_rules(classes, category_ids, sizes if masks else None)
    check(annotation_file, "annotations", kept, rules)

    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
        annotation.setdefault("iscrowd", 0)
        if "area" not in annotation:
            annotation["area"] = true_area(annotation, sizes[annotation["image_id"]], masks)
    report_unlikely(annotation_file, content["annotations"], annotations, sizes, masks)
    content["annotations"] = annotations
    return content


def true_area(annotation: Entry, size: list[int], masks: bool) -> float:
    """Return the pixels of an annotation's mask or, where masks are not evaluated, of its box."""
    if not masks:
        _, _, width, height = annotation["bbox"]
        return width * height
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, list):  # polygons
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))
    elif isinstance(segmentation["counts"], list):
        rle = coco_mask.frPyObjects(segmentation, *size)
    else:
        rle = segmentation
    return float(coco_mask.area(rle))


def report_unlikely(
    annotation_file: Path,
    all_annotations: Sequence[Entry],
    annotations: Sequence[Entry],
    sizes: dict[int, list[int]],
    masks: bool,
) -> None:
    """Log a line for each thing that is possible in a file, but unlikely to be meant.

    annotations: those of images that the file lists. sizes: [height, width] of each image by id.
    """
    left_out = len(all_annotations) - len(annotations)
    if left_out:
        log(f"{annotation_file}: {left_out:,} of {len(all_annotations):,} annotations left out, "
            "since their images are not listed")

    crowds = sum(annotation["iscrowd"] for annotation in annotations)
    if crowds:
        log(f"{annotation_file}: {crowds:,} of {len(annotations):,} annotations are crowds "
            "(iscrowd 1), which metrics ignore")

    outside = [a for a in annotations if leaves_image(a["bbox"], *sizes[a["image_id"]])]
    if outside:
        log(f"{annotation_file}: {len(outside):,} of {len(annotations):,} boxes leave their "
            f"images; the first is {outside[0]['bbox']} (x, y of the corner, width, height) in "
            f"image {outside[0]['image_id']} of {sizes[outside[0]['image_id']]} (height, width)")
    unlikely = [a for a in annotations
                if has_unlikely_area(a, sizes[a["image_id"]], masks)]
    if unlikely:
        log(f"{annotation_file}: {len(unlikely):,} of {len(annotations):,} areas are far from "
            "those of box and mask, so APs, APm and APl mean little; the first is "
            f"{unlikely[0]['area']} of the box {unlikely[0]['bbox']}")


def leaves_image(box: Sequence[float], height: int, width: int) -> bool:
    """Return whether a box (x, y, width, height) leaves its image by more than a tenth of itself.

    A pixel more is allowed: many exporters round.
    """
    x, y, box_width, box_height = box
    margin_x, margin_y = box_width / 10 + 1, box_height / 10 + 1
    return (x < -margin_x or x + box_width > width + margin_x
            or y < -margin_y or y + box_height > height + margin_y)


def has_unlikely_area(annotation: Entry, size: list[int], masks: bool) -> bool:
    """Return whether an area is far from what the box allows, and from the mask's true area."""
    _, _, width, height = annotation["bbox"]
    area = annotation["area"]
    if width * height / 20 <= area <= 1.1 * width * height + 10:
        return False
    true = true_area(annotation, size, masks)
    return not (true / 2 - 10 <= area <= 2 * true + 10)


# ---- images --------------------------------------------------------------------------------------


def load_train_split(
    data_dir: Path, max_size: int, limit: int | None = None
) -> tuple[list[ImageInfo], Path]:
    """Return the first `limit` images to train on, and their folder, on every process.

    Raises InputError, naming the file, where something is missing or cannot be right.
    """
    annotation_file, folder = distributed.on_main(split_paths, data_dir, "train2017")
    images = distributed.on_main(read_train_images, annotation_file)[:limit]
    distributed.on_main(check_images, images, folder, max_size)
    return images, folder


def split_paths(data_dir: Path, split: str) -> tuple[Path, Path]:
    """Return the annotation file and the image folder of "train2017" or "val2017".

    Raises InputError if one is missing.
    """
    annotation_file = data_dir / "annotations" / f"instances_{split}.json"
    folder = data_dir / split
    for path, is_there in ((annotation_file, os.path.isfile), (folder, os.path.isdir)):
        if not is_there(path):
            raise InputError(f"{path} is missing; --data-dir must hold annotations/, train2017/ "
                             "and val2017/ as COCO does")
    return annotation_file, folder


def check_images(images: Sequence[ImageInfo], folder: Path, max_size: int) -> None:
    """Raise InputError if there are no images, one has no file, or one is too thin to be resized.

    max_size: of the detector's transform, which resizes the longer side to at most so many pixels.
    """
    if not images:
        raise InputError(f"the annotation file of {folder} lists no images to use")
    absent = [folder / image.file_name for image in images
              if not has_content(os.path.join(folder, image.file_name))]
    if absent:
        reason = "is empty, or no file" if os.path.exists(absent[0]) else "is missing"
        more = f", and {len(absent) - 1:,} more images" if len(absent) > 1 else ""
        raise InputError(f"image {absent[0]} {reason}{more}")
    for image in images:
        long_side, short_side = max(image.width, image.height), min(image.width, image.height)
        # Resized, the shorter side has short_side * max_size / long_side pixels, rounded down, and
        # what should be 1 may come out as 0.9999.
        if short_side * max_size <= long_side:
            raise InputError(
                f"image {folder / image.file_name} is too thin: of {image.width} x {image.height} "
                f"pixels, none is left when its longer side is resized to {max_size}")


def has_content(path: str) -> bool:
    """Return whether a path leads to a file that is not empty."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # a name can also be too long, or have a zero byte
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size > 0


def read_image(path: Path) -> Tensor:
    """Decode an image file to RGB, (3, h, w) uint8, as Pillow converts it. EXIF is not applied.

    Of 16-bit colours Pillow takes the upper 8 bits, and of an animation the first picture.
    Raises InputError, naming the file, if it is broken, or grey of more than 8 bits.
    """
    try:
        with Image.open(path) as image:
            mode = image.mode
            # Contiguous, because the detector's transform takes 1.6 ms longer where it is not.
            pixels = pil_to_tensor(image.convert("RGB")).contiguous()
    except Exception as error:  # each decoder raises exceptions of its own
        raise InputError(f"image {path} cannot be decoded: {error}") from error
    if mode.startswith(("I", "F")):  # "I;16" and the like, which convert has clipped
        raise InputError(f"image {path} has more than 8 bits a value (mode {mode})")
    return pixels


class CocoImages(Dataset):
    """Images alone, since nothing in GHND's loss reads a label. Indexed by (position, flip).

    Gives (3, h, w) uint8, flipped left to right or not.
    Raises InputError, naming the file, if an image cannot be used.
    """

    def __init__(self, images: Sequence[ImageInfo], folder: Path) -> None:
        self.images = images
        self.folder = folder

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, bool]) -> Tensor:
        position, flip = key
        info = self.images[position]
        path = self.folder / info.file_name
        image = read_image(path)
        _, height, width = image.shape
        if (width, height) != (info.width, info.height):
            raise InputError(
                f"image {path} has {width} x {height} pixels, but {info.width} x {info.height} in "
                "the annotation file (a photo that EXIF turns must be saved upright)")
        return image.flip(-1) if flip else image


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
        rng = np.random.default_rng((self.seed, self.epoch))
        flips = (rng.random(len(self.groups)) < 0.5).tolist()
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
        worker_init_fn=stay_silent,
    )


def val_loader(
    images: Sequence[ImageInfo], folder: Path, workers: int, device: torch.device
) -> DataLoader:
    """Return a loader of uint8 images (3, h, w), one by one."""
    distributed.on_main(check_shared_memory, images, 1, workers)
    return DataLoader(
        CocoImages(images, folder),
        sampler=[(position, False) for position in range(len(images))],
        batch_size=None,  # single images
        num_workers=min(workers, len(images)),
        pin_memory=device.type == "cuda",
        worker_init_fn=stay_silent,
    )


def stay_silent(worker: int) -> None:
    """Let a worker say nothing on Ctrl-C: the process that it works for says it, and ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A thread of multiprocessing reports connections that break then. What an image raises goes
    # another way, to the process that asked for the image.
    sys.excepthook = lambda *_: None


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
            f"/dev/shm has {free / 2**20:.0f} MiB free, and {workers} workers may need "
            f"{needed / 2**20:.0f} MiB; give --workers 0, or start docker with a larger --shm-size")
