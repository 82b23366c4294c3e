# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""RMS norm and rotary embedding of queries and keys in one pass, in Triton. Imported on first use only.

Shapes
    q, k          [B, S, H * D] by strides, contiguous along the last dimension; offsets are 64-bit
    q_out, k_out  [B, L, H, D] contiguous
    weights       [H * D] (one norm across all heads) or [D] (every head by itself)
    cos, sin      [S, 1 or H, D / 2] by strides; the pair (2i, 2i + 1) of a head turns by angle i
    table         int32 [H, 8], see `ordering.axis_table`
Position p of the output takes token p - start; positions of a launch before `start` are a gap and get zeros. With an
order, every head of token p goes to the position that the order gives it instead.

One program owns one token, with all heads of q and then of k. The heads fall into two parts of a power of two each,
40 = 32 + 8, which stay in registers from load to store: everything is read once and written once. Arithmetic is fp32,
rounded once at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from videosparse.kernels import gpu
from videosparse.kernels.steps import Steps
from videosparse.kernels.stream import Pair, Stream
from videosparse.kernels.triton_common import strides_of
from videosparse.kernels.triton_order import load_steps, next_power, place_of

NO_ROTARY = tl.constexpr(0)
SHARED_ROTARY = tl.constexpr(1)
HEAD_ROTARY = tl.constexpr(2)


@triton.jit
def _tile(
    FIRST: tl.constexpr, PART: tl.constexpr, HEADS: tl.constexpr, stride_head, WIDTH: tl.constexpr, PAD: tl.constexpr,
    stride_column,
):  # fmt: skip
    """(offsets, mask) [PART, PAD] of heads FIRST.. of HEADS x WIDTH. The mask folds away where all of it is there."""
    head = FIRST + tl.arange(0, PART)
    column = tl.arange(0, PAD)
    mask = tl.full([PART, PAD], True, tl.int1)
    if FIRST + PART > HEADS:
        mask = mask & (head < HEADS)[:, None]
    if WIDTH < PAD:
        mask = mask & (column < WIDTH)[None, :]
    return head[:, None] * stride_head + column[None, :] * stride_column, mask


@triton.jit
def _load_part(
    ptr, present, FIRST: tl.constexpr, PART: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr,
    GAP: tl.constexpr,
):  # fmt: skip
    """Heads FIRST.. of a row as [PART, PAD] in their own dtype; zeros in a gap."""
    offsets, mask = _tile(FIRST, PART, HEADS, DIM, DIM, PAD, 1)
    if GAP:
        mask = mask & present
    return tl.load(ptr + offsets, mask=mask, other=0.0)


@triton.jit
def _sum_of_squares(x, ACROSS: tl.constexpr):
    """fp32, of all heads or of each as [PART, 1]."""
    x = x.to(tl.float32)
    if ACROSS:
        return tl.sum(x * x)
    else:
        return tl.sum(x * x, axis=1)[:, None]


@triton.jit
def _load_turns(
    cos_ptr, sin_ptr, stride_head, STRIDE_PAIR: tl.constexpr, FIRST: tl.constexpr, PART: tl.constexpr,
    HEADS: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """cos and sin of a token, fp32 [PART, PAD / 2]."""
    offsets, mask = _tile(FIRST, PART, HEADS, stride_head, DIM // 2, PAD // 2, STRIDE_PAIR)
    cos = tl.load(cos_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return cos, tl.load(sin_ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_part(
    x, mean_square, eps, out_ptr, place, weight_ptr, cos_ptr, sin_ptr, stride_rh, cos, sin, FIRST: tl.constexpr,
    PART: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr, ACROSS: tl.constexpr,
    ROTARY: tl.constexpr, STRIDE_PAIR: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """Norm, rotate, round and store heads FIRST.. of a row; with ORDER, `place` rows after `out_ptr` each."""
    offsets, mask = _tile(FIRST, PART, HEADS, DIM if ACROSS else 0, DIM, PAD, 1)
    weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    y = x.to(tl.float32) * tl.rsqrt(mean_square + eps) * weight
    if ROTARY != NO_ROTARY:
        if ROTARY == HEAD_ROTARY:
            cos, sin = _load_turns(cos_ptr, sin_ptr, stride_rh, STRIDE_PAIR, FIRST, PART, HEADS, DIM, PAD)
        even, odd = tl.split(tl.reshape(y, [PART, PAD // 2, 2]))
        y = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [PART, PAD])
    offsets, mask = _tile(FIRST, PART, HEADS, DIM, DIM, PAD, 1)
    if ORDER:
        offsets = place.to(tl.int64)[:, None] * (HEADS * DIM) + offsets
    tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _row(
    ptr, present, eps, out_ptr, order, weight_ptr, cos_ptr, sin_ptr, stride_rh, cos, sin, HEADS: tl.constexpr,
    DIM: tl.constexpr, PAD: tl.constexpr, PART: tl.constexpr, REST: tl.constexpr, ACROSS: tl.constexpr,
    ROTARY: tl.constexpr, STRIDE_PAIR: tl.constexpr, GAP: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """All heads of one token, of q or of k."""
    SIZE: tl.constexpr = HEADS * DIM if ACROSS else DIM
    x = _load_part(ptr, present, 0, PART, HEADS, DIM, PAD, GAP)
    place = 0
    rest_place = 0
    if REST > 0:
        rest = _load_part(ptr, present, PART, REST, HEADS, DIM, PAD, GAP)
    if ORDER:  # after the long loads, to be there when these are
        table_ptr, token, height, width = order
        place = place_of(token, load_steps(table_ptr, 0, PART, HEADS), height, width)
        if REST > 0:
            rest_place = place_of(token, load_steps(table_ptr, PART, REST, HEADS), height, width)
    total = _sum_of_squares(x, ACROSS)
    if REST > 0:
        rest_total = _sum_of_squares(rest, ACROSS)
        if ACROSS:
            total += rest_total
            rest_total = total
    _store_part(
        x, total / SIZE, eps, out_ptr, place, weight_ptr, cos_ptr, sin_ptr, stride_rh, cos, sin,
        0, PART, HEADS, DIM, PAD, ACROSS, ROTARY, STRIDE_PAIR, ORDER,
    )  # fmt: skip
    if REST > 0:
        _store_part(
            rest, rest_total / SIZE, eps, out_ptr, rest_place, weight_ptr, cos_ptr, sin_ptr, stride_rh, cos, sin,
            PART, REST, HEADS, DIM, PAD, ACROSS, ROTARY, STRIDE_PAIR, ORDER,
        )  # fmt: skip


# sizes change from call to call: specialising on them would compile again and again
@triton.jit(do_not_specialize=["count", "first", "start", "length", "height", "width"])
def norm_rotate_kernel(
    q_ptr,
    k_ptr,
    q_out_ptr,
    k_out_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    table_ptr,
    stride_qb: tl.int64,
    stride_qs: tl.int64,
    stride_kb: tl.int64,
    stride_ks: tl.int64,
    stride_rs: tl.int64,
    stride_rh: tl.int64,
    count,
    first,
    start,
    length,
    height,
    width,
    eps,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    PART: tl.constexpr,
    REST: tl.constexpr,
    ACROSS: tl.constexpr,
    ROTARY: tl.constexpr,
    STRIDE_PAIR: tl.constexpr,
    GAP: tl.constexpr,
    SPLIT: tl.constexpr,
    ORDER: tl.constexpr,
):
    """Positions [first, first + count) of every sample; with SPLIT, q and k of a token in programs of their own."""
    program = tl.program_id(0)
    piece = program // 2 if SPLIT else program
    position = (first + piece % count).to(tl.int64)
    sample = (piece // count).to(tl.int64)
    token = position - start
    present = token >= 0
    out = (sample * length + position) * (HEADS * DIM)
    order = (table_ptr, token.to(tl.int32), height, width)
    if ORDER:
        out = sample * length * (HEADS * DIM)
    cos = 1.0
    sin = 0.0
    if ROTARY != NO_ROTARY:
        cos_ptr += token * stride_rs
        sin_ptr += token * stride_rs
        if ROTARY == SHARED_ROTARY:
            cos, sin = _load_turns(cos_ptr, sin_ptr, 0, STRIDE_PAIR, 0, 1, 1, DIM, PAD)
    q_ptr += sample * stride_qb + token * stride_qs
    k_ptr += sample * stride_kb + token * stride_ks
    if SPLIT == 0 or program % 2 == 0:
        _row(
            q_ptr, present, eps, q_out_ptr + out, order, q_weight_ptr, cos_ptr, sin_ptr, stride_rh, cos, sin,
            HEADS, DIM, PAD, PART, REST, ACROSS, ROTARY, STRIDE_PAIR, GAP, ORDER,
        )  # fmt: skip
    if SPLIT == 0 or program % 2 == 1:
        _row(
            k_ptr, present, eps, k_out_ptr + out, order, k_weight_ptr, cos_ptr, sin_ptr, stride_rh, cos, sin,
            HEADS, DIM, PAD, PART, REST, ACROSS, ROTARY, STRIDE_PAIR, GAP, ORDER,
        )  # fmt: skip


WARP_ELEMENTS = 1280  # what one warp holds of a row: 40 numbers a thread


@dataclass(frozen=True)
class Work:
    """How one program works: heads of the two parts, warps, and whether q and k go to programs of their own."""

    part: int
    rest: int
    warps: int
    split: bool


def choose_work(heads: int, head_dim: int) -> Work:
    """Parts that hold all heads with as few idle lanes as two powers of two allow, and warps for them."""
    part = 1 << (heads.bit_length() - 1)
    rest = next_power(heads - part)
    warps = next_power(-(-(part + rest) * next_power(head_dim) // WARP_ELEMENTS))
    return Work(part, rest, min(8, warps), split=False)


def _launch(
    stream: Stream,
    out: Pair,
    positions: tuple[int, int],
    start: int,
    rotary: Pair | None,
    work: Work,
    order: Steps | None = None,
) -> None:
    """Fill positions [positions[0], positions[1]) of `out` [B, L, H, D] with tokens of a stream from `start` on."""
    q, k = stream.q, stream.k
    batch, length, heads, head_dim = out[0].shape
    count = positions[1] - positions[0]
    programs = batch * count * (2 if work.split else 1)
    if programs == 0:
        return
    cos, sin = rotary or (None, None)
    kind, stride_token, stride_head, stride_pair = NO_ROTARY, 0, 0, 1
    if cos is not None:
        stride_token, stride_head, stride_pair = cos.stride()
        kind, stride_head = (SHARED_ROTARY, 0) if cos.shape[1] == 1 else (HEAD_ROTARY, stride_head)
    norm_rotate_kernel[(programs,)](
        q,
        k,
        *out,
        stream.q_weight,
        stream.k_weight,
        cos,
        sin,
        None if order is None else order.table,
        *strides_of(q),
        *strides_of(k),
        stride_token,
        stride_head,
        count,
        positions[0],
        start,
        length,
        1 if order is None else order.height,
        1 if order is None else order.width,
        stream.eps,
        HEADS=heads,
        DIM=head_dim,
        PAD=next_power(max(2, head_dim)),
        PART=work.part,
        REST=work.rest,
        ACROSS=stream.q_weight.shape[0] != head_dim,
        ROTARY=kind.value,
        STRIDE_PAIR=stride_pair,  # known, for loads of 16 bytes
        GAP=positions[0] < start,
        SPLIT=work.split,
        ORDER=order is not None,
        num_warps=work.warps,
        enable_fp_fusion=True,
    )


def forward(
    video: Stream,
    text: Stream | None,
    rotary: Pair | None,
    heads: int,
    text_start: int,
    order: Steps | None = None,
    work: Work | None = None,
) -> Pair:
    """q and k [B, L, H, D], contiguous, of checked streams: video, zeros up to `text_start`, then text.

    Args:
        video, text, rotary, heads, text_start: as in `norm_rotate`.
        order: in which heads take the video tokens.
        work: how programs work; for benchmarks.
    """
    batch, tokens, width = video.q.shape
    length = tokens if text is None else text_start + text.q.shape[1]
    shape = (batch, length, heads, width // heads)
    q, k = (torch.empty(shape, dtype=video.q.dtype, device=video.q.device) for _ in range(2))
    if rotary is not None and rotary[0].stride() != rotary[1].stride():
        rotary = rotary[0].contiguous(), rotary[1].contiguous()
    work = choose_work(heads, width // heads) if work is None else work
    with gpu.on_device(q):
        _launch(video, (q, k), (0, tokens), 0, rotary, work, order)
        if text is not None:
            _launch(text, (q, k), (tokens, length), text_start, None, work)
    return q, k
