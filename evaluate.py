"""COCO box and mask mAP of a student checkpoint, beside its teacher's and the published figures.

    python evaluate.py --ckpt coco/ghnd/coco2017-custom_maskrcnn_..._fpn.pt --teacher --bits 32 8
"""

import argparse
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
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

import data
import distributed
import models
from distributed import log

FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
PUBLISHED = {  # AP of torchvision's COCO_V1 weights, and of the students (arXiv 2011.12913)
    "fasterrcnn": {"teacher": {"bbox": 0.370}, "student": {"bbox": 0.359}},
    "maskrcnn": {"teacher": {"bbox": 0.379, "segm": 0.346},
                 "student": {"bbox": 0.369, "segm": 0.336}}}
CERTAIN = 0.5  # the score from which a detection is drawn, or is a truth to agree with
USAGE = "%(prog)s FLAGS (--help lists them)"
SILENCE = contextlib.redirect_stdout(io.StringIO())  # for pycocotools, which prints

Results = list[dict[str, Any]]  # in COCO's format
Figures = dict[str, list[float]]  # for "bbox" and, of a Mask R-CNN, "segm": the 12 FIGURES

class ValSet:
    """The first `limit` images of val2017 and all annotations, checked and ready for a detector."""
    def __init__(self, data_dir: Path, detector: nn.Module, limit: int | None = None) -> None:
        self.index, self.folder = data.load_split(data_dir, "val", limit)
        self.kinds = ("bbox", "segm") if detector.roi_heads.has_mask() else ("bbox",)
        classes = detector.roi_heads.box_predictor.cls_score.out_features  # with the background
        annotation_file = data_dir / "annotations" / "instances_val2017.json"
        with data.reading(annotation_file), SILENCE:
            self.coco = COCO(annotation_file)
            np.array(list(self.coco.anns), dtype=float)  # as COCOeval notes ids of what is found
            largest = max(self.coco.cats)
            for kind in self.kinds:  # better a broken annotation is met now than after the detector
                evaluation = COCOeval(self.coco, COCO(), kind)
                evaluation.params.useCats = 0  # all categories at once
                evaluation.evaluate()
        if largest >= classes:
            raise ValueError(f"{annotation_file}: category {largest} is beyond {classes} classes")

# ---- from images to results to figures -----------------------------------------------------------
@torch.inference_mode()
def to_coco(image_id: int, detector: nn.Module, found: dict[str, Tensor], resized: tuple[int, int],
            original: tuple[int, int]) -> Results:
    """Turn what models.detect found in an image, and its sizes, into COCO results, on the CPU.

    Returns N dicts: image_id, category_id, bbox (x y w h in pixels of the original), score, and for
    Mask R-CNN segmentation: the RLE of the mask that torchvision pastes, cut at 0.5.
    """
    found = detector.transform.postprocess([dict(found)], [resized], [original])[0]
    columns = {"category_id": found["labels"].tolist(),  # COCO's ids themselves
               "bbox": box_convert(found["boxes"], "xyxy", "xywh").tolist(),
               "score": found["scores"].tolist()}
    if "masks" in found:  # (N, 1, h, w) in [0, 1]; pycocotools wants (h, w, N) in Fortran order
        masks = (found["masks"][:, 0] > 0.5).to(torch.uint8).mT.contiguous().numpy().T
        columns["segmentation"] = [{**rle, "counts": rle["counts"].decode()}
                                   for rle in coco_mask.encode(masks)]
    return [{"image_id": image_id, **dict(zip(columns, row))}
            for row in zip(*columns.values(), strict=True)]


def results_of_kind(results: Iterable[dict[str, Any]], kind: str) -> Results:
    """Copy COCO results with their boxes or masks alone, lest masks get the areas of boxes."""
    drop = {"bbox": "segmentation", "segm": "bbox"}[kind]
    return [{key: value for key, value in r.items() if key != drop} for r in results]


def coco_figures(
    coco: COCO, results: Iterable[dict[str, Any]], image_ids: Sequence[int], kind: str
) -> list[float]:
    """Return COCOeval's 12 figures for "bbox" or "segm" over these images; -1: nothing to find.

    To be called on all processes with the same arguments: each matches its share of the categories.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    categories = sorted(coco.getCatIds())
    mine = set(categories[rank::world_size])
    results = results_of_kind((r for r in results if r["category_id"] in mine), kind)
    with SILENCE:
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


@torch.inference_mode()
def evaluate(detector: nn.Module, val: ValSet, device: torch.device, workers: int, title: str,
             bits: int | None = None) -> tuple[Figures, Results, np.ndarray]:
    """Run a detector over a ValSet, on any number of processes; the device only detects, and
    threads make the results of its last images. bits: by way of models.split.

    Returns, on every process, figures, all results and, a row an image sent: bytes, bytes before
    zlib, seconds in head and in tail.
    """
    models.to_device(detector, device).eval()
    head, tail = models.split(detector, bits) if bits else (None, None)
    loader = data.val_loader(val.index, val.folder, workers)
    mine = val.index.id[distributed.rank()::distributed.world_size()].tolist()
    futures, sent, begin = [], [], time.perf_counter()
    with ThreadPoolExecutor(threads := 4) as pool:  # a GPU is faster than one of them
        for done, (image_id, image) in enumerate(zip(mine, loader, strict=True), start=1):
            image, start = image.to(device, non_blocking=True) / 255, time.perf_counter()
            payload = head(image) if head else b""
            middle = time.perf_counter()
            found, *sizes = tail.detect(payload) if tail else models.detect(detector, image)
            found = {name: values.cpu() for name, values in found.items()}
            now = time.perf_counter()
            if head:
                sent.append((len(payload), models.raw_size(payload), middle - start, now - middle))
            if done > threads:  # so many images at a time bound the memory
                futures[-threads].result()
            futures.append(pool.submit(to_coco, image_id, detector, found, *sizes))
            if done % 100 == 0:
                log(f"{title}: image {done}/{len(mine)}, {(now - begin) / done:.3f} s each")
    results = [future.result() for future in futures]
    by_position = itertools.zip_longest(*distributed.gather(results), fillvalue=[])
    results = [r for images in by_position for image in images for r in image]
    figures = {kind: coco_figures(val.coco, results, val.index.id.tolist(), kind)
               for kind in val.kinds}
    return figures, results, np.array(sum(distributed.gather(sent), []))


def agreement(val: ValSet, teacher: Results, student: Results) -> Figures:
    """Return the student's figures with what the teacher is CERTAIN of as truth; on all alike."""
    figures = {}
    for kind in val.kinds:
        coco, truths = COCO(), [r for r in teacher if r["score"] >= CERTAIN]
        areas = [int(coco_mask.area(r["segmentation"])) if kind == "segm"
                 else r["bbox"][2] * r["bbox"][3] for r in truths]
        coco.dataset = {**val.coco.dataset, "annotations": [
            {**truth, "id": i, "area": area, "iscrowd": 0}
            for i, (truth, area) in enumerate(zip(truths, areas), start=1) if area > 0]}
        with SILENCE:
            coco.createIndex()
        figures[kind] = coco_figures(coco, student, val.index.id.tolist(), kind)
    return figures


def table(rows: dict[str, Figures], student: nn.Module) -> str:
    """Format figures, by name, with the published AP beside a "teacher" and "student" like them."""
    heads, layer1 = student.roi_heads, student.backbone.body["layer1"]
    like = (heads.box_predictor.cls_score.out_features, len(layer1.encoder[7].weight)) == (91, 3)
    published = PUBLISHED["maskrcnn" if heads.has_mask() else "fasterrcnn"] if like else {}
    lines = [f"{'':15}" + "".join(f"{name:>8}" for name in FIGURES) + "   AP published" * like]
    for who, figures in rows.items():
        for kind, values in figures.items():
            lines.append(f"{who + ' ' + kind:15}" + "".join(f"{value:8.4f}" for value in values)
                         + (f"   {published[who][kind]:.3f}" if who in published else ""))
    return "\n".join(lines)


def rate_table(rate: list[dict[str, Any]], head: dict[str, int]) -> str:
    """Format main's "rate" and "head"."""
    kinds = rate[0]["figures"]
    lines = ["bits" + "".join(f"  AP {k}" for k in kinds) + "   bytes of JPEG  head s  tail s"]
    for row in rate:
        lines.append(f"{row['bits']:4}" + "".join(f"{row['figures'][k][0]:9.4f}" for k in kinds)
                     + f"{row['payload_bytes']:8.0f}{row['payload_bytes'] / row['jpeg_bytes']:8.1%}"
                     f"{row['head_seconds']:8.4f}{row['tail_seconds']:8.4f}")
    return "\n".join([*lines, "head: {parameters:,} of the student's {student_parameters:,} "
                      "parameters, 32 bits each".format(**head)])


def draw(val: ValSet, columns: Sequence[Results], folder: Path, count: int) -> None:
    """Write the first images of a ValSet, each once for each column of results, side by side."""
    folder.mkdir(parents=True, exist_ok=True)
    for image_id, name in zip(val.index.id[:count].tolist(), val.index.name):
        panels = []
        for results in columns:
            panels.append(data.read_image(val.folder / name))
            mine = [r for r in results if r["image_id"] == image_id and r["score"] >= CERTAIN]
            for r in mine if "segm" in val.kinds else ():
                mask = torch.from_numpy(coco_mask.decode(r["segmentation"])).bool()
                panels[-1] = draw_segmentation_masks(panels[-1], mask, alpha=0.3)
            if mine:
                boxes = box_convert(torch.tensor([r["bbox"] for r in mine]), "xywh", "xyxy")
                names = [val.coco.cats.get(r["category_id"], {}).get("name", "?") for r in mine]
                titles = [f"{name} {r['score']:.2f}" for name, r in zip(names, mine)]
                panels[-1] = draw_bounding_boxes(panels[-1], boxes, titles)
        to_pil_image(torch.cat(panels, dim=2)).save(folder / f"{Path(name).stem}.jpg")

# ---- the command ---------------------------------------------------------------------------------
def positive(text: str) -> int:
    """Parse an integer from 1 up, for argparse."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def path(text: str) -> Path:
    """Parse a path, for argparse; in --flag=~/x, bash leaves the ~ as it is."""
    return Path(text).expanduser()


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that train.py and evaluate.py share."""
    flag = parser.add_argument
    flag("--data-dir", type=path, default="~/datasets/coco2017", metavar="DIR",
         help="folder with COCO's train2017/, val2017/, annotations/ (%(default)s)")
    flag("--teacher-ckpt", type=path, metavar="FILE",
         help="the teacher, a torchvision state dict (default: download COCO_V1)")
    flag("--device", choices=["auto", "cuda", "cpu"], default="auto", help="auto: cuda or else cpu")
    flag("--workers", type=int, default=min(4, os.cpu_count() or 1), metavar="N",
         help="image-loading processes per process, 0 for none (%(default)s)")
    flag("--limit-val", type=positive, metavar="N", help="use only the first N images of val2017")
    flag("--min-size", type=positive, default=800, metavar="PX", help="shorter side (%(default)s)")
    flag("--max-size", type=positive, default=1333, metavar="PX", help="longer side (%(default)s)")


def main() -> None:
    parser = argparse.ArgumentParser(usage=USAGE, description="COCO figures of a GHND student.")
    flag = parser.add_argument
    flag("--ckpt", type=path, required=True, metavar="FILE",
         help="the student's checkpoint, ours or torchdistill's")
    flag("--teacher", action="store_true", help="evaluate the teacher, and agreement with it, too")
    flag("--bits", type=int, nargs="+", choices=[*range(1, 9), 16, 32], metavar="N",
         help="send images through head, bytes and tail, with 32, 16 or 1 to 8 bits a value")
    flag("--save-detections", type=path, metavar="FILE",
         help="write the student's results, in COCO's format, to this .json file")
    flag("--pictures", type=path, metavar="DIR",
         help="draw what teacher (left) and student find in --limit-val images, or in 20")
    add_common_flags(parser)
    args = parser.parse_args()
    device, sizes = distributed.set_up(args.device), (args.min_size, args.max_size)
    student, arch = distributed.from_main(models.load_student, args.ckpt, *sizes)
    val = ValSet(args.data_dir, student, args.limit_val)
    if args.save_detections:
        args.save_detections.open("a").close()  # better to fail now than after an hour
    log(f"{args.ckpt}: {arch}; {len(val.index)} images, {distributed.world_size()} x {device.type}")
    rows, summary, common = {}, {}, (val, device, args.workers)
    if args.teacher or args.teacher_ckpt or args.pictures:
        teacher = distributed.from_main(models.load_teacher, arch, args.teacher_ckpt, *sizes)
        rows["teacher"], truths, _ = evaluate(teacher, *common, "teacher")
    if not args.bits:
        rows["student"], results, _ = evaluate(student, *common, "student")
    jpeg_bytes, rate = [os.path.getsize(val.folder / name) for name in val.index.name], []
    for bits in args.bits or ():
        figures, found, sent = evaluate(student, *common, f"student, {bits} bits", bits)
        if bits == max(args.bits):
            rows["student"], results = figures, found
        rate.append({"bits": bits, "figures": figures, "payload_bytes": sent[:, 0].mean(),
                     "raw_bytes": sent[:, 1].mean(), "jpeg_bytes": float(np.mean(jpeg_bytes)),
                     "head_seconds": np.median(sent[:, 2]), "tail_seconds": np.median(sent[:, 3])})
    if rate:
        head, whole = (sum(p.numel() for p in part.parameters())
                       for part in (models.split(student)[0].network, student))
        summary = {"rate": rate, "head": {"parameters": head, "student_parameters": whole}}
        log(rate_table(**summary))
    if "teacher" in rows:
        rows["agreement"] = agreement(val, truths, results)
    if args.pictures:
        distributed.from_main(draw, val, (truths, results), args.pictures, args.limit_val or 20)
    for kind in val.kinds if args.save_detections and distributed.rank() == 0 else ():
        file = args.save_detections
        file = file if kind == "bbox" else file.with_suffix(".segm.json")
        file.write_text(json.dumps(results_of_kind(results, kind)))
    log(table(rows, student))
    log(json.dumps({**rows, **summary}))


if __name__ == "__main__":
    distributed.run(main)
