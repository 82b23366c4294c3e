"""The time of every block of a transformer within one forward, from stamps before and after each call."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch


class BlockClock:
    """While it is entered, notes when each block begins and ends: by events on the GPU, which wait for nothing.

    The stamps stand around the call of a block, compiled or not, outside of its graph.

    Args:
        blocks: of a transformer.
        device: that they run on.
    """

    def __init__(self, blocks: Sequence[torch.nn.Module], device: torch.device) -> None:
        self.blocks, self.on_gpu = blocks, device.type == "cuda"
        self._before: list[Any] = []
        self._stamps: list[list[tuple[Any, Any]]] = [[] for _ in blocks]

    def __enter__(self) -> BlockClock:
        self._before = [block._compiled_call_impl for block in self.blocks]
        self._stamps = [[] for _ in self.blocks]
        for block, stamps, compiled in zip(self.blocks, self._stamps, self._before, strict=True):
            block._compiled_call_impl = self._stamped(compiled or block._call_impl, stamps)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for block, compiled in zip(self.blocks, self._before, strict=True):
            block._compiled_call_impl = compiled

    def _stamped(self, call: Callable[..., Any], stamps: list[tuple[Any, Any]]) -> Callable[..., Any]:
        def stamped(*args: Any, **kwargs: Any) -> Any:
            first = self._stamp()
            out = call(*args, **kwargs)
            stamps.append((first, self._stamp()))
            return out

        return stamped

    def _stamp(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call, unused-ignore]
        event.record()
        return event

    def seconds(self) -> list[float]:
        """Of each block, in all its calls since this was entered; read it once the device is done."""
        return [sum(self._between(*pair) for pair in stamps) for stamps in self._stamps]

    def _between(self, first: Any, last: Any) -> float:
        return float(first.elapsed_time(last)) / 1e3 if self.on_gpu else last - first
