"""The table of `eval/compare_methods.py` on the page of results."""

from __future__ import annotations

from videosparse.benchmark.tables import Row, Table
from videosparse.evaluation.page.summary import sizes_of
from videosparse.metrics.bootstrap import Interval

COLUMNS = (
    ("video_density", 0, 0), ("psnr_db", 1, 1), ("ssim", 3, 1), ("latent_l1", 3, 1), ("all_right", 0, 100),
    ("motion_right", 0, 100), ("permanence", 1, 100), ("temporal_flickering", 4, 1),
)  # fmt: skip
"""Name, digits, factor; a factor of 0 stands for a density, which has no interval."""


def methods(rows: list[Row]) -> Table:
    """Every method of `eval/compare_methods.py` at every size, with the anchors."""
    lines = []
    for size in sizes_of(rows):
        for group in size.groups:
            cells = [_sure(group.mean(name), digits, factor) for name, digits, factor in COLUMNS]
            lines.append([f"{size.key['frames']}x{size.key['height']}x{size.key['width']}", group.setting, *cells])
    head = [
        "frames x H x W", "setting", "video density", "PSNR against dense, dB", "SSIM", "latents, relative L1",
        "all right, %", "motion class right, %", "permanence, %", "temporal flickering",
    ]  # fmt: skip
    return head, lines


def _sure(found: Interval | None, digits: int, factor: int) -> str:
    """A mean with its interval; a density, which has none, by its mean alone; "-" where there is nothing."""
    if found is None:
        return "-"
    if not factor:
        return f"{found[0]:.4f}"
    return "{} ({} to {})".format(*(f"{x * factor:.{digits}f}" for x in found))
