"""Videos beyond the trained length: what is compared, going on after a stop, the table and the figure."""

import csv
import json
import sys
from pathlib import Path

import pytest
from eval_programs import load

from videosparse.benchmark import training_tables
from videosparse.benchmark.rows import write_rows

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def score():
    return load("score_lora_lengths")


def row(score, lora, method, frames, **more):
    figures = {name + end: "0.5" for name in score.FIGURES for end in ("", "_low", "_high")}
    trained = {"training_steps": "240", "training_s": "61.5", "training_peak_gib": "7.25"} if lora == method else {}
    return {
        "lora": lora, "method": method, "frames": str(frames), "videos": "48", **figures, "drift": "0.125",
        "drift_low": "0.05", "drift_high": "0.2", **trained, **more,
    }  # fmt: skip


def test_every_setting_and_column_that_is_asked_for(score, tmp_path):
    """No training, three ways to stretch, and a LoRA for each method; figures, training time and memory of each."""
    for name in ("dense", "radial"):
        (tmp_path / name).mkdir()
    steps = [{"step": 1, "seconds": 2.5, "peak_gib": 1.5}, {"step": 1, "held_out/17/0.5": 1.0},
             {"step": 2, "seconds": 2.0, "peak_gib": 1.75}]  # fmt: skip
    (tmp_path / "dense/log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    args = type("Args", (), {"lora": [f"{name}={tmp_path / name}" for name in ("dense", "radial")], "only": None})
    settings = score.settings_of(args)
    assert [(name, method) for name, method, _ in settings] == list(training_tables.SETTINGS)
    assert [folder is not None for *_, folder in settings] == [False] * 6 + [True] * 2
    assert {"right_q1", "right_q4", "drift", "repetition", "permanence", "frozen"} <= set(score.COLUMNS)
    found = score.trained(tmp_path / "dense")
    assert found == {"training_steps": 2, "training_s": "4.5", "training_peak_gib": "1.75"}
    assert set(found) == set(training_tables.TRAINING_COLUMNS) <= set(score.COLUMNS)


def test_what_stretches_is_in_force_for_its_own_setting_alone(score):
    """By the calls of the transformer that a video beyond the trained length takes, and by what attention is told."""
    import torch
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(ROOT / "assets/tiny-wan")
    told = []

    def look(module, args):
        layer = module.blocks[0].attn1.processor
        told.append((layer.plan.layout.grid.frames, layer.plan.options.logit))

    inputs = {
        "hidden_states": torch.randn(1, 8, 26, 4, 4), "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 4, 128), "return_dict": False,
    }  # fmt: skip
    for name in ("none", *score.STRETCHED, "none"):
        with score.switched(pipe, name, "dense", None), torch.no_grad():
            handle = pipe.transformer.register_forward_pre_hook(look)
            pipe.transformer(**inputs)
            handle.remove()
    plain, far = (26, None), (26, score.FarLogits(21))
    assert told == [plain, plain, far, (21, None), (21, None), plain]


def test_it_goes_on_where_it_was_stopped(score, tmp_path, monkeypatch, capsys):
    output, made = tmp_path / "rows.csv", []

    def measure(pipe, prompts, name, frames, pool, args):
        made.append((name, frames))
        return {name + end: "0.5" for name in score.FIGURES for end in ("", "_low", "_high")}

    monkeypatch.setattr(score, "measure", measure)

    def run(*more):
        made.clear()
        argv = ["score", "--frames", "17", "33", "--size", "32", "--limit", "1", "--batch", "1", "--workers", "1",
                "--commit", "x", "--output", str(output), *more]  # fmt: skip
        monkeypatch.setattr(sys, "argv", argv)
        score.main()
        return capsys.readouterr().out

    assert "12 are left, call me again" in run("--seconds", "-1")
    assert (made, output.exists()) == ([], False)
    assert "12 rows in" in run()
    every = ("truth", "none", "none", "riflex", "ultravico", "windows")
    assert made == [(name, frames) for frames in (17, 33) for name in every]
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert all(row[column] for row in rows for column in score.FIGURES)
    write_rows(output, rows[1:], score.COLUMNS)
    run()
    assert made == [("truth", 17)], "only what is missing"
    run("--steps", "3")
    assert len(made) == 12, "rows of other settings are made again"


def test_parts_of_several_machines_become_one_table(score, tmp_path, monkeypatch, capsys):
    made = []

    def measure(pipe, prompts, name, frames, pool, args):
        made.append((name, frames, len(prompts)))
        return {name + end: f"0.{len(made)}" for name in score.FIGURES for end in ("", "_low", "_high")}

    monkeypatch.setattr(score, "measure", measure)

    def run(name, *more):
        argv = ["score", "--frames", "17", "33", "--size", "32", "--batch", "1", "--workers", "1", "--commit", "x",
                "--output", str(tmp_path / name), *more]  # fmt: skip
        monkeypatch.setattr(sys, "argv", argv)
        score.main()

    run("a.csv", "--only", "truth", "riflex", "--limit", "2", "1")
    assert made == [("truth", 17, 2), ("riflex", 17, 2), ("truth", 33, 1), ("riflex", 33, 1)]
    run("b.csv", "--only", "none", "riflex", "--limit", "3")
    made.clear()
    run("all.csv", "--merge", str(tmp_path / "a.csv"), str(tmp_path / "b.csv"))
    assert made == [], "merging measures nothing"
    rows = [(r["lora"], r["method"], r["frames"], r["videos"]) for r in score.read_rows(tmp_path / "all.csv", ())]
    assert len(rows) == len(set(rows)) == 8
    assert ("truth", "none", "33", "1") in rows
    assert ("riflex", "dense", "33", "3") in rows, "of two rows of one setting the later file's"
    wrongs = {
        "--only rifle": "--only must be of", "--limit 1 2 3": "--limit must", "--merge none.csv": "cannot be read",
    }  # fmt: skip
    for wrong, told in wrongs.items():
        with pytest.raises(SystemExit):
            run("c.csv", *wrong.split())
        assert told in capsys.readouterr().err


def test_the_table_says_what_is_missing(score, tmp_path, monkeypatch):
    tables = load("readme_tables")
    folder, tmp_path = tmp_path, tmp_path / "results"
    tmp_path.mkdir()
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.made("lora_lengths") == "Not measured yet."
    settings = [(lora, method, frames) for frames in (81, 161, 321) for lora, method in training_tables.SETTINGS]
    rows = [row(score, *setting) for setting in settings]
    write_rows(tmp_path / "lora_length.csv", rows, score.COLUMNS)
    whole = tables.made("lora_lengths").splitlines()
    assert [line for line in whole if line.startswith("**")] == ["**81 frames**", "**161 frames**", "**321 frames**"]
    assert sum("LoRA trained" in line for line in whole) == 6
    assert whole[-1] == (
        "| LoRA trained with Radial | 48 | 50 (50 to 50) | 50 (50 to 50) | 50 (50 to 50) | 50 (50 to 50) "
        "| 12 (5 to 20) | 0.50 (0.50 to 0.50) | 50 (50 to 50) | 240, 61.5, 7.25 |"
    )
    write_rows(tmp_path / "lora_length.csv", rows[:-2], score.COLUMNS)
    part = tables.made("lora_lengths").splitlines()
    assert sum("LoRA trained" in line for line in part) == 4 + 1
    assert part[-1] == "Not measured yet: LoRA trained dense at 321 frames; LoRA trained with Radial at 321 frames."
    (folder / "figures").mkdir()
    (folder / "figures/lora_lengths.png").touch()
    assert tables.made("lora_lengths").splitlines()[-1].endswith("(../figures/lora_lengths.png)")


def test_the_figure_is_drawn(score, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    plots = load("plot_lora_lengths")
    assert set(plots.STYLES) == set(training_tables.SETTINGS)
    rows = [row(score, lora, method, frames) for frames in (81, 321) for lora, method in plots.STYLES][:-1]
    write_rows(tmp_path / "rows.csv", rows, score.COLUMNS)
    assert plots.main(["--rows", str(tmp_path / "rows.csv"), "--output", str(tmp_path / "lengths.png")]) == 0
    assert (tmp_path / "lengths.png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        plots.main(["--rows", str(tmp_path / "none.csv")])
    assert "cannot be read" in capsys.readouterr().err


def test_training_rows_with_and_without_a_kernel(tmp_path, monkeypatch):
    """Rows of before there were several GPUs, one kernel that is absent, and a case that did not fit."""
    tables = load("readme_tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    case = {"case": "a", "frames": "161", "times_length": "2", "tokens": "147600", "gpus": ""}
    gains = {"against_cudnn": "2.148", "against_fa2": "3.239"}
    wide = {**case, "gpus": "2", "frames": "321", "times_length": "4"}
    write_rows(
        tmp_path / "lora_training.csv",
        [
            {**case, "attention": "cudnn", "extrapolated_step_s": "177.07", "note": ""},
            {**case, "attention": "fa2", "extrapolated_step_s": "266.97", "note": ""},
            {**case, "attention": "radial", "extrapolated_step_s": "82.43", "note": "", **gains},
            {**wide, "attention": "radial", "extrapolated_step_s": "", "note": "out of memory"},
            {**wide, "attention": "fa4", "extrapolated_step_s": "", "note": "flash-attn-4 is not usable"},
        ],
        ("case", "frames", "times_length", "tokens", "gpus", "attention", "extrapolated_step_s", *gains, "note"),
    )
    lines = tables.made("training").splitlines()[2:]
    assert lines == [
        "| a, 161 frames | 2x | 147,600 | 1 | 82 | 177 (2.15x) | 267 (3.24x) | not timed |",
        "| a, 321 frames | 4x | 147,600 | 2 | out of memory | not timed | not timed | not installed |",
    ]
