"""A small COCO-layout data set, random teachers, and a way to run the scripts as a user does."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.io
from pycocotools import mask as coco_mask

import data
import distributed
import models

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ("fasterrcnn", "maskrcnn")
SIZES = {"min_size": 96, "max_size": 160}
SIZE_FLAGS = ["--min-size", "96", "--max-size", "160", "--device", "cpu", "--workers", "1"]


def run(script, *flags, nproc=None, cwd=None, env=None, timeout=900):
    """Run a script, under torchrun with nproc processes if given; returns the CompletedProcess."""
    launcher = [sys.executable]
    if nproc:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    command = [
        *launcher,
        str(script if Path(script).is_absolute() else ROOT / script),
        *map(str, flags),
    ]
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        timeout=timeout,
        capture_output=True,
        text=True,
    )


def free_port():
    """A port for processes that no torchrun starts, as MASTER_PORT wants it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def figures_of(process):
    """The figures that evaluate.py prints in its last line."""
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def changed(path, edit):
    """Rewrite a JSON file by a function that edits its content in place."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def add_edge_cases(content):
    """Add what the drawn data set lacks: crowds, as RLE, one of them alone in its image."""
    empty = next(
        i
        for i in content["images"]
        if i["id"] not in {a["image_id"] for a in content["annotations"]}
    )
    for image in (content["images"][0], empty):
        area = np.zeros((image["height"], image["width"]), dtype=np.uint8, order="F")
        area[10:100, 20:120] = 1
        rle = coco_mask.encode(area)
        content["annotations"].append(
            {
                "id": len(content["annotations"]) + 1,
                "image_id": image["id"],
                "category_id": 1,
                "bbox": [20, 10, 100, 90],
                "area": 9000,
                "iscrowd": 1,
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
            }
        )


@pytest.fixture
def sessions_here(monkeypatch):
    """Let distributed.session run in this process: no os._exit, and signals as they were."""
    numbers = (*distributed.SIGNALS, signal.SIGCHLD)
    handlers = {number: signal.getsignal(number) for number in numbers}
    monkeypatch.setattr("os._exit", sys.exit)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """36 training and 11 validation images: odd sizes, greyscale, crowds, some without annotations."""
    folder = tmp_path_factory.mktemp("coco")
    data.write_demo_dataset(folder, train=36, val=11, seed=1)
    for split in ("train", "val"):
        changed(folder / "annotations" / f"instances_{split}2017.json", add_edge_cases)
    return folder


@pytest.fixture
def own_dataset(dataset, tmp_path):
    """A copy of the data set that a test may damage."""
    return Path(shutil.copytree(dataset, tmp_path / "coco"))


@pytest.fixture(scope="session")
def teachers(dataset, tmp_path_factory):
    """For each architecture, a file with a random teacher's state dict."""
    images = [data.read_image(path) / 255 for path in sorted((dataset / "train2017").iterdir())[:6]]
    folder, files = tmp_path_factory.mktemp("teachers"), {}
    for arch in ARCHS:
        files[arch] = folder / f"{arch}.pt"
        torch.save(models.random_teacher(arch, images, 0, **SIZES).state_dict(), files[arch])
    return files


@pytest.fixture(scope="session")
def checkpoints(teachers, tmp_path_factory):
    """For each architecture, a student's checkpoint as torchdistill wrote them: a dict with 'model'."""
    folder, files = tmp_path_factory.mktemp("students"), {}
    for arch in ARCHS:
        torch.manual_seed(0)
        student = models.build_student(models.load_teacher(arch, teachers[arch]))
        files[arch] = folder / f"{arch}.pt"
        torch.save({"model": student.state_dict()}, files[arch])
    return files


@pytest.fixture(scope="session")
def same_size_dataset(tmp_path_factory):
    """12 training images of one size, so that no micro-batch is padded; 2 validation images."""
    folder = tmp_path_factory.mktemp("same_size")
    data.write_demo_dataset(folder, train=12, val=2, seed=2)
    rng = np.random.default_rng(0)

    def edit(content):
        for image in content["images"]:
            image["width"], image["height"] = 128, 96
            pixels = torch.from_numpy(rng.integers(0, 256, (3, 96, 128), dtype=np.uint8))
            torchvision.io.write_jpeg(pixels, str(folder / "train2017" / image["file_name"]))
            content["annotations"].append({**content["annotations"][0], "image_id": image["id"]})

    changed(folder / "annotations" / "instances_train2017.json", edit)
    return folder
