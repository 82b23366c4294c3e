"""Decoding a video as a stream: frames go to a file as the VAE makes them, and are never all in memory.

```python
with stream_to(pipe, "cat.mp4", fps=16):
    pipe("a cat surfing", num_frames=321)
```
These are the frames of the stock decode, since the VAE's own code makes them: bit by bit for Wan, whose VAE decodes one
latent frame after the other already, and for HunyuanVideo, whose VAE decodes tiles of five. Mochi's decodes a whole
video at once; here it gets two latent frames at a time, and its convolutions the frames before. That is the same
computation, in which convolutions over other lengths may round otherwise.
"""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from videosparse.generation.errors import GenerationError
from videosparse.generation.output import Destination, destination
from videosparse.generation.request import RATES, check_within
from videosparse.generation.video import Mp4Writer

Sink = Callable[[torch.Tensor], None]
"""Called with consecutive frames, floating [frames, 3, height, width] in [0, 1] on the VAE's device."""

_TESTED = ((0, 41), (0, 44))
"""Releases of Diffusers, from and before, whose decoders are known here."""

_Part = Callable[[torch.Tensor], None]
_Decode = Callable[..., Any]


def unstreamable(vae: Any) -> str | None:
    """Why a VAE's videos cannot be decoded as a stream; None when they can."""
    name = type(vae).__name__
    if name not in _DECODERS:
        return f"{name} is not one of {', '.join(_DECODERS)}"
    installed = importlib.metadata.version("diffusers")
    numbers = tuple(int(part) for part in installed.split(".")[:2])
    if not _TESTED[0] <= numbers < _TESTED[1]:
        return f"decoding as a stream was not tested with diffusers {installed}"
    if name == "AutoencoderKLWan" and vae.use_tiling:
        return "a tiled Wan VAE decodes one tile of all frames after the other; leave enable_tiling out"
    if name == "AutoencoderKLMochi" and vae.use_framewise_decoding:
        return "framewise decoding of Mochi's VAE is another one than its usual"
    return None


def check_streamable(vae: Any) -> None:
    """Raise NotImplementedError unless a VAE's videos can be decoded as a stream."""
    if reason := unstreamable(vae):
        raise NotImplementedError(f"This VAE cannot decode as a stream: {reason}. Decode the whole video instead.")


def decode_stream(vae: Any, latents: torch.Tensor, sink: Sink) -> None:
    """Decode one video and pass its frames on as they come.

    Args:
        vae: of Wan, HunyuanVideo or Mochi.
        latents: [1, C, F, h, w] as `vae.decode` takes them.
        sink: gets the frames.

    Raises:
        NotImplementedError: see `check_streamable`.
        ValueError: more than one video.
        RuntimeError: another number of frames came than the VAE makes of so many latents.
    """
    check_streamable(vae)
    _decode(vae, vae.decode, latents, sink)


@contextmanager
def streaming(pipe: Any, sink: Sink) -> Iterator[None]:
    """Let the videos of a pipeline go to `sink` while they are decoded; the pipeline then returns none of their frames.

    Args:
        pipe: called once inside the block.
        sink: gets the frames.

    Raises:
        NotImplementedError: see `check_streamable`.
        GenerationError: a block inside of such a block, a second video, or one that was cut off.
    """
    vae = pipe.vae
    check_streamable(vae)
    if isinstance(vars(vae).get("decode"), _Streamed):
        raise GenerationError(
            "The videos of this pipeline go to a file already; leave that stream_to block first, or give the new one "
            "another pipeline."
        )
    decode = _Streamed(vae, sink)
    with replaced_decode(vae, decode):
        yield
    if decode.cut:  # and the block went on
        raise GenerationError(_CUT)


class SecondVideoError(GenerationError):
    """A pipeline made another video where one was expected."""


_CUT = "Decoding failed after some frames had been passed on, which cannot be taken back; try again in a new block."


class _Streamed:
    """Stands for the decode of a VAE, whose one video goes to `sink`.

    `cut`: frames went there, and the video is not whole.
    """

    def __init__(self, vae: Any, sink: Sink) -> None:
        self._vae, self._stock, self._sink = vae, vae.decode, sink
        self._whole = self.cut = False

    def __call__(self, z: torch.Tensor, return_dict: bool = True) -> Any:
        if self._whole:
            raise SecondVideoError("A stream takes one video, and this is another one; open a block for each.")
        if self.cut:
            raise GenerationError(_CUT)
        _decode(self._vae, self._stock, z, self._pass_on)
        self._whole, self.cut = True, False
        none = z.new_zeros(1, 3, 0, 1, 1)
        return _output(none) if return_dict else (none,)

    def _pass_on(self, frames: torch.Tensor) -> None:
        self.cut = True
        self._sink(frames)


@contextmanager
def replaced_decode(vae: Any, decode: _Decode) -> Iterator[None]:
    """Let a VAE decode otherwise for the time of a block: an attribute of this one object hides its method."""
    before = vars(vae).get("decode")
    vae.decode = decode
    try:
        yield
    finally:
        if before is None:
            del vae.decode
        else:
            vae.decode = before


@dataclass
class StreamedVideo:
    """A video that went to a file while it was decoded; `path` is known once it is whole."""

    path: Path | None = None


@contextmanager
def stream_to(
    pipe: Any, output: str | Path | Destination, fps: float, *, overwrite: bool = False
) -> Iterator[StreamedVideo]:
    """Write what a pipeline makes to an mp4 file while it is decoded. The file appears when it is whole.

    Args:
        pipe: called once inside the block.
        output: an .mp4 file, a folder, or what `video_place` decided before the model was loaded. In a folder a taken
            name gets a number, so that two runs do not collide.
        fps: frames a second, 1 to 240.
        overwrite: whether an existing file may be replaced.

    Raises:
        NotImplementedError: see `check_streamable`.
        GenerationError: the file is there already, or cannot be written; another rate; frames that are not finite; a
            block inside of such a block; a video that was cut off, of which nothing is left; or a second video, once
            the first is in its file.
        ValueError: nothing was generated.
    """
    place = output if isinstance(output, Destination) else destination(output, "video", (".mp4",), overwrite)
    check_within("fps", fps, RATES)
    found, second = StreamedVideo(), None

    def add(frames: torch.Tensor) -> None:
        if not bool(frames.isfinite().all()):
            raise GenerationError(
                "The model made frames that are not finite; check its dtype, its weights and the shift of the schedule."
            )
        video.add(frames)

    with place.files() as parts:
        with Mp4Writer(parts.path(".mp4"), fps) as video, streaming(pipe, add):
            try:
                yield found
            except SecondVideoError as error:  # the first is whole
                second = error
        found.path = parts.publish()[".mp4"]
    if second is not None:
        raise GenerationError(
            f"stream_to writes one video, and the pipeline made another in its block: the first is {found.path}; open "
            "a block for each."
        ) from second


def _output(sample: torch.Tensor) -> Any:
    from diffusers.models.autoencoders.vae import DecoderOutput

    return DecoderOutput(sample=sample)


def _decode(vae: Any, stock: _Decode, latents: torch.Tensor, sink: Sink) -> None:
    """Decode by the VAE's own `stock` method, which offloading may have wrapped."""
    from diffusers.video_processor import VideoProcessor

    if latents.shape[0] != 1:
        raise ValueError(f"One video is decoded at a time (got {latents.shape[0]}); use num_videos_per_prompt=1.")
    processor, seen = VideoProcessor(), 0

    def emit(part: torch.Tensor) -> None:
        nonlocal seen
        seen += part.shape[2]
        if part.shape[2]:
            sink(processor.postprocess_video(part, output_type="pt")[0])

    with torch.no_grad():
        _DECODERS[type(vae).__name__](vae, stock, latents, emit)
    expected = (latents.shape[2] - 1) * vae.config.get("scale_factor_temporal", _ratio(vae)) + 1
    if seen != expected:
        raise RuntimeError(
            f"{type(vae).__name__} decoded {seen} frames of {latents.shape[2]} latent ones, and {expected} were "
            "expected: this version of Diffusers decodes otherwise. Decode the whole video instead."
        )


def _ratio(vae: Any) -> int:
    return int(getattr(vae, "temporal_compression_ratio", 4))


def _decode_wan(vae: Any, stock: _Decode, latents: torch.Tensor, emit: _Part) -> None:
    """The stock decode calls the decoder for each latent frame: take what it returns, and leave it nothing to join."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    patch = vae.config.patch_size

    def take(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        frames = output if patch is None else unpatchify(output, patch_size=patch)
        emit(frames.clamp(min=-1.0, max=1.0))
        return output[:, :, :0].clone()  # a view would keep the frames

    handle = vae.decoder.register_forward_hook(take)
    try:
        stock(latents, return_dict=False)
    finally:
        handle.remove()


def _decode_hunyuan_video(vae: Any, stock: _Decode, latents: torch.Tensor, emit: _Part) -> None:
    """The stock decode blends tiles that overlap in time, and joins them at the end: they go on as they are blended."""
    length = vae.tile_sample_min_num_frames // vae.temporal_compression_ratio
    if not vae.use_framewise_decoding or latents.shape[2] <= length:
        emit(stock(latents, return_dict=False)[0])
        return
    stride = vae.tile_sample_stride_num_frames
    overlap = vae.tile_sample_min_num_frames - stride
    left = (latents.shape[2] - 1) * vae.temporal_compression_ratio + 1
    before: torch.Tensor | None = None
    vae.use_framewise_decoding = False  # a tile is decoded as a video that is short enough
    try:
        for start in range(0, latents.shape[2], stride // vae.temporal_compression_ratio):
            tile = stock(latents[:, :, start : start + length + 1], return_dict=False)[0]
            if before is None:
                shown = tile[:, :, : stride + 1]
            else:
                tile = vae.blend_t(before, tile[:, :, 1:], overlap)
                shown = tile[:, :, :stride]
            emit(shown[:, :, :left])
            left -= min(left, shown.shape[2])
            before = tile
    finally:
        vae.use_framewise_decoding = True


def _decode_mochi(vae: Any, stock: _Decode, latents: torch.Tensor, emit: _Part) -> None:
    """The decoder only looks back: a few latent frames at a time, with the past that each convolution looks back to."""
    drops = vae.drop_last_temporal_frames
    step = vae.num_latent_frames_batch_size
    with _remembering(vae.decoder) as begin:
        try:
            for start in range(0, latents.shape[2], step):
                begin()
                vae.drop_last_temporal_frames = drops and start == 0
                emit(stock(latents[:, :, start : start + step], return_dict=False)[0])
        finally:
            vae.drop_last_temporal_frames = drops


@contextmanager
def _remembering(decoder: torch.nn.Module) -> Iterator[Callable[[], None]]:
    """Give the causal convolutions of a decoder the frames before; call what is yielded before each part of the video.

    They repeat the first frame into the past. A convolution that gets its past as further frames in front, and whose
    first outputs are dropped, makes what it makes of the whole video. A tiled decode calls every convolution once for
    each tile, always in the same order: so the number of a call within its part tells the tile.
    """
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXCausalConv3d

    past: dict[tuple[torch.nn.Module, int], torch.Tensor] = {}
    calls: Counter[torch.nn.Module] = Counter()
    extra: dict[torch.nn.Module, int] = {}

    def before(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        key = module, calls[module]
        calls[module] += 1
        found = past.get(key)
        x = args[0] if found is None else torch.cat((found, args[0]), 2)
        extra[module] = 0 if found is None else found.shape[2]
        past[key] = x[:, :, -(module.time_kernel_size - 1) :].clone()
        return x, *args[1:]

    def after(module: Any, args: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
        return output[0][:, :, extra[module] :], output[1]

    convolutions = [m for m in decoder.modules() if isinstance(m, CogVideoXCausalConv3d) and m.time_kernel_size > 1]
    handles = [m.register_forward_pre_hook(before) for m in convolutions]
    handles += [m.register_forward_hook(after) for m in convolutions]
    try:
        yield calls.clear
    finally:
        for handle in handles:
            handle.remove()


_DECODERS: dict[str, Callable[[Any, _Decode, torch.Tensor, _Part], None]] = {
    "AutoencoderKLWan": _decode_wan,
    "AutoencoderKLHunyuanVideo": _decode_hunyuan_video,
    "AutoencoderKLMochi": _decode_mochi,
}
