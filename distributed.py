"""What the scripts share: errors for users, logging, one or several processes, common flags.

Started by torchrun, a script runs in several processes that know their number from RANK and
WORLD_SIZE; started by python, in one. Every function here does the right thing in both cases.
"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import Tensor, nn

# ---- errors and logging --------------------------------------------------------------------------


class InputError(ValueError):
    """Something that a user gave is wrong: a flag, a file, a folder, a disk.

    The message names it, and says what was found, what was expected and what to do.
    on_all_processes: whether every process raises it, so that only the main process prints it.
    """

    def __init__(self, message: str, on_all_processes: bool = False) -> None:
        super().__init__(message)
        self.on_all_processes = on_all_processes


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError within the block into an InputError that names the path and the reason."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error


log_file: TextIO | None = None  # the open log of a run, set by logging_to


def log(text: str) -> None:
    """Print a line on the main process and, within logging_to, append it to the run's log."""
    if rank() > 0:
        return
    write_line(sys.stdout, text)
    if log_file is not None:
        with writing(Path(log_file.name)):
            log_file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            log_file.flush()


def write_line(stream: TextIO, text: str) -> None:
    """Write a line in one call: unbuffered, print writes the line end separately, and then lines
    of several processes mix."""
    stream.write(f"{text}\n")
    stream.flush()


def plural(number: int, noun: str, more: str = "") -> str:
    """Return "1 image", or "5,000 images"; more: the plural of a noun that needs more than an s."""
    return f"{number:,} {noun if number == 1 else more or noun + 's'}"


@contextlib.contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Append what the main process logs within the block to a file, too, with the time."""
    global log_file
    if rank() > 0:
        yield
        return
    with writing(path):
        file = path.open("a", encoding="utf-8", errors="backslashreplace")
    log_file = file
    try:
        yield
    finally:
        log_file = None
        with contextlib.suppress(OSError):  # `log` has already raised it
            file.close()


def run(main: Callable[[], Any], if_interrupted: str = "stopped") -> None:
    """Run a script's main function; print one line and exit with status 1 for an InputError.

    Ctrl-C prints if_interrupted and exits with status 130. Every other exception keeps its
    traceback. Where one of several processes fails alone, torchrun ends the others, which may print
    tracebacks of lost connections.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's streams have no encoding of their own
            stream.reconfigure(errors="backslashreplace")
    script = Path(sys.argv[0]).name
    try:
        main()
    except InputError as error:
        if rank() == 0 or not error.on_all_processes:
            # A DataLoader wraps what its workers raise into their traceback, which ends with it.
            message = str(error).rpartition("InputError: ")[2].strip()
            write_line(sys.stderr, f"{script}: error: {message}")
        sys.exit(1)
    except KeyboardInterrupt:
        if rank() == 0:
            write_line(sys.stderr, f"{script}: {if_interrupted}")
        sys.exit(130)
    if dist.is_initialized():
        # Every process waits for the others, or an early one would close connections that they
        # still need. The token outlives the group, since torch 2.6 can hang where a thread of gloo
        # frees the tensor while the group is destroyed.
        token = sum_over_processes(torch.zeros(1))
        dist.destroy_process_group()
        del token


# ---- set-up --------------------------------------------------------------------------------------


def rank() -> int:
    """Return this process's number, from 0; process 0 is called the main process."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return the number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def set_up(device: str = "auto") -> torch.device:
    """Choose this process's device and, if there are several processes, join them.

    device: "cuda", "cpu", or "auto", which is "cuda" where there is a GPU.
    Raises InputError if the environment has a part of torchrun's variables, or if this machine has
    fewer GPUs than processes.
    """
    check_environment()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{choose_gpu()}"
        torch.cuda.set_device(device)
    if world_size() > 1 and not dist.is_initialized():  # it is, if an experiment ran before
        # Gradients go by nccl. Detections, metrics and errors are on the CPU and go by gloo.
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        # torchrun's store outlives a restart. With a prefix of its own, each attempt starts empty
        # and does not meet the addresses of processes that are dead.
        store, _, _ = next(dist.rendezvous("env://"))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        dist.init_process_group(
            backend, store=dist.PrefixStore(attempt, store), rank=rank(), world_size=world_size())
        # With torch 2.6 the others may still be connecting, which one that fails now would break.
        sum_over_processes(torch.zeros(1))
    return torch.device(device)


def check_environment() -> None:
    """Raise InputError if some of torchrun's variables are there without the others."""
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    found = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    missing = [name for name in needed if name not in os.environ]
    if found and missing:
        raise InputError(
            f"the environment has {' and '.join(found)}, but no {' and no '.join(missing)}; start "
            "several processes by torchrun, or unset what is left over from another job")
    slurm_tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if not found and slurm_tasks > 1:
        raise InputError(
            f"Slurm started {slurm_tasks} tasks (SLURM_STEP_NUM_TASKS), which know nothing of each "
            "other; start one task on each machine, and torchrun in it, or unset the variable for "
            "independent runs")


def choose_gpu() -> int:
    """Return the index of this process's GPU among those that it can see."""
    gpus = torch.cuda.device_count()
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    # Some clusters show each task its own GPU alone, as number 0. torchrun does not.
    if gpus == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0
    if gpus < processes_here:
        raise InputError(
            f"--device cuda: this machine has {plural(gpus, 'GPU')} for "
            f"{plural(processes_here, 'process', 'processes')}; "
            "lower --nproc_per_node, or use --device cpu",
            on_all_processes=local_rank > 0)  # the first process of each machine prints it
    return local_rank


# ---- collectives ---------------------------------------------------------------------------------


def on_main(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function on the main process alone, and return its result on every process.

    An InputError of the function is raised on every process; the result must be picklable.
    """
    outcome = None
    if rank() == 0:
        try:
            outcome = function(*args)
        except InputError as error:
            outcome = InputError(str(error), on_all_processes=True)
    if dist.is_initialized():
        outcomes = [outcome]
        dist.broadcast_object_list(outcomes)
        outcome = outcomes[0]
    if isinstance(outcome, InputError):
        raise outcome
    return outcome


def on_main_first(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function on the main process, then on all others; return each process's own result.

    So a file is downloaded once, and an error of the main process is printed once.
    """
    results = []
    on_main(lambda: results.append(function(*args)))  # the result itself is not sent to the others
    return results[0] if rank() == 0 else function(*args)


def gather(value: Any) -> list[Any]:
    """Return every process's picklable value, in order of rank, on every process."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def sum_over_processes(values: Tensor) -> Tensor:
    """Return, on the CPU, the sum of a tensor over all processes. This waits for the device."""
    total = values.detach().to("cpu", copy=True)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def broadcast_buffers(module: nn.Module) -> None:
    """Give every process the main process's buffers, such as BatchNorm's running statistics."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


# ---- flags that train.py and evaluate.py share ---------------------------------------------------


def positive(text: str) -> int:
    """Parse a whole number from 1 on, for argparse."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for data, teacher, device and workers."""
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR",
        default=Path(os.path.expanduser("~/datasets/coco2017")),
        help="folder with COCO's train2017/, val2017/ and annotations/ (~/datasets/coco2017)")
    parser.add_argument(
        "--teacher-ckpt", type=Path, metavar="FILE",
        help="the teacher's weights, a torchvision state dict (default: download COCO_V1)")
    parser.add_argument(
        "--teacher-eps", type=float, metavar="EPS",
        help="eps of the BatchNorm layers in --teacher-ckpt; by default 1e-5 if they are ordinary "
             "ones, and 0, as in COCO_V1, if they are FrozenBatchNorm2d")
    parser.add_argument(
        "--device", choices=["auto", "cuda", "cpu"], default="auto",
        help="auto is cuda where there is a GPU (%(default)s)")
    parser.add_argument(
        "--workers", type=int, metavar="N", default=min(4, os.cpu_count() or 1),
        help="processes that load images, for each process that computes (%(default)s)")
    parser.add_argument(
        "--limit-val", type=positive, metavar="N", help="use only the first N images of val2017")
