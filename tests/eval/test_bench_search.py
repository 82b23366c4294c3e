"""The search benchmark without a GPU: every check on tiny tensors, the rest of a layer, and the shares of a run."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("triton")

from videosparse.benchmark import searches
from videosparse.cases import CASES, Case
from videosparse.kernels import torch_select
from videosparse.layout import TokenLayout, VideoGrid

PATH = Path(__file__).parents[2] / "eval" / "bench_search.py"
CPU = torch.device("cpu")
WAN, HUNYUAN = "wan2.1-14b 720x1280x81", "hunyuan-video 720x1280x129"


class Tiny(Case):
    """A model's case with few tokens."""

    def layout(self):
        return TokenLayout(VideoGrid(3, 9, 20), self.model.text)


@pytest.fixture
def bench(monkeypatch):
    spec = importlib.util.spec_from_file_location("bench_search", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    models = {name: replace(CASES[name].model, heads=2, head_dim=32) for name in (WAN, HUNYUAN)}
    models[HUNYUAN] = replace(models[HUNYUAN], text=40)
    monkeypatch.setattr(searches, "CASES", {name: Tiny(model, 81, 720, 1280) for name, model in models.items()})
    monkeypatch.setattr(module, "triton_select", SimpleNamespace(keep_largest=torch_select.keep_largest))
    monkeypatch.setattr(torch, "compile", lambda layer, **_: layer)
    return module


@pytest.mark.parametrize(("name", "rest"), [(WAN, 2), (HUNYUAN, 0)])
def test_every_call_passes_its_check(bench, name, rest):
    problem, finer = bench.make_problems(name, ((128, 64), (64, 64)), CPU)
    with torch.no_grad():
        calls = [*bench.dense_calls(problem), *bench.search_calls(problem), *bench.search_calls(finer)]
        others = bench.rest_calls(problem)
        assert len(others) == rest
        for timed in (*calls, *others):
            assert bench.is_right(timed), timed.row


def test_wrong_results_are_not_timed(bench):
    (problem,) = bench.make_problems(HUNYUAN, ((128, 64),), CPU)
    for timed in (*bench.dense_calls(problem), *bench.search_calls(problem)):
        right = timed.call()
        if timed.row["kernel"] in ("select", "keep_largest"):  # they write to buffers
            continue
        timed.call = lambda right=right: _spoiled(right)
        assert not bench.is_right(timed)
        assert timed.row["note"] == "error above allowed: not timed"
    timed.call = lambda: 1 / 0
    assert not bench.is_right(timed)
    assert timed.row["note"] == "failed: ZeroDivisionError: division by zero"


def _spoiled(result):
    if isinstance(result, torch.Tensor):
        return result * 1.1
    if isinstance(result, tuple):
        return result[0] * 1.1, result[1]
    return replace(result, ids=result.ids + 1)


def test_shares_of_a_run(bench):
    (problem,) = bench.make_problems(WAN, ((128, 64),), CPU)

    def timed(kernel, ms, sample=None):
        return bench.Timed(problem.row(kernel, sample), None, None, [ms] * 5)

    dense = [timed("dense ours", 12.0), timed("dense fa3", 10.0), timed("dense ours with lse", 13.0)]
    search = [timed("block_sums", 6.0), timed("block_sums", 1.0, 16), timed("block_sums", 0.5, 8)]
    search += [timed("select", 0.5), timed("expand", 0.25), timed("sparse", 2.25)]
    rows = bench.shares(problem, dense, search, [timed("rest of a layer, eager", 6.0)])
    # 10 dense steps of 10, the lse 3 more, twice sums and selection, 40 sparse steps of 2.5; 50 times the rest
    extra = 3 + 2 * 6.5
    assert float(rows[0]["share_of_attention"]) == pytest.approx(100 * extra / (200 + extra), abs=0.01)
    assert float(rows[0]["share_of_run_eager"]) == pytest.approx(100 * extra / (500 + extra), abs=0.01)
    assert float(rows[1]["share_of_attention"]) == pytest.approx(100 * 6 / 206, abs=0.01)
    assert "share_of_run_compiled" not in rows[0]
    assert "dense by fa3" in rows[0]["note"]
    assert "% of the attention" in bench.line(rows[0])


@pytest.mark.skipif("torch.cuda.is_available()", reason="needs a machine without a GPU")
def test_says_that_it_needs_a_gpu(bench, capsys):
    assert bench.main([]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
