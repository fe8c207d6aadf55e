"""Stick-breaking attention in plain torch operations: any device, any float dtype, memory linear in N.

Query blocks walk their key tiles newest first, as the kernels do, and stop once no row has stick left. Products and
transcendental functions run in float32 (float64 for float64 input). Equations: reference.py.

A tile is [heads, rows, BLOCK_N] with keys newest first, so that one cumulative product along it, started by the stick on
entry, is the stick on every key: sticks [..., 0] is the entry, [..., :-1] stands before each key, [..., -1] is the exit.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch

from .. import env
from ..problem import Problem
from .base import Backend, Call

# Elements of one tile array the default sizes aim at: on a CPU 1 MiB of float32, which stays in a core's L2 cache; on a GPU
# enough to fill the machine and hide the launches.
TILE_ELEMENTS_CPU, BLOCKS_CPU = 2**18, (128, 128)
TILE_ELEMENTS_GPU, BLOCKS_GPU = 2**25, (1024, 512)
TILES_KEPT = 8  # bytes a logit the backward keeps of a block of rows: z and the stick, float32


@dataclasses.dataclass(frozen=True)
class TorchConfig:
    """BLOCK_M query rows by BLOCK_N keys per tile, HEADS key heads (with their query groups) at a time."""

    BLOCK_M: int
    BLOCK_N: int
    HEADS: int


class TorchBackend(Backend):
    name = "torch"
    config_types = {"forward": TorchConfig, "backward": TorchConfig}

    def unsupported(self, problem: Problem) -> str | None:
        return None

    def default_config(self, problem: Problem) -> TorchConfig:
        on_cpu = problem.device_type == "cpu"
        block_m, block_n = BLOCKS_CPU if on_cpu else BLOCKS_GPU
        block_m, block_n = min(block_m, _ceil_to(problem.queries, 16)), min(block_n, _ceil_to(problem.keys, 16))
        budget = TILE_ELEMENTS_CPU if on_cpu else TILE_ELEMENTS_GPU
        heads = max(1, budget // (block_m * block_n * problem.group))
        units = (1 if problem.varlen else problem.batch) * problem.kv_heads
        return TorchConfig(block_m, block_n, min(heads, max(units, 1)))

    def illegal(self, problem: Problem, config: TorchConfig) -> str | None:
        for field, value in dataclasses.asdict(config).items():
            if not isinstance(value, int) or value < 1:
                return f"{field}={value!r} is not a positive integer"
        return None

    def config_space(self, problem: Problem):
        return [
            TorchConfig(block_m, block_n, heads)
            for block_m in (64, 128, 256, 512)
            for block_n in (64, 128, 256, 512)
            for heads in (1, 2, 4, 8, 16)
        ]

    def sources(self):
        return [__file__]

    def versions(self):
        return {"torch": torch.__version__}

    def forward(self, call: Call, config: TorchConfig):
        out, remainder = call.empty_out(), call.empty_statistic(_statistic_dtype(call.q))
        for part in _parts(call, config.HEADS, out=out, remainder=remainder):
            _forward(part, config)
        return out, remainder, ()

    def backward(self, call: Call, config: TorchConfig, remainder, saved, dout, dremainder):
        dq, dk, dv = (call.empty_gradient(x) for x in (call.q, call.k, call.v))
        rows = {"remainder": remainder, "dout": dout, "dremainder": dremainder, "dq": dq}
        # All tiles of a block of rows are kept: fewer heads rather than fewer rows where the workspace does not hold them.
        head_bytes = TILES_KEPT * config.BLOCK_M * call.problem.group * max(call.problem.keys, 1)
        for part in _parts(call, max(1, min(config.HEADS, env.workspace() // head_bytes)), **rows):
            _backward(part, config, part.slice_of(dk), part.slice_of(dv))
        return dq, dk, dv


def _ceil_to(n: int, multiple: int) -> int:
    return max(multiple, -(-n // multiple) * multiple)


def _statistic_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@dataclasses.dataclass(frozen=True)
class _Part:
    """Some key heads of one batch entry or sequence, with their query heads: q [heads, group, M, D], k [heads, N, D].

    rows holds views of per-query tensors, [heads, group, M] or [heads, group, M, width].
    """

    call: Call
    b: int
    heads: slice
    tokens: slice
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    rows: dict[str, torch.Tensor]

    def slice_of(self, x: torch.Tensor) -> torch.Tensor:
        """This part of a key-side tensor [B, Hk, N, width]."""
        return x[self.b, self.heads, self.tokens]


def _parts(call: Call, heads_at_once: int, **rows: torch.Tensor):
    """The independent pieces of a call: batch entries (or sequences) by groups of key heads."""
    kv_heads, group = call.problem.kv_heads, call.problem.group
    if call.cu_seqlens is None:
        entries = [(b, slice(None)) for b in range(call.q.shape[0])]
    else:
        bounds = call.cu_seqlens.tolist()
        entries = [(0, slice(begin, end)) for begin, end in itertools.pairwise(bounds) if end > begin]

    for b, tokens in entries:
        for head in range(0, kv_heads, heads_at_once):
            heads = slice(head, min(head + heads_at_once, kv_heads))
            query_heads = slice(heads.start * group, heads.stop * group)
            yield _Part(
                call, b, heads, tokens,
                q=call.q[b, query_heads, tokens].unflatten(0, (-1, group)),
                k=call.k[b, heads, tokens],
                v=call.v[b, heads, tokens],
                rows={name: x[b, query_heads, tokens].unflatten(0, (-1, group)) for name, x in rows.items()},
            )  # fmt: skip


def _newest_first(x: torch.Tensor) -> torch.Tensor:
    """[heads, N, width] with the newest key first, in the dtype the arithmetic runs in."""
    return x.flip(1).to(_statistic_dtype(x))


def _block(x: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    """Rows begin:end of [heads, group, M, ...] as [heads, group * rows, ...], in the dtype the arithmetic runs in."""
    return x[:, :, begin:end].flatten(1, 2).to(_statistic_dtype(x))


def _complement(beta: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """1 - sigmoid(z), without cancellation where beta is near 1 and without bias where it is small.

    NOTE: sigmoid(-z) = 1 / (1 + e) loses e^2 where e is about 1e-4, for every key on the same side: 1e-4 of the stick after
    8,192 keys. 1 - beta is rounded to either side.
    """
    return torch.where(z < 0, 1 - beta, torch.sigmoid(-z))


class _Walk:
    """The key tiles one block of query rows visits, newest first: yields (columns, z, beta, sticks); `stick` is what is left."""

    def __init__(self, part: _Part, keys: torch.Tensor, config: TorchConfig, begin: int):
        problem, call = part.call.problem, part.call
        M, N = part.q.shape[2], part.k.shape[1]
        end = min(begin + config.BLOCK_M, M)
        self.skip_below = call.skip_below
        self.keys, self.config, self.N = keys, config, N
        self.q = _block(part.q, begin, end)
        first_end = N - M + begin + (1 if problem.attend_current else 0)  # first invisible key of the first row
        self.row_end = torch.arange(first_end, first_end + end - begin, device=keys.device).repeat(problem.group)
        self.first_end, self.last_end = first_end, min(first_end + end - begin - 1, N)
        self.scaled_q = self.q * call.scale
        self.stick = self.q.new_ones(self.q.shape[:2])

    def __iter__(self):
        for column in range(self.N - self.last_end, self.N, self.config.BLOCK_N):
            columns = slice(column, min(column + self.config.BLOCK_N, self.N))
            z = self.scaled_q @ self.keys[:, columns].transpose(1, 2)
            if self.N - columns.start > self.first_end:
                key = torch.arange(self.N - 1 - columns.start, self.N - 1 - columns.stop, -1, device=z.device)
                z.masked_fill_(key >= self.row_end[:, None], float("-inf"))
            sticks = z.new_empty(*z.shape[:2], z.shape[2] + 1)
            beta = torch.sigmoid(z)
            sticks[..., 0] = self.stick
            sticks[..., 1:] = _complement(beta, z)
            # NOTE: in float32 a GPU multiplies factors just below 1 with each other, which rounds most products to the same side:
            # the remainder is off by what the tolerance allows at 32,768 keys.
            sticks.copy_(sticks.cumprod(-1, dtype=torch.float64))
            yield columns, z, beta, sticks
            self.stick = sticks[..., -1]
            if self.skip_below > 0 and not bool((self.stick >= self.skip_below).any()):
                return


def _forward(part: _Part, config: TorchConfig) -> None:
    keys, values = _newest_first(part.k), _newest_first(part.v)
    for begin in range(0, part.q.shape[2], config.BLOCK_M):
        rows = slice(begin, begin + config.BLOCK_M)
        walk = _Walk(part, keys, config, begin)
        out = walk.q.new_zeros(*walk.q.shape[:2], values.shape[2])
        for columns, _, beta, sticks in walk:
            out.baddbmm_(beta.mul_(sticks[..., :-1]), values[:, columns])
        target = part.rows["out"][:, :, rows]
        target.copy_(out.unflatten(1, target.shape[1:3]))
        target = part.rows["remainder"][:, :, rows]
        target.copy_(walk.stick.unflatten(1, target.shape[1:3]))


def _backward(part: _Part, config: TorchConfig, dk: torch.Tensor, dv: torch.Tensor) -> None:
    """Per block of rows: the forward's walk, keeping z and sticks, then the same tiles back, oldest first."""
    keys, values = _newest_first(part.k), _newest_first(part.v)
    dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
    row_bytes = TILES_KEPT // 4 * keys.element_size() * keys.shape[0] * part.q.shape[1] * max(keys.shape[1], 1)
    block_m = max(1, min(config.BLOCK_M, env.workspace() // row_bytes))
    config = dataclasses.replace(config, BLOCK_M=block_m)
    for begin in range(0, part.q.shape[2], block_m):
        end = min(begin + block_m, part.q.shape[2])
        do = _block(part.rows["dout"], begin, end)
        walk = _Walk(part, keys, config, begin)
        dq = torch.zeros_like(walk.q)
        tiles = [(columns, z, sticks) for columns, z, _, sticks in walk]
        remainder = _block(part.rows["remainder"], begin, end)
        older_sum = remainder * _block(part.rows["dremainder"], begin, end)
        for columns, z, sticks in reversed(tiles):
            beta = z.sigmoid()
            A = beta * sticks[..., :-1]
            dvalues[:, columns].baddbmm_(A.transpose(1, 2), do)
            a = (do @ values[:, columns].transpose(1, 2)).mul_(A)
            older = a.new_empty(*a.shape[:2], a.shape[2] + 1)
            older[..., 0] = older_sum
            older[..., 1:] = a.flip(-1)
            older.cumsum_(-1)
            older_sum = older[..., -1]
            dz = a.mul_(torch.sigmoid(-z)).sub_(beta.mul_(older[..., :-1].flip(-1)))
            dq.baddbmm_(dz, keys[:, columns])
            dkeys[:, columns].baddbmm_(dz.transpose(1, 2), walk.scaled_q)
        target = part.rows["dq"][:, :, begin:end]
        target.copy_((dq * part.call.scale).unflatten(1, target.shape[1:3]))
    dk.copy_(dkeys.flip(1))
    dv.copy_(dvalues.flip(1))
