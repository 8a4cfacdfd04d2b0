"""COCO box and mask AP of a student checkpoint, beside its teacher's and the published figures.

    python evaluate.py --ckpt coco/ghnd/coco2017-custom_maskrcnn_..._fpn.pt --teacher --bits 8 4

Under torchrun, the processes share the images and then the categories.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torchvision.ops import box_convert
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_segmentation_masks

import data
import distributed
import models
from distributed import InputError, log

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
MIN_SCORE = 0.5  # of the detections that are drawn, and of a teacher's that count as ground truth
PUBLISHED = {    # AP of torchvision's COCO_V1 weights, and of the students (arXiv 2011.12913)
    "fasterrcnn": {"teacher": {"bbox": 0.370}, "student": {"bbox": 0.359}},
    "maskrcnn": {"teacher": {"bbox": 0.379, "segm": 0.346},
                 "student": {"bbox": 0.369, "segm": 0.336}},
}
COCO_VAL_IMAGES = 5000  # in val2017, to which these figures belong

Predict = Callable[[Tensor], dict[str, Tensor]]  # from (3, h, w) in [0, 1] to torchvision's dict
Results = list[dict[str, Any]]                   # in COCO's format
Metrics = dict[str, list[float]]                 # "bbox" and, of a Mask R-CNN, "segm": 12 METRICS

# ---- the validation set --------------------------------------------------------------------------


class ValSet:
    """The first `limit` images of val2017, and its annotations, checked, for one kind of detector.

    images: list of data.ImageInfo, by ascending id. folder: of their files.
    coco: pycocotools' COCO of all annotations.
    iou_types: "bbox" and, if the detector has masks, "segm".
    """

    def __init__(self, data_dir: Path, detector: nn.Module, limit: int | None = None) -> None:
        heads = detector.roi_heads
        self.iou_types = ("bbox", "segm") if heads.has_mask() else ("bbox",)
        classes = heads.box_predictor.cls_score.out_features
        annotation_file = data_dir / "annotations" / "instances_val2017.json"
        content = distributed.on_main(
            read_annotations, annotation_file, classes, heads.has_mask())

        self.folder = data_dir / "val2017"
        self.images = data.image_infos(content)[:limit]
        distributed.on_main(
            data.check_images, self.images, self.folder, detector.transform.max_size)
        self.coco = make_coco(content)


def read_annotations(annotation_file: Path, classes: int, masks: bool) -> dict[str, Any]:
    """Read a COCO instances file, and check and repair all that COCOeval reads of it.

    classes: of the detector, the background (0) included. masks: whether they are evaluated.
    Repaired: annotations are numbered from 1, since COCOeval takes id 0 for "no match"; a missing
    iscrowd is 0; a missing area is the mask's or the box's. An annotation of an image or category
    that is not listed is left out, as by COCOeval.
    Raises InputError, naming the file and the entry, if anything there cannot be right.
    """
    content = data.read_instances(annotation_file)
    categories = content.get("categories")
    if not isinstance(categories, list) or not all(isinstance(c, dict) for c in categories):
        raise InputError(f"{annotation_file} has no list of objects named 'categories'")
    data.check_ids(annotation_file, "categories", categories)
    category_ids = {category["id"] for category in categories}
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}

    kept = []
    for i, annotation in enumerate(content["annotations"]):
        if type(annotation.get("category_id")) is not int:
            raise data.entry_error(
                annotation_file, "annotations", i, annotation, "category_id", "a whole number")
        if annotation["image_id"] not in sizes or annotation["category_id"] not in category_ids:
            continue
        size = sizes[annotation["image_id"]]
        fault = find_fault(annotation, classes, size if masks else None)
        if fault:
            raise data.entry_error(annotation_file, "annotations", i, annotation, *fault)
        repair(annotation, size if masks else None)
        kept.append(annotation)
        annotation["id"] = len(kept)

    left_out = len(content["annotations"]) - len(kept)
    if left_out:
        log(f"{annotation_file}: {left_out} annotations left out, since their images or categories "
            "are not listed")
    content["annotations"] = kept
    return content


def find_fault(
    annotation: dict[str, Any], classes: int, mask_size: tuple[int, int] | None
) -> tuple[str, str] | None:
    """Return the first field of an annotation that is wrong, and what is expected of it, if any.

    mask_size: height and width of the image, None where masks are not evaluated.
    """
    if not 1 <= annotation["category_id"] < classes:
        return "category_id", (f"one of the detector's classes, 1 to {classes - 1} (0 is the "
                               "background)")
    _, _, width, height = annotation["bbox"]
    if width < 0 or height < 0:
        return "bbox", "x, y, and a width and height that are not negative"
    if annotation.get("iscrowd", 0) not in (0, 1):
        return "iscrowd", "0 or 1"
    area = annotation.get("area", 0)
    if type(area) not in (int, float) or not 0 <= area < 1e18:
        return "area", "a finite number of pixels"
    if mask_size and not is_mask(annotation.get("segmentation"), *mask_size):
        return "segmentation", ("polygons of three points or more, or an RLE of {} x {} pixels "
                                "(height x width)".format(*mask_size))
    return None


def is_mask(segmentation: object, height: int, width: int) -> bool:
    """Return whether a segmentation is COCO's, as polygons or RLE, for an image of this size."""
    if isinstance(segmentation, list):
        # pycocotools would take a "polygon" of four numbers for a box.
        return len(segmentation) > 0 and all(
            isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0
            and all(map(data.is_coordinate, polygon)) for polygon in segmentation)
    if not isinstance(segmentation, dict):
        return False
    size = segmentation.get("size")
    if size != [height, width] or not all(type(side) is int for side in size):
        return False
    counts = segmentation.get("counts")
    if isinstance(counts, str):
        counts = run_lengths(counts)
    # Where the runs do not cover the image, pycocotools would show what happens to be in memory.
    return (isinstance(counts, list) and all(type(run) is int and run >= 0 for run in counts)
            and sum(counts) == height * width)


def run_lengths(counts: str) -> list[int]:
    """Decode the text of a compressed RLE to its run lengths; return [] if it is not whole.

    A character, less 48, is 6 bits: five of a number, of which the lowest come first, and one that
    says whether the number goes on in the next character. From the fourth on, a number is not a
    run, but its difference to the run before the last (rleFrString in pycocotools' maskApi.c).
    """
    runs = []
    number, bits = 0, 0
    for character in counts:
        code = ord(character) - 48
        if not 0 <= code < 64:
            return []
        number |= (code & 0b011111) << bits
        bits += 5
        if code & 0b100000:  # the number goes on
            continue
        if code & 0b010000:  # it is negative, in two's complement
            number -= 1 << bits
        if len(runs) > 2:
            number += runs[-2]
        runs.append(number)
        number, bits = 0, 0
    return runs if bits == 0 else []


def repair(annotation: dict[str, Any], mask_size: tuple[int, int] | None) -> None:
    """Add a missing iscrowd and area to an annotation, as read_annotations says."""
    annotation.setdefault("iscrowd", 0)
    if "area" in annotation:
        return
    if mask_size is None:
        _, _, width, height = annotation["bbox"]
        annotation["area"] = width * height
        return
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, list):  # polygons
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, *mask_size))
    elif isinstance(segmentation["counts"], list):
        rle = coco_mask.frPyObjects(segmentation, *mask_size)
    else:
        rle = segmentation
    annotation["area"] = float(coco_mask.area(rle))


# ---- from images to results ----------------------------------------------------------------------


@torch.inference_mode()
def evaluate(
    predict: Predict, val: ValSet, device: torch.device, workers: int = 0, title: str = ""
) -> tuple[Metrics, Results]:
    """Return, on every process, the metrics of a detector over a ValSet and all its results.

    predict: from an image (3, h, w), float in [0, 1] on the device, to torchvision's detections:
        a detector, head and tail with so many bits, or anything else that detects.
    workers: that load images. title: for the lines of progress.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    share = val.images[rank::world_size]
    loader = data.val_loader(val.images, val.folder, workers, device)
    my_results = []
    begin = time.perf_counter()
    for done, (info, image) in enumerate(zip(share, data.iterate(loader), strict=True), start=1):
        detections = predict(image.to(device, non_blocking=True) / 255)
        my_results += to_coco(info.id, detections)
        if done % 100 == 0:
            seconds = (time.perf_counter() - begin) / done
            log(f"{title}: image {done}/{len(share)}, {seconds:.3f} s each")

    image_ids = [info.id for info in val.images]
    results = list(itertools.chain.from_iterable(distributed.gather(my_results)))
    results.sort(key=lambda result: result["image_id"])  # stable: an image's keep their order
    metrics = {iou_type: coco_metrics(val.coco, results, image_ids, iou_type)
               for iou_type in val.iou_types}
    return metrics, results


def whole(detector: nn.Module) -> Predict:
    """Return a torchvision detector as a function of one image."""
    return lambda image: detector([image])[0]


def to_coco(image_id: int, detections: dict[str, Tensor]) -> Results:
    """Turn a torchvision detector's output for one image into COCO results.

    detections: boxes (N, 4) x0 y0 x1 y1, labels (N,), scores (N,) and, from a Mask R-CNN, masks
        (N, 1, h, w) in [0, 1], which are cut at 0.5.
    Returns N dicts: image_id, category_id, bbox (x y w h), score[, segmentation as RLE].
    """
    labels = detections["labels"].tolist()  # the detectors' classes are COCO's category ids
    boxes = box_convert(detections["boxes"], "xyxy", "xywh").tolist()
    scores = detections["scores"].tolist()
    results = [
        {"image_id": image_id, "category_id": label, "bbox": box, "score": score}
        for label, box, score in zip(labels, boxes, scores, strict=True)
    ]
    if "masks" in detections:
        masks = (detections["masks"][:, 0] > 0.5).to(torch.uint8)
        # pycocotools wants (h, w, N) in Fortran order. That is (N, w, h) in C order, transposed.
        columns_first = masks.transpose(1, 2).contiguous().cpu().numpy()  # (N, w, h)
        for result, rle in zip(results, coco_mask.encode(columns_first.T), strict=True):
            result["segmentation"] = {**rle, "counts": rle["counts"].decode()}
    return results


def results_of_type(results: Results, iou_type: str) -> Results:
    """Return copies of COCO results with only their boxes ("bbox") or only their masks ("segm").

    pycocotools would otherwise take the area of a mask from its box, which moves detections
    between small, medium and large.
    """
    unwanted = {"bbox": "segmentation", "segm": "bbox"}[iou_type]
    return [{key: value for key, value in result.items() if key != unwanted} for result in results]


# ---- from results to metrics ---------------------------------------------------------------------


def coco_metrics(
    coco: COCO, results: Results, image_ids: Sequence[int], iou_type: str
) -> list[float]:
    """Return COCOeval's 12 METRICS for "bbox" or "segm" over these images; -1: nothing to find.

    All processes call this with the same arguments. Each matches its slice of the categories; the
    slices' precision and recall are then concatenated, and summarized on every process.
    """
    categories = np.array_split(sorted(coco.getCatIds()), distributed.world_size())
    my_categories = categories[distributed.rank()].tolist()
    my_results = [result for result in results_of_type(results, iou_type)
                  if result["category_id"] in my_categories]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        evaluation = COCOeval(coco, load_results(coco, my_results), iou_type)
        evaluation.params.imgIds = list(image_ids)
        evaluation.params.catIds = my_categories
        evaluation.evaluate()
        evaluation.accumulate()
        for name, category_axis in (("precision", 2), ("recall", 1)):
            slices = distributed.gather(evaluation.eval[name])
            evaluation.eval[name] = np.concatenate(slices, axis=category_axis)
        evaluation.summarize()
    return evaluation.stats.tolist()


def make_coco(content: dict[str, Any]) -> COCO:
    """Return pycocotools' COCO of the content of an annotation file."""
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def load_results(coco: COCO, results: Results) -> COCO:
    """Return coco.loadRes(results), for an empty list too. loadRes adds fields to the results."""
    if results:
        return coco.loadRes(results)
    return make_coco({"images": coco.dataset["images"],
                      "categories": coco.dataset["categories"], "annotations": []})


def agreement(val: ValSet, student_results: Results, teacher_results: Results) -> Metrics:
    """Return the student's metrics with the teacher's confident detections as ground truth.

    Those are the ones of score >= MIN_SCORE. This needs no labels. On every process alike.
    """
    metrics = {}
    image_ids = [info.id for info in val.images]
    for iou_type in val.iou_types:
        confident = [result for result in teacher_results
                     if result["score"] >= MIN_SCORE and has_area(result, iou_type)]
        with contextlib.redirect_stdout(io.StringIO()):
            truth = load_results(val.coco, results_of_type(confident, iou_type))
        metrics[iou_type] = coco_metrics(truth, student_results, image_ids, iou_type)
    return metrics


def has_area(result: dict[str, Any], iou_type: str) -> bool:
    """Return whether a result's box or mask covers anything, so that it can be found at all."""
    if iou_type == "segm":
        return coco_mask.area(result["segmentation"]) > 0
    _, _, width, height = result["bbox"]
    return width * height > 0


# ---- rates ---------------------------------------------------------------------------------------


def measure_split(
    student: nn.Module, bits: int, val: ValSet, device: torch.device, workers: int
) -> dict[str, Any]:
    """Evaluate a student split into head, bytes and tail; return metrics, bytes and seconds.

    Bytes are means over the images: of the payload, its values before zlib, and the image's file.
    Seconds are medians over the images.
    """
    head, tail = models.split(student, bits)
    sent = []

    def predict(image: Tensor) -> dict[str, Tensor]:
        start = time.perf_counter()
        payload = head.compress(image)
        middle = time.perf_counter()
        detections = {name: values.cpu() for name, values in tail.detect(payload).items()}
        end = time.perf_counter()
        _, values = models.unpack(
            payload, student.backbone.body.layer1.channels, student.transform.max_size)
        sent.append((len(payload), values.nbytes, middle - start, end - middle))
        return detections

    metrics, _ = evaluate(predict, val, device, workers, f"student, {bits} bits")
    rows = list(itertools.chain.from_iterable(distributed.gather(sent)))  # one an image
    payload_bytes, raw_bytes, head_seconds, tail_seconds = zip(*rows)
    return {
        "bits": bits,
        "metrics": metrics,
        "payload_bytes": float(np.mean(payload_bytes)),
        "raw_bytes": float(np.mean(raw_bytes)),
        "jpeg_bytes": file_bytes(val),
        "head_seconds": float(np.median(head_seconds)),
        "tail_seconds": float(np.median(tail_seconds)),
    }


def measure_jpeg(
    teacher: nn.Module, quality: int, val: ValSet, device: torch.device, workers: int
) -> dict[str, Any]:
    """Evaluate the teacher on images recompressed as JPEG: the alternative to a split student.

    quality: Pillow's, 1 to 100. Returns metrics, and the mean bytes of the recompressed files.
    """
    sizes = []

    def predict(image: Tensor) -> dict[str, Tensor]:
        file = io.BytesIO()
        pixels = (image * 255).round().to(torch.uint8)
        to_pil_image(pixels.cpu()).save(file, "JPEG", quality=quality)
        sizes.append(len(file.getvalue()))
        file.seek(0)
        recompressed = pil_to_tensor(Image.open(file)).contiguous()
        return teacher([recompressed.to(image.device) / 255])[0]

    metrics, _ = evaluate(predict, val, device, workers, f"teacher, JPEG {quality}")
    all_sizes = list(itertools.chain.from_iterable(distributed.gather(sizes)))
    return {"quality": quality, "metrics": metrics, "payload_bytes": float(np.mean(all_sizes))}


def file_bytes(val: ValSet) -> float:
    """Return the mean size of the images' files."""
    return float(np.mean([os.path.getsize(val.folder / info.file_name) for info in val.images]))


# ---- tables and pictures -------------------------------------------------------------------------


def metrics_table(rows: dict[str, Metrics], published: dict[str, dict[str, float]]) -> str:
    """Format metrics as a table; a row whose name is in `published` ends with the published AP."""
    header = f"{'':15}" + "".join(f"{name:>8}" for name in METRICS)
    if published:
        header += "   AP published"
    lines = [header]
    for name, metrics in rows.items():
        for iou_type, values in metrics.items():
            line = f"{name + ' ' + iou_type:15}" + "".join(f"{value:8.4f}" for value in values)
            if name in published:
                line += f"   {published[name][iou_type]:.3f}"
            lines.append(line)
    return "\n".join(lines)


def rate_table(rows: Sequence[dict[str, Any]], jpeg_bytes: float) -> str:
    """Format what measure_split and measure_jpeg return.

    jpeg_bytes: the mean size of the images' files, of which the bytes sent are a share.
    """
    iou_types = rows[0]["metrics"]
    header = f"{'sent':18}" + "".join(f"  AP {iou_type}" for iou_type in iou_types)
    lines = [header + "   bytes   share  head s  tail s"]
    for row in rows:
        if "bits" in row:
            name = f"student, {row['bits']} bits"
            seconds = f"{row['head_seconds']:8.4f}{row['tail_seconds']:8.4f}"
        else:
            name = f"teacher, JPEG {row['quality']}"
            seconds = ""
        line = f"{name:18}"
        for metrics in row["metrics"].values():
            line += f"{metrics[0]:9.4f}"
        line += f"{row['payload_bytes']:8.0f}{row['payload_bytes'] / jpeg_bytes:8.1%}{seconds}"
        lines.append(line)
    return "\n".join(lines)


def draw_pictures(
    val: ValSet, student_results: Results, teacher_results: Results, folder: Path, count: int
) -> None:
    """Write a picture of each of the first images: annotations, teacher, student side by side."""
    names = {c["id"]: str(c.get("name", c["id"])) for c in val.coco.dataset["categories"]}
    for info in val.images[:count]:
        image = data.read_image(val.folder / info.file_name)
        truth = val.coco.imgToAnns[info.id]
        columns = {"annotations": truth, "teacher": teacher_results, "student": student_results}
        if not val.coco.dataset["annotations"]:
            del columns["annotations"]
        panels = []
        for title, results in columns.items():
            shown = [r for r in results
                     if r["image_id"] == info.id and r.get("score", 1) >= MIN_SCORE]
            panels.append(draw_panel(image, shown, names, title, val))
        picture = Image.new("RGB", (sum(panel.width for panel in panels), panels[0].height))
        left = 0
        for panel in panels:
            picture.paste(panel, (left, 0))
            left += panel.width
        # One picture for each image, also where two have one stem.
        name = info.file_name if info.file_name.endswith(".jpg") else f"{info.file_name}.jpg"
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)  # one folder for each folder of images
        picture.save(path, quality=90)


def draw_panel(
    image: Tensor, results: Results, names: dict[int, str], title: str, val: ValSet
) -> Image.Image:
    """Draw boxes, masks, names and scores onto an image (3, h, w), under a title."""
    colours = [category_colour(result["category_id"]) for result in results]
    if "segm" in val.iou_types and results:
        masks = [coco_mask.decode(val.coco.annToRLE(result)) for result in results]
        image = draw_segmentation_masks(
            image, torch.from_numpy(np.stack(masks)).bool(), alpha=0.4, colors=colours)
    # Small images are enlarged, or the text would cover them.
    zoom = max(1, round(600 / max(image.shape[1:])))
    panel = to_pil_image(image)
    panel = panel.resize((zoom * panel.width, zoom * panel.height))
    draw = ImageDraw.Draw(panel)
    font = ImageFont.load_default(size=16)
    for result, colour in zip(results, colours, strict=True):
        x, y, width, height = (zoom * side for side in result["bbox"])
        draw.rectangle((x, y, x + width, y + height), outline=colour, width=3)
        text = names.get(result["category_id"], "?")
        if "score" in result:
            text += f" {result['score']:.2f}"
        write(draw, (x, max(y - 20, 0)), text, font, colour)
    write(draw, (4, panel.height - 24), title, font, (40, 40, 40))
    return panel


def write(
    draw: ImageDraw.ImageDraw, position: tuple[float, float], text: str, font: Any, colour: tuple
) -> None:
    """Write white text on a ground of some colour."""
    draw.rectangle(draw.textbbox(position, text, font=font), fill=colour)
    draw.text(position, text, fill="white", font=font)


def category_colour(category_id: int) -> tuple[int, int, int]:
    """Return a colour, the same for a category in every picture: neighbours differ in hue."""
    hue = category_id * 0.381966 % 1  # the golden ratio spreads any number of hues evenly
    return Image.new("HSV", (1, 1), (int(255 * hue), 220, 170)).convert("RGB").getpixel((0, 0))


# ---- the command ---------------------------------------------------------------------------------


def positive(text: str) -> int:
    """Parse a whole number from 1 on, for argparse."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def not_negative(text: str) -> int:
    """Parse a whole number from 0 on, for argparse."""
    number = int(text)
    if number < 0:
        raise ValueError
    return number


def path(text: str) -> Path:
    """Parse a path, for argparse: bash leaves the ~ of --flag=~/x as it is."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text}: there is no home directory") from error


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that train.py and evaluate.py share."""
    parser.add_argument(
        "--data-dir", type=path, metavar="DIR", default="~/datasets/coco2017",
        help="folder with COCO's train2017/, val2017/ and annotations/ (%(default)s)")
    parser.add_argument(
        "--teacher-ckpt", type=path, metavar="FILE",
        help="the teacher's weights, a torchvision state dict (default: download COCO_V1)")
    parser.add_argument(
        "--teacher-eps", type=float, metavar="EPS", default=0.0,
        help="eps of the FrozenBatchNorm2d in --teacher-ckpt: %(default)s, the default, for "
             "COCO_V1 and what was fine-tuned from it; 1e-5 for what torchvision's constructors "
             "built without COCO_V1")
    parser.add_argument(
        "--device", choices=["auto", "cuda", "cpu"], default="auto",
        help="auto is cuda where there is a GPU (%(default)s)")
    parser.add_argument(
        "--workers", type=not_negative, metavar="N", default=min(4, os.cpu_count() or 1),
        help="processes that load images, for each process that computes (%(default)s)")
    parser.add_argument(
        "--limit-val", type=positive, metavar="N", help="use only the first N images of val2017")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="COCO metrics of a GHND student.", usage="%(prog)s --ckpt FILE [flags]")
    parser.add_argument(
        "--ckpt", type=path, metavar="FILE", required=True,
        help="the student's checkpoint, ours or torchdistill's")
    parser.add_argument(
        "--teacher", action="store_true", help="evaluate the teacher, and agreement with it, too")
    parser.add_argument(
        "--bits", type=int, nargs="+", choices=sorted(models.DTYPES), metavar="N", default=[],
        help="send the images through head and tail, too, with 1 to 8, 16 or 32 bits a value")
    parser.add_argument(
        "--jpeg", type=int, nargs="+", choices=range(1, 101), metavar="Q", default=[],
        help="evaluate the teacher on images recompressed as JPEG of these qualities, too")
    parser.add_argument(
        "--save-detections", type=path, metavar="FILE",
        help="write the student's results, in COCO's format, to this .json file")
    parser.add_argument(
        "--pictures", type=path, metavar="DIR",
        help="draw what teacher and student find, in as many images as --limit-val says, or in 20")
    add_common_flags(parser)
    parser.add_argument(
        "--min-size", type=positive, metavar="PX", default=800,
        help="images are resized to this shorter side (%(default)s) ...")
    parser.add_argument(
        "--max-size", type=positive, metavar="PX", default=1333,
        help="... or, if that is less, to this longer side (%(default)s)")
    return parser.parse_args()


def save_detections(results: Results, iou_types: Sequence[str], path: Path) -> None:
    """Write results to path and, those of masks, to the same name ending in .segm.json."""
    for iou_type in iou_types:
        file = path if iou_type == "bbox" else path.with_suffix(".segm.json")
        file.write_text(json.dumps(results_of_type(results, iou_type)))


def require_writable(file: Path) -> None:
    """Raise InputError if a file cannot be written: better now than after an hour."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("a").close()
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error}") from error


def require_pictures_folder(folder: Path, data_dir: Path) -> None:
    """Raise InputError if pictures cannot be written to a folder, or could replace the images."""
    for split in ("train2017", "val2017"):
        if folder.resolve().is_relative_to((data_dir / split).resolve()):
            raise InputError(f"--pictures {folder} is where the images are; give another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--pictures {folder} cannot be written: {error}") from error


def count_parameters(student: nn.Module) -> dict[str, int]:
    """Return how many parameters the head and the whole student have."""
    head, _ = models.split(student)
    return {"parameters": sum(p.numel() for p in head.network.parameters()),
            "student_parameters": sum(p.numel() for p in student.parameters())}


def published_for(student: nn.Module, val: ValSet) -> dict[str, dict[str, float]]:
    """Return the published AP to set beside a student's metrics, if they can be compared.

    That is, if it has COCO's 91 classes and 3 channels, and val is as large as all of val2017.
    """
    classes = student.roi_heads.box_predictor.cls_score.out_features
    channels = student.backbone.body.layer1.channels
    if (classes, channels, len(val.images)) != (91, 3, COCO_VAL_IMAGES):
        return {}
    return PUBLISHED["maskrcnn" if student.roi_heads.has_mask() else "fasterrcnn"]


def main() -> None:
    args = parse_args()
    device = distributed.set_up(args.device)
    sizes = (args.min_size, args.max_size)
    student, arch = distributed.on_main(models.load_student, args.ckpt, *sizes)
    models.to_device(student, device)
    val = ValSet(args.data_dir, student, args.limit_val)
    if args.save_detections:
        distributed.on_main(require_writable, args.save_detections)
    if args.pictures:
        distributed.on_main(require_pictures_folder, args.pictures, args.data_dir)
    log(f"{args.ckpt}: {arch}, {len(val.images)} images, "
        f"{distributed.world_size()} x {device.type}")

    metrics = {}
    if args.teacher or args.teacher_ckpt or args.jpeg or args.pictures:
        teacher = distributed.on_main(
            models.load_teacher, arch, args.teacher_ckpt, *sizes, args.teacher_eps)
        models.to_device(teacher, device)
        metrics["teacher"], teacher_results = evaluate(
            whole(teacher), val, device, args.workers, "teacher")
    metrics["student"], results = evaluate(whole(student), val, device, args.workers, "student")
    if "teacher" in metrics:
        metrics["agreement"] = agreement(val, results, teacher_results)

    split = [measure_split(student, bits, val, device, args.workers) for bits in args.bits]
    jpeg = [measure_jpeg(teacher, quality, val, device, args.workers) for quality in args.jpeg]
    if args.pictures:
        distributed.on_main(
            draw_pictures, val, results, teacher_results, args.pictures, args.limit_val or 20)
    if args.save_detections:
        distributed.on_main(save_detections, results, val.iou_types, args.save_detections)

    log(metrics_table(metrics, published_for(student, val)))
    summary = dict(metrics)
    if split:
        summary |= {"rate": split, "head": count_parameters(student)}
    if jpeg:
        summary["jpeg"] = jpeg
    if split or jpeg:
        log(rate_table(split + jpeg, file_bytes(val)))
    log(json.dumps(summary))


if __name__ == "__main__":
    distributed.run(main)
