"""What commands share: checks of names, the progress bar, tables."""

from __future__ import annotations

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .. import dispatch, env
from ..problem import DTYPES
from ..verify.report import label as label

NAMES = ("backend", "pass", "dtype", "name", "variant")  # columns that never wrap
# Tables need this many columns; where output is no terminal, nothing else says how wide it may be.
WIDTH = 110
out = Console(highlight=False)
if not out.is_terminal:
    out = Console(highlight=False, width=WIDTH)


def check_device(device: str) -> str:
    """The device's full name; ValueError if torch has no such device."""
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"--device {device!r} is no device: expected cpu, cuda or cuda:N") from error
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {device!r}: expected cpu, cuda or cuda:N")
    if found.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"--device {device!r}: torch sees no CUDA device")
        index = torch.cuda.current_device() if found.index is None else found.index
        if index >= torch.cuda.device_count():
            raise ValueError(f"--device {device!r}: there are {torch.cuda.device_count()} CUDA devices")
        return f"cuda:{index}"
    return "cpu"


def backend_names(asked: list[str] | None) -> tuple[str, ...] | None:
    """Backends a command is restricted to: its --backend options, else SBKERNELS_BACKEND; None for all. ValueError if unknown."""
    names, asked_by = (asked, "--backend") if asked else ([env.backend()] if env.backend() else [], env.BACKEND)
    for name in names:
        dispatch.check_name(name, asked_by)
    return tuple(names) or None


def check_dtypes(asked: list[str] | None) -> list[str] | None:
    """ValueError if a dtype is not one of ours."""
    for name in asked or ():
        if name not in DTYPES:
            raise ValueError(f"--dtype {name!r}: expected one of {', '.join(DTYPES)}")
    return asked


def progress_bar() -> Progress:
    """A bar on standard error that vanishes when done."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    return Progress(*columns, console=Console(stderr=True), transient=True)


def shown(value: float | None, form: str) -> str:
    """A number, or that there is none."""
    return "-" if value is None else format(value, form)


def table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Table:
    """Print the title and make a plain table under it; columns named in `right` hold numbers."""
    out.print(title, style="bold", markup=False, soft_wrap=True)
    made = Table(header_style="dim", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        numbers = column in right or column in NAMES
        made.add_column(column, justify="right" if column in right else "left", no_wrap=numbers, overflow="fold")
    return made
