"""Helpers that do the same on one process and on several, and errors that name what a user can fix.

Started by torchrun, a script runs in several processes that know their number from RANK and
WORLD_SIZE; started by python, in one.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

logger = logging.getLogger("ghnd")
logger.setLevel(logging.INFO)  # for train.log also where `run` was not called
log = logger.info              # prints on the main process only, once `run` has set it up


class InputError(ValueError):
    """Something that a user gave is wrong: a flag, a file, a folder.

    The message names it, and says what was found, what was expected and what to do.
    on_all_processes: whether every process raises it, so that only the first should tell it.
    """

    def __init__(self, message: str, on_all_processes: bool = False) -> None:
        super().__init__(message)
        self.on_all_processes = on_all_processes


def rank() -> int:
    """Return this process's number, from 0; 0 is called the main process."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return the number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def run(main: Callable[[], None]) -> None:
    """Run a script's main function, with one line and exit status 1 for an InputError.

    Every other exception keeps its traceback. Where one of several processes fails alone, torchrun
    ends the others, which may print tracebacks of lost connections: these only follow from it.
    """
    logger.addHandler(logging.StreamHandler(sys.stdout))
    logger.setLevel(logging.INFO if rank() == 0 else logging.WARNING)
    try:
        main()
    except InputError as error:
        if rank() == 0 or not error.on_all_processes:
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(1)
    if dist.is_initialized():
        # Every process waits for the others, or an early one would close connections that they
        # still need. The token outlives the group, since torch 2.6 can hang where a thread of gloo
        # frees the tensor while the group is destroyed.
        token = sum_over_processes(torch.zeros(1))
        dist.destroy_process_group()
        del token


def set_up(device: str = "auto") -> torch.device:
    """Choose this process's device and, if there are several processes, join them.

    device: "cuda", "cpu", or "auto", which is "cuda" where there is a GPU.
    Raises InputError if there are fewer GPUs than processes on this machine.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        gpus = torch.cuda.device_count()
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if gpus < processes_here:
            raise InputError(
                f"--device cuda: this machine has {gpus} GPUs for {processes_here} processes; "
                "lower --nproc_per_node, or use --device cpu",
                on_all_processes=local_rank > 0)  # the first process of each machine tells it
        device = f"cuda:{local_rank}"
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


@contextlib.contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Append what the main process logs within the block to a file, too, with the time."""
    if rank() > 0:
        yield
        return
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


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


def sync_only_at_the_last(
    is_last: bool, module: nn.Module
) -> contextlib.AbstractContextManager:
    """Return a context for the forward and backward pass of one of a step's micro-batches.

    is_last: whether it is the step's last micro-batch.
    DistributedDataParallel averages the gradients over the processes in every backward pass.
    Averaging in the last pass is enough, since that includes what the passes before accumulated.
    """
    if isinstance(module, nn.parallel.DistributedDataParallel) and not is_last:
        return module.no_sync()
    return contextlib.nullcontext()
