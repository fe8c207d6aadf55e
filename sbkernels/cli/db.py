"""`sbk db`: the tuning database, read and carried from machine to machine."""

from __future__ import annotations

import pathlib

from rich.markup import escape

from .. import env
from ..tuning import keys
from ..tuning.store import Store
from .shared import out, table


def db(arguments) -> int:
    """Show, export to a file, or import exports. ValueError where there is nothing to show or to take in."""
    path = pathlib.Path(arguments.db) if arguments.db else env.tuning_database()
    files = [pathlib.Path(name) for name in arguments.files]
    allowed = {"show": (0, 0), "export": (1, 1), "import": (1, None)}[arguments.action]
    if len(files) < allowed[0] or (allowed[1] is not None and len(files) > allowed[1]):
        words = {"show": "no FILE", "export": "one FILE", "import": "one FILE or more"}[arguments.action]
        raise ValueError(f"{arguments.action} with {len(files)} files: expected {words}")
    if arguments.action != "import" and not path.exists():
        raise ValueError(f"there is no tuning database {path}; `sbk db import` makes one")
    for file in files if arguments.action == "import" else ():
        if not file.is_file():
            raise ValueError(f"there is no file {file}")
    with Store(path) as store:
        if store.mended:
            out.print(f"[red]{escape(store.mended)}[/red]")
        if arguments.action == "export":
            out.print(f"{store.count()} trials stored in {store.export(files[0])}", soft_wrap=True)
        elif arguments.action == "import":
            for file in files:
                out.print(f"{store.take_in(file)} trials taken from {file}, {store.count()} in {path}", soft_wrap=True)
        else:
            show(store, path)
    return 0


def show(store: Store, path: pathlib.Path) -> None:
    """The fastest config of each problem on each machine, of all toolchains."""
    rows = table(f"{path}: {store.count()} trials", "machine", "backend", "problem", "config", "ms", right=("ms",))
    fastest = {}
    for row in store.measured():
        key = keys.canonical([row.machine, row.kernel, row.problem])
        if row.ms is not None and (key not in fastest or row.ms < fastest[key].ms):
            fastest[key] = row
    for _, row in sorted(fastest.items()):
        exact, sizes = row.problem["exact"], row.problem["sizes"]
        words = f"{exact['direction']} {sizes['heads']} heads M={sizes['queries']} N={sizes['keys']} "
        words += f"D={exact['head_dim']} {exact['dtype']}"
        values = " ".join(f"{name}={value}" for name, value in row.config.items())
        rows.add_row(escape(row.machine["name"]), row.kernel["backend"], words, values, f"{row.ms:.4g}")
    out.print(rows)
