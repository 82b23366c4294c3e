import pytest
import torch

from videosparse.layout import TokenLayout, VideoGrid
from videosparse.ordering import AXIS_ORDERS, TokenOrder

GRID = VideoGrid(3, 4, 5)
LAYOUT = TokenLayout(GRID, text=6)


def test_reorder_then_restore_is_the_identity_bit_for_bit():
    order = TokenOrder(GRID, tuple(range(6)))
    x = torch.randn(2, LAYOUT.length, 6, 8)
    moved = order.apply(x, LAYOUT)
    assert torch.equal(order.restore(moved, LAYOUT), x)
    assert torch.equal(moved[:, GRID.tokens :], x[:, GRID.tokens :])
    assert torch.equal(moved[:, :, 0], x[:, :, 0])


@pytest.mark.parametrize("name", AXIS_ORDERS)
def test_names_say_the_axes_slowest_first(name):
    sizes = {"F": 3, "H": 4, "W": 5}
    coordinates = torch.stack(torch.meshgrid(*(torch.arange(sizes[a]) for a in "FHW"), indexing="ij"), -1).view(-1, 3)
    moved = coordinates[TokenOrder.from_names(GRID, [name]).permutation()[0]]
    weights = torch.tensor([10 ** (2 - name.index(a)) for a in "FHW"])
    assert ((moved * weights).sum(1).diff() > 0).all()


def test_wrong_use():
    with pytest.raises(ValueError, match=r"indices 0\.\.5"):
        TokenOrder(GRID, (0, 6))
    with pytest.raises(ValueError, match="Unknown axis order 'FWX'"):
        TokenOrder.from_names(GRID, ["FWX"])
    with pytest.raises(ValueError, match="2 heads on grid 3x4x5"):
        TokenOrder(GRID, (0, 1)).apply(torch.randn(1, LAYOUT.length, 3, 8), LAYOUT)
