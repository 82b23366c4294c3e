"""One HTML page about a comparison, with everything in it: tables, charts, maps, videos."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from videosparse.benchmark.rows import WHERE
from videosparse.evaluation.judging import DIMENSIONS, QUARTERS
from videosparse.evaluation.page.charts import Level, Point, Series, chart, legend
from videosparse.evaluation.page.summary import Group, Size
from videosparse.evaluation.table import Row
from videosparse.metrics.bootstrap import Interval

_SHOWN = 6  # players at first; the others are one tap away


@dataclass(frozen=True)
class Column:
    """One column of the table.

    Args:
        title: its head.
        name: of the rows.
        digits: after the point.
        hint: what it is, in a sentence.
        percent: whether it is a share.
        sure: whether an interval is shown.
    """

    title: str
    name: str
    digits: int
    hint: str
    percent: bool = False
    sure: bool = True


# what is 0 or 1 for a video is a share of videos
_DIMENSIONS = tuple(
    Column(name.replace("_", " "), name, 0 if name.startswith("dynamic") else 4, one.formula,
           percent=name.startswith("dynamic"))
    for name, one in DIMENSIONS.items()
)  # fmt: skip

TABLE = (
    Column("density", "video_density", 3, "Kept blocks over all blocks, video against video.", sure=False),
    Column("work", "average_density", 3, "Attention work of the run over dense, dense steps included.", sure=False),
    Column("seconds", "denoise_seconds", 3, "Wall seconds of denoising a video, made in batches.", sure=False),
    Column("PSNR, dB", "psnr_db", 1, "Against the dense video of the same noise; mean over frames."),
    Column("SSIM", "ssim", 3, "Against the dense video of the same noise; Gaussian window of 11."),
    Column("latent L1", "latent_l1", 3, "Mean |a - b| / mean |b| of latents against dense; mean over frames."),
    Column("all right", "all_right", 0, "Videos that show everything that the prompt says.", percent=True),
    Column("colour", "colour_right", 0, "Videos whose objects have the named colours.", percent=True),
    Column("shape", "shape_right", 0, "Videos whose objects have the named shapes.", percent=True),
    Column("motion", "motion_right", 0, "Videos whose objects move as told.", percent=True),
    Column("permanence", "permanence", 1, "Share of the frames in which the named objects are there.", percent=True),
    *_DIMENSIONS,
)  # fmt: skip

_MARKS = {"": ("", False), "int8": ("5 3", True), "int8-fp8": ("2 3", True), "int8-int8": ("5 3 2 3", True)}

_GLOSSARY = (
    ("ceiling", "The rendered truth of each prompt through the model's VAE: no model with this VAE shows more."),
    ("dense", "Full attention; what all others are compared with."),
    ("other noise", "Full attention from another seed: how far videos are apart that share only the prompt."),
    ("random", "As many random blocks in every row: what a density is worth without looking. The floor."),
    ("density", "Kept blocks over all blocks, video against video; 1 is dense. Work counts dense steps as 1."),
    ("intervals", "95 %, percentile bootstrap over videos; the same prompts and noise under every setting."),
    ("drift", "Cosine of the colour histograms of the first two seconds and of later ones: 1 is no change."),
    ("by quarter", "The same measure on each quarter of the frames: what drifts over a video shows as a slope."),
)  # fmt: skip


def build_page(sizes: Sequence[Size], title: str, videos: Path | None = None) -> str:
    """The page.

    Args:
        sizes: at least one.
        title: of the page.
        videos: the folder that the rows' columns "video" and "map" start from; None leaves both out.

    Raises:
        ValueError: a file that a row names is not there or is no video.
    """
    reels = [] if videos is None else [reel for size in sizes if (reel := _reel(size, videos))["prompts"]]
    data = json.dumps(reels).replace("</", "<\\/")
    parts = [_head(title), _intro(sizes, title, bool(reels))]
    if reels:
        parts.append(_VIEWER)
    parts += [_size_section(size, videos) for size in sizes]
    parts += [_glossary(), _environment(sizes), "</main>"]
    parts.append(f'<script type="application/json" id="reels">{data}</script><script>{_asset("page.js")}</script>')
    return "\n".join(parts) + "\n</body>\n</html>\n"


def _asset(name: str) -> str:
    return (files("videosparse.evaluation.page") / name).read_text(encoding="utf-8")


def _head(title: str) -> str:
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_asset('page.css')}</style>\n</head>\n<body>\n<main>"
    )


def _intro(sizes: Sequence[Size], title: str, has_videos: bool) -> str:
    links = ['<a href="#videos">Videos</a>'] if has_videos else []
    links += [f'<a href="#{size.anchor}">{escape(size.title)}</a>' for size in sizes]
    links.append('<a href="#words">Words</a>')
    settings = len({group.setting for size in sizes for group in size.groups})
    rows = sum(len(group.rows) for size in sizes for group in size.groups)
    return (
        f"<header><h1>{escape(title)}</h1><p>{settings} settings, {rows:,} videos. Each is compared with the dense "
        'video of the same prompt and noise.</p><nav aria-label="Parts of this page">'
        f"{''.join(links)}</nav></header>"
    )


_VIEWER = """<section id="videos"><h2>Videos</h2>
<noscript><p>The players need JavaScript.</p></noscript>
<div class="choose"><label>Size <select id="size"></select></label>
<label>Prompt <select id="prompt"></select></label></div>
<div id="players" class="players"></div>
<div class="bar"><button id="play" type="button" aria-label="Play">Play</button>
<input id="scrub" type="range" min="0" value="0" step="1" aria-label="Frame">
<output id="frame" for="scrub">1</output>
<label>Speed <select id="speed"><option value="0.25">¼</option><option value="0.5">½</option>
<option value="1" selected>1</option></select></label></div>
<fieldset id="shown"><legend>Shown</legend></fieldset>
<p class="keys">Keys: space plays and pauses, the arrows go by a frame, Home and End to the ends.</p></section>"""


def _size_section(size: Size, videos: Path | None) -> str:
    body = [f"<p>{escape(size.about)}</p>", _table(size), _differences(size), _costs(size), _drifts(size)]
    if videos is not None:
        body.append(_maps(size, videos))
    return f'<section id="{size.anchor}"><h2>{escape(size.title)}</h2>{"".join(body)}</section>'


# Tables


def _table(size: Size) -> str:
    means = {(g.setting, c.name): g.mean(c.name) for g in size.groups for c in TABLE}
    shown = [c for c in TABLE if any(means[g.setting, c.name] for g in size.groups)]
    head = "".join(f'<th scope="col" title="{escape(c.hint)}">{escape(c.title)}</th>' for c in shown)
    lines = []
    for group in size.groups:
        name = f'<th scope="row"><i class="{_css(group)}"></i>{escape(group.setting)}</th>'
        cells = "".join(_cell(means[group.setting, c.name], c) for c in shown)
        lines.append(f'<tr class="{"method" if group.is_sparse else "anchor"}">{name}{cells}</tr>')
    where = f'tabindex="0" role="region" aria-label="Results, {escape(size.title)}"'
    return (
        f'<div class="scroll" {where}><table><thead><tr><th scope="col">setting</th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _differences(size: Size) -> str:
    """What is sure about one setting against another: differences of the same prompt and noise."""
    dense, radial = size.group("dense"), size.group("radial")
    lines = []
    for group in size.groups:
        if not group.is_sparse:
            continue
        floor = size.group("random", group.rows[0].get("asked_density", "") or _density_of(size, radial))
        pairs = [
            (floor if group is not floor else None, _OVER[0]), (radial if group is not radial else None, _OVER[0]),
            *((dense, column) for column in _OVER[1:]),
        ]  # fmt: skip
        found = [(None if other is None else group.difference(other, column.name), column) for other, column in pairs]
        if any(value is not None for value, _ in found):
            name = f'<th scope="row"><i class="{_css(group)}"></i>{escape(group.setting)}</th>'
            lines.append(f"<tr>{name}{''.join(_cell(value, column) for value, column in found)}</tr>")
    if not lines:
        return ""
    heads = ["PSNR over random, dB", "PSNR over radial, dB", *(f"{column.title} less dense" for column in _OVER[1:])]
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    where = f'tabindex="0" role="region" aria-label="Differences, {escape(size.title)}"'
    return (
        "<h3>Prompt by prompt</h3><p>Means of differences between two videos of the same prompt and noise; an interval "
        "without 0 is sure of its sign. Random is at the density that was asked of the method.</p>"
        f'<div class="scroll" {where}><table><thead><tr><th scope="col">setting</th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _density_of(size: Size, radial: Group | None) -> str:
    """What a method is asked for that is to have Radial's density, as rows write it."""
    mean = None if radial is None else radial.mean("video_density")
    asked = {group.rows[0].get("asked_density", "") for group in size.groups} - {""}
    near = [text for text in asked if mean is not None and abs(float(text) - mean.mean) < 0.002]
    return near[0] if near else "none"


_OVER = (
    Column("PSNR", "psnr_db", 1, ""),
    Column("all right", "all_right", 0, "", percent=True),
    Column("permanence", "permanence", 1, "", percent=True),
    *_DIMENSIONS,
)


def _cell(value: Interval | None, column: Column) -> str:
    if value is None:
        return "<td>–</td>"
    if math.isinf(value.mean):
        return "<td>equal</td>"
    factor = 100 if column.percent else 1
    mean, low, high = (f"{x * factor:.{column.digits}f}" for x in value)
    unit = " %" if column.percent else ""
    return f"<td>{mean}{unit}" + (f"<small>{low} to {high}</small>" if column.sure else "") + "</td>"


# Charts


def _css(group: Group) -> str:
    return f"s-{group.method}"


def _series(size: Size, x: Callable[[Group], float | None], name: str) -> list[Series]:
    """The sparse methods at their densities."""
    found: dict[str, list[tuple[float, Group, Interval]]] = {}
    for group in size.groups:
        place, value = x(group), group.mean(name)
        if group.is_sparse and place is not None and value is not None and math.isfinite(value.mean):
            found.setdefault(group.series, []).append((place, group, value))
    series = []
    for label, points in found.items():
        dash, hollow = _MARKS.get(points[0][1].quant, ("", False))
        marks = [Point(p, v, f"{g.setting}: {v.mean:.4g} ({v.low:.4g} to {v.high:.4g})") for p, g, v in points]
        ordered = tuple(sorted(marks, key=lambda point: point.x))
        series.append(Series(label, _css(points[0][1]), ordered, dash, hollow))
    return series


def _mean_of(name: str) -> Callable[[Group], float | None]:
    def mean(group: Group) -> float | None:
        value = group.mean(name)
        return None if value is None else value.mean

    return mean


def _level(size: Size, method: str, name: str, text: str, upright: bool = False) -> list[Level]:
    group = size.group(method)
    value = None if group is None else group.mean(name)
    return [] if value is None or math.isinf(value.mean) else [Level(value.mean, text, f"s-{method}", upright)]


def _costs(size: Size) -> str:
    """Quality against density and against time."""
    charts: list[str] = []
    named: list[Series] = []
    seconds = _level(size, "dense", "denoise_seconds", "dense", upright=True)
    for x_name, x_label, upright in (
        ("video_density", "density (kept / all blocks)", []),
        ("denoise_seconds", "seconds of denoising a video", seconds),
    ):
        for name, label, anchors in (
            ("psnr_db", "PSNR against dense, dB", [("other-noise", "another seed")]),
            ("all_right", "share of videos all right", [("ceiling", "ceiling"), ("dense", "dense")]),
        ):
            series = _series(size, _mean_of(x_name), name)
            if series:
                levels = [one for method, text in anchors for one in _level(size, method, name, text)]
                what = "Likeness" if name == "psnr_db" else "Truth to the prompt"
                against = "density" if x_name == "video_density" else "time"
                charts.append(chart(f"{what} against {against}", x_label, label, series, [*levels, *upright]))
                named += [s for s in series if s.name not in {n.name for n in named}]
    if not charts:
        return ""
    return f'<h3>Quality against cost</h3>{legend(named)}<div class="charts">{"".join(charts)}</div>'


def _drifts(size: Size) -> str:
    """What changes from quarter to quarter: of anchors and the sparsest setting of each method."""
    shown = {*_sparsest(size), *(group.setting for group in size.groups if not group.is_sparse)}
    charts: list[str] = []
    named: list[Series] = []
    ticks = [(float(q), str(q)) for q in range(1, QUARTERS + 1)]
    for name, title, label in (
        ("psnr_db", "Likeness to dense", "PSNR against dense, dB"),
        ("permanence", "Objects that stay", "share of frames with the objects"),
        ("colour_error", "Colours that stay", "CIELAB distance to the named colour"),
    ):
        lines = [_quarter_line(group, name) for group in size.groups if group.setting in shown]
        series = [line for line in lines if line is not None]
        if series:
            charts.append(chart(title, "quarter of the video", label, series, ticks=ticks))
            named += [s for s in series if s.name not in {n.name for n in named}]
    lines = [_drift_line(group) for group in size.groups if group.setting in shown]
    if curves := [line for line in lines if line is not None]:
        named += [s for s in curves if s.name not in {n.name for n in named}]
        charts.append(chart("Drift", "seconds from the beginning", "cosine to the first 2 s, colours", curves))
    if not charts:
        return ""
    place = [group.setting for group in size.groups]
    named.sort(key=lambda series: place.index(series.name))
    return f'<h3>Over the video</h3>{legend(named)}<div class="charts">{"".join(charts)}</div>'


def _drift_line(group: Group) -> Series | None:
    """The drift curve of videos that are long enough for one."""
    points = tuple(
        Point(x, v, f"{group.setting}, after {x:g} s: {v.mean:.4g} ({v.low:.4g} to {v.high:.4g})")
        for x, v in group.drift()
    )
    return _line(group, points) if len(points) > 2 else None


def _quarter_line(group: Group, name: str) -> Series | None:
    means = [(q, value) for q, value in enumerate(group.quarters(name), start=1) if value is not None]
    if len(means) < 2 or not all(math.isfinite(value.mean) for _, value in means):
        return None
    points = tuple(
        Point(q, v, f"{group.setting}, quarter {q}: {v.mean:.4g} ({v.low:.4g} to {v.high:.4g})") for q, v in means
    )
    return _line(group, points)


def _line(group: Group, points: tuple[Point, ...]) -> Series:
    dash, hollow = _MARKS.get(group.quant, ("", False))
    return Series(group.setting, _css(group), points, dash or ("1 3" if not group.is_sparse else ""), hollow)


# Pictures


def _maps(size: Size, videos: Path) -> str:
    figures = []
    for group in size.groups:
        row = next((row for row in group.rows if row.get("map")), None)
        if row is None:
            continue
        data = base64.b64encode(_file(_inside(videos, row["map"]))).decode()
        text = f"{group.setting}: {row.get('map_shows', '')}"
        figures.append(
            f'<figure class="map"><img src="data:image/png;base64,{data}" alt="Block maps of {escape(text)}">'
            f"<figcaption><b>{escape(group.setting)}</b> {escape(row.get('map_shows', ''))}</figcaption></figure>"
        )
    if not figures:
        return ""
    return (
        "<h3>Which blocks are read</h3><p>Maps of the last step: rows are blocks of queries, columns blocks of keys, "
        f'dark is read.</p><div class="maps">{"".join(figures)}</div>'
    )


def _reel(size: Size, videos: Path) -> dict[str, Any]:
    """The kept videos of a size, for the players."""
    prompts: dict[str, list[dict[str, str]]] = {}
    fps, frames = 16.0, int(size.key["frames"])
    for group in size.groups:
        for row in group.rows:
            if row.get("video"):
                path = _inside(videos, row["video"])
                data, fps = _file(path), _fps(path)
                note = f"{float(row['psnr_db']):.1f} dB" if row.get("psnr_db") else ""
                one = {
                    "setting": group.setting,
                    "css": _css(group),
                    "note": note,
                    "data": base64.b64encode(data).decode(),
                }
                prompts.setdefault(row["prompt"], []).append(one)
    listed = [{"text": text, "videos": found} for text, found in prompts.items()]
    shape = {"width": int(size.key["width"]), "height": int(size.key["height"])}
    return {"title": size.title, "fps": fps, "frames": frames, "prompts": listed, "shown": _first_shown(size), **shape}


def _first_shown(size: Size) -> list[str]:
    """The settings that play at first: dense, then the sparsest of each method."""
    return ["dense", *_sparsest(size)][:_SHOWN]


def _sparsest(size: Size) -> list[str]:
    """Of each method the setting with the fewest blocks, in the order of the rows."""
    found: dict[str, str] = {}
    for group in sorted(size.groups, key=lambda g: -float(g.rows[0].get("video_density") or 1)):
        if group.is_sparse:
            found[group.series] = group.setting
    return [group.setting for group in size.groups if group.setting in found.values()]


def _inside(videos: Path, name: str) -> Path:
    """A file of the folder of kept videos; rows come from elsewhere, and may name any file of this machine."""
    path = videos / name
    if not path.resolve().is_relative_to(videos.resolve()):
        raise ValueError(f"A row names {name!r}, which is not in --videos {videos}; use rows that you trust.")
    return path


def _file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}); give --videos as it was in the comparison."
        ) from error


def _fps(path: Path) -> float:
    import av

    try:
        with av.open(str(path)) as file:
            rate = file.streams.video[0].average_rate
    except (OSError, IndexError) as error:
        raise ValueError(f"{path} is no video; make it again.") from error
    return float(rate or 16)


# The end of the page


def _glossary() -> str:
    terms = [*_GLOSSARY]
    terms += [(name.replace("_", " "), f"VBench, {one.kind}: {one.formula}.") for name, one in DIMENSIONS.items()]
    items = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in terms)
    return f'<section id="words"><h2>Words</h2><dl>{items}</dl></section>'


def _environment(sizes: Sequence[Size]) -> str:
    rows: Iterable[Row] = (row for size in sizes for group in size.groups for row in group.rows)
    found = dict.fromkeys(tuple(row.get(name, "") for name in WHERE if name != "run") for row in rows)
    head = "".join(f'<th scope="col">{name}</th>' for name in WHERE if name != "run")
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell or '–')}</td>" for cell in line) + "</tr>" for line in found)
    return (
        "<section><h2>Where it was measured</h2>"
        '<div class="scroll" tabindex="0" role="region" aria-label="Environment">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div></section>"
    )
