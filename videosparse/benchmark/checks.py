"""Error checks before a timing: on some rows of two heads, or on the gradients of one head, against fp64."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from videosparse.benchmark.contenders import in_key_order
from videosparse.benchmark.problems import Problem
from videosparse.blocks import BlockMap
from videosparse.kernels import attend
from videosparse.kernels.accuracy import allowed_error, attend_rows, measure, worst_row
from videosparse.kernels.call import LOG2_E, wide

if TYPE_CHECKING:
    from videosparse.kernels.quantize import Quantized


def picked_rows(length: int, device: torch.device) -> torch.Tensor:
    """Query positions that are checked: a run at each end and some between."""
    ends = torch.arange(64, device=device)
    return torch.cat([ends, length - 1 - ends, torch.randint(length, (64,), device=device)])


def of_heads(p: Problem, heads: list[int]) -> tuple[list[torch.Tensor], BlockMap | None]:
    """q, k, v and the map of some heads."""
    tensors = [x.detach()[:, :, heads] for x in p.qkv]
    if p.block_map is None or p.block_map.keep.shape[1] == 1:
        return tensors, p.block_map
    return tensors, replace(p.block_map, keep=p.block_map.keep[:, heads])


def check_forward(p: Problem, out: torch.Tensor) -> tuple[float, float]:
    """(error, allowed) of some rows of two heads of an output."""
    heads = [0, p.q.shape[2] - 1]
    tensors, block_map = of_heads(p, heads)
    rows = picked_rows(p.layout.length, p.q.device)
    found = measure(out.detach()[:, :, heads], None, *tensors, layout=p.layout, block_map=block_map, rows=rows)
    return found.error if found.empty_rows else float("nan"), found.allowed


INTEGER_ERRORS = {"int8": 0.03, "int8-fp8": 0.05, "int8-int8": 0.03}
"""Largest relative errors of integer attention in the mean square, for normally distributed q, k and v: nothing is
common to such values, so that rounding them shows most. FP8 e4m3 alone rounds values and weights by 2.5 % each."""

LEAST_COSINE = 0.999


def check_integers(p: Problem, out: torch.Tensor) -> tuple[float, float]:
    """(relative error in the mean square, allowed) of some rows of two heads; NaN where the direction is off."""
    heads = [0, p.q.shape[2] - 1]
    (q, k, v), block_map = of_heads(p, heads)
    rows = picked_rows(p.layout.length, p.q.device)
    truth, _ = attend_rows(q.double(), k.double(), v.double(), rows, layout=p.layout, block_map=block_map)
    found = out.detach()[:, rows][:, :, heads].double()
    cosine = torch.nn.functional.cosine_similarity(found.flatten(), truth.flatten(), 0)
    error = float((found - truth).norm() / truth.norm())
    return error if cosine >= LEAST_COSINE else float("nan"), INTEGER_ERRORS[p.entry.kernel]


ROUNDING_ERRORS = {"queries": 0.01, "keys": 0.012, "values": 0.03}
"""Largest relative errors of rounded tensors in the mean square, for normally distributed ones: of INT8 with a scale
for each row and for each 64 rows, and of FP8 e4m3."""


def check_quantize(p: Problem, found: Quantized) -> tuple[float, float]:
    """(relative error in the mean square, allowed) of queries, keys or values, whichever is nearest to its bound.

    Of some rows of two heads. Keys may lack any vector that is the same for all of them: smoothing takes one away.
    """
    from videosparse.kernels.quantize import KEY_ORDER, SCALED_KEYS

    heads, rows = [0, p.q.shape[2] - 1], picked_rows(p.layout.length, p.q.device)
    true = {name: x[:, rows][:, :, heads].double() for name, x in zip(ROUNDING_ERRORS, p.qkv, strict=True)}

    def back(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Rows [1, rows, heads, D] of integers and scales [1, heads, rows, ...]."""
        return (x.double() * scale.double()).transpose(1, 2)

    given = {
        "queries": back(found.q[:, heads][:, :, rows], found.q_scale[:, heads][:, :, rows, None])
        / (p.call.scale * LOG2_E),
        "keys": back(found.k[:, heads][:, :, rows], found.k_scale[:, heads][:, :, rows // SCALED_KEYS, :1]),
    }
    given["keys"] += (true["keys"] - given["keys"]).mean(1, keepdim=True)
    if found.v_scale is not None:
        order = torch.tensor(KEY_ORDER, device=rows.device).argsort() if in_key_order(p) else torch.arange(16)
        places = rows // 16 * 16 + order.to(rows.device)[rows % 16]
        bits = found.v.view(torch.uint8)[:, heads][..., places]  # few operations take fp8
        given["values"] = back(bits.view(found.v.dtype).mT, found.v_scale[:, heads, None])
    errors = [(float((x - true[n]).norm() / true[n].norm()), ROUNDING_ERRORS[n]) for n, x in given.items()]
    bad = [pair for pair in errors if not pair[0] <= pair[1]]
    return bad[0] if bad else max(errors, key=lambda pair: pair[0] / pair[1])


def check_sums(p: Problem, sums: torch.Tensor) -> tuple[float, float]:
    """(error, allowed) of some block rows of two heads, in query tokens; plain torch computes in fp32."""
    rows = torch.arange(sums.shape[2], device=sums.device)[:: max(1, sums.shape[2] // 6)]
    position = (rows[:, None] * p.entry.block[0] + torch.arange(p.entry.block[0], device=sums.device)).flatten()
    real = position < p.layout.length
    q, k, _ = of_heads(p, [0, p.q.shape[2] - 1])[0]
    _, lse = attend(*p.qkv, layout=p.layout, return_lse=True)
    level = lse[:, [0, -1]][:, :, position[real]]

    def expected(dtype: torch.dtype) -> torch.Tensor:
        scores = torch.einsum("blhd,bmhd->bhlm", q[:, position[real]].to(dtype), k.to(dtype)) * p.q.shape[3] ** -0.5
        mass = torch.exp(scores - level.to(dtype)[..., None])
        mass = torch.nn.functional.pad(mass, (0, sums.shape[3] * p.entry.block[1] - p.layout.length))
        whole = mass.new_zeros(*mass.shape[:2], position.numel(), mass.shape[3])
        whole[:, :, real] = mass
        shape = (*whole.shape[:2], rows.numel(), p.entry.block[0], sums.shape[3], p.entry.block[1])
        return whole.view(shape).sum((3, 5))

    truth, found = expected(torch.float64), sums[:, [0, -1]][:, :, rows]
    return worst_row(found, truth), allowed_error(truth, expected(torch.float32))


def gradients_of(
    tensors: list[torch.Tensor], grad: torch.Tensor, p: Problem, block_map: BlockMap | None, step: int = 1024
) -> list[torch.Tensor]:
    """Gradients of plain attention of one head, a strip of rows at a time, in the precision of `tensors`."""
    q, k, v = (x.detach().requires_grad_() for x in tensors)
    sums = [torch.zeros(x.shape, dtype=wide(q.dtype), device=x.device) for x in (q, k, v)]
    for start in range(0, q.shape[1], step):
        rows = torch.arange(start, min(start + step, q.shape[1]), device=q.device)
        out, _ = attend_rows(q, k, v, rows, layout=p.layout, block_map=block_map)
        for total, part in zip(sums, torch.autograd.grad(out, (q, k, v), grad[:, rows].to(out.dtype)), strict=True):
            total += part
    return [total.to(q.dtype) for total in sums]


def check_backward(p: Problem, grads: tuple[torch.Tensor, ...], grad_out: torch.Tensor) -> tuple[float, float]:
    """(error, allowed) of dq, dk or dv of the last head, whichever is nearest to its bound."""
    head = [p.q.shape[2] - 1]
    tensors, block_map = of_heads(p, head)
    grad = grad_out[:, :, head]
    truth = gradients_of([x.double() for x in tensors], grad, p, block_map)
    plain = gradients_of(tensors, grad, p, block_map)
    pairs = [
        (worst_row(found[:, :, head], t), allowed_error(t, e)) for found, t, e in zip(grads, truth, plain, strict=True)
    ]
    bad = [pair for pair in pairs if not pair[0] <= pair[1]]
    return bad[0] if bad else max(pairs, key=lambda pair: pair[0] / pair[1])
