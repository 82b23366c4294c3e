"""Estimates against the rows that were measured."""

import csv
from pathlib import Path

import pytest

from videosparse.cases import MODELS
from videosparse.generation.estimating import _parameters, estimate
from videosparse.generation.planning import plan_run
from videosparse.generation.sources import find_spec

ROWS = Path(__file__).parents[2] / "assets/results/models.csv"


def measured():
    with ROWS.open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["contender"].endswith("-eager") and r["run_s"]]
    return [r for r in rows if r["gpu"] == "NVIDIA H200" and r["model"].startswith("wan")]


@pytest.mark.parametrize("row", measured(), ids=lambda r: f"{r['case']} {r['contender']}")
def test_time_and_memory_are_within_20_percent_of_what_was_measured(row):
    spec = MODELS[row["model"]]
    sizes = {"num_frames": int(row["frames"]), "height": int(row["height"]), "width": int(row["width"])}
    plan = plan_run(find_spec(row["model"]), method=row["method"], steps=50, **sizes)
    found = estimate(plan, row["gpu"])
    assert found.seconds == pytest.approx(float(row["run_s"]), rel=0.2)
    layers = int(row["layers_timed"])
    rest = spec.layers - layers
    dropped = 2 * rest * _parameters(spec) / spec.layers  # rows of fewer layers hold fewer weights
    assert found.weights - dropped + found.activations == pytest.approx(1e9 * float(row["peak_gb"]), rel=0.2)


@pytest.mark.parametrize(("name", "billions"), [("wan2.1-1.3b", 1.42), ("wan2.1-14b", 14.29), ("wan2.2-5b", 5.0)])
def test_parameters(name, billions):
    assert _parameters(MODELS[name]) == pytest.approx(1e9 * billions, rel=0.03)


def test_what_was_not_measured_has_no_estimate():
    assert estimate(plan_run(find_spec("mochi"))) is None
    assert estimate(plan_run(find_spec("wan2.1-14b"), options={"block": (64, 64)})) is None


def test_searches_and_dense_steps_cost():
    radial = estimate(plan_run(find_spec("wan2.1-14b"), options={"first_steps": 0}))
    default = estimate(plan_run(find_spec("wan2.1-14b")))
    dense = estimate(plan_run(find_spec("wan2.1-14b"), method="dense"))
    assert radial.seconds < default.seconds < dense.seconds == pytest.approx(default.dense_seconds)
    few, often = (
        estimate(plan_run(find_spec("wan2.1-14b"), method="adaspa", options={"refresh": refresh}))
        for refresh in ((), (20, 30, 40))
    )
    assert few.seconds < often.seconds
    two = estimate(plan_run(find_spec("wan2.2-a14b")))
    assert two.weights == pytest.approx(2 * default.weights)
