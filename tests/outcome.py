"""Results of our own: a teacher, students of this code and of torchdistill 1.1.5, and JPEG files.

    python tests/outcome.py --data-dir DIR --folder RESULTS [...]

By hand. On a data set in COCO's layout, or on a drawn one, it trains a teacher for boxes, and then
students of some seeds: by train.py, by torchdistill's distillation box, and with other numbers of
channels. All are evaluated after the last epoch, those of this code also through fewer bits, beside
the teacher on JPEG files.

Both sides start from the same layer1 and get the same batches of 4 images, in the same number of
steps, with the same learning rates. They differ in how they compute: torchdistill does not fold
FrozenBatchNorm2d, has another memory layout, and runs the transform once for each detector. Float32
training magnifies such roundings until the weights differ, so only scores can be compared.

What is finished is kept in RESULTS: the same command goes on from there, also with more seeds.
"""

import argparse
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import drawn
import matplotlib.pyplot as plt
import numpy as np
import torch
from benchmark import describe_machine
from test_parity import box_config
from torch import nn
from torchdistill.core.distillation import get_distillation_box

import data
import distributed
import evaluate
import losses
import models
import train

CPU = torch.device("cpu")
WHOLE = 32  # bits: nothing is lost
QUALITIES = (75, 50, 30, 10, 3)  # of JPEG files
Rows = list[tuple["Row", list[dict[str, Any]]]]  # and what Study.students returns of each


@dataclass(frozen=True)
class Row:
    """Students that differ in their seeds alone: how they are trained and evaluated.

    name: stands for all the rest, so that another experiment must have another name.
    bits: with how many bits a value they are evaluated. WHOLE is the student as it is.
    curve: the name of the curve that shows the other bits; rows can share one.
    bottleneck, criterion: of train.run_experiment; the bottleneck is made anew for each seed.
    by_epoch: whether they are also evaluated after each epoch. Nothing is chosen by that.
    by_torchdistill: whether its box trains them, with the loss and the bottleneck of the recipe.
    """

    name: str
    experiment: train.Experiment
    bits: tuple[int, ...] = (WHOLE,)
    curve: str = ""
    bottleneck: Callable[[], nn.Module] | None = None
    criterion: Callable[..., Any] = losses.ghnd_loss
    by_epoch: bool = False
    by_torchdistill: bool = False


class Study:
    """A data set, a teacher for it, and its students. What is finished is kept in a folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.data_dir = args.data_dir or args.folder / "data"
        self.teacher_file = args.folder / "teacher.pt"
        self.results_file = args.folder / "results.json"
        self.base = replace(
            train.FASTERRCNN, epochs=args.epochs, lr_drops=lr_drops(args.epochs),
            images_per_step=4, min_size=args.min_size, max_size=args.max_size)

        args.folder.mkdir(parents=True, exist_ok=True)
        self.results = {}
        if self.results_file.exists():
            self.results = json.loads(self.results_file.read_text())
        settings = {name: getattr(args, name) for name in (
            "data_dir", "min_size", "max_size", "teacher_steps", "upside_down", "epochs")}
        self.settings = settings | {"data_dir": str(args.data_dir and args.data_dir.resolve())}
        self.once("machine", partial(describe_machine, CPU))

    def once(self, name: str, function: Callable[[], Any], **settings: Any) -> Any:
        """Return the result kept under a name; if there is none, call the function and keep its.

        settings: of this result, besides those of the study. Exits if the kept one has others.
        """
        settings = json.loads(json.dumps(self.settings | settings))
        if name not in self.results:
            begin = time.perf_counter()
            result = function()
            minutes = (time.perf_counter() - begin) / 60
            self.results[name] = {"settings": settings, "result": result, "minutes": minutes}
            part = self.results_file.with_suffix(".part")
            part.write_text(json.dumps(self.results, indent=1) + "\n")
            part.replace(self.results_file)  # whole, or not at all
        if self.results[name]["settings"] != settings:
            sys.exit(f"{self.results_file}: {name!r} has other settings; give another --folder")
        return self.results[name]["result"]

    def count_steps(self) -> int:
        """Return the number of steps that a student is trained for, one batch each."""
        images, folder = data.load_train_split(self.data_dir, self.base.max_size, None)
        loader = data.train_loader(
            images, folder, self.base.images_per_step, seed=0, workers=0, device=CPU)
        return len(loader) * self.base.epochs

    # ---- training --------------------------------------------------------------------------------

    def train_teacher(self) -> None:
        if self.args.data_dir is None:
            shutil.rmtree(self.data_dir, ignore_errors=True)
            drawn.write_dataset(self.data_dir, train=256, val=48, hard=True)
        teacher = drawn.train_teacher(
            "fasterrcnn", self.data_dir, self.args.teacher_steps, min_size=self.args.min_size,
            max_size=self.args.max_size, proposals=200, rois=66,  # a third, as in the demo
            upside_down=self.args.upside_down, report=distributed.log)
        models.save_checkpoint(teacher.state_dict(), self.teacher_file)

    def train_here(self, row: Row, experiment: train.Experiment, output_dir: Path) -> Path:
        """Train a student by this code; return the checkpoint after the last epoch."""
        train.run_experiment(
            experiment, data_dir=self.data_dir, output_dir=output_dir,
            teacher_ckpt=self.teacher_file, resume=True, device="cpu", workers=0,
            limit_val=None if row.by_epoch else 1, log_every=20, bottleneck=row.bottleneck,
            criterion=row.criterion)
        return train.RunFolder(output_dir, experiment.arch).last

    def train_by_torchdistill(self, experiment: train.Experiment, output_dir: Path) -> Path:
        """Train a student by torchdistill's distillation box; return the checkpoint."""
        config = box_config()
        config["num_epochs"] = experiment.epochs
        config["optimizer"]["kwargs"]["lr"] = experiment.lr
        config["scheduler"]["kwargs"] = {
            "milestones": list(experiment.lr_drops), "gamma": experiment.lr_drop_factor}

        teacher = models.load_teacher(
            experiment.arch, self.teacher_file, experiment.min_size, experiment.max_size)
        torch.manual_seed(experiment.seed)
        student = models.build_student(teacher, models.Bottleneck(experiment.bottleneck_channels))
        box = get_distillation_box(teacher, student, {}, config, CPU, None, False, 1.0)

        images, folder = data.load_train_split(self.data_dir, experiment.max_size, None)
        loader = data.train_loader(
            images, folder, experiment.images_per_step, experiment.seed, workers=0, device=CPU)
        for epoch in range(experiment.epochs):
            loader.batch_sampler.epoch = epoch
            box.pre_epoch_process(epoch=epoch)
            for step, batch in enumerate(loader, start=1):
                loss = box.forward_process([image / 255 for image in batch], None, None)
                box.post_forward_process(loss=loss)
                if step % 20 == 0:
                    distributed.log(f"torchdistill: epoch {epoch} step {step}/{len(loader)} "
                                    f"loss {loss.item():.4e}")
            box.post_epoch_process()

        checkpoint = output_dir / "torchdistill.pt"
        output_dir.mkdir(parents=True, exist_ok=True)
        models.save_checkpoint({"model": student.state_dict()}, checkpoint)
        return checkpoint

    # ---- evaluation ------------------------------------------------------------------------------

    def teacher(self) -> dict[str, Any]:
        """Return the teacher's box AP on the images and on JPEG files, and the files' mean bytes."""
        self.once("teacher's training", self.train_teacher)
        return self.once("teacher", self.evaluate_teacher)

    def evaluate_teacher(self) -> dict[str, Any]:
        teacher = models.to_device(models.load_teacher(
            "fasterrcnn", self.teacher_file, self.args.min_size, self.args.max_size), CPU)
        val = evaluate.ValSet(self.data_dir, teacher)
        metrics, _ = evaluate.evaluate(evaluate.whole(teacher), val, CPU)
        jpeg = []
        for is_resized in (False, True):
            for quality in QUALITIES:
                found = evaluate.measure_jpeg(teacher, quality, is_resized, val, CPU, workers=0)
                jpeg.append({"quality": quality, "is_resized": is_resized,
                             "bytes": found["payload_bytes"], "AP": found["metrics"]["bbox"]["AP"]})
        return {"AP": metrics["bbox"]["AP"], "file_bytes": evaluate.mean_file_bytes(val),
                "jpeg": jpeg}

    def students(self, row: Row, seeds: Sequence[int]) -> list[dict[str, Any]]:
        """Return each seed's student: {"rates": its AP and bytes by bits, "epochs": AP by epoch}."""
        found = []
        for seed in seeds:
            name = f"{row.name}, seed {seed}"
            found.append(self.once(
                name, partial(self.make_student, row, seed),
                experiment=asdict(replace(row.experiment, seed=seed)), bits=row.bits))
            rates = " ".join(f"{rate['bits']}: {rate['AP']:.3f}" for rate in found[-1]["rates"])
            distributed.log(f"{name}: box AP by bits {rates}")
        return found

    def make_student(self, row: Row, seed: int) -> dict[str, Any]:
        experiment = replace(row.experiment, seed=seed)
        output_dir = self.args.folder / f"{re.sub(r'[^0-9A-Za-z]+', '-', row.name)}-{seed}"
        if row.by_torchdistill:
            checkpoint = self.train_by_torchdistill(experiment, output_dir)
        else:
            checkpoint = self.train_here(row, experiment, output_dir)

        rates = self.evaluate_student(row, experiment, checkpoint)
        epochs = []
        if row.by_epoch:
            lines = train.RunFolder(output_dir, experiment.arch).metrics.read_text().splitlines()
            by_epoch = {line["epoch"]: line["metrics"]["bbox"]["AP"]
                        for line in map(json.loads, lines) if line["kind"] == "epoch"}
            epochs = list(by_epoch.values())
        shutil.rmtree(output_dir)  # 200 MB and more
        return {"rates": rates, "epochs": epochs}

    def evaluate_student(
        self, row: Row, experiment: train.Experiment, checkpoint: Path
    ) -> list[dict[str, Any]]:
        """Return a student's box AP and mean bytes with each of the row's bits."""
        student, _ = models.load_student(
            checkpoint, experiment.min_size, experiment.max_size,
            row.bottleneck or models.Bottleneck(experiment.bottleneck_channels))
        models.to_device(student, CPU)
        val = evaluate.ValSet(self.data_dir, student)
        rates = []
        for bits in row.bits:
            found = evaluate.measure_split(student, bits, val, CPU, workers=0)
            rates.append({"bits": bits, "bytes": found["payload_bytes"],
                          "AP": found["metrics"]["bbox"]["AP"]})
        return rates


def lr_drops(epochs: int) -> tuple[int, ...]:
    """Return the epoch, at two thirds, from which on a student's learning rate is a tenth."""
    return (max(1, epochs * 2 // 3),)


# ---- the table and the curve ---------------------------------------------------------------------


def spread(values: Sequence[float]) -> str:
    """Return "mean ± standard deviation"."""
    text = f"{np.mean(values):.3f}"
    return f"{text} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else text


def mean_rates(students: Sequence[dict[str, Any]]) -> list[tuple[int, float, list[float]]]:
    """Return (bits, mean bytes, each student's AP) of the rates of a row's students."""
    return [(rates[0]["bits"], float(np.mean([rate["bytes"] for rate in rates])),
             [rate["AP"] for rate in rates])
            for rates in zip(*(student["rates"] for student in students))]


def print_table(study: Study, rows: Rows) -> None:
    """Print, as Markdown, the AP of the teacher, of every row, of every rate, and of JPEG files."""
    teacher = study.teacher()

    def line(name: str, ap: str, sent: float | None = None, each: Sequence[float] = ()) -> None:
        share = f"{sent:,.0f} ({sent / teacher['file_bytes']:.0%})" if sent else ""
        print(f"| {name} | {ap} | {share} | {' '.join(f'{value:.3f}' for value in each)} |")

    print("\n| what detects | box AP | bytes an image | each seed |\n| --- | --- | --- | --- |")
    line("teacher", f"{teacher['AP']:.3f}", teacher["file_bytes"])
    for row, students in rows:
        for bits, sent, aps in mean_rates(students):
            what = f", {'whole' if bits == WHOLE else distributed.plural(bits, 'bit')}"
            name = row.name + what * (len(row.bits) > 1)
            line(name, spread(aps), None if bits == WHOLE else sent, aps)
    for jpeg in teacher["jpeg"]:
        resized = "resized, " * jpeg["is_resized"]
        line(f"teacher, {resized}JPEG of quality {jpeg['quality']}", f"{jpeg['AP']:.3f}",
             jpeg["bytes"])
    minutes = sum(entry["minutes"] for entry in study.results.values())
    print(f"\n{study.results['machine']['result']}\n{minutes:.0f} minutes, of all in the folder")


def draw_curves(study: Study, rows: Rows, path: Path) -> None:
    """Draw box AP over bytes an image: the rows' curves, and the teacher on JPEG files."""
    teacher = study.teacher()
    figure, axes = plt.subplots(figsize=(8, 5))
    curves = {}
    for row, students in rows:
        if row.curve:
            points = [point for point in mean_rates(students) if point[0] != WHOLE]
            curves.setdefault(row.curve, []).extend(points)
    for number, (curve, points) in enumerate(curves.items()):
        points = sorted(points, key=lambda point: point[1])
        axes.errorbar(
            [sent for _, sent, _ in points], [np.mean(aps) for _, _, aps in points],
            yerr=[np.std(aps, ddof=1) if len(aps) > 1 else 0 for _, _, aps in points],
            marker="o^vDPX<>"[number % 8], capsize=3, linewidth=1 if number else 2.5, label=curve)
        for bits, sent, aps in points if number == 0 else ():
            axes.annotate(distributed.plural(bits, "bit"), (sent, np.mean(aps)), xytext=(6, -12),
                          textcoords="offset points", fontsize=8)
    for is_resized, style, label in (
            (False, "k--s", "teacher, JPEG"), (True, "k:d", "teacher, JPEG of the resized photo")):
        points = [jpeg for jpeg in teacher["jpeg"] if jpeg["is_resized"] == is_resized]
        axes.plot([jpeg["bytes"] for jpeg in points], [jpeg["AP"] for jpeg in points], style,
                  label=label)
    axes.axhline(teacher["AP"], color="grey", linewidth=1, label="teacher, the files as they are")
    axes.set(xscale="log", xlabel="bytes an image", ylabel="box AP", ylim=(0, None))
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


# ---- the command ---------------------------------------------------------------------------------


def make_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the flags of a Study."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="in COCO's layout; else images are drawn")
    parser.add_argument("--folder", type=Path, default="outcome", help="where results are kept")
    parser.add_argument("--min-size", type=int, default=160, help="pixels of the shorter side")
    parser.add_argument("--max-size", type=int, default=214, help="pixels of the longer side")
    parser.add_argument("--teacher-steps", type=int, default=450, help="of 4 images each")
    parser.add_argument("--upside-down", action="store_true",
                        help="train the teacher on images that are flipped that way, too")
    parser.add_argument("--epochs", type=int, default=3, help="of a student")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the students")
    return parser


def list_rows(base: train.Experiment, channels: Sequence[int]) -> list[Row]:
    rows = [plain_row(base), Row("GHND, torchdistill", base, by_torchdistill=True)]
    for number in channels:
        name = distributed.plural(number, "channel")
        experiment = replace(base, bottleneck_channels=number)
        rows.append(Row(
            f"GHND, this code, {name}", experiment, (WHOLE, 8, 4, 2), f"student, {name}"))
    return rows


def plain_row(base: train.Experiment) -> Row:
    return Row("GHND, this code", base, (WHOLE, 8, 4, 3, 2, 1), "student, 3 channels")


def main() -> None:
    parser = make_parser("Train students by this code and torchdistill.")
    parser.add_argument("--channels", type=int, nargs="*", default=[1, 6, 12],
                        help="of further students")
    args = parser.parse_args()
    study = Study(args)
    distributed.log(f"teacher: box AP {study.teacher()['AP']:.3f}")
    rows = [(row, study.students(row, args.seeds))
            for row in list_rows(study.base, args.channels)]
    print_table(study, rows)
    draw_curves(study, rows, args.folder / "curve.jpg")


if __name__ == "__main__":
    distributed.run(main)
