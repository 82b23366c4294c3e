# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="no-untyped-call"
"""The attention mass of every block on Hopper, in Gluon: scores by wgmma while the scores before become masses.

Shapes
    q, k          [B, L, H, D] by strides in multiples of 16 bytes, float16 or bfloat16, D 64 or 128
    lse           fp32 [B, H, L], natural log, -inf for rows that count nothing
    sums          fp32 [B, H, ceil(L / UNIT_M), ceil(L / UNIT_N)], units of 64 or 128
Positions [0, video) are video, [text_start, lens[b]) are text; all others may hold anything.

One program owns 128 query rows: a producer warp fetches tiles of 128 keys, two warpgroups take 64 rows each. A product
of 128 x 128 x 128 takes the tensor cores as long as its exponentials take the special-function units, so each
warpgroup keeps the next product running while it exponentiates. A warp's share of the sum of a tile stays with one of
its lanes until 32 tiles are done, so that warps seldom wait for each other. Where two warpgroups share a block, both
add to a zero: a + b is b + a, so the result is the same in every run.
"""

from __future__ import annotations

from functools import cache

import torch
from triton.compiler.errors import CompilationError
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from videosparse.kernels.call import AttentionCall
from videosparse.layout import ceil_div

__all__ = ["CompilationError", "block_sums", "unsuited"]

LOG2_E = gl.constexpr(1.4426950408889634)
MMA = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16]))
LINE = gl.constexpr(gl.SliceLayout(1, MMA.value))
COLS = gl.constexpr(gl.SliceLayout(0, MMA.value))
WARPS = gl.constexpr(gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0]))
"""A number for each warp of a warpgroup and each of its lanes."""

# Triton 3.7 renamed these
_barrier = getattr(gl, "thread_barrier", None) or gl.barrier
_load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def _next(i, phase, n: gl.constexpr):
    return gl.where(i + 1 == n, 0, i + 1), gl.where(i + 1 == n, phase ^ 1, phase)


@gluon.jit
def _produce(
    q_desc, k_desc, q_s, ring, q_full, full, empty, sample, head, first, tiles, D: gl.constexpr, RING: gl.constexpr
):
    """Fetch the queries, then all keys, as slots of the ring become free."""
    mbarrier.expect(q_full.index(0), 128 * D * 2)
    for w in gl.static_range(2):
        _load_tile(q_desc, [sample, head, first + w * 64, 0], q_full.index(0), q_s.index(w))
    r, phase = 0, 1
    for n in range(tiles):
        mbarrier.wait(empty.index(r), phase)
        mbarrier.expect(full.index(r), 128 * D * 2)
        _load_tile(k_desc, [sample, head, n * 128, 0], full.index(r), ring.index(r))
        r, phase = _next(r, phase, RING)


@gluon.jit
def _scores(q, k, D: gl.constexpr):
    zero = gl.zeros([64, 128], gl.float32, MMA)
    return warpgroup_mma(q.reshape([64, D]), k.reshape([128, D]).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _exp2_by_fma(x):
    """2^x without the special-function units, relative error 2e-7: 2^round(x) by its bits, the rest by a polynomial.

    Exactly 0 for x <= -127. The coefficients are those of the Taylor series, for |rest| <= 1/2.
    """
    x = gl.maximum(x, -127.0)
    shifted = x + 12582912.0  # 1.5 * 2^23: the sum's last bits are round(x)
    rest = x - (shifted - 12582912.0)
    y = rest * 1.5403530393381608e-4 + 1.3333558146428443e-3
    y = y * rest + 9.618129107628477e-3
    y = y * rest + 5.550410866482158e-2
    y = y * rest + 2.4022650695910072e-1
    y = y * rest + 6.931471805599453e-1
    y = y * rest + 1.0
    return (y.to(gl.int32, bitcast=True) + (shifted.to(gl.int32, bitcast=True) << 23)).to(gl.float32, bitcast=True)


@gluon.jit
def _exp2(x, BY_FMA: gl.constexpr):
    """2^x [64, 128]; with BY_FMA a quarter of the columns, by groups of eight, avoids the special-function units."""
    if BY_FMA:
        even, odd = gl.split(gl.permute(gl.reshape(x, [64, 8, 2, 8]), (0, 1, 3, 2)))
        left, right = gl.split(gl.permute(gl.reshape(odd, [64, 4, 2, 8]), (0, 1, 3, 2)))
        odd = gl.permute(gl.join(gl.exp2(left), _exp2_by_fma(right)), (0, 1, 3, 2))
        # the same registers under another name, so converting moves nothing
        odd = gl.convert_layout(gl.reshape(odd, [64, 8, 8]), even.type.layout)
        both = gl.join(gl.exp2(even), odd)
        return gl.reshape(gl.permute(both, (0, 1, 3, 2)), [64, 128])
    else:
        return gl.exp2(x)


@gluon.jit
def _of_warps(p, GROUPS: gl.constexpr):
    """[64, 8 * GROUPS] in the layout of a product -> fp32 [4], the sum of what each warp holds."""
    lanes = gl.sum(gl.sum(gl.reshape(p, [64, GROUPS, 4, 2]), 3), 1)
    own = gl.reshape(gl.sum(gl.reshape(lanes, [4, 2, 8, 4]), 1), [4, 32])
    return gl.convert_layout(gl.sum(own, 1), gl.SliceLayout(1, WARPS))


@gluon.jit
def _exponents(s, level, scale):
    """Scores above the level of their row, base 2."""
    return (s * scale - level[:, None]) * LOG2_E


@gluon.jit
def _keep(total, slot, lane, p, UNIT_N: gl.constexpr):
    """Put the sums of a tile where they wait to be written: one for each half of 64 keys, or for both."""
    if UNIT_N == 128:
        return gl.where((lane == slot)[None, :], _of_warps(p, 16)[:, None], total)
    else:
        left, right = gl.split(gl.permute(gl.reshape(p, [64, 2, 64]), (0, 2, 1)))
        total = gl.where((lane == 2 * slot)[None, :], _of_warps(left, 8)[:, None], total)
        return gl.where((lane == 2 * slot + 1)[None, :], _of_warps(right, 8)[:, None], total)


@gluon.jit
def _flush(line_ptr, total, lane, first, count, limit, UNIT_M: gl.constexpr, UNIT_N: gl.constexpr):
    """Write the sums of `count` tiles from `first` to a row of units, up to column `limit`."""
    per_tile: gl.constexpr = 128 // UNIT_N
    column = first * per_tile + lane
    inside = (lane < count * per_tile) & (column < limit)
    if UNIT_M == 128:
        gl.atomic_add(line_ptr + column, gl.sum(total, 0), mask=inside, sem="relaxed")
    else:
        gl.store(line_ptr + column, gl.sum(total, 0), mask=inside)


@gluon.jit
def _consume(
    w: gl.constexpr,
    lse_line,
    sums_line,
    q_s,
    ring,
    q_full,
    full,
    empty,
    first,
    tiles,
    whole,
    video,
    text_start,
    end,
    columns,
    limit,
    scale,
    D: gl.constexpr,
    UNIT_M: gl.constexpr,
    UNIT_N: gl.constexpr,
    RING: gl.constexpr,
    STEP: gl.constexpr,
    BY_FMA: gl.constexpr,
):
    """64 rows against all keys."""
    CHUNK: gl.constexpr = UNIT_N // 4  # tiles whose sums, one or two for each, fill the lanes of a warp
    rows = first + w * 64 + gl.arange(0, 64, LINE)
    row_valid = (rows < video) | ((rows >= text_start) & (rows < end))
    lse = gl.load(lse_line + rows, mask=row_valid, other=-float("inf"))
    level = gl.where(lse == -float("inf"), float("inf"), lse)
    lane = gl.arange(0, 32, gl.SliceLayout(0, WARPS))
    line = sums_line
    if UNIT_M == 64:
        line = sums_line + w * columns

    mbarrier.wait(q_full.index(0), 0)
    q = q_s.index(w)
    # rows that are no tokens may hold NaN, which the level could not undo
    held = q.reshape([64, D]).load(MMA)
    q.reshape([64, D]).store(gl.where(row_valid[:, None], held, 0.0).to(held.dtype))
    fence_async_shared()
    _barrier()

    mbarrier.wait(full.index(0), 0)
    s = warpgroup_mma_wait(0, [_scores(q, ring.index(0), D)])
    mbarrier.arrive(empty.index(0))
    r, phase = 1, 0
    sure = gl.minimum(whole, tiles - 1) // STEP * STEP
    for start in range(0, sure, CHUNK):
        total = gl.zeros([4, 32], gl.float32, WARPS)
        stop = gl.minimum(start + CHUNK, sure)
        for n in range(start, stop, STEP):
            for step in gl.static_range(STEP):  # two at a time, scores take turns in two sets of registers: no moves
                mbarrier.wait(full.index(r), phase)
                running = _scores(q, ring.index(r), D)
                p = _exp2(_exponents(s, level, scale), BY_FMA)
                total = _keep(total, n + step - start, lane, p, UNIT_N)
                s = warpgroup_mma_wait(0, [running])
                mbarrier.arrive(empty.index(r))
                r, phase = _next(r, phase, RING)
        _flush(line, total, lane, start, stop - start, limit, UNIT_M, UNIT_N)
    # the tiles that need a mask, and the last one, whose successor does not exist
    for n in range(sure, tiles):
        key = n * 128 + gl.arange(0, 128, COLS)
        valid = (key < video) | ((key >= text_start) & (key < end))
        p = gl.exp2(gl.where(valid[None, :], _exponents(s, level, scale), -float("inf")))
        total = _keep(gl.zeros([4, 32], gl.float32, WARPS), 0, lane, p, UNIT_N)
        _flush(line, total, lane, n, 1, limit, UNIT_M, UNIT_N)
        if n + 1 < tiles:
            mbarrier.wait(full.index(r), phase)
            s = warpgroup_mma_wait(0, [_scores(q, ring.index(r), D)])
            mbarrier.arrive(empty.index(r))
            r, phase = _next(r, phase, RING)


@gluon.jit
def _barriers(n: gl.constexpr, arrivals: gl.constexpr):
    made = gl.allocate_shared_memory(gl.int64, [n, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(n):
        mbarrier.init(made.index(i), count=arrivals)
    return made


SIZES = ["lens_ptr", "video", "text_start", "length", "row_tiles", "tiles", "rows", "columns", "heads"]


@gluon.jit(do_not_specialize=SIZES)
def hopper_sums_kernel(
    q_desc,
    k_desc,
    lse_ptr,
    sums_ptr,
    lens_ptr,
    video,
    text_start,
    length,
    row_tiles,
    tiles,
    rows,
    columns,
    heads,
    scale,
    D: gl.constexpr,
    UNIT_M: gl.constexpr,
    UNIT_N: gl.constexpr,
    HAS_LENS: gl.constexpr,
    RING: gl.constexpr,
    STEP: gl.constexpr,
    BY_FMA: gl.constexpr,
):
    """128 query rows of one head; `rows` and `columns` of units, `tiles` of 128 keys, `row_tiles` of 128 rows."""
    program = gl.program_id(0)
    tile = program % row_tiles
    head = program // row_tiles % heads
    sample = program // row_tiles // heads
    end = length
    if HAS_LENS:
        end = gl.minimum(gl.load(lens_ptr + sample), length)
    # one run of surely valid keys: the video, and the text where it follows without a gap
    sure = gl.where(text_start == video, gl.maximum(video, end), video)
    line = (sample * heads + head).to(gl.int64)
    lse_line = lse_ptr + line * length
    unit_row = tile * (128 // UNIT_M)
    sums_line = sums_ptr + (line * rows + unit_row) * columns

    q_s = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, 64, D], q_desc.layout)
    ring = gl.allocate_shared_memory(k_desc.dtype, [RING, 1, 1, 128, D], k_desc.layout)
    q_full = _barriers(1, 1)
    full = _barriers(RING, 1)
    empty = _barriers(RING, 2)
    # a last row of units may not exist: its warpgroup works for nothing, and writes nothing
    limit = gl.where(unit_row + 1 < rows, columns, 0) if UNIT_M == 64 else columns
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    0, lse_line, sums_line, q_s, ring, q_full, full, empty, tile * 128, tiles, sure // 128, video,
                    text_start, end, columns, columns, scale, D, UNIT_M, UNIT_N, RING, STEP, BY_FMA,
                ),
            ),
            (
                _consume,
                (
                    1, lse_line, sums_line, q_s, ring, q_full, full, empty, tile * 128, tiles, sure // 128, video,
                    text_start, end, columns, limit, scale, D, UNIT_M, UNIT_N, RING, STEP, BY_FMA,
                ),
            ),
            (_produce, (q_desc, k_desc, q_s, ring, q_full, full, empty, sample, head, tile * 128, tiles, D, RING)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@cache
def _is_hopper(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0)


def unsuited(q: torch.Tensor, k: torch.Tensor, call: AttentionCall) -> str | None:
    """Why the kernel cannot take a call; None when it can."""
    if not q.is_cuda or not _is_hopper(q.device):
        return f"it is for Hopper GPUs (got {q.device})"
    if q.dtype not in (torch.float16, torch.bfloat16) or q.shape[3] not in (64, 128):
        return f"it takes float16 and bfloat16 with head_dim 64 or 128 (got {q.dtype}, {q.shape[3]})"
    for x in (q, k):
        if x.data_ptr() % 16 or any(n % 8 for n, size in zip(x.stride()[:3], x.shape[:3], strict=True) if size > 1):
            return "tensors and their strides must be multiples of 16 bytes"
    return None


VARIANTS = ((5, 2, False), (5, 1, False), (5, 2, True), (4, 2, False))
"""(slots for key tiles, tiles in one turn of the loop, a quarter of the exponentials by FMA); the first is taken."""


def block_sums(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    call: AttentionCall,
    block: tuple[int, int],
    variant: tuple[int, int, bool] = VARIANTS[0],
) -> torch.Tensor:
    """Launch the kernel on checked tensors that suit it; see `kernels.block_sums`.

    Returns:
        fp32 [B, H, ceil(L / block[0]), ceil(L / block[1])].
    """
    batch, length, heads, head_dim = q.shape
    rows, columns = ceil_div(length, block[0]), ceil_div(length, block[1])
    # two warpgroups add to the sums of a block of 128 rows
    make = torch.zeros if block[0] == 128 else torch.empty
    sums = make((batch, heads, rows, columns), dtype=torch.float32, device=q.device)
    if sums.numel() == 0:
        return sums
    tiles = ceil_div(length, 128)
    ring, step, by_fma = variant
    with torch.cuda.device(q.device):
        hopper_sums_kernel[(batch * heads * tiles,)](
            _descriptor(q, 64),
            _descriptor(k, 128),
            lse.float().contiguous(),
            sums,
            call.seq_lens,
            call.video,
            call.text_start,
            length,
            tiles,
            tiles,
            rows,
            columns,
            heads,
            call.scale,
            D=head_dim,
            UNIT_M=block[0],
            UNIT_N=block[1],
            HAS_LENS=call.seq_lens is not None,
            RING=ring,
            STEP=step,
            BY_FMA=by_fma,
            num_warps=4,
        )
    return sums


def _descriptor(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """Tiles of `rows` tokens of one head of x [B, L, H, D], seen as [B, H, L, D]."""
    batch, length, heads, dim = x.shape
    b, n, h, d = x.stride()
    # a stride along a dimension of 1 means nothing, but must be a multiple of 16 bytes
    strides = [b if batch > 1 else length * heads * dim * 8, h if heads > 1 else heads * dim, n, d]
    return TensorDescriptor(x, [batch, heads, length, dim], strides, [1, 1, rows, dim], LAYOUT)


LAYOUT = gl.NVMMASharedLayout(128, 16, 4)
