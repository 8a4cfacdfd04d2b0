"""Time a training step and an evaluation beside torchdistill's and torchvision's. By hand.

    python tests/benchmark.py [step evaluate] [--large] [--device cuda]

A time is the median of rounds in which all that are compared take turns.
"""

import argparse
import importlib.metadata
import multiprocessing
import os
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import drawn
import numpy as np
import torch
from pycocotools import mask as coco_mask

import data
import distributed
import evaluate
import losses
import models
import train

TORCHDISTILL, FLOOR = "torchdistill", "the convolutions of ours alone"
OURS = {  # the other steps: (amp, compiled)
    "ours": (None, False), "ours, --compile": (None, True), "ours, --amp bf16": ("bf16", False),
    "ours, --compile --amp bf16": ("bf16", True), FLOOR: (None, False)}


def alternate(rounds, functions):
    """Call functions in turn, after a round to warm up; return the median seconds of each."""
    seconds = np.zeros((1 + rounds, len(functions)))
    for place in np.ndindex(seconds.shape):
        begin = time.perf_counter()
        functions[place[1]]()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        seconds[place] = time.perf_counter() - begin
    return np.median(seconds[1:], axis=0)


def describe_machine(device):
    """Return what timings depend on, as one line."""
    cpuinfo = Path("/proc/cpuinfo")  # of Linux
    cpu = cpuinfo.read_text().partition("model name\t: ")[2] if cpuinfo.exists() else "a CPU"
    gpu = [torch.cuda.get_device_name(device)] if device.type == "cuda" else []
    versions = [f"{package} {importlib.metadata.version(package)}"
                for package in ("torch", "torchvision", "torchdistill", "numpy")]
    return ", ".join([*gpu, cpu.split("\n")[0], torch.backends.cpu.get_cpu_capability(),
                      f"{torch.get_num_threads()} threads on {os.cpu_count()} cores", *versions])


# ---- the training step ---------------------------------------------------------------------------


def distillation_box(teacher, student, device, experiment):
    """Return torchdistill 1.1.5's distillation box for an experiment in one process."""
    from test_parity import box_config
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

    for detector in (teacher, student):
        models.to_device(detector, device)
    amp, compiled = OURS[name]
    optimizer, _ = train.build_optimizer(student.train(), experiment)
    experiment = replace(experiment, amp=amp)
    step = train.build_step(student, teacher, experiment, losses.ghnd_loss, compiled)
    step = partial(step, [images], optimizer)
    return convolutions(step) if name == FLOOR else step


def convolutions(step):
    """Return a function that repeats the convolutions of a step, forward and backward."""
    calls = []
    kept = {}  # one tensor of each shape and stride will do

    def keep(arg):
        if isinstance(arg, torch.Tensor):
            return kept.setdefault((arg.shape, arg.stride()), arg.detach())
        return arg

    class Note(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "convolution" in function.name():
                calls.append((function, [keep(arg) for arg in args]))
            return function(*args, **kwargs or {})

    with Note():
        step()

    @torch.no_grad()
    def repeat():
        for function, args in calls:
            function(*args)

    return repeat


def peak(*what):
    """Return MiB that two steps need at most: on a GPU or, with all else, of this process."""
    alternate(1, [make_step(*what)])  # the second with Adam's state
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10


def bench_step(args, device):
    size = (800, 1333) if args.large else (320, 533)
    names = [TORCHDISTILL] + [
        name for name, (amp, _) in OURS.items() if models.has_bf16(device) or not amp]
    seconds = alternate(args.rounds, [make_step(name, device, size) for name in names])
    for name, value in zip(names, seconds):
        with multiprocessing.get_context("spawn").Pool(1) as apart:  # has its memory to itself
            mib = apart.apply(peak, (name, device, size))
        distributed.log(f"a step of 4 images at {size}, {name:31}{value:8.3f} s, "
                        f"{seconds[0] / value:.2f} x, {mib:6.0f} MiB")


# ---- evaluation ----------------------------------------------------------------------------------


@torch.inference_mode()
def detect(detector, images, device):
    """Detect as torchvision's references do: by its forward, then encode mask by mask."""
    for image in images:
        for mask in detector([image.to(device) / 255])[0].get("masks", ()):
            coco_mask.encode(np.asfortranarray((mask[0] > 0.5).byte().cpu().numpy()))


def bench_evaluate(args, device):
    size = (800, 1333) if args.large else (96, 160)
    for arch in models.DETECTORS:
        with tempfile.TemporaryDirectory() as folder:
            drawn.write_dataset(Path(folder), train=0, val=6)
            images = [data.read_image(path) for path in sorted(Path(folder, "val2017").iterdir())]
            teacher = drawn.random_teacher(arch, [image / 255 for image in images], *size)
            student = models.to_device(models.build_student(teacher), device)
            val = evaluate.ValSet(Path(folder), student)
            seconds = alternate(args.rounds, [
                partial(detect, teacher.to(device), images, device),
                partial(evaluate.evaluate, evaluate.whole(student), val, device, title=arch)])
        for name, value in zip(("torchvision's forward", "ours, with metrics"), seconds):
            distributed.log(f"{arch} at {size}, {name:21}{len(images) / value:8.3f} images/s, "
                            f"{seconds[0] / value:.2f} x")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    benches = {"step": bench_step, "evaluate": bench_evaluate}
    parser.add_argument("benches", nargs="*", help="step, evaluate; default: both")
    parser.add_argument("--large", action="store_true", help="at 800/1333, as in the recipe")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=3, help="of timing (%(default)s)")
    args = parser.parse_args()
    device = distributed.set_up(args.device)
    distributed.log(describe_machine(device))
    for name in args.benches or benches:
        benches[name](args, device)


if __name__ == "__main__":
    main()
