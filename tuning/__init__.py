"""Tuned configs: what they are kept under (keys), where (store), and which serves a problem (lookup).

Importing this makes dispatch ask the user's database, from the first problem on that it has to choose a config for.
"""

from __future__ import annotations

import pathlib
import warnings

from .. import config, env
from .autotune import on_miss
from .lookup import Lookup
from .store import NewerDatabase, Store

SHIPPED = pathlib.Path(__file__).parent / "data"  # exports, a file for each GPU


def databases() -> list[tuple[str, Store]]:
    """(name, database) of those there are, the user's first. One that cannot be read is warned of and left out; none is made."""
    found, path = [], env.tuning_database()
    try:
        if path.exists():
            found.append(("your database", user_database(path)))
    except (OSError, NewerDatabase) as error:
        warnings.warn(f"tuned configs are not used: {error}", stacklevel=2)
    return [*found, ("shipped", shipped())]


def user_database(path: pathlib.Path) -> Store:
    """The database at a path, read only where it cannot be written. OSError and NewerDatabase as Store."""
    try:
        store = Store(path)
    except OSError:
        return Store(path, writable=False)
    if store.mended:
        warnings.warn(store.mended, stacklevel=2)
    return store


def shipped() -> Store:
    """What sbkernels comes with, in memory."""
    store = Store(":memory:")
    for path in sorted(SHIPPED.glob("*.json")):
        store.take_in(path)
    return store


def install() -> None:
    """Have dispatch ask the databases, with nothing kept of earlier answers."""
    config.install_lookup(Lookup(databases), on_miss)


install()
