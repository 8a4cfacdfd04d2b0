import contextlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import ARCHS, BEST, SIZE_FLAGS, SIZES, finish, records, run_script, same
from torch import nn
from torch.overrides import TorchFunctionMode

import data
import distributed
import evaluate
import losses
import models
import train

PUBLISHED = json.loads((Path(__file__).parent / "published_training.json").read_text())


def flags(arch, dataset, teachers, output_dir, *more):
    return ["--arch", arch, "--data-dir", dataset, "--teacher-ckpt", teachers[arch],
            "--output-dir", output_dir, *SIZE_FLAGS, *more]


# ---- the experiments


@pytest.mark.parametrize("arch", ARCHS)
def test_experiments_are_the_published_ones(arch):
    experiment, published = train.EXPERIMENTS[arch], PUBLISHED[arch]["epochs"]
    assert asdict(experiment) == {
        "arch": arch, "bottleneck_channels": 3, "epochs": 20, "images_per_step": 12,
        "reference_batch": 4, "layer_weights": (1, 1, 1, 1), "lr": 1e-3, "lr_drops": (5, 15), "lr_drop_factor": 0.1,
        "min_size": 800, "max_size": 1333, "seed": 0,
        "published_box_map": {i: epoch["new_best_bbox_map"] for i, epoch in enumerate(published)
                              if "new_best_bbox_map" in epoch},
        "published_loss": tuple(
            float(f"{epoch['loss']['9000'][1] / 1e6:.3f}e6") for epoch in published)}
    assert evaluate.PUBLISHED[arch]["student"] == PUBLISHED["reported"][arch]
    steps = PUBLISHED["train_images_after_filtering"] // experiment.images_per_step
    assert steps == PUBLISHED[arch]["iterations_per_epoch"]


def test_learning_rate_follows_the_published_log():
    optimizer, scheduler = train.build_optimizer(nn.Linear(1, 1), train.MASKRCNN)
    for epoch in PUBLISHED["maskrcnn"]["epochs"]:
        assert optimizer.param_groups[0]["lr"] == pytest.approx(epoch["lr"], rel=1e-12)
        optimizer.step()
        scheduler.step()


def test_an_edited_experiment_is_what_is_trained(monkeypatch):
    edited = replace(train.MASKRCNN, epochs=30, images_per_step=24, min_size=600, seed=7)
    monkeypatch.setitem(train.EXPERIMENTS, "maskrcnn", edited)
    monkeypatch.setattr("sys.argv", ["train.py", "--arch", "maskrcnn", "--max-size", "999"])
    assert train.parse_args()[1] == replace(edited, max_size=999)


@pytest.mark.parametrize("processes", [5, 7, 8, 24])
def test_processes_that_cannot_share_a_step(processes, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    monkeypatch.setattr("sys.argv", ["train.py", "--arch", "maskrcnn"])
    with pytest.raises(SystemExit, match="2"):
        train.parse_args()
    assert f"{processes} processes cannot share 12 images" in capsys.readouterr().err


@pytest.mark.parametrize("processes, told", [
    (1, "of 1 x 3 x 4\n"), (2, "of 2 x 2 x 3\n"), (3, "of 3 x 1 x 4\n"), (4, "of 4 x 1 x 3\n"), (6, "of 6 x 1 x 2\n"),
    (12, "of 12 x 1 x 1\n")])
def test_twelve_images_are_shared_as_the_recipe_says(
        processes, told, dataset, teachers, tmp_path, monkeypatch, call, caplog):
    def stop(*_):
        raise ValueError("so far")

    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    monkeypatch.setattr(distributed, "set_up", torch.device)
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda stem: stem)
    monkeypatch.setattr(train, "train", stop)
    with caplog.at_level("INFO", "ghnd"):
        assert "so far" in call(train.main, *flags("fasterrcnn", dataset, teachers, tmp_path))[1]
    assert told in caplog.text


# ---- one step is the same step on any number of processes


def one_step():
    """Write loss and gradients of a step with BatchNorm in eval mode to a file."""
    import sys

    folder, teacher_file, out = map(Path, sys.argv[1:])
    distributed.set_up("cpu")
    processes, experiment = distributed.world_size(), train.FASTERRCNN
    teacher = models.load_teacher("fasterrcnn", teacher_file, 64, 128)
    torch.manual_seed(0)
    distiller = models.Distiller(teacher, models.build_student(teacher))
    stem = distiller.student_stem.to(memory_format=models.memory_format(torch.device("cpu")))
    for module in stem.modules():
        if isinstance(module, nn.BatchNorm2d):  # batch statistics would be the micro-batch's
            module.eval()
            module.train = lambda mode=True, module=module: module
    if processes > 1:
        distiller.student_stem = nn.parallel.DistributedDataParallel(stem)
    index, images = data.load_split(folder, "train")
    loader = data.train_loader(index, images, {1: 4, 2: 3, 3: 4, 4: 3}[processes], 0, 0)
    optimizer = torch.optim.SGD([p for p in stem.parameters() if p.requires_grad], lr=0)
    reports = []
    train.train(experiment, distiller, teacher.transform, loader, optimizer, train.Progress(),
                lambda **values: reports.append(values))
    if distributed.rank() == 0:
        grads = {name: p.grad for name, p in stem.named_parameters() if p.grad is not None}
        torch.save({"loss": reports[0]["loss"], "errors": reports[0]["relative_errors"],
                    "grads": grads, "steps": len(reports)}, out)


def test_a_step_has_the_same_loss_and_gradient_on_1_2_3_and_4_processes(teachers, tmp_path):
    # 12 training images of one size, so that no micro-batch is padded
    data.write_demo_dataset(tmp_path, train=14, val=1, seed=2)
    file = tmp_path / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    content["images"] = content["images"][:12]
    generator = torch.Generator().manual_seed(0)
    for image in content["images"]:
        image["width"], image["height"] = 128, 96
        pixels = torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8, generator=generator)
        data.to_pil_image(pixels).save(tmp_path / "train2017" / image["file_name"])
        content["annotations"].append({**content["annotations"][0], "image_id": image["id"]})
    file.write_text(json.dumps(content))
    teacher_file, steps = teachers["fasterrcnn"], {}
    for processes in (None, 2, 3, 4):
        finish(one_step, tmp_path, teacher_file, tmp_path / "step.pt", processes=processes)
        steps[processes] = torch.load(tmp_path / "step.pt")
        assert steps[processes]["steps"] == 1
    alone = steps[None]
    for processes, other in steps.items():
        off = abs(other["loss"] / alone["loss"] - 1)
        # a bias before a BatchNorm in eval mode has a true gradient, so all can be compared
        grads_off = max(((other["grads"][name] - grad).norm() / grad.norm()).item()
                        for name, grad in alone["grads"].items())
        print(f"\n{processes or 1} processes: loss off by {off:.1e}, gradients by {grads_off:.1e}")
        assert off < 1e-5 and grads_off < 1e-4
        assert other["errors"] == pytest.approx(alone["errors"], rel=1e-5)

    # and the loss is (sum over the 12 images) / 3, with a gradient to match
    index, folder = data.load_split(tmp_path, "train")
    images = data.CocoImages(index, folder)
    flips = dict(key for batch in data.GroupedBatches(index, 4, 0, 1) for key in batch)
    teacher = models.load_teacher("fasterrcnn", teacher_file, 64, 128)
    torch.manual_seed(0)
    student = models.build_student(teacher)
    batch = teacher.transform([images[key] / 255 for key in flips.items()])[0].tensors
    pairs = zip(student.backbone.body(batch).values(), teacher.backbone.body(batch).values())
    loss = sum(((s - t) ** 2).sum() for s, t in pairs) / 3
    loss.backward()
    assert alone["loss"] == pytest.approx(loss.item(), rel=1e-5)
    wanted = student.backbone.body.conv1.weight.grad
    assert (alone["grads"]["0.weight"] - wanted).norm() < 1e-3 * wanted.norm()


# ---- whole runs


@pytest.fixture(scope="module")
def three_processes(dataset, teachers, tmp_path_factory):
    """A whole run of Mask R-CNN under torchrun, on 3 processes: its output folder and its process."""
    folder = tmp_path_factory.mktemp("three")
    process = run_script("train.py", *flags("maskrcnn", dataset, teachers, folder, "--epochs", 1,
                                            "--limit-train", 24, "--limit-val", 3), nproc=3)
    assert process.returncode == 0, process.stderr
    return folder, process


def test_a_run_on_three_processes_reports_what_it_did(three_processes):
    folder, process = three_processes
    steps, epochs, tests = (
        records(folder / "maskrcnn", kind) for kind in ("step", "epoch", "test"))
    assert [step["step"] for step in steps] == [2] and len(epochs) == len(tests) == 1
    step = steps[0]
    assert step["loss"] == epochs[0]["loss"] > 0 and len(step["relative_errors"]) == 4
    assert step["lr"] == 1e-3 and step["images_per_second"] > 0
    assert 0 <= step["data_wait"] <= 1 and step["hours_left"] == 0
    log = (folder / "maskrcnn" / "train.log").read_text()
    for text in ("epoch 0 step 2/2 loss", "relative errors", "img/s", "h left", "data wait", "MiB",
                 "0.379", "0.336"):
        assert text in process.stdout and text in log
    assert process.stdout.count("epoch 0 step 2/2") == 1
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == sorted(
        [BEST.format("maskrcnn"), "last.pt", "metrics.jsonl", "train.log"])


def test_only_conv1_and_layer1_have_changed(three_processes, teachers):
    teacher = torch.load(teachers["maskrcnn"])
    state = torch.load(three_processes[0] / BEST.format("maskrcnn"), weights_only=True)["model"]
    torch.manual_seed(0)
    start = models.build_student(models.load_teacher("maskrcnn", teachers["maskrcnn"])).state_dict()
    assert list(state) == list(start)
    for key, value in state.items():
        trained = key.startswith(("backbone.body.conv1.", "backbone.body.layer1."))
        assert torch.equal(value, start[key]) != trained, key
        assert trained or torch.equal(value, teacher[key]), key


@pytest.mark.parametrize("processes", [None, 2, 3])
def test_the_checkpoint_gives_the_figures_of_its_last_validation(
        three_processes, dataset, processes):
    folder = three_processes[0]
    run = finish(evaluate.main, "--ckpt", folder / BEST.format("maskrcnn"), "--data-dir", dataset,
                 *SIZE_FLAGS, "--limit-val", 3, processes=processes)
    validated = records(folder / "maskrcnn", "epoch")[-1]["figures"]
    assert json.loads(run.out.splitlines()[-1])["student"] == validated
    assert records(folder / "maskrcnn", "test")[0]["figures"]["student"] == validated
    assert any(0 < figure < 1 for figure in validated["bbox"])


def test_the_same_command_gives_the_same_losses_and_tensors(dataset, teachers, tmp_path):
    for name, more in (("a", []), ("b", []), ("c", ["--seed", 1])):
        finish(train.main, *flags("fasterrcnn", dataset, teachers, tmp_path / name, "--epochs", 1,
                                  "--limit-val", 1, "--limit-train", 12, *more))
    a, b, c = (records(tmp_path / name / "fasterrcnn", "step")[0]["loss"] for name in "abc")
    assert a == b != c
    a, b, c = (torch.load(tmp_path / name / BEST.format("fasterrcnn"), weights_only=True)
               for name in "abc")
    assert same(a, b) and not same(a["model"], c["model"])


@pytest.mark.parametrize("more, told", [
    (["--seed", 7], True), ([], True), (["--min-size", 600], False), (["--epochs", 2], False),
    (["--limit-val", 2], False)])
def test_epochs_are_told_beside_the_published_ones_only_in_the_full_recipe(
        more, told, dataset, teachers, tmp_path, call, caplog, monkeypatch):
    """With a loop that trains nothing and files that are none, so that each epoch is told at once."""
    def train_nothing(experiment, distiller, transform, loader, optimizer, progress, *_):
        optimizer.step()
        progress.step = len(loader)

    saved, load = {}, models.load_checkpoint
    monkeypatch.setattr(train, "train", train_nothing)
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: ({"bbox": [0.35] * 12}, [], None))
    monkeypatch.setattr(models, "save_checkpoint", lambda content, path: saved.update({path: content}))
    monkeypatch.setattr(models, "load_checkpoint", lambda path: saved.get(path) or load(path))
    with caplog.at_level("INFO", "ghnd"):
        assert call(train.main, "--arch", "fasterrcnn", "--data-dir", dataset, "--teacher-ckpt",
                    teachers["fasterrcnn"], "--output-dir", tmp_path, *more) == (0, "")
    assert ("1.1740e+06" in caplog.text and "0.3545" in caplog.text) == told
    assert "epoch 1: mean loss 0.0000e+00, box mAP 0.3500, best before 0.3500" in caplog.text


def test_bfloat16_is_refused_where_it_would_be_emulated(dataset, teachers, tmp_path, monkeypatch, call):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    told = call(train.main, *flags("fasterrcnn", dataset, teachers, tmp_path, "--amp", "bf16"))
    assert told == (1, "train.py: error: --amp bf16: this cpu has no bfloat16; leave the flag out\n")
    for supported in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                            lambda including_emulation, s=supported: s and not including_emulation)
        assert models.has_bf16(torch.device("cuda")) == supported


def test_frozen_layers_cast_once_give_autocasts_maps(teachers):
    teacher = models.load_teacher("fasterrcnn", teachers["fasterrcnn"], **SIZES)
    student, batch = models.build_student(teacher), torch.randn(2, 3, 64, 96)
    once, each_time = (models.Distiller(teacher, student, bf16) for bf16 in (True, False))
    each_time.bf16 = True  # autocast alone, over float32 weights
    wanted = each_time(batch)
    assert same(once(batch), wanted) and wanted[1][3].dtype == torch.bfloat16
    assert next(once.shared_layers.parameters()).dtype == torch.bfloat16
    assert {p.dtype for p in once.student_stem.parameters()} == {torch.float32}


@pytest.mark.skipif(not models.has_bf16(torch.device("cpu")), reason="this CPU has no bfloat16")
def test_bfloat16_trains_too(dataset, teachers, tmp_path):
    finish(train.main, *flags("fasterrcnn", dataset, teachers, tmp_path, "--epochs", 1,
                              "--limit-train", 12, "--limit-val", 2, "--amp", "bf16"))
    (step,) = records(tmp_path / "fasterrcnn", "step")
    assert step["loss"] > 0 and all(0 < e < 3 for e in step["relative_errors"])


def test_the_demo_shows_what_it_says(tmp_path, monkeypatch, capfd):
    process = run_script("train.py", "--demo", "--epochs", 1, "--limit-train", 60, "--limit-val", 2,
                         cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    steps = records(tmp_path / "demo" / "fasterrcnn", "step")
    assert [step["step"] for step in steps] == list(range(1, 6))
    for layer in range(4):
        assert steps[-1]["relative_errors"][layer] < 0.9 * steps[0]["relative_errors"][layer]
    assert len(list((tmp_path / "demo" / "pictures").iterdir())) == 2
    command = process.stdout.splitlines()[-1].split()
    assert command[:2] == ["python", "evaluate.py"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [*command[1:], "--limit-val", "2"])
    with pytest.raises(SystemExit, match="0"):
        distributed.run(evaluate.main)
    figures = json.loads(capfd.readouterr().out.splitlines()[-1])
    tested = records(tmp_path / "demo" / "fasterrcnn", "test")[0]["figures"]
    assert {who: figures[who] for who in tested} == tested  # 32 bits are the student as it is
    assert [row["bits"] for row in figures["rate"]] == [32, 8, 4, 2]


def test_the_weights_of_the_layers_are_the_experiments(dataset, teachers, tmp_path, monkeypatch, call):
    """With (1, 0, 0, 0), which is HND, the loss is layer1's alone, and so is the gradient."""
    monkeypatch.setitem(train.EXPERIMENTS, "fasterrcnn",
                        replace(train.FASTERRCNN, layer_weights=(1, 0, 0, 0)))
    terms, ghnd_loss = [], losses.ghnd_loss
    monkeypatch.setattr(losses, "ghnd_loss", lambda *args: terms.append(ghnd_loss(*args)) or terms[-1])
    common = flags("fasterrcnn", dataset, teachers, tmp_path, "--epochs", 1, "--limit-train", 12,
                   "--limit-val", 1, "--bottleneck-channels", 6)
    assert call(train.main, *common) == (0, "")
    assert all(loss == errors[0] for loss, errors in terms) and len(terms) == 3
    wanted = sum(loss.item() for loss, _ in terms) / 3
    assert records(tmp_path / "fasterrcnn", "step")[0]["loss"] == pytest.approx(wanted, rel=1e-6)
    best = tmp_path / BEST.format("fasterrcnn")
    assert models.load_student(best)[0].backbone.body.layer1.encoder[7].out_channels == 6
    assert "published" not in (tmp_path / "fasterrcnn" / "train.log").read_text()
    told = call(train.main, *common, "--resume", "--bottleneck-channels", 3)
    assert told[0] == 1 and "with bottleneck_channels 6, not 3" in told[1]


def test_a_teacher_of_21_classes_end_to_end(dataset, tmp_path, call, capfd):
    """A data set of one's own: the number of classes follows from the teacher, then the student."""
    torch.manual_seed(0)
    teacher = models.build_detector("fasterrcnn", classes=21)
    torch.save(teacher.state_dict(), tmp_path / "fasterrcnn.pt")
    common = flags("fasterrcnn", dataset, {"fasterrcnn": tmp_path / "fasterrcnn.pt"}, tmp_path / "out")
    assert call(train.main, *common, "--epochs", 1, "--limit-train", 12, "--limit-val", 1) == (0, "")
    best = tmp_path / "out" / BEST.format("fasterrcnn")
    student, arch = models.load_student(best)
    assert arch == "fasterrcnn" and student.roi_heads.box_predictor.cls_score.out_features == 21
    finish(evaluate.main, "--ckpt", best, "--data-dir", dataset, *SIZE_FLAGS, "--limit-val", 1)


# ---- what a GPU would show


class Copies(TorchFunctionMode):
    """Notes what is copied to the meta device, and whether the host would wait, were it a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result, to = func(*args, **(kwargs or {})), torch.Tensor.to
        if func in (to, torch.Tensor.copy_, torch.as_tensor, torch.tensor) and result.is_meta:
            source = args[1] if func is torch.Tensor.copy_ else args[0]
            on_host = not isinstance(source, torch.Tensor) or not source.is_meta
            if on_host:
                self.found.append((func, not (kwargs or {}).get("non_blocking")))
        return result


@pytest.mark.parametrize("placed", [True, False])
def test_between_log_lines_the_host_never_waits_for_the_device(placed, dataset, monkeypatch):
    """On the meta device, which has no values: whatever reads one raises there."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # not on meta
    index, folder = data.load_split(dataset, "train")
    loader = data.train_loader(index, folder, 3, 0, 0)
    experiment = replace(train.MASKRCNN, images_per_step=6, **SIZES)
    teacher = models.build_detector("maskrcnn", **SIZES)
    student = models.build_student(teacher)
    for detector in (teacher, student):
        models.to_device(detector, torch.device("meta")) if placed else detector.to("meta")
    distiller, steps = models.Distiller(teacher, student), []
    optimizer, _ = train.build_optimizer(distiller.student_stem, experiment)
    monkeypatch.setattr(distributed, "noted_signal", lambda: steps.append(len(copies.found)) or 0)
    with Copies() as copies, pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        train.train(experiment, distiller, teacher.transform, loader, optimizer, train.Progress(),
                    None, log_every=3)
    assert len(steps) == 3  # the third, which is to be reported, waits
    if placed:  # each of a step's 6 images crosses once, and nothing else does
        assert copies.found == [(torch.Tensor.to, False)] * 18 and steps == [6, 12, 18]
    else:  # torchvision copies its two constants for each image
        assert (torch.as_tensor, True) in copies.found and steps == [18, 36, 54]
