"""Work in processes that can be killed: a crash or a hang costs the item it happened in, and is named; the others go on."""

from __future__ import annotations

import collections
import dataclasses
import multiprocessing
import multiprocessing.connection
import signal
import time
from collections.abc import Callable, Iterator

JOIN_SECONDS = 5.0  # for a process whose pipe has closed to end
START_SECONDS = 120.0  # for a process to start and to import what it needs
READY = "ready"


@dataclasses.dataclass
class Last:
    """A result after which its process is to be used no more, as after an illegal access on a GPU; another takes the rest."""

    result: object


class Pool:
    """Processes that work(item, state) runs in; a context manager, which kills them all on leaving.

    work: a function of a module, or a partial of one. state: a dict, empty at the start of a group, whose items run in turn in one
    process. deadline: seconds an item may take, once its process has started; that process is killed then. It may be changed for
    the items to come. Processes start as they are needed and stay.
    """

    def __init__(self, work: Callable, processes: int, deadline: float):
        self.deadline = deadline
        self._work, self._processes = work, processes
        self._context = multiprocessing.get_context("spawn")
        self._waiting, self._workers = collections.deque(), []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for worker in self._workers:
            worker.end()
        self._workers.clear()
        self._waiting.clear()

    def put(self, group: list) -> None:
        """Queue the items of a group."""
        if group:
            self._waiting.append(list(group))

    @property
    def busy(self) -> bool:
        """Whether results are still to come."""
        return bool(self._waiting) or any(worker.left for worker in self._workers)

    def results(self, wait: float | None = None) -> list[tuple[object, object, str | None]]:
        """(item, work(item, state), None) of items that are done, or (item, None, what was lost) in words.

        Waits until there is one, at most `wait` seconds; empty then, or when nothing is to come.
        """
        until = float("inf") if wait is None else time.monotonic() + wait
        while True:
            self._hand_out()
            found = []
            for worker in list(self._workers):
                found += worker.results()
                lost = worker.lost(self.deadline) if worker.left and not worker.done else None
                if lost is not None:
                    found.append((worker.left.pop(0), None, lost))
                if lost is not None or worker.done or worker.closed:
                    self._workers.remove(worker)
                    worker.end()
                    if worker.left:
                        self._waiting.appendleft(worker.left)
            left = until - time.monotonic()
            if found or left <= 0 or not self.busy:
                return found
            self._hand_out()
            _wait([worker for worker in self._workers if worker.left], self.deadline, left)

    def ask(self, item) -> tuple[object, str | None]:
        """work(item, {}) and None, or None and what was lost in words; nothing else may be under way."""
        self.put([item])
        ((_, result, lost),) = self.results()
        return result, lost

    def _hand_out(self) -> None:
        for worker in self._workers:
            if self._waiting and not worker.left:
                worker.take(self._waiting.popleft())
        while self._waiting and len(self._workers) < self._processes:
            self._workers.append(_Worker(self._context, self._work))
            self._workers[-1].take(self._waiting.popleft())


def run(work: Callable, groups: list[list], processes: int, deadline: float) -> Iterator[tuple[object, object, str | None]]:
    """What Pool.results gives of all items of the groups, as they come. All processes are killed when the generator is closed."""
    with Pool(work, processes, deadline) as pool:
        for group in groups:
            pool.put(group)
        while pool.busy:
            yield from pool.results()


class _Worker:
    """A process, and the items it has still to give results of; the first is under way."""

    def __init__(self, context, work: Callable):
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work), daemon=True)
        self.process.start()
        theirs.close()
        self.left, self.since, self.started, self.closed, self.done = [], time.monotonic(), False, False, False

    def take(self, group: list) -> None:
        self.left, self.since = group, time.monotonic()
        try:
            self.connection.send(group)
        except OSError:  # it died since its last result
            self.closed = True

    def results(self) -> Iterator[tuple[object, object, None]]:
        while self.left and not (self.closed or self.done) and self.connection.poll():
            try:
                result = self.connection.recv()
            except (EOFError, OSError):
                self.closed = True
                return
            self.since = time.monotonic()
            if not self.started:
                self.started = True
                continue
            self.done = isinstance(result, Last)
            yield self.left.pop(0), result.result if self.done else result, None

    def allowed(self, deadline: float) -> float:
        """Seconds from `since` on for what is under way."""
        return deadline if self.started else max(deadline, START_SECONDS)

    def lost(self, deadline: float) -> str | None:
        """What became of the item under way, if nothing more comes of it."""
        if self.closed:
            self.process.join(JOIN_SECONDS)
            return f"its process died with exit status {self.process.exitcode}"
        if time.monotonic() - self.since > self.allowed(deadline):
            return f"no result in {self.allowed(deadline):g} s: its process was killed"
        return None

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _wait(workers: list[_Worker], deadline: float, most: float) -> None:
    """Until one of them has something to say, or is late, or `most` seconds have passed."""
    first = min(worker.since + worker.allowed(deadline) for worker in workers) - time.monotonic()
    multiprocessing.connection.wait([worker.connection for worker in workers], min(most, max(0.0, first) + 0.01))


def _serve(connection, work: Callable) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who interrupts the command kills this process
    connection.send(READY)
    while True:
        try:
            group = connection.recv()
        except EOFError:
            return
        state = {}
        for item in group:
            connection.send(work(item, state))
