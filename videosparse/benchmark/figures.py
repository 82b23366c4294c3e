"""What the programs that draw figures have in common: one legend below all panels, and the file."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from videosparse.files import whole


def finish(figure: Any, panels: Sequence[Any], path: Path, columns: int) -> None:
    """Name every label of the panels once, below them, write the figure, and say where it is.

    Args:
        figure: of matplotlib, with a constrained layout.
        panels: the axes whose labels are named, in the order of the legend.
        path: of the PNG; its folder is made.
        columns: of the legend.
    """
    handles = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles.keys(), fontsize=9, loc="outside lower center", ncols=columns, frameon=False
    )
    save_figure(figure, path, 110)
    print(path)


def save_figure(figure: Any, path: Path, dpi: int) -> None:
    """Write a figure of matplotlib, whole or not at all; its folder is made.

    A PNG of 128 colours: enough for lines and text, in a third of the room.
    """
    from PIL import Image

    drawn = BytesIO()
    figure.savefig(drawn, dpi=dpi, format="png")
    with Image.open(drawn) as image, whole(path) as part:
        image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(part, "PNG", optimize=True)
