"""The methods that a request can name, their options as the user writes them, and what they mean for a model."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Iterable, Mapping

import torch

from videosparse.blocks import BlockIndex, BlockMap
from videosparse.generation.errors import GenerationError, nearest, one_line
from videosparse.generation.sources import ModelSource
from videosparse.kernels.backend import missing
from videosparse.layout import TokenLayout, VideoGrid
from videosparse.policies.radial import RadialPolicy
from videosparse.processors import DenseProcessor, Processor, RadialProcessor, Resolved

Options = Mapping[str, object]

METHODS: dict[str, type[Processor]] = {"radial": RadialProcessor, "dense": DenseProcessor}

# A pipeline's own clock knows the number of steps; the processor's argument is for bare transformers.
_NOT_SETTABLE = {"num_steps"}

_WORDS = {"true": True, "false": False, "none": None}


def check_method(name: str) -> None:
    """Raise GenerationError unless `name` is a method."""
    if name not in METHODS:
        raise GenerationError(f"Unknown method {name!r}; use {' or '.join(METHODS)}.{nearest(name, METHODS)}")


def option_names(method: str) -> tuple[str, ...]:
    """The options of a method, in the order of its processor's arguments."""
    check_method(method)
    return tuple(name for name in inspect.signature(METHODS[method]).parameters if name not in _NOT_SETTABLE)


def parse_overrides(assignments: Iterable[str]) -> dict[str, dict[str, object]]:
    """Options by method from texts such as "radial.decay=0.5"; later ones win.

    Values are read as Python literals (`1`, `0.5`, `(64, 64)`), true, false, none, or else as a word.

    Raises:
        GenerationError: no "method.option=value", an unknown method, or an unknown option (with the nearest name).
    """
    parsed: dict[str, dict[str, object]] = {}
    for text in assignments:
        name, equals, value = (part.strip() for part in text.partition("="))
        method, dot, option = name.partition(".")
        if not (equals and dot and option and value):
            raise GenerationError(f"--set expects method.option=value, such as radial.decay=0.5 (got {text!r}).")
        _check_option(method, option)
        parsed.setdefault(method, {})[option] = _value(value)
    return parsed


def make_processor(method: str, options: Options | None = None) -> Processor:
    """The attention processor of a method.

    Raises:
        GenerationError: an unknown method or option, or a value that the method refuses.
    """
    check_method(method)
    options = options or {}
    for option in options:
        _check_option(method, option)
    try:
        return METHODS[method](**options)
    except (TypeError, ValueError) as error:
        raise GenerationError(f"Bad option of method {method}: {one_line(error)}") from error


def resolve_method(source: ModelSource, grid: VideoGrid, method: str, options: Options | None) -> Resolved:
    """What a method chooses for a model and grid, without weights.

    Raises:
        GenerationError: an unknown method or option, a bad value, or more dense layers than the model has.
    """
    processor = make_processor(method, options)
    try:
        resolved = processor.resolve(source.spec, grid=grid)
        resolved.schedule.check_layers(source.spec.layers)
    except (TypeError, ValueError) as error:
        raise GenerationError(one_line(error)) from error
    return resolved


def check_method_fits(
    source: ModelSource, grid: VideoGrid, method: str, options: Options | None, device: torch.device
) -> None:
    """Raise GenerationError where a method cannot run on a model, grid and device."""
    resolved = resolve_method(source, grid, method, options)
    if isinstance(resolved.policy, RadialPolicy):
        static_map(resolved.policy, TokenLayout(grid, source.spec.text))
    if resolved.options.backend == "triton" and (reason := missing(device, torch.float32)):
        raise GenerationError(f"backend=triton cannot run on {device}: {reason}; use backend=auto.")


def resolved_options(resolved: Resolved) -> dict[str, object]:
    """The options in force by name; empty for dense."""
    if resolved.policy is None:
        return {}
    policy = {field.name: getattr(resolved.policy, field.name) for field in dataclasses.fields(resolved.policy)}  # type: ignore[arg-type]
    return {**policy, **dataclasses.asdict(resolved.schedule), "backend": resolved.options.backend}


def static_map(policy: RadialPolicy, layout: TokenLayout) -> tuple[BlockMap, BlockIndex]:
    """The map of a layout and its lists, on the CPU.

    Raises:
        GenerationError: the policy refuses this layout.
    """
    try:
        return policy.block_map(layout), policy.block_index(layout)
    except ValueError as error:
        raise GenerationError(one_line(error)) from error


def check_options_used(options: Mapping[str, Options], method: str) -> None:
    """Raise GenerationError when options are set for a method that does not run."""
    for other in options:
        check_method(other)
        if other != method:
            raise GenerationError(
                f"An option of method {other} was set, but this run uses {method}; drop it, or use --method {other}."
            )


def _check_option(method: str, option: str) -> None:
    known = option_names(method)
    if not known:
        raise GenerationError(f"Method {method} has no options (got {option!r}).")
    if option not in known:
        raise GenerationError(
            f"Method {method} has no option {option!r}; it has {', '.join(known)}.{nearest(option, known)}"
        )


def _value(text: str) -> object:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
