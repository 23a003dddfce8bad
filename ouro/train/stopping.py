"""A training run that ends before its last step: after a signal or its time limit, saved."""

import os
import signal
import time

from ouro.train.processes import LOCAL_WORLD_SIZE, WORLD_SIZE

import torch

STARTED = time.time()
STOPPED = 75  # exit code, BSD's EX_TEMPFAIL: stopped after saving; the same command continues


class Stopped(Exception):
    """Training ended before its last step, after a checkpoint."""


class Stopper:
    """Says when to end training, after a step in which a signal came or the time was up, in all processes together."""

    def __init__(self, time_limit: float | None):
        self.deadline = None if time_limit is None else STARTED + time_limit
        self.why: str | None = None
        # Processes of one node ask each other without their GPUs, which would have to finish first. Across nodes that
        # is left to NCCL, which finds its network where gloo may not.
        self.group = None
        if 1 < WORLD_SIZE == LOCAL_WORLD_SIZE:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # needs no network, nor a host name that resolves
            self.group = torch.distributed.new_group(backend="gloo")
        # Up to here these signals end the process at once: a Slurm job that has trained nothing is not worth a requeue.
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self.note)

    def note(self, number: int, frame) -> None:
        self.why = signal.Signals(number).name

    def asked(self, device: torch.device) -> bool:
        """Whether to stop now: the same answer in all processes, also where a signal comes to one of them just now."""
        if self.deadline is not None and time.time() > self.deadline:
            self.why = self.why or "the time limit"
        stop = self.why is not None
        if WORLD_SIZE > 1:
            flag = torch.tensor(float(stop), device="cpu" if self.group else device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self.group)
            stop = bool(flag)
        if stop:
            self.why = self.why or "a signal to another process"
        return stop
