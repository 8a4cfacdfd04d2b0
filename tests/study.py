"""Results on photographs: a teacher, students of ours and of torchdistill, variants, JPEG files.

    python tests/study.py --data-dir DIR --arch maskrcnn --folder RESULTS [--only ghnd qat-3] [...]

By hand. On a data set in COCO's layout it trains a teacher from random weights, and then students,
which are evaluated after their last epoch through fewer and fewer bits. Ours are trained by
train.py's flags. Those of torchdistill's distillation box start from the same weights and get the
same batches; both round differently, and training magnifies that, so only scores can be compared.

What is finished is kept in RESULTS/*.json: the same command goes on from there, also with other
seeds and names. Once teacher.json and jpeg.json are there, another one may make other students.
"""

import argparse
import hashlib
import itertools
import json
import sys
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import drawn
import matplotlib.pyplot as plt
import numpy as np
import torch
from benchmark import describe_machine, distillation_box
from torch import Tensor, nn

import data
import distributed
import evaluate
import models
import train

CPU = torch.device("cpu")
BITS = [32, 8, 4, 3, 2]  # a value; with 32 nothing is lost
QUALITIES = [75, 30, 10, 3]
KEPT_BYTES = 5 * 10**9  # of teacher maps, at most
FILES = "teacher, the files"  # on the images as they are

Rows = list[dict[str, Any]]  # as evaluate.measure_split and measure_jpeg return them
# {"what detects, what is sent": {"bytes": each seed's, "bbox": each seed's AP, "segm": the same}}
Found = dict[str, dict[str, list[float]]]

# ---- the variants that a paper tries first -------------------------------------------------------


def quantized(bits: int, first_step: int) -> type[nn.Module]:
    """Return a bottleneck class that is trained with what will be sent, quantized for each image.

    Gradients pass straight through. Until first_step, which BatchNorm counts, it trains as usual.
    """

    class Quantized(models.Bottleneck):
        def forward(self, x: Tensor) -> Tensor:
            z = self.encoder(x)
            if self.training and self.decoder[0].num_batches_tracked < first_step:
                return self.decoder(z)
            sent = torch.stack([models.dequantize(*models.quantize(image, bits)) for image in z])
            return self.decoder(z + (sent - z).detach())

    return Quantized


class Strided(nn.Module):
    """A bottleneck whose map has a quarter of the pixels; its decoder has twice the weights."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(64, 128, 3, padding=1, bias=False), nn.BatchNorm2d(128), nn.ReLU(),
            nn.Conv2d(128, channels, 3, stride=2, padding=1, bias=False))
        self.decoder = nn.Sequential(
            nn.BatchNorm2d(channels), nn.ConvTranspose2d(channels, 128, 2, stride=2, bias=False),
            nn.BatchNorm2d(128), nn.ReLU(),
            nn.Conv2d(128, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256), nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


@dataclass(frozen=True)
class Variant:
    """How students are trained, and with how many bits a value they are evaluated."""

    bits: Sequence[int]
    bottleneck: models.MakeBottleneck | None = None
    flags: Sequence[str] = ()  # of train.py
    by_torchdistill: bool = False


def list_variants(steps: int) -> dict[str, Variant]:
    """Return the variants by name; steps: of a student's training."""
    last_third = steps * 2 // 3
    return {
        "ghnd": Variant(BITS),
        "torchdistill": Variant(BITS[:1], by_torchdistill=True),
        "hnd": Variant(BITS[:1], flags=["--layer-weights", "1", "0", "0", "0"]),
        "strided-6": Variant(BITS[1:], partial(Strided, 6)),
        "qat-3": Variant([3], quantized(3, last_third)),
        "qat-2": Variant([2], quantized(2, last_third)),
    }


# ---- what is computed once -----------------------------------------------------------------------


def once(file: Path, settings: dict, function: Callable[..., Rows], *args: Any) -> Rows:
    """Return the rows that a file keeps; if it is not there, call the function for them.

    Raises InputError if they were made with other settings.
    """
    if not file.exists():
        begin = time.process_time()  # of all cores
        rows = function(*args)
        hours = (time.process_time() - begin) / 3600  # without those of a run that was killed
        part = file.with_suffix(".part")
        part.write_text(json.dumps({"settings": settings, "core_hours": hours,
                                    "machine": describe_machine(CPU), "rows": rows}, indent=1))
        part.replace(file)  # whole, or not at all
    kept = json.loads(file.read_text())
    if kept["settings"] != settings:
        raise distributed.InputError(f"{file} was made with {kept['settings']}, not {settings}; "
                                     "give another --folder")
    return kept["rows"]


def keep_teacher_maps(training_bodies: Callable[..., Any]) -> Callable[..., Any]:
    """Return models.training_bodies, but with a teacher's body that keeps the maps of each image.

    It computes a batch only where it lacks one of its images. All students of one teacher share
    what it keeps. An image's key is what a batch holds of it, with the padding.
    """
    kept = {}  # {key: {name: map (1, C, H, W)}}

    def bodies(*args: Any) -> tuple[nn.Module, Callable[[Tensor], dict[str, Tensor]]]:
        student_body, teacher_body = training_bodies(*args)
        names = list(teacher_body.return_layers.values())

        def body(batch: Tensor) -> dict[str, Tensor]:
            keys = [(image.shape, hashlib.sha256(image.numpy().tobytes()).digest())
                    for image in batch]
            if all(kept.get(key, {}).keys() >= set(names) for key in keys):
                return {name: torch.cat([kept[key][name] for key in keys]) for name in names}
            maps = teacher_body(batch)  # the whole batch: fewer images could be rounded differently
            image_bytes = sum(values[0].nbytes for values in maps.values())
            for i, key in enumerate(keys):
                if len(kept) * image_bytes < KEPT_BYTES:
                    kept[key] = {name: maps[name][i:i + 1].clone() for name in names}
            return maps

        return student_body, body

    return bodies


# ---- training and evaluation ---------------------------------------------------------------------


def make_teacher(args: argparse.Namespace) -> Rows:
    """Train a teacher, write it, and evaluate it on the images as they are."""
    teacher = drawn.train_teacher(
        args.arch, args.data_dir, args.teacher_steps, min_size=args.min_size,
        max_size=args.max_size, proposals=3 * args.rois, rois=args.rois,
        upside_down=args.upside_down, report=distributed.log)
    models.save_checkpoint(teacher.state_dict(), args.teacher_file)
    val = make_val_set(args, teacher)
    metrics, _ = evaluate.evaluate(evaluate.whole(teacher), val, CPU)
    sizes = [(val.folder / info.file_name).stat().st_size for info in val.images]
    return [{"sent": FILES, "metrics": metrics, "payload_bytes": np.mean(sizes)}]


def make_val_set(args: argparse.Namespace, detector: nn.Module) -> evaluate.ValSet:
    val = evaluate.ValSet(args.data_dir, models.to_device(detector, CPU))
    val.images = val.images[::args.every]
    return val


def measure_jpeg(args: argparse.Namespace) -> Rows:
    teacher = models.load_teacher(args.arch, args.teacher_file, args.min_size, args.max_size)
    val = make_val_set(args, teacher)
    return [evaluate.measure_jpeg(teacher, quality, val, CPU, 0) for quality in QUALITIES]


def make_student(args: argparse.Namespace, variant: Variant, seed: int, folder: Path) -> Rows:
    """Train a student, and evaluate it through each of the variant's numbers of bits."""
    if variant.by_torchdistill:
        student = train_by_torchdistill(args, seed)
    else:
        student = train_here(args, variant, seed, folder)
    val = make_val_set(args, student)
    return [evaluate.measure_split(student, bits, val, CPU, 0) for bits in variant.bits]


def train_here(args: argparse.Namespace, variant: Variant, seed: int, folder: Path) -> nn.Module:
    """Train a student by train.py, and return it as it is after the last epoch."""
    flags = [
        "--arch", args.arch, "--data-dir", args.data_dir, "--teacher-ckpt", args.teacher_file,
        "--output-dir", folder, "--resume", "--device", "cpu", "--workers", 0, "--limit-val", 1,
        "--min-size", args.min_size, "--max-size", args.max_size, "--images-per-step", 4,
        "--epochs", args.epochs, "--lr-drops", args.lr_drop, "--seed", seed, *variant.flags]
    train.main(list(map(str, flags)), bottleneck=variant.bottleneck)
    distributed.log_to(None)  # what follows is no part of its log
    last = train.RunFolder(folder, args.arch).last
    return models.load_student(last, bottleneck=variant.bottleneck)[0]


def train_by_torchdistill(args: argparse.Namespace, seed: int) -> nn.Module:
    """Train a student by torchdistill's distillation box, from the same start and batches."""
    teacher = models.load_teacher(args.arch, args.teacher_file, args.min_size, args.max_size)
    torch.manual_seed(seed)
    student = models.build_student(teacher)
    experiment = replace(
        train.EXPERIMENTS[args.arch], epochs=args.epochs, lr_drops=(args.lr_drop,))
    box = distillation_box(teacher, student, CPU, experiment)
    images, folder = data.load_train_split(args.data_dir, args.max_size)
    loader = data.train_loader(images, folder, 4, seed, workers=0, device=CPU)
    for epoch in range(args.epochs):
        loader.batch_sampler.epoch = epoch
        box.pre_epoch_process(epoch=epoch)
        for batch in loader:
            loss = box.forward_process([image / 255 for image in batch], None, None)
            box.post_forward_process(loss=loss)
        box.post_epoch_process()
        distributed.log(f"torchdistill: epoch {epoch} ends with loss {loss.item():.4e}")
    return student.eval()


# ---- the table and the figure --------------------------------------------------------------------


def add(found: Found, name: str, rows: Rows) -> None:
    """Add a seed's rows to what was found."""
    for row in rows:
        sent = row["sent"].partition(", ")[2]
        values = found.setdefault(f"{name}, {sent}", defaultdict(list))
        values["bytes"].append(row["payload_bytes"])
        for iou_type, metrics in row["metrics"].items():
            values[iou_type].append(metrics["AP"])


def describe(values: Sequence[float], sign: str = "") -> str:
    """Return "mean ± standard deviation (each value)"; sign: "+" to give it always."""
    if len(values) == 1:
        return f"{values[0]:{sign}.3f}"
    each = " ".join(f"{value:{sign}.3f}" for value in values)
    return f"{np.mean(values):{sign}.3f} ± {np.std(values, ddof=1):.3f} ({each})"


def print_table(found: Found, iou_types: Sequence[str]) -> None:
    """Print, as Markdown, the AP of all that was found, and the bytes that were sent."""
    titles = " | ".join(f"{iou_type} AP" for iou_type in iou_types)
    print(f"\n| what detects | {titles} | bytes an image |")
    print("| --- |" + " --- |" * (1 + len(iou_types)))
    [file_bytes] = found[FILES]["bytes"]
    for what, values in found.items():
        aps = " | ".join(describe(values[iou_type]) for iou_type in iou_types)
        mean_bytes = np.mean(values["bytes"])
        print(f"| {what} | {aps} | {mean_bytes:,.0f} ({mean_bytes / file_bytes:.0%}) |")
    ours, theirs = (found.get(f"{name}, 32-bit") for name in ("ghnd", "torchdistill"))
    for iou_type in iou_types if ours and theirs else ():
        differences = [a - b for a, b in zip(ours[iou_type], theirs[iou_type], strict=True)]
        print(f"\n{iou_type} AP, ghnd - torchdistill, seed by seed: {describe(differences, '+')}")


def draw_figure(found: Found, iou_types: Sequence[str], path: Path) -> None:
    """Draw AP over bytes an image: a curve of each variant's means, with its seeds as dots."""
    figure, panels = plt.subplots(
        1, len(iou_types), figsize=(7 * len(iou_types), 5), squeeze=False, layout="constrained")
    for axes, iou_type in zip(panels[0], iou_types):
        curves = defaultdict(list)  # of points: bytes, AP
        for what, values in found.items():
            if what != FILES and not what.endswith("32-bit"):
                point = np.mean(values["bytes"]), np.mean(values[iou_type])
                curves[what.split(", ")[0].replace("teacher", "teacher, JPEG")].append(point)
                axes.plot(values["bytes"], values[iou_type], ".", color="grey", alpha=0.5)
        for number, (name, points) in enumerate(curves.items()):
            axes.plot(*zip(*points), marker="so^vDP*"[number % 7], label=name)
        axes.axhline(found[FILES][iou_type][0], color="grey", label=FILES)
        axes.set_xscale("log", subs=[3])
        axes.xaxis.set(major_formatter="{x:,.0f}", minor_formatter="{x:,.0f}")
        axes.set(xlabel="bytes an image", ylabel=f"{iou_type} AP", ylim=(0, None))
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)


# ---- the command ---------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data-dir", type=Path, required=True, help="in COCO's layout")
    add("--arch", choices=train.EXPERIMENTS, required=True, help="which detector")
    add("--folder", type=Path, required=True, help="where all goes")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the students")
    add("--only", nargs="*", choices=list_variants(0), default=list(list_variants(0)),
        metavar="NAME", help="which students; none: teacher and JPEG files alone")
    add("--min-size", type=int, default=160, help="pixels of an image's shorter side")
    add("--max-size", type=int, default=256, help="pixels that the longer side has at most")
    add("--teacher-steps", type=int, default=450, help="of 4 images each")
    add("--rois", type=int, default=66, help="of an image, for the teacher's heads in training")
    add("--upside-down", action="store_true", help="train the teacher on images turned so, too")
    add("--epochs", type=int, default=3, help="of a student; lr drops at two thirds of them")
    add("--every", type=int, default=1, help="evaluate on every Nth image only")
    args = parser.parse_args(argv)
    args.teacher_file = args.folder / "teacher.pt"
    args.lr_drop = max(1, args.epochs * 2 // 3)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    names = ("arch", "min_size", "max_size", "teacher_steps", "rois", "upside_down", "every")
    settings = {name: getattr(args, name) for name in names}
    for split in ("train2017", "val2017"):
        settings[split] = zlib.crc32(data.split_paths(args.data_dir, split)[0].read_bytes())
    images, _ = data.load_train_split(args.data_dir, args.max_size)
    variants = list_variants(len(images) // 4 * args.epochs)

    found = {}
    add(found, "teacher", once(args.folder / "teacher.json", settings, make_teacher, args))
    settings["teacher"] = zlib.crc32(args.teacher_file.read_bytes())
    add(found, "teacher", once(args.folder / "jpeg.json", settings, measure_jpeg, args))
    with mock.patch.object(models, "training_bodies", keep_teacher_maps(models.training_bodies)):
        for seed, name in itertools.product(dict.fromkeys(args.seeds), dict.fromkeys(args.only)):
            own = settings | {"epochs": args.epochs, "bits": variants[name].bits}
            folder = args.folder / f"{name}-{seed}" / str(args.epochs)
            add(found, name, once(args.folder / f"{name}-{seed}.json", own, make_student, args,
                                  variants[name], seed, folder))
            for checkpoint in folder.glob("*.pt"):  # of 200 MB
                checkpoint.unlink()
    iou_types = [name for name in found[FILES] if name != "bytes"]
    print_table(found, iou_types)
    draw_figure(found, iou_types, args.folder / "study.jpg")
    kept = [json.loads(file.read_text()) for file in args.folder.glob("*.json")]
    hours = sum(result["core_hours"] for result in kept)
    machines = "; ".join(sorted({result["machine"] for result in kept}))
    print(f"\n{hours:.2f} hours of one core, of all in the folder, on {machines}")


if __name__ == "__main__":
    distributed.run(main)
