"""Presets, run files and prompt files: what they say, how they are merged, and what they refuse."""

import tomllib

import pytest

from videosparse.generation import GenerationError
from videosparse.generation.planning import plan_run
from videosparse.generation.presets import PRESETS, split_presets
from videosparse.generation.runfile import (
    KEYS,
    LISTS,
    OF_PRESETS,
    merge,
    preset_as_toml,
    read_prompts,
    read_run_file,
    request_from,
)
from videosparse.generation.sources import find_spec


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_their_models(name):
    values = dict(PRESETS[name].values)
    request = request_from({**values, "prompt": "x"})
    method = request.method
    plan = plan_run(
        find_spec(request.model), num_frames=request.num_frames, height=request.height, width=request.width,
        steps=request.steps, guidance=request.guidance, method=method, options=request.options.get(method),
    )  # fmt: skip
    assert plan.steps == request.steps
    assert 0 < plan.density < 1


def test_the_published_schedule_is_in_force():
    values = PRESETS["wan2.1-14b-720p"].values
    plan = plan_run(find_spec("wan2.1-14b"), height=720, width=1280, options=values["radial"])
    assert plan.schedule.dense_steps(50) == (12, 0)
    assert plan.method["decay"] == 0.2


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_as_a_run_file_says_the_same(tmp_path, name):
    path = tmp_path / "run.toml"
    path.write_text(preset_as_toml(name, PRESETS[name].values))
    file = read_run_file(path)
    assert (file.preset, file.values) == ((name,), {})
    path.write_text(path.read_text().replace("# ", "").partition("\n")[2])
    values = read_run_file(path).values
    assert request_from({**values, "prompt": "x"}) == request_from({**PRESETS[name].values, "prompt": "x"})


def test_toml_of_any_text():
    text = 'a "quoted" \\ backslash'
    lines = preset_as_toml("x", {"prompt": text, "seed": 3}).splitlines()
    assert tomllib.loads("\n".join(line.removeprefix("# ") for line in lines[1:])) == {
        "preset": "x", "prompt": text, "seed": 3,
    }  # fmt: skip


def test_unknown_preset():
    with pytest.raises(GenerationError, match=r"Unknown preset 'wan2.1-14b-270p'.*Did you mean 'wan2.1-14b-720p'"):
        split_presets(["wan2.1-14b-270p"])


def test_a_run_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        'preset = "tiny"\nprompt = "a cat"\nnegative-prompt = "dogs"\nframes = 9\nguidance = 4\noutput = "o/"\n'
        "[radial]\ndecay = 0.5\nblock = [64, 128]\nsink = false\n"
    )
    found = read_run_file(path)
    assert (found.preset, found.output, found.prompts) == (("tiny",), "o/", None)
    request = request_from(found.values)
    assert (request.prompt, request.negative_prompt, request.num_frames, request.guidance) == ("a cat", "dogs", 9, 4)
    assert request.options == {"radial": {"decay": 0.5, "block": (64, 128), "sink": False}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("frame = 3", "unknown key 'frame'. Did you mean 'frames'?"),
        ("frames = 3.5", r"frames must be a whole number \(got 3.5\)"),
        ("frames = true", "frames must be a whole number"),
        ("prompt = 3", "prompt must be a text"),
        ("guidance = 'x'", "guidance must be a number"),
        ("radial = 3", r"radial must be a table of options, \[radial\]"),
        ("[radial]\ndekay = 1", "Did you mean 'decay'?"),
        ("[radial]\ndecay = 'x'", "radial.decay must be a number"),
        ("frames = ", "is no TOML"),
    ],
)
def test_run_files_that_are_wrong(tmp_path, text, message):
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(GenerationError, match=message):
        read_run_file(path)


def test_missing_files(tmp_path):
    with pytest.raises(GenerationError, match=r"Cannot read .*run\.toml: No such file"):
        read_run_file(tmp_path / "run.toml")
    with pytest.raises(GenerationError, match="Cannot read prompts from"):
        read_prompts(tmp_path / "prompts.txt")


def test_later_layers_win():
    first = {
        "frames": 9,
        "method": "adaspa",
        "adaspa": {"density": 0.3, "sample": 16},
        "rope": "pi",
        "trained_frames": 5,
    }
    assert merge([first, {"frames": 13, "adaspa": {"density": 0.4}}]) == {
        **first, "frames": 13, "adaspa": {"density": 0.4, "sample": 16},
    }  # fmt: skip
    other = merge([first, {"method": "radial", "rope": "none"}])
    assert "adaspa" not in other
    assert "trained_frames" not in other
    assert first["adaspa"] == {"density": 0.3, "sample": 16}


def test_every_method_has_its_own_options_whoever_chooses_it():
    preset = {"method": "adaspa", "adaspa": {"first_steps": 7}, "radial": {"decay": 0.3}}
    file = {"radial": {"first_steps": 2}, "adaspa": {"sample": 16}, "paro": {"first_steps": 3}}
    for method, options in {
        "radial": {"decay": 0.3, "first_steps": 2},
        "adaspa": {"first_steps": 7, "sample": 16},
        "paro": {"first_steps": 3},
    }.items():
        assert merge([preset, file, {"method": method}]) == {"method": method, method: options}
        back = merge([preset, file, {"method": "dense"}, {"method": method}])
        assert back == {"method": method, method: options}


@pytest.mark.parametrize("method", ["radial", "adaspa", "paro", "dense"])
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_leaves_nothing_in_another_method(name, method):
    values = PRESETS[name].values
    found = request_from(merge([values, {"method": method, "prompt": "x"}]))
    own = values.get(method, {}) if method != "dense" else {}
    assert found.options == ({method: own} if own else {})


@pytest.mark.parametrize(
    "layers",
    [
        [{"radial": {"first_steps": 2}, "method": "adaspa"}],
        [{"method": "adaspa"}, {"radial": {"first_steps": 2}}],
        [{"adaspa": {"first_steps": 2}}],
    ],
)
def test_options_of_a_method_that_does_not_run_are_refused(layers):
    with pytest.raises(GenerationError, match=r"An option of method \w+ was set, but this run uses"):
        request_from(merge([*layers, {"prompt": "x"}])).resolve()


def test_every_key_is_a_field():
    from dataclasses import fields

    from videosparse.generation import GenerationRequest

    assert {field for field, _ in {**KEYS, **LISTS}.values()} == {f.name for f in fields(GenerationRequest)} - {
        "options",
        *OF_PRESETS,
    }


def test_prompt_files(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(
        "# comment\n\na cat -- surfing --fast on waves\na dog --f 9 --seed 7\n"
        "  a bird --w 64 --h 48 --f 5 --s 2 --seed 12345678901  \n"
    )
    lines = read_prompts(path)
    assert [line.number for line in lines] == [3, 4, 5]
    assert [line.prompt for line in lines] == ["a cat -- surfing --fast on waves", "a dog", "a bird"]
    assert [line.values for line in lines] == [
        {}, {"frames": 9, "seed": 7}, {"width": 64, "height": 48, "frames": 5, "steps": 2, "seed": 12345678901},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a cat --x 3", r"line 1: unknown --x; a line may end in --w, --h, --f, --s, --seed\."),
        ("a cat --f", r"line 1: --f must be followed by a whole number, such as --f 64 \(got nothing\)"),
        ("a cat --f 9 --seed -3", r"--seed must be followed by a whole number.*\(got -3\)"),
        ("a cat --w 1.5 --h 3", "--w must be followed by a whole number"),
        ("a cat --f 9 --f 5", "--f is there twice"),
        ("--f 9", "no prompt before the options"),
        ("# nothing", "holds no prompt"),
    ],
)
def test_prompt_files_that_are_wrong(tmp_path, line, message):
    path = tmp_path / "prompts.txt"
    path.write_text(line)
    with pytest.raises(GenerationError, match=message):
        read_prompts(path)
