import subprocess
import sys

import pytest
import torch
from conftest import ROOT

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
    print(f"done {rank}\n", end="", flush=True)


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


LOGGING = """
import pathlib, sys, distributed
with distributed.logging_to(pathlib.Path(sys.argv[1])):
    distributed.log("within")
distributed.log("after")
"""


def test_what_is_logged_in_a_block_goes_to_its_file(tmp_path):
    """In a Python of its own, whose logging nothing has set up."""
    subprocess.run([sys.executable, "-c", LOGGING, tmp_path / "train.log"], check=True)
    assert (tmp_path / "train.log").read_text().splitlines()[0].endswith(" within")
    assert "after" not in (tmp_path / "train.log").read_text()


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


def test_scripts_need_nothing_that_windows_lacks():
    """Neither fcntl nor signals that only Unix has."""
    for script in ROOT.glob("*.py"):
        text = script.read_text()
        assert "fcntl" not in text and "SIGUSR" not in text and "os.fork" not in text
