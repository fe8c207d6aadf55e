"""What was verified where: written with `sbk verify --record`, held against the present sources with --check-record."""

from __future__ import annotations

import json
import math
import pathlib

from .. import environment

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "tests" / "records"


def write(path, kind: str, rows: list[dict], measured_in: dict | None = None, **more) -> None:
    """Store rows with everything that produced them; measured_in: environment.describe(), where it is known already."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"kind": kind, "environment": measured_in or environment.describe(), **more, "rows": rows}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def _finite(x):
    """x with infinite numbers and NaN as words, which JSON has no numbers for."""
    if isinstance(x, dict):
        return {name: _finite(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(value) for value in x]
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x


def stale(path) -> list[str]:
    """In words, in what a record differs from the sources of the backends that load here; empty if in nothing.

    ValueError if the file is not a record.
    """
    try:
        content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        content["environment"]["sources"]
        differences = changed(content)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a record: {error!r}") from error
    return [f"{name}: recorded sources {recorded}, present sources {present}" for name, (recorded, present) in differences.items()]


def backends(content: dict) -> set[str]:
    """Those that a record is of, and what they were timed beside; all, of a profile that was only read."""
    if content["kind"] == "profile":
        return {content["backend"]} if "backend" in content else {*content["environment"].get("sources", {})}
    return {row["contender" if content["kind"] == "bench" else "backend"] for row in content["rows"]}


def changed(content: dict) -> dict[str, tuple[str | None, str]]:
    """(recorded, present) hashes of the backends of a record that load here and whose sources are others by now."""
    recorded, present = content["environment"].get("sources", {}), environment.source_hashes()
    names = sorted(backends(content) & present.keys())
    return {name: (recorded.get(name), present[name]) for name in names if recorded.get(name) != present[name]}
