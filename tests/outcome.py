"""Results of our own: students trained by this code and by torchdistill 1.1.5, side by side.

    python tests/outcome.py [--quick] [--folder DIR]

By hand, under an hour on two cores (--quick: a few minutes, to see that it runs). It draws the hard
data set, trains a teacher, and then students over several seeds: by train.py and by torchdistill's
distillation box, with GHND's loss and with HND's, with fewer and more channels. All are evaluated by
evaluate.py, whole, through fewer and fewer bits, and beside the teacher on JPEG files.

Both sides start from the same layer1 and get the same batches of 4 images, in the same number of
steps, with the same learning rates. They differ in how they compute: torchdistill does not fold
FrozenBatchNorm2d, has another memory layout, and runs the transform once for each detector. Float32
training magnifies such roundings until the weights differ, so only scores can be compared.

What is finished is kept in DIR: the same command goes on from there.
"""

import argparse
import json
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import drawn
import matplotlib.pyplot as plt
import numpy as np
import torch
from benchmark import describe_machine
from test_parity import box_config
from torchdistill.core.distillation import get_distillation_box

import data
import distributed
import evaluate
import models
import train

CPU = torch.device("cpu")
THIS_CODE, TORCHDISTILL, HND = "GHND, this code", "GHND, torchdistill", "HND, this code"


@dataclass(frozen=True)
class Plan:
    """How much is trained and evaluated."""

    train_images: int = 256
    val_images: int = 48
    teacher_steps: int = 600
    epochs: int = 3
    seeds: tuple[int, ...] = (0, 1, 2)
    other_channels: tuple[int, ...] = (1, 6, 12)  # besides 3
    bits: tuple[int, ...] = (8, 6, 4, 3, 2, 1)
    other_bits: tuple[int, ...] = (8, 4, 2)       # of the students with other channels
    qualities: tuple[int, ...] = (50, 10, 5, 1)


QUICK = Plan(train_images=128, val_images=12, teacher_steps=150, epochs=2, seeds=(0, 1),
             other_channels=(6,), bits=(8, 4), other_bits=(4,), qualities=(10,))


def list_students(plan):
    """Return (row of the table, experiment) of every student, in the order of training."""
    base = replace(
        train.FASTERRCNN, epochs=plan.epochs, lr_drops=(plan.epochs - 1,), images_per_step=4,
        min_size=128, max_size=224)
    rows = {
        THIS_CODE: base,
        TORCHDISTILL: base,
        HND: replace(base, layer_weights=(1, 0, 0, 0)),
    }
    students = [(row, replace(experiment, seed=seed))
                for seed in plan.seeds for row, experiment in rows.items()]
    for channels in plan.other_channels:
        row = f"GHND, this code, {channels} channel{'s' * (channels > 1)}"
        experiment = replace(base, bottleneck_channels=channels)
        students += [(row, replace(experiment, seed=seed)) for seed in plan.seeds]
    return students


# ---- training ------------------------------------------------------------------------------------


def make_teacher(plan, data_dir, teacher_file):
    """Draw the data set and train its teacher, unless they are there."""
    if teacher_file.exists():
        return
    shutil.rmtree(data_dir, ignore_errors=True)
    drawn.write_dataset(data_dir, plan.train_images, plan.val_images, hard=True)
    teacher = drawn.train_teacher(
        "fasterrcnn", data_dir, plan.teacher_steps, min_size=128, max_size=224,
        report=distributed.log)
    models.save_checkpoint(teacher.state_dict(), teacher_file)


def train_here(experiment, data_dir, teacher_file, output_dir):
    """Train a student by this code; return the checkpoint after the last epoch."""
    # One image is enough to validate with: the last epoch counts, as with torchdistill, and not
    # the best one. All images are evaluated afterwards.
    train.run_experiment(
        experiment, data_dir=data_dir, output_dir=output_dir, teacher_ckpt=teacher_file,
        resume=True, device="cpu", workers=0, limit_val=1, log_every=20)
    return train.RunFolder(output_dir, experiment.arch).last


def train_by_torchdistill(experiment, data_dir, teacher_file, output_dir):
    """Train a student by torchdistill's distillation box; return the checkpoint."""
    config = box_config()
    config["num_epochs"] = experiment.epochs
    config["optimizer"]["kwargs"]["lr"] = experiment.lr
    config["scheduler"]["kwargs"] = {
        "milestones": list(experiment.lr_drops), "gamma": experiment.lr_drop_factor}

    teacher = models.load_teacher(
        experiment.arch, teacher_file, experiment.min_size, experiment.max_size)
    torch.manual_seed(experiment.seed)
    student = models.build_student(teacher, models.Bottleneck(experiment.bottleneck_channels))
    box = get_distillation_box(teacher, student, {}, config, CPU, None, False, 1.0)

    images, folder = data.load_train_split(data_dir, experiment.max_size, None)
    loader = data.train_loader(
        images, folder, experiment.images_per_step, experiment.seed, workers=0, device=CPU)
    for epoch in range(experiment.epochs):
        loader.batch_sampler.epoch = epoch
        box.pre_epoch_process(epoch=epoch)
        for step, batch in enumerate(loader, start=1):
            loss = box.forward_process([image / 255 for image in batch], None, None)
            box.post_forward_process(loss=loss)
            if step % 20 == 0:
                distributed.log(f"torchdistill: epoch {epoch} step {step} loss {loss.item():.4e}")
        box.post_epoch_process()

    checkpoint = output_dir / "torchdistill.pt"
    output_dir.mkdir(parents=True, exist_ok=True)
    models.save_checkpoint({"model": student.state_dict()}, checkpoint)
    return checkpoint


# ---- evaluation ----------------------------------------------------------------------------------


def evaluate_teacher(plan, data_dir, teacher_file):
    """Return the teacher's box AP, on the images and on JPEG files, and the files' mean bytes."""
    teacher = models.to_device(models.load_teacher("fasterrcnn", teacher_file, 128, 224), CPU)
    val = evaluate.ValSet(data_dir, teacher)
    metrics, _ = evaluate.evaluate(evaluate.whole(teacher), val, CPU)
    jpeg = [evaluate.measure_jpeg(teacher, quality, is_resized, val, CPU, 0)
            for is_resized in (False, True) for quality in plan.qualities]
    return {"AP": metrics["bbox"]["AP"], "file_bytes": evaluate.mean_file_bytes(val), "jpeg": jpeg}


def make_student(plan, row, experiment, data_dir, teacher_file, folder):
    """Train and evaluate a student; return its box AP, and rates where the plan has them."""
    train_student = train_by_torchdistill if row == TORCHDISTILL else train_here
    output_dir = folder / f"{row.replace(', ', '-').replace(' ', '-')}-{experiment.seed}"
    checkpoint = train_student(experiment, data_dir, teacher_file, output_dir)

    student, _ = models.load_student(checkpoint, experiment.min_size, experiment.max_size)
    models.to_device(student, CPU)
    val = evaluate.ValSet(data_dir, student)
    metrics, _ = evaluate.evaluate(evaluate.whole(student), val, CPU)
    bits = ()
    if row == THIS_CODE:
        bits = plan.bits
    elif row not in (TORCHDISTILL, HND):
        bits = plan.other_bits
    rate = [evaluate.measure_split(student, b, val, CPU, 0) for b in bits]
    shutil.rmtree(output_dir)  # 200 MB and more
    return {"row": row, "AP": metrics["bbox"]["AP"], "rate": rate, "experiment": asdict(experiment)}


def once(results, file, name, function):
    """Return a function's result, from the results in a file if it is there; else keep it there."""
    if name not in results:
        results[name] = function()
        file.write_text(json.dumps(results, indent=1) + "\n")
    return results[name]


# ---- the table and the curve ---------------------------------------------------------------------


def spread(values):
    """Return "mean ± deviation" of some AP."""
    text = f"{np.mean(values):.3f}"
    return f"{text} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else text


def rates(students, row):
    """Return [(bits, mean bytes, list of AP)] of a row's students, as far as they have rates."""
    by_bits = {}
    for student in students:
        for rate in student["rate"] if student["row"] == row else ():
            by_bits.setdefault(rate["bits"], []).append(rate)
    return [(bits, float(np.mean([rate["payload_bytes"] for rate in found])),
             [rate["metrics"]["bbox"]["AP"] for rate in found]) for bits, found in by_bits.items()]


def print_table(teacher, students):
    """Print, as Markdown, the AP of every row and of every rate."""
    def line(name, ap, sent, each=""):
        share = f"{sent:,.0f} ({sent / teacher['file_bytes']:.0%})" if sent else ""
        print(f"| {name} | {ap} | {share} | {each} |")

    print("\n| what detects | box AP | bytes an image | each seed |\n| --- | --- | --- | --- |")
    line("teacher", f"{teacher['AP']:.3f}", teacher["file_bytes"])
    rows = list(dict.fromkeys(student["row"] for student in students))
    for row in rows:
        aps = [student["AP"] for student in students if student["row"] == row]
        line(row, spread(aps), None, " ".join(f"{ap:.3f}" for ap in aps))
    for row in rows:
        for bits, sent, aps in rates(students, row):
            line(f"{row}, {bits} bit{'s' * (bits > 1)} a value", spread(aps), sent)
    for jpeg in teacher["jpeg"]:
        resized = "resized, " * jpeg["is_resized"]
        line(f"teacher, {resized}JPEG of quality {jpeg['quality']}",
             f"{jpeg['metrics']['bbox']['AP']:.3f}", jpeg["payload_bytes"])


def draw_curve(teacher, students, path):
    """Draw box AP over bytes an image: students, and the teacher on JPEG files."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for row in dict.fromkeys(student["row"] for student in students):
        found = rates(students, row)
        if not found:
            continue
        label = "student, 3 channels" if row == THIS_CODE else f"student, {row.split(', ')[-1]}"
        axes.errorbar(
            [sent for _, sent, _ in found], [np.mean(aps) for _, _, aps in found],
            yerr=[np.std(aps, ddof=1) if len(aps) > 1 else 0 for _, _, aps in found],
            marker="o", capsize=3, linewidth=2.5 if row == THIS_CODE else 1, label=label)
        for bits, sent, aps in found if row == THIS_CODE else ():
            axes.annotate(f"{bits} bit" + "s" * (bits > 1), (sent, np.mean(aps)), xytext=(6, -12),
                          textcoords="offset points", fontsize=8)
    for is_resized, style, label in (
            (False, "k--s", "teacher on JPEG files"), (True, "k:d", "teacher on resized JPEG files")):
        found = [jpeg for jpeg in teacher["jpeg"] if jpeg["is_resized"] == is_resized]
        axes.plot([jpeg["payload_bytes"] for jpeg in found],
                  [jpeg["metrics"]["bbox"]["AP"] for jpeg in found], style, label=label)
    axes.axhline(teacher["AP"], color="grey", linewidth=1, label="teacher on the images")
    axes.set(xscale="log", xlabel="bytes an image", ylabel="box AP", ylim=(0, 1))
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description="Train students by this code and torchdistill.")
    parser.add_argument("--quick", action="store_true", help="a few minutes, to see that it runs")
    parser.add_argument(
        "--folder", type=Path,
        help="where everything goes, and from where it goes on (outcome, or outcome-quick)")
    args = parser.parse_args()
    plan = QUICK if args.quick else Plan()
    folder = args.folder or Path("outcome-quick" if args.quick else "outcome")
    folder.mkdir(parents=True, exist_ok=True)
    data_dir, teacher_file, file = folder / "data", folder / "teacher.pt", folder / "results.json"

    results = json.loads(file.read_text()) if file.exists() else {}
    settings = json.loads(json.dumps(asdict(plan)))
    if once(results, file, "plan", lambda: settings) != settings:
        sys.exit(f"{file} is of another plan; remove {folder}, or give another --folder")
    once(results, file, "machine", partial(describe_machine, CPU))

    make_teacher(plan, data_dir, teacher_file)
    teacher = once(results, file, "teacher", partial(evaluate_teacher, plan, data_dir, teacher_file))
    distributed.log(f"teacher: box AP {teacher['AP']:.3f}")
    students = []
    for row, experiment in list_students(plan):
        name = f"{row}, seed {experiment.seed}"
        students.append(once(results, file, name, partial(
            make_student, plan, row, experiment, data_dir, teacher_file, folder)))
        distributed.log(f"{name}: box AP {students[-1]['AP']:.3f}")
    print_table(teacher, students)
    draw_curve(teacher, students, folder / "curve.jpg")
    print(f"\n{file}, {folder / 'curve.jpg'}")


if __name__ == "__main__":
    distributed.run(main)
