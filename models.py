"""Teacher, bottleneck-injected student, the module that training runs, and checkpoint files."""

import argparse
import contextlib
import copy
import itertools
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models import get_model_weights
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d

DETECTORS = {"fasterrcnn": FasterRCNN, "maskrcnn": MaskRCNN}
STEM = ("conv1", "bn1", "relu", "maxpool")
DISTILLED = ("layer1", "layer2", "layer3", "layer4")
CLASSES = "roi_heads.box_predictor.cls_score.weight"  # which has as many rows
# version, bits, channels, (h, w) of the original, resized and padded image, scale, zero point
HEADER, VERSION = struct.Struct("<BBH6HfB"), 1
DTYPES = {16: torch.float16, 32: torch.float32}  # of what is sent; uint8 for fewer bits
Found = tuple[dict[str, Tensor], tuple[int, int], tuple[int, int]]

# ---- detectors -----------------------------------------------------------------------------------
def build_detector(arch: str, min_size: int = 800, max_size: int = 1333,
                   classes: int = 91) -> nn.Module:
    """Build torchvision's {arch}_resnet50_fpn without weights, frozen, in eval mode.

    It resizes to min_size, max_size (pixels). Of the classes, 0 is the background. Its
    FrozenBatchNorm2d have the published weights' eps, 0, where torchvision's default is 1e-5.
    """
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=0,
                                   norm_layer=partial(FrozenBatchNorm2d, eps=0.0))
    detector = DETECTORS[arch](backbone, classes, min_size=min_size, max_size=max_size)
    return detector.eval().requires_grad_(False)


def load_teacher(arch: str, path: str | Path | None = None, min_size: int = 800,
                 max_size: int = 1333) -> nn.Module:
    """Return the teacher: build_detector with torchvision's COCO_V1 weights, or those in a file.

    Raises OSError or ValueError, naming the file, where the weights cannot be had or do not fit.
    """
    if path is None:
        weights = get_model_weights(f"{arch}_resnet50_fpn").COCO_V1
        try:
            state = weights.get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError) as error:  # no network, a wrong hash
            raise OSError(f"cannot download the teacher's weights ({error}); fetch {weights.url} "
                          "elsewhere and name the file with --teacher-ckpt") from error
    else:
        state = detector_state(load_checkpoint(path), path)
    teacher = build_detector(arch, min_size, max_size, len(state.get(CLASSES, "no")))
    load_weights(teacher, state, path or weights.url)
    return teacher


def memory_format(device: torch.device) -> torch.memory_format:
    """Return the layout in which a device convolves faster: channels_last made a step up to 1.3 x
    faster with AVX512, 1.2 x slower with AVX2 alone (tests/README.md); CUDA is unmeasured."""
    pays = (torch.cuda.get_device_capability(device) >= (8, 0) if device.type == "cuda"
            else torch.backends.cpu.get_cpu_capability() == "AVX512")
    return torch.channels_last if pays else torch.contiguous_format


def has_bf16(device: torch.device) -> bool:
    """Return whether a device has bfloat16 itself: emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@torch.inference_mode(False)
def to_device(detector: nn.Module, device: torch.device) -> nn.Module:
    """Move a detector to its device, in its memory_format."""
    for name in ("image_mean", "image_std"):  # lists, which torchvision would copy for each image
        constants = torch.as_tensor(getattr(detector.transform, name), device=device)
        setattr(detector.transform, name, constants)
    return detector.to(device, memory_format=memory_format(device))


class Bottleneck(nn.Module):
    """The student's layer1: an encoder to a few channels, which cross the network, and a decoder.

    Maps (B, 64, H, W) to (B, 256, H, W), at stride 4, through (B, channels, H + 4, W + 4). Keys,
    shapes and PyTorch's own initialisation are torchdistill 0.0.1's Bottleneck4LargeResNet's.
    """
    def __init__(self, channels: int = 3, bits: int | None = None) -> None:
        super().__init__()
        self.bits = bits  # None, or as in quantise: what is sent in eval mode
        down = partial(nn.Conv2d, kernel_size=2, padding=1, bias=False)
        up = partial(nn.Conv2d, kernel_size=2, bias=False)
        self.encoder = nn.Sequential(
            down(64, 64), nn.BatchNorm2d(64),
            down(64, 256), nn.BatchNorm2d(256), nn.ReLU(inplace=True),
            down(256, 64), nn.BatchNorm2d(64), down(64, channels))
        self.decoder = nn.Sequential(
            nn.BatchNorm2d(channels), nn.ReLU(inplace=True), up(channels, 64), nn.BatchNorm2d(64),
            up(64, 128), nn.BatchNorm2d(128), nn.ReLU(inplace=True),
            up(128, 256), nn.BatchNorm2d(256), up(256, 256), nn.BatchNorm2d(256),
            nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        z = self.encoder(x)
        if self.bits is not None and not self.training:  # image by image, as they are sent
            z = torch.stack([restore(*quantise(image, self.bits)) for image in z])
        return self.decoder(z)


def build_student(teacher: nn.Module, bottleneck_channels: int = 3) -> nn.Module:
    """Return the teacher with a copy of its conv1 and a new Bottleneck as layer1, in eval mode.

    These two are trainable. Every other module with weights is the teacher's own frozen object.
    """
    body = teacher.backbone.body
    shared = [body["bn1"], *(body[name] for name in DISTILLED), teacher.backbone.fpn, teacher.rpn,
              teacher.roi_heads]
    student = copy.deepcopy(teacher, {id(module): module for module in shared})
    student.backbone.body["layer1"] = Bottleneck(bottleneck_channels)
    student.backbone.body["conv1"].requires_grad_(True)
    return student.eval()

# ---- what training runs --------------------------------------------------------------------------
def fold_frozen_bn(module: nn.Module) -> nn.Module:
    """Return a frozen copy in which each convolution has absorbed the FrozenBatchNorm2d after it.

    Only for frozen layers, since Adam would see rescaled weights, and never to be saved.
    """
    module = copy.deepcopy(module)
    for parent in list(module.modules()):
        children = list(parent.named_children())  # torchvision registers a bn right after its conv
        for (conv_name, conv), (bn_name, bn) in itertools.pairwise(children):
            if isinstance(bn, FrozenBatchNorm2d):
                parent.add_module(conv_name, fuse_conv_bn_eval(conv, bn))
                parent.add_module(bn_name, nn.Identity())
    return module.requires_grad_(False)


def maps_from(first: Tensor, layers: Iterable[nn.Module]) -> list[Tensor]:
    """Return layer1's map and what each further layer in turn makes of the one before."""
    return list(itertools.accumulate(layers, lambda x, layer: layer(x), initial=first))


class Distiller(nn.Module):
    """Compute teacher's and student's features of a batch, with one set of frozen layers for both.

    DDP wraps and Adam updates `student_stem`, the student's own modules; the rest is folded copies.
    """
    def __init__(self, teacher: nn.Module, student: nn.Module, bf16: bool = False) -> None:
        super().__init__()
        self.bf16 = bf16
        folded, body = fold_frozen_bn(teacher.backbone.body), student.backbone.body
        self.teacher_stem = nn.Sequential(*(folded[name] for name in (*STEM, "layer1")))
        self.student_stem: nn.Module = nn.Sequential(*(body[name] for name in (*STEM, "layer1")))
        self.shared_layers = nn.ModuleList(folded[name] for name in DISTILLED[1:])
        if bf16:  # once, not at each use, as autocast would
            self.teacher_stem.to(torch.bfloat16), self.shared_layers.to(torch.bfloat16)

    def forward(self, batch: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """From (B, 3, H, W), normalised and padded, to both's four (B, C_j, H_j, W_j), 256 to 2048
        channels at strides 4 to 32: the student's, then the teacher's."""
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=self.bf16):
            with torch.no_grad():
                teacher_maps = maps_from(self.teacher_stem(batch), self.shared_layers)
            return maps_from(self.student_stem(batch), self.shared_layers), teacher_maps

# ---- detection, whole or in two halves -----------------------------------------------------------
def detect(detector: nn.Module, image: Tensor) -> Found:
    """Run a detector on a float image (3, h, w) in [0, 1], but for transform.postprocess: return
    boxes (N, 4) x0 y0 x1 y1 in the resized image, labels (N,), scores (N,), masks (N, 1, 28, 28)
    in [0, 1] of a Mask R-CNN, and (h, w) of the resized and of the original image."""
    images, _ = detector.transform([image])
    found = detect_from(detector, detector.backbone.body(images.tensors), images)
    return found, images.image_sizes[0], tuple(image.shape[1:])


def detect_from(detector: nn.Module, maps: dict[str, Tensor], images: ImageList) -> dict:
    """Go from the body's maps of an image to detections, as torchvision's GeneralizedRCNN does."""
    features = detector.backbone.fpn(maps)
    proposals, _ = detector.rpn(images, features)  # of images, only the sizes are read
    return detector.roi_heads(features, proposals, images.image_sizes)[0][0]


def quantise(x: Tensor, bits: int) -> tuple[Tensor, float, int]:
    """Return what is sent for x, of any shape, its scale and its zero point; restore takes these.

    32, 16: floats. 1 to 8: scale = (max - min) / (2^bits - 1), zero = int(-min / scale), q = round(
    zero + x / scale), both clamped to 2^bits values (Jacob et al., CVPR 2018; torchdistill's
    quantize_tensor bit for bit, but that constants are kept).
    """
    if bits > 8:
        return x.to(DTYPES[bits]), 1.0, 0
    low, top = x.min(), 2**bits - 1
    scale = (x.max() - low) / top
    if scale == 0:
        scale = low.abs() if low != 0 else torch.ones_like(low)
    zero = int((-low / scale).clamp(0, top))
    return (zero + x / scale).clamp(0, top).round().byte(), scale.item(), zero


def restore(q: Tensor, scale: float, zero: int) -> Tensor:
    """Undo quantise, in float32 (torchdistill's dequantize_tensor)."""
    return scale * (q.float() - zero)


def split(student: nn.Module, bits: int = 8) -> tuple["Head", "Tail"]:
    """Return head(image) -> bytes and tail(bytes) -> detections, as of layer1.bits = bits."""
    return Head(student, bits), Tail(student)


def raw_size(payload: bytes) -> int:
    """Return how many bytes a payload's values are when unzipped, as its header says."""
    _, bits, channels, *_, h, w, _, _ = HEADER.unpack_from(payload)
    return channels * (h // 4 + 4) * (w // 4 + 4) * DTYPES.get(bits, torch.uint8).itemsize


class Head(nn.Module):
    """The device's part; `network` maps (B, 3, H, W) to (B, channels, H / 4 + 4, W / 4 + 4)."""
    def __init__(self, student: nn.Module, bits: int) -> None:
        super().__init__()
        body = student.backbone.body
        self.transform, self.bits = student.transform, bits
        self.network = nn.Sequential(*(body[name] for name in STEM), body["layer1"].encoder)

    @torch.inference_mode()
    def forward(self, image: Tensor) -> bytes:
        """image: (3, h, w) float in [0, 1]. Returns HEADER and, zipped, the quantised values."""
        images, _ = self.transform([image])
        values, scale, zero = quantise(self.network(images.tensors)[0], self.bits)
        header = HEADER.pack(VERSION, self.bits, len(values), *image.shape[1:],
                             *images.image_sizes[0], *images.tensors.shape[2:], scale, zero)
        zipper = zlib.compressobj(zdict=header)  # so that unzipping also checks the header
        return header + zipper.compress(values.cpu().contiguous().numpy()) + zipper.flush()


class Tail(nn.Module):
    """The server's part."""
    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student, self.body = student, student.backbone.body

    def forward(self, payload: bytes) -> dict[str, Tensor]:
        """Return detections as torchvision's detector does. Raises ValueError for a bad payload."""
        found, resized, original = self.detect(payload)
        return self.student.transform.postprocess([found], [resized], [original])[0]

    @torch.inference_mode()
    def detect(self, payload: bytes) -> Found:
        """Return what models.detect does. Raises ValueError for a bad payload."""
        decoder = self.body["layer1"].decoder
        try:
            version, bits, channels, *sizes, scale, zero = HEADER.unpack_from(payload)
            original, resized, padded = zip(sizes[::2], sizes[1::2])
            if ((version, channels) != (VERSION, decoder[0].num_features) or min(sizes) < 1
                    or bits not in (*range(1, 9), *DTYPES) or not abs(scale) < float("inf")
                    or max(padded) > self.student.transform.max_size + 31 or max(original) > 2**14
                    or any(r > p or p % 32 for r, p in zip(resized, padded))):
                raise ValueError("its header is of another version or another student")
            unzipper = zlib.decompressobj(zdict=payload[:HEADER.size])
            values = unzipper.decompress(payload[HEADER.size:], raw_size(payload) + 1)
            if len(values) != raw_size(payload) or not unzipper.eof or unzipper.unused_data:
                raise ValueError("it holds less or more than its header says")
        except (ValueError, struct.error, zlib.error) as error:
            raise ValueError(f"the payload was refused: {error}") from error
        values = torch.frombuffer(bytearray(values), dtype=DTYPES.get(bits, torch.uint8))
        values = values.view(1, channels, padded[0] // 4 + 4, -1).to(decoder[2].weight.device)
        layers = (self.body[name] for name in DISTILLED[1:])
        maps = dict(zip("0123", maps_from(decoder(restore(values, scale, zero)), layers)))
        images = ImageList(torch.empty(1, 3, *padded, device="meta"), [resized])
        return detect_from(self.student, maps, images), resized, original

# ---- checkpoint files ----------------------------------------------------------------------------
@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the block raises where a path cannot be written into an OSError that names it."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save raises the latter on a full disk
        raise OSError(f"{path} cannot be written: {error}") from error


def save_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint: at every moment the file is either the old one or the whole new one."""
    part = path.with_name(f".{path.name}.part")
    try:
        with writing(path), part.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU without running anything that is in it.

    Besides tensors, a Namespace, a Counter, a numpy float64 are safe, as in torchdistill's files.
    Raises FileNotFoundError or, if it is broken or refused, ValueError.
    """
    scalar = np.float64(0).__reduce__()[0]  # numpy's own name for it has moved, old files have both
    allowed = [argparse.Namespace, np.dtype, type(np.dtype(np.float64)),
               (scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar")]
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint {path} is not there")
    try:
        entries = zipfile.ZipFile(path).infolist() if zipfile.is_zipfile(path) else []
        if sum(entry.file_size for entry in entries) > Path(path).stat().st_size:
            raise ValueError("it would unpack to more than it is")  # torch.save never compresses
        with torch.serialization.safe_globals(allowed):
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # as many kinds as there are kinds of damage
        raise ValueError(f"{path} was refused: it is damaged, holds no dict of weights, or holds "
                         f"code, which is never run ({str(error).split('.')[0]})") from error


def detector_state(content: dict[str, Any], path: str | Path) -> dict[str, Tensor]:
    """Return a checkpoint's state dict, "model" or itself. Raises ValueError if there is none."""
    state = content.get("model", content)
    if not isinstance(state, dict) or not all(
            isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        raise ValueError(f"{path} holds no state dict, neither under 'model' nor by itself")
    if any(key.startswith("seq.") for key in state):
        raise ValueError(f"{path} holds torchdistill's training wrapper (keys seq.backbone...), "
                         "which has no RPN and heads, so no detector can be made of it")
    return {key.removeprefix("module."): value for key, value in state.items()}


def load_weights(detector: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Load strictly, by the modules, which know torchvision 0.7's keys too, or raise ValueError."""
    try:
        detector.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(" ".join(str(error).splitlines()[1:]).split())[:300]
        raise ValueError(f"{path} does not fit {type(detector).__name__}: {reason}") from error
    for key, value in state.items():
        if not value.isfinite().all():
            raise ValueError(f"{path} is spoilt: {key} has values that are not finite")


def load_student(path: str | Path, min_size: int = 800,
                 max_size: int = 1333) -> tuple[nn.Module, str]:
    """Return the student that a checkpoint holds, in eval mode, and its arch, told by its keys."""
    state = detector_state(load_checkpoint(path), path)
    narrowest = state.get("backbone.body.layer1.encoder.7.weight", torch.empty(0))
    if narrowest.shape[1:] != (64, 2, 2) or len(narrowest) > 2**16:
        raise ValueError(f"{path} holds no student: it has no bottleneck in backbone.body.layer1")
    arch = "maskrcnn" if any("roi_heads.mask_head." in key for key in state) else "fasterrcnn"
    classes = len(state.get(CLASSES, "no"))  # what is missing is told below
    student = build_student(build_detector(arch, min_size, max_size, classes), len(narrowest))
    load_weights(student, state, path)
    return student, arch

# ---- a teacher without downloads -----------------------------------------------------------------
@torch.no_grad()
def random_teacher(arch: str, images: list[Tensor], seed: int = 0, min_size: int = 800,
                   max_size: int = 1333) -> nn.Module:
    """Build a seeded random detector; images, (3, h, w) in [0, 1], are to scale its features by."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        detector = build_detector(arch, min_size, max_size)
    for name, norm in detector.backbone.body.named_modules():
        if name.endswith(".bn3"):
            norm.weight.fill_(0.1)  # weak residual branches, as trained ones are

    def calibrate(norm: FrozenBatchNorm2d, inputs: tuple[Tensor]) -> None:
        norm.running_mean.copy_(inputs[0].mean((0, 2, 3)))
        norm.running_var.copy_(inputs[0].var((0, 2, 3)).clamp(min=1e-6))

    def spread(linear: nn.Linear, inputs: tuple[Tensor]) -> None:
        scores = nn.functional.linear(inputs[0], linear.weight)  # (RoIs, 91)
        linear.weight.mul_(3 / (scores - scores.mean(0)).std())
        linear.bias.copy_(-nn.functional.linear(inputs[0], linear.weight).mean(0))
        linear.bias[3:] -= 20

    hooks = [m.register_forward_pre_hook(calibrate) for m in detector.modules()
             if isinstance(m, FrozenBatchNorm2d)]
    hooks.append(detector.roi_heads.box_predictor.cls_score.register_forward_pre_hook(spread))
    detector(images)
    for hook in hooks:
        hook.remove()
    return detector
