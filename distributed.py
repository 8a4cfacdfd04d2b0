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
    """


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turn an OSError within the block into an InputError that names the path and the reason."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error


log_file: TextIO | None = None  # the log of the present run, opened by log_to


def log_to(path: Path | None) -> None:
    """Append what the main process logs from now on to a file, too; None: to none."""
    global log_file
    if log_file is not None:
        with contextlib.suppress(OSError):  # `log` has reported it
            log_file.close()
    log_file = None
    if path is not None and rank() == 0:
        with writing(path):
            log_file = path.open("a", buffering=1, encoding="utf-8", errors="backslashreplace")


def log(text: str) -> None:
    """Print a line, on the main process, and append it with the time to the run's log."""
    if rank() > 0:
        return
    if log_file is not None:
        with writing(log_file.name):
            log_file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
    try:
        # In one write: print writes a line end separately, and lines of processes could mix.
        print(f"{text}\n", end="", flush=True)
    except OSError as error:
        if log_file is None:
            raise InputError(f"stdout cannot be written: {error.strerror or error}") from error
        sys.stdout = None  # the terminal is gone, and print now does nothing; the log goes on


def run(main: Callable[[], Any], if_interrupted: str = "stopped") -> None:
    """Run a script's main function; print one line and exit with status 1 for an InputError.

    Ctrl-C prints if_interrupted and exits with status 130. Every other exception keeps its
    traceback; torchrun then ends the other processes, which may print tracebacks, too.
    """
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's stream has no encoding of its own
        sys.stdout.reconfigure(errors="backslashreplace")  # for letters that a terminal lacks
    try:
        main()
    except InputError as error:
        # A DataLoader raises a worker's error with the traceback before the message.
        end_with(f"error: {str(error).rpartition('InputError: ')[2].strip()}", status=1)
    except KeyboardInterrupt:
        end_with(if_interrupted, status=130)
    if dist.is_initialized():
        # Every process waits for the others, or an early one would close connections that they
        # still need. The token outlives the group, since torch 2.6 can hang where a thread of gloo
        # frees the tensor while the group is destroyed.
        token = sum_over_processes(torch.zeros(1))
        dist.destroy_process_group()
        del token


def end_with(text: str, status: int) -> None:
    """Exit with a last line on stderr and in the run's log, as far as they can be written."""
    is_told = status == 130 and rank() > 0  # all processes get a Ctrl-C
    for stream in (log_file, sys.stderr):
        if stream is not None and not is_told:
            with contextlib.suppress(OSError):
                print(f"{Path(sys.argv[0]).name}: {text}\n", end="", flush=True, file=stream)
    sys.exit(status)


# ---- set-up --------------------------------------------------------------------------------------

def rank() -> int:
    """Return this process's number, from 0; process 0 is called the main process."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return the number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def set_up(device: str = "auto") -> torch.device:
    """Choose this process's device, and join the other processes, if there are any.

    device: "cuda", "cpu", or "auto", which is "cuda" where there is a GPU.
    """
    log_to(None)  # an earlier run of this process may have had a log
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
        # In torch 2.6, others may still be connecting, and would fail if this process ended now.
        sum_over_processes(torch.zeros(1))
    return torch.device(device)


def choose_gpu() -> int:
    """Return the index of this process's GPU among those that it can see."""
    gpus = torch.cuda.device_count()
    if gpus == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0  # launchers other than torchrun may show each process its own GPU alone
    index = int(os.environ.get("LOCAL_RANK", rank() % max(gpus, 1)))
    if index >= gpus:
        raise InputError(f"--device cuda: this machine shows {gpus} GPU(s), none for its process "
                         f"{index} (from 0); lower --nproc_per_node, or use --device cpu")
    return index


# ---- collectives ---------------------------------------------------------------------------------

def on_main(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function on the main process alone, and return its picklable result on every process.

    Where it raises an InputError, the main process raises it, and the others exit with status 1.
    For any other exception, torchrun ends the others, which wait.
    """
    outcome = [None, None]  # result, error
    if rank() == 0:
        try:
            outcome[0] = function(*args)
        except InputError as error:
            outcome[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(outcome)
    result, error = outcome
    if error is None:
        return result
    if rank() > 0:
        sys.exit(1)  # the main process prints the reason
    raise error


def on_main_first(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function on the main process, then on the others; return each process's own result."""
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


def user_path(text: str) -> Path:
    """Parse a path, for argparse, and expand ~, which shells do not do in --flag=~/x."""
    return Path(os.path.expanduser(text))


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for data, teacher, device and workers."""
    add = parser.add_argument
    add("--data-dir", type=user_path, metavar="DIR", default="~/datasets/coco2017",
        help="folder with COCO's train2017/, val2017/ and annotations/ (%(default)s)")
    add("--teacher-ckpt", type=user_path, metavar="FILE",
        help="the teacher's weights, a torchvision state dict (default: download COCO_V1)")
    add("--teacher-eps", type=float, metavar="EPS",
        help="eps of the BatchNorm layers in --teacher-ckpt; by default 1e-5 if they are ordinary "
             "ones, and 0, as in COCO_V1, if they are FrozenBatchNorm2d")
    add("--device", choices=["auto", "cuda", "cpu"], default="auto",
        help="auto is cuda where there is a GPU (%(default)s)")
    add("--workers", type=int, metavar="N", default=min(4, os.cpu_count() or 1),
        help="processes that load images, for each process that computes (%(default)s)")
    add("--limit-val", type=positive, metavar="N", help="use only the first N images of val2017")
