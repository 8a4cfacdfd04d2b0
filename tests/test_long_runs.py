"""Runs that are killed, stopped, restarted, moved or run out of disk: what is left, and what follows."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SIZE_FLAGS, free_port, run

import distributed
import train

BEST = "coco2017-custom_fasterrcnn_resnet_fpn_from_fasterrcnn_resnet50_fpn.pt"
LAST, METRICS = "fasterrcnn/last.pt", "fasterrcnn/metrics.jsonl"
FORK = multiprocessing.get_context("forkserver")  # so that each process need not import torch again
FORK.set_forkserver_preload(["torchvision", "pycocotools.cocoeval", "pytest"])


def process_of_a_run(rank, world_size, port, flags, log, limit):
    """What torchrun would start, in a process group of its own."""
    os.setsid()
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of the loader's workers
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = ["train.py", *flags]
    with distributed.session():
        train.main()


class Run:
    """A run of train.py in so many processes; `log` is what all of them print."""

    def __init__(self, flags, log, world_size=2, limit=None):
        port = free_port()
        self.log = log
        log.write_text("")
        self.processes = [
            FORK.Process(
                target=process_of_a_run,
                args=(rank, world_size, port, list(map(str, flags)), log, limit),
            )
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def wait(self, timeout=300):
        """Wait for the end of all; returns their exit statuses."""
        for process in self.processes:
            process.join(timeout)
        return [process.exitcode for process in self.processes]

    def kill(self):
        """As a power cut does: every process and all that it started."""
        for process in self.processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:  # over, or not yet in a group of its own
                process.kill()
        self.wait()


def wait_for(condition, timeout=120):
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < timeout
        time.sleep(0.01)


MORE_STEPS = ("--images-per-step", "4", "--log-every", "4")  # 6 an epoch


@pytest.fixture(scope="module")
def flags(dataset, teachers):
    """Two epochs of two steps, reported after each second step only."""
    return [
        *("--arch", "fasterrcnn", "--data-dir", dataset, *SIZE_FLAGS),
        *("--teacher-ckpt", teachers["fasterrcnn"], "--epochs", "2", "--log-every", "2"),
        *("--limit-train", "24", "--limit-val", "2"),
    ]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The folder of a run never interrupted, of so many processes and with more flags."""
    runs = {}

    def whole(world_size, *more):
        if (world_size, more) not in runs:
            folder = runs[world_size, more] = tmp_path_factory.mktemp("whole")
            process = Run([*flags, *more, "--output-dir", folder], folder / "log", world_size)
            assert process.wait() == [0] * world_size, process.log.read_text()
        return runs[world_size, more]

    return whole


def metrics(folder):
    """The records of a run, without those of its speed."""
    speed = ("images_per_second", "data_wait", "peak_memory_mib", "eta_seconds")
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [{key: line[key] for key in line if key not in speed} for line in lines]


def assert_same_run(a, b):
    for name in (BEST, LAST):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    assert metrics(a) == metrics(b)
    files = {path.name for path in [*a.iterdir(), *(a / "fasterrcnn").iterdir()]}
    assert files - {"log"} == {BEST, "fasterrcnn", "last.pt", "metrics.jsonl", "train.log"}


def loadable(folder):
    """The whole checkpoints that are on disk."""
    found = [path for path in (folder / LAST, folder / BEST) if path.exists()]
    return [path for path in found if "model" in torch.load(path, weights_only=True)]


def test_twenty_kills_change_nothing(flags, whole, tmp_path):
    moments = random.Random(0)
    flags = [*flags, *MORE_STEPS, "--output-dir", tmp_path, "--resume", "--save-every-minutes", "0"]
    positions = []
    for kill in range(20):
        process = Run(flags, tmp_path / "log")
        if kill % 4:  # one in four strikes while it starts
            wait_for(lambda log=process.log: "2 processes x 1 x 2 images" in log.read_text())
        time.sleep(moments.uniform(0, 2.5))
        process.kill()
        if (tmp_path / LAST).exists():
            content = torch.load(tmp_path / LAST, weights_only=True)
            inside = content["position"] or {"step": 0}
            positions.append((content["progress"]["epoch"], inside["step"]))
    assert Run(flags, tmp_path / "log").wait() == [0, 0], (tmp_path / "log").read_text()
    assert_same_run(tmp_path, whole(2, *MORE_STEPS))
    assert positions == sorted(positions) and len(set(positions)) > 4, positions


def test_sigterm_under_torchrun(flags, whole, tmp_path):
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"),
        *map(str, (ROOT / "train.py", *flags, "--output-dir", tmp_path, "--epochs", "1000")),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (tmp_path / METRICS).exists() and (tmp_path / METRICS).read_text())
    begin = time.monotonic()
    process.terminate()
    _, errors = process.communicate(timeout=120)
    assert time.monotonic() - begin < 30 and process.returncode != 0
    assert errors.count("train.py: error: stopped by SIGTERM; it can be continued with\n") == 1
    assert "    torchrun --nproc_per_node=3 " in errors and " --epochs 1000 --resume\n" in errors
    assert loadable(tmp_path)
    flags = [*flags, "--output-dir", tmp_path, "--resume"]
    assert Run(flags, tmp_path / "log", 3).wait() == [0, 0, 0], (tmp_path / "log").read_text()
    assert_same_run(tmp_path, whole(3))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_within_an_epoch(number, flags, whole, tmp_path):
    """It may reach only one of the processes, and its loader's workers as well."""
    flags = [*flags, *MORE_STEPS, "--output-dir", tmp_path, "--log-every", "1"]
    process = Run(flags, tmp_path / "log")
    wait_for(lambda: (tmp_path / METRICS).exists() and (tmp_path / METRICS).read_text())
    begin = time.monotonic()
    os.killpg(process.processes[1].pid, number)
    assert process.wait() == [128 + number] * 2 and time.monotonic() - begin < 30
    told = process.log.read_text()
    assert told.count(f"train.py: error: stopped by {signal.Signals(number).name}; ") == 1
    assert told.endswith(" --resume\n") and "Traceback" not in told
    content = torch.load(tmp_path / LAST, weights_only=True)
    assert content["position"]["epoch"] == 0 and 1 <= content["position"]["step"] <= 6
    assert Run([*flags, "--resume"], tmp_path / "log").wait() == [0, 0]
    assert (tmp_path / BEST).read_bytes() == (whole(2, *MORE_STEPS) / BEST).read_bytes()


def test_another_number_of_processes_starts_the_epoch_again(flags, whole, tmp_path):
    flags = [*flags, *MORE_STEPS, "--output-dir", tmp_path]
    process = Run([*flags, "--log-every", "1"], tmp_path / "log", 1)
    wait_for(lambda: (tmp_path / METRICS).exists() and (tmp_path / METRICS).read_text())
    os.kill(process.processes[0].pid, signal.SIGTERM)
    assert process.wait() == [143]
    assert torch.load(tmp_path / LAST, weights_only=True)["position"]["step"] > 0
    process = Run([*flags, "--resume"], tmp_path / "log", 2)
    assert process.wait() == [0, 0], process.log.read_text()
    assert "written by 1 processes within epoch 0, which 2 cannot take" in process.log.read_text()
    assert_same_run(tmp_path, whole(2, *MORE_STEPS))


def test_two_runs_never_write_to_one_folder(flags, tmp_path):
    flags = [*flags, *MORE_STEPS, "--output-dir", tmp_path, "--epochs", "1000"]
    process = Run(flags, tmp_path / "log", 1)
    wait_for(lambda: (tmp_path / METRICS).exists() and (tmp_path / METRICS).read_text())
    second = run("train.py", *flags, "--resume", "--overwrite")
    assert second.returncode == 1 and second.stderr == (
        f"train.py: error: {tmp_path / 'fasterrcnn'} is being written by another run; wait for its "
        "end or name another folder by --output-dir\n"
    )
    os.kill(process.processes[0].pid, signal.SIGTERM)
    assert process.wait() == [143] and loadable(tmp_path)


DYING = """
import os, sys
from pathlib import Path
import torch
sys.path.insert(0, {root!r})
import distributed, train
step, died = torch.optim.Adam.step, Path({folder!r}) / "died"
steps = 0
def dying_step(self, *args):
    global steps
    steps += 1
    if steps == 2 and os.environ["RANK"] == "1" and len(died.read_text()) < {times}:
        died.write_text(died.read_text() + "x")
        os.kill(os.getpid(), 9)
    return step(self, *args)
torch.optim.Adam.step = dying_step
with distributed.session():
    train.main()
"""


@pytest.mark.parametrize("restarts, times", [(0, 1), (2, 2)])
def test_a_process_that_dies(restarts, times, flags, whole, tmp_path):
    (tmp_path / "died").write_text("")
    script = tmp_path / "dying.py"
    script.write_text(DYING.format(root=str(ROOT), folder=str(tmp_path), times=times))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *(f"--max-restarts={restarts}", "--monitor-interval=0.1"),
        *map(str, (script, *flags, "--output-dir", tmp_path / "out", "--resume")),
        *("--save-every-minutes", "0"),
    ]
    begin = time.monotonic()
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (tmp_path / "died").read_text() == "x" * times
    assert "train.py" not in process.stderr  # as a traceback of ours would have it
    assert process.stderr.count("error: another process died; what follows tells which") == times
    assert loadable(tmp_path / "out")
    if restarts:
        assert process.returncode == 0, process.stderr
        assert "resuming at epoch 0 after step 1" in process.stdout
        assert_same_run(tmp_path / "out", whole(2))
    else:
        assert process.returncode != 0 and time.monotonic() - begin < 60
        assert "Signal 9 (SIGKILL) received by PID" in process.stderr


def test_a_full_disk(flags, whole, tmp_path):
    """As if the disk were full: no file may grow beyond 1 MiB, or beyond metrics.jsonl's size."""
    out = tmp_path / "out"
    shutil.copytree(whole(2), out)
    before = {name: (out / name).read_bytes() for name in (BEST, LAST, METRICS)}
    more = [*flags, "--output-dir", out, "--resume", "--epochs", "3", "--workers", "0"]
    process = Run(more, tmp_path / "log", limit=2**20)
    assert process.wait() == [1, 1]
    told = process.log.read_text()
    assert told.count(f"train.py: error: {out / LAST} cannot be written: ") == 1, told
    assert "Traceback" not in told
    assert {name: (out / name).read_bytes() for name in (BEST, LAST)} == {
        name: before[name] for name in (BEST, LAST)
    }
    assert not list(out.rglob(".*"))  # no half-written file is left to fill it further
    many = b"".join(before[METRICS].splitlines(True)[:-1]) * 50  # but for the test's record
    (out / METRICS).write_bytes(many)
    process = Run(more, tmp_path / "log", limit=len(many))
    assert process.wait() == [1, 1]
    told = process.log.read_text()
    assert told.count(f"train.py: error: {out / METRICS} cannot be written: ") == 1, told
    assert (out / METRICS).read_bytes() == many
    assert loadable(out) == [out / LAST, out / BEST]


def test_a_signal_is_not_told_as_saved_on_a_full_disk(flags, tmp_path):
    """The process that has nothing to write must not be the first to tell how it went."""
    flags = [*flags, *MORE_STEPS, "--output-dir", tmp_path, "--log-every", "1"]
    process = Run(flags, tmp_path / "log", limit=2**20)
    wait_for(lambda: (tmp_path / METRICS).exists() and (tmp_path / METRICS).read_text())
    os.kill(process.processes[1].pid, signal.SIGTERM)
    assert process.wait() == [1, 1]
    told = process.log.read_text()
    assert told.count(f"train.py: error: {tmp_path / LAST} cannot be written: ") == 1, told
    assert "stopped by" not in told and not (tmp_path / LAST).exists()


def test_a_stopped_evaluation(dataset, checkpoints):
    command = [sys.executable, ROOT / "evaluate.py", "--ckpt", checkpoints["fasterrcnn"]]
    command += ["--data-dir", dataset, *SIZE_FLAGS]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "11 images" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (143, "evaluate.py: error: stopped by SIGTERM\n")


def test_checking_a_data_set(own_dataset):
    good = run("data.py", own_dataset, "--workers", "2")
    assert good.returncode == 0 and good.stderr == ""
    assert "train2017: 36 images, 32 of them to train with, none with problems" in good.stdout
    folder = own_dataset / "train2017"
    (folder / "000000000003.jpg").unlink()
    whole = (folder / "000000000004.jpg").read_bytes()
    (folder / "000000000004.jpg").write_bytes(whole[: len(whole) // 3])
    shutil.copy(folder / "000000000006.jpg", folder / "000000000005.jpg")
    (own_dataset / "annotations" / "instances_val2017.json").write_text("{")
    bad = run("data.py", own_dataset, "--workers", "2")
    assert bad.returncode == 1 and bad.stderr == "data.py: error: 4 problems, listed above\n"
    for text in (
        f"image {folder / '000000000003.jpg'} is missing",
        f"image {folder / '000000000004.jpg'} cannot be decoded",
        f"image {folder / '000000000005.jpg'} is ",
        "instances_val2017.json is no whole JSON file",
        "train2017: 36 images, 32 of them to train with, 3 with problems",
    ):
        assert bad.stdout.count(text) == 1, bad.stdout
