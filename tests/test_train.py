import contextlib
import json
import math
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ARCHS, BEST, CPU, SIZE_FLAGS, SIZES, Job, edit_json, records, same
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision.transforms.functional import to_pil_image

import data
import distributed
import evaluate
import losses
import models
import train
from distributed import InputError

PUBLISHED = json.loads((Path(__file__).parent / "published_training.json").read_text())

VAL_IMAGES = 11  # of the data set of conftest.py
SMALL = ["--min-size", "64", "--max-size", "96"]


def flags(arch, dataset, teachers, output_dir, *more):
    return ["--arch", arch, "--data-dir", dataset, "--teacher-ckpt", teachers[arch],
            "--output-dir", output_dir, *SIZE_FLAGS, *more]


# ---- the experiments -----------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_experiments_are_the_published_ones(arch):
    experiment, epochs = train.EXPERIMENTS[arch], PUBLISHED[arch]["epochs"]
    assert asdict(experiment) == {
        "arch": arch, "bottleneck_channels": 3, "layer_weights": (1, 1, 1, 1), "epochs": 20,
        "images_per_step": 12, "reference_batch": 4, "lr": 1e-3, "lr_drops": (5, 15),
        "lr_drop_factor": 0.1, "min_size": 800, "max_size": 1333, "seed": 0}
    assert train.PUBLISHED_EPOCHS[arch] == tuple(
        (float(f"{epoch['loss']['9000'][1] / 1e6:.3f}e6"), epoch.get("new_best_bbox_map"))
        for epoch in epochs)
    assert evaluate.PUBLISHED_AP[arch]["student"] == PUBLISHED["reported"][arch]
    assert train.RECIPE_IMAGES == PUBLISHED["train_images_after_filtering"]
    steps = train.RECIPE_IMAGES // experiment.images_per_step
    assert steps == PUBLISHED[arch]["iterations_per_epoch"]


def test_learning_rate_follows_the_published_log():
    optimizer, scheduler = train.build_optimizer(nn.Linear(1, 1), train.MASKRCNN)
    for epoch in PUBLISHED["maskrcnn"]["epochs"]:
        assert optimizer.param_groups[0]["lr"] == pytest.approx(epoch["lr"], rel=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("processes, micro_batch, accumulation", [
    (1, 4, 3), (2, 3, 2), (3, 4, 1), (4, 3, 1), (6, 2, 1), (12, 1, 1)])
def test_twelve_images_are_shared_as_the_recipe_says(processes, micro_batch, accumulation):
    assert train.share_step(12, processes) == (micro_batch, accumulation)


@pytest.mark.parametrize("processes", [5, 7, 8, 24])
def test_processes_that_cannot_share_a_step_are_told(processes):
    with pytest.raises(InputError, match=f"{processes} processes cannot share 12 images"):
        train.share_step(12, processes)


def test_flags_change_the_experiment_and_nothing_else(monkeypatch):
    seen = []
    monkeypatch.setattr(train, "run_experiment", lambda *args, **kwargs: seen.append((args, kwargs)))
    flags = ("--arch maskrcnn --max-size 999 --epochs 3 --layer-weights 1 0 0 0.5 --lr 2e-4 "
             "--lr-drops 1 2 --data-dir /x --resume")
    monkeypatch.setattr("sys.argv", ["train.py", *flags.split()])
    train.main()
    [((experiment,), settings)] = seen
    assert experiment == replace(
        train.MASKRCNN, max_size=999, epochs=3, layer_weights=(1, 0, 0, 0.5), lr=2e-4,
        lr_drops=(1, 2))
    assert settings["data_dir"] == Path("/x") and settings["resume"] is True
    assert settings["save_every"] == 2000 and settings["output_dir"] == Path("coco/maskrcnn")


@pytest.mark.parametrize("changes, message", [
    ({"epochs": 0}, "epochs is 0"), ({"images_per_step": -3}, "images_per_step is -3"),
    ({"seed": -1}, "seed is -1"), ({"seed": 2**64}, "seed is 18446744073709551616"),
    ({"layer_weights": (1.0,)}, "one for each of 4 layers")])
def test_an_experiment_that_cannot_be_run_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        replace(train.FASTERRCNN, **changes)


# ---- one step is the same step on any number of processes ----------------------------------------


def one_step():
    """Write loss and gradients of a step, with BatchNorm in eval mode, to a file."""
    import sys

    folder, teacher_file, output = map(Path, sys.argv[1:])
    distributed.set_up("cpu")
    processes = distributed.world_size()
    teacher = models.to_device(models.load_teacher("fasterrcnn", teacher_file, 64, 128), CPU)
    torch.manual_seed(0)
    student = models.to_device(models.build_student(teacher), CPU)
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):  # batch statistics would be the micro-batch's
            module.train = lambda mode=True, module=module: module
    student_body, teacher_body = models.training_bodies(student, teacher)
    if processes > 1:
        student_body = nn.parallel.DistributedDataParallel(student_body)
    micro_batch, _ = train.share_step(12, processes)
    images, images_folder = data.load_train_split(folder, 128)
    loader = data.train_loader(images, images_folder, micro_batch, 0, 0, CPU)
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0)
    reports = list(train.train_epoch(
        train.FASTERRCNN, train.Run(student, optimizer, None), student_body, teacher_body,
        teacher.transform, loader))
    if distributed.rank() == 0:
        grads = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        torch.save({"reports": reports, "grads": grads}, output)


@pytest.fixture
def images_of_one_size(own_dataset):
    """12 training images, so that no micro-batch is padded."""
    generator = torch.Generator().manual_seed(0)

    def shrink(content):
        content["images"] = content["images"][:12]
        for image in content["images"]:
            image["width"], image["height"] = 128, 96
            pixels = torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8, generator=generator)
            to_pil_image(pixels).save(own_dataset / "train2017" / image["file_name"])
            content["annotations"].append({**content["annotations"][0], "image_id": image["id"]})

    edit_json(own_dataset / "annotations" / "instances_train2017.json", shrink)
    return own_dataset


def test_a_step_has_the_same_loss_and_gradient_on_1_2_and_3_processes(
        images_of_one_size, teachers, tmp_path, finish):
    steps = {}
    for processes in (None, 2, 3):
        finish(one_step, images_of_one_size, teachers["fasterrcnn"], tmp_path / "step.pt",
               world_size=processes)
        steps[processes] = torch.load(tmp_path / "step.pt")
    alone = steps[None]
    [report] = alone["reports"]
    for processes, step in steps.items():
        [other] = step["reports"]
        loss_off = abs(other["loss"] / report["loss"] - 1)
        # A bias before a BatchNorm in eval mode has a true gradient, so all can be compared.
        grads_off = max(((step["grads"][name] - grad).norm() / grad.norm()).item()
                        for name, grad in alone["grads"].items())
        print(f"\n{processes or 1} processes: loss off by {loss_off:.1e}, grads {grads_off:.1e}")
        assert loss_off < 1e-5 and grads_off < 1e-4
        assert other["relative_errors"] == pytest.approx(report["relative_errors"], rel=1e-5)


def test_the_loss_is_that_of_twelve_images_by_three(
        images_of_one_size, teachers, tmp_path, finish):
    finish(one_step, images_of_one_size, teachers["fasterrcnn"], tmp_path / "step.pt")
    step = torch.load(tmp_path / "step.pt")
    images, folder = data.load_train_split(images_of_one_size, 128)
    dataset = data.CocoImages(images, folder)
    keys = [key for batch in data.GroupedBatches(images, 4, 0, 1) for key in batch]
    teacher = models.load_teacher("fasterrcnn", teachers["fasterrcnn"], 64, 128)
    torch.manual_seed(0)
    student = models.build_student(teacher)
    batch = teacher.transform([dataset[key] / 255 for key in keys])[0].tensors
    pairs = zip(student.backbone.body(batch).values(), teacher.backbone.body(batch).values())
    loss = sum(((s - t) ** 2).sum() for s, t in pairs) / 3
    loss.backward()
    assert step["reports"][0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    wanted = student.backbone.body.conv1.weight.grad
    assert (step["grads"]["backbone.body.conv1.weight"] - wanted).norm() < 1e-3 * wanted.norm()


# ---- whole runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three_processes(dataset, teachers, tmp_path_factory):
    """A whole run of Mask R-CNN on 3 processes: its output folder, and what it printed."""
    folder = tmp_path_factory.mktemp("three")
    job = Job(tmp_path_factory.mktemp("job"), train.main, flags(
        "maskrcnn", dataset, teachers, folder, "--epochs", 1, "--limit-train", 24, "--limit-val", 2,
        *SMALL), world_size=3)
    assert job.wait() == [0, 0, 0], job.err
    return folder, job.out


def test_a_run_on_three_processes_reports_what_it_did(three_processes, dataset):
    folder, out = three_processes
    starts, steps, epochs, tests = (
        records(folder, kind) for kind in ("start", "step", "epoch", "test"))
    assert [step["step"] for step in steps] == [1, 2]
    assert len(starts) == len(epochs) == len(tests) == 1
    losses = [step["loss"] for step in steps]
    assert epochs[0]["loss"] == pytest.approx(sum(losses) / 2) and losses[0] > 0
    step = steps[1]
    assert len(step["relative_errors"]) == 4
    assert step["lr"] == 1e-3 and step["images_per_second"] > 0
    assert 0 <= step["data_wait"] <= 1 and step["hours_left"] == 0
    assert list(epochs[0]["metrics"]["segm"]) == list(evaluate.METRICS)
    assert starts[0]["processes"] == 3 and starts[0]["data_dir"] == str(dataset)
    assert starts[0]["config"]["epochs"] == 1 and starts[0]["versions"]["torch"] == torch.__version__
    assert "--limit-train" in starts[0]["command"]
    log = (folder / "train.log").read_text()
    for text in ("epoch 0 step 2/2", "images left out", "validation 0: 2 images",
                 "test of the student: 2 images", '"kind": "start"'):
        assert out.count(text) == log.count(text) == 1, text
    assert "best before" not in out and " MiB" not in out and " h left" not in out
    assert {p.name for p in folder.rglob("*") if p.is_file()} == {
        BEST.format("maskrcnn"), "last.pt", "metrics.jsonl", "train.log"}


def test_only_conv1_and_layer1_have_changed(three_processes, teachers):
    teacher = torch.load(teachers["maskrcnn"])
    content = torch.load(three_processes[0] / BEST.format("maskrcnn"), weights_only=True)
    assert list(content) == ["model", "optimizer", "lr_scheduler", "best_value", "config", "args",
                             "progress"]
    torch.manual_seed(0)
    start = models.build_student(models.load_teacher("maskrcnn", teachers["maskrcnn"])).state_dict()
    assert list(content["model"]) == list(start)
    for key, value in content["model"].items():
        trained = key.startswith(("backbone.body.conv1.", "backbone.body.layer1."))
        assert torch.equal(value, start[key]) != trained, key
        assert trained or torch.equal(value, teacher[key]), key


def main_without_kernels():
    """train.main, where torch.compile traces and differentiates, but leaves out the minute or more
    in which it makes kernels."""
    torch.compile = partial(torch.compile, backend="aot_eager")
    train.main()
    counters = torch._dynamo.utils.counters
    print("graphs", counters["stats"]["unique_graphs"], "breaks", len(counters["graph_break"]))


def test_compiled_training_is_the_same_within_rounding(finish, dataset, teachers, tmp_path):
    """Four steps of other sizes, with and without --compile."""
    few_steps = ["--images-per-step", 1, "--limit-train", 4, "--limit-val", 1, "--log-every", 1]
    reports, content = {}, {}
    for name, main, more in (
            ("eager", train.main, []), ("compiled", main_without_kernels, ["--compile"])):
        folder = tmp_path / name
        job = finish(main, *flags("fasterrcnn", dataset, teachers, folder, *few_steps, *more),
                     "--epochs", 1)
        reports[name] = [[record["loss"], *record["relative_errors"]]
                         for record in records(folder, "step")]
        content[name] = models.load_checkpoint(folder / "last.pt")
    assert "graphs 3 breaks 0" in job.out  # two bodies and the loss; one graph for all sizes
    assert len(reports["eager"]) == 4
    np.testing.assert_allclose(reports["compiled"], reports["eager"], rtol=1e-5)

    eager, compiled = content["eager"], content["compiled"]
    assert list(eager["model"]) == list(compiled["model"])
    for index, moments in eager["optimizer"]["state"].items():
        off = compiled["optimizer"]["state"][index]["exp_avg"] - moments["exp_avg"]
        assert off.norm() <= 1e-3 * moments["exp_avg"].norm()  # the mean gradient


def test_the_checkpoint_gives_the_metrics_of_its_last_validation(
        three_processes, dataset, finish):
    folder = three_processes[0]
    """And at the image sizes that it holds, without flags for them."""
    job = finish(evaluate.main, "--ckpt", folder / BEST.format("maskrcnn"), "--data-dir", dataset,
                 "--limit-val", 2, "--device", "cpu", "--workers", 0)
    validated = records(folder, "epoch")[-1]["metrics"]
    assert "maskrcnn at 64/96 pixels, on 1 process x cpu" in job.out
    assert "used with" not in job.out and "It was validated with" not in job.out
    assert models.name_of(evaluate.whole) == "evaluate.whole"  # also where evaluate.py is the script
    assert json.loads(job.out.splitlines()[-1])["student"] == validated
    assert records(folder, "test")[0]["metrics"]["student"] == validated


def test_an_experiment_runs_from_python_with_ideas_of_its_own(dataset, teachers, tmp_path):
    """Another bottleneck, another loss, another predictor. The same again gives the same tensors.

    What is logged, checked and recorded is the loss that was trained.
    """
    hnd = replace(train.FASTERRCNN, layer_weights=(1, 0, 0, 0), epochs=1, **SIZES)
    losses_seen, predictors = [], []

    def criterion(student_maps, teacher_maps, layer_weights):
        loss, errors = losses.ghnd_loss(student_maps, teacher_maps, layer_weights)
        assert loss == errors[0]
        loss = loss + 1e6 * student_maps[0].abs().sum()
        losses_seen.append(loss.item() / 3)
        return loss, errors

    def predictor(student):
        predictors.append(student)
        return evaluate.whole(student)

    for name in "ab":
        metrics = train.run_experiment(
            hnd, data_dir=dataset, output_dir=tmp_path / name, teacher_ckpt=teachers["fasterrcnn"],
            device="cpu", workers=0, limit_train=12, limit_val=1,
            bottleneck=lambda: models.Bottleneck(6),
            criterion=criterion, predictor=predictor)
    assert set(metrics) == {"teacher", "student", "agreement"}
    assert len(losses_seen) == 6 and len(predictors) == 4
    [step] = records(tmp_path / "a", "step")
    assert step["loss"] == pytest.approx(sum(losses_seen[:3]), rel=1e-6)
    a, b = (torch.load(tmp_path / name / BEST.format("fasterrcnn"), weights_only=True)
            for name in "ab")
    assert same(a, b)
    assert "epoch 0: mean loss" in (tmp_path / "a" / "train.log").read_text()
    assert a["config"]["criterion"].endswith("criterion") and not a["config"]["is_recipe"]
    path = tmp_path / "a" / BEST.format("fasterrcnn")
    student, config = models.load_student(path)
    assert config["bottleneck_channels"] == 6 and config["min_size"] == SIZES["min_size"] and config["layer_weights"] == (1, 0, 0, 0)
    assert student.backbone.body.layer1.encoder[7].out_channels == 6


def test_a_teacher_of_21_classes_with_another_eps_end_to_end(dataset, tmp_path, call):
    """A data set of one's own: the number of classes follows from the teacher, then the student.

    One of its variances is 0, as where a channel is always 0: eps alone keeps it finite.
    """
    torch.manual_seed(0)
    state = models.build_detector("fasterrcnn", classes=21).state_dict()
    state["backbone.body.layer2.0.bn1.running_var"][3] = 0
    torch.save(state, tmp_path / "teacher.pt")
    common = flags("fasterrcnn", dataset, {"fasterrcnn": tmp_path / "teacher.pt"}, tmp_path / "out",
                   "--epochs", 1, "--limit-train", 12, "--limit-val", 1)
    status, _, err = call(train.main, *common)
    assert status == 1 and "layer2.0.bn1 divides by a variance that is not above 0" in err
    status, out, err = call(train.main, *common, "--teacher-eps", "1e-5")
    assert status == 0, err
    assert "AP published" not in out  # nor are there figures to compare with
    student, config = models.load_student(tmp_path / "out" / BEST.format("fasterrcnn"))
    assert config["arch"] == "fasterrcnn"
    assert student.roi_heads.box_predictor.cls_score.out_features == 21


@pytest.mark.parametrize("before, box_ap, is_best", [
    (-math.inf, 0.0, True), (0.2, 0.3, True), (0.3, 0.3, False), (0.3, 0.2, False),
    (-math.inf, -1.0, True), (-1.0, -1.0, True)])
def test_the_best_epoch_is_the_newest_one_where_nothing_is_annotated(before, box_ap, is_best):
    run = train.Run(None, None, None, best_box_ap=before)
    assert run.is_best(box_ap) == is_best


@pytest.mark.parametrize("changes, images, is_published", [
    ({"seed": 7}, 32, True), ({"min_size": 600}, 32, False), ({}, 33, False),
    ({"seed": 8}, 32, False)])
def test_published_figures_stand_beside_the_published_recipe_only(
        changes, images, is_published, dataset, teachers, tmp_path, monkeypatch, capfd):
    """With a loop that trains nothing, and metrics of nothing."""

    def train_nothing(experiment, run, *_):
        run.step = 1
        run.optimizer.step()
        yield {"kind": "step", "epoch": run.epoch, "step": 1, "steps": 1, "loss": 0.0, "is_saved": True,
               "relative_errors": [], "lr": 1e-3, "images_per_second": 0.0, "data_wait": 0.0,
               "gpu_memory_mib": 0.0, "hours_left": 0.0}

    def save_best(content, path):
        if path.name != "last.pt":
            torch.save({key: content[key] for key in ("model", "config")}, path)

    metrics = {"bbox": dict.fromkeys(evaluate.METRICS, 0.0)}
    monkeypatch.setattr(train, "train_epoch", train_nothing)
    monkeypatch.setattr(train, "RECIPE_IMAGES", images)
    monkeypatch.setattr(evaluate, "COCO_VAL_IMAGES", VAL_IMAGES)
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: (metrics, []))
    monkeypatch.setattr(evaluate, "agreement", lambda *_: metrics)
    monkeypatch.setattr(models, "save_checkpoint", save_best)
    monkeypatch.setattr(models, "is_coco_v1", lambda *_: changes != {"seed": 8})  # which it is not
    train.run_experiment(
        replace(train.FASTERRCNN, **changes), data_dir=dataset, output_dir=tmp_path,
        teacher_ckpt=teachers["fasterrcnn"], device="cpu", workers=0)
    out = capfd.readouterr().out
    published = "published: mean loss 1.1740e+06 (of the first 9,001 steps), box AP 0.3545"
    assert (published in out) == is_published == ("AP published" in out)
    assert "epoch 1: mean loss 0.0000e+00, box AP 0.0000, best before 0.0000" in out
    _, config = models.load_student(tmp_path / BEST.format("fasterrcnn"))
    assert config["is_recipe"] == is_published


@pytest.mark.skipif(not models.has_bf16(CPU), reason="this CPU has no bfloat16")
def test_bfloat16_trains_too(dataset, teachers, tmp_path, call):
    status, _, err = call(train.main, *flags(
        "fasterrcnn", dataset, teachers, tmp_path, "--epochs", 1, "--limit-train", 12,
        "--limit-val", 2, "--amp", "bf16"))
    assert status == 0, err
    [step] = records(tmp_path, "step")
    assert step["loss"] > 0 and all(0 < error < 3 for error in step["relative_errors"])


# ---- what a GPU would show -----------------------------------------------------------------------


class Copies(TorchFunctionMode):
    """Notes what is copied to the meta device, and whether the host would wait, were it a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        copying = (torch.Tensor.to, torch.Tensor.copy_, torch.as_tensor, torch.tensor)
        if func in copying and result.is_meta:
            source = args[1] if func is torch.Tensor.copy_ else args[0]
            if not isinstance(source, torch.Tensor) or not source.is_meta:
                waits = not (kwargs or {}).get("non_blocking")
                self.found.append((func, waits))
        return result


@pytest.mark.parametrize("is_placed", [True, False])
def test_between_log_lines_the_host_never_waits_for_the_device(is_placed, dataset, monkeypatch):
    """On the meta device, which has no values: whatever reads one raises there."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # not on meta
    images, folder = data.load_train_split(dataset, 160)
    loader = data.train_loader(images, folder, 3, 0, 0, CPU)
    experiment = replace(train.MASKRCNN, images_per_step=6, **SIZES)
    teacher = models.build_detector("maskrcnn", **SIZES)
    student = models.build_student(teacher)
    for detector in (teacher, student):
        if is_placed:
            models.to_device(detector, torch.device("meta"))
        else:
            detector.to("meta")
    run = train.Run(student, *train.build_optimizer(student, experiment))
    bodies = models.training_bodies(student, teacher)
    steps = []
    run.optimizer.register_step_post_hook(lambda *_: steps.append(len(copies.found)))
    # The first step is reported as well; here, after it, training goes on as after any report.
    reports = []
    monkeypatch.setattr(distributed, "sum_over_processes", lambda sums: (
        reports.append(len(steps)) or (torch.zeros(2, 4) if sums.dim() else torch.zeros(()))
        if len(steps) == 1 else sums.item()))
    with Copies() as copies, pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        list(train.train_epoch(
            experiment, run, *bodies, teacher.transform, loader, log_every=3))
    assert reports == [1, 1] and len(steps) == 3  # the third, which is to be reported, waits
    if is_placed:  # each of a step's 6 images crosses once, and nothing else does
        assert copies.found == [(torch.Tensor.to, False)] * 18 and steps == [6, 12, 18]
    else:  # torchvision copies its two constants for each image
        assert (torch.as_tensor, True) in copies.found and steps == [18, 36, 54]
