"""What users can get wrong: one line that names it, exit status 1 (usage: 2), nothing harmed."""

import os
import types
from pathlib import Path

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
        last=out / "fasterrcnn" / "last.pt", best=out / BEST.format("fasterrcnn"),
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


def add_category_91(content):
    content["categories"].append({"id": 91, "name": "x"})
    content["annotations"][0]["category_id"] = 91


USAGE_ERRORS = [
    (train, TRAIN + " --epochs 0", "argument --epochs"),
    (train, TRAIN + " --images-per-step -3", "argument --images-per-step"),
    (train, TRAIN + " --workers -1", "argument --workers"),
    (train, TRAIN + " --seed -1", "argument --seed"),
    (train, TRAIN + " --seed x", "argument --seed"),
    (train, "", "--arch"),
    (evaluate, EVALUATE + " --bits 9", "argument --bits"),
    (evaluate, EVALUATE + " --jpeg 0", "argument --jpeg"),
    (evaluate, EVALUATE + " --data-dir ~nobody-of-this-name/x", "there is no home directory"),
    (evaluate, "--data-dir {data}", "--ckpt"),
]


@pytest.mark.parametrize("script, flags, text", USAGE_ERRORS)
def test_usage_errors(script, flags, text, place, call):
    status, _, err = call(script.main, *flags.format(**vars(place)).split())
    assert status == 2 and text in err.splitlines()[-1]


@pytest.mark.parametrize("script", [train, evaluate])
def test_help_tells_real_defaults(script, call):
    status, out, _ = call(script.main, "--help")
    assert status == 0 and "None" not in out and "datasets/coco2017" in out


# What is done before, the script, its flags, and what must be said.
REFUSALS = [
    (None, train, TRAIN + " --data-dir {tmp}/no", "{tmp}/no/annotations/instances_train2017.json"),
    (None, train, TRAIN + " --limit-train 11", "11 images to train on are fewer than one step's 12"),
    (None, train, TRAIN + " --teacher-ckpt {x}", "checkpoint {x} is not there"),
    (None, train, TRAIN + " --output-dir /proc/ghnd", "--output-dir /proc/ghnd: "),
    (lambda p: p.x.touch(), train, TRAIN + " --output-dir {x}", "--output-dir {x}: "),
    (lambda p: (p.data / "val2017").rename(p.x), train, TRAIN, "{data}/val2017/ is missing"),
    (lambda p: p.val.unlink(), train, TRAIN, "{val} is missing"),
    (lambda p: cut(p.val), train, TRAIN, "{val} is not whole"),
    (lambda p: cut(p.train), train, TRAIN, "{train} is not whole"),
    (lambda p: edit_json(p.val, add_category_91), train, TRAIN, "category_id is 91, not one of the"),
    (lambda p: p.image.unlink(), train, TRAIN, "image {image} is missing"),
    (lambda p: cut_all(p.data / "train2017"), train, TRAIN + " --workers 1",
     "jpg cannot be decoded"),
    (lambda p: publish(p.best), train, TRAIN, "{best} is there"),
    (lambda p: publish(p.best), train, TRAIN + " --resume", "{best} is there, but no {last}"),
    (lambda p: publish(p.last), train, TRAIN, "{last} is there; go on with its run by --resume"),
    (lambda p: publish(p.last.with_name("metrics.jsonl")), train, TRAIN, "metrics.jsonl is there"),
    (lambda p: publish(p.last), train, TRAIN + " --resume", "{last} is not of a run of this train"),
    (lambda p: cut(p.val_image), evaluate, EVALUATE + " --ckpt {student}",
     "image {val_image} cannot be decoded"),
    (None, evaluate, EVALUATE, "checkpoint {x} is not there"),
    (lambda p: p.x.write_bytes(p.student.read_bytes()[:99_999]), evaluate, EVALUATE,
     "checkpoint {x} was refused"),
    (None, evaluate, EVALUATE + " --ckpt {student} --save-detections {tmp}", "{tmp} cannot be"),
    *((None, evaluate, EVALUATE + " --ckpt {student} --pictures {data}/" + folder, "where the images are")
      for folder in ("val2017", "train2017/drawn")),
    (lambda p: p.x.touch(), evaluate, EVALUATE + " --ckpt {student} --pictures {x}/y", "{x}/y cannot be written"),
    *((lambda p, name=name: edit_json(p.val, lambda c: c["images"][0].update(file_name=name)),
       evaluate, EVALUATE + " --ckpt {student}", f'its file_name is "{name}", not a path below')
      for name in ("/tmp/a.jpg", "../a.jpg")),
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
    after.pop(place.out / "fasterrcnn" / "train.log", None)
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
        assert files_below(place.out) == before

    assert train_again("--resume")[0] == 0  # there is nothing to resume yet
    last, best = torch.load(place.last, weights_only=True), place.best.read_bytes()
    assert_refused("", str(place.last), "--resume")
    assert_refused("--resume --seed 3", "belongs to a run with seed 0, not 3")
    assert_refused("--resume --limit-train 13", "train_images 12, not 13")
    assert_refused("--resume --limit-val 3", "val_images 1, not 3")
    teacher = torch.load(place.teacher)
    teacher["rpn.head.cls_logits.bias"] += 1
    torch.save(teacher, place.x)
    assert_refused("--resume --teacher-ckpt {x}", "another teacher", "cls_logits.bias")
    broken = last["model"] | {
        "backbone.body.conv1.weight": torch.full((64, 3, 7, 7), torch.nan)}
    torch.save(last | {"model": broken}, place.last)
    assert_refused("--resume", "last.pt is spoilt: backbone.body.conv1.weight has")
    place.last.write_bytes(b"junk")
    assert_refused("--resume", "last.pt was refused")

    torch.save(last | {"best_value": 1.0}, place.last)  # a best that is never to be beaten
    assert train_again("--resume")[0] == 0
    assert place.best.read_bytes() == best
    publish(place.best)
    assert_refused("--resume --epochs 2", f"{place.best} is not of a run of this train.py")
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


def test_weights_that_are_not_finite_are_not_saved(place, tmp_path):
    student = models.build_student(models.load_teacher("fasterrcnn", place.teacher))
    run = train.Run(student, *train.build_optimizer(student, train.FASTERRCNN))
    run.save(tmp_path / "last.pt", {})
    before = (tmp_path / "last.pt").read_bytes()
    student.backbone.body.layer1.decoder[0].running_mean[1] = torch.inf
    with pytest.raises(distributed.InputError, match="decoder.0.running_mean has values that are"):
        run.save(tmp_path / "last.pt", {})
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_broken_image_on_one_of_three_processes_ends_all_and_is_told_once(place, start):
    images, folder = data.load_train_split(place.data, 160, limit=12)
    position, _ = next(iter(data.GroupedBatches(images, 4, rank=1, world_size=3)))[0]
    victim = folder / images[position].file_name
    cut(victim)
    job = start(train.main, *(TRAIN + " --workers 1").format(**vars(place)).split(), world_size=3)
    assert 1 in job.wait(60)
    told = [line for line in job.err.splitlines() if ": error: " in line]
    assert len(told) == 1 and told[0].startswith(f"train.py: error: image {victim} cannot be decoded")
    assert not place.last.exists() and not place.best.exists()


def test_nothing_is_written_to_a_folder_named_tilde(place, call, monkeypatch):
    """Without a home directory, and with none in the system's list of users."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(Path, "expanduser", lambda path: (_ for _ in ()).throw(RuntimeError()))
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.delenv("TORCH_HOME", raising=False)
    monkeypatch.chdir(place.tmp)
    status, _, err = call(train.main, "--arch", "fasterrcnn")
    assert status == 2 and "there is no home directory" in err
    assert not Path("~").exists()
