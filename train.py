"""Train a student by Generalized Head Network Distillation; validate, save and test it.

    torchrun --nproc_per_node=3 train.py --arch maskrcnn

runs one of the two published experiments on any number of GPUs that divides 12. From Python,
run_experiment does the same with any Experiment.
"""

import argparse
import contextlib
import inspect
import json
import math
import os
import platform
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils.data import DataLoader

import data
import distributed
import evaluate
import losses
import models
from distributed import InputError, log, plural, writing

# ---- the recipe ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """The settings of a published experiment, or of one that differs from it.

    The comments are the help texts of train.py's flags, which are made from these fields.
    """

    arch: str                            # "fasterrcnn" or "maskrcnn"
    bottleneck_channels: int = 3         # channels that are sent
    layer_weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)  # of the loss; HND has 1 0 0 0
    epochs: int = 20                     # passes over the images
    images_per_step: int = 12            # over all processes and micro-batches together
    reference_batch: int = 4             # images that the loss is scaled to, as on a GPU of 2020
    lr: float = 1e-3                     # of Adam, for any number of processes; no weight decay
    lr_drops: tuple[int, ...] = (5, 15)  # epochs, counted from 0, at whose start lr is reduced
    lr_drop_factor: float = 0.1          # by which lr is multiplied at each drop
    min_size: int = 800                  # pixels of an image's shorter side after resizing ...
    max_size: int = 1333                 # ... unless the longer side would have more than this
    seed: int = 0                        # of layer1's initial values, the images' order, the flips

    def __post_init__(self) -> None:
        for name in ("bottleneck_channels", "epochs", "images_per_step", "reference_batch",
                     "min_size", "max_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be 1 or more",
                                 on_all_processes=True)
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed}; it must be from 0 to 2^63 - 1",
                             on_all_processes=True)
        if len(self.layer_weights) != 4:
            raise InputError(f"layer_weights are {self.layer_weights}; there must be one for each "
                             "of 4 layers", on_all_processes=True)


FASTERRCNN = Experiment("fasterrcnn")
MASKRCNN = Experiment("maskrcnn")
EXPERIMENTS = {"fasterrcnn": FASTERRCNN, "maskrcnn": MASKRCNN}
RECIPE_IMAGES = 117_266  # of train2017 that have a box of more than a pixel
LOG_EVERY = 100          # steps; these two are the defaults of their flags
SAVE_EVERY = 2000

# The published runs, epoch by epoch: the mean loss, and the box AP where it was better than in all
# epochs before. The loss is the mean of an epoch's first 9,001 steps, the last that the logs give.
# Source: the logs beside torchdistill's rrpr2020 configurations (arXiv 2011.12913).
PUBLISHED_EPOCHS = {
    "fasterrcnn": (
        (2.337e6, 0.3519), (1.174e6, 0.3545), (1.094e6, None), (1.054e6, 0.3549),
        (1.027e6, 0.3558), (0.982e6, 0.3578), (0.975e6, 0.3579), (0.972e6, None),
        (0.968e6, None), (0.967e6, None), (0.962e6, None), (0.961e6, 0.3586),
        (0.957e6, None), (0.957e6, None), (0.954e6, None), (0.947e6, None),
        (0.948e6, None), (0.946e6, None), (0.950e6, None), (0.947e6, None),
    ),
    "maskrcnn": (
        (2.499e6, 0.3601), (1.482e6, 0.3659), (1.392e6, None), (1.398e6, None),
        (1.286e6, None), (1.256e6, 0.3684), (1.210e6, None), (1.202e6, None),
        (1.195e6, 0.3690), (1.191e6, None), (1.184e6, 0.3691), (1.184e6, None),
        (1.174e6, None), (1.174e6, None), (1.171e6, None), (1.161e6, None),
        (1.161e6, None), (1.158e6, None), (1.165e6, None), (1.159e6, None),
    ),
}


def build_optimizer(
    student: nn.Module, experiment: Experiment
) -> tuple[torch.optim.Adam, MultiStepLR]:
    """Return Adam over the trainable parameters, and a schedule to be stepped after each epoch."""
    trainable = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, experiment.lr)
    scheduler = MultiStepLR(optimizer, experiment.lr_drops, experiment.lr_drop_factor)
    return optimizer, scheduler


def share_step(images_per_step: int, processes: int) -> tuple[int, int]:
    """Return (images in a micro-batch, micro-batches that a process accumulates in a step).

    A micro-batch has at most 4 images. It is what BatchNorm sees: on 1 or 3 processes, 4 images,
    as in the original.
    Raises InputError if the processes cannot share a step evenly.
    """
    share, rest = divmod(images_per_step, processes)
    if rest:
        raise InputError(f"{processes} processes cannot share {images_per_step} images a step "
                         "evenly; change --nproc_per_node or --images-per-step",
                         on_all_processes=True)
    micro_batch = max(size for size in (1, 2, 3, 4) if share % size == 0)
    return micro_batch, share // micro_batch


# ---- one epoch -----------------------------------------------------------------------------------


def train_epoch(
    experiment: Experiment,
    run: "Run",
    student_body: nn.Module,
    teacher_body: nn.Module,
    transform: nn.Module,
    loader: DataLoader,
    criterion: Callable[..., Any] = losses.ghnd_loss,
    amp: str | None = None,
    log_every: int = LOG_EVERY,
    save_every: int = SAVE_EVERY,
) -> Iterator[dict[str, Any]]:
    """Train to the end of run.epoch, from run.step on; yield records of progress.

    A record comes after the first step, every log_every and save_every steps, and after the last.
    `run` then says how far training has come; if "is_saved", the caller saves it.
    student_body, teacher_body: models.training_bodies; the former may be wrapped for DDP.
    transform: the detector's. loader: data.train_loader's.
    criterion: losses.ghnd_loss, or another function of its arguments and results.
    amp: "bf16" to run both bodies under autocast.
    Raises FloatingPointError, on every process, if the loss is no longer finite.
    """
    device = next(student_body.parameters()).device
    layout = models.memory_format(device)
    processes = distributed.world_size()
    _, accumulation = share_step(experiment.images_per_step, processes)
    first, last = run.step + 1, len(loader) // accumulation
    # In 2020 each of 3 GPUs summed the errors of 4 images, and gradients were averaged over the
    # GPUs. So a step's loss and gradient are those of (sum over its 12 images) * 4 / 12.
    loss_scale = experiment.reference_batch / experiment.images_per_step

    loader.batch_sampler.epoch = run.epoch
    loader.batch_sampler.first_batch = run.step * accumulation
    batches = iter(loader)
    layers = len(experiment.layer_weights)
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    squared_sums = torch.zeros(2, layers, dtype=torch.float64, device=device)  # errors; norms
    waited, begin = 0.0, time.perf_counter()
    student_body.train()
    for step in range(first, last + 1):
        # The default student draws no random numbers. For one that does: they differ between the
        # processes, and are the same after resuming.
        seeds = np.random.SeedSequence((experiment.seed, run.epoch, step, distributed.rank()))
        torch.manual_seed(int(seeds.generate_state(1)[0]))
        run.optimizer.zero_grad()
        for micro_step in range(1, accumulation + 1):
            wait_begin = time.perf_counter()
            images = next(batches)                # each uint8 (3, h, w)
            waited += time.perf_counter() - wait_begin

            images = [image.to(device, non_blocking=True) / 255 for image in images]
            batch = transform(images)[0].tensors  # (B, 3, H, W): normalised, resized, padded
            batch = batch.contiguous(memory_format=layout)

            # DistributedDataParallel averages gradients over the processes in a backward pass.
            # The last one is enough, since it includes what the others have accumulated.
            student_body.require_backward_grad_sync = micro_step == accumulation
            with torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16"):
                with torch.no_grad():
                    teacher_maps = list(teacher_body(batch).values())
                student_maps = list(student_body(batch).values())
            loss, errors = criterion(student_maps, teacher_maps, experiment.layer_weights)
            loss = loss * loss_scale
            # DistributedDataParallel divides the summed gradients by the number of processes.
            (loss * processes).backward()

            loss_sum += loss.detach()
            squared_sums += torch.stack([errors, losses.squared_norms(teacher_maps)])
            del student_maps, teacher_maps  # or they would stay until the next batch has its own
        run.optimizer.step()

        is_saved = step % save_every == 0 or step == last
        if step == first or step % log_every == 0 or is_saved:
            # The only place in the loop that waits for the device.
            count = step - run.step  # steps since the last record
            mean_loss = distributed.sum_over_processes(loss_sum).item() / count
            if not math.isfinite(mean_loss):
                raise FloatingPointError(f"the loss is {mean_loss} between steps {run.step} and "
                                         f"{step} of epoch {run.epoch}")
            error_sums, norm_sums = distributed.sum_over_processes(squared_sums)
            seconds = (time.perf_counter() - begin) / count
            run.step = step
            run.loss_sum += mean_loss * count
            yield {
                "kind": "step",
                "epoch": run.epoch,
                "step": step,
                "steps": last,
                "is_saved": is_saved,
                "loss": mean_loss,
                "relative_errors": (error_sums / norm_sums).tolist(),
                "lr": run.optimizer.param_groups[0]["lr"],
                "images_per_second": experiment.images_per_step / seconds,
                "data_wait": waited / count / seconds,  # share of the time
                "gpu_memory_mib": torch.cuda.max_memory_allocated() / 2**20,
                # Of training alone, without validation.
                "hours_left": seconds / 3600 * (last * (experiment.epochs - run.epoch) - step),
            }
            loss_sum.zero_()
            squared_sums.zero_()
            waited, begin = 0.0, time.perf_counter()


def describe_step(record: dict[str, Any]) -> str:
    """Return a line of progress for a record of train_epoch."""
    relative_errors = " ".join(f"{error:.3f}" for error in record["relative_errors"])
    line = (f"epoch {record['epoch']} step {record['step']}/{record['steps']} "
            f"loss {record['loss']:.4e} relative errors {relative_errors} lr {record['lr']:.0e} "
            f"{record['images_per_second']:.1f} img/s, data wait {record['data_wait']:.0%}")
    if record["gpu_memory_mib"]:
        line += f", {record['gpu_memory_mib']:.0f} MiB"
    if record["hours_left"] >= 0.05:
        line += f", {record['hours_left']:.1f} h left"
    return line


# ---- an experiment -------------------------------------------------------------------------------


def run_experiment(
    experiment: Experiment,
    *,
    data_dir: Path,
    output_dir: Path,
    teacher_ckpt: Path | None = None,
    teacher_eps: float | None = None,
    resume: bool = False,
    amp: str | None = None,
    compiled: bool = False,
    device: str = "auto",
    workers: int = 4,
    limit_train: int | None = None,
    limit_val: int | None = None,
    log_every: int = LOG_EVERY,
    save_every: int = SAVE_EVERY,
    bottleneck: models.MakeBottleneck | None = None,
    criterion: Callable[..., Any] = losses.ghnd_loss,
    predictor: Callable[[nn.Module], evaluate.Predict] = evaluate.whole,
) -> dict[str, evaluate.Metrics]:
    """Train, validate and save a student; return the metrics of teacher, student and agreement.

    After each epoch the student is validated, and the best checkpoint is written if its box AP is
    the best so far; the test at the end is of that. Settings are those of the command line, and:
    bottleneck: as in models.make_bottleneck, made after the experiment's seed was set.
    criterion: the loss, as in train_epoch.
    predictor: a function of the student that returns what is validated and tested.
    """
    device = distributed.set_up(device)
    if amp == "bf16" and not models.has_bf16(device):
        raise InputError(f"--amp bf16: this {device.type} has no fast bfloat16; leave it out",
                         on_all_processes=True)
    micro_batch, accumulation = share_step(experiment.images_per_step, distributed.world_size())
    for split in ("train2017", "val2017"):
        distributed.on_main(data.split_paths, data_dir, split)
    layer1 = make_layer1(experiment, bottleneck)
    config = asdict(experiment) | {
        "bottleneck_channels": models.check_bottleneck(layer1),
        "amp": amp,
        "bottleneck": models.name_of(layer1),
        "criterion": models.name_of(criterion),
        "predictor": models.name_of(predictor),
    }
    start = describe_start(config, device, data_dir, teacher_ckpt, teacher_eps, compiled)

    folder = RunFolder(output_dir, experiment.arch)
    with folder.claimed(start, resume) as checkpoint, distributed.logging_to(folder.log):
        log(json.dumps(start))
        distributed.on_main(check_config, checkpoint, config, folder.last)
        teacher = distributed.on_main_first(
            models.load_teacher, experiment.arch, teacher_ckpt, experiment.min_size,
            experiment.max_size, teacher_eps)
        student = models.build_student(teacher, layer1)
        images, images_folder = data.load_train_split(data_dir, experiment.max_size, limit_train)
        if len(images) < experiment.images_per_step:
            raise InputError(f"{len(images)} images to train on are fewer than one step's "
                             f"{experiment.images_per_step}: see --limit-train, --images-per-step",
                             on_all_processes=True)
        loader = data.train_loader(
            images, images_folder, micro_batch, experiment.seed, workers, device)
        val = evaluate.ValSet(data_dir, teacher, limit_val)
        is_recipe = (follows_recipe(config, len(images)) and not teacher_eps
                     and distributed.on_main(models.is_coco_v1, experiment.arch, teacher_ckpt))
        config = config | {"train_images": len(images), "val_images": len(val.images),
                           "is_recipe": is_recipe}
        distributed.on_main(check_config, checkpoint, config, folder.last)

        models.to_device(teacher, device)
        models.to_device(student, device)
        run = Run(student, *build_optimizer(student, experiment))
        if checkpoint:
            run.load(checkpoint, folder.last)
            del checkpoint  # 170 MB
        bodies = prepare_bodies(student, teacher, amp, compiled)
        loss = torch.compile(criterion, dynamic=True) if compiled else criterion

        log(f"{experiment.arch} on {device}, from epoch {run.epoch}, step {run.step} on: "
            f"{plural(len(images), 'image')}; a step is "
            f"{plural(distributed.world_size(), 'process', 'processes')} x "
            f"{plural(accumulation, 'micro-batch', 'micro-batches')} x "
            f"{plural(micro_batch, 'image')}")
        while run.epoch < experiment.epochs:
            for record in train_epoch(
                    experiment, run, *bodies, teacher.transform, loader, loss, amp, log_every,
                    save_every):
                log(describe_step(record))
                folder.record(record)
                if record["is_saved"]:
                    folder.save(folder.last, run.content(config))
            distributed.broadcast_buffers(student.backbone.body.layer1)
            student.eval()
            metrics, _ = evaluate.evaluate(
                predictor(student), val, device, workers, f"validation {run.epoch}")
            report_epoch(run, metrics, folder, config, evaluate.published_ap(student, config, val))
            run.start_next_epoch()
        return test(student, predictor, teacher, val, config, device, workers, folder)


def make_layer1(experiment: Experiment, bottleneck: models.MakeBottleneck | None) -> nn.Module:
    """Return the student's layer1, made after the experiment's seed was set.

    Raises InputError if the experiment asks for channels that the given bottleneck does not have.
    """
    torch.manual_seed(experiment.seed)
    layer1 = models.make_bottleneck(bottleneck, experiment.bottleneck_channels)
    channels = models.check_bottleneck(layer1)
    if experiment.bottleneck_channels not in (Experiment.bottleneck_channels, channels):
        raise InputError(f"--bottleneck-channels {experiment.bottleneck_channels}: the bottleneck "
                         f"that was given sends {channels}", on_all_processes=True)
    return layer1


def describe_start(
    config: dict[str, Any], device: torch.device, data_dir: Path, teacher_ckpt: Path | None,
    teacher_eps: float | None, compiled: bool
) -> dict[str, Any]:
    """Return the record of what is run, and with what."""
    return {
        "kind": "start",
        "command": sys.argv,
        "config": config,
        "data_dir": str(data_dir),
        "teacher": str(teacher_ckpt or "COCO_V1"),
        "teacher_eps": teacher_eps,
        "compiled": compiled,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": distributed.world_size(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "torchvision": torchvision.__version__, "numpy": np.__version__},
    }


def follows_recipe(config: dict[str, Any], train_images: int) -> bool:
    """Return whether a run has the settings of a published experiment, with any seed."""
    recipe = default_config(config["arch"])
    return train_images == RECIPE_IMAGES and config | {"seed": 0} == recipe


def default_config(arch: str) -> dict[str, Any]:
    """Return the settings that decide on the result of a run, as they are by default."""
    return asdict(Experiment(arch)) | {
        "amp": None,
        "bottleneck": models.name_of(models.Bottleneck),
        "criterion": models.name_of(losses.ghnd_loss),
        "predictor": models.name_of(evaluate.whole),
    }


def prepare_bodies(
    student: nn.Module, teacher: nn.Module, amp: str | None, compiled: bool
) -> tuple[nn.Module, nn.Module]:
    """Return models.training_bodies as this run needs them: in bf16, compiled, on N processes."""
    student_body, teacher_body = models.training_bodies(student, teacher, bf16=amp == "bf16")
    if compiled:
        # In place, so that no wrapper renames the weights; dynamic, so once for all image sizes.
        student_body.compile(dynamic=True)
        teacher_body.compile(dynamic=True)
    if distributed.world_size() > 1:
        student_body = DistributedDataParallel(student_body)
        # BatchNorm's statistics are shared at the end of an epoch and not, as by default, in each
        # step. It is no argument above, because torch 2.14 has renamed the argument.
        student_body.broadcast_buffers = False
    return student_body, teacher_body


def report_epoch(
    run: "Run", metrics: evaluate.Metrics, folder: "RunFolder", config: dict[str, Any],
    published: dict[str, Any]
) -> None:
    """Log and record a validated epoch, and save the student if it is the best so far.

    published: evaluate.published_ap's; the published epoch is logged where there is any.
    """
    loss = run.loss_sum / run.step
    box_ap = metrics["bbox"]["AP"]
    before = f", best before {run.best_box_ap:.4f}" if run.best_box_ap > -math.inf else ""
    log(f"epoch {run.epoch}: mean loss {loss:.4e}, box AP {box_ap:.4f}{before}")
    if published:
        published_loss, published_box_ap = PUBLISHED_EPOCHS[config["arch"]][run.epoch]
        log(f"    published: mean loss {published_loss:.4e} (of the first 9,001 steps), box AP "
            f"{published_box_ap or 'no better than before'}")
    is_best = run.is_best(box_ap)
    folder.record({"kind": "epoch", "epoch": run.epoch, "loss": loss, "metrics": metrics,
                   "best": is_best})
    if is_best:
        run.best_box_ap = box_ap
        folder.save(folder.best, run.content(config))


def test(
    student: nn.Module, predictor: Callable[[nn.Module], evaluate.Predict], teacher: nn.Module,
    val: evaluate.ValSet, config: dict[str, Any], device: torch.device, workers: int,
    folder: "RunFolder"
) -> dict[str, evaluate.Metrics]:
    """Load the best checkpoint; log, record and return the metrics of teacher and student."""
    content = distributed.on_main(models.load_checkpoint, folder.best)
    models.load_weights(student.eval(), models.detector_state(content, folder.best), folder.best)
    teacher_metrics, teacher_results = evaluate.evaluate(
        evaluate.whole(teacher), val, device, workers, "test of the teacher")
    student_metrics, student_results = evaluate.evaluate(
        predictor(student), val, device, workers, "test of the student")
    metrics = {
        "teacher": teacher_metrics,
        "student": student_metrics,
        "agreement": evaluate.agreement(val, student_results, teacher_results),
    }
    folder.record({"kind": "test", "metrics": metrics})
    published = evaluate.published_ap(student, config, val)
    log(f"{folder.best}\n{evaluate.metrics_table(metrics, published)}")
    return metrics


# ---- a run and its folder ------------------------------------------------------------------------


@dataclass
class Run:
    """All that training changes: weights, optimizer, schedule, and how far it has come."""

    student: nn.Module
    optimizer: torch.optim.Adam
    scheduler: MultiStepLR
    epoch: int = 0         # that is being trained or validated, counted from 0
    step: int = 0          # steps of this epoch that are done, as of the last record
    loss_sum: float = 0.0  # over these steps
    best_box_ap: float = -math.inf

    def content(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return what a checkpoint holds. Up to "args", these are torchdistill's entries."""
        return {
            "model": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.scheduler.state_dict(),
            "best_value": self.best_box_ap,
            "config": config,
            "args": None,
            "progress": {"epoch": self.epoch, "step": self.step, "loss_sum": self.loss_sum},
        }

    def load(self, content: dict[str, Any], path: Path) -> None:
        """Go on with the run that wrote a checkpoint. Raises InputError for another teacher."""
        state = models.detector_state(content, path)
        # The student's frozen weights are still its teacher's own.
        other = models.other_than_teacher(state, self.student.state_dict())
        if other:
            raise InputError(f"{path} belongs to another teacher, with another {other}; resume "
                             "with the same teacher")
        models.load_weights(self.student, state, path)
        self.optimizer.load_state_dict(content["optimizer"])
        self.scheduler.load_state_dict(content["lr_scheduler"])
        self.epoch = content["progress"]["epoch"]
        self.step = content["progress"]["step"]
        self.loss_sum = content["progress"]["loss_sum"]
        self.best_box_ap = content["best_value"]

    def is_best(self, box_ap: float) -> bool:
        """Return whether a validated epoch's student replaces the best one so far."""
        nothing_to_find = box_ap < 0  # COCO's -1; with nothing to choose by, the newest is taken
        return box_ap > self.best_box_ap or nothing_to_find

    def start_next_epoch(self) -> None:
        """Move on after validation; MultiStepLR counts the epochs by itself."""
        with warnings.catch_warnings():
            # PyTorch warns where the schedule is stepped before the optimizer. That is right here
            # if the run was killed in validation: resumed, it had no step left to train.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            self.scheduler.step()
        self.epoch += 1
        self.step = 0
        self.loss_sum = 0.0


class RunFolder:
    """The folder of one run: its files, and whether they are still this run's.

    best: the checkpoint of best box AP, with torchdistill's name. last: the newest checkpoint.
    metrics: a JSON object a line; if one is repeated after resuming, the last counts.
    log: what was printed, with the time.
    """

    def __init__(self, path: Path, arch: str) -> None:
        self.best = path / f"coco2017-custom_{arch}_resnet_fpn_from_{arch}_resnet50_fpn.pt"
        self.last = path / "last.pt"
        self.metrics = path / "metrics.jsonl"
        self.log = path / "train.log"
        self.is_unused = False  # nothing has been recorded yet but the start of a new run
        self.own_last = None    # file_identity of last.pt as this run loaded or wrote it

    @contextlib.contextmanager
    def claimed(self, start: dict[str, Any], resume: bool) -> Iterator[dict[str, Any] | None]:
        """Claim the folder; give last.pt's content if there is a run to resume, else None.

        A new run with an error before its first step leaves the folder free again.
        """
        try:
            # No name is bound to what is given, or it would stay in memory during the run.
            yield distributed.on_main(self.claim, start, resume)
        except BaseException:
            if self.is_unused:
                self.metrics.unlink(missing_ok=True)
            raise

    def claim(self, start: dict[str, Any], resume: bool) -> dict[str, Any] | None:
        """Write the start record, on the main process; return last.pt's content if it is there.

        Raises InputError if the folder holds another run's checkpoint or, without `resume`, any
        run's checkpoint or records.
        """
        found = [path for path in (self.last, self.best, self.metrics) if os.path.exists(path)]
        if self.best in found and self.last not in found:
            raise InputError(f"{self.best} is there, but no {self.last}, from which its run could "
                             "be resumed; move it away, or give another --output-dir")
        if found and not resume:
            raise self.taken_error(found[0])
        content = None
        if self.last in found:
            content = self.load()

        with writing(self.metrics):
            self.metrics.parent.mkdir(parents=True, exist_ok=True)
            if self.metrics in found:
                cut_half_line(self.metrics)
            else:
                try:
                    self.metrics.open("x").close()
                except FileExistsError:  # another run was faster
                    raise self.taken_error(self.metrics) from None
                self.is_unused = True
        self.record(start)
        return content

    def taken_error(self, path: Path) -> InputError:
        return InputError(f"{path} is there; go on with its run by --resume, or give another "
                          "--output-dir")

    def load(self) -> dict[str, Any]:
        """Return last.pt's content, having checked it and removed what a kill left beside it."""
        self.own_last = file_identity(self.last)  # first: what is written meanwhile is not ours
        content = models.load_checkpoint(self.last)
        if not isinstance(content.get("config"), dict) or "progress" not in content:
            raise InputError(f"{self.last} was not written by this train.py; move it away, or give "
                             "another --output-dir")
        if not self.best.exists():
            content["best_value"] = -math.inf  # so that the next validation writes it
        for path in (self.last, self.best):
            for part in path.parent.glob(models.part_file(path, "*").name):
                process = part.name.rpartition(".")[2]
                if not (process.isdigit() and is_running(int(process))):
                    part.unlink(missing_ok=True)
        return content

    def record(self, record: dict[str, Any]) -> None:
        """Append a record to metrics.jsonl, on the main process."""
        if distributed.rank() > 0:
            return
        self.is_unused = self.is_unused and record["kind"] == "start"
        with writing(self.metrics), self.metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def save(self, path: Path, content: dict[str, Any]) -> None:
        """Write a checkpoint to `last` or `best`, on the main process.

        Raises InputError, and writes nothing, if a weight is not finite, or if last.pt is no longer
        as this run left it: then another run has taken it up.
        """
        if distributed.rank() > 0:
            return
        models.check_finite(content["model"], f"{path} was not written")
        if file_identity(self.last) != self.own_last:
            raise InputError(f"{self.last} was changed by another run; this one stops, and has "
                             "overwritten nothing")
        models.save_checkpoint(content, path)
        if path == self.last:
            self.own_last = file_identity(self.last)


def file_identity(path: Path) -> tuple[int, int] | None:
    """Return what changes whenever a file is replaced or written, or None if there is no file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def is_running(process: int) -> bool:
    """Return whether a process of this number may be running on this machine."""
    if os.name != "posix":
        return True  # elsewhere, asking by os.kill would end it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        pass
    return True


def cut_half_line(path: Path) -> None:
    """Remove what stands after a text file's last line end: a kill has cut it."""
    whole, line_end, _ = path.read_bytes().rpartition(b"\n")
    os.truncate(path, len(whole + line_end))


def check_config(content: dict[str, Any] | None, config: dict[str, Any], path: Path) -> None:
    """Raise InputError if there is a checkpoint to resume, of a run with other settings.

    The number of epochs may change. A field that the file does not have, since it is older than the
    field, has its default there.
    """
    if content is None:
        return
    before = default_config(config["arch"]) | content["config"]
    for name, value in config.items():
        if name not in ("epochs", "is_recipe") and before.get(name) != value:
            raise InputError(f"{path} belongs to a run with {name} {before.get(name)}, not "
                             f"{value}; give the same settings, or another --output-dir")


# ---- the command ---------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a GHND student.", usage="%(prog)s --arch ARCH [flags]")
    parser.add_argument("--arch", choices=EXPERIMENTS, required=True, help="which experiment")
    distributed.add_common_flags(parser)
    parser.add_argument(
        "--output-dir", type=Path, metavar="DIR",
        help="the run's own folder, for its checkpoints and logs (coco/ARCH)")
    parser.add_argument(
        "--resume", action="store_true",
        help="go on from last.pt, or start if there is none: the same command each time")
    parser.add_argument(
        "--save-every", type=distributed.positive, metavar="N", default=SAVE_EVERY,
        help="write last.pt after so many steps, besides after each epoch (%(default)s)")
    parser.add_argument(
        "--log-every", type=distributed.positive, metavar="N", default=LOG_EVERY,
        help="print a line after so many steps (%(default)s)")
    parser.add_argument(
        "--limit-train", type=distributed.positive, metavar="N",
        help="use only the first N images of train2017")
    parser.add_argument(
        "--amp", choices=["bf16"], help="run both bodies in bfloat16, the loss in float32")
    parser.add_argument(
        "--compile", action="store_true", dest="compiled",
        help="fuse both bodies and the loss by torch.compile, which takes minutes at the start")
    add_recipe_flags(parser)
    return parser.parse_args()


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each field of Experiment but arch, with the field's comment as its help."""
    group = parser.add_argument_group("changes to the recipe")
    source = inspect.getsource(Experiment)
    comments = dict(re.findall(r"^    (\w+): .*?# (.+)$", source, re.MULTILINE))
    for field in fields(Experiment)[1:]:
        flag = "--" + field.name.replace("_", "-")
        is_list = isinstance(field.default, tuple)
        values = field.default if is_list else (field.default,)
        group.add_argument(
            flag, type=type(values[0]), nargs="*" if is_list else None, metavar="X",
            help=f"{comments[field.name]} ({' '.join(map(str, values))})")


def main(
    bottleneck: models.MakeBottleneck | None = None,
    criterion: Callable[..., Any] = losses.ghnd_loss,
    predictor: Callable[[nn.Module], evaluate.Predict] = evaluate.whole,
) -> None:
    """Run the command, with another part in place of a default; see run_experiment."""
    settings = vars(parse_args())
    changes = {}
    for field in fields(Experiment):
        value = settings.pop(field.name)
        if value is not None:
            changes[field.name] = tuple(value) if isinstance(value, list) else value
    experiment = replace(EXPERIMENTS[changes["arch"]], **changes)
    if settings["output_dir"] is None:
        settings["output_dir"] = Path("coco", experiment.arch)
    run_experiment(experiment, **settings, bottleneck=bottleneck, criterion=criterion,
                   predictor=predictor)


if __name__ == "__main__":
    distributed.run(main, if_interrupted="stopped; the same command with --resume goes on")
