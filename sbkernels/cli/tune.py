"""`sbk tune`: finds configs for this machine and writes them to the tuning database."""

from __future__ import annotations

import pathlib
import threading
import time

import torch
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from .. import env, registry, tuning
from ..dispatch import BackendError, availability_text
from ..problem import DTYPES
from ..tuning import problems, ranks, replay, store
from ..tuning import tune as tuner
from ..tuning.session import Outcome, Session
from ..tuning.strategies import STRATEGIES, load_optuna
from ..tuning.tune import DIRECTIONS, Task, tasks
from .main import EXCEEDED, INTERRUPTED, OK
from .shared import backend_names, check_device, out, progress_bar, table

LEAST_BUDGET = 1.0  # seconds a task: below, not even the default config is measured


def tune(arguments) -> int:
    """Exit status 1 where nothing could be confirmed for some problem."""
    if arguments.replay:
        return show_replay(pathlib.Path(arguments.replay))
    if arguments.strategy == "guided":
        load_optuna()  # an answer now rather than after the first trial
    devices = chosen_devices(arguments)
    wanted, missing = chosen_tasks(arguments, devices[0])
    session = Session(arguments.strategy, arguments.seed, arguments.budget)
    least = LEAST_BUDGET * len(wanted)
    if session.seconds is not None and not session.seconds >= least:
        raise ValueError(f"--budget {session.seconds:g}: expected at least {least:g} seconds for {len(wanted)} searches")
    path = pathlib.Path(arguments.db) if arguments.db else env.tuning_database()
    with store.Store(path) as database:  # the same
        if database.mended:
            out.print(f"[red]{escape(database.mended)}[/red]")
    for name, reason in missing.items():
        out.print(f"not tuned: {name}: {escape(reason)}")
    display, interrupted = Display(len(wanted), session.seconds), False
    with display:
        try:
            run = ranks.tune if ranks.world() > 1 else tuner.tune
            run(wanted, path, session, devices, processes=arguments.processes, started=display.started, advanced=display.advanced)
        except KeyboardInterrupt:
            interrupted = True
    tuning.install()
    summary(display.outcomes(), path)
    if interrupted:
        out.print("interrupted; what was measured is kept, and the next run goes on from there")
        return INTERRUPTED
    return OK if all(outcome.best for outcome in display.outcomes()) and display.outcomes() else EXCEEDED


def chosen_devices(arguments) -> list[str]:
    """--gpus all: every CUDA device; else the one of --device."""
    if arguments.gpus is None:
        return [ranks.local_device(check_device(arguments.device))]
    if arguments.gpus != "all":
        raise ValueError(f"--gpus {arguments.gpus!r}: expected all")
    if not torch.cuda.device_count():
        raise ValueError("--gpus all: torch sees no CUDA device")
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())]


def chosen_tasks(arguments, device: str) -> tuple[list[Task], dict[str, str]]:
    """Tasks of --shape, else of --set, by default training on a GPU and small on a CPU. BackendError where there are none."""
    dtype = arguments.dtype or ("float32" if device == "cpu" else "bfloat16")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    name = arguments.set or ("small" if device == "cpu" else "training")
    if name not in problems.SETS:
        raise ValueError(f"--set {name!r}: expected one of {', '.join(problems.SETS)}")
    flags = {"attend_current": arguments.attend_current, "skip": not arguments.no_skip}
    found = [problems.parse(text, dtype, device, **flags) for text in arguments.shape or ()]
    directions = DIRECTIONS if arguments.direction == "both" else (arguments.direction,)
    asked, (*names, last) = backend_names(arguments.backend), registry.names()
    wanted, missing = tasks(found or problems.SETS[name](device), asked or registry.names(), directions)
    if asked is None and any(task.backend in names for task in wanted):  # nobody runs the last resort where others can
        wanted = [task for task in wanted if task.backend != last]
        missing[last] = "others run these problems; --backend asks for it"
    if not wanted:
        raise BackendError(f"nothing to tune on {device}\n{availability_text()}")
    return wanted, missing


class Display:
    """The live table on standard error: a line for each task under way or done. Called from several threads."""

    def __init__(self, count: int, seconds: float | None):
        self._count, self._seconds, self._begin = count, seconds, time.monotonic()
        self._lock, self._lines = threading.Lock(), {}
        self._live = Live(console=Console(stderr=True), refresh_per_second=4, transient=True, get_renderable=self._table)

    def __enter__(self):
        self._live.__enter__()
        return self

    def __exit__(self, *exception):
        return self._live.__exit__(*exception)

    def started(self, task: Task) -> None:
        with self._lock:
            self._lines[task.backend, str(task.problem)] = Outcome(task.backend, task.problem)

    def advanced(self, outcome: Outcome) -> None:
        with self._lock:
            self._lines[outcome.backend, str(outcome.problem)] = outcome

    def outcomes(self) -> list[Outcome]:
        """The last known of each task, those that were begun."""
        with self._lock:
            return [outcome for outcome in self._lines.values() if outcome.configs]

    def _table(self) -> Table:
        spent = time.monotonic() - self._begin
        left = "" if self._seconds is None else f", {max(0.0, self._seconds - spent):.0f} s left"
        made = Table(title=f"{len(self._lines)} of {self._count} begun, {spent:.0f} s{left}", title_justify="left", box=None)
        for column in ("backend", "problem", "configs", "failed", "best"):
            made.add_column(column, no_wrap=column != "problem")
        with self._lock:
            last = list(self._lines.values())[-12:]
        for outcome in last:
            best = f"{outcome.ms:.4g} ms, {outcome.gain:.2f} x default" if outcome.ms else ""
            done = f"{outcome.known + outcome.tried}/{outcome.configs}"
            made.add_row(outcome.backend, escape(str(outcome.problem)), done, str(sum(outcome.failed.values())), best)
        return made


def summary(outcomes: list[Outcome], path: pathlib.Path) -> None:
    """What was found, a line each, and why not where nothing was."""
    numbers = ("tried", "known", "of", "default ms", "best ms", "gain")
    rows = table(f"tuned in {path}", "backend", "problem", *numbers, "config", right=numbers)
    for outcome in outcomes:
        failed = ", ".join(f"{count} {status}" for status, count in sorted(outcome.failed.items()))
        values = " ".join(f"{name}={value}" for name, value in (outcome.best or {}).items())
        if outcome.best and outcome.gain == 1:
            values = f"the default; as fast: {len(outcome.ties)}" if outcome.ties else "the default"
        notes = "; ".join(filter(None, (values, outcome.why, failed and f"failed: {failed}")))
        times = [f"{x:.4g}" if x else "-" for x in (outcome.default_ms, outcome.ms)]
        gain = f"{outcome.gain:.3f}" if outcome.best else "-"
        counts = [str(n) for n in (outcome.tried, outcome.known, outcome.configs)]
        rows.add_row(outcome.backend, escape(str(outcome.problem)), *counts, *times, gain, escape(notes))
    out.print(rows)
    gains = [outcome.gain for outcome in outcomes if outcome.best]
    better = sum(gain > 1 for gain in gains)
    out.print(f"{better} of {len(outcomes)} faster than the default, {len(gains) - better} no faster: the default is kept there")


def show_replay(path: pathlib.Path) -> int:
    """How near each strategy comes to the best of fully measured spaces, by what share of them it tries."""
    spaces = replay.spaces(path)
    if not spaces:
        raise ValueError(f"{path} has no fully measured space")
    rows = table(
        f"{path}: {len(spaces)} spaces of {min(map(len, spaces))} to {max(map(len, spaces))} configs, {replay.SEEDS} seeds",
        "strategy", "share", "median", "95 %", "within 2 %", right=("share", "median", "95 %", "within 2 %"),
    )  # fmt: skip
    wanted = [(name, share) for name in STRATEGIES for share in (replay.SHARES if name != "exhaustive" else (1.0,))]
    with progress_bar() as bar:
        for name, share in bar.track(wanted, description="replaying"):
            regrets = replay.regrets(spaces, name, share)
            shown = (f"{share:.0%}", f"{replay.quantile(regrets, 0.5):.2%}", f"{replay.quantile(regrets, 0.95):.2%}")
            rows.add_row(name, *shown, f"{sum(r <= 0.02 for r in regrets) / len(regrets):.0%}")
    out.print(rows)
    out.print("median, 95 %: how much slower the best config that was tried is than the best of all.", style="dim")
    return OK
