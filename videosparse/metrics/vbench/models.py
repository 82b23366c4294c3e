"""The learned models, loaded when first asked for, and what they make of a video."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from videosparse.checking import check_device
from videosparse.metrics.vbench.weights import MissingError, Weights, fit_state, read_state
from videosparse.metrics.video import Video

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIDE = 224
_RAFT_LEAST = 128  # pixels a side: its coarsest correlation would be empty below
_LONGEST = 512  # of an image that goes into MUSIQ

Frames = torch.Tensor  # fp32 [n, 3, height, width]


@dataclass(eq=False)
class Models:
    """The models of a run, each loaded once.

    Args:
        weights: where they come from.
        device: that they run on.
        batch: frames at once.

    Raises:
        TypeError, ValueError: device is no name, or names none.
    """

    weights: Weights = field(default_factory=Weights)
    device: str = "cpu"
    batch: int = 16
    _loaded: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        check_device(self.device)

    def load(self, key: str) -> Any:
        """The model with that key of `weights.NEEDED`, in fp32 and in evaluation mode.

        Raises:
            MissingError: it cannot be had.
        """
        if key not in self._loaded:
            try:
                self._loaded[key] = _LOADERS[key](self.weights)
            except MissingError as error:
                self._loaded[key] = error  # asked once, however many dimensions need it
            else:
                for module in _modules(self._loaded[key]):
                    module.to(self.device).eval().requires_grad_(False)
        if isinstance(self._loaded[key], MissingError):
            raise self._loaded[key]
        return self._loaded[key]

    @torch.inference_mode()
    def features(self, key: str, video: Video) -> torch.Tensor:
        """A feature of length 1 for every frame, fp32 [frames, width] on the CPU.

        Args:
            key: "dino" (class token), "clip-b32" or "clip-l14" (projected image feature).
            video: to look at.

        Raises:
            MissingError: the model cannot be had.
        """
        embed = _embed_dino if key == "dino" else _embed_clip
        model = self.load(key)
        found = [embed(model, frames.to(self.device)) for frames in _batches(video, self.batch)]
        return functional.normalize(torch.cat(found).float(), dim=-1).cpu()

    @torch.inference_mode()
    def text_feature(self, text: str) -> torch.Tensor:
        """CLIP B/32's feature of a text, length 1, fp32 [width] on the CPU.

        Raises:
            MissingError: the model cannot be had.
        """
        model, tokenizer = self.load("clip-b32")
        tokens = tokenizer([text], truncation=True, max_length=77, return_tensors="pt").to(self.device)
        pooled = model.text_model(**tokens).pooler_output
        return functional.normalize(model.text_projection(pooled).float(), dim=-1)[0].cpu()

    @torch.inference_mode()
    def flow(self, first: Frames, second: Frames) -> torch.Tensor:
        """RAFT's flow from one frame to another, pixels (x, y), fp32 [height, width, 2] on the CPU.

        Args:
            first, second: fp32 [1, 3, height, width] in [0, 1], at least 128 pixels a side.

        Raises:
            MissingError: the model cannot be had.
            ValueError: the frames are too small.
        """
        height, width = first.shape[-2:]
        if min(height, width) < _RAFT_LEAST:
            raise ValueError(f"RAFT needs at least {_RAFT_LEAST} pixels a side (got {height}x{width}).")
        # centred in a multiple of 8, borders repeated, as RAFT's own evaluation does
        down, right = -height % 8, -width % 8
        border = [right // 2, right - right // 2, down // 2, down - down // 2]
        both = (functional.pad(x.to(self.device) * 2 - 1, border, mode="replicate") for x in (first, second))
        flow: torch.Tensor = self.load("raft")(*both, num_flow_updates=20)[-1][0]
        top, left = border[2], border[0]
        return flow[:, top : top + height, left : left + width].permute(1, 2, 0).float().cpu()

    @torch.inference_mode()
    def technical_quality(self, video: Video) -> list[float]:
        """MUSIQ's score of every frame, about 0 to 100; the long side at most 512 pixels.

        Raises:
            MissingError: the model cannot be had.
        """
        model = self.load("musiq")
        return [float(model(_at_most(frame, _LONGEST).to(self.device))) for frame in _batches(video, 1)]


def _batches(video: Video, size: int) -> Iterator[Frames]:
    """Frames as fp32 [n, 3, height, width] in [0, 1]; a batch at a time, since a long video in fp32 would not fit."""
    frames = video.levels()
    for at in range(0, len(video), size):
        yield frames[at : at + size].permute(0, 3, 1, 2).float() / 255


def shorter_side(frames: Frames, side: int, mode: str) -> Frames:
    """Resized, anti-aliased, so that the shorter side has `side` pixels."""
    height, width = frames.shape[-2:]
    short = min(height, width)
    size = (int(side * height / short), int(side * width / short))
    return functional.interpolate(frames, size, mode=mode, align_corners=False, antialias=True)


def centre(frames: Frames, side: int) -> Frames:
    """The square in the middle."""
    top, left = (round((size - side) / 2) for size in frames.shape[-2:])
    return frames[..., top : top + side, left : left + side]


def normalised(frames: Frames, means_and_deviations: tuple[tuple[float, ...], tuple[float, ...]]) -> Frames:
    """Each channel less its mean, over its deviation."""
    mean, deviation = (torch.tensor(x, device=frames.device).view(3, 1, 1) for x in means_and_deviations)
    return (frames - mean) / deviation


def _at_most(frames: Frames, side: int) -> Frames:
    height, width = frames.shape[-2:]
    scale = side / max(height, width)
    if scale >= 1:
        return frames
    size = (int(scale * height), int(scale * width))
    return functional.interpolate(frames, size, mode="bilinear", align_corners=False, antialias=True)


def _embed_dino(model: Any, frames: Frames) -> torch.Tensor:
    pixels = normalised(shorter_side(frames, SIDE, "bilinear"), IMAGENET)
    hidden: torch.Tensor = model(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
    return hidden[:, 0]


def _embed_clip(model: Any, frames: Frames) -> torch.Tensor:
    model = model[0] if isinstance(model, tuple) else model
    pixels = normalised(centre(shorter_side(frames, SIDE, "bicubic"), SIDE), CLIP)
    pooled = model.vision_model(pixel_values=pixels).pooler_output
    projected: torch.Tensor = model.visual_projection(pooled)
    return projected


def _modules(loaded: Any) -> list[torch.nn.Module]:
    parts = loaded if isinstance(loaded, tuple) else (loaded,)
    return [part for part in parts if isinstance(part, torch.nn.Module)]


def _load_dino(weights: Weights) -> Any:
    from transformers import ViTModel

    return weights.pretrained("dino", lambda name, **where: ViTModel.from_pretrained(
        name, add_pooling_layer=False, dtype=torch.float32, **where
    ))  # fmt: skip


def _load_clip_b32(weights: Weights) -> Any:
    from transformers import AutoTokenizer, CLIPModel

    def load(name: str, **where: Any) -> Any:
        return CLIPModel.from_pretrained(name, dtype=torch.float32, **where), AutoTokenizer.from_pretrained(
            name, **where
        )

    return weights.pretrained("clip-b32", load)


def _load_clip_l14(weights: Weights) -> Any:
    from transformers import CLIPModel

    return weights.pretrained("clip-l14", lambda name, **where: CLIPModel.from_pretrained(
        name, dtype=torch.float32, **where
    ))  # fmt: skip


def _load_laion_head(weights: Weights) -> Any:
    path = weights.file("laion-head")
    head = torch.nn.Linear(768, 1)
    fit_state(head, read_state(path), path)
    return head


def _load_raft(weights: Weights) -> Any:
    path = weights.file("raft")
    from torchvision.models.optical_flow import raft_large

    model = raft_large(weights=None)
    fit_state(model, read_state(path), path)
    return model


def _load_musiq(weights: Weights) -> Any:
    path = weights.file("musiq")
    from pyiqa.archs.musiq_arch import MUSIQ

    model = MUSIQ(pretrained=False)
    fit_state(model, read_state(path), path)
    return model


_LOADERS: dict[str, Callable[[Weights], Any]] = {
    "dino": _load_dino,
    "clip-b32": _load_clip_b32,
    "clip-l14": _load_clip_l14,
    "laion-head": _load_laion_head,
    "raft": _load_raft,
    "musiq": _load_musiq,
}
