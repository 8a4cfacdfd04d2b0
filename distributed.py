"""Start-up, collectives, signals, logging, errors told once, and files that are never torn."""

import argparse
import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

logger = logging.getLogger("ghnd")
log = logger.info
USER_ERRORS = (OSError, ValueError, FloatingPointError)  # told without a traceback
PEER_DIED = ("by peer", "Broken pipe", "remote process exited")  # as gloo and nccl say it
# Ctrl-C, what clusters send, and what the end of a terminal's connection sends
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


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
    and USER_ERRORS (1), what an Interrupted says (128 + the signal's number), a traceback for
    anything else (1). The others leave silently after it: all that they see is that a peer is gone.
    torchrun then stops whoever is still waiting.
    """
    logger.setLevel(logging.INFO if is_main() else logging.CRITICAL)
    logger.addHandler(logging.StreamHandler(sys.stdout))
    logging.raiseExceptions = False  # lest a full disk's log bury its one message
    global _store, _advice, _signal, _deferred
    _store, _advice, _signal, _deferred = None, "", 0, True
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup does
            signal.signal(number, _on_signal)
    status = 0
    try:
        with signals_deferred():  # till the store is there, which knows if another has failed
            if world_size() > 1:
                store, *_ = next(dist.rendezvous("env://"))
                # torchrun's store outlives a restart, with the dead processes' addresses in it
                _store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        yield
        if _signal:  # raised where Python swallows it, as in a destructor
            raise Interrupted(_signal)
        barrier()
        _deferred = True
    except (Exception, Interrupted) as error:
        _deferred = True  # leave undisturbed
        status = _report_once(error)
    finally:
        logger.handlers.clear()
    if status == 0 and _store is None:
        return
    # After a failure a normal exit would wait for peers that are themselves waiting; after success
    # it has been seen to abort in a gloo thread (torch 2.11).
    if status == 0 and dist.is_initialized():
        dist.destroy_process_group()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or torch would miss its workers
    for worker in multiprocessing.active_children():
        worker.kill()
    with contextlib.suppress(OSError, ValueError):  # a full disk, a closed file
        sys.stdout.flush()
    os._exit(status)


def _report_once(error: BaseException) -> int:
    """Report an error unless another process has; returns the exit status."""
    if isinstance(error, Interrupted):
        message, status = str(error), 128 + error.number
    elif isinstance(error, RuntimeError) and any(sign in str(error) for sign in PEER_DIED):
        message, status = "another process died; what follows tells which one", 1
    elif isinstance(error, (argparse.ArgumentError, *USER_ERRORS)):
        message, status = str(error), 2 if isinstance(error, argparse.ArgumentError) else 1
        if "Traceback" in message:  # from a loader's worker: the message follows its traceback
            message = message.strip().rsplit(f"\n{type(error).__name__}: ", 1)[-1]
    else:
        message, status = "".join(traceback.format_exception(error)), 1
    try:
        with _c10d_muted():
            if _store is not None and _store.add("failed", 1) > 1:
                _store.wait(["told"], timedelta(seconds=10))  # or torchrun would stop the teller
                logger.debug("%s", _store.get("told").decode())  # for the main process's log file
                return status
    except RuntimeError:  # the store went down with its host, or nobody told in time
        return status
    logger.debug("%s", "".join(traceback.format_exception(error)))
    with contextlib.suppress(OSError):  # stderr may be a file on a full disk
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    with contextlib.suppress(RuntimeError), _c10d_muted():
        if _store is not None:
            _store.set("told", message)
    return status


@contextlib.contextmanager
def _c10d_muted() -> Iterator[None]:
    """Silence C++, which prints its stack where the process with the store was quicker to leave."""
    stderr = os.dup(2)
    try:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


# ---- signals -------------------------------------------------------------------------------------


class Interrupted(BaseException):  # which libraries do not catch, like KeyboardInterrupt
    """One of SIGNALS has asked for the end."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}{_advice}")
        self.number = number


_advice = ""
_signal = 0         # the number of the first that came
_deferred = False   # whether to wait for a good moment


def advise(advice: str) -> None:
    """Set what Interrupted tells after the name of its signal."""
    global _advice
    _advice = advice


def _on_signal(number: int, frame: object) -> None:
    global _signal
    _signal = _signal or number
    if not _deferred:
        raise Interrupted(number)


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Raise Interrupted not where a signal strikes but at the end of the block, or see `poll`."""
    global _deferred
    _deferred = True
    yield
    _deferred = False
    if _signal:
        raise Interrupted(_signal)


def poll(wish: bool) -> tuple[bool, int]:
    """Return, on all processes alike, whether one has the wish, and a signal that reached one or 0.

    Cheap enough for every step (a CPU collective), and notices at once if a process has died.
    """
    votes = torch.tensor([int(wish), _signal])
    if dist.is_initialized():
        dist.all_reduce(votes, dist.ReduceOp.MAX)
    return bool(votes[0]), int(votes[1])


def ignore_signals(worker: int) -> None:
    """Leave signals, which reach whole process groups, to a loader's main process."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


# ---- start-up and collectives --------------------------------------------------------------------


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
    """Also append what is logged, and what ends the run, to a file."""
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


# ---- files ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Write a file that is, at every moment, either the old one or the whole new one.

    Raises OSError, naming the path, where it cannot be written; the old file is then as it was.
    """
    prefix = f".{path.name}."
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=prefix, delete=False) as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.chmod(file.name, 0o644)
                os.replace(file.name, path)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(file.name)
                raise
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(
                sign in str(error) for sign in ("inline_container", "PytorchStreamWriter")):
            raise  # no full disk, as torch's zip writer tells it, but a CUDA error, say
        raise OSError(f"{path} cannot be written: {error}") from error


def remove_leftovers(path: Path) -> None:
    """Remove what processes killed in the midst of `replacing` have left."""
    for leftover in path.parent.glob(f".{path.name}.*"):
        leftover.unlink()
