"""Inputs of the kernel tests: layouts, maps, and tensors whose invalid tokens hold NaN."""

import math
from dataclasses import replace

import torch

from videosparse.blocks import BlockIndex, BlockMap
from videosparse.kernels import KernelOptions
from videosparse.kernels.accuracy import allowed_error, measure, worst_row
from videosparse.layout import TokenLayout, VideoGrid, ceil_div
from videosparse.reference import changed

TORCH = KernelOptions(backend="torch")
TRITON = KernelOptions(backend="triton")
BLOCKS = [(128, 128), (128, 64), (64, 64), (64, 128)]
MAP_SHARES = ["shared", "per head", "per sample", "per sample and head"]
OTHER_CALLS = [
    (1, 16, 0.1, "shared", 1, 1),
    (4, 32, 0.9, "per head", 1, 4),
    (5, 13, 0.5, "per sample", 3, 2),
    (16, 60, 0.2, "shared", 1, 12),
]
"""Frames and height of a video, density and sharing of its map, samples, heads: none may compile after a first call."""


GRID = VideoGrid(3, 9, 10)  # 270 tokens: no block size divides them


def make_layout(kind: str, device="cpu", grid=GRID) -> TokenLayout:
    """A layout for two samples; the kinds are `LAYOUTS`."""
    if kind == "video":
        return TokenLayout(grid)
    lens = {"text": None, "ragged text": [7, 40], "no text in one": [0, 33], "no text at all": [0, 0]}[kind]
    if lens is not None:
        lens = torch.tensor(lens, dtype=torch.int32, device=device) + grid.tokens
    return TokenLayout(grid, 40, seq_lens=lens)


LAYOUTS = ["video", "text", "ragged text", "no text in one", "no text at all"]


def make_map(layout, block, share="shared", samples=2, heads=3, density=0.5, device="cpu") -> BlockMap:
    """A random map whose second block row is empty and whose last is full."""
    keep = torch.rand(
        samples if "sample" in share else 1,
        heads if "head" in share else 1,
        ceil_div(layout.length, block[0]),
        ceil_div(layout.length, block[1]),
        device=device,
    )
    keep = keep < density
    keep[:, :, 1] = False
    keep[:, :, -1] = True
    return BlockMap(keep, block, layout.length, layout.length)


def both_ids(block_map, monkeypatch) -> list[BlockIndex]:
    """The lists of a map with int32 ids as if it had many blocks, with int16 ids, and with such that start amid a word.

    Key-major lists are made with each.
    """
    with monkeypatch.context() as patch:
        patch.setattr("videosparse.blocks.SHORT_IDS", 0)
        long = block_map.index()
        long.prepare_backward()
    short = block_map.index()
    amid = replace(short, ids=torch.cat([short.ids.new_zeros(1), short.ids])[1:])
    for index in (short, amid):
        index.prepare_backward()
    found = [(x.ids.dtype, x.key_major.ids.dtype, x.ids.data_ptr() % 4) for x in (long, short, amid)]
    assert found == [(torch.int32,) * 2 + (0,), (torch.int16,) * 2 + (0,), (torch.int16,) * 2 + (2,)]
    return [long, short, amid]


def assert_same_of_both_ids(call, block_map, monkeypatch):
    """`call(index)`, a tensor or several, is bitwise the same whatever the ids of the lists are."""
    first, *others = (call(index) for index in both_ids(block_map, monkeypatch))
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0, equal_nan=True)


def poison(x, layout):
    """Put NaN where no valid token is."""
    return x.masked_fill(~layout.key_mask(x.shape[0], x.device)[:, :, None, None], float("nan"))


def make_qkv(layout, dtype, *, batch=2, heads=3, dim=64, device="cpu", view="contiguous"):
    """q, k, v [B, L, H, D], NaN in the gap and in padding.

    view: "contiguous", "fused" (three slices of one projection) or "head-major" ([B, H, L, D] transposed).
    """
    if view == "head-major":
        return [
            poison(torch.randn(batch, layout.length, heads, dim, device=device), layout)
            .to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
            for _ in range(3)
        ]  # fmt: skip
    fused = torch.randn(batch, layout.length, 3, heads, dim, device=device)
    fused = poison(fused.flatten(2, 3), layout).to(dtype).unflatten(2, (3, heads))
    return [x.contiguous() if view == "contiguous" else x for x in fused.unbind(2)]


def assert_accurate(out, lse, q, k, v, **kwargs):
    found = measure(out, lse, q, k, v, **kwargs)
    assert found.ok, found


class PoisonedEmpty:
    """A stand-in for torch.empty that fills floats with NaN, so that an unwritten element shows."""

    def __init__(self):
        self.calls = 0
        self.empty = torch.empty

    def __call__(self, *size, **kwargs):
        self.calls += 1
        x = self.empty(*size, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x


def expected_sums(q, k, lse, layout, block, dtype, scale=None, base=math.e, logit=None):
    """Block sums of probabilities [B, H, L, L] in a given precision, with exponentials of a given base."""
    valid = layout.key_mask(q.shape[0], q.device)
    q, k = (x.masked_fill(~valid[:, :, None, None], 0) for x in (q, k))
    scores = products(q, k, dtype) * ((q.shape[3] ** -0.5 if scale is None else scale) / math.log(base))
    scores = changed(scores, torch.arange(layout.length, device=q.device), layout, logit)
    level = lse.to(dtype).masked_fill(lse == -torch.inf, torch.inf) / math.log(base)
    p = torch.exp2(scores - level[..., None]) if base == 2 else torch.exp(scores - level[..., None])
    p = p.masked_fill(~valid[:, None, None, :], 0).masked_fill(~valid[:, None, :, None], 0)
    rows, cols = (ceil_div(layout.length, b) for b in block)
    p = torch.nn.functional.pad(p, (0, cols * block[1] - layout.length, 0, rows * block[0] - layout.length))
    return p.unflatten(3, (cols, block[1])).unflatten(2, (rows, block[0])).sum((3, 5))


def products(q, k, dtype):
    """q k^T [B, H, L, L] in a given precision, by the unit that a kernel would use.

    16-bit factors are multiplied exactly, but tensor cores cut off where they add up, which fp32 units round: products
    of 16-bit inputs that are wanted in fp32 on a GPU are theirs.
    """
    if dtype == torch.float32 and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        left, right = (x.transpose(1, 2).flatten(0, 1) for x in (q, k))
        return torch.bmm(left, right.mT, out_dtype=dtype).unflatten(0, (q.shape[0], -1))
    return torch.einsum("blhd,bmhd->bhlm", q.to(dtype), k.to(dtype))


def assert_sums_accurate(found, q, k, lse, layout, block, scale=None, logit=None, factor=1.0):
    """At most twice as far from fp64 as plain torch in fp32, asked in several orders and bases as `measure` does."""
    truth = expected_sums(q, k, lse, layout, block, torch.float64, scale, logit=logit) * factor
    orders = [torch.randperm(q.shape[3], device=q.device) for _ in range(3)]
    tries = [
        expected_sums(q[..., order], k[..., order], lse, layout, block, torch.float32, scale, base, logit) * factor
        for order in orders
        for base in (math.e, 2)
    ]
    error, allowed = worst_row(found, truth), max(allowed_error(truth, x) for x in tries)
    assert error <= allowed, (error, allowed)
