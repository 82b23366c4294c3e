"""Prompt suites, and folders scored with and without them: what goes wrong, going on, long videos."""

import json
import shutil
from pathlib import Path

import footage
import pytest
import torch
from safetensors.torch import load_file, save_file

from videosparse.metrics.vbench import DIMENSIONS, WITHOUT_WEIGHTS, Models, Weights, suite
from videosparse.metrics.vbench.consistency import consistency
from videosparse.metrics.vbench.drift import clip_bounds
from videosparse.metrics.vbench.ledger import Ledger
from videosparse.metrics.vbench.prompts import load_suite, prompt_of, video_name
from videosparse.metrics.vbench.suite import score_folder
from videosparse.metrics.vbench.tables import dimension_rows, drift_rows, video_rows
from videosparse.metrics.vbench.weights import NEEDED
from videosparse.metrics.video import as_video, read_video, save_raw

FREE = ["temporal_flickering", "motion_smoothness"]
PROMPTS = Path(__file__).parents[3] / "eval" / "prompts"
STYLE = {"appearance_style": {"appearance_style": "oil painting"}}


@pytest.fixture
def folder(tmp_path):
    """Two videos of one prompt and one of another."""
    place = tmp_path / "videos"
    footage.save(place, footage.pan(2), "a cat-0.mp4")
    footage.save(place, footage.still(17), "a cat-1.mp4")
    footage.save(place, footage.shake(8), "a dog, oil-0.mp4")
    return place


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "ledger.jsonl", {})


def write_suite(folder, *entries):
    path = folder / "suite.json"
    path.write_text(json.dumps(entries))
    return load_suite(path)


def test_every_video_in_every_dimension(folder, ledger):
    found = score_folder(folder, ledger, dimensions=FREE)
    assert found.complete
    assert list(found.results) == FREE
    values = found.results["temporal_flickering"].videos
    assert [Path(path).name for path in values] == ["a cat-0.mp4", "a cat-1.mp4", "a dog, oil-0.mp4"]
    for path, value in values.items():
        expected = DIMENSIONS["temporal_flickering"].score(read_video(Path(path)), None).value
        assert value == pytest.approx(expected)
    assert found.results["temporal_flickering"].score == pytest.approx(sum(values.values()) / 3)
    assert list(found.prompts.values()) == ["a cat", "a cat", "a dog, oil"]
    assert found.drift == {}


def test_learned_dimensions_over_a_suite(folder, ledger, models):
    chosen = write_suite(
        folder.parent,
        {"prompt_en": "a cat", "dimension": ["subject_consistency", "dynamic_degree", "human_action"]},
        {"prompt_en": "a cat", "dimension": ["aesthetic_quality"]},  # VBench's file names some prompts twice
        {"prompt_en": "a dog, oil", "dimension": ["appearance_style"], "auxiliary_info": STYLE},
        {"prompt_en": "a cow", "dimension": ["subject_consistency"]},
    )
    names = ["subject_consistency", "aesthetic_quality", "appearance_style", "dynamic_degree_dis", *FREE]
    found = score_folder(folder, ledger, dimensions=names, suite=chosen, models=models)
    videos = {name: [Path(p).stem for p in result.videos] for name, result in found.results.items()}
    assert videos == {
        "subject_consistency": ["a cat-0", "a cat-1"],
        "aesthetic_quality": ["a cat-0", "a cat-1"],
        "appearance_style": ["a dog, oil-0"],
        "dynamic_degree_dis": ["a cat-0", "a cat-1"],
    }
    assert found.missing == dict.fromkeys(FREE, "no video of this folder is for it.")
    assert found.notes == ["Prompts of the suite without a video: 1, such as 'a cow'."]


def test_videos_that_are_not_of_the_suite(folder, ledger):
    chosen = write_suite(folder.parent, {"prompt_en": "a cat", "dimension": FREE})
    found = score_folder(folder, ledger, dimensions=FREE, suite=chosen)
    assert found.notes == ["a dog, oil-0.mp4: its prompt is not in the suite; left out."]
    assert len(found.results["temporal_flickering"].videos) == 2
    other = write_suite(folder.parent, {"prompt_en": "a cow", "dimension": FREE})
    with pytest.raises(ValueError, match=r"No video belongs to a prompt of the suite; videos must be called"):
        score_folder(folder, ledger, dimensions=FREE, suite=other)


def test_what_cannot_be_scored_is_named_and_the_rest_goes_on(folder, ledger):
    (folder / "broken-0.mp4").write_bytes(b"no")
    footage.save(folder, as_video(torch.zeros(2, 3, 64, 64), 16), "short-0.mp4")
    footage.save(folder, footage.still(size=32), "small-0.mp4")
    frames = torch.rand(4, 64, 64, 3)
    save_raw(folder / "raw-0.safetensors", as_video(frames, 16))
    broken = folder / "nan-0.safetensors"
    from safetensors.torch import save_file

    frames[2, 0, 0, 0] = float("nan")
    save_file({"video": frames}, broken, metadata={"fps": "16"})
    found = score_folder(folder, ledger, dimensions=FREE)
    assert not found.complete
    assert sorted(found.failures) == [
        "broken-0.mp4: cannot be read (Invalid data found when processing input).",
        "nan-0.safetensors: frame 2 holds NaN or infinite values.",
        "short-0.mp4: motion_smoothness needs at least 3 frames (got 2).",
        "small-0.mp4: is 32x32 in a folder of 64x64 videos; mixed sizes are scored with --mixed-sizes.",
    ]
    assert len(found.results["temporal_flickering"].videos) == 5  # what is short still flickers
    assert len(found.results["motion_smoothness"].videos) == 4
    mixed = score_folder(folder, ledger, dimensions=FREE, mixed_sizes=True)
    assert len(mixed.results["temporal_flickering"].videos) == 6


def test_a_run_goes_on_where_it_was(folder, ledger, monkeypatch):
    def stop(name, done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_folder(folder, ledger, dimensions=FREE, progress=stop)
    read = []
    monkeypatch.setattr(suite, "read_video", lambda path: read.append(path.name) or read_video(path))
    again = Ledger(ledger.path, {})
    first = score_folder(folder, again, dimensions=FREE)
    assert read == ["a dog, oil-0.mp4"]
    assert score_folder(folder, Ledger(ledger.path, {}), dimensions=FREE).results == first.results
    assert len(read) == 1
    # a changed file is scored again, in all; the others are not
    footage.save(folder, footage.shake(4), "a cat-1.mp4")
    changed = score_folder(folder, again, dimensions=FREE)
    assert read[1:] == ["a cat-1.mp4"]
    assert changed.results != first.results


def test_scores_of_other_weights_are_not_taken(folder, ledger, weights_folder, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(weights_folder, own)

    def scores():
        models = Models(Weights(own, download=False), batch=4)
        chosen = ["temporal_flickering", "subject_consistency"]
        found = score_folder(folder, ledger, dimensions=chosen, models=models).results
        return [found[name].score for name in chosen], ledger.path.read_text().count("\n")

    (flicker, consistent), lines = scores()
    assert scores() == ([flicker, consistent], lines), "nothing is scored twice"
    path = next(own.rglob(f"{NEEDED['dino'].name}/*.safetensors"))
    save_file({name: torch.randn_like(x) for name, x in load_file(path).items()}, path, {"format": "pt"})
    (again, other), more = scores()
    assert (again, more) == (flicker, lines + 3), "what needs no weights is known"
    assert other != consistent


def test_missing_weights_are_named_and_the_rest_is_computed(folder, ledger, models, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    nothing = Models(Weights(tmp_path / "nothing", download=False))
    names = ["subject_consistency", "aesthetic_quality", "appearance_style", *FREE]
    found = score_folder(folder, ledger, dimensions=names, models=nothing)
    assert list(found.results) == FREE
    assert not found.complete
    assert "facebook/dino-vitb16" in found.missing["subject_consistency"]
    both = found.missing["aesthetic_quality"]
    assert "openai/clip-vit-large-patch14" in both
    assert "sa_0_4_vit_l_14_linear.pth" in both
    assert found.missing["appearance_style"] == "needs a suite that names the style of each prompt (--suite)."
    # with the weights the same ledger goes on; what it knows afterwards needs no weights any more
    later = score_folder(folder, ledger, dimensions=["subject_consistency", *FREE], models=models)
    assert later.complete
    without = score_folder(folder, ledger, dimensions=["subject_consistency"], models=nothing)
    assert without.results["subject_consistency"] == later.results["subject_consistency"]


def test_a_score_that_is_no_number(folder, ledger, models):
    models.load("laion-head").weight[:] = float("nan")
    found = score_folder(folder, ledger, dimensions=["aesthetic_quality"], models=models)
    assert found.failures[0] == "a cat-0.mp4: aesthetic_quality gave nan."
    assert found.missing == {"aesthetic_quality": "none of its videos could be scored."}


def test_long_videos(tmp_path, ledger, models):
    folder = tmp_path / "videos"
    footage.save(folder, footage.pan(1, frames=20, size=32, fps=4), "a-0.mp4")
    footage.save(folder, footage.still(frames=6, size=32, fps=4), "b-0.mp4")
    names = ["subject_consistency", "temporal_flickering"]
    found = score_folder(folder, ledger, dimensions=names, models=models, long=True)
    video = read_video(folder / "a-0.mp4")
    bounds = clip_bounds(video)
    assert bounds == [(0, 8), (8, 16), (12, 20)]
    features = models.features("dino", video)
    clips = [consistency(features[a:b]).value for a, b in bounds]
    path = str(folder / "a-0.mp4")
    assert found.results["subject_consistency"].videos[path] == pytest.approx(sum(clips) / 3, abs=1e-6)
    # over clips, of which the second video has one
    one = found.results["subject_consistency"].videos[str(folder / "b-0.mp4")]
    assert found.results["subject_consistency"].score == pytest.approx((sum(clips) + one) / 4, abs=1e-6)
    assert list(found.drift) == [path]
    assert [curve.feature for curve in found.drift[path]] == ["colour", "dino"]
    assert found.drift[path][0].seconds == (0, 2, 3)
    again = score_folder(folder, Ledger(ledger.path, {}), dimensions=names, models=models, long=True)
    assert (again.drift, again.results) == (found.drift, found.results)
    rows = drift_rows(found)
    assert [row["video"] for row in rows[:3]] == ["mean"] * 3
    assert len(rows) == 12


def test_tables(folder, ledger):
    found = score_folder(folder, ledger, dimensions=[*WITHOUT_WEIGHTS])
    rows = {row["dimension"]: row for row in dimension_rows(found)}
    flicker = rows["temporal_flickering"]
    assert (flicker["kind"], flicker["videos"], flicker["missing"]) == ("exact", 3, "")
    assert float(flicker["low"]) <= float(flicker["score"]) <= float(flicker["high"])
    assert rows["color"]["missing"] == "not computed here."
    assert rows["quality"]["missing"].startswith("of 2 of 7 dimensions; missing: subject_consistency")
    assert rows["total"]["normalised"] == ""
    assert rows["total"]["missing"].startswith("of 2 of 16 dimensions")
    values, columns = video_rows(found)
    assert columns == ("video", "prompt", *WITHOUT_WEIGHTS)
    assert [row["prompt"] for row in values] == ["a cat", "a cat", "a dog, oil"]


def test_an_unknown_dimension(folder, ledger):
    for name, told in (("colour", "Unknown dimension 'colour'"), ("color", "'color' of VBench is not computed here")):
        with pytest.raises(ValueError, match=rf"{told}; choose from: subject_consistency"):
            score_folder(folder, ledger, dimensions=[name])
    with pytest.raises(ValueError, match="Did you mean 'motion_smoothness'"):
        score_folder(folder, ledger, dimensions=["motion_smothness"])


def test_names_of_videos():
    assert video_name("a cat", 3) == "a cat-3.mp4"
    assert prompt_of("a cat-3") == "a cat"
    assert prompt_of("a cat-like dog") == "a cat-like dog"
    assert prompt_of("1980-1990-0") == "1980-1990"
    with pytest.raises(ValueError, match="no slash"):
        video_name("a/b", 0)
    with pytest.raises(ValueError, match="too long for a file name"):
        video_name("x" * 255, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as a prompt suite"),
        ('{"prompts": []}', "is no prompt suite"),
        ("[]", "is no prompt suite"),
        ("[1]", "entry 0: expected an object"),
        ('[{"dimension": []}]', "entry 0: prompt_en must be a text"),
        ('[{"prompt_en": "a", "dimension": "b"}]', "entry 0: dimension must be a list of names"),
        ('[{"prompt_en": "a", "dimension": ["b"], "auxiliary_info": 1}]', "auxiliary_info must be an object"),
    ],
)
def test_files_that_are_no_suites(tmp_path, text, message):
    path = tmp_path / "suite.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_suite(path)
    with pytest.raises(ValueError, match="cannot be read"):
        load_suite(tmp_path / "absent.json")


def test_the_suite_of_the_embedded_model_follows_its_prompts():
    """What stands still before a still background is asked for flickering, what moves for dynamics."""
    prompts = json.loads((PROMPTS / "world64.json").read_text())["prompts"]
    found = load_suite(PROMPTS / "world64_suite.json").prompts
    assert list(found) == [p["prompt"] for p in prompts]
    for entry in prompts:
        still = all(o["motion"] == "static" for o in entry["objects"])
        dimensions = found[entry["prompt"]].dimensions
        assert set(dimensions) <= set(DIMENSIONS)
        assert ("temporal_flickering" in dimensions) == (still and entry["background"] != "stripes")
        assert ("dynamic_degree" in dimensions) == (not still)
        video_name(entry["prompt"], 0)
