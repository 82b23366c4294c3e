"""Constructed videos whose scores can be worked out by hand, and files of them."""

import torch

from videosparse.generation.video import write_mp4
from videosparse.metrics.video import as_video


def texture(height, width, seed=0):
    """A smooth random picture, [3, height, width] in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // 8 + 1, width // 8 + 1, generator=generator)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)[0]


def still(frames=9, size=64, fps=16):
    return as_video(texture(size, size).expand(frames, -1, -1, -1), fps)


def cut(frames=8, size=64, fps=16):
    """Black, then white."""
    video = torch.zeros(frames, 3, size, size)
    video[frames // 2 :] = 1
    return as_video(video, fps)


def pan(step, frames=17, size=64, fps=16):
    """A picture that moves to the left by whole pixels."""
    picture = texture(size, size + step * frames)
    return as_video(torch.stack([picture[..., step * i : step * i + size] for i in range(frames)]), fps)


def shake(step, frames=17, size=64, fps=16):
    """A picture that jumps back and forth, a frame each."""
    picture = texture(size, size + step)
    return as_video(torch.stack([picture[..., step * (i % 2) :][..., :size] for i in range(frames)]), fps)


def noise(frames=9, size=64, fps=16):
    """Black or white by chance, for every pixel and channel."""
    generator = torch.Generator().manual_seed(0)
    return as_video(torch.randint(0, 2, (frames, 3, size, size), generator=generator).float(), fps)


def save(folder, video, name):
    """Write an mp4 of it; returns the path."""
    folder.mkdir(parents=True, exist_ok=True)
    write_mp4(folder / name, video.unit(), video.fps)
    return folder / name
