"""A small COCO-layout data set, random teachers, and ways to run the scripts as a user does."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

import data
import distributed
import models

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ("fasterrcnn", "maskrcnn")
BEST = "coco2017-custom_{0}_resnet_fpn_from_{0}_resnet50_fpn.pt"
SIZES = {"min_size": 96, "max_size": 160}
SIZE_FLAGS = ["--min-size", "96", "--max-size", "160", "--device", "cpu", "--workers", "0"]
os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
FORK = multiprocessing.get_context("forkserver")  # processes that need not import torch again
FORK.set_forkserver_preload(["torchvision", "pycocotools.cocoeval", "pytest", "train"])


def process_of_a_run(main, argv, rank, processes, port, out, limit):
    """What torchrun would start: one process, in a process group of its own."""
    os.setsid()
    if processes:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                       "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": port, "TORCHELASTIC_RESTART_COUNT": "0"}
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of the loader's workers
    for number, suffix in ((1, ".out"), (2, ".err")):
        with open(f"{out}{suffix}", "a") as file:
            os.dup2(file.fileno(), number)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = argv
    distributed.run(main)


class Run:
    """A script's main in so many processes (None: not even one of torchrun's), started at once.

    limit: bytes that a file may grow to, as if the disk were full.
    """

    def __init__(self, main, flags, processes=None, limit=None, name=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.folder = tempfile.TemporaryDirectory(prefix="ghnd-run-")
        self.path = f"{self.folder.name}/log"
        argv = [name or f"{main.__module__}.py", *map(str, flags)]
        self.processes = [
            FORK.Process(target=process_of_a_run,
                         args=(main, argv, rank, processes, port, self.path, limit))
            for rank in range(processes or 1)]
        for process in self.processes:
            process.start()

    def text(self, suffix):
        path = Path(self.path + suffix)
        return path.read_text() if path.exists() else ""

    out = property(lambda self: self.text(".out"))
    err = property(lambda self: self.text(".err"))

    def wait(self, timeout=300):
        """Wait for the end, and end the others where one fails, as torchrun does; return statuses."""
        wait_for(lambda: any(p.exitcode for p in self.processes)
                 or all(p.exitcode == 0 for p in self.processes), timeout)
        if any(process.exitcode for process in self.processes):
            time.sleep(0.2)
            for process in self.processes:
                if process.exitcode is None:
                    process.terminate()
        for process in self.processes:
            process.join(60)
        return [process.exitcode for process in self.processes]

    def kill(self):
        """As a power cut does: every process and all that it started."""
        for process in self.processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:  # over, or not yet in a group of its own
                process.kill()
            process.join()


def wait_for(condition, timeout=120):
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < timeout
        time.sleep(0.01)


def finish(main, *flags, processes=None):
    """Run a script's main to its good end; returns the Run."""
    run = Run(main, flags, processes)
    assert run.wait() == [0] * (processes or 1), run.err
    return run


def run_script(script, *flags, nproc=None, cwd=None, more=(), timeout=300):
    """Run a script as a user does, under torchrun with nproc processes if given."""
    launcher = [sys.executable]
    if nproc:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}",
                     *more]
    return subprocess.run([*launcher, ROOT / script, *map(str, flags)], cwd=cwd, timeout=timeout,
                          capture_output=True, text=True)


@pytest.fixture
def call(monkeypatch, capfd):
    """Run a script's main in this process; returns (exit status, what it wrote to stderr)."""

    def call(main, *flags):
        monkeypatch.setattr("sys.argv", [f"{main.__module__}.py", *map(str, flags)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            distributed.run(main)
        return exit.value.code, capfd.readouterr().err

    return call


def records(folder, kind):
    """The records of a kind in a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def same(a, b):
    """Compare nested dicts and lists, tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def changed(path, edit):
    """Rewrite a JSON file by a function that edits its content in place."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def add_edge_cases(content):
    """Add what the drawn data set lacks: crowds, as RLE, one of them alone in its image."""
    annotated = {a["image_id"] for a in content["annotations"]}
    empty = next(i for i in content["images"] if i["id"] not in annotated)
    for image in (content["images"][0], empty):
        area = np.zeros((image["height"], image["width"]), dtype=np.uint8, order="F")
        area[10:100, 20:120] = 1
        rle = coco_mask.encode(area)
        content["annotations"].append({
            "id": len(content["annotations"]) + 1, "image_id": image["id"], "category_id": 1,
            "bbox": [20, 10, 100, 90], "area": 9000, "iscrowd": 1,
            "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}})


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory):
    os.environ["TORCH_HOME"] = str(tmp_path_factory.mktemp("home"))  # of the cached indices


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """36 training and 11 validation images: odd sizes, grey, crowds, some without annotations."""
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
    """For each architecture, a student's checkpoint as torchdistill wrote them: {"model": ...}."""
    folder, files = tmp_path_factory.mktemp("students"), {}
    for arch in ARCHS:
        torch.manual_seed(0)
        student = models.build_student(models.load_teacher(arch, teachers[arch]))
        files[arch] = folder / f"{arch}.pt"
        torch.save({"model": student.state_dict()}, files[arch])
    return files
