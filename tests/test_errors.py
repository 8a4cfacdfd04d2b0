"""What users can get wrong: a message that names it, an exit status, nothing harmed, nobody left hanging."""

import hashlib
import time
import urllib.error
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import SIZE_FLAGS, changed, run

import data
import distributed
import evaluate
import models
import train

BEST = "coco2017-custom_{0}_resnet_fpn_from_{0}_resnet50_fpn.pt"


@pytest.fixture
def call(sessions_here, monkeypatch, capfd):
    """Run a script's main in this process; returns (exit status, what it wrote to stderr)."""

    def call(module, *flags):
        monkeypatch.setattr("sys.argv", [f"{module.__name__}.py", *map(str, flags)])
        capfd.readouterr()
        try:
            with distributed.session():
                module.main()
            status = 0
        except SystemExit as exit:
            status = exit.code
        return status, capfd.readouterr().err

    return call


@pytest.fixture
def flags(dataset, teachers, tmp_path):
    return [
        "--arch",
        "fasterrcnn",
        "--data-dir",
        dataset,
        "--teacher-ckpt",
        teachers["fasterrcnn"],
        "--output-dir",
        tmp_path / "out",
        *SIZE_FLAGS,
        "--workers",
        "0",
        "--epochs",
        "1",
        "--limit-train",
        "12",
        "--limit-val",
        "2",
    ]


def digests(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.pt")}


def assert_told(result, status, *texts):
    found, message = result
    assert found == status, message
    assert "Traceback" not in message and message.count(": error: ") == 1
    assert len(message.strip().splitlines()) <= 2, message
    for text in texts:
        assert str(text) in message


# ---- flags


@pytest.mark.parametrize(
    "more, text",
    [
        (["--epochs", "0"], "argument --epochs"),
        (["--images-per-step", "-3"], "argument --images-per-step"),
        (["--arch", "retinanet"], "argument --arch"),
        (["--workers", "many"], "argument --workers"),
        (["--warmup"], "unrecognized arguments: --warmup"),
        (["--device", "tpu"], "argument --device"),
    ],
)
def test_wrong_flags_are_usage_errors(call, flags, more, text):
    assert_told(call(train, *flags, *more), 2, "train.py: error:", text, "--help")


def test_missing_flags_are_usage_errors(call):
    assert_told(call(train), 2, "--arch fasterrcnn or --arch maskrcnn")
    assert_told(call(evaluate), 2, "--ckpt")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there(call, flags):
    assert_told(call(train, *flags, "--device", "cuda"), 1, "--device cuda", "has no GPU")


def test_usage_errors_of_several_processes_are_told_once(flags):
    for more, text in (
        (["--epochs", "0"], "argument --epochs"),
        ([], "5 processes cannot share 12 images"),
    ):
        begin = time.monotonic()
        process = run("train.py", *flags, *more, nproc=5)
        assert process.returncode != 0 and time.monotonic() - begin < 60
        assert process.stderr.count(text) == 1 and process.stderr.count("train.py: error: ") == 1
        assert "exitcode  : 2" in process.stderr
    assert "--images-per-step" in process.stderr


# ---- data


def test_missing_data(call, flags, checkpoints, tmp_path):
    nowhere = tmp_path / "nowhere"
    for result in (
        call(train, *flags, "--data-dir", nowhere),
        call(evaluate, "--ckpt", checkpoints["fasterrcnn"], "--data-dir", nowhere),
    ):
        assert_told(result, 1, nowhere / "annotations", "is missing", "--data-dir must hold")


def test_half_a_data_folder(call, flags, own_dataset):
    (own_dataset / "val2017").rename(own_dataset / "val")
    assert_told(
        call(train, *flags, "--data-dir", own_dataset), 1, own_dataset / "val2017", "is missing"
    )
    (own_dataset / "annotations" / "instances_val2017.json").unlink()
    assert_told(
        call(train, *flags, "--data-dir", own_dataset), 1, "instances_val2017.json is missing"
    )


@pytest.mark.parametrize("split", ["train", "val"])
def test_broken_annotation_files(call, flags, own_dataset, split):
    path = own_dataset / "annotations" / f"instances_{split}2017.json"
    whole = path.read_text()
    path.write_text(whole[:1000])
    assert_told(call(train, *flags, "--data-dir", own_dataset), 1, path, "no whole JSON file")
    path.write_text('{"rows": []}')
    assert_told(
        call(train, *flags, "--data-dir", own_dataset), 1, path, "not a COCO instances file"
    )
    path.write_text(whole)
    changed(path, lambda content: content["annotations"][0].pop("area"))
    assert data.check_split(own_dataset, split, 0) == (split == "val")  # training needs no areas
    if split == "val":
        assert_told(call(train, *flags, "--data-dir", own_dataset), 1, path, "KeyError: 'area'")


def test_too_few_images(call, flags):
    assert_told(
        call(train, *flags, "--limit-train", "11"), 1, "11 images to train on", "--images-per-step"
    )


def test_a_broken_image_is_named_from_a_worker(call, flags, own_dataset):
    victim = own_dataset / "train2017" / "000000000002.jpg"
    victim.write_bytes(victim.read_bytes()[:200])
    assert_told(
        call(train, *flags, "--data-dir", own_dataset, "--workers", "1"),
        1,
        victim,
        "cannot be decoded",
    )
    victim.unlink()
    assert_told(
        call(train, *flags, "--data-dir", own_dataset, "--workers", "1", "--overwrite"),
        1,
        victim,
        "is missing",
    )


def test_a_broken_image_on_one_of_three_processes_ends_all_and_is_told_once(
    flags, own_dataset, tmp_path
):
    index, folder = data.load_split(own_dataset, "train", 12)
    position = next(iter(data.GroupedBatches(index, 4, rank=1, world_size=3)))[0][0]
    victim = folder / index.names[position]
    victim.write_bytes(victim.read_bytes()[:200])
    begin = time.monotonic()
    process = run("train.py", *flags, "--data-dir", own_dataset, "--workers", "1", nproc=3)
    assert process.returncode != 0 and time.monotonic() - begin < 60
    assert process.stderr.count("train.py: error: ") == 1
    assert process.stderr.count(f"{victim} cannot be decoded") == 1
    assert digests(tmp_path / "out") == {}


def test_a_missing_validation_image(call, checkpoints, own_dataset):
    (own_dataset / "val2017" / "000000000002.jpg").unlink()
    assert_told(
        call(evaluate, "--ckpt", checkpoints["fasterrcnn"], "--data-dir", own_dataset, *SIZE_FLAGS),
        1,
        "val2017/000000000002.jpg is missing",
    )


# ---- checkpoints


class Code:
    def __reduce__(self):
        return Path.touch, (Path("/tmp/ghnd-test-was-run"),)


def write_zip_bomb(path):
    """A small file whose pickle would unpack to 200 MB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(200_000_000))
        archive.writestr("archive/version", "3")


def spoil(source, path):
    content = torch.load(source, weights_only=True)
    content["model"]["rpn.head.conv.0.0.bias"][7] = torch.inf
    torch.save(content, path)


def test_checkpoints_that_are_not(call, dataset, teachers, checkpoints, tmp_path):
    Path("/tmp/ghnd-test-was-run").unlink(missing_ok=True)
    path = tmp_path / "x.pt"
    cases = {
        "is not there": lambda: path.unlink(missing_ok=True),
        "never run": lambda: torch.save({"model": Code()}, path),
        "damaged": lambda: path.write_bytes(checkpoints["fasterrcnn"].read_bytes()[:100_000]),
        "no R-CNN detector": lambda: torch.save({"model": {"fc.weight": torch.zeros(1)}}, path),
        "no bottleneck": lambda: path.write_bytes(teachers["fasterrcnn"].read_bytes()),
        "unpack to more than it is": lambda: write_zip_bomb(path),
        "x.pt is spoilt: rpn.head.conv.0.0.bias has values that are not finite": lambda: spoil(
            checkpoints["fasterrcnn"], path
        ),
    }
    for text, make in cases.items():
        make()
        assert_told(
            call(evaluate, "--ckpt", path, "--data-dir", dataset),
            1,
            "evaluate.py: error:",
            path,
            text,
        )
    assert not Path("/tmp/ghnd-test-was-run").exists()


def test_a_refused_checkpoint_is_told_once_by_three_processes(dataset, tmp_path):
    (tmp_path / "x.pt").write_bytes(b"junk")
    process = run(
        "evaluate.py", "--ckpt", tmp_path / "x.pt", "--data-dir", dataset, *SIZE_FLAGS, nproc=3
    )
    assert process.returncode != 0 and process.stderr.count("x.pt was refused") == 1


def test_a_teacher_that_cannot_be_downloaded(monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", offline)
    with pytest.raises(
        OSError, match=r"maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth elsewhere .* --teacher-ckpt"
    ):
        models.load_teacher("maskrcnn")


# ---- output


def test_an_output_folder_that_cannot_be_written(call, flags, tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", "/proc/ghnd"):
        assert_told(
            call(train, *flags, "--output-dir", folder),
            1,
            f"--output-dir {folder} cannot be written",
        )
    assert (tmp_path / "file").read_bytes() == b""


def test_no_checkpoint_of_another_run_is_overwritten(call, flags, tmp_path):
    out, best = tmp_path / "out", tmp_path / "out" / BEST.format("fasterrcnn")
    out.mkdir()
    best.write_bytes(b"the published one")
    for more in ([], ["--resume"]):
        assert_told(
            call(train, *flags, *more),
            1,
            best,
            "exists and this run did not write it",
            "--overwrite",
        )
    assert best.read_bytes() == b"the published one"

    assert call(train, *flags, "--overwrite")[0] == 0
    written = digests(out)
    assert len(written) == 2
    assert_told(call(train, *flags), 1, "last.pt", "--resume", "--overwrite")
    assert call(train, *flags, "--resume")[0] == 0  # nothing left to train
    assert digests(out)[best] == written[best]

    torch.save({"model": {}, "config": {"train": {"num_epochs": 20}}}, best)
    before = digests(out)
    assert_told(call(train, *flags, "--resume", "--epochs", "2"), 1, best, "did not write it")
    best.write_bytes(b"junk")
    assert_told(call(train, *flags, "--resume", "--epochs", "2"), 1, best)
    best.unlink()
    assert_told(call(train, *flags, "--resume", "--seed", "3"), 1, "last.pt", "seed 0, not 3")
    assert_told(call(train, *flags, "--resume", "--limit-train", "13"), 1, "n_images 12, not 13")
    assert_told(call(train, *flags, "--resume", "--limit-val", "3"), 1, "val_images 2, not 3")
    state = torch.load(flags[flags.index("--teacher-ckpt") + 1])
    state["rpn.head.cls_logits.bias"] += 1
    torch.save(state, tmp_path / "other.pt")
    assert_told(
        call(train, *flags, "--resume", "--teacher-ckpt", tmp_path / "other.pt"),
        1,
        "last.pt belongs to another teacher",
        "rpn.head.cls_logits.bias",
    )
    assert digests(out).items() <= before.items()
    (out / "fasterrcnn" / "last.pt").write_bytes(b"junk")
    assert_told(call(train, *flags, "--resume"), 1, "last.pt was refused")
    torch.save({"some": "thing"}, out / "fasterrcnn" / "last.pt")
    assert_told(call(train, *flags, "--resume"), 1, "last.pt was not written by this train.py")


def test_a_resumed_run_ends_with_a_checkpoint_of_its_own(call, flags, tmp_path):
    best = tmp_path / "out" / BEST.format("fasterrcnn")
    last = tmp_path / "out" / "fasterrcnn" / "last.pt"
    assert call(train, *flags)[0] == 0
    torch.save({"model": {}, "config": {}}, best)  # as if unpacked over it
    content = torch.load(last, weights_only=True)
    content["progress"]["best_value"] = 1.0  # never to be beaten
    torch.save(content, last)
    assert call(train, *flags, "--resume", "--overwrite", "--epochs", "2")[0] == 0
    written = torch.load(best, weights_only=True)
    assert written["progress"]["epoch"] == 1 and 0 <= written["best_value"] < 1


def test_a_last_checkpoint_that_cannot_be_resumed(call, flags, tmp_path):
    assert call(train, *flags)[0] == 0
    path = tmp_path / "out" / "fasterrcnn" / "last.pt"
    last = torch.load(path, weights_only=True)
    model = {**last["model"], "backbone.body.conv1.weight": torch.full((64, 3, 7, 7), torch.nan)}
    for text, change in {
        "last.pt was not written by this train.py": {"progress": last["progress"] | {"x": 1}},
        "last.pt was not written by this train.py (": {"position": {"step": 1}},
        "last.pt was not written by this train.py ('param_groups'": {"optimizer": {}},
        "last.pt is spoilt: backbone.body.conv1.weight has values that": {"model": model},
    }.items():
        torch.save(last | change, path)
        before = digests(tmp_path / "out")
        assert_told(call(train, *flags, "--resume"), 1, text)
        assert digests(tmp_path / "out") == before


@pytest.fixture
def poisoned(teachers, tmp_path):
    """A teacher with a weight so large, though finite, that features and loss are not."""
    state = torch.load(teachers["fasterrcnn"])
    state["backbone.body.layer3.0.conv1.weight"][0] = 3e38
    torch.save(state, tmp_path / "poisoned.pt")
    return tmp_path / "poisoned.pt"


def test_a_loss_that_is_not_finite_saves_nothing(call, flags, poisoned, tmp_path):
    told = call(train, *flags, "--teacher-ckpt", poisoned, "--save-every-minutes", "0")
    assert_told(
        told,
        1,
        "the loss is no longer finite at epoch 0, step 1, lr 1e-03; terms of the loss: layer1 ",
        "layer3 nan",
    )
    index, folder = data.load_split(Path(flags[3]), "train", 12)
    batch = next(iter(data.GroupedBatches(index, 4, 0, 1)))
    assert " ".join(f"{folder / index.names[image]}" for image, _ in batch) in told[1]
    assert digests(tmp_path / "out") == {}


def test_a_bug_is_told_with_its_traceback(call, flags, monkeypatch, tmp_path):
    def broken(*_, **__):
        raise RuntimeError("a slip of ours")

    monkeypatch.setattr(models, "build_student", broken)
    status, message = call(train, *flags)
    assert status == 1 and "Traceback" in message and "a slip of ours" in message
    assert "Traceback" in (tmp_path / "out" / "fasterrcnn" / "train.log").read_text()


def test_overwriting_leaves_nothing_of_the_old_run_to_resume(call, flags, poisoned, tmp_path):
    assert call(train, *flags)[0] == 0
    broken = call(train, *flags, "--overwrite", "--teacher-ckpt", poisoned)
    assert_told(broken, 1, "the loss is no longer finite")
    assert digests(tmp_path / "out") == {}


def test_the_demo_draws_over_nobodys_images(call, own_dataset, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (own_dataset / "annotations" / "instances_val2017.json").unlink()
    before = {path: path.read_bytes() for path in own_dataset.rglob("*.jpg")}
    assert_told(
        call(train, "--demo", "--data-dir", own_dataset), 1, own_dataset, "holds images already"
    )
    assert before == {path: path.read_bytes() for path in own_dataset.rglob("*.jpg")}


def test_detections_that_cannot_be_saved_are_told_before_the_evaluation(
    call, dataset, checkpoints, tmp_path
):
    flags = [
        "--ckpt",
        checkpoints["fasterrcnn"],
        "--data-dir",
        dataset,
        "--save-detections",
        tmp_path,
    ]
    begin = time.monotonic()
    assert_told(call(evaluate, *flags), 1, tmp_path)
    assert time.monotonic() - begin < 30
