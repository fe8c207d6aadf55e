"""`sbk db`: the tuning database, read, checked and carried from machine to machine."""

from __future__ import annotations

import pathlib

from rich.markup import escape

from .. import env, registry
from ..tuning import keys, user_database
from ..tuning.store import SERVED, STATUSES, Store
from .main import EXCEEDED, OK
from .shared import out, table

# action -> (fewest files, most files or None, in words)
FILES = {
    "show": (0, 0, "no FILE"), "history": (0, 0, "no FILE"), "check": (0, 0, "no FILE"), "prune": (0, 0, "no FILE"),
    "export": (1, 1, "one FILE"), "import": (1, None, "one FILE or more"), "merge": (1, None, "one FILE or more"),
}  # fmt: skip
MAKES = ("import", "merge")  # a database, where there is none
READS = ("show", "history", "export")
COLUMNS = ("at", "backend", "problem", "config", "what", "ms")  # of the history
EXCERPTS = {"served": SERVED, "medians": STATUSES}  # of --only
SHOWN = 40  # trials of the history


def db(arguments) -> int:
    """One action. ValueError where files are missing or too many; exit status 1 where `check` finds faults."""
    action = arguments.action
    path = pathlib.Path(arguments.db) if arguments.db else env.tuning_database()
    files = [pathlib.Path(name) for name in arguments.files]
    fewest, most, words = FILES[action]
    if len(files) < fewest or (most is not None and len(files) > most):
        raise ValueError(f"{action} with {len(files)} files: expected {words}")
    if action not in MAKES and not path.exists():
        raise ValueError(f"there is no tuning database {path}; `sbk tune` and `sbk db import` make one")
    if arguments.only and action != "export":
        raise ValueError(f"--only {arguments.only} with {action}: expected with export")
    for file in files if action in MAKES else ():
        if not file.is_file():
            raise ValueError(f"there is no file {file}")
        if action == "merge" and path.exists() and file.samefile(path):
            raise ValueError(f"merge of {file} with itself")
    with user_database(path) if action in READS else Store(path) as store:
        if store.mended:
            out.print(f"[red]{escape(store.mended)}[/red]")
        return ACTIONS[action](store.excerpt(EXCERPTS[arguments.only]) if arguments.only else store, path, files)


def show(store: Store, path: pathlib.Path, _) -> int:
    """The config that is served for each problem on each machine, of all toolchains and kernel sources."""
    rows = table(f"{path}: {store.count()} trials", "machine", "backend", "problem", "config", "ms", right=("ms",))
    fastest = {}
    for row in store.measured():
        key = keys.canonical([row.machine, row.kernel, row.problem])
        if row.confirmed is not None and (key not in fastest or row.confirmed < fastest[key].confirmed):
            fastest[key] = row
    for _, row in sorted(fastest.items()):
        names = escape(row.machine["name"]), row.kernel["backend"], problem_words(row.problem)
        rows.add_row(*names, config_words(row.config), f"{row.confirmed:.4g}")
    out.print(rows)
    return OK


def history(store: Store, path: pathlib.Path, _) -> int:
    """The last trials, oldest first."""
    trials = store.trials()
    rows = table(f"{path}: {len(trials)} trials, the last {SHOWN} of them", *COLUMNS, right=("ms",))
    for trial in trials[-SHOWN:]:
        bodies, median = trial.bodies, "-" if trial.median is None else f"{trial.median:.4g}"
        what = trial.status + (f": {trial.details['why']}" if trial.details.get("why") else "")
        words = problem_words(bodies["problem"]), config_words(bodies["config"])
        rows.add_row(trial.details.get("at", "-")[:19], bodies["kernel"]["backend"], *words, escape(what), median)
    out.print(rows)
    return OK


def check(store: Store, path: pathlib.Path, _) -> int:
    """Whether every row holds what its name says, and how many trials are of the present kernels."""
    faults = store.faults()
    for fault in faults:
        out.print(f"[red]{escape(fault)}[/red]")
    present = {keys.digest(kernel) for kernel in present_kernels()}
    current = sum(keys.digest(trial.bodies["kernel"]) in present for trial in store.trials())
    out.print(f"{path}: {store.count()} trials, {current} of the present kernels, {len(faults)} faults", soft_wrap=True)
    return EXCEEDED if faults else OK


def prune(store: Store, path: pathlib.Path, _) -> int:
    """Remove the trials of kernels that are no more, after an export of all."""
    kept = store.export(path.with_suffix(".before-prune.json"))
    out.print(
        f"{store.prune(present_kernels())} trials of other kernels removed, {store.count()} left; all are in {kept}", soft_wrap=True
    )
    return OK


def export(store: Store, _, files) -> int:
    out.print(f"{store.count()} trials stored in {store.export(files[0])}", soft_wrap=True)
    return OK


def take_in(store: Store, path: pathlib.Path, files) -> int:
    for file in files:
        out.print(f"{store.take_in(file)} trials taken from {file}, {store.count()} in {path}", soft_wrap=True)
    return OK


def merge(store: Store, path: pathlib.Path, files) -> int:
    for file in files:
        out.print(f"{store.merge(file)} trials new in {file}, {store.count()} in {path}", soft_wrap=True)
    return OK


ACTIONS = {
    "show": show, "history": history, "check": check, "prune": prune, "export": export, "import": take_in, "merge": merge,
}  # fmt: skip


def present_kernels() -> list[dict]:
    """Kernels of the backends that load here, of both directions."""
    loaded = [backend for backend, _ in map(registry.try_load, registry.names()) if backend is not None]
    return [keys.kernel(backend, direction) for backend in loaded for direction in ("forward", "backward")]


def problem_words(problem: dict) -> str:
    exact, sizes = problem["exact"], problem["sizes"]
    lengths = f"N={sizes['keys']}" if sizes["queries"] == sizes["keys"] else f"M={sizes['queries']} N={sizes['keys']}"
    dims = f"D={exact['head_dim']}" if exact["head_dim"] == exact["value_dim"] else f"D={exact['head_dim']}/{exact['value_dim']}"
    return f"{exact['direction']} {sizes['heads']} heads {lengths} {dims} {exact['dtype']}"


def config_words(config: dict) -> str:
    return " ".join(f"{name}={value}" for name, value in config.items())
