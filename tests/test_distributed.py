"""Collectives, devices, the log, and how errors end one process or several."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import distributed
from distributed import InputError


def collectives():
    assert distributed.set_up("cpu") == torch.device("cpu")
    rank, world_size = distributed.rank(), distributed.world_size()
    assert distributed.on_main(lambda x: (x, rank), 5) == (5, 0)
    assert distributed.on_main_first(lambda: rank) == rank
    assert distributed.gather([rank] * rank) == [[r] * r for r in range(world_size)]
    values = torch.tensor([1.0, rank])
    assert distributed.sum_over_processes(values).tolist() == [world_size, sum(range(world_size))]
    assert values.tolist() == [1, rank]
    norm = torch.nn.BatchNorm1d(2)
    norm.running_mean += rank + 1
    norm.weight.data.fill_(rank)
    distributed.broadcast_buffers(norm)
    assert norm.running_mean.tolist() == [1, 1] and norm.weight.tolist() == [rank, rank]
    distributed.log(f"said by {rank}")


@pytest.mark.parametrize("world_size", [None, 3])
def test_collectives(world_size, finish):
    assert finish(collectives, world_size=world_size).out == "said by 0\n"


@pytest.mark.parametrize("gpus, variables, index", [
    (4, {"LOCAL_RANK": "3"}, 3), (4, {"RANK": "5"}, 1), (4, {}, 0), (0, {}, None),
    (1, {"LOCAL_RANK": "2"}, 0),  # it sees its own alone, as other launchers than torchrun do it
    (1, {"LOCAL_RANK": "2", "TORCHELASTIC_RUN_ID": "x"}, None), (2, {"LOCAL_RANK": "2"}, None)])
def test_a_process_takes_a_gpu_of_its_own(gpus, variables, index, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name in ("RANK", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if index is None:
        with pytest.raises(InputError, match=rf"this machine shows {gpus} GPU\(s\)"):
            distributed.choose_gpu()
    else:
        assert distributed.choose_gpu() == index


def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


@pytest.mark.parametrize("open_stdout", [closed_pipe, lambda: open("/dev/full", "w"), lambda: None])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # closing fails, too
def test_a_run_with_a_log_goes_on_without_its_terminal(open_stdout, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", open_stdout())
    monkeypatch.setattr(distributed, "log_file", None)
    distributed.log_to(tmp_path / "log")
    for text in ("one", "two"):
        distributed.run(lambda: distributed.log(text))
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line.split()[2] for line in lines] == ["one", "two"]


@pytest.mark.parametrize("path, name", [(None, "stdout"), (Path("/dev/full"), "/dev/full")])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_cannot_be_written_anywhere_is_an_error(path, name, monkeypatch):
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))
    monkeypatch.setattr(distributed, "log_file", None)
    distributed.log_to(path)
    with pytest.raises(InputError, match=f"^{name} cannot be written: No space left on device$"):
        distributed.log("a figure")


def fail():
    """Fail on the main process for all, or on one process alone, as the flags say."""
    distributed.set_up("cpu")
    _, kind, where = sys.argv
    if where == "for all":
        distributed.on_main(raise_error, kind)
    if where == str(distributed.rank()):
        raise_error(kind)
    distributed.gather(None)  # wait for the others


def raise_error(kind):
    raise (InputError if kind == "InputError" else ValueError)("the reason")


@pytest.mark.parametrize("where, world_size", [
    ("for all", None), ("for all", 3), ("0", 2), ("1", 3)])
def test_an_input_error_is_told_once_in_one_line(where, world_size, start):
    job = start(fail, "InputError", where, world_size=world_size)
    statuses = job.wait(60)
    assert 1 in statuses and 0 not in statuses
    assert job.err.count("test_distributed.py: error: the reason\n") == 1
    if where == "for all":
        assert job.err.count("\n") == 1 and set(statuses) == {1}


def test_any_other_error_keeps_its_traceback(start):
    job = start(fail, "ValueError", 1, world_size=2)
    assert 1 in job.wait(60) and ": error: " not in job.err
    assert "Traceback" in job.err and "ValueError: the reason" in job.err


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
