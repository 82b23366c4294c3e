# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Queries and keys as INT8, values as FP8 or INT8: one pass over each before integer attention. Imported on first use.

Shapes
    q, k, v       [B, L, H, D] by strides, contiguous along D, fp16 or bf16, D 64 or 128; offsets are 64-bit
    P             L rounded up to 128: blocks of 64 and 128 keys are whole
    q, k out      int8 [B, H, P, D], 0 where no token is
    q_scale       fp32 [B, H, P], one for each row, with the scale of the scores and log2(e) folded in
    k_scale       fp32 [B, H, P / 64, 32], one for each 64 keys, written 32 times: the least that Hopper's copies move
    v out         fp8 e4m3 or int8 [B, H, D, P], keys along the last dimension, 0 where no token is
    v_scale       fp32, one for each channel: of fp8 [B, H, D], of int8 [B, H, P / 64, D], for each 64 keys
A score is q . k x q_scale x k_scale, base 2. Scales are positive.

Keys are smoothed first: their mean over the tokens of a sample and head is subtracted (SageAttention, arXiv
2410.02367). That takes the same number q . mean from all scores of a row, so the softmax stays, and what the key
channels have in common, which is much, need not fit into eight bits. Differs from the paper in the scale of queries,
one for each row, which costs nothing here, and, from `_MANY_TOKENS` on, in the mean, which is that of every eighth
key: to subtract any vector changes no output, and the second reading of all keys would be for nothing. A NaN among the
tokens makes its scale infinite, and the output NaN.

Scales of INT8 values are for 64 keys since eight bits have no exponent: with one for all keys, a few large tokens take
the bits of all others (4.0 % relative error where 1 of 97 tokens is 50 times as large, against 2.3 %).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from videosparse.kernels.call import LOG2_E, AttentionCall
from videosparse.kernels.triton_common import is_token, load_rows, strides_of
from videosparse.layout import ceil_div

LN_2 = tl.constexpr(0.6931471805599453)
KEY_ORDER = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)
"""Which of 16 keys a place of turned values holds, for the Hopper kernel: `hopper_int8_softmax._pack` says why."""

PAD = 128
SCALED_KEYS = 64
COPIES = 32
SMALLEST = tl.constexpr(1e-12)  # rows and blocks below count as 0, so that products of two scales stay normal
FP8_MAX = tl.constexpr(448.0)
GOLDEN = tl.constexpr(40503)  # 2^16 times the golden ratio
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves the nearest integer in the last bits
_FEW, _MANY = (128, 128), (512, 64)  # tokens whose statistics one program gathers, and keys of these in the mean
_MANY_TOKENS = 16384  # tokens of a call from which on it is `_MANY`


@dataclass(frozen=True, eq=False)
class Quantized:
    """What integer attention reads; shapes as above.

    Args:
        v: fp8 or int8 turned values, or the values as they came.
        v_scale: of such values, else None.
        lse: fp32 [B, H, L]: q . mean x scale, which smoothing took from the lse of each row; empty unless asked for.
    """

    q: torch.Tensor
    q_scale: torch.Tensor
    k: torch.Tensor
    k_scale: torch.Tensor
    v: torch.Tensor
    v_scale: torch.Tensor | None
    lse: torch.Tensor


@triton.jit
def _magnitude(x):
    """|x|, infinite for NaN, which a maximum would pass over."""
    return tl.where(x != x, float("inf"), tl.abs(x))


@triton.jit
def _to_int8(x, peak):
    """(x as integers of -127..127, their scale) for |x| <= peak."""
    scale = tl.where(peak < SMALLEST, 1.0, peak / 127.0)
    near = x * (1.0 / scale) + ROUND
    return near.to(tl.int32, bitcast=True).to(tl.int8), scale


PLAIN = ["lens_ptr", "length", "video", "text_start"]


@triton.jit
def _first_sampled(chunk, ROWS: tl.constexpr, PART: tl.constexpr):
    """Where the keys of a chunk that count in the mean begin: elsewhere in each, by multiples of the golden ratio, so
    that no size of frames makes them the same tokens of all."""
    return chunk * ROWS + ((chunk * GOLDEN & 0xFFFF) * (ROWS // PART) >> 16) * PART


@triton.jit(do_not_specialize=PLAIN)
def statistics_kernel(
    k_ptr,
    v_ptr,
    sum_ptr,
    peak_ptr,
    lens_ptr,
    stride_kb: tl.int64,
    stride_kl: tl.int64,
    stride_kh: tl.int64,
    stride_vb: tl.int64,
    stride_vl: tl.int64,
    stride_vh: tl.int64,
    length,
    video,
    text_start,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    PART: tl.constexpr,
    HAS_LENS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Of a chunk of ROWS tokens, the sum of PART keys, and the largest values of all; both [B, H, chunks, D]."""
    head, chunk, sample = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    end = length
    if HAS_LENS:
        end = tl.minimum(tl.load(lens_ptr + sample), length)
    place = ((sample * tl.num_programs(0) + head) * tl.num_programs(1) + chunk) * HEAD_DIM + tl.arange(0, HEAD_DIM)
    position = _first_sampled(chunk, ROWS, PART) + tl.arange(0, PART)
    token = is_token(position, video, text_start, end)
    k_base = k_ptr + sample * stride_kb + head * stride_kh
    keys = load_rows(k_base, position, stride_kl, token, HEAD_DIM, HEAD_DIM).to(tl.float32)
    if VALUES:
        position = chunk * ROWS + tl.arange(0, ROWS)
        token = is_token(position, video, text_start, end)
        v_base = v_ptr + sample * stride_vb + head * stride_vh
        values = load_rows(v_base, position, stride_vl, token, HEAD_DIM, HEAD_DIM).to(tl.float32)
        tl.store(peak_ptr + place, tl.max(_magnitude(values), 0))
    tl.store(sum_ptr + place, tl.sum(keys, 0))


@triton.jit(do_not_specialize=[*PLAIN, "chunks"])
def totals_kernel(
    sum_ptr,
    peak_ptr,
    mean_ptr,
    v_scale_ptr,
    lens_ptr,
    length,
    video,
    text_start,
    chunks,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    PART: tl.constexpr,
    DIMS: tl.constexpr,
    TILE: tl.constexpr,
    HAS_LENS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """The mean of keys and the scale of values of some channels of a head, from what `statistics_kernel` wrote."""
    part, head, sample = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    end = length
    if HAS_LENS:
        end = tl.minimum(tl.load(lens_ptr + sample), length)
    dims = part * DIMS + tl.arange(0, DIMS)
    line = sample * tl.num_programs(1) + head
    total = tl.zeros([TILE, DIMS], tl.float32)
    peak = tl.zeros([TILE, DIMS], tl.float32)
    tokens = tl.zeros([TILE], tl.int32)
    for start in range(0, chunks, TILE):
        chunk = start + tl.arange(0, TILE)
        there = (chunk < chunks)[:, None]
        place = (line * chunks + chunk)[:, None] * HEAD_DIM + dims[None, :]
        total += tl.load(sum_ptr + place, mask=there, other=0.0)
        if VALUES:
            peak = tl.maximum(peak, tl.load(peak_ptr + place, mask=there, other=0.0))
        first = _first_sampled(chunk, ROWS, PART)
        of_video = tl.minimum(first + PART, video) - first
        of_text = tl.minimum(first + PART, end) - tl.maximum(first, text_start)
        tokens += tl.maximum(of_video, 0) + tl.maximum(of_text, 0)
    tl.store(mean_ptr + line * HEAD_DIM + dims, tl.sum(total, 0) / tl.sum(tokens, 0))
    if VALUES:
        tl.store(v_scale_ptr + line * HEAD_DIM + dims, tl.max(peak, 0) / FP8_MAX)


@triton.jit(do_not_specialize=PLAIN)
def queries_kernel(
    q_ptr,
    mean_ptr,
    out_ptr,
    scale_ptr,
    lse_ptr,
    lens_ptr,
    stride_qb: tl.int64,
    stride_ql: tl.int64,
    stride_qh: tl.int64,
    length,
    video,
    text_start,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_LENS: tl.constexpr,
    NEED_LSE: tl.constexpr,
):
    """ROWS queries of one head: each row by its own scale."""
    head, tile, sample = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads, padded = tl.num_programs(0), tl.num_programs(1) * ROWS
    end = length
    if HAS_LENS:
        end = tl.minimum(tl.load(lens_ptr + sample), length)
    position = tile * ROWS + tl.arange(0, ROWS)
    token = is_token(position, video, text_start, end)
    dims = tl.arange(0, HEAD_DIM)
    base = q_ptr + sample * stride_qb + head * stride_qh
    x = load_rows(base, position, stride_ql, token, HEAD_DIM, HEAD_DIM).to(tl.float32) * scale_log2
    ints, scale = _to_int8(x, tl.max(_magnitude(x), 1)[:, None])
    row = (sample * heads + head) * padded + position
    tl.store(out_ptr + row[:, None] * HEAD_DIM + dims[None, :], ints)
    tl.store(scale_ptr + row[:, None], scale)
    if NEED_LSE:
        mean = tl.load(mean_ptr + (sample * heads + head) * HEAD_DIM + dims)
        lost = tl.sum(x * mean[None, :], 1) * LN_2
        tl.store(lse_ptr + (sample * heads + head) * length + position, lost, mask=position < length)


@triton.jit(do_not_specialize=PLAIN)
def keys_kernel(
    k_ptr,
    mean_ptr,
    out_ptr,
    scale_ptr,
    lens_ptr,
    stride_kb: tl.int64,
    stride_kl: tl.int64,
    stride_kh: tl.int64,
    length,
    video,
    text_start,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COPIES: tl.constexpr,
    HAS_LENS: tl.constexpr,
):
    """ROWS keys of one head, less their mean, by one scale."""
    head, tile, sample = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads, padded = tl.num_programs(0), tl.num_programs(1) * ROWS
    end = length
    if HAS_LENS:
        end = tl.minimum(tl.load(lens_ptr + sample), length)
    position = tile * ROWS + tl.arange(0, ROWS)
    token = is_token(position, video, text_start, end)
    dims = tl.arange(0, HEAD_DIM)
    base = k_ptr + sample * stride_kb + head * stride_kh
    x = load_rows(base, position, stride_kl, token, HEAD_DIM, HEAD_DIM).to(tl.float32)
    mean = tl.load(mean_ptr + (sample * heads + head) * HEAD_DIM + dims)
    x = tl.where(token[:, None], x - mean[None, :], 0.0)
    ints, scale = _to_int8(x, tl.max(tl.max(_magnitude(x), 1), 0))
    row = (sample * heads + head) * padded + position
    tl.store(out_ptr + row[:, None] * HEAD_DIM + dims[None, :], ints)
    block = (sample * heads + head) * tl.num_programs(1) + tile
    tl.store(scale_ptr + block * COPIES + tl.arange(0, COPIES), tl.zeros([COPIES], tl.float32) + scale)


@triton.jit(do_not_specialize=PLAIN)
def values_kernel(
    v_ptr,
    v_scale_ptr,
    out_ptr,
    lens_ptr,
    stride_vb: tl.int64,
    stride_vl: tl.int64,
    stride_vh: tl.int64,
    length,
    video,
    text_start,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_LENS: tl.constexpr,
    REORDER: tl.constexpr,
    INT8: tl.constexpr,
):
    """ROWS values of one head, turned: as fp8, with REORDER in `KEY_ORDER` within every 16; or int8, by own scales."""
    head, tile, sample = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads, padded = tl.num_programs(0), tl.num_programs(1) * ROWS
    end = length
    if HAS_LENS:
        end = tl.minimum(tl.load(lens_ptr + sample), length)
    place = tl.arange(0, ROWS)
    source = place
    if REORDER:
        source = (place & ~15) + (place & 2) * 4 + (place & 12) // 2 + (place & 1)
    position = tile * ROWS + source
    token = is_token(position, video, text_start, end)
    dims = tl.arange(0, HEAD_DIM)
    base = v_ptr + sample * stride_vb + head * stride_vh
    x = load_rows(base, position, stride_vl, token, HEAD_DIM, HEAD_DIM).to(tl.float32)
    if INT8:
        x, scale = _to_int8(x, tl.max(_magnitude(x), 0)[None, :])
        block = (sample * heads + head) * tl.num_programs(1) + tile
        tl.store(v_scale_ptr + block * HEAD_DIM + dims[None, :], scale)
    else:
        scale = tl.load(v_scale_ptr + (sample * heads + head) * HEAD_DIM + dims)
        x = x * (1.0 / tl.where(scale == 0.0, 1.0, scale))[None, :]
    x = tl.trans(x.to(out_ptr.dtype.element_ty))
    column = ((sample * heads + head) * HEAD_DIM + dims) * padded
    tl.store(out_ptr + column[:, None] + (tile * ROWS + place)[None, :], x)


def padded_length(length: int) -> int:
    """Rows of the quantized tensors."""
    return ceil_div(length, PAD) * PAD


def chunk_of(length: int) -> tuple[int, int]:
    """(tokens of a chunk, keys of it that count in the mean which all keys lose).

    On an H200, at 75,600 tokens x 40 heads, the mean takes 0.07 ms by 64 keys of every 512 tokens, 0.13 by 32 of every
    256, 0.22 by all. To launch all kernels for a few heads at a time, so that what is read again comes from L2, is no
    way to save it: a head's 19 MB of keys are too little for a launch and too much for L2 beside what else passes
    (mean and rounding of keys 1.17 ms for three heads at a time, 0.56 for all).
    """
    return _MANY if length >= _MANY_TOKENS else _FEW


def quantize(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    call: AttentionCall,
    need_lse: bool,
    values: str | None,
    reorder: bool,
) -> Quantized:
    """Quantize checked tensors [B, L, H, D] of the current device, L > 0.

    Args:
        q, k, v: fp16 or bf16.
        call: geometry and scale of the attention.
        need_lse: also give what smoothing took from each row's lse.
        values: what to round values to, "fp8" or "int8"; None leaves them.
        reorder: put fp8 values in `KEY_ORDER`.
    """
    batch, length, heads, dim = q.shape
    padded = padded_length(length)
    chunk, part = chunk_of(length)
    chunks, tiles = ceil_div(length, chunk), padded // SCALED_KEYS
    fp8 = values == "fp8"
    geometry = (length, call.video, call.text_start)
    lens, has_lens = call.seq_lens, call.seq_lens is not None

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    sums, mean = make(batch, heads, chunks, dim), make(batch, heads, dim)
    peaks = make(batch, heads, chunks, dim) if fp8 else None
    v_scale = make(batch, heads, dim) if fp8 else None
    statistics_kernel[(heads, chunks, batch)](
        k, v, sums, peaks, lens, *strides_of(k), *strides_of(v), *geometry,
        HEAD_DIM=dim, ROWS=chunk, PART=part, HAS_LENS=has_lens, VALUES=fp8,
        num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
    totals_kernel[(dim // 32, heads, batch)](
        sums, peaks, mean, v_scale, lens, *geometry, chunks,
        HEAD_DIM=dim, ROWS=chunk, PART=part, DIMS=32, TILE=128, HAS_LENS=has_lens, VALUES=fp8,
        enable_fp_fusion=True,
    )  # fmt: skip
    k8, k_scale = make(batch, heads, padded, dim, dtype=torch.int8), make(batch, heads, tiles, COPIES)
    keys_kernel[(heads, tiles, batch)](
        k, mean, k8, k_scale, lens, *strides_of(k), *geometry,
        HEAD_DIM=dim, ROWS=SCALED_KEYS, COPIES=COPIES, HAS_LENS=has_lens, enable_fp_fusion=True,
    )  # fmt: skip
    q8, q_scale = make(batch, heads, padded, dim, dtype=torch.int8), make(batch, heads, padded)
    lse = make(batch, heads, length) if need_lse else make(0)
    queries_kernel[(heads, tiles, batch)](
        q, mean, q8, q_scale, lse, lens, *strides_of(q), *geometry, call.scale * LOG2_E,
        HEAD_DIM=dim, ROWS=SCALED_KEYS, HAS_LENS=has_lens, NEED_LSE=need_lse, enable_fp_fusion=True,
    )  # fmt: skip
    if values is None:
        return Quantized(q8, q_scale, k8, k_scale, v, None, lse)
    if v_scale is None:
        v_scale = make(batch, heads, tiles, dim)
    v8 = make(batch, heads, dim, padded, dtype=torch.float8_e4m3fn if fp8 else torch.int8)
    rows = PAD if fp8 else SCALED_KEYS
    values_kernel[(heads, padded // rows, batch)](
        v, v_scale, v8, lens, *strides_of(v), *geometry,
        HEAD_DIM=dim, ROWS=rows, HAS_LENS=has_lens, REORDER=reorder, INT8=not fp8, enable_fp_fusion=True,
    )  # fmt: skip
    return Quantized(q8, q_scale, k8, k_scale, v8, v_scale, lse)
