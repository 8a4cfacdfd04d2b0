import contextlib
import copy
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import ARCHS, SIZE_FLAGS, SIZES, figures_of, run
from torch.overrides import TorchFunctionMode

import data
import models
import train

PUBLISHED = json.loads((Path(__file__).parent / "published_training.json").read_text())
BEST = "coco2017-custom_{0}_resnet_fpn_from_{0}_resnet50_fpn.pt"


def train_flags(arch, dataset, teachers, output_dir, *more):
    return [
        "--arch",
        arch,
        "--data-dir",
        dataset,
        "--teacher-ckpt",
        teachers[arch],
        "--output-dir",
        output_dir,
        *SIZE_FLAGS,
        *more,
    ]


def records(folder, kind):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def same_tensors(a, b):
    """Compare nested dicts and lists, tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tensors(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_tensors, a, b))
    return a == b


# ---- the experiments


@pytest.mark.parametrize("arch", ARCHS)
def test_experiments_are_the_published_ones(arch):
    experiment, published = train.EXPERIMENTS[arch], PUBLISHED[arch]["epochs"]
    assert asdict(experiment) | {
        "arch": arch,
        "bottleneck_channels": 3,
        "epochs": 20,
        "images_per_step": 12,
        "images_per_loss": 4,
        "lr": 1e-3,
        "lr_drops": (5, 15),
        "lr_drop_factor": 0.1,
        "min_size": 800,
        "max_size": 1333,
        "seed": 0,
        "reported_box_map": PUBLISHED["reported"][arch]["bbox"],
        "published_box_map": tuple(epoch.get("new_best_bbox_map") for epoch in published),
        "published_loss": tuple(
            float(f"{epoch['loss']['9000'][1] / 1e6:.3f}e6") for epoch in published
        ),
    } == asdict(experiment)
    steps = PUBLISHED["train_images_after_filtering"] // experiment.images_per_step
    assert steps == PUBLISHED[arch]["iterations_per_epoch"]


def test_an_edited_experiment_is_what_is_trained(monkeypatch):
    edited = replace(train.MASKRCNN, epochs=30, images_per_step=24, min_size=600, seed=7)
    monkeypatch.setitem(train.EXPERIMENTS, "maskrcnn", edited)
    monkeypatch.setattr("sys.argv", ["train.py", "--arch", "maskrcnn", "--max-size", "999"])
    args = train.parse_args()
    settings = {flag: getattr(args, flag) for flag in train.FLAGS}
    assert replace(edited, **settings) == replace(edited, max_size=999)


@pytest.mark.parametrize(
    "world_size, expected",
    [(1, (4, 3)), (2, (3, 2)), (3, (4, 1)), (4, (3, 1)), (6, (2, 1)), (12, (1, 1))],
)
def test_twelve_images_are_split_as_the_recipe_says(world_size, expected):
    assert train.micro_batches(12, world_size) == expected


@pytest.mark.parametrize("world_size", [5, 7, 8, 24])
def test_other_numbers_of_processes_are_an_error(world_size):
    with pytest.raises(
        Exception, match=f"{world_size} processes cannot share 12 .*--images-per-step"
    ):
        train.micro_batches(12, world_size)


# ---- one step is the same step on any number of processes

STEP = """
import sys, torch
from pathlib import Path
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, sys.argv[1])
import data, distributed, models, train
with distributed.session():
    torch.set_num_threads(1)
    distributed.start("cpu")
    experiment = train.FASTERRCNN
    teacher = models.load_teacher("fasterrcnn", sys.argv[3], 64, 128)
    torch.manual_seed(0)
    distiller = models.Distiller(teacher, models.build_student(teacher)).to(memory_format=torch.channels_last)
    stem = distiller.student_stem
    for module in stem.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # batch statistics would be those of the micro-batch
            module.eval()
            module.train = lambda mode=True, module=module: module
    world, rank = distributed.world_size(), distributed.rank()
    if world > 1:
        distiller.student_stem = DistributedDataParallel(stem)
    index, folder = data.load_split(Path(sys.argv[2]), "train")
    batches = data.GroupedBatches(index, train.micro_batches(12, world)[0], rank, world)
    loader = data.train_loader(data.CocoImages(index, folder), batches, 0, False)
    optimizer = torch.optim.SGD([p for p in stem.parameters() if p.requires_grad], lr=0)
    reports = []
    train.train_epoch(experiment, distiller, teacher.transform, loader, optimizer, train.Position(0), False, 1,
                      lambda **values: reports.append(values))
    if rank == 0:
        grads = {name: p.grad for name, p in stem.named_parameters() if p.grad is not None}
        torch.save({"loss": reports[0]["loss"], "errors": reports[0]["relative_errors"], "grads": grads,
                    "steps": len(reports)}, sys.argv[4])
"""


def test_a_step_has_the_same_loss_and_gradient_on_1_2_3_and_4_processes(
    same_size_dataset, teachers, tmp_path
):
    (tmp_path / "step.py").write_text(STEP)
    steps = {}
    for nproc in (None, 2, 3, 4):
        file = tmp_path / f"{nproc}.pt"
        process = run(
            tmp_path / "step.py",
            train.Path(train.__file__).parent,
            same_size_dataset,
            teachers["fasterrcnn"],
            file,
            nproc=nproc,
        )
        assert process.returncode == 0, process.stderr
        steps[nproc] = torch.load(file)
        assert steps[nproc]["steps"] == 1
    alone = steps[None]
    for nproc, other in steps.items():
        off = abs(other["loss"] / alone["loss"] - 1)
        # a bias before a BatchNorm in eval mode has a true gradient, so all can be compared
        grads_off = max(
            ((other["grads"][name] - grad).norm() / grad.norm()).item()
            for name, grad in alone["grads"].items()
        )
        print(f"\n{nproc or 1} processes: loss off by {off:.1e}, gradients by {grads_off:.1e}")
        assert off < 1e-5 and grads_off < 1e-4
        assert other["errors"] == pytest.approx(alone["errors"], rel=1e-5)

    # and the loss is (sum over the 12 images) / 3, with a gradient to match
    index, folder = train.data.load_split(same_size_dataset, "train")
    images = train.data.CocoImages(index, folder)
    flips = dict(key for batch in train.data.GroupedBatches(index, 4, 0, 1) for key in batch)
    teacher = models.load_teacher("fasterrcnn", teachers["fasterrcnn"], 64, 128)
    torch.manual_seed(0)
    student = models.build_student(teacher)
    batch = teacher.transform([images[key] / 255 for key in flips.items()])[0].tensors
    pairs = zip(student.backbone.body(batch).values(), teacher.backbone.body(batch).values())
    loss = sum(((s - t) ** 2).sum() for s, t in pairs) / 3
    loss.backward()
    assert alone["loss"] == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(
        alone["grads"]["0.weight"],
        student.backbone.body.conv1.weight.grad,
        rtol=1e-3,
        atol=1e-4 * alone["grads"]["0.weight"].abs().max().item(),
    )


# ---- whole runs


@pytest.fixture(scope="module")
def three_processes(dataset, teachers, tmp_path_factory):
    """A whole run of Mask R-CNN on 3 processes: its output folder and its process."""
    folder = tmp_path_factory.mktemp("three")
    flags = train_flags(
        "maskrcnn", dataset, teachers, folder, "--epochs", 1, "--limit-train", 24, "--limit-val", 7
    )
    process = run("train.py", *flags, nproc=3)
    assert process.returncode == 0, process.stderr
    return folder, process


def test_a_run_on_three_processes_reports_what_it_did(three_processes):
    folder, process = three_processes
    steps, epochs, tests = (
        records(folder / "maskrcnn", kind) for kind in ("step", "epoch", "test")
    )
    assert [step["step"] for step in steps] == [2] and len(epochs) == len(tests) == 1
    assert steps[0]["loss"] == epochs[0]["loss"] > 0 and len(steps[0]["relative_errors"]) == 4
    assert (
        steps[0]["lr"] == 1e-3
        and steps[0]["images_per_second"] > 0
        and steps[0]["peak_memory_mib"] > 100
    )
    assert 0 <= steps[0]["data_wait"] <= 1 and steps[0]["eta_seconds"] == 0
    log = (folder / "maskrcnn" / "train.log").read_text()
    for text in (
        "epoch 0 step 2/2 loss",
        "relative errors",
        "img/s",
        "ETA",
        "data wait",
        "MiB",
        "0.379",
        "0.336",
    ):
        assert text in process.stdout and text in log
    assert process.stdout.count("epoch 0 step 2/2") == 1
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == sorted(
        [BEST.format("maskrcnn"), "last.pt", "metrics.jsonl", "train.log"]
    )


def test_only_conv1_and_layer1_have_changed(three_processes, teachers):
    folder, _ = three_processes
    teacher = torch.load(teachers["maskrcnn"])
    state = torch.load(folder / BEST.format("maskrcnn"), weights_only=True)["model"]
    torch.manual_seed(0)
    start = models.build_student(models.load_teacher("maskrcnn", teachers["maskrcnn"])).state_dict()
    assert list(state) == list(start)
    for key, value in state.items():
        trained = key.startswith(("backbone.body.conv1.", "backbone.body.layer1."))
        assert torch.equal(value, start[key]) != trained, key
        assert trained or torch.equal(value, teacher[key]), key


@pytest.mark.parametrize("nproc", [None, 2, 3])
def test_the_checkpoint_gives_the_figures_of_its_last_validation(three_processes, dataset, nproc):
    folder, _ = three_processes
    process = run(
        "evaluate.py",
        "--ckpt",
        folder / BEST.format("maskrcnn"),
        "--data-dir",
        dataset,
        *SIZE_FLAGS,
        "--limit-val",
        7,
        nproc=nproc,
    )
    validated = records(folder / "maskrcnn", "epoch")[-1]["figures"]
    assert figures_of(process) == {"student": validated}
    assert records(folder / "maskrcnn", "test")[0]["figures"]["student"] == validated
    assert any(0 < figure < 1 for figure in validated["bbox"])


def test_the_checkpoint_has_torchdistills_entries(three_processes):
    content = torch.load(three_processes[0] / BEST.format("maskrcnn"), weights_only=True)
    assert {"model", "optimizer", "lr_scheduler", "best_value", "config", "args"} <= content.keys()
    adam = torch.optim.Adam(
        [torch.nn.Parameter(torch.zeros(1)) for _ in content["optimizer"]["state"]]
    )
    adam.load_state_dict(content["optimizer"])
    scheduler = torch.optim.lr_scheduler.MultiStepLR(adam, [5, 15])
    scheduler.load_state_dict(content["lr_scheduler"])
    assert scheduler.last_epoch == 1
    assert len(content["optimizer"]["state"]) == 1 + 8 + 2 * 8  # conv1, 8 convs and 8 BatchNorms


@pytest.fixture(scope="module")
def uninterrupted(dataset, teachers, tmp_path_factory):
    """Two epochs in one go, on one process."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    process = run(
        "train.py",
        *train_flags(
            "fasterrcnn",
            dataset,
            teachers,
            folder,
            "--epochs",
            2,
            "--limit-val",
            4,
            "--log-every",
            1,
        ),
    )
    assert process.returncode == 0, process.stderr
    return folder


def equal_but_for_speed(a, b):
    speed = ("images_per_second", "data_wait", "peak_memory_mib", "eta_seconds")
    return [{k: v for k, v in r.items() if k not in speed} for r in a] == [
        {k: v for k, v in r.items() if k not in speed} for r in b
    ]


def test_two_epochs_are_one_and_one_resumed(uninterrupted, dataset, teachers, tmp_path):
    flags = [
        *train_flags("fasterrcnn", dataset, teachers, tmp_path, "--limit-val", 4, "--log-every", 1),
        "--resume",
    ]
    first = run("train.py", *flags, "--epochs", 1)  # --resume where there is nothing to resume
    assert first.returncode == 0, first.stderr
    metrics = tmp_path / "fasterrcnn" / "metrics.jsonl"
    stray = records(tmp_path / "fasterrcnn", "step")[-1] | {"epoch": 1}
    metrics.write_text(
        metrics.read_text() + json.dumps(stray) + "\n" + '{"kind": "step", "epo'
    )  # as a crash in epoch 1 leaves it
    second = run("train.py", *flags, "--epochs", 2)
    assert second.returncode == 0, second.stderr
    assert "resuming at epoch 1 after step 0" in second.stdout
    for kind in ("step", "epoch"):
        assert equal_but_for_speed(
            records(tmp_path / "fasterrcnn", kind), records(uninterrupted / "fasterrcnn", kind)
        )
    for name in (BEST.format("fasterrcnn"), "fasterrcnn/last.pt"):
        a, b = (
            torch.load(folder / name, weights_only=True) for folder in (uninterrupted, tmp_path)
        )
        for entry in ("model", "optimizer", "lr_scheduler", "best_value"):
            assert same_tensors(a[entry], b[entry]), (name, entry)
        assert a["progress"] == b["progress"]


def test_an_epoch_that_was_not_validated_is_validated_on_resuming(
    uninterrupted, dataset, teachers, tmp_path
):
    last = torch.load(uninterrupted / "fasterrcnn" / "last.pt", weights_only=True)
    last["progress"]["validated"] = False
    best_value = last["progress"]["best_value"]
    last["progress"]["best_value"] = float("-inf")
    (tmp_path / "fasterrcnn").mkdir()
    torch.save(last, tmp_path / "fasterrcnn" / "last.pt")
    process = run(
        "train.py",
        *train_flags(
            "fasterrcnn", dataset, teachers, tmp_path, "--limit-val", 4, "--epochs", 2, "--resume"
        ),
    )
    assert process.returncode == 0, process.stderr
    assert not records(tmp_path / "fasterrcnn", "step")
    validated = records(tmp_path / "fasterrcnn", "epoch")
    assert validated[0]["figures"] == records(uninterrupted / "fasterrcnn", "epoch")[1]["figures"]
    assert validated[0]["figures"]["bbox"][0] <= best_value
    assert validated[0]["loss"] == records(uninterrupted / "fasterrcnn", "epoch")[1]["loss"]


def test_the_same_command_gives_the_same_losses_and_bytes(
    uninterrupted, dataset, teachers, tmp_path
):
    again = run(
        "train.py",
        *train_flags(
            "fasterrcnn",
            dataset,
            teachers,
            tmp_path,
            "--epochs",
            2,
            "--limit-val",
            4,
            "--log-every",
            1,
        ),
    )
    assert again.returncode == 0, again.stderr
    for kind in ("step", "epoch", "test"):
        assert equal_but_for_speed(
            *(records(f / "fasterrcnn", kind) for f in (uninterrupted, tmp_path))
        )
    for name in (BEST.format("fasterrcnn"), "fasterrcnn/last.pt"):
        assert (uninterrupted / name).read_bytes() == (tmp_path / name).read_bytes()
    seeded = train_flags(
        "fasterrcnn",
        dataset,
        teachers,
        tmp_path,
        "--epochs",
        1,
        "--limit-val",
        1,
        "--limit-train",
        12,
        "--seed",
        1,
        "--overwrite",
    )
    assert run("train.py", *seeded).returncode == 0
    assert (
        records(tmp_path / "fasterrcnn", "step")[0]["loss"]
        != records(uninterrupted / "fasterrcnn", "step")[0]["loss"]
    )


def test_learning_rate_follows_the_published_log(dataset, teachers, tmp_path):
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=train.MASKRCNN.lr)
    scheduler = train.build_scheduler(optimizer, train.MASKRCNN)
    for epoch in PUBLISHED["maskrcnn"]["epochs"]:
        assert optimizer.param_groups[0]["lr"] == pytest.approx(epoch["lr"], rel=1e-12)
        optimizer.step()
        scheduler.step()


def test_epochs_are_told_beside_the_published_ones_only_in_the_full_recipe(caplog, monkeypatch):
    monkeypatch.setattr(train.evaluate, "evaluate", lambda *_: {"bbox": [0.35] * 12})
    args = train.argparse.Namespace(device=None, workers=0, limit_train=None, limit_val=None)
    for experiment, epoch, expected in (
        (train.FASTERRCNN, 1, True),
        (replace(train.FASTERRCNN, seed=7), 1, True),
        (replace(train.FASTERRCNN, min_size=600), 1, False),
        (replace(train.FASTERRCNN, epochs=30), 1, False),
        (train.FASTERRCNN, 20, False),  # of an experiment that was made longer
    ):
        caplog.clear()
        progress = train.Progress(117_266, 5_000, epoch, mean_loss=2e6)
        with caplog.at_level("INFO", "ghnd"):
            assert train.validate(None, None, args, experiment, progress, lambda **_: None)
        assert ("1.1740e+06" in caplog.text and "0.3545" in caplog.text) == expected
        assert "mean loss 2.0000e+06, bbox mAP 0.3500, the best so far" in caplog.text
        assert progress.best_value == 0.35 and progress.validated


def test_bfloat16_trains_too(dataset, teachers, tmp_path):
    process = run(
        "train.py",
        *train_flags(
            "fasterrcnn",
            dataset,
            teachers,
            tmp_path,
            "--epochs",
            1,
            "--limit-train",
            12,
            "--limit-val",
            2,
            "--amp",
            "bf16",
        ),
    )
    assert process.returncode == 0, process.stderr
    (step,) = records(tmp_path / "fasterrcnn", "step")
    assert step["loss"] > 0 and all(0 < e < 3 for e in step["relative_errors"])


def test_the_demo_shows_what_it_says(tmp_path):
    process = run("train.py", "--demo", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    steps = records(tmp_path / "demo" / "fasterrcnn", "step")
    first, last = ([s for s in steps if s["epoch"] == epoch] for epoch in (0, steps[-1]["epoch"]))
    assert len(steps) > 24 and sum(s["loss"] for s in last) < 0.75 * sum(s["loss"] for s in first)
    for layer in range(4):
        assert sum(s["relative_errors"][layer] for s in last) < 0.8 * sum(
            s["relative_errors"][layer] for s in first
        )
    assert "all fell" in process.stdout
    command = process.stdout.splitlines()[-1].split()
    assert command[:2] == ["python", "evaluate.py"]
    figures = figures_of(run("evaluate.py", *command[2:], cwd=tmp_path))
    assert figures == records(tmp_path / "demo" / "fasterrcnn", "test")[0]["figures"]
    again = run(
        "train.py", "--demo", "--epochs", 1, cwd=tmp_path
    )  # a scratch folder: no questions asked
    assert again.returncode == 0, again.stderr


def test_weights_that_are_not_finite_are_told_with_the_latest_batch(dataset):
    index, folder = data.load_split(dataset, "train", 24)
    batches = data.GroupedBatches(index, 4, 0, 1)
    loader = data.train_loader(data.CocoImages(index, folder), batches, 0, False)
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.Adam([weight], lr=1e-3)
    position = train.Position(0, 2, window=[torch.ones(2, 4) * i for i in range(1, 7)])
    train.check_finite(position, 3, loader, optimizer)
    with torch.no_grad():
        weight[1] = torch.nan
    files = [str(folder / index.names[image]) for image, _ in list(batches)[5]]
    with pytest.raises(FloatingPointError) as error:
        train.check_finite(position, 3, loader, optimizer)
    assert "the weights are no longer finite at epoch 0, step 2, lr 1e-03" in str(error.value)
    assert "layer4 6.000e+00; images: " + " ".join(files) + ";" in str(error.value)
    batches.start, position.window[1][0, 2] = 0, torch.inf
    files = [str(folder / index.names[image]) for image, _ in list(batches)[1]]
    with pytest.raises(
        FloatingPointError, match="the loss is no longer finite at .*, step 1,"
    ) as e:
        train.check_finite(position, 3, loader, optimizer)
    assert "layer3 inf, layer4 2.000e+00; images: " + " ".join(files) + ";" in str(e.value)


class CopiesThatWait(TorchFunctionMode):
    """Notes what is copied to the meta device so that the host would wait, were it a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result, to = func(*args, **(kwargs or {})), torch.Tensor.to
        if func in (to, torch.Tensor.copy_, torch.as_tensor, torch.tensor) and result.is_meta:
            source = args[1] if func is torch.Tensor.copy_ else args[0]
            on_host = not isinstance(source, torch.Tensor) or not source.is_meta
            if on_host and not (kwargs or {}).get("non_blocking"):
                self.found.append(func)
        return result


@pytest.mark.parametrize("placed", [True, False])
def test_between_log_lines_the_host_never_waits_for_the_device(placed, dataset, monkeypatch):
    """On the meta device, which has no values: whatever reads one raises there."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # not on meta
    index, folder = data.load_split(dataset, "train")
    batches = data.GroupedBatches(index, 3, 0, 1)
    loader = data.train_loader(data.CocoImages(index, folder), batches, 0, False)
    experiment = replace(train.MASKRCNN, images_per_step=6, **SIZES)
    teacher = models.build_detector("maskrcnn", **SIZES)
    student = models.build_student(teacher)
    for detector in (teacher, student):
        models.place(detector, torch.device("meta")) if placed else detector.to("meta")
    distiller = models.Distiller(teacher, student)
    trained = [p for p in distiller.student_stem.parameters() if p.requires_grad]
    optimizer, steps = torch.optim.Adam(trained), []
    common = (experiment, distiller, teacher.transform, loader, optimizer, train.Position(0), False)
    with CopiesThatWait() as copies, pytest.raises(RuntimeError, match="meta"):
        train.train_epoch(*common, 3, None, lambda: steps.append(len(copies.found)))
    assert len(steps) == 2  # the third, which is to be reported, waits
    if placed:
        assert copies.found == []
    else:  # torchvision copies its constants for each image
        assert set(copies.found) == {torch.as_tensor} and steps == [2 * 6, 4 * 6]


def test_a_restored_optimizer_does_not_reach_into_the_start_of_the_epoch(teachers, tmp_path):
    teacher = models.load_teacher("fasterrcnn", teachers["fasterrcnn"])
    student = models.build_student(teacher)
    weights = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=1e-3)
    scheduler = train.build_scheduler(optimizer, train.FASTERRCNN)

    def step():
        sum(p.sum() for p in weights).backward()
        optimizer.step()

    step()
    model = {k: v.clone() for k, v in student.state_dict().items()}
    start = {"optimizer": optimizer.state_dict(), "lr_scheduler": scheduler.state_dict()}
    start = copy.deepcopy(start | {"model": {k: model[k] for k in model if "layer1" in k}})
    last = start | {
        "model": model,
        "progress": asdict(train.Progress(12, 2, epoch=0)),
        "position": {"epoch": 1, "window": [[], []]},  # of two processes
        "epoch_start": copy.deepcopy(start),
    }
    _, position, kept = train.restore(last, tmp_path, student, optimizer, scheduler)
    assert position == train.Position(1)
    step()
    assert optimizer.state[weights[0]]["step"] == 2
    assert same_tensors(kept, start)
