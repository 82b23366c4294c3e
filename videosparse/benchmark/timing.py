"""Timing on a GPU: calls in turn, medians and quantiles, memory."""

from __future__ import annotations

import random
import statistics
import time
from typing import Any

import torch

from videosparse.benchmark.contenders import Call
from videosparse.benchmark.problems import Problem

FEWEST_ROUNDS = 5
SLOW_MS = 1500.0


def memory_of(call: Call, p: Problem) -> dict[str, str]:
    """Columns on the memory that a call takes beyond what it is given and what it returns."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call()
    torch.cuda.synchronize()
    tensors = [x for x in (out if isinstance(out, tuple) else [out]) if isinstance(x, torch.Tensor)]
    extra = torch.cuda.max_memory_allocated() - before - sum(x.numel() * x.element_size() for x in tensors)
    given = sum(x.numel() * x.element_size() for x in p.qkv)
    return {"extra_mb": megabytes(extra), "extra_percent": f"{100 * extra / given:.2f}"}


def megabytes(count: int) -> str:
    """Bytes as text in MB."""
    return f"{count / 1e6:.2f}"


def interleave(
    calls: dict[Any, Call], rounds: int, seconds: float, before: Call | None = None
) -> dict[Any, list[float]]:
    """Milliseconds of each call, in turn. Calls that take seconds run thrice.

    A card is slower after a call that heats it. So every round has an order of its own, and `before`, where given, runs
    ahead of each call, untimed: the same work for all, long enough that the card forgets most of the call before. It
    also keeps the card busy while the call is launched, so that only the card is timed: of a call that computes on the
    CPU as much is hidden.
    """
    times: dict[Any, list[float]] = {key: [] for key in calls}
    orders = random.Random(0)
    start = time.perf_counter()
    for number in range(-1, rounds):  # round -1 warms up
        events = {}
        for key in orders.sample(list(calls), len(calls)):
            if len(times[key]) >= 3 and min(times[key]) > SLOW_MS:
                continue
            if before is not None:
                before()
            events[key] = _event(), _event()
            events[key][0].record()
            calls[key]()
            events[key][1].record()
        torch.cuda.synchronize()
        if number >= 0:
            for key, (first, last) in events.items():
                times[key].append(first.elapsed_time(last))
        if number >= FEWEST_ROUNDS - 1 and time.perf_counter() - start > seconds:
            break
    return times


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call, unused-ignore]


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    p20, _, _, p80 = statistics.quantiles(times, n=5, method="inclusive")
    return p20, statistics.median(times), p80


def timed_columns(times: list[float], flops: float, ceiling: float) -> dict[str, str]:
    """Columns of one entry's timing; times in ms, ceiling in TFLOP/s."""
    p20, p50, p80 = quantiles(times)
    columns = {"p20_ms": f"{p20:.4f}", "p50_ms": f"{p50:.4f}", "p80_ms": f"{p80:.4f}", "rounds": str(len(times))}
    if flops:
        rate = flops / p50 / 1e9
        columns |= {"tflops": f"{rate:.1f}", "percent_of_ceiling": f"{100 * rate / ceiling:.1f}"}
    return columns | {"ceiling_tflops": f"{ceiling:.1f}"}
