"""At what clock, and with how much power, a card runs one call over and over: what bounds it."""

from __future__ import annotations

import statistics
import threading
import time
from types import TracebackType

import torch

from videosparse.benchmark.contenders import Call

COLUMNS = ("steady_ms", "sm_mhz", "watts", "joules")
_EVERY = 0.05
# drivers report the mean of up to a second
_SETTLING = 1.5
# calls are enqueued for so long before the card is waited for
_AHEAD = 0.1


class Gauge:
    """Reads clock and power of the current GPU in a thread of its own, for the time of a block.

    Raises:
        ModuleNotFoundError: torch reads neither without `pip install nvidia-ml-py`.
    """

    def __init__(self) -> None:
        self.mhz: list[float] = []
        self.watts: list[float] = []
        self._over = threading.Event()
        self._read()

    def __enter__(self) -> Gauge:
        self.mhz, self.watts = [], []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._read()
            if self._over.wait(_EVERY):
                return

    def _read(self) -> None:
        self.mhz.append(float(torch.cuda.clock_rate()))
        self.watts.append(torch.cuda.power_draw() / 1e3)


def steady_columns(call: Call, seconds: float) -> dict[str, str]:
    """Columns of a call that the card does nothing but repeat: its time, the medians of clock and power, its energy.

    Args:
        call: what to repeat.
        seconds: for how long, after a time to settle.

    Raises:
        ModuleNotFoundError: see `Gauge`.
    """
    gauge = Gauge()
    _repeat(call, _SETTLING)
    with gauge:
        ms = _repeat(call, seconds)
    watts = statistics.median(gauge.watts)
    return {
        "steady_ms": f"{ms:.4f}", "sm_mhz": f"{statistics.median(gauge.mhz):.0f}", "watts": f"{watts:.0f}",
        "joules": f"{watts * ms / 1e3:.3f}",
    }  # fmt: skip


def _repeat(call: Call, seconds: float) -> float:
    """Mean time of a call in ms when it is repeated for so long, at least once."""
    torch.cuda.synchronize()
    start = now = time.perf_counter()
    count, batch = 0, 1
    while now - start < seconds or not count:
        for _ in range(batch):
            call()
        torch.cuda.synchronize()
        count += batch
        now = time.perf_counter()
        batch = max(1, round(_AHEAD * count / (now - start)))
    return 1e3 * (now - start) / count
