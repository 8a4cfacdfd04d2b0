"""The recipe, steps on several processes, whole runs, and what would keep a GPU waiting."""

import contextlib
import json
import sys
import types
from dataclasses import asdict, make_dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import ARCHS, BEST, CPU, SIZES, records, same
from torch import nn
from torch.overrides import TorchFunctionMode

import data
import distributed
import evaluate
import losses
import models
import train
from distributed import InputError

PUBLISHED = json.loads((Path(__file__).parent / "published_training.json").read_text())
FASTERRCNN, MASKRCNN = (train.EXPERIMENTS[arch] for arch in ARCHS)

# ---- the recipe and its flags --------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_experiments_are_the_published_ones(arch):
    assert asdict(train.EXPERIMENTS[arch]) == {
        "arch": arch, "bottleneck_channels": 3, "layer_weights": (1, 1, 1, 1), "epochs": 20,
        "images_per_step": 12, "reference_batch": 4, "lr": 1e-3, "lr_drops": (5, 15),
        "lr_drop_factor": 0.1, "min_size": 800, "max_size": 1333, "seed": 0, "amp": None}


def test_learning_rate_follows_the_published_log():
    optimizer, scheduler = train.build_optimizer(nn.Linear(1, 1), MASKRCNN)
    for epoch in PUBLISHED["maskrcnn"]["epochs"]:
        assert optimizer.param_groups[0]["lr"] == pytest.approx(epoch["lr"], rel=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("images, processes, micro_batch, accumulation", [
    (12, 1, 4, 3), (12, 2, 3, 2), (12, 3, 4, 1), (12, 4, 3, 1), (12, 12, 1, 1), (5, 1, 1, 5)])
def test_processes_share_a_step(images, processes, micro_batch, accumulation):
    assert train.share_step(images, processes) == (micro_batch, accumulation)


@mock.patch.object(train, "run_experiment")
def test_flags_change_the_experiment_and_nothing_else(run_experiment):
    train.main("--arch maskrcnn --max-size 999 --epochs 3 --layer-weights 1 0 0 0.5 --lr 2e-4 "
               "--lr-drops --amp bf16 --data-dir /x --output-dir=~/x --compile".split())
    experiment, args, folder, *parts = run_experiment.call_args.args
    assert experiment == replace(MASKRCNN, max_size=999, epochs=3, layer_weights=(1, 0, 0, 0.5),
                                 lr=2e-4, lr_drops=(), amp="bf16")
    assert args.data_dir == Path("/x") and args.compiled and args.save_every == 2000
    assert folder.last == Path.home() / "x" / "last.pt"
    assert parts == [None, losses.ghnd_loss, evaluate.whole]


def test_a_new_field_of_the_experiment_is_a_flag(monkeypatch, capsys):
    changed = make_dataclass(
        "Changed", [("decay", float, 0.5), ("nesterov", bool, True)], bases=(train.Experiment,),
        frozen=True)
    monkeypatch.setattr(train, "Experiment", changed)
    monkeypatch.setattr(train, "EXPERIMENTS", {"maskrcnn": changed("maskrcnn")})
    args = train.parse_args("--arch maskrcnn --decay 2 --no-nesterov".split())
    assert train.change_experiment(args) == changed("maskrcnn", decay=2.0, nesterov=False)
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--decay X (0.5)" in text and "--nesterov, --no-nesterov (True)" in text
    assert "--layer-weights [X ...] of layer1 to layer4; HND: 1 0 0 0 (1.0 1.0 1.0 1.0)" in text


@pytest.mark.parametrize("changes", [
    {"epochs": 0}, {"images_per_step": -3}, {"seed": 2**64}, {"max_size": 2**16},
    *({"layer_weights": weights} for weights in (
        (1,), (0, 0, 0, 0), (1, 0, -1, 1), (float("nan"), 1, 1, 1)))])
def test_an_experiment_that_cannot_be_run_is_refused(changes):
    with pytest.raises(InputError, match=f"^{list(changes)[0]} "):
        replace(FASTERRCNN, **changes)


# ---- steps on several processes ------------------------------------------------------------------


def build_parts(teacher_file):
    """Return student, teacher and 12 images, which are the same on each process."""
    teacher = models.load_teacher("fasterrcnn", Path(teacher_file), 32, 96)
    torch.manual_seed(0)
    student = models.build_student(models.to_device(teacher, CPU))
    return student, teacher, torch.randint(0, 256, (12, 3, 48, 64), dtype=torch.uint8)


def one_step():
    """Write loss, relative errors and gradients of a step, with BatchNorm in eval mode."""
    distributed.set_up("cpu")
    _, teacher_file, output = sys.argv
    student, teacher, images = build_parts(teacher_file)
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):  # batch statistics would be the micro-batch's
            module.train = lambda mode=True, module=module: module
    step = train.build_step(student, teacher, FASTERRCNN, losses.ghnd_loss, False)
    micro_batch, _ = train.share_step(12, distributed.world_size())
    micro_batches = images[distributed.rank()::distributed.world_size()].split(micro_batch)
    trainable = {name: p for name, p in student.named_parameters() if p.requires_grad}
    sums = step(micro_batches, torch.optim.SGD(trainable.values(), lr=0))
    loss, errors, norms = map(distributed.sum_over_processes, sums)
    if distributed.rank() == 0:
        grads = {name: p.grad for name, p in trainable.items()}
        torch.save((loss.item(), (errors / norms).tolist(), grads), output)


def test_a_step_on_1_2_and_3_processes_is_that_of_twelve_images_by_three(
        teachers, tmp_path, finish):
    student, teacher, images = build_parts(teachers["fasterrcnn"])
    batch = teacher.transform(list(images / 255))[0].tensors
    student_maps, teacher_maps = (
        detector.backbone.body(batch).values() for detector in (student, teacher))
    errors = torch.stack([(s - t).square().sum() for s, t in zip(student_maps, teacher_maps)])
    norms = torch.stack([t.square().sum() for t in teacher_maps])
    (errors.sum() / 3).backward()

    for processes in (None, 2, 3):
        finish(one_step, teachers["fasterrcnn"], tmp_path / "step", world_size=processes)
        loss, relative_errors, grads = torch.load(tmp_path / "step")
        assert loss == pytest.approx(errors.sum().item() / 3, rel=1e-5)
        assert relative_errors == pytest.approx((errors / norms).tolist(), rel=1e-5)
        # A bias before a BatchNorm in eval mode has a true gradient, so all can be compared.
        for name, grad in grads.items():
            wanted = student.get_parameter(name).grad
            assert (grad - wanted).norm() < 1e-4 * wanted.norm(), name


def some_steps():
    """Write what steps of other image sizes give, with and without torch.compile.

    It traces and, in float32, differentiates, but leaves out the minutes for making kernels.
    """
    distributed.set_up("cpu")
    _, teacher_file, output = sys.argv
    counters, plain_compile = torch._dynamo.utils.counters, torch.compile
    _, teacher, images = build_parts(teacher_file)
    found = {}
    for amp, backend in ((None, "aot_eager"), ("bf16", "eager")):
        torch.compile = partial(plain_compile, backend=backend)
        experiment = replace(FASTERRCNN, layer_weights=(1.0, 0.5, 0.0, 0.0), amp=amp)
        for compiled in (False, True):
            counters.clear()
            torch.manual_seed(0)
            student = models.build_student(teacher)
            optimizer, _ = train.build_optimizer(student, experiment)
            step = train.build_step(student, teacher, experiment, losses.ghnd_loss, compiled)
            sums = [step([images[:2, :, :height]], optimizer)[0] for height in (16, 48)]
            layer1 = dict(student.backbone.body.layer1.named_parameters())
            found[amp, compiled] = {
                "losses": [loss.item() for loss in sums], "layer1": distributed.gather(layer1),
                "gradient": optimizer.state_dict()["state"][0]["exp_avg"],
                "graphs": counters["stats"]["unique_graphs"], "breaks": counters["graph_break"]}
    if distributed.rank() == 0:
        torch.save(found, output)


def test_two_processes_train_compiled_and_in_bf16(teachers, tmp_path, finish):
    finish(some_steps, teachers["fasterrcnn"], tmp_path / "found", world_size=2)
    found = torch.load(tmp_path / "found", weights_only=False)
    for amp, tolerance in ((None, 1e-5), ("bf16", 1e-2)):
        eager, compiled = found[amp, False], found[amp, True]
        assert compiled["graphs"] == 3 and not compiled["breaks"]  # two bodies, one loss; all sizes
        assert compiled["losses"] == pytest.approx(eager["losses"], rel=tolerance)
        off = compiled["gradient"] - eager["gradient"]
        assert off.norm() < 10 * tolerance * eager["gradient"].norm()
        assert same(*eager["layer1"]) and same(*compiled["layer1"])  # on both processes
    assert found["bf16", False]["losses"] != found[None, False]["losses"]


# ---- whole runs ----------------------------------------------------------------------------------


FLAGS = ("--epochs 1 --limit-val 1 --min-size 32 --max-size 64 --device cpu --workers 0 "
         "--data-dir {} --teacher-ckpt {} --output-dir {} --arch ")


@pytest.fixture(scope="module")
def trained(dataset, teachers, tmp_path_factory):
    """The folder of a run of Mask R-CNN, of two steps."""
    folder = tmp_path_factory.mktemp("trained")
    flags = FLAGS.format(dataset, teachers["maskrcnn"], folder)
    with mock.patch.object(data, "check_workers") as check:
        train.main(f"{flags} maskrcnn --images-per-step 5 --limit-train 10".split())
    assert check.call_args.args[1:] == (1, 0, 5)  # five micro-batches of one image are in use
    distributed.log_to(None)
    return folder


def test_a_run_reports_what_it_did(trained):
    [start], [first, last], [epoch], [test] = (
        records(trained, kind) for kind in ("start", "step", "epoch", "test"))
    assert start["config"]["train_images"] == 10 and start["config"]["val_images"] == 1
    assert start["versions"].keys() == {"torch", "torchvision", "numpy"} and start["commit"]
    assert start["flags"]["limit_train"] == "10"
    assert epoch["loss"] == pytest.approx((first["loss"] + last["loss"]) / 2)
    assert len(last["relative_errors"]) == 4 and last["hours_left"] == 0 and last["lr"] == 1e-3
    assert last["images_per_second"] > 0 and 0 <= last["data_wait"] <= 1
    assert list(epoch["metrics"]["segm"]) == list(evaluate.METRICS)
    assert test["metrics"]["student"] == epoch["metrics"]
    log = (trained / "train.log").read_text()
    for text in ("images left out", '"kind": "start"', "epoch 0 step 2/2", "validation 0: 1 images",
                 "from epoch 0, step 0 on: 10 images; a step is 1 process(es) x 5 micro-batch(es) "
                 "of 1 image(s), which is what BatchNorm sees (4 in the original)"):
        assert log.count(text) == 1, text


def test_only_conv1_and_layer1_have_changed(trained, teachers):
    content = torch.load(trained / BEST.format("maskrcnn"), weights_only=True)
    assert list(content) == ["model", "optimizer", "lr_scheduler", "best_value", "config", "args",
                             "progress"]
    torch.manual_seed(0)
    teacher = models.load_teacher("maskrcnn", teachers["maskrcnn"])
    start = models.build_student(teacher).state_dict()
    assert list(content["model"]) == list(start)
    for key, value in content["model"].items():
        is_trained = key.startswith(("backbone.body.conv1.", "backbone.body.layer1."))
        assert torch.equal(value, start[key]) != is_trained, key
        assert is_trained or torch.equal(value, teacher.state_dict()[key]), key


def test_a_run_with_parts_and_a_teacher_of_ones_own(dataset, tmp_path):
    """What is logged, checked and recorded is what was trained. The teacher has 21 classes."""
    teacher = models.build_detector("fasterrcnn", classes=21).state_dict()
    torch.save(teacher, tmp_path / "teacher.pt")
    seen = []
    bottleneck = partial(models.Bottleneck, 6)
    predictor = partial(evaluate.whole)  # whose own name would be a memory address

    def criterion(student_maps, teacher_maps, layer_weights):
        loss, errors = losses.ghnd_loss(student_maps, teacher_maps, layer_weights)
        assert loss == errors[0] and len(errors) == 1
        seen.append(loss + 1e6 * student_maps[0].abs().sum())
        return seen[-1], errors

    flags = FLAGS.format(dataset, tmp_path / "teacher.pt", tmp_path / "out")
    train.main(f"{flags} fasterrcnn --limit-train 12 --layer-weights 1 0 0 0".split(),
               bottleneck=bottleneck, criterion=criterion, predictor=predictor)
    distributed.log_to(None)
    [start], [step] = (records(tmp_path / "out", kind) for kind in ("start", "step"))
    assert step["loss"] == pytest.approx(sum(seen).item() / 3, rel=1e-6) and len(seen) == 3
    path = tmp_path / "out" / BEST.format("fasterrcnn")
    student, config = models.load_student(path, bottleneck=bottleneck)
    assert student.roi_heads.box_predictor.cls_score.out_features == 21
    assert config["bottleneck_channels"] == start["config"]["bottleneck_channels"] == 6
    names = [config[part] for part in ("bottleneck", "criterion", "predictor")]
    assert names == ["models.Bottleneck", train.name_of(criterion), "functools.partial"]


@pytest.mark.parametrize("before, box_ap, is_best", [
    (0.2, 0.3, True), (0.3, 0.3, False), (0.3, 0.2, False), (-1.0, -1.0, True)])
def test_the_best_epoch_is_the_newest_one_where_nothing_is_annotated(before, box_ap, is_best):
    student, saved = nn.Linear(1, 1), []
    folder = types.SimpleNamespace(
        best=None, record=lambda record: None, save=lambda *args: saved.append(args))
    run = train.Run(student, *train.build_optimizer(student, FASTERRCNN), {}, step=2)
    run.best_box_ap = before
    train.report_epoch(run, {"bbox": {"AP": box_ap}}, folder)
    assert len(saved) == is_best and run.best_box_ap == max(before, box_ap)


# ---- what would keep a GPU waiting ---------------------------------------------------------------


class Copies(TorchFunctionMode):
    """Notes what is copied to the meta device, and whether the host would wait, were it a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in (torch.Tensor.to, torch.Tensor.copy_, torch.as_tensor, torch.tensor):
            source = args[1] if func is torch.Tensor.copy_ else args[0]
            if result.is_meta and not getattr(source, "is_meta", False):
                self.found.append((func, not kwargs.get("non_blocking")))
        return result


def test_between_log_lines_the_host_never_waits_for_the_device(dataset, monkeypatch):
    """On the meta device, which has no values: whatever reads one raises there."""
    with Copies() as copies:
        torch.as_tensor([0.5], device="meta")
    assert copies.found == [(torch.as_tensor, True)]  # as torchvision's transform does it by itself

    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # not on meta
    loader = data.train_loader(*data.load_train_split(dataset, 160), 3, 0, 0, CPU)
    experiment = replace(FASTERRCNN, images_per_step=6, **SIZES)
    teacher = models.build_detector("fasterrcnn", **SIZES)
    student = models.build_student(teacher)
    for detector in (teacher, student):
        models.to_device(detector, torch.device("meta"))
    run = train.Run(student, *train.build_optimizer(student, experiment), asdict(experiment))
    step = train.build_step(student, teacher, experiment, losses.ghnd_loss, False)
    steps, sums = [], []
    run.optimizer.register_step_post_hook(lambda *_: steps.append(len(copies.found)))
    # The first step is reported as well; here, after it, training goes on as after any report.
    monkeypatch.setattr(distributed, "sum_over_processes", lambda values: (
        sums.append(len(steps)) or torch.zeros(values.shape) if len(steps) == 1 else values.item()))
    folder = types.SimpleNamespace(record=lambda record: None)
    args = types.SimpleNamespace(log_every=3, save_every=99)
    with Copies() as copies, pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        train.train_to_epoch_end(run, step, loader, 2, folder, args)
    assert sums == [1, 1, 1] and len(steps) == 3  # the third, which is to be reported, waits
    # Each of a step's 6 images crosses once, and nothing else does.
    assert copies.found == [(torch.Tensor.to, False)] * 18 and steps == [6, 12, 18]
