"""Tables in HTML, for whoever writes a page."""

from __future__ import annotations

import html

ONE_LINE = 36  # characters: columns with longer cells wrap


def table(columns, rows, right: tuple[str, ...] = ()) -> str:
    """An HTML table that scrolls sideways where it is too wide; None is an empty cell, columns named in `right` hold numbers."""
    rows = [tuple(row) for row in rows]
    longest = [max((len(str(row[i])) for row in rows), default=0) for i in range(len(columns))]
    kinds = [
        ' class="number"' if column in right else ' class="prose"' if length > ONE_LINE else ""
        for column, length in zip(columns, longest, strict=True)
    ]

    def line(tag: str, cells) -> str:
        shown = ("" if cell is None else html.escape(str(cell)) for cell in cells)
        return "".join(f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, shown, strict=True))

    body = "\n".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    head = f"<thead><tr>{line('th', columns)}</tr></thead>"
    return f'<div class="scroll"><table>\n{head}\n<tbody>\n{body}\n</tbody>\n</table></div>'


def number(value: float | str | None, form: str) -> str | None:
    """A formatted number, or the word that records have for one that is infinite or NaN; None stays None."""
    return None if value is None else format(float(value), form)
