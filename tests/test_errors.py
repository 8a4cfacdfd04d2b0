"""What users can get wrong: a message that names it, an exit status, nothing harmed, no hanging."""

import time
import types
import urllib.error
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import BEST, SIZE_FLAGS, Run, changed

import data
import distributed
import evaluate
import models
import train

RAN = Path("/tmp/ghnd-test-was-run")


@pytest.fixture
def place(own_dataset, teachers, checkpoints, tmp_path):
    """Where a test damages things, by short names that its flags may use."""
    out = tmp_path / "out"
    return types.SimpleNamespace(
        data=own_dataset, tmp=tmp_path, out=out, last=out / "fasterrcnn" / "last.pt", x=tmp_path / "x",
        best=out / BEST.format("fasterrcnn"), teacher=teachers["fasterrcnn"],
        student=checkpoints["fasterrcnn"], masks=teachers["maskrcnn"],
        val=own_dataset / "annotations" / "instances_val2017.json",
        index=own_dataset / "annotations" / "instances_train2017.json",
        image=own_dataset / "train2017" / "000000000002.jpg")


TRAIN = ("--arch fasterrcnn --data-dir {data} --teacher-ckpt {teacher} --output-dir {out} "
         "--epochs 1 --limit-train 12 --limit-val 2 ") + " ".join(SIZE_FLAGS)
EVALUATE = "--ckpt {x} --data-dir {data} " + " ".join(SIZE_FLAGS)


def flags_of(text, place):
    return text.format(**vars(place)).split()


def files_below(folder):
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")
            if path.is_file() and path.name not in ("train.log", "metrics.jsonl")}


def assert_told(result, status, *texts):
    found, message = result
    assert found == status, message
    assert "Traceback" not in message and message.count(": error: ") == 1
    assert len(message.strip().splitlines()) <= 2 and len(message) < 600, message
    for text in texts:
        assert text in message


class Code:
    def __reduce__(self):
        return Path.touch, (RAN,)


def cut(path, size=200):
    path.write_bytes(path.read_bytes()[:size])


def write_zip_bomb(path):
    """A small file whose pickle would unpack to 200 MB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(200_000_000))
        archive.writestr("archive/version", "3")


def spoil(source, path):
    content = torch.load(source, weights_only=True)
    content["model"]["rpn.head.conv.0.0.bias"][7] = torch.inf
    torch.save(content, path)


def publish(path):
    """As if a file of torchdistill's were unpacked there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": {}, "config": {"train": {"num_epochs": 20}}}, path)


REFUSALS = [  # what is broken, flags, what must be said; usage errors also say how to find the flags
    (None, TRAIN + " --epochs 0", "argument --epochs"),
    (None, TRAIN + " --images-per-step -3", "argument --images-per-step"),
    (None, TRAIN + " --log-every 0", "argument --log-every"),
    (None, TRAIN + " --images-per-step 0", "argument --images-per-step"),
    (None, EVALUATE + " --ckpt {student} --bits 9", "argument --bits"),
    (None, TRAIN + " --resume --overwrite", "argument --overwrite: not allowed with"),
    (None, "", "--arch fasterrcnn or --arch maskrcnn"),
    (None, "--data-dir {data}", "--ckpt"),
    (None, TRAIN + " --data-dir {tmp}/no", "{tmp}/no/annotations/instances_train2017.json is miss"),
    (None, TRAIN + " --workers -1", "num_workers"),
    (None, TRAIN + " --limit-train 11", "11 images to train on are fewer than one step's 12"),
    (None, TRAIN + " --teacher-ckpt {x}", "checkpoint {x} is not there"),
    (None, TRAIN + " --output-dir /proc/ghnd", "/proc/ghnd"),
    (lambda p: p.x.touch(), TRAIN + " --output-dir {x}", "{x}/fasterrcnn"),
    (lambda p: (p.data / "val2017").rename(p.x), TRAIN, "{data}/val2017/ is missing"),
    (lambda p: p.val.unlink(), TRAIN, "{val} is missing"),
    (lambda p: cut(p.val), TRAIN, "{val} is not a whole COCO instances file (JSONDecodeError"),
    (lambda p: cut(p.index), TRAIN, "{index} is not a whole COCO instances file (JSONDecodeError"),
    (lambda p: changed(p.val, lambda c: c["categories"].append({"id": 91, "name": "x"})), TRAIN,
     "{val}: category 91 is beyond 91 classes"),
    (lambda p: p.image.unlink(), TRAIN, "image {image} is missing, the first of 1"),
    (lambda p: cut(p.image), TRAIN + " --workers 1", "image {image} cannot be decoded"),
    (lambda p: (p.data / "val2017" / "000000000002.jpg").unlink(), EVALUATE + " --ckpt {student}",
     "val2017/000000000002.jpg is missing"),
    (lambda p: torch.save({"model": Code()}, p.x), EVALUATE, "{x} was refused: "),
    (lambda p: p.x.write_bytes(p.student.read_bytes()[:99_999]), EVALUATE, "{x} was refused: "),
    (lambda p: write_zip_bomb(p.x), EVALUATE, "it would unpack to more than it is"),
    (lambda p: torch.save({"model": {"fc.weight": torch.zeros(1)}}, p.x), EVALUATE,
     "{x} holds no student: it has no bottleneck"),
    (lambda p: spoil(p.student, p.x), EVALUATE, "{x} is spoilt: rpn.head.conv.0.0.bias has values"),
    (None, EVALUATE + " --ckpt {student} --save-detections {tmp}", "{tmp}"),
    (lambda p: publish(p.best), TRAIN, "{best} exists and this run did not write it"),
    (lambda p: publish(p.best), TRAIN + " --resume", "{best} exists and this run did not write it"),
    (lambda p: publish(p.last), TRAIN + " --resume", "{last} exists and this run did not write it"),
]


@pytest.mark.parametrize("damage, flags, text", REFUSALS)
def test_refusals(damage, flags, text, place, call):
    RAN.unlink(missing_ok=True)
    if damage:
        damage(place)
    before = files_below(place.tmp)
    main = evaluate.main if "--ckpt {" in flags or text == "--ckpt" else train.main
    usage = text.startswith(("argument", "unrecognized", "--ckpt", "--arch"))
    more = ["--help"] if usage else []
    assert_told(call(main, *flags_of(flags, place)), 2 if usage else 1,
                f"{main.__module__}.py: error: ", text.format(**vars(place)), *more)
    assert files_below(place.tmp) == before and not RAN.exists()


def impatient():
    distributed.PATIENCE = 2
    train.main()


def test_a_broken_image_on_one_of_three_processes_ends_all_and_is_told_once(place):
    index, folder = data.load_split(place.data, "train", 12)
    position = next(iter(data.GroupedBatches(index, 4, rank=1, world_size=3)))[0][0]
    victim = folder / index.name[position]
    cut(victim)
    begin = time.monotonic()
    run = Run(impatient, flags_of(TRAIN + " --workers 1", place), processes=3, name="train.py")
    assert any(run.wait()) and time.monotonic() - begin < 60
    told = [line for line in run.err.splitlines() if ": error: " in line]
    assert len(told) == 1 and told[0].startswith(f"train.py: error: image {victim} cannot be decoded")
    assert not place.last.exists() and not place.best.exists()


def test_a_teacher_that_cannot_be_downloaded(monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", offline)
    with pytest.raises(
            OSError, match=r"maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth elsewhere .* --teacher-ckpt"):
        models.load_teacher("maskrcnn")


def test_what_can_be_resumed_and_overwritten(call, place):
    def again(more, *texts):
        before = files_below(place.tmp)
        assert_told(call(train.main, *flags_of(f"{TRAIN} {more}", place)), 1, *texts)
        assert files_below(place.tmp) == before

    def save(**changes):
        torch.save({**last, **changes}, place.last)

    publish(place.best)
    assert call(train.main, *flags_of(TRAIN + " --overwrite", place)) == (0, "")
    last, best = torch.load(place.last, weights_only=True), place.best.read_bytes()
    again("", str(place.best), "--resume", "--overwrite")
    again("--resume --seed 3", "belongs to another run, with seed 0, not 3")
    again("--resume --limit-train 13", "train_images 12, not 13")
    again("--resume --limit-val 3", "val_images 2, not 3")
    state = torch.load(place.teacher)
    state["rpn.head.cls_logits.bias"] += 1
    torch.save(state, place.x)
    again("--resume --teacher-ckpt {x}", "last.pt belongs to another teacher", "cls_logits.bias")
    for changes, text in (
            ({"progress": last["progress"] | {"x": 1}}, "was not written by this train.py"),
            ({"progress": None}, "was not written by this train.py"),
            ({"optimizer": {}}, "was not written by this train.py ('param_groups'"),
            ({"model": last["model"] | {"backbone.body.conv1.weight": torch.full(
                (64, 3, 7, 7), torch.nan)}}, "last.pt is spoilt: backbone.body.conv1.weight has")):
        save(**changes)
        again("--resume", text)
    place.last.write_bytes(b"junk")
    again("--resume", "last.pt was refused")
    save(best_value=1.0)  # never to be beaten; the best checkpoint is this run's
    assert call(train.main, *flags_of(TRAIN + " --resume", place)) == (0, "")
    assert place.best.read_bytes() == best  # nothing was left to train
    publish(place.best)
    again("--resume --epochs 2", str(place.best), "did not write it")
    place.best.unlink()  # where it is gone, the next validation counts as the best
    assert call(train.main, *flags_of(TRAIN + " --resume --epochs 2", place)) == (0, "")
    written = torch.load(place.best, weights_only=True)
    assert written["progress"]["epoch"] <= 1 and written["best_value"] < 1


def test_a_loss_that_is_not_finite_saves_nothing(call, place):
    """A teacher with a weight so large, though finite, that features and loss are not."""
    state = torch.load(place.teacher)
    state["backbone.body.layer3.0.conv1.weight"][0] = 3e38
    torch.save(state, place.x)
    told = call(train.main, *flags_of(TRAIN + " --teacher-ckpt {x} --overwrite", place))
    assert_told(told, 1, "loss (nan) or weights are no longer finite at epoch 0, step 1")
    assert not place.last.exists() and not place.best.exists()


VALUES = [None, "x", [], {}, -1, 1e99, float("nan"), ...]  # ...: the field is taken away


@pytest.mark.parametrize("group, field", [
    *(("images", field) for field in ("id", "file_name", "width", "height")),
    *(("annotations", field) for field in (
        "id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation")),
    *(("categories", field) for field in ("id", "name"))])
def test_a_damaged_annotation_file_is_evaluated_or_named(group, field, place):
    """Whatever a field is changed to, there is no error but the ones that users are told."""
    outcomes, whole = set(), place.val.read_bytes()
    detector = models.build_detector("maskrcnn")
    coco = evaluate.ValSet(place.data, detector).coco
    results = [{"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"],
                "segmentation": coco.annToRLE(a), "score": 0.5} for a in coco.anns.values()]
    for value in VALUES:
        def edit(content, value=value):
            content[group][0].pop(field) if value is ... else content[group][0].update({field: value})

        place.val.write_bytes(whole)
        changed(place.val, edit)
        try:
            val = evaluate.ValSet(place.data, detector)
            known = [r for r in results if r["image_id"] in val.index.id]
            for kind in val.kinds:
                figures = evaluate.coco_figures(val.coco, known, val.index.id.tolist(), kind)
                assert len(figures) == 12
            outcomes.add("evaluated")
        except (ValueError, FileNotFoundError) as error:
            assert str(place.val) in str(error) or "is missing, the first of 1" in str(error)
            outcomes.add("named")
    assert "named" in outcomes or field in ("name", "file_name")
