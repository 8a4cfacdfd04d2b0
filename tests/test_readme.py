"""Every block of Python in both READMEs is run, with small data under the names that it uses."""

import json
import re
import runpy
import shutil
import sys
import threading

import pytest
import torch
from conftest import BEST, ROOT, find_free_port, records

import evaluate
import losses
import models
import train

SPLIT, STRIDED, SPARSE = re.findall(
    r"```python\n(.+?)```", (ROOT / "README.md").read_text(), re.DOTALL)
PLOT, PRECISION, SERVER, DEVICE, EXPORT = re.findall(
    r"```python\n(.+?)```", (ROOT / "tests" / "README.md").read_text(), re.DOTALL)
BEST = BEST.format("fasterrcnn")


@pytest.fixture
def place(tmp_path, monkeypatch, dataset, checkpoints):
    """A working folder with a student.pt and a photo.jpg."""
    monkeypatch.chdir(tmp_path)
    content = models.load_checkpoint(checkpoints["fasterrcnn"])
    content["config"] = {"bottleneck_channels": 3, "min_size": 96, "max_size": 160}
    torch.save(content, "student.pt")
    shutil.copy(dataset / "val2017" / "000000000002.jpg", "photo.jpg")
    return tmp_path


@pytest.fixture
def run_script(place, dataset, teachers, monkeypatch):
    """A function that saves a block under the name in its first line, and runs it as a script."""

    def run_script(block, *flags):
        name = re.match(r"# (\w+\.py): ", block)[1]
        (place / name).write_text(block)
        monkeypatch.setattr("sys.argv", [name, *map(str, flags), "--data-dir", str(dataset),
                                         "--teacher-ckpt", str(teachers["fasterrcnn"]),
                                         "--limit-val", "1", "--device", "cpu", "--workers", "0"])
        runpy.run_path(str(place / name), run_name="__main__")

    return run_script


TRAIN = ("--arch fasterrcnn --output-dir out --images-per-step 1 --limit-train 2 "
         "--min-size 64 --max-size 96").split()


def test_the_plot(place):
    pytest.importorskip("matplotlib").use("agg")
    (place / "coco" / "maskrcnn").mkdir(parents=True)
    (place / "tests").symlink_to(ROOT / "tests")
    lines = [{"kind": "start"}, *({"kind": "epoch", "epoch": i, "loss": 3e6 / i} for i in (1, 2))]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (place / "coco" / "maskrcnn" / "metrics.jsonl").write_text(text)
    exec(PLOT, {})
    assert (place / "loss.png").stat().st_size > 5000


def test_ap_of_each_category(place, dataset, capsys):
    pytest.importorskip("matplotlib").use("agg")
    # A trained student would take minutes, so these are the annotations, those of boxes moved.
    content = json.loads((dataset / "annotations" / "instances_val2017.json").read_text())
    content["categories"].reverse()  # in files they come in any order
    (place / "instances_val2017.json").write_text(json.dumps(content))
    detections = []
    for annotation in content["annotations"]:
        x, y, width, height = annotation["bbox"]
        moved = width / 5 * (annotation["category_id"] == 1)
        detections.append({"image_id": annotation["image_id"], "bbox": [x + moved, y, width, height],
                           "category_id": annotation["category_id"], "score": 0.9})
    evaluate.save_detections(detections, ["bbox"], place / "detections.json")
    exec(PRECISION, {})
    out = capsys.readouterr().out
    assert "box AP 0.400, AP50 1.000\nellipse AP 1.000, AP50 1.000\n" in out
    assert (place / "precision_recall.png").stat().st_size > 5000


def test_head_and_tail(place):
    names = {}
    exec(SPLIT, names)
    assert set(names["detections"]) == {"boxes", "labels", "scores"}
    assert names["config"]["min_size"] == 96 and len(names["payload"]) > 100


def test_head_and_tail_over_a_socket(place, monkeypatch, capsys):
    free_port = find_free_port()
    monkeypatch.setattr(sys, "argv", ["device.py", "127.0.0.1", "photo.jpg"])
    server = threading.Thread(target=exec, args=(SERVER.replace("5000", free_port), {}))
    server.start()
    for attempt in range(100):
        try:
            exec(DEVICE.replace("5000", free_port), {})
            break
        except ConnectionRefusedError:
            server.join(0.1)
    server.join(60)
    assert "'boxes': tensor" in capsys.readouterr().out


def test_the_heads_export(place):
    student, _ = models.load_student(place / "student.pt")
    names = {"torch": torch, "head": models.Head(student)}
    exec(EXPORT.replace("800, 1088", "96, 160"), names)
    q, _, _ = names["program"].module()(torch.rand(1, 3, 128, 64))
    assert q.shape == (1, 3, 36, 20)


def test_another_bottleneck_is_trained_resumed_and_evaluated(run_script, place, capsys):
    run_script(STRIDED, "train", *TRAIN, "--epochs", 1)
    run_script(STRIDED, "train", *TRAIN, "--epochs", 1, "--resume")  # there remains the test
    assert "from epoch 0, step 2 on" in capsys.readouterr().out
    run_script(STRIDED, "evaluate", "--ckpt", f"out/{BEST}", "--bits", 32)
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    _, epoch = records(place / "out", "epoch")  # validated at the sizes that are in the file
    assert summary["rate"][0]["metrics"] == summary["student"] == epoch["metrics"]
    [start, _] = records(place / "out", "start")
    assert start["config"]["bottleneck"] == "__main__.Strided"
    assert start["config"]["bottleneck_channels"] == 6


def test_one_more_loss_term_is_trained(place, dataset, teachers):
    names = {"losses": losses}
    exec(SPARSE, names)
    flags = [*TRAIN, "--epochs", "1", "--data-dir", str(dataset), "--limit-val", "1", "--workers", "0",
             "--teacher-ckpt", str(teachers["fasterrcnn"]), "--device", "cpu"]
    sums = []

    def criterion(student_maps, teacher_maps, layer_weights):
        loss, errors = names["sparse_loss"](student_maps, teacher_maps, layer_weights)
        sums.append(errors.sum() + 0.1 * student_maps[0].detach().abs().sum())
        return loss, errors

    train.main(flags, criterion=criterion)
    logged = [step["loss"] for step in records(place / "out", "step")]
    assert logged == pytest.approx([4 * x.item() for x in sums], rel=1e-5)  # of one image, not 4
