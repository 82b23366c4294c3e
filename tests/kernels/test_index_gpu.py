"""Lists of a map and of the map turned, made in a CUDA graph: replayed, they are those of the map that is there then.

Without a GPU the same is made again for every map, so that what the graph is compared with is known to be right.
"""

from itertools import pairwise

import pytest
import torch

from videosparse.blocks import BlockMap
from videosparse.kernels import attend
from videosparse.layout import TokenLayout, VideoGrid

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
BLOCK = (128, 64)
GRID = VideoGrid(25, 30, 41)
SHAPE = (2, 3, 241, 481)  # more rows than go longest first, and a part of a block at the end of either side
CAPACITY = SHAPE[0] * SHAPE[1] * SHAPE[2] * SHAPE[3] // 2


def maps():
    """Even, skewed, empty, and as many blocks as are allocated."""
    share = torch.rand(SHAPE[:3]) ** 4
    yield "even", torch.rand(SHAPE) < 0.3
    yield "skewed", torch.rand(SHAPE) < share[..., None]
    yield "empty", torch.zeros(SHAPE, dtype=torch.bool)
    full = torch.zeros(SHAPE, dtype=torch.bool)
    full.view(-1)[torch.randperm(full.numel())[:CAPACITY]] = True
    yield "full", full


def recorded(make, device):
    """Results of `make`, and what makes them again: a captured graph writes the same tensors."""
    found = make()
    if device == "cpu":
        return found, lambda: make()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = make()

    def again():
        for index in found:
            for tensor in (index.row_ptr, index.ids, index.order):
                tensor.fill_(-7)
        graph.replay()
        return found

    return found, again


def rows_of(index):
    """Block ids row by row; what lies beyond the last row is undefined."""
    ends = index.row_ptr.tolist()
    ids = index.ids.tolist()
    return [ids[a:b] for a, b in pairwise(ends)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_graph_makes_the_lists_of_another_map(device):
    keep = torch.zeros(SHAPE, dtype=torch.bool, device=device)

    def make():
        index = BlockMap(keep, BLOCK, GRID.tokens, GRID.tokens).index(CAPACITY)
        return index, index.transpose()

    keep[..., ::3] = True
    _, again = recorded(make, device)
    for name, wanted in maps():
        keep.copy_(wanted)
        index, turned = again()
        # the rows of a map by another way, and its counts in the order of work that the lists of the CPU have
        expected = BlockMap(wanted, BLOCK, GRID.tokens, GRID.tokens)
        for lists, block_map in ((index, expected), (turned, expected.transpose())):
            flat = block_map.keep.flatten(0, 2)
            assert rows_of(lists) == [row.nonzero()[:, 0].tolist() for row in flat], name
            assert torch.equal(lists.order.cpu(), block_map.index().order), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_graph_makes_the_lists_and_attends():
    layout = TokenLayout(GRID)
    q, k, v = (torch.randn(2, GRID.tokens, 3, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    keep = torch.rand(SHAPE, device="cuda") < 0.2

    def call():
        index = BlockMap(keep, BLOCK, GRID.tokens, GRID.tokens).index(CAPACITY)
        return attend(q, k, v, layout=layout, index=index)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for _ in range(2):
        keep.copy_(torch.rand(SHAPE, device="cuda") < 0.2)
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, call())
