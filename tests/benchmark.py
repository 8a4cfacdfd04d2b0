"""Compare with torchdistill: training step, loading, start-up, evaluation. By hand, not by pytest.

    python tests/benchmark.py [step load start evaluate] [--large] [--device cuda] [--json FILE]

Medians, ranges, and how many times better than the original: for the step torchdistill 1.1.5's box,
for the data set its 0.0.1 in a process of its own, for detection torchvision's own forward.
"""

import argparse
import contextlib
import copy
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import drawn
import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch.nn.functional import interpolate
from torchvision.transforms.functional import to_pil_image

import data
import distributed
import evaluate
import models
import train

ORIGINAL, OURS, BF16, LAYOUT = "torchdistill", "ours", "ours, --amp bf16", "ours, other layout"
COMPILED, COMPILED_BF16 = "ours, --compile", "ours, --compile --amp bf16"
NOT_FOLDED, FLOOR = "ours, FrozenBatchNorm2d not folded", "floor: the convolutions of ours alone"

# ---- measuring and reporting ---------------------------------------------------------------------
def clock(function, *args):
    """Return the seconds that a function takes, with all that it has started on a GPU."""
    begin = time.perf_counter()
    function(*args)
    torch.cuda.is_initialized() and torch.cuda.synchronize()
    return time.perf_counter() - begin


def alternate(rounds, *functions):
    """Call functions in turn, after a round to warm up; return seconds, (functions, rounds)."""
    return np.array([[clock(f) for f in functions] for _ in range(1 + rounds)])[1:].T


def apart(function, *args):
    """Call a function of this file in a new process, which has its memory to itself."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def memory(key):
    """Return MiB that this process holds: VmRSS now, VmHWM at most since clear_refs was written."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 2**10


def report(results, file, bench, name, values, unit, original=None):
    """Print a row, the median of the values and its ratio to the original's, and keep it."""
    values, ratio = np.atleast_1d(values), None
    end = f"{values.min():.4g} to {values.max():.4g}" if len(values) > 1 else ""
    if original is not None:
        ratio = (np.median(original) / np.median(values)) ** (-1 if unit == "images/s" else 1)
        end = f"{end:19}{ratio:.2f} x"
    print(f"{bench:9}{name:61}{np.median(values):>9.4g} {unit:9}{end}".rstrip(), flush=True)
    results["rows"].append({"bench": bench, "name": name, "unit": unit, "ratio": ratio,
                            "median": np.median(values), "rounds": values.tolist()})
    file.write_text(json.dumps(results, indent=1) + "\n")


def describe_machine(device):
    """Return what timings depend on, {what: value}."""
    cpu = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    cpu = cpu.partition("model name\t: ")[2].split("\n")[0] or platform.processor()
    found = {"CPU": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
             "capability": torch.backends.cpu.get_cpu_capability(), "date": time.strftime("%F"),
             "bf16": models.has_bf16(device)}
    if device.type == "cuda":
        found = {"GPU": torch.cuda.get_device_name(device), **found}
    packages = ("torch", "torchvision", "torchdistill", "numpy")
    return found | {package: importlib.metadata.version(package) for package in packages}


def call_original(*command):
    """Run a command of original.py under torchdistill 0.0.1; return the JSON of its last line."""
    lines = subprocess.check_output([sys.executable, ROOT / "tests" / "original.py", *command],
                                    env=os.environ | {"PYTHONPATH": os.environ["TMPDIR"]})
    return np.array(json.loads(lines.splitlines()[-1]))


def pictures(count):
    """Return uint8 (3, 480, 640) pictures with some structure."""
    coarse = 255 * torch.rand(count, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    return [interpolate(c[None], (480, 640), mode="bilinear")[0].byte() for c in coarse]


# ---- the training step ---------------------------------------------------------------------------
def convolutions(step):
    """Return a function that repeats the convolutions of a step, forward and backward."""
    calls, seen = [], {}  # one tensor of each shape will do

    class Note(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "convolution" in function.name():
                calls.append((function, [seen.setdefault((a.shape, a.stride()), a.detach())
                                         if isinstance(a, torch.Tensor) else a for a in args]))
            return function(*args, **kwargs or {})

    with Note():
        step()
    return torch.no_grad()(lambda: [function(*args) for function, args in calls])


def other_layout(device):
    """Return a context in which models.memory_format decides the other way."""
    layout = {torch.channels_last, torch.contiguous_format} - {models.memory_format(device)}
    return mock.patch.object(models, "memory_format", lambda device, chosen=layout.pop(): chosen)


def make_step(name, device, checkpoint, min_size, max_size, batch):
    """Return a function that makes one training step, the original's or ours, on pictures."""
    teacher = models.load_teacher("fasterrcnn", Path(checkpoint), min_size, max_size)
    student, images = models.build_student(teacher), pictures(batch)
    if name == ORIGINAL:
        import test_parity
        from torchdistill.core.distillation import get_distillation_box

        teacher = copy.deepcopy(teacher).to(device)  # frozen layers twice, as there
        box = get_distillation_box(teacher, student.to(device), {}, test_parity.box_config(),
                                   device, None, False, 1.0)
        box.pre_epoch_process(epoch=0)
        teacher.eval()
        images = [image / 255 for image in images]  # as its loader gives them

        def original():
            loss = box.forward_process([image.to(device) for image in images], None, None)
            box.post_forward_process(loss=loss)
            loss.item()  # its loop logs every step

        return original
    changed = other_layout(device) if name == LAYOUT else contextlib.nullcontext()
    if name == NOT_FOLDED:
        changed = mock.patch.object(models, "fold_frozen_bn", copy.deepcopy)
    with changed:
        for detector in (teacher, student):
            models.to_device(detector, device)
        bf16, compiled = name in (BF16, COMPILED_BF16), name in (COMPILED, COMPILED_BF16)
        bodies = models.training_bodies(student, teacher, bf16=bf16)
        for body in bodies * compiled:
            body.compile(dynamic=True)
    experiment = replace(train.FASTERRCNN, images_per_step=batch)
    loader = torch.utils.data.DataLoader(images, batch, collate_fn=list)
    run = train.Run(student, *train.build_optimizer(student, experiment))

    def ours():
        run.step = 0
        with changed:
            train.train_epoch(
                experiment, run, *bodies, teacher.transform, loader, lambda record: None,
                lambda: None, amp="bf16" if bf16 else None, compiled=compiled)

    return convolutions(ours) if name == FLOOR else ours


def peak(*what):
    """Return MiB that two steps take at most: all of a GPU's, or what they add to this process."""
    step = make_step(*what)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of making the models
    before = memory("VmRSS")
    alternate(1, step)  # two steps, the second with Adam's state
    return torch.cuda.max_memory_allocated() / 2**20 or memory("VmHWM") - before


def bench_step(args, device, folder, row):
    bf16_names = [BF16, COMPILED_BF16] if args.bf16 else []
    names = [ORIGINAL, OURS, COMPILED, *bf16_names, LAYOUT, NOT_FOLDED, FLOOR]
    for min_size, max_size, batch in args.sizes + [[800, 1333, 4]] * args.large:
        what = device, args.teacher, min_size, max_size, batch
        steps = [make_step(name, *what) for name in names]
        times, original = alternate(args.rounds, *steps), None
        for name, seconds in zip(names, times):
            row(f"{batch} images at {min_size}/{max_size}, {name}", seconds, "s", times[0])
        del steps
        for name in (ORIGINAL, OURS, COMPILED, *bf16_names):
            mib = apart(peak, name, *what)
            original = original or mib
            row(f"{name}, peak memory", mib, "MiB", original)


# ---- data ----------------------------------------------------------------------------------------
def write_coco(folder, count, files):
    """Write a COCO-layout training set of so many images, which share so many files."""
    for i, picture in enumerate(pictures(files)):
        to_pil_image(picture).save(folder / "train2017" / f"{i:012d}.jpg", quality=90)
    images = json.dumps([{"id": i + 1, "file_name": f"{i % files:012d}.jpg", "license": 3, "height":
                          480, "width": 640, "coco_url": "images/"} for i in range(count)])
    outline = (200.5 + 75 * np.exp(np.arange(22) * np.pi / 11j)).view(float).round(2).tolist()
    shape = json.dumps({"segmentation": [outline], "area": 17671.46, "iscrowd": 0,
                        "bbox": [125.5, 125.5, 150.25, 150.75], "category_id": 1})[1:]
    annotations = ", ".join(f'{{"id": {n}, "image_id": {n * 20 // 147 + 1}, {shape}'
                            for n in range(count * 147 // 20))  # 7.35 each
    (folder / "annotations" / "instances_train2017.json").write_text(
        f'{{"images": {images}, "annotations": [{annotations}], "categories": [{{"id": 1}}]}}')


def bench_load(args, device, folder, row):
    write_coco(folder, args.files, args.files)
    infos, images_folder = data.load_train_split(folder, 1333)
    images, threads, rounds = data.CocoImages(infos, images_folder), torch.get_num_threads(), []
    torch.set_num_threads(1)
    for _ in range(args.rounds):
        ours = [clock(lambda: [images[i, i % 2] for i in range(args.files)]) for _ in range(3)]
        rounds.append((1e3 * call_original("load", folder), 1e3 * min(ours) / args.files))
    torch.set_num_threads(threads)
    original, ours = zip(*rounds)
    row("torchdistill, load and prepare a 640 x 480 image, one thread", original, "ms")
    row("ours", ours, "ms", original)
    loader = data.train_loader(infos, images_folder, 4, 0, workers=2, device=device)
    speed = 4 * len(loader) / alternate(args.rounds, lambda: list(loader))[0]
    row("ours, by 2 workers that have started", speed, "images/s")


def start_ours(folder):
    """Return seconds and MiB that the training set takes until its first batch is known."""
    before, begin = memory("VmRSS"), time.perf_counter()
    infos, images_folder = data.load_train_split(folder, 1333)
    kept = data.CocoImages(infos, images_folder), data.GroupedBatches(infos, 4, 0, 3)
    next(iter(kept[1]))
    return time.perf_counter() - begin, memory("VmRSS") - before


def bench_start(args, device, folder, row):
    write_coco(folder, args.annotated, 1)
    original = call_original("start", folder)
    row(f"torchdistill, {args.annotated} annotated images, to the first batch", original[0], "s")
    row("torchdistill, memory for it of each process and worker", original[1], "MiB")
    seconds, mib = apart(start_ours, folder)
    row("ours", seconds, "s", original[0])
    row("ours, memory", mib, "MiB", original[1])
    command = [sys.executable, ROOT / "train.py", "--arch", "fasterrcnn", "--data-dir", folder,
               "--teacher-ckpt", args.teacher, "--output-dir", folder, "--device", args.device,
               "--min-size", "96", "--max-size", "160", "--workers", "0", "--log-every", "1"]
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        next(line for line in process.stdout if line.startswith("epoch 0 step 1/"))
        row("ours, from the command to a step at 96/160", time.perf_counter() - begin, "s")
        process.kill()
    row("of which imports", clock(subprocess.check_output, [*command[:2], "--help"]), "s")


# ---- evaluation ----------------------------------------------------------------------------------
@torch.inference_mode()
def detect(detector, images, device, plainly):
    """Detect alone, or plainly as torchvision's references do: its forward, then mask by mask."""
    for image in (image.to(device) / 255 for image in images):
        if plainly:
            for mask in detector([image])[0].get("masks", torch.empty(0)).cpu():
                coco_mask.encode(np.asfortranarray((mask[0] > 0.5).byte().numpy()))
        else:
            detector([image])


def bench_evaluate(args, device, folder, row):
    images = [data.read_image(path) for path in sorted((folder / "val2017").iterdir())]
    for arch, size in itertools.product(models.DETECTORS, [(96, 160)] + [(800, 1333)] * args.large):
        original = drawn.random_teacher(arch, [image / 255 for image in images], *size)
        detector = models.to_device(copy.deepcopy(original), device)
        val, n = evaluate.ValSet(folder, detector), len(images)
        student = models.build_student(detector)
        with other_layout(device):
            turned = models.to_device(copy.deepcopy(student), device)
        # no workers: to start some takes time
        ours = partial(evaluate.evaluate, evaluate.whole(student), val, device)
        halves = partial(evaluate.measure_split, student, 8, val, device, 0)
        plain, ours, halves, alone, turned = alternate(
            args.rounds, partial(detect, original.to(device), images, device, True), ours, halves,
            *(partial(detect, model, images, device, False) for model in (student, turned)))
        row(f"{arch} at {size[0]}/{size[1]}, torchvision alone, the teacher", n / plain, "images/s")
        row("ours, with the figures, the student", n / ours, "images/s", n / plain)
        row("ours, split, 8 bits", n / halves, "images/s", n / ours)
        row("the student's detector alone", n / alone, "images/s", n / ours)
        row("the same in the other layout", n / turned, "images/s", n / ours)


BENCHES = {"step": bench_step, "load": bench_load, "start": bench_start,
           "evaluate": bench_evaluate}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("benches", nargs="*", metavar="BENCH", help="step, load, start, evaluate; default: all")
    flag("--large", action="store_true", help="800/1333 too")
    flag("--device", choices=["cpu", "cuda"], default="cpu")
    flag("--json", type=Path, metavar="FILE", default=os.devnull, help="write the results to it")
    flag("--sizes", nargs="*", default=[[320, 533, 4]], type=lambda s: [*map(int, s.split("/"))])
    for name, number in (("rounds", 3), ("files", 96), ("annotated", 117_000), ("images", 6)):
        flag(f"--{name}", type=int, default=number, metavar="N", help="%(default)s")
    args = parser.parse_args()
    device = distributed.set_up(args.device)
    results = {"machine": describe_machine(device), "rows": []}
    print(", ".join(f"{key} {value}" for key, value in results["machine"].items()), flush=True)
    with tempfile.TemporaryDirectory(prefix="ghnd-benchmark-") as folder:
        tempfile.tempdir = os.environ["TMPDIR"] = folder  # for whatever else makes folders
        args.teacher, args.bf16 = f"{folder}/teacher.pt", results["machine"]["bf16"]
        teacher = drawn.random_teacher("fasterrcnn", [torch.rand(3, 96, 128)], 96, 160)
        torch.save(teacher.state_dict(), args.teacher)
        if set(args.benches) - {"step"} or not args.benches:
            subprocess.check_call([sys.executable, "-m", "pip", "install", "-q", "--no-deps",
                                   "--target", folder, "torchdistill==0.0.1"])
        for name in args.benches or BENCHES:
            drawn.write_dataset(Path(folder, name), train=1, val=args.images)
            BENCHES[name](args, device, Path(folder, name), lambda *row: report(
                results, args.json, name, *row))


if __name__ == "__main__":
    main()
