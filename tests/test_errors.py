"""What users can get wrong: one line that names it, exit status 1 (usage: 2), nothing harmed."""

import errno
import os
import types
from pathlib import Path

import pytest
import torch
from conftest import BEST, CPU, records
from torch import nn

import evaluate
import models
import train
from distributed import InputError

FLAGS = {
    train: "--arch fasterrcnn --data-dir {data} --teacher-ckpt {teacher} --output-dir {out} "
           "--epochs 1 --images-per-step 1 --limit-train 2 --limit-val 1 --save-every 1 "
           "--min-size 32 --max-size 64 --device cpu --workers 0 ",
    evaluate: "--ckpt {student} --data-dir {data} --device cpu --workers 0 "}


@pytest.fixture(scope="module")
def teacher(teachers):
    return models.to_device(models.load_teacher("fasterrcnn", teachers["fasterrcnn"], 32, 64), CPU)


@pytest.fixture
def place(own_dataset, teacher, teachers, checkpoints, tmp_path, monkeypatch):
    """Where a test damages things, by short names that its flags may use."""
    monkeypatch.setattr(models, "load_teacher", lambda *_: teacher)  # reading it takes a second
    out = tmp_path / "out"
    return types.SimpleNamespace(
        data=own_dataset, tmp=tmp_path, out=out, last=out / "last.pt",
        best=out / BEST.format("fasterrcnn"), teacher=teachers["fasterrcnn"],
        student=checkpoints["fasterrcnn"], image=own_dataset / "train2017" / "000000000001.jpg",
        val_image=own_dataset / "val2017" / "000000000001.jpg")


def flags_of(script, place, more=""):
    return (FLAGS[script] + more).format(**vars(place)).split()


def files_below(folder):
    """Return all files with their sizes and times; but a start may be told in a run's log."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")
            if path.is_file() and path.name not in ("train.log", "metrics.jsonl")}


def cut(path):
    path.write_bytes(path.read_bytes()[:200])


def publish(path):
    """Do as if a file of torchdistill's were unpacked there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": {}, "config": {"train": {"num_epochs": 20}}}, path)


@pytest.mark.parametrize("script, flags, status, text", [
    (train, "--arch fasterrcnn --limit-train -3", 2, "argument --limit-train"),
    (evaluate, "--ckpt x --bits 9", 2, "argument --bits"),
    (train, "--help", 0, "~/datasets/coco2017"), (evaluate, "--help", 0, "~/datasets/coco2017")])
def test_usage_errors_and_help(script, flags, status, text, call):
    found, out, err = call(script.main, *flags.split())
    assert found == status and text in out + err and "None" not in out


# What is done before, the script, its flags, and what must be said.
REFUSALS = [
    (None, train, "--data-dir {tmp}/no", "{tmp}/no/annotations/instances_val2017.json: No such"),
    (None, train, "--seed 18446744073709551616", "seed is 18446744073709551616"),
    (None, train, "--images-per-step 3", "has 2 images to use"),
    (None, train, "--output-dir /proc/ghnd", "/proc/ghnd/metrics.jsonl cannot be written"),
    (lambda p: cut(p.image), train, "--images-per-step 2 --workers 1", "{image} cannot be decoded"),
    (lambda p: publish(p.best), train, "--resume", "{best} is there; go on with its run by --resu"),
    (lambda p: publish(p.last), train, "--resume", "{last} was not written by this train.py"),
    (lambda p: cut(p.val_image), evaluate, "--workers 1", "image {val_image} cannot be decoded"),
    (lambda p: p.out.mkdir(), evaluate, "--ckpt no --save-detections {out}", "{out} cannot be writ"),
    (None, evaluate, "--ckpt " + 300 * "x", "xxx cannot be read: File name too long")]


@pytest.mark.parametrize("prepare, script, more, text", REFUSALS)
def test_refusals(prepare, script, more, text, place, call):
    if prepare:
        prepare(place)
    before = files_below(place.tmp)
    status, _, err = call(script.main, *flags_of(script, place, more))
    assert status == 1
    assert err.startswith(f"{script.__name__}.py: error: ") and err.count("\n") == 1, err
    assert text.format(**vars(place)) in err
    assert files_below(place.tmp) == before


@pytest.mark.parametrize("more, parts, text", [
    ("", {"bottleneck": nn.Identity}, "Identity has no encoder"),
    ("--bottleneck-channels 3", {"bottleneck": lambda: models.Bottleneck(6)}, "was given sends 6"),
    ("--amp bf16", {}, "this cpu has no fast bfloat16")])
def test_what_cannot_be_trained_is_told_at_the_start(more, parts, text, place, call, monkeypatch):
    monkeypatch.setattr(models, "has_bf16", lambda device: False)
    status, _, err = call(train.main, *flags_of(train, place, more), **parts)
    assert status == 1 and text in err and err.count("\n") == 1
    assert records(place.out, "start") == []


def test_a_wrong_predictor_fails_before_training(place):
    with pytest.raises(TypeError, match="indices must be"):  # without [0], it gives a list
        train.main(flags_of(train, place), predictor=lambda student: lambda image: student([image]))
    assert records(place.out, "start") == []


def test_only_its_like_goes_on_with_a_run_and_nothing_harms_it(teacher, place, call):
    config = train.asdict(train.Experiment("fasterrcnn"))
    config |= {"criterion": "losses.ghnd_loss", "train_images": 12, "val_images": 1}
    student = models.build_student(teacher)
    parts = (student, *train.build_optimizer(student, train.EXPERIMENTS["fasterrcnn"]))
    content = train.Run(*parts, config).content()
    older = content | {"config": {key: config[key] for key in config if key not in ("seed", "amp")}}
    for before in (content, older):  # fields that are younger than a file had their defaults
        train.Run(*parts, config | {"epochs": 7}).load(before, place.last)
        for name, now in (("seed", 3), ("train_images", 11), ("val_images", 2), ("criterion", "x")):
            with pytest.raises(InputError, match=f"belongs to a run with {name} .*, not {now};"):
                train.Run(*parts, config | {name: now}).load(before, place.last)

    place.out.mkdir()
    for path in (place.last, place.best):
        models.save_checkpoint(content, path)
    before = files_below(place.out)
    for more, text in (("", f"{place.last} is there; go on with its run by --resume"),
                       ("--resume", "belongs to a run with images_per_step 12, not 1")):
        status, _, err = call(train.main, *flags_of(train, place, more))
        assert status == 1 and text in err and err.count("\n") == 1, err
        assert files_below(place.out) == before

    content["model"]["rpn.head.cls_logits.bias"] = torch.ones(3)
    with pytest.raises(InputError, match="another teacher, with another rpn.head.cls_logits.bias"):
        train.Run(*parts, config).load(content, place.last)


@pytest.mark.parametrize("owner, name, number, file, steps", [
    (os, "fsync", 3, "last.pt", [1, 2]),        # the first is a trial, the second saves step 1
    (Path, "replace", 1, "trial.pt", [])])      # where nothing can be renamed
def test_what_cannot_be_saved_ends_a_run_and_harms_no_checkpoint(
        owner, name, number, file, steps, place, call, monkeypatch):
    calls, function = [], getattr(owner, name)

    def fail(*args):
        calls.append(args)
        if len(calls) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*args)

    monkeypatch.setattr(owner, name, fail)
    status, _, err = call(train.main, *flags_of(train, place))
    line = f"train.py: error: {place.out / file} cannot be written: No space left on device\n"
    assert (status, err) == (1, line)
    assert [record["step"] for record in records(place.out, "step")] == steps
    for path in place.out.glob("*pt*"):
        assert path == place.last and models.load_checkpoint(path)["progress"]["step"] == 1


def test_what_is_not_finite_is_not_saved(place, teacher, call, monkeypatch):
    """Neither after a loss, here of a weight so large, though finite, nor a weight itself."""
    weight = teacher.backbone.body.layer3[0].conv1.weight
    monkeypatch.setattr(weight, "data", torch.full_like(weight, 3e38))
    status, _, err = call(train.main, *flags_of(train, place))
    assert status == 1 and "train.py: error: the loss is" in err and err.count("\n") == 1
    folder = train.RunFolder(place.out, "fasterrcnn")
    with pytest.raises(InputError, match="last.pt was not written: mean has values that are not"):
        folder.save(folder.last, {"model": {"mean": torch.tensor([0.0, torch.inf])}})
    assert not place.last.exists() and not place.best.exists()
