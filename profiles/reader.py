"""What a profiler's report says: Nsight Compute's raw page and Nsight Systems' summary of kernels, as CSV of any columns."""

from __future__ import annotations

import csv
import io
import pathlib
import re
import subprocess

from .counters import COUNTERS, NO_STALLS, STALL

FOLDER = pathlib.Path(__file__).resolve().parent
SUFFIXES = {"ncu": ".ncu-rep", "nsys": ".nsys-rep"}
KERNEL = {"ncu": "Kernel Name", "nsys": "Name"}  # the column that tells the two apart
# Of ncu, which scales them as it sees fit: how many of the unit that a counter is shown in one of them is.
TIMES = {"s": 1e6, "second": 1e6, "ms": 1e3, "msecond": 1e3, "us": 1.0, "usecond": 1.0, "ns": 1e-3, "nsecond": 1e-3}


def script(tool: str, *words: str) -> list[str]:
    """The command that runs a tool's script."""
    return ["bash", str(FOLDER / f"{tool}.sh"), *words]


def read(path: pathlib.Path) -> tuple[str, list[dict]]:
    """(tool, rows) of a report or of the CSV it was printed as.

    ValueError for a file that is neither, FileNotFoundError where there is none, RuntimeError where the tool cannot read it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    tool = next((tool for tool, suffix in SUFFIXES.items() if path.suffix == suffix), None)
    if tool is None:
        return parse(path.read_text(encoding="utf-8", errors="replace"), str(path))
    result = subprocess.run(script(tool, "read", str(path)), capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{tool} does not read {path}: {(result.stderr or result.stdout).strip()}")
    return parse(result.stdout, str(path))


def parse(text: str, source: str) -> tuple[str, list[dict]]:
    """(tool, rows) of CSV, below whatever the tool says before it. ValueError, naming the source, where there is none."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        columns = next(csv.reader([line]), [])
        tool = next((tool for tool, column in KERNEL.items() if column in columns and len(columns) > 1), None)
        if tool is not None:
            # A kernel without a value for each column is what the tool says after the table.
            table = [row for row in csv.reader(io.StringIO("\n".join(lines[number + 1 :]))) if len(row) == len(columns)]
            rows = [dict(zip(columns, row, strict=True)) for row in table]
            return tool, compute_rows(rows) if tool == "ncu" else system_rows(rows)
    raise ValueError(f"{source} is no report: expected {' or '.join(SUFFIXES.values())}, or CSV with a column Kernel Name or Name")


def compute_rows(rows: list[dict]) -> list[dict]:
    """A row for each kernel that ncu profiled: name, full name, counters (None where missing), stalls by reason."""
    units = rows.pop(0) if rows and not rows[0][KERNEL["ncu"]] else {}
    return [
        {
            "kernel": short(row[KERNEL["ncu"]]),
            "name": row[KERNEL["ncu"]],
            "counters": {c.name: scaled(row.get(c.metric), units.get(c.metric, ""), c.unit) for c in COUNTERS},
            "stalls": stalls(row),
        }
        for row in rows
    ]


def system_rows(rows: list[dict]) -> list[dict]:
    """A row for each kernel of nsys' summary: share of the time in percent, calls, microseconds in all and of the median call."""
    columns = {"share": "Time (%)", "calls": "Instances", "total": "Total Time (ns)", "median": "Med (ns)"}
    found = []
    for row in rows:
        values = {name: number(row.get(column)) for name, column in columns.items()}
        times = {name: None if values[name] is None else values[name] * TIMES["ns"] for name in ("total", "median")}
        found.append({"kernel": short(row[KERNEL["nsys"]]), "name": row[KERNEL["nsys"]]} | values | times)
    return found


def stalls(row: dict) -> dict[str, float]:
    """Warps that wait by reason, most first."""
    found = {match[1]: number(value) for name, value in row.items() if (match := STALL.fullmatch(name))}
    kept = {reason: value for reason, value in found.items() if value and reason not in NO_STALLS}
    return dict(sorted(kept.items(), key=lambda item: -item[1]))


def number(text: str | None) -> float | None:
    """The number of a cell, with commas or without; None for none."""
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def scaled(text: str | None, unit: str, wanted: str) -> float | None:
    """A cell's number in the unit wanted: of times; others ncu does not scale."""
    value = number(text)
    return value if value is None or wanted != "us" else value * TIMES.get(unit, TIMES["ns"])


def short(name: str) -> str:
    """A kernel's name without return type, namespaces, template arguments, parameters and "_kernel"."""
    head = re.split(r"[<(]", re.sub(r"\([^()]*namespace\)|\(anonymous\)", "", name), maxsplit=1)[0]
    return head.split()[-1].rsplit("::", 1)[-1].removesuffix("_kernel") if head.strip() else name
