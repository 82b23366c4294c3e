"""What the tests of integer attention share: the quantization pass in plain torch, and how far outputs may be off."""

import torch

from videosparse.kernels import quantize as module
from videosparse.kernels import torch_int8
from videosparse.kernels.accuracy import attend_rows
from videosparse.kernels.call import LOG2_E
from videosparse.kernels.quantize import COPIES, KEY_ORDER, SCALED_KEYS, Quantized, padded_length

QUANTS = ["int8", "int8-fp8", "int8-int8"]
LIMITS = {"int8": 0.03, "int8-fp8": 0.05, "int8-int8": 0.03}
"""Largest relative error in the mean square. FP8 e4m3 rounds by 2.5 %, values and weights alike, and INT8 scores add
1 %: where nothing is common to the values, as here, that is 3.7 % of the output."""


def integers(x, dims):
    """x as int8 of a scale for `dims`, as the kernels round."""
    peak = x.abs().amax(dims, keepdim=True)
    scale = torch.where(peak < 1e-12, 1.0, peak / 127)
    return (x / scale).round().to(torch.int8), scale


def counted(length):
    """Bool [length]: which keys count in the mean that all of them lose."""
    chunk, part = module.chunk_of(length)
    position = torch.arange(length)
    first = (position // chunk * 40503 % 2**16 * (chunk // part) // 2**16) * part
    return (position % chunk >= first) & (position % chunk < first + part)


def quantize(q, k, v, call, need_lse, kind, reorder):
    """`quantize.quantize` on the CPU."""
    length = q.shape[1]
    padded = padded_length(length)
    token = torch_int8.is_token(q, call)[:, :, None, None]
    queries, keys, values = (x.float().masked_fill(~token, 0) for x in (q, k, v))
    used = token & counted(length)[:, None, None]
    mean = keys.masked_fill(~used, 0).sum(1, keepdim=True) / used.sum(1, keepdim=True)
    centred = (keys - mean).masked_fill(~token, 0)
    lse = (queries * mean).sum(3).transpose(1, 2) * call.scale if need_lse else torch.zeros(0)

    def by_head(x):
        return torch.nn.functional.pad(x.transpose(1, 2), (0, 0, 0, padded - length))

    q8, q_scale = integers(by_head(queries) * (call.scale * LOG2_E), (3,))
    blocks = by_head(centred).unflatten(2, (padded // SCALED_KEYS, SCALED_KEYS))
    k8, k_scale = integers(blocks, (3, 4))
    k_scale = k_scale[..., 0, 0, None].expand(-1, -1, -1, COPIES).contiguous()
    if kind is None:
        return Quantized(q8, q_scale[..., 0].contiguous(), k8.flatten(2, 3), k_scale, v, None, lse.contiguous())
    if kind == "int8":
        v8, v_scale = integers(by_head(values).unflatten(2, (padded // SCALED_KEYS, SCALED_KEYS)), (3,))
        v8, v_scale = v8.flatten(2, 3).transpose(2, 3).contiguous(), v_scale[:, :, :, 0].contiguous()
        return Quantized(q8, q_scale[..., 0].contiguous(), k8.flatten(2, 3), k_scale, v8, v_scale, lse.contiguous())
    v_scale = values.abs().amax(1) / 448
    turned = (by_head(values) / torch.where(v_scale == 0, 1.0, v_scale)[:, :, None]).transpose(2, 3)
    if reorder:
        turned = turned.unflatten(3, (padded // 16, 16))[..., list(KEY_ORDER)].flatten(3)
    v8 = turned.contiguous().to(torch.float8_e4m3fn)
    return Quantized(q8, q_scale[..., 0].contiguous(), k8.flatten(2, 3), k_scale, v8, v_scale, lse.contiguous())


def check(out, lse, q, k, v, quant, *, layout, block_map=None, scale=None, limit=None, lse_limit=0.05):
    """Assert that an output is as near to fp64 as integers allow, and its empty rows right."""
    rows = torch.arange(layout.length, device=q.device)
    clean = [x.nan_to_num(0).double() for x in (q, k, v)]
    true, true_lse = attend_rows(*clean, rows, layout=layout, block_map=block_map, scale=scale)
    read = true_lse > -torch.inf
    own = out[read.transpose(1, 2)].double()
    true = true[read.transpose(1, 2)]
    assert (out[~read.transpose(1, 2)] == 0).all()
    if lse is not None:
        assert torch.equal(lse > -torch.inf, read)
    if not read.any():  # a random map may keep nothing for the few rows there are
        return
    assert (own - true).norm() <= (limit or LIMITS[quant]) * true.norm()
    assert torch.nn.functional.cosine_similarity(own.flatten(), true.flatten(), 0) >= 0.999
    if lse is not None:
        assert (lse[read] - true_lse[read]).abs().max() <= lse_limit


def lse_limit(q, k):
    """How far the lse may be off where one key has nearly all the weight of a row, for the default scale.

    Rounding queries to 127 steps of their row, and keys to as many of their 64, shifts a score by 1.2 % of the product
    of both norms over the root of head_dim, in the root mean square; this is four times as much.
    """
    largest = [x.nan_to_num(0).double().norm(dim=-1).max() for x in (q, k)]
    return 0.048 * float(largest[0] * largest[1]) / q.shape[-1]


def biased(k, share=0.1, size=20.0):
    """Keys with large biases in some channels, as those of real models have."""
    bias = torch.randn(k.shape[2:], device=k.device)
    return k + (bias * torch.where(torch.rand_like(bias) < share, size, 0.5)).to(k.dtype)


def growing(k, most=8.0, least=0.5):
    """Keys whose scores grow towards the start, where the Hopper kernel ends: so do maxima, by much and unevenly."""
    size = torch.linspace(most, least, k.shape[1], device=k.device)
    return (k * size[:, None, None]).to(k.dtype)
