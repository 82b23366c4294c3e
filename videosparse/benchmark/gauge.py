"""At what clock, and with how much energy, a card runs one call over and over: what bounds it."""

from __future__ import annotations

import random
import statistics
import threading
import time
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Any

import torch

from videosparse.benchmark.contenders import Call
from videosparse.benchmark.timing import quantiles

COLUMNS = ("steady_ms", "steady_p20_ms", "steady_p80_ms", "stretches", "sm_mhz", "watts", "joules")
_EVERY = 0.01
# of each stretch, not counted: clocks follow the power of the call before for some tens of ms
_SETTLING = 0.25
# calls are enqueued for so long before the card is waited for
_AHEAD = 0.1


class Gauge:
    """Reads the clock of the current GPU and the energy it has taken, in a thread of its own, for the time of a block.

    Args:
        mhz: the clocks of the last block.
        watts: the mean power of the last block; None where the card does not count energy, or the block was too short.

    Raises:
        ModuleNotFoundError: torch reads no clock without `pip install nvidia-ml-py`.
    """

    def __init__(self) -> None:
        self.mhz: list[float] = []
        self.watts: float | None = None
        self._counter = _EnergyCounter()
        self._ticks: list[tuple[float, float]] = []
        self._read()

    def __enter__(self) -> Gauge:
        self.mhz, self._ticks = [], []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self.watts = power(self._ticks)

    def _run(self) -> None:
        while True:
            self._read()
            if self._over.wait(_EVERY):
                return

    def _read(self) -> None:
        self.mhz.append(float(torch.cuda.clock_rate()))
        joules = self._counter.joules()
        if joules is not None:
            self._ticks.append((time.perf_counter(), joules))


def power(readings: list[tuple[float, float]]) -> float | None:
    """Mean watts of readings (seconds, joules) of a counter that moves in steps, some tenths of a second apart.

    Only the readings at which it moved count, for between them nobody knows how far it is; None for less than two.
    """
    moved = [later for earlier, later in pairwise(readings) if later[1] != earlier[1]]
    if len(moved) < 2:
        return None
    return (moved[-1][1] - moved[0][1]) / (moved[-1][0] - moved[0][0])


class _EnergyCounter:
    """The energy that the current GPU has taken since its driver was loaded."""

    def __init__(self) -> None:
        import pynvml

        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties().uuid)
        self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")

    def joules(self) -> float | None:
        """None on a card, or under a hypervisor, that does not tell."""
        import pynvml

        try:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3
        except pynvml.NVMLError:
            return None


@dataclass
class _Stretches:
    """What the stretches of one call gave: mean times of a call, clocks, and means of power."""

    ms: list[float] = field(default_factory=list)
    mhz: list[float] = field(default_factory=list)
    watts: list[float] = field(default_factory=list)

    def columns(self) -> dict[str, str]:
        p20, p50, p80 = quantiles(self.ms)
        found = {
            "steady_ms": f"{p50:.4f}", "steady_p20_ms": f"{p20:.4f}", "steady_p80_ms": f"{p80:.4f}",
            "stretches": str(len(self.ms)), "sm_mhz": f"{statistics.median(self.mhz):.0f}",
        }  # fmt: skip
        if self.watts:
            watts = statistics.median(self.watts)
            found |= {"watts": f"{watts:.0f}", "joules": f"{watts * p50 / 1e3:.3f}"}
        return found


def steady_columns(calls: dict[Any, Call], seconds: float, rounds: int) -> dict[Any, dict[str, str]]:
    """Columns of calls that the card repeats in stretches, one call after the other, in another order every round.

    Within a stretch the card does nothing but the one call, so clock, power and energy are that call's; the stretches
    take turns, so what drifts while they last is everybody's. A card bound by its limit of power spends time on joules.

    Args:
        calls: what to repeat, by any key.
        seconds: of a stretch, after a time to settle.
        rounds: stretches of each call.

    Returns:
        by key: `steady_ms` and its 20th and 80th percentile over the stretches, of the mean time of a call in one; the
        median clock in MHz; power in W and the energy of a call in J, absent where stretches are too short to tell.

    Raises:
        ModuleNotFoundError: see `Gauge`.
    """
    gauge = Gauge()
    found = {key: _Stretches() for key in calls}
    orders = random.Random(0)
    for _ in range(rounds):
        for key in orders.sample(list(calls), len(calls)):
            _repeat(calls[key], _SETTLING)
            with gauge:
                ms = _repeat(calls[key], seconds)
            found[key].ms.append(ms)
            found[key].mhz.append(statistics.median(gauge.mhz))
            if gauge.watts is not None:
                found[key].watts.append(gauge.watts)
    return {key: stretches.columns() for key, stretches in found.items()}


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
