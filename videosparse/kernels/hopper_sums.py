# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="no-untyped-call"
"""The attention mass of every block on Hopper, in Gluon: scores by wgmma while other scores become masses.

Shapes
    q, k          [B, L, H, D] by strides in multiples of 16 bytes, float16 or bfloat16, D 64 or 128
    lse           fp32 [B, H, L], natural log, -inf for rows that count nothing
    sums          fp32 [B, H, ceil(L / UNIT_M), ceil(L / UNIT_N)], units of 64 or 128
Positions [0, video) are video, [text_start, lens[b]) are text; all others may hold anything.

One program owns 256 query rows: a producer warp fetches tiles of 128 keys, four groups of four warps take 64 rows each.
A product takes the tensor cores as long as its exponentials take the special-function units, so both must always have
work. The groups see to that: each waits for its own product, and meanwhile the others exponentiate. (Two groups that
keep a product of their own running beside their exponentials took 1.2 times as long: ptxas spreads the parts of that
product over the exponentials, and none is left to run while a group sums up, waits and turns.) A warp's share of the
sum of a tile stays with one of its lanes until 32 sums are there, so that warps seldom wait for each other. Where two
groups share a block, both add to a zero: a + b is b + a, so the result is the same in every run.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from videosparse.kernels.call import LOG2_E, AttentionCall
from videosparse.kernels.compiled import compiled
from videosparse.kernels.hopper_kernel import load_tile, next_slot, thread_barrier
from videosparse.kernels.tma import describe, is_aligned
from videosparse.layout import ceil_div

LOG2_E_IN_KERNEL = gl.constexpr(LOG2_E)
GROUPS = gl.constexpr(4)  # of 64 query rows; more would not find registers for their scores
RING = gl.constexpr(4)  # tiles of keys that shared memory holds beside the queries
REGISTERS = gl.constexpr([112, 112, 112, 24])  # a thread of the other groups, and of the producer
MMA = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16]))
LINE = gl.constexpr(gl.SliceLayout(1, MMA.value))
COLS = gl.constexpr(gl.SliceLayout(0, MMA.value))
WARPS = gl.constexpr(gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0]))
"""A number for each warp of a group and each of its lanes."""


@gluon.jit
def _produce(q_desc, k_desc, shared, sample, head, first, tiles, D: gl.constexpr):
    """Fetch the queries, then all keys, as slots of the ring become free."""
    queries, ring, q_full, full, empty = shared
    mbarrier.expect(q_full.index(0), GROUPS * 64 * D * 2)
    for w in gl.static_range(GROUPS):
        load_tile(q_desc, [sample, head, first + w * 64, 0], q_full.index(0), queries.index(w))
    slot, phase = 0, 1
    for n in range(tiles):
        mbarrier.wait(empty.index(slot), phase)
        mbarrier.expect(full.index(slot), 128 * D * 2)
        load_tile(k_desc, [sample, head, n * 128, 0], full.index(slot), ring.index(slot))
        slot, phase = next_slot(slot, phase, RING)


@gluon.jit
def _scores(q, shared, slot, phase, D: gl.constexpr):
    """The product of 64 queries and the tile of keys in a slot, which is free afterwards."""
    _, ring, _, full, empty = shared
    mbarrier.wait(full.index(slot), phase)
    zero = gl.zeros([64, 128], gl.float32, MMA)
    k = ring.index(slot).reshape([128, D]).permute((1, 0))
    s = warpgroup_mma_wait(0, [warpgroup_mma(q, k, zero, use_acc=False, is_async=True)])
    mbarrier.arrive(empty.index(slot))
    return s


@gluon.jit
def _exponents(s, level, scale):
    """Scores above the level of their row, base 2; in one multiply-add, with a level in base 2, it errs too much."""
    return (s * scale - level[:, None]) * LOG2_E_IN_KERNEL


@gluon.jit
def _of_warps(p, COLUMNS: gl.constexpr):
    """[64, COLUMNS] in the layout of a product -> fp32 [4, 1], the sum of what each warp holds."""
    rows = gl.sum(gl.sum(gl.reshape(p, [64, COLUMNS // 8, 4, 2]), 3), 1)
    own = gl.reshape(gl.sum(gl.reshape(rows, [4, 2, 8, 4]), 1), [4, 32])
    return gl.sum(gl.convert_layout(own, WARPS), 1)[:, None]


@gluon.jit
def _keep(total, slot, lane, p, UNIT_N: gl.constexpr):
    """Put the sums of a tile where they wait to be written: one for each half of 64 keys, or for both."""
    if UNIT_N == 128:
        return gl.where((lane == slot)[None, :], _of_warps(p, 128), total)
    else:
        left, right = gl.split(gl.permute(gl.reshape(p, [64, 2, 64]), (0, 2, 1)))
        total = gl.where((lane == 2 * slot)[None, :], _of_warps(left, 64), total)
        return gl.where((lane == 2 * slot + 1)[None, :], _of_warps(right, 64), total)


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
    w: gl.constexpr, lse_line, sums_ptr, shared, first, tiles, whole, layout, units, scale,
    D: gl.constexpr, UNIT_M: gl.constexpr, UNIT_N: gl.constexpr,
):  # fmt: skip
    """64 rows against all keys, of which the first `whole` tiles are surely valid; `sums_ptr` of this head."""
    CHUNK: gl.constexpr = UNIT_N // 4  # tiles whose sums, one or two for each, fill the lanes of a warp
    queries, _, q_full, _, _ = shared
    video, text_start, end = layout
    unit_rows, columns = units
    first += w * 64
    rows = first + gl.arange(0, 64, LINE)
    row_valid = (rows < video) | ((rows >= text_start) & (rows < end))
    lse = gl.load(lse_line + rows, mask=row_valid, other=-float("inf"))
    level = gl.where(lse == -float("inf"), float("inf"), lse)
    lane = gl.arange(0, 32, gl.SliceLayout(0, WARPS))
    line = sums_ptr + first // UNIT_M * columns
    # rows behind the last unit are worked on for nothing, and nothing is written for them
    limit = gl.where(first // UNIT_M < unit_rows, columns, 0)

    mbarrier.wait(q_full.index(0), 0)
    q = queries.index(w).reshape([64, D])
    # rows that are no tokens may hold NaN, which the level could not undo
    held = q.load(MMA)
    q.store(gl.where(row_valid[:, None], held, 0.0).to(held.dtype))
    fence_async_shared()
    thread_barrier()

    slot, phase = 0, 0
    for start in range(0, whole, CHUNK):
        total = gl.zeros([4, 32], gl.float32, WARPS)
        stop = gl.minimum(start + CHUNK, whole)
        for n in range(start, stop):
            s = _scores(q, shared, slot, phase, D)
            total = _keep(total, n - start, lane, gl.exp2(_exponents(s, level, scale)), UNIT_N)
            slot, phase = next_slot(slot, phase, RING)
        _flush(line, total, lane, start, stop - start, limit, UNIT_M, UNIT_N)
    for n in range(whole, tiles):
        s = _scores(q, shared, slot, phase, D)
        key = n * 128 + gl.arange(0, 128, COLS)
        valid = (key < video) | ((key >= text_start) & (key < end))
        p = gl.exp2(gl.where(valid[None, :], _exponents(s, level, scale), -float("inf")))
        total = _keep(gl.zeros([4, 32], gl.float32, WARPS), 0, lane, p, UNIT_N)
        _flush(line, total, lane, n, 1, limit, UNIT_M, UNIT_N)
        slot, phase = next_slot(slot, phase, RING)


@gluon.jit
def _make_barriers(n: gl.constexpr, arrivals: gl.constexpr):
    """Barriers of n slots, whose phases end with so many arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [n, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(n):
        mbarrier.init(made.index(i), count=arrivals)
    return made


# nothing is specialised: sizes change from call to call
@gluon.jit(
    do_not_specialize=[
        "lse_ptr", "sums_ptr", "lens_ptr", "video", "text_start", "length", "row_tiles", "tiles", "rows", "columns",
        "heads",
    ]
)  # fmt: skip
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
):
    """256 query rows of one head; `rows` and `columns` of units, `tiles` of 128 keys, `row_tiles` of 256 rows."""
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
    sums_head = sums_ptr + line * rows * columns
    first = tile * (GROUPS * 64)

    queries = gl.allocate_shared_memory(q_desc.dtype, [GROUPS, 1, 1, 64, D], q_desc.layout)
    ring = gl.allocate_shared_memory(k_desc.dtype, [RING, 1, 1, 128, D], k_desc.layout)
    shared = (queries, ring, _make_barriers(1, 1), _make_barriers(RING, 1), _make_barriers(RING, GROUPS))
    whole, layout, units = sure // 128, (video, text_start, end), (rows, columns)
    gl.warp_specialize(
        [
            (_consume, (0, lse_line, sums_head, shared, first, tiles, whole, layout, units, scale, D, UNIT_M, UNIT_N)),
            (_consume, (1, lse_line, sums_head, shared, first, tiles, whole, layout, units, scale, D, UNIT_M, UNIT_N)),
            (_consume, (2, lse_line, sums_head, shared, first, tiles, whole, layout, units, scale, D, UNIT_M, UNIT_N)),
            (_consume, (3, lse_line, sums_head, shared, first, tiles, whole, layout, units, scale, D, UNIT_M, UNIT_N)),
            (_produce, (q_desc, k_desc, shared, sample, head, first, tiles, D)),
        ],
        [4, 4, 4, 1],
        REGISTERS,
    )


def unsuited(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, call: AttentionCall, block: tuple[int, int]
) -> str | None:
    """What of a call on checked tensors [B, L, H, D] this kernel does not take; None when it takes all."""
    if call.far is not None:
        return "it takes scores as they are (no logit)"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16 (got {q.dtype})"
    if q.shape[3] not in (64, 128):
        return f"it takes head_dim 64 and 128 (got {q.shape[3]})"
    if not (is_aligned(q) and is_aligned(k)):
        return "it takes tensors whose start and strides are multiples of 16 bytes"
    return None


def block_sums(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, call: AttentionCall, block: tuple[int, int]
) -> torch.Tensor:
    """Launch the kernel on tensors of the current device, for a call that `unsuited` lets pass.

    Returns:
        fp32 [B, H, ceil(L / block[0]), ceil(L / block[1])].

    Raises:
        CannotCompile: what it says.
    """
    batch, length, heads, head_dim = q.shape
    rows, columns = ceil_div(length, block[0]), ceil_div(length, block[1])
    # two groups add to the sums of a block of 128 rows
    make = torch.zeros if block[0] == 128 else torch.empty
    sums = make((batch, heads, rows, columns), dtype=torch.float32, device=q.device)
    if sums.numel() == 0:
        return sums
    lse = lse.float().contiguous()
    row_tiles = ceil_div(length, GROUPS.value * 64)
    arguments = (
        describe(q, 64, head_dim),
        describe(k, 128, head_dim),
        lse,
        sums,
        lse if call.seq_lens is None else call.seq_lens,
        call.video,
        call.text_start,
        length,
        row_tiles,
        ceil_div(length, 128),
        rows,
        columns,
        heads,
        call.scale,
    )
    constants = (head_dim, *block, call.seq_lens is not None)
    key = (q.device, q.dtype, constants)
    kernel = compiled(hopper_sums_kernel, key, *arguments, *constants, num_warps=4, enable_fp_fusion=True)
    kernel[(batch * heads * row_tiles, 1, 1)](*arguments, *constants)
    return sums
