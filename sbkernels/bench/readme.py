"""The tables of README.md, made of the records in tests/records.

A table stands between `<!-- table: RECORD COLUMN... -->` and `<!-- end of table -->`; RECORD is a file's name without .json, of
`sbk compare` or `sbk bench`, a COLUMN is contender:what. what is a pass, with the time in milliseconds and in brackets the speed
beside FlashAttention-2 and cuDNN; "both": forward and backward together beside FlashAttention-2; "error": the larger relative L2
error of both passes; "tokens": thousands of tokens a second.
"""

from __future__ import annotations

import json
import pathlib
import re

from ..verify.record import FOLDER
from . import compare

README = pathlib.Path(__file__).resolve().parents[2] / "README.md"
MARKED = re.compile(r"(<!-- table: ([^>]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
BESIDE = ("FlashAttention-2", "cuDNN")
HEADS = {"both": "both, beside FlashAttention-2", "error": "rel. L2 error", "tokens": "1000 tokens/s"}


def rewrite() -> bool:
    """Write all tables anew; whether that changed README.md. ValueError names a table that cannot be made."""
    try:
        text = README.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ValueError(f"there is no {README}: expected a checkout of the repository") from error
    made = filled(text)
    README.write_text(made, encoding="utf-8")
    return made != text


def filled(text: str) -> str:
    """The text with all its tables made anew."""
    return MARKED.sub(lambda found: f"{found[1]}{table(found[2])}{found[3]}", text)


def table(asked: str) -> str:
    """The lines of a table, "RECORD COLUMN..."."""
    name, *columns = asked.split()
    try:
        content = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"table {asked!r} of README.md: {error}") from error
    wanted = [column.rpartition(":")[::2] for column in columns]
    problems = grouped(content)
    lines = [" | ".join(["B, H, N, D", *(f"{who} {HEADS.get(what, what)}" for who, what in wanted)])]
    lines.append(" | ".join(["---"] * (len(columns) + 1)))
    for shape, rows in problems.items():
        cells = [cell(rows, who, what) for who, what in wanted]
        if any(cells):
            lines.append(" | ".join([shape, *(text or "-" for text in cells)]))
    if len(lines) == 2:
        raise ValueError(f"table {asked!r} of README.md: {name}.json has none of these columns")
    return "".join(f"| {line} |\n" for line in lines)


def grouped(content: dict) -> dict[str, dict[tuple[str, str], dict]]:
    """{shape: {(contender, pass): row}} of a record of either kind, as far as rows have times; a backend's variants left out."""
    found, named = {}, {}
    if content["kind"] == "compare":
        kind = content["device"].partition(":")[0]
        named = {compare.title(shape): label(B, H, Hk, N, N, D) for shape in compare.SHAPES[kind] for _, B, H, Hk, N, D in [shape]}
    for row in content["rows"]:
        if row["ms"] is None or row.get("variant"):
            continue
        if content["kind"] == "compare":
            shape, who = named.get(row["problem"]), row["backend"]
        else:
            sizes = [row[size] for size in ("B", "H", "Hk", "M", "N", "D")]
            shape, who = row["case"] if row["lengths"] else label(*sizes), row["contender"]
        if shape:
            found.setdefault(shape, {})[who, row["direction"]] = row
    return found


def label(B: int, H: int, Hk: int, M: int, N: int, D: int) -> str:
    """A problem's sizes."""
    heads = f"{H}" if Hk == H else f"{H} on {Hk}"
    return f"{B}, {heads}, {N if M == N else f'{M} of {N}'}, {D}"


def cell(rows: dict[tuple[str, str], dict], who: str, what: str) -> str:
    """What one column says of a problem; empty where nothing was measured."""
    both = [rows.get((who, direction)) for direction in ("forward", "backward")]
    if what in ("both", "error"):
        if None in both:
            return ""
        if what == "error":
            return f"{max(row['relative_l2'] for row in both):.1e}".replace("e-0", "e-")
        theirs = [row["ms"] * row["ratios"][BESIDE[0]] for row in both if BESIDE[0] in row["ratios"]]
        return f"{sum(theirs) / sum(row['ms'] for row in both):.2f}" if len(theirs) == len(both) else ""
    row = rows.get((who, "step" if what == "tokens" else what))
    if row is None:
        return ""
    if what == "tokens":
        return f"{row['B'] * row['N'] / row['ms']:.0f}"
    ratios = ", ".join(f"{row['ratios'][name]:.2f}" for name in BESIDE if name in row["ratios"])
    return f"{row['ms']:#.3g}".rstrip(".") + (f" ({ratios})" if ratios else "")
