"""Tables of the rows of `eval/compare_methods.py` on the page of results."""

from __future__ import annotations

from collections.abc import Sequence

from videosparse.benchmark.tables import Row, Table, markdown, usual
from videosparse.evaluation.page.summary import Group, Size, sizes_of
from videosparse.metrics.bootstrap import Interval

LIKENESS = (("psnr_db", 1, 1), ("ssim", 3, 1), ("latent_l1", 3, 1))
"""Name, digits, factor."""

SHOWN = (("colour_right", 0, 100), ("shape_right", 0, 100), ("motion_right", 0, 100), ("permanence", 1, 100))
DIMENSIONS = (("temporal_flickering", 2, 100), ("motion_smoothness", 2, 100), ("dynamic_degree_dis", 0, 100))

OPTIONS = {"head_adaptive=no": "equal heads", "refresh=never": "one search", "block=128x64": "blocks of 128x64"}
"""How options of the published comparison read."""

SIZES = ("33x120x136", "81x128x128", "161x128x128", "321x128x128")
"""Frames, height and width that the page is to have."""

PAIRS = (
    ("search instead of Radial's map", "adaspa, density of radial", "radial", ""),
    ("plan instead of Radial's map", "paro, density of radial", "radial", ""),
    ("plan instead of search", "paro, density of radial", "adaspa, density of radial", ""),
    ("plan instead of search", "paro 0.2", "adaspa 0.2", ""),
    ("Radial's map instead of chance", "radial", "random, density of radial", ""),
    ("search instead of chance", "adaspa 0.2", "random 0.2", ""),
    ("search instead of chance", "adaspa 0.1", "random 0.1", ""),
    ("each head its own density", "adaspa 0.2", "adaspa 0.2, head_adaptive=no", "+0.56"),
    ("a second search", "adaspa 0.2", "adaspa 0.2, refresh=never", ""),
    ("blocks twice as high", "adaspa 0.2, block=128x64", "adaspa 0.2", ""),
    ("token orders", "paro 0.5", "paro 0.5, raster order", "+2.8"),
    ("token orders", "paro 0.3", "paro 0.3, raster order", ""),
    ("token orders", "paro 0.2", "paro 0.2, raster order", ""),
    ("token orders by mass", "paro 0.5, orders by mass", "paro 0.5, raster order", ""),
    ("token orders by mass", "paro 0.3, orders by mass", "paro 0.3, raster order", ""),
    ("token orders by mass", "paro 0.2, orders by mass", "paro 0.2, raster order", ""),
    ("queries and keys as INT8", "radial, int8", "radial", ""),
    ("queries and keys as INT8", "paro 0.5, int8", "paro 0.5", "-0.1"),
    ("queries and keys as INT8", "paro 0.2, int8", "paro 0.2", ""),
    ("values as FP8, too", "paro 0.2, int8-fp8", "paro 0.2, int8", ""),
)
"""What two settings differ in, the settings, and the difference in dB that a paper reports: AdaSpa (arXiv 2502.21079)
on HunyuanVideo, PAROAttention (arXiv 2506.16054) on CogVideoX-5B, whose values are INT8, too."""


def gains(rows: list[Row]) -> Table:
    """What each part of a method is worth: differences prompt by prompt, which are surer than those of two means."""
    groups = {group.setting: group for size in sizes_of(usual(rows)) for group in size.groups}
    lines = []
    for what, setting, other, published in PAIRS:
        if setting in groups and other in groups:
            found = [groups[setting].difference(groups[other], name) for name in ("psnr_db", "all_right")]
            cells = [_sure(found[0], 2, 1, "+"), _sure(found[1], 0, 100, "+"), published or "-"]
            lines.append([what, readable(setting), readable(other), *cells])
    return ["", "setting", "against", "PSNR against dense, dB", "all right, points", "paper: PSNR, dB"], lines


def fidelity(rows: list[Row]) -> Table:
    """Likeness to dense of AdaSpa, Radial Attention and random blocks in full precision."""
    groups = _groups(usual(rows), ("other-noise", "radial", "adaspa", "random"))
    return _likeness([group for group in groups if not group.quant])


def paro_videos(rows: list[Row]) -> Table:
    """Likeness to dense of PAROAttention by plans, with orders, without, and in integers."""
    return _likeness(_groups(usual(rows), ("random", "paro", "paro-mass", "paro-raster")))


def side_by_side(rows: list[Row]) -> str:
    """What is at several sizes, a column each: density, PSNR, and how many videos show all that the prompt says."""
    sizes = sizes_of(rows)
    settings = dict.fromkeys(group.setting for size in sizes for group in size.groups)
    found = {s: [next((g for g in size.groups if g.setting == s), None) for size in sizes] for s in settings}
    shared = {s: groups for s, groups in found.items() if len(groups) - groups.count(None) >= min(2, len(sizes))}
    head = ["", *(_title(size) for size in sizes)]
    parts = []
    for title, name, digits, factor in (
        ("PSNR against dense, dB", "psnr_db", 1, 1), ("all that the prompt says is right, %", "all_right", 0, 100),
    ):  # fmt: skip
        lines = []
        for setting, groups in shared.items():
            means = [None if group is None else group.mean(name) for group in groups]
            if any(means):
                lines.append([readable(setting), *(_sure(mean, digits, factor) for mean in means)])
        if lines:
            densities = [_density(size.group("radial"), "video_density") for size in sizes]
            parts.append(f"**{title}**\n\n{markdown((head, [['video density of Radial', *densities], *lines]))}")
    return "\n\n".join(parts)


def missing_sizes(rows: list[Row]) -> str:
    """A sentence that names the sizes without a row; empty where there are none."""
    found = {_title(size) for size in sizes_of(rows)}
    missing = [size for size in SIZES if size not in found]
    return f"Not measured yet: {', '.join(missing)}." if missing else ""


def earlier_weights(rows: list[Row]) -> str:
    """A sentence that names the sizes whose rows are of other weights than the newest; empty where there are none."""
    newest = max(rows, key=lambda row: row.get("run", ""), default={}).get("weights")
    earlier = [row for row in rows if row.get("weights") != newest]
    titles = {"x".join(row[name] for name in ("frames", "height", "width")) for row in earlier}
    listed = ", ".join(title for title in SIZES if title in titles)
    return f"Of the model before its last rounds of training: {listed}." if listed else ""


def methods(rows: list[Row]) -> str:
    """Every setting at every size, with the anchors: how like dense it is, and what its videos show."""
    parts = []
    for size in sizes_of(rows):
        groups = [group for group in size.groups if not group.is_sparse]
        groups += _densest_first([group for group in size.groups if group.is_sparse])
        tables = {
            "likeness to dense": _likeness(groups),
            "what detectors see": _shown(groups, size.group("dense")),
            "dimensions of VBench": _dimensions(groups),
        }
        parts += [f"**{_title(size)}: {what}**\n\n{markdown(table)}" for what, table in tables.items()]
    return "\n\n".join(parts)


def readable(setting: str) -> str:
    """The name of a setting with its options in words."""
    for option, words in OPTIONS.items():
        setting = setting.replace(option, words)
    return setting


def _groups(rows: Sequence[Row], methods: Sequence[str]) -> list[Group]:
    """The settings of some methods, the densest first."""
    return _densest_first([group for size in sizes_of(rows) for group in size.groups if group.method in methods])


def _densest_first(groups: Sequence[Group]) -> list[Group]:
    """Methods of about one density stand together, in their order."""
    return sorted(groups, key=lambda group: -round(float(group.rows[0]["video_density"]), 2))


def _likeness(groups: Sequence[Group]) -> Table:
    """Settings that have a dense twin; with the number of videos."""
    lines = []
    for group in groups:
        if group.mean("psnr_db") is not None:
            densities = [_density(group, name) for name in ("video_density", "average_density")]
            lines.append([readable(group.setting), str(len(group.rows)), *densities, *_cells(group, LIKENESS)])
    head = [
        "setting", "videos", "video density", "averaged over the run", "PSNR, dB", "SSIM", "latents, relative L1",
    ]  # fmt: skip
    return head, lines


def _shown(groups: Sequence[Group], dense: Group | None) -> Table:
    """What the detectors of the world say of the videos of every setting."""
    lines = []
    for group in groups:
        beside = None if dense is None or group is dense else group.difference(dense, "all_right")
        cells = [_sure(group.mean("all_right"), 0, 100), _sure(beside, 0, 100, "+")]
        lines.append([readable(group.setting), *cells, *_cells(group, SHOWN)])
    head = [
        "setting", "all right, %", "beside dense, points", "colour, %", "shape, %", "motion, %", "permanence, %",
    ]  # fmt: skip
    return head, lines


def _dimensions(groups: Sequence[Group]) -> Table:
    """The dimensions that need no download."""
    head = ["setting", "temporal flickering, %", "motion smoothness (proxy), %", "dynamic degree (proxy), %"]
    return head, [[readable(group.setting), *_cells(group, DIMENSIONS)] for group in groups]


def _cells(group: Group, columns: Sequence[tuple[str, int, int]]) -> list[str]:
    return [_sure(group.mean(name), digits, factor) for name, digits, factor in columns]


def _title(size: Size) -> str:
    return f"{size.key['frames']}x{size.key['height']}x{size.key['width']}"


def _density(group: Group | None, name: str) -> str:
    mean = None if group is None else group.mean(name)
    return "-" if mean is None else f"{mean.mean:.4f}"


def _sure(found: Interval | None, digits: int, factor: int, sign: str = "") -> str:
    """A mean with its interval; "-" where there is nothing."""
    if found is None:
        return "-"
    return "{} ({} to {})".format(*(f"{x * factor:{sign}.{digits}f}" for x in found))
