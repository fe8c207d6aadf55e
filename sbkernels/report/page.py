"""One HTML page of sections: the template, the charts' data and the library that draws them, all inside."""

from __future__ import annotations

import dataclasses
import html
import json
import pathlib
import string

TEMPLATE = pathlib.Path(__file__).with_name("template.html")


@dataclasses.dataclass(frozen=True)
class Section:
    """One part of the page. name: in the table of contents; heading: what was found; body: HTML; charts: specification by id."""

    name: str
    heading: str
    body: str
    charts: dict[str, dict] = dataclasses.field(default_factory=dict)

    @property
    def id(self) -> str:
        return self.name.lower()


@dataclasses.dataclass(frozen=True)
class Tile:
    """One number at the head of the page."""

    value: str
    meaning: str


def library() -> str:
    """The JavaScript of Vega, Vega-Lite and Vega-Embed. RuntimeError saying how to get it where it is missing."""
    try:
        import vl_convert
    except ImportError as error:
        raise RuntimeError(f"the report's charts need vl-convert: pip install 'sbkernels[report]' ({error})") from error
    return vl_convert.javascript_bundle()


def figure(id: str, title: str, description: str) -> str:
    """The place of a chart under its title; description: for who cannot see it."""
    label = html.escape(description, quote=True)
    place = f'<div class="chart" id="{id}" role="img" aria-label="{label}"></div>'
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{place}</figure>"


def grid(figures: list[str]) -> str:
    """Charts side by side where there is room."""
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def note(text: str) -> str:
    """A paragraph of small print."""
    return f'<p class="note">{html.escape(text)}</p>'


def details(summary: str, body: str) -> str:
    """What opens on request."""
    return f"<details><summary>{html.escape(summary)}</summary>\n{body}\n</details>"


def render(sections: list[Section], tiles: list[Tile], subtitle: str) -> str:
    """The page. RuntimeError where the charts' library is missing."""
    charts = {id: spec for section in sections for id, spec in section.charts.items()}
    parts = [
        f'<section id="{s.id}"><p class="kicker">{html.escape(s.name)}</p><h2>{html.escape(s.heading)}</h2>\n{s.body}\n</section>'
        for s in sections
    ]
    return string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        subtitle=html.escape(subtitle),
        tiles="".join(f"<li><b>{html.escape(t.value)}</b><span>{html.escape(t.meaning)}</span></li>" for t in tiles),
        contents="".join(f'<a href="#{s.id}">{html.escape(s.name)}</a>' for s in sections),
        sections="\n".join(parts),
        # A script ends at the first "</" that looks like its end.
        charts=json.dumps(charts, ensure_ascii=False).replace("</", "<\\/"),
        library=library().replace("</script", "<\\/script") if charts else "",
    )
