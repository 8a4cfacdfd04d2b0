"""Every link of the chain against the original: torchdistill 0.0.1 and 1.1.5, Pillow, torchvision."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ARCHS, CPU, SIZES, same
from PIL import Image
from torchvision.transforms.functional import to_tensor

import data
import losses
import models
import train


def absent(reason):  # a parity test is skipped then, but may not be in CI
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


# ---- torchdistill 0.0.1, which made the published checkpoints ------------------------------------
@pytest.fixture(scope="session")
def original(tmp_path_factory):
    """A function that runs original.py with torchdistill 0.0.1, installed in its own folder."""
    folder = tmp_path_factory.mktemp("torchdistill-0.0.1")
    pip = subprocess.run([
        sys.executable, "-m", "pip", "install", "torchdistill==0.0.1", "--quiet", "--no-deps",
        "--target", folder], capture_output=True, text=True)
    if pip.returncode:
        absent(f"torchdistill 0.0.1 cannot be installed: {pip.stderr.strip().splitlines()[-1]}")
    return lambda *args: subprocess.run(
        [sys.executable, Path(__file__).with_name("original.py"), *args], check=True,
        env={**os.environ, "PYTHONPATH": str(folder)})


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
    optimizer, scheduler = train.build_optimizer(student, train.EXPERIMENTS[arch])
    sum(p.sum() for p in student.parameters() if p.requires_grad).backward()
    optimizer.step()
    models.save_checkpoint({
        "model": student.state_dict(), "optimizer": optimizer.state_dict(), "best_value": 0.125,
        "lr_scheduler": scheduler.state_dict(), "config": {}, "args": None}, folder / "ours.pt")
    original("student", arch, folder / "ours.pt", folder)
    return arch, student, folder, torch.load(folder / "seen.pt", weights_only=True)


@torch.no_grad()
def outputs(student):
    images = [torch.rand(3, 90, 120, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    batch = student.transform(images)[0].tensors
    return list(student.backbone.body(batch).values()), student(images)


def test_original_student_loads_our_checkpoint_strictly_and_computes_the_same(both_students):
    arch, student, _, seen = both_students
    assert seen["keys"] == list(student.state_dict())
    assert seen["best_value"] == 0.125 and seen["steps"] == 25
    features, detections = found = outputs(student)
    assert same(found, (seen["features"], seen["detections"])) and len(features) == 4
    kinds = {"boxes", "scores", "labels"} | ({"masks"} if arch == "maskrcnn" else set())
    assert all(d.keys() == kinds and len(d["boxes"]) > 1 for d in detections)
    torch.manual_seed(5)  # layer1's modules, made in the same order, draw the same numbers
    initial = models.Bottleneck(3).state_dict()
    assert list(initial) == list(seen["initial"]) and same(initial, seen["initial"])


@pytest.mark.parametrize("file", ["zip.pt", "old.pt"])
def test_original_checkpoint_loads_strictly_into_our_student(both_students, file):
    arch, student, folder, seen = both_students
    loaded, config = models.load_student(folder / file, **SIZES)
    assert config["arch"] == arch and same(loaded.state_dict(), student.state_dict())
    assert same(outputs(loaded), (seen["features"], seen["detections"]))
    content = models.load_checkpoint(folder / file)
    assert content["best_value"] == 0.25 and content["args"].config == "x.yaml"


def test_batches_are_the_original_ones(original, tmp_path):
    rng = np.random.default_rng(0)
    sizes = [(640, 480), (480, 640), (640, 427), (500, 375), (640, 640), (640, 320), (200, 640),
             (640, 200)]
    content = {"images": [], "annotations": [], "categories": [{"id": 1}]}
    for i in rng.permutation(np.arange(1, 1012)).tolist():
        w, h = sizes[i % len(sizes)] if i % 3 else rng.integers(100, 640, 2).tolist()
        content["images"].append({"id": i, "file_name": f"{i}.jpg", "width": w, "height": h})
        for _ in range(int(rng.integers(0, 4))):
            content["annotations"].append({
                "id": len(content["annotations"]) + 1, "image_id": i, "category_id": 1, "area": 1,
                "bbox": [0, 0, *rng.choice([0.5, 1, 1.5, 80], 2).tolist()],
                "iscrowd": int(rng.random() < 0.3)})
    path, output = tmp_path / "instances.json", tmp_path / "theirs.json"
    path.write_text(json.dumps(content))
    original("batches", path, output)
    theirs = json.loads(output.read_text())
    images = data.read_train_images(path)
    assert [image.id for image in images] == theirs.pop("ids") and 100 < len(images) < 800
    groups = data.aspect_ratio_groups([i.width for i in images], [i.height for i in images])
    assert groups.tolist() == theirs.pop("groups")
    filled = 0
    for key, wanted in theirs.items():
        world_size, rank, epoch = map(int, key.split())
        batches = data.GroupedBatches(images, 4, rank, world_size)
        batches.epoch = epoch
        assert [[image for image, _ in batch] for batch in batches] == wanted
        filled += len(sum(wanted, [])) != len(set(sum(wanted, [])))
    assert len(theirs) == 4 * (1 + 2 + 3) and filled > 12  # left-overs were filled up in most


# ---- torchdistill 1.1.5: its distillation box with the published configuration -------------------
LAYERS = [f"seq.backbone.body.layer{i}" for i in (1, 2, 3, 4)]


def box_config():
    """The published configuration, as data: its train section without the data loaders."""
    def term(layer):
        student, teacher = ({"is_from_teacher": is_teacher, "module_path": layer, "io": "output"}
                            for is_teacher in (False, True))
        return {"criterion": {"key": "MSELoss", "kwargs": {"reduction": "sum"}}, "weight": 1.0,
                "criterion_wrapper": {"key": "SimpleLossWrapper",
                                      "kwargs": {"input": student, "target": teacher}}}

    def model(frozen, requires_grad):
        wrapper = {"key": "HeadRCNN", "kwargs": {"head_rcnn": {"sequential": ["backbone.body"]}}}
        return {"forward_proc": "forward_batch_only", "sequential": [], "frozen_modules": frozen,
                "requires_grad": requires_grad, "forward_hook": {"input": [], "output": LAYERS},
                "auxiliary_model_wrapper": wrapper}

    terms = {layer.rsplit(".")[-1]: term(layer) for layer in LAYERS}
    return {"num_epochs": 20, "train_data_loader": {}, "val_data_loader": {},
            "teacher": model([], False), "student": model(LAYERS[1:], True),
            "optimizer": {"key": "Adam", "kwargs": {"lr": 0.001}},
            "scheduler": {"key": "MultiStepLR", "kwargs": {"milestones": [5, 15], "gamma": 0.1}},
            "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}}}


def make_pair(path):
    teacher = models.load_teacher("fasterrcnn", path, 64, 128)
    torch.manual_seed(0)
    return teacher, models.build_student(teacher)


def train_original(path, batches, threads):
    """Train with its box, one batch an epoch; returns (lr, loss, terms) of steps, student, Adam."""
    try:
        from torchdistill.core.distillation import get_distillation_box
    except ImportError as error:
        absent(f"torchdistill 1.1.5 is not installed: {error}")
    teacher, student = copy.deepcopy(make_pair(path))
    for name, parameter in student.named_parameters():  # as torchvision's fresh detectors come
        parameter.requires_grad_(
            not name.startswith(("backbone.body.bn1", "rpn", "roi_heads", "backbone.fpn")))
    torch.set_num_threads(threads)
    box = get_distillation_box(
        teacher, student, {}, box_config(), torch.device("cpu"), None, False, 1.0)
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


class OneBatch(list):
    """A loader of one batch of 4 images."""

    batch_sampler = SimpleNamespace(batch_size=4)


def train_ours(path, batches, monkeypatch):
    """The same with train.train_epoch, on one process with one micro-batch of 4 images a step."""
    experiment = replace(train.FASTERRCNN, images_per_step=4)
    teacher, student = (models.to_device(detector, CPU) for detector in make_pair(path))
    student_body, teacher_body = models.training_bodies(student, teacher)
    run = train.Run(student, *train.build_optimizer(student, experiment))
    terms, steps, squared_errors = [], [], losses.squared_errors

    def noted(*maps):
        terms.append(squared_errors(*maps))
        return terms[-1]

    monkeypatch.setattr(losses, "squared_errors", noted)
    for images in batches:
        for record in train.train_epoch(
                experiment, run, student_body, teacher_body, teacher.transform,
                OneBatch([images])):
            steps.append([record["lr"], record["loss"], *terms[-1].tolist()])
        run.start_next_epoch()
    return np.array(steps), student, run.optimizer


def end_state(student, optimizer):
    """Every trained parameter, its Adam moments, and every BatchNorm buffer, by name."""
    state, body = {}, student.backbone.body
    for module, prefix in ((body.conv1, "conv1."), (body.layer1, "")):
        for name, parameter in module.named_parameters():
            state[prefix + name] = parameter.detach()
            for moment in ("exp_avg", "exp_avg_sq"):
                state[f"{prefix}{name} {moment}"] = optimizer.state[parameter][moment]
        state |= {prefix + name: buffer for name, buffer in module.named_buffers()}
    # of true gradient zero, since a BatchNorm follows; Adam turns rounding noise into whole steps
    undetermined = ("decoder.3.bias", "decoder.8.bias", "decoder.5.running_mean",
                    "decoder.10.running_mean")
    return {key: value for key, value in state.items() if key.split()[0] not in undetermined}


@pytest.fixture
def compare(teachers, monkeypatch):
    """A function that trains by us, the original, and the original with one thread, not two.

    Returns the steps of all three; by name, how far in norm our end_state is off; and the third's.
    """
    def compare(dtype, steps, first_step=0):
        torch.set_default_dtype(dtype)  # also what uint8 / 255 becomes
        batches = [[torch.randint(0, 256, (3, h, w), dtype=torch.uint8,
                                  generator=torch.Generator().manual_seed(4 * b + i))
                    for i, (h, w) in enumerate([(70, 96), (64, 80), (75, 100), (66, 99)])]
                   for b in range(first_step, first_step + steps)]
        path = teachers["fasterrcnn"]
        theirs, noisy = (train_original(path, batches, threads) for threads in (2, 1))
        runs = train_ours(path, batches, monkeypatch), theirs, noisy
        ours, wanted, noisy = (end_state(*run[1:]) for run in runs)
        assert {v.dtype for v in [*ours.values(), *wanted.values()]} == {dtype, torch.int64}
        off, noise = ({key: ((state[key] - value).double().norm()
                             / value.double().norm().clamp(min=1e-300)).item()
                       for key, value in wanted.items()} for state in (ours, noisy))
        return *(run[0] for run in runs), off, noise

    yield compare
    torch.set_default_dtype(torch.float32)


def test_training_follows_the_original_in_float64(compare):
    """16 steps, one an epoch so that both drops of the learning rate are passed.

    The bounds come from the original alone: 20 times what two of its runs that differ in the number
    of threads are apart by then, or 20 times 1e-11 (steps) and 1e-10 (end) where that is less.
    """
    ours, theirs, noisy, end_off, end_noise = compare(torch.float64, steps=16)
    assert ours.shape == theirs.shape == (16, 6)
    np.testing.assert_allclose(ours[:, 0], theirs[:, 0], rtol=1e-12)
    assert theirs[[0, 4, 5, 14, 15], 0] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4, 1e-5])
    off, noise = (np.abs(run / theirs - 1)[:, 1:].max(1) for run in (ours, noisy))  # of 5 figures
    assert (off <= 20 * np.maximum(np.maximum.accumulate(noise), 1e-11)).all(), (off, noise)
    assert len(end_off) == 25 * 3 + 8 * 3 - 8  # parameters, moments, buffers; 4 undetermined
    assert max(end_off.values()) <= 20 * max(*end_noise.values(), 1e-10), (end_off, end_noise)
    print(f"\nfloat64, loss and terms over 16 steps: off by {off.max():.1e}, original's noise "
          f"{noise.max():.1e}; state after them: off by {max(end_off.values()):.1e}, noise "
          f"{max(end_noise.values()):.1e}")


def test_one_step_follows_the_original_in_float32(compare):
    """From a common state, as float32 trajectories part of themselves: loss, terms and gradients.

    Adam's first moment is 0.1 times the gradient. The bounds are derived as above, with 1e-6, from
    the worst of five batches: in about every second one, rounding switches a ReLU, and gradients
    move by 1e-3 where they otherwise move by 1e-6.
    """
    off, noise, grad_off, grad_noise = [], [], [], []
    for batch in range(5):
        ours, theirs, noisy, end_off, end_noise = compare(torch.float32, 1, first_step=batch)
        off.append(np.abs(ours / theirs - 1).max())
        noise.append(np.abs(noisy / theirs - 1).max())
        grad_off.append(max(end_off[key] for key in end_off if key.endswith(" exp_avg")))
        grad_noise.append(max(end_noise[key] for key in end_noise if key.endswith(" exp_avg")))
    print(f"\nfloat32, one step: loss off by {max(off):.1e}, noise {max(noise):.1e}; gradients off "
          f"by {max(grad_off):.1e}, noise {max(grad_noise):.1e}")
    assert max(off) <= 20 * max(*noise, 1e-6), (off, noise)
    assert max(grad_off) <= 20 * max(*grad_noise, 1e-6), (grad_off, grad_noise)


# ---- pixels: Pillow and torchvision's own transform ----------------------------------------------
def test_batches_are_prepared_as_the_original_prepares_them(dataset, teachers):
    """Pillow, to_tensor, flip and the detector's transform against ours: the same, bit for bit."""
    teacher = models.load_teacher("fasterrcnn", teachers["fasterrcnn"], **SIZES)
    transform = copy.deepcopy(teacher.transform)
    models.to_device(teacher, CPU)
    student = models.build_student(teacher)
    images, folder = data.load_train_split(dataset, 160)
    loader = data.train_loader(images, folder, 4, seed=0, workers=0, device=CPU)
    batches, flips = [], set()

    class Body(torch.nn.Module):
        """Four maps that are no work, and a note of the batch."""

        def __init__(self, value, note):
            super().__init__()
            self.value = torch.nn.Parameter(torch.full((1, 1), value))
            self.note = note

        def forward(self, batch):
            self.note(batch)
            return {str(i): self.value for i in range(4)}

    run = train.Run(student, torch.optim.SGD(student.backbone.body.conv1.parameters()), None)
    list(train.train_epoch(
        replace(train.FASTERRCNN, images_per_step=4), run, Body(1.0, batches.append),
        Body(2.0, lambda batch: None), teacher.transform, loader))
    for keys, batch in zip(loader.batch_sampler, batches, strict=True):
        originals = []
        for position, flip in keys:
            image = Image.open(folder / images[position].file_name).convert("RGB")
            originals.append(to_tensor(image).flip([-1] * flip))
            flips.add(flip)
        assert same(batch, transform(originals)[0].tensors)
    assert flips == {False, True} and len(batches) > 4
