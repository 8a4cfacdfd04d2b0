import multiprocessing
import os
import signal
import sys
import time

import pytest
import torch
from conftest import Run, finish, run_script

import distributed


def collectives():
    assert distributed.set_up("cpu") == torch.device("cpu")
    rank, world = distributed.rank(), distributed.world_size()
    assert distributed.from_main(lambda x: (x, rank), 5) == (5, 0)
    assert distributed.gather([rank] * rank) == [[r] * r for r in range(world)]
    sums = distributed.sum_over_processes(torch.tensor([1.0, rank]))
    assert sums.tolist() == [world, sum(range(world))]
    norm = torch.nn.BatchNorm1d(2)
    norm.running_mean += rank + 1
    norm.num_batches_tracked += rank
    norm.weight.data.fill_(rank)
    distributed.broadcast_buffers(norm)
    assert norm.running_mean.tolist() == [1, 1] and norm.num_batches_tracked == 0
    assert norm.weight.tolist() == [rank, rank]
    distributed.log(f"said by {rank}")
    print(f"done {rank}\n", end="", flush=True)


@pytest.mark.parametrize("processes", [None, 2, 3])
def test_collectives(processes):
    run = finish(collectives, processes=processes)
    assert run.out.count("said by") == 1 and "said by 0" in run.out
    assert all(run.out.count(f"done {rank}\n") == 1 for rank in range(processes or 1))


def failure():
    distributed.PATIENCE = 2
    distributed.set_up("cpu")
    who, kind = sys.argv[1:]
    if who == "all" or distributed.rank() == int(who):
        raise {"ValueError": ValueError, "RuntimeError": RuntimeError}[kind]("the reason")
    distributed.barrier()  # waits for the other, in vain


def suicide():
    distributed.PATIENCE = 2
    distributed.set_up("cpu")
    if distributed.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.barrier()


@pytest.mark.parametrize("who", ["0", "1", "all"])
@pytest.mark.parametrize("kind", ["ValueError", "RuntimeError"])
def test_a_process_that_fails_ends_the_others_with_its_reason_told_once(who, kind):
    begin = time.monotonic()
    run = Run(failure, [who, kind], processes=3)
    assert any(status == 1 for status in run.wait()) and time.monotonic() - begin < 30
    assert run.err.count("test_distributed.py: error: ") == 1, run.err
    assert ("Traceback" in run.err) == (kind == "RuntimeError") and "the reason" in run.err


def test_the_death_of_a_peer_is_not_told_as_a_reason():
    run = Run(suicide, [], processes=2)
    assert -signal.SIGKILL in run.wait() and "error: " not in run.err
    alone = Run(suicide, [], processes=2)  # and nobody ends the one that is left
    for process in alone.processes:
        process.join(60)
    assert [process.exitcode for process in alone.processes] == [1, -signal.SIGKILL]
    assert alone.err == "test_distributed.py: error: another process died, which tells why\n"


@pytest.mark.parametrize("error, status, text", [
    (FileNotFoundError("x is missing"), 1, "x is missing"),
    (ValueError("Caught ValueError in worker 0.\nOriginal Traceback (most recent call last):\n"
                "  File\nValueError: image x: bad\n"), 1, "image x: bad")])
def test_user_errors_become_one_line_and_a_status(error, status, text, call):
    def main():
        raise error

    found, told = call(main)
    assert found == status and told == f"{__name__}.py: error: {text}\n"


def test_too_few_gpus_are_noticed_by_all_processes_of_a_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank in range(3):
        monkeypatch.setattr(os, "environ", {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "3"})
        with pytest.raises(ValueError, match="--device cuda: this machine has 2 GPUs for 3"):
            distributed.set_up("cuda")


def test_signals_are_noted_within_the_block_alone():
    before = [signal.getsignal(number) for number in distributed.SIGNALS]
    with distributed.noting_signals():
        assert distributed.noted_signal() == 0
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert distributed.noted_signal() == signal.SIGUSR1  # the first
        with pytest.raises(KeyboardInterrupt):  # and now Ctrl-C ends a hang
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in distributed.SIGNALS] == before
    distributed._noted = 0


def signalled():
    distributed.set_up("cpu")
    with distributed.noting_signals():
        if distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        print(f"noted {distributed.noted_signal()}\n", end="", flush=True)


def test_a_signal_of_one_process_is_known_to_all():
    assert finish(signalled, processes=3).out.count("noted 15\n") == 3


def loader_worker(queue):
    distributed.ignore_signals(0)
    for number in distributed.SIGNALS:
        os.kill(os.getpid(), number)
    queue.put("alive")


def test_loader_workers_ignore_signals():
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    context.Process(target=loader_worker, args=(queue,)).start()
    assert queue.get(timeout=60) == "alive"


def test_usage_errors_under_torchrun_are_told_once():
    process = run_script("evaluate.py", "--ckpt", nproc=3)
    assert process.returncode != 0 and "exitcode  : 2" in process.stderr
    assert process.stderr.count("evaluate.py: error: argument --ckpt: expected one argument\n") == 1
    assert process.stderr.count("usage: evaluate.py FLAGS (--help lists them)\n") == 1
