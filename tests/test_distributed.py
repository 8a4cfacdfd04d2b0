import io
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import distributed
from distributed import InputError

# ---- collectives ---------------------------------------------------------------------------------


def collectives():
    assert distributed.set_up("cpu") == torch.device("cpu")
    rank, world_size = distributed.rank(), distributed.world_size()
    assert distributed.on_main(lambda x: (x, rank), 5) == (5, 0)
    assert distributed.gather([rank] * rank) == [[r] * r for r in range(world_size)]
    mine = torch.tensor([1.0, rank])
    assert distributed.sum_over_processes(mine).tolist() == [world_size, sum(range(world_size))]
    assert mine.tolist() == [1, rank]
    norm = torch.nn.BatchNorm1d(2)
    norm.running_mean += rank + 1
    norm.weight.data.fill_(rank)
    distributed.broadcast_buffers(norm)
    assert norm.running_mean.tolist() == [1, 1] and norm.weight.tolist() == [rank, rank]
    distributed.log(f"said by {rank}")
    distributed.write_line(sys.stdout, f"done {rank}")


@pytest.mark.parametrize("world_size", [None, 2, 3])
def test_collectives(world_size, finish):
    job = finish(collectives, world_size=world_size)
    assert job.out.count("said by") == 1 and "said by 0" in job.out
    assert all(job.out.count(f"done {rank}\n") == 1 for rank in range(world_size or 1))


def test_too_few_gpus_are_told_by_the_first_process_of_a_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    for local_rank in range(3):
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        with pytest.raises(InputError, match="this machine has 2 GPUs for 3 processes") as error:
            distributed.set_up("cuda")
        assert error.value.on_all_processes == (local_rank > 0)


@pytest.mark.parametrize("local_rank, gpus, index", [(0, 4, 0), (3, 4, 3), (1, 1, 0)])
def test_a_process_that_sees_one_gpu_takes_that(local_rank, gpus, index, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    assert distributed.choose_gpu() == index


@pytest.mark.parametrize("variables, named", [
    ({"RANK": "0", "WORLD_SIZE": "2"}, "has RANK and WORLD_SIZE, but no MASTER_ADDR and no MASTER_P"),
    ({"WORLD_SIZE": "2"}, "has WORLD_SIZE, but no RANK"),
    ({"RANK": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "has RANK, but no WORLD_SIZE"),
    ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, "Slurm started 2 tasks")])
def test_what_another_launcher_left_is_named(variables, named, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    distributed.set_up("cpu")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=named):
        distributed.set_up("cpu")


# ---- logging -------------------------------------------------------------------------------------

LOGGING = """
import pathlib, sys, distributed
def main():
    with distributed.logging_to(pathlib.Path(sys.argv[1])):
        distributed.log("within, \u56fe")
    distributed.log("after")
distributed.log("before")
for _ in range(2):
    distributed.run(main)
"""


def test_lines_are_printed_once_and_logged_within_the_block(tmp_path):
    """Also by a terminal that lacks the letters, and where `run` is called twice."""
    path = tmp_path / "train.log"
    process = subprocess.run(
        [sys.executable, "-c", LOGGING, path], check=True, capture_output=True, text=True,
        env=os.environ | {"PYTHONIOENCODING": "cp1252"})
    assert process.stdout.splitlines() == ["before", *2 * ["within, \\u56fe", "after"]]
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 and all(line.endswith(" within, \u56fe") for line in lines)


def test_a_line_is_one_write(monkeypatch):
    """print makes two where Python is unbuffered, and lines of several processes mix."""
    stream = io.StringIO()
    writes = []
    monkeypatch.setattr(stream, "write", writes.append, raising=False)
    monkeypatch.setattr(sys, "stdout", stream)
    distributed.log("a line")
    assert writes == ["a line\n"]


# ---- errors --------------------------------------------------------------------------------------


def fail():
    """Fail on the process, or on all, that the command line names, in the way that it names."""
    distributed.set_up("cpu")
    way, who = sys.argv[1:]
    if way == "on_main":
        distributed.on_main(raise_input_error)
    elif who in ("all", str(distributed.rank())):
        if way == "InputError":
            raise InputError("the reason", on_all_processes=who == "all")
        torch.zeros(1).numpy().reshape(7)  # a ValueError of numpy's
    distributed.gather(None)  # wait for the others


def raise_input_error():
    raise InputError("the reason")


@pytest.mark.parametrize("way, who, world_size", [
    ("on_main", "all", None), ("on_main", "all", 3), ("InputError", "all", 3),
    ("InputError", "0", 2), ("InputError", "1", 3)])
def test_an_input_error_is_told_once_in_one_line(way, who, world_size, start):
    job = start(fail, way, who, world_size=world_size)
    statuses = job.wait(60)
    assert 1 in statuses and 0 not in statuses
    assert job.err.count("test_distributed.py: error: the reason\n") == 1
    if who == "all":
        assert job.err == "test_distributed.py: error: the reason\n"
        assert statuses == [1] * (world_size or 1)


@pytest.mark.parametrize("world_size", [None, 2])
def test_any_other_error_keeps_its_traceback(world_size, start):
    job = start(fail, "numpy", str((world_size or 1) - 1), world_size=world_size)
    assert 1 in job.wait(60)
    assert "Traceback" in job.err and 'reshape(7)' in job.err
    assert "ValueError: cannot reshape array" in job.err and ": error: " not in job.err


def write_to_a_full_disk():
    with distributed.logging_to(distributed.Path("/dev/full")):
        distributed.log("a line")


def test_a_full_disk_is_named(start):
    job = start(write_to_a_full_disk)
    assert job.wait(60) == [1]
    assert job.err.endswith("error: /dev/full cannot be written: No space left on device\n")
    assert job.err.count("\n") == 1


def wait_long():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    print("waiting", flush=True)
    time.sleep(60)


def test_an_interrupt_is_one_line(start):
    job = start(wait_long)
    while "waiting" not in job.out:
        time.sleep(0.1)
    os.kill(job.processes[0].pid, signal.SIGINT)
    assert job.wait(60) == [130] and job.err == "test_distributed.py: stopped\n"
