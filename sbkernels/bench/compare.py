"""Every backend that works here, beside the float64 reference and beside softmax attention, on synthetic and captured input."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from .. import reference
from ..api import stickbreaking_attention
from ..verify import inputs, tolerance
from ..verify.run import attend, expectation, judge, problem_of, variant_of, why_not
from .contenders import ours, softmax_contenders
from .timer import measure, measure_host

CAPTURED = pathlib.Path(__file__).resolve().parents[2] / "tests" / "data" / "captured_qkv.safetensors"
# The interpreter takes about 15 ms a tile of 64 by 64 logits: this many keep it to some seconds.
MAX_SLOW_LOGITS = 2**16
# Errors of larger problems are computed on the first and the last group of heads only.
CHECKED_LOGITS = 2**25
TILED_TOKENS, NO_STOP = 16384, ", no early stop"
STICK_GONE = 2.0**-24
# Name, B, H, Hk, N, D of the synthetic problems.
SHAPES = {
    "cpu": [("small", 1, 2, 2, 128, 32), ("cpu", 1, 8, 8, 2048, 64)],
    "cuda": [
        ("4x16 heads, 4k", 4, 16, 16, 4096, 128), ("4x32 heads, 4k", 4, 32, 32, 4096, 64),
        ("16 heads, 16k", 1, 16, 16, 16384, 128), ("32 heads, 16k", 1, 32, 32, 16384, 64),
        ("16x16 heads, 1k", 16, 16, 16, 1024, 128), ("grouped 32/8, 4k", 2, 32, 8, 4096, 128),
    ],
}  # fmt: skip
SYNTHETIC_DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
HOST_SHAPE = (1, 1, 64, 64)  # B, H, N, D: so little that the device keeps up with the host


@dataclasses.dataclass
class Problem:
    """One thing to compare: a name, inputs, whether early stop is on."""

    name: str
    x: inputs.Inputs


@dataclasses.dataclass
class Row:
    """One backend on one problem, one pass. ratios: by softmax contender, its time over ours (above 1: we are faster)."""

    problem: str
    backend: str
    variant: str
    direction: str
    relative_l2: float | None = None
    to_baseline: float | None = None
    ok: bool = True
    ms: float | None = None
    interval: tuple[float, float] | None = None
    tflops: float | None = None
    ratios: dict[str, float] = dataclasses.field(default_factory=dict)
    note: str = ""


def synthetic(device: str) -> list[Problem]:
    """Problems sized for the device; the stick stays alive over all keys and early stop is off, so that every key counts."""
    kind = device.partition(":")[0]
    found = []
    for shape in SHAPES[kind]:
        _, B, H, Hk, N, D = shape
        found.append(Problem(title(shape), inputs.make(inputs.Case("alive", B, H, Hk, N, N, D, D), SYNTHETIC_DTYPE[kind], device)))
    return found


def title(shape: tuple) -> str:
    """The name of a problem of SHAPES."""
    return f"{shape[0]} D={shape[-1]}"


def from_file(path: pathlib.Path, device: str) -> list[Problem]:
    """Problems of a safetensors file: q, k, v [B, H, N, D], or with cu_seqlens (int32) [T, H, D]; any number, as "prefix.q" etc.

    ValueError names what is missing or ill-shaped.
    """
    try:
        tensors = load_file(path, device=device)
    except Exception as error:
        raise ValueError(f"cannot read {path} as safetensors: {error}") from error
    prefixes = sorted(name[:-1] for name in tensors if name == "q" or name.endswith(".q"))
    if not prefixes:
        raise ValueError(f"{path} has no tensor named q or *.q; it has {', '.join(sorted(tensors)) or 'none'}")
    found = []
    for prefix in prefixes:
        missing = [name for name in ("q", "k", "v") if prefix + name not in tensors]
        if missing:
            raise ValueError(f"{path} has {prefix}q but not {', '.join(prefix + name for name in missing)}")
        q, k, v = (tensors[prefix + name] for name in ("q", "k", "v"))
        cu_seqlens = tensors.get(prefix + "cu_seqlens")
        if cu_seqlens is not None:
            q, k, v = (x.transpose(0, 1)[None] if x.dim() == 3 else x for x in (q, k, v))
        if q.dim() != 4:
            expected = "[T, H, D] with cu_seqlens" if cu_seqlens is not None else "[B, H, N, D]"
            raise ValueError(f"{path}: {prefix}q has shape {tuple(q.shape)}: expected {expected}")
        lengths = tuple((cu_seqlens[1:] - cu_seqlens[:-1]).tolist()) if cu_seqlens is not None else ()
        case = inputs.Case(
            "file",
            q.shape[0],
            q.shape[1],
            k.shape[1],
            q.shape[2],
            k.shape[2],
            q.shape[3],
            v.shape[3],
            skip=True,
            lengths=lengths,
        )
        generator = torch.Generator().manual_seed(0)
        dout = torch.randn(*q.shape[:3], v.shape[3], generator=generator).to(q.dtype).to(device)
        dremainder = torch.randn(q.shape[:3], generator=generator).to(device)
        found.append(Problem(prefix.rstrip(".") or path.name, inputs.Inputs(case, q, k, v, dout, dremainder, cu_seqlens)))
    return found


def tiled(problem: Problem) -> tuple[Problem, Problem]:
    """A dense problem repeated along its tokens up to TILED_TOKENS: with early stop, and without."""
    x = problem.x
    times = -(-TILED_TOKENS // x.q.shape[2])
    names = ("q", "k", "v", "dout", "dremainder")
    tensors = {name: torch.cat([getattr(x, name)] * times, 2)[:, :, :TILED_TOKENS] for name in names}
    found = []
    for skip in (True, False):
        case = dataclasses.replace(x.case, M=TILED_TOKENS, N=TILED_TOKENS, skip=skip)
        found.append(Problem(f"{problem.name} tiled{'' if skip else NO_STOP}", inputs.Inputs(case, **tensors)))
    return tuple(found)


def stick_lasts(x: inputs.Inputs) -> tuple[float, float]:
    """Median and 95th percentile, over heads and queries, of the newest keys after which less than STICK_GONE is left."""
    lasts = []
    bounds = x.cu_seqlens.tolist() if x.cu_seqlens is not None else [0, x.k.shape[2]]
    group = x.q.shape[1] // x.k.shape[1]
    for begin, end in itertools.pairwise(bounds):
        q, k = (x.q, x.k) if x.cu_seqlens is None else (x.q[:, :, begin:end], x.k[:, :, begin:end])
        M, N = q.shape[2], k.shape[2]
        for b in range(q.shape[0]):
            for h in range(q.shape[1]):
                for first, last in reference.row_blocks(M, N):
                    z = reference.default_scale(q) * (q[b, h, first:last].double() @ k[b, h // group].double().T)
                    mask = reference.visible(range(first, last), M, N, False, q.device)
                    log_rest = F.logsigmoid(-z).masked_fill(~mask, 0.0)
                    left = (log_rest + reference.exclusive_cumsum(log_rest, newer=True)).exp()
                    gone = (left < STICK_GONE) & mask
                    lasts.append((mask.sum(1) - gone.sum(1) + gone.any(1)).double())
    return tuple(torch.quantile(torch.cat(lasts).cpu(), torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist())


def checked_heads(x: inputs.Inputs) -> list[tuple[int, slice, slice]]:
    """Where errors are computed: (batch entry, query heads, key heads); of large problems the first and the last group."""
    B, H, M, _ = x.q.shape
    Hk, group = x.k.shape[1], H // x.k.shape[1]
    places = [(b, slice(kh * group, (kh + 1) * group), slice(kh, kh + 1)) for b in range(B) for kh in range(Hk)]
    large = B * H * M * x.k.shape[2] > CHECKED_LOGITS and len(places) > 1
    return [places[0], places[-1]] if large else places


def errors(problem: Problem, got: tuple[torch.Tensor, ...], cache: dict) -> list[tolerance.Finding]:
    """Findings of the checked heads."""
    x = problem.x
    found = []
    for b, heads, key_heads in checked_heads(x):
        key = (problem.name, b, heads.start)
        if key not in cache:
            part = inputs.Inputs(
                x.case, *(t[b : b + 1, s] for t, s in ((x.q, heads), (x.k, key_heads), (x.v, key_heads))),
                x.dout[b : b + 1, heads], x.dremainder[b : b + 1, heads], x.cu_seqlens,
            )  # fmt: skip
            cache[key] = expectation(part)
        slices = (heads, heads, heads, key_heads, key_heads)
        found += judge(tuple(t[b : b + 1, s] for t, s in zip(got, slices, strict=True)), cache[key])
    return found


def host_overhead(backends: list[str], device: str) -> dict[str, float]:
    """Host's microseconds for a forward call of HOST_SHAPE in bfloat16, without gradients: of backends that run it, and of SDPA."""
    q, k, v = (torch.randn(HOST_SHAPE, dtype=torch.bfloat16, device=device) for _ in range(3))
    contenders = {name: lambda name=name: stickbreaking_attention(q, k, v, backend=name) for name in backends}
    return measure_host(contenders | {"SDPA": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)}, device)


def run(problems: list[Problem], device: str, found, rows: list[Row], progress) -> None:
    """Add to rows what each (backend, variant) of found makes of each problem, problem by problem; progress(*words) after each."""
    cache = {}
    for problem in problems:
        softmax = softmax_contenders(problem.x)
        timed = {(name, direction): f for name, both in softmax.items() for direction, f in both.items()}
        problem_rows = {}
        for backend, variant in found:
            described = problem_of(problem.x)
            reason, slow = why_not(backend, variant, described), backend.slow(described)
            if not reason and slow and described.batch * described.heads * described.visible_logits() > MAX_SLOW_LOGITS:
                reason = f"left out: {slow}"
            for direction in ("forward", "backward"):
                row = Row(problem.name, backend.name, variant, direction, note=reason)
                problem_rows[backend.name, variant, direction] = row
            if not reason:
                with variant_of(backend, variant, described):
                    findings = errors(problem, attend(problem.x), cache)
                for direction in ("forward", "backward"):
                    row = problem_rows[backend.name, variant, direction]
                    wanted = [f for f in findings if (f.output in tolerance.GRADIENTS) == (direction == "backward")]
                    row.relative_l2 = max(f.relative_l2 for f in wanted if f.output != "remainder")
                    row.to_baseline = max(f.to_baseline for f in wanted if f.output != "remainder")
                    row.ok = all(f.ok for f in wanted)
                    row.note = "; ".join(f"{f.output}: {f.where}" for f in wanted if not f.ok)
                if slow:
                    for direction in ("forward", "backward"):
                        problem_rows[backend.name, variant, direction].note += f"not timed: {slow}"
                else:
                    for direction, function in ours(problem.x, backend, variant).items():
                        timed[backend.name, variant, direction] = function
            progress(problem.name, backend.name, variant)
        for direction in ("forward", "backward"):
            times = measure({key: f for key, f in timed.items() if key[-1] == direction}, device)
            described = problem_of(problem.x)
            flops = (described if direction == "forward" else described.reversed()).flops()
            for key, timing in times.items():
                if key in problem_rows:
                    row = problem_rows[key]
                    row.ms, row.interval = timing.median, timing.interval
                    row.tflops = flops / timing.median / 1e9 if not problem.x.case.lengths else None
                    row.ratios = {k[0]: t.median / timing.median for k, t in times.items() if len(k) == 2}
        progress(problem.name, "timed")
        cache.clear()
        rows += problem_rows.values()
