import argparse
import collections
import copy
import json
import pickle
import re
import shutil
import urllib.error
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import ARCHS, CPU, SIZES, same
from torchvision.ops import FrozenBatchNorm2d

import models
from distributed import InputError

REFERENCE = json.loads((Path(__file__).parent / "checkpoint_keys.json").read_text())
TRAINED = ("backbone.body.conv1.", "backbone.body.layer1.")


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


def random(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# ---- teacher and student -------------------------------------------------------------------------


def test_student_has_the_published_keys_shapes_and_types(arch, student):
    found = [(key, [list(value.shape), str(value.dtype).removeprefix("torch.")])
             for key, value in student.state_dict().items()]
    assert found == list(REFERENCE["keys"][arch].items())
    counts = REFERENCE["parameters"][arch]
    layer1 = student.backbone.body.layer1
    assert sum(p.numel() for p in student.parameters()) == counts["total"]
    assert sum(p.numel() for p in layer1.parameters()) == counts["backbone.body.layer1"]


def test_student_trains_conv1_and_layer1_and_shares_all_else(student, teacher):
    own = {id(p) for p in teacher.parameters()}
    for name, parameter in student.named_parameters():
        assert parameter.requires_grad == name.startswith(TRAINED)
        assert (id(parameter) in own) != name.startswith(TRAINED)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert same(student.backbone.body.conv1.weight, teacher.backbone.body.conv1.weight)
    assert isinstance(teacher.backbone.body.layer1, torch.nn.Sequential), "the teacher was changed"


def test_bottleneck_starts_as_pytorch_does_and_narrows_to_its_channels():
    bottleneck, x = models.Bottleneck(5).eval(), random(2, 64, 13, 22)
    assert bottleneck.encoder(x).shape == (2, 5, 17, 26)
    assert bottleneck(x).shape == (2, 256, 13, 22)
    torch.manual_seed(3)
    fresh = models.Bottleneck(5)
    torch.manual_seed(3)
    for module in bottleneck.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert same(bottleneck.state_dict(), fresh.state_dict())
    assert repr(bottleneck.encoder[1]) == repr(torch.nn.BatchNorm2d(64))  # eps, momentum


def test_detector_is_torchvisions_with_the_published_eps(arch, teacher, student, checkpoints):
    theirs = getattr(torchvision.models.detection, f"{arch}_resnet50_fpn")(
        weights=None, weights_backbone=None, num_classes=91)
    ours = models.build_detector(arch)
    for part in ("transform", "rpn", "roi_heads"):
        assert repr(getattr(ours, part)) == repr(getattr(theirs, part))
    heads = ours.roi_heads
    assert (heads.score_thresh, heads.nms_thresh, heads.detections_per_img) == (0.05, 0.5, 100)
    loaded, config = models.load_student(checkpoints[arch])
    assert (config["arch"], config["min_size"], config["max_size"]) == (arch, 800, 1333)
    for detector in (ours, teacher, student, loaded):
        norms = [m for m in detector.modules() if isinstance(m, FrozenBatchNorm2d)]
        assert {norm.eps for norm in norms} == {0} and not detector.training


@torch.no_grad()
def test_moving_to_a_device_changes_no_detection(teacher, monkeypatch):
    image = random(3, 90, 131)
    wanted = teacher([image])
    for layout in (torch.channels_last, torch.contiguous_format):
        monkeypatch.setattr(models, "memory_format", lambda device: layout)
        moved = models.to_device(copy.deepcopy(teacher), CPU)
        assert moved.backbone.body.conv1.weight.is_contiguous(memory_format=layout)
        assert same(moved.state_dict(), teacher.state_dict())
        assert same(moved.transform([image])[0].tensors, teacher.transform([image])[0].tensors)
    assert same(moved([image]), wanted) and len(wanted[0]["boxes"]) > 1


class Strided(torch.nn.Module):
    """A bottleneck with another layout: an eighth of the height and width."""

    def __init__(self, up=8):
        super().__init__()
        self.encoder = torch.nn.Conv2d(64, 5, kernel_size=8, stride=8)
        self.decoder = torch.nn.ConvTranspose2d(5, 256, kernel_size=8, stride=up)

    def forward(self, x):
        return self.decoder(self.encoder(x))


@pytest.mark.parametrize("arch", ["fasterrcnn"], indirect=True)
def test_a_bottleneck_must_keep_the_contract(teacher):
    student = models.build_student(teacher, Strided())
    assert isinstance(student.backbone.body.layer1, Strided)
    with pytest.raises(InputError, match=r"^Strided maps \(1, 64, 24, 40\) to \(1, 256, 22, 36\)"):
        models.build_student(teacher, Strided(up=7))
    with pytest.raises(InputError, match="Conv2d has no encoder; a bottleneck needs"):
        models.build_student(teacher, torch.nn.Conv2d(64, 256, 1))
    narrow = Strided()
    narrow.forward = lambda x: x
    with pytest.raises(InputError, match=r"^Strided maps .* to \(1, 64, 24, 40\), not"):
        models.build_student(teacher, narrow)


# ---- what training runs --------------------------------------------------------------------------


def test_training_bodies_give_both_detectors_maps_and_train_the_students_own_modules(
        student, teacher):
    before = copy.deepcopy(teacher.state_dict())
    batch = 2 * random(2, 3, 64, 96) - 1
    student_body, teacher_body = models.training_bodies(student, teacher)
    norms = [m for body in (student_body, teacher_body) for m in body.modules()
             if isinstance(m, FrozenBatchNorm2d)]
    assert norms == [student.backbone.body.bn1]  # all others are folded
    for name in ("layer2", "layer3", "layer4"):
        assert student_body[name] is teacher_body[name]
    trainable = [p for p in student_body.parameters() if p.requires_grad]
    assert list(map(id, trainable)) == [id(p) for p in student.parameters() if p.requires_grad]
    for layout in (torch.channels_last, torch.contiguous_format):
        for body, detector in ((student_body, student), (teacher_body, teacher)):
            maps = body.to(memory_format=layout)(batch)
            torch.testing.assert_close(maps, detector.backbone.body(batch), rtol=1e-4, atol=1e-4)
            assert [m.shape[1] for m in maps.values()] == [256, 512, 1024, 2048]
            assert all(m.requires_grad == (detector is student) for m in maps.values())
    sum(m.sum() for m in student_body(batch).values()).backward()
    for name, parameter in student.named_parameters():
        assert (parameter.grad is not None) == name.startswith(TRAINED)
        parameter.grad = None
    assert same(before, teacher.state_dict())


@pytest.mark.parametrize("arch", ["fasterrcnn"], indirect=True)
def test_frozen_layers_cast_once_give_autocasts_maps(student, teacher):
    batch = random(2, 3, 64, 96)
    once = models.training_bodies(student, teacher, bf16=True)
    each_time = models.training_bodies(student, teacher)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for body, other in zip(once, each_time, strict=True):
            maps = body(batch)
            assert same(dict(maps), dict(other(batch))) and maps["3"].dtype == torch.bfloat16
    assert {p.dtype for p in once[1].parameters()} == {torch.bfloat16}
    assert {p.dtype for p in once[0].parameters() if p.requires_grad} == {torch.float32}


def test_bfloat16_is_used_only_where_the_device_has_it(monkeypatch):
    for supported in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
        assert models.has_bf16(CPU) == supported
        monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                            lambda including_emulation: supported or including_emulation)
        assert models.has_bf16(torch.device("cuda")) == supported


# ---- checkpoint files ----------------------------------------------------------------------------


@pytest.mark.parametrize("channels, device, numpy_module", [
    (3, "cuda:0", None), (6, "cpu", b"numpy.core"), (3, "cuda:0", b"numpy._core")])
def test_files_of_2020_load(arch, teacher, tmp_path, monkeypatch, channels, device, numpy_module):
    """Zip files, and pre-zip files with either name of numpy's scalar; saved on a GPU or not."""
    state = models.build_student(teacher, models.Bottleneck(channels)).state_dict()
    path = tmp_path / "file.pt"
    names = REFERENCE["names_of_2020"][arch]
    old = collections.OrderedDict((names.get(key, key), value) for key, value in state.items())
    assert set(old) != set(state)
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: device)
    torch.save({
        "model": old, "best_value": np.float64(0.359), "args": argparse.Namespace(seed=None),
        "config": {"train": {"num_epochs": 20}}, "optimizer": {"state": {}, "param_groups": []},
        "lr_scheduler": {"milestones": collections.Counter([5, 15])},
    }, path, _use_new_zipfile_serialization=numpy_module is None)
    if numpy_module:
        raw = re.sub(rb"cnumpy\._?core\.multi", b"c" + numpy_module + b".multi", path.read_bytes())
        assert b"c" + numpy_module + b".multiarray\n" in raw
        path.write_bytes(raw)
    student, config = models.load_student(path, bottleneck=models.Bottleneck(channels))
    assert config["arch"] == arch and same(student.state_dict(), state)
    content = models.load_checkpoint(path)
    assert content["best_value"] == 0.359 and content["lr_scheduler"]["milestones"][15] == 1


@pytest.mark.parametrize("prefix, inside", [
    ("module._orig_mod.", ""), ("_orig_mod.module.", ""), ("", "backbone.body._orig_mod.")])
def test_keys_of_wrapped_modules_are_accepted(prefix, inside, teachers, checkpoints, tmp_path):
    def wrapped(path):
        state = torch.load(path, weights_only=True)
        state = state.get("model", state)
        return {prefix + key.replace("backbone.body.", inside or "backbone.body."): value
                for key, value in state.items()}

    path = tmp_path / "file.pt"
    for source, load in ((checkpoints["fasterrcnn"], lambda: models.load_student(path)[0]),
                         (teachers["fasterrcnn"], lambda: models.load_teacher("fasterrcnn", path))):
        torch.save(wrapped(source), path)
        wanted = torch.load(source, weights_only=True)
        assert same(dict(load().state_dict()), dict(wanted.get("model", wanted)))


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("was-run"),)


@pytest.mark.parametrize("content, message", [
    ({"model": Malicious()}, "was refused: .*never run .*(getattr|touch|Path)"),
    ([1, 2], "was refused: it holds no dict"),
    ({"model": None}, "holds no state dict"),
    ({"optimizer": {}}, "holds no state dict: 'optimizer' is not a tensor"),
    ({"model": {1: torch.zeros(1)}}, "holds no state dict"),
    ({"model": {"x": torch.zeros(1)}}, "holds no detector: it has no roi_heads.box_predictor"),
    ({"model": {models.CLASS_SCORES: torch.zeros(())}}, "holds no detector"),
    ({"model": {models.CLASS_SCORES: torch.zeros(1).expand(10**7, 1024)}}, "holds fewer values"),
    ({"model": {models.CLASS_SCORES: torch.zeros(10**7, 1024, device="meta")}}, "fewer values"),
    ({"model": {"x": torch.eye(3).to_sparse()}}, "holds fewer values")])
def test_files_of_other_contents_are_refused(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "file.pt")
    with pytest.raises(InputError, match=f"file.pt.*{message}"):
        models.load_student(Path("file.pt"))
    assert not Path("was-run").exists()


@pytest.mark.parametrize("edit, message", [
    ({"rpn.head.cls_logits.bias": None}, "does not fit: .*rpn.head.cls_logits.bias"),
    ({"rpn.head.cls_logits.bias": torch.zeros(5)}, "does not fit: .*size mismatch"),
    ({"surplus": torch.zeros(1)}, "does not fit: .*surplus"),
    ({"rpn.head.cls_logits.bias": torch.full((3,), np.nan)},
     "rpn.head.cls_logits.bias has values that are not finite"),
    ({"backbone.body.bn1.running_var": torch.zeros(64)},
     "cannot be used: backbone.body.bn1 divides by a variance .* --teacher-eps"),
    ({"backbone.body.layer1.encoder.7.weight": None}, "does not fit: .*layer1.encoder.7.weight"),
    ({models.CLASS_SCORES: None}, "holds no detector")])
def test_weights_that_do_not_fit_are_named(edit, message, checkpoints, tmp_path):
    state = models.load_checkpoint(checkpoints["fasterrcnn"])["model"] | edit
    torch.save({key: value for key, value in state.items() if value is not None},
               tmp_path / "file.pt")
    with pytest.raises(InputError, match=f"file.pt.* .*{message}"):
        models.load_student(tmp_path / "file.pt")


@pytest.mark.parametrize("field, value", [
    ("bottleneck_channels", 10**9), ("min_size", "800"), ("max_size", -1)])
def test_a_config_that_cannot_be_right_is_named(field, value, checkpoints, tmp_path):
    config = {"bottleneck_channels": 3, field: value}
    content = models.load_checkpoint(checkpoints["fasterrcnn"])
    torch.save(content | {"config": config}, tmp_path / "file.pt")
    with pytest.raises(InputError, match=f"file.pt cannot be used: its config has {field} "):
        models.load_student(tmp_path / "file.pt")


def test_files_of_another_detector_are_refused(teachers, checkpoints):
    with pytest.raises(InputError, match="fasterrcnn.pt does not fit"):
        models.load_student(teachers["fasterrcnn"])
    for arch, path in (("maskrcnn", teachers["fasterrcnn"]), ("fasterrcnn", teachers["maskrcnn"]),
                       ("fasterrcnn", checkpoints["fasterrcnn"])):
        with pytest.raises(InputError, match=f"{path} does not fit: "):
            models.load_teacher(arch, path)


def test_damaged_files_are_refused(checkpoints, tmp_path):
    whole, path = checkpoints["fasterrcnn"].read_bytes(), tmp_path / "file.pt"
    with pytest.raises(InputError, match="file.pt is not there"):
        models.load_student(path)
    for raw in (whole[:len(whole) // 2], b"", b"<html>", pickle.dumps({"model": 1}, protocol=2)):
        path.write_bytes(raw)
        with pytest.raises(InputError, match="file.pt was refused: it is damaged"):
            models.load_student(path)


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "last.pt"
    models.save_checkpoint({"epoch": 1}, path)
    with pytest.raises(Exception, match="pickle|local"):
        models.save_checkpoint({"epoch": 2, "unpicklable": lambda: None}, path)
    assert models.load_checkpoint(path) == {"epoch": 1} and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("arch", ["fasterrcnn"], indirect=True)
def test_a_teacher_with_eps_is_its_own_batch_norm(arch, teacher, teachers):
    """What torchvision computes with eps 1e-5, ours computes with eps 0 and other variances."""
    theirs = copy.deepcopy(teacher)
    for module in theirs.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.eps = 1e-5
    ours = models.load_teacher(arch, teachers[arch], **SIZES, eps=1e-5)
    batch = random(1, 3, 64, 96)
    torch.testing.assert_close(ours.backbone.body(batch), theirs.backbone.body(batch))
    assert not same(ours.backbone.body(batch)["3"], teacher.backbone.body(batch)["3"])


def test_ordinary_batch_norm_is_told_by_its_keys(teachers, tmp_path, capsys):
    """A torchvision detector of nothing pretrained has it, with eps 1e-5."""
    state = torch.load(teachers["fasterrcnn"], weights_only=True)
    state["backbone.body.bn1.num_batches_tracked"] = torch.tensor(7)
    torch.save(state, tmp_path / "teacher.pt")
    ours = models.load_teacher("fasterrcnn", tmp_path / "teacher.pt")
    assert "ordinary BatchNorm2d; its eps is assumed to be 1e-5" in capsys.readouterr().out
    wanted = models.load_teacher("fasterrcnn", teachers["fasterrcnn"], eps=1e-5)
    assert same(ours.state_dict(), wanted.state_dict())
    forced = models.load_teacher("fasterrcnn", tmp_path / "teacher.pt", eps=0.0)
    assert not same(forced.state_dict(), wanted.state_dict())


# ---- downloaded teachers -------------------------------------------------------------------------


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """The file in torch.hub's cache where a downloaded Faster R-CNN would be."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth"
    path.parent.mkdir(parents=True)
    return path


def test_a_teacher_is_downloaded_once_checked_and_read_safely(
        cached, teachers, tmp_path, monkeypatch):
    calls = []

    def download(url, path, hash_prefix, progress):
        calls.append((url, hash_prefix))
        shutil.copy(teachers["fasterrcnn"], path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        teacher = models.load_teacher("fasterrcnn")
    [(url, hash_prefix)] = calls
    assert url.endswith(cached.name) and hash_prefix == "258fb6c6"
    assert same(dict(teacher.state_dict()), dict(torch.load(cached, weights_only=True)))

    monkeypatch.chdir(tmp_path)
    torch.save({"model": Malicious()}, cached)
    hostile = cached.read_bytes()
    for raw in (hostile, b"<html>", b"", hostile[:50]):
        cached.write_bytes(raw)
        with pytest.raises(InputError, match="no weights from http.* by way of the cache .*hub"):
            models.load_teacher("fasterrcnn")
    assert not Path("was-run").exists()


def test_coco_v1_is_told_by_the_hash_in_its_name(tmp_path, monkeypatch):
    (tmp_path / "a.pth").write_bytes(b"abc")  # whose SHA-256 begins with ba7816bf
    assert models.is_coco_v1("maskrcnn", None)
    assert not models.is_coco_v1("maskrcnn", tmp_path / "a.pth")
    monkeypatch.setattr(models, "coco_v1_url", lambda arch: "https://x/maskrcnn-ba7816bf.pth")
    assert models.is_coco_v1("maskrcnn", tmp_path / "a.pth")


def test_a_teacher_that_cannot_be_downloaded(cached, monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(InputError, match=r"258fb6c6.pth .*no network.* elsewhere .* --teacher-ckpt"):
        models.load_teacher("fasterrcnn")


# ---- split computing -----------------------------------------------------------------------------

INPUTS = {
    "random": torch.randn(3, 9, 13, generator=torch.Generator().manual_seed(0)),
    "negative": -1 - random(3, 9, 13, seed=1),
    "positive": 1 + random(3, 9, 13, seed=2),
    "huge": 1e38 * (3 * random(3, 9, 13, seed=3) - 1.5),
    "tiny": 1e-30 * (2 * random(3, 9, 13, seed=4) - 1)}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_quantizer_is_torchdistills_bit_for_bit(bits, name):
    from torchdistill.common.tensor_util import dequantize_tensor, quantize_tensor
    x = INPUTS[name]
    theirs, (q, scale, zero_point) = quantize_tensor(x, bits), models.quantize(x, bits)
    assert torch.equal(q, theirs.tensor) and q.dtype == torch.uint8
    assert (scale.item(), zero_point.item()) == (theirs.scale.item(), theirs.zero_point)
    wanted = dequantize_tensor(theirs)
    assert torch.equal(models.dequantize(q, scale, zero_point), wanted)
    assert torch.equal(models.dequantize(q, scale.item(), int(zero_point)), wanted)  # as sent


def test_floats_are_sent_as_they_are():
    x = INPUTS["random"]
    assert torch.equal(models.dequantize(*models.quantize(x, 32)), x)
    assert torch.equal(models.dequantize(*models.quantize(x, 16)), x.half().float())


@pytest.mark.parametrize("constant", [0.0, 3.7, -0.2, 1e-40, -1e38])
@pytest.mark.parametrize("bits", [1, 4, 8, 32])
def test_a_constant_is_kept(constant, bits):
    """Where the original divides by zero."""
    x = torch.full((3, 5, 5), constant)
    assert torch.equal(models.dequantize(*models.quantize(x, bits)), x)


@pytest.mark.parametrize("bits", [32, 8, 1])
def test_tail_of_head_is_the_student_with_a_quantizer_in_it(student, bits, monkeypatch):
    monkeypatch.setattr(student.roi_heads, "score_thresh", 1e-3)  # untrained, it finds little
    monkeypatch.setattr(student.roi_heads, "detections_per_img", 10)  # whose masks take long
    head, tail = models.split(student, bits)
    for seed, (h, w) in enumerate([(90, 131), (200, 97)]):
        image = random(3, h, w, seed=seed)
        payload = head.compress(image)
        assert isinstance(payload, bytes)
        hook = student.backbone.body.layer1.encoder.register_forward_hook(
            lambda module, args, z: models.dequantize(*models.quantize(z, bits)))
        with torch.no_grad():
            wanted = student([image])[0]
        hook.remove()
        assert same(tail.detect(payload), wanted) and len(wanted["boxes"]) > 0
        assert ("masks" in wanted) == student.roi_heads.has_mask()


@pytest.mark.parametrize("arch", ["fasterrcnn"], indirect=True)
def test_long_images_are_split_as_well(student, monkeypatch):
    monkeypatch.setattr(student.transform, "max_size", 2000)
    monkeypatch.setattr(student.roi_heads, "detections_per_img", 2)  # whose masks are large
    image = random(3, 1, 1).expand(3, 66_000, 40)
    head, tail = models.split(student, 32)
    with torch.no_grad():
        wanted = student([image])[0]
    detections = tail.detect(head.compress(image))
    assert same(detections, wanted)


@pytest.mark.parametrize("arch", ["fasterrcnn"], indirect=True)
@pytest.mark.parametrize("bits", [8, 32])
def test_head_with_its_quantizer_can_be_exported(student, bits):
    head, _ = models.split(student, bits)
    sizes = {2: 32 * torch.export.Dim("rows", min=2, max=9),
             3: 32 * torch.export.Dim("columns", min=2, max=9)}
    program = torch.export.export(head, (random(1, 3, 96, 160),), dynamic_shapes=(sizes,))
    for h, w in ((96, 160), (160, 64)):
        batch = random(1, 3, h, w)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(batch), head(batch))
    assert sum(p.numel() for p in head.network.parameters()) == 158_400


@pytest.fixture(scope="module")
def payload(student):
    return models.Head(student, 8).compress(random(3, 90, 131))


def changed(payload, values=None, **fields):
    """The payload with other fields in its header, or other values."""
    content = zlib.decompress(payload)
    size = models.HEADER_FORMAT.size
    header = models.Header._make(models.HEADER_FORMAT.unpack_from(content))._replace(**fields)
    values = content[size:] if values is None else values
    return zlib.compress(models.HEADER_FORMAT.pack(*header) + values)


@pytest.mark.parametrize("arch", ["fasterrcnn"], indirect=True)
@pytest.mark.parametrize("damage, message", [
    (lambda p: b"", "cut off"), (lambda p: p[:-1], "cut off"), (lambda p: p[:-100], "cut off"),
    (lambda p: p[:-1] + b"?", "cannot be unzipped"),
    (lambda p: p + b"x", "goes on after its end"),
    (lambda p: zlib.compress(b"GHND"), "not made by a Head"),
    (lambda p: changed(p, magic=b"PNG!"), "not made by a Head"),
    (lambda p: changed(p, bits=9), "sizes cannot be right"),
    (lambda p: changed(p, bits=16), "sizes cannot be right"),
    (lambda p: changed(p, scale=float("nan")), "sizes cannot be right"),
    (lambda p: changed(p, image_width=0), "sizes cannot be right"),
    (lambda p: changed(p, resized_height=0), "sizes cannot be right"),
    (lambda p: changed(p, image_width=2**32 - 1, image_height=2**32 - 1), "sizes cannot be right"),
    (lambda p: changed(p, rows=7), "sizes cannot be right"),
    (lambda p: changed(p, values=b""), "sizes cannot be right"),
    (lambda p: changed(p, values=bytes(models.MAX_BYTES)), "too large"),
    (lambda p: changed(p, resized_width=161), "for another student"),
    (lambda p: changed(p, bytes(3 * 4096 * 4096), rows=4096, columns=4096), "for another student"),
    (lambda p: changed(p, bytes(4 * 50 * 50), channels=4, rows=50, columns=50), "for another student")])
def test_damaged_payloads_are_refused(student, payload, damage, message):
    with pytest.raises(InputError, match=f"payload refused: .*{message}"):
        models.Tail(student).detect(damage(payload))


@pytest.mark.parametrize("arch", ["fasterrcnn"], indirect=True)
def test_any_changed_bit_of_a_payload_is_noticed(payload):
    """By zlib's checksum, which covers header and values."""
    for position in np.linspace(0, len(payload) - 1, 60).astype(int):
        damaged = bytearray(payload)
        damaged[position] ^= 1 << (position % 8)
        with pytest.raises(InputError, match="payload refused"):
            models.unpack(bytes(damaged))


@pytest.mark.parametrize("arch", ["fasterrcnn"], indirect=True)
def test_another_bottleneck_is_split_as_well(teacher, monkeypatch):
    """Whose values have another shape, of which nothing but its head knows."""
    student = models.build_student(teacher, Strided())
    monkeypatch.setattr(student.roi_heads, "detections_per_img", 10)
    payload = models.Head(student, 32).compress(random(3, 90, 131))
    header, values = models.unpack(payload)
    assert values.shape == (1, 5, 3, 5) == (1, header.channels, header.rows, header.columns)
    with torch.no_grad():
        wanted = student([random(3, 90, 131)])[0]
    assert same(models.Tail(student).detect(payload), wanted)
