"""Random problems against the reference, and the smallest problem that still fails.

A seed decides everything: `draw` gives its case. FAMILY seeds in a row share what kernels are compiled for, so that compilers do
not take all of the time. A failure is written to the corpus when it is found, and again when it has been made smaller.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import pathlib
import random
import time
from collections.abc import Callable, Iterator

from .. import registry, workers
from ..problem import DTYPES
from . import inputs, run
from .inputs import Case

FAMILY = 8
# Most tokens of a problem and most logits, all heads together; slow: through an interpreter.
SIZES = {"cuda": (2048, 2**25), "cpu": (1024, 2**22), "slow": (160, 2**17)}
DEADLINE_SECONDS = 120.0  # of a case, with the start of its process and what it compiles
SHRINK_SECONDS = 120.0
MOST_FAILURES = 10  # a run ends with as many
FOLDER = pathlib.Path(__file__).resolve().parents[2] / "tests" / "data"
Job = tuple[str, str, str, Case]  # as in run.plan: backend, variant, dtype, case


def corpus() -> pathlib.Path:
    """Where failures go and pytest finds them: the checkout's file, or one in the current folder."""
    return (FOLDER if FOLDER.is_dir() else pathlib.Path.cwd()) / "fuzz.txt"


# ---- Drawing ----


def _tokens(rng: random.Random, largest: int) -> int:
    """A length: around tile edges, or of any size."""
    if rng.random() < 0.5:
        return min(largest, max(1, rng.choice((16, 32, 64, 128, 192, 256, 384)) * rng.choice((1, 1, 2)) + rng.choice((-1, 0, 1))))
    return round(2 ** rng.uniform(0, math.log2(largest)))


def _width(rng: random.Random) -> int:
    """A head dim: mostly the usual ones."""
    if rng.random() < 0.6:
        return rng.choice((16, 32, 64, 64, 128, 128, 256))
    return rng.choice((rng.randint(1, 256), rng.randint(1, 64)))


def size_of(backend: str, device: str) -> str:
    """Which of SIZES a backend's problems have."""
    return "slow" if registry.load(backend).slow(run.probe(device)) else device.split(":")[0]


def draw(seed: int, size: str) -> Case:
    """The case of a seed at one of SIZES."""
    largest, most = SIZES[size]
    family, rng = random.Random(f"family {seed // FAMILY}"), random.Random(f"seed {seed}")
    D = _width(family)
    Hk, group = family.choice((1, 1, 2, 3)), family.choice((1, 1, 1, 2, 3, 4))
    varlen = family.random() < 0.25
    one = lambda choices: family.choice(choices) if family.random() < 0.5 else "bhnd"  # noqa: E731
    case = Case(
        H=Hk * group,
        Hk=Hk,
        D=D,
        Dv=D if family.random() < 0.6 else _width(family),
        layout=family.choice(("bhnd", "bnhd")),
        attend_current=family.random() < 0.5,
        skip=family.random() < 0.5,
        skip_below=family.choice((inputs.SKIP_BELOW, inputs.SKIP_BELOW, 2.0**-10, 2.0**-40)),
        strides=(*(one(inputs.MEMORY) for _ in range(3)), one((*inputs.MEMORY, inputs.EXPANDED))),
        regime=rng.choice(inputs.REGIMES),
        scale=None if rng.random() < 0.7 else D**-0.5 * 2 ** rng.uniform(-3, 1),
        seed=rng.randint(0, 2**16),
    )
    if varlen:
        lengths = tuple(rng.choice((0, 1, 2, _tokens(rng, largest))) for _ in range(rng.randint(1, 6)))
        lengths = lengths if any(lengths) else (3,)
        while sum(lengths) > 2 * largest:
            lengths = tuple(n // 2 for n in lengths)
        return dataclasses.replace(case, lengths=lengths)
    N = _tokens(rng, largest)
    M = N if rng.random() < 0.6 else rng.choice((1, rng.randint(1, N)))
    logits = lambda: case.H * M * N  # noqa: E731
    while logits() > most:
        M, N = -(-M // 2), -(-N // 2)
    return dataclasses.replace(case, B=rng.randint(1, max(1, min(3, most // logits()))), M=M, N=N)


def job_of(seed: int, backend: str, device: str) -> Job:
    """What a seed runs: its case in a dtype and a variant the backend takes it in."""
    case, family = draw(seed, size_of(backend, device)), random.Random(f"kernels {seed // FAMILY}")
    loaded = registry.load(backend)
    dtype = family.choice(dtypes(backend, device))
    problem = run.problem_of(inputs.make(case, DTYPES[dtype], device))
    variants = [name for name in loaded.variants(problem) if not run.why_not(loaded, name, problem)]
    return backend, family.choice(("", *variants)), dtype, case


@functools.cache
def dtypes(backend: str, device: str) -> tuple[str, ...]:
    """The dtypes a backend takes on a device; ValueError if none."""
    loaded, reasons = registry.load(backend), {}
    for name, dtype in DTYPES.items():
        reasons[name] = loaded.unsupported(run.probe(device, dtype))
    found = tuple(name for name, reason in reasons.items() if reason is None)
    if not found:
        raise ValueError(f"backend {backend!r} runs nothing on {device}: {next(iter(reasons.values()))}")
    return found


# ---- Text ----


def to_text(job: Job) -> str:
    """A job in one line: backend, variant if any, dtype, case."""
    backend, variant, dtype, case = job
    return f"{backend}{f' ({variant})' if variant else ''} {dtype} {case}"


def from_text(text: str, backend: str | None = None) -> Job:
    """The inverse; "dtype Case(...)" is enough where the backend is given. ValueError in words."""
    head, found, rest = text.partition("Case(")
    words = head.replace("(", " ( ").replace(")", " ) ").split()
    if not found or not words or words[-1] not in DTYPES:
        raise ValueError(f"{text!r}: expected [backend [(variant)]] dtype Case(...), dtype one of {', '.join(DTYPES)}")
    variant = " ".join(words[2:-2]) if words[1:2] == ["("] else ""
    name = backend or (words[0] if len(words) > 1 else "")
    if name not in registry.names():
        raise ValueError(f"{text!r} names backend {name!r}: expected one of {', '.join(registry.names())}")
    return name, variant, words[-1], Case.parse(found + rest)


def remember(path: pathlib.Path, job: Job, what: str, instead_of: Job | None = None) -> None:
    """Add a failure to a corpus, with what failed behind a #; or put it in the place of another."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    lines = [line for line in lines if line.split("  # ")[0] not in (to_text(job), instead_of and to_text(instead_of))]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("\n".join([*lines, f"{to_text(job)}  # {what}", ""]), encoding="utf-8")
    temporary.replace(path)


def remembered(path: pathlib.Path) -> list[Job]:
    """The jobs of a corpus."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [from_text(line.split("  # ")[0]) for line in lines if line.strip() and not line.startswith("#")]


# ---- Shrinking ----


def _less(n: int) -> list[int]:
    """Smaller numbers, the smallest first."""
    return sorted({n // 2, 3 * n // 4, n - 1} - {n, -1})


def simpler(case: Case) -> Iterator[Case]:
    """Cases a step simpler than this one, the largest steps first: something is smaller, or is what it is by default."""
    default = Case()
    changes: list[dict] = []
    if case.lengths:
        lengths, longest = case.lengths, max(case.lengths)
        changes += [{"lengths": (), "M": longest, "N": longest}]
        changes += [{"lengths": lengths[:i] + lengths[i + 1 :]} for i in range(len(lengths)) if len(lengths) > 1]
        changes += [{"lengths": (*lengths[:i], n, *lengths[i + 1 :])} for i in range(len(lengths)) for n in _less(lengths[i])]
    else:
        changes += [{"B": 1}, {"M": 1}]
        changes += [{"M": min(case.M, n), "N": n} for n in _less(case.N)]
        changes += [{"M": n} for n in _less(case.M)]
    group = case.H // case.Hk
    changes += [{"H": 1, "Hk": 1}, {"H": case.Hk, "Hk": case.Hk}, {"H": group, "Hk": 1}]
    for name in ("D", "Dv"):
        changes += [{name: n} for n in (16, *_less(getattr(case, name))) if 1 <= n < getattr(case, name)]
    names = ("strides", "layout", "attend_current", "skip", "skip_below", "scale", "regime", "seed")
    changes += [{name: getattr(default, name)} for name in names]
    changes += [{"strides": (*case.strides[:i], "bhnd", *case.strides[i + 1 :])} for i in range(len(case.strides))]
    seen = {case}
    for change in changes:
        candidate = dataclasses.replace(case, **change)
        dense = not candidate.lengths
        if candidate not in seen and (not dense or 1 <= candidate.M <= candidate.N) and (dense or any(candidate.lengths)):
            seen.add(candidate)
            yield candidate


def shrink(case: Case, first_failing: Callable[[list[Case]], Case | None]) -> Case:
    """The smallest case found that fails, too; first_failing(cases): the first of cases that fails, or None."""
    while (smaller := first_failing(list(simpler(case)))) is not None:
        case = smaller
    return case


# ---- Running ----


def outcomes(jobs: list[Job], device: str) -> Iterator[tuple[Job, run.Outcome]]:
    """Outcomes of jobs, in turn; on a GPU in a process that is killed when the generator is closed."""
    if device == "cpu":
        yield from ((job, run.run_job(job, device, {})) for job in jobs)
        return
    work = functools.partial(run.work, device=device)
    with contextlib.closing(workers.run(work, [jobs], 1, DEADLINE_SECONDS)) as results:
        for job, outcome, lost in results:
            yield job, outcome or run.Outcome(*job[:3], str(job[3]), error=lost)


def smallest(job: Job, device: str) -> Job:
    """The smallest job found in SHRINK_SECONDS that still fails."""
    last = time.monotonic() + SHRINK_SECONDS

    def first_failing(cases: list[Case]) -> Case | None:
        with contextlib.closing(outcomes([(*job[:3], case) for case in cases], device)) as results:
            for found, outcome in results:
                if not outcome.ok or time.monotonic() > last:
                    return None if outcome.ok else found[3]
        return None

    return (*job[:3], shrink(job[3], first_failing))


def _work(seed: int, state: dict, backend: str, device: str):
    job = job_of(seed, backend, device)
    result = run.work(job, {}, device)
    if isinstance(result, workers.Last):
        return workers.Last((job, result.result))
    return job, result


def fuzz(backend: str, device: str, seeds: range, processes: int = 1) -> Iterator[tuple[int, Job, run.Outcome]]:
    """(seed, job, outcome) of each seed as they come; on a GPU, and with several processes, in processes that can be killed."""
    dtypes(backend, device)
    if processes <= 1 and device == "cpu":
        for seed in seeds:
            job = job_of(seed, backend, device)
            yield seed, job, run.run_job(job, device, {})
        return
    families: dict[int, list[int]] = {}
    for seed in seeds:
        families.setdefault(seed // FAMILY, []).append(seed)
    work = functools.partial(_work, backend=backend, device=device)
    with contextlib.closing(workers.run(work, list(families.values()), processes, DEADLINE_SECONDS)) as results:
        for seed, found, lost in results:
            if found is None:
                job = (backend, "", dtypes(backend, device)[0], draw(seed, size_of(backend, device)))
                found = job, run.Outcome(*job[:3], str(job[3]), error=lost)
            yield seed, *found
