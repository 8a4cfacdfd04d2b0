import argparse
import collections
import copy
import json
import re
import zlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ARCHS, SIZES, same
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import models
from distributed import InputError

REFERENCE = json.loads((Path(__file__).parent / "checkpoint_keys.json").read_text())
BIAS = "rpn.head.cls_logits.bias"
CLASSES = "roi_heads.box_predictor.cls_score.weight"
DAMAGED = ("^checkpoint file.pt was refused: it is damaged, no checkpoint, or holds code, which is "
           r"never run \(it starts with b'{}'\)$")


def random(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pairs(teachers):
    """For each architecture, a student and its teacher."""
    pairs = {}
    for arch in ARCHS:
        teacher = models.load_teacher(arch, teachers[arch], **SIZES)
        teacher.roi_heads.score_thresh = 1e-3  # an untrained student finds little
        teacher.roi_heads.detections_per_img = 4  # masks take long
        torch.manual_seed(3)
        pairs[arch] = models.build_student(teacher), teacher
    return pairs


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Path("file.pt")


def test_student_is_a_copy_of_the_teacher_that_trains_conv1_and_a_new_layer1(pairs):
    student, teacher = pairs["fasterrcnn"]
    for name, parameter in student.named_parameters():
        is_trained = name.startswith(("backbone.body.conv1.", "backbone.body.layer1."))
        assert parameter.requires_grad == is_trained
    assert not any(p.requires_grad for p in teacher.parameters())
    assert same(student.backbone.body.conv1.weight, teacher.backbone.body.conv1.weight)
    torch.manual_seed(3)  # as for the student; nothing has been counted by a BatchNorm
    assert same(student.backbone.body.layer1.state_dict(), models.Bottleneck().state_dict())

    state, wanted = student.state_dict(), teacher.state_dict()
    assert models.first_difference(state, wanted) is None
    for name in (BIAS, "surplus"):
        assert models.first_difference(state | {name: random(3)}, wanted) == name


class Own(nn.Module):
    def __init__(self, encoder, decoder, forward=None):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.forward = forward or (lambda x: self.decoder(self.encoder(x)))


def strided(stride=8):
    return Own(nn.Conv2d(64, 5, 8, 8), nn.ConvTranspose2d(5, 256, 8, stride))


@pytest.mark.parametrize("bottleneck, message", [
    (strided(7), r"forward ends with \(1, 256, 22, 36\) for an input of \(1, 64, 24, 40\), where"),
    (Own(nn.Identity(), nn.Identity(), lambda x: x.repeat(1, 4, 1, 1)), "Own's decoder ends with"),
    (Own(nn.Flatten(), nn.Identity()), r"encoder gives \(1, 61440\), not \(B, C, H, W\)"),
    (Own(nn.Identity(), None), "Own has no decoder; a bottleneck needs the modules")])
def test_a_bottleneck_that_breaks_the_contract_is_refused(bottleneck, message):
    with pytest.raises(InputError, match=message):
        models.build_student(nn.Module(), lambda: bottleneck)


def test_training_bodies_give_the_detectors_maps_and_train_the_student(pairs):
    student, teacher = pairs["fasterrcnn"]
    before = copy.deepcopy(teacher.state_dict())
    batch = 2 * random(2, 3, 64, 96) - 1
    bodies = student_body, teacher_body = models.training_bodies(student, teacher)
    norms = [m for body in bodies for m in body.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert norms == [student.backbone.body.bn1]  # all others are folded
    assert student_body["layer2"] is teacher_body["layer2"]
    layer1_bodies = models.training_bodies(student, teacher, layers=1)  # for HND
    for body, layer1_body, detector in zip(bodies, layer1_bodies, (student, teacher), strict=True):
        maps = body(batch)
        torch.testing.assert_close(maps, detector.backbone.body(batch), rtol=1e-4, atol=1e-4)
        assert same(dict(layer1_body(batch)), {"0": maps["0"]}) and "layer2" not in layer1_body
    sum(m.sum() for m in student_body(batch).values()).backward()
    assert all((p.grad is not None) == p.requires_grad for p in student.parameters())
    student.zero_grad()

    cast_once = models.training_bodies(student, teacher, bf16=True)
    assert {p.dtype for p in cast_once[1].parameters()} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for body, other in zip(bodies, cast_once, strict=True):
            assert same(dict(body(batch[:1])), dict(other(batch[:1])))
    assert same(before, teacher.state_dict())


# ---- checkpoint files ----------------------------------------------------------------------------


@pytest.mark.parametrize("arch, device, numpy_module", [
    ("fasterrcnn", "cuda:0", None), ("maskrcnn", "cuda:0", b"numpy.core"),
    ("fasterrcnn", "cpu", b"numpy._core")])
def test_students_of_2020_load_with_eps_0(arch, pairs, path, monkeypatch, device, numpy_module):
    """Zip files, and pre-zip files with either name of numpy's scalar; saved on a GPU or not."""
    state = pairs[arch][0].state_dict()
    assert list(state) == list(REFERENCE["keys"][arch])
    names = REFERENCE["names_of_2020"][arch]
    old = collections.OrderedDict((names.get(key, key), value) for key, value in state.items())
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
    student, config = models.load_student(path)
    assert same(student.state_dict(), state)
    wanted = {"bottleneck_channels": 3, "min_size": 800, "max_size": 1333, "arch": arch}
    assert config == wanted | {"train": {"num_epochs": 20}}
    norms = [m for m in student.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert {norm.eps for norm in norms} == {0} and not student.training


@pytest.mark.parametrize("key", ["module._orig_mod.a.b", "_orig_mod.module.a.b", "a._orig_mod.b"])
def test_keys_of_wrapped_modules_are_accepted(key, path):
    for content in ({key: random(2)}, {"model": {key: random(2)}, "optimizer": {}}):
        torch.save(content, path)
        assert same(models.load_checkpoint(path)["model"], {"a.b": random(2)})


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("was-run"),)


@pytest.mark.parametrize("content, message", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
     DAMAGED.format("version https://git-lfs.github.com/spec/")),
    ({"model": Malicious()}, DAMAGED.format("PK.*")),
    ([1, 2], "file.pt holds no state dict"),
    ({"model": None}, "file.pt holds no state dict"),
    ({"optimizer": {}}, "holds no state dict: 'optimizer' is not the name of a tensor"),
    ({"model": {"x": torch.zeros(1)}}, f"holds no detector: it has no {CLASSES} of 1024"),
    ({"model": {CLASSES: torch.zeros(1).expand(10**7, 1024)}}, "holds fewer values"),
    ({"model": {CLASSES: torch.zeros(10**7, 1024, device="meta")}}, "holds fewer values"),
    ({"model": {"x": torch.eye(3).to_sparse()}}, "holds fewer values"),
    ({"model": {}, "config": {"min_size": "800"}}, "with min_size '800': it must be a whole")])
def test_files_of_other_contents_are_refused_in_our_own_words(content, message, path):
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(InputError, match=message):
        models.load_student(path)
    assert not Path("was-run").exists()


@pytest.mark.parametrize("key, value, message", [
    (BIAS, random(5), f"does not fit: .*size mismatch.*{BIAS}"),
    (BIAS, random(3) / 0, f"{BIAS} has values that are not finite"),
    ("backbone.body.bn1.running_var", 0 * random(64), "bn1 divides by a variance .*--teacher-eps")])
def test_weights_that_do_not_fit_are_named(key, value, message, pairs, path):
    student = copy.deepcopy(pairs["fasterrcnn"][0])
    with pytest.raises(InputError, match=f"file.pt.* .*{message}"):
        models.load_weights(student, student.state_dict() | {key: value}, path)


def test_a_student_is_used_as_its_config_says_unless_told_otherwise(pairs, path, capsys):
    saved = models.build_student(pairs["fasterrcnn"][1], lambda: models.Bottleneck(5))
    config = {"arch": "maskrcnn", "bottleneck_channels": 5, "seed": 7, **SIZES}
    models.save_checkpoint({"model": saved.state_dict(), "config": config}, path)
    student, found = models.load_student(path, min_size=96, max_size=200)
    assert found == config | {"arch": "fasterrcnn", "max_size": 200}
    assert (student.transform.min_size, student.transform.max_size) == ((96,), 200)
    assert same(student.state_dict(), saved.state_dict())
    assert capsys.readouterr().out == f"{path}: trained with max_size 160, used with 200\n"


@pytest.mark.parametrize("is_ordinary, eps, added", [
    (False, 1e-5, 1e-5), (True, None, 1e-5), (True, 0.0, 0.0)])
def test_eps_of_batch_norm_is_added_to_variances(
        is_ordinary, eps, added, pairs, monkeypatch, capsys):
    state = pairs["fasterrcnn"][1].state_dict()
    counted = {"backbone.body.bn1.num_batches_tracked": torch.tensor(7)} if is_ordinary else {}
    monkeypatch.setattr(models, "load_checkpoint", lambda path: {"model": state | counted})
    teacher = models.load_teacher("fasterrcnn", Path("x"), eps=eps)
    for key, value in teacher.state_dict().items():
        assert same(value, state[key] + added if key.endswith(".running_var") else state[key])
    is_assumed = "its eps is assumed to be 1e-5" in capsys.readouterr().out
    assert is_assumed == (is_ordinary and eps is None)


def test_coco_v1_is_downloaded_once_checked_and_read_safely(teachers, path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", ".")
    download = Mock(side_effect=OSError("no network"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(InputError, match="258fb6c6.pth .*hub.*no network.*--teacher-ckpt"):
        models.load_teacher("fasterrcnn")

    raw = teachers["fasterrcnn"].read_bytes()
    download.side_effect = lambda url, file, *_, **__: Path(file).write_bytes(raw)
    teacher = models.load_teacher("fasterrcnn")
    assert same(dict(teacher.state_dict()), dict(models.download_coco_v1("fasterrcnn")))
    url, cached, hash_prefix = download.call_args.args
    assert url.endswith("/fasterrcnn_resnet50_fpn_coco-258fb6c6.pth") and hash_prefix == "258fb6c6"
    torch.save({"model": Malicious()}, cached)
    with pytest.raises(InputError, match="258fb6c6.pth .*hub.*--teacher-ckpt"):
        models.load_teacher("fasterrcnn")
    assert download.call_count == 2 and not Path("was-run").exists()


# ---- split computing -----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("x", [
    torch.randn(3, 9, 13, generator=torch.Generator().manual_seed(0)),
    -1 - random(3, 9, 13, seed=1),
    1 + random(3, 9, 13, seed=2),
    1e38 * (3 * random(3, 9, 13, seed=3) - 1.5)])
def test_quantizer_is_torchdistills_bit_for_bit(x, bits):
    from torchdistill.common.tensor_util import dequantize_tensor, quantize_tensor
    theirs, (q, scale, zero_point) = quantize_tensor(x, bits), models.quantize(x, bits)
    assert torch.equal(q, theirs.tensor) and q.dtype == torch.uint8
    assert (scale.item(), zero_point.item()) == (theirs.scale.item(), theirs.zero_point)
    wanted = dequantize_tensor(theirs)
    assert torch.equal(models.dequantize(q, scale, zero_point), wanted)
    assert torch.equal(models.dequantize(q, scale.item(), int(zero_point)), wanted)  # as sent


@pytest.mark.parametrize("constant", [0.0, 3.7, -0.2, 1e-40, -1e38])
def test_a_constant_is_kept_where_the_original_divides_by_zero(constant):
    x = torch.full((3, 5, 5), constant)
    assert torch.equal(models.quantize(x, 16)[0], x.half())
    for bits in (1, 4, 8, 32):
        assert torch.equal(models.dequantize(*models.quantize(x, bits)), x)


@pytest.mark.parametrize("arch, bottleneck, bits, h, w", [
    ("maskrcnn", models.Bottleneck, 8, 90, 131),
    ("fasterrcnn", models.Bottleneck, 1, 200, 97),
    ("fasterrcnn", strided, 32, 66_000, 40),
    ("fasterrcnn", lambda: Own(nn.PixelUnshuffle(2), nn.Upsample(scale_factor=2)), 8, 90, 131)])
def test_tail_of_head_is_the_student_with_a_quantizer_in_it(arch, bottleneck, bits, h, w, pairs):
    torch.manual_seed(3)
    student = models.build_student(pairs[arch][1], bottleneck)
    student.transform.max_size = 2000
    image = random(3, h, w)
    head, tail = models.split(student, bits)
    payload = head.compress(image)
    head.to("meta")  # the two halves can be on two devices
    student.backbone.body.layer1.encoder.register_forward_hook(
        lambda module, args, z: models.dequantize(*models.quantize(z, bits)) if bits < 32 else z)
    with torch.no_grad():
        [wanted] = student([image])
    assert same(tail.detect(payload), wanted) and len(wanted["boxes"]) > 0


def changed(payload, values=None, **fields):
    """Return the payload with other fields in its header, or with other values."""
    content = zlib.decompress(payload)
    header = np.frombuffer(content, models.HEADER, count=1).copy()
    for name, value in fields.items():
        header[name] = value
    values = content[models.HEADER.itemsize:] if values is None else bytes(values)
    return zlib.compress(header.tobytes() + values)


@pytest.mark.parametrize("damage, message", [
    (lambda p: p[:-1], "cut off"),
    (lambda p: p + b"x", "goes on after its end"),
    (lambda p: p[:14] + bytes([p[14] ^ 4]) + p[15:], "cannot be unzipped"),  # in its header
    (lambda p: changed(p, magic=b"JPEG"), "not made by a Head"),
    (lambda p: changed(p, bits=9), "sizes cannot be right"),
    (lambda p: changed(p, scale=3e38), "for another student"),  # gives infinite values
    (lambda p: changed(p, shape=(3, 2**13, 2**12)), "sizes cannot be right"),
    (lambda p: changed(p, bytes(3), shape=(3, 1, 1)), "for another student"),
    (lambda p: changed(p, bytes(3 * 32 * 44), shape=(3, 32, 44)), "for another student"),
    (lambda p: changed(p, bytes(3 * 200 * 200), shape=(3, 200, 200)), "for another student"),
    (lambda p: changed(p, bytes(3 * 28 * 260), shape=(3, 28, 260), resized_size=(96, 1024)),
     "for another student"),
    (lambda p: changed(p, image_size=(2**32 - 1, 2**32 - 1)), "masks .* are too large")])
def test_damaged_payloads_are_refused_before_they_take_memory(damage, message, pairs):
    head, tail = models.split(pairs["maskrcnn"][0], bits=8)
    decoded = []
    hook = tail.student.backbone.body.layer1.decoder.register_forward_pre_hook(
        lambda module, args: decoded.append(args[0].numel()))
    with pytest.raises(InputError, match=message):
        tail.detect(damage(head.compress(random(3, 90, 131))))
    hook.remove()
    assert max(decoded, default=0) <= 3 * 96 * 160  # the padded size
