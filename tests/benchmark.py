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
import losses
import models
import train

# The training steps that are compared, as they are called in the report.
ORIGINAL = "torchdistill"
OURS = "ours"
COMPILED = "ours, --compile"
BF16 = "ours, --amp bf16"
COMPILED_BF16 = "ours, --compile --amp bf16"
LAYOUT = "ours, other layout"
NOT_FOLDED = "ours, FrozenBatchNorm2d not folded"
FLOOR = "floor: the convolutions of ours alone"

# ---- measuring and reporting ---------------------------------------------------------------------
def clock(function, *args):
    """Return the seconds that a function takes, with all that it has started on a GPU."""
    begin = time.perf_counter()
    function(*args)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def alternate(rounds, *functions):
    """Call functions in turn, after a round to warm up; return seconds, (functions, rounds)."""
    seconds = [[clock(function) for function in functions] for _ in range(1 + rounds)]
    return np.array(seconds[1:]).T


def apart(function, *args):
    """Call a function of this file in a new process, which has its memory to itself."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def memory(key):
    """Return MiB that this process holds: VmRSS now, VmHWM at most since clear_refs was written."""
    status = Path("/proc/self/status").read_text()
    kib = status.split(f"{key}:")[1].split()[0]
    return int(kib) / 2**10


def report(results, file, bench, name, values, unit, original=None):
    """Print a row, the median of the values and its ratio to the original's, and keep it."""
    values = np.atleast_1d(values)
    median = np.median(values)
    line = f"{bench:9}{name:61}{median:>9.4g} {unit:9}"
    line += f"{values.min():.4g} to {values.max():.4g}".ljust(19) if len(values) > 1 else ""

    ratio = None
    if original is not None:  # how many times better
        ratio = np.median(original) / median
        if unit == "images/s":
            ratio = 1 / ratio
        line += f"{ratio:.2f} x"
    print(line.rstrip(), flush=True)

    results["rows"].append({
        "bench": bench, "name": name, "unit": unit, "ratio": ratio, "median": median,
        "rounds": values.tolist()})
    file.write_text(json.dumps(results, indent=1) + "\n")


def describe_machine(device):
    """Return what timings depend on, {what: value}."""
    cpu = platform.processor()
    if os.path.exists("/proc/cpuinfo"):  # of Linux, which names the model
        cpuinfo = Path("/proc/cpuinfo").read_text()
        cpu = cpuinfo.partition("model name\t: ")[2].split("\n")[0]
    found = {}
    if device.type == "cuda":
        found["GPU"] = torch.cuda.get_device_name(device)
    found |= {
        "CPU": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(), "date": time.strftime("%F"),
        "bf16": models.has_bf16(device)}
    for package in ("torch", "torchvision", "torchdistill", "numpy"):
        found[package] = importlib.metadata.version(package)
    return found


def call_original(*command):
    """Run a command of original.py under torchdistill 0.0.1; return the JSON of its last line."""
    output = subprocess.check_output(
        [sys.executable, ROOT / "tests" / "original.py", *command],
        env=os.environ | {"PYTHONPATH": os.environ["TMPDIR"]})  # main installed it there
    return np.array(json.loads(output.splitlines()[-1]))


def pictures(count):
    """Return uint8 (3, 480, 640) pictures with some structure."""
    coarse = 255 * torch.rand(count, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    return list(interpolate(coarse, (480, 640), mode="bilinear").byte())


# ---- the training step ---------------------------------------------------------------------------
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


def other_layout(device):
    """Return a context in which models.memory_format decides the other way."""
    layout = torch.channels_last
    if models.memory_format(device) == layout:
        layout = torch.contiguous_format
    return mock.patch.object(models, "memory_format", lambda device: layout)


def make_step(name, device, checkpoint, min_size, max_size, batch):
    """Return a function that makes one training step, the original's or ours, on pictures."""
    teacher = models.load_teacher("fasterrcnn", Path(checkpoint), min_size, max_size)
    student = models.build_student(teacher)
    if name == ORIGINAL:
        return make_original_step(device, teacher, student, pictures(batch))
    return make_our_step(name, device, teacher, student, pictures(batch))


def make_original_step(device, teacher, student, images):
    import test_parity  # here, since only this step needs torchdistill
    from torchdistill.core.distillation import get_distillation_box

    # The student shares the teacher's frozen layers; there, both have their own.
    teacher = copy.deepcopy(teacher).to(device)
    student.to(device)
    box = get_distillation_box(
        teacher, student, {}, test_parity.box_config(), device, None, False, 1.0)
    box.pre_epoch_process(epoch=0)
    teacher.eval()
    images = [image / 255 for image in images]  # as its loader gives them

    def step():
        loss = box.forward_process([image.to(device) for image in images], None, None)
        box.post_forward_process(loss=loss)
        loss.item()  # its loop logs every step

    return step


def make_our_step(name, device, teacher, student, images):
    changed = contextlib.nullcontext()
    if name == LAYOUT:
        changed = other_layout(device)
    if name == NOT_FOLDED:
        changed = mock.patch.object(models, "fold_frozen_bn", copy.deepcopy)
    bf16 = name in (BF16, COMPILED_BF16)
    compiled = name in (COMPILED, COMPILED_BF16)

    with changed:
        for detector in (teacher, student):
            models.to_device(detector, device)
        bodies = models.training_bodies(student, teacher, bf16=bf16)
    criterion = losses.ghnd_loss
    if compiled:
        for body in bodies:
            body.compile(dynamic=True)
        criterion = torch.compile(criterion, dynamic=True)
    experiment = replace(train.FASTERRCNN, images_per_step=len(images))
    loader = torch.utils.data.DataLoader(images, len(images), collate_fn=list)
    run = train.Run(student, *train.build_optimizer(student, experiment))

    def step():
        run.step = 0
        with changed:
            list(train.train_epoch(
                experiment, run, *bodies, teacher.transform, loader, criterion,
                amp="bf16" if bf16 else None))

    return convolutions(step) if name == FLOOR else step


def peak(*what):
    """Return MiB that two steps take at most: all of a GPU's, or what they add to this process."""
    step = make_step(*what)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of making the models
    before = memory("VmRSS")
    alternate(1, step)  # two steps, the second with Adam's state
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return memory("VmHWM") - before


def bench_step(args, device, folder, row):
    bf16_names = [BF16, COMPILED_BF16] if args.bf16 else []
    names = [ORIGINAL, OURS, COMPILED, *bf16_names, LAYOUT, NOT_FOLDED, FLOOR]
    sizes = list(args.sizes)
    if args.large:
        sizes.append([800, 1333, 4])
    for min_size, max_size, batch in sizes:
        what = device, args.teacher, min_size, max_size, batch
        steps = [make_step(name, *what) for name in names]
        times = alternate(args.rounds, *steps)
        for name, seconds in zip(names, times):
            row(f"{batch} images at {min_size}/{max_size}, {name}", seconds, "s", times[0])
        del steps

        original = apart(peak, ORIGINAL, *what)
        row(f"{ORIGINAL}, peak memory", original, "MiB", original)
        for name in (OURS, COMPILED, *bf16_names):
            row(f"{name}, peak memory", apart(peak, name, *what), "MiB", original)


# ---- data ----------------------------------------------------------------------------------------
def write_coco(folder, count, files):
    """Write a COCO-layout training set of so many images, which share so many files."""
    for i, picture in enumerate(pictures(files)):
        to_pil_image(picture).save(folder / "train2017" / f"{i:012d}.jpg", quality=90)
    images = [
        {"id": i + 1, "file_name": f"{i % files:012d}.jpg", "license": 3, "height": 480,
         "width": 640, "coco_url": "images/"}
        for i in range(count)]

    angles = np.arange(22) * np.pi / 11
    outline = 200.5 + 75 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    shape = {
        "segmentation": [outline.ravel().round(2).tolist()], "area": 17671.46, "iscrowd": 0,
        "bbox": [125.5, 125.5, 150.25, 150.75], "category_id": 1}
    annotations = [
        {"id": n, "image_id": n * 20 // 147 + 1, **shape}
        for n in range(count * 147 // 20)]  # 7.35 an image, as in COCO

    content = {"images": images, "annotations": annotations, "categories": [{"id": 1}]}
    with open(folder / "annotations" / "instances_train2017.json", "w") as file:
        json.dump(content, file)


def bench_load(args, device, folder, row):
    write_coco(folder, args.files, args.files)
    infos, images_folder = data.load_train_split(folder, 1333)
    images = data.CocoImages(infos, images_folder)

    def load_all():
        for i in range(args.files):
            images[i, i % 2]  # every second one flipped

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    original, ours = [], []
    for _ in range(args.rounds):
        original.append(1e3 * call_original("load", folder))
        ours.append(1e3 * min(clock(load_all) for _ in range(3)) / args.files)
    torch.set_num_threads(threads)
    row("torchdistill, load and prepare a 640 x 480 image, one thread", original, "ms")
    row("ours", ours, "ms", original)

    loader = data.train_loader(infos, images_folder, 4, 0, workers=2, device=device)
    seconds = alternate(args.rounds, lambda: list(loader))[0]
    row("ours, by 2 workers that have started", 4 * len(loader) / seconds, "images/s")


def start_ours(folder):
    """Return seconds and MiB that the training set takes until its first batch is known."""
    before = memory("VmRSS")
    begin = time.perf_counter()
    infos, images_folder = data.load_train_split(folder, 1333)
    images = data.CocoImages(infos, images_folder)
    batches = data.GroupedBatches(infos, 4, 0, 3)
    next(iter(batches))
    seconds, mib = time.perf_counter() - begin, memory("VmRSS") - before
    del images, batches  # not before the memory is read
    return seconds, mib


def bench_start(args, device, folder, row):
    write_coco(folder, args.annotated, 1)
    original = call_original("start", folder)
    row(f"torchdistill, {args.annotated} annotated images, to the first batch", original[0], "s")
    row("torchdistill, memory for it of each process and worker", original[1], "MiB")
    seconds, mib = apart(start_ours, folder)
    row("ours", seconds, "s", original[0])
    row("ours, memory", mib, "MiB", original[1])

    command = [
        sys.executable, ROOT / "train.py", "--arch", "fasterrcnn", "--data-dir", folder,
        "--teacher-ckpt", args.teacher, "--output-dir", folder / "run", "--device", args.device,
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
    for image in images:
        detections = detector([image.to(device) / 255])[0]
        if plainly and "masks" in detections:
            for mask in detections["masks"].cpu():
                coco_mask.encode(np.asfortranarray((mask[0] > 0.5).byte().numpy()))


def bench_evaluate(args, device, folder, row):
    images = [data.read_image(path) for path in sorted((folder / "val2017").iterdir())]
    sizes = [(96, 160)]
    if args.large:
        sizes.append((800, 1333))
    for arch, (min_size, max_size) in itertools.product(models.DETECTORS, sizes):
        original = drawn.random_teacher(arch, [image / 255 for image in images], min_size, max_size)
        teacher = models.to_device(copy.deepcopy(original), device)
        student = models.build_student(teacher)
        with other_layout(device):
            turned = models.to_device(copy.deepcopy(student), device)
        val = evaluate.ValSet(folder, teacher)
        original.to(device)

        # Without workers, since to start some takes time.
        seconds = alternate(
            args.rounds,
            lambda: detect(original, images, device, plainly=True),
            lambda: evaluate.evaluate(evaluate.whole(student), val, device),
            lambda: evaluate.measure_split(student, 8, val, device, 0),
            lambda: detect(student, images, device, plainly=False),
            lambda: detect(turned, images, device, plainly=False))
        plain, ours, halves, alone, other = len(images) / seconds
        name = f"{arch} at {min_size}/{max_size}"
        row(f"{name}, torchvision alone, the teacher", plain, "images/s")
        row("ours, with the figures, the student", ours, "images/s", plain)
        row("ours, split, 8 bits", halves, "images/s", ours)
        row("the student's detector alone", alone, "images/s", ours)
        row("the same in the other layout", other, "images/s", ours)


BENCHES = {
    "step": bench_step, "load": bench_load, "start": bench_start, "evaluate": bench_evaluate}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("benches", nargs="*", metavar="BENCH", help="step, load, start, evaluate; default: all")
    add("--large", action="store_true", help="800/1333 too")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--json", type=Path, metavar="FILE", default=os.devnull, help="write the results to it")
    add("--sizes", nargs="*", metavar="MIN/MAX/IMAGES", default=[[320, 533, 4]],
        type=lambda text: [int(part) for part in text.split("/")],
        help="of the training steps (320/533/4)")
    add("--rounds", type=int, default=3, metavar="N", help="of each timing (%(default)s)")
    add("--files", type=int, default=96, metavar="N", help="images to load (%(default)s)")
    add("--annotated", type=int, default=117_000, metavar="N",
        help="images of the annotation file to start with (%(default)s)")
    add("--images", type=int, default=6, metavar="N", help="images to evaluate (%(default)s)")
    args = parser.parse_args()
    benches = args.benches or list(BENCHES)

    device = distributed.set_up(args.device)
    results = {"machine": describe_machine(device), "rows": []}
    args.bf16 = results["machine"]["bf16"]
    print(", ".join(f"{key} {value}" for key, value in results["machine"].items()), flush=True)

    with tempfile.TemporaryDirectory(prefix="ghnd-benchmark-") as folder:
        tempfile.tempdir = os.environ["TMPDIR"] = folder  # for whatever else makes folders
        args.teacher = f"{folder}/teacher.pt"
        teacher = drawn.random_teacher("fasterrcnn", [torch.rand(3, 96, 128)], 96, 160)
        torch.save(teacher.state_dict(), args.teacher)
        if benches != ["step"]:
            subprocess.check_call([
                sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder,
                "torchdistill==0.0.1"])
        for name in benches:
            bench_folder = Path(folder, name)
            drawn.write_dataset(bench_folder, train=1, val=args.images)
            BENCHES[name](args, device, bench_folder, partial(report, results, args.json, name))


if __name__ == "__main__":
    main()
