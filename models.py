"""The student and its bottleneck; teachers, training bodies, checkpoint files, split students."""

import argparse
import copy
import hashlib
import io
import itertools
import math
import os
import struct
import sys
import textwrap
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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

MakeBottleneck = nn.Module | Callable[[], nn.Module]

# ---- the student ---------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """The student's layer1: an encoder to a few channels, which are what is sent, and a decoder.

    Any other module can take its place, if it maps (B, 64, H, W) to (B, 256, H, W) for H and W that
    are multiples of 8, and has an `encoder` and a `decoder`: the split student runs
    decoder(encoder(x)), which has the same shape. Nothing else in the code knows what is inside.

    Here, the map in between is (B, channels, H + 4, W + 4): the four padded 2 x 2 convolutions grow
    it by one pixel each, and the four unpadded ones shrink it back. Layers, keys and initial values
    are those of torchdistill 0.0.1's Bottleneck4LargeResNet.
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


def build_student(teacher: nn.Module, bottleneck: MakeBottleneck | None = None) -> nn.Module:
    """Return the teacher with a copy of its conv1 and a bottleneck as layer1, in eval mode.

    teacher: a Faster or Mask R-CNN with torchvision's ResNet-50 FPN backbone; it is frozen here.
    bottleneck: as in make_bottleneck.
    Only conv1 and the bottleneck are trainable. All other modules with weights are the teacher's
    own objects, so the two detectors together take little more memory than one.
    Raises InputError if the bottleneck does not keep the contract.
    """
    bottleneck = make_bottleneck(bottleneck)
    check_bottleneck(bottleneck)
    teacher.eval().requires_grad_(False)
    body = teacher.backbone.body
    shared = [body.bn1, body.layer1, body.layer2, body.layer3, body.layer4,
              teacher.backbone.fpn, teacher.rpn, teacher.roi_heads]
    # deepcopy takes what its memo already holds for the copy: here, each shared module itself.
    # layer1 is among them only so that it is not copied in vain.
    student = copy.deepcopy(teacher, memo={id(module): module for module in shared})
    student.backbone.body.layer1 = bottleneck
    student.backbone.body.conv1.requires_grad_(True)
    return student.eval()


def make_bottleneck(given: MakeBottleneck | None, channels: int = 3) -> nn.Module:
    """Return a module for layer1: the one that was given, or made by the given function or class.

    If none was given, it is a Bottleneck of so many channels.
    """
    if given is None:
        return Bottleneck(channels)
    return given if isinstance(given, nn.Module) else given()


def name_of(part: object) -> str:
    """Return "module.name" of a function, or of a module's class: "models.Bottleneck"."""
    if isinstance(part, partial):
        return f"{name_of(part.func)} with {part.args} {part.keywords}"
    kind = part if hasattr(part, "__qualname__") else type(part)
    return f"{kind.__module__}.{kind.__qualname__}"


@torch.no_grad()
def check_bottleneck(bottleneck: nn.Module) -> int:
    """Return how many channels a bottleneck sends.

    Raises InputError if it does not keep Bottleneck's contract, before hours of training show it.
    """
    name = type(bottleneck).__name__
    for part in ("encoder", "decoder"):
        if not isinstance(getattr(bottleneck, part, None), nn.Module):
            raise InputError(f"{name} has no {part}; a bottleneck needs the modules encoder, whose "
                             "output is sent, and decoder", on_all_processes=True)
    was_training = bottleneck.training
    bottleneck.eval()  # or BatchNorm would count this input
    x = next(bottleneck.parameters()).new_zeros(1, 64, 24, 40)
    sent = bottleneck.encoder(x)
    outputs = {name: bottleneck(x), f"{name}'s decoder(encoder(x))": bottleneck.decoder(sent)}
    bottleneck.train(was_training)
    for what, output in outputs.items():
        if output.shape != (1, 256, 24, 40):
            raise InputError(f"{what} maps {tuple(x.shape)} to {tuple(output.shape)}, not to "
                             "(1, 256, 24, 40), as a ResNet-50's layer1 does",
                             on_all_processes=True)
    return sent.shape[1]


# ---- detectors and teachers ----------------------------------------------------------------------

DETECTORS = {"fasterrcnn": FasterRCNN, "maskrcnn": MaskRCNN}


def build_detector(
    arch: str, min_size: int = 800, max_size: int = 1333, classes: int = 91, **settings: Any
) -> nn.Module:
    """Build torchvision's {arch}_resnet50_fpn without weights, frozen and in eval mode.

    arch: "fasterrcnn" or "maskrcnn".
    min_size, max_size: pixels; its transform resizes the shorter side to min_size, unless the
        longer one would exceed max_size.
    classes: their number, with the background, which is class 0.
    settings: any others of torchvision's FasterRCNN or MaskRCNN.
    """
    # The published weights were trained with eps 0. torchvision's constructor gives 1e-5 and
    # corrects it only when it loads the published weights itself.
    frozen_bn = partial(FrozenBatchNorm2d, eps=0.0)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, trainable_layers=0, norm_layer=frozen_bn)
    detector = DETECTORS[arch](
        backbone, classes, min_size=min_size, max_size=max_size, **settings)
    return detector.eval().requires_grad_(False)


def load_teacher(
    arch: str,
    path: Path | None = None,
    min_size: int = 800,
    max_size: int = 1333,
    eps: float | None = None,
) -> nn.Module:
    """Return the teacher: build_detector with torchvision's COCO_V1 weights, or those in a file.

    path: a checkpoint of a torchvision detector with any number of classes; None to download.
    eps: of the BatchNorm layers that the file was trained with. It is added to the variances here,
        so that every detector in this code, and every file that it writes, has eps 0.
        FrozenBatchNorm2d has 0 in COCO_V1, in what was fine-tuned from it, and in build_detector;
        it has 1e-5 where torchvision built a detector on an ImageNet backbone, as has ordinary
        BatchNorm2d, which torchvision takes where nothing is pretrained.
        None: 1e-5 if the file's keys show ordinary BatchNorm2d, else 0.
    Raises InputError if the weights cannot be had or do not fit.
    """
    if path is None and eps is not None:
        raise InputError("--teacher-eps is for the weights in --teacher-ckpt; COCO_V1 has eps 0")
    if path is None:
        source = coco_v1_url(arch)
        state = download(source)
    else:
        source = path
        state = detector_state(load_checkpoint(path), path)
    if eps is None:
        eps = 0.0
        if any(key.endswith(".num_batches_tracked") for key in state):
            eps = 1e-5
            log(f"{path} was trained with ordinary BatchNorm2d; its eps is assumed to be 1e-5")
    for key in state:
        if key.endswith(".running_var"):
            state[key] = state[key] + eps
    teacher = build_detector(arch, min_size, max_size, count_classes(state, source))
    load_weights(teacher, state, source)
    return teacher


def coco_v1_url(arch: str) -> str:
    """Return where torchvision's COCO_V1 weights are; the name ends with the start of a SHA-256."""
    return get_model_weights(f"{arch}_resnet50_fpn").COCO_V1.url


def is_coco_v1(arch: str, path: Path | None) -> bool:
    """Return whether a teacher's file is torchvision's own, which made the published students."""
    if path is None:
        return True
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return f"-{digest[:8]}." in coco_v1_url(arch)


def download(url: str) -> dict[str, Tensor]:
    """Return the state dict at a URL, from torch.hub's cache if it is there."""
    try:
        return torch.hub.load_state_dict_from_url(
            url, map_location="cpu", check_hash=True, weights_only=True,
            progress=sys.stderr.isatty())
    except Exception as error:  # no network, no disk, another hash, a damaged file in the cache
        reason = textwrap.shorten(str(error), 300) or type(error).__name__
        raise InputError(
            f"no weights from {url} by way of the cache {torch.hub.get_dir()} ({reason}); fetch "
            "the file elsewhere and give it by --teacher-ckpt") from error


def to_device(detector: nn.Module, device: torch.device) -> nn.Module:
    """Move a detector to a device, in the device's memory_format, and return it."""
    # torchvision keeps mean and deviation as lists, which are no part of the module's state. It
    # would copy them to the device for each image, and the host would wait for that.
    transform = detector.transform
    transform.image_mean = torch.as_tensor(transform.image_mean, device=device)
    transform.image_std = torch.as_tensor(transform.image_std, device=device)
    return detector.to(device, memory_format=memory_format(device))


def memory_format(device: torch.device) -> torch.memory_format:
    """Return the layout in which a device convolves faster.

    On CPUs with AVX512, channels_last makes a training step up to 1.3 times faster; with AVX2
    alone it makes it 1.2 times slower (measured, tests/README.md). For GPUs with tensor cores for
    TF32 and bfloat16 (Ampere on), it is NVIDIA's advice, and not measured here.
    """
    if device.type == "cuda":
        prefers_channels_last = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        prefers_channels_last = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return torch.channels_last if prefers_channels_last else torch.contiguous_format


def has_bf16(device: torch.device) -> bool:
    """Return whether to let a device compute in bfloat16: emulated, it is slower than float32.

    On CPUs, this is whether oneDNN does; some with AVX512, but without AVX512_BF16, emulate it.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


# ---- the bodies that training runs ---------------------------------------------------------------


def training_bodies(
    student: nn.Module, teacher: nn.Module, bf16: bool = False
) -> tuple[nn.Module, nn.Module]:
    """Return the student's and the teacher's body as training runs them: fast, not to be saved.

    Each maps a batch (B, 3, H, W) to a dict of four feature maps (B, C_j, H_j, W_j), with 256,
    512, 1024 and 2048 channels at strides 4, 8, 16 and 32, as backbone.body itself does.
    The student's body holds the student's own conv1 and layer1, so whatever trains this body trains
    the student. layer2 to layer4 are one frozen, folded copy for both bodies.
    bf16: whether the frozen layers become bfloat16, for use under torch.autocast.
    """
    teacher_body = fold_frozen_bn(teacher.backbone.body)
    if bf16:
        teacher_body.to(torch.bfloat16)  # once; autocast would cast them in every step

    layers = dict(student.backbone.body.items())
    for name in ("layer2", "layer3", "layer4"):
        layers[name] = teacher_body[name]
    student_body = IntermediateLayerGetter(
        nn.ModuleDict(layers), student.backbone.body.return_layers)
    return student_body, teacher_body


def fold_frozen_bn(module: nn.Module) -> nn.Module:
    """Return a frozen copy in which each convolution has absorbed the FrozenBatchNorm2d after it.

    Only for layers that are not trained: folding rescales their weights, and Adam would take other
    steps. A folded module is not to be saved, since its keys are others.
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

CLASS_SCORES = "roi_heads.box_predictor.cls_score.weight"  # (classes, 1024), class 0 is background


def save_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that at every moment the file is the old one or the whole new one.

    Raises InputError, naming the file and the reason, if it cannot be written.
    """
    # In memory first, because torch.save hides the reason where it cannot write.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    part = part_file(path, os.getpid())
    with writing(path):
        try:
            with part.open("wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)  # left only where an error was raised


def part_file(path: Path, process: int | str) -> Path:
    """Return where save_checkpoint writes before it replaces path; process: its number, or "*"."""
    return path.with_name(f".{path.name}.{process}")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU without running any code that is in it.

    Besides tensors and plain Python objects, torchdistill's files hold an argparse.Namespace and a
    numpy float64, harmless types that torch.load's safe mode refuses unless they are listed.
    Raises InputError if the file is not there, is damaged, or holds any other type.
    """
    if not os.path.isfile(path):
        raise InputError(f"checkpoint {path} is not there")
    # A numpy float64 is pickled as a call of a function named scalar, with a dtype.
    scalar, _ = np.float64(0).__reduce__()
    safe_types = [
        argparse.Namespace, np.dtype, type(np.dtype(np.float64)),
        (scalar, "numpy.core.multiarray.scalar"),   # the function's name before numpy 2
        (scalar, "numpy._core.multiarray.scalar"),  # and since
    ]
    try:
        with torch.serialization.safe_globals(safe_types):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each kind of damage raises an exception of its own
        reason = " ".join(str(error).split())
        raise InputError(f"checkpoint {path} was refused: it is damaged, or holds code, which is "
                         f"never run ({type(error).__name__}: {reason})") from error
    if not isinstance(content, dict):
        raise InputError(f"checkpoint {path} was refused: it holds no dict")
    return content


def detector_state(content: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """Return the state dict in a checkpoint: under "model" or, if there is none, the whole.

    What DistributedDataParallel ("module." at the start of keys) and torch.compile ("_orig_mod.")
    add is removed.
    Raises InputError, naming the path, if there is no state dict of whole tensors.
    """
    state = content.get("model", content)
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise InputError(f"{path} holds no state dict, neither under 'model' nor by itself")
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise InputError(f"{path} holds no state dict: {key!r} is not a tensor")
        # A file of a few bytes can claim any shape for a tensor with strides of 0, or without data.
        is_plain = value.layout == torch.strided and value.device.type == "cpu"
        if not is_plain or value.untyped_storage().nbytes() < value.nbytes:
            raise InputError(f"{path} was refused: {key!r} holds fewer values than it claims")
    return {key.replace("_orig_mod.", "").removeprefix("module."): value
            for key, value in state.items()}


def count_classes(state: dict[str, Tensor], path: Path) -> int:
    """Return how many classes, with the background, the detector of a state dict has."""
    if CLASS_SCORES not in state or state[CLASS_SCORES].shape[1:] != (1024,):
        raise InputError(f"{path} holds no detector: it has no {CLASS_SCORES} of 1024 columns")
    return len(state[CLASS_SCORES])


def load_weights(detector: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load a state dict strictly, or raise an InputError that names the path and what is wrong."""
    try:
        detector.load_state_dict(state)  # torchvision's modules rename the keys of 2020 themselves
    except RuntimeError as error:
        raise InputError(f"{path} does not fit: {textwrap.shorten(str(error), 600)}") from error
    check_finite(detector.state_dict(), path)
    for name, module in detector.named_modules():
        if isinstance(module, FrozenBatchNorm2d) and not (module.running_var > 0).all():
            raise InputError(f"{path} cannot be used: {name} divides by a variance that is not "
                             "above 0 (a teacher trained with eps 1e-5 needs --teacher-eps 1e-5)")


def other_than_teacher(
    student_state: dict[str, Tensor], teacher_state: dict[str, Tensor]
) -> str | None:
    """Return the first frozen weight in which a student differs from a teacher, or None."""
    for name, value in student_state.items():
        is_trained = name.startswith(("backbone.body.conv1.", "backbone.body.layer1."))
        if is_trained:
            continue
        if name not in teacher_state or not torch.equal(value.cpu(), teacher_state[name].cpu()):
            return name
    return None


def check_finite(state: dict[str, Tensor], path: Path) -> None:
    """Raise an InputError that names the path and the key if a value is infinite or NaN."""
    for key, value in state.items():
        if not value.isfinite().all():
            raise InputError(f"{path}: {key} has values that are not finite")


def load_student(
    path: Path,
    min_size: int | None = None,
    max_size: int | None = None,
    bottleneck: MakeBottleneck | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the student that a checkpoint holds, in eval mode, and the config that it runs by.

    min_size, max_size: as in build_detector; by default those that the student was trained with.
    bottleneck: as in make_bottleneck; by default a Bottleneck of the channels in the config.
    The config is that of the file, as train.py wrote it, but for what is used otherwise here, which
    is logged. torchdistill's files have none: they are published students of 3 channels at
    800 / 1333 pixels. "arch" is told by the keys.
    Raises InputError if the file cannot be read or holds no student.
    """
    content = load_checkpoint(path)
    state = detector_state(content, path)
    config = read_config(content, path)
    has_masks = any(key.startswith("roi_heads.mask_head.") for key in state)
    config["arch"] = "maskrcnn" if has_masks else "fasterrcnn"
    trained = {"min_size": config["min_size"], "max_size": config["max_size"]}
    used = {"min_size": min_size or config["min_size"], "max_size": max_size or config["max_size"]}
    bottleneck = make_bottleneck(bottleneck, config["bottleneck_channels"])
    if "bottleneck" in config:
        trained["bottleneck"], used["bottleneck"] = config["bottleneck"], name_of(bottleneck)
    if used != trained:
        log(f"{path}: trained with {trained}, used with {used}")
        config |= used | {"is_recipe": False}

    classes = count_classes(state, path)
    detector = build_detector(config["arch"], used["min_size"], used["max_size"], classes)
    student = build_student(detector, bottleneck)
    load_weights(student, state, path)
    return student, config


def read_config(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the config in a checkpoint of train.py, or that of torchdistill's students.

    is_recipe: whether the student can be compared with the published ones: it was trained by their
        recipe, with any seed, and is used at their image sizes.
    """
    published = {"bottleneck_channels": 3, "min_size": 800, "max_size": 1333, "is_recipe": True}
    config = content.get("config")
    if not isinstance(config, dict) or "bottleneck_channels" not in config:  # torchdistill's
        return published
    config = published | {"is_recipe": False} | config
    for name in ("bottleneck_channels", "min_size", "max_size"):
        if type(config[name]) is not int or not 1 <= config[name] < 2**16:
            raise InputError(f"{path} cannot be used: its config has {name} {config[name]!r}, not "
                             "a whole number from 1 to 65,535")
    return config


# ---- split computing: head, bytes, tail ----------------------------------------------------------


class Header(NamedTuple):
    """What a payload starts with, packed as HEADER_FORMAT says; sizes are in pixels."""

    magic: bytes
    bits: int            # for each value: 32 and 16 are floats, 1 to 8 are quantized
    channels: int        # of the values, (channels, rows, columns)
    rows: int
    columns: int
    image_height: int    # of the image that the head was given
    image_width: int
    resized_height: int  # of what the detector's transform made of it, before padding
    resized_width: int
    scale: float         # of the quantizer
    zero_point: int


HEADER_FORMAT = struct.Struct("<4s" "B" "HHH" "II" "HH" "f" "B")
MAGIC = b"GHND"
MAX_BYTES = 2**26   # that a payload may hold when it is unzipped
MAX_PIXELS = 2**28  # that its image may have, since masks are as large
DTYPES = {32: torch.float32, 16: torch.float16} | dict.fromkeys(range(1, 9), torch.uint8)


def quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, which has x's shape, and two scalars: x is about scale * (q - zero_point).

    bits: 32 and 16 give floats; 1 to 8 give uint8 values from 0 to 2^bits - 1, by Jacob et al.
        (CVPR 2018). These are torchdistill's quantize_tensor bit for bit, also where x is all
        positive or all negative and the clamped zero_point cuts its range; except that a constant
        x, for which that divides by zero, is kept exactly.
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
    """The half of a student that runs on the device: conv1 to the encoder, and the quantizer."""

    def __init__(self, student: nn.Module, bits: int = 8) -> None:
        super().__init__()
        body = student.backbone.body
        self.bits = bits
        self.transform = student.transform
        self.network = nn.Sequential(
            body.conv1, body.bn1, body.relu, body.maxpool, body.layer1.encoder)

    def forward(self, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return quantize's q (1, channels, rows, columns), scale and zero point.

        batch: (1, 3, H, W), one image, normalised, resized and padded as the transform does.
        """
        return quantize(self.network(batch), self.bits)

    @torch.inference_mode()
    def compress(self, image: Tensor) -> bytes:
        """Return the payload for an image (3, h, w), float in [0, 1]: Header and values, zipped."""
        images, _ = self.transform([image])
        q, scale, zero_point = self(images.tensors)
        _, channels, rows, columns = q.shape
        _, image_height, image_width = image.shape
        [(resized_height, resized_width)] = images.image_sizes
        header = Header(
            magic=MAGIC, bits=self.bits, channels=channels, rows=rows, columns=columns,
            image_height=image_height, image_width=image_width, resized_height=resized_height,
            resized_width=resized_width, scale=scale.item(), zero_point=int(zero_point))
        zipper = zlib.compressobj()
        payload = zipper.compress(HEADER_FORMAT.pack(*header))
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

        Masks are as large as the image was, by what the payload says.
        Raises InputError if the payload is not a whole one of a student like this.
        """
        body = self.student.backbone.body
        transform = self.student.transform
        header, q = unpack(payload)
        resized = (header.resized_height, header.resized_width)
        padded = padded_size(*resized)
        # The sizes bound the memory that the values of a stranger can take in the decoder.
        if (header.channels != self.channels or max(resized) > transform.max_size
                or header.rows * header.columns > math.prod(padded)):
            raise InputError(f"payload refused: it is for another student ({header})")

        x = dequantize(q.to(body.conv1.weight.device), header.scale, header.zero_point)
        maps = {}
        for layer, name in body.return_layers.items():  # layer1 to layer4
            x = body.layer1.decoder(x) if layer == "layer1" else body[layer](x)
            maps[name] = x

        # From here on as in torchvision's GeneralizedRCNN.forward, where the RPN and the heads
        # need the padded batch for its size alone.
        features = self.student.backbone.fpn(maps)
        images = ImageList(torch.empty(1, 3, *padded, device="meta"), [resized])
        proposals, _ = self.student.rpn(images, features)
        detections, _ = self.student.roi_heads(features, proposals, [resized])
        image_size = (header.image_height, header.image_width)
        return transform.postprocess(detections, [resized], [image_size])[0]


def padded_size(height: int, width: int) -> tuple[int, int]:
    """Return the size to which torchvision's detectors pad a resized image: multiples of 32."""
    return 32 * math.ceil(height / 32), 32 * math.ceil(width / 32)


def unpack(payload: bytes) -> tuple[Header, Tensor]:
    """Return a payload's header and its values, (1, channels, rows, columns).

    Raises InputError for a payload that is cut off, damaged, larger than MAX_BYTES, or none at all.
    """
    unzipper = zlib.decompressobj()
    try:
        content = unzipper.decompress(payload, max_length=MAX_BYTES)
    except zlib.error as error:
        raise InputError(f"payload refused: it cannot be unzipped ({error})") from error
    if not unzipper.eof or unzipper.unused_data:
        raise InputError("payload refused: it is cut off, goes on after its end, or is too large")
    if len(content) < HEADER_FORMAT.size or not content.startswith(MAGIC):
        raise InputError("payload refused: it was not made by a Head")

    header = Header._make(HEADER_FORMAT.unpack_from(content))
    shape = (1, header.channels, header.rows, header.columns)
    image = (header.image_height, header.image_width)
    resized = (header.resized_height, header.resized_width)
    is_whole = (
        header.bits in DTYPES
        and math.isfinite(header.scale)
        and min(*shape, *image, *resized) >= 1
        and math.prod(image) <= MAX_PIXELS
        and math.prod(shape) * DTYPES[header.bits].itemsize == len(content) - HEADER_FORMAT.size
    )
    if not is_whole:
        raise InputError(f"payload refused: its sizes cannot be right ({header})")
    values = bytearray(content[HEADER_FORMAT.size:])
    return header, torch.frombuffer(values, dtype=DTYPES[header.bits]).view(shape)
