"""The program that compares methods, at a size where a video takes a fraction of a second."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("scipy")

from videosparse.evaluation import running
from videosparse.evaluation.running import Batches
from videosparse.evaluation.table import read_table, write_table
from videosparse.evaluation.work import COLUMNS
from videosparse.policies.paro_plan import PAROPlan

PROGRAM = Path(__file__).parents[2] / "eval" / "compare_methods.py"
SMALL = [
    "--frames", "5", "--height", "64", "--width", "64", "--steps", "3", "--limit", "2", "--device", "cpu",
    "--workers", "0", "--densities", "0.5",
]  # fmt: skip


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("compare_methods", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module", autouse=True)
def _load_once():
    """The embedded model is loaded once for each precision."""
    patch, load = pytest.MonkeyPatch(), running.load_pipeline
    kept = {}

    def cached(settings):
        if settings.dtype not in kept:
            kept[settings.dtype] = load(settings)
        return kept[settings.dtype]

    patch.setattr(running, "load_pipeline", cached)
    yield
    patch.undo()


@pytest.fixture
def calls(monkeypatch):
    """What was generated: [setting's processor, number of prompts]; raises KeyboardInterrupt at `calls.stop_at`."""

    class Calls(list):
        stop_at = None

    made, original = Calls(), Batches.make

    def make(self, prompts, processor, **more):
        if made.stop_at is not None and len(made) == made.stop_at:
            raise KeyboardInterrupt
        made.append((type(processor).__name__, len(prompts)))
        return original(self, prompts, processor, **more)

    monkeypatch.setattr(Batches, "make", make)
    return made


def test_a_killed_run_goes_on_and_makes_nothing_twice(program, tmp_path, calls, capsys):
    output = tmp_path / "rows.csv"
    command = [*SMALL, "--output", str(output), "--methods", "ceiling", "other-noise", "random", "adaspa"]
    command += ["--keep-videos", "1"]
    calls.stop_at = 2
    assert program.main(command) == 130
    assert calls == [("DenseProcessor", 2), ("DenseProcessor", 2)]
    assert not output.exists()
    waiting = {path.suffix for path in (tmp_path / "rows.csv.parts").iterdir()}
    assert waiting == {".jsonl", ".safetensors"}
    assert "goes on where it was" in capsys.readouterr().err

    calls.clear()
    calls.stop_at = None
    assert program.main(command) == 0
    # other noise was made but not judged when the run was killed; dense came from the file
    assert calls == [("DenseProcessor", 2), ("RandomProcessor", 2), ("AdaSpaProcessor", 2)]
    rows = read_table(output, program.COLUMNS)
    assert [row["setting"] for row in rows[::2]] == ["dense", "ceiling", "other noise", "random 0.5", "adaspa 0.5"]
    assert not (tmp_path / "rows.csv.parts").exists()
    assert "10 of 10 rows" in capsys.readouterr().out

    by_setting = {row["setting"]: row for row in rows[::2]}
    assert by_setting["dense"]["psnr_db"] == by_setting["ceiling"]["psnr_db"] == ""
    assert int(by_setting["other noise"]["seed"]) == int(by_setting["dense"]["seed"]) + 1000
    assert all(float(by_setting[name]["latent_l1"]) > 0 for name in ("other noise", "adaspa 0.5", "random 0.5"))
    assert by_setting["random 0.5"]["video_density"] == "0.5"
    assert float(by_setting["random 0.5"]["average_density"]) == pytest.approx(1 / 3 + 2 / 3 * 0.5, abs=1e-4)
    assert by_setting["ceiling"]["seconds"] == ""
    assert all(row["temporal_flickering"] and row["permanence"] and row["commit"] for row in rows)
    for row in rows:
        assert bool(row["video"]) == (row["prompt"] == rows[0]["prompt"])
        assert not row["video"] or (tmp_path / "rows-videos" / row["video"]).stat().st_size > 500
    assert (tmp_path / "rows-videos" / by_setting["adaspa 0.5"]["map"]).read_bytes().startswith(b"\x89PNG")
    assert "layers 1, 5, 8 of 8" in by_setting["adaspa 0.5"]["map_shows"]

    calls.clear()
    assert program.main(command) == 0
    assert calls == []
    more = [*command, "--limit", "3"]
    assert program.main(more) == 0
    assert [count for _, count in calls] == [3, 1, 1, 1], "dense twins of a new batch, and what is new of the others"
    assert len(read_table(output)) == 15


def test_the_same_noise_gives_the_same_rows_in_a_resumed_run(program, tmp_path, calls):
    command = [*SMALL, "--methods", "random", "--limit", "1"]
    assert program.main([*command, "--output", str(tmp_path / "whole.csv")]) == 0
    calls.clear()
    calls.stop_at = 1
    assert program.main([*command, "--output", str(tmp_path / "halved.csv")]) == 130
    calls.stop_at = None
    assert program.main([*command, "--output", str(tmp_path / "halved.csv")]) == 0
    timed = ("seconds", "denoise_seconds", "run")
    whole, halved = (
        [{k: v for k, v in row.items() if k not in timed} for row in read_table(tmp_path / f"{name}.csv")]
        for name in ("whole", "halved")
    )
    assert whole == halved


def test_a_grid_that_divides_by_nothing(program, tmp_path, capsys):
    """56x72 is no multiple of 16, which Wan's pipeline asks for; 63 tokens a frame."""
    output = tmp_path / "rows.parquet"
    pytest.importorskip("pyarrow")
    command = [*SMALL, "--height", "56", "--width", "72", "--limit", "1", "--output", str(output)]
    assert program.main([*command, "--methods", "radial", "ceiling", "paro-online", "--untimed"]) == 0
    rows = {row["setting"]: row for row in read_table(output)}
    assert {row["tokens"] for row in rows.values()} == {"126"}
    assert float(rows["radial"]["ssim"]) > 0
    assert rows["radial"]["seconds"] == rows["radial"]["denoise_seconds"] == ""
    assert set(rows) == {"dense", "radial", "ceiling", "paro-online 0.5"}
    assert program.main([*command, "--methods", "paro"]) == 2
    assert "paro-online needs none" in capsys.readouterr().err


def test_plans_are_calibrated_once_and_integers_run(program, tmp_path):
    """What stands between `paro 0.5` and its twin in raster order is the orders alone."""
    command = [*SMALL, "--dtype", "bf16", "--limit", "1", "--output", str(tmp_path / "rows.csv")]
    assert program.main([*command, "--methods", "paro", "paro+int8", "paro-mass", "paro-raster", "dense+int8"]) == 0
    rows = {row["setting"]: row for row in read_table(tmp_path / "rows.csv")}
    assert set(rows) == {
        "dense",
        "dense, int8",
        "paro 0.5",
        "paro 0.5, int8",
        "paro 0.5, orders by mass",
        "paro 0.5, raster order",
    }
    assert rows["paro 0.5, int8"]["quant"] == "int8"
    assert len({row["psnr_db"] for row in rows.values()}) >= 5, "none for dense, and every other one its own"
    assert len({row["video_density"] for name, row in rows.items() if name.startswith("paro")}) == 1
    plans = {path.stem.rpartition("-")[0].rpartition("-")[2]: path for path in (tmp_path / "rows-plans").iterdir()}
    kinds = [kind for kind in plans if kind not in ("raster", "mass")] + ["mass", "raster"]
    assert len(plans) == 3
    reordered, by_mass, raster = (PAROPlan.load(plans[kind]) for kind in kinds)
    assert [plan.facts.method["order_by"] for plan in (reordered, by_mass)] == ["metric", "mass"]
    assert (raster.codes == 0).all()
    assert (reordered.codes != 0).any()
    assert torch.equal(reordered.counts, raster.counts)
    made = plans[kinds[0]].stat().st_mtime_ns
    assert program.main([*command, "--methods", "paro", "--seeds", "2"]) == 0
    assert plans[kinds[0]].stat().st_mtime_ns == made


def test_prompts_of_any_kind_have_no_detectors_and_no_ceiling(program, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat surfing\n")
    command = [*SMALL, "--steps", "2", "--prompts", str(prompts), "--output", str(tmp_path / "rows.csv")]
    assert program.main([*command, "--methods", "ceiling", "random"]) == 0
    rows = read_table(tmp_path / "rows.csv")
    assert [row["setting"] for row in rows] == ["dense", "random 0.5"]
    assert rows[1]["psnr_db"]
    assert rows[1]["all_right"] == ""
    assert program.main([*command, "--methods", "paro"]) == 2
    assert "paro-online" in capsys.readouterr().err


def test_tables_of_several_machines_become_one(program, tmp_path, capsys):
    """Each has made its own dense videos, which must be the same; nothing is written where they are not."""
    parts = [tmp_path / "a.csv", tmp_path / "b.csv"]
    for method, part in zip(("random", "radial"), parts, strict=True):
        assert program.main([*SMALL, "--limit", "1", "--methods", method, "--output", str(part)]) == 0
    command = ["--output", str(tmp_path / "rows.csv"), "--merge", *map(str, parts)]
    assert program.main(command) == 0
    assert [row["setting"] for row in read_table(tmp_path / "rows.csv")] == ["dense", "random 0.5", "radial"]
    assert not (tmp_path / "rows.csv.parts").exists()
    assert program.main(command) == 0, "rows that are there already"
    assert len(read_table(tmp_path / "rows.csv")) == 3

    before = read_table(parts[1])
    for column, value, told in (
        ("permanence", "0.123", r"b.csv says permanence '0.123' of a video"),
        ("weights", "other", ", b.csv with weights other; merge rows of one comparison only."),
        ("weights", "", ", b.csv with no weights; merge rows of one comparison only."),
        ("dtype", "bf16", "rows of tiny-wan with dtype fp32, b.csv with dtype bf16; merge"),
        ("convention", "svg", "rows with convention videosparse, b.csv with convention svg; merge"),
    ):
        rows = [dict(row) for row in before]
        for row in rows if column in ("weights", "dtype", "convention") else rows[:1]:
            row[column] = value
        write_table(tmp_path / "b.csv", rows, program.COLUMNS)
        (tmp_path / "rows.csv").unlink(missing_ok=True)
        capsys.readouterr()
        assert program.main(command) == 2
        assert told in capsys.readouterr().err.replace(f"{tmp_path}/", "")
        assert not (tmp_path / "rows.csv").exists()
        assert not (tmp_path / "rows.csv.parts").exists()


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("weights", "sha256:other", "rows of tiny-wan with weights sha256:other, this run with weights sha256:"),
        ("dtype", "bf16", "rows of tiny-wan with dtype bf16, this run with dtype fp32"),
        ("convention", "svg", "rows with convention svg, this run with convention videosparse"),
    ],
)
def test_a_table_of_other_weights_is_left_as_it_is(program, tmp_path, calls, capsys, column, value, told):
    """Also where none of its videos is asked for: its rows have another number of steps."""
    output, settings = tmp_path / "rows.csv", program.settings_of(device="cpu")
    row = dict.fromkeys(COLUMNS, "") | {"model": "tiny-wan", "setting": "dense", "steps": "2", "commit": "another"}
    row |= program.kind_of(settings, program.weights_of(settings))
    write_table(output, [row | {column: value}], COLUMNS)
    before = output.read_bytes()
    command = [*SMALL, "--limit", "1", "--output", str(output), "--methods", "other-noise"]
    assert program.main(command) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.endswith("; use another --output.\n")
    assert said.count("\n") == 1
    assert calls == []
    assert output.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]
    write_table(output, [row], COLUMNS)
    assert program.main(command) == 0, "other code may go on"
    assert len(read_table(output)) == 3


def test_integers_that_cannot_run_are_told_before_anything_is_made(program, tmp_path, calls, capsys):
    command = [*SMALL, "--limit", "1", "--output", str(tmp_path / "rows.csv"), "--methods"]
    assert program.main([*command, "paro@0.5+int8"]) == 2
    told = "tiny-wan, paro 0.5, int8: int8 cannot run on cpu: it takes float16 and bfloat16 (got float32); "
    assert capsys.readouterr().err == f"Error: {told}use --dtype bf16 or a setting without it.\n"
    assert calls == []
    assert list(tmp_path.iterdir()) == []
    assert program.main([*command, "paro@0.5+int8", "radial:quant=int8", "random"]) == 1, "the others go on"
    said = capsys.readouterr().err
    assert f"Left out: {told}" in said
    assert f"Failed: {told}" in said
    assert "Left out: tiny-wan, radial, quant=int8: int8 cannot run" in said
    assert "Calibrating" not in said
    assert [row["setting"] for row in read_table(tmp_path / "rows.csv")] == ["dense", "random 0.5"]


def test_time_that_is_up_ends_the_run(program, tmp_path, capsys):
    output = tmp_path / "rows.csv"
    assert program.main([*SMALL, "--output", str(output), "--methods", "random", "--seconds", "0"]) == 3
    assert "The time was up" in capsys.readouterr().err
    assert not output.exists()


def test_a_setting_that_fails_leaves_the_others(program, tmp_path, monkeypatch, capsys):
    original = Batches.make

    def make(self, prompts, processor, **more):
        if type(processor).__name__ == "RandomProcessor":
            raise RuntimeError("no such kernel\nat all")
        return original(self, prompts, processor, **more)

    monkeypatch.setattr(Batches, "make", make)
    command = [*SMALL, "--steps", "2", "--limit", "1", "--output", str(tmp_path / "rows.csv")]
    assert program.main([*command, "--methods", "random", "radial"]) == 1
    assert "Failed: tiny-wan, random 0.5: RuntimeError: no such kernel at all\n" in capsys.readouterr().err
    assert [row["setting"] for row in read_table(tmp_path / "rows.csv")] == ["dense", "radial"]
    monkeypatch.undo()
    assert program.main([*command, "--methods", "random", "radial"]) == 0
    assert [row["setting"] for row in read_table(tmp_path / "rows.csv")] == ["dense", "random 0.5", "radial"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--methods", "radail"], "Did you mean 'radial'"),
        (["--height", "60"], "height"),
        (["--prompts", "none.json"], "Cannot read prompts from none.json"),
        (["--output", "rows.txt"], "must end in .csv or .parquet"),
        (["--models", "/no/such/folder"], "/no/such/folder"),
        (["--models", "tiny-wan", "assets/tiny-wan"], "are both called tiny-wan, by which rows tell models apart"),
        (["--output", f"{__file__}/rows.csv"], "is not a folder; choose another folder"),
    ],
)
def test_what_cannot_be_run_is_one_line(program, tmp_path, capsys, options, told):
    assert program.main([*SMALL, "--output", str(tmp_path / "rows.csv"), *options]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert len(said.strip().splitlines()) == 1


def test_a_table_that_cannot_be_written_is_one_line(program, tmp_path, capsys):
    rows, output = tmp_path / "rows.csv", tmp_path / "merged.csv"
    write_table(rows, [], COLUMNS)
    (tmp_path / "merged.csv.parts").write_text("a file where the folder of the parts should be")
    assert program.main(["--output", str(output), "--merge", str(rows)]) == 2
    assert "merged.csv.parts" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--block", "32"],
        ["--batch", "0"],
        ["--keep-videos", "-1"],
        ["--first-steps", "nan"],
        ["--first-steps", "7"],
        ["--first-steps=-1"],
        ["--seconds", "nan"],
        ["--seconds=-1"],
    ],
)
def test_options_out_of_range(program, capsys, options):
    with pytest.raises(SystemExit):
        program.arguments(["--output", "rows.csv", *options])
    assert "must be" in capsys.readouterr().err


def test_two_processes_share_the_prompts(tmp_path):
    """As accelerate and torchrun start them; each process writes its part, and the first makes the table."""
    output = tmp_path / "rows.csv"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(PROGRAM)]
    command += [*SMALL, "--steps", "2", "--methods", "random", "--output", str(output)]
    path = os.pathsep.join(filter(None, [str(PROGRAM.parents[1]), os.environ.get("PYTHONPATH", "")]))
    more = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=os.environ | more)
    assert done.returncode == 0, done.stderr
    rows = read_table(output)
    assert [row["setting"] for row in rows] == ["dense"] * 2 + ["random 0.5"] * 2
    assert {row["batch"] for row in rows} == {"1"}, "each made one prompt"
    assert rows[0]["prompt"] != rows[1]["prompt"]
    assert "4 of 4 rows" in done.stdout
