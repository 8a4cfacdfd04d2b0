"""Train a bottleneck-injected detector by head network distillation, validate it, save it, test it.

    torchrun --nproc_per_node=3 train.py --arch maskrcnn     # any number of GPUs that divides 12
    python train.py --demo                                   # no GPU, no data, no downloads
"""

import argparse
import contextlib
import copy
import fcntl
import json
import math
import os
import resource
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils.data import DataLoader

import data
import distributed
import evaluate
import losses
import models
from distributed import log

# ---- the experiments -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """One row of the results table, with every number of its recipe."""

    arch: str                       # "fasterrcnn" or "maskrcnn", for teacher and student
    bottleneck_channels: int        # channels that cross the split point
    epochs: int
    images_per_step: int            # over all processes and micro-batches together
    images_per_loss: int            # loss and gradient are scaled to as many: a GPU's share in 2020
    lr: float                       # Adam, no weight decay; never scaled by the number of processes
    lr_drops: tuple[int, ...]       # from these epochs on (counted from 0), ...
    lr_drop_factor: float           # ... lr is this many times what it was
    min_size: int                   # pixels, shorter side after resizing
    max_size: int                   # pixels, longer side at most
    seed: int                       # layer1's initial values, the order of the images, the flips
    reported_box_map: float         # the student's AP@[.5:.95] on val2017
    published_loss: tuple[float, ...]  # mean over each epoch's first 9,001 steps
    published_box_map: tuple[float | None, ...]  # after each epoch; None: not better than before


# Both: arXiv 2011.12913, torchdistill's rrpr2020 configurations and the logs beside them.
FASTERRCNN = Experiment(
    arch="fasterrcnn", bottleneck_channels=3, epochs=20, images_per_step=12, images_per_loss=4,
    lr=1e-3, lr_drops=(5, 15), lr_drop_factor=0.1, min_size=800, max_size=1333, seed=0,
    reported_box_map=0.359,
    published_loss=(
        2.337e6, 1.174e6, 1.094e6, 1.054e6, 1.027e6, 0.982e6, 0.975e6, 0.972e6, 0.968e6, 0.967e6,
        0.962e6, 0.961e6, 0.957e6, 0.957e6, 0.954e6, 0.947e6, 0.948e6, 0.946e6, 0.950e6, 0.947e6),
    published_box_map=(
        0.3519, 0.3545, None, 0.3549, 0.3558, 0.3578, 0.3579, None, None, None, None, 0.3586,
        None, None, None, None, None, None, None, None),
)
MASKRCNN = Experiment(
    arch="maskrcnn", bottleneck_channels=3, epochs=20, images_per_step=12, images_per_loss=4,
    lr=1e-3, lr_drops=(5, 15), lr_drop_factor=0.1, min_size=800, max_size=1333, seed=0,
    reported_box_map=0.369,
    published_loss=(
        2.499e6, 1.482e6, 1.392e6, 1.398e6, 1.286e6, 1.256e6, 1.210e6, 1.202e6, 1.195e6, 1.191e6,
        1.184e6, 1.184e6, 1.174e6, 1.174e6, 1.171e6, 1.161e6, 1.161e6, 1.158e6, 1.165e6, 1.159e6),
    published_box_map=(
        0.3601, 0.3659, None, None, None, 0.3684, None, None, 0.3690, None, 0.3691, None,
        None, None, None, None, None, None, None, None),
)
EXPERIMENTS = {"fasterrcnn": FASTERRCNN, "maskrcnn": MASKRCNN}
DEMO_DIR = Path("demo")
TRAINED = ("backbone.body.conv1.", "backbone.body.layer1.")  # keys of all that training changes
FLAGS = ("epochs", "images_per_step", "min_size", "max_size", "seed")  # of an Experiment's fields


def micro_batches(images_per_step: int, world_size: int) -> tuple[int, int]:
    """Split a step: return images in a micro-batch, at most 4, and micro-batches per process.

    Raises argparse.ArgumentError where the processes cannot share the step evenly.
    """
    per_process, rest = divmod(images_per_step, world_size)
    if rest or per_process == 0:
        raise argparse.ArgumentError(None, (
            f"{world_size} processes cannot share {images_per_step} images a step evenly; change "
            "--nproc_per_node, or depart from the published recipe with --images-per-step"))
    micro = max(size for size in (1, 2, 3, 4) if per_process % size == 0)
    return micro, per_process // micro


def build_scheduler(optimizer: torch.optim.Optimizer, experiment: Experiment) -> MultiStepLR:
    """Return the schedule, which is to be stepped once an epoch."""
    return MultiStepLR(optimizer, list(experiment.lr_drops), experiment.lr_drop_factor)


# ---- one epoch -----------------------------------------------------------------------------------


@dataclass
class Position:
    """A place in an epoch, between two steps. All of it is needed to go on as if never stopped."""

    epoch: int              # counted from 0
    step: int = 0           # so many steps are done, ...
    reported: int = 0       # ... and so many steps reported
    loss_sum: float = 0.0   # over the steps reported
    # since then, from this process's micro-batches: errors and energies, (2, layers), on device
    window: list[Tensor] = field(default_factory=list)


def train_epoch(
    experiment: Experiment, distiller: models.Distiller, transform: nn.Module, loader: DataLoader,
    optimizer: torch.optim.Optimizer, position: Position, bf16: bool, log_every: int,
    report: Callable[..., None], pause: Callable[[], None] = lambda: None,
) -> float:
    """Train an epoch from a position on, which moves along, and return the epoch's mean loss.

    transform: the detector's own GeneralizedRCNNTransform. loader: lists of uint8 (3, h, w) images.
    report: called every log_every steps. pause: called after each step.
    Raises FloatingPointError, on all processes alike, when the loss is no longer finite.
    """
    device, stem = next(distiller.parameters()).device, distiller.student_stem
    world_size, micro_batch = distributed.world_size(), loader.batch_sampler.batch_size
    accumulation = experiment.images_per_step // (world_size * micro_batch)
    steps = len(loader) // accumulation
    # the loss of a step is (sum over its 12 images) / 3, and DDP averages over the processes
    scale = experiment.images_per_loss / experiment.images_per_step
    position.window = [terms.to(device) for terms in position.window]
    waited, first = 0.0, position.step
    begin = window_begin = time.perf_counter()
    stem.train()
    loader.batch_sampler.epoch, loader.batch_sampler.start = position.epoch, first * accumulation
    batches = iter(loader)
    for step in range(first + 1, steps + 1):
        optimizer.zero_grad(set_to_none=True)
        for micro_step in range(1, accumulation + 1):
            asked = time.perf_counter()
            images = next(batches)
            waited += time.perf_counter() - asked
            images = [image.to(device, non_blocking=True) / 255 for image in images]
            batch = transform(images)[0].tensors  # (B, 3, H, W): normalised, resized, padded, once
            batch = batch.contiguous(memory_format=torch.channels_last)
            syncs = world_size == 1 or micro_step == accumulation
            with contextlib.nullcontext() if syncs else stem.no_sync():
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    student_maps, teacher_maps = distiller(batch)
                loss, errors = losses.ghnd_loss(student_maps, teacher_maps)  # errors: (layers,)
                (loss * scale * world_size).backward()
            position.window.append(torch.stack([errors, losses.energies(teacher_maps)]))
        optimizer.step()
        position.step = step
        if step % log_every == 0 or step == steps:  # the only place that waits for the device
            check_finite(position, accumulation, loader, optimizer)
            errors, energies = distributed.total(torch.stack(position.window).cpu().double().sum(0))
            loss = errors.sum().item() * scale / (step - position.reported)
            now = time.perf_counter()
            seconds = (now - window_begin) / (step - max(first, position.reported))
            report(kind="step", epoch=position.epoch, step=step, steps=steps, loss=loss,
                   relative_errors=(errors / energies).tolist(), lr=optimizer.param_groups[0]["lr"],
                   images_per_second=experiment.images_per_step / seconds,
                   data_wait=waited / (now - window_begin), peak_memory_mib=peak_memory_mib(device),
                   eta_seconds=((experiment.epochs - position.epoch) * steps - step)
                   * (now - begin) / (step - first))
            position.loss_sum += loss * (step - position.reported)
            position.reported, position.window, waited, window_begin = step, [], 0.0, now
        pause()
    return position.loss_sum / steps


def check_finite(
    position: Position, accumulation: int, loader: DataLoader, optimizer: torch.optim.Optimizer
) -> None:
    """Raise FloatingPointError, on all processes alike, unless losses and weights are finite.

    It looks at the losses not yet reported, and names the images of the first batch to blame.
    """
    distributed.barrier()  # finds out who died, where the GPU's queue would wait for them
    group, sound = optimizer.param_groups[0], []
    if position.window:
        sound = torch.stack(position.window)[:, 0].isfinite().all(1).tolist()
    sound.append(all(weight.isfinite().all() for weight in group["params"]))
    blamed = None
    if not all(sound):
        back = max(1, len(position.window) - sound.index(False))  # 1: the latest batch
        number = position.step * accumulation - back
        loader.batch_sampler.start = number
        folder, names = loader.dataset.folder, loader.dataset.names
        files = [str(folder / names[image]) for image, _ in next(iter(loader.batch_sampler))]
        terms = position.window[-back][0].tolist() if position.window else []
        blamed = number, (
            f"the {'weights are' if all(sound[:-1]) else 'loss is'} no longer finite at epoch "
            f"{position.epoch}, step {1 + number // accumulation}, lr {group['lr']:.0e}; "
            "terms of the loss: "
            + ", ".join(f"{name} {t:.3e}" for name, t in zip(models.DISTILLED, terms))
            + f"; images: {' '.join(files)}; the checkpoints on disk are from before")
    everyone = [blamed for blamed in distributed.gather(blamed) if blamed]
    if everyone:
        raise FloatingPointError(min(everyone)[1])


def peak_memory_mib(device: torch.device) -> float:
    """Return the most memory used so far, in MiB: the GPU's or, on the CPU, this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# ---- files of a run ------------------------------------------------------------------------------


@dataclass
class Progress:
    """How far a run has come, in whole epochs; stored in its checkpoints."""

    train_images: int         # how many images an epoch is drawn from, ...
    val_images: int           # ... and how many the best one is chosen by
    epoch: int = -1           # the last one trained whole, counted from 0
    validated: bool = True    # and whether it has been validated
    mean_loss: float = math.nan    # of that epoch
    best_value: float = -math.inf  # the best box mAP so far


def save_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint that is never torn: distributed.replacing and torch.save."""
    with distributed.replacing(path) as file:
        torch.save(content, file)


def interned(content: Any) -> Any:
    """Make equal strings of a loaded checkpoint one object, as they were when it was written.

    A pickle tells them apart, and a resumed run shall write the same bytes.
    """
    if isinstance(content, dict):
        return type(content)({interned(key): interned(value) for key, value in content.items()})
    if isinstance(content, list):
        return list(map(interned, content))
    return sys.intern(content) if isinstance(content, str) else content


class Files:
    """The best checkpoint and, in a folder beside it, last.pt, metrics.jsonl and train.log."""

    def __init__(self, output_dir: Path, arch: str) -> None:
        name = f"coco2017-custom_{arch}_resnet_fpn_from_{arch}_resnet50_fpn.pt"  # torchdistill's
        self.best = output_dir / name
        self.folder = output_dir / arch
        self.last, self.metrics = self.folder / "last.pt", self.folder / "metrics.jsonl"

    def claim(self, resume: bool, overwrite: bool) -> dict[str, Any] | None:
        """Check that the files can be written; return last.pt's content if there is one to resume.

        On the main process only: the others may not even see the folder.
        Raises FileExistsError rather than let a run overwrite a checkpoint that it did not write,
        or what another run is writing.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            folder = self.folder.parent
            raise OSError(f"--output-dir {folder} cannot be written: {error}") from error
        self.lock = (self.folder / "train.log").open("a")
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which ends with this process
        except (BlockingIOError, PermissionError) as error:
            raise FileExistsError(f"{self.folder} is being written by another run; wait for its "
                                  "end or name another folder by --output-dir") from error
        except OSError:  # a file system without locks
            pass
        for path in (self.last, self.best, self.metrics):
            distributed.remove_leftovers(path)
        last = None
        if resume and self.last.exists():
            last = interned(models.load_checkpoint(self.last))
        for path in (self.last, self.best) if last is None else (self.best,):
            if path.exists() and (
                    last is None or recipe(models.load_checkpoint(path)) != recipe(last)):
                if not overwrite:
                    raise FileExistsError(
                        f"{path} exists and this run did not write it; --resume continues a run "
                        "from its last.pt, --output-dir names another folder, --overwrite replaces "
                        "the file")
                if last is not None:
                    path.unlink()  # lest it be tested as this run's
        if last is not None and not self.best.exists():
            with contextlib.suppress(KeyError, TypeError):  # told by check_resumable
                last["progress"]["best_value"] = -math.inf
        return last

    def report(self, **values: Any) -> None:
        """Append one record to metrics.jsonl, and log a line on it if it is a training step's."""
        if values["kind"] == "step":
            log("epoch {epoch} step {step}/{steps} loss {loss:.4e} relative errors {errors} "
                "lr {lr:.0e} {images_per_second:.1f} img/s, data wait {data_wait:.0%}, "
                "{peak_memory_mib:.0f} MiB, ETA {eta}".format(
                    **values, eta=timedelta(seconds=round(values["eta_seconds"])),
                    errors=" ".join(f"{e:.4f}" for e in values["relative_errors"])))
        if distributed.is_main():
            try:
                with self.metrics.open("a") as file:
                    file.write(json.dumps(values) + "\n")
            except OSError as error:
                raise OSError(f"{self.metrics} cannot be written: {error}") from error

    def start_afresh(self) -> None:
        """Remove what --overwrite gives up, lest a later --resume continue the old run."""
        for path in (self.last, self.best, self.metrics):
            path.unlink(missing_ok=True)

    def trim_metrics(self, progress: Progress, position: Position) -> None:
        """Drop from metrics.jsonl what is about to be repeated, and a line torn by a crash."""
        done = {"step": lambda r: (r["epoch"], r["step"]) <= (position.epoch, position.reported),
                "epoch": lambda r: r["epoch"] < progress.epoch + progress.validated,
                "test": lambda r: False}
        lines = self.metrics.read_text().splitlines() if self.metrics.exists() else []
        with distributed.replacing(self.metrics) as file:
            for line in lines:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    record = json.loads(line)
                    if done[record["kind"]](record):
                        file.write(line.encode() + b"\n")


def recipe(content: dict[str, Any]) -> dict[str, Any] | None:
    """Return a checkpoint's experiment but for the number of epochs, which may grow on resuming."""
    config = content.get("config")
    return {**config, "epochs": None} if isinstance(config, dict) else None


def check_resumable(
    last: dict[str, Any], path: Path, experiment: Experiment, progress: Progress, student: nn.Module
) -> None:
    """Raise ValueError unless last.pt is of this experiment, teacher and number of images."""
    counts = ("train_images", "val_images")
    now = recipe({"config": asdict(experiment)}) | {n: getattr(progress, n) for n in counts}
    try:
        before = recipe(last) | {n: last["progress"][n] for n in counts}
        changed = [f"{key} {before[key]}, not {now[key]}" for key in now if before[key] != now[key]]
        if changed:
            raise ValueError(f"{path} belongs to another experiment, with {', '.join(changed)}; "
                             "give it those settings, or another --output-dir")
        for key, value in student.state_dict().items():
            if not key.startswith(TRAINED) and not torch.equal(value.cpu(), last["model"][key]):
                raise ValueError(f"{path} belongs to another teacher, whose {key} differs; resume "
                                 "with the same --teacher-ckpt")
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} was not written by this train.py ({error})") from error


def restore(
    last: dict[str, Any], path: Path, student: nn.Module, optimizer: torch.optim.Optimizer,
    scheduler: MultiStepLR,
) -> tuple[Progress, Position, dict[str, Any] | None]:
    """Load last.pt's content; return how far it is, where, and what its epoch started from.

    Within an epoch each process has its own share, which another number of processes cannot take
    over: they start that epoch again.
    """
    try:
        inside, epoch_start = last["position"], last["epoch_start"]
        position = Position(last["progress"]["epoch"] + 1)
        if inside is not None and len(inside["window"]) == distributed.world_size():
            position = Position(**inside | {"window": inside["window"][distributed.rank()]})
        elif inside is not None:
            log(f"{path} was written by {len(inside['window'])} processes within epoch "
                f"{position.epoch}, which {distributed.world_size()} cannot take over: starting "
                "that epoch again")
            last = last | epoch_start | {"model": last["model"] | epoch_start["model"]}
        models.load_weights(student, models.detector_state(last, path), path)
        optimizer.load_state_dict(copy.deepcopy(last["optimizer"]))  # it would keep the tensors
        scheduler.load_state_dict(last["lr_scheduler"])
        return Progress(**last["progress"]), position, epoch_start
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} was not written by this train.py ({error})") from error


# ---- the run -------------------------------------------------------------------------------------


def validate(
    student: nn.Module, val: evaluate.ValSet, args: argparse.Namespace, experiment: Experiment,
    progress: Progress, report: Callable[..., None],
) -> bool:
    """Validate an epoch, update the progress, tell how it went; return whether it is the best."""
    title = f"validation of epoch {progress.epoch}"
    figures = evaluate.evaluate(student, val, args.device, args.workers, title)
    box_map = figures["bbox"][0]
    best = box_map > progress.best_value
    progress.best_value, progress.validated = max(box_map, progress.best_value), True
    log(f"epoch {progress.epoch}: mean loss {progress.mean_loss:.4e}, "
        + ", ".join(f"{kind} mAP {values[0]:.4f}" for kind, values in figures.items())
        + (", the best so far" if best else f", best so far {progress.best_value:.4f}"))
    full_recipe = replace(experiment, seed=0) == replace(EXPERIMENTS[experiment.arch], seed=0)
    if (full_recipe and not args.limit_train and not args.limit_val
            and progress.epoch < len(experiment.published_loss)):
        loss = experiment.published_loss[progress.epoch]
        published = experiment.published_box_map[progress.epoch]
        log(f"    published: mean loss {loss:.4e} (of the first 9,001 steps), bbox mAP "
            + (f"{published:.4f}" if published else "no better than before")
            + f"; reported in the end {experiment.reported_box_map}")
    report(kind="epoch", epoch=progress.epoch, loss=progress.mean_loss, figures=figures, best=best)
    return best


def parse_args() -> argparse.Namespace:
    parser = distributed.Parser(description="Train a student by head network distillation.")
    parser.add_argument("--arch", choices=EXPERIMENTS,
                        help="which experiment; needed unless --demo")
    parser.add_argument("--demo", action="store_true",
                        help=f"a small run on drawn images and a random teacher, below {DEMO_DIR}/")
    evaluate.add_common_flags(parser)
    parser.add_argument("--output-dir", type=data.path, default=Path("coco/ghnd"), metavar="DIR",
                        help="for the best checkpoint; below it, last.pt and logs (%(default)s)")
    parser.add_argument("--resume", action="store_true",
                        help="continue from last.pt, if there is one")
    parser.add_argument("--save-every-minutes", type=float, default=30, metavar="MIN",
                        help="write last.pt within an epoch too (%(default)s)")
    parser.add_argument("--overwrite", action="store_true",
                        help="replace checkpoints of other runs")
    parser.add_argument("--amp", choices=["bf16"],
                        help="run the networks in bfloat16, the loss in float32")
    parser.add_argument("--seed", type=evaluate.natural, metavar="N",
                        help="instead of the experiment's, as the next two")
    parser.add_argument("--epochs", type=evaluate.positive, metavar="N")
    parser.add_argument("--images-per-step", type=evaluate.positive, metavar="N",
                        help="over all processes together")
    parser.add_argument("--limit-train", type=evaluate.positive, metavar="N",
                        help="only the first N images of train2017")
    parser.add_argument("--log-every", type=evaluate.positive, default=100, metavar="STEPS")
    known = parser.parse_known_args()[0]
    experiment = EXPERIMENTS[known.arch or "fasterrcnn"]
    parser.set_defaults(**{flag: getattr(experiment, flag) for flag in FLAGS})
    if known.demo:
        parser.set_defaults(arch="fasterrcnn", data_dir=DEMO_DIR / "coco", output_dir=DEMO_DIR,
                            min_size=128, max_size=224, epochs=5, log_every=1, workers=1)
    args = parser.parse_args()
    if args.arch is None:
        parser.error("--arch fasterrcnn or --arch maskrcnn is needed")
    if args.demo:
        args.overwrite |= args.output_dir == DEMO_DIR  # which is made for being overwritten
    return args


def prepare_demo(args: argparse.Namespace) -> None:
    """Draw the demo's images and make its teacher, if an earlier demo has not done it."""
    drawn = (args.data_dir / "annotations" / "instances_val2017.json").exists()  # the last file
    if distributed.is_main() and not drawn:
        if args.data_dir != DEMO_DIR / "coco" and (args.data_dir / "train2017").exists():
            raise ValueError(f"--demo would draw into {args.data_dir}, which holds images already")
        data.write_demo_dataset(args.data_dir)
    if args.teacher_ckpt is None:
        args.teacher_ckpt = args.output_dir / f"teacher_{args.arch}.pt"
    if distributed.is_main() and not args.teacher_ckpt.exists():
        folder = args.data_dir / "train2017"
        images = [data.read_image(path) / 255 for path in sorted(folder.iterdir())[:8]]
        teacher = models.random_teacher(args.arch, images, 0, args.min_size, args.max_size)
        save_checkpoint(teacher.state_dict(), args.teacher_ckpt)
    distributed.barrier()


def tell_demo(args: argparse.Namespace, files: Files) -> None:
    """Say how far loss and relative errors went from the demo's first epoch to its last."""
    records = [json.loads(line) for line in files.metrics.read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "step"]
    first, last = (
        torch.tensor([[r["loss"], *r["relative_errors"]] for r in steps if r["epoch"] == epoch])
        .mean(0).tolist() for epoch in (0, steps[-1]["epoch"]))
    log("demo: from the first to the last epoch, the mean loss went "
        f"from {first[0]:.3e} to {last[0]:.3e}, the relative error of "
        + ", ".join(f"{name} from {a:.3f} to {b:.3f}"
                    for name, a, b in zip(models.DISTILLED, first[1:], last[1:], strict=True)))
    fell = all(a > b for a, b in zip(first, last))
    log("demo: " + ("all fell: the student learns the teacher's features, from images alone"
                    if fell else "not all fell, which takes a few epochs")
        + ". mAP means nothing here, since this teacher is random.\n"
        "demo: evaluate the checkpoint with\n"
        f"    python evaluate.py --ckpt {files.best} --teacher --teacher-ckpt {args.teacher_ckpt} "
        f"--data-dir {args.data_dir} --min-size {args.min_size} --max-size {args.max_size}")


def command_to_continue() -> str:
    """Return the command line of this run with --resume."""
    local, everywhere = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("WORLD_SIZE")
    launcher = ["python"] if local is None else ["torchrun", f"--nproc_per_node={local}"]
    if local != everywhere:
        launcher.append("...")  # what joins several machines is known to its caller alone
    flags = [flag for flag in sys.argv[1:] if flag not in ("--resume", "--overwrite")]
    return " ".join(launcher) + " " + shlex.join([sys.argv[0], *flags, "--resume"])


def main() -> None:
    args = parse_args()
    args.device = device = distributed.start(args.device)
    experiment = replace(EXPERIMENTS[args.arch], **{flag: getattr(args, flag) for flag in FLAGS})
    micro_batch, accumulation = micro_batches(experiment.images_per_step, distributed.world_size())
    files = Files(args.output_dir, args.arch)
    last = files.claim(args.resume, args.overwrite) if distributed.is_main() else None
    last = distributed.broadcast(last)
    distributed.log_to(files.folder / "train.log")
    if args.demo:
        prepare_demo(args)

    # data
    index, folder = data.load_split(args.data_dir, "train", args.limit_train)
    if len(index) < experiment.images_per_step:
        raise ValueError(
            f"there are {len(index)} images to train on, fewer than one step's "
            f"{experiment.images_per_step}: see {folder}, --limit-train, --images-per-step")
    batches = data.GroupedBatches(
        index, micro_batch, distributed.rank(), distributed.world_size(), experiment.seed)
    loader = data.train_loader(
        data.CocoImages(index, folder), batches, args.workers, pin=device.type == "cuda")
    val = evaluate.ValSet(args.data_dir, args.limit_val)

    # teacher, student, optimizer
    with distributed.main_first():
        teacher = models.load_teacher(args.arch, args.teacher_ckpt, args.min_size, args.max_size)
    models.place(teacher, device)
    torch.manual_seed(experiment.seed)
    student = models.place(models.build_student(teacher, experiment.bottleneck_channels), device)
    distiller = models.Distiller(teacher, student)
    stem = distiller.student_stem
    optimizer = torch.optim.Adam(
        [p for p in stem.parameters() if p.requires_grad], lr=experiment.lr)
    scheduler = build_scheduler(optimizer, experiment)

    # what an earlier run has reached, for --resume
    progress, position, epoch_start = Progress(len(index), len(val.index)), Position(0), None
    if last is not None:
        check_resumable(last, files.last, experiment, progress, student)
        progress, position, epoch_start = restore(
            last, files.last, student, optimizer, scheduler)
        log(f"resuming at epoch {position.epoch} after step {position.step}, "
            f"best box mAP so far {progress.best_value:.4f}")
    if distributed.is_main():
        files.trim_metrics(progress, position) if last else files.start_afresh()
    del last  # its weights
    distributed.advise(f"; it can be continued with\n    {command_to_continue()}")
    if distributed.world_size() > 1:
        distiller.student_stem = DistributedDataParallel(
            stem, device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True)
        # once an epoch is enough, see below; the constructor's argument of this name is deprecated
        distiller.student_stem.broadcast_buffers = False
        # DDP lays out its buckets anew after its first pass, and what three processes add up
        # depends on that in the last bit: pass once before the first step, new run or resumed
        distiller.student_stem(torch.zeros(1, 3, 32, 32, device=device)).sum().backward()
    log(f"{args.arch}: {len(index)} training images, {len(batches) // accumulation} steps an epoch "
        f"of {distributed.world_size()} processes x {accumulation} x {micro_batch} images; "
        f"{len(val.index)} validation images; on {device.type}")

    def save(path: Path, position: Position | None = None) -> None:
        inside = None
        if position is not None:  # every process has a window of its own
            check_finite(position, accumulation, loader, optimizer)
            inside = vars(position) | {
                "window": distributed.gather([terms.cpu() for terms in position.window])}
        if distributed.is_main():  # torchdistill's entries, then ours
            save_checkpoint({
                "model": student.state_dict(), "optimizer": optimizer.state_dict(),
                "lr_scheduler": scheduler.state_dict(), "best_value": progress.best_value,
                "config": asdict(experiment), "args": None, "progress": asdict(progress),
                "position": inside, "epoch_start": epoch_start if inside else None}, path)
        distributed.barrier()  # so that no process goes on as if it were written

    def finish_epoch() -> None:
        if validate(student, val, args, experiment, progress, files.report):
            save(files.best)
        save(files.last)

    def pause() -> None:
        nonlocal saved_at
        due = time.monotonic() - saved_at >= 60 * args.save_every_minutes
        due, interrupted = distributed.poll(due)
        if due or interrupted:
            save(files.last, position)
            saved_at = time.monotonic()
        if interrupted:
            raise distributed.Interrupted(interrupted)

    if not progress.validated:
        finish_epoch()
    while position.epoch < experiment.epochs:
        saved_at = time.monotonic()
        epoch_start = epoch_start or copy.deepcopy({
            "model": {k: v for k, v in student.state_dict().items() if k.startswith(TRAINED)},
            "optimizer": optimizer.state_dict(), "lr_scheduler": scheduler.state_dict()})
        with distributed.signals_deferred():
            progress.mean_loss = train_epoch(
                experiment, distiller, teacher.transform, loader, optimizer, position,
                args.amp == "bf16", args.log_every, files.report, pause)
            scheduler.step()
            distributed.broadcast_buffers(stem)
            progress.epoch, progress.validated = position.epoch, False
            position, epoch_start = Position(position.epoch + 1), None
            save(files.last)  # so that a crash while validating does not cost the epoch
        finish_epoch()

    best = distributed.broadcast(
        models.load_checkpoint(files.best) if distributed.is_main() else None)
    models.load_weights(student, models.detector_state(best, files.best), files.best)
    figures = {who: evaluate.evaluate(detector, val, device, args.workers, f"test of the {who}")
               for who, detector in (("teacher", teacher), ("student", student))}
    files.report(kind="test", epoch=progress.epoch, figures=figures)
    log(f"{files.best}\n{evaluate.table(figures, args.arch)}")
    if args.demo and distributed.is_main():
        tell_demo(args, files)


if __name__ == "__main__":
    with distributed.session():
        main()
