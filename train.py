"""Train a bottleneck-injected detector by head network distillation, validate, save and test it.

    torchrun --nproc_per_node=3 train.py --arch maskrcnn     # any number of GPUs that divides 12
    python train.py --demo                                   # no GPU, no data, no downloads
"""

import argparse
import contextlib
import fcntl
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import MultiStepLR

import data
import distributed
import evaluate
import losses
import models
from distributed import log


# ---- the recipe ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Experiment:
    """One row of the results table, with every number of its recipe."""
    arch: str                            # "fasterrcnn" or "maskrcnn", for teacher and student
    published_loss: tuple[float, ...]    # mean over each epoch's first 9,001 steps
    published_box_map: dict[int, float]  # after the epochs that bettered it, counted from 0
    bottleneck_channels: int = 3         # channels that cross the split point
    epochs: int = 20
    images_per_step: int = 12            # over all processes and micro-batches together
    reference_batch: int = 4             # a GPU's images in 2020: loss and gradient are of so many
    lr: float = 1e-3                     # Adam, no weight decay; for any number of processes
    lr_drops: tuple[int, ...] = (5, 15)  # from these epochs on (counted from 0), ...
    lr_drop_factor: float = 0.1          # ... lr is this many times what it was
    min_size: int = 800                  # pixels, shorter side after resizing
    max_size: int = 1333                 # pixels, longer side at most
    layer_weights: tuple[float, ...] = (1, 1, 1, 1)  # of the loss's terms; HND is (1, 0, 0, 0)
    seed: int = 0                        # layer1's initial values, order of the images, flips


# Both: arXiv 2011.12913, torchdistill's rrpr2020 configurations and the logs beside them.
FASTERRCNN = Experiment("fasterrcnn", published_loss=(
    2.337e6, 1.174e6, 1.094e6, 1.054e6, 1.027e6, 0.982e6, 0.975e6, 0.972e6, 0.968e6, 0.967e6,
    0.962e6, 0.961e6, 0.957e6, 0.957e6, 0.954e6, 0.947e6, 0.948e6, 0.946e6, 0.950e6, 0.947e6),
    published_box_map={
        0: 0.3519, 1: 0.3545, 3: 0.3549, 4: 0.3558, 5: 0.3578, 6: 0.3579, 11: 0.3586})
MASKRCNN = Experiment("maskrcnn", published_loss=(
    2.499e6, 1.482e6, 1.392e6, 1.398e6, 1.286e6, 1.256e6, 1.210e6, 1.202e6, 1.195e6, 1.191e6,
    1.184e6, 1.184e6, 1.174e6, 1.174e6, 1.171e6, 1.161e6, 1.161e6, 1.158e6, 1.165e6, 1.159e6),
    published_box_map={0: 0.3601, 1: 0.3659, 5: 0.3684, 8: 0.3690, 10: 0.3691})
EXPERIMENTS = {"fasterrcnn": FASTERRCNN, "maskrcnn": MASKRCNN}
BEST = "coco2017-custom_{0}_resnet_fpn_from_{0}_resnet50_fpn.pt"  # as torchdistill's
FILES = (BEST, "{0}/last.pt", "{0}/metrics.jsonl")
TRAINED = ("backbone.body.conv1.", "backbone.body.layer1.")  # keys of all that training changes


def build_optimizer(stem: nn.Module, recipe: Experiment) -> tuple[torch.optim.Adam, MultiStepLR]:
    """Return Adam over conv1 and layer1, and its schedule, which is to be stepped once an epoch."""
    optimizer = torch.optim.Adam([p for p in stem.parameters() if p.requires_grad], recipe.lr)
    return optimizer, MultiStepLR(optimizer, recipe.lr_drops, recipe.lr_drop_factor)

# ---- the loop ------------------------------------------------------------------------------------
@dataclass
class Progress:
    """How far a run is: all that its checkpoints hold of it besides weights and optimizer."""
    epoch: int = 0                   # that is being trained or validated, counted from 0
    step: int = 0                    # steps of it that are done
    loss_sum: float = 0.0            # over these
    best_box_map: float = float("-inf")


def train(
    experiment: Experiment, distiller: models.Distiller, transform: nn.Module, loader: Iterable,
    optimizer: torch.optim.Optimizer, progress: Progress, report: Callable[..., None],
    log_every: int = 100, save_every: int = 2000,
) -> None:
    """Train to the end of the epoch, the next save or a signal, progress moving along with reports.

    transform: the detector's. loader: lists of uint8 (3, h, w). Raises FloatingPointError, alike.
    """
    stem, sampler, epoch = distiller.student_stem, loader.batch_sampler, progress.epoch
    device, processes = next(stem.parameters()).device, distributed.world_size()
    accumulation = experiment.images_per_step // (processes * sampler.batch_size)
    steps = len(loader) // accumulation
    # the loss of a step is (sum over its 12 images) / 3, and DDP averages over the processes
    scale = experiment.reference_batch / experiment.images_per_step
    sums = torch.zeros(3, len(models.DISTILLED), dtype=torch.float64, device=device)
    sampler.epoch, sampler.skip = epoch, progress.step * accumulation
    batches, waited, begin = iter(loader), 0.0, time.perf_counter()
    stem.train()
    for step in range(progress.step + 1, steps + 1):
        optimizer.zero_grad(set_to_none=True)
        for micro_step in range(1, accumulation + 1):
            asked = time.perf_counter()
            images = next(batches)
            waited += time.perf_counter() - asked
            images = [image.to(device, non_blocking=True) / 255 for image in images]
            batch = transform(images)[0].tensors  # (B, 3, H, W): normalised, resized, padded, once
            batch = batch.contiguous(memory_format=models.memory_format(device))
            syncs = processes == 1 or micro_step == accumulation
            with contextlib.nullcontext() if syncs else stem.no_sync():
                maps, wanted = distiller(batch)  # the student's and the teacher's
                loss, errors = losses.ghnd_loss(maps, wanted, experiment.layer_weights)
                (loss * scale * processes).backward()
            sums[:2] += torch.stack([errors, losses.squared_norms(wanted)])
            del maps, wanted  # or they would stay until the next batch has its own
        optimizer.step()
        pausing = distributed.noted_signal() or step == steps or step % save_every == 0
        if pausing or step % log_every == 0:  # the only place that waits for the device
            weights = [value for value in stem.state_dict().values() if value.is_floating_point()]
            sums[2] = nn.utils.get_total_norm(weights)  # finite if all weights are
            totals, count = distributed.sum_over_processes(sums), step - progress.step
            loss = (totals[0] @ totals.new_tensor(experiment.layer_weights)).item() * scale / count
            if not totals.isfinite().all():
                raise FloatingPointError(f"loss ({loss:.4e}) or weights are no longer finite at "
                                         f"epoch {epoch}, step {step}; none was saved")
            seconds = (time.perf_counter() - begin) / count
            report(kind="step", epoch=epoch, step=step, steps=steps, loss=loss,
                   relative_errors=(totals[0] / totals[1]).tolist(),
                   lr=optimizer.param_groups[0]["lr"], data_wait=waited / count / seconds,
                   images_per_second=experiment.images_per_step / seconds,
                   gpu_memory_mib=torch.cuda.max_memory_allocated() / 2**20,
                   hours_left=seconds / 3600 * (steps * (experiment.epochs - epoch) - step))
            progress.step, progress.loss_sum = step, progress.loss_sum + loss * count
            sums.zero_()
            waited, begin = 0.0, time.perf_counter()
        if pausing:
            return

# ---- the run -------------------------------------------------------------------------------------
def parse_args() -> tuple[argparse.Namespace, Experiment]:
    """Read the command line; return it and the experiment that it asks for."""
    parser = argparse.ArgumentParser(usage=evaluate.USAGE, description="Train a GHND student.")
    count = partial(flag := parser.add_argument, type=evaluate.positive, metavar="N")
    flag("--arch", choices=EXPERIMENTS, help="which experiment to run; needed unless --demo")
    flag("--demo", action="store_true", help="a small run without data, in demo/ or --output-dir")
    evaluate.add_common_flags(parser)
    flag("--output-dir", type=evaluate.path, metavar="DIR", default="coco/ghnd",
         help="folder for the best checkpoint, last.pt and logs (%(default)s)")
    either = partial(parser.add_mutually_exclusive_group().add_argument, action="store_true")
    either("--resume", help="continue from last.pt, if there is one")
    either("--overwrite", help="replace the checkpoints of another run")
    count("--save-every", default=2000, help="write last.pt after so many steps too (%(default)s)")
    count("--log-every", default=100, help="print a line after so many steps (%(default)s)")
    count("--limit-train", help="use only the first N images of train2017")
    flag("--amp", choices=["bf16"], help="run the networks in bfloat16, the loss in float32")
    flag("--seed", type=int, metavar="N", help="of layer1, order and flips, instead of 0")
    count("--epochs", help="how many to train, instead of 20")
    count("--bottleneck-channels", help="how many to send, instead of 3")
    count("--images-per-step", help="on all processes together, instead of 12")
    parser.set_defaults(min_size=None, max_size=None)  # the experiment's
    args = parser.parse_args()
    if args.demo:
        parser.set_defaults(arch="fasterrcnn", output_dir="demo", min_size=128, max_size=224,
                            epochs=5, log_every=1, workers=1)
        args = parser.parse_args()
        args.overwrite = not args.resume  # it is made for being overwritten
        args.data_dir = args.output_dir / "coco"
        args.teacher_ckpt = args.output_dir / f"teacher_{args.arch}.pt"
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":  # torchrun repeats its command
        args.resume, args.overwrite = True, False
    if args.arch is None:
        parser.error("--arch fasterrcnn or --arch maskrcnn is needed")
    given = {key: value for key, value in vars(args).items()
             if key in Experiment.__annotations__ and value is not None}
    experiment = replace(EXPERIMENTS[args.arch], **given)
    if experiment.images_per_step % distributed.world_size():
        parser.error(f"{distributed.world_size()} processes cannot share "
                     f"{experiment.images_per_step} images a step evenly")
    return args, experiment


def prepare_demo(args: argparse.Namespace) -> None:
    """Draw the demo's images and make its teacher, if an earlier demo has not done it."""
    if not args.teacher_ckpt.exists():
        data.write_demo_dataset(args.data_dir)
        files = sorted((args.data_dir / "train2017").iterdir())[:8]
        images = [data.read_image(file) / 255 for file in files]
        teacher = models.random_teacher(args.arch, images, 0, args.min_size, args.max_size)
        models.save_checkpoint(teacher.state_dict(), args.teacher_ckpt)


def open_output(best: Path, last: Path, metrics: Path, config: dict, resume: bool,
                overwrite: bool) -> dict | None:
    """Lock a run's folder, log into it, return last.pt's content if there is a run to resume."""
    last.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(last.with_name("train.log"))
    try:
        fcntl.lockf(handler.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as long as this process lives
    except BlockingIOError as error:
        raise FileExistsError(f"{last.parent} is being written by another run; wait for its end or "
                              "name another folder by --output-dir") from error
    except OSError:  # a file system without locks
        pass
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    distributed.logger.addHandler(handler)
    for path in (best, last, metrics) if overwrite else ():
        path.unlink(missing_ok=True)
    content, resume = None, resume and last.exists()
    for path in filter(Path.exists, (best, last)):
        content = models.load_checkpoint(path) if resume else {}
        before = content.get("config")
        if not isinstance(before, dict) or "train_images" not in before:
            raise FileExistsError(f"{path} exists and this run did not write it; see --resume (for "
                                  "a run with a last.pt), --output-dir and --overwrite")
        changed = [f"{key} {before.get(key)}, not {value}" for key, value in config.items()
                   if before.get(key) != value and key != "epochs" and "published" not in key]
        if changed:
            raise ValueError(f"{path} belongs to another run, with {', '.join(changed)}; give it "
                             "those settings, or another --output-dir")
    return content if best.exists() or content is None else {**content, "best_value": float("-inf")}


def restore(content: dict, path: Path, student: nn.Module,
            optimizer: torch.optim.Optimizer, scheduler: MultiStepLR) -> Progress:
    """Load last.pt's content. Raises ValueError if it is broken, or of another teacher."""
    state = models.detector_state(content, path)
    for key, value in student.state_dict().items():
        same = torch.equal(value.cpu(), state.get(key, torch.empty(0)))
        if not key.startswith(TRAINED) and not same:
            raise ValueError(f"{path} belongs to another teacher, with another {key}; resume with "
                             "the same --teacher-ckpt")
    models.load_weights(student, state, path)
    try:
        optimizer.load_state_dict(content["optimizer"])
        scheduler.load_state_dict(content["lr_scheduler"])
        return Progress(**content["progress"] | {"best_box_map": content["best_value"]})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} was not written by this train.py ({error})") from error


def append_record(metrics: Path, **record: object) -> None:
    """Append a record to metrics.jsonl, and log a line on it if it is a training step's."""
    if record["kind"] == "step":
        log("epoch {epoch} step {step}/{steps} loss {loss:.4e} relative errors {errors} lr {lr:.0e}"
            " {images_per_second:.1f} img/s, data wait {data_wait:.0%}, {gpu_memory_mib:.0f} MiB, "
            "{hours_left:.1f} h left".format(
                errors=" ".join(f"{e:.3f}" for e in record["relative_errors"]), **record))
    if distributed.rank() == 0:
        with models.writing(metrics), metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")


def main() -> None:
    args, experiment = parse_args()
    device, processes = distributed.set_up(args.device), distributed.world_size()
    if args.amp and not models.has_bf16(device):
        raise ValueError(f"--amp bf16: this {device.type} has no bfloat16; leave the flag out")
    share = experiment.images_per_step // processes
    micro_batch = max(size for size in (1, 2, 3, 4) if share % size == 0)
    best, last, metrics = (args.output_dir / file.format(args.arch) for file in FILES)
    report = partial(append_record, metrics)
    if args.demo:
        distributed.from_main(prepare_demo, args)
    index, images = data.load_split(args.data_dir, "train", args.limit_train)
    if len(index) < experiment.images_per_step:
        raise ValueError(f"{len(index)} images to train on are fewer than one step's "
                         f"{experiment.images_per_step}: see --limit-train, --images-per-step")
    loader = data.train_loader(index, images, micro_batch, experiment.seed, args.workers)
    steps = len(loader) // (share // micro_batch)
    teacher = distributed.from_main(models.load_teacher, args.arch, args.teacher_ckpt,
                                    experiment.min_size, experiment.max_size)
    val = evaluate.ValSet(args.data_dir, teacher, args.limit_val)
    common = val, device, args.workers
    config = {**asdict(experiment), "amp": args.amp,
              "train_images": len(index), "val_images": len(val.index)}
    content = distributed.from_main(
        open_output, best, last, metrics, config, args.resume, args.overwrite)
    torch.manual_seed(experiment.seed)
    student = models.build_student(teacher, experiment.bottleneck_channels)
    teacher, student = (models.to_device(detector, device) for detector in (teacher, student))
    distiller = models.Distiller(teacher, student, bf16=args.amp == "bf16")
    stem = distiller.student_stem
    optimizer, scheduler = build_optimizer(stem, experiment)
    progress = restore(content, last, student, optimizer, scheduler) if content else Progress()
    if processes > 1:
        distiller.student_stem = nn.parallel.DistributedDataParallel(stem)
        distiller.student_stem.broadcast_buffers = False  # once, before saving, is enough
    log(f"{args.arch} on {device}, from epoch {progress.epoch}, step {progress.step} on: {steps} "
        f"steps, {len(index)} images, of {processes} x {share // micro_batch} x {micro_batch}")

    def save(path: Path) -> None:
        if distributed.rank() == 0:  # torchdistill's entries, then ours
            models.save_checkpoint({
                "model": student.state_dict(), "optimizer": optimizer.state_dict(),
                "lr_scheduler": scheduler.state_dict(), "best_value": progress.best_box_map,
                "config": config, "args": None, "progress": asdict(progress)}, path)
        distributed.barrier()  # so that no process goes on as if it were written

    while progress.epoch < experiment.epochs:
        with distributed.noting_signals():
            train(experiment, distiller, teacher.transform, loader, optimizer, progress, report,
                  args.log_every, args.save_every)
            distributed.broadcast_buffers(stem)
            save(last)
            if stop := distributed.noted_signal():
                log(f"stopped by {signal.Signals(stop).name}; repeat the command with --resume")
                distributed.barrier()  # lest torchrun, seeing one leave, ends the first too soon
                sys.exit(128 + stop)
        if progress.step < steps:
            continue
        epoch, loss = progress.epoch, progress.loss_sum / steps
        figures, *_ = evaluate.evaluate(student, *common, f"validation {epoch}")
        box_map, before = figures["bbox"][0], progress.best_box_map
        progress.best_box_map = max(box_map, before)
        report(kind="epoch", epoch=epoch, loss=loss, figures=figures, best=box_map > before)
        log(f"epoch {epoch}: mean loss {loss:.4e}, box mAP {box_map:.4f}, best before {before:.4f}")
        departs = args.limit_train or args.limit_val or args.amp
        if replace(experiment, seed=0) == EXPERIMENTS[args.arch] and not departs:
            log(f"    published: mean loss {experiment.published_loss[epoch]:.4e} (of 9,001 steps),"
                f" box mAP {experiment.published_box_map.get(epoch, 'no better than before')}")
        if box_map > before:
            save(best)
        progress = Progress(epoch + 1, best_box_map=progress.best_box_map)
        scheduler.step()

    content = distributed.from_main(models.load_checkpoint, best)
    models.load_weights(student, models.detector_state(content, best), best)
    taught, truths, _ = evaluate.evaluate(teacher, *common, "test of the teacher")
    figures, results, _ = evaluate.evaluate(student, *common, "test of the student")
    rows = {"teacher": taught, "student": figures,
            "agreement": evaluate.agreement(val, truths, results)}
    report(kind="test", epoch=progress.epoch, figures=rows)
    log(f"{best}\n{evaluate.table(rows, student)}")
    if args.demo:
        pictures = args.output_dir / "pictures"
        distributed.from_main(evaluate.draw, val, (truths, results), pictures, len(val.index))
        torch.manual_seed(experiment.seed)
        fresh = models.build_student(teacher, experiment.bottleneck_channels)
        fresh = evaluate.agreement(val, truths, evaluate.evaluate(fresh, *common, "a fresh one")[1])
        log(f"agreement was {fresh['bbox'][0]:.4f} before training (labels say nothing of a random "
            f"teacher); {pictures}/ shows it. Try\n    python evaluate.py "
            f"--ckpt {best} --teacher-ckpt {args.teacher_ckpt} --data-dir {args.data_dir} "
            f"--min-size {args.min_size} --max-size {args.max_size} --bits 32 8 4 2")


if __name__ == "__main__":
    distributed.run(main)
