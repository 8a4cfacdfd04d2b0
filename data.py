"""Read and check COCO's annotation files; read its images; make the batches to train on."""

import gc
import itertools
import json
import math
import os
import shutil
import signal
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler
from torchvision.transforms.functional import pil_to_tensor

import distributed
from distributed import InputError, log

Entry = dict[str, Any]          # an image, annotation or category of an annotation file
Entries = Sequence[Entry]
ById = dict[int, Entry]
Images = Sequence["ImageInfo"]
Problem = tuple[int, str, str]  # position of an entry, its wrong field, what is expected there

# ---- annotation files ----------------------------------------------------------------------------

class ImageInfo(NamedTuple):
    """What an annotation file says of an image."""

    id: int
    file_name: str  # below the image folder
    width: int      # pixels
    height: int


def read_train_images(file: Path, val_categories: ById | None = None) -> list[ImageInfo]:
    """Return the images to train on, by ascending id.

    They are those with an annotation, crowd or not, whose box has a width and a height of more
    than 1 pixel (torchvision's references, _has_valid_annotation). The loss reads no label, but the
    published students were trained on exactly these images.
    Raises InputError as read_instances does, or if a category has another id in val_categories.
    """
    content = read_instances(file)
    if val_categories and "categories" in content:
        check(file, content, "categories", category_problems, val_categories)
    usable_ids = set()
    for annotation in content["annotations"]:
        _, _, width, height = annotation["bbox"]
        if width > 1 and height > 1:
            usable_ids.add(annotation["image_id"])
    images = image_infos(content)
    usable = [image for image in images if image.id in usable_ids]
    if len(usable) < len(images):
        log(f"{file}: {len(images) - len(usable):,} of {len(images):,} images left out, since they "
            "have no box of more than a pixel")
    return usable


def image_infos(content: dict[str, Any]) -> list[ImageInfo]:
    """Return all images of a checked annotation file, by ascending id."""
    return sorted(ImageInfo(image["id"], image["file_name"], image["width"], image["height"])
                  for image in content["images"])


def read_instances(file: Path) -> dict[str, Any]:
    """Read a COCO instances file, and check all that training reads of it: images and boxes.

    Raises InputError for wrong values, such as ids from 2^63 on, which numpy turns into floats.
    """
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read, or is not whole: {error}") from error
    check(file, content, "images", image_problems)
    check(file, content, "annotations", box_problems)
    if content["annotations"] and all(max(a["bbox"][2:]) <= 1 for a in content["annotations"]):
        raise InputError(f"{file}: no box is larger than a pixel; the first is "
                         f"{content['annotations'][0]['bbox']} (COCO counts pixels)")
    return content


def read_annotations(file: Path, classes: int, masks: bool) -> dict[str, Any]:
    """Read a COCO instances file, and check and repair all that COCOeval reads of it.

    classes: of the detector, the background (0) included. masks: whether they are evaluated.
    Repaired: annotations are numbered from 1, since COCOeval takes id 0 for "no match"; a missing
    iscrowd is 0; a missing area is the mask's or the box's. Annotations of images that are not
    listed, as in subsets of COCO, are left out. Raises InputError if anything cannot be right.
    """
    content = read_instances(file)
    check(file, content, "categories", id_problems)
    category_ids = {category["id"] for category in content["categories"]}
    if max(category_ids, default=classes - 1) != classes - 1:
        log(f"{file}: the highest category id is {max(category_ids)}, and that of the detector "
            f"{classes - 1}: is it the right checkpoint?")
    coco = COCO()  # of the images, which is all that annToRLE needs
    coco.imgs = {image["id"]: image for image in content["images"]}
    check(file, content, "annotations", annotation_problems, coco.imgs, category_ids, classes,
          masks)

    annotations = [a for a in content["annotations"] if a["image_id"] in coco.imgs]
    own_boxes, own_areas = measure_objects(annotations, coco, masks)
    for number, (annotation, area) in enumerate(zip(annotations, own_areas.tolist()), start=1):
        annotation["id"] = number
        annotation.setdefault("iscrowd", 0)
        annotation.setdefault("area", area)
    if len(annotations) < len(content["annotations"]):
        log(f"{file}: {len(annotations):,} of {len(content['annotations']):,} annotations are of "
            "listed images; the others are left out")
    if content["annotations"] and all(a["iscrowd"] for a in annotations):
        raise InputError(f"{file}: every annotation is a crowd (iscrowd 1) or belongs to an image "
                         "that is not listed, so there is nothing to find")
    report_unlikely(file, annotations, coco.imgs, own_boxes, own_areas, masks)
    content["annotations"] = annotations
    return content


def measure_objects(annotations: Entries, coco: COCO, masks: bool) -> tuple[np.ndarray, ...]:
    """Return box (N, 4), x y w h, and area (N,) of the masks or, without masks, of the boxes."""
    if not masks:
        boxes = np.array([a["bbox"] for a in annotations], dtype=float).reshape(-1, 4)
        return boxes, boxes[:, 2] * boxes[:, 3]
    # One by one, since pycocotools' area fails for a list of more than 255.
    rles = [coco.annToRLE(annotation) for annotation in annotations]
    boxes = np.array([coco_mask.toBbox(rle) for rle in rles]).reshape(-1, 4)
    return boxes, np.array([coco_mask.area(rle) for rle in rles], dtype=float)


def report_unlikely(
    file: Path, annotations: Entries, images: ById, own_boxes: np.ndarray, own_areas: np.ndarray,
    masks: bool
) -> None:
    """Log a line for each thing that is possible in a file, but unlikely to be meant.

    own_boxes, own_areas: measure_objects's. Raises InputError if most annotations do not fit them:
    then the masks lie elsewhere, or the areas are not in pixels.
    """
    boxes = np.array([a["bbox"] for a in annotations], dtype=float).reshape(-1, 4)
    areas = np.array([a["area"] for a in annotations], dtype=float)
    sizes = [(images[a["image_id"]]["width"], images[a["image_id"]]["height"]) for a in annotations]
    starts, ends = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    own_starts, own_ends = own_boxes[:, :2], own_boxes[:, :2] + own_boxes[:, 2:]
    margins = boxes[:, 2:] / 10
    keys = [(a["image_id"], a["category_id"], *a["bbox"]) for a in annotations]
    times = Counter(keys)

    smallest = own_areas / 2 - 10 if masks else own_areas / 1000  # objects do not fill their boxes
    is_wrong = (areas < smallest) | (areas > 2 * own_areas + 10)
    is_far = np.maximum(abs(starts - own_starts), abs(ends - own_ends)) > margins + 2  # pixels
    is_outside = np.maximum(-starts, ends - np.reshape(sizes, (-1, 2))) > margins + 1
    is_tiny = (boxes[:, 2:] < 2).any(axis=1)  # rounding can leave an empty mask
    misfits = (is_far.any(axis=1) | is_wrong) & ~is_tiny
    unlikely = {
        "are crowds (iscrowd 1), which metrics ignore": [a["iscrowd"] for a in annotations],
        "are flagged by ignore, which metrics do not heed": [
            bool(a.get("ignore")) for a in annotations],
        "are outside their images": is_outside.any(axis=1),
        "have no width or no height": (boxes[:, 2:] == 0).any(axis=1),
        "are listed more than once": [times[key] > 1 for key in keys],
        "do not fit their own mask" if masks else "do not fit their own box": misfits,
    }
    for what, is_found in unlikely.items():
        count = np.count_nonzero(is_found)
        if count:
            i = np.argmax(is_found)
            first = annotations[i]
            text = (f"{file}: {count:,} of {len(annotations):,} annotations {what}; the first, of "
                    f"image {first['image_id']}, has bbox {first['bbox']} and area {first['area']}")
            if is_found is misfits and count > len(annotations) / 2:
                raise InputError(f"{text}, and measures {own_boxes[i].tolist()} and "
                                 f"{own_areas[i]:.0f} (without an area, it is measured)")
            log(text)


# ---- checks of annotation files ------------------------------------------------------------------

def check(
    file: Path, content: Any, group: str, find_problems: Callable[..., Any], *args: Any
) -> None:
    """Raise InputError if a file has no list of objects named `group`, or if they have problems.

    find_problems: called with the list and args, yields Problems; may rely on earlier checks. The
    message names the first entry with a problem, and says how many more have the same.
    """
    entries = content.get(group) if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{file} is no COCO instances file: it has no list of objects named "
                         f"{group!r}")
    problems = list(find_problems(entries, *args))
    if problems:
        i, field, expected = problems[0]
        value = json.dumps(entries[i][field])[:80] if field in entries[i] else "missing"
        others = sum(problem[1:] == (field, expected) for problem in problems[1:])
        more = f", and {others:,} more like it" if others else ""
        raise InputError(f"{file}: {group}[{i}], with id {entries[i].get('id')!r}: its "
                         f"{field} is {value}, not {expected}{more}")


def id_problems(entries: Entries) -> Iterator[Problem]:
    seen = set()
    for i, entry in enumerate(entries):
        if not is_whole(entry.get("id")):
            yield i, "id", "a whole number below 2^63"
        elif entry["id"] in seen:
            yield i, "id", "unique"
        else:
            seen.add(entry["id"])


def category_problems(categories: Entries, val_categories: ById) -> Iterator[Problem]:
    val_ids = defaultdict(list)
    for number, category in val_categories.items():
        val_ids[str(category.get("name"))].append(number)
    for i, category in enumerate(categories):
        name = str(category.get("name"))
        if name in val_ids and category.get("id") not in val_ids[name]:
            yield i, "id", f"{val_ids[name]}, as {name!r} has in the file for validation"


def image_problems(images: Entries) -> Iterator[Problem]:
    yield from id_problems(images)
    seen = set()
    for i, image in enumerate(images):
        name = image.get("file_name")
        path = PurePath(name) if isinstance(name, str) else PurePath("..")
        if path.is_absolute() or ".." in path.parts:
            yield i, "file_name", "a path below the image folder"
        elif path in seen:
            yield i, "file_name", "listed once (all boxes of an image belong to one entry)"
        seen.add(path)
        for side in ("width", "height"):
            if not is_whole(image.get(side)) or not 1 <= image[side] < 2**16:
                yield i, side, "a whole number of pixels below 2^16"  # pycocotools' area: 32 bits


def box_problems(annotations: Entries) -> Iterator[Problem]:
    for i, annotation in enumerate(annotations):
        if not is_whole(annotation.get("image_id")):
            yield i, "image_id", "a whole number below 2^63"
        box = annotation.get("bbox")
        if not are_coordinates(box) or len(box) != 4:
            yield i, "bbox", "four finite numbers of at most 2^20"


def annotation_problems(
    annotations: Entries, images: ById, category_ids: set[int], classes: int, masks: bool
) -> Iterator[Problem]:
    for i, annotation in enumerate(annotations):
        if annotation["image_id"] not in images:  # it will be left out
            continue
        category = annotation.get("category_id")
        if not is_whole(category) or category not in category_ids or not 1 <= category < classes:
            yield i, "category_id", (
                f"the id of one of the file's categories, from 1 to {classes - 1} (if 0 is in use, "
                "add 1 to every category id)")
        if min(annotation["bbox"][2:]) < 0:
            yield i, "bbox", "x, y, and a width and height that are not negative"
        if annotation.get("iscrowd", 0) not in (0, 1):
            yield i, "iscrowd", "0 or 1"
        area = annotation.get("area", 0)
        if type(area) not in (int, float) or not 0 <= area < 1e18:
            yield i, "area", "a finite number of pixels"
        image = images[annotation["image_id"]]
        if masks and not is_mask(annotation.get("segmentation"), image["height"], image["width"]):
            yield i, "segmentation", ("polygons of three points or more in or near the image, "
                                      "or an RLE that covers exactly its height and width")


def is_mask(x: object, height: int, width: int) -> bool:
    """Return whether x is a mask in COCO's format for an image of this size."""
    if isinstance(x, list):
        return len(x) > 0 and all(is_polygon(polygon, height, width) for polygon in x)
    if not isinstance(x, dict) or x.get("size") != [height, width]:
        return False
    runs = x.get("counts")
    if isinstance(runs, str):
        runs = decode_runs(runs)
    # pycocotools fills what the runs do not cover with whatever is in memory.
    return (isinstance(runs, list) and all(is_whole(run) and run >= 0 for run in runs)
            and sum(runs) == height * width)


def is_polygon(x: object, height: int, width: int) -> bool:
    """Return whether x is a polygon that leaves its image by no more than the image's own size.

    pycocotools' memory grows with the distance, and far away it crashes; and it would take a
    "polygon" of four numbers for a box.
    """
    return (are_coordinates(x) and len(x) >= 6 and len(x) % 2 == 0
            and -width <= min(x[::2]) and max(x[::2]) <= 2 * width
            and -height <= min(x[1::2]) and max(x[1::2]) <= 2 * height)


def decode_runs(text: str) -> list[int]:
    """Return the run lengths of a compressed RLE, [] if it is damaged (pycocotools' rleFrString).

    A character has 5 bits of a number, the lowest first, and a 6th that says whether it goes on;
    the last bit is the sign. From the fourth run on, numbers are differences to the last run but 1.
    """
    runs, value, shift = [], 0, 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 25:  # pycocotools shifts in 32 bits
            return []
        value += (bits & 31) << shift
        shift += 5
        if bits < 32:
            value -= (bits & 16) << (shift - 4)
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value, shift = 0, 0
    return runs if shift == 0 else []


def is_whole(x: object) -> bool:
    return type(x) is int and -2**63 <= x < 2**63  # isinstance would take True for a number


def are_coordinates(x: object) -> bool:
    return isinstance(x, list) and all(
        type(value) in (int, float) and -2**20 <= value <= 2**20 for value in x)


# ---- images --------------------------------------------------------------------------------------

def load_train_split(
    data_dir: Path, max_size: int, limit: int | None = None, needed: int = 1,
    val_categories: ById | None = None
) -> tuple[list[ImageInfo], Path]:
    """Return read_train_images's first `limit`, checked by check_images, and their folder."""
    file, folder = split_paths(data_dir, "train2017")
    gc.disable()  # it would look at the millions of objects in the file again and again
    try:
        images = read_train_images(file, val_categories)[:limit]
    finally:
        gc.enable()
    check_images(images, folder, max_size, needed)
    return images, folder


def split_paths(data_dir: Path, split: str) -> tuple[Path, Path]:
    """Return the annotation file and the image folder of "train2017" or "val2017"."""
    file = data_dir / "annotations" / f"instances_{split}.json"
    folder = data_dir / split
    for path, look in ((file, os.stat), (folder, os.listdir)):
        try:
            look(path)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; --data-dir must hold annotations/, "
                             "train2017/ and val2017/ as COCO does") from error
    return file, folder


def check_images(images: Images, folder: Path, max_size: int, needed: int = 1) -> None:
    """Raise InputError for fewer images than needed, missing files, and impossible sizes.

    max_size: of the detector's transform, which resizes the longer side to at most so many pixels.
    """
    if len(images) < needed:
        raise InputError(f"{folder} has {len(images)} images to use, and {needed} are needed")
    paths = [os.path.join(folder, image.file_name) for image in images]
    absent = [path for path in paths
              if not (os.path.isfile(path) and os.path.getsize(path) and os.access(path, os.R_OK))]
    if absent:
        reason = "it is empty, or no file"
        try:
            open(absent[0], "rb").close()
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            reason = getattr(error, "strerror", error)
        more = f", and {len(absent) - 1:,} more images" if len(absent) > 1 else ""
        if not absent[0].isascii():
            more += "; on disk, a name can have another Unicode form, as macOS writes it"
        raise InputError(f"image {absent[0]}: {reason}{more}")
    largest = 2 * (Image.MAX_IMAGE_PIXELS or math.inf)  # Pillow refuses what has more pixels
    for path, image in zip(paths, images):
        short_side, long_side = sorted((image.width, image.height))
        if short_side * long_side > largest:
            raise InputError(f"image {path} has {image.width} x {image.height} pixels, and Pillow "
                             f"reads at most {largest:,}")
        # Resized, the shorter side is rounded down, and what should be 1 may come out as 0.9999.
        if short_side * max_size <= long_side:
            raise InputError(f"image {path} is too thin: of {image.width} x {image.height} pixels, "
                             f"none is left when its longer side is resized to {max_size}")


def read_image(path: Path) -> Tensor:
    """Decode an image file to RGB, (3, h, w) uint8, as Pillow converts it.

    Raises InputError, naming the file, if it is broken, grey of more than 8 bits, or turned or
    mirrored by EXIF: annotations may be of either view.
    """
    try:
        with Image.open(path) as image:
            mode = image.mode
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            # Contiguous, because the detector's transform is 1.6 ms slower on other tensors.
            pixels = pil_to_tensor(image.convert("RGB")).contiguous()
    except Exception as error:  # each decoder raises exceptions of its own
        raise InputError(f"image {path} cannot be decoded: {error}") from error
    if mode.startswith(("I", "F")):  # "I;16" and the like, which convert has clipped
        raise InputError(f"image {path} has more than 8 bits a value (mode {mode})")
    if orientation in range(2, 9):
        raise InputError(f"image {path} has EXIF orientation {orientation}: viewers turn or mirror "
                         "it; save it upright, and check that its annotations match that view")
    return pixels


class CocoImages(Dataset):
    """Images alone, (3, h, w) uint8, by (position, whether to flip it left to right).

    Raises InputError, naming the file, if an image cannot be used.
    """

    def __init__(self, images: Images, folder: Path) -> None:
        self.images = images
        self.folder = folder

    def __getitem__(self, key: tuple[int, bool]) -> Tensor:
        position, flip = key
        info = self.images[position]
        path = self.folder / info.file_name
        image = read_image(path)
        _, height, width = image.shape
        if (width, height) != (info.width, info.height):
            raise InputError(f"image {path} has {width} x {height} pixels, but {info.width} x "
                             f"{info.height} in the annotation file")
        return image.flip(-1) if flip else image


# ---- batches -------------------------------------------------------------------------------------

def aspect_ratio_groups(widths: Sequence[int], heights: Sequence[int]) -> np.ndarray:
    """Group images by width / height: (N,) ints from 0 to 7; an edge is in the upper group.

    Source: torchvision's references, create_aspect_ratio_groups with k = 3.
    """
    edges = 2 ** np.linspace(-1, 1, 7)
    return np.searchsorted(edges, np.divide(widths, heights), side="right")


def group_batches(order: Sequence[int], groups: Sequence[int], batch_size: int) -> list[list[int]]:
    """Cut an order of images into len(order) // batch_size batches, each of one group.

    Batches come in the order in which they fill up. At the end, left-over groups are filled up
    from the images that came first in them, the largest left-over first. This is the
    GroupedBatchSampler of torchvision's references in 2020, but that fails where a group has too
    few images for one batch; here they are repeated.
    """
    batches = []
    left_over = defaultdict(list)  # group -> positions that wait for their batch
    seen = defaultdict(list)       # group -> all its positions so far
    for position in order:
        group = groups[position]
        left_over[group].append(position)
        seen[group].append(position)
        if len(left_over[group]) == batch_size:
            # Taken out and put in again, the group is the dict's last. That order decides between
            # left-overs of equal size below, as in the original.
            batches.append(left_over.pop(group))
            left_over[group] = []

    missing = len(order) // batch_size - len(batches)
    by_size = sorted(left_over, key=lambda group: len(left_over[group]), reverse=True)
    for group in by_size[:missing]:
        fill = itertools.cycle(seen[group])
        still_free = batch_size - len(left_over[group])
        batches.append(left_over[group] + list(itertools.islice(fill, still_free)))
    return batches


class GroupedBatches(Sampler):
    """This process's batches of (position, flip), which depend on the arguments and epoch alone.

    The order is a DistributedSampler's; whether an image is flipped depends on seed, epoch and
    image. So an epoch can be resumed in the middle without a saved random state.
    images: have width and height. epoch, first_batch: set before each pass, which starts there.
    """

    def __init__(
        self, images: Images, batch_size: int, rank: int, world_size: int, seed: int = 0
    ) -> None:
        widths, heights = zip(*((image.width, image.height) for image in images))
        self.groups = aspect_ratio_groups(widths, heights).tolist()
        self.order = DistributedSampler(range(len(images)), world_size, rank, seed=seed)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self.first_batch = 0

    def __len__(self) -> int:
        return len(self.order) // self.batch_size  # of a whole epoch, whatever first_batch is

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        self.order.set_epoch(self.epoch)
        rng = np.random.default_rng((self.seed, self.epoch))
        flips = (rng.random(len(self.groups)) < 0.5).tolist()
        batches = group_batches(list(self.order), self.groups, self.batch_size)
        for batch in batches[self.first_batch:]:
            yield [(position, flips[position]) for position in batch]


# ---- loaders -------------------------------------------------------------------------------------

def train_loader(
    images: Images, folder: Path, batch_size: int, seed: int, workers: int, device: torch.device
) -> DataLoader:
    """Return a loader of this process's GroupedBatches, as lists of uint8 images (3, h, w)."""
    batches = GroupedBatches(
        images, batch_size, distributed.rank(), distributed.world_size(), seed)
    return DataLoader(
        CocoImages(images, folder), batch_sampler=batches,
        collate_fn=list,  # the images differ in size
        num_workers=workers, persistent_workers=workers > 0, pin_memory=device.type == "cuda",
        worker_init_fn=ignore_ctrl_c)


def val_loader(images: Images, folder: Path, workers: int, device: torch.device) -> DataLoader:
    """Return a loader of uint8 images (3, h, w), one by one."""
    return DataLoader(
        CocoImages(images, folder), sampler=[(i, False) for i in range(len(images))],
        batch_size=None, num_workers=min(workers, len(images)), pin_memory=device.type == "cuda",
        worker_init_fn=ignore_ctrl_c)


def ignore_ctrl_c(worker: int) -> None:
    """Ignore Ctrl-C in a worker; the main process ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def check_workers(images: Images, batch_size: int, workers: int, batches_in_use: int) -> None:
    """Raise InputError if loader workers would hang: for a long TMPDIR, or a small /dev/shm."""
    folder = tempfile.gettempdir()
    # Tensors go by Unix sockets named TMPDIR/pymp-xxxxxxxx/listener-xxxxxxxx, of 107 bytes at most.
    if workers > 0 and len(os.fsencode(folder)) > 75:
        raise InputError(f"TMPDIR {folder} is too long for the sockets of --workers {workers}: set "
                         "one of at most 75 bytes, or give --workers 0")
    if workers == 0 or not os.path.isdir("/dev/shm"):
        return
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    batches = 2 * workers + batches_in_use  # a DataLoader's prefetch_factor is 2
    sizes = (3 * image.width * image.height for image in images)
    needed = sum(sorted(sizes)[-processes_here * batches * batch_size:])
    free = shutil.disk_usage("/dev/shm").free
    if free < needed:
        raise InputError(f"/dev/shm has {free / 2**20:.0f} MiB free, and workers may need "
                         f"{needed / 2**20:.0f} MiB; give --workers 0, or docker more --shm-size")
