"""Checkpoints of a LoRA run: folders that appear whole or not at all, the newest few kept.

A checkpoint is a LoRA that can be used as it is, and beside it the optimizer's state, the moving average and the step.
What is drawn follows from the step (see `batches.py`), so nothing else is needed to go on exactly.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from videosparse.files import write_tensors
from videosparse.generation.errors import one_line
from videosparse.training.adapters import copy_into, whole
from videosparse.training.config import ConfigError

FOLDER = "checkpoints"
WEIGHTS, OPTIMIZER, EMA, STATE = "trained.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json"
_NAME = re.compile(r"step-(\d{6,})$")


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [p for p in (folder / FOLDER).glob("step-*") if _NAME.search(p.name) and (p / STATE).is_file()]
    return sorted(found, key=lambda p: int(_NAME.search(p.name)[1]))  # type: ignore[index]


def write_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int,
    more: Any = None,
) -> Path:
    """Write a checkpoint and delete the oldest beyond `keep`.

    Args:
        folder: of the run.
        step: optimizer steps done.
        tensors: by file name.
        state: JSON values.
        keep: checkpoints that stay.
        more: called with the folder while it is not visible yet, to write more files.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    target = folder / FOLDER / f"step-{step:06d}"
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        for name, values in tensors.items():
            if values:
                write_tensors({key: value.contiguous() for key, value in values.items()}, part / name)
        if more is not None:
            more(part)
        (part / STATE).write_text(json.dumps({"step": step, **state}, indent=2) + "\n")
        shutil.rmtree(target, ignore_errors=True)  # of a run that went past this step before
        os.replace(part, target)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError):
            error.filename = str(target)  # the part is gone
        raise
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def read_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(tensors by file name, state) of a checkpoint.

    Raises:
        ConfigError: it is damaged or incomplete.
    """
    try:
        state = json.loads((path / STATE).read_text())
        names = [name for name in (WEIGHTS, OPTIMIZER, EMA) if (path / name).is_file()]
        tensors = {name: load_file(path / name) for name in names}
        _check_complete(tensors, state)
    except Exception as error:  # of JSON, safetensors or the system
        raise ConfigError(
            f"The checkpoint {path} is damaged ({one_line(error)}); delete it to go on from the one before."
        ) from error
    return tensors, state


def _check_complete(tensors: Mapping[str, Mapping[str, Tensor]], state: Any) -> None:
    """Raise ValueError where a run could not go on exactly as before."""
    for name, kind in (("step", int), ("config", dict)):
        if not isinstance(state, dict) or not isinstance(state.get(name), kind):
            raise ValueError(f"{STATE} has no {name}")
    averaged = state["config"].get("train", {}).get("ema", 0)
    # an optimizer has no state before its first step
    needed = [WEIGHTS, *([OPTIMIZER] if state["step"] else []), *([EMA] if averaged else [])]
    for name in needed:
        if name not in tensors:
            raise ValueError(f"{name} is missing")
    weights = tensors[WEIGHTS]
    if averaged and set(tensors[EMA]) != set(weights):
        raise ValueError(f"{EMA} is not of the parameters in {WEIGHTS}")
    for entry, value in tensors.get(OPTIMIZER, {}).items():
        name, _, key = entry.rpartition(":")
        if name not in weights or (key.startswith("exp_avg") and value.shape != weights[name].shape):
            raise ValueError(f"{OPTIMIZER} has {entry}, which is not of a parameter in {WEIGHTS}")


def optimizer_tensors(optimizer: Any, names: Mapping[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's state as tensors "parameter:key" (all processes must call where it is sharded)."""
    found = {}
    for name, parameter in names.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name}:{key}"] = whole(value) if isinstance(value, Tensor) else torch.tensor(value)
    return found


def load_optimizer(optimizer: Any, names: Mapping[str, torch.nn.Parameter], stored: Mapping[str, Tensor]) -> None:
    """Bring back what `optimizer_tensors` gave."""
    for entry, value in stored.items():
        name, key = entry.rsplit(":", 1)
        parameter = names[name]
        if value.shape == parameter.shape:
            own = torch.zeros_like(parameter, dtype=value.dtype)
            copy_into(own, value, entry)
            value = own.detach()
        elif value.dim():
            value = value.to(parameter.device)
        # AdamW counts its steps in a float on the CPU, bitsandbytes in a plain int
        plain = key == "step" and not value.is_floating_point()
        optimizer.state[parameter][key] = int(value) if plain else value
