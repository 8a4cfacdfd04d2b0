"""COCO box and mask AP of a student checkpoint, beside its teacher's and the published figures.

    python evaluate.py --ckpt coco/ghnd/coco2017-custom_maskrcnn_..._fpn.pt --teacher --bits 8 4

Under torchrun, the processes share the images and then the categories.
"""

import argparse
import contextlib
import io
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
from distributed import log, writing

Predict = Callable[[Tensor], dict[str, Tensor]]  # from (3, h, w) in [0, 1] to torchvision's dict
Results = list[dict[str, Any]]                   # in COCO's format
Metrics = dict[str, dict[str, float]]            # "bbox" and, of a Mask R-CNN, "segm": METRICS

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
MIN_SCORE = 0.5  # lowest of drawn detections, and of teacher detections used as ground truth

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
        self.classes = heads.box_predictor.cls_score.out_features
        file, self.folder = distributed.on_main(data.split_paths, data_dir, "val2017")
        content = distributed.on_main(data.read_annotations, file, self.classes, heads.has_mask())
        self.images = data.image_infos(content)[:limit]
        max_size = detector.transform.max_size
        distributed.on_main(data.check_images, self.images, self.folder, max_size)
        self.coco = make_coco(content)


@torch.inference_mode()
def evaluate(
    predict: Predict, val: ValSet, device: torch.device, workers: int = 0, title: str = "evaluation"
) -> tuple[Metrics, Results]:
    """Return, on every process, the metrics of a detector over a ValSet and all its results.

    predict: from an image (3, h, w), float in [0, 1] on the device, to torchvision's detections:
        `whole` of a detector, a split student, or anything else that detects.
    workers: processes that load images. title: how lines of progress begin.
    """
    share = val.images[distributed.rank()::distributed.world_size()]
    loader = data.val_loader(share, val.folder, workers, device)
    log(f"{title}: {len(val.images):,} images")
    my_results = []
    begin = last_line = time.perf_counter()
    for done, (info, image) in enumerate(zip(share, loader, strict=True), start=1):
        detections = predict(image.to(device, non_blocking=True) / 255)
        my_results += to_coco(info.id, detections)
        now = time.perf_counter()
        if now - last_line > 30:  # seconds
            last_line = now
            log(f"{title}: {done:,} of this process's {len(share):,} images, "
                f"{(now - begin) / done:.3f} s each")

    results = sum(distributed.gather(my_results), [])
    results.sort(key=lambda result: result["image_id"])  # stable: an image's keep their order
    image_ids = [info.id for info in val.images]
    metrics = {iou_type: coco_metrics(val.coco, results, image_ids, iou_type)
               for iou_type in val.iou_types}
    return metrics, results


def compare(
    predict: Predict, teacher: nn.Module, val: ValSet, device: torch.device, workers: int
) -> tuple[dict[str, Metrics], Results, Results]:
    """Evaluate a student, by its predict, beside its teacher; log and return the metrics.

    They are of "teacher", "student" and "agreement"; then come the student's and teacher's results.
    """
    metrics = {}
    metrics["teacher"], teacher_results = evaluate(whole(teacher), val, device, workers, "teacher")
    log(metrics_table(metrics))
    metrics["student"], results = evaluate(predict, val, device, workers, "student")
    metrics["agreement"] = agreement(val, results, teacher_results)
    log(metrics_table(metrics))
    return metrics, results, teacher_results


def whole(detector: nn.Module) -> Predict:
    """Return a torchvision detector as a function of one image."""
    return lambda image: detector([image])[0]


def to_coco(image_id: int, detections: dict[str, Tensor]) -> Results:
    """Turn a torchvision detector's output for one image into COCO results.

    detections: boxes (N, 4) x0 y0 x1 y1, labels (N,), scores (N,)[, masks (N, 1, h, w) in [0, 1]].
    Returns N dicts: image_id, category_id, bbox (x y w h), score[, segmentation as RLE].
    """
    labels = detections["labels"].tolist()  # the detectors' classes are COCO's category ids
    boxes = box_convert(detections["boxes"], "xyxy", "xywh").tolist()
    scores = detections["scores"].tolist()
    results = [{"image_id": image_id, "category_id": label, "bbox": box, "score": score}
               for label, box, score in zip(labels, boxes, scores, strict=True)]
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

    All processes of set_up call this alike. Each matches its slice of the categories; the
    slices' precision and recall are then concatenated, and summarized on every process.
    """
    categories = np.array_split(sorted(coco.getCatIds()), distributed.world_size())
    my_categories = categories[distributed.rank()].tolist()
    my_results = [result for result in results if result["category_id"] in my_categories]
    evaluation = COCOeval(coco, load_results(coco, my_results, iou_type), iou_type)
    evaluation.params.imgIds = list(image_ids)
    evaluation.params.catIds = my_categories
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        evaluation.evaluate()
        evaluation.accumulate()
        for name, category_axis in (("precision", 2), ("recall", 1)):
            slices = distributed.gather(evaluation.eval[name])
            evaluation.eval[name] = np.concatenate(slices, axis=category_axis)
        evaluation.summarize()
    return dict(zip(METRICS, evaluation.stats.tolist(), strict=True))


def make_coco(content: dict[str, Any]) -> COCO:
    """Return pycocotools' COCO of the content of an annotation file."""
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def load_results(coco: COCO, results: Results, iou_type: str) -> COCO:
    """Return coco.loadRes of results_of_type, for an empty list too; it adds their areas."""
    if not results:
        return make_coco(coco.dataset | {"annotations": []})
    with contextlib.redirect_stdout(io.StringIO()):
        return coco.loadRes(results_of_type(results, iou_type))


def results_of_type(results: Results, iou_type: str) -> Results:
    """Return copies of COCO results with only their boxes ("bbox") or only their masks ("segm").

    Otherwise pycocotools takes a mask's area from its box, which moves APs, APm and APl.
    """
    unwanted = {"bbox": "segmentation", "segm": "bbox"}[iou_type]
    return [{key: value for key, value in result.items() if key != unwanted} for result in results]


def agreement(val: ValSet, student_results: Results, teacher_results: Results) -> Metrics:
    """Return the student's metrics with the teacher's detections >= MIN_SCORE as ground truth."""
    metrics = {}
    image_ids = [info.id for info in val.images]
    confident = [result for result in teacher_results if result["score"] >= MIN_SCORE]
    for iou_type in val.iou_types:
        truth = load_results(val.coco, confident, iou_type).dataset
        # Drop empty masks, which no detection can match.
        truth["annotations"] = [a for a in truth["annotations"] if a["area"] > 0]
        metrics[iou_type] = coco_metrics(make_coco(truth), student_results, image_ids, iou_type)
    return metrics


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

    sent = f"student, {bits}-bit"
    metrics, _ = evaluate(predict, val, device, workers, sent)
    rows = np.array(sum(distributed.gather(rows), []))  # (images, 3)
    return {"sent": sent, "bits": bits, "metrics": metrics, "payload_bytes": rows[:, 0].mean(),
            "head_seconds": np.median(rows[:, 1]), "tail_seconds": np.median(rows[:, 2])}


def measure_jpeg(
    teacher: nn.Module, quality: int, val: ValSet, device: torch.device, workers: int
) -> dict[str, Any]:
    """Evaluate the teacher on recompressed photos: the alternative to a split student.

    quality: Pillow's, 1 to 100. Returns metrics, and the mean bytes of the photos.
    """
    sizes = []

    def predict(image: Tensor) -> dict[str, Tensor]:
        jpeg = recompress(image, quality, teacher.transform)
        sizes.append(len(jpeg))
        photo = pil_to_tensor(Image.open(io.BytesIO(jpeg))).to(device) / 255
        images, _ = teacher.transform([photo])
        maps = teacher.backbone.body(images.tensors)
        # The photo can be smaller than the image, to which the detections are scaled back.
        return models.detect_from_maps(teacher, maps, images.image_sizes[0], image.shape[1:])

    sent = f"teacher, JPEG {quality}"
    metrics, _ = evaluate(predict, val, device, workers, sent)
    return {"sent": sent, "quality": quality, "metrics": metrics,
            "payload_bytes": np.mean(sum(distributed.gather(sizes), []))}


def recompress(image: Tensor, quality: int, transform: nn.Module) -> bytes:
    """Return an image (3, h, w) in [0, 1] as a JPEG file, no larger than the transform makes it."""
    photo = to_pil_image((image * 255).round().to(torch.uint8).cpu())
    scale = min(1, transform.min_size[-1] / min(photo.size), transform.max_size / max(photo.size))
    size = [max(1, round(scale * side)) for side in photo.size]
    photo = photo.resize(size, Image.Resampling.BILINEAR)
    file = io.BytesIO()
    # With Huffman tables of its own; the standard ones make small files up to twice as large.
    photo.save(file, "JPEG", quality=quality, optimize=True)
    return file.getvalue()


# ---- tables and pictures -------------------------------------------------------------------------

# AP of torchvision's COCO_V1 weights, and of the students in arXiv 2011.12913.
PUBLISHED_AP = {
    "fasterrcnn": "published AP: teacher bbox 0.370, student bbox 0.359",
    "maskrcnn": "published AP: teacher bbox 0.379, segm 0.346, student bbox 0.369, segm 0.336",
}


def metrics_table(metrics: dict[str, Metrics]) -> str:
    """Format the metrics of "teacher", "student" and so on, a row each."""
    lines = [f"{'':15}" + "".join(f"{name:>8}" for name in METRICS)]
    for name, by_type in metrics.items():
        for iou_type, values in by_type.items():
            numbers = "".join(f"{values[metric]:8.4f}" for metric in METRICS)
            lines.append(f"{name + ' ' + iou_type:15}{numbers}")
    return "\n".join(lines)


def rate_line(row: dict[str, Any], file_bytes: float) -> str:
    """Describe what measure_split or measure_jpeg returns; file_bytes: mean of image files."""
    line = f"{row['sent']:18}"
    for iou_type, metrics in row["metrics"].items():
        line += f" AP {iou_type} {metrics['AP']:.4f}"
    line += f" {row['payload_bytes']:7.0f} bytes, {row['payload_bytes'] / file_bytes:.1%}"
    if "head_seconds" in row:
        line += f", head {row['head_seconds']:.4f} s, tail {row['tail_seconds']:.4f} s"
    return line


def draw_pictures(
    val: ValSet, student_results: Results, teacher_results: Results, folder: Path, limit: int = 20
) -> None:
    """Write folder/compared_ID.jpg of the first images: annotations, teacher, student."""
    columns = {"annotations": val.coco.dataset["annotations"], "teacher": teacher_results,
               "student": student_results}
    for info in val.images[:limit]:
        image = data.read_image(val.folder / info.file_name)
        panels = []
        for title, results in columns.items():
            shown = [result for result in results if result["image_id"] == info.id
                     and result.get("score", 1) >= MIN_SCORE]
            panels.append(pil_to_tensor(draw_panel(image, shown, title, val)))
        path = folder / f"compared_{info.id}.jpg"
        with writing(path):
            to_pil_image(torch.cat(panels, dim=2)).save(path, quality=90)


def draw_panel(image: Tensor, results: Results, title: str, val: ValSet) -> Image.Image:
    """Draw boxes, masks, names and scores onto an image (3, h, w), with a title."""
    # A category has the same colour in every picture. The golden angle keeps neighbours apart.
    colours = [ImageColor.getrgb(f"hsl({r['category_id'] * 137.5 % 360:.0f}, 85%, 38%)")
               for r in results]
    if "segm" in val.iou_types and results:
        masks = np.stack([val.coco.annToMask(result) for result in results])
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
        name = str(val.coco.cats.get(result["category_id"], {}).get("name", ""))
        # Pillow's own font has the letters of Latin-1, and empty boxes for most others.
        is_drawable = name and max(map(ord, name)) < 256
        text = name if is_drawable else f"category {result['category_id']}"
        if "score" in result:
            text += f" {result['score']:.2f}"
        draw.text((x + 4, max(y - 20, 0)), text, "white", stroke_width=3, stroke_fill=colour)
    draw.text((6, panel.height - 24), title, "white", stroke_width=3, stroke_fill="black")
    return panel


# ---- the command ---------------------------------------------------------------------------------

def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="COCO metrics of a GHND student.", usage="%(prog)s --ckpt FILE [flags]")
    add = parser.add_argument
    add("--ckpt", type=distributed.user_path, metavar="FILE", required=True,
        help="the student's checkpoint, ours or torchdistill's")
    add("--teacher", action="store_true",
        help="evaluate the teacher, and agreement with it, too; --teacher-ckpt, --jpeg and "
             "--pictures imply this")
    add("--bits", type=int, nargs="+", choices=sorted(models.DTYPES), metavar="N", default=[],
        help="send the images through head and tail, too, with 1 to 8, 16 or 32 bits a value")
    add("--jpeg", type=int, nargs="+", choices=range(1, 101), metavar="Q", default=[],
        help="evaluate the teacher on photos resized and recompressed with these qualities, too")
    add("--save-detections", type=distributed.user_path, metavar="FILE",
        help="write the student's results, in COCO's format, to this .json file")
    add("--pictures", type=distributed.user_path, metavar="DIR",
        help="draw what is annotated, and what teacher and student find, in the first 20 images")
    add("--min-size", type=distributed.positive, metavar="PX",
        help="pixels to which an image's shorter side is resized (default: as in training)")
    add("--max-size", type=distributed.positive, metavar="PX",
        help="pixels that the longer side has at most (default: as in training)")
    distributed.add_common_flags(parser)
    return parser.parse_args(argv)


def check_outputs(args: argparse.Namespace) -> None:
    """Raise InputError if an output cannot be written, before hours of work for it."""
    for file in (args.pictures and args.pictures / "trial", args.save_detections):
        if file:
            with writing(file):
                file.parent.mkdir(parents=True, exist_ok=True)
                is_new = not file.exists()
                file.open("a").close()
                if is_new:
                    file.unlink()


def save_detections(results: Results, iou_types: Sequence[str], path: Path) -> None:
    """Write boxes to NAME.json, the path, and masks to NAME.segm.json."""
    for iou_type in iou_types:
        file = path if iou_type == "bbox" else path.with_suffix(".segm.json")
        with writing(file):
            file.write_text(json.dumps(results_of_type(results, iou_type)))


def main(
    argv: Sequence[str] | None = None, *, bottleneck: models.MakeBottleneck | None = None,
    predictor: Callable[[nn.Module], Predict] = whole
) -> None:
    """Run the command. Each result is printed or written as soon as it is ready.

    argv: its flags; None are those that the script was started with.
    bottleneck: as in models.load_student. predictor: as in train.main.
    """
    args = parse_args(argv)
    device = distributed.set_up(args.device)
    distributed.on_main(check_outputs, args)
    student, config = distributed.on_main_first(
        models.load_student, args.ckpt, args.min_size, args.max_size, bottleneck)
    arch, min_size, max_size = config["arch"], config["min_size"], config["max_size"]
    log(f"{args.ckpt}: {arch} at {min_size}/{max_size} pixels, on {distributed.world_size()} x "
        f"{device.type}")
    models.to_device(student, device)
    val = ValSet(args.data_dir, student, args.limit_val)
    distributed.on_main(data.check_workers, val.images, 1, args.workers, 2)  # 2: this and the last

    if (args.teacher or args.teacher_ckpt or args.teacher_eps is not None or args.jpeg
            or args.pictures):
        teacher = distributed.on_main_first(
            models.load_teacher, arch, args.teacher_ckpt, min_size, max_size, args.teacher_eps)
        models.to_device(teacher, device)
        difference = models.first_difference(student.state_dict(), teacher.state_dict())
        if difference:
            log(f"This is not the teacher that the student was trained with: {difference} differs. "
                "See --teacher-ckpt and --teacher-eps.")
        metrics, results, teacher_results = compare(
            predictor(student), teacher, val, device, args.workers)
    else:
        student_metrics, results = evaluate(
            predictor(student), val, device, args.workers, "student")
        metrics = {"student": student_metrics}
        log(metrics_table(metrics))
    if (len(val.images), val.classes) == (5000, 91):  # COCO's val2017
        log(PUBLISHED_AP[arch])
    if args.save_detections:
        distributed.on_main(save_detections, results, val.iou_types, args.save_detections)
    if args.pictures:
        distributed.on_main(draw_pictures, val, results, teacher_results, args.pictures)

    file_bytes = np.mean([os.path.getsize(val.folder / info.file_name) for info in val.images])
    rates, jpeg = [], []
    for bits in args.bits:
        rates.append(measure_split(student, bits, val, device, args.workers))
        log(rate_line(rates[-1], file_bytes))
    for quality in args.jpeg:
        jpeg.append(measure_jpeg(teacher, quality, val, device, args.workers))
        log(rate_line(jpeg[-1], file_bytes))
    head = models.Head(student)
    log(json.dumps(metrics | {
        "file_bytes": file_bytes,
        "rate": rates,
        "jpeg": jpeg,
        "head": {"parameters": sum(p.numel() for p in head.network.parameters()),
                 "student_parameters": sum(p.numel() for p in student.parameters())},
    }))


if __name__ == "__main__":
    distributed.run(main)
