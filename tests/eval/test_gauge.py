"""Calls repeated in stretches, and the card's clock and energy meanwhile, on cards that are not there."""

from __future__ import annotations

import logging
import sys
import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers")

from videosparse.benchmark import gauge
from videosparse.benchmark.rows import repeated_ms


class Card:
    """At 1,200 MHz and 600 W while it works, at 1,900 MHz else, on a clock of its own in ms.

    Its counter of energy moves every 100 ms, and what reads it does so every 10 ms of work, as the thread of a gauge
    would: so all figures are exact.
    """

    def __init__(self):
        self.now, self.mhz, self.read, self.counts = 0, 1900.0, None, True

    def perf_counter(self):
        return self.now / 1e3

    def joules(self):
        return 60.0 * (self.now // 100) if self.counts else None

    def work(self, milliseconds):
        self.mhz = 1200.0
        for _ in range(milliseconds):
            self.now += 1
            if self.read is not None and self.now % 10 == 0:
                self.read()
        self.mhz = 1900.0

    def thread(self, target, daemon):
        """What stands in for the gauge's thread."""

        def start():
            self.read = target.__self__._read

        def join():
            self.read = None

        return SimpleNamespace(start=start, join=join)


@pytest.fixture
def unread(monkeypatch):
    """No GPU: what waits for it returns, and it is at 1,900 MHz."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "clock_rate", lambda: 1900.0)
    monkeypatch.setattr(gauge, "_EnergyCounter", lambda: SimpleNamespace(joules=lambda: None))


@pytest.fixture
def card(unread, monkeypatch):
    found = Card()
    monkeypatch.setattr(torch.cuda, "clock_rate", lambda: found.mhz)
    monkeypatch.setattr(gauge, "_EnergyCounter", lambda: SimpleNamespace(joules=found.joules))
    monkeypatch.setattr(gauge, "time", SimpleNamespace(perf_counter=found.perf_counter))
    monkeypatch.setattr(gauge, "threading", SimpleNamespace(Thread=found.thread, Event=threading.Event))
    return found


def test_a_card_is_read_while_it_does_nothing_but_repeat_a_call(card):
    found = gauge.steady_columns({"a": partial(card.work, 2), "b": partial(card.work, 5)}, 1.5, stretches=2)
    same = {"stretches": "2", "sm_mhz": "1200", "watts": "600"}
    for name, ms, joules in (("a", "2.0000", "1.200"), ("b", "5.0000", "3.000")):
        times = dict.fromkeys(("steady_ms", "steady_p20_ms", "steady_p80_ms"), ms)
        assert found[name] == times | same | {"joules": joules}
        assert set(found[name]) == set(gauge.COLUMNS)
    # each stretch ends with the calls that are enqueued by then
    assert 4 * (1500 + 250) <= card.now <= 4 * (1500 + 250 + 200)


def test_stretches_that_are_too_short_for_the_counter_have_times_but_no_power(card):
    found = gauge.steady_columns({"a": partial(card.work, 2)}, 0.5, stretches=2)["a"]
    assert set(gauge.COLUMNS) - set(found) == {"watts", "joules"}
    assert (found["steady_ms"], found["sm_mhz"]) == ("2.0000", "1200")


def test_a_card_that_counts_no_energy_gives_none(card):
    card.counts = False
    found = gauge.steady_columns({"a": partial(card.work, 2)}, 1.5, stretches=2)["a"]
    assert set(gauge.COLUMNS) - set(found) == {"watts", "joules"}


def test_stretches_of_calls_take_turns(unread, monkeypatch):
    """Each call once a time round, to settle and then to be timed, in another order each; medians over stretches."""
    ran, times = [], iter([9.0, 1.0, 9.0, 2.0, 9.0, 6.0])
    monkeypatch.setattr(gauge, "_repeat", lambda call, seconds: ran.append((call(), seconds)) or 5.0)
    calls = {name: partial(str, name) for name in "abcd"}
    found = gauge.steady_columns(calls, 0.01, stretches=6)
    assert [seconds for _, seconds in ran] == [gauge.SETTLING, 0.01] * 24
    names = "".join(name for name, _ in ran)
    assert names[::2] == names[1::2]
    turns = [names[i : i + 8 : 2] for i in range(0, len(names), 8)]
    assert ["".join(sorted(turn)) for turn in turns] == ["abcd"] * 6
    assert len(set(turns)) > 3
    assert {columns["stretches"] for columns in found.values()} == {"6"}
    monkeypatch.setattr(gauge, "_repeat", lambda call, seconds: next(times))
    found = gauge.steady_columns({"a": list}, 0.01, stretches=3)["a"]
    assert [found[f"steady_{x}ms"] for x in ("p20_", "", "p80_")] == ["1.4000", "2.0000", "4.4000"]


def test_a_slow_call_is_repeated_once_at_least(card):
    calls = []
    assert gauge._repeat(lambda: (calls.append(1), card.work(10)), 0.0) == pytest.approx(10.0)
    assert calls == [1]


def test_power_is_read_off_the_steps_of_the_counter():
    """A counter that moves every 0.2 s by what went through since, read often: its steps, not the readings, count."""
    readings = [(t / 100, 650.0 * (t // 20) / 5) for t in range(7, 159)]
    assert gauge.power(readings) == pytest.approx(650.0)
    assert readings[-1][1] / (readings[-1][0] - readings[0][0]) != pytest.approx(650.0, rel=0.05)
    shorter = [reading for reading in readings if reading[0] < 1.2]
    assert shorter[-1][0] - shorter[0][0] > gauge.LEAST_SPAN, "its steps are closer than its readings"
    for few in (shorter, readings[:20], readings[:5], []):
        assert gauge.power(few) is None


def test_a_gauge_stops_with_its_block(unread):
    with pytest.raises(ZeroDivisionError) as raised, gauge.Gauge() as found:
        raise ZeroDivisionError
    assert len(found.mhz) >= 1
    assert not found._thread.is_alive()
    assert not hasattr(raised.value, "__notes__")


def test_an_error_of_the_readings_is_that_of_the_block(unread, monkeypatch):
    """Their thread ends with it, and the next block begins anew."""

    def lost():
        raise RuntimeError("the GPU is lost")

    found = gauge.Gauge()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "clock_rate", lost)
        with pytest.raises(RuntimeError, match="the GPU is lost"), found:
            pass
        with pytest.raises(ZeroDivisionError) as raised, found:
            raise ZeroDivisionError
        assert raised.value.__notes__ == ["The card's clock could not be read, either: the GPU is lost"]
    with found:
        pass
    assert set(found.mhz) == {1900.0}


class NVMLError(Exception):
    """As of pynvml, which need not be installed."""


def refuse(*_):
    raise NVMLError("Not Supported")


@pytest.fixture
def nvml(monkeypatch):
    """A driver that counts 1,500 mJ, of the one card that it knows."""
    gauge._say_absent.cache_clear()
    known = SimpleNamespace(
        NVMLError=NVMLError, nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: {"GPU-1-2": 1500}[handle],
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", known)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(uuid="1-2"))
    yield known
    gauge._say_absent.cache_clear()


def test_energy_is_that_of_the_card_of_this_process(nvml, caplog):
    assert gauge._EnergyCounter().joules() == 1.5
    assert not caplog.messages


@pytest.mark.parametrize("lacking", ["nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetTotalEnergyConsumption"])
def test_a_card_without_a_counter_says_so_in_one_line(nvml, lacking, monkeypatch, caplog):
    monkeypatch.setattr(nvml, lacking, refuse)
    with caplog.at_level(logging.WARNING):
        counters = [gauge._EnergyCounter() for _ in range(2)]
    assert [counter.joules() for counter in counters] == [None, None]
    assert caplog.messages == ["The card does not tell its energy (Not Supported); rows will have no watts and joules."]


def test_a_counter_that_fails_later_is_left_alone(nvml, monkeypatch, caplog):
    counter = gauge._EnergyCounter()
    monkeypatch.setattr(nvml, "nvmlDeviceGetTotalEnergyConsumption", refuse)
    assert [counter.joules(), counter.joules()] == [None, None]
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"steady_ms": "2.5", "stretches": "5"}, 2.5),
        ({"steady_ms": "2.5", "stretches": "2"}, 2.5),
        ({"steady_ms": "2.5", "stretches": "1"}, None),
        ({"steady_ms": "2.5", "stretches": ""}, None),
        ({"steady_ms": "2.5"}, None),
        ({"steady_ms": "", "stretches": ""}, None),
        ({}, None),
    ],
)
def test_calls_of_two_stretches_or_more_were_repeated_in_turn(columns, found):
    assert repeated_ms(columns) == found
