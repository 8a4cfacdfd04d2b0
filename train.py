"""Train a student by Generalized Head Network Distillation; validate, save and test it.

    torchrun --nproc_per_node=3 train.py --arch maskrcnn

runs one of the two published experiments on any number of GPUs that divides 12. From Python,
run_experiment does the same with any Experiment.
"""

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils.data import DataLoader

import data
import distributed
import evaluate
import losses
import models
from distributed import InputError, log

# ---- the recipe ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """One row of the results table, with every number that its training depends on."""

    arch: str                            # "fasterrcnn" or "maskrcnn"
    bottleneck_channels: int = 3         # channels that are sent
    layer_weights: tuple[float, ...] = (1, 1, 1, 1)  # of the loss's terms; HND is (1, 0, 0, 0)
    epochs: int = 20
    images_per_step: int = 12            # over all processes and micro-batches together
    reference_batch: int = 4             # images that the loss is scaled to, as on a GPU of 2020
    lr: float = 1e-3                     # Adam, for any number of processes; no weight decay
    lr_drops: tuple[int, ...] = (5, 15)  # epochs, counted from 0, at whose start lr is ...
    lr_drop_factor: float = 0.1          # ... multiplied by this
    min_size: int = 800                  # pixels: shorter side after resizing
    max_size: int = 1333                 # pixels: longer side at most, which may shrink the shorter
    seed: int = 0                        # of layer1's initial values, the images' order, the flips


FASTERRCNN = Experiment("fasterrcnn")
MASKRCNN = Experiment("maskrcnn")
EXPERIMENTS = {"fasterrcnn": FASTERRCNN, "maskrcnn": MASKRCNN}

# The published runs, epoch by epoch: the mean loss, and the box AP where it was better than in all
# epochs before. The loss is the mean of an epoch's first 9,001 steps, the last that the logs give.
# Source: the logs beside torchdistill's rrpr2020 configurations (arXiv 2011.12913).
PUBLISHED = {
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
                         "evenly; change --nproc_per_node or --images-per-step")
    micro_batch = max(size for size in (1, 2, 3, 4) if share % size == 0)
    return micro_batch, share // micro_batch


# ---- what a checkpoint holds ---------------------------------------------------------------------


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

    def save(self, path: Path, config: dict[str, Any]) -> None:
        """Write a checkpoint, on the main process. Raises InputError, and writes nothing, if a
        weight is not finite."""
        if distributed.rank() > 0:
            return
        weights = self.student.state_dict()
        models.check_finite(weights, path)
        progress = {"epoch": self.epoch, "step": self.step, "loss_sum": self.loss_sum,
                    "best_box_map": self.best_box_ap}
        models.save_checkpoint({
            "model": weights,  # from here to "args": the entries of torchdistill's files
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.scheduler.state_dict(),
            "best_value": self.best_box_ap,
            "config": config,
            "args": None,
            "progress": progress,
        }, path)

    def load(self, content: dict[str, Any], path: Path) -> None:
        """Take up the run whose checkpoint this is. Raises InputError if the teacher is another."""
        state = models.detector_state(content, path)
        trained = {name for name, p in self.student.named_parameters() if p.requires_grad}
        for name, value in self.student.state_dict().items():
            # Training also changes layer1's BatchNorm buffers, which are no parameters.
            is_frozen = name not in trained and not name.startswith("backbone.body.layer1.")
            if is_frozen and name in state and not torch.equal(value.cpu(), state[name]):
                raise InputError(f"{path} belongs to another teacher, with another {name}; resume "
                                 "with the same --teacher-ckpt")
        models.load_weights(self.student, state, path)
        self.optimizer.load_state_dict(content["optimizer"])
        self.scheduler.load_state_dict(content["lr_scheduler"])
        self.epoch = content["progress"]["epoch"]
        self.step = content["progress"]["step"]
        self.loss_sum = content["progress"]["loss_sum"]
        self.best_box_ap = content["best_value"]

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


class Files(NamedTuple):
    """The files of a run."""

    best: Path     # the checkpoint of best box AP, with torchdistill's name
    last: Path     # the newest checkpoint
    metrics: Path  # a JSON object a line; if one is repeated after resuming, the last counts
    log: Path      # what was printed


def name_files(output_dir: Path, arch: str) -> Files:
    """Return where a run's files are."""
    folder = output_dir / arch
    return Files(
        best=output_dir / f"coco2017-custom_{arch}_resnet_fpn_from_{arch}_resnet50_fpn.pt",
        last=folder / "last.pt",
        metrics=folder / "metrics.jsonl",
        log=folder / "train.log",
    )


def open_output(files: Files, config: dict[str, Any], resume: bool) -> dict[str, Any] | None:
    """Make a run's folder; return last.pt's content if there is a run to resume, else None.

    Raises InputError if the folder holds a checkpoint of another run or, without `resume`, anything
    of any: a new run's records would be appended to the old one's.
    """
    try:
        files.last.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output-dir {files.best.parent}: {error}") from error
    found = [path for path in (files.last, files.best, files.metrics) if path.exists()]
    if found and not resume:
        raise InputError(f"{found[0]} is there; go on with its run by --resume, or give another "
                         "--output-dir")
    checkpoints = [path for path in found if path != files.metrics]
    if not checkpoints:
        return None
    if not files.last.exists():
        raise InputError(f"{files.best} is there, but no {files.last}, from which its run could be "
                         "resumed; move it away, or give another --output-dir")
    contents = {path: models.load_checkpoint(path) for path in checkpoints}
    for path, content in contents.items():
        check_config(content, config, path)
    for path in (files.last, files.best):
        for part in path.parent.glob(f".{path.name}.*"):  # left by a kill amid save_checkpoint
            part.unlink()
    last = contents[files.last]
    if not files.best.exists():
        last["best_value"] = -math.inf  # so that the next validation writes it
    return last


def check_config(content: dict[str, Any], config: dict[str, Any], path: Path) -> None:
    """Raise InputError if a checkpoint is of a run with other settings, but for its epochs."""
    before = content.get("config")
    if not isinstance(before, dict) or "progress" not in content:
        raise InputError(f"{path} is not of a run of this train.py; move it away, or give another "
                         "--output-dir")
    for key, value in config.items():
        if key != "epochs" and before.get(key) != value:
            raise InputError(f"{path} belongs to a run with {key} {before.get(key)}, not {value}; "
                             "give it the same settings, or another --output-dir")


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Append a record to metrics.jsonl, on the main process."""
    if distributed.rank() == 0:
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")


# ---- one epoch -----------------------------------------------------------------------------------


def train_epoch(
    experiment: Experiment,
    run: Run,
    student_body: nn.Module,
    teacher_body: nn.Module,
    transform: nn.Module,
    loader: DataLoader,
    report: Callable[[dict[str, Any]], None],
    save: Callable[[], None],
    amp: str | None = None,
    compiled: bool = False,
    log_every: int = 100,
    save_every: int = 2000,
) -> None:
    """Train to the end of run.epoch, from run.step on.

    student_body, teacher_body: models.training_bodies; the former may be wrapped for DDP.
    transform: the detector's. loader: data.train_loader's.
    save: writes last.pt, every save_every steps and at the end. report: takes a record every
        log_every steps and before each save. When either is called, run says how far training has
        come.
    amp: "bf16" to run both bodies under autocast.
    compiled: whether to run the loss through torch.compile; the caller does so with the bodies.
    Raises FloatingPointError, on every process, if the loss is no longer finite.
    """
    device = next(student_body.parameters()).device
    layout = models.memory_format(device)
    processes = distributed.world_size()
    accumulation = experiment.images_per_step // (processes * loader.batch_sampler.batch_size)
    steps = len(loader) // accumulation
    # In 2020 each of 3 GPUs summed the errors of 4 images, and gradients were averaged over the
    # GPUs. So a step's loss and gradient are those of (sum over its 12 images) * 4 / 12.
    loss_scale = experiment.reference_batch / experiment.images_per_step

    ghnd_loss, squared_norms = losses.ghnd_loss, losses.squared_norms
    if compiled:
        ghnd_loss = torch.compile(ghnd_loss, dynamic=True)
        squared_norms = torch.compile(squared_norms, dynamic=True)

    loader.batch_sampler.epoch = run.epoch
    loader.batch_sampler.first_batch = run.step * accumulation
    batches = data.iterate(loader)
    sums = torch.zeros(  # squared errors; squared norms of the teacher's maps
        2, len(experiment.layer_weights), dtype=torch.float64, device=device)
    waited, begin = 0.0, time.perf_counter()
    student_body.train()
    for step in range(run.step + 1, steps + 1):
        run.optimizer.zero_grad()
        for micro_step in range(1, accumulation + 1):
            asked = time.perf_counter()
            images = next(batches)                # each uint8 (3, h, w)
            waited += time.perf_counter() - asked

            images = [image.to(device, non_blocking=True) / 255 for image in images]
            batch = transform(images)[0].tensors  # (B, 3, H, W): normalised, resized, padded
            batch = batch.contiguous(memory_format=layout)

            is_last = micro_step == accumulation
            with distributed.sync_only_at_the_last(is_last, student_body):
                with torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16"):
                    with torch.no_grad():
                        teacher_maps = list(teacher_body(batch).values())
                    student_maps = list(student_body(batch).values())
                loss, errors = ghnd_loss(student_maps, teacher_maps, experiment.layer_weights)
                # Times the processes, because DistributedDataParallel averages over them.
                (loss * loss_scale * processes).backward()

            sums += torch.stack([errors, squared_norms(teacher_maps)])
            del student_maps, teacher_maps  # or they would stay until the next batch has its own
        run.optimizer.step()

        is_saved = step % save_every == 0 or step == steps
        if is_saved or step % log_every == 0:
            # The only place in the loop that waits for the device.
            errors, norms = distributed.sum_over_processes(sums)
            count = step - run.step  # steps since the last record
            layer_weights = errors.new_tensor(experiment.layer_weights)
            mean_loss = (layer_weights @ errors).item() * loss_scale / count
            if not math.isfinite(mean_loss):
                raise FloatingPointError(f"the loss is {mean_loss} between steps {run.step} and "
                                         f"{step} of epoch {run.epoch}")
            run.step = step
            run.loss_sum += mean_loss * count
            seconds = (time.perf_counter() - begin) / count
            report({
                "kind": "step",
                "epoch": run.epoch,
                "step": step,
                "steps": steps,
                "loss": mean_loss,
                "relative_errors": (errors / norms).tolist(),
                "lr": run.optimizer.param_groups[0]["lr"],
                "images_per_second": experiment.images_per_step / seconds,
                "data_wait": waited / count / seconds,  # share of the time
                "gpu_memory_mib": torch.cuda.max_memory_allocated() / 2**20,
                # Of training alone, without validation.
                "hours_left": seconds / 3600 * (steps * (experiment.epochs - run.epoch) - step),
            })
            if is_saved:
                save()
            sums.zero_()
            waited, begin = 0.0, time.perf_counter()


def describe_step(record: dict[str, Any]) -> str:
    """Return a line of progress for a record of train_epoch."""
    relative_errors = " ".join(f"{error:.3f}" for error in record["relative_errors"])
    return (
        f"epoch {record['epoch']} step {record['step']}/{record['steps']} "
        f"loss {record['loss']:.4e} relative errors {relative_errors} lr {record['lr']:.0e} "
        f"{record['images_per_second']:.1f} img/s, data wait {record['data_wait']:.0%}, "
        f"{record['gpu_memory_mib']:.0f} MiB, {record['hours_left']:.1f} h left")


# ---- the run -------------------------------------------------------------------------------------


def run_experiment(
    experiment: Experiment,
    *,
    data_dir: Path,
    output_dir: Path,
    teacher_ckpt: Path | None = None,
    teacher_eps: float = 0.0,
    resume: bool = False,
    amp: str | None = None,
    compiled: bool = False,
    device: str = "auto",
    workers: int = 4,
    limit_train: int | None = None,
    limit_val: int | None = None,
    log_every: int = 100,
    save_every: int = 2000,
) -> dict[str, evaluate.Metrics]:
    """Train, validate and save a student; return the metrics of teacher, student and agreement.

    The settings are those of the command line. After each epoch the student is validated, and the
    best checkpoint is written if its box AP is the best so far; the test at the end is of that.
    """
    device = distributed.set_up(device)
    if amp == "bf16" and not models.has_bf16(device):
        raise InputError(f"--amp bf16: this {device.type} has no bfloat16; leave the flag out",
                         on_all_processes=True)
    # On the main process, so that an error is told once.
    micro_batch, accumulation = distributed.on_main(
        share_step, experiment.images_per_step, distributed.world_size())

    images, folder = data.load_train_split(data_dir, experiment.max_size, limit_train)
    if len(images) < experiment.images_per_step:
        raise InputError(f"{len(images)} images to train on are fewer than one step's "
                         f"{experiment.images_per_step}: see --limit-train, --images-per-step",
                         on_all_processes=True)
    loader = data.train_loader(images, folder, micro_batch, experiment.seed, workers, device)
    teacher = distributed.on_main(
        models.load_teacher, experiment.arch, teacher_ckpt, experiment.min_size,
        experiment.max_size, teacher_eps)
    val = evaluate.ValSet(data_dir, teacher, limit_val)

    files = name_files(output_dir, experiment.arch)
    config = asdict(experiment) | {
        "amp": amp, "train_images": len(images), "val_images": len(val.images)}
    checkpoint = distributed.on_main(open_output, files, config, resume)

    torch.manual_seed(experiment.seed)
    student = models.build_student(teacher, experiment.bottleneck_channels)
    models.to_device(teacher, device)
    models.to_device(student, device)
    run = Run(student, *build_optimizer(student, experiment))
    if checkpoint:
        run.load(checkpoint, files.last)
        del checkpoint
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

    def report(record: dict[str, Any]) -> None:
        log(describe_step(record))
        append_record(files.metrics, record)

    is_full_recipe = (replace(experiment, seed=0) == EXPERIMENTS[experiment.arch]
                      and evaluate.published_for(student, val)
                      and not (limit_train or amp))
    with distributed.logging_to(files.log):
        log(f"{experiment.arch} on {device}, from epoch {run.epoch}, step {run.step} on: "
            f"{len(images)} images; a step is {distributed.world_size()} processes x "
            f"{accumulation} micro-batches x {micro_batch} images")
        while run.epoch < experiment.epochs:
            train_epoch(
                experiment, run, student_body, teacher_body, teacher.transform, loader,
                report=report, save=lambda: run.save(files.last, config), amp=amp,
                compiled=compiled, log_every=log_every, save_every=save_every)
            distributed.broadcast_buffers(student.backbone.body.layer1)
            metrics, _ = evaluate.evaluate(
                evaluate.whole(student.eval()), val, device, workers, f"validation {run.epoch}")
            published = PUBLISHED[experiment.arch][run.epoch] if is_full_recipe else None
            report_epoch(run, metrics, files.metrics, published)
            if is_best(run, metrics):
                run.best_box_ap = metrics["bbox"][0]
                run.save(files.best, config)
            run.start_next_epoch()
        return test(student, teacher, val, device, workers, files)


def is_best(run: Run, metrics: evaluate.Metrics) -> bool:
    """Return whether a validated epoch's student replaces the best one so far."""
    box_ap = metrics["bbox"][0]
    nothing_to_find = box_ap < 0  # COCO's -1; with nothing to choose by, the newest is taken
    return box_ap > run.best_box_ap or nothing_to_find


def report_epoch(
    run: Run,
    metrics: evaluate.Metrics,
    metrics_file: Path,
    published: tuple[float, float | None] | None,
) -> None:
    """Log and record a validated epoch; published: loss and box AP to set beside it, if any."""
    loss = run.loss_sum / run.step
    box_ap = metrics["bbox"][0]
    log(f"epoch {run.epoch}: mean loss {loss:.4e}, box AP {box_ap:.4f}, "
        f"best before {run.best_box_ap:.4f}")
    if published:
        published_loss, published_box_ap = published
        log(f"    published: mean loss {published_loss:.4e} (of the first 9,001 steps), box AP "
            f"{published_box_ap or 'no better than before'}")
    append_record(metrics_file, {
        "kind": "epoch", "epoch": run.epoch, "loss": loss, "metrics": metrics,
        "best": is_best(run, metrics)})


def test(
    student: nn.Module,
    teacher: nn.Module,
    val: evaluate.ValSet,
    device: torch.device,
    workers: int,
    files: Files,
) -> dict[str, evaluate.Metrics]:
    """Load the best checkpoint; log, record and return the metrics of teacher and student."""
    content = distributed.on_main(models.load_checkpoint, files.best)
    models.load_weights(student.eval(), models.detector_state(content, files.best), files.best)
    teacher_metrics, teacher_results = evaluate.evaluate(
        evaluate.whole(teacher), val, device, workers, "test of the teacher")
    student_metrics, student_results = evaluate.evaluate(
        evaluate.whole(student), val, device, workers, "test of the student")
    metrics = {
        "teacher": teacher_metrics,
        "student": student_metrics,
        "agreement": evaluate.agreement(val, student_results, teacher_results),
    }
    append_record(files.metrics, {"kind": "test", "metrics": metrics})
    log(f"{files.best}\n{evaluate.metrics_table(metrics, evaluate.published_for(student, val))}")
    return metrics


# ---- the command ---------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a GHND student.", usage="%(prog)s --arch ARCH [flags]")
    parser.add_argument("--arch", choices=EXPERIMENTS, required=True, help="which experiment")
    evaluate.add_common_flags(parser)
    parser.add_argument(
        "--output-dir", type=evaluate.path, metavar="DIR", default="coco/ghnd",
        help="folder for the best checkpoint, last.pt and logs (%(default)s)")
    parser.add_argument(
        "--resume", action="store_true",
        help="go on from last.pt, or start if there is none: the same command each time")
    parser.add_argument(
        "--save-every", type=evaluate.positive, metavar="N", default=2000,
        help="write last.pt after so many steps, besides after each epoch (%(default)s)")
    parser.add_argument(
        "--log-every", type=evaluate.positive, metavar="N", default=100,
        help="print a line after so many steps (%(default)s)")
    parser.add_argument(
        "--limit-train", type=evaluate.positive, metavar="N",
        help="use only the first N images of train2017")
    parser.add_argument(
        "--amp", choices=["bf16"], help="run both bodies in bfloat16, the loss in float32")
    parser.add_argument(
        "--compile", action="store_true", dest="compiled",
        help="fuse both bodies and the loss by torch.compile, which takes minutes at the start")

    # These depart from the recipe; not given, they are the experiment's.
    parser.add_argument(
        "--bottleneck-channels", type=evaluate.positive, metavar="N", help="instead of 3")
    parser.add_argument("--epochs", type=evaluate.positive, metavar="N", help="instead of 20")
    parser.add_argument(
        "--images-per-step", type=evaluate.positive, metavar="N",
        help="on all processes together, instead of 12")
    parser.add_argument(
        "--min-size", type=evaluate.positive, metavar="PX",
        help="images are resized to this shorter side, instead of 800 ...")
    parser.add_argument(
        "--max-size", type=evaluate.positive, metavar="PX",
        help="... or, if that is less, to this longer side, instead of 1333")
    parser.add_argument(
        "--seed", type=evaluate.not_negative, metavar="N",
        help="of layer1, the images' order and the flips, instead of 0")
    return parser.parse_args()


def main() -> None:
    settings = vars(parse_args())
    changes = {}
    for field in fields(Experiment):
        value = settings.pop(field.name, None)
        if value is not None:
            changes[field.name] = value
    experiment = replace(EXPERIMENTS[changes["arch"]], **changes)
    run_experiment(experiment, **settings)


if __name__ == "__main__":
    distributed.run(main)
