"""Every link of the chain against torchdistill 0.0.1 and 1.1.5, Pillow and torchvision."""

import copy
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark import box_config
from conftest import ARCHS, CPU, SIZES, same
from PIL import Image
from torchvision.transforms.functional import to_tensor

import data
import models
import train


def absent(reason):
    """Skip a test, except in CI, where none of these may be skipped."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


# ---- torchdistill 0.0.1, which made the published checkpoints ------------------------------------


@pytest.fixture(scope="module")
def students(teachers):
    """For each architecture, a student of ours whose BatchNorms are as after training."""
    students = {}
    for arch in ARCHS:
        torch.manual_seed(11)
        students[arch] = models.build_student(
            models.load_teacher(arch, teachers[arch], **SIZES))
        for module in students[arch].backbone.body.layer1.modules():
            if isinstance(module, torch.nn.BatchNorm2d):  # nothing at 0 or 1
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return students


@pytest.fixture(scope="module")
def original(students, tmp_path_factory):
    """The folder of our files and of what 0.0.1, installed there too, makes of them."""
    folder = tmp_path_factory.mktemp("original")
    pip = subprocess.run([
        sys.executable, "-m", "pip", "install", "torchdistill==0.0.1", "--quiet", "--no-deps",
        "--target", folder / "0.0.1"], capture_output=True, text=True)
    if pip.returncode:
        absent(f"torchdistill 0.0.1 cannot be installed: {pip.stderr.strip().splitlines()[-1]}")
    write_annotations(folder / "instances.json")
    for arch, student in students.items():
        optimizer, scheduler = train.build_optimizer(student, train.EXPERIMENTS[arch])
        sum(p.sum() for p in student.parameters() if p.requires_grad).backward()
        optimizer.step()
        models.save_checkpoint({
            "model": student.state_dict(), "optimizer": optimizer.state_dict(),
            "best_value": 0.125, "lr_scheduler": scheduler.state_dict(), "config": {},
            "args": None}, folder / f"{arch}.pt")
    subprocess.run([sys.executable, Path(__file__).with_name("original.py"), folder], check=True,
                   env={**os.environ, "PYTHONPATH": str(folder / "0.0.1")})
    return folder


def write_annotations(path):
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
    path.write_text(json.dumps(content))


@torch.no_grad()
def outputs(student):
    student.roi_heads.score_thresh = 0.0  # as in original.py
    image = torch.rand(3, 90, 120, generator=torch.Generator().manual_seed(0))
    batch = student.transform([image])[0].tensors
    return list(student.backbone.body(batch).values()), student([image])


@pytest.mark.parametrize("arch", ARCHS)
def test_checkpoints_load_strictly_both_ways_and_compute_the_same(arch, students, original):
    student, seen = students[arch], torch.load(original / f"{arch}_seen.pt", weights_only=True)
    assert seen["keys"] == list(student.state_dict())
    assert seen["best_value"] == 0.125 and seen["steps"] == 25
    features, [detections] = found = outputs(student)
    assert same(found, (seen["features"], seen["detections"])) and len(features) == 4
    kinds = {"boxes", "scores", "labels"} | ({"masks"} if arch == "maskrcnn" else set())
    assert detections.keys() == kinds and len(detections["boxes"]) > 9
    torch.manual_seed(5)  # layer1's modules, made in the same order, draw the same numbers
    initial = models.Bottleneck(3).state_dict()
    assert list(initial) == list(seen["initial"]) and same(initial, seen["initial"])

    for suffix in ("zip", "old"):
        path = original / f"{arch}_{suffix}.pt"
        loaded, config = models.load_student(path, **SIZES)
        assert config["arch"] == arch and same(loaded.state_dict(), student.state_dict())
        assert same(outputs(loaded), found)
        content = models.load_checkpoint(path)
        assert content["best_value"] == 0.25 and content["args"].config == "x.yaml"


def test_batches_are_the_original_ones(original):
    theirs = json.loads((original / "batches.json").read_text())
    images = data.read_train_images(original / "instances.json")
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


def train_original(student, teacher, batches):
    """Train with its box, one batch an epoch; return (lr, loss, terms) of steps, and Adam."""
    try:
        from torchdistill.core.distillation import get_distillation_box
    except ImportError as error:
        absent(f"torchdistill 1.1.5 is not installed: {error}")
    for name, parameter in student.named_parameters():  # as torchvision's fresh detectors come
        parameter.requires_grad_(
            not name.startswith(("backbone.body.bn1", "rpn", "roi_heads", "backbone.fpn")))
    box = get_distillation_box(teacher, student, {}, box_config(), CPU, None, False, 1.0)
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
    return np.array(steps), box.optimizer


def train_ours(student, teacher, batches):
    """Do the same with train.train_step, on one process with one batch of 4 images a step."""
    bodies = models.training_bodies(
        models.to_device(student, CPU), models.to_device(teacher, CPU))
    optimizer, scheduler = train.build_optimizer(student, train.EXPERIMENTS["fasterrcnn"])
    steps = []
    for images in batches:
        loss, terms, _ = train.train_step(*bodies, teacher.transform, [images], optimizer)
        steps.append([optimizer.param_groups[0]["lr"], loss.item(), *terms.tolist()])
        scheduler.step()
    return np.array(steps), optimizer


def end_state(student, optimizer):
    """Return every trained parameter, its Adam moments, and every BatchNorm buffer, by name."""
    state, body = {}, student.backbone.body
    for module, prefix in ((body.conv1, "conv1."), (body.layer1, "")):
        for name, parameter in module.named_parameters():
            state[prefix + name] = parameter.detach()
            for moment in ("exp_avg", "exp_avg_sq"):
                state[f"{prefix}{name} {moment}"] = optimizer.state[parameter][moment]
        state |= {prefix + name: buffer for name, buffer in module.named_buffers()}
    # Their true gradient is zero, since a BatchNorm follows; Adam turns rounding noise into steps.
    undetermined = ("decoder.3.bias", "decoder.8.bias", "decoder.5.running_mean",
                    "decoder.10.running_mean")
    return {key: value for key, value in state.items() if key.split()[0] not in undetermined}


@pytest.fixture
def compare(teachers):
    """A function that trains by us, the original, and the original with one thread, not two.

    Returns the steps of all three; by name, how far in norm our end_state is off; and the third's.
    """
    threads_before = torch.get_num_threads()

    @functools.cache
    def make_pair(dtype):
        torch.set_default_dtype(dtype)  # also what uint8 / 255 becomes
        teacher = models.load_teacher("fasterrcnn", teachers["fasterrcnn"], 64, 128)
        torch.manual_seed(0)
        return models.build_student(teacher), teacher

    def compare(dtype, steps, first_step=0):
        batches = [[torch.randint(0, 256, (3, h, w), dtype=torch.uint8,
                                  generator=torch.Generator().manual_seed(4 * b + i))
                    for i, (h, w) in enumerate([(70, 96), (64, 80), (75, 100), (66, 99)])]
                   for b in range(first_step, first_step + steps)]
        tables, states = [], []
        for train_pair, threads in ((train_ours, 2), (train_original, 2), (train_original, 1)):
            torch.set_num_threads(threads)
            student, teacher = copy.deepcopy(make_pair(dtype))
            table, optimizer = train_pair(student, teacher, batches)
            tables.append(table)
            states.append(end_state(student, optimizer))
        ours, wanted, noisy = states
        assert {v.dtype for v in [*ours.values(), *wanted.values()]} == {dtype, torch.int64}
        off, noise = ({key: ((state[key] - value).double().norm()
                             / value.double().norm().clamp(min=1e-300)).item()
                       for key, value in wanted.items()} for state in (ours, noisy))
        return *tables, off, noise

    yield compare
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads_before)


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


class Body(torch.nn.Module):
    """Four maps that are no work, and a list of the batches that came in."""

    def __init__(self):
        super().__init__()
        self.value = torch.nn.Parameter(torch.ones(1, 1))
        self.batches = []

    def forward(self, batch):
        self.batches.append(batch)
        return {str(i): self.value for i in range(4)}


def test_batches_are_prepared_as_the_original_prepares_them(dataset, teachers):
    """Pillow, to_tensor, flip and the detector's transform against ours: the same, bit for bit."""
    teacher = models.load_teacher("fasterrcnn", teachers["fasterrcnn"], **SIZES)
    transform = copy.deepcopy(teacher.transform)
    models.to_device(teacher, CPU)
    images, folder = data.load_train_split(dataset, 160)
    loader = data.train_loader(images, folder, 4, seed=0, workers=0, device=CPU)
    body, flips = Body(), set()
    optimizer = torch.optim.SGD(body.parameters())
    for keys, micro_batch in zip(loader.batch_sampler, loader, strict=True):
        train.train_step(body, Body(), teacher.transform, [micro_batch], optimizer)
        originals = []
        for position, flip in keys:
            image = Image.open(folder / images[position].file_name).convert("RGB")
            originals.append(to_tensor(image).flip([-1] * flip))
            flips.add(flip)
        assert same(body.batches[-1], transform(originals)[0].tensors)
    assert flips == {False, True} and len(body.batches) > 4
