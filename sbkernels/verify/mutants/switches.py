"""Mutants inside: (file, right expression, wrong expression) of a backend's sources, built in as switches (mutant.py)."""

from __future__ import annotations

from .mutant import Mutant


def _of(file: str, name: str, what: str, *switches: tuple[str, str], variant: str = "") -> Mutant:
    """A mutant of one file."""
    return Mutant(name, what, switches=tuple((file, right, wrong) for right, wrong in switches), variant=variant)


TORCH = [
    _of("torch_.py", *rest)
    for rest in (
        ("window", "each block of rows sees its newest tile of keys only",
         ("range(self.N - self.last_end, self.N, self.config.BLOCK_N)",
          "range(self.N - self.last_end, self.N - self.last_end + 1)")),
        ("window of 64", "a row sees its newest 64 keys only",
         ("self.N - columns.start > self.first_end", "True"),
         ("key >= self.row_end[:, None]", "(key >= self.row_end[:, None]) | (key < self.row_end[:, None] - 64)")),
        ("mask too late", "a tile of which one key is beyond the diagonal is taken for a full one",
         ("self.N - columns.start > self.first_end", "self.N - columns.start > self.first_end + 1")),
        ("current key in its own share", "the stick before a key lacks what the key takes",
         ("beta.mul_(sticks[..., :-1])", "beta.mul_(sticks[..., 1:])")),
        ("bf16 running product", "sticks are multiplied up in bfloat16",
         ("sticks.cumprod(-1, dtype=torch.float64)", "sticks.bfloat16().cumprod(-1)")),
        ("newer and older swapped", "within a tile the oldest key takes its share first",
         ("sticks.cumprod(-1, dtype=torch.float64)",
          "(lambda p: sticks[..., :1] * torch.cat((p[..., 1:], torch.ones_like(p[..., :1]), p[..., :1]), -1))"
          "(sticks[..., 1:].flip(-1).cumprod(-1).flip(-1))")),
        ("1 - beta by difference", "loses its digits where beta is near 1",
         ("torch.where(z < 0, 1 - beta, torch.sigmoid(-z))", "1 - beta")),
        ("1 - beta by sigmoid(-z)", "is off by the square of a small share, for every key on the same side",
         ("torch.where(z < 0, 1 - beta, torch.sigmoid(-z))", "torch.sigmoid(-z)")),
        ("logits cut at 15", "softplus(z) = z from there on, and no further",
         ("torch.sigmoid(z)", "torch.sigmoid(z.clamp(-15, 15))")),
        ("stick not carried", "each tile starts with what the one before leaves of a whole stick",
         ("sticks[..., -1]", "sticks[..., -1] / sticks[..., 0].clamp_min(1e-30)")),
        ("stop with the first row", "a block stops as soon as one of its rows has used its stick up",
         ("(self.stick >= self.skip_below).any()", "(self.stick >= self.skip_below).all()")),
        ("oldest tile lost", "of several tiles, what the oldest takes is missing in the remainder",
         ("sticks[..., -1]", "sticks[..., 0] if columns.stop == self.N and column > self.N - self.last_end else sticks[..., -1]")),
        ("last tile dropped", "keys of the oldest, partial tile are not visited",
         ("range(self.N - self.last_end, self.N, self.config.BLOCK_N)",
          "range(self.N - self.last_end, max(self.N - self.last_end + 1, self.N - self.config.BLOCK_N + 1), self.config.BLOCK_N)")),
        ("1 - beta forgotten", "dz = a - beta ... in place of a (1 - beta) - beta ...", ("a.mul_(torch.sigmoid(-z))", "a")),
        ("inclusive sum", "the sum over strictly older keys takes in the key itself",
         ("older[..., :-1].flip(-1)", "older[..., 1:].flip(-1)")),
        ("remainder's share lost", "dr r is missing in the sum over older keys",
         ("remainder * _block(part.rows[\"dremainder\"], begin, end)", "remainder * 0.0")),
        ("walk not turned", "the backward visits the tiles newest first", ("reversed(tiles)", "tiles")),
        ("sum not carried", "each tile of the backward starts its sum with the remainder's share",
         ("older[..., -1]", "older[..., 0]")),
        ("keys in walking order", "dk is stored newest key first", ("dkeys.flip(1)", "dkeys")),
        ("unscaled q in dk", "dk = dz^T q without scale", ("walk.scaled_q", "walk.q")),
        ("first batch entry's values", "every batch entry reads v of the first",
         ("call.v[b, heads, tokens]", "call.v[0, heads, tokens]")),
        ("row of the sequence before", "a packed sequence starts one token early",
         ("(0, slice(begin, end))", "(0, slice(max(begin - 1, 0), end))")),
        ("group's rows interleaved", "the rows of a group's query heads are masked as if interleaved",
         ("torch.arange(first_end, first_end + end - begin, device=keys.device).repeat(problem.group)",
          "torch.arange(first_end, first_end + end - begin, device=keys.device).repeat_interleave(problem.group)")),
        ("last block of rows", "dq of the last, partial block of rows is not stored",
         ("(dq * part.call.scale).unflatten(1, target.shape[1:3])",
          "(dq * part.call.scale * (end == begin + block_m)).unflatten(1, target.shape[1:3])")),
    )
]  # fmt: skip

FORWARD, QUERIES, KEYS, STEP, TILES = "forward.py", "backward_queries.py", "backward_keys.py", "step.py", "tiles.py"
TRITON = [
    _of(FORWARD, "window", "a row sees its newest two tiles of keys only",
        ("tile_hi - tile_lo", "tl.minimum(tile_hi - tile_lo, 2)")),
    _of(TILES, "diagonal", "a query sees the key at its own position",
        ("offsets[None, :] < keys_seen[:, None]", "offsets[None, :] <= keys_seen[:, None]")),
    _of(FORWARD, "diagonal tile unmasked", "the tile the diagonal cuts is taken for a full one",
        ("first_end // BLOCK_N", "tl.cdiv(first_end, BLOCK_N)")),
    _of(FORWARD, "bf16 running product", "the stick is cut to bfloat16 after each tile",
        ("stick * total", "((stick * total).to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)")),
    _of(FORWARD, "stick cut short", "a stick below 2^-8 counts as used up", ("stick < MIN_STICK", "stick < 0.00390625")),
    _of(FORWARD, "stop with the first row", "a block stops as soon as one of its rows has used its stick up",
        ("tl.max(state[1]) >= skip_below", "tl.min(state[1]) >= skip_below")),
    _of(FORWARD, "key head modulo", "query head h takes k of key head h % Hk",
        ("rows_at(k_ptr, batch, k_stride_b, h // GROUP, k_stride_h, token, k_stride_n, ALIGNED)",
         "rows_at(k_ptr, batch, k_stride_b, h % (H // GROUP), k_stride_h, token, k_stride_n, ALIGNED)")),
    _of(FORWARD, "last tile dropped", "the oldest of several tiles of a walk, or of a stretch of it, is not visited",
        ("tile_hi - tile_lo", "tl.maximum(tile_hi - tile_lo - 1, tl.minimum(tile_hi - tile_lo, 1))")),
    _of(STEP, "newer and older swapped", "the stick is scanned towards older keys",
        ("scan(rest, start, product, M, R // 2, NEWER, False, CHAIN)",
         "scan(rest, start, product, M, R // 2, OLDER, False, CHAIN)")),
    _of(STEP, "stick not carried", "each tile starts with a whole stick",
        ("_combine(inner, _combine(outer, start, SUM), SUM)", "_combine(inner, outer, SUM)")),
    _of(STEP, "logits cut at 20", "2^s is cut at 2^20, which leaves more of the stick than it should",
        ("tl.minimum(s, MAX_LOGIT2, propagate_nan=tl.PropagateNan.ALL)", "tl.minimum(s, 20.0, propagate_nan=tl.PropagateNan.ALL)")),
    _of(STEP, "1 - beta of the other key", "the two keys of a pair take each other's 1 - beta in the gradient",
        ("join_pairs(rest + rest * newer, rest + rest * older, M, R)",
         "join_pairs(rest + rest * older, rest + rest * newer, M, R)")),
    _of(STEP, "no sum over older keys", "dz = a (1 - beta)", ("a - e * older_a", "a - 0.0 * older_a")),
    _of(TILES, "one row too many", "a row behind the last is stored", ("rows[:, None] < count", "rows[:, None] <= count")),
    _of(TILES, "sequence one short", "the last token of each packed sequence is not seen",
        ("(tl.load(cu_seqlens_ptr + b + 1) - begin).to(tl.int32)",
         "tl.maximum((tl.load(cu_seqlens_ptr + b + 1) - begin).to(tl.int32) - 1, 0)")),
    _of(QUERIES, "remainder's share lost", "dr r is missing in the sum over older keys",
        ("per_lane(dremainder * remainder, BLOCK_M)", "per_lane(dremainder * 0.0, BLOCK_M)")),
    _of(QUERIES, "walk begins late", "the walk begins where the first, not the last, row ran out of stick",
        ("tl.min(oldest_tile, 0)", "tl.max(oldest_tile, 0)")),
    _of(KEYS, "first head of a group", "q and dout of a group's first query head stand in for all of them",
        ("h * GROUP + g", "h * GROUP")),
    _of(KEYS, "unscaled dk", "dk lacks the factor scale", ("dk * scale", "dk")),
    _of(KEYS, "first visitor lost", "the oldest block of rows that sees a tile of keys adds nothing",
        ("tl.maximum(1 - keys_seen, 0) // BLOCK_M", "tl.maximum(1 - keys_seen, 0) // BLOCK_M + 1")),
    _of(KEYS, "chunks of rows", "what the chunk of rows before left of dk and dv is not read",
        ("load_rows(ptr + row * D, 0, rows, count, D, D, BLOCK_D, False)",
         "load_rows(ptr + row * D, 0, rows, count, D, D, BLOCK_D, False) * 0.0")),
    _of(STEP, "softplus is a ramp", "log2(1 + 2^s) = max(s, 0)",
        ("tl.maximum(s, 0.0) + x * log2_1p", "tl.maximum(s, 0.0)"), variant="log space"),
]  # fmt: skip

SWITCHES = {"torch": TORCH, "triton": TRITON}
