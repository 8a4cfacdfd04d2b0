"""Start-up, collectives, the vote on signals, and one message for an error of many processes."""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

logger = logging.getLogger("ghnd")
log = logger.info
USER_ERRORS = (OSError, ValueError, FloatingPointError)  # told without a traceback
PEER_DIED = ("by peer", "Broken pipe", "remote process exited")  # as gloo and nccl say it
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C, and what clusters send
PATIENCE = 10  # seconds that the first process has to tell the reason and end everybody
_noted = 0  # the signal that noting_signals has met


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def run(main: Callable[[], None]) -> None:
    """Run a script's main and exit, with 0, sys.exit's status, 128 + a signal or 1 for any error.

    The first process tells its error at once, and torchrun then ends the others; these, and who
    only sees that a peer is gone, wait for that before they speak.
    """
    if rank() > 0:
        sys.stderr = open(os.devnull, "w")  # warnings and usage errors are alike on all processes
    logger.setLevel(logging.DEBUG if rank() == 0 else logging.CRITICAL)
    logger.addHandler(console := logging.StreamHandler(sys.stdout))
    console.setLevel(logging.INFO)
    logging.raiseExceptions = False  # lest a full disk's log bury the one message
    try:
        status = main() or barrier() or 0
    except Exception as error:
        status = _tell(error)
    except (SystemExit, KeyboardInterrupt) as stop:
        status = getattr(stop, "code", 128 + signal.SIGINT)
    logger.handlers.clear()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # by which torch misses its loader's workers,
    for worker in multiprocessing.active_children():  # who ignore signals and hold our sockets
        worker.kill()
    if dist.is_initialized():  # a normal exit may wait for peers that wait, or abort inside gloo
        os._exit(status)
    sys.exit(status)


def _tell(error: Exception) -> int:
    full = message = "".join(traceback.format_exception(error))
    if isinstance(error, USER_ERRORS):  # in a loader's worker, the message follows its traceback
        message = str(error).strip().rsplit(f"\n{type(error).__name__}: ", 1)[-1]
    peer_died = isinstance(error, RuntimeError) and any(sign in str(error) for sign in PEER_DIED)
    if peer_died and _noted:  # all were asked to end
        return 128 + _noted
    if peer_died or rank() > 0:
        time.sleep(PATIENCE)
        message = "another process died, which tells why" if peer_died else message
    logger.debug("%s", full)  # for the log file
    with contextlib.suppress(OSError):  # stderr may be a file on a full disk
        print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.__stderr__, flush=True)
    return 1


def set_up(device: str = "auto") -> torch.device:
    """Choose a device ("auto", "cuda" or "cpu") and, where there are several processes, join them.

    Raises ValueError, on all processes of a machine alike, where it has too few GPUs.
    """
    if device == "cuda" or device == "auto" and torch.cuda.is_available():
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if gpus < here:
            raise ValueError(f"--device cuda: this machine has {gpus} GPUs for {here} processes; "
                             "lower --nproc_per_node or use --device cpu")
        torch.cuda.set_device(device := f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    if world_size() > 1:  # torchrun's store outlives a restart, with the dead's addresses in it
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
                                 next(dist.rendezvous("env://"))[0])
        backend = "cpu:gloo,cuda:nccl" if "cuda" in device else "gloo"
        dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size())
    return torch.device("cpu" if device == "auto" else device)


@contextlib.contextmanager
def noting_signals() -> Iterator[None]:
    """Only note SIGNALS within the block; after one, Ctrl-C acts as usual again, to end a hang."""
    def note(number: int, frame: object) -> None:
        global _noted
        _noted = _noted or number
        # the others stay: a cluster signals each process, and torchrun then does so once more
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def noted_signal() -> int:
    """Return, on all processes alike, a signal that one of them has noted, or 0."""
    number = torch.tensor(_noted)
    if dist.is_initialized():
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def ignore_signals(worker: int) -> None:
    """Leave signals, which reach whole process groups, to a loader's main process."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def from_main(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function on the main process alone; return its result, an object, on every process."""
    box = [function(*args) if rank() == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def gather(value: Any) -> list[Any]:
    """Return every process's Python object, in rank order, on every process."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    """Add up a tensor of every process, on the CPU; this waits for the device."""
    values = values.cpu()
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def barrier() -> None:
    sum_over_processes(torch.zeros(1))  # on the CPU, so that it waits for no GPU


def broadcast_buffers(module: torch.nn.Module) -> None:
    """Give every process the main process's buffers (BatchNorm's running statistics)."""
    for buffer in module.buffers() if dist.is_initialized() else ():
        dist.broadcast(buffer, 0)
