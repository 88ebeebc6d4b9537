"""One piece of work at a time, in the order in which it was asked for: bounded, cancellable, with a time limit."""

from __future__ import annotations

import collections
import logging
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Literal

import torch
from torch import nn

from attnorm.config import UserError

_log = logging.getLogger(__name__)
_current = threading.local()


class Cancelled(Exception):
    """Nobody waits for this work any more."""


class TooBusy(UserError):
    """So much waits already that more is refused: come back later."""


class TooLong(UserError):
    """Work that ran into its time limit."""


class Job:
    """One piece of work: waiting, running or done. Safe to ask from any thread."""

    def __init__(self, name: str, function: Callable[[Job], Any], seconds: float) -> None:
        self.name, self.function, self.seconds = name, function, seconds
        self.state: Literal["waiting", "running", "done"] = "waiting"
        self.done, self.total = 0, 0
        self.result: Future[Any] = Future()
        self._is_cancelled = threading.Event()
        self._ends = float("inf")

    def cancel(self) -> None:
        """The work ends at its next `check`; if it has not begun, it never will."""
        self._is_cancelled.set()
        self.result.cancel()  # only while it waits

    def tell(self, done: int, total: int) -> None:
        """Progress, and a `check`."""
        self.done, self.total = done, total
        self.check()

    def check(self) -> None:
        """Cancelled or TooLong, if that is so."""
        if self._is_cancelled.is_set():
            raise Cancelled
        if time.monotonic() > self._ends:
            raise TooLong(
                f"this took longer than the {self.seconds:g} seconds that are allowed; ask for fewer or smaller images"
            )

    def run(self) -> None:
        """In the worker's thread."""
        if not self.result.set_running_or_notify_cancel():
            self.state = "done"
            return
        self.state, self._ends = "running", time.monotonic() + self.seconds
        _current.job = self
        try:
            self.check()
            self.result.set_result(self.function(self))
        except BaseException as error:  # whatever it is, it is this job's alone
            self.result.set_exception(error)
        finally:
            _current.job, self.state = None, "done"


class Jobs:
    """A queue with one worker: networks use all cores by themselves, and two at a time would only be slower.

    Args:
        waiting: How many may wait.
        seconds: How long each may run.
    """

    def __init__(self, *, waiting: int, seconds: float) -> None:
        self.waiting, self.seconds = waiting, seconds
        self._queue: collections.deque[Job] = collections.deque()
        self._known: dict[str, Job] = {}
        self._changed = threading.Condition()
        self._is_closed = False
        self._num_threads = torch.get_num_threads()
        self._worker = threading.Thread(target=self._work, name="studio", daemon=True)
        self._worker.start()

    def submit(self, function: Callable[[Job], Any], name: str = "") -> Job:
        """Work for the queue; its outcome is in `result`.

        Args:
            name: By which `find` finds it while it lives; a secret one of ours unless given.

        Raises:
            TooBusy: too much waits already, or a job of this name.
        """
        job = Job(name or secrets.token_urlsafe(12), function, self.seconds)
        with self._changed:
            self._drop_cancelled()
            if len(self._queue) >= self.waiting:
                raise TooBusy(f"the queue is full, {len(self._queue)} waiting; try again in a few seconds")
            if job.name in self._known:
                raise TooBusy(f"a request named {job.name} is not finished; choose another name")
            self._known[job.name] = job
            self._queue.append(job)
            self._changed.notify()
        return job

    def find(self, name: str) -> tuple[Job, int] | None:
        """A job that waits or runs, and how many are before it."""
        with self._changed:
            self._drop_cancelled()
            job = self._known.get(name)
            if job is None:
                return None
            return job, self._queue.index(job) + 1 if job in self._queue else 0

    @property
    def length(self) -> int:
        """How many wait or run."""
        with self._changed:
            self._drop_cancelled()
            return len(self._known)

    def close(self) -> None:
        """Ends the worker after what it is at."""
        with self._changed:
            self._is_closed = True
            for job in self._known.values():
                job.cancel()
            self._changed.notify()

    def _drop_cancelled(self) -> None:
        for job in [job for job in self._queue if job.result.cancelled()]:
            self._queue.remove(job)
            del self._known[job.name]

    def _work(self) -> None:
        torch.set_num_threads(self._num_threads)  # which is a thread's own: without this, results would be rounded anew
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._is_closed)
                if self._is_closed:
                    return
                job = self._queue.popleft()
            job.run()
            with self._changed:
                self._known.pop(job.name, None)


def let_cancel(model: nn.Module) -> None:
    """Has every convolution and linear layer of a network ask first whether the job that it is run for goes on."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_pre_hook(_check)


def _check(*_: Any) -> None:
    job: Job | None = getattr(_current, "job", None)
    if job is not None:
        job.check()
