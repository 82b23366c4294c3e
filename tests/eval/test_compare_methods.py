"""The programs that judge methods, at tiny sizes: what they measure, and what they refuse."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from videosparse.benchmark.rows import read_rows, write_rows
from videosparse.layout import TokenLayout, VideoGrid
from videosparse.policies.base import RunStep

ROOT = Path(__file__).parents[2]
LAYOUT = TokenLayout(VideoGrid(4, 12, 15))


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "eval" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recall():
    return load("measure_recall")


@pytest.fixture(scope="module")
def rows(recall):
    """What an observer of ten steps of two layers finds, on random queries and keys."""
    observer = recall.Observer(10, [0.25, 1.0], {0.25: recall.RadialPolicy(block=(64, 64)).block_map(LAYOUT)})
    torch.manual_seed(0)
    for step in observer.watched:
        for layer in range(2):
            q, k, v = (2 * torch.randn(2, LAYOUT.length, 4, 16) for _ in range(3))
            observer.see(layer, step, q, k, v, LAYOUT)
    return list(recall.rows_of(observer, LAYOUT, 13, 10))


def test_steps_are_those_of_a_run(recall):
    for steps, search, refresh in ((50, 9, 29), (10, 1, 5), (4, 0, 2)):
        observer = recall.Observer(steps, [0.2], {})
        assert (observer.search, observer.refresh) == (search, refresh)
        assert {search, refresh} <= set(observer.watched)
    with pytest.raises(SystemExit, match="leave room for a search and a later refresh"):
        recall.Observer(1, [0.2], {})


def test_methods_are_ranked_as_they_must_be(rows):
    found = {(r["method"], r["block"], r["asked_density"]): r for r in rows if r["step"] == "all"}
    best, random = (float(found[name, "64x64", 0.25]["recall"]) for name in ("best", "random"))
    fresh, kept = (float(found[name, "64x64", 0.25]["recall"]) for name in ("adaspa, search now", "adaspa"))
    assert best >= fresh > max(kept, random) - 0.02
    assert fresh > random
    for (method, _, density), row in found.items():
        if density == 1.0:
            assert float(row["recall"]) == pytest.approx(1, abs=1e-4), method
            assert float(row["error"]) < 1e-4, method
        assert float(row["recall_low"]) <= float(row["recall"]) <= float(row["recall_high"])
    at_search = {r["method"]: r for r in rows if (r["step"], r["block"], r["asked_density"]) == ("2", "64x64", 0.25)}
    assert at_search["adaspa"]["recall"] == at_search["adaspa, search now"]["recall"]


def test_the_figure_is_drawn(recall, rows, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    plots = load("plot_recall")
    monkeypatch.setattr(plots, "DENSITY", "0.25")
    write_rows(tmp_path / "rows.csv", rows, recall.COLUMNS)
    assert plots.main(["--rows", str(tmp_path / "rows.csv"), "--output", str(tmp_path / "recall.png")]) == 0
    assert (tmp_path / "recall.png").stat().st_size > 10_000


def test_random_maps_differ_by_layer_and_not_by_step():
    videos = load("compare_videos")
    policy, cpu = videos.RandomPolicy(0.25), torch.device("cpu")
    plans = [policy.plan(LAYOUT, RunStep("cond", i, 9), layer, {}, device=cpu) for i, layer in ((0, 0), (5, 0), (0, 1))]
    assert plans[0].index is plans[1].index
    assert not torch.equal(plans[0].index.ids, plans[2].index.ids)
    assert int(plans[0].index.row_ptr[-1]) == 12 * round(0.25 * 12)


@pytest.mark.parametrize(
    ("name", "option"), [("measure_recall", ["--prompts", "1"]), ("compare_videos", ["--limit", "2"])]
)
def test_parts_do_not_replace_the_published_rows(name, option, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, *option])
    with pytest.raises(SystemExit):
        load(name).arguments()
    assert "would replace the rows of" in capsys.readouterr().err


def test_plans_are_compared_with_and_without_orders(tmp_path, monkeypatch, capsys):
    """What stands between `paro 0.5` and its twin in raster order is the orders alone."""
    videos, output = load("compare_videos"), tmp_path / "rows.csv"
    made, make = {}, videos.calibrate
    monkeypatch.setattr(videos, "PARO_PROMPTS", videos.PARO_PROMPTS[:1])
    monkeypatch.setattr(
        videos, "calibrate", lambda request, path, **more: made.setdefault(path.name, make(request, path, **more))
    )
    small = [
        "--frames",
        "5",
        "--steps",
        "2",
        "--limit",
        "1",
        "--device",
        "cpu",
        "--only",
        "^(paro|random) 0.5(, r[a-z ]+)?$",
    ]
    monkeypatch.setattr(sys, "argv", ["compare_videos", "--paro", *small, "--output", str(output)])
    videos.main()
    reordered, raster = made["0.5.safetensors"].plan, made["0.5, raster order.safetensors"].plan
    assert (raster.codes == 0).all()
    assert (reordered.codes != 0).any()
    assert torch.equal(reordered.counts, raster.counts)
    assert not raster.facts.method["reorder"]
    rows = read_rows(output, ("setting", "psnr_db"))
    assert [row["setting"] for row in rows] == ["random 0.5", "paro 0.5", "paro 0.5, raster order"]
    assert len({row["psnr_db"] for row in rows}) == 3
    assert {row["video_density"] for row in rows} == {"0.5000"}
    assert capsys.readouterr().out.count("dB") == 3
