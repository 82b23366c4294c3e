"""What the kernels of the search are tested with: maps by sorting, and block sums of some rows by counting."""

import math

import torch
from inputs import expected_sums

from videosparse.blocks import id_dtype
from videosparse.kernels.accuracy import allowed_error, worst_row
from videosparse.kernels.call import AttentionCall
from videosparse.layout import ceil_div


def keep_by_sorting(sums, counts, video_rows, video_cols):
    """Bool [B, H, M, N]: the counts[b, h] largest of the video columns of video rows, and all text."""
    keep = torch.ones(sums.shape, dtype=torch.bool, device=sums.device)
    video = sums[:, :, :video_rows, :video_cols]
    order = video.nan_to_num(-1.0, torch.inf).argsort(dim=3, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(3, order, torch.arange(video_cols, device=sums.device).expand_as(order))
    keep[:, :, :video_rows, :video_cols] = rank < counts[:, :, None, None]
    return keep


def unpacked(bits, columns):
    """Bool [B, H, M, columns] of uint8 [B, H, M, bytes], whose other bits must be 0."""
    flat = (bits[..., None] >> torch.arange(8, dtype=torch.uint8, device=bits.device) & 1).bool().flatten(3)
    assert not flat[..., columns:].any()
    return flat[..., :columns]


def packed(keep):
    """uint8 [B, H, M, bytes] of bool [B, H, M, N]."""
    padded = torch.nn.functional.pad(keep, (0, -keep.shape[3] % 8)).unflatten(3, (-1, 8))
    return (padded * 2 ** torch.arange(8, device=keep.device)).sum(4).to(torch.uint8)


def row_ptr_of(keep):
    """int32 [B * H * M + 1]."""
    return torch.nn.functional.pad(keep.sum(3).flatten().cumsum(0), (1, 0)).int()


def make_sums(kind, shape, device="cpu"):
    """fp32 [B, H, M, N] of a kind of `KINDS`."""
    x = torch.rand(shape, device=device) ** 8
    if kind == "few values":
        x = (x * 3).round()
    elif kind == "zeros":
        x = torch.zeros_like(x)
    elif kind == "mostly zeros":
        x = x * (torch.rand(shape, device=device) < 0.05)
    elif kind == "tiny":
        x = x * 1e-42
    elif kind == "nan":
        x = x.masked_fill(torch.rand(shape, device=device) < 0.6, torch.nan)
    elif kind == "infinite":
        x = x.masked_fill(torch.rand(shape, device=device) < 0.3, torch.inf)
    elif kind == "neighbours":  # one unit in the last place apart
        x = (torch.randint(0, 9, shape, device=device) + 0x3F800000).int().view(torch.float32)
    return x


KINDS = ["random", "few values", "zeros", "mostly zeros", "tiny", "nan", "infinite", "neighbours"]


def assert_selects(select, sums, counts, video_rows, video_cols):
    """`keep_largest` against sorting: the same map, its mass, and twice the same bits. Returns the map."""
    keep = keep_by_sorting(sums, counts, video_rows, video_cols)
    found = []
    for fill in (255, 0):
        bits = torch.full((*sums.shape[:3], ceil_div(sums.shape[3], 8)), fill, dtype=torch.uint8, device=sums.device)
        kept = select.keep_largest(sums, counts, bits, video_rows, video_cols)
        found.append((bits, kept))
    assert torch.equal(unpacked(bits, sums.shape[3]), keep)
    mass = torch.where(keep, sums.double(), 0.0).sum(3)
    torch.testing.assert_close(kept.double(), mass, rtol=1e-6, atol=1e-40, equal_nan=True)
    assert torch.equal(found[0][0], bits)
    assert torch.equal(found[0][1].view(torch.int32), kept.view(torch.int32))
    return keep


def assert_expands(select, keep, spare=5):
    """`expand` against the map itself, into capacities that are larger than needed, and too small."""
    row_ptr, ids = row_ptr_of(keep), keep.nonzero()[:, 3]
    total = ids.numel()
    found = select.expand(packed(keep), row_ptr, total + spare, keep.shape[3])
    assert found.dtype == id_dtype(keep.shape[3])
    assert found.shape == (total + spare,)
    assert torch.equal(found[:total].long(), ids)
    few = total // 2
    assert torch.equal(select.expand(packed(keep), row_ptr, few, keep.shape[3]).long(), ids[:few])


def expected_sampled(q, k, lse, layout, block, sample, dtype, scale=None, base=math.e):
    """Sums [B, H, Mq, Nk] over the visited rows, times valid over visited rows of each block, in a given precision."""
    place = torch.arange(layout.length, device=q.device)
    visited = place % block[0] % (block[0] // sample) == 0
    seen = expected_sums(q, k, lse.masked_fill(~visited, -torch.inf), layout, block, dtype, scale, base)
    valid = layout.key_mask(q.shape[0], q.device)

    def count(rows):
        padded = torch.nn.functional.pad(rows, (0, -layout.length % block[0]))
        return padded.unflatten(1, (-1, block[0])).sum(2).to(dtype)

    return seen * (count(valid) / count(valid & visited).clamp(min=1))[:, None, :, None]


def assert_sampled(found, q, k, lse, layout, block, sample, scale=None):
    """At most twice as far from fp64 as plain torch in fp32, asked in several orders and bases.

    By the root mean square over the blocks of a head: where few rows are visited the errors of single exponentials
    stand alone, and the worst row of blocks of a hundred was beyond twice that of plain torch by chance. It may be
    thrice.
    """
    rest = (lse, layout, block, sample)
    truth = expected_sampled(q, k, *rest, torch.float64, scale)
    orders = [torch.randperm(q.shape[3], device=q.device) for _ in range(3)]
    tries = [
        expected_sampled(q[..., order], k[..., order], *rest, torch.float32, scale, base)
        for order in orders
        for base in (math.e, 2)
    ]
    assert worst_row(found, truth) <= 1.5 * max(allowed_error(truth, x) for x in tries)
    found, truth, *tries = (x.flatten(2) for x in (found, truth, *tries))
    error, allowed = worst_row(found, truth), max(allowed_error(truth, x) for x in tries)
    assert error <= allowed, (error, allowed)


def call_of(layout, dim, scale=None):
    """How the kernels are told of a layout."""
    lens = layout.seq_lens if layout.text else None
    start = layout.text_start if layout.text else layout.video
    return AttentionCall(None, lens, layout.video, start, dim**-0.5 if scale is None else scale)
