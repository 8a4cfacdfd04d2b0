import argparse
import collections
import copy
import json
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import ARCHS, SIZES, same
from torchvision.ops import FrozenBatchNorm2d

import models

REFERENCE = json.loads((Path(__file__).parent / "checkpoint_keys.json").read_text())
TRAINED = ("backbone.body.conv1.", "backbone.body.layer1.")


@pytest.fixture(scope="module", params=ARCHS)
def arch(request):
    return request.param


@pytest.fixture(scope="module")
def teacher(arch, teachers):
    torch.manual_seed(3)  # of the students
    return models.load_teacher(arch, teachers[arch], **SIZES)


def random(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# ---- teacher and student -------------------------------------------------------------------------
def test_student_has_the_published_keys_and_trains_conv1_and_layer1_alone(arch, teacher):
    student = models.build_student(teacher)
    found = [(k, [list(v.shape), str(v.dtype)[6:]]) for k, v in student.state_dict().items()]
    assert found == list(REFERENCE["keys"][arch].items())
    body, parameters = student.backbone.body, dict(student.named_parameters())
    counts = REFERENCE["parameters"][arch]
    assert sum(p.numel() for p in parameters.values()) == counts["total"]
    assert sum(p.numel() for p in body.layer1.parameters()) == counts["backbone.body.layer1"]
    trainable = {name for name, p in parameters.items() if p.requires_grad}
    assert trainable and trainable == {name for name in parameters if name.startswith(TRAINED)}
    own = {id(p) for p in teacher.parameters()}
    assert {name for name, p in parameters.items() if id(p) not in own} == trainable
    assert not any(p.requires_grad for p in teacher.parameters())
    assert same(body.conv1.weight, teacher.backbone.body.conv1.weight)
    assert hasattr(teacher.backbone.body.layer1, "0"), "building the student changed the teacher"


def test_bottleneck_starts_as_pytorch_does_and_narrows_to_its_channels():
    torch.manual_seed(3)
    bottleneck, x = models.Bottleneck(5).eval(), random(2, 64, 13, 22)
    again = copy.deepcopy(bottleneck)
    torch.manual_seed(3)
    again.apply(lambda module: getattr(module, "reset_parameters", lambda: None)())
    assert same(bottleneck.state_dict(), again.state_dict())
    assert repr(bottleneck.encoder[1]) == repr(torch.nn.BatchNorm2d(64))  # eps, momentum
    assert [bottleneck.encoder(x).shape, bottleneck(x).shape] == [(2, 5, 17, 26), (2, 256, 13, 22)]


def test_detector_is_torchvisions_with_coco_v1s_settings(arch, teacher, checkpoints):
    theirs = getattr(torchvision.models.detection, f"{arch}_resnet50_fpn")(
        weights=None, weights_backbone=None, num_classes=91)
    ours, (loaded, found_arch) = models.build_detector(arch), models.load_student(checkpoints[arch])
    for part in ("transform", "rpn", "roi_heads"):
        assert repr(getattr(ours, part)) == repr(getattr(theirs, part))
    heads = ours.roi_heads
    assert (heads.score_thresh, heads.nms_thresh, heads.detections_per_img) == (0.05, 0.5, 100)
    frozen = {key for key in theirs.state_dict() if not key.endswith("num_batches_tracked")}
    assert set(ours.state_dict()) == frozen and found_arch == arch
    for detector in (ours, teacher, models.build_student(teacher), loaded):
        norms = [m for m in detector.modules() if isinstance(m, FrozenBatchNorm2d)]
        assert {norm.eps for norm in norms} == {0} and not detector.training


@pytest.mark.parametrize("device, capability, pays", [
    ("cpu", "AVX2", 0), ("cpu", "AVX512", 1), ("cuda", (7, 5), 0), ("cuda", (8, 0), 1)])
def test_memory_format_is_channels_last_where_it_pays(device, capability, pays, monkeypatch):
    name = "torch.cuda.get_device" if device == "cuda" else "torch.backends.cpu.get_cpu"
    monkeypatch.setattr(f"{name}_capability", lambda *device: capability)
    wanted = torch.channels_last if pays else torch.contiguous_format
    assert models.memory_format(torch.device(device)) == wanted


@torch.no_grad()
def test_detect_on_its_device_is_the_detectors_own_forward(arch, teacher, monkeypatch):
    image = random(3, 90, 131)
    for detector in (teacher, models.build_student(teacher)):
        for layout in (torch.channels_last, torch.contiguous_format):
            monkeypatch.setattr(models, "memory_format", lambda device: layout)
            moved = models.to_device(copy.deepcopy(detector), torch.device("cpu"))
            assert moved.backbone.body.conv1.weight.is_contiguous(memory_format=layout)
            assert same(moved.state_dict(), detector.state_dict())
            images, _ = moved.transform([image])
            assert same(images.tensors, detector.transform([image])[0].tensors)
        found, resized, original = models.detect(moved, image)
        found = moved.transform.postprocess([found], [resized], [original])
        wanted = detector([image])
        assert same(found, wanted) and len(wanted[0]["boxes"]) > 1
        assert ("masks" in wanted[0]) == (arch == "maskrcnn")


# ---- what training runs --------------------------------------------------------------------------
def test_distiller_gives_both_features_and_trains_the_students_own_modules(teacher):
    before, batch = copy.deepcopy(teacher.state_dict()), 2 * random(2, 3, 64, 96) - 1
    distiller = models.Distiller(teacher, student := models.build_student(teacher))
    norms = [m for m in distiller.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert norms == [student.backbone.body.bn1]  # all others are folded
    trainable = {id(p) for p in distiller.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in student.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in distiller.student_stem.parameters()}
    for layout in (torch.channels_last, torch.contiguous_format):
        found = distiller.to(memory_format=layout)(batch)
        for maps, detector in zip(found, (student, teacher), strict=True):
            wanted = list(detector.backbone.body(batch).values())
            assert len(wanted) == 4 and all(m.requires_grad == (detector is student) for m in maps)
            torch.testing.assert_close(maps, wanted, rtol=1e-4, atol=1e-4)
    sum(m.sum() for m in found[0]).backward()
    for name, parameter in student.named_parameters():
        assert (parameter.grad is not None) == name.startswith(TRAINED)
    assert same(before, teacher.state_dict())


# ---- checkpoint files ----------------------------------------------------------------------------
def loads(content, tmp_path):
    torch.save(content, tmp_path / "file.pt")
    return models.load_student(tmp_path / "file.pt")


@pytest.mark.parametrize("channels, device, module", [
    (3, "cuda:0", None), (6, "cpu", b"numpy.core"), (3, "cuda:0", b"numpy._core")])
def test_files_of_2020_load(arch, teacher, tmp_path, monkeypatch, channels, device, module):
    """Zip and pre-zip files, from a GPU, with either name of numpy's scalar."""
    state, path = models.build_student(teacher, channels).state_dict(), tmp_path / "file.pt"
    names = REFERENCE["names_of_2020"][arch]
    old = collections.OrderedDict((names.get(key, key), value) for key, value in state.items())
    assert set(old) != set(state)
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: device)
    torch.save({
        "model": old, "best_value": np.float64(0.359), "args": argparse.Namespace(seed=None),
        "config": {"train": {"num_epochs": 20}}, "optimizer": {"state": {}, "param_groups": []},
        "lr_scheduler": {"milestones": collections.Counter([5, 15])},
    }, path, _use_new_zipfile_serialization=module is None)
    if module:
        raw = re.sub(rb"cnumpy\._?core\.multi", b"c" + module + b".multi", path.read_bytes())
        assert b"c" + module + b".multiarray\n" in raw
        path.write_bytes(raw)
    student, found_arch = models.load_student(path)
    assert found_arch == arch and same(student.state_dict(), state)
    content = models.load_checkpoint(path)
    assert content["best_value"] == 0.359 and content["lr_scheduler"]["milestones"][15] == 1


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("was-run"),)


@pytest.mark.parametrize("content, message", [
    ({"model": Malicious()}, "was refused: .*never run"), ([1, 2], "was refused: .*no dict"),
    ({"model": {"x": torch.zeros(1)}}, "no student"), ({"model": None}, "no state dict"),
    ({"optimizer": {}}, "no state dict"), ({"model": {1: torch.zeros(1)}}, "no state dict"),
    ({"model": {"seq.backbone.body.conv1.weight": torch.zeros(1)}}, "training wrapper")])
def test_wrong_contents_are_refused(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"file.pt.*{message}"):
        loads(content, tmp_path)
    assert not Path("was-run").exists()


def test_only_what_fits_is_accepted(teachers, checkpoints, tmp_path):
    state = models.load_checkpoint(checkpoints["fasterrcnn"])["model"]
    for content in (state, {"model": {f"module.{key}": value for key, value in state.items()}}):
        assert same(loads(content, tmp_path)[0].state_dict(), state)
    bias, narrowest = "rpn.head.cls_logits.bias", "backbone.body.layer1.encoder.7.weight"
    for edit, message in (
            ({bias: None}, f"does not fit FasterRCNN: .*{bias}"),
            ({bias: torch.zeros(5)}, "does not fit FasterRCNN: size mismatch"),
            ({"surplus": torch.zeros(1)}, "does not fit FasterRCNN: .*surplus"),
            ({bias: torch.full((3,), np.nan)}, f"is spoilt: {bias} has values that are not"),
            ({narrowest: torch.zeros(())}, "no bottleneck"),
            ({narrowest: torch.zeros(1).expand(10**9, 64, 2, 2)}, "no bottleneck")):  # nor memory
        edited = {key: value for key, value in {**state, **edit}.items() if value is not None}
        with pytest.raises(ValueError, match=f"file.pt .*{message}"):
            loads(edited, tmp_path)
    with pytest.raises(ValueError, match="fasterrcnn.pt holds no student: it has no bottleneck"):
        models.load_student(teachers["fasterrcnn"])
    for arch, path in (("maskrcnn", teachers["fasterrcnn"]), ("fasterrcnn", teachers["maskrcnn"]),
                       ("fasterrcnn", checkpoints["fasterrcnn"])):
        with pytest.raises(ValueError, match=f"(?i){path} does not fit {arch}: "):
            models.load_teacher(arch, path)


def test_damaged_files_are_refused(checkpoints, tmp_path):
    whole, path = checkpoints["fasterrcnn"].read_bytes(), tmp_path / "file.pt"
    for raw in (whole[:len(whole) // 2], b"", b"text\n", pickle.dumps({"model": 1}, protocol=2)):
        path.write_bytes(raw)
        with pytest.raises(ValueError, match="file.pt was refused: it is damaged"):
            models.load_student(path)
    for content, reason in ((b"", ""), (bytes(10**6), "it would unpack to more than it is")):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", content)
        with pytest.raises(ValueError, match=f"file.pt was refused: it is damaged.*{reason}"):
            models.load_student(path)
    with pytest.raises(FileNotFoundError, match="nowhere.pt is not there"):
        models.load_student(tmp_path / "nowhere.pt")


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "last.pt"
    models.save_checkpoint({"epoch": 1}, path)
    with pytest.raises(Exception, match="pickle|local"):
        models.save_checkpoint({"epoch": 2, "unpicklable": lambda: None}, path)
    assert models.load_checkpoint(path) == {"epoch": 1} and list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="no/last.pt cannot be written: .*No such file"):
        models.save_checkpoint({"epoch": 1}, tmp_path / "no" / "last.pt")
