"""VBench's results file, totals with missing dimensions, and the ledger of a run."""

import json

import pytest

from videosparse.metrics.vbench import SCALES
from videosparse.metrics.vbench.ledger import Ledger, stamp_of
from videosparse.metrics.vbench.results import DimensionResult, load_results, save_results, totals


def test_round_trip(tmp_path):
    path = tmp_path / "a_eval_results.json"
    results = {
        "temporal_flickering": DimensionResult(0.9, {"v/a-0.mp4": 0.85, "v/b-0.mp4": 0.95}),
        "imaging_quality": DimensionResult(0.7, {"v/a-0.mp4": 0.7}),
    }
    save_results(path, results)
    back = load_results(path)
    assert list(back) == list(results)
    assert back["temporal_flickering"] == results["temporal_flickering"]
    assert back["imaging_quality"].videos["v/a-0.mp4"] == pytest.approx(0.7)
    told = json.loads(path.read_text())
    # the shape that VBench's summariser reads: score first; it tells imaging_quality of a video in hundredths
    assert {name: entry[0] for name, entry in told.items()} == {"temporal_flickering": 0.9, "imaging_quality": 0.7}
    assert told["temporal_flickering"][1][0] == {"video_path": "v/a-0.mp4", "video_results": 0.85}
    assert told["imaging_quality"][1][0]["video_results"] == pytest.approx(70)
    assert not list(tmp_path.glob("*.part"))


def test_a_file_by_vbench(tmp_path):
    path = tmp_path / "b_eval_results.json"
    told = {
        "dynamic_degree": [
            0.5,
            [{"video_path": "a", "video_results": True}, {"video_path": "b", "video_results": False}],
        ],
        "subject_consistency": [0.9, [{"video_path": "a", "video_results": 0.9, "video_sim": 4.5, "cnt_per_video": 5}]],
        "human_action": [1.0, []],
    }
    path.write_text(json.dumps(told))
    found = load_results(path)
    assert found["dynamic_degree"].videos == {"a": 1.0, "b": 0.0}
    assert found["subject_consistency"].score == 0.9
    assert found["human_action"].videos == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as results"),
        ("[1]", "expected dimensions by name"),
        ("{}", "c.json holds no dimension; expected at least one"),
        ('{"color": [NaN, []]}', r"c.json: the score of color must be a finite number \(got nan\)"),
        ('{"color": [1, [{"video_path": "a", "video_results": NaN}]]}', "score of color of a must be a finite number"),
        (f'{{"color": [1{"0" * 400}, []]}}', "color has another shape than"),
        ('{"color": 0.5}', "color has another shape than"),
        ('{"color": [0.5, [{"video": 1}]]}', "color has another shape than"),
    ],
)
def test_files_that_are_no_results(tmp_path, text, message):
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_results(path)
    with pytest.raises(ValueError, match="cannot be read"):
        load_results(tmp_path / "absent.json")


def middle(name):
    """The raw score that is normalised to one half."""
    return (SCALES[name].minimum + SCALES[name].maximum) / 2


def test_complete_totals():
    scores = {name: middle(name) for name in SCALES} | {"dynamic_degree": 1.0, "scene": SCALES["scene"].maximum}
    found = totals(scores)
    quality = (6 * 0.5 + 0.5 * 1.0) / 6.5
    semantic = (8 * 0.5 + 1) / 9
    assert found.complete
    assert found.quality == pytest.approx(quality)
    assert found.semantic == pytest.approx(semantic)
    assert found.total == pytest.approx((4 * quality + semantic) / 5)


def test_missing_dimensions_are_named_and_not_counted_as_zero():
    found = totals({"temporal_flickering": 1.0, "dynamic_degree": 0.0})
    assert found.quality == pytest.approx((1 * 1 + 0.5 * 0) / 1.5)
    assert (found.semantic, found.total, found.complete) == (None, None, False)
    assert set(found.missing_quality) == {
        "subject_consistency", "background_consistency", "motion_smoothness", "aesthetic_quality", "imaging_quality",
    }  # fmt: skip
    assert len(found.missing_semantic) == 9
    both = totals({"temporal_flickering": 1.0, "appearance_style": 0.0009})
    assert (both.quality, both.semantic) == (1.0, 0.0)
    assert both.total == pytest.approx(0.8)
    assert not both.complete


def test_scores_outside_the_range_are_clipped_and_extra_ones_left_out():
    assert totals({"motion_smoothness": 1.0}).quality == 1
    assert totals({"dynamic_degree_dis": 1.0}).quality is None


def test_bootstrap():
    def bootstrap(values):
        return DimensionResult(0.5, {str(i): value for i, value in enumerate(values)}).interval()

    assert bootstrap([0.5] * 9) == (0.5, 0.5)
    values = [0.0, 1.0] * 50
    low, high = bootstrap(values)
    # mean .5, standard error .05: 1.96 of them to either side
    assert (low, high) == pytest.approx((0.402, 0.598), abs=0.02)
    assert bootstrap(values) == (low, high)


def test_a_ledger_goes_on(tmp_path):
    path = tmp_path / "deep" / "ledger.jsonl"
    ledger = Ledger(path, {"long": False})
    assert not path.parent.exists()
    ledger.put("a.mp4", "temporal_flickering", "stamp", {"value": 0.5})
    again = Ledger(path, {"long": False})
    assert again.get("a.mp4", "temporal_flickering", "stamp") == {"value": 0.5}
    assert again.get("a.mp4", "temporal_flickering", "another") is None
    assert again.get("b.mp4", "temporal_flickering", "stamp") is None


def test_a_torn_line_is_dropped(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, {"long": False})
    ledger.put("a", "x", "s", 1)
    ledger.put("b", "x", "s", 2)
    whole = path.read_bytes()
    for kept in (len(whole) - 1, len(whole) - 20):
        path.write_bytes(whole[:kept])
        again = Ledger(path, {"long": False})
        assert (again.get("a", "x", "s"), again.get("b", "x", "s")) == (1, None)
        again.put("b", "x", "s", 3)
        assert Ledger(path, {"long": False}).get("b", "x", "s") == 3
    path.write_bytes(whole[:10])  # not even the first line is whole
    assert Ledger(path, {"long": False}).get("a", "x", "s") is None


def test_ledgers_of_other_runs_are_refused(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger(path, {"long": False}).put("a", "x", "s", 1)
    with pytest.raises(ValueError, match=r"another long \(False there, True now\)"):
        Ledger(path, {"long": True})
    path.write_text("hello\n")
    with pytest.raises(ValueError, match="holds no scores"):
        Ledger(path, {"long": True})


def test_stamps_change_with_files(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("1")
    b.write_text("2")
    before = stamp_of(a, b)
    assert stamp_of(a, b) == before
    b.write_text("22")
    assert stamp_of(a, b) != before
    b.unlink()
    assert stamp_of(a, b).endswith(" absent")
