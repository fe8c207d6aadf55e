"""What a run of the harness says: counts and worst errors by check, what was covered, skipped and why; as JSON and HTML."""

from __future__ import annotations

import collections
import html

from ..markup import number, table
from . import tolerance
from .inputs import EXPANDED, MEMORY, REGIMES, TILE, Case
from .properties import PROPERTIES

CASES = "cases"  # the check of all five outputs of a case together, whose time it is
# What a case may cover: name -> whether it does.
FEATURES = {
    **{f"regime {name}": (lambda case, name=name: case.regime == name) for name in REGIMES},
    **{f"memory {name}": (lambda case, name=name: name in (case.strides or (case.layout,))) for name in (*MEMORY, EXPANDED)},
    **{f"D or Dv {dim}": (lambda case, dim=dim: dim in (case.D, case.Dv)) for dim in (16, 32, 50, 64, 80, 96, 128, 192, 256)},
    "Dv other than D": lambda case: case.Dv != case.D,
    **{f"{n} heads on one": (lambda case, n=n: n * case.Hk == case.H) for n in (1, 2, 3, 4)},
    **{
        f"{n} keys": (lambda case, n=n: not case.lengths and n == case.N)
        for n in (1, 2, TILE - 1, TILE, TILE + 1, 2 * TILE, 500, 4096, 8192)
    },
    "one query": lambda case: not case.lengths and case.M == 1,
    "fewer queries than keys": lambda case: not case.lengths and case.M < case.N,
    "packed sequences": lambda case: bool(case.lengths),
    "empty sequences": lambda case: 0 in case.lengths,
    "attend_current": lambda case: case.attend_current,
    "early stop": lambda case: case.skip,
}


def label(backend: str, variant: str) -> str:
    """How a backend's variant is called in tables."""
    return f"{backend} ({variant})" if variant else backend


def _label(outcome) -> str:
    return label(outcome.backend, outcome.variant)


def checks(outcomes) -> list[dict]:
    """A row for each backend and check over all dtypes: how many ran, failed, were skipped, the worst ratio and where, seconds."""
    rows: dict[tuple[str, str], dict] = {}
    for outcome in outcomes:
        is_property = outcome.name in PROPERTIES
        names = (outcome.name,) if is_property else (CASES, *tolerance.OUTPUTS)
        for name in names:
            empty = {"run": 0, "skipped": 0, "failed": 0, "worst": 0.0, "where": "", "seconds": None}
            row = rows.setdefault((_label(outcome), name), empty)
            if name in (outcome.name, CASES):
                row["seconds"] = (row["seconds"] or 0.0) + outcome.seconds
            if outcome.skipped:
                row["skipped"] += 1
                continue
            found = [f for f in outcome.findings if name in (outcome.name, CASES) or f.output == name]
            row["run"] += 1
            row["failed"] += bool(outcome.error) or not all(f.ok for f in found)
            for f in found:
                if f.ratio > row["worst"]:
                    row["worst"], row["where"] = f.ratio, f"{outcome.dtype} {outcome.name}: {f.output}, {f.where}"
    return [{"backend": backend, "check": check} | row for (backend, check), row in rows.items()]


def coverage(outcomes) -> dict[str, dict[str, list[int]]]:
    """feature -> backend -> [cases that ran, cases skipped], over all dtypes; features that no case has count 0."""
    cases = [(outcome, Case.parse(outcome.name)) for outcome in outcomes if outcome.name not in PROPERTIES]
    matrix = {}
    for feature, has in {f"dtype {d}": d for d in dict.fromkeys(o.dtype for o in outcomes)}.items():
        matrix[feature] = _count((o for o, _ in cases if o.dtype == has), outcomes)
    for feature, has in FEATURES.items():
        matrix[feature] = _count((o for o, case in cases if has(case)), outcomes)
    matrix["properties"] = _count((o for o in outcomes if o.name in PROPERTIES), outcomes)
    return matrix


def _count(chosen, outcomes) -> dict[str, list[int]]:
    counts = {_label(outcome): [0, 0] for outcome in outcomes}
    for outcome in chosen:
        counts[_label(outcome)][bool(outcome.skipped)] += 1
    return counts


def skipped(outcomes) -> list[dict]:
    """How many checks of each backend were skipped, by reason."""
    counts = collections.Counter((_label(o), o.skipped) for o in outcomes if o.skipped)
    return [{"backend": backend, "reason": reason, "count": count} for (backend, reason), count in sorted(counts.items())]


def report(outcomes, missing: dict[str, str], planned: int) -> dict:
    """All of the above as JSON takes it; missing: backends that could not run, with their reasons."""
    return {
        "planned": planned,
        "ran": sum(not o.skipped for o in outcomes),
        "skipped": sum(bool(o.skipped) for o in outcomes),
        "failed": sum(not o.ok for o in outcomes),
        "seconds": sum(o.seconds for o in outcomes),
        "missing": missing,
        "reasons": skipped(outcomes),
        "coverage": coverage(outcomes),
        "checks": checks(outcomes),
    }


def totals(found: dict) -> str:
    """The counts of a report in a line."""
    return (
        f"{found['planned']} checks planned: {found['ran']} ran in {found['seconds']:.0f} s, {found['skipped']} skipped, "
        f"{found['failed']} failed, {found['planned'] - found['ran'] - found['skipped']} not reached"
    )


def section(found: dict) -> str:
    """A report as a section of an HTML page, without style or script."""
    parts = ["<section id='verification'>", "<h2>Verification</h2>", f"<p>{html.escape(totals(found))}</p>", tables(found)]
    return "\n".join([*parts, "</section>"]) + "\n"


def tables(found: dict) -> str:
    """The tables of a section: checks, coverage, what was skipped."""
    backends = list(dict.fromkeys(row["backend"] for row in found["checks"]))
    counts = ("run", "skipped", "failed")
    numbers = (*counts, "worst ratio", "seconds")
    by_check = [
        (row["backend"], row["check"], *(row[name] for name in counts), number(row["worst"], ".2f"), number(row["seconds"], ".1f"),
         row["where"])
        for row in found["checks"]
    ]  # fmt: skip
    covered = [
        (feature, *(" / ".join(map(str, counts.get(backend, [0, 0]))) for backend in backends))
        for feature, counts in found["coverage"].items()
    ]
    why = [(row["backend"], row["count"], row["reason"]) for row in found["reasons"]]
    why += [(name, "all", reason) for name, reason in found["missing"].items()]
    parts = [
        "<h3>Checks</h3>",
        table(("backend", "check", *numbers, "worst at"), by_check, numbers),
        "<h3>Coverage: cases run / skipped</h3>",
        table(("feature", *backends), covered, tuple(backends)),
        "<h3>Skipped</h3>",
        table(("backend", "checks", "why"), why, ("checks",)),
    ]
    return "\n".join(parts)
