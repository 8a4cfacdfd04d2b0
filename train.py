"""Train a student by Generalized Head Network Distillation; validate, save and test it.

    torchrun --nproc_per_node=3 train.py --arch maskrcnn

runs one of the two published experiments on any number of GPUs that divides 12.
"""

import argparse
import contextlib
import json
import math
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, BinaryIO, get_type_hints

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils.data import DataLoader

import data
import distributed
import evaluate
import losses
import models
from distributed import InputError, log, writing

Criterion = Callable[[list[Tensor], list[Tensor], Sequence[float]], tuple[Tensor, Tensor]]
Predictor = Callable[[nn.Module], evaluate.Predict]

# ---- the recipe ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Experiment:
    """The settings of a published experiment, or of one that differs from it.

    Each field is a flag of train.py; its text is the help.
    """

    arch: str  # "fasterrcnn" or "maskrcnn"
    bottleneck_channels: Annotated[int, "channels that models.Bottleneck sends"] = 3
    layer_weights: Annotated[tuple[float, ...], "of layer1 to layer4; HND: 1 0 0 0"] = (1.0,) * 4
    epochs: Annotated[int, "passes over the images"] = 20
    images_per_step: Annotated[int, "images over all processes and micro-batches together"] = 12
    reference_batch: Annotated[int, "the loss is this times the images' mean; 4 in 2020"] = 4
    lr: Annotated[float, "learning rate of Adam, for any number of processes"] = 1e-3
    lr_drops: Annotated[tuple[int, ...], "epochs (from 0) that begin with a lower lr"] = (5, 15)
    lr_drop_factor: Annotated[float, "factor of lr at each drop"] = 0.1
    min_size: Annotated[int, "pixels to which an image's shorter side is resized"] = 800
    max_size: Annotated[int, "pixels that the longer side has at most"] = 1333
    seed: Annotated[int, "seed of layer1's initial values, the images' order, the flips"] = 0
    amp: Annotated[str | None, "bf16: both bodies run in bfloat16, the loss in float32"] = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = 1 if type(value) is int and name != "seed" else 0
            most = models.MAX_SIZE if name.endswith("_size") else 2**63 - 1
            if type(value) in (int, float) and not least <= value <= most:
                raise InputError(f"{name} is {value}; it must be from {least} to {most:,}")
        weights = self.layer_weights
        if len(weights) != 4 or not 0 <= min(weights) < sum(weights) < math.inf:
            raise InputError(f"layer_weights are {weights}; give 4, none below 0, and one above")


EXPERIMENTS = {arch: Experiment(arch) for arch in ("fasterrcnn", "maskrcnn")}

# ---- the loop ------------------------------------------------------------------------------------

def train_step(
    student_body: nn.Module, teacher_body: nn.Module, transform: nn.Module,
    micro_batches: Sequence[Sequence[Tensor]], optimizer: torch.optim.Optimizer,
    criterion: Criterion = losses.ghnd_loss, layer_weights: Sequence[float] = (1, 1, 1, 1),
    loss_scale: float = 1.0, bf16: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Train the student's body by one step, with the gradients of all micro-batches added up.

    student_body, teacher_body: models.training_bodies; with several processes, the former is
        wrapped for DDP. transform: the detector's.
    micro_batches: lists of images, uint8 (3, h, w).
    criterion: losses.ghnd_loss, or another function of its arguments and results; layer_weights
        go there. loss_scale: factor of each micro-batch's loss.
    bf16: whether to run both bodies under autocast.
    Returns loss, squared errors (layers,) and squared norms (layers,), on the device, in float64,
    summed over this process's micro-batches. Nothing here waits for the device.
    """
    device = next(student_body.parameters()).device
    student_body.train()
    step_loss = step_errors = step_norms = 0.0
    optimizer.zero_grad()
    for number, images in enumerate(micro_batches, start=1):
        images = [image.to(device, non_blocking=True) / 255 for image in images]
        batch = transform(images)[0].tensors  # (B, 3, H, W): normalised, resized, padded

        # What DDP's no_sync sets; without DDP, it does nothing. The last backward pass sends all.
        student_body.require_backward_grad_sync = number == len(micro_batches)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                teacher_maps = list(teacher_body(batch).values())
            student_maps = list(student_body(batch).values())
        loss, errors = criterion(student_maps, teacher_maps, layer_weights)
        loss = loss * loss_scale
        # DistributedDataParallel divides the summed gradients by the number of processes.
        (loss * distributed.world_size()).backward()

        step_loss += loss.detach().double()
        step_errors += errors.detach().double()
        step_norms += losses.squared_norms(teacher_maps).double()
        del student_maps, teacher_maps  # free them before the next forward pass
    optimizer.step()
    return step_loss, step_errors, step_norms


class Meter:
    """Adds up what train_step returns, and the time, since it was made."""

    def __init__(self) -> None:
        self.steps = []    # what train_step returned
        self.waited = 0.0  # seconds, for images
        self.begin = time.perf_counter()

    def read(self, images_per_step: int) -> dict[str, Any]:
        """Return the means over the steps, and the times of this process. Waits for the device."""
        loss, errors, norms = (distributed.sum_over_processes(torch.stack(values).sum(0))
                               for values in zip(*self.steps, strict=True))
        seconds = (time.perf_counter() - self.begin) / len(self.steps)
        return {
            "loss": loss.item() / len(self.steps),
            "relative_errors": (errors / norms).tolist(),  # of each layer
            "images_per_second": images_per_step / seconds,
            "data_wait": self.waited / len(self.steps) / seconds,  # share of the time
            "gpu_memory_mib": torch.cuda.max_memory_allocated() / 2**20,
        }


# ---- an experiment -------------------------------------------------------------------------------

def build_optimizer(student: nn.Module, experiment: Experiment) -> tuple[Adam, MultiStepLR]:
    """Return Adam over the trainable parameters, and a schedule to be stepped after each epoch."""
    trainable = [p for p in student.parameters() if p.requires_grad]
    optimizer = Adam(trainable, experiment.lr)
    scheduler = MultiStepLR(optimizer, experiment.lr_drops, experiment.lr_drop_factor)
    return optimizer, scheduler


def share_step(images_per_step: int, processes: int) -> tuple[int, int]:
    """Return (images in a micro-batch, micro-batches that a process accumulates in a step).

    A micro-batch is what BatchNorm sees: at most 4 images; on 1 or 3 processes 4, as originally.
    """
    share, rest = divmod(images_per_step, processes)
    if rest:
        raise InputError(f"{processes} processes cannot share {images_per_step} images a step "
                         "evenly; change --nproc_per_node or --images-per-step")
    micro_batch = max(size for size in (1, 2, 3, 4) if share % size == 0)
    return micro_batch, share // micro_batch


def run_experiment(
    experiment: Experiment, args: argparse.Namespace, folder: "RunFolder",
    bottleneck: models.MakeBottleneck | None, criterion: Criterion, predictor: Predictor
) -> dict[str, evaluate.Metrics]:
    """Train, validate and save a student; return the metrics of teacher, student and agreement.

    After each epoch the student is validated, and the best checkpoint is written if its box AP is
    the best so far; the final test uses that checkpoint.
    args: parse_args's, with the device. bottleneck, criterion, predictor: as in `main`.
    """
    checkpoint = distributed.on_main(folder.lock_and_read, args.resume)
    distributed.log_to(folder.log)
    processes = distributed.world_size()
    micro_batch, accumulation = distributed.on_main(
        share_step, experiment.images_per_step, processes)
    student, teacher = distributed.on_main_first(
        build_detectors, experiment, args, bottleneck, predictor)
    val = evaluate.ValSet(args.data_dir, teacher, args.limit_val)
    images, images_folder = distributed.on_main(
        data.load_train_split, args.data_dir, experiment.max_size, args.limit_train,
        experiment.images_per_step, val.coco.cats)
    distributed.on_main(data.check_workers, images, micro_batch, args.workers, accumulation)
    loader = data.train_loader(
        images, images_folder, micro_batch, experiment.seed, args.workers, args.device)
    config = asdict(experiment) | {
        "bottleneck_channels": models.check_bottleneck(student.backbone.body.layer1),
        "bottleneck": name_of(student.backbone.body.layer1),
        "criterion": name_of(criterion),
        "predictor": name_of(predictor),
        "train_images": len(images),
        "val_images": len(val.images),
    }
    run = Run(student, *build_optimizer(student, experiment), config)
    if checkpoint:
        distributed.on_main_first(run.load, checkpoint, folder.last)
        del checkpoint  # 170 MB
    start = describe_start(config, args)
    distributed.on_main(folder.record, start)
    log(json.dumps(start))
    log(f"from epoch {run.epoch}, step {run.step} on: {len(images):,} images; a step is "
        f"{processes} process(es) x {accumulation} micro-batch(es) of {micro_batch} image(s), "
        "which is what BatchNorm sees (4 in the original)")

    step_function = build_step(student, teacher, experiment, criterion, args.compiled)
    while run.epoch < experiment.epochs:
        train_to_epoch_end(run, step_function, loader, accumulation, folder, args)
        distributed.broadcast_buffers(student.backbone.body.layer1)  # BatchNorm's differ by rank
        student.eval()
        metrics, _ = evaluate.evaluate(
            predictor(student), val, args.device, args.workers, f"validation {run.epoch}")
        distributed.on_main(report_epoch, run, metrics, folder)
        # PyTorch warns here if a resumed run had no step of epoch 0 left, only its validation.
        run.scheduler.step()
        run.epoch += 1
        run.step, run.loss_sum = 0, 0.0

    content = distributed.on_main(models.load_checkpoint, folder.best)
    models.load_weights(student, content["model"], folder.best)
    log(f"test of {folder.best}")
    metrics, _, _ = evaluate.compare(predictor(student), teacher, val, args.device, args.workers)
    distributed.on_main(folder.record, {"kind": "test", "metrics": metrics})
    return metrics


def build_detectors(
    experiment: Experiment, args: argparse.Namespace, bottleneck: models.MakeBottleneck | None,
    predictor: Predictor
) -> tuple[nn.Module, nn.Module]:
    """Return student and teacher on their device; try the predictor, if it is not the default."""
    teacher = models.load_teacher(
        experiment.arch, args.teacher_ckpt, experiment.min_size, experiment.max_size,
        args.teacher_eps)
    torch.manual_seed(experiment.seed)  # for layer1's initial values
    student = models.build_student(
        teacher, bottleneck or partial(models.Bottleneck, experiment.bottleneck_channels))
    sent = models.check_bottleneck(student.backbone.body.layer1)
    if "bottleneck_channels" in args and sent != experiment.bottleneck_channels:  # if given
        raise InputError(f"--bottleneck-channels {experiment.bottleneck_channels}: the bottleneck "
                         f"that was given sends {sent}")
    if experiment.amp and not models.has_bf16(args.device):
        raise InputError(f"--amp bf16: this {args.device} has no fast bfloat16; leave it out")
    models.to_device(teacher, args.device)
    models.to_device(student, args.device)
    if predictor is not evaluate.whole:  # otherwise a faulty one fails only after the first epoch
        with torch.inference_mode():
            evaluate.to_coco(0, predictor(student)(torch.rand(3, 120, 160, device=args.device)))
    return student, teacher


def name_of(part: Any) -> str:
    """Return "module.name" of a class or a function, or of an object's class."""
    named = part if hasattr(part, "__qualname__") else type(part)
    return f"{named.__module__}.{named.__qualname__}"


def describe_start(config: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Return the record of what is run, and with what."""
    folder = shlex.quote(str(Path(__file__).parent))
    return {
        "kind": "start",
        "config": config,
        "flags": {name: str(value) for name, value in vars(args).items()},
        "device": torch.cuda.get_device_name() if args.device.type == "cuda" else "cpu",
        "processes": distributed.world_size(),
        "versions": {part.__name__: part.__version__ for part in (torch, torchvision, np)},
        "commit": subprocess.getoutput(f"git -C {folder} describe --always --dirty 2>/dev/null"),
    }


def build_step(
    student: nn.Module, teacher: nn.Module, experiment: Experiment, criterion: Criterion,
    compiled: bool
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Return train_step for this run: a function of micro_batches and optimizer."""
    layer_weights = np.trim_zeros(experiment.layer_weights, "b")  # HND needs layer1 alone
    bf16 = experiment.amp is not None
    student_body, teacher_body = models.training_bodies(student, teacher, bf16, len(layer_weights))
    if compiled:
        # In place, so that no wrapper renames the weights; dynamic, so once for all image sizes.
        student_body.compile(dynamic=True)
        teacher_body.compile(dynamic=True)
        criterion = torch.compile(criterion, dynamic=True)
    if distributed.world_size() > 1:
        # find_unused_parameters, as in the original: without it, gradients are summed in another
        # order from the second step on, and a resumed run would not be the same to the last bit.
        student_body = DistributedDataParallel(student_body, find_unused_parameters=True)
    return partial(
        train_step, student_body, teacher_body, teacher.transform, criterion=criterion,
        layer_weights=layer_weights, bf16=bf16,
        # In 2020 each of 3 GPUs summed the errors of 4 images, and gradients were averaged over
        # the GPUs. So a step's loss and gradient are those of (sum over its 12 images) * 4 / 12.
        loss_scale=experiment.reference_batch / experiment.images_per_step)


def train_to_epoch_end(
    run: "Run", step_function: Callable[..., tuple[Tensor, Tensor, Tensor]], loader: DataLoader,
    accumulation: int, folder: "RunFolder", args: argparse.Namespace
) -> None:
    """Train to the last step of run.epoch, from run.step on; log, record and save on the way.

    step_function: build_step's. loader: data.train_loader's, with `accumulation` batches a step.
    Raises InputError if the loss is no longer finite.
    """
    config = run.config
    first, last = run.step + 1, len(loader) // accumulation
    loader.batch_sampler.epoch = run.epoch
    loader.batch_sampler.first_batch = run.step * accumulation
    batches = iter(loader)
    meter = Meter()
    for step in range(first, last + 1):
        # For students that draw random numbers: each process and step has a seed, resumed or not.
        seed = np.random.SeedSequence((config["seed"], run.epoch, step, distributed.rank()))
        torch.manual_seed(int(seed.generate_state(1)[0]))
        wait_begin = time.perf_counter()
        micro_batches = [next(batches) for _ in range(accumulation)]
        meter.waited += time.perf_counter() - wait_begin
        meter.steps.append(step_function(micro_batches, run.optimizer))
        del micro_batches  # their shared memory is free before the next ones come

        is_saved = step % args.save_every == 0 or step == last
        if step == first or step % args.log_every == 0 or is_saved:
            reading = meter.read(config["images_per_step"])  # waits for the device
            run.loss_sum += reading["loss"] * (step - run.step)
            run.step = step
            distributed.on_main(report_step, run, reading, last, folder)
            if is_saved:
                distributed.on_main(folder.save, folder.last, run.content())
            meter = Meter()  # here, so that the time for saving is not counted


def report_step(run: "Run", reading: dict[str, Any], last: int, folder: "RunFolder") -> None:
    """Log and record Meter's reading; last: the steps in an epoch. InputError if not finite."""
    if not math.isfinite(reading["loss"]):
        raise InputError(f"the loss is {reading['loss']} at or before epoch {run.epoch}, step "
                         f"{run.step}; last.pt, if there is one, is of before that")
    lr = run.optimizer.param_groups[0]["lr"]
    steps_left = last * (run.config["epochs"] - run.epoch) - run.step
    hours = run.config["images_per_step"] * steps_left / reading["images_per_second"] / 3600
    folder.record({"kind": "step", "epoch": run.epoch, "step": run.step, "steps": last, "lr": lr,
                   **reading, "hours_left": hours})  # of training alone, without validation
    relative_errors = " ".join(f"{error:.3f}" for error in reading["relative_errors"])
    log(f"epoch {run.epoch} step {run.step}/{last} loss {reading['loss']:.4e} relative errors "
        f"{relative_errors} lr {lr:.0e} {reading['images_per_second']:.1f} img/s, data wait "
        f"{reading['data_wait']:.0%}, GPU {reading['gpu_memory_mib']:.0f} MiB, {hours:.1f} h left")


def report_epoch(run: "Run", metrics: evaluate.Metrics, folder: "RunFolder") -> None:
    """Log and record a validated epoch, and save the student if it is the best so far."""
    loss = run.loss_sum / run.step
    box_ap = metrics["bbox"]["AP"]
    is_best = box_ap > run.best_box_ap or box_ap < 0  # COCO's -1: no objects; the newest counts
    log(f"epoch {run.epoch}: mean loss {loss:.4e}, box AP {box_ap:.4f}"
        + ", the best so far" * is_best)
    folder.record({"kind": "epoch", "epoch": run.epoch, "loss": loss, "metrics": metrics,
                   "best": is_best})
    if is_best:
        run.best_box_ap = box_ap
        folder.save(folder.best, run.content())


# ---- a run and its folder ------------------------------------------------------------------------

@dataclass
class Run:
    """All that training changes: weights, optimizer, schedule, and how far it has come."""

    student: nn.Module
    optimizer: Adam
    scheduler: MultiStepLR
    config: dict[str, Any]  # the settings, and the numbers of images: not changed
    epoch: int = 0          # being trained or validated, from 0; last.pt is written between
    step: int = 0           # steps done in this epoch, as of the last record
    loss_sum: float = 0.0   # over these steps
    best_box_ap: float = -math.inf  # on the main process alone

    def content(self) -> dict[str, Any]:
        """Return what a checkpoint holds. Up to "args", these are torchdistill's entries."""
        return {
            "model": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.scheduler.state_dict(),
            "best_value": self.best_box_ap,
            "config": self.config,
            "args": None,
            "progress": {"epoch": self.epoch, "step": self.step, "loss_sum": self.loss_sum},
        }

    def load(self, content: dict[str, Any], path: Path) -> None:
        """Go on with the run that wrote a checkpoint.

        Raises InputError if it had another teacher or other settings; epochs may change.
        """
        # Fields added since the file was written count as their defaults.
        before = asdict(Experiment(self.config["arch"])) | content["config"]
        for name, value in self.config.items():
            if name != "epochs" and before.get(name) != value:
                raise InputError(f"{path} belongs to a run with {name} {before.get(name)}, not "
                                 f"{value}; give the same settings, or another --output-dir")
        state = content["model"]
        # The frozen weights in the file are its teacher's, so they show which teacher it had.
        difference = models.first_difference(state, self.student.state_dict())
        if difference:
            raise InputError(f"{path} belongs to another teacher, with another {difference}; "
                             "resume with the same teacher")
        models.load_weights(self.student, state, path)
        self.optimizer.load_state_dict(content["optimizer"])
        self.scheduler.load_state_dict(content["lr_scheduler"])
        self.epoch = content["progress"]["epoch"]
        self.step = content["progress"]["step"]
        self.loss_sum = content["progress"]["loss_sum"]
        self.best_box_ap = content["best_value"]


class RunFolder:
    """The folder of one run and its files. All is done on the main process alone.

    best: the checkpoint of best box AP, with torchdistill's name. last: the newest checkpoint.
    metrics: a JSON object a line; if one is repeated after resuming, the last counts.
    log: what was printed, with the time.
    """

    def __init__(self, path: Path, arch: str) -> None:
        self.best = path / f"coco2017-custom_{arch}_resnet_fpn_from_{arch}_resnet50_fpn.pt"
        self.last = path / "last.pt"
        self.metrics = path / "metrics.jsonl"
        self.log = path / "train.log"
        self.file = None  # metrics, open and locked from lock_and_read to the end

    def close(self) -> None:
        """Unlock the folder."""
        if self.file is not None:
            self.file.close()

    def lock_and_read(self, resume: bool) -> dict[str, Any] | None:
        """Lock the folder for this run; return last.pt's content if there is a run to resume.

        Raises InputError if another run has the folder, or a checkpoint that does not go on here.
        """
        with writing(self.metrics):
            self.metrics.parent.mkdir(parents=True, exist_ok=True)
            # Open this file nowhere else: wherever the process closes it, the lock ends.
            self.file = self.metrics.open("ab+", buffering=0)
        lock(self.file, self.metrics)
        trial = self.last.with_name("trial.pt")
        models.save_checkpoint({}, trial)  # some file systems cannot rename, or not sync
        trial.unlink()

        found = [path for path in (self.last, self.best) if path.exists()]
        if found and not (resume and self.last in found):
            raise InputError(f"{found[0]} is there; go on with its run by --resume, which needs "
                             f"{self.last}, or give another --output-dir")
        with writing(self.metrics):
            self.file.seek(0)
            self.file.truncate(self.file.read().rfind(b"\n") + 1)  # without half a line
        if not found:
            return None
        content = models.load_checkpoint(self.last)
        if not isinstance(content.get("config"), dict) or "progress" not in content:
            raise InputError(f"{self.last} was not written by this train.py; move it away, or give "
                             "another --output-dir")
        if self.best not in found:
            content["best_value"] = -math.inf  # so that the next validation writes it
        return content

    def record(self, record: dict[str, Any]) -> None:
        """Append a record to metrics.jsonl."""
        with writing(self.metrics):
            self.file.write(json.dumps(record).encode() + b"\n")

    def save(self, path: Path, content: dict[str, Any]) -> None:
        """Write a checkpoint, unless a weight is not finite: InputError."""
        models.check_finite(content["model"], f"{path} was not written")
        models.save_checkpoint(content, path)


def lock(file: BinaryIO, path: Path) -> None:
    """Lock an open file until this process closes it or ends, or raise InputError."""
    try:
        import fcntl  # not on Windows
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise InputError(f"another run, or another process of this one, is using {path.parent}: "
                         "give another --output-dir, or stop it; several processes for one run are "
                         "started by torchrun") from error
    except (ImportError, OSError) as error:  # a file system without locks
        log(f"{path} cannot be locked ({error}): take care that no other run uses the folder")


# ---- the command ---------------------------------------------------------------------------------

def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the flags, and the fields of Experiment that they change."""
    parser = argparse.ArgumentParser(
        description="Train a GHND student.", usage="%(prog)s --arch ARCH [flags]")
    add = parser.add_argument
    add("--arch", choices=EXPERIMENTS, required=True, help="which experiment")
    distributed.add_common_flags(parser)
    add("--output-dir", type=distributed.user_path, metavar="DIR",
        help="the run's own folder, for its checkpoints and logs (coco/ARCH)")
    add("--resume", action="store_true",
        help="go on from last.pt, or start if there is none: the same command each time")
    add("--save-every", type=distributed.positive, metavar="N", default=2000,
        help="write last.pt every N steps, and after each epoch (%(default)s)")
    add("--log-every", type=distributed.positive, metavar="N", default=100,
        help="print a line every N steps (%(default)s)")
    add("--limit-train", type=distributed.positive, metavar="N",
        help="use only the first N images of train2017")
    add("--compile", action="store_true", dest="compiled",
        help="compile both bodies and the loss, which takes minutes at the start")
    group = parser.add_argument_group("changes to the recipe")
    for name, hint in get_type_hints(Experiment, include_extras=True).items():
        if name != "arch":
            add_recipe_flag(group, name, hint)
    args = parser.parse_args(argv)
    args.output_dir = args.output_dir or Path("coco", args.arch)
    return args


def add_recipe_flag(group: Any, name: str, hint: Any) -> None:
    """Add the flag of a field of Experiment; hint: its type, with a help text if Annotated."""
    default = getattr(Experiment, name)
    is_list = isinstance(default, tuple)
    values = default if is_list else (default,)
    if name == "amp":
        kind = {"choices": ["bf16"]}
    elif isinstance(default, bool):
        kind = {"action": argparse.BooleanOptionalAction}
    else:
        kind = {"type": type(values[0]), "nargs": "*" if is_list else None, "metavar": "X"}
    text = " ".join(getattr(hint, "__metadata__", ()))
    if default is not None:
        text += f" ({' '.join(map(str, values))})"
    flag = "--" + name.replace("_", "-")
    group.add_argument(flag, default=argparse.SUPPRESS, help=text, **kind)


def change_experiment(args: argparse.Namespace) -> Experiment:
    """Return the experiment of --arch, with the changes that flags make to it."""
    names = {field.name for field in fields(Experiment)} - {"arch"}
    changes = {name: tuple(value) if isinstance(value, list) else value
               for name, value in vars(args).items() if name in names}
    return replace(EXPERIMENTS[args.arch], **changes)


def main(
    argv: Sequence[str] | None = None,
    *,
    bottleneck: models.MakeBottleneck | None = None,
    criterion: Criterion = losses.ghnd_loss,
    predictor: Predictor = evaluate.whole,
) -> dict[str, evaluate.Metrics]:
    """Run the command, with another part in place of a default; return the test's metrics.

    argv: its flags, by default sys.argv[1:].
    bottleneck: a class or a function without arguments that returns layer1; see models.Bottleneck.
    criterion: the loss, a function of losses.ghnd_loss's arguments and results.
    predictor: a function of the student that returns what is validated and tested.
    """
    args = parse_args(argv)
    args.device = distributed.set_up(args.device)
    experiment = distributed.on_main(change_experiment, args)
    with contextlib.closing(RunFolder(args.output_dir, experiment.arch)) as folder:
        return run_experiment(experiment, args, folder, bottleneck, criterion, predictor)


if __name__ == "__main__":
    distributed.run(main, if_interrupted="stopped; the same command with --resume goes on")
