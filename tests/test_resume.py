"""Runs that are killed, restarted or moved: what is left, and what follows."""

import os
import random
import signal
import threading
import time

import pytest
import torch
from conftest import BEST, records, same, torchrun

import distributed
import models
import train

BEST, LAST = BEST.format("fasterrcnn"), "fasterrcnn/last.pt"


@pytest.fixture(scope="module")
def flags(dataset, teachers):
    """Two epochs of four steps, saved after each second."""
    return ["--arch", "fasterrcnn", "--data-dir", dataset, "--teacher-ckpt", teachers["fasterrcnn"],
            "--epochs", "2", "--images-per-step", "4", "--limit-train", "16", "--limit-val", "1",
            "--save-every", "2", "--log-every", "3", "--min-size", "64", "--max-size", "96",
            "--device", "cpu", "--workers", "0"]


@pytest.fixture(scope="module")
def never_killed(flags, tmp_path_factory):
    """A function that gives the folder of a run of so many processes that was never killed."""
    folders = {}

    def never_killed(finish, world_size):
        if world_size not in folders:
            folders[world_size] = tmp_path_factory.mktemp("whole")
            finish(train.main, *flags, "--output-dir", folders[world_size], world_size=world_size)
        return folders[world_size]

    return never_killed


def load(path):
    content = torch.load(path, weights_only=True)
    return {key: content[key] for key in ("model", "optimizer", "lr_scheduler", "best_value")}


def assert_same_run(a, b):
    """The same tensors in all files, and the same metrics; no file is left over."""
    for name in (BEST, LAST):
        assert same(load(a / name), load(b / name)), name
    for folder in (a, b):
        files = {path.name for path in folder.rglob("*") if path.is_file()}
        assert files == {BEST, "last.pt", "metrics.jsonl", "train.log"}
    by_epoch = [{r["epoch"]: r["metrics"] for r in records(folder / "fasterrcnn", "epoch")}
                for folder in (a, b)]  # of a record that was repeated, the last counts
    assert by_epoch[0] == by_epoch[1]
    tests = [records(folder / "fasterrcnn", "test")[-1] for folder in (a, b)]
    assert tests[0] == tests[1]


def killed_before_the_best_checkpoint():
    """train.main, but killed after last.pt of the epoch and its validation."""

    def save(content, path):
        if path.name == BEST:
            os.kill(os.getpid(), signal.SIGKILL)
        save_checkpoint(content, path)

    save_checkpoint, models.save_checkpoint = models.save_checkpoint, save
    train.main()


def killed_at_random():
    """train.main, but killed, on its last process, after GHND_SECONDS of training."""

    def start_timer(*args, **kwargs):
        if distributed.rank() == distributed.world_size() - 1:
            seconds = random.uniform(0.1, 1.5)
            timer = threading.Timer(seconds, os.kill, [os.getpid(), signal.SIGKILL])
            timer.daemon = True
            timer.start()
        train_epoch(*args, **kwargs)

    train_epoch, train.train_epoch = train.train_epoch, start_timer
    train.main()


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_killed_again_and_again_ends_as_one_that_never_was(
        world_size, flags, start, finish, never_killed, tmp_path):
    for main in (killed_at_random, killed_before_the_best_checkpoint, killed_at_random):
        job = start(main, *flags, "--output-dir", tmp_path, "--resume", world_size=world_size)
        statuses = job.wait()
        job.kill()
        assert main is killed_at_random or -signal.SIGKILL in statuses, job.err
        assert ": error: " not in job.err
    finish(train.main, *flags, "--output-dir", tmp_path, "--resume", world_size=world_size)
    assert_same_run(tmp_path, never_killed(finish, world_size))


def test_torchrun_resumes_by_itself_when_a_process_is_killed(
        flags, finish, never_killed, tmp_path):
    process = torchrun(__file__, *flags, "--output-dir", tmp_path, "--resume", nproc=2,
                       more=["--max-restarts=2"])
    assert process.returncode == 0, process.stderr
    assert "from epoch 0, step 2 on" in process.stdout
    assert_same_run(tmp_path, never_killed(finish, 2))


def test_another_number_of_processes_goes_on_at_the_same_step(flags, finish, tmp_path):
    flags = [*flags, "--output-dir", tmp_path, "--limit-train", 8]
    finish(train.main, *flags, "--epochs", 1, world_size=None)
    job = finish(train.main, *flags, "--resume", world_size=2)
    assert "from epoch 0, step 2 on" in job.out
    assert [r["epoch"] for r in records(tmp_path / "fasterrcnn", "epoch")] == [0, 0, 1]


def kill_once():
    """train.main, but killed once, on process 1, in the third step of its first attempt."""
    steps, step = [], torch.optim.Adam.step

    def counted_step(self, *args):
        steps.append(1)
        if len(steps) == 3 and distributed.rank() == 1:
            time.sleep(1)  # until process 0 has saved after the second
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args)

    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        torch.optim.Adam.step = counted_step
    torch.set_num_threads(1)
    train.main()


if __name__ == "__main__":
    distributed.run(kill_once)
