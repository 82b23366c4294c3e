"""Accelerations beside sparse attention, and which of them go together: `Stack`, `PARTS`, `REFUSED`.

The table of `pipelines/README.md` is made from `PARTS` and `REFUSED`, requests are refused by them, and the tests run
every pair that is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from videosparse._diffusers import settle_prefetch
from videosparse.components import targets
from videosparse.generation.compiling import compile_blocks
from videosparse.generation.errors import GenerationError, nearest
from videosparse.generation.linears import check_kind, quantize_linears, unavailable
from videosparse.generation.output import check_writable
from videosparse.generation.presets import find_speed
from videosparse.generation.sources import ModelSource
from videosparse.generation.step_cache import StepCache, parse_step_cache, read_magnitudes
from videosparse.kernels import int8_path

if TYPE_CHECKING:
    from videosparse.generation.request import GenerationRequest

OFFLOADS = ("none", "model", "group")

PARTS: Mapping[str, str] = MappingProxyType(
    {
        "sparse": "a sparse `--method`",
        "int8": "`quant=int8`",
        "state": "`adaspa.offload_state`",
        "first-block": "`--step-cache first-block`",
        "magcache": "`--step-cache magcache`",
        "fp8": "`--linears fp8`",
        "compile": "`--compile`",
        "model": "`--offload model`",
        "group": "`--offload group`",
        "lora": "`--lora`",
        "far": "`--ultravico`",
        "windows": "`--context-frames`",
        "experts": "two experts (Wan2.2-A14B)",
    }
)
"""What can be combined, as a user writes it."""

_OF_KEY = {"quant": "int8", "linears": "fp8", "compile": "compile", "step_cache": "first-block"}
"""Which part each key of a speed's preset stands for."""

_ONE_CACHE = "a run has one step cache; leave one"
_ONE_PLACE = "weights can be offloaded one way; leave one"
_ONE_CALL = "a step cache compares a call with the one before, which is of another window; drop one"

REFUSED: Mapping[frozenset[str], str] = MappingProxyType(
    {
        frozenset({"first-block", "magcache"}): _ONE_CACHE,
        frozenset({"model", "group"}): _ONE_PLACE,
        frozenset({"state", "compile"}): "maps are copied between calls, which no compiled block does; drop one, or "
        "use --set adaspa.lse_dtype=bfloat16, which halves what is kept",
        frozenset({"first-block", "windows"}): _ONE_CALL,
        frozenset({"magcache", "windows"}): _ONE_CALL,
        frozenset({"int8", "far"}): "one looks at the sign of scores, which the other shifts and rounds; drop one",
        frozenset({"magcache", "experts"}): "each expert runs a part of the steps, and Diffusers counts those of each "
        "from 0; use --step-cache first-block",
    }
)
"""Pairs that do not go together: why, and what to do."""


@dataclass(frozen=True)
class Stack:
    """What a run has beside its attention.

    Args:
        step_cache: None for none.
        linears: "none" or "fp8".
        compiled: whether blocks are compiled.
        offload: "none", "model" or "group".
    """

    step_cache: StepCache | None = None
    linears: str = "none"
    compiled: bool = False
    offload: str = "none"


def resolve_stack(
    request: GenerationRequest, source: ModelSource, device: torch.device, dtype: torch.dtype
) -> tuple[GenerationRequest, Stack, tuple[str, ...]]:
    """What a request asks for and its speed preset adds, checked.

    Returns:
        The request with the options of its preset, the stack, and what the preset leaves out here, a sentence.

    Raises:
        GenerationError: something unknown, something that cannot run here, or two that do not go together.
    """
    request, left_out = sped_up(request, source, device, dtype)
    linears = "none" if request.linears is None else request.linears
    check_kind(linears)
    if linears != "none" and (reason := unavailable(device, dtype)):
        raise GenerationError(f"linears={linears} cannot run: {reason}.")
    check_offload(request.offload)
    if request.offload != "none" and device.type != "cuda":
        raise GenerationError(f"offload={request.offload!r} frees GPU memory, and this run is on {device}; drop it.")
    stack = Stack(_step_cache(request, source), linears, bool(request.compile), request.offload)
    check_together(parts_of(request, stack, source.experts))
    return request, stack, left_out


def check_offload(name: str) -> None:
    """Raise GenerationError unless `name` is a way to offload weights."""
    if name not in OFFLOADS:
        *others, last = OFFLOADS
        raise GenerationError(f"Unknown offload {name!r}; use {', '.join(others)} or {last}.{nearest(name, OFFLOADS)}")


def parts_of(request: GenerationRequest, stack: Stack, experts: int = 1) -> tuple[str, ...]:
    """Which of `PARTS` a run combines."""
    options = request.options.get(request.method, {})
    found = {
        "sparse": request.method != "dense",
        "int8": options.get("quant") is not None,
        "state": bool(options.get("offload_state")),
        "fp8": stack.linears != "none",
        "compile": stack.compiled,
        "lora": bool(request.loras),
        "far": request.ultravico is not None,
        "windows": request.context_frames is not None,
        "experts": experts > 1,
        stack.offload: True,
        "" if stack.step_cache is None else stack.step_cache.kind: True,
    }
    return tuple(part for part in PARTS if found.get(part))


def check_together(parts: tuple[str, ...]) -> None:
    """Raise GenerationError where two parts do not go together."""
    for one, other in combinations(parts, 2):
        if reason := REFUSED.get(frozenset({one, other})):
            raise GenerationError(f"{_written(one)} and {_written(other)} do not go together: {reason}.")


def _written(part: str) -> str:
    """A part as a user writes it."""
    return PARTS[part].replace("`", "")


def together() -> str:
    """What goes together, in Markdown: the parts, and the pairs that are refused."""
    reasons: dict[str, list[str]] = {}
    for pair, reason in REFUSED.items():
        reasons.setdefault(reason, []).append(" with ".join(PARTS[part] for part in PARTS if part in pair))
    rows = [f"| {'; '.join(pairs)} | {reason[0].upper()}{reason[1:]}. |" for reason, pairs in reasons.items()]
    return "\n".join(
        [f"The parts: {', '.join(PARTS.values())}.", "", "| refused | why, and what to do |", "| --- | --- |", *rows]
    )


def apply_stack(pipe: Any, stack: Stack, device: torch.device) -> None:
    """Compile, quantize and place a pipeline that was loaded into the memory of the CPU, its LoRAs included.

    Raises:
        GenerationError: see `quantize_linears`.
    """
    transformers = targets(pipe)[1]
    if stack.compiled:
        for transformer in transformers:
            compile_blocks(transformer)
    if stack.linears != "none":
        for transformer in transformers:
            # on the GPU in no time, layer by layer; who offloads groups may not have room for all of them
            quantize_linears(transformer, kind=stack.linears, device=None if stack.offload == "group" else device)
            if stack.offload == "model":
                transformer.to("cpu")
    if stack.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif stack.offload == "group":
        # VAEs have their own loops over frames and tiles, and are small
        pipe.enable_group_offload(
            device, offload_type="block_level", num_blocks_per_group=1, use_stream=device.type == "cuda",
            exclude_modules=["vae"],
        )  # fmt: skip
        for transformer in transformers:
            settle_prefetch(transformer)  # before a step cache comes
    else:
        pipe.to(device)


def _step_cache(request: GenerationRequest, source: ModelSource) -> StepCache | None:
    cache = parse_step_cache("none" if request.step_cache is None else request.step_cache)
    if cache is None or cache.kind != "magcache":
        if request.magnitudes is not None:
            raise GenerationError("--magnitudes is for --step-cache magcache; drop it, or choose that.")
        return cache
    if request.magnitudes is None:
        raise GenerationError(
            "--step-cache magcache needs the magnitudes of this model: add --magnitudes FILE. A file that is not there "
            "is measured by that run, which then skips nothing."
        )
    if not request.magnitudes.strip():
        raise GenerationError("--magnitudes must not be empty; give a file.")
    file = Path(request.magnitudes).expanduser()
    if file.is_dir():
        raise GenerationError(
            f"Cannot keep magnitudes in {file}: it is a folder; name a file, such as {file / 'm.json'}."
        )
    if file.exists():
        return replace(cache, file=file, magnitudes=read_magnitudes(file, source.spec))
    check_writable(file.parent, [file.name])  # what a whole run finds out must not be lost
    return replace(cache, file=file)


def sped_up(
    request: GenerationRequest, source: ModelSource, device: torch.device | None, dtype: torch.dtype
) -> tuple[GenerationRequest, tuple[str, ...]]:
    """A request with what its speed preset adds to it, and what that leaves out of this run, a sentence.

    Args:
        request, source, dtype: of the run.
        device: None for one that can do everything.

    Raises:
        GenerationError: another method was asked for than the preset's.
    """
    if request.speed is None:
        return request, ()
    speed = find_speed(request.speed)
    wanted = dict(speed.values)
    method = wanted.pop("method", None)
    if method is not None and method != request.method:
        raise GenerationError(
            f"--preset {speed.name} runs {method} attention (got --method {request.method}); drop one of them."
        )
    impossible = {} if device is None else _impossible(wanted, source, device, dtype)
    reasons = {**impossible, **_clashing(wanted, request, source)}
    kept = {key: value for key, value in wanted.items() if key not in reasons}
    options = request.options
    if (quant := kept.pop("quant", None)) is not None:
        options = {**options, request.method: {"quant": quant, **options.get(request.method, {})}}
    fill: dict[str, Any] = {key: value for key, value in kept.items() if getattr(request, key) is None}
    # what was asked for beside the preset is not left out, it is refused
    told = [f"{_written(_OF_KEY[key])} ({reason})" for key, reason in reasons.items() if not _given(request, key)]
    notices = (f"Preset {speed.name} leaves out here: {'; '.join(told)}.",) if told else ()
    return replace(request, options=options, **fill), notices


def _given(request: GenerationRequest, key: str) -> bool:
    if key == "quant":
        return "quant" in request.options.get(request.method, {})
    return getattr(request, key) is not None


def _clashing(wanted: Mapping[str, object], request: GenerationRequest, source: ModelSource) -> dict[str, str]:
    """Which parts of a speed preset do not go with what was asked for beside it, and why."""
    asked = parts_of(request, Stack(compiled=bool(request.compile)), source.experts)
    found: dict[str, str] = {}
    for key in wanted:
        for other in asked:
            if reason := REFUSED.get(frozenset({_OF_KEY[key], other})):
                found[key] = f"with {_written(other)}: {reason.partition('; ')[0]}"
    return found


def _impossible(
    wanted: Mapping[str, object], source: ModelSource, device: torch.device, dtype: torch.dtype
) -> dict[str, str]:
    """Which parts of a speed preset cannot run on this machine, or gain nothing, and why."""
    reasons: dict[str, str | None] = {}
    if "quant" in wanted:
        slow = None if device.type == "cuda" else f"plain torch computes it on {device}, no faster"
        reasons["quant"] = slow or int8_path.unavailable(str(wanted["quant"]), device, dtype, source.spec.head_dim)
    if "linears" in wanted and (reason := unavailable(device, dtype)):
        reasons["linears"] = reason.removesuffix(", or drop it").removesuffix("; drop it")
    if "compile" in wanted and device.type != "cuda":
        reasons["compile"] = f"it is for GPUs, and this run is on {device}"
    return {key: reason for key, reason in reasons.items() if reason}
