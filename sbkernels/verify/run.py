"""Runs the harness: every backend and variant, every dtype it takes, all cases and all properties."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import time

import torch

from .. import registry, workers
from ..backends.base import guarded_outputs
from ..dispatch import use_backend
from ..problem import DTYPES, describe
from . import inputs, properties, tolerance
from .calls import canonical, public
from .tolerance import Finding

DEADLINE_SECONDS = 300.0  # of a case, with the start of its process and what it compiles


@dataclasses.dataclass
class Outcome:
    """One case or property on one backend: its findings, or why it has none."""

    backend: str
    variant: str
    dtype: str
    name: str
    findings: list[Finding] = dataclasses.field(default_factory=list)
    skipped: str = ""
    error: str = ""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.error and all(finding.ok for finding in self.findings)


def problem_of(x: inputs.Inputs):
    """The forward Problem the API will make of these inputs."""
    lengths = {"cu_seqlens": x.cu_seqlens, "max_seqlen": max(x.case.lengths)} if x.case.lengths else {}
    options = {name: value for name, value in x.case.options.items() if name != "scale"}
    return describe(x.q, x.k, x.v, **options, **lengths)


@contextlib.contextmanager
def variant_of(backend, variant: str, problem):
    """use_backend with the configs of a variant; "" is the backend as dispatched."""
    if not variant:
        with use_backend(backend.name):
            yield
        return
    forward, backward = (backend.variants(p)[variant] for p in (problem, problem.reversed()))
    with use_backend(backend.name, forward=forward, backward=backward):
        yield


def why_not(backend, variant: str, problem) -> str:
    """Why there is nothing to run: the backend cannot, or takes the variant's configs anyway; else empty."""
    reason = backend.unsupported(problem) or ""
    if reason or not variant:
        return reason
    both = (problem, problem.reversed())
    same = all(backend.variants(p)[variant] == backend.default_config(p) for p in both)
    return "what is dispatched anyway" if same else ""


def attend(x: inputs.Inputs, guarded: bool = True) -> tuple[torch.Tensor, ...]:
    """out, remainder, dq, dk, dv in canonical order, through the public API; guarded: with poisoned and guarded outputs."""
    operator, tensors, upstream = public(x, check_seqlens=None)
    leaves = [t.detach().requires_grad_() for t in tensors]
    with guarded_outputs() if guarded else contextlib.nullcontext():
        outputs = operator(*leaves)
        gradients = torch.autograd.grad(outputs, leaves, upstream)
    return tuple(canonical(t.detach(), x.case) for t in (*outputs, *gradients))


def expectation(x: inputs.Inputs) -> list[tuple[slice, tolerance.Expected]]:
    """Reference, baseline and floor by stretch of tokens: one for a dense case, one a sequence for varlen."""
    case, bounds = x.case, x.cu_seqlens.tolist() if x.case.lengths else None
    spans = [slice(a, b) for a, b in itertools.pairwise(bounds) if b > a] if bounds else [slice(None)]
    tensors = (x.q, x.k, x.v, x.dout, x.dremainder)
    return [(span, tolerance.expect(*(t[:, :, span] for t in tensors), **case.options)) for span in spans]


def judge(got: tuple[torch.Tensor, ...], expected) -> list[Finding]:
    """Findings of all five outputs over all stretches."""
    return [
        tolerance.compare(tensor[:, :, span], expect, name)
        for span, expect in expected
        for name, tensor in zip(tolerance.OUTPUTS, got, strict=True)
    ]


def check_property(lab: properties.Lab, name: str) -> list[Finding]:
    """A property's results as findings, with poisoned and guarded outputs; NotHere where it cannot be checked."""
    found = []
    with guarded_outputs():
        results = properties.PROPERTIES[name](lab)
    for what, error, allowed in results:
        ratio = 0.0 if error == 0 else error / allowed if allowed else float("inf")
        found.append(Finding(what, ratio, 0.0, 0.0, f"error {error:.3g}, allowed {allowed:.3g}"))
    return found


def probe(device: str, dtype: torch.dtype = torch.float16):
    """A small Problem, to ask backends what they take."""
    return problem_of(inputs.make(inputs.Case(), dtype, device))


def targets(device: str, names: tuple[str, ...] | None):
    """(backend, variant) of every registered backend that loads, and {name: reason} of the others."""
    found, missing = [], {}
    for name in names or registry.names():
        backend, reason = registry.try_load(name)
        if backend is None:
            missing[name] = reason
            continue
        problem = probe(device)
        found += [(backend, variant) for variant in ("", *backend.variants(problem))]
    return found, missing


def plan(device: str, names=None, dtypes=None, quick: bool = False):
    """[(backend, variant, dtype, case or property name)] of a run on this device, and {name: reason} of backends left out."""
    found, missing = targets(device, names)
    jobs = []
    for backend, variant in found:
        reasons = set()
        for dtype in dtypes or DTYPES:
            problem = probe(device, DTYPES[dtype])
            reason = backend.unsupported(problem)
            if reason:
                reasons.add(reason)
                continue
            small = quick or backend.slow(problem) is not None
            cases = inputs.small_cases() if small else inputs.cases(large=device != "cpu" and dtype in ("float16", "bfloat16"))
            jobs += [(backend.name, variant, dtype, case) for case in cases]
            jobs += [(backend.name, variant, dtype, name) for name in properties.PROPERTIES]
        if not any(job[0] == backend.name for job in jobs):
            missing[backend.name] = "; ".join(sorted(reasons))
    return jobs, missing


def checked(outcome: Outcome, findings) -> Outcome:
    """The outcome with what findings() returns, or with why there is nothing; and how long that took."""
    begin = time.perf_counter()
    try:
        outcome.findings = findings()
    except properties.NotHere as reason:
        outcome.skipped = str(reason)
    except Exception as error:  # a crash is a finding too: the harness goes on
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.seconds = time.perf_counter() - begin
    return outcome


def run_job(job, device: str, cache: dict) -> Outcome:
    """One job of `plan`; cache keeps cases' inputs and expectations, which backends share."""
    name, variant, dtype, what = job
    backend = registry.load(name)

    def findings() -> list[Finding]:
        if isinstance(what, str):
            small = backend.slow(probe(device, DTYPES[dtype])) is not None
            around = functools.partial(variant_of, backend, variant)
            lab = properties.Lab(around, DTYPES[dtype], device, *((40, 16) if small else (100, 32)))
            return check_property(lab, what)
        key = (what, dtype, device)
        if key not in cache:
            x = inputs.make(what, DTYPES[dtype], device)
            cache[key] = (x, expectation(x))
        x, expected = cache[key]
        problem = problem_of(x)
        reason = why_not(backend, variant, problem)
        if reason:
            raise properties.NotHere(reason)
        with variant_of(backend, variant, problem):
            return judge(attend(x), expected)

    return checked(Outcome(name, variant, dtype, str(what)), findings)


def groups(jobs) -> list[list]:
    """Jobs in groups that share a case's inputs and reference."""
    found = {}
    for job in jobs:
        found.setdefault((str(job[3]), job[2]), []).append(job)
    return list(found.values())


def run(jobs, device: str, progress, processes: int = 1, deadline: float = DEADLINE_SECONDS) -> None:
    """Run jobs, calling progress(outcome) after each; several processes mostly compile, which takes longest on a GPU.

    On a GPU, and with more than one process, jobs run in processes that are killed when one takes longer than `deadline` seconds: a
    crash or a hang is that job's failure.
    """
    if processes <= 1 and device == "cpu":
        for group in groups(jobs):
            cache = {}
            for job in group:
                progress(run_job(job, device, cache))
        return
    with contextlib.closing(workers.run(functools.partial(work, device=device), groups(jobs), processes, deadline)) as results:
        for job, outcome, lost in results:
            progress(outcome or Outcome(*job[:3], str(job[3]), error=lost))


def work(job, cache: dict, device: str):
    """`run_job` for `workers.run`."""
    outcome = run_job(job, device, cache)
    return workers.Last(outcome) if outcome.error and spoiled(device) else outcome


def spoiled(device: str) -> bool:
    """Whether the device takes no more work from this process, as after an illegal access."""
    if device == "cpu":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


EMPTY_ROW = {"run": 0, "skipped": 0, "failed": 0, "worst": 0.0, "where": "", "relative_l2": 0.0, "relative_l2_at": ""}


def summary(outcomes: list[Outcome]) -> list[dict]:
    """A row for each backend, variant, dtype and pass: counts, worst ratio and where, worst relative L2."""
    rows = {}
    for outcome in outcomes:
        is_property = outcome.name in properties.PROPERTIES
        passes = ("properties",) if is_property else ("forward", "backward")
        for direction in passes:
            key = (outcome.backend, outcome.variant, outcome.dtype, direction)
            row = rows.setdefault(key, dict(EMPTY_ROW))
            if outcome.skipped:
                row["skipped"] += 1
                continue
            row["run"] += 1
            wanted = [f for f in outcome.findings if is_property or (f.output in tolerance.GRADIENTS) == (direction == "backward")]
            row["failed"] += bool(outcome.error) or not all(f.ok for f in wanted)
            for f in wanted:
                if f.ratio > row["worst"]:
                    row["worst"], row["where"] = f.ratio, f"{outcome.name}: {f.output}, {f.where}"
                if f.output != "remainder" and f.relative_l2 > row["relative_l2"]:
                    row["relative_l2"], row["relative_l2_at"] = f.relative_l2, f"{outcome.name}: {f.output}"
    names = ("backend", "variant", "dtype", "pass")
    return [dict(zip(names, key, strict=True)) | row for key, row in rows.items()]
