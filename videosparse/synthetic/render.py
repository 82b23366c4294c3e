"""Scenes to pixels: anti-aliased by signed distance, batched over scenes and frames, on any device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from videosparse.checking import check_device
from videosparse.synthetic.motion import centres, path_table
from videosparse.synthetic.scene import BACKGROUNDS, COLOURS, OUTLINES, Outline, Scene, SceneObject

# Bounds the temporaries of one pass, about a dozen float32 images: within a CPU's cache, large enough for a GPU.
PIXELS_PER_PASS = {"cpu": 1 << 19, "cuda": 1 << 26}
VISIBLE_SHARE = 0.2


@dataclass(frozen=True)
class ObjectState:
    """The truth about one object in one frame.

    Args:
        id: index of the object in its scene.
        x: centre, fraction of the frame's width.
        y: centre, fraction of the frame's height, downwards.
        radius: nominal radius, fraction of the frame's shorter side.
        colour: a key of ``COLOURS``.
        visible: whether at least a fifth of the object's area is in front of everything else.
    """

    id: int
    x: float
    y: float
    radius: float
    colour: str
    visible: bool


def render(
    scenes: Sequence[Scene],
    num_frames: int,
    height: int,
    width: int,
    *,
    fps: float = 16.0,
    start: float = 0.0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Render clips.

    Args:
        scenes: B scenes.
        num_frames: F, pixel frames.
        height: H, in pixels.
        width: W, in pixels.
        fps: frames per second.
        start: time of the first frame, seconds.
        device: where to render; the result stays there.

    Returns:
        float32 [B, 3, F, H, W], RGB in [0, 1].

    Raises:
        ValueError: if there are no scenes, a size is not positive, or device names none.
        TypeError: device is no device and no name.
    """
    if not scenes or min(num_frames, height, width) < 1 or fps <= 0:
        raise ValueError(
            "render needs at least one scene and positive num_frames, height, width and fps "
            f"(got {len(scenes)} scenes, {num_frames}, {height}, {width}, {fps})."
        )
    device = check_device(device)
    out = torch.empty(len(scenes), 3, num_frames, height, width, device=device)
    times = start + torch.arange(num_frames, dtype=torch.float64, device=device) / fps
    pixels = PIXELS_PER_PASS.get(device.type, 1 << 24)
    step = max(1, pixels // (num_frames * height * width))
    for at in range(0, len(scenes), step):
        _paint(out[at : at + step], scenes[at : at + step], times)
    return out


def _paint(out: Tensor, scenes: Sequence[Scene], times: Tensor) -> None:
    """Fill ``out`` [B, 3, F, H, W]: background, objects from back to front, occluders."""
    x, y = _pixel_centres(out)
    _paint_backgrounds(out, scenes, times, x, y)
    for depth in range(max(len(scene.objects) for scene in scenes)):
        rows = [i for i, scene in enumerate(scenes) if len(scene.objects) > depth]
        objects = [scenes[i].objects[depth] for i in rows]
        _blend(out, rows, _coverage(objects, times, x, y), [COLOURS[o.colour] for o in objects])
    rows = [i for i, scene in enumerate(scenes) if scene.occluder]
    if rows:
        bars = [bar for scene in scenes if (bar := scene.occluder)]
        _blend(out, rows, _bars([bar.x for bar in bars], [bar.width for bar in bars], x), [bar.colour for bar in bars])


def _pixel_centres(out: Tensor) -> tuple[Tensor, Tensor]:
    """x [1, W] and y [H, 1] of the pixel centres, as fractions of the frame."""
    height, width = out.shape[-2:]
    x = (torch.arange(width, device=out.device, dtype=torch.float32) + 0.5) / width
    y = (torch.arange(height, device=out.device, dtype=torch.float32) + 0.5) / height
    return x[None, :], y[:, None]


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """One number per clip as float32 [N, 1, 1, 1], to broadcast over [N, F, H, W]."""
    return torch.tensor(values, dtype=torch.float32, device=like.device).reshape(-1, 1, 1, 1)


def _blend(out: Tensor, rows: list[int], coverage: Tensor, colours: Sequence[Sequence[float]]) -> None:
    """Lay colours over some clips. ``coverage`` is [N, F or 1, H, W] in [0, 1]."""
    whole = len(rows) == out.shape[0]
    index = torch.tensor(rows, device=out.device)
    for channel in range(3):
        plane = out[:, channel] if whole else out[index, channel]
        colour = _column([c[channel] for c in colours], out)
        mixed = torch.lerp(plane, colour.expand_as(plane), coverage.expand_as(plane))
        if whole:
            out[:, channel] = mixed
        else:
            out[index, channel] = mixed


def _coverage(objects: Sequence[SceneObject], times: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """How much of each pixel each object covers: float32 [N, F, H, W] in [0, 1]."""
    # Distances are measured in shorter sides, so that shapes keep their form in a frame that is not square.
    height, width = y.shape[0], x.shape[1]
    short = min(height, width)
    where = centres(path_table(objects).to(times.device), times).float()[:, :, None, None, :]
    radius = _column([o.radius for o in objects], x)
    dx = (x - where[..., 0]) * (width / short) / radius
    dy = (y - where[..., 1]) * (height / short) / radius
    distance = signed_distance(dx, dy, [OUTLINES[o.shape] for o in objects])
    return (0.5 - distance * (radius * short)).clamp_(0, 1)


def signed_distance(dx: Tensor, dy: Tensor, outlines: Sequence[Outline]) -> Tensor:
    """Signed distance to outlines of nominal radius 1, negative inside.

    A regular polygon or star is folded onto one half of one corner, after Inigo Quilez' two-dimensional distance
    functions.

    Args:
        dx: [N, ...], rightwards from the centre.
        dy: [N, ...], downwards from the centre.
        outlines: N of them.

    Returns:
        [N, ...] as the broadcast of ``dx`` and ``dy``.
    """
    length = torch.hypot(dx, dy)

    def column(values: list[float]) -> Tensor:
        shaped = torch.tensor(values, dtype=length.dtype, device=length.device)
        return shaped.reshape(-1, *([1] * (length.dim() - 1)))

    # A circle is folded as if it had three corners and then overwritten.
    half = [math.pi / (o.corners or 3) for o in outlines]
    corner = [(o.outer * math.cos(h), o.outer * math.sin(h)) for o, h in zip(outlines, half, strict=True)]
    edge = [(c - o.inner, s) for o, (c, s) in zip(outlines, corner, strict=True)]
    size = [math.hypot(*e) for e in edge]
    ex = column([e[0] / n for e, n in zip(edge, size, strict=True)])
    ey = column([e[1] / n for e, n in zip(edge, size, strict=True)])
    h = column(half)
    angle = torch.remainder(torch.atan2(dx, -dy) - column([o.turn for o in outlines]), 2 * h) - h
    px = length * angle.cos() - column([c[0] for c in corner])
    py = length * angle.sin().abs() - column([c[1] for c in corner])
    along = (-(px * ex + py * ey)).clamp(min=torch.zeros_like(h), max=column(size))
    px, py = px + ex * along, py + ey * along
    polygon = torch.hypot(px, py) * px.sign()
    round_ = column([float(o.corners == 0) for o in outlines]) > 0
    return torch.where(round_, length - column([o.outer for o in outlines]), polygon)


def _bars(x: Sequence[float], widths: Sequence[float], columns: Tensor) -> Tensor:
    """Coverage of vertical bars, float32 [N, 1, 1, W]."""
    distance = (columns - _column(x, columns)).abs() - _column(widths, columns) / 2
    return (0.5 - distance * columns.shape[1]).clamp(0, 1)


def _square_wave(position: Tensor, pixel: float | Tensor) -> Tensor:
    """An anti-aliased 0/1 wave of period 1; ``pixel`` is the width of a pixel in periods."""
    triangle = 0.25 - (position - position.floor() - 0.5).abs()
    return (0.5 + triangle / pixel).clamp(0, 1)


def _paint_backgrounds(out: Tensor, scenes: Sequence[Scene], times: Tensor, x: Tensor, y: Tensor) -> None:
    """Fill ``out`` with the backgrounds, one pass per kind because only stripes depend on time."""
    for kind in BACKGROUNDS:
        rows = [i for i, scene in enumerate(scenes) if scene.background.kind == kind]
        if not rows:
            continue
        backgrounds = [scenes[i].background for i in rows]
        period = _column([b.period for b in backgrounds], x)
        cos, sin = (_column([f(b.angle) for b in backgrounds], x) for f in (math.cos, math.sin))
        along = (x - 0.5) * cos + (y - 0.5) * sin
        pixel = 1.0 / min(y.shape[0], x.shape[1]) / period
        if kind == "flat":
            share = torch.zeros_like(along)
        elif kind == "gradient":
            share = 0.5 + along / (cos.abs() + sin.abs())
        elif kind == "checker":
            across, down = _square_wave(x / period, pixel), _square_wave(y / period, pixel)
            share = across + down - 2 * across * down
        else:
            moved = _column([b.velocity for b in backgrounds], x).double() * times.reshape(1, -1, 1, 1)
            share = _square_wave((along - torch.remainder(moved, period.double()).float()) / period, pixel)
        for channel in range(3):
            first = _column([b.first[channel] for b in backgrounds], x)
            second = _column([b.second[channel] for b in backgrounds], x)
            plane = first + (second - first) * share
            out[torch.tensor(rows, device=out.device), channel] = plane.expand(-1, out.shape[2], -1, -1)


def states(scene: Scene, num_frames: int, *, fps: float = 16.0, start: float = 0.0) -> list[list[ObjectState]]:
    """The truth about every object of a scene, frame by frame.

    Args:
        scene: the scene.
        num_frames: F, pixel frames.
        fps: frames per second.
        start: time of the first frame, seconds.

    Returns:
        F lists of one ``ObjectState`` per object, in the scene's order.
    """
    times = start + torch.arange(num_frames, dtype=torch.float64) / fps
    where = centres(path_table(scene.objects), times).tolist()
    visible = _visible(scene, times).tolist()
    return [
        [
            ObjectState(i, where[i][frame][0], where[i][frame][1], o.radius, o.colour, visible[i][frame])
            for i, o in enumerate(scene.objects)
        ]
        for frame in range(num_frames)
    ]


def _visible(scene: Scene, times: Tensor, *, samples: int = 64) -> Tensor:
    """Whether enough of each object can be seen, bool [objects, F]: the pixels are counted on a coarse raster."""
    grid = (torch.arange(samples, dtype=torch.float32) + 0.5) / samples
    x, y = grid[None, :], grid[:, None]
    cover = _coverage(scene.objects, times, x, y)
    hidden = torch.zeros_like(cover[0])
    if scene.occluder:
        hidden = torch.maximum(hidden, _bars([scene.occluder.x], [scene.occluder.width], x)[0])
    shares = []
    for own in reversed(cover.unbind(0)):
        shares.append((own * (1 - hidden)).sum((1, 2)) / own.sum((1, 2)).clamp(min=1e-6))
        hidden = torch.maximum(hidden, own)
    return torch.stack(shares[::-1]) >= VISIBLE_SHARE
