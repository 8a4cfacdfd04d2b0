"""COCO box and mask mAP of a student checkpoint, beside its teacher's and the published figures.

    python evaluate.py --ckpt coco/ghnd/coco2017-custom_maskrcnn_..._fpn.pt --teacher
"""

import contextlib
import io
import itertools
import json
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torchvision.ops import box_convert

import data
import distributed
import models
from distributed import log

FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
REPORTED = {  # AP of torchvision's COCO_V1 weights, and of the students (arXiv 2011.12913)
    "fasterrcnn": {"teacher": {"bbox": 0.370}, "student": {"bbox": 0.359}},
    "maskrcnn": {"teacher": {"bbox": 0.379, "segm": 0.346},
                 "student": {"bbox": 0.369, "segm": 0.336}},
}
PROGRESS_EVERY = 15  # seconds

Figures = dict[str, list[float]]  # "bbox" and, for Mask R-CNN, "segm": the 12 FIGURES


class ValSet:
    """The first `limit` images of val2017 and all annotations.

    Raises FileNotFoundError or ValueError, naming what is missing or broken.
    """

    def __init__(self, data_dir: Path, limit: int | None = None) -> None:
        self.index, folder = data.load_split(data_dir, "val", limit)
        self.images = data.CocoImages(self.index, folder)
        self.coco = COCO()
        self.coco.dataset = data.read_val_annotations(
            data_dir / "annotations" / "instances_val2017.json")
        with contextlib.redirect_stdout(io.StringIO()):
            self.coco.createIndex()


def encode_masks(masks: np.ndarray, boxes: np.ndarray) -> list[dict[str, Any]]:
    """Cut masks (N, h, w) at 0.5 and encode them to N RLEs, equal to pycocotools.mask.encode's.

    Only the surroundings of each box (N, 4), x0 y0 x1 y1, are looked at: torchvision pastes a mask
    into its box, enlarged by 1/14 and rounded, and leaves zeros elsewhere.
    """
    n, h, w = masks.shape
    margin = 0.1 * (boxes[:, 2:] - boxes[:, :2]) + 2
    corners = np.concatenate([boxes[:, :2] - margin, boxes[:, 2:] + margin], axis=1).astype(int)
    corners = corners.clip(0, [w, h, w, h]).tolist()
    runs = []
    for mask, (x0, y0, x1, y1) in zip(masks, corners, strict=True):
        column = np.zeros((x1 - x0, y1 - y0 + 2), dtype=bool)  # COCO's RLE runs down the columns
        column[:, 1:-1] = mask[y0:y1, x0:x1].T > 0.5
        x, y = np.nonzero(column[:, 1:] != column[:, :-1])
        edges = (x0 + x) * h + y0 + y  # where 0 turns to 1 or back in the flattened mask
        goes_on = np.flatnonzero(np.diff(edges) == 0)  # from a column's foot to the next one's head
        edges = np.delete(edges, [*goes_on, *goes_on + 1])
        counts = np.diff(edges, prepend=0, append=h * w)
        runs.append({"size": [h, w], "counts": counts[: len(counts) - (counts[-1] == 0)]})
    rles = coco_mask.frPyObjects(runs, h, w) if n else []
    return [{**rle, "counts": rle["counts"].decode()} for rle in rles]


def to_coco(image_id: int, output: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Turn one image's torchvision detections into COCO results, in the detector's order.

    output: boxes (N, 4) x0 y0 x1 y1 in pixels of the original image, scores (N,), labels (N,),
    which are COCO category ids, and for Mask R-CNN masks (N, 1, h, w) in [0, 1], cut at 0.5.
    Returns N dicts: image_id, category_id, bbox (x y w h), score, and segmentation (RLE).
    """
    columns = {"category_id": output["labels"].tolist(),
               "bbox": box_convert(output["boxes"], "xyxy", "xywh").tolist(),
               "score": output["scores"].tolist()}
    if "masks" in output:
        masks = output["masks"][:, 0]
        if masks.device.type != "cpu":
            masks = (masks > 0.5).cpu()  # so that bytes travel, not floats
        columns["segmentation"] = encode_masks(masks.numpy(), output["boxes"].cpu().numpy())
    return [{"image_id": image_id, **dict(zip(columns, row))}
            for row in zip(*columns.values(), strict=True)]


@torch.inference_mode()
def detect(
    detector: nn.Module, val: ValSet, device: torch.device, workers: int, title: str
) -> list[dict[str, Any]]:
    """Run the detector over all images, each on one process; a thread encodes while it runs.

    Returns all COCO results, on every process, in the order of the index.
    """
    models.place(detector, device).eval()
    loader = data.val_loader(val.images, workers, pin=device.type == "cuda")
    image_ids = val.index.ids[distributed.rank()::distributed.world_size()].tolist()
    results: list[list[dict[str, Any]]] = []
    begin = reported = time.monotonic()
    with ThreadPoolExecutor(1) as encoder:
        encoding = None
        for image_id, image in zip(image_ids, loader, strict=True):
            output = detector([image.to(device, non_blocking=True) / 255])[0]
            if encoding is not None:  # of the image before: one at a time bounds the memory
                results.append(encoding.result())
            encoding = encoder.submit(to_coco, image_id, output)
            if (now := time.monotonic()) - reported > PROGRESS_EVERY:
                reported, speed = now, (len(results) + 1) / (now - begin)
                log(f"{title}: image {len(results) + 1}/{len(image_ids)} of this process, "
                    f"{speed:.2f} img/s, {(len(image_ids) - len(results) - 1) / speed:.0f} s left")
        if encoding is not None:
            results.append(encoding.result())
    by_position = itertools.zip_longest(*distributed.gather(results), fillvalue=[])
    return list(itertools.chain.from_iterable(itertools.chain.from_iterable(by_position)))


def of_kind(results: Iterable[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Copy COCO results with their boxes or their masks alone.

    Given both, pycocotools would take the areas of masks from their boxes and shift AP small,
    medium and large.
    """
    drop = {"bbox": "segmentation", "segm": "bbox"}[kind]
    return [{key: value for key, value in r.items() if key != drop} for r in results]


def coco_figures(
    coco: COCO, results: Iterable[dict[str, Any]], image_ids: Sequence[int], kind: str
) -> list[float]:
    """Return COCOeval's 12 figures for "bbox" or "segm" over these images, as pycocotools has them.

    To be called on all processes with the same arguments: each matches its share of the categories,
    which COCOeval treats one by one. A figure is -1 where there is nothing to find.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    categories = sorted(coco.getCatIds())
    mine = set(categories[rank::world_size])
    results = of_kind((r for r in results if r["category_id"] in mine), kind)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress and its table
        found = coco.loadRes(results) if results else COCO()  # loadRes fails on an empty list
        evaluation = COCOeval(coco, found, kind)
        evaluation.params.imgIds = list(image_ids)
        evaluation.params.catIds = categories[rank::world_size]
        evaluation.evaluate()
        evaluation.accumulate()
        for figure, axis in (("precision", 2), ("recall", 1)):
            shares = [np.moveaxis(s, axis, 0) for s in distributed.gather(evaluation.eval[figure])]
            dealt = itertools.chain.from_iterable(itertools.zip_longest(*shares))
            everyone = [category for category in dealt if category is not None]
            evaluation.eval[figure] = np.stack(everyone, axis)
        evaluation.summarize()
    return np.asarray(evaluation.stats).tolist()


def evaluate(detector: nn.Module, val: ValSet, device: torch.device, workers: int = 4,
             title: str = "evaluation", save_to: Path | None = None) -> Figures:
    """Compute COCO's figures of a detector over a ValSet, on any number of processes alike.

    Every image is seen by exactly one process, every category matched by one.
    save_to: also write the results, in COCO's format: boxes to this file and, for Mask R-CNN,
    masks to the same name ending in .segm.json. Returns the Figures on every process.
    """
    results = detect(detector, val, device, workers, title)
    kinds = ["bbox", "segm"] if detector.roi_heads.has_mask() else ["bbox"]
    if save_to is not None and distributed.is_main():
        for kind in kinds:
            path = save_to if kind == "bbox" else save_to.with_suffix(".segm.json")
            with distributed.replacing(path) as file:
                file.write(json.dumps(of_kind(results, kind)).encode())
            log(f"{len(results)} {kind} results written to {path}")
    return {kind: coco_figures(val.coco, results, val.index.ids.tolist(), kind) for kind in kinds}


def table(figures: dict[str, Figures], arch: str) -> str:
    """Format the figures of "teacher" and "student", with the published AP in brackets."""
    lines = [f"{'':14}" + "".join(f"{name:>8}" for name in FIGURES) + "   AP published"]
    for who, kinds in figures.items():
        for kind, values in kinds.items():
            row = "".join(f"{value:8.4f}" for value in values)
            lines.append(f"{who + ' ' + kind:14}{row}   {REPORTED[arch][who][kind]:.3f}")
    return "\n".join(lines)


def add_common_flags(parser: distributed.Parser) -> None:
    """Add the flags that train.py and evaluate.py share."""
    parser.add_argument("--data-dir", type=data.path, default="~/datasets/coco2017", metavar="DIR",
                        help="train2017/, val2017/ and annotations/ as COCO has them (%(default)s)")
    parser.add_argument("--teacher-ckpt", type=data.path, metavar="FILE",
                        help="the teacher, a torchvision state dict (default: download COCO_V1)")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu", "mps"], default="auto")
    parser.add_argument("--workers", type=natural, default=min(4, os.cpu_count() or 1), metavar="N",
                        help="image-loading processes per process, 0 for none (%(default)s)")
    parser.add_argument("--limit-val", type=positive, metavar="N",
                        help="only the first N images of val2017")
    parser.add_argument("--min-size", type=positive, default=800, metavar="PX",
                        help="resize the shorter side to this (%(default)s)")
    parser.add_argument("--max-size", type=positive, default=1333, metavar="PX",
                        help="but the longer side to at most this (%(default)s)")


def natural(text: str) -> int:
    """Parse an integer from 0 up, for argparse."""
    if (value := int(text)) < 0:
        raise ValueError
    return value


def positive(text: str) -> int:
    """Parse an integer from 1 up, for argparse."""
    if (value := int(text)) < 1:
        raise ValueError
    return value


def main() -> None:
    parser = distributed.Parser(description="COCO figures of a GHND student, by pycocotools.")
    parser.add_argument("--ckpt", type=data.path, required=True, metavar="FILE",
                        help="ours or torchdistill's")
    parser.add_argument("--teacher", action="store_true", help="evaluate the teacher too")
    parser.add_argument("--save-detections", type=data.path, metavar="FILE",
                        help="write the student's results, in COCO's format, to this .json file")
    add_common_flags(parser)
    args = parser.parse_args()
    device = distributed.start(args.device)
    sizes = {"min_size": args.min_size, "max_size": args.max_size}
    student, arch = models.load_student(args.ckpt, **sizes)
    detectors = {"student": student}
    if args.teacher or args.teacher_ckpt:
        with distributed.main_first():
            teacher = models.load_teacher(arch, args.teacher_ckpt, **sizes)
        detectors = {"teacher": teacher, **detectors}
    if args.save_detections:
        args.save_detections.open("a").close()  # better to fail now than after an hour
    val = ValSet(args.data_dir, args.limit_val)
    log(f"{args.ckpt}: {arch}; {len(val.index)} images, {distributed.world_size()} x {device.type}")
    figures = {}
    for who, detector in detectors.items():
        save_to = args.save_detections if who == "student" else None
        figures[who] = evaluate(detector, val, device, args.workers, who, save_to)
    log(table(figures, arch))
    log(json.dumps(figures))


if __name__ == "__main__":
    with distributed.session():
        main()
