"""The prompt lists of `eval/score_world.py`: balanced, from their split, and true to their attributes."""

import importlib.util
import re
import runpy
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("scipy")

from videosparse.evaluation import prompt_lists
from videosparse.synthetic.scene import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, heldout_triples, triples

PROGRAM = Path(__file__).parents[2] / "eval" / "score_world.py"
MODEL = PROGRAM.parents[1] / "assets" / "tiny-wan"


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("score_world", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules["score_world"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["score_world"]


@pytest.fixture(scope="module")
def trained(program):
    return program.load_prompts(program.PROMPTS / "world64.json")


@pytest.fixture(scope="module")
def held_out(program):
    return program.load_prompts(program.PROMPTS / "world128_heldout.json")


@pytest.fixture(scope="module")
def pairs(program):
    return program.load_prompts(program.PROMPTS / "world32_pairs.json")


def test_the_training_list_is_balanced_and_holds_nothing_held_out(trained):
    assert len(trained) == 64
    objects = [o for prompt in trained for o in prompt.objects]
    assert len(objects) == len(set(objects)) == 64
    assert set(objects) <= set(triples("train"))
    for position, names in enumerate((SHAPES, tuple(COLOURS), MOTIONS)):
        counts = Counter(o[position] for o in objects)
        assert set(counts) == set(names)
        assert max(counts.values()) - min(counts.values()) <= 2
    assert Counter(p.background for p in trained) == dict.fromkeys(BACKGROUNDS, 16)


def test_the_other_list_holds_only_what_is_held_out(held_out):
    assert Counter(len(p.objects) for p in held_out) == {1: 96, 2: 32}
    assert {o for prompt in held_out for o in prompt.objects} == heldout_triples()
    assert all(p.objects[0][1] != p.objects[1][1] for p in held_out if len(p.objects) == 2)


def test_the_list_of_pairs_holds_nothing_held_out(pairs):
    assert [len(p.objects) for p in pairs] == [2] * 32
    assert {o for prompt in pairs for o in prompt.objects} <= set(triples("train"))
    assert all(p.objects[0][1] != p.objects[1][1] for p in pairs)


def test_every_prompt_has_its_own_text_and_seed(trained, held_out, pairs):
    for prompts in (trained, held_out, pairs):
        assert len({p.prompt for p in prompts}) == len(prompts)
        assert len({p.seed for p in prompts}) == len(prompts)


def test_the_scene_of_a_prompt_shows_what_the_prompt_says(trained, held_out, pairs):
    for prompt in trained + held_out + pairs:
        scene, expected = prompt.scene(), prompt.expected()
        by_colour = {o.colour: o for o in scene.objects}
        assert scene.background.kind == expected.background
        for said in expected.objects:
            drawn = by_colour[said.colour]
            assert (said.shape, said.motion) == (drawn.shape, drawn.motion)
            assert said.size in (None, drawn.size)
            assert said.speed in (None, drawn.speed)


def test_a_list_can_be_written_again(trained):
    for prompt in trained[:5]:
        again = prompt_lists.write_prompt(prompt.objects, prompt.background, prompt.seed)
        assert again["prompt"] == prompt.prompt


def test_a_text_that_says_something_else_is_an_error(program, tmp_path):
    path = tmp_path / "list.json"
    path.write_text(
        '{"prompts": [{"prompt": "a red circle rests on a plain background", "seed": 1, "background": "flat",'
        ' "objects": [{"shape": "circle", "colour": "red", "motion": "orbit"}]}]}'
    )
    with pytest.raises(ValueError, match="does not say"):
        program.load_prompts(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frames", "8"], r"--frames must be 4k\+1 for tiny-wan \(got 8\); use 5 or 9"),
        (["--model", "none"], "No model folder at none"),
        (["--prompts", "none.json"], r"Cannot read prompts from none\.json"),
        (["--output", "list.txt/rows.csv"], r"list\.txt is not a folder"),
    ],
)
def test_mistakes_end_with_one_line_before_anything_is_loaded(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").touch()
    monkeypatch.setattr(sys, "argv", [PROGRAM.name, "--model", "tiny-wan", "--output", "rows.csv", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(PROGRAM), run_name="__main__")
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert re.match(f"Error: .*{message}", told)
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--limit", "0"], "--limit must be at least 1"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--workers", "-1"], "--workers must be at least 0"),
        (["--guidance", "nan"], "--guidance must be a finite number"),
        (["--flow-shift", "-3"], "--flow-shift must be a positive number"),
        (["--set", "radial.decay=1"], "is not of --method dense"),
        (["--validate", "0"], "--validate must be at least 1"),
    ],
)
def test_what_would_score_nothing_is_refused(program, options, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["score_world.py", "--model", "tiny", "--output", "rows.csv", *options])
    with pytest.raises(SystemExit):
        program.parse_args()
    assert said in capsys.readouterr().err


def test_prompts_that_cannot_be_judged_are_refused_before_any_video(program, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "load_pipeline", lambda args: pytest.fail("loaded"))
    lines, other = tmp_path / "lines.txt", tmp_path / "other.json"
    lines.write_text("a red circle bounces\na cat surfing\n")
    entry = '{"prompt": "a red circle bounces", "seed": "x", "objects": [], "background": ""}'
    other.write_text(f'{{"prompts": [{entry}]}}')
    for path, more, said in (
        (lines, [], "lines.txt: the caption must name a colour and a shape"),
        (lines, ["--limit", "1", "--through-vae"], "renders scenes"),
        (other, [], "its seed a whole number"),
        (program.PROMPTS / "world64.json", ["--save", f"{lines}/videos"], "is not a folder"),
        (program.PROMPTS / "world64.json", ["--output", str(tmp_path)], "it is a folder"),
    ):
        options = ["--model", str(MODEL), "--output", str(tmp_path / "rows.csv"), "--prompts", str(path), *more]
        monkeypatch.setattr(sys, "argv", ["score_world.py", *options])
        with pytest.raises(ValueError, match=said):
            program.main()
