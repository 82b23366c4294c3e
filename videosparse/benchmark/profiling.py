"""Where the time of a forward goes: the trace of torch.profiler, kernel by kernel."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from videosparse.benchmark.kernel_names import Work

_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


def trace(call: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """The trace of one call, as torch.profiler exports it for Chrome."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        found: dict[str, Any] = json.loads(path.read_text())
    return found


def works(found: dict[str, Any]) -> list[Work]:
    """The kernels of a trace; where there are none, its operations on the CPU, each without those that it calls."""
    events = [event for event in found["traceEvents"] if event.get("ph") == "X"]
    operations = _nest([event for event in events if event.get("cat") == "cpu_op"])
    kernels = [event for event in events if event.get("cat") in _ON_DEVICE]
    if not kernels:
        return [Work(o.name, o.own / 1e6, o.around, o.shapes) for o in operations]
    by_id = {operation.number: operation for operation in operations if operation.number is not None}
    return [_of_kernel(kernel, by_id.get(kernel["args"].get("External id"))) for kernel in kernels]


@dataclass
class _Operation:
    """An operation on the CPU: microseconds with and without what it calls, and the names of those around it."""

    name: str
    number: int | None
    start: float
    end: float
    own: float
    around: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


def _nest(events: list[dict[str, Any]]) -> list[_Operation]:
    """Operations of every thread, with those around them."""
    found: list[_Operation] = []
    threads: dict[Any, list[_Operation]] = {}
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        stack = threads.setdefault(event["tid"], [])
        start, end = float(event["ts"]), float(event["ts"]) + float(event["dur"])
        while stack and stack[-1].end <= start:
            stack.pop()
        around = tuple(operation.name for operation in reversed(stack))
        if stack:
            stack[-1].own -= end - start
        args = event.get("args", {})
        shapes = _shapes(args.get("Input Dims", ())) or (stack[-1].shapes if stack else ())
        operation = _Operation(
            event["name"], args.get("External id"), start, end, end - start, (event["name"], *around), shapes
        )
        stack.append(operation)
        found.append(operation)
    return found


def _shapes(given: Any) -> tuple[tuple[int, ...], ...]:
    """Of inputs that are tensors; lists of tensors are left out."""
    return tuple(tuple(s) for s in given if isinstance(s, list) and s and all(isinstance(n, int) for n in s))


def _of_kernel(kernel: dict[str, Any], operation: _Operation | None) -> Work:
    seconds = float(kernel["dur"]) / 1e6
    if operation is None:
        return Work(kernel["name"], seconds)
    return Work(kernel["name"], seconds, operation.around, operation.shapes)


def sums(found: list[Work], part: Callable[[Work], str]) -> Iterator[tuple[str, float, int, str]]:
    """(part, seconds, kernels, names of the longest) of each part, the longest part first."""
    parts: dict[str, list[Work]] = {}
    for work in found:
        parts.setdefault(part(work), []).append(work)
    for name, members in sorted(parts.items(), key=lambda item: -sum(w.seconds for w in item[1])):
        yield name, sum(w.seconds for w in members), len(members), longest(members)


def longest(members: list[Work], most: int = 4) -> str:
    """Names of the kernels that take most, with milliseconds and counts."""
    times: dict[str, list[float]] = {}
    for work in members:
        times.setdefault(work.name, []).append(work.seconds)
    ranked = sorted(times.items(), key=lambda item: -sum(item[1]))[:most]
    return "; ".join(f"{name[:90]} {1e3 * sum(each):.2f} ms x{len(each)}" for name, each in ranked)
