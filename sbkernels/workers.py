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


@dataclasses.dataclass
class Last:
    """A result after which its process is to be used no more, as after an illegal access on a GPU; another takes the rest."""

    result: object


def run(work: Callable, groups: list[list], processes: int, deadline: float) -> Iterator[tuple[object, object, str | None]]:
    """(item, work(item, state), None) of each item of the groups as they come, or (item, None, what was lost) in words.

    work: a function of a module, or a partial of one. state: a dict, empty at the start of a group, whose items run in turn in one
    process. deadline: seconds an item may take, the start of a process included; its process is killed then. All are killed when
    the generator is closed.
    """
    context = multiprocessing.get_context("spawn")
    waiting, workers = collections.deque(list(group) for group in groups if group), []
    try:
        while waiting or workers:
            while waiting and len(workers) < processes:
                workers.append(_Worker(context, work))
            for worker in workers:
                if not worker.left and waiting:
                    worker.take(waiting.popleft())
            for worker in [worker for worker in workers if not worker.left]:
                workers.remove(worker)
                worker.end()
            _wait(workers, deadline)
            for worker in list(workers):
                yield from worker.results()
                lost = worker.lost(deadline) if worker.left and not worker.done else None
                if lost is not None:
                    workers.remove(worker)
                    worker.end()
                    yield worker.left.pop(0), None, lost
                elif worker.done:
                    workers.remove(worker)
                    worker.end()
                if worker not in workers and worker.left:
                    waiting.appendleft(worker.left)
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """A process, and the items it has still to give results of; the first is under way."""

    def __init__(self, context, work: Callable):
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work), daemon=True)
        self.process.start()
        theirs.close()
        self.left, self.since, self.closed, self.done = [], time.monotonic(), False, False

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
            self.done = isinstance(result, Last)
            yield self.left.pop(0), result.result if self.done else result, None

    def lost(self, deadline: float) -> str | None:
        """What became of the item under way, if nothing more comes of it."""
        if self.closed:
            self.process.join(JOIN_SECONDS)
            return f"its process died with exit status {self.process.exitcode}"
        if time.monotonic() - self.since > deadline:
            return f"no result in {deadline:g} s: its process was killed"
        return None

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _wait(workers: list[_Worker], deadline: float) -> None:
    """Until one of them has something to say, or is late."""
    if workers:
        first = min(worker.since for worker in workers) + deadline - time.monotonic()
        multiprocessing.connection.wait([worker.connection for worker in workers], max(0.0, first) + 0.01)


def _serve(connection, work: Callable) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who interrupts the command kills this process
    while True:
        try:
            group = connection.recv()
        except EOFError:
            return
        state = {}
        for item in group:
            connection.send(work(item, state))
