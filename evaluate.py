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
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFont
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
from distributed import InputError, log, plural, writing

Predict = Callable[[Tensor], dict[str, Tensor]]  # from (3, h, w) in [0, 1] to torchvision's dict
Results = list[dict[str, Any]]                   # in COCO's format
Metrics = dict[str, dict[str, float]]            # "bbox" and, of a Mask R-CNN, "segm": METRICS

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
MIN_SCORE = 0.5  # of detections that are drawn, and of a teacher's that count as ground truth

# ---- from images to metrics ----------------------------------------------------------------------


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
        annotation_file, self.folder = distributed.on_main(
            data.split_paths, data_dir, "val2017")
        content = distributed.on_main(
            data.read_annotations, annotation_file, classes, heads.has_mask())
        self.images = data.image_infos(content)[:limit]
        distributed.on_main(
            data.check_images, self.images, self.folder, detector.transform.max_size)
        self.coco = make_coco(content)


@torch.inference_mode()
def evaluate(
    predict: Predict, val: ValSet, device: torch.device, workers: int = 0, title: str = "evaluation"
) -> tuple[Metrics, Results]:
    """Return, on every process, the metrics of a detector over a ValSet and all its results.

    predict: from an image (3, h, w), float in [0, 1] on the device, to torchvision's detections:
        `whole` of a detector, head and tail with so many bits, or anything else that detects.
    workers: that load images. title: for the lines of progress.
    """
    share = val.images[distributed.rank()::distributed.world_size()]
    loader = data.val_loader(share, val.folder, workers, device)
    log(f"{title}: {plural(len(val.images), 'image')}")
    my_results = []
    begin = last_line = time.perf_counter()
    for done, (info, image) in enumerate(zip(share, loader, strict=True), start=1):
        detections = predict(image.to(device, non_blocking=True) / 255)
        my_results += to_coco(info.id, detections)
        now = time.perf_counter()
        if now - last_line > 30:
            last_line = now
            log(f"{title}: {done:,} of {plural(len(share), 'image')} of this process, "
                f"{(now - begin) / done:.3f} s each")

    results = list(itertools.chain.from_iterable(distributed.gather(my_results)))
    results.sort(key=lambda result: result["image_id"])  # stable: an image's keep their order
    image_ids = [info.id for info in val.images]
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


def coco_metrics(
    coco: COCO, results: Results, image_ids: Sequence[int], iou_type: str
) -> dict[str, float]:
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
    return dict(zip(METRICS, evaluation.stats.tolist(), strict=True))


def results_of_type(results: Results, iou_type: str) -> Results:
    """Return copies of COCO results with only their boxes ("bbox") or only their masks ("segm").

    pycocotools would otherwise take the area of a mask from its box, which moves detections
    between small, medium and large.
    """
    unwanted = {"bbox": "segmentation", "segm": "bbox"}[iou_type]
    return [{key: value for key, value in result.items() if key != unwanted} for result in results]


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

    Those are the ones of score >= MIN_SCORE. This needs no labels. All processes call it.
    """
    metrics = {}
    image_ids = [info.id for info in val.images]
    for iou_type in val.iou_types:
        confident = [result for result in teacher_results
                     if result["score"] >= MIN_SCORE and has_area(result, iou_type)]
        with contextlib.redirect_stdout(io.StringIO()):
            ground_truth = load_results(val.coco, results_of_type(confident, iou_type))
        metrics[iou_type] = coco_metrics(ground_truth, student_results, image_ids, iou_type)
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

    payload_bytes is the mean over the images; head_seconds and tail_seconds are medians.
    """
    head, tail = models.split(student, bits)
    rows = []  # of each image: bytes, seconds of the head, seconds of the tail

    def predict(image: Tensor) -> dict[str, Tensor]:
        begin = time.perf_counter()
        payload = head.compress(image)
        middle = time.perf_counter()
        detections = {name: values.cpu() for name, values in tail.detect(payload).items()}
        rows.append((len(payload), middle - begin, time.perf_counter() - middle))
        return detections

    metrics, _ = evaluate(predict, val, device, workers, f"student, {plural(bits, 'bit')}")
    all_rows = itertools.chain.from_iterable(distributed.gather(rows))
    payload_bytes, head_seconds, tail_seconds = zip(*all_rows)
    return {
        "bits": bits,
        "metrics": metrics,
        "payload_bytes": float(np.mean(payload_bytes)),
        "head_seconds": float(np.median(head_seconds)),
        "tail_seconds": float(np.median(tail_seconds)),
    }


def measure_jpeg(
    teacher: nn.Module, quality: int, is_resized: bool, val: ValSet, device: torch.device,
    workers: int
) -> dict[str, Any]:
    """Evaluate the teacher on recompressed images: the alternative to a split student.

    quality: Pillow's, 1 to 100.
    is_resized: whether they are first resized as the teacher does it, which a phone could do.
    Returns metrics, and the mean bytes of the recompressed files.
    """
    sizes = []

    def predict(image: Tensor) -> dict[str, Tensor]:
        picture = to_pil_image((image * 255).round().to(torch.uint8).cpu())
        full_size = (picture.height, picture.width)
        if is_resized:
            picture = shrink(picture, teacher.transform)
        file = io.BytesIO()
        # With Huffman tables of its own; the standard ones make small files up to twice as large.
        picture.save(file, "JPEG", quality=quality, optimize=True)
        sizes.append(len(file.getvalue()))
        decoded = pil_to_tensor(Image.open(file)).to(image.device) / 255
        return enlarge(teacher([decoded])[0], decoded.shape[1:], full_size)

    title = f"teacher, {'resized ' * is_resized}JPEG {quality}"
    metrics, _ = evaluate(predict, val, device, workers, title)
    all_sizes = list(itertools.chain.from_iterable(distributed.gather(sizes)))
    return {"quality": quality, "is_resized": is_resized, "metrics": metrics,
            "payload_bytes": float(np.mean(all_sizes))}


def shrink(picture: Image.Image, transform: nn.Module) -> Image.Image:
    """Resize a picture to the size at which a detector's transform sees it, if that is smaller."""
    short_side, long_side = sorted(picture.size)
    scale = min(transform.min_size[-1] / short_side, transform.max_size / long_side)
    if scale >= 1:
        return picture
    width, height = (max(1, round(scale * side)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BILINEAR)


def enlarge(
    detections: dict[str, Tensor], size: Sequence[int], full_size: tuple[int, int]
) -> dict[str, Tensor]:
    """Return detections in an image of this size, (height, width), as those in the full image."""
    if tuple(size) == full_size:
        return detections
    (height, width), (full_height, full_width) = size, full_size
    scales = [full_width / width, full_height / height] * 2
    detections["boxes"] = detections["boxes"] * detections["boxes"].new_tensor(scales)
    if "masks" in detections:
        detections["masks"] = F.interpolate(detections["masks"], full_size, mode="bilinear")
    return detections


def mean_file_bytes(val: ValSet) -> float:
    """Return the mean size of the images' files."""
    return float(np.mean([os.path.getsize(val.folder / info.file_name) for info in val.images]))


# ---- tables and pictures -------------------------------------------------------------------------

# AP of torchvision's COCO_V1 weights, and of the published students (arXiv 2011.12913).
PUBLISHED_AP = {
    "fasterrcnn": {"teacher": {"bbox": 0.370}, "student": {"bbox": 0.359}},
    "maskrcnn": {"teacher": {"bbox": 0.379, "segm": 0.346},
                 "student": {"bbox": 0.369, "segm": 0.336}},
}
LAYER1_PARAMETERS = 577_158  # of these students
COCO_CLASSES = 91            # with the background
COCO_VAL_IMAGES = 5000       # in val2017, to which these figures belong


def published_ap(
    student: nn.Module, config: dict[str, Any], val: ValSet
) -> dict[str, dict[str, float]]:
    """Return the published AP to set beside a student's metrics, or {} if it is another student.

    config: what load_student returned with the student.
    """
    parameters = sum(p.numel() for p in student.backbone.body.layer1.parameters())
    classes = student.roi_heads.box_predictor.cls_score.out_features
    found = (parameters, classes, len(val.images))
    if config["is_recipe"] and found == (LAYER1_PARAMETERS, COCO_CLASSES, COCO_VAL_IMAGES):
        return dict(PUBLISHED_AP[config["arch"]])
    return {}


def metrics_table(rows: dict[str, Metrics], published: dict[str, dict[str, float]]) -> str:
    """Format metrics as a table; a row whose name is in `published` ends with the published AP."""
    header = f"{'':15}" + "".join(f"{name:>8}" for name in METRICS)
    if published:
        header += "   AP published"
    lines = [header]
    for name, metrics in rows.items():
        for iou_type, values in metrics.items():
            line = f"{name + ' ' + iou_type:15}"
            line += "".join(f"{values[metric]:8.4f}" for metric in METRICS)
            if name in published:
                line += f"   {published[name][iou_type]:.3f}"
            lines.append(line)
    return "\n".join(lines)


def rate_table(rows: Sequence[dict[str, Any]], file_bytes: float) -> str:
    """Format what measure_split and measure_jpeg return.

    file_bytes: the mean size of the images' files, of which the bytes sent are a share.
    """
    iou_types = rows[0]["metrics"]
    header = f"{'sent':27}" + "".join(f"  AP {iou_type}" for iou_type in iou_types)
    lines = [header + "   bytes   share  head s  tail s"]
    for row in rows:
        if "bits" in row:
            name = f"student, {plural(row['bits'], 'bit')}"
            seconds = f"{row['head_seconds']:8.4f}{row['tail_seconds']:8.4f}"
        else:
            name = f"teacher, {'resized ' * row['is_resized']}JPEG {row['quality']}"
            seconds = ""
        line = f"{name:27}"
        for metrics in row["metrics"].values():
            line += f"{metrics['AP']:9.4f}"
        line += f"{row['payload_bytes']:8.0f}{row['payload_bytes'] / file_bytes:8.1%}{seconds}"
        lines.append(line)
    return "\n".join(lines)


def draw_pictures(
    val: ValSet, student_results: Results, teacher_results: Results, folder: Path, limit: int = 20
) -> None:
    """Write a picture of each of the first images: annotations, teacher, student side by side."""
    columns = {"teacher": group_by_image(teacher_results),
               "student": group_by_image(student_results)}
    if val.coco.dataset["annotations"]:
        columns = {"annotations": group_by_image(val.coco.dataset["annotations"])} | columns
    names = {c["id"]: str(c.get("name", c["id"])) for c in val.coco.dataset["categories"]}
    for info in val.images[:limit]:
        image = data.read_image(val.folder / info.file_name)
        panels = [draw_panel(image, results[info.id], names, title, val)
                  for title, results in columns.items()]
        picture = Image.new("RGB", (sum(panel.width for panel in panels), panels[0].height))
        left = 0
        for panel in panels:
            picture.paste(panel, (left, 0))
            left += panel.width
        # One picture for each image, also where two have one stem, and in their subfolders.
        name = info.file_name if info.file_name.endswith(".jpg") else f"{info.file_name}.jpg"
        path = folder / name
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path, quality=90)


def group_by_image(results: Iterable[dict[str, Any]]) -> dict[int, Results]:
    """Return the annotations of each image, or the results of MIN_SCORE and more, by its id."""
    groups = defaultdict(list)
    for result in results:
        if result.get("score", 1) >= MIN_SCORE:
            groups[result["image_id"]].append(result)
    return groups


def draw_panel(
    image: Tensor, results: Results, names: dict[int, str], title: str, val: ValSet
) -> Image.Image:
    """Draw boxes, masks, names and scores onto an image (3, h, w), with a title.

    torchvision's draw_bounding_boxes writes too small, and on no ground of its own.
    """
    # A category has the same colour in every picture. The golden angle keeps neighbours apart.
    colours = [ImageColor.getrgb(f"hsl({r['category_id'] * 137.5 % 360:.0f}, 85%, 38%)")
               for r in results]
    if "segm" in val.iou_types and results:
        masks = np.stack([coco_mask.decode(val.coco.annToRLE(result)) for result in results])
        image = draw_segmentation_masks(image, torch.from_numpy(masks).bool(), 0.4, colours)
    # Small images are enlarged, or the text would cover them.
    zoom = max(1, round(600 / max(image.shape[1:])))
    panel = to_pil_image(image)
    panel = panel.resize((zoom * panel.width, zoom * panel.height))
    draw = ImageDraw.Draw(panel)
    draw.font = ImageFont.load_default(size=16)
    for result, colour in zip(results, colours, strict=True):
        x, y, width, height = (zoom * side for side in result["bbox"])
        draw.rectangle((x, y, x + width, y + height), outline=colour, width=3)
        text = names.get(result["category_id"], "?")
        if "score" in result:
            text += f" {result['score']:.2f}"
        draw.text((x + 4, max(y - 20, 0)), text, "white", stroke_width=3, stroke_fill=colour)
    draw.text((6, panel.height - 24), title, "white", stroke_width=3, stroke_fill="black")
    return panel


# ---- the command ---------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="COCO metrics of a GHND student.", usage="%(prog)s --ckpt FILE [flags]")
    parser.add_argument(
        "--ckpt", type=Path, metavar="FILE", required=True,
        help="the student's checkpoint, ours or torchdistill's")
    parser.add_argument(
        "--teacher", action="store_true",
        help="evaluate the teacher, and agreement with it, too; --teacher-ckpt, --jpeg and "
             "--pictures imply this")
    parser.add_argument(
        "--bits", type=int, nargs="+", choices=sorted(models.DTYPES), metavar="N", default=[],
        help="send the images through head and tail, too, with 1 to 8, 16 or 32 bits a value")
    parser.add_argument(
        "--jpeg", type=int, nargs="+", choices=range(1, 101), metavar="Q", default=[],
        help="evaluate the teacher on images recompressed as JPEG of these qualities, too: as they "
             "are, and first resized as the teacher does it")
    parser.add_argument(
        "--save-detections", type=Path, metavar="FILE",
        help="write the student's results, in COCO's format, to this .json file")
    parser.add_argument(
        "--pictures", type=Path, metavar="DIR",
        help="draw what is annotated, and what teacher and student find, in the first 20 images")
    parser.add_argument(
        "--min-size", type=distributed.positive, metavar="PX",
        help="images are resized to this shorter side (default: as the student was trained) ...")
    parser.add_argument(
        "--max-size", type=distributed.positive, metavar="PX",
        help="... or, if that is less, to this longer side")
    distributed.add_common_flags(parser)
    return parser.parse_args()


def check_outputs(args: argparse.Namespace) -> None:
    """Raise InputError if an output cannot be written, or would replace the images."""
    if args.save_detections:
        with writing(args.save_detections):
            args.save_detections.parent.mkdir(parents=True, exist_ok=True)
            args.save_detections.open("a").close()
    if args.pictures:
        for split in ("train2017", "val2017"):
            if args.pictures.resolve().is_relative_to((args.data_dir / split).resolve()):
                raise InputError(f"--pictures {args.pictures} is where the images are; give "
                                 "another folder")
        with writing(args.pictures):
            args.pictures.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=args.pictures).close()


def save_detections(results: Results, iou_types: Sequence[str], path: Path) -> None:
    """Write results to path and, those of masks, to the same name ending in .segm.json."""
    for iou_type in iou_types:
        file = path if iou_type == "bbox" else path.with_suffix(".segm.json")
        with writing(file):
            file.write_text(json.dumps(results_of_type(results, iou_type)))


def main(bottleneck: models.MakeBottleneck | None = None) -> None:
    """Run the command; bottleneck: as in models.make_bottleneck."""
    args = parse_args()
    device = distributed.set_up(args.device)
    distributed.on_main(check_outputs, args)
    distributed.on_main(data.split_paths, args.data_dir, "val2017")
    student, config = distributed.on_main_first(
        models.load_student, args.ckpt, args.min_size, args.max_size, bottleneck)
    log(f"{args.ckpt}: {config['arch']} at {config['min_size']}/{config['max_size']} pixels, on "
        f"{plural(distributed.world_size(), 'process', 'processes')} x {device.type}")
    # As train.py names it. When this file is the script, name_of(whole) is "__main__.whole".
    if config.get("predictor", "evaluate.whole") != "evaluate.whole":
        log(f"It was validated with {config['predictor']}, and is evaluated with evaluate.whole.")
    models.to_device(student, device)
    teacher = None
    if args.teacher or args.teacher_ckpt or args.jpeg or args.pictures:
        teacher = distributed.on_main_first(
            models.load_teacher, config["arch"], args.teacher_ckpt, config["min_size"],
            config["max_size"], args.teacher_eps)
        models.to_device(teacher, device)
        other = models.other_than_teacher(student.state_dict(), teacher.state_dict())
        if other:
            log(f"This is not the teacher that the student was trained with: {other} differs. See "
                "--teacher-ckpt and --teacher-eps.")
    val = ValSet(args.data_dir, student, args.limit_val)

    metrics = {}
    if teacher:
        metrics["teacher"], teacher_results = evaluate(
            whole(teacher), val, device, args.workers, "teacher")
    metrics["student"], results = evaluate(whole(student), val, device, args.workers, "student")
    if teacher:
        metrics["agreement"] = agreement(val, results, teacher_results)
    rates = [measure_split(student, bits, val, device, args.workers) for bits in args.bits]
    jpeg = [measure_jpeg(teacher, quality, is_resized, val, device, args.workers)
            for is_resized in (False, True) for quality in args.jpeg]

    published = published_ap(student, config, val)
    if teacher and other:
        published.pop("teacher", None)
    log(metrics_table(metrics, published))
    summary = dict(metrics)
    if rates or jpeg:
        summary["file_bytes"] = mean_file_bytes(val)
        log(rate_table(rates + jpeg, summary["file_bytes"]))
    if rates:
        head, _ = models.split(student)
        summary |= {
            "rate": rates,
            "head": {"parameters": sum(p.numel() for p in head.network.parameters()),
                     "student_parameters": sum(p.numel() for p in student.parameters())}}
    if jpeg:
        summary["jpeg"] = jpeg
    log(json.dumps(summary))

    if args.save_detections:
        distributed.on_main(save_detections, results, val.iou_types, args.save_detections)
    if args.pictures:
        distributed.on_main(draw_pictures, val, results, teacher_results, args.pictures)


if __name__ == "__main__":
    distributed.run(main)
