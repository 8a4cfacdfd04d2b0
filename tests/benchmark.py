"""Compare with torchdistill: training step, loading, start-up, evaluation. By hand, not in the suite.

    python tests/benchmark.py [step load start evaluate] [--device cuda] [--json FILE]

Alternating in one process, medians; for figures of memory, one process each. torchdistill 1.1.5's real
distillation box with the published configuration; its data set and evaluation code, which are no
part of that package, are 0.0.1's, in a process of their own. See README for the figures.
"""

import argparse
import copy
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import unittest.mock
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.io

import data
import evaluate
import models
import train

HERE = Path(__file__).resolve().parent


def clock(function, device=torch.device("cpu")):
    begin = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def alternate(functions, rounds, device=torch.device("cpu")):
    """Run each function in turn, after one round to warm up; returns {name: median seconds}."""
    times = {name: [] for name in functions}
    for i in range(rounds + 1):
        for name, function in functions.items():
            seconds = clock(function, device)
            if i:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def pictures(count, h, w, seed=0):
    """uint8 (3, h, w) pictures with some structure."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        coarse = torch.from_numpy(rng.integers(0, 256, (1, 3, h // 16 + 1, w // 16 + 1))).float()
        smooth = F.interpolate(coarse, (h, w), mode="bilinear")[0]
        yield (
            (smooth + torch.from_numpy(rng.normal(0, 10, (3, h, w)))).clamp(0, 255).to(torch.uint8)
        )


# ---- the training step


class Loader(list):
    """As much of a DataLoader as train_epoch needs, for batches at hand."""

    def __init__(self, batches):
        super().__init__(batches)
        self.batch_sampler = argparse.Namespace(batch_size=len(batches[0]), epoch=0)


def make_steps(min_size, max_size, device, images):
    """Functions that each do one training step on a batch: the original's, ours, ours in bfloat16."""
    import test_parity
    from torchdistill.core.distillation import get_distillation_box

    teacher = models.random_teacher(
        "fasterrcnn", [image / 255 for image in images[:1]], 0, min_size, max_size
    )
    path = Path(tempfile.mkdtemp()) / "teacher.pt"
    torch.save(teacher.state_dict(), path)

    def pair():
        own = models.load_teacher("fasterrcnn", path, min_size, max_size)
        return own.to(device), models.build_student(own).to(device)

    def original():
        (own, _), (_, student) = pair(), pair()  # frozen layers twice, as there
        box = get_distillation_box(
            own, student, {}, test_parity.box_config(), device, None, False, 1.0
        )
        box.pre_epoch_process(epoch=0)
        own.eval()

        def step():
            loss = box.forward_process(
                [image.to(device).float() / 255 for image in images], None, None
            )
            box.post_forward_process(loss=loss)
            loss.item()  # its loop logs every step

        return step

    def ours(bf16=False, layout=torch.channels_last, fold=models.fold_frozen_bn):
        own, student = pair()
        with unittest.mock.patch.object(models, "fold_frozen_bn", fold):
            distiller = models.Distiller(own, student).to(memory_format=layout)
        optimizer = torch.optim.Adam(
            [p for p in distiller.student_stem.parameters() if p.requires_grad], lr=1e-3
        )
        experiment = replace(train.FASTERRCNN, images_per_step=len(images))

        def step():
            with unittest.mock.patch.object(torch, "channels_last", layout):
                train.train_epoch(
                    experiment,
                    distiller,
                    own.transform,
                    Loader([images]),
                    optimizer,
                    train.Position(0),
                    bf16,
                    100,
                    lambda **_: None,
                )

        return step

    def floor():
        own, student = pair()
        return convolutions(
            models.Distiller(own, student).to(memory_format=torch.channels_last),
            own.transform([image.to(device) / 255 for image in images])[0].tensors,
        )

    return {
        "original": original,
        "ours": ours,
        "ours bf16": lambda: ours(bf16=True),
        "ours not channels_last": lambda: ours(layout=torch.contiguous_format),
        "ours not folded": lambda: ours(fold=copy.deepcopy),
        "floor": floor,
    }


def convolutions(distiller, batch):
    """The step's convolutions with nothing else: forward, and the gradients that are needed."""
    calls = []

    def note(module, inputs, output):
        x = inputs[0].detach()
        mask = (
            output.requires_grad and inputs[0].requires_grad,
            module.weight.requires_grad,
            False,
        )
        calls.append(
            (x, module.weight.detach(), module.stride, module.padding, mask, output.detach())
        )

    hooks = [
        m.register_forward_hook(note) for m in distiller.modules() if isinstance(m, torch.nn.Conv2d)
    ]
    distiller(batch.contiguous(memory_format=torch.channels_last))
    for hook in hooks:
        hook.remove()

    def run():
        with torch.no_grad():
            for x, weight, stride, padding, mask, output in calls:
                F.conv2d(x, weight, None, stride, padding)
                if any(mask):
                    torch.ops.aten.convolution_backward(
                        output, x, weight, None, stride, padding, (1, 1), False, (0, 0), 1, mask
                    )

    return run


def bench_step(args, device):
    rows = {}
    for min_size, max_size, batch in args.sizes:
        images = list(pictures(batch, 480, 640))
        makers = make_steps(min_size, max_size, device, images)
        key = f"{min_size}/{max_size} x {batch}"
        rows[key] = alternate({name: make() for name, make in makers.items()}, args.rounds, device)
        if device.type == "cuda":
            for name in ("original", "ours", "ours bf16"):
                step = makers[name]()
                torch.cuda.reset_peak_memory_stats()
                step()
                rows[key][f"{name} MiB"] = torch.cuda.max_memory_allocated() / 2**20
        elif batch == 4:
            for name in ("original", "ours", "ours bf16"):
                rows[key][f"{name} MiB"] = json.loads(
                    subprocess.run(
                        [
                            sys.executable,
                            __file__,
                            "peak",
                            "--name",
                            name,
                            "--min-size",
                            str(min_size),
                            "--max-size",
                            str(max_size),
                        ],
                        capture_output=True,
                        text=True,
                        check=True,
                    ).stdout.splitlines()[-1]
                )
    return rows


def peak(args, device):
    """Print the MiB by which three steps raise this process's peak over what it held before them."""
    images = list(pictures(4, 480, 640))
    step = make_steps(args.min_size, args.max_size, device, images)[args.name]()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making the models
    before = high_water()
    for _ in range(3):
        step()
    print(json.dumps(high_water() - before))


def high_water():
    """The most memory that this process has held since its peak was last forgotten, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


# ---- data


def write_coco(folder, images, annotations, files):
    """Write a COCO-layout training set: so many images and annotations, the first `files` as JPEGs."""
    rng = np.random.default_rng(0)
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / "train2017").mkdir(exist_ok=True)
    for i, picture in enumerate(pictures(files, 480, 640)):
        torchvision.io.write_jpeg(
            picture, str(folder / "train2017" / f"{i + 1:012d}.jpg"), quality=90
        )
    for i in range(files, images):
        (folder / "train2017" / f"{i + 1:012d}.jpg").symlink_to(f"{i % files + 1:012d}.jpg")
    owners = np.sort(rng.integers(1, images + 1, annotations)).tolist()
    with (folder / "annotations" / "instances_train2017.json").open("w") as file:
        file.write(
            '{"info": {}, "licenses": [], "categories": [{"id": 1, "name": "thing"}], "images": '
        )
        json.dump(
            [
                {
                    "license": 3,
                    "file_name": f"{i:012d}.jpg",
                    "coco_url": f"http://images/train2017/{i:012d}.jpg",
                    "height": 480,
                    "width": 640,
                    "date_captured": "2013-11-14 11:18:45",
                    "id": i,
                }
                for i in range(1, images + 1)
            ],
            file,
        )
        file.write(', "annotations": [')
        for n, owner in enumerate(owners):
            x, y = rng.uniform(0, 400), rng.uniform(0, 300)
            w, h = rng.uniform(10, 200, 2)
            angle = np.linspace(0, 2 * np.pi, 22, endpoint=False)
            outline = np.stack(
                [x + w / 2 * (1 + np.cos(angle)), y + h / 2 * (1 + np.sin(angle))], 1
            )
            annotation = {
                "segmentation": [outline.round(2).flatten().tolist()],
                "area": w * h * 0.78,
                "iscrowd": 0,
                "image_id": owner,
                "bbox": [x, y, w, h],
                "category_id": 1,
                "id": n + 1,
            }
            file.write(("," if n else "") + json.dumps(annotation))
        file.write("]}")


def call_original(args, *command):
    """Run a command of original.py under torchdistill 0.0.1; returns the JSON of its last line."""
    process = subprocess.run(
        [sys.executable, HERE / "original.py", *map(str, command)],
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(args.original)},
    )
    if process.returncode:
        sys.exit(process.stderr)
    return json.loads(process.stdout.splitlines()[-1])


def bench_load(args, device):
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    write_coco(folder, 256, 1880, 256)
    index, images_folder = data.load_split(folder, "train")
    images = data.CocoImages(index, images_folder)

    def ours():
        for position in range(len(images)):
            images[position, position % 2 == 0]

    rounds = [
        (call_original(args, "load", folder), min(clock(ours) for _ in range(3)) / len(images))
        for _ in range(3)
    ]
    rows = {
        "original, ms an image": 1e3 * statistics.median(r[0] for r in rounds),
        "ours, ms an image": 1e3 * statistics.median(r[1] for r in rounds),
    }
    for workers in args.workers:
        loader = data.train_loader(
            images, data.GroupedBatches(index, 4, 0, 1), workers, device.type == "cuda"
        )
        list(loader)  # the workers start
        seconds = statistics.median(clock(lambda loader=loader: list(loader)) for _ in range(5))
        rows[f"ours, {workers} workers, img/s"] = len(loader) * 4 / seconds
    return rows


def bench_start(args, device):
    folder = Path(tempfile.mkdtemp())
    write_coco(folder, 117_000, 860_000, 1)
    path = folder / "annotations" / "instances_train2017.json"
    rows = {"annotation file, MB": path.stat().st_size / 1e6}
    for name, (seconds, mib) in {
        "original": call_original(args, "start", folder),
        **{
            name: json.loads(
                subprocess.run(
                    [sys.executable, __file__, "start-ours", "--name", str(folder)],
                    text=True,
                    capture_output=True,
                    check=True,
                ).stdout.splitlines()[-1]
            )
            for name in ("ours, first time", "ours, cached")
        },
    }.items():
        rows[f"{name}, s"], rows[f"{name}, MiB held by the rank and again by each worker"] = (
            seconds,
            mib,
        )
    data.write_demo_dataset(folder / "demo", train=8, val=2)
    (folder / "demo" / "val2017").rename(folder / "val2017")
    val_file = Path("annotations", "instances_val2017.json")
    (folder / "demo" / val_file).rename(folder / val_file)
    sample = [picture / 255 for picture in pictures(2, 96, 128)]
    teacher = models.random_teacher("fasterrcnn", sample, 0, 96, 160)
    torch.save(teacher.state_dict(), folder / "teacher.pt")
    path.with_suffix(".index.npz").unlink()
    for name in ("first time", "cached"):
        rows[f"ours, {name}, from the command to the first step, s"] = first_step(folder, device)
    rows["of which importing, s"] = clock(
        lambda: subprocess.run([sys.executable, "-c", "import train"], cwd=HERE.parent, check=True)
    )
    return rows


def first_step(folder, device):
    """Seconds from train.py's command to its first line of progress."""
    command = [sys.executable, train.__file__, "--arch", "fasterrcnn", "--data-dir", folder]
    command += ["--teacher-ckpt", folder / "teacher.pt", "--output-dir", folder / "out"]
    command += ["--overwrite", "--min-size", "96", "--max-size", "160", "--log-every", "1"]
    begin = time.perf_counter()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen([*command, "--device", device.type], **pipes) as process:
        next(line for line in process.stdout if line.startswith("epoch 0 step 1/"))
        seconds = time.perf_counter() - begin
        process.terminate()
    return seconds


def start_ours(args, device):
    """Print seconds and MiB that the training data set takes until its first batch is known."""
    before = float(Path("/proc/self/statm").read_text().split()[1])
    begin = time.perf_counter()
    index, folder = data.load_split(Path(args.name), "train")
    images, batches = data.CocoImages(index, folder), data.GroupedBatches(index, 4, 0, 3)
    next(iter(batches))
    seconds = time.perf_counter() - begin
    assert len(images) > 100_000
    pages = float(Path("/proc/self/statm").read_text().split()[1]) - before
    print(json.dumps([seconds, pages * resource.getpagesize() / 2**20]))


# ---- evaluation


def bench_evaluate(args, device):
    """End to end, and what is left of it outside the detector, beside the original's for the same masks."""
    folder, rows = Path(tempfile.mkdtemp()), {}
    for count in args.images:
        data.write_demo_dataset(folder / str(count), train=8, val=count)
        sample = [
            data.read_image(p) / 255 for p in sorted((folder / str(count) / "train2017").iterdir())
        ]
        for arch in models.DETECTORS:
            teacher = models.random_teacher(arch, sample, 0, 96, 160).to(device)
            inside = 0.0

            def counted(images, teacher=teacher, forward=teacher.forward):
                nonlocal inside
                begin = time.perf_counter()
                output = forward(images)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                inside += time.perf_counter() - begin
                return output

            teacher.forward = counted
            val = evaluate.ValSet(folder / str(count))
            seconds = clock(lambda: evaluate.evaluate(teacher, val, device, args.workers[0]))  # noqa: B023
            rows[f"{arch}, {count} images, img/s"] = count / seconds
            rows[f"{arch}, {count} images, share of the detector"] = inside / seconds
    rng = np.random.default_rng(0)
    outputs = {}
    for i in range(20):
        corner, size = rng.uniform(0, 300, (100, 2)), rng.uniform(10, 170, (100, 2))
        boxes = torch.from_numpy(np.concatenate([corner, corner + size], 1)).float()
        masks = torch.zeros(100, 1, 480, 640)
        for mask, (x0, y0, x1, y1) in zip(masks[:, 0], boxes.int().tolist(), strict=True):
            patch = F.interpolate(torch.rand(1, 1, 28, 28), (y1 - y0, x1 - x0), mode="bilinear")[
                0, 0
            ]
            mask[y0:y1, x0:x1] = patch
        outputs[i + 1] = {
            "boxes": boxes,
            "labels": torch.ones(100, dtype=torch.int64),
            "masks": masks,
            "scores": torch.from_numpy(rng.random(100)).float(),
        }
    file = folder / "outputs.pt"
    torch.save(outputs, file)
    ours = [
        clock(lambda: [evaluate.to_coco(i, output) for i, output in outputs.items()]) / 20
        for _ in range(3)
    ]
    rows["original, 100 masks to results, ms an image"] = 1e3 * call_original(args, "masks", file)
    rows["ours, 100 masks to results, ms an image"] = 1e3 * statistics.median(ours)
    return rows


BENCHES = {"step": bench_step, "load": bench_load, "start": bench_start, "evaluate": bench_evaluate}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benches", nargs="*", default=list(BENCHES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--sizes",
        type=lambda text: [int(n) for n in text.split("/")],
        nargs="*",
        default=[[320, 533, 4], [800, 1333, 4]],
        help="min/max/batch",
    )
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2])
    parser.add_argument("--images", type=int, nargs="*", default=[100])
    parser.add_argument(
        "--original", type=Path, help="a folder with torchdistill 0.0.1; default: install it"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    parser.add_argument("--min-size", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--max-size", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.benches == ["peak"]:
        return peak(args, device)
    if args.benches == ["start-ours"]:
        return start_ours(args, device)
    if args.original is None and set(args.benches) - {"step"}:
        args.original = Path(tempfile.mkdtemp())
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "install",
                "-q",
                "--no-deps",
                "--target",
                args.original,
                "torchdistill==0.0.1",
            ],
            check=True,
        )
    versions = {
        name: importlib.metadata.version(name)
        for name in ("torch", "torchvision", "torchdistill", "numpy")
    }
    machine = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{platform.machine()}, {os.cpu_count()} cores"
    )
    results = {"machine": machine, "date": time.strftime("%Y-%m-%d"), **versions}
    print(results)
    for name in args.benches:
        results[name] = BENCHES[name](args, device)
        for key, value in results[name].items():
            print(f"{name}: {key}: ", end="")
            if isinstance(value, dict):
                ratio = value["original"] / value["ours"]
                print(
                    ", ".join(f"{k} {v:.4g}" for k, v in value.items()),
                    f"| ours {ratio:.2f} x faster",
                )
            else:
                print(f"{value:.4g}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
