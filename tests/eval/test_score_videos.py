"""The program that scores folders: files it writes, exit codes, and what it says about what it could not do."""

import csv
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("cv2")

from videosparse.generation.video import write_mp4
from videosparse.metrics.vbench.results import load_results

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("score_videos", ROOT / "eval" / "score_videos.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def gliding(frames=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 8, generator=generator)
    picture = torch.nn.functional.interpolate(coarse, (32, 64), mode="bicubic").clamp(0, 1)[0]
    return torch.stack([picture[..., t : t + 32] for t in range(frames)])


@pytest.fixture
def folders(tmp_path):
    """Two videos each: a folder and its reference."""
    for folder, shift in (("fast", 0.0), ("dense", 0.02)):
        (tmp_path / folder).mkdir()
        for seed, prompt in enumerate(("a cat", "a dog")):
            write_mp4(tmp_path / folder / f"{prompt}-0.mp4", (gliding(seed=seed) + shift).clamp(0, 1), 4)
    return tmp_path / "fast", tmp_path / "dense"


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_long_scores_stand_beside_those_of_whole_videos(program, folders, capsys):
    fast, _ = folders
    for more in ([], ["--long"], ["--long"], []):
        assert program.main([str(fast), "--dimensions", "temporal_flickering", *more]) == 0, capsys.readouterr().err
    names = {path.name for path in (fast / "scores").iterdir()}
    assert {"fast_ledger.jsonl", "fast_long_ledger.jsonl", "fast_videos.csv", "fast_long_videos.csv"} <= names


def test_scores_of_a_folder(program, folders, capsys):
    fast, _ = folders
    assert program.main([str(fast), "--dimensions", "free", "--no-download"]) == 0
    output = fast / "scores"
    assert {path.name for path in output.iterdir()} == {
        "fast_eval_results.json", "fast_full_info.json", "fast_dimensions.csv", "fast_videos.csv", "fast_ledger.jsonl",
    }  # fmt: skip
    told = json.loads((output / "fast_eval_results.json").read_text())
    # what VBench's summariser does with the file
    firsts = {name.replace("_", " "): told[name][0] for name in told}
    assert set(firsts) == {"temporal flickering", "motion smoothness", "dynamic degree dis"}
    assert all(0 <= value <= 1 for value in firsts.values())
    info = json.loads((output / "fast_full_info.json").read_text())
    assert [entry["prompt_en"] for entry in info] == ["a cat", "a dog"]
    assert info[0]["video_list"] == [str(fast / "a cat-0.mp4")]
    rows = {row["dimension"]: row for row in table(output / "fast_dimensions.csv")}
    assert rows["motion_smoothness"]["kind"] == "proxy"
    assert float(rows["temporal_flickering"]["score"]) == pytest.approx(firsts["temporal flickering"], abs=1e-6)
    assert len(table(output / "fast_videos.csv")) == 2
    said = capsys.readouterr()
    assert "quality: " in said.out
    assert "without subject_consistency" in said.out
    assert "total: none" in said.out
    assert said.err == ""


def test_a_second_run_computes_nothing(program, folders, monkeypatch):
    fast, dense = folders
    command = [str(fast), "--dimensions", "free", "--reference", str(dense), "--no-download"]
    assert program.main(command) == 0
    before = {p.name: p.read_bytes() for p in (fast / "scores").iterdir()}
    for module in ("vbench.suite", "pairs"):
        monkeypatch.setattr(f"videosparse.metrics.{module}.read_video", lambda path: pytest.fail("read again"))
    assert program.main(command) == 0
    assert {p.name: p.read_bytes() for p in (fast / "scores").iterdir()} == before


def test_what_is_missing_ends_in_exit_code_1(program, folders, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    fast, _ = folders
    (fast / "broken-0.mp4").write_bytes(b"no")
    names = ["aesthetic_quality", "temporal_flickering"]
    weights = ["--weights", str(tmp_path / "w"), "--no-download"]
    assert program.main([str(fast), "--dimensions", *names, *weights]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert f"{tmp_path / 'w' / 'sa_0_4_vit_l_14_linear.pth'}" in said[0]
    assert said[1] == "Not computed: broken-0.mp4: cannot be read (Invalid data found when processing input)."
    results = load_results(fast / "scores" / "fast_eval_results.json")
    assert len(results["temporal_flickering"].videos) == 2


def test_fidelity_to_a_reference(program, folders, capsys):
    fast, dense = folders
    command = [
        str(fast),
        "--dimensions",
        "none",
        "--reference",
        str(dense),
        "--convention",
        "fastvideo",
        "--no-download",
    ]
    assert program.main([*command, "--output", str(fast / "other"), "--name", "radial"]) == 0
    rows = table(fast / "other" / "radial_fidelity.csv")
    assert [row["video"] for row in rows] == ["a cat-0", "a dog-0"]
    assert {row["convention"] for row in rows} == {"fastvideo"}
    assert {row["frames_from"] for row in rows} == {"decoded"}
    assert 28 < float(rows[0]["psnr"]) < 38  # a shift of 0.02 is 34 dB, and the codec adds to it
    assert not (fast / "other" / "radial_eval_results.json").exists()
    assert "without LPIPS" in capsys.readouterr().err
    (dense / "a dog-0.mp4").unlink()
    assert program.main(command) == 1
    assert f"Not computed: a dog-0.mp4: {dense} has no video of that name." in capsys.readouterr().err


def test_long_videos(program, folders):
    fast, _ = folders
    assert program.main([str(fast), "--dimensions", "temporal_flickering", "--long", "--no-download"]) == 0
    rows = table(fast / "scores" / "fast_long_drift.csv")
    assert [(row["video"], row["seconds"]) for row in rows[:2]] == [("mean", "0.000"), ("mean", "1.000")]
    assert {row["feature"] for row in rows} == {"colour"}


def test_summarise(program, tmp_path, capsys):
    path = tmp_path / "by_vbench.json"
    path.write_text(json.dumps({"temporal_flickering": [1.0, []], "appearance_style": [0.0009, []]}))
    assert program.main(["--summarise", str(path)]) == 0
    said = capsys.readouterr().out
    assert "total: 0.8000, of what is there: no published figure" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "no such folder"),
        (["FAST", "--dimensions", "colour"], "Unknown dimension 'colour'"),
        (["FAST", "--suite", "absent.json"], "cannot be read as a prompt suite"),
        (["FAST", "--dimensions", "none", "--reference", "absent"], "no such folder"),
        (["--summarise", "absent.json"], "cannot be read as results"),
        (["FAST", "--dimensions", "free", "--output", f"{__file__}/out"], "is not a folder; choose another folder"),
    ],
)
def test_requests_that_cannot_be_carried_out(program, folders, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    given = [str(folders[0]) if a == "FAST" else a for a in arguments]
    assert program.main([*given, *([] if "--summarise" in given else ["--no-download"])]) == 2
    said = capsys.readouterr().err
    assert said.startswith("Error: ")
    assert message in said
    assert len(said.splitlines()) <= 2  # LPIPS may be noted before
    assert not (tmp_path / "absent").exists(), "a mistyped name must not become a folder"


def test_another_kind_of_run_is_refused(program, folders, capsys):
    fast, _ = folders
    command = [str(fast), "--dimensions", "temporal_flickering", "--no-download", "--name", "mine"]
    assert program.main(command) == 0
    assert program.main([*command, "--long"]) == 2
    assert "another long (False there, True now)" in capsys.readouterr().err


def test_a_folder_or_results_must_be_given(program, capsys):
    with pytest.raises(SystemExit):
        program.main([])
    assert "give a FOLDER of videos, or --summarise" in capsys.readouterr().err
