"""The per-tile step of stick-breaking attention: every Triton kernel calls this module and nothing else for the math.

Equations are numbered as in sbkernels/reference.py. A tile holds BLOCK_M query rows and BLOCK_N keys. Its columns are in
*permuted* order: column c = 8j + 2q + b (q in 0..3, b in 0..1) holds key offset q*(BLOCK_N/4) + 2j + b (`key_offsets`).
In the accumulator layout of mma and wgmma one thread owns, of a row, the columns with q = lane % 4, so that in this order it
owns one contiguous run of BLOCK_N/4 keys: scans are thread-local trees and only the 4 run totals cross lanes.

    shapes: a tile is [M, N]; the same tile as runs is [M, 4, N/4]; a statistic per row is [M, 2, 2], four equal copies, one
    for each lane that holds a part of the row, so that no scan has to reduce what every lane already knows

Two formulations, chosen by the constexpr LOG_SPACE:
    False  linear space, eq. (6) and (7): u = 1 + 2^s, and one reciprocal serves a pair of keys: 1/(u_older u_newer) is the
           pair's share of the product and, times the other u, each key's 1 - beta. A = 2^s times the stick after the key.
           1.5 special functions a logit. Products only shrink, so an underflow to 0 means "stick used up".
    True   log space, the paper's: A = 2^(s - softplus2(s) - sum(newer softplus2)). Two, and a polynomial.
"""

import os

import triton
import triton.language as tl

# Triton's interpreter has no inline assembly; there the same functions run through tl's own operations.
INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
# Base-2 logits are cut here: (1 + 2^63)^2 and its reciprocal are normal float32 numbers, and 2^s times a sum of gradients
# stays finite. 1 - beta and A are right to 2^-63 of a stick.
MAX_LOGIT2 = tl.constexpr(63.0)
# A stick below this counts as used up, exactly 0: what one key beyond MAX_LOGIT2 leaves, and invisible in any output dtype.
MIN_STICK = tl.constexpr(2.0**-62)
# log2(1 + x) = x (c0 + c1 x + ... + c8 x^8) on [0, 1], minimax of the relative error: 2^-25, with roundings 2^-22.4.
LOG2_1P = tl.constexpr((
    1.442695, -0.7213402, 0.48069295, -0.35840845, 0.27564132, -0.19711882, 0.112856016, -0.042566955, 0.007549156,
))  # fmt: skip

NEWER = tl.constexpr(0)  # scan direction: over keys nearer to the query
OLDER = tl.constexpr(1)  # scan direction: over keys farther from the query


@triton.jit
def exp2(x):
    """2^x, results below 2^-126 flushed to 0."""
    # NOTE: tl.exp2 keeps subnormal results, at three more instructions a logit on sm_90.
    if INTERPRET:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def reciprocal(x):
    """1/x to one ulp."""
    if INTERPRET:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def log2(x):
    """log2(x) to 2^-22 absolute; -inf at 0."""
    if INTERPRET:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def softplus2(s):
    """log2(1 + 2^s) to 2^-22 relative, both tails included: max(s, 0) + log2(1 + 2^-|s|).

    NOTE: the paper's lg2.approx(1 + ex2.approx(s)) is right to 2^-22 absolute only: far keys, each with a small share, add that
    up to 2 to 8 times what the tolerance allows the remainder from N = 300 on.
    """
    x = exp2(-tl.abs(s))
    log2_1p = LOG2_1P[8]
    for i in tl.static_range(7, -1, -1):
        log2_1p = log2_1p * x + LOG2_1P[i]
    return tl.maximum(s, 0.0) + x * log2_1p


@triton.jit
def key_offsets(BLOCK_N: tl.constexpr):
    """[BLOCK_N] key offset held by each column of a tile."""
    c = tl.arange(0, BLOCK_N)
    return ((c >> 1) & 3) * (BLOCK_N // 4) + (c >> 3) * 2 + (c & 1)


@triton.jit
def to_runs(x, M: tl.constexpr, N: tl.constexpr):
    """[M, N] tile -> [M, 4, N/4] runs, keys oldest first."""
    x = tl.permute(tl.reshape(x, [M, N // 8, 4, 2]), (0, 2, 1, 3))
    return tl.reshape(x, [M, 4, N // 4])


@triton.jit
def from_runs(x, M: tl.constexpr, N: tl.constexpr):
    """[M, 4, N/4] runs -> [M, N] tile."""
    x = tl.permute(tl.reshape(x, [M, 4, N // 8, 2]), (0, 2, 1, 3))
    return tl.reshape(x, [M, N])


@triton.jit
def split_pairs(x, M: tl.constexpr, R: tl.constexpr):
    """Runs [M, 4, R] -> the older and the newer key of each pair, [M, 4, R/2]."""
    return tl.split(tl.reshape(x, [M, 4, R // 2, 2]))


@triton.jit
def join_pairs(older, newer, M: tl.constexpr, R: tl.constexpr):
    """The inverse of `split_pairs`."""
    return tl.reshape(tl.join(older, newer), [M, 4, R])


@triton.jit
def _combine(a, b, SUM: tl.constexpr):
    return a + b if SUM else a * b


@triton.jit
def per_lane(x, M: tl.constexpr):
    """[M] -> the [M, 2, 2] form of a statistic per row."""
    return tl.broadcast_to(x[:, None, None], [M, 2, 2])


@triton.jit
def per_row(x):
    """[M, 2, 2] form of a statistic per row -> [M]."""
    return tl.max(tl.max(x, 2), 1)


@triton.jit
def spent_log2(total, LOG_SPACE: tl.constexpr):
    """log2 (<= 0) of what a tile leaves of the stick, from its total [M, 2, 2] of `weights`."""
    return -total if LOG_SPACE else log2(total)


@triton.jit
def scan_start(stick, LOG_SPACE: tl.constexpr):
    """What the scan of a tile starts from: the stick on entry [M, 2, 2] or, in log space, -log2 of it."""
    return -log2(stick) if LOG_SPACE else stick


@triton.jit
def chain_entry(total, chain, LOG_SPACE: tl.constexpr):
    """Walking newer: log2 of the stick on entry of this tile, and the stick itself, both [M, 2, 2].

    chain, all [M, 2, 2]: log2_stick, the same of the next older tile or, up to the oldest tile in which the row had stick
    left, that tile's own from the forward; age, this tile's index less that tile's (negative: no stick); at_newest, whether
    this is the row's newest tile (a whole stick, which ends the drift of the sums).
    """
    log2_stick, age, at_newest = chain
    entry = tl.where(age > 0, log2_stick - spent_log2(total, LOG_SPACE), log2_stick)
    entry = tl.where(at_newest, 0.0, entry)
    return entry, tl.where(age < 0, 0.0, exp2(entry))


@triton.jit
def _other(x, AXIS: tl.constexpr):
    """x with the two elements of AXIS swapped, through one shuffle: the exclusive or of both, less one's own."""
    bits = x.to(tl.int32, bitcast=True)
    return (tl.expand_dims(tl.xor_sum(bits, AXIS), AXIS) ^ bits).to(tl.float32, bitcast=True)


@triton.jit
def _scan_run_totals(x, start, M: tl.constexpr, DIRECTION: tl.constexpr, SUM: tl.constexpr, CHAIN: tl.constexpr):
    """[M, 4, 1] run totals, one per lane -> their exclusive scan from start, and the row's total.

    NOTE: tl.associative_scan goes through shared memory (9 to 12 % of the forward), and a division "inclusive / own" is NaN
    once a product has underflowed. start comes in while the shape is [M, 2, 2]: later, the compiler re-lays the whole tile
    out (140 more shuffles a thread and tile).
    """
    identity: tl.constexpr = 0.0 if SUM else 1.0
    takes = (tl.arange(0, 2) == 0) if DIRECTION == NEWER else (tl.arange(0, 2) == 1)  # which of two has the other ahead
    x = tl.reshape(x, [M, 2, 2])
    other = _other(x, 2)
    inner = tl.where(takes[None, None, :], other, identity)
    pair = _combine(x, other, SUM)  # the same for both of a pair
    other = _other(pair, 1)
    outer = tl.where(takes[None, :, None], other, identity)
    total = _combine(pair, other, SUM)  # the same for all four
    if CHAIN:
        _, stick = chain_entry(total, start, SUM)
        start = scan_start(stick, SUM)
    return tl.reshape(_combine(inner, _combine(outer, start, SUM), SUM), [M, 4, 1]), total


@triton.jit
def run_product(u, e, M: tl.constexpr, R: tl.constexpr):
    """u [M, 4, 1] times 1 + e for each key of the runs e [M, 4, R], one after the other; inf or NaN where that overflows.

    NOTE: u (1 + e) rounded once is rounded to either side, since e has digits that u has not. A product of two such is not.
    """
    if R == 1:
        return u * e + u
    else:
        older, newer = split_pairs(e, M, R)
        return run_product(run_product(u, older, M, R // 2), newer, M, R // 2)


@triton.jit
def scan(
    x, start, product,
    M: tl.constexpr, R: tl.constexpr, DIRECTION: tl.constexpr, SUM: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Exclusive scan of runs x [M, 4, R] towards DIRECTION from start [M, 2, 2], and the tile's total [M, 2, 2].

    product: None, or one over each run's product [M, 4, 1], where it is known better. SUM: add, else multiply. CHAIN: start is the
    tuple `chain` of `chain_entry`.
    """
    if R == 1:
        if product is not None:
            x = tl.where(product < float("inf"), reciprocal(product), x)
        return _scan_run_totals(x, start, M, DIRECTION, SUM, CHAIN)
    else:
        older, newer = split_pairs(x, M, R)
        pair, total = scan(_combine(older, newer, SUM), start, product, M, R // 2, DIRECTION, SUM, CHAIN)
        if DIRECTION == NEWER:
            return join_pairs(_combine(pair, newer, SUM), pair, M, R), total
        else:
            return join_pairs(pair, _combine(pair, older, SUM), M, R), total


@triton.jit
def weights(s, start, M: tl.constexpr, N: tl.constexpr, CHAIN: tl.constexpr, LOG_SPACE: tl.constexpr):
    """Eq. (2), (3) and (6), (7) on base-2 logits s [M, N]; -inf marks an invisible key.

    Returns A as runs [M, 4, N/4]; what `logit_gradient` wants: runs of 2^s and, for each pair of keys, 1/(u_older u_newer)
    [M, 4, N/8] (in log space: runs of s and of softplus2(s)); and the tile's total [M, 2, 2]: prod(1 - beta) or, in log space,
    sum(softplus2(s)).
    """
    R: tl.constexpr = N // 4
    s = to_runs(s, M, N)
    if LOG_SPACE:
        softplus = softplus2(s)
        newer, total = scan(softplus, start, None, M, R, NEWER, True, CHAIN)
        return exp2(s - softplus - newer), s, softplus, total
    else:
        e = exp2(tl.minimum(s, MAX_LOGIT2, propagate_nan=tl.PropagateNan.ALL))
        older, newer = split_pairs(e, M, R)
        u = 1.0 + older
        rest = reciprocal(u * newer + u)
        product = run_product(tl.full([M, 4, 1], 1.0, tl.float32), e, M, R)
        stick, total = scan(rest, start, product, M, R // 2, NEWER, False, CHAIN)
        after_newer = stick * (rest + rest * older)
        after_older = stick * rest
        return join_pairs(after_older * older, after_newer * newer, M, R), e, rest, total


@triton.jit
def logit_gradient(
    A, e, rest, dA, older_sum, one,
    M: tl.constexpr, N: tl.constexpr, RECOMPUTE: tl.constexpr, LOG_SPACE: tl.constexpr,
):  # fmt: skip
    """Eq. (8) and (9): dz [M, N] from what `weights` returned, dA = do v^T [M, N] and dr r + sum(a over older tiles) [M, 2, 2].

    Returns dz and that sum with this tile added. RECOMPUTE takes the reciprocals from 2^s again, so that 16 registers less
    live through the product dA; one is 1.0 as an argument of the kernel, without which the compiler undoes that.
    """
    R: tl.constexpr = N // 4
    a = A * to_runs(dA, M, N)
    older_a, total = scan(a, older_sum, None, M, R, OLDER, True, False)
    if LOG_SPACE:
        dz = a * exp2(-rest) - exp2(e - rest) * older_a
    else:
        older, newer = split_pairs(e, M, R)
        if RECOMPUTE:
            rest = reciprocal((older + one) * (newer + one))
        t = join_pairs(rest + rest * newer, rest + rest * older, M, R)  # 1 - beta
        dz = (a - e * older_a) * t
    return from_runs(dz, M, N), older_sum + total
