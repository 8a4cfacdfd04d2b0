"""A drawn data set in COCO's layout, and teachers for it: one trained in minutes, one random.

Whoever has a data set of their own can train a teacher for it as train_teacher does.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from pycocotools.coco import COCO
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import data
import evaluate
import models

CATEGORIES = [{"id": 1, "name": "box"}, {"id": 2, "name": "ellipse"}]
COLOURS = {1: (230, 40, 40), 2: (40, 60, 220)}  # darker than the ground, in greyscale too

# ---- the data set --------------------------------------------------------------------------------


def write_dataset(data_dir: Path, train: int, val: int, seed: int = 0) -> None:
    """Draw red boxes and blue ellipses into JPEG files; write annotations, with polygons as masks.

    train, val: numbers of images. Every 7th has no object, every 8th is greyscale.
    """
    rng = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", val)):
        folder = data_dir / f"{split}2017"
        folder.mkdir(parents=True, exist_ok=True)
        images, annotations = [], []
        for image_id in range(1, count + 1):
            objects = int(rng.integers(1, 5)) if image_id % 7 else 0
            picture, polygons = draw_image(rng, objects)
            if image_id % 8 == 0:
                picture = picture.convert("L")
            name = f"{image_id:012d}.jpg"
            picture.save(folder / name, quality=90)
            images.append({"id": image_id, "file_name": name,
                           "width": picture.width, "height": picture.height})
            for category_id, polygon in polygons:
                annotation = {"id": len(annotations) + 1, "image_id": image_id}
                annotations.append(annotation | describe_object(category_id, polygon))
        file = data_dir / "annotations" / f"instances_{split}2017.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(
            {"images": images, "annotations": annotations, "categories": CATEGORIES}))


def draw_image(
    rng: np.random.Generator, objects: int
) -> tuple[Image.Image, list[tuple[int, np.ndarray]]]:
    """Return a picture of 160 to 320 pixels a side, and its objects: category and (N, 2) polygon.

    Objects do not overlap; one that finds no place is left out.
    """
    width, height = sorted(rng.integers(160, 321, 2).tolist(), reverse=True)
    if rng.random() < 0.25:
        width, height = height, width
    pixels = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1)  # x, y
    waves = np.sin(pixels @ rng.normal(size=(2, 3)) / 60)                        # (h, w, 3)
    picture = Image.fromarray((170 + 45 * waves).astype(np.uint8))
    draw = ImageDraw.Draw(picture)

    polygons = []
    taken = np.zeros((height, width), dtype=bool)
    for _ in range(objects):
        half = rng.uniform(16, 50, 2)  # width and height
        centre = rng.uniform(half + 1, np.array([width, height]) - half - 2)
        category_id = int(rng.integers(1, 3))
        (x0, y0), (x1, y1) = (centre - half).astype(int) - 3, (centre + half).astype(int) + 4
        if taken[max(y0, 0):y1, max(x0, 0):x1].any():
            continue
        taken[max(y0, 0):y1, max(x0, 0):x1] = True
        polygon = outline(category_id) * half + centre
        draw.polygon([tuple(point) for point in polygon], fill=COLOURS[category_id])
        polygons.append((category_id, polygon))
    return picture, polygons


def outline(category_id: int) -> np.ndarray:
    """Return the corners of a box, or 24 points of an ellipse, within -1 to 1: (N, 2)."""
    if category_id == 1:
        return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    angles = np.arange(24) * 2 * np.pi / 24
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def describe_object(category_id: int, polygon: np.ndarray) -> dict:
    """Return the fields of a COCO annotation that follow from an object's polygon."""
    low, high = polygon.min(axis=0), polygon.max(axis=0)
    x, y = polygon.T
    area = abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2  # the shoelace formula
    return {
        "category_id": category_id,
        "bbox": [*low.tolist(), *(high - low).tolist()],
        "area": float(area),
        "iscrowd": 0,
        "segmentation": [polygon.flatten().tolist()],
    }


# ---- teachers ------------------------------------------------------------------------------------


def train_teacher(
    arch: str, data_dir: Path, steps: int, min_size: int, max_size: int, proposals: int = 100,
    rois: int = 32, upside_down: bool = False, seed: int = 0, report: Callable[[str], None] = print
) -> nn.Module:
    """Train a whole detector from random weights with torchvision's own losses, and return it.

    It is for data sets in COCO's layout for which there is no detector yet, and is good enough to
    be distilled, not more. Save its state_dict() for --teacher-ckpt.
    steps: of 4 images each, with Adam and one cycle of the learning rate.
    proposals, rois: of an image, from the RPN and of them for the RoI heads. torchvision has 2,000
        and 512; for a handful of objects fewer are enough, and faster.
    upside_down: also flip half of the images that way, for photographs that have no upper side.
    """
    masks = arch == "maskrcnn"
    annotation_file, folder = data.split_paths(data_dir, "train2017")
    categories = json.loads(annotation_file.read_text())["categories"]
    classes = max(category["id"] for category in categories) + 1
    content = data.read_annotations(annotation_file, classes, masks)
    coco = evaluate.make_coco(content)
    images = data.image_infos(content)

    torch.manual_seed(seed)
    detector = models.build_detector(
        arch, min_size, max_size, classes,
        box_batch_size_per_image=rois, rpn_post_nms_top_n_train=proposals)
    initialize(detector)
    calibrate(detector, [data.read_image(folder / info.file_name) / 255 for info in images[:8]])
    detector.requires_grad_(True)
    detector.train()
    bf16 = models.has_bf16(torch.device("cpu"))  # twice as fast there
    optimizer = torch.optim.Adam(detector.parameters(), fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-4, total_steps=steps)
    rng = np.random.default_rng(seed)
    for step in range(1, steps + 1):
        chosen = [images[i] for i in rng.choice(len(images), 4, replace=False)]
        batch = []
        for info in chosen:
            flips = (rng.random() < 0.5, upside_down and rng.random() < 0.5)
            batch.append(load_example(coco, folder, info, flips, masks))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            losses = detector([image for image, _ in batch], [target for _, target in batch])
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 10)
        optimizer.step()
        scheduler.step()
        if step % 25 == 0:
            report(f"teacher: step {step}/{steps} loss {loss.item():.3f}")
    return detector.eval().requires_grad_(False)


def load_example(
    coco: COCO, folder: Path, info: data.ImageInfo, flips: tuple[bool, bool], with_masks: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return an image (3, h, w) in [0, 1], and what torchvision's detectors are trained with.

    flips: whether the image is flipped left-right, and upside down.
    """
    image = data.read_image(folder / info.file_name) / 255
    annotations = [a for a in coco.imgToAnns[info.id]
                   if not a["iscrowd"] and min(a["bbox"][2:]) > 0]
    boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]  # x0 y0 x1 y1
    left_right, upside_down = flips
    if left_right:
        boxes[:, [0, 2]] = image.shape[-1] - boxes[:, [2, 0]]
    if upside_down:
        boxes[:, [1, 3]] = image.shape[-2] - boxes[:, [3, 1]]
    axes = [axis for axis, is_flipped in ((-1, left_right), (-2, upside_down)) if is_flipped]
    image = image.flip(axes)
    labels = torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64)
    target = {"boxes": boxes, "labels": labels}
    if with_masks:
        masks = [torch.from_numpy(coco.annToMask(a)) for a in annotations]
        masks = torch.stack(masks) if masks else torch.zeros(0, info.height, info.width)
        target["masks"] = masks.flip(axes).to(torch.uint8)
    return image, target


def random_teacher(
    arch: str, images: Sequence[Tensor], min_size: int, max_size: int, seed: int = 0
) -> nn.Module:
    """Return a random detector of 91 classes that detects something, for tests that need no more.

    images: (3, h, w) in [0, 1], to calibrate its features with.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        detector = models.build_detector(arch, min_size, max_size)
        initialize(detector)

    @torch.no_grad()
    def spread(linear: nn.Linear, inputs: tuple[Tensor]) -> None:
        """Give the class scores a deviation of 3, so that some exceed the score threshold, and
        make all classes but background, 1 and 2, which the data set has, improbable."""
        scores = nn.functional.linear(inputs[0], linear.weight)  # (RoIs, 91)
        linear.weight.mul_(3 / (scores - scores.mean(0)).std())
        linear.bias.copy_(-nn.functional.linear(inputs[0], linear.weight).mean(0))
        linear.bias[3:] -= 20

    hook = detector.roi_heads.box_predictor.cls_score.register_forward_pre_hook(spread)
    calibrate(detector, images)
    hook.remove()
    return detector


def initialize(detector: nn.Module) -> None:
    """Weaken the residual branches of a random ResNet-50, as in trained ones."""
    for name, norm in detector.backbone.body.named_modules():
        if name.endswith(".bn3"):
            norm.weight.fill_(0.1)


@torch.no_grad()
def calibrate(detector: nn.Module, images: Sequence[Tensor]) -> None:
    """Set the statistics of each FrozenBatchNorm2d to those of its inputs for these images."""

    def set_statistics(norm: FrozenBatchNorm2d, inputs: tuple[Tensor]) -> None:
        norm.running_mean.copy_(inputs[0].mean((0, 2, 3)))
        norm.running_var.copy_(inputs[0].var((0, 2, 3)).clamp(min=1e-6))

    hooks = [module.register_forward_pre_hook(set_statistics) for module in detector.modules()
             if isinstance(module, FrozenBatchNorm2d)]
    detector.eval()(list(images))
    for hook in hooks:
        hook.remove()
