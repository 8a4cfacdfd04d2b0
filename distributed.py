"""Start-up under torchrun or alone, the few collectives in use, logging, and errors told once."""

import argparse
import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

logger = logging.getLogger("ghnd")
log = logger.info
USER_ERRORS = (OSError, ValueError, FloatingPointError)  # told without a traceback


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def is_main() -> bool:
    return rank() == 0


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Join the process group's store, run a command inside, and leave; an error ends every process.

    The first process to fail prints the reason: one line for argparse.ArgumentError (exit status 2)
    and USER_ERRORS (1), a traceback for anything else (1). The others leave silently after it: all
    that they see is that a peer is gone. torchrun then stops whoever is still waiting.
    """
    logger.setLevel(logging.INFO if is_main() else logging.CRITICAL)
    logger.addHandler(logging.StreamHandler(sys.stdout))
    global _store
    _store = next(dist.rendezvous("env://"))[0] if world_size() > 1 else None
    status = 0
    try:
        yield
        barrier()
    except (Exception, KeyboardInterrupt) as error:
        status = _report_once(error)
        if _store is None:
            sys.exit(status)
    finally:
        logger.handlers.clear()
    if _store is not None:
        # after a failure a normal exit would wait for peers that are themselves waiting; after
        # success it has been seen to abort in a gloo thread (torch 2.11)
        if status == 0 and dist.is_initialized():
            dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _report_once(error: BaseException) -> int:
    """Report an error unless another process has; returns the exit status."""
    if _store is None:
        return _report(error)
    try:
        if _store.add("failed", 1) == 1:
            status = _report(error)
            _store.set("told", "yes")
            return status
        _store.wait(["told"], timedelta(seconds=10))  # or torchrun would stop the one who tells
    except RuntimeError:  # the store went down with its host, or nobody told in time
        pass
    return 1


def _report(error: BaseException) -> int:
    logger.debug("%s", "".join(traceback.format_exception(error)))
    if isinstance(error, KeyboardInterrupt):
        message, status = "interrupted", 130
    elif isinstance(error, (argparse.ArgumentError, *USER_ERRORS)):
        message = str(error)
        if "Traceback" in message:  # from a loader's worker: the message follows its traceback
            message = message.strip().rsplit(f"\n{type(error).__name__}: ", 1)[-1]
        status = 2 if isinstance(error, argparse.ArgumentError) else 1
    else:
        message, status = "".join(traceback.format_exception(error)), 1
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    return status


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises its usage errors, so that N processes report them once."""

    def error(self, message: str) -> None:
        raise argparse.ArgumentError(None, f"{message} (--help lists the flags)")


def start(device: str = "auto") -> torch.device:
    """Pick this process's device and, where there are several processes, form the process group.

    device: "auto" (cuda, else mps, else cpu), "cuda", "cpu" or "mps". CUDA tensors go through nccl,
    CPU tensors and Python objects through gloo. Raises ValueError for a device that is not there.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        mps = torch.backends.mps.is_available() and world_size() == 1
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"--device cuda: process {local_rank} of this machine has no GPU, it has "
                f"{torch.cuda.device_count()}; lower --nproc_per_node or use --device cpu")
        torch.cuda.set_device(local_rank)
    if device == "mps" and (world_size() > 1 or not torch.backends.mps.is_available()):
        raise ValueError("--device mps needs an Apple GPU and a single process")
    if world_size() > 1:
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=_store, rank=rank(), world_size=world_size())
    return torch.device(device, local_rank) if device == "cuda" else torch.device(device)


def log_to(path: Path) -> None:
    """Also append what is logged, and the traceback of an error, to a file."""
    if is_main():
        logger.setLevel(logging.DEBUG)
        logger.handlers[0].setLevel(logging.INFO)
        handler = logging.FileHandler(path)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logger.addHandler(handler)


def broadcast(value: Any) -> Any:
    """Return the main process's Python object on every process."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def gather(value: Any) -> list[Any]:
    """Return every process's Python object, in rank order, on every process."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def total(values: Tensor) -> Tensor:
    """Sum a tensor over all processes, on the CPU; this waits for the device."""
    values = values.cpu()
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def barrier() -> None:
    """Wait for all processes, on the CPU and so without a claim on any GPU."""
    total(torch.zeros(1))


def broadcast_buffers(module: nn.Module) -> None:
    """Give every process the main process's buffers (BatchNorm's running statistics)."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Let each machine's first process do something (a download) before its other processes do."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first:
        barrier()
    yield
    if first:
        barrier()
