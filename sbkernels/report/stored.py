"""Stored results as files: records of sbk's commands, and exports or databases of the tuner."""

from __future__ import annotations

import dataclasses
import json
import pathlib

from ..tuning import replay, store
from ..verify import record

ROOT = pathlib.Path(store.__file__).resolve().parent
LANDSCAPES = record.FOLDER.parent / "data" / "tuning-spaces.json"


@dataclasses.dataclass(frozen=True)
class Record:
    """One record: the file's name, what wrote it (verify, compare, bench, ...), all it says."""

    name: str
    kind: str
    content: dict

    @property
    def rows(self) -> list[dict]:
        return self.content["rows"]

    @property
    def environment(self) -> dict:
        return self.content["environment"]

    @property
    def on_gpu(self) -> bool:
        """Whether it is of a GPU; records that name no device are of one where there was one."""
        return self._device.startswith("cuda")

    @property
    def machine(self) -> str:
        """The processor that was measured; of what was only read there, that much."""
        if not self.content.get("measured_here", True):
            return f"unknown, read on {self.environment['cpu']}"
        index = int(self._device.partition(":")[2] or 0)
        return self.environment["gpus"][index]["name"] if self.on_gpu else self.environment["cpu"]

    @property
    def _device(self) -> str:
        return str(self.content.get("device") or ("cuda" if self.environment["gpus"] else "cpu"))

    def changed(self) -> list[str]:
        """Backends whose sources are not those that were recorded."""
        return [name for name, (recorded, _) in record.changed(self.content).items() if recorded]


@dataclasses.dataclass(frozen=True)
class Stored:
    """All that a page is made of. spaces: fully measured, by file; trials: all the others that were tried, by file."""

    records: list[Record]
    spaces: dict[str, list[replay.Space]]
    trials: dict[str, list[store.Trial]]

    def of(self, *kinds: str) -> list[Record]:
        """The records of some kinds."""
        return [found for found in self.records if found.kind in kinds]


def default() -> list[pathlib.Path]:
    """What comes with sbkernels: in a checkout its records and recorded tuning spaces, and everywhere the shipped configs."""
    return [
        *sorted(record.FOLDER.glob("*.json")),
        *([LANDSCAPES] if LANDSCAPES.is_file() else []),
        *sorted(ROOT.glob("data/*.json")),
    ]


def load(paths: list[pathlib.Path]) -> Stored:
    """What files hold. ValueError, naming the file, for what is no record and not the tuner's; OSError for what cannot be read."""
    found = Stored([], {}, {})
    for path in paths:
        content = None if path.suffix == ".db" else _content(path)
        if content is None:
            take_trials(found, path)
        elif isinstance(content, dict) and {"kind", "environment", "rows"} <= content.keys():
            found.records.append(Record(path.name, content["kind"], content))
        else:
            raise ValueError(f"{path} is no record: expected kind, environment and rows")
    return found


def _content(path: pathlib.Path):
    """The JSON of a file; None for an export of the tuner, which is a document a line."""
    text = path.read_text(encoding="utf-8")
    if text.startswith('{"schema"'):
        return None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no record: {error}") from error


def take_trials(found: Stored, path: pathlib.Path) -> None:
    """Add what the tuner tried: its full measurements of spaces where there are some, else single trials."""
    spaces = replay.spaces(path)
    if spaces:
        found.spaces[path.name] = spaces
        return
    with replay.opened(path) as opened:
        found.trials[path.name] = opened.trials()
