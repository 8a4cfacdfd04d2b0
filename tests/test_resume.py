"""Runs that are killed, restarted or moved: what is left, what follows, and whose the folder is."""

import gc
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import BEST, records, same, start_process
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import distributed
import models
import train
from distributed import InputError

BEST, LAST = BEST.format("fasterrcnn"), "last.pt"


class Noisy(models.Bottleneck):
    """A bottleneck that draws random numbers in training, with a weight that no loss reaches."""

    def __init__(self):
        super().__init__()
        self.spare = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        z = self.encoder(x)
        return self.decoder(z + torch.randn_like(z) if self.training else z)


def main(argv=None):
    return train.main(argv, bottleneck=Noisy)


@pytest.fixture(scope="module")
def flags(dataset, teachers):
    """Epochs of three steps, saved after the second and the third."""
    return ["--arch", "fasterrcnn", "--data-dir", str(dataset), "--teacher-ckpt",
            str(teachers["fasterrcnn"]), "--images-per-step", "3", "--limit-train", "9",
            "--limit-val", "1", "--save-every", "2", "--log-every", "3", "--min-size", "32",
            "--max-size", "64", "--device", "cpu", "--workers", "0"]


def assert_same_run(a, b):
    """The same tensors in all files, and the same metrics; no file is left over."""
    for folder in (a, b):
        files = {path.name for path in folder.rglob("*") if path.is_file()}
        assert files == {BEST, LAST, "metrics.jsonl", "train.log"}
    for name in (BEST, LAST):
        assert same(models.load_checkpoint(a / name), models.load_checkpoint(b / name)), name
    # Of a record that was repeated, the last counts.
    metrics_a, metrics_b = (
        {r.get("epoch"): r["metrics"] for kind in ("epoch", "test") for r in records(folder, kind)}
        for folder in (a, b))
    assert metrics_a == metrics_b


# ---- killed --------------------------------------------------------------------------------------


def killed_in_the_third_step():
    """main, but killed on the last process, which has waited for the others' third step."""
    steps, step = [], torch.optim.Adam.step

    def counted_step(self, *args):
        steps.append(1)
        if len(steps) == 3 and distributed.rank() == distributed.world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args)

    torch.optim.Adam.step = counted_step
    main()


def killed_while_the_best_is_saved():
    """main, but killed when it has written a part of the best checkpoint."""

    def save(content, path):
        if path.name == BEST:
            path.with_name(f"{BEST}.part").write_bytes(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        save_checkpoint(content, path)

    save_checkpoint, models.save_checkpoint = models.save_checkpoint, save
    main()


def test_a_run_killed_again_and_again_ends_as_one_that_never_was(flags, start, tmp_path, capfd):
    """With a bottleneck that draws random numbers, too."""
    whole, killed = ([*flags, "--epochs", "2", "--output-dir", str(tmp_path / name)]
                     for name in ("whole", "killed"))
    main(whole)
    for victim in (killed_in_the_third_step, killed_while_the_best_is_saved):
        job = start(victim, *killed, "--resume")
        assert job.wait() == [-signal.SIGKILL] and ": error: " not in job.err
        with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
            file.write('{"kind": "step", "epo')  # as if the kill had cut the last line
    assert "from epoch 0, step 2 on" in job.out
    main([*killed, "--resume"])
    assert "from epoch 0, step 3 on" in capfd.readouterr().out
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert len(records(tmp_path / "killed", "start")) == 3


def killed_once():
    is_first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    killed_in_the_third_step() if is_first else main()


def by_torchrun():
    """Do as torchrun --nproc_per_node=3 --max-restarts=1; the first flag: where output goes."""
    config = LaunchConfig(
        1, 1, 3, run_id="run", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=1,
        monitor_interval=0.1, start_method="fork")
    script, output, *flags = sys.argv
    elastic_launch(config, start_process)(killed_once, [script, *flags], Path(output), {})


@pytest.fixture(scope="module")
def on_three_processes(tmp_path_factory):
    return tmp_path_factory.mktemp("three")


def test_torchrun_resumes_three_processes_to_the_last_bit(
        flags, finish, on_three_processes, tmp_path):
    """When one of them is killed, without anybody's help."""
    flags = [*flags, "--epochs", 1, "--output-dir"]
    finish(main, *flags, on_three_processes, world_size=3)
    finish(by_torchrun, tmp_path / "output", *flags, tmp_path / "run", "--resume")
    out = (tmp_path / "output.out").read_text()
    for text in ("from epoch 0, step 0 on", "from epoch 0, step 2 on", "epoch 0: mean loss"):
        assert out.count(text) == 1, out
    assert [start["processes"] for start in records(tmp_path / "run", "start")] == [3, 3]
    assert_same_run(tmp_path / "run", on_three_processes)


def test_what_an_earlier_state_wrote_on_three_processes_goes_on_on_one(
        flags, on_three_processes, tmp_path, capfd):
    shutil.copytree(on_three_processes, tmp_path / "run")
    content = models.load_checkpoint(tmp_path / "run" / LAST)
    content["config"]["is_recipe"] = False  # a field that it had, and that is gone
    torch.save(content, tmp_path / "run" / LAST)
    student, config = models.load_student(tmp_path / "run" / LAST, bottleneck=Noisy)
    assert same(dict(student.state_dict()), dict(content["model"])) and config["max_size"] == 64
    (tmp_path / "run" / BEST).unlink()  # where it is gone, the next validation counts as the best
    main([*flags, "--epochs", "2", "--output-dir", str(tmp_path / "run"), "--resume"])
    assert "from epoch 0, step 3 on" in capfd.readouterr().out
    assert [(record["epoch"], record["best"]) for record in records(tmp_path / "run", "epoch")] == [
        (0, True), (0, True), (1, False)]


# ---- a folder has one owner ----------------------------------------------------------------------


def test_a_folder_belongs_to_one_run_at_a_time(flags, start, tmp_path):
    """Also where an earlier run of the process has failed, and when loader workers have started."""
    flags = [*flags, "--output-dir", str(tmp_path / "run")]
    failed = []

    def criterion(*_):
        failed.clear()
        gc.collect()  # an open file of the failed run would now be closed, and the lock be lost
        for more in ([], ["--resume"]):
            job = start(train.main, *flags, *more)
            assert job.wait(60) == [1] and job.err.count("\n") == 1, job.err
            assert "another run, or another process of this one, is using" in job.err
        raise KeyboardInterrupt

    with pytest.raises(InputError, match="No such file") as error:
        train.main([*flags, "--teacher-ckpt", str(tmp_path / "x")])
    failed.append(error)
    del error
    with pytest.raises(KeyboardInterrupt):
        train.main([*flags, "--workers", "1"], criterion=criterion)
    job = start(train.main, *flags, "--teacher-ckpt", tmp_path / "x")  # the folder is free again
    assert job.wait(60) == [1] and "No such file" in job.err
