"""A small data set, random teachers and students, and ways to run the scripts as a user does."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path

import drawn
import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

import data
import distributed
import models

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ("fasterrcnn", "maskrcnn")
CPU = torch.device("cpu")
SIZES = {"min_size": 96, "max_size": 160}
SIZE_FLAGS = ["--min-size", "96", "--max-size", "160", "--device", "cpu", "--workers", "0"]
BEST = "coco2017-custom_{0}_resnet_fpn_from_{0}_resnet50_fpn.pt"
# One thread is as fast with small images. Detectors look at 40 places, as 1,000 take seconds.
torch.set_num_threads(1)
models.build_detector = partial(models.build_detector, rpn_post_nms_top_n_test=40)
os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))

# ---- running the scripts -------------------------------------------------------------------------

# Processes that start with torch already imported, which takes seconds.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch._dynamo", "conftest", "train"])


def start_process(main, argv, output, environment):
    """Run a script's main in a process of its own, with these variables in its environment."""
    os.setsid()  # a group of its own, so that a test can kill it with its loader's workers
    os.environ |= environment
    for descriptor, suffix in ((1, ".out"), (2, ".err")):
        with open(f"{output}{suffix}", "a") as file:
            os.dup2(file.fileno(), descriptor)
    sys.argv = argv
    distributed.run(main)


def find_free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


class Job:
    """A script's main, started in so many processes as torchrun does it; None: in one."""

    def __init__(self, folder, main, flags, world_size):
        port = find_free_port()
        self.output = folder / f"job-{port}"
        for suffix in (".out", ".err"):
            self.output.with_suffix(suffix).touch()
        argv = [f"{main.__module__}.py", *map(str, flags)]
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(world_size or 1))
        self.processes = []
        for rank in range(world_size or 1):
            ranks = dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
            args = (main, argv, self.output, environment | ranks)
            self.processes.append(PROCESSES.Process(target=start_process, args=args))
            self.processes[-1].start()

    out = property(lambda self: self.output.with_suffix(".out").read_text())
    err = property(lambda self: self.output.with_suffix(".err").read_text())

    def wait(self, timeout=300):
        """Wait for the end; where one fails, end the others, as torchrun does; return statuses."""
        end = time.monotonic() + timeout
        while any(p.exitcode is None for p in self.processes):
            assert time.monotonic() < end, "the processes hang"
            if any(p.exitcode for p in self.processes):
                for process in self.processes:
                    process.join(5)  # for what it has to say
                    process.terminate()
            self.processes[0].join(0.05)
        return [p.exitcode for p in self.processes]

    def kill(self):
        """Kill every process, and all that it started, as a power cut does."""
        for process in self.processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:  # it has ended, or has no group of its own yet
                process.kill()
            process.join()


@pytest.fixture
def start(tmp_path_factory):
    """A function that starts a Job; what is still running after the test is killed."""
    folder = tmp_path_factory.mktemp("jobs")
    jobs = []

    def start(main, *flags, world_size=None):
        jobs.append(Job(folder, main, flags, world_size))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()


@pytest.fixture
def finish(start):
    """A function that runs a Job to its good end, and returns it."""

    def finish(main, *flags, world_size=None):
        job = start(main, *flags, world_size=world_size)
        assert not any(job.wait()), job.err
        return job

    return finish


@pytest.fixture
def call(monkeypatch, capfd):
    """A function that runs a script's main in this process: (exit status, stdout, stderr).

    parts: main's other arguments, such as a bottleneck.
    """

    def call(main, *flags, **parts):
        monkeypatch.setattr("sys.argv", [f"{main.__module__}.py", *map(str, flags)])
        capfd.readouterr()
        status = 0
        try:
            distributed.run(lambda: main(**parts))
        except SystemExit as stop:
            status = stop.code
        return status, *capfd.readouterr()

    yield call
    distributed.log_to(None)


def records(folder, kind):
    """Return the records of a kind in the metrics.jsonl of a folder."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def same(a, b):
    """Return whether nested dicts and lists are equal, tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ---- data and detectors --------------------------------------------------------------------------


def edit_json(path, edit):
    """Rewrite a JSON file by a function that edits its content in place."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def encode(mask):
    """Return a mask (h, w) as COCO's compressed RLE, ready for JSON."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def add_crowds(content):
    """Add what the drawn data set lacks: crowds, as RLE, one of them alone in its image."""
    annotated = {annotation["image_id"] for annotation in content["annotations"]}
    empty = next(image for image in content["images"] if image["id"] not in annotated)
    for image in (content["images"][0], empty):
        mask = np.zeros((image["height"], image["width"]))
        mask[10:100, 20:120] = 1
        content["annotations"].append({
            "id": len(content["annotations"]) + 1, "image_id": image["id"], "category_id": 1,
            "bbox": [20, 10, 100, 90], "area": 9000, "iscrowd": 1, "segmentation": encode(mask)})


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """36 training and 11 validation images: odd sizes, grey, crowds, some without annotations."""
    folder = tmp_path_factory.mktemp("coco")
    drawn.write_dataset(folder, train=36, val=11, seed=1)
    for split in ("train", "val"):
        edit_json(folder / "annotations" / f"instances_{split}2017.json", add_crowds)
    return folder


@pytest.fixture
def own_dataset(dataset, tmp_path):
    """A copy of the data set that a test may damage."""
    return Path(shutil.copytree(dataset, tmp_path / "coco"))


@pytest.fixture(scope="session")
def teachers(dataset, tmp_path_factory):
    """For each architecture, a file with a random teacher's state dict."""
    images = [data.read_image(path) / 255 for path in sorted((dataset / "train2017").iterdir())[:3]]
    folder = tmp_path_factory.mktemp("teachers")
    state = drawn.random_teacher("fasterrcnn", images, **SIZES).state_dict()
    torch.manual_seed(0)
    for arch in ARCHS:
        teacher = models.build_detector(arch)
        teacher.load_state_dict(state, strict=False)  # masks stay random
        torch.save(teacher.state_dict(), folder / f"{arch}.pt")
    return {arch: folder / f"{arch}.pt" for arch in ARCHS}


@pytest.fixture(scope="session")
def checkpoints(teachers, tmp_path_factory):
    """For each architecture, a student's checkpoint with no more in it than {"model": ...}."""
    folder = tmp_path_factory.mktemp("students")
    for arch in ARCHS:
        torch.manual_seed(0)
        student = models.build_student(models.load_teacher(arch, teachers[arch]))
        torch.save({"model": student.state_dict()}, folder / f"{arch}.pt")
    return {arch: folder / f"{arch}.pt" for arch in ARCHS}
