"""Measures of one video: worked out by hand where that can be done, else against rendered truth."""

import math

import pytest
import torch

pytest.importorskip("scipy")

from videosparse.evaluation.judging import (
    DIMENSIONS,
    FIDELITY,
    WORLD,
    Seen,
    fidelity_columns,
    judged,
    seen_columns,
    world_columns,
)
from videosparse.evaluation.prompts import Prompt, load_prompts
from videosparse.evaluation.work import workers
from videosparse.metrics.bootstrap import interval
from videosparse.metrics.fidelity import fidelity
from videosparse.synthetic.render import render


def test_fidelity_by_quarter():
    """Frame t is off by a constant of its quarter, so that PSNR and latent distance are known."""
    off = torch.tensor([0.1, 0.2, 0.3, 0.4]).repeat_interleave(2)
    dense = torch.full((8, 3, 16, 16), 0.5)
    latents = torch.ones(4, 4, 2, 2)
    found = fidelity_columns(
        dense + off[:, None, None, None], dense, latents * torch.tensor([1.0, 1.5, 1, 3])[None, :, None, None], latents
    )
    assert set(found) == set(FIDELITY)
    expected = [-20 * math.log10(x) for x in (0.1, 0.2, 0.3, 0.4)]
    assert [found[f"psnr_db_q{q}"] for q in range(1, 5)] == pytest.approx(expected, abs=1e-3)
    assert found["psnr_db"] == pytest.approx(sum(expected) / 4, abs=1e-3)
    assert found["worst_psnr_db"] == pytest.approx(expected[3], abs=1e-3)
    assert [found[f"latent_l1_q{q}"] for q in range(1, 5)] == pytest.approx([0, 0.5, 0, 2])
    assert found["latent_l1"] == pytest.approx(2.5 / 4)


def test_columns_are_the_metrics_of_that_name():
    """Also where frames differ in size, over which a mean of ratios is no ratio of means."""
    a, b = torch.rand(2, 8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    x, y = torch.rand(2, 4, 5, 2, 2, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 6)[:, None, None]
    found = fidelity_columns(a, b, x, y)
    for metric in fidelity(a, b, latents=(x, y)):
        name = {"psnr": "psnr_db"}.get(metric.metric, metric.metric)
        assert found[name] == pytest.approx(metric.value, rel=1e-5)
        assert [found[f"{name}_q{q}"] for q in range(1, 5)] == pytest.approx(metric.per_quarter, rel=1e-5)


def test_few_frames_leave_quarters_empty():
    video = torch.rand(5, 3, 16, 16)
    found = fidelity_columns(video, video.flip(0), torch.ones(4, 2, 2, 2), torch.ones(4, 2, 2, 2))
    assert found["latent_l1_q2"] is None
    assert found["latent_l1_q3"] == 0
    assert found["psnr_db_q4"] is not None


def test_dimensions_that_need_no_weights():
    still = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).expand(5, 3, 32, 32)
    found = seen_columns(still, Prompt("a cat", 1), 16)
    assert found == {"temporal_flickering": 1, "motion_smoothness": pytest.approx(1, abs=0.01), "dynamic_degree_dis": 0}
    assert set(found) == set(DIMENSIONS)
    steps = torch.tensor([0, 51, 51]).view(3, 1, 1, 1).expand(3, 3, 32, 32) / 255
    assert seen_columns(steps, Prompt("a cat", 1), 16)["temporal_flickering"] == pytest.approx(0.9)
    long = torch.zeros(12, 3, 32, 32)
    long[8:, 0] = 1  # black, black, red, in clips of two seconds at 2 frames a second
    assert seen_columns(long, Prompt("a cat", 1), 2)["drift"] == "0:1.00000 2:1.00000 4:0.00000"
    with pytest.raises(ValueError, match=r"a cat.*at least"):
        seen_columns(steps[:1], Prompt("a cat", 1), 16)


def test_truth_is_all_right_and_a_blank_half_shows():
    prompt = Prompt(
        "a large red circle stands still on a plain dark background", 3, (("circle", "red", "static"),), "flat"
    )
    video = render([prompt.scene()], 16, 64, 64)[0]
    found = world_columns(video, prompt, 16)
    assert set(found) == set(WORLD)
    assert found["all_right"] == 1
    assert seen_columns(video.transpose(0, 1), prompt, 16).items() >= found.items()
    assert [found[f"permanence_q{q}"] for q in range(1, 5)] == [1, 1, 1, 1]
    half = video.clone()
    half[:, 8:] = 0.1
    found = world_columns(half, prompt, 16)
    assert [found[f"permanence_q{q}"] for q in range(1, 5)] == [1, 1, 0, 0]
    assert found["permanence"] == 0.5
    assert found["colour_error_q4"] is None
    nothing = world_columns(torch.full_like(video, 0.1), prompt, 16)
    assert (nothing["all_right"], nothing["permanence_q1"], nothing["overlap"]) == (0, 0, None)


def test_a_worker_says_what_is_said_here():
    """Through a process of its own, to which tensors of a view and of inference have to get."""
    prompt = Prompt("a cat", 1)
    with torch.inference_mode():
        videos, latents = torch.rand(2, 4, 3, 32, 32), torch.rand(2, 4, 2, 4, 4)
    seen, dense = (
        Seen(v.to("cpu", copy=True), x.to("cpu", copy=True), prompt, 16) for v, x in zip(videos, latents, strict=True)
    )
    with workers(1) as submit:
        there = submit(judged, seen, dense).result()
    assert there == judged(seen, dense)
    assert {*DIMENSIONS, *FIDELITY} == set(there)
    assert set(judged(seen, None)) == set(DIMENSIONS)


def test_text_files_hold_a_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# two\na cat\n\n  a dog \n")
    assert load_prompts(path) == [Prompt("a cat", 2), Prompt("a dog", 4)]
    assert not load_prompts(path)[0].of_world
    path.write_text("# none\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        load_prompts(path)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"Cannot read prompts from .*broken.json"):
        load_prompts(tmp_path / "broken.json")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[]", r'list.json must hold \{"prompts": \[...\]\} \(got a JSON list\); see eval/prompts/world64.json'),
        ('{"a": 1}', r"\(got no such list\)"),
        ('{"prompts": {"a": 1}}', r"\(got no such list\)"),
        ('{"prompts": ["a cat"]}', "list.json, prompt 1 must be an object with prompt, seed, objects, background"),
        ('{"prompts": [{"prompt": "a cat"}]}', "list.json, prompt 1 has no 'seed'"),
        (
            '{"prompts": [{"prompt": "a", "seed": 1, "background": "flat", "objects": ["circle"]}]}',
            "objects must be a list, each with shape, colour, motion",
        ),
    ],
)
def test_lists_of_another_form_are_told_what_is_expected(tmp_path, text, told):
    path = tmp_path / "list.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=told):
        load_prompts(path)


def test_intervals():
    values = [0.0] * 50 + [1.0] * 50
    found = interval(values)
    assert found.mean == 0.5
    assert found.low == pytest.approx(0.4, abs=0.02)  # 0.5 - 1.96 * 0.5 / sqrt(100)
    assert found.high == pytest.approx(0.6, abs=0.02)
    assert interval(values) == found
    assert interval([3.0]) == (3, 3, 3)
    assert interval([math.inf, math.inf]) == (math.inf, math.inf, math.inf)
