"""The oracle itself, against torch's own attention and against its contract."""

import torch

from videosparse.blocks import BlockMap
from videosparse.layout import TokenLayout, VideoGrid
from videosparse.reference import attention_reference


def make(length, heads=2, dim=16):
    return [torch.randn(2, length, heads, dim, dtype=torch.float64) for _ in range(3)]


def test_equals_torch_attention():
    q, k, v = make(70)
    out, lse = attention_reference(q, k, v)
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    assert torch.allclose(out, expected.transpose(1, 2))
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) / 4
    assert torch.allclose(lse, scores.logsumexp(-1))


def test_padding_gap_and_empty_rows_are_zero_and_never_nan():
    layout = TokenLayout(VideoGrid(2, 5, 7), 10, seq_lens=torch.tensor([70, 75], dtype=torch.int32)).aligned((64, 64))
    q, k, v = make(layout.length)
    for x in (q, k, v):
        x[~layout.key_mask(2, "cpu")] = torch.nan
    keep = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    keep[0, 0, 0] = False
    out, lse = attention_reference(
        q, k, v, layout=layout, block_map=BlockMap(keep, (64, 64), layout.length, layout.length)
    )
    silent = ~layout.key_mask(2, "cpu")
    silent[:, :64] = True
    assert not out.isnan().any()
    assert (out[silent] == 0).all()
    assert (lse.transpose(1, 2)[silent] == -torch.inf).all()
    assert lse.transpose(1, 2)[~silent].isfinite().all()
