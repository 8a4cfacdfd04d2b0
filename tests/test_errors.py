"""What users can get wrong: one line that names it, exit status 1 (usage: 2), nothing harmed."""

import errno
import os
import types

import pytest
import torch
from conftest import BEST, SIZE_FLAGS, edit_json

import data
import distributed
import evaluate
import models
import train

TRAIN = ("--arch fasterrcnn --data-dir {data} --teacher-ckpt {teacher} --output-dir {out} "
         "--epochs 1 --limit-train 12 --limit-val 1 ") + " ".join(SIZE_FLAGS)
EVALUATE = "--ckpt {x} --data-dir {data} " + " ".join(SIZE_FLAGS)


@pytest.fixture
def place(own_dataset, teachers, checkpoints, tmp_path):
    """Where a test damages things, by short names that its flags may use."""
    out = tmp_path / "out"
    return types.SimpleNamespace(
        data=own_dataset, tmp=tmp_path, out=out, x=tmp_path / "x",
        last=out / "last.pt", best=out / BEST.format("fasterrcnn"),
        teacher=teachers["fasterrcnn"], student=checkpoints["fasterrcnn"],
        masks=checkpoints["maskrcnn"],
        val=own_dataset / "annotations" / "instances_val2017.json",
        train=own_dataset / "annotations" / "instances_train2017.json",
        image=own_dataset / "train2017" / "000000000002.jpg",
        val_image=own_dataset / "val2017" / "000000000002.jpg")


def files_below(folder):
    return {path: (path.stat().st_size, path.stat().st_mtime_ns)
            for path in folder.rglob("*") if path.is_file()}


def cut(path):
    path.write_bytes(path.read_bytes()[:200])


def cut_all(folder):
    for path in folder.iterdir():
        cut(path)


def publish(path):
    """As if a file of torchdistill's were unpacked there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": {}, "config": {"train": {"num_epochs": 20}}}, path)


USAGE_ERRORS = [
    (train, TRAIN + " --epochs x", "argument --epochs"),
    (train, TRAIN + " --limit-train -3", "argument --limit-train"),
    (evaluate, EVALUATE + " --bits 9", "argument --bits"),
    (evaluate, "--data-dir {data}", "--ckpt"),
]


@pytest.mark.parametrize("script, flags, text", USAGE_ERRORS)
def test_usage_errors(script, flags, text, place, call):
    status, _, err = call(script.main, *flags.format(**vars(place)).split())
    assert status == 2 and text in err.splitlines()[-1]


@pytest.mark.parametrize("script", [train, evaluate])
def test_help_tells_real_defaults(script, call):
    status, out, _ = call(script.main, "--help")
    assert status == 0 and "None" not in out and "~/datasets/coco2017" in out
    if script is train:
        text = " ".join(out.split())
        help_text = "--lr-drops [X ...] epochs, counted from 0, at whose start lr is reduced (5 15)"
        assert help_text in text


# What is done before, the script, its flags, and what must be said.
REFUSALS = [
    (None, train, TRAIN + " --data-dir {tmp}/no", "{tmp}/no/annotations/instances_train2017.json"),
    (None, train, TRAIN + " --seed 18446744073709551616", "seed is 18446744073709551616"),
    (None, train, TRAIN + " --limit-train 11", "11 images to train on are fewer than one step's 12"),
    (None, train, TRAIN + " --teacher-ckpt {x}", "checkpoint {x} is not there"),
    (None, train, TRAIN + " --output-dir /proc/ghnd", "/proc/ghnd/metrics.jsonl cannot be written"),
    (lambda p: cut(p.train), train, TRAIN, "{train} is not whole"),
    (lambda p: cut_all(p.data / "train2017"), train, TRAIN + " --workers 1",
     "jpg cannot be decoded"),
    (lambda p: publish(p.best), train, TRAIN + " --resume", "{best} is there, but no {last}"),
    (lambda p: publish(p.last), train, TRAIN + " --resume", "{last} was not written by this train"),
    (lambda p: cut(p.val_image), evaluate, EVALUATE + " --ckpt {student} --workers 1",
     "image {val_image} cannot be decoded"),
    (None, evaluate, EVALUATE + " --ckpt {tmp}/" + 300 * "x", "xxx is not there"),
    (None, evaluate, EVALUATE + " --ckpt {student} --save-detections {tmp}", "{tmp} cannot be"),
    (None, evaluate, EVALUATE + " --ckpt {student} --pictures {data}/train2017/drawn",
     "where the images are"),
    (lambda p: edit_json(p.val, lambda c: c["images"][0].update(file_name="../a.jpg")), evaluate,
     EVALUATE + " --ckpt {student}", 'its file_name is "../a.jpg", not a path below'),
    (lambda p: edit_json(p.val, lambda c: c["annotations"][1].update(segmentation=[])), evaluate,
     EVALUATE + " --ckpt {masks}", "{val}: annotations[1]"),
]


@pytest.mark.parametrize("prepare, script, flags, text", REFUSALS)
def test_refusals(prepare, script, flags, text, place, call):
    if prepare:
        prepare(place)
    before = files_below(place.tmp)
    status, _, err = call(script.main, *flags.format(**vars(place)).split())
    assert status == 1
    assert err.startswith(f"{script.__name__}.py: error: ") and err.count("\n") == 1, err
    assert text.format(**vars(place)) in err
    after = files_below(place.tmp)
    after.pop(place.out / "train.log", None)
    assert after == before


def test_masks_are_checked_only_where_they_are_evaluated(place, call):
    edit_json(place.val, lambda content: content["annotations"][1].update(segmentation=[]))
    flags = (EVALUATE + " --ckpt {student} --limit-val 1").format(**vars(place)).split()
    assert call(evaluate.main, *flags)[0] == 0


def test_what_can_be_resumed(call, place):
    def train_again(more):
        flags = f"{TRAIN} --min-size 64 --max-size 96 {more}"
        return call(train.main, *flags.format(**vars(place)).split())

    def assert_refused(more, *texts):
        before = files_below(place.out)
        status, _, err = train_again(more)
        assert status == 1 and err.count("\n") == 1, err
        for text in texts:
            assert text in err
        after = files_below(place.out)
        for name in ("train.log", "metrics.jsonl"):  # each start is told there
            before.pop(place.out / name), after.pop(place.out / name)
        assert after == before

    assert train_again("--resume")[0] == 0  # there is nothing to resume yet
    last, best = torch.load(place.last, weights_only=True), place.best.read_bytes()
    assert_refused("", str(place.last), "--resume")
    assert_refused("--resume --seed 3", "belongs to a run with seed 0, not 3")
    assert_refused("--resume --limit-train 13", "train_images 12, not 13")
    teacher = torch.load(place.teacher)
    teacher["rpn.head.cls_logits.bias"] += 1
    torch.save(teacher, place.x)
    assert_refused("--resume --teacher-ckpt {x}", "another teacher", "cls_logits.bias")
    place.last.write_bytes(b"junk")
    assert_refused("--resume", "last.pt was refused")

    torch.save(last | {"best_value": 1.0}, place.last)  # a best that is never to be beaten
    assert train_again("--resume")[0] == 0
    assert place.best.read_bytes() == best
    place.best.unlink()  # where it is gone, the next validation counts as the best
    assert train_again("--resume --epochs 2")[0] == 0
    assert torch.load(place.best, weights_only=True)["best_value"] < 1


def test_a_loss_that_is_not_finite_saves_nothing(place, monkeypatch):
    """A teacher with a weight so large, though finite, that features and loss are not."""
    state = torch.load(place.teacher)
    state["backbone.body.layer3.0.conv1.weight"][0] = 3e38
    torch.save(state, place.x)
    flags = (TRAIN + " --teacher-ckpt {x}").format(**vars(place)).split()
    monkeypatch.setattr("sys.argv", ["train.py", *flags])
    with pytest.raises(FloatingPointError, match="the loss is (nan|inf) between steps 0 and 1"):
        train.main()
    assert not place.last.exists() and not place.best.exists()


def test_weights_that_are_not_finite_are_not_saved(place):
    student = models.build_student(models.load_teacher("fasterrcnn", place.teacher))
    run = train.Run(student, *train.build_optimizer(student, train.FASTERRCNN))
    folder = train.RunFolder(place.out, "fasterrcnn")
    folder.claim({"kind": "start"}, resume=False)
    folder.save(folder.last, run.content({}))
    before = folder.last.read_bytes()
    student.backbone.body.layer1.decoder[0].running_mean[1] = torch.inf
    with pytest.raises(distributed.InputError, match="decoder.0.running_mean has values that are"):
        folder.save(folder.last, run.content({}))
    assert folder.last.read_bytes() == before


def test_a_checkpoint_that_cannot_be_written_is_named_with_the_reason(place, monkeypatch):
    """And the old one stays, and nothing else."""
    def no_space(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    models.save_checkpoint({"epoch": 1}, place.x)
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(distributed.InputError, match=f"{place.x} cannot be written: No space left"):
        models.save_checkpoint({"epoch": 2}, place.x)
    assert models.load_checkpoint(place.x) == {"epoch": 1}
    assert {path.name for path in place.tmp.iterdir()} == {"coco", "x"}


def test_a_bottleneck_without_a_decoder_is_told_before_training(place, call):
    class HalfBottleneck(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = torch.nn.Conv2d(64, 256, 1)

    def main():
        train.main(bottleneck=HalfBottleneck())

    place.train.write_text("not read yet")
    status, _, err = call(main, *TRAIN.format(**vars(place)).split())
    assert status == 1 and err.count("\n") == 1
    assert "HalfBottleneck has no decoder" in err and not place.out.joinpath("metrics.jsonl").exists()


def test_a_broken_image_on_one_of_two_processes_ends_all_and_is_told_once(place, start):
    images, folder = data.load_train_split(place.data, 160, limit=12)
    position, _ = next(iter(data.GroupedBatches(images, 3, rank=1, world_size=2)))[0]
    victim = folder / images[position].file_name
    cut(victim)
    job = start(train.main, *(TRAIN + " --workers 1").format(**vars(place)).split(), world_size=2)
    assert 1 in job.wait(60)
    told = [line for line in job.err.splitlines() if ": error: " in line]
    assert len(told) == 1 and told[0].startswith(f"train.py: error: image {victim} cannot be decoded")
    assert not place.last.exists() and not place.best.exists()
