"""The oracle itself, against torch's own attention and against its contract."""

import pytest
import torch

from videosparse.blocks import BlockMap
from videosparse.layout import TokenLayout, VideoGrid
from videosparse.logits import FarLogits
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


GRID = VideoGrid(2, 5, 7)
WRONG = {
    r"q must be \[batch.*got \[70, 2, 16\]": {"q": torch.zeros(70, 2, 16)},
    r"v must be of one float dtype with q, torch.float64 \(got torch.float32": {"v": torch.zeros(2, 70, 2, 16)},
    r"k must be \[2, 70, 2, 16\].*got \[2, 70, 3, 16\]": {"k": torch.zeros(2, 70, 3, 16, dtype=torch.float64)},
    "layout must be of 70 and 70 tokens.*got 35": {"layout": TokenLayout(VideoGrid(1, 5, 7))},
    "block_map must be for 70 x 70 tokens.*got 35 x 35": {
        "block_map": BlockMap.full(TokenLayout(VideoGrid(1, 5, 7)), (64, 64))
    },
    r"scale must be a finite number \(got nan": {"scale": float("nan")},
    "logit needs a layout": {"logit": FarLogits(1)},
    r"tokens must be int64 \[2 or 1, 70\]": {"tokens": torch.zeros(70, dtype=torch.int64)},
}


@pytest.mark.parametrize("message", WRONG)
def test_arguments_that_do_not_fit_one_another(message):
    given = dict(zip("qkv", make(GRID.tokens), strict=True)) | WRONG[message]
    with pytest.raises((TypeError, ValueError), match=message):
        attention_reference(**given)


def test_another_length_of_keys():
    q, (k, v) = make(70)[0], make(64)[1:]
    out, _ = attention_reference(q, k, v)
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    assert torch.allclose(out, expected.transpose(1, 2))
