"""What goes together on a GPU: torchao's own FP8, streams of group offloading, and compiled blocks."""

import pytest
import torch
from stacks import FAMILIES, SETS, Stacked, check

from videosparse.generation.linears import unavailable

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parts", SETS, ids="+".join)
def test_sets(family, parts):
    reason = unavailable("cuda")
    if reason is not None:
        pytest.skip(reason)
    torch._dynamo.reset()
    check(Stacked(family, parts, "cuda"))
