"""The methods that a request can name, their options as the user writes them, and what they mean for a model."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch

from videosparse.blocks import BlockMap
from videosparse.generation.errors import LONGEST, GenerationError, memory_errors, nearest, one_line
from videosparse.generation.sources import ModelSource
from videosparse.kernels import int8_path
from videosparse.kernels.backend import unavailable
from videosparse.layout import TokenLayout, VideoGrid
from videosparse.logits import FarLogits
from videosparse.policies.base import SparsityPolicy
from videosparse.processors import (
    AdaSpaProcessor,
    DenseProcessor,
    PAROProcessor,
    Processor,
    RadialProcessor,
    Resolved,
)

Options = Mapping[str, object]

METHODS: dict[str, type[Processor]] = {
    "radial": RadialProcessor,
    "adaspa": AdaSpaProcessor,
    "paro": PAROProcessor,
    "dense": DenseProcessor,
}

# A pipeline's own clock knows the number of steps; the processor's argument is for bare transformers. How queries and
# keys are normed changes no more than rounding. A logit belongs to the length of a video, not to the method.
_NOT_SETTABLE = {"num_steps", "fused_norm", "logit"}

_SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_WHOLE = re.compile(r"[+-]?[0-9]{1,9}")
_SIZES = re.compile(r"([0-9]{1,9})(?:\s*[x×,]\s*([0-9]{1,9}))?")


@contextmanager
def refusals(before: str = "") -> Iterator[None]:
    """Make what the library refuses an error of the request; only around calls that check what the user gave."""
    try:
        yield
    except GenerationError:
        raise
    except (TypeError, ValueError, NotImplementedError) as error:
        raise GenerationError(before + one_line(error, LONGEST)) from error


def check_method(name: str) -> None:
    """Raise GenerationError unless `name` is a method."""
    if name not in METHODS:
        *others, last = METHODS
        raise GenerationError(f"Unknown method {name!r}; use {', '.join(others)} or {last}.{nearest(name, METHODS)}")


def option_names(method: str) -> tuple[str, ...]:
    """The options of a method, in the order of its processor's arguments."""
    check_method(method)
    return tuple(name for name in inspect.signature(METHODS[method]).parameters if name not in _NOT_SETTABLE)


def parse_overrides(assignments: Iterable[str]) -> dict[str, dict[str, object]]:
    """Options by method from texts such as "radial.decay=0.5"; later ones win.

    A value is read as the type that the processor declares: yes, no, on, off, true or false; 64, 64x128 or "64, 128";
    numbers; several numbers, such as 0.4,0.7, or "never" for none of them; words. "none" is the model's default.

    Raises:
        GenerationError: no "method.option=value", an unknown method, an unknown option (with the nearest name), or a
            value of another type.
    """
    parsed: dict[str, dict[str, object]] = {}
    for text in assignments:
        name, equals, value = (part.strip() for part in text.partition("="))
        method, dot, option = name.partition(".")
        if not (equals and dot and option and value):
            raise GenerationError(f"--set expects method.option=value, such as radial.decay=0.5 (got {text!r}).")
        _check_option(method, option)
        parsed.setdefault(method, {})[option] = _value(method, option, value)
    return parsed


def make_processor(method: str, options: Options | None = None, logit: FarLogits | None = None) -> Processor:
    """The attention processor of a method, with the logit of a long video.

    Raises:
        GenerationError: an unknown method or option, or a value that the method refuses.
    """
    check_method(method)
    options = options or {}
    for option in options:
        _check_option(method, option)
    with refusals(f"Bad option of method {method}: "):
        return METHODS[method](**options, **({} if logit is None else {"logit": logit}))


def resolve_method(
    source: ModelSource,
    grid: VideoGrid,
    method: str,
    options: Options | None,
    steps: int | None = None,
    logit: FarLogits | None = None,
) -> Resolved:
    """What a method chooses for a model and grid, without weights.

    Raises:
        GenerationError: an unknown method or option, a bad value, more dense layers than the model has, or something
            that does not fit a run of `steps`, where given.
    """
    processor = make_processor(method, options, logit)
    with refusals():
        resolved = processor.resolve(source.described, experts=source.experts, grid=grid)
        resolved.schedule.check_layers(source.spec.layers)
        if steps is not None and resolved.policy is not None:
            resolved.policy.check_run(resolved.schedule, steps)
    return resolved


def check_method_fits(
    source: ModelSource,
    grid: VideoGrid,
    method: str,
    options: Options | None,
    device: torch.device,
    steps: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    logit: FarLogits | None = None,
) -> None:
    """Raise GenerationError where a method cannot run on a model, grid and device, in a dtype, or for so many steps."""
    resolved = resolve_method(source, grid, method, options, steps, logit)
    if resolved.policy is not None:
        layout = TokenLayout(grid, source.spec.text)
        static_map(resolved.policy, layout)
        with refusals():
            resolved.policy.state_bytes(layout, 1, source.spec.heads)
    if reason := unavailable(resolved.options.backend, device, dtype):
        raise GenerationError(f"backend={resolved.options.backend} cannot run on {device}: {reason}; use backend=auto.")
    quant = resolved.options.quant
    if quant is not None and (reason := int8_path.unavailable(quant, device, dtype, source.spec.head_dim)):
        helps = "drop it" if dtype in int8_path.DTYPES else "drop it, or see --dtype"
        raise GenerationError(f"quant={quant} cannot run on {device}: {reason}; {helps}.")


def resolved_options(resolved: Resolved) -> dict[str, object]:
    """The options in force by name; of dense none but quant."""
    quant: dict[str, object] = {} if resolved.options.quant is None else {"quant": resolved.options.quant}
    if resolved.policy is None:
        return quant
    policy = {field.name: getattr(resolved.policy, field.name) for field in dataclasses.fields(resolved.policy)}  # type: ignore[arg-type]
    return {**policy, **dataclasses.asdict(resolved.schedule), "backend": resolved.options.backend, **quant}


def static_map(policy: SparsityPolicy, layout: TokenLayout) -> BlockMap | None:
    """The map of a layout on the CPU; None for a method that chooses blocks while it runs.

    Raises:
        GenerationError: the policy refuses this layout.
    """
    with refusals(), memory_errors():
        return policy.static_map(layout)


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


def _value(method: str, option: str, text: str) -> object:
    """`text` as the type that the processor declares for `option`."""
    hint = typing.get_type_hints(METHODS[method])[option]
    kinds = typing.get_args(hint) or (hint,)
    tuples = [typing.get_args(kind) for kind in kinds if typing.get_origin(kind) is tuple]
    inside = text[1:-1].strip() if text[0] + text[-1] == "()" else text.lower()
    if text.lower() == "none" and type(None) in kinds:
        return None
    if bool in kinds:
        if text.lower() in _SWITCH:
            return _SWITCH[text.lower()]
        expected = "yes or no"
    elif any(Ellipsis in parts for parts in tuples):
        if text.lower() in ("none", "never"):
            return ()
        numbers = tuple(_int_or_float(part) for part in inside.rstrip(",").split(",")) if inside else ()
        if None not in numbers:
            return numbers
        expected = "a number or several, such as 0.6 or 0.4,0.7, or never"
    elif tuples:
        if found := _SIZES.fullmatch(inside):
            return tuple(int(size or found[1]) for size in found.groups())
        expected = "one size or two, such as 64 or 64x128"
    elif str in kinds:
        return text
    else:
        if int in kinds and _WHOLE.fullmatch(text):
            return int(text)
        if float in kinds and (number := _number(text)) is not None:
            return number
        expected = "a number, such as 0.5" if float in kinds else "a whole number, such as 2"
    raise GenerationError(f"{method}.{option} must be {expected} (got {text!r}).")


def _int_or_float(text: str) -> int | float | None:
    text = text.strip()
    return int(text) if _WHOLE.fullmatch(text) else _number(text)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
