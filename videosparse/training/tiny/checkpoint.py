"""What a run starts from and leaves behind: a backup, or an exported pipeline."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import UMT5EncoderModel

from videosparse.files import whole, write_tensors
from videosparse.training.tiny.models import TinySizes

MIB = 1 << 20


def shard(tensors: dict[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """Tensors in order, in groups whose bytes stay under `limit`."""
    groups: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.nbytes
    return groups


def write_backup(folder: Path, tensors: dict[str, Tensor], meta: dict[str, Any], limit: int = 14 * MIB) -> None:
    """Tensors as `weights-*.safetensors` of at most `limit` bytes and `state.json`.

    They take the place of an earlier backup once all are written, so that a full disk leaves that one as it was.

    Raises:
        OSError: they cannot be written.
    """
    with ExitStack() as files:
        # entered first, so it is replaced last
        state = files.enter_context(whole(folder / "state.json"))
        for index, group in enumerate(shard(tensors, limit)):
            write_tensors(group, files.enter_context(whole(folder / f"weights-{index}.safetensors")))
        state.write_text(json.dumps(meta))


def read_backup(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_backup` wrote.

    Raises:
        FileNotFoundError: there is no state in the folder.
    """
    if not (folder / "state.json").exists():
        raise FileNotFoundError(f"{folder} is no backup: state.json is missing; give the --backup of another run.")
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("weights-*.safetensors")):
        tensors |= load_file(path)
    return tensors, json.loads((folder / "state.json").read_text())


def read_pipeline(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of an exported pipeline, as a backup would hold them: a finished VAE, a DiT at step 0.

    An export keeps only the average of the DiT and the text encoder, so it becomes both the weights and the average.
    The rounds that made the pipeline, and the VAE's PSNR, come from its `training.json`.

    Raises:
        FileNotFoundError: a file of an export is missing.
    """
    for name in ("model_index.json", "training.json", "tokenizer/tokenizer.json"):
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder} is not a pipeline that `export` wrote: {name} is missing.")
    vae = AutoencoderKLWan.from_pretrained(folder / "vae", local_files_only=True)
    transformer = WanTransformer3DModel.from_pretrained(folder / "transformer", local_files_only=True)
    text = UMT5EncoderModel.from_pretrained(folder / "text_encoder", local_files_only=True)
    tensors: dict[str, Tensor] = {}
    for prefix, module in (
        ("vae.", vae),
        ("raw.transformer.", transformer),
        ("raw.text.", text),
        ("ema.transformer.", transformer),
        ("ema.text.", text),
    ):
        # Copies: safetensors refuses tensors that share memory, and later steps must not change both.
        tensors |= {prefix + k: v.detach().to("cpu", torch.float32, copy=True) for k, v in module.state_dict().items()}
    sizes = TinySizes(
        vae_base=vae.config.base_dim,
        z_dim=vae.config.z_dim,
        layers=transformer.config.num_layers,
        heads=transformer.config.num_attention_heads,
        head_dim=transformer.config.attention_head_dim,
        ffn_dim=transformer.config.ffn_dim,
        text_dim=text.config.d_model,
        text_ff=text.config.d_ff,
        text_layers=text.config.num_layers,
        vocab=text.config.vocab_size,
    )
    told = json.loads((folder / "training.json").read_text())
    meta = {
        "sizes": asdict(sizes),
        "tokenizer": read_tokenizer(folder / "tokenizer" / "tokenizer.json"),
        "latents_mean": list(vae.config.latents_mean),
        "latents_std": list(vae.config.latents_std),
        "vae": {"step": 0, "elapsed": 0.0, "finished": True},
        "dit": {"step": 0, "elapsed": 0.0, "finished": False},
        "phase": "vae",
        "rounds": told["rounds"],
        "numbers": {k: told[k] for k in ("vae_psnr",) if k in told},
    }
    return tensors, meta


def read_tokenizer(path: Path) -> str:
    """A saved tokenizer as `train_tokenizer` left it, without the padding and truncation of its last use."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return str(tokenizer.to_str())
