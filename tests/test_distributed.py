import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import free_port, run

import distributed

COLLECTIVES = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
import distributed
from distributed import log
with distributed.session():
    device = distributed.start("cpu")
    rank, world = distributed.rank(), distributed.world_size()
    assert device.type == "cpu" and distributed.is_main() == (rank == 0)
    assert distributed.broadcast({"rank": rank}) == {"rank": 0}
    gathered = distributed.gather([rank] * rank)
    assert gathered == [[r] * r for r in range(world)]
    assert distributed.total(torch.tensor([1.0, rank])).tolist() == [world, sum(range(world))]
    norm = torch.nn.BatchNorm1d(2)
    norm.running_mean += rank + 1
    norm.num_batches_tracked += rank
    weight = norm.weight.detach().clone()
    distributed.broadcast_buffers(norm)
    assert norm.running_mean.tolist() == [1, 1] and norm.num_batches_tracked == 0
    assert torch.equal(norm.weight, weight)
    marker = Path(sys.argv[2])
    with distributed.main_first():
        if rank == 0:
            time.sleep(1)
            marker.touch()
        assert marker.exists()
    log(f"said by {rank}")
    print(f"done {rank}")
"""

FAILURE = """
import sys, time
sys.path.insert(0, sys.argv[1])
import torch
import distributed
with distributed.session():
    distributed.start("cpu")
    distributed.log_to(sys.argv[2])
    if distributed.rank() == 1:
        raise {error}
    distributed.total(torch.zeros(1))  # waits for rank 1, in vain
"""

LATE = """
import sys, time
sys.path.insert(0, sys.argv[1])
import distributed
with distributed.session():
    distributed.start("cpu")
    print("before")
    time.sleep(distributed.rank() == int(sys.argv[2]))
    raise ValueError("the reason")
"""

SLOW_TO_JOIN = """
import sys, time
sys.path.insert(0, sys.argv[1])
import torch.distributed as dist
import distributed
rendezvous = dist.rendezvous
dist.rendezvous = lambda url: time.sleep(3 * distributed.rank()) or rendezvous(url)
with distributed.session():
    raise ValueError("the reason")
"""


@pytest.mark.parametrize("nproc", [None, 2, 3])
def test_collectives(nproc, tmp_path):
    (tmp_path / "script.py").write_text(COLLECTIVES)
    process = run(
        tmp_path / "script.py", Path(distributed.__file__).parent, tmp_path / "marker", nproc=nproc
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("said by") == 1 and "said by 0" in process.stdout
    for rank in range(nproc or 1):
        assert process.stdout.count(f"done {rank}") == 1


@pytest.mark.parametrize(
    "error, traceback", [("ValueError('the reason')", False), ("RuntimeError('the reason')", True)]
)
def test_a_process_that_fails_ends_the_others_with_its_reason_told_once(error, traceback, tmp_path):
    (tmp_path / "script.py").write_text(FAILURE.replace("{error}", error))
    script, log = tmp_path / "script.py", tmp_path / "log"
    process = run(script, Path(distributed.__file__).parent, log, nproc=3, timeout=120)
    assert process.returncode != 0
    assert "the reason" in log.read_text()  # the main process's, who was told
    assert (
        process.stderr.count("script.py: error: ") == 1 and process.stderr.count("the reason") >= 1
    )
    assert (f"in <module>\n    raise {error}" in process.stderr) == traceback
    assert "Connection closed" not in process.stderr


@pytest.mark.parametrize("late", [0, 1])
def test_without_torchrun_the_one_with_the_store_may_leave_first(late, tmp_path):
    (tmp_path / "script.py").write_text(LATE)
    command = [sys.executable, tmp_path / "script.py", Path(distributed.__file__).parent, str(late)]
    env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = [
        subprocess.Popen(
            command,
            env=env | {"RANK": rank, "LOCAL_RANK": rank, "PYTHONUNBUFFERED": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    outputs, errors = zip(*(process.communicate(timeout=120) for process in processes))
    assert outputs == ("before\n", "before\n")
    assert sorted(errors) == ["", "script.py: error: the reason\n"]
    assert [process.returncode for process in processes] == [1, 1]


def test_a_process_that_torchrun_stops_while_it_starts_has_nothing_to_tell(tmp_path):
    (tmp_path / "script.py").write_text(SLOW_TO_JOIN)
    process = run(tmp_path / "script.py", Path(distributed.__file__).parent, nproc=2, timeout=120)
    assert "closing signal SIGTERM" in process.stderr
    assert process.stderr.count("script.py: error: ") == 1, process.stderr
    assert "script.py: error: the reason\n" in process.stderr


def test_device_is_chosen(monkeypatch):
    assert distributed.start("cpu") == torch.device("cpu")
    assert distributed.start("auto").type in ("cpu", "cuda", "mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert distributed.start("auto").type == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert distributed.start("auto").type == "mps"
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    assert distributed.world_size() == 1  # left over from something that was not torchrun
    monkeypatch.setitem(os.environ, "RANK", "0")
    with pytest.raises(ValueError, match="--device mps needs"):
        distributed.start("mps")


def test_a_signal_that_was_swallowed_is_remembered_and_a_second_one_strikes(sessions_here, capsys):
    seen = []
    with pytest.raises(SystemExit) as exit, distributed.session():
        for number in (signal.SIGTERM, signal.SIGINT):
            try:  # as Python does around a destructor
                os.kill(os.getpid(), number)
                time.sleep(1)
            except distributed.Interrupted as error:
                seen.append(error.number)
    assert seen == [signal.SIGTERM, signal.SIGINT] and exit.value.code == 143
    assert capsys.readouterr().err.endswith(": error: stopped by SIGTERM\n")


def test_the_end_of_a_terminal_is_a_signal_too_unless_nohup_says_so(sessions_here):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with distributed.session():
        os.kill(os.getpid(), signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with pytest.raises(SystemExit) as exit, distributed.session():
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(1)
    assert exit.value.code == 129


def test_user_errors_become_one_line_and_a_status(sessions_here, capsys):
    for error, status, text in (
        (FileNotFoundError("x is missing"), 1, ": error: x is missing\n"),
        (ValueError("bad"), 1, ": error: bad\n"),
        (distributed.argparse.ArgumentError(None, "flag"), 2, ": error: flag\n"),
        (distributed.Interrupted(signal.SIGTERM), 143, ": error: stopped by SIGTERM\n"),
        (
            ValueError(
                "Caught ValueError in worker 0.\nOriginal Traceback (most recent call last):\n  File\n"
                "ValueError: image x: bad\n"
            ),
            1,
            ": error: image x: bad\n",
        ),
    ):
        with pytest.raises(SystemExit) as exit, distributed.session():
            raise error
        assert exit.value.code == status
        assert capsys.readouterr().err.endswith(text)
