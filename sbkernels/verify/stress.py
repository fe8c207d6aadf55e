"""The same bits a thousand times while the device does other work; and graphs, streams and devices at a size that fills it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable

import torch

from .. import registry, workers
from ..problem import DTYPES
from . import inputs, run
from .inputs import Case
from .properties import Lab
from .tolerance import OUTPUTS

PROBLEMS_GPU = [
    Case("fading", B=32, H=32, Hk=32, M=1024, N=1024, D=32, Dv=32),
    Case("fading", B=4, H=16, Hk=16, M=1024, N=1024, D=128, Dv=128),
    Case("fading", B=4, H=16, Hk=4, M=1024, N=1024, D=64, Dv=64, attend_current=True, skip=True),
    Case("critical", H=16, Hk=4, D=128, Dv=128, skip=True, lengths=(1000, 0, 17, 2048, 1, 500)),
    Case("fading", B=4, H=16, Hk=4, M=1024, N=1024, D=256, Dv=256, skip=True),
]
PROBLEMS_CPU = [Case("fading", H=4, Hk=2, M=150, N=150, skip=True)]
PROPERTIES = ("graph_replay", "streams", "devices")
LAB = {"N": 512, "D": 64}
LOAD_SIZE, LOAD_AT_ONCE = 4096, 16  # products of square matrices, some milliseconds of an H100, in its queue beside the runs
DEADLINE_SECONDS = 1200.0  # of one problem's runs; a device that hangs is killed then


@dataclasses.dataclass
class Row:
    """One problem or property on one backend. wrong: elements that differ in all runs; first_wrong: the first run with one."""

    backend: str
    dtype: str
    check: str
    runs: int = 0
    wrong: int = 0
    first_wrong: int | None = None
    loads: int = 0
    skipped: str = ""
    error: str = ""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.error and not self.wrong


class Load:
    """Matrix products on a stream of their own, so many at once that the device always has some; none on a CPU."""

    def __init__(self, device: str):
        self.count = 0
        self.stream = torch.cuda.Stream(device) if device.startswith("cuda") else None
        if self.stream:
            self.x = torch.randn(LOAD_SIZE, LOAD_SIZE, device=device, dtype=torch.bfloat16)
            self.done = torch.cuda.Event()
            torch.cuda.current_stream(device).synchronize()

    def keep_up(self) -> None:
        """Queue more if the last have run."""
        if self.stream and (self.count == 0 or self.done.query()):
            with torch.cuda.stream(self.stream):
                for _ in range(LOAD_AT_ONCE):
                    self.x @ self.x
                self.done.record()
            self.count += LOAD_AT_ONCE


def repeat(row: Row, case: Case, runs: int, device: str) -> None:
    """Forward and backward `runs` times beside a load, each compared with the first, bit by bit, where the tensors are."""
    x = inputs.make(case, DTYPES[row.dtype], device)
    with run.use_backend(row.backend):
        first = run.attend(x, guarded=False)
        wrong = torch.zeros(runs, len(OUTPUTS), dtype=torch.int64, device=device)
        load = Load(device)
        for i in range(runs):
            load.keep_up()
            for j, (a, b) in enumerate(zip(run.attend(x, guarded=False), first, strict=True)):
                wrong[i, j] = (a != b).sum()
    wrong = wrong.sum(1).cpu()
    row.runs, row.wrong, row.loads = runs, int(wrong.sum()), load.count
    row.first_wrong = int(wrong.nonzero()[0]) if row.wrong else None


def check(row: Row, name: str, device: str) -> None:
    """A property at LAB's size: what it finds wrong becomes the row's error."""
    lab = Lab(functools.partial(run.variant_of, registry.load(row.backend), ""), DTYPES[row.dtype], device, **LAB)
    outcome = run.checked(run.Outcome(row.backend, "", row.dtype, name), lambda: run.check_property(lab, name))
    row.runs, row.skipped = int(not outcome.skipped), outcome.skipped
    row.error = outcome.error or "; ".join(f"{f.output}: {f.where}" for f in outcome.findings if not f.ok)


def _work(item: tuple[str, str, str | Case], _state: dict, runs: int, device: str):
    backend, dtype, what = item
    row, begin = Row(backend, dtype, str(what)), time.perf_counter()
    try:
        if isinstance(what, Case):
            repeat(row, what, runs, device)
        else:
            check(row, what, device)
    except Exception as error:  # is a finding of this item
        row.error = f"{type(error).__name__}: {error}"
    row.seconds = time.perf_counter() - begin
    return row if row.ok else workers.Last(row)


def stress(names: list[str], device: str, runs: int, progress: Callable[[Row], None]) -> None:
    """All problems and properties on these backends, each in a process that can be killed; progress(row) after each."""
    problems = PROBLEMS_CPU if device == "cpu" else PROBLEMS_GPU
    items = []
    for name in names:
        backend = registry.load(name)
        dtype = next(d for d in ("bfloat16", "float32") if backend.unsupported(run.probe(device, DTYPES[d])) is None)
        items += [(name, dtype, what) for what in (*problems, *PROPERTIES)]
    work = functools.partial(_work, runs=runs, device=device)
    with contextlib.closing(workers.run(work, [[item] for item in items], 1, DEADLINE_SECONDS)) as results:
        for item, row, lost in results:
            progress(row or Row(*item[:2], str(item[2]), error=lost))
