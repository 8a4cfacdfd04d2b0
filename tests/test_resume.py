"""Runs that are killed, restarted or moved: what is left, what follows, and whose the folder is."""

import json
import os
import shutil
import signal

import pytest
import torch
from conftest import BEST, records, same, torchrun

import distributed
import losses
import models
import train
from distributed import InputError

BEST, LAST = BEST.format("fasterrcnn"), "last.pt"


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
    by_epoch = [{r["epoch"]: r["metrics"] for r in records(folder, "epoch")}
                for folder in (a, b)]  # of a record that was repeated, the last counts
    assert by_epoch[0] == by_epoch[1]
    tests = [records(folder, "test")[-1] for folder in (a, b)]
    assert tests[0] == tests[1]


# ---- killed --------------------------------------------------------------------------------------


def killed_in_the_third_step():
    """train.main, but killed on the last process, which has waited for the others' third step."""
    steps, step = [], torch.optim.Adam.step

    def counted_step(self, *args):
        steps.append(1)
        if len(steps) == 3 and distributed.rank() == distributed.world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args)

    torch.optim.Adam.step = counted_step
    train.main()


def killed_while_the_best_is_saved():
    """train.main, but killed when it has written a part of the best checkpoint."""

    def save(content, path):
        if path.name == BEST:
            models.part_file(path, os.getpid()).write_bytes(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        save_checkpoint(content, path)

    save_checkpoint, models.save_checkpoint = models.save_checkpoint, save
    train.main()


def test_a_run_killed_again_and_again_ends_as_one_that_never_was(
        flags, start, finish, never_killed, tmp_path):
    for main in (killed_in_the_third_step, killed_while_the_best_is_saved):
        job = start(main, *flags, "--output-dir", tmp_path, "--resume")
        assert job.wait() == [-signal.SIGKILL] and ": error: " not in job.err
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"kind": "step", "epo')  # as if the kill had cut the last line
    job = finish(train.main, *flags, "--output-dir", tmp_path, "--resume")
    assert "from epoch 0, step 4 on" in job.out
    assert_same_run(tmp_path, never_killed(finish, None))
    assert len(records(tmp_path, "start")) == 3


def test_torchrun_resumes_by_itself_when_a_process_is_killed(
        flags, finish, never_killed, tmp_path):
    process = torchrun(__file__, *flags, "--output-dir", tmp_path, "--resume", nproc=2,
                       more=["--max-restarts=1"])
    assert process.returncode == 0, process.stderr
    for text in ("from epoch 0, step 0 on", "from epoch 0, step 2 on"):
        assert text in process.stdout
    assert_same_run(tmp_path, never_killed(finish, 2))


def test_another_number_of_processes_goes_on_at_the_same_step(
        flags, finish, never_killed, tmp_path):
    shutil.copytree(never_killed(finish, None), tmp_path, dirs_exist_ok=True)
    job = finish(train.main, *flags, "--output-dir", tmp_path, "--resume", "--epochs", 3,
                 world_size=2)
    assert "from epoch 1, step 4 on" in job.out
    assert [r["epoch"] for r in records(tmp_path, "epoch")] == [0, 1, 1, 2]


class Noisy(models.Bottleneck):
    """A bottleneck that draws random numbers in training."""

    def forward(self, x):
        z = self.encoder(x)
        return self.decoder(z + torch.randn_like(z) if self.training else z)


def test_random_numbers_are_the_same_after_resuming(dataset, teachers, tmp_path):
    calls_left = {"whole": 4, "stopped": 2}

    def criterion(*args):
        calls_left[folder] -= 1
        if calls_left[folder] < 0:
            raise KeyboardInterrupt
        return losses.ghnd_loss(*args)

    def run(**settings):
        train.run_experiment(
            train.Experiment("fasterrcnn", epochs=1, images_per_step=4, min_size=64, max_size=96),
            data_dir=dataset, output_dir=tmp_path / folder, teacher_ckpt=teachers["fasterrcnn"],
            limit_train=16, limit_val=1, save_every=2, workers=0, device="cpu", bottleneck=Noisy,
            criterion=criterion, **settings)

    folder = "whole"
    run()
    folder = "stopped"
    with pytest.raises(KeyboardInterrupt):
        run()
    calls_left[folder] = 2
    run(resume=True)
    assert same(load(tmp_path / "whole" / LAST), load(tmp_path / "stopped" / LAST))


# ---- a folder has one owner ----------------------------------------------------------------------


def content_of(**changes):
    return {"model": {}, "best_value": 0.0, "progress": {}, "config": {"arch": "fasterrcnn"}} | changes


def claim(folder, resume=False):
    """A RunFolder that has claimed a folder."""
    run_folder = train.RunFolder(folder, "fasterrcnn")
    run_folder.claim({"kind": "start"}, resume)
    return run_folder


def test_a_folder_is_given_to_one_new_run(tmp_path):
    first = claim(tmp_path)
    with pytest.raises(InputError, match="metrics.jsonl is there; go on with its run by --resume"):
        claim(tmp_path)
    first.save(first.last, content_of())
    with pytest.raises(InputError, match="last.pt is there"):
        claim(tmp_path)


@pytest.mark.parametrize("has_trained", [False, True])
def test_a_run_that_fails_before_its_first_step_leaves_the_folder_free(has_trained, tmp_path):
    folder = train.RunFolder(tmp_path, "fasterrcnn")
    with pytest.raises(InputError, match="^annotations$"):
        with folder.claimed({"kind": "start"}, resume=False) as content:
            assert content is None and folder.metrics.exists()
            if has_trained:
                folder.record({"kind": "step"})
            raise InputError("annotations")
    assert folder.metrics.exists() == has_trained


def test_of_two_runs_that_go_on_the_second_to_save_stops(tmp_path):
    first = claim(tmp_path)
    first.save(first.last, content_of())
    second = claim(tmp_path, resume=True)
    second.save(second.last, content_of(best_value=1.0))
    for path in (first.last, first.best):
        with pytest.raises(InputError, match="last.pt was changed by another run; this one stops"):
            first.save(path, content_of(best_value=2.0))
    assert models.load_checkpoint(first.last)["best_value"] == 1 and not first.best.exists()
    second.save(second.best, content_of())


def test_what_is_resumed_has_whole_lines_and_no_parts_of_the_dead(tmp_path):
    first = claim(tmp_path)
    first.save(first.last, content_of())
    with first.metrics.open("a") as file:
        file.write('{"kind": "step", "lo')
    living, dead = (models.part_file(first.last, process) for process in (os.getppid(), 2**22 + 1))
    for part in (living, dead):
        part.write_bytes(b"half")
    claim(tmp_path, resume=True)
    assert living.exists() and not dead.exists()
    lines = [json.loads(line) for line in first.metrics.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["start", "start"]


def test_a_field_that_is_younger_than_the_file_has_its_default(tmp_path):
    config = train.default_config("fasterrcnn")
    for name in ("layer_weights", "criterion"):
        old = {key: value for key, value in config.items() if key != name}
        train.check_config({"config": old}, config, tmp_path)
        with pytest.raises(InputError, match=f"belongs to a run with {name} "):
            train.check_config({"config": old}, config | {name: "another"}, tmp_path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    is_first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    distributed.run(killed_in_the_third_step if is_first else train.main)
