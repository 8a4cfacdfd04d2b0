"""The student and its bottleneck; teachers, training bodies, checkpoint files, split students."""

import argparse
import copy
import io
import itertools
import math
import os
import textwrap
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models import get_model_weights
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d

from distributed import InputError, log, writing

MakeBottleneck = Callable[[], nn.Module]  # a class, or a function without arguments
State = dict[str, Tensor]

# ---- the student ---------------------------------------------------------------------------------

class Bottleneck(nn.Module):
    """The student's layer1: an encoder to a few channels, which are what is sent, and a decoder.

    Any other module can take its place, if it maps (B, 64, H, W) to (B, 256, H, W) for H and W that
    are multiples of 8, and has an `encoder` and a `decoder` (the split student runs one after the
    other). Nothing else in the code knows what is inside. Here, (B, channels, H + 4, W + 4) is
    sent. Layers, keys and initial values are those of torchdistill 0.0.1's Bottleneck4LargeResNet.
    """

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(64, 64, kernel_size=2, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.Conv2d(64, 256, kernel_size=2, padding=1, bias=False),
            nn.BatchNorm2d(256),
            nn.ReLU(inplace=True),
            nn.Conv2d(256, 64, kernel_size=2, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.Conv2d(64, channels, kernel_size=2, padding=1, bias=False),
        )
        self.decoder = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, 64, kernel_size=2, bias=False),
            nn.BatchNorm2d(64),
            nn.Conv2d(64, 128, kernel_size=2, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(inplace=True),
            nn.Conv2d(128, 256, kernel_size=2, bias=False),
            nn.BatchNorm2d(256),
            nn.Conv2d(256, 256, kernel_size=2, bias=False),
            nn.BatchNorm2d(256),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


def build_student(teacher: nn.Module, bottleneck: MakeBottleneck = Bottleneck) -> nn.Module:
    """Return a copy of the teacher with a new bottleneck as layer1, in eval mode.

    teacher: a Faster or Mask R-CNN with torchvision's ResNet-50 FPN backbone; it is frozen here.
    Only the student's conv1 and bottleneck are trainable: all else remains as the teacher's.
    """
    layer1 = bottleneck()
    check_bottleneck(layer1)
    student = copy.deepcopy(teacher.eval().requires_grad_(False))
    student.backbone.body.layer1 = layer1
    student.backbone.body.conv1.requires_grad_(True)
    return student.eval()


@torch.no_grad()
def check_bottleneck(bottleneck: nn.Module) -> int:
    """Check Bottleneck's contract, switch to eval mode, and return how many channels are sent."""
    name = type(bottleneck).__name__
    for part in ("encoder", "decoder"):
        if not isinstance(getattr(bottleneck, part, None), nn.Module):
            raise InputError(f"{name} has no {part}; a bottleneck needs the modules encoder, whose "
                             "output is sent, and decoder")
    bottleneck.eval()  # or BatchNorm would count this input
    x = next(bottleneck.parameters(), torch.empty(0)).new_zeros(1, 64, 24, 40)
    sent = bottleneck.encoder(x)
    if sent.dim() != 4:
        raise InputError(f"{name}'s encoder gives {tuple(sent.shape)}, not (B, C, H, W)")
    for what, output in (("forward", bottleneck(x)), ("decoder", bottleneck.decoder(sent))):
        if output.shape != (1, 256, 24, 40):
            raise InputError(f"{name}'s {what} ends with {tuple(output.shape)} for an input of "
                             f"{tuple(x.shape)}, where a ResNet-50's layer1 gives (1, 256, 24, 40)")
    return sent.shape[1]


# ---- detectors and teachers ----------------------------------------------------------------------

DETECTORS = {"fasterrcnn": FasterRCNN, "maskrcnn": MaskRCNN}


def build_detector(
    arch: str, min_size: int = 800, max_size: int = 1333, classes: int = 91, **settings: Any
) -> nn.Module:
    """Build torchvision's {arch}_resnet50_fpn without weights, frozen and in eval mode.

    min_size, max_size: pixels; its transform resizes the shorter side to min_size, unless the
        longer one would exceed max_size.
    classes: their number, with the background, which is class 0.
    settings: any others of torchvision's FasterRCNN or MaskRCNN.
    """
    # The published weights were trained with eps 0. torchvision's constructor gives 1e-5 and
    # corrects it only when it loads the published weights itself.
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, trainable_layers=0,
        norm_layer=partial(FrozenBatchNorm2d, eps=0.0))
    detector = DETECTORS[arch](backbone, classes, min_size=min_size, max_size=max_size, **settings)
    return detector.eval().requires_grad_(False)


def load_teacher(
    arch: str, path: Path | None = None, min_size: int = 800, max_size: int = 1333,
    eps: float | None = None
) -> nn.Module:
    """Return the teacher: build_detector with torchvision's COCO_V1 weights, or those in a file.

    path: a checkpoint of a torchvision detector with any number of classes; None to download.
    eps: with which the file's BatchNorm layers were trained; it is added to their variances, so
        that every detector here has eps 0. None: 1e-5 if the keys show ordinary BatchNorm2d, else
        0, as in COCO_V1; torchvision's FrozenBatchNorm2d on an ImageNet backbone has 1e-5.
    """
    if path is None and eps is not None:
        raise InputError("--teacher-eps is for the weights in --teacher-ckpt; COCO_V1 has eps 0")
    source = path or "COCO_V1"
    state = load_checkpoint(path)["model"] if path else download_coco_v1(arch)
    if eps is None and any(key.endswith(".num_batches_tracked") for key in state):
        eps = 1e-5
        log(f"{path} was trained with ordinary BatchNorm2d; its eps is assumed to be 1e-5")
    for key in state:
        if eps and key.endswith(".running_var"):
            state[key] = state[key] + eps
    teacher = build_detector(arch, min_size, max_size, count_classes(state, source))
    load_weights(teacher, state, source)
    return teacher


def download_coco_v1(arch: str) -> State:
    """Return torchvision's COCO_V1 weights, from torch.hub's cache if they are there."""
    weights = get_model_weights(f"{arch}_resnet50_fpn").COCO_V1
    try:
        return weights.get_state_dict(map_location="cpu", check_hash=True, weights_only=True)
    except Exception as error:  # no network, no disk, another hash, a damaged file in the cache
        reason = error if isinstance(error, OSError) else type(error).__name__
        raise InputError(f"no {weights.url} by way of the cache {torch.hub.get_dir()} ({reason}); "
                         "give a file by --teacher-ckpt") from error


def to_device(detector: nn.Module, device: torch.device) -> nn.Module:
    """Move a detector to a device, in the layout in which that convolves faster, and return it.

    CPUs with AVX512 are faster with channels_last, and those with AVX2 alone slower
    (tests/README.md). For GPUs from Ampere on, it is NVIDIA's advice, and not measured here.
    """
    if device.type == "cuda":
        is_channels_last = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        is_channels_last = torch.backends.cpu.get_cpu_capability() == "AVX512"
    # torchvision keeps mean and deviation as lists, and would copy them to the device for each
    # image, for which the host would wait.
    transform = detector.transform
    transform.image_mean = torch.as_tensor(transform.image_mean, device=device)
    transform.image_std = torch.as_tensor(transform.image_std, device=device)
    layout = torch.channels_last if is_channels_last else torch.contiguous_format
    return detector.to(device, memory_format=layout)


def has_bf16(device: torch.device) -> bool:
    """Return whether a device computes in bfloat16; emulated, it would be slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


# ---- the bodies that training runs ---------------------------------------------------------------

def training_bodies(
    student: nn.Module, teacher: nn.Module, bf16: bool = False, layers: int = 4
) -> tuple[nn.Module, nn.Module]:
    """Return student's and teacher's body in the form that training uses: faster, never saved.

    Each maps a batch (B, 3, H, W) to a dict of feature maps (B, C_j, H_j, W_j), as backbone.body
    does: C_j is 256, 512, 1024, 2048 at strides 4, 8, 16, 32. The student's has its own conv1 and
    layer1, which are trained; layer2 to layer4 are one folded copy for both.
    bf16: whether the frozen layers become bfloat16, for use under torch.autocast.
    layers: how many maps are computed, from layer1 on.
    """
    return_layers = dict(list(teacher.backbone.body.return_layers.items())[:layers])
    teacher_body = IntermediateLayerGetter(fold_frozen_bn(teacher.backbone.body), return_layers)
    if bf16:
        teacher_body.to(torch.bfloat16)  # once; autocast would cast them in every step

    modules = dict(student.backbone.body.items())
    for name in list(return_layers)[1:]:  # all but layer1
        modules[name] = teacher_body[name]
    student_body = IntermediateLayerGetter(nn.ModuleDict(modules), return_layers)
    return student_body, teacher_body


def fold_frozen_bn(module: nn.Module) -> nn.Module:
    """Return a frozen copy in which each convolution has absorbed the FrozenBatchNorm2d after it.

    Only for layers that are not trained: folding rescales their weights, and Adam would take other
    steps. A folded module is never saved, because its keys differ.
    """
    module = copy.deepcopy(module).eval()
    for parent in list(module.modules()):
        children = list(parent.named_children())
        # In torchvision's ResNets, a norm is registered right after its convolution.
        for (conv_name, conv), (norm_name, norm) in itertools.pairwise(children):
            if isinstance(norm, FrozenBatchNorm2d):
                setattr(parent, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, nn.Identity())
    return module.requires_grad_(False)


# ---- checkpoint files ----------------------------------------------------------------------------

# The published students' settings, which their files do not contain.
PUBLISHED = {"bottleneck_channels": 3, "min_size": 800, "max_size": 1333}
MAX_SIZE = 2**16 - 1  # pixels of a side; a payload's header has 16 bits for it


def save_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that at every moment the file is the old one or the whole new one.

    content: what torch.load(weights_only=True) reads. Raises InputError if it cannot be written.
    """
    # In memory first, because torch.save hides the reason where it cannot write.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    part = path.with_name(f"{path.name}.part")
    with writing(path):
        try:
            with part.open("wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)  # what failed must not fill the disk


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU without running any code in it.

    Its state dict is under "model" in the result, also if the file holds that alone; what DDP and
    torch.compile add to keys is removed. Raises InputError if there is none of whole tensors.
    """
    # torchdistill's files hold an argparse.Namespace and a numpy float64, harmless types that must
    # be listed. The latter is pickled as a call of a function, whose name numpy 2 has changed.
    scalar, _ = np.float64(0).__reduce__()
    safe_types = [
        argparse.Namespace, np.dtype, type(np.dtype(np.float64)),
        (scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar")]
    try:
        with open(path, "rb") as file, torch.serialization.safe_globals(safe_types):
            start = file.peek(40)[:40]
            content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"checkpoint {path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # each kind of damage raises an exception of its own
        raise InputError(f"checkpoint {path} was refused: it is damaged, no checkpoint, or holds "
                         f"code, which is never run (it starts with {start!r})") from error
    state = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise InputError(f"{path} holds no state dict, neither under 'model' nor by itself")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise InputError(f"{path} holds no state dict: {key!r} is not the name of a tensor")
        # A file of a few bytes can claim any shape for a tensor with strides of 0, or without data.
        is_plain = value.layout == torch.strided and value.device.type == "cpu"
        if not is_plain or value.untyped_storage().nbytes() < value.nbytes:
            raise InputError(f"{path} was refused: {key!r} holds fewer values than it claims")
    state = {key.replace("_orig_mod.", "").removeprefix("module."): value
             for key, value in state.items()}
    return (content if "model" in content else {}) | {"model": state}


def count_classes(state: State, source: Path | str) -> int:
    """Return how many classes, with the background, the detector of a state dict has."""
    key = "roi_heads.box_predictor.cls_score.weight"  # (classes, 1024)
    if key not in state or state[key].shape[1:] != (1024,):
        raise InputError(f"{source} holds no detector: it has no {key} of 1024 columns")
    return len(state[key])


def load_weights(detector: nn.Module, state: State, source: Path | str) -> None:
    """Load a state dict strictly, or raise an InputError that says what is wrong where."""
    try:
        detector.load_state_dict(state)  # torchvision's modules rename the keys of 2020 themselves
    except RuntimeError as error:
        raise InputError(f"{source} does not fit: {textwrap.shorten(str(error), 600)}") from error
    check_finite(detector.state_dict(), source)
    for name, module in detector.named_modules():
        if isinstance(module, FrozenBatchNorm2d) and not (module.running_var > 0).all():
            raise InputError(f"{source} cannot be used: {name} divides by a variance that is not "
                             "above 0 (a teacher trained with eps 1e-5 needs --teacher-eps 1e-5)")


def check_finite(state: State, source: Path | str) -> None:
    """Raise an InputError that names the source and the key if a value is infinite or NaN."""
    for key, value in state.items():
        if not value.isfinite().all():
            raise InputError(f"{source}: {key} has values that are not finite")


def first_difference(student_state: State, teacher_state: State) -> str | None:
    """Return the name of the first frozen weight in which student and teacher differ, or None."""
    for name, value in student_state.items():
        is_trained = name.startswith(("backbone.body.conv1.", "backbone.body.layer1."))
        wanted = teacher_state.get(name)
        if not is_trained and (wanted is None or not torch.equal(value.cpu(), wanted.cpu())):
            return name
    return None


def load_student(
    path: Path, min_size: int | None = None, max_size: int | None = None,
    bottleneck: MakeBottleneck | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the student that a checkpoint holds, in eval mode, and the config of its training.

    min_size, max_size: as in build_detector; by default those that the student was trained with.
    bottleneck: by default a Bottleneck of as many channels as the student was trained with.
    The config returned is the file's, with the sizes in use, and arch as the keys tell it.
    """
    content = load_checkpoint(path)
    state, config = content["model"], content.get("config")
    config = PUBLISHED | (config if isinstance(config, dict) else {})
    for name, value in (("min_size", min_size), ("max_size", max_size)):
        if value not in (None, config[name]):
            log(f"{path}: trained with {name} {config[name]}, used with {value}")
            config[name] = value
    for name in PUBLISHED:
        if type(config[name]) is not int or not 1 <= config[name] <= MAX_SIZE:
            raise InputError(f"{path} cannot be used with {name} {config[name]!r}: it must be a "
                             f"whole number from 1 to {MAX_SIZE:,}")
    has_masks = any(key.startswith("roi_heads.mask_head.") for key in state)
    config["arch"] = "maskrcnn" if has_masks else "fasterrcnn"
    detector = build_detector(
        config["arch"], config["min_size"], config["max_size"], count_classes(state, path))
    student = build_student(
        detector, bottleneck or partial(Bottleneck, config["bottleneck_channels"]))
    load_weights(student, state, path)
    return student, config


# ---- split computing: head, bytes, tail ----------------------------------------------------------

# What a payload starts with. Sizes are in pixels.
HEADER = np.dtype([
    ("magic", "S4"),
    ("bits", "u1"),              # for each value: 32 and 16 are floats, 1 to 8 are quantized
    ("shape", "<u2", 3),         # of the values: channels, rows, columns
    ("image_size", "<u4", 2),    # of the image that the head was given: height, width
    ("resized_size", "<u2", 2),  # of what the detector's transform made of it, before padding
    ("scale", "<f4"),            # of the quantizer
    ("zero_point", "u1"),
])
MAGIC = b"GHND"
MAX_BYTES = 2**26        # of a payload when it is unzipped
MAX_MASK_PIXELS = 2**33  # of an image's detections together
DTYPES = {32: torch.float32, 16: torch.float16} | dict.fromkeys(range(1, 9), torch.uint8)


def quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, which has x's shape, and two scalars: x is about scale * (q - zero_point).

    bits: 32 and 16 give floats; 1 to 8 give uint8 values from 0 to 2^bits - 1, by Jacob et al.
        (CVPR 2018). These are torchdistill's quantize_tensor bit for bit, which cuts x off where
        its range lacks 0; but a constant x is kept exactly, where that divides by 0.
    There are only tensor operations here, so that torch.export can follow.
    """
    if bits > 8:
        return x.to(DTYPES[bits]), x.new_ones(()), x.new_zeros(())
    top = 2**bits - 1
    low = x.min()
    scale = (x.max() - low) / top
    # With |x| as the scale of a constant x, q - zero_point is 1 or -1, and exactly x comes back.
    if_constant = torch.where(low == 0, torch.ones_like(low), low.abs())
    scale = torch.where(scale == 0, if_constant, scale)
    zero_point = (-low / scale).clamp(0, top).trunc()
    q = (zero_point + x / scale).clamp(0, top).round().to(torch.uint8)
    return q, scale, zero_point


def dequantize(q: Tensor, scale: Tensor | float, zero_point: Tensor | int) -> Tensor:
    """Return float32 scale * (q - zero point), as torchdistill's dequantize_tensor does."""
    return scale * (q.float() - zero_point)


def split(student: nn.Module, bits: int = 8) -> tuple["Head", "Tail"]:
    """Return the device's and the server's half of a student: bytes go from one to the other."""
    return Head(student, bits), Tail(student)


class Head(nn.Module):
    """The half of a student, in eval mode, that runs on the device: conv1 to the quantizer."""

    def __init__(self, student: nn.Module, bits: int = 8) -> None:
        super().__init__()
        body = student.backbone.body
        self.bits = bits
        # Copies, so that Head and Tail can be on two devices.
        self.transform = copy.deepcopy(student.transform)
        self.network = copy.deepcopy(nn.Sequential(
            body.conv1, body.bn1, body.relu, body.maxpool, body.layer1.encoder))

    def forward(self, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return quantize's results for a batch (1, 3, H, W) that the transform has prepared."""
        return quantize(self.network(batch), self.bits)

    @torch.inference_mode()
    def compress(self, image: Tensor) -> bytes:
        """Return the payload for an image (3, h, w), float in [0, 1]: HEADER and values, zipped."""
        images, _ = self.transform([image])
        [resized_size] = images.image_sizes
        q, scale, zero_point = self(images.tensors)
        header = np.array((MAGIC, self.bits, q.shape[1:], image.shape[1:], resized_size,
                           scale.item(), int(zero_point)), HEADER)
        zipper = zlib.compressobj()
        payload = zipper.compress(header.tobytes())
        payload += zipper.flush(zlib.Z_BLOCK)  # sharing a block, header and values would be longer
        payload += zipper.compress(q.cpu().contiguous().numpy())
        return payload + zipper.flush()


class Tail(nn.Module):
    """The half of a student that runs on the server: decoder, layer2 to layer4, FPN, RPN, heads."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student
        self.channels = check_bottleneck(student.backbone.body.layer1)

    @torch.inference_mode()
    def detect(self, payload: bytes) -> dict[str, Tensor]:
        """Return torchvision's detections for a payload: boxes, labels, scores[, masks].

        Masks have the original image's size, which the payload states.
        Raises InputError if the payload is damaged, or comes from another student.
        """
        body = self.student.backbone.body
        header, q = unpack(payload)
        channels, rows, columns = header["shape"]
        resized = tuple(header["resized_size"])
        padded = padded_size(resized)
        refusal = InputError(f"payload refused: it is for another student ({header})")
        # The sizes bound the memory that an untrusted payload can use in the decoder.
        if (channels != self.channels or rows * columns > math.prod(padded)
                or max(resized) > self.student.transform.max_size):
            raise refusal
        x = dequantize(q.to(body.conv1.weight.device), header["scale"], header["zero_point"])
        try:
            x = body.layer1.decoder(x)
        except RuntimeError as error:  # sizes that a layer cannot take, or too little memory
            raise InputError(f"{refusal}: {textwrap.shorten(str(error), 300)}") from error
        if x.shape != (1, 256, padded[0] // 4, padded[1] // 4) or not x.isfinite().all():
            raise refusal

        maps = {}
        for layer, name in body.return_layers.items():  # layer1 to layer4
            x = x if layer == "layer1" else body[layer](x)
            maps[name] = x
        return detect_from_maps(self.student, maps, resized, tuple(header["image_size"]))


def detect_from_maps(
    detector: nn.Module, maps: dict[str, Tensor], resized: tuple[int, int],
    image_size: tuple[int, int]
) -> dict[str, Tensor]:
    """Do what torchvision's GeneralizedRCNN.forward does after the body, for one image.

    maps: backbone.body's. resized: the image's height and width in the padded batch.
    image_size: height and width to which boxes and masks are scaled.
    """
    features = detector.backbone.fpn(maps)
    # The RPN and the heads use only the size of the padded batch.
    images = ImageList(torch.empty(1, 3, *padded_size(resized), device="meta"), [resized])
    proposals, _ = detector.rpn(images, features)
    detections, _ = detector.roi_heads(features, proposals, [resized])
    if len(detections[0].get("masks", ())) * math.prod(image_size) > MAX_MASK_PIXELS:
        raise InputError(f"masks of an image of {image_size} pixels (height, width) are too large")
    return detector.transform.postprocess(detections, [resized], [image_size])[0]


def padded_size(resized: tuple[int, int]) -> list[int]:
    """Return the height and width to which torchvision's transform pads a resized image."""
    return [32 * math.ceil(side / 32) for side in resized]


def unpack(payload: bytes) -> tuple[dict[str, Any], Tensor]:
    """Return a payload's header and its values (1, channels, rows, columns); or InputError."""
    unzipper = zlib.decompressobj()
    try:
        content = unzipper.decompress(payload, max_length=MAX_BYTES)
    except zlib.error as error:
        raise InputError(f"payload refused: it cannot be unzipped ({error})") from error
    if not unzipper.eof or unzipper.unused_data:
        raise InputError("payload refused: it is cut off, goes on after its end, or is too large")
    if len(content) < HEADER.itemsize or not content.startswith(MAGIC):
        raise InputError("payload refused: it was not made by a Head")

    record = np.frombuffer(content, HEADER, count=1)[0]
    header = {name: record[name].tolist() for name in HEADER.names}  # ints that never overflow
    dtype, shape = DTYPES.get(header["bits"]), header["shape"]
    sizes = [*shape, *header["image_size"], *header["resized_size"]]
    if (dtype is None or min(sizes) < 1
            or math.prod(shape) * dtype.itemsize != len(content) - HEADER.itemsize):
        raise InputError(f"payload refused: its sizes cannot be right ({header})")
    values = torch.frombuffer(bytearray(content), dtype=dtype, offset=HEADER.itemsize)
    return header, values.view(1, *shape)
