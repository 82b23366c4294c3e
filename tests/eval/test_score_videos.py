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
    rows = table(fast / "other" / "radial_fidelity_fastvideo.csv")
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


def test_videos_too_short_for_drift_are_told(program, folders, capsys):
    fast, _ = folders
    command = [str(fast), "--dimensions", "temporal_flickering", "--long", "--no-download"]
    assert program.main(command) == 0
    assert capsys.readouterr().err == ""
    for seed, prompt in enumerate(("a cat", "a dog")):
        write_mp4(fast / f"{prompt}-0.mp4", gliding(frames=8, seed=seed), 4)
    for earlier in (True, False):
        assert program.main(command) == 0
        told = capsys.readouterr().err.splitlines()
        old = "fast_long_drift.csv is of an earlier run, and this run has no rows for it; it is now"
        why = "has no drift; it is not longer than one clip of 2 seconds."
        assert told == [f"Note: {old} fast_long_drift.csv.old."] * earlier + [
            f"Note: a cat-0.mp4: {why}",
            f"Note: a dog-0.mp4: {why}",
        ]


def test_summarise(program, tmp_path, capsys):
    path = tmp_path / "by_vbench.json"
    path.write_text(json.dumps({"temporal_flickering": [1.0, []], "appearance_style": [0.0009, []]}))
    assert program.main(["--summarise", str(path)]) == 0
    said = capsys.readouterr().out
    assert "total: 0.8000, of what is there: no published figure" in said
    assert "range" not in said


def test_summarise_tells_of_scores_outside_their_range(program, tmp_path, capsys):
    path = tmp_path / "by_vbench.json"
    path.write_text(json.dumps({"scene": [97, []], "temporal_flickering": [0.5, []]}))
    assert program.main(["--summarise", str(path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "scene: 97.0000 is outside its range, 0 to 0.8222; it counts as 1" in said
    assert "temporal_flickering: 0.5000 is outside its range, 0.6293 to 1; it counts as 0" in said


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{}", "holds no dimension; expected at least one with a score."),
        (
            '{"scene": [NaN, []]}',
            "the score of scene must be a finite number (got nan); score it anew.",
        ),
        (
            '{"scene": [0.5, [{"video_path": "a.mp4", "video_results": Infinity}]]}',
            "the score of scene of a.mp4 must be a finite number (got inf); score it anew.",
        ),
    ],
)
def test_summarise_refuses_what_has_no_scores(program, tmp_path, capsys, text, told):
    path = tmp_path / "results.json"
    path.write_text(text)
    assert program.main(["--summarise", str(path)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith(f"Error: {path}")
    assert line.endswith(told)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "no such folder"),
        (["FAST", "--dimensions", "colour"], "Unknown dimension 'colour'"),
        (["FAST", "--suite", "absent.json"], "cannot be read as a prompt suite"),
        (["FAST", "--dimensions", "none", "--reference", "absent"], "no such folder"),
        (["FAST", "--dimensions", "none"], "leaves nothing to compute; add --reference FOLDER"),
        (["FAST", "--name", "../esc"], "--name must not start with a dot or hold a slash (got '../esc')"),
        (["FAST", "--name", "a/b"], "--name must not start with a dot or hold a slash (got 'a/b')"),
        (["FAST", "--name", ".a"], "--name must not start with a dot or hold a slash (got '.a')"),
        ([__file__], "test_score_videos.py: is a file; expected a folder that holds videos"),
        (["FAST", "--reference", __file__], "test_score_videos.py: is a file; expected a folder that holds videos"),
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
    assert not (folders[0] / "scores").exists(), "told before anything is scored"


@pytest.mark.parametrize("name", ["ledger.jsonl", "eval_results.json", "fidelity_svg.csv", "drift.csv.part"])
def test_a_folder_where_a_file_is_to_be(program, folders, capsys, name):
    fast, dense = folders
    place = fast / "scores" / f"mine_{name}"
    place.mkdir(parents=True)
    command = [str(fast), "--dimensions", "free", "--long", "--name", "mine", "--no-download"]
    assert program.main([*command, "--reference", str(dense), "--convention", "svg"]) == 2
    told = f"Error: {place} is a folder, where a file of scores is to be; rename it, or choose another --name."
    assert capsys.readouterr().err.splitlines() == [told]
    assert list(place.parent.iterdir()) == [place]


@pytest.mark.parametrize("more", [[], ["--long"], ["--mixed-sizes"]])
def test_a_bad_link_stops_nothing(program, folders, capsys, more):
    fast, _ = folders
    (fast / "dangling-0.mp4").symlink_to("nowhere.mp4")
    (fast / "loop-0.mp4").symlink_to("loop-0.mp4")
    assert program.main([str(fast), "--dimensions", "temporal_flickering", "--no-download", *more]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "Not computed: dangling-0.mp4: cannot be read (No such file or directory).",
        "Not computed: loop-0.mp4: cannot be read (Too many levels of symbolic links).",
    ]
    prefix = "fast_long" if "--long" in more else "fast"
    results = load_results(fast / "scores" / f"{prefix}_eval_results.json")
    assert len(results["temporal_flickering"].videos) == 2


def test_each_convention_has_its_table(program, folders):
    fast, dense = folders
    command = [str(fast), "--dimensions", "none", "--reference", str(dense), "--no-download"]
    for more in ([], ["--convention", "svg"]):
        assert program.main([*command, *more]) == 0
    for name, convention in (("fast_fidelity.csv", "videosparse"), ("fast_fidelity_svg.csv", "svg")):
        assert {row["convention"] for row in table(fast / "scores" / name)} == {convention}


def test_a_table_of_another_reference_does_not_stay(program, folders, capsys):
    fast, dense = folders
    strange = dense.parent / "strange"
    strange.mkdir()
    (strange / "x-0.mp4").write_bytes((dense / "a cat-0.mp4").read_bytes())
    command = [str(fast), "--dimensions", "none", "--no-download", "--reference"]
    assert program.main([*command, str(dense)]) == 0
    path = fast / "scores" / "fast_fidelity.csv"
    before = path.read_text()
    capsys.readouterr()
    assert program.main([*command, str(strange)]) == 1
    said = capsys.readouterr()
    assert not path.exists()
    assert path.with_name("fast_fidelity.csv.old").read_text() == before
    assert (
        "Note: fast_fidelity.csv is of an earlier run, and this run has no rows for it; it is now "
        "fast_fidelity.csv.old." in said.err.splitlines()
    )
    assert said.out.splitlines() == ["Nothing written: no video could be compared."]


def test_equal_frames_do_not_hide_the_others(program, folders, capsys):
    fast, dense = folders
    for video in ("a cat-0.mp4", "same-0.mp4"):
        for folder in folders:
            (folder / video).write_bytes((dense / "a cat-0.mp4").read_bytes())
    command = [str(fast), "--dimensions", "none", "--reference", str(dense), "--no-download"]
    assert program.main(command) == 0
    said = capsys.readouterr().out
    rows = {row["video"]: row["psnr"] for row in table(fast / "scores" / "fast_fidelity.csv")}
    assert (rows["a cat-0"], rows["same-0"]) == ("inf", "inf")
    (line,) = [line for line in said.splitlines() if "psnr" in line and "│" in line]
    assert f" {float(rows['a dog-0']):.4f} " in line
    assert (
        "psnr: inf for 2 of 3 videos, 2 of them identical in all frames; mean and interval are of the other 1"
        in said.splitlines()
    )
    (fast / "a dog-0.mp4").unlink()
    assert program.main(command) == 0
    said = capsys.readouterr().out
    assert " inf " in next(line for line in said.splitlines() if "psnr" in line)
    assert "mean and interval" not in said


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
