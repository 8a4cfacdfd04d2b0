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
KINDS = {"fasterrcnn": ("bbox",), "maskrcnn": ("bbox", "segm")}  # of results, as COCOeval has them
PUBLISHED = {  # AP of torchvision's COCO_V1 weights, and of the students (arXiv 2011.12913)
    "fasterrcnn": {"teacher": {"bbox": 0.370}, "student": {"bbox": 0.359}},
    "maskrcnn": {"teacher": {"bbox": 0.379, "segm": 0.346},
                 "student": {"bbox": 0.369, "segm": 0.336}},
}
PROGRESS_EVERY = 15  # seconds

Figures = dict[str, list[float]]  # for each kind the 12 FIGURES


class ValSet:
    """The first `limit` images of val2017 and all annotations, made ready for kinds of results.

    Raises FileNotFoundError or ValueError, naming what is missing or broken.
    """

    def __init__(self, data_dir: Path, kinds: Sequence[str], limit: int | None = None) -> None:
        self.index, self.folder = data.load_split(data_dir, "val", limit)
        self.kinds, self.coco = kinds, COCO()
        annotation_file = data_dir / "annotations" / "instances_val2017.json"
        with data.reading(annotation_file), contextlib.redirect_stdout(io.StringIO()):
            self.coco.dataset = json.loads(annotation_file.read_bytes())
            self.coco.createIndex()
            np.array(list(self.coco.anns), dtype=float)  # as COCOeval notes ids of what is found
            for kind in kinds:  # better a broken annotation is met now than after the detector
                evaluation = COCOeval(self.coco, COCO(), kind)
                evaluation.params.useCats = 0  # all categories at once
                evaluation.evaluate()


# ---- from images to COCO results -----------------------------------------------------------------
@torch.inference_mode()
def to_coco(
    image_id: int, detector: nn.Module, found: dict[str, Tensor], resized: tuple[int, int],
    original: tuple[int, int],
) -> list[dict[str, Any]]:
    """Turn what models.detect found in an image into COCO results, on the CPU, in its order.

    resized, original: (h, w) of the image as the detector saw it and as the file has it.
    Returns N dicts: image_id, category_id, bbox (x y w h in pixels of the original), score, and for
    Mask R-CNN segmentation: the RLE of the mask that torchvision pastes, cut at 0.5.
    """
    found = detector.transform.postprocess([found], [resized], [original])[0]
    columns = {"category_id": found["labels"].tolist(),  # COCO's ids themselves
               "bbox": box_convert(found["boxes"], "xyxy", "xywh").tolist(),
               "score": found["scores"].tolist()}
    if "masks" in found:  # (N, 1, h, w) in [0, 1]; pycocotools wants (h, w, N) in Fortran order
        masks = (found["masks"][:, 0] > 0.5).to(torch.uint8).mT.contiguous().numpy().T
        columns["segmentation"] = [{**rle, "counts": rle["counts"].decode()}
                                   for rle in coco_mask.encode(masks)]
    return [{"image_id": image_id, **dict(zip(columns, row))}
            for row in zip(*columns.values(), strict=True)]


@torch.inference_mode()
def run_detector(
    detector: nn.Module, val: ValSet, device: torch.device, workers: int, title: str
) -> list[dict[str, Any]]:
    """Run a detector over all images, each on one process; the device only detects, and a thread
    makes the results of an image while it sees the next.

    Returns all COCO results, on every process, in the order of the index.
    """
    models.to_device(detector, device).eval()
    loader = data.val_loader(val.index, val.folder, workers)
    image_ids = val.index.id[distributed.rank()::distributed.world_size()].tolist()
    results, pending = [], None
    begin = reported = time.monotonic()
    with ThreadPoolExecutor(1) as thread:
        for done, (image_id, image) in enumerate(zip(image_ids, loader, strict=True), start=1):
            images, _ = detector.transform([image.to(device, non_blocking=True) / 255])
            found = models.detect(detector, images, detector.backbone.body(images.tensors))
            found = {name: values.cpu() for name, values in found.items()}
            if pending is not None:  # one at a time bounds the memory
                results.append(pending.result())
            pending = thread.submit(to_coco, image_id, detector, found, images.image_sizes[0],
                                    tuple(image.shape[1:]))
            if (now := time.monotonic()) - reported > PROGRESS_EVERY:
                reported, speed = now, done / (now - begin)
                log(f"{title}: image {done}/{len(image_ids)} of this process, {speed:.2f} img/s, "
                    f"{(len(image_ids) - done) / speed:.0f} s left")
        if pending is not None:
            results.append(pending.result())
    by_position = itertools.zip_longest(*distributed.gather(results), fillvalue=[])
    return list(itertools.chain.from_iterable(itertools.chain.from_iterable(by_position)))


# ---- from results to figures ---------------------------------------------------------------------
def results_of_kind(results: Iterable[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
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
    results = results_of_kind((r for r in results if r["category_id"] in mine), kind)
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
    results = run_detector(detector, val, device, workers, title)
    for kind in val.kinds if save_to is not None and distributed.rank() == 0 else ():
        path = save_to if kind == "bbox" else save_to.with_suffix(".segm.json")
        path.write_text(json.dumps(results_of_kind(results, kind)))
        log(f"{len(results)} {kind} results written to {path}")
    return {kind: coco_figures(val.coco, results, val.index.id.tolist(), kind)
            for kind in val.kinds}


def table(figures: dict[str, Figures], arch: str) -> str:
    """Format the figures of "teacher" and "student", with the published AP in the last column."""
    lines = [f"{'':14}" + "".join(f"{name:>8}" for name in FIGURES) + "   AP published"]
    for who, kinds in figures.items():
        for kind, values in kinds.items():
            row = "".join(f"{value:8.4f}" for value in values)
            lines.append(f"{who + ' ' + kind:14}{row}   {PUBLISHED[arch][who][kind]:.3f}")
    return "\n".join(lines)


# ---- the command ---------------------------------------------------------------------------------
def positive(text: str) -> int:
    """Parse an integer from 1 up, for argparse."""
    if (value := int(text)) < 1:
        raise ValueError
    return value


def path(text: str) -> Path:
    """Parse a path, for argparse; in --flag=~/x, bash leaves the ~ as it is."""
    return Path(text).expanduser()


def add_common_flags(parser: distributed.Parser) -> None:
    """Add the flags that train.py and evaluate.py share."""
    parser.add_argument("--data-dir", type=path, default="~/datasets/coco2017", metavar="DIR",
                        help="folder with COCO's train2017/, val2017/, annotations/ (%(default)s)")
    parser.add_argument("--teacher-ckpt", type=path, metavar="FILE",
                        help="the teacher, a torchvision state dict (default: download COCO_V1)")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto",
                        help="where to run; auto is cuda if there is a GPU (%(default)s)")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), metavar="N",
                        help="image-loading processes per process, 0 for none (%(default)s)")
    parser.add_argument("--limit-val", type=positive, metavar="N",
                        help="use only the first N images of val2017")
    parser.add_argument("--min-size", type=positive, default=800, metavar="PX",
                        help="resize the shorter side of images to this (%(default)s)")
    parser.add_argument("--max-size", type=positive, default=1333, metavar="PX",
                        help="resize the longer side of images to at most this (%(default)s)")


def main() -> None:
    parser = distributed.Parser(description="COCO figures of a GHND student, by pycocotools.")
    parser.add_argument("--ckpt", type=path, required=True, metavar="FILE",
                        help="the student's checkpoint, ours or torchdistill's")
    parser.add_argument("--teacher", action="store_true", help="evaluate the teacher too")
    parser.add_argument("--save-detections", type=path, metavar="FILE",
                        help="write the student's results, in COCO's format, to this .json file")
    add_common_flags(parser)
    args = parser.parse_args()
    device = distributed.set_up(args.device)
    sizes = args.min_size, args.max_size
    student, arch = distributed.from_main(models.load_student, args.ckpt, *sizes)
    detectors = {"student": student}
    if args.teacher or args.teacher_ckpt:
        teacher = distributed.from_main(models.load_teacher, arch, args.teacher_ckpt, *sizes)
        detectors = {"teacher": teacher, **detectors}
    if args.save_detections:
        args.save_detections.open("a").close()  # better to fail now than after an hour
    val = ValSet(args.data_dir, KINDS[arch], args.limit_val)
    log(f"{args.ckpt}: {arch}; {len(val.index)} images, {distributed.world_size()} x {device.type}")
    figures = {}
    for who, detector in detectors.items():
        save_to = args.save_detections if who == "student" else None
        figures[who] = evaluate(detector, val, device, args.workers, who, save_to)
    log(table(figures, arch))
    log(json.dumps(figures))


if __name__ == "__main__":
    distributed.run(main)
