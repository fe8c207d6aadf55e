"""What the kernels share around the math: where a program's sequence lies, tile loads, which keys a row sees."""

import triton
import triton.language as tl

from .step import INTERPRET


@triton.jit
def sequence(cu_seqlens_ptr, b, M, N, VARLEN: tl.constexpr):
    """First token, number of queries and number of keys of batch entry b."""
    if VARLEN:
        begin = tl.load(cu_seqlens_ptr + b).to(tl.int64)
        length = (tl.load(cu_seqlens_ptr + b + 1) - begin).to(tl.int32)
        return begin, length, length
    else:
        return tl.full([], 0, tl.int64), M, N


@triton.jit
def rows_at(ptr, batch, stride_b, head, stride_h, row, stride_row: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to a row of a batch entry's head. ALIGNED: all rows start on 16 bytes.

    NOTE: Triton knows of a stride only whether it is a multiple of 16 elements. Rows that it does not know to be aligned it loads
    without asynchronous copies, and gives wgmma wrong descriptors: see UNALIGNED_SM90 in sbkernels/backends/triton_configs.py.
    """
    ptr += batch * stride_b + head * stride_h + row * stride_row
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def wide(x):
    """An int32 scalar as int64, by a step the compiler cannot trace.

    NOTE: traced, every pointer of a tile gets registers of its own, stepped on in the loop: 32 more at D = 128, which spill.
    """
    if INTERPRET:
        return tl.full([], 0, tl.int64) + x
    else:
        return tl.inline_asm_elementwise("cvt.s64.s32 $0, $1;", "=l,r", [x], dtype=tl.int64, is_pure=True, pack=1)


@triton.jit
def program_again(x):
    """tl.program_id(0), read from the hardware once more; x is an int32 the reading shall depend on."""
    if INTERPRET:
        return tl.program_id(0)
    else:
        return tl.inline_asm_elementwise("mov.u32 $0, %ctaid.x;", "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _row_ptrs(ptr, rows, stride: tl.constexpr, BLOCK_D: tl.constexpr):
    """[len(rows), BLOCK_D] pointers into a matrix."""
    # Offsets within a tile are 32-bit; from a row stride of 2^23 elements on, 256 rows could overflow them.
    if stride >= 8388608:
        rows = rows.to(tl.int64)
    return ptr + rows[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def load_rows(ptr, begin, rows, count, stride: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr):
    """Rows begin + rows of a [count, D] matrix as a tile [len(rows), BLOCK_D]; zeros beyond D.

    Unless EVEN, rows may lie beyond count: the tile then repeats the last row, for whoever reads it to mask.
    NOTE: a mask of the rows in its place takes 38 more registers in the dk, dv kernel, which then spills.
    """
    if not EVEN:
        rows = tl.minimum(rows, count - 1 - begin)
    ptrs = _row_ptrs(ptr, rows, stride, BLOCK_D) + wide(begin) * stride
    if BLOCK_D != D:
        return tl.load(ptrs, mask=(tl.arange(0, BLOCK_D) < D)[None, :], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def store_rows(ptr, tile, rows, count, stride: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store tile [len(rows), BLOCK_D] into a [count, D] matrix, rounded to its dtype."""
    # NOTE: a zero the compiler cannot trace keeps the row numbers (from D = 256 on, the columns too; below, that costs more
    # than it saves) from taking registers all the way from the loads before the loop to here.
    zero = wide(0).to(tl.int32)
    rows += zero
    ptrs = _row_ptrs(ptr, rows, stride, BLOCK_D)
    if BLOCK_D > 128:
        ptrs += zero
    mask = (rows[:, None] < count) & (tl.arange(0, BLOCK_D) < D)[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def keep(x):
    """x, at a place the compiler may not move it from."""
    if INTERPRET:
        return x
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def logits(q, k, scale_log2, offsets, keys_seen, on_diagonal):
    """Eq. (1) in base 2, s [M, N] with columns in the order of `offsets`; -inf where a row does not see the key,
    which it does where offsets < keys_seen [M].

    NOTE: `keep` makes the test of on_diagonal a branch; without it the mask is computed and applied in every tile.
    """
    s = tl.dot(q, tl.trans(k)) * scale_log2
    if on_diagonal:
        s = keep(tl.where(offsets[None, :] < keys_seen[:, None], s, float("-inf")))
    return s


@triton.jit
def state_ptrs(ptr, row, rows):
    """[M, 2] pointers to the stick on entry of a tile and the sum over older tiles, side by side for each row."""
    return ptr + row * 2 + rows[:, None] * 2 + tl.arange(0, 2)[None, :]


@triton.jit
def side_by_side(a, b):
    """Two statistics per row [M, 2, 2] -> [M, 2], as `state_ptrs` lays them out."""
    first = tl.arange(0, 2) == 0
    return tl.max(tl.where(first[None, None, :], a, b), 1)
