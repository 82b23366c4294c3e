"""Latents as files: what the VAE was given, to be decoded again without the transformer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from videosparse.generation.environment import choose_device
from videosparse.generation.errors import GenerationError, memory_errors, one_line
from videosparse.generation.filing import carried_record, latents_metadata
from videosparse.generation.output import Destination
from videosparse.generation.request import RATES, within
from videosparse.generation.sources import ModelSource, find_model
from videosparse.generation.streaming import decode_stream, replaced_decode, unstreamable
from videosparse.generation.video import Mp4Writer, write_mp4


@dataclass(frozen=True, eq=False)
class Latents:
    """One video before decoding.

    Args:
        tensor: [1, C, F, h, w] as `vae.decode` takes it, in its dtype.
        about: the record of the run.
    """

    tensor: torch.Tensor
    about: Mapping[str, Any]


@contextmanager
def keeping(vae: Any, kept: list[torch.Tensor]) -> Iterator[None]:
    """Keep a copy on the CPU of what a VAE is given to decode."""
    before = vae.decode

    def decode(z: torch.Tensor, return_dict: bool = True) -> Any:
        kept.append(z.detach().to("cpu", copy=True))
        return before(z, return_dict=return_dict)

    with replaced_decode(vae, decode):
        yield


def save_latents(path: Path, tensor: torch.Tensor, about: Mapping[str, Any]) -> None:
    """Write latents as safetensors, with the record of their run.

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors.torch import save

    path.write_bytes(save({"latents": tensor.contiguous()}, latents_metadata(about)))


def load_latents(path: str | Path) -> Latents:
    """Read what `save_latents` wrote.

    Raises:
        GenerationError: no such file, or another one.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise GenerationError(f"There are no latents at {path}; videosparse generate --save-latents makes such a file.")
    try:
        with safe_open(str(path), framework="pt") as file:
            about = carried_record(file.metadata())
            tensor = file.get_tensor("latents")
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        reason = "none of ours" if isinstance(error, KeyError) else one_line(error, 100)
        raise GenerationError(
            f"{path} holds no latents of videosparse ({reason}); use a file that generate --save-latents wrote."
        ) from error
    # what decoding reads
    whole = about is not None and "location" in about.get("model", ()) and "fps" in about.get("video", ())
    if about is None or not whole or tensor.dim() != 5 or tensor.shape[0] != 1 or not tensor.isfinite().all():
        raise GenerationError(f"{path} is of another version, or damaged; make it again with --save-latents.")
    return Latents(tensor, about)


def decode_latents(
    latents: Latents, place: Destination, *, model: str | None = None, device: str = "auto", fps: float | None = None
) -> dict[str, Path]:
    """Decode latents to a video file; loads the VAE alone.

    Args:
        latents: see `load_latents`.
        place: for ".mp4".
        model: where the VAE is; None is where the latents came from.
        device: as in `GenerationRequest`.
        fps: None is that of the run.

    Raises:
        GenerationError: no such model, another VAE, too little memory, a file that cannot be written.
    """
    source = find_model(model or latents.about["model"]["location"])
    vae = load_vae(source, latents.tensor.dtype).to(choose_device(device))
    channels = int(vae.config.get("z_dim", vae.config.get("latent_channels", 0)))
    if channels != latents.tensor.shape[1]:
        raise GenerationError(
            f"These latents have {latents.tensor.shape[1]} channels, and the VAE of {source.name} takes {channels}; "
            f"use the model that made them, {latents.about['model']['location']}."
        )
    rate = float(within("fps", fps, latents.about["video"]["fps"], RATES))
    place = replace(place, fingerprint=latents.about.get("fingerprint"))  # beside the files of their run
    with place.parts() as parts, memory_errors():
        path, z = parts.path(".mp4"), latents.tensor.to(vae.device)
        if unstreamable(vae) is None:
            with Mp4Writer(path, rate) as video:
                decode_stream(vae, z, video.add)
        else:
            with torch.no_grad():
                frames = vae.decode(z, return_dict=False)[0][0]
            write_mp4(path, (frames.float() / 2 + 0.5).permute(1, 0, 2, 3), rate)
        return parts.publish()


def load_vae(source: ModelSource, dtype: torch.dtype) -> Any:
    """The VAE of a model, as `load_pipeline` prepares it.

    Raises:
        GenerationError: weights are missing or damaged.
    """
    import diffusers

    assert source.location is not None  # find_model always knows it
    kind = getattr(diffusers, source.pipelines.vae)
    try:
        vae = kind.from_pretrained(source.location, subfolder="vae", dtype=dtype)
    except Exception as error:  # several libraries read these files, and each raises its own
        raise GenerationError(
            f"Cannot load the VAE of {source.location} ({type(error).__name__}: {one_line(error)}); check its files."
        ) from error
    prepare_vae(vae, source)
    return vae.eval()


def prepare_vae(vae: Any, source: ModelSource) -> None:
    """Make a VAE work in the memory that there usually is."""
    if source.pipelines.vae_tiles:
        vae.enable_tiling()
