"""Tuned configs: what they are kept under (keys), where (store), and which serves a problem (lookup).

Importing this makes dispatch ask the user's database, from the first problem on that it has to choose a config for.
"""

from __future__ import annotations

import warnings

from .. import config, env
from .lookup import Lookup
from .store import NewerDatabase, Store


def databases() -> list[tuple[str, Store]]:
    """(name, database) of those there are. One that cannot be read is warned of and left out; none is made by being asked."""
    path = env.tuning_database()
    if not path.exists():
        return []
    try:
        store = Store(path)
    except (OSError, NewerDatabase) as error:
        warnings.warn(f"tuned configs are not used: {error}", stacklevel=2)
        return []
    if store.mended:
        warnings.warn(store.mended, stacklevel=2)
    return [("your database", store)]


def install() -> None:
    """Have dispatch ask the databases, with nothing kept of earlier answers."""
    config.install_lookup(Lookup(databases))


install()
