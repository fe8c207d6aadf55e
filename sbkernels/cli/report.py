"""`sbk report`: stored results as one HTML page."""

from __future__ import annotations

import pathlib

from ..report import build, stored
from .main import OK
from .shared import out

KB = 1000


def report(arguments) -> int:
    """Exit status 2 where a file is no result, or the charts' library is missing."""
    paths = [pathlib.Path(path) for path in arguments.files] or stored.default()
    page = build.build(stored.load(paths)).encode()
    target = pathlib.Path(arguments.output)
    target.write_bytes(page)
    out.print(f"{target}: {len(page) / KB:,.0f} kB of {len(paths)} files", soft_wrap=True)
    return OK
