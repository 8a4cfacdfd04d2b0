"""The student in two halves: what is quantised, sent, refused, and what comes out."""

import zlib

import pytest
import torch
from conftest import ARCHS, SIZES, same

import models

INPUTS = {
    "random": torch.randn(3, 9, 13, generator=torch.Generator().manual_seed(0)),
    "negative": -1 - torch.rand(3, 9, 13, generator=torch.Generator().manual_seed(1)),
    "positive": 1 + torch.rand(3, 9, 13, generator=torch.Generator().manual_seed(2)),
    "huge": 1e38 * torch.randn(3, 9, 13, generator=torch.Generator().manual_seed(3)).clamp(-1.5, 1.5),
    "tiny": 1e-30 * torch.randn(3, 9, 13, generator=torch.Generator().manual_seed(4))}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_quantiser_is_torchdistills_bit_for_bit(bits, name):
    from torchdistill.common.tensor_util import dequantize_tensor, quantize_tensor
    x = INPUTS[name]
    theirs, (q, scale, zero) = quantize_tensor(x, bits), models.quantise(x, bits)
    assert torch.equal(q, theirs.tensor) and q.dtype == torch.uint8
    assert (scale, zero) == (theirs.scale.item(), theirs.zero_point)
    assert torch.equal(models.restore(q, scale, zero), dequantize_tensor(theirs))
    assert torch.equal(models.restore(*models.quantise(x, 16)), x.half().float())
    assert torch.equal(models.restore(*models.quantise(x, 32)), x)


@pytest.mark.parametrize("constant", [0.0, 3.7, -0.2, 1e-40, -1e38])
@pytest.mark.parametrize("bits", [1, 4, 8, 32])
def test_a_constant_is_restored(constant, bits):
    """Where the original divides by zero."""
    x = torch.full((3, 5, 5), constant)
    assert torch.equal(models.restore(*models.quantise(x, bits)), x)


@pytest.fixture(scope="module", params=ARCHS)
def student(request, teachers):
    torch.manual_seed(0)
    student = models.build_student(models.load_teacher(request.param, teachers[request.param], **SIZES))
    return models.to_device(student, torch.device("cpu"))


def image(seed=0, h=90, w=131):
    return torch.rand(3, h, w, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [32, 16, 8, 5, 1])
def test_the_halves_give_what_the_quantised_student_gives(student, bits):
    keys = list(student.state_dict())
    head, tail = models.split(student, bits)
    for seed, (h, w) in enumerate([(90, 131), (200, 97)]):
        payload = head(image(seed, h, w))
        assert isinstance(payload, bytes) and len(payload) < models.raw_size(payload) + 40
        student.backbone.body.layer1.bits = bits
        with torch.no_grad():
            wanted = student([image(seed, h, w)])[0]
        student.backbone.body.layer1.bits = None
        found = tail(payload)
        assert same(found, wanted) and len(found["boxes"]) > 0
        assert ("masks" in found) == student.roi_heads.has_mask()
    with torch.no_grad():
        assert bits < 32 or same(found, student([image(1, 200, 97)])[0])
    assert list(student.state_dict()) == keys  # neither bits nor splitting adds any


def test_only_what_is_sent_is_quantised(student):
    layer1, x = models.Bottleneck(3, bits=2), torch.rand(2, 64, 8, 8)
    plain = models.Bottleneck(3)
    plain.load_state_dict(layer1.state_dict())
    assert torch.equal(layer1(x), plain(x))  # training is not quantised
    one_by_one = torch.cat([layer1.eval()(part[None]) for part in x])
    torch.testing.assert_close(layer1(x), one_by_one)  # each image has a scale of its own
    assert not torch.equal(layer1(x), plain.eval()(x))


def test_the_head_can_be_exported(student):
    head, _ = models.split(student, 8)
    sizes = {2: 32 * torch.export.Dim("rows", min=2, max=9), 3: 32 * torch.export.Dim("columns", min=2, max=9)}
    program = torch.export.export(head.network, (torch.rand(1, 3, 96, 160),), dynamic_shapes=(sizes,))
    for h, w in ((96, 160), (160, 64)):
        x = torch.rand(1, 3, h, w)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x), head.network(x))
    assert sum(p.numel() for p in head.network.parameters()) == 158_400


def test_damaged_payloads_are_refused(student):
    head, tail = models.split(student, 8)
    payload, size = head(image()), models.HEADER.size
    fields, raw = list(models.HEADER.unpack_from(payload)), models.raw_size(payload)

    def sent(values, **changes):
        """A payload that is whole in itself, but for what is changed."""
        names = ("version", "bits", "channels", "h", "w", "rh", "rw", "ph", "pw", "scale", "zero")
        header = models.HEADER.pack(*(dict(zip(names, fields)) | changes).values())
        zipper = zlib.compressobj(zdict=header)
        return header + zipper.compress(values) + zipper.flush()

    assert same(tail(sent(bytes(raw))), tail(sent(bytes(raw))))
    bad = [b"", payload[:size - 1], payload[:size], payload[:-1], payload[:-9], payload + b"x",
           sent(bytes(raw), version=2), sent(bytes(raw), channels=4), sent(bytes(raw - 1)),
           sent(bytes(raw + 1)), sent(bytes(50_000_000)), sent(b"", ph=65_504, pw=65_504),
           sent(bytes(raw), bits=16)]
    for position in (*range(size), size + 3, len(payload) // 2, len(payload) - 2):
        bad.append(payload[:position] + bytes([payload[position] ^ 4]) + payload[position + 1:])
    for damaged in bad:
        with pytest.raises(ValueError, match="the payload was refused: "):
            tail(damaged)
