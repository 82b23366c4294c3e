"""The adapters: put on a transformer, given as plain tensors, written as a file that plain Diffusers loads.

The file is what `pipe.load_lora_weights` reads, with peft's own configuration in its header, so that alpha and the
target modules come back, and beside it an entry `videosparse` that says what the LoRA is for.
"""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from videosparse.files import naming, write_tensors
from videosparse.files import whole as whole_file
from videosparse.generation.errors import one_line
from videosparse.generation.lora import ABOUT_KEY, NORMS_FILE, WEIGHTS_FILE
from videosparse.training.config import ConfigError, LoraConfig
from videosparse.training.families import TrainingFamily

ADAPTER = "default"
FORMATS = ("diffusers", "comfy")


def add_adapters(transformer: Any, family: TrainingFamily, config: LoraConfig, seed: int) -> None:
    """Freeze a transformer and add adapters to its self-attentions, in fp32.

    Raises:
        ConfigError: the regular expression is none, or matches no layer.
    """
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig as PeftConfig

    target = config.target or family.target
    try:
        found = [name for name, _ in transformer.named_modules() if re.fullmatch(target, name)]
    except re.error as error:
        raise ConfigError(f"lora.target is no regular expression ({error}): {target!r}.") from error
    if not found:
        raise ConfigError(f"lora.target matches no module of {type(transformer).__name__}: {target!r}.")
    transformer.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the same start on every process
        transformer.add_adapter(
            PeftConfig(r=config.rank, lora_alpha=config.alpha, target_modules=target, init_lora_weights=True),
            adapter_name=ADAPTER,
        )
    if config.norms:
        for name, module in transformer.named_modules():
            if re.fullmatch(family.norms, name) and getattr(module, "weight", None) is not None:
                module.requires_grad_(True)
    cast_training_params(transformer, torch.float32)


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def save_lora(
    folder: Path, pipeline_class: str, transformer: Any, weights: Mapping[str, Tensor], about: Mapping[str, Any]
) -> Path:
    """Write adapters as plain Diffusers reads them, and trained norms in a file of their own, which others lose.

    Args:
        folder: made if missing; files appear whole or not at all.
        pipeline_class: Diffusers' class whose format is written.
        transformer: that has the adapters.
        weights: by name of its parameters, as `trained` gives them.
        about: what the LoRA is for, as JSON values.

    Raises:
        OSError: it cannot be written.
    """
    import diffusers

    config = transformer.peft_config[ADAPTER].to_dict()
    layers = {
        n.replace(f".{ADAPTER}.", "."): w.detach().cpu().contiguous() for n, w in weights.items() if ".lora_" in n
    }
    folder.mkdir(parents=True, exist_ok=True)
    with naming(folder / WEIGHTS_FILE), tempfile.TemporaryDirectory(prefix=".", dir=folder) as place:
        try:
            getattr(diffusers, pipeline_class).save_lora_weights(
                place, transformer_lora_layers=layers, transformer_lora_adapter_metadata=config
            )
        except SafetensorError as error:  # what it makes of a full disk
            raise OSError(errno.EIO, one_line(error), str(folder / WEIGHTS_FILE)) from error
        written = Path(place) / WEIGHTS_FILE
        header = {**_header(written), ABOUT_KEY: json.dumps(dict(about))}
        part = Path(place) / "with-metadata.safetensors"
        write_tensors(load_file(written), part, metadata=header)
        norms = {name: w.detach().cpu().contiguous() for name, w in weights.items() if ".lora_" not in name}
        if norms:
            write_tensors(norms, Path(place) / NORMS_FILE)
            os.replace(Path(place) / NORMS_FILE, folder / NORMS_FILE)
        else:
            (folder / NORMS_FILE).unlink(missing_ok=True)  # of another training
        os.replace(part, folder / WEIGHTS_FILE)
    return folder / WEIGHTS_FILE


def load_adapters(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy tensors, by name of parameters, into what is trained.

    Raises:
        ConfigError: names or shapes differ.
    """
    mine = trained(module)
    for name in sorted(set(mine) ^ set(weights)):
        raise ConfigError(f"The checkpoint does not fit: {name} is in only one of model and checkpoint.")
    with torch.no_grad():
        for name, parameter in mine.items():
            copy_into(parameter, weights[name], name)


def whole(tensor: Tensor) -> Tensor:
    """A tensor on the CPU, gathered where it is sharded (all processes must call)."""
    full = getattr(tensor, "full_tensor", None)
    return (tensor if full is None else full()).detach().cpu().clone()


def copy_into(tensor: Tensor, value: Tensor, name: str = "tensor") -> None:
    """Copy a whole tensor into one that may be sharded."""
    if tensor.shape != value.shape:
        raise ConfigError(f"The checkpoint does not fit: {name} is {list(value.shape)}, expected {list(tensor.shape)}.")
    placements = getattr(tensor, "placements", None)
    if placements is None:
        tensor.detach().copy_(value)
        return
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(tensor, DTensor)
    mesh = tensor.device_mesh
    tensor.detach().copy_(distribute_tensor(value.to(mesh.device_type, tensor.dtype), mesh, placements))


def comfy_names(about: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """What the original layout of Wan calls weights of adapters.

    Args:
        about: of the LoRA, as `save_lora` is given it.
        names: of the weights, as `trained` gives them or as they are in the file, without "transformer.".

    Raises:
        ConfigError: as by `to_comfy`.
    """
    if about.get("family") != "wan":
        raise ConfigError(
            f"--format comfy is for Wan only (this LoRA is for {about.get('family', 'an unknown model')}); ComfyUI "
            "reads the Diffusers layout of the others."
        )
    if about.get("norms"):
        raise ConfigError("--format comfy cannot hold trained norms; train with lora.norms = false.")
    places = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
    weight = re.compile(rf"(blocks\.\d+)\.attn1\.(to_[qkv]|to_out\.0)\.lora_([AB])(?:\.{ADAPTER})?\.weight")
    found = []
    for name in names:
        match = weight.fullmatch(name)
        if match is None:
            raise ConfigError(f"--format comfy knows self-attentions of Wan only (got {name}); drop it.")
        kind = "down" if match[3] == "A" else "up"
        found.append(f"diffusion_model.{match[1]}.self_attn.{places[match[2]]}.lora_{kind}.weight")
    return found


def to_comfy(file: Path, output: Path) -> None:
    """Rewrite a Wan LoRA in the key layout of the original model, which ComfyUI reads (and Diffusers, too).

    Raises:
        ConfigError: another family, for whose original layout there is no reader that tells right from wrong, or
            trained norms, which that layout has no place for.
    """
    header, weights = _header(file), load_file(file)
    named = comfy_names(
        json.loads(header.get(ABOUT_KEY, "{}")), [name.removeprefix("transformer.") for name in weights]
    )
    peft = json.loads(header["lora_adapter_metadata"])
    alpha = float(peft["transformer.lora_alpha"])
    tensors: dict[str, Tensor] = {}
    for name, value in zip(named, weights.values(), strict=True):
        tensors[name] = value
        tensors[f"{name.rpartition('.lora_')[0]}.alpha"] = torch.tensor(alpha)
    with whole_file(output) as part:
        write_tensors(tensors, part, metadata={"format": "pt", ABOUT_KEY: header[ABOUT_KEY]})


def _header(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})
