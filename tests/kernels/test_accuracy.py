"""The judge of the kernels: it agrees with the reference, passes good outputs and fails bad ones."""

import dataclasses
import math

import pytest
import torch
from inputs import TORCH, make_layout, make_map, make_qkv

from videosparse.blocks import BlockMap
from videosparse.kernels import attend
from videosparse.kernels.accuracy import attend_rows, measure
from videosparse.reference import attention_reference


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("base", [math.e, 2])
def test_rows_are_those_of_the_reference(dtype, base):
    layout = make_layout("ragged text").aligned((64, 128))
    block_map = make_map(layout, (64, 128), "per head")
    q, k, v = (x.nan_to_num() for x in make_qkv(layout, dtype))
    rows = torch.randperm(layout.length)[:150]
    out, lse = attend_rows(q, k, v, rows, layout=layout, block_map=block_map, scale=0.2, base=base)
    expected, expected_lse = attention_reference(q, k, v, layout=layout, block_map=block_map, scale=0.2)
    torch.testing.assert_close(out, expected[:, rows])
    torch.testing.assert_close(lse, expected_lse[:, :, rows])


def test_wrong_outputs_fail():
    layout = make_layout("ragged text").aligned((64, 64))
    block_map = make_map(layout, (64, 64), density=1.0)
    q, k, v = make_qkv(layout, torch.float16)
    out, lse = attend(q, k, v, layout=layout, index=block_map.index(), return_lse=True, options=TORCH)

    def judge(out=out, lse=lse, block_map=block_map, rows=None):
        return measure(out, lse, q, k, v, layout=layout, block_map=block_map, rows=rows)

    assert judge().ok
    for position, value in (((0, 5, 1, 3), 1.0), ((0, 5, 1, 3), float("nan")), ((1, 70, 0, 0), 1e-3)):
        wrong = out.clone()
        wrong[position] = value
        assert not judge(out=wrong).ok
        assert judge(out=wrong, rows=torch.arange(200, 250)).ok
    for position, value in (((0, 1, 5), 0.0), ((0, 1, 5), float("nan")), ((1, 0, 70), 0.0)):
        wrong = lse.clone()
        wrong[position] = value
        assert not judge(lse=wrong).ok
    dropped = block_map.keep.clone()
    dropped[..., 0, 0] = False
    assert not judge(block_map=BlockMap(dropped, (64, 64), layout.length, layout.length)).ok


def test_a_measure_with_nan_is_not_ok():
    layout = make_layout("video")
    q, k, v = make_qkv(layout, torch.float32)
    found = measure(attend(q, k, v, layout=layout), None, q, k, v, layout=layout)
    assert found.ok
    assert not dataclasses.replace(found, error=float("nan")).ok
