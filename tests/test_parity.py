"""Every link of the chain against the original code: torchdistill 0.0.1 and 1.1.5, Pillow, torchvision."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ARCHS, SIZES
from PIL import Image
from torchvision.transforms.functional import to_tensor

import data
import losses
import models
import train


def absent(reason):
    """Skip a parity test, except in CI, where it must not be skipped."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


# ---- torchdistill 0.0.1, which made the published checkpoints


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    """Returns a function that runs original.py with torchdistill 0.0.1, installed in a folder of its own."""
    folder = tmp_path_factory.mktemp("torchdistill-0.0.1")
    pip = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            folder,
            "torchdistill==0.0.1",
        ],
        capture_output=True,
        text=True,
    )
    if pip.returncode:
        absent(f"torchdistill 0.0.1 cannot be installed: {pip.stderr.strip().splitlines()[-1]}")

    def call(*args):
        process = subprocess.run(
            [sys.executable, Path(__file__).parent / "original.py", *map(str, args)],
            env={**os.environ, "PYTHONPATH": str(folder)},
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr

    return call


@pytest.fixture(scope="module", params=ARCHS)
def both_students(request, original, teachers, tmp_path_factory):
    """Our student, saved as train.py saves it, and what 0.0.1 made of that file."""
    arch, folder = request.param, tmp_path_factory.mktemp("parity")
    torch.manual_seed(11)
    student = models.build_student(models.load_teacher(arch, teachers[arch], **SIZES))
    for module in student.backbone.body.layer1.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # as after training: nothing at 0 or 1
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=1e-3)
    sum(p.sum() for p in student.parameters() if p.requires_grad).backward()
    optimizer.step()
    train.save_checkpoint(
        {
            "model": student.state_dict(),
            "optimizer": optimizer.state_dict(),
            "best_value": 0.125,
            "lr_scheduler": train.build_scheduler(optimizer, train.EXPERIMENTS[arch]).state_dict(),
            "config": {},
            "args": None,
        },
        folder / "ours.pt",
    )
    original("student", arch, folder / "ours.pt", folder)
    return arch, student, folder, torch.load(folder / "seen.pt", weights_only=True)


def outputs(student):
    images = [torch.rand(3, 90, 120, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    with torch.no_grad():
        return list(student.backbone.body(student.transform(images)[0].tensors).values()), student(
            images
        )


def test_our_checkpoint_loads_strictly_into_the_original_student(both_students):
    _, student, _, seen = both_students
    assert seen["keys"] == list(student.state_dict())
    assert seen["best_value"] == 0.125 and seen["steps"] == 25


def test_original_student_computes_the_same_features_and_detections(both_students):
    arch, student, _, seen = both_students
    features, detections = outputs(student)
    assert (
        all(map(torch.equal, features, seen["features"]))
        and len(features) == len(seen["features"]) == 4
    )
    kinds = {"boxes", "scores", "labels"} | ({"masks"} if arch == "maskrcnn" else set())
    for ours, theirs in zip(detections, seen["detections"], strict=True):
        assert kinds == set(ours) == set(theirs) and len(ours["boxes"]) > 1
        assert all(torch.equal(ours[kind], theirs[kind]) for kind in kinds)


@pytest.mark.parametrize("file", ["zip.pt", "old.pt"])
def test_original_checkpoint_loads_strictly_into_our_student(both_students, file):
    arch, student, folder, seen = both_students
    loaded, found_arch = models.load_student(folder / file, **SIZES)
    assert found_arch == arch
    assert all(map(torch.equal, loaded.state_dict().values(), student.state_dict().values()))
    features, detections = outputs(loaded)
    assert all(map(torch.equal, features, seen["features"]))
    assert torch.equal(detections[0]["scores"], seen["detections"][0]["scores"])
    content = models.load_checkpoint(folder / file)
    assert content["best_value"] == 0.25 and content["args"].config == "x.yaml"


def test_layer1_starts_from_the_same_distribution(both_students):
    """The same modules made in the same order draw the same numbers: bit-identical from one seed."""
    torch.manual_seed(5)
    ours, theirs = models.Bottleneck(3).state_dict(), both_students[3]["initial"]
    assert list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_batches_are_the_original_ones(original, tmp_path):
    rng = np.random.default_rng(0)
    sizes = [
        (640, 480),
        (480, 640),
        (640, 427),
        (500, 375),
        (640, 640),
        (640, 320),
        (200, 640),
        (640, 200),
    ]
    images, annotations = [], []
    for i in rng.permutation(np.arange(1, 1012)).tolist():
        w, h = sizes[i % len(sizes)] if i % 3 else rng.integers(100, 640, 2).tolist()
        images.append({"id": i, "file_name": f"{i}.jpg", "width": w, "height": h})
        for _ in range(int(rng.integers(0, 4))):
            box = rng.choice([0.5, 1, 1.5, 80], 2).tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": 1,
                    "bbox": [0, 0, *box],
                    "area": 1,
                    "iscrowd": int(rng.random() < 0.3),
                }
            )
    path = tmp_path / "instances.json"
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1}]})
    )
    original("batches", path, tmp_path / "theirs.json")
    theirs = json.loads((tmp_path / "theirs.json").read_text())

    index = data.parse_annotations(path)
    index = index[index.usable]
    assert index.ids.tolist() == theirs.pop("ids") and 100 < len(index) < 800
    assert data.aspect_ratio_groups(index.widths, index.heights).tolist() == theirs.pop("groups")
    filled = 0
    for key, wanted in theirs.items():
        world_size, rank, epoch = map(int, key.split())
        batches = data.GroupedBatches(index, 4, rank, world_size)
        batches.epoch = epoch
        ours = [[image for image, _ in batch] for batch in batches]
        assert ours == wanted
        filled += sum(map(len, ours)) != len({image for batch in ours for image in batch})
    assert len(theirs) == 4 * (1 + 2 + 3) and filled > 12  # left-overs were filled up in most


# ---- torchdistill 1.1.5: its distillation box with the published configuration


LAYERS = [f"seq.backbone.body.{name}" for name in models.DISTILLED]


def box_config():
    """The published configuration, as data: its train section without the data loaders."""

    def term(layer):
        value = {"is_from_teacher": False, "module_path": layer, "io": "output"}
        return {
            "criterion": {"key": "MSELoss", "kwargs": {"reduction": "sum"}},
            "weight": 1.0,
            "criterion_wrapper": {
                "key": "SimpleLossWrapper",
                "kwargs": {"input": value, "target": {**value, "is_from_teacher": True}},
            },
        }

    def model(frozen, requires_grad):
        return {
            "forward_proc": "forward_batch_only",
            "sequential": [],
            "frozen_modules": frozen,
            "requires_grad": requires_grad,
            "forward_hook": {"input": [], "output": LAYERS},
            "auxiliary_model_wrapper": {
                "key": "HeadRCNN",
                "kwargs": {"head_rcnn": {"sequential": ["backbone.body"]}},
            },
        }

    return {
        "num_epochs": 20,
        "train_data_loader": {},
        "val_data_loader": {},
        "teacher": model([], False),
        "student": model(LAYERS[1:], True),
        "optimizer": {"key": "Adam", "kwargs": {"lr": 0.001}},
        "scheduler": {"key": "MultiStepLR", "kwargs": {"milestones": [5, 15], "gamma": 0.1}},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {layer.rsplit(".")[-1]: term(layer) for layer in LAYERS}},
        },
    }


def make_pair(path, dtype):
    teacher = models.load_teacher("fasterrcnn", path, 64, 128)
    torch.manual_seed(0)
    student = models.build_student(teacher)
    return teacher.to(dtype), student.to(dtype)


def train_original(path, batches, threads=2, dtype=torch.float32):
    """Train with torchdistill's box, one batch an epoch; returns (per step: lr, loss, terms; student; Adam)."""
    try:
        from torchdistill.core.distillation import get_distillation_box
    except ImportError as error:
        absent(f"torchdistill 1.1.5 is not installed: {error}")
    teacher, student = copy.deepcopy(make_pair(path, dtype))
    for name, parameter in student.named_parameters():  # as torchvision's fresh detectors come
        parameter.requires_grad_(
            not name.startswith(("backbone.body.bn1", "rpn", "roi_heads", "backbone.fpn"))
        )
    torch.set_num_threads(threads)
    box = get_distillation_box(
        teacher, student, {}, box_config(), torch.device("cpu"), None, False, 1.0
    )
    terms, steps = [], []
    for criterion, _ in box.criterion.term_dict.values():
        criterion.register_forward_hook(lambda module, args, output: terms.append(output.item()))
    for epoch, images in enumerate(batches):
        box.pre_epoch_process(epoch=epoch)
        teacher.eval()  # 1.1.5 forgets; it changes nothing but which random numbers are drawn
        loss = box.forward_process([image / 255 for image in images], None, None)
        steps.append([box.optimizer.param_groups[0]["lr"], loss.item(), *terms[-4:]])
        box.post_forward_process(loss=loss)
        box.post_epoch_process()
    torch.set_num_threads(2)
    return np.array(steps), student, box.optimizer


class Loader(list):
    batch_sampler = data.GroupedBatches(
        data.CocoIndex(*[np.ones(4, int)] * 5), batch_size=4, rank=0, world_size=1
    )


def train_ours(path, batches, dtype, monkeypatch):
    """The same with train.train_epoch, on one process with one micro-batch of 4 images a step."""
    teacher, student = make_pair(path, dtype)
    experiment = replace(train.FASTERRCNN, images_per_step=4)
    distiller = models.Distiller(teacher, student).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(
        [p for p in distiller.student_stem.parameters() if p.requires_grad], lr=experiment.lr
    )
    scheduler = train.build_scheduler(optimizer, experiment)
    terms, steps, squared_errors = [], [], losses.squared_errors

    def recorded(*maps):
        terms.append(squared_errors(*maps))
        return terms[-1]

    monkeypatch.setattr(losses, "squared_errors", recorded)
    for epoch, images in enumerate(batches):
        train.train_epoch(
            experiment,
            distiller,
            teacher.transform,
            Loader([images]),
            optimizer,
            train.Position(epoch),
            False,
            1,
            lambda **v: steps.append([v["lr"], v["loss"], *terms[-1].tolist()]),
        )
        scheduler.step()
    return np.array(steps), student, optimizer


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)  # what uint8 / 255 becomes
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def batches():
    return [
        [
            torch.randint(
                0,
                256,
                (3, h, w),
                dtype=torch.uint8,
                generator=torch.Generator().manual_seed(4 * b + i),
            )
            for i, (h, w) in enumerate([(70, 96), (64, 80), (75, 100), (66, 99)])
        ]
        for b in range(16)
    ]


# their true gradient is zero, since a BatchNorm follows; Adam turns rounding noise into whole steps
UNDETERMINED = {
    "decoder.3.bias",
    "decoder.8.bias",
    "decoder.5.running_mean",
    "decoder.10.running_mean",
}


def end_state(student, optimizer):
    """Every trained parameter, its Adam moments, and every BatchNorm buffer, by name."""
    state, body = {}, student.backbone.body
    for module, prefix in ((body.conv1, "conv1."), (body.layer1, "")):
        for name, parameter in module.named_parameters():
            state[prefix + name] = parameter.detach()
            for moment in ("exp_avg", "exp_avg_sq"):
                state[f"{prefix}{name} {moment}"] = optimizer.state[parameter][moment]
        state |= {prefix + name: buffer for name, buffer in module.named_buffers()}
    return {key: value for key, value in state.items() if key.split()[0] not in UNDETERMINED}


def distances(a, b):
    return {
        key: ((a[key] - b[key]).double().norm() / b[key].double().norm().clamp(min=1e-300)).item()
        for key in b
    }


def run_all(path, batches, dtype, monkeypatch):
    """Our run, the original's, and the original's once more with one thread instead of two."""
    theirs = train_original(path, batches, dtype=dtype)
    noisy = train_original(path, batches, threads=1, dtype=dtype)
    return train_ours(path, batches, dtype, monkeypatch), theirs, noisy


def test_training_follows_the_original_in_float64(teachers, batches, monkeypatch, float64):
    """16 steps, one an epoch so that both drops of the learning rate are passed.

    The bounds come from the original alone: 20 times what two of its runs that differ in the number
    of threads are apart by then, or 20 times 1e-11 (steps) and 1e-10 (end) where that is less.
    """
    ours, theirs, noisy = run_all(teachers["fasterrcnn"], batches, torch.float64, monkeypatch)
    assert ours[0].shape == theirs[0].shape == (16, 6)
    np.testing.assert_allclose(ours[0][:, 0], theirs[0][:, 0], rtol=1e-12)
    assert theirs[0][[0, 4, 5, 14, 15], 0] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4, 1e-5])
    noise = np.maximum.accumulate(
        np.abs(noisy[0] / theirs[0] - 1)[:, 1:].max(1)
    )  # loss and four terms
    off = np.abs(ours[0] / theirs[0] - 1)[:, 1:].max(1)
    assert (off <= 20 * np.maximum(noise, 1e-11)).all(), (off, noise)
    end_ours, end_theirs, end_noisy = (end_state(*run[1:]) for run in (ours, theirs, noisy))
    end_off, end_noise = distances(end_ours, end_theirs), distances(end_noisy, end_theirs)
    assert (
        len(end_off) == 25 * 3 + 8 * 3 - 8
    )  # 25 parameters, their moments, buffers; 4 undetermined
    assert max(end_off.values()) <= 20 * max(*end_noise.values(), 1e-10), (end_off, end_noise)
    print(
        f"\nfloat64, loss and terms over 16 steps: off by {off.max():.1e}, original's noise {noise.max():.1e}; "
        f"state after them: off by {max(end_off.values()):.1e}, noise {max(end_noise.values()):.1e}"
    )


def test_one_step_follows_the_original_in_float32(teachers, batches, monkeypatch):
    """From a common state, since float32 trajectories part of themselves: loss, terms and gradients.

    Adam's first moment is 0.1 times the gradient. The bound is derived as above, with 1e-6.
    """
    ours, theirs, noisy = run_all(teachers["fasterrcnn"], batches[:1], torch.float32, monkeypatch)
    off, noise = (np.abs(run[0] / theirs[0] - 1).max() for run in (ours, noisy))
    assert off <= 20 * max(noise, 1e-6), (off, noise)
    moments = [
        {key: value for key, value in end_state(*run[1:]).items() if key.endswith(" exp_avg")}
        for run in (ours, theirs, noisy)
    ]
    grad_off, grad_noise = distances(moments[0], moments[1]), distances(moments[2], moments[1])
    assert max(grad_off.values()) <= 20 * max(*grad_noise.values(), 1e-6), (grad_off, grad_noise)
    print(
        f"\nfloat32, one step: loss off by {off:.1e}, noise {noise:.1e}; gradients off by "
        f"{max(grad_off.values()):.1e}, noise {max(grad_noise.values()):.1e}"
    )


# ---- pixels: Pillow and torchvision's own transform


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2])  # 4:4:4, 4:2:2, 4:2:0
def test_decoded_pixels_are_pillows(mode, progressive, subsampling, tmp_path):
    rng = np.random.default_rng(subsampling)
    for quality, (h, w) in ((75, (97, 131)), (95, (64, 64)), (30, (1, 17))):
        smooth = np.kron(rng.integers(0, 256, (h // 8 + 1, w // 8 + 1, 3)), np.ones((8, 8, 1)))[
            :h, :w
        ]
        pixels = (smooth + rng.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)
        path = tmp_path / f"{quality}.jpg"
        Image.fromarray(pixels).convert(mode).save(
            path,
            quality=quality,
            progressive=progressive,
            subsampling=-1 if mode == "L" else subsampling,
        )
        wanted = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
        assert torch.equal(data.read_image(path), wanted)


class Seen(torch.nn.Module):
    """Stands in for the distiller: keeps the batches that training feeds it."""

    def __init__(self):
        super().__init__()
        self.student_stem, self.batches = torch.nn.Linear(1, 1), []

    def forward(self, batch):
        self.batches.append(batch)
        return [self.student_stem.weight], [torch.ones(1, 1)]


def test_batches_are_prepared_as_the_original_prepares_them(dataset, teachers):
    """Pillow, to_tensor, flip and the detector's transform against ours: bit-identical with padding."""
    teacher = models.load_teacher("fasterrcnn", teachers["fasterrcnn"], **SIZES)
    index, folder = data.load_split(dataset, "train")
    batches, seen = data.GroupedBatches(index, 4, 0, 1), Seen()
    loader = data.train_loader(data.CocoImages(index, folder), batches, 0, pin=False)
    train.train_epoch(
        replace(train.FASTERRCNN, images_per_step=4),
        seen,
        teacher.transform,
        loader,
        torch.optim.SGD(seen.parameters()),
        train.Position(0),
        False,
        1,
        lambda **_: None,
    )
    flips = set()
    for keys, batch in zip(batches, seen.batches, strict=True):
        images = [
            to_tensor(Image.open(folder / index.names[position]).convert("RGB"))
            for position, _ in keys
        ]
        images = [
            image.flip(-1) if flip else image for image, (_, flip) in zip(images, keys, strict=True)
        ]
        assert torch.equal(batch, teacher.transform(images)[0].tensors)
        flips |= {flip for _, flip in keys}
    assert flips == {False, True} and len(seen.batches) > 4
