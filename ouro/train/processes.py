"""This process among those that train together: its rank, and how it prints, waits and ends."""

import os
import sys
import time

from ouro.files import UserError, one_line

import torch
from torch.distributed.distributed_c10d import _get_default_store


def number(name: str, missing: int) -> int:
    """The number in a launcher's variable, `missing` where it is not set; -1, which `check_launcher` refuses, where it
    holds no whole number."""
    text = os.environ.get(name, str(missing))
    return int(text) if text.isdecimal() else -1


RANK = number("RANK", 0)
LOCAL_RANK = number("LOCAL_RANK", 0)
WORLD_SIZE = number("WORLD_SIZE", 1)
LOCAL_WORLD_SIZE = number("LOCAL_WORLD_SIZE", 0)  # processes on this node; 0: the launcher does not say
REQUEUED = number("SLURM_RESTART_COUNT", 0) > 0


def check_launcher() -> None:
    """Refuses launcher's variables that do not describe a process of a group: such a process would train its share of
    each step alone, or save nothing.
    Raises UserError: so they are."""
    rank, local, world, here = map(number, ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"), (0, 0, 1, 0))
    if "LOCAL_RANK" not in os.environ and (rank, world) == (0, 1):
        return
    needed = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not os.environ.get(name)]
    whole = 0 <= local <= rank < world and (here == 0 or local < here <= world) and number("MASTER_PORT", 0) > 0
    if missing or not whole:
        said = " ".join(f"{name}={os.environ[name]}" for name in (*needed, "LOCAL_WORLD_SIZE") if name in os.environ)
        lack = f" without {', '.join(missing)}" * bool(missing)
        raise UserError(f"{said}{lack} in the environment is no process of a group: start it with torchrun, or unset "
                        "these variables for one process")  # fmt: skip


def print0(text: str) -> None:
    """Prints a line in process 0 alone; whatever names and values are in it, it stays one, and a terminal obeys nothing
    in it."""
    if RANK == 0:
        print(one_line(text))


def wait_for_data() -> None:
    """Waits a moment while another process of this node tokenises.
    Raises UserError: another process has failed, and has said why."""
    time.sleep(0.2)
    try:
        failed = _get_default_store().add("failed", 0) if torch.distributed.is_initialized() else 0
    except RuntimeError:  # process 0, which keeps the store, has ended
        failed = 1
    if failed:
        raise UserError("another process failed")


def speaks(error: BaseException) -> bool:
    """Whether this process is to print why the run ends. Only the first that fails is, since its failure makes the
    others fail, too."""
    if not torch.distributed.is_initialized():  # so early a UserError is raised in all processes
        return LOCAL_RANK == 0 or not isinstance(error, UserError)
    try:
        return _get_default_store().add("failed", 1) == 1
    except RuntimeError:  # process 0, which may be the one that keeps the store, has ended
        return False


def among_others() -> bool:
    """Whether this process belongs to a group that a launcher started, even if to one of a single process."""
    return WORLD_SIZE > 1 or (torch.distributed.is_available() and torch.distributed.is_initialized())


def leave(code: int) -> None:
    """Ends this process with its exit code."""
    if not among_others():
        sys.exit(code)
    # os._exit waits for nothing. sys.exit may hang: the process group waits for processes that are gone or wait, too;
    # the interpreter waits for a thread of gloo that waits for the interpreter's lock.
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
