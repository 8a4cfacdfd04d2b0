"""Time a training step beside torchdistill's. By hand.

    python tests/benchmark.py [--large] [--device cuda]

A time is the median of rounds in which all that are compared take turns.
"""

import argparse
import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import drawn
import numpy as np
import torch

import distributed
import losses
import models
import train

LAYERS = [f"seq.backbone.body.layer{i}" for i in (1, 2, 3, 4)]
TORCHDISTILL = "torchdistill"
OURS = {  # the other steps: (amp, compiled)
    "ours": (None, False), "ours, --compile": (None, True), "ours, --amp bf16": ("bf16", False),
    "ours, --compile --amp bf16": ("bf16", True)}


def alternate(rounds, functions):
    """Call functions in turn, after a round to warm up; return the median seconds of each."""
    seconds = np.zeros((1 + rounds, len(functions)))
    for row in seconds:
        for i, function in enumerate(functions):
            begin = time.perf_counter()
            function()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            row[i] = time.perf_counter() - begin
    return np.median(seconds[1:], axis=0)


def describe_machine(device):
    """Return what timings depend on, as one line."""
    cpuinfo = Path("/proc/cpuinfo")  # of Linux
    cpu = cpuinfo.read_text().partition("model name\t: ")[2] if cpuinfo.exists() else "a CPU"
    name = torch.cuda.get_device_name() if device.type == "cuda" else cpu.partition("\n")[0]
    return (f"{name}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} of "
            f"{os.cpu_count()} cores, torch {torch.__version__}")


def box_config():
    """The published configuration, as data: its train section without the data loaders."""
    def term(layer):
        student, teacher = ({"is_from_teacher": is_teacher, "module_path": layer, "io": "output"}
                            for is_teacher in (False, True))
        return {"criterion": {"key": "MSELoss", "kwargs": {"reduction": "sum"}}, "weight": 1.0,
                "criterion_wrapper": {"key": "SimpleLossWrapper",
                                      "kwargs": {"input": student, "target": teacher}}}

    def model(frozen, requires_grad):
        wrapper = {"key": "HeadRCNN", "kwargs": {"head_rcnn": {"sequential": ["backbone.body"]}}}
        return {"forward_proc": "forward_batch_only", "sequential": [], "frozen_modules": frozen,
                "requires_grad": requires_grad, "forward_hook": {"input": [], "output": LAYERS},
                "auxiliary_model_wrapper": wrapper}

    terms = {layer.rsplit(".")[-1]: term(layer) for layer in LAYERS}
    return {"num_epochs": 20, "train_data_loader": {}, "val_data_loader": {},
            "teacher": model([], False), "student": model(LAYERS[1:], True),
            "optimizer": {"key": "Adam", "kwargs": {"lr": 0.001}},
            "scheduler": {"key": "MultiStepLR", "kwargs": {"milestones": [5, 15], "gamma": 0.1}},
            "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}}}


def distillation_box(teacher, student, device, experiment):
    """Return torchdistill 1.1.5's distillation box for an experiment in one process."""
    from torchdistill.core.distillation import get_distillation_box

    config = box_config()
    config["num_epochs"] = experiment.epochs
    config["optimizer"]["kwargs"]["lr"] = experiment.lr
    config["scheduler"]["kwargs"] = {
        "milestones": list(experiment.lr_drops), "gamma": experiment.lr_drop_factor}
    return get_distillation_box(teacher, student, {}, config, device, None, False, 1.0)


def make_step(name, device, size):
    """Return a function that makes one training step with 4 images, of one of the names above."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(256, (3, 480, 640), dtype=torch.uint8, generator=generator)
              for _ in range(4)]
    teacher = drawn.random_teacher("fasterrcnn", [images[0] / 255], *size)
    student = models.build_student(teacher)
    experiment = replace(train.EXPERIMENTS["fasterrcnn"], images_per_step=4)
    if name == TORCHDISTILL:
        box = distillation_box(teacher.to(device), student.to(device), device, experiment)
        box.pre_epoch_process(epoch=0)
        images = [image / 255 for image in images]  # as its loader gives them

        def step():
            loss = box.forward_process([image.to(device) for image in images], None, None)
            box.post_forward_process(loss=loss)
            loss.item()  # its loop logs every step

        return step

    models.to_device(teacher, device)
    models.to_device(student, device)
    amp, compiled = OURS[name]
    optimizer, _ = train.build_optimizer(student, experiment)
    experiment = replace(experiment, amp=amp)
    step = train.build_step(student, teacher, experiment, losses.ghnd_loss, compiled)
    return partial(step, [images], optimizer)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", action="store_true", help="at 800/1333, as in the recipe")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    device = distributed.set_up(args.device)
    size = (800, 1333) if args.large else (320, 533)
    names = [TORCHDISTILL] + [
        name for name, (amp, _) in OURS.items() if models.has_bf16(device) or not amp]
    print(describe_machine(device))
    seconds = alternate(3, [make_step(name, device, size) for name in names])
    for name, value in zip(names, seconds):
        print(f"a step of 4 images at {size}, {name:27}{value:8.3f} s, {seconds[0] / value:.2f} x")


if __name__ == "__main__":
    main()
