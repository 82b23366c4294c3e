"""Pictures of the block maps that transformers used at their last steps: `maps_of`, `drawn`."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from videosparse.attach import tracker_of
from videosparse.blocks import BlockIndex, BlockMap, PackedIndex, unpack_rows
from videosparse.metrics.attention import map_of
from videosparse.ordering import AXIS_ORDERS

_HEADS = 4
_GAP = 4


@dataclass(frozen=True, eq=False)
class Maps:
    """Maps of the first sample of one transformer, on the CPU.

    Args:
        tiles: bool [rows, columns] each; a row a layer, a column a head; layers side by side where heads share theirs.
        caption: what they show.
    """

    tiles: list[list[torch.Tensor]]
    caption: str


@dataclass(frozen=True)
class MapPicture:
    """`Maps`, those of several experts below one another.

    Args:
        png: the picture, kept blocks dark.
        caption: what it shows.
    """

    png: bytes
    caption: str


def drawn(maps: Sequence[Maps]) -> MapPicture | None:
    """A picture of the maps of each expert; None where there are none."""
    if not maps:
        return None
    captions = [m.caption if len(maps) == 1 else f"expert {n + 1}: {m.caption}" for n, m in enumerate(maps)]
    return MapPicture(png_of(mosaic([row for one in maps for row in one.tiles])), "; ".join(captions))


def maps_of(transformer: Any) -> Maps | None:
    """The maps that a transformer's current plans read: of its first, middle and last sparse layer, up to 4 heads.

    One map where all layers and heads share it; None where nothing is sparse. Waits for the device.
    """
    plans = {number: layer.plan for number, (_, layer) in enumerate(tracker_of(transformer).layers)}
    sparse = [number for number, plan in plans.items() if plan is not None and plan.index is not None]
    if not sparse:
        return None
    if len({id(plans[number].index) for number in sparse}) == 1:  # type: ignore[union-attr]
        shown = sparse[:1]
    else:
        shown = sorted({sparse[0], sparse[len(sparse) // 2], sparse[-1]})
    tiles = []
    for number in shown:
        plan = plans[number]
        assert plan is not None
        assert plan.index is not None
        tiles.append(_heads(plan.index))
    heads_shown = max(len(tile) for tile in tiles)
    index = plans[shown[0]].index  # type: ignore[union-attr]
    assert index is not None
    layers = "all layers" if len(shown) == 1 else f"layers {', '.join(str(n + 1) for n in shown)} of {len(plans)}"
    block = "x".join(map(str, index.block))
    if heads_shown == 1:
        tiles, caption = [[tile[0] for tile in tiles]], f"{layers}, all heads, blocks of {block}"
    else:
        caption = f"{layers} (rows), heads 1 to {heads_shown} (columns), blocks of {block}"
    orders = [plans[number].order for number in shown]  # type: ignore[union-attr]
    if any(order is not None for order in orders):
        named = "; ".join(", ".join(_order_names(order)[:heads_shown]) for order in orders)
        caption += f", tokens in orders {named}"
    return Maps(tiles, caption)


def _heads(index: BlockIndex | PackedIndex) -> list[torch.Tensor]:
    """Bool [rows, columns] of the first sample's first heads."""
    if isinstance(index, PackedIndex):
        keep = unpack_rows(index.bits[:1, :_HEADS], index.shape[3])
        whole = BlockMap(keep, index.block, index.q_len, index.kv_len)
    else:
        whole = map_of(index)
    return list(whole.keep[0, :_HEADS].cpu())


def _order_names(order: Any) -> list[str]:
    if order is None:
        return [AXIS_ORDERS[0]] * _HEADS
    codes = order.codes
    listed = codes.tolist() if isinstance(codes, torch.Tensor) else list(codes)
    return [AXIS_ORDERS[code] for code in listed]


def mosaic(tiles: list[list[torch.Tensor]]) -> torch.Tensor:
    """uint8 [height, width]: 0 kept, 1 dropped, 2 between maps."""
    columns = max(len(tile) for tile in tiles)
    rows, cols = tiles[0][0].shape
    canvas = torch.full((len(tiles) * (rows + _GAP) - _GAP, columns * (cols + _GAP) - _GAP), 2, dtype=torch.uint8)
    for i, line in enumerate(tiles):
        for j, keep in enumerate(line):
            top, left = i * (rows + _GAP), j * (cols + _GAP)
            canvas[top : top + rows, left : left + cols] = (~keep).to(torch.uint8)
    return canvas


def png_of(canvas: torch.Tensor) -> bytes:
    """A palette picture with nothing drawn between maps, so that a page's own background shows."""
    from PIL import Image

    image = Image.frombytes("P", (canvas.shape[1], canvas.shape[0]), canvas.numpy().tobytes())
    image.putpalette([38, 84, 140, 228, 233, 240, 255, 255, 255])
    out = io.BytesIO()
    image.save(out, "PNG", transparency=2, optimize=True)
    return out.getvalue()
