"""Inputs that reach what random ones never do: regimes of logits, layouts in memory, shapes around tile edges."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import math
import re

import torch

STOP = 150.0  # a logit that takes the whole stick: exp(-150) is 0 beside anything
DRAWN_ON_DEVICE = 2**22  # from this many numbers on, drawing them on the CPU takes longer than all else
FADING_LOGIT = -3.6  # mean logit with which the stick lasts some hundred keys: what is between a stop too early and one in time
# Mean logit of the problems that are timed, of standard deviation 1, up to so many keys, which leave e^-17 of the stick. Beyond
# some 10,000 such keys kernels would find sticks used up, and pass over the rest.
ALIVE_LOGIT, ALIVE_KEYS = -6.0, 4096
REGIMES = (
    "normal", "critical", "negative", "std10", "std30", "plus_minus_30", "plus_minus_150", "ternary", "stop_at_edge", "zero",
    "fading",
)  # fmt: skip
LAYOUTS = ("bhnd", "bnhd", "packed", "padded", "transposed", "broadcast")
MEMORY = (*LAYOUTS, "sliced", "offset", "one_entry")  # how a tensor can lie in memory with a last stride of 1
EXPANDED = "scalar"  # and how a gradient can that .sum().backward() hands back: all strides 0
SKIP_BELOW = 2.0**-24
TILE = 64  # the tile edge stop_at_edge and the shapes aim at: a multiple of every backend's


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem of the harness; `lengths` makes it varlen.

    layout: the call's, "bnhd" or any other for "bhnd", and how q, k, v and dout lie in memory (`arrange`), unless `strides` says so
    for each of the four; dremainder lies as dout does. skip_below counts where skip is on.
    """

    regime: str = "critical"
    B: int = 1
    H: int = 2
    Hk: int = 2
    M: int = 130
    N: int = 130
    D: int = 32
    Dv: int = 32
    layout: str = "bhnd"
    attend_current: bool = False
    skip: bool = False
    skip_below: float = SKIP_BELOW
    scale: float | None = None
    strides: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    seed: int = 0

    def __str__(self) -> str:
        default = Case()
        parts = [f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self)]
        changed = [p for p, f in zip(parts, dataclasses.fields(self), strict=True) if getattr(self, f.name) != f.default]
        return f"Case({', '.join(changed)})" if self != default else "Case()"

    @classmethod
    def parse(cls, text: str) -> Case:
        """The inverse of str(). ValueError, with the part that is wrong."""
        inside = re.fullmatch(r"\s*Case\((.*)\)\s*", text)
        fields, values = {f.name: f.default for f in dataclasses.fields(cls)}, {}
        if inside is None:
            raise ValueError(f"{text!r} is no case: expected Case(name=value, ...)")
        for part in re.findall(r"[^,(]+(?:\([^)]*\))?", inside[1]):
            name, _, value = (word.strip() for word in part.partition("="))
            if name not in fields:
                raise ValueError(f"{part.strip()!r} of a case: expected one of {', '.join(fields)}")
            try:
                values[name] = value if isinstance(fields[name], str) else ast.literal_eval(value)
            except (ValueError, SyntaxError) as error:
                raise ValueError(f"{part.strip()!r} of a case: expected a value like {fields[name]!r}") from error
        return cls(**values)

    @property
    def options(self) -> dict:
        """Keyword arguments of the call, but for its layout and lengths."""
        return {
            "attend_current": self.attend_current,
            "skip_below": self.skip_below if self.skip else 0.0,
            "scale": self.scale,
        }


def alive_logit(keys: int) -> float:
    """Mean logit with which a stick lasts over all of so many keys."""
    return ALIVE_LOGIT - max(0.0, math.log(keys / ALIVE_KEYS))


def key_bias(regime: str, N: int, generator: torch.Generator) -> torch.Tensor | None:
    """What a regime adds to the logits of each key [N], or None."""
    pick = torch.rand(N, generator=generator, device=generator.device)
    if regime == "critical":
        return torch.full((N,), -math.log(max(N, 2)), device=generator.device)
    if regime in ("alive", "fading"):
        return torch.full((N,), alive_logit(N) if regime == "alive" else FADING_LOGIT, device=generator.device)
    if regime == "negative":
        return torch.full((N,), -15.0, device=generator.device)
    if regime in ("plus_minus_30", "plus_minus_150"):
        return torch.where(pick < 0.5, -1.0, 1.0) * float(regime.rsplit("_", 1)[1])
    if regime == "ternary":
        return torch.where(pick < 0.8, -STOP, torch.where(pick < 0.97, 0.0, STOP))
    if regime == "stop_at_edge":
        bias = torch.full((N,), -4.0, device=generator.device)
        edge = N // TILE // 2 * TILE
        bias[[j for j in (edge - 1, edge, edge + 1) if 0 <= j < N]] = STOP
        return bias
    return None


def logit_parts(case: Case, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 q [B, H, M, D], k [B, Hk, N, D] whose logits at the default scale follow the regime.

    A key's bias comes in through the last column, where q holds a constant: no change to the operator is needed.
    """
    q = torch.randn(case.B, case.H, case.M, case.D, generator=generator, dtype=torch.float64, device=generator.device)
    k = torch.randn(case.B, case.Hk, case.N, case.D, generator=generator, dtype=torch.float64, device=generator.device)
    if case.regime == "zero":
        return torch.zeros_like(q), k
    if case.regime.startswith("std"):
        return q * float(case.regime[3:]), k
    bias = key_bias(case.regime, case.N, generator)
    if bias is not None:
        spread = 0.0 if case.regime == "ternary" else 1.0
        q, k = q * spread, k * spread
        q[..., -1] = math.sqrt(case.D)
        k[..., -1] = bias.double()
    return q, k


def arrange(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of x [B, H, N, D] in other memory: same shape, other strides, last one 1."""
    B, H, N, D = x.shape
    if layout == "bnhd":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "packed":  # a slice of one projection's output [B, N, 3, H, D]
        wide = x.new_full((B, N, 3, H, D), float("nan"))
        wide[:, :, 1] = x.transpose(1, 2)
        return wide[:, :, 1].transpose(1, 2)
    if layout == "padded":  # rows with a gap behind them
        wide = x.new_full((B, H, N, D + 24), float("nan"))
        wide[..., :D] = x
        return wide[..., :D]
    if layout == "transposed":  # heads outermost
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "broadcast":  # one head's memory for all
        return x[:, :1].expand(B, H, N, D)
    if layout == "one_entry":  # one batch entry's memory for all
        return x[:1].expand(B, H, N, D)
    if layout == "sliced":  # every second row of more
        wide = x.new_full((B, H, 2 * N, D), float("nan"))
        wide[:, :, ::2] = x
        return wide[:, :, ::2]
    if layout == "offset":  # begins one element behind where the allocator aligns
        flat = x.new_empty(x.numel() + 1)
        flat[1:] = x.flatten()
        return flat[1:].view(x.shape)
    if layout == EXPANDED:
        return x[:1, :1, :1, :1].expand(B, H, N, D)
    return x.contiguous()


@dataclasses.dataclass
class Inputs:
    """Tensors of a case, canonical order; varlen: [1, H, T, ...] with cu_seqlens."""

    case: Case
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    dremainder: torch.Tensor
    cu_seqlens: torch.Tensor | None = None


def make(case: Case, dtype: torch.dtype, device: str) -> Inputs:
    """Draw the case's inputs; the same for the same case, dtype by dtype."""
    large = case.B * max(case.H * case.M, case.Hk * case.N) * case.D > DRAWN_ON_DEVICE
    generator = torch.Generator(device if large else "cpu").manual_seed(case.seed + 1)
    if case.lengths:
        total = sum(case.lengths)
        case = dataclasses.replace(case, B=1, M=total, N=total)
    q, k = logit_parts(case, generator)
    v = torch.randn(case.B, case.Hk, case.N, case.Dv, generator=generator, dtype=torch.float64, device=generator.device)
    dout = torch.randn(case.B, case.H, case.M, case.Dv, generator=generator, dtype=torch.float64, device=generator.device)
    dremainder = torch.randn(case.B, case.H, case.M, generator=generator, dtype=torch.float64, device=generator.device)
    layouts = case.strides or (case.layout,) * 4
    q, k, v, dout = (arrange(x.to(dtype).to(device), layout) for x, layout in zip((q, k, v, dout), layouts, strict=True))
    dremainder = dremainder.to(torch.float64 if dtype == torch.float64 else torch.float32).to(device)
    if case.strides:
        dremainder = arrange(dremainder[..., None], case.strides[3])[..., 0]
    cu_seqlens = None
    if case.lengths:
        bounds = [0, *torch.tensor(case.lengths).cumsum(0).tolist()]
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    return Inputs(case, q, k, v, dout, dremainder, cu_seqlens)


def small_cases() -> list[Case]:
    """A covering set for slow executors: each feature and each regime once or twice."""
    return [
        *(Case(regime, M=70, N=70, D=16, Dv=16, skip=i % 2 == 0, attend_current=i % 3 == 0) for i, regime in enumerate(REGIMES)),
        *(Case(M=n, N=n, D=16, Dv=16, H=1, Hk=1, attend_current=n % 2 == 1) for n in (1, 2, 31, 32, 33)),
        Case(M=3, N=70, D=16, Dv=16, H=4, Hk=2, attend_current=True),
        Case(B=2, M=20, N=33, D=16, Dv=16, H=2, Hk=1),
        Case("fading", M=20, N=300, D=16, Dv=16, H=1, Hk=1, skip=True),
        Case(H=4, Hk=1, M=40, N=70, D=24, Dv=50, layout="bnhd", skip=True),
        Case(H=4, Hk=2, M=65, N=65, D=50, Dv=16, layout="packed"),
        Case(lengths=(33, 0, 1, 64, 2), D=16, Dv=16, H=4, Hk=2, skip=True),
        Case("normal", lengths=(40, 31), D=16, Dv=24, H=2, Hk=1, attend_current=True),
    ]


def cases(large: bool) -> list[Case]:
    """The harness's set: regimes, tile edges, layouts, head dims, groups, chunked prefill, varlen; large adds long ones."""
    edges = (1, 2, TILE - 1, TILE, TILE + 1, 2 * TILE, 500)
    found = [
        Case(regime, M=300, N=300, D=64, Dv=64, attend_current=current, skip=skip)
        for regime in REGIMES
        for current, skip in ((False, False), (True, True))
    ]
    found += [
        Case(
            regime,
            B=2,
            H=4,
            Hk=(4, 2, 4, 1)[i % 4],
            M=384,
            N=384,
            D=dim,
            Dv=dim,
            layout=LAYOUTS[i % len(LAYOUTS)],
            attend_current=i % 2 == 1,
            skip=i % 3 == 0,
        )
        for i, (regime, dim) in enumerate(itertools.product(REGIMES, (64, 128)))
    ]
    found += [Case(M=n, N=n, attend_current=n % 2 == 0, skip=n > TILE) for n in edges]
    found += [Case(M=m, N=n, attend_current=m % 2 == 0) for m, n in ((1, 2), (1, 200), (2, 65), (64, 128), (63, 500), (500, 501))]
    found += [Case(layout=layout, B=2, H=4, M=90, N=100, D=64, Dv=64, skip=True) for layout in LAYOUTS]
    found += [Case(strides=(memory,) * 4, B=2, H=4, M=90, N=100) for memory in MEMORY if memory not in LAYOUTS]
    found += [Case(strides=("bhnd", "bhnd", "bhnd", dout), M=256, N=256, D=64, Dv=64) for dout in ("offset", EXPANDED)]
    # Rows on 16 bytes of heads that no multiple of 32 bytes lies between.
    found += [Case(B=2, H=4, Hk=1, M=193, N=193, D=72, Dv=72, layout="bnhd")]
    found += [Case(strides=("bhnd", "bhnd", "transposed", "padded"), B=2, H=4, Hk=1, M=193, N=193, D=64, Dv=64)]
    found += [Case(D=D, Dv=Dv, M=150, N=150) for D, Dv in ((16, 16), (50, 80), (80, 50), (96, 96), (128, 64), (64, 128))]
    found += [Case(D=D, Dv=D, M=192, N=192, skip=D > 200) for D in (128, 192, 256)]
    found += [Case(H=H, Hk=Hk, M=100, N=170, skip=Hk == 1) for H, Hk in ((4, 2), (4, 1), (6, 2), (8, 8))]
    found += [
        Case(lengths=(130, 0, 1, 64, 65, 2, 300), H=4, Hk=2, D=64, Dv=64, attend_current=current, skip=current)
        for current in (False, True)
    ]
    found += [Case("std10", lengths=(500, 3), D=50, Dv=64, skip=True)]
    # Lengths and head dims that no tile divides; queries of which older keys see nothing, of one and of several blocks.
    found += [
        Case("std10", B=2, H=4, Hk=2, M=301, N=301, D=128, Dv=96, layout="bnhd", skip=True),
        Case("ternary", B=2, M=257, N=390, D=128, Dv=128, layout="bnhd", attend_current=True),
        Case("stop_at_edge", B=2, H=4, Hk=1, M=200, N=777, D=96, Dv=128, layout="packed"),
        Case("std30", M=100, N=1000, D=64, Dv=64, skip=True),
        Case("normal", B=3, H=4, Hk=2, M=40, N=700, D=80, Dv=24, layout="padded", attend_current=True, skip=True),
        Case("plus_minus_30", B=2, M=129, N=200, D=128, Dv=8),
        Case("critical", M=1000, N=1001, D=96, Dv=96, skip=True),
        Case("stop_at_edge", B=2, H=4, Hk=2, M=400, N=777, D=192, Dv=256, layout="bnhd", skip=True),
        Case("std10", lengths=(130, 0, 1, 500, 65), H=4, Hk=2, D=256, Dv=136, attend_current=True, skip=True),
    ]
    found += [Case(H=1, Hk=1, M=16, N=8192, D=16, Dv=16)]  # a small error of each share, 8,192 times
    if large:
        found += [
            Case(regime, M=4096, N=4096, D=D, Dv=D, skip=skip)
            for D in (64, 128)
            for regime, skip in (("critical", False), ("critical", True), ("std10", True), ("std30", False), ("ternary", True))
        ]
        found += [Case(lengths=(4000, 17, 0, 2048, 1), H=8, Hk=2, D=128, Dv=128, skip=True), Case(M=512, N=8192, D=128, Dv=128)]
        found += [Case(M=64, N=32768, D=dim, Dv=dim) for dim in (64, 128, 256)]  # a bias of each share shows in what is left
        # More query blocks than any GPU has multiprocessors, some of which stop early.
        found += [Case("stop_at_edge", B=4, H=16, Hk=4, M=700, N=700, D=dim, Dv=dim, skip=True) for dim in (64, 128, 256)]
    return found
