import argparse
import collections
import json
import math
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ARCHS, SIZES
from torchvision.ops import FrozenBatchNorm2d

import models
import train

REFERENCE = json.loads((Path(__file__).parent / "checkpoint_keys.json").read_text())


@pytest.fixture(scope="module", params=ARCHS)
def arch(request):
    return request.param


@pytest.fixture(scope="module")
def teacher(arch, teachers):
    return models.load_teacher(arch, teachers[arch], **SIZES)


@pytest.fixture(scope="module")
def student(teacher):
    torch.manual_seed(3)
    return models.build_student(teacher)


def batch(seed=0):
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(seed))


def frozen_norms(detector):
    return [module for module in detector.modules() if isinstance(module, FrozenBatchNorm2d)]


# ---- teacher and student


def test_student_state_has_the_published_keys_shapes_and_order(arch, student):
    state = student.state_dict()
    found = [
        (key, list(value.shape), str(value.dtype).removeprefix("torch."))
        for key, value in state.items()
    ]
    assert found == [(key, *spec) for key, spec in REFERENCE["keys"][arch].items()]
    counts = REFERENCE["parameters"][arch]
    assert sum(p.numel() for p in student.parameters()) == counts["total"]
    assert (
        sum(p.numel() for p in student.backbone.body.layer1.parameters())
        == counts["backbone.body.layer1"]
    )


def test_only_conv1_and_layer1_are_trainable_and_not_the_teachers(teacher, student):
    trainable = {name for name, p in student.named_parameters() if p.requires_grad}
    assert trainable and trainable == {
        name
        for name, _ in student.named_parameters()
        if name.startswith(("backbone.body.conv1.", "backbone.body.layer1."))
    }
    own = {id(p) for p in teacher.parameters()}
    for name, parameter in student.named_parameters():
        assert (id(parameter) in own) == (name not in trainable), name
    assert not any(p.requires_grad for p in teacher.parameters())
    assert torch.equal(student.backbone.body.conv1.weight, teacher.backbone.body.conv1.weight)
    assert hasattr(teacher.backbone.body.layer1, "0"), "building the student changed the teacher"


def test_layer1_has_pytorchs_default_initialisation(student):
    for module in student.backbone.body.layer1.modules():
        if isinstance(module, torch.nn.Conv2d):
            # kaiming_uniform with a = sqrt(5) is uniform within 1 / sqrt(fan_in)
            bound = 1 / math.sqrt(module.weight[0].numel())
            assert module.bias is None
            assert 0.97 * bound < module.weight.abs().max() <= bound
            assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        elif isinstance(module, torch.nn.BatchNorm2d):
            assert (module.eps, module.momentum) == (1e-5, 0.1)
            assert torch.all(module.weight == 1) and torch.all(module.bias == 0)


def test_bottleneck_keeps_the_size_and_narrows_to_its_channels():
    bottleneck = models.Bottleneck(5).eval()
    x = torch.randn(2, 64, 13, 22)
    assert bottleneck.encoder(x).shape == (2, 5, 17, 26)
    assert bottleneck(x).shape == (2, 256, 13, 22)


def test_frozen_norms_have_eps_0_after_every_way_of_loading(arch, teacher, student, checkpoints):
    loaded, found_arch = models.load_student(checkpoints[arch])
    assert found_arch == arch
    for detector in (models.build_detector(arch), teacher, student, loaded):
        assert frozen_norms(detector) and all(norm.eps == 0 for norm in frozen_norms(detector))


def test_detector_is_torchvisions_with_its_coco_weights_settings(arch):
    import torchvision

    theirs = getattr(torchvision.models.detection, f"{arch}_resnet50_fpn")(
        weights=None, weights_backbone=None, num_classes=91
    )
    ours = models.build_detector(arch)
    assert repr(ours.transform) == repr(theirs.transform)
    assert repr(ours.rpn) == repr(theirs.rpn) and repr(ours.roi_heads) == repr(theirs.roi_heads)
    assert (
        ours.roi_heads.score_thresh,
        ours.roi_heads.nms_thresh,
        ours.roi_heads.detections_per_img,
    ) == (0.05, 0.5, 100)
    frozen = {key for key in theirs.state_dict() if not key.endswith("num_batches_tracked")}
    assert set(ours.state_dict()) == frozen
    assert not ours.training


def test_random_teacher_is_seeded_and_well_scaled(arch, teacher):
    with torch.no_grad():
        maps = teacher.backbone.body(batch())
    assert all(0.1 < m.std() < 10 for m in maps.values())
    images = [torch.rand(3, 80, 96, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    a, b, c = (
        models.random_teacher(arch, images, seed, **SIZES).state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["backbone.body.conv1.weight"], c["backbone.body.conv1.weight"])


# ---- what training runs


def test_folded_layers_compute_the_same(teacher):
    body = teacher.backbone.body
    before = {key: value.clone() for key, value in body.state_dict().items()}
    folded = models.fold_frozen_bn(body)
    assert not frozen_norms(folded)
    with torch.no_grad():
        for ours, wanted in zip(folded(batch()).values(), body(batch()).values()):
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(before[key], value) for key, value in body.state_dict().items())


def test_distiller_gives_the_features_of_both_detectors(teacher, student):
    distiller = models.Distiller(teacher, student).to(memory_format=torch.channels_last)
    student_maps, teacher_maps = distiller(batch())
    with torch.no_grad():
        for ours, wanted in ((teacher_maps, teacher), (student_maps, student)):
            wanted = list(wanted.backbone.body(batch()).values())
            assert len(ours) == len(wanted) == 4
            for a, b in zip(ours, wanted):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not any(m.requires_grad for m in teacher_maps) and all(
        m.requires_grad for m in student_maps
    )


def test_distiller_trains_the_students_own_modules_and_nothing_else(teacher, student):
    distiller = models.Distiller(teacher, student)
    trainable = {id(p) for p in distiller.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in student.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in distiller.student_stem.parameters()}
    student_maps, _ = distiller(batch())
    sum(m.sum() for m in student_maps).backward()
    for name, parameter in student.named_parameters():
        assert (parameter.grad is not None) == name.startswith(
            ("backbone.body.conv1", "backbone.body.layer1")
        )
        parameter.grad = None


# ---- checkpoint files


@pytest.fixture
def state(checkpoints):
    return torch.load(checkpoints["fasterrcnn"], weights_only=True)["model"]


def loads(content, tmp_path, **save_options):
    torch.save(content, tmp_path / "file.pt", **save_options)
    return models.load_student(tmp_path / "file.pt")


def same(detector, state):
    return all(torch.equal(value, state[key]) for key, value in detector.state_dict().items())


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_2020_load(arch, checkpoints, tmp_path, zipped):
    state = torch.load(checkpoints[arch], weights_only=True)["model"]
    old = collections.OrderedDict(
        (REFERENCE["names_of_2020"][arch].get(key, key), value) for key, value in state.items()
    )
    assert set(old) != set(state)
    content = {
        "model": old,
        "best_value": np.float64(0.359),
        "config": {"train": {"num_epochs": 20}},
        "optimizer": {"state": {}, "param_groups": []},
        "args": argparse.Namespace(seed=None),
        "lr_scheduler": {"milestones": collections.Counter([5, 15])},
    }
    student, found_arch = loads(content, tmp_path, _use_new_zipfile_serialization=zipped)
    assert found_arch == arch and same(student, state)
    content = models.load_checkpoint(tmp_path / "file.pt")
    assert content["best_value"] == 0.359 and content["lr_scheduler"]["milestones"][15] == 1


def test_old_and_new_name_of_numpys_scalar_are_allowed(tmp_path):
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        torch.save(
            {"best_value": np.float64(0.5)},
            tmp_path / "file.pt",
            _use_new_zipfile_serialization=False,
        )
        raw = (tmp_path / "file.pt").read_bytes()
        for name in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
            raw = raw.replace(b"c" + name + b"\n", b"c" + module.encode() + b"\n")
        assert module.encode() in raw
        (tmp_path / "file.pt").write_bytes(raw)
        assert models.load_checkpoint(tmp_path / "file.pt") == {"best_value": 0.5}


def test_tensors_saved_on_a_gpu_load_without_one(state, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    student, _ = loads({"model": state}, tmp_path)
    assert same(student, state)


def test_bare_state_and_ddp_prefix_are_accepted(state, tmp_path):
    assert same(loads(state, tmp_path)[0], state)
    assert same(loads({"model": {f"module.{k}": v for k, v in state.items()}}, tmp_path)[0], state)


def test_bottleneck_width_follows_from_the_file(teacher, tmp_path):
    student, _ = loads(models.build_student(teacher, 6).state_dict(), tmp_path)
    assert student.backbone.body.layer1.encoder[7].out_channels == 6


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("/tmp/ghnd-test-was-run"),)


@pytest.mark.parametrize(
    "content, message",
    [
        ({"model": Malicious()}, "never run"),
        ({"model": {"x": torch.zeros(1)}}, "no R-CNN detector"),
        ({"model": {"seq.backbone.body.conv1.weight": torch.zeros(1)}}, "training wrapper"),
        ({"model": None}, "no state dict"),
        ({"optimizer": {}}, "no state dict"),
        ([1, 2], "holds a list"),
    ],
)
def test_wrong_contents_are_refused(content, message, tmp_path):
    Path("/tmp/ghnd-test-was-run").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=f"file.pt.*{message}"):
        loads(content, tmp_path)
    assert not Path("/tmp/ghnd-test-was-run").exists()


def test_wrong_detectors_are_refused(state, teachers, tmp_path):
    short = {k: v for k, v in state.items() if k != "rpn.head.cls_logits.bias"}
    with pytest.raises(
        ValueError, match=r"file.pt does not fit FasterRCNN: .*rpn\.head\.cls_logits\.bias"
    ):
        loads(short, tmp_path)
    with pytest.raises(ValueError, match="does not fit FasterRCNN: .*surplus"):
        loads({**state, "surplus": torch.zeros(1)}, tmp_path)
    with pytest.raises(ValueError, match="does not fit FasterRCNN: size mismatch"):
        loads({**state, "rpn.head.cls_logits.bias": torch.zeros(5)}, tmp_path)
    for narrowest in (torch.zeros(()), torch.zeros(1).expand(10**9, 64, 2, 2)):
        with pytest.raises(ValueError, match="no bottleneck"):  # nor the memory that it would take
            loads({**state, "backbone.body.layer1.encoder.7.weight": narrowest}, tmp_path)
    with pytest.raises(ValueError, match="no bottleneck"):
        models.load_student(teachers["fasterrcnn"])
    with pytest.raises(ValueError, match="teacher of a maskrcnn"):
        models.load_teacher("maskrcnn", teachers["fasterrcnn"])
    torch.save(state, tmp_path / "student.pt")
    with pytest.raises(ValueError, match="does not hold the teacher"):
        models.load_teacher("fasterrcnn", tmp_path / "student.pt")


def test_damaged_files_are_refused(checkpoints, tmp_path):
    whole, path = checkpoints["fasterrcnn"].read_bytes(), tmp_path / "file.pt"
    cases = {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"not a checkpoint\n",
        "pickle": pickle.dumps({"model": 1}),
    }
    for raw in cases.values():
        path.write_bytes(raw)
        with pytest.raises(ValueError, match="file.pt was refused"):
            models.load_student(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "a zip, but no checkpoint")
    with pytest.raises(ValueError, match="file.pt was refused: it is damaged"):
        models.load_student(path)
    with pytest.raises(FileNotFoundError, match="nowhere.pt is not there"):
        models.load_student(tmp_path / "nowhere.pt")


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "last.pt"
    train.save_checkpoint({"epoch": 1}, path)
    with pytest.raises(Exception, match="pickle|local"):
        train.save_checkpoint({"epoch": 2, "unpicklable": lambda: None}, path)
    assert models.load_checkpoint(path) == {"epoch": 1}
    assert list(tmp_path.iterdir()) == [path]
