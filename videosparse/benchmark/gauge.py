"""At what clock, and with how much energy, a card runs one call over and over: what bounds it."""

from __future__ import annotations

import logging
import random
import statistics
import threading
import time
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from types import TracebackType
from typing import Any

import torch

from videosparse.benchmark.contenders import Call
from videosparse.benchmark.timing import quantiles
from videosparse.wording import one_line

COLUMNS = ("steady_ms", "steady_p20_ms", "steady_p80_ms", "stretches", "sm_mhz", "watts", "joules")
_EVERY = 0.01
"""Seconds between two readings: a small part of the tenths of a second between two steps of the counter of energy."""
SETTLING = 0.25
"""Seconds at the start of each stretch that do not count: clocks follow the power of the call before for some tens of
milliseconds."""
_AHEAD = 0.1
"""Seconds of calls that are enqueued before the card is waited for."""
LEAST_SPAN = 1.0
"""Seconds between the first and the last step of the counter of energy, below which power is not told: the time of
each of the two is known to `_EVERY` seconds only."""

logger = logging.getLogger(__name__)


class Gauge:
    """Reads the clock of the current GPU and the energy it has taken, in a thread of its own, for the time of a block.

    A block ends with the error that ended the readings, if one did; the block's own error goes first, with a note.

    Attributes:
        mhz: the clocks of the last block in MHz, some 10 ms apart; before the first block a single reading.
        watts: the mean power of the last block in W; None where the card does not tell, or the block was too short
            (`power`).

    Raises:
        ModuleNotFoundError: torch reads no clock without `pip install nvidia-ml-py`.
    """

    def __init__(self) -> None:
        self.mhz: list[float] = []
        self.watts: float | None = None
        self._counter = _EnergyCounter()
        self._ticks: list[tuple[float, float]] = []
        self._failed: Exception | None = None
        self._read()

    def __enter__(self) -> Gauge:
        self.mhz, self._ticks, self._failed = [], [], None
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
        if self._failed is None:
            return
        if error is None:
            raise self._failed
        error.add_note(f"The card's clock could not be read, either: {one_line(self._failed)}")

    def _run(self) -> None:
        try:
            while True:
                self._read()
                if self._over.wait(_EVERY):
                    return
        except Exception as error:  # nobody hears a thread: the block tells it
            self._failed = error

    def _read(self) -> None:
        self.mhz.append(float(torch.cuda.clock_rate()))
        joules = self._counter.joules()
        if joules is not None:
            self._ticks.append((time.perf_counter(), joules))


def power(readings: list[tuple[float, float]]) -> float | None:
    """Mean power in W of readings (seconds, joules) of a counter that moves in steps, tenths of a second apart.

    Only the readings at which it moved count, for between them nobody knows how far it is. None where the first and
    the last of them are less than `LEAST_SPAN` seconds apart, so that an error of a reading or two is a few percent.
    """
    moved = [later for earlier, later in pairwise(readings) if later[1] != earlier[1]]
    if not moved or moved[-1][0] - moved[0][0] < LEAST_SPAN:
        return None
    return (moved[-1][1] - moved[0][1]) / (moved[-1][0] - moved[0][0])


class _EnergyCounter:
    """The energy that the current GPU has taken since its driver was loaded.

    Of a card, or under a hypervisor, that does not tell, one line of log says so, and there are no readings.

    Raises:
        ModuleNotFoundError: without `pip install nvidia-ml-py`.
    """

    def __init__(self) -> None:
        import pynvml

        self._handle: Any = None
        uuid = str(torch.cuda.get_device_properties().uuid)
        try:
            pynvml.nvmlInit()
            uuid = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        except pynvml.NVMLError as error:
            _say_absent(one_line(error))
        self.joules()

    def joules(self) -> float | None:
        """The counter in J; None from the first time on that it cannot be read."""
        import pynvml

        if self._handle is None:
            return None
        try:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3
        except pynvml.NVMLError as error:
            self._handle = None
            _say_absent(one_line(error))
            return None


@cache
def _say_absent(reason: str) -> None:
    """Once for each reason: a program makes a gauge for every set of calls."""
    logger.warning("The card does not tell its energy (%s); rows will have no watts and joules.", reason)


@dataclass
class _Stretches:
    """What the stretches of one call gave.

    Attributes:
        ms: the mean time of a call, of each stretch.
        mhz: the median clock of each.
        watts: the mean power of each that was long enough to tell.
    """

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


def steady_columns(calls: dict[Any, Call], seconds: float, stretches: int) -> dict[Any, dict[str, str]]:
    """Columns of calls that the card repeats in stretches, one call after the other, in another order every time round.

    Within a stretch the card does nothing but the one call, so clock, power and energy are that call's; the stretches
    take turns, so what drifts while they last is everybody's. A card bound by its limit of power spends time on joules.
    All takes about (`seconds` + `SETTLING`) x `stretches` for each call.

    Args:
        calls: what to repeat, by any key.
        seconds: of a stretch, after a time to settle; power needs some tenths more than `LEAST_SPAN`.
        stretches: of each call, at least 1.

    Returns:
        by key: `steady_ms` and its 20th and 80th percentile over the stretches, of the mean time of a call in one in
        ms; the number of `stretches`; the median clock in MHz; power in W and the energy of a call in J, absent where
        stretches are too short to tell or the card does not.

    Raises:
        ModuleNotFoundError: see `Gauge`.
    """
    gauge = Gauge()
    found = {key: _Stretches() for key in calls}
    orders = random.Random(0)
    for _ in range(stretches):
        for key in orders.sample(list(calls), len(calls)):
            _repeat(calls[key], SETTLING)
            with gauge:
                ms = _repeat(calls[key], seconds)
            found[key].ms.append(ms)
            found[key].mhz.append(statistics.median(gauge.mhz))
            if gauge.watts is not None:
                found[key].watts.append(gauge.watts)
    return {key: of_call.columns() for key, of_call in found.items()}


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
