"""Runs that are killed, stopped, restarted, moved or run out of disk: what is left, what follows."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
import torch
from conftest import BEST, ROOT, SIZE_FLAGS, Run, finish, records, same, wait_for

import distributed
import evaluate
import models
import train

BEST, LAST = BEST.format("fasterrcnn"), "fasterrcnn/last.pt"


def dying(moment):
    """train.main, but for the signal that strikes it; torchrun's restarts do not meet it again."""
    def strike(number):
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            os.kill(os.getpid(), number)
            time.sleep(10 * (number == signal.SIGKILL))

    saves, steps, save, step = [], [], models.save_checkpoint, torch.optim.Adam.step

    def counted_save(content, path):
        saves.append(path)
        if moment == "before the second save" and len(saves) == 2:
            strike(signal.SIGKILL)
        save(content, path)
        if moment == "after the second save" and len(saves) == 2:
            strike(signal.SIGKILL)

    def counted_step(self, *args):
        steps.append(1)
        if moment == "in the third step" and len(steps) == 3:
            strike(signal.SIGTERM)  # of which this process alone knows
        if moment == "in the third step, by force" and len(steps) == 3:
            strike(signal.SIGKILL)
        return step(self, *args)

    if distributed.rank() == distributed.world_size() - 1 or "save" in moment:
        models.save_checkpoint, torch.optim.Adam.step = counted_save, counted_step
        if moment == "in validation":
            evaluate.evaluate = lambda *_: strike(signal.SIGKILL)
        if moment.startswith("after "):
            seconds = moment.split()[1]
            if seconds[0].isdigit():
                threading.Timer(float(seconds), strike, [signal.SIGKILL]).start()
    train.main()


@pytest.fixture(scope="module")
def flags(dataset, teachers):
    """Two epochs of six steps, reported after each fourth and saved after each second."""
    return ["--arch", "fasterrcnn", "--data-dir", dataset, *SIZE_FLAGS, "--teacher-ckpt",
            teachers["fasterrcnn"], "--epochs", "2", "--images-per-step", "4", "--log-every", "4",
            "--save-every", "2", "--limit-train", "24", "--limit-val", "2"]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The folder of a run never interrupted, of so many processes."""
    runs = {}

    def whole(processes):
        if processes not in runs:
            runs[processes] = tmp_path_factory.mktemp("whole")
            finish(train.main, *flags, "--output-dir", runs[processes], "--save-every", "2000",
                   processes=processes)
        return runs[processes]

    return whole


def load(path):
    content = torch.load(path, weights_only=True)
    return {key: content[key] for key in ("model", "optimizer", "lr_scheduler", "best_value")}


def assert_same_run(a, b):
    """The same tensors in all files, the same figures, and no file too many."""
    for name in (BEST, LAST):
        assert same(load(a / name), load(b / name)), name
    for kind in ("epoch", "test"):
        last = [{r["epoch"]: r["figures"] for r in records(folder / "fasterrcnn", kind)}
                for folder in (a, b)]  # of a record that was repeated, the last counts
        assert last[0] == last[1]
    files = {path.name for path in [*a.iterdir(), *(a / "fasterrcnn").iterdir()]}
    assert files == {BEST, "fasterrcnn", "last.pt", "metrics.jsonl", "train.log"}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_stopped_at_six_moments_ends_as_one_that_never_was(
        processes, flags, whole, tmp_path):
    rng, positions = random.Random(0), []
    flags = [*flags, "--output-dir", tmp_path, "--resume"]
    moments = ["before the second save", "in the third step", "after the second save",
               *(f"after {rng.uniform(0.5, 4):.2f} s" for _ in range(2)), "in validation"]
    for moment in moments:
        run = Run(partial(dying, moment), flags, processes, name="train.py")
        statuses = run.wait()
        run.kill()
        told = [line for line in run.err.splitlines() if ": error: " in line]
        assert not told, (moment, run.err)  # a death is nothing to tell
        if moment == "in the third step":
            assert statuses == [128 + signal.SIGTERM] * processes and run.err == ""
            assert run.out.count("stopped by SIGTERM; repeat the command with --resume\n") == 1
        elif not moment.endswith(" s"):
            assert -signal.SIGKILL in statuses, (moment, statuses, run.out)
        if (tmp_path / LAST).exists():
            progress = torch.load(tmp_path / LAST, weights_only=True)["progress"]
            positions.append((progress["epoch"], progress["step"]))
    run = finish(train.main, *flags, processes=processes)
    assert ", step 6 on" in run.out  # where it was to be validated
    assert_same_run(tmp_path, whole(processes))
    assert positions == sorted(positions) and len(set(positions)) >= 3, positions


def test_sigterm_under_torchrun_and_another_number_of_processes(flags, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               ROOT / "train.py", *flags, "--output-dir", tmp_path, "--epochs", "1000"]
    process = subprocess.Popen(list(map(str, command)), text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    wait_for(lambda: (tmp_path / LAST).exists())
    begin = time.monotonic()
    process.terminate()
    out, err = process.communicate(timeout=120)
    assert time.monotonic() - begin < 30 and process.returncode != 0
    assert out.count("stopped by SIGTERM; repeat the command with --resume\n") == 1
    assert "train.py: error" not in err
    before = torch.load(tmp_path / LAST, weights_only=True)["progress"]
    run = finish(train.main, *flags, "--output-dir", tmp_path, "--resume", "--epochs",
                 before["epoch"] + 2, processes=4)
    assert f"from epoch {before['epoch']}, step {before['step']} on" in run.out
    assert records(tmp_path / "fasterrcnn", "epoch")[-1]["epoch"] == before["epoch"] + 1
    assert load(tmp_path / BEST)["best_value"] >= 0


def test_torchrun_restarts_a_run_whose_process_dies(flags, whole, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "--max-restarts=1", "--monitor-interval=0.1", __file__, *flags,
               "--output-dir", tmp_path, "--overwrite"]  # which the restart must not repeat
    process = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    assert "error: another process died" not in process.stderr
    assert "from epoch 0, step 2 on" in process.stdout
    assert_same_run(tmp_path, whole(2))


def test_two_runs_never_write_to_one_folder(flags, tmp_path):
    flags = [*flags, "--output-dir", tmp_path, "--epochs", "1000"]
    first = Run(train.main, flags)
    wait_for(lambda: (tmp_path / LAST).exists())
    second = Run(train.main, [*flags, "--resume"])
    assert second.wait() == [1] and second.err == (
        f"train.py: error: {tmp_path / 'fasterrcnn'} is being written by another run; wait for its "
        "end or name another folder by --output-dir\n")
    os.kill(first.processes[0].pid, signal.SIGINT)
    assert first.wait() == [130] and load(tmp_path / LAST)


def test_a_full_disk(flags, whole, tmp_path):
    """No file may grow beyond 1 MiB."""
    out = tmp_path / "out"
    shutil.copytree(whole(2), out)
    flags = [*flags, "--output-dir", out, "--resume", "--epochs", "3"]
    before = {name: (out / name).read_bytes() for name in (BEST, LAST)}
    run = Run(train.main, flags, 2, limit=2**20)
    assert 1 in run.wait()
    told = [line for line in run.err.splitlines() if ": error: " in line]
    assert len(told) == 1 and told[0].startswith(f"train.py: error: {out / LAST} cannot be written")
    assert {name: (out / name).read_bytes() for name in (BEST, LAST)} == before
    assert not list(out.rglob(".*"))  # no half-written file is left to fill it further


if __name__ == "__main__":
    distributed.run(partial(dying, "in the third step, by force"))
