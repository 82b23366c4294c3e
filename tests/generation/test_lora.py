"""`generate --lora`: what a file says decides what is not given, wrong files are refused, several add up."""

import json
import os
from dataclasses import replace

import folders
import pytest
import torch
from folders import ABOUT
from safetensors.torch import save_file

from videosparse.generation import GenerationError, GenerationRequest, generate
from videosparse.generation.lora import find_lora


def test_length_and_schedule_come_from_the_file(ask, make_lora):
    settings = ask(num_frames=None, loras=(str(make_lora()),)).resolve()
    assert settings.num_frames == 17
    assert settings.request.options["radial"] == {"decay": 0.7, "first_steps": 0.5, "first_layers": 1}


def test_the_shift_comes_from_the_file_and_decides_what_is_dense(ask, make_lora):
    """As many steps are dense as lie at the noise levels at which training was dense."""
    lora = str(make_lora(6, about={**ABOUT, "shift": 5.0, "first_steps": 0.2}))
    settings = ask(loras=(lora,)).resolve()
    assert (settings.shift, settings.request.options["radial"]["first_steps"]) == (5.0, 0.2)
    level = 5.0 * 0.8 / (1 + 4.0 * 0.8)
    for shift in (3.0, 12.0):
        given = ask(loras=(lora,), shift=shift).resolve()
        left = 1 - given.request.options["radial"]["first_steps"]
        assert given.shift == shift
        assert shift * left / (1 + (shift - 1) * left) == pytest.approx(level, abs=1e-5)
    won = ask(loras=(lora,), shift=3.0, options={"radial": {"first_steps": 2}}).resolve()
    assert won.request.options["radial"]["first_steps"] == 2
    assert ask(loras=(str(make_lora()),), shift=3.0).resolve().request.options["radial"]["first_steps"] == 0.5
    other = str(make_lora(7, about={**ABOUT, "shift": 3.0}))
    with pytest.raises(GenerationError, match=r"several shifts .\[3.0, 5.0\].; choose one with --shift"):
        ask(loras=(lora, other)).resolve()
    with pytest.raises(GenerationError, match="shift must be"):
        ask(loras=(lora,), shift=0.0).resolve()


def test_a_stretched_rotary_embedding_comes_from_the_file(ask, make_lora):
    lora = str(make_lora(5, about={**ABOUT, "rope": "ntk", "trained_frames": 9}))
    settings = ask(loras=(lora,)).resolve()
    assert (settings.request.rope, settings.trained_frames) == ("ntk", 9)
    given = ask(loras=(lora,), rope="pi", trained_frames=5).resolve()
    assert (given.request.rope, given.trained_frames) == ("pi", 5)


def test_what_is_given_wins(ask, make_lora):
    settings = ask(num_frames=9, loras=(str(make_lora()),), options={"radial": {"decay": 0.4}}).resolve()
    assert settings.num_frames == 9
    assert settings.request.options["radial"] == {"decay": 0.4, "first_steps": 0.5, "first_layers": 1}
    assert ask(method="dense", loras=(str(make_lora()),)).resolve().request.options == {}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, None),
        ({"options": {"radial": {"decay": 0.7, "block": (64, 64), "first_steps": 0.9}}}, None),
        ({"options": {"radial": {"decay": 0.4}}}, "was trained with decay=0.7, here 0.4."),
        ({"method": "dense"}, "was trained with radial attention; this run has dense."),
    ],
)
def test_another_attention_than_in_training_is_told(ask, make_lora, fields, told):
    """As by a preset with options of its own."""
    lora = str(make_lora(8, about={**ABOUT, "options": {"decay": 0.7, "block": [64, 64]}}))
    notices = generate(ask(loras=(lora,), steps=1, num_frames=9, **fields)).run.notices
    assert notices == (() if told is None else (f"The LoRA lora8 {told}",))
    assert find_lora(lora).other_attention("radial", {}) is None


def test_loras_change_the_video_and_add_up(ask, make_lora):
    length, style = str(make_lora(1)), str(make_lora(2, about=None))
    made = {
        name: generate(ask(num_frames=9, steps=2, loras=loras, lora_scales=scales)).frames
        for name, loras, scales in (
            ("none", (), ()), ("one", (length,), ()), ("two", (length, style), ()),
            ("zero", (length, style), (1.0, 0.0)),
        )
    }  # fmt: skip
    assert not torch.equal(made["one"], made["none"])
    assert not torch.equal(made["two"], made["one"])
    torch.testing.assert_close(made["zero"], made["one"], rtol=0, atol=1e-4)


def test_the_record_names_them(ask, make_lora, tmp_path):
    result = generate(ask(num_frames=21, loras=(str(make_lora()),)))
    data = json.loads(result.save(tmp_path / "a.mp4")[".json"].read_text())
    assert data["loras"][0]["scale"] == 1.0
    assert data["method"]["options"]["decay"] == 0.7
    assert any("was trained for 17 frames; this video has 21" in notice for notice in data["notices"])


def test_only_a_lora_that_knows_a_length_helps_with_one(ask, make_lora):
    """One that does not say, such as of a style, leaves the notice of the model's own length."""
    length, style = str(make_lora(10)), str(make_lora(11, about=None))
    for loras, notices in (((), 1), ((style,), 1), ((length,), 0), ((style, length), 0)):
        found = ask(num_frames=85, loras=loras).resolve().notices
        assert len(found) == notices
        assert all("85 frames at once are beyond the 81" in notice for notice in found)


def test_a_window_is_what_a_lora_has_to_know(ask, make_lora):
    """The video may be longer than it was trained for."""
    lora = str(make_lora(9))
    for windows, notices in ((9, ()), (21, ("The LoRA lora9 was trained for 17 frames; windows have 21.",))):
        request = ask(num_frames=25, loras=(lora,), steps=1, context_frames=windows)
        assert generate(request).run.notices == notices


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 40}, "is for small .wan, 40 layers, 2 heads., and .* is wan, 2 layers, 2 heads"),
        ({"format": "videosparse-lora-9"}, "is of format 'videosparse-lora-9'"),
        ({"component": "transformer_2"}, "is for a second expert"),
        ({"norms": True}, "qk_norms.safetensors is not beside it"),
    ],
)
def test_files_that_do_not_fit_are_refused(ask, make_lora, change, message):
    with pytest.raises(GenerationError, match=message):
        ask(loras=(str(make_lora(3, about={**ABOUT, **change})),)).resolve()


def test_files_that_are_none_are_refused(ask, tmp_path):
    with pytest.raises(GenerationError, match="No LoRA at"):
        ask(loras=(str(tmp_path / "none"),)).resolve()
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(GenerationError, match=r"Cannot read the LoRA .*; copy it again"):
        find_lora(str(tmp_path / "bad.safetensors"))
    save_file({"transformer.other.lora_A.weight": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(GenerationError, match=r"Cannot load the LoRA|has nothing for the transformer"):
        generate(ask(loras=(str(tmp_path / "x.safetensors"),)))
    with pytest.raises(GenerationError, match="--lora-scale is given 2 times and --lora 1 times"):
        GenerationRequest(folders.PROMPT, loras=("a",), lora_scales=(1.0, 2.0)).resolve()
    with pytest.raises(GenerationError, match=r"lora_scale must be a finite number \(got nan\)"):
        GenerationRequest(folders.PROMPT, loras=("a",), lora_scales=(float("nan"),)).resolve()


def test_loras_of_two_experts_agree_on_what_is_dense(ask, make_lora):
    other = make_lora(4, about={**ABOUT, "first_steps": 0.0, "first_layers": 2})
    for pair in ((make_lora(), other), (other, make_lora())):
        options = ask(loras=tuple(map(str, pair))).resolve().request.options["radial"]
        assert (options["first_steps"], options["first_layers"]) == (0.5, 2)


def test_another_lora_is_another_video(ask, make_lora):
    """A batch makes again what it made with other adapters."""
    from videosparse.generation.sidecar import fingerprint

    one, two = str(make_lora(6)), make_lora(7)
    asked = ({}, {"loras": (one,)}, {"loras": (str(two),)}, {"loras": (one,), "lora_scales": (0.5,)})
    given = {"num_frames": 9, "options": {"radial": {"decay": 0.7, "first_steps": 0.5, "first_layers": 1}}}
    prints = [fingerprint(ask(**given, **loras).resolve()) for loras in asked]
    assert len(set(prints)) == 4
    weights = two / "pytorch_lora_weights.safetensors"
    os.utime(weights, (1, 1))  # trained again
    assert fingerprint(ask(**given, loras=(str(two),)).resolve()) not in prints


def test_a_pipeline_without_the_lora_is_refused(ask, make_lora):
    from videosparse.generation.running import load_pipeline

    lora = str(make_lora(8))
    plain = load_pipeline(ask(num_frames=9).resolve())[0]
    with pytest.raises(GenerationError, match="has not loaded the LoRA"):
        generate(ask(num_frames=9, loras=(lora,)), pipe=plain)
    settings = ask(num_frames=9, steps=1, loras=(lora,)).resolve()
    assert generate(settings, pipe=load_pipeline(settings)[0]).frames.shape[0] == 9


def test_a_batch_has_one_set_of_loras(ask, make_lora, tmp_path):
    from videosparse.generation.batch import plan_batch

    with pytest.raises(GenerationError, match=r"Prompt 2 of 2 asks for another model, .*, compiling or LoRA"):
        plan_batch([ask(), ask(loras=(str(make_lora(9)),))], tmp_path)


def test_run_files_name_loras(tmp_path):
    from videosparse.generation.runfile import read_run_file, request_from

    path = tmp_path / "run.toml"
    path.write_text('prompt = "a cat"\nlora = ["a", "b"]\nlora_scale = [1.0, 0.5]\n')
    request = request_from(read_run_file(path).values)
    assert (request.loras, request.lora_scales) == (("a", "b"), (1.0, 0.5))
    path.write_text('prompt = "a cat"\nlora = "a"\n')
    assert request_from(read_run_file(path).values).loras == ("a",)
    path.write_text('prompt = "a cat"\nlora = [1]\n')
    with pytest.raises(GenerationError, match="lora must be a text"):
        read_run_file(path)


@pytest.mark.parametrize(
    ("text", "files", "fetched"),
    [
        ("org/name", ["pytorch_lora_weights.safetensors", "b.safetensors"], "pytorch_lora_weights.safetensors"),
        ("org/name", ["README.md", "four-steps.safetensors"], "four-steps.safetensors"),
        ("org/name/sub/b.safetensors", ["a.safetensors", "sub/b.safetensors"], "sub/b.safetensors"),
        (
            "org/name",
            ["a.safetensors", "b.safetensors"],
            "it has a.safetensors, b.safetensors; name one: org",
        ),
        ("org/name", ["README.md"], "it has no .safetensors file"),
    ],
)
def test_loras_of_the_hub(monkeypatch, make_lora, text, files, fetched):
    """The file with the usual name, else the only one; a client that stands in for the network's."""
    from huggingface_hub.errors import EntryNotFoundError

    weights = make_lora() / "pytorch_lora_weights.safetensors"

    def download(repo, file):
        assert repo == "org/name"
        if file not in files:
            raise EntryNotFoundError("404")
        calls.append(file)
        return str(weights)

    calls = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda repo: files)
    if fetched in files:
        assert find_lora(text).about == ABOUT
        assert calls == [fetched]
    else:
        with pytest.raises(GenerationError, match=f"^No LoRA at 'org/name', and the hub model org/name .*{fetched}"):
            find_lora(text)


def test_a_lora_of_that_length_takes_the_place_of_a_presets_ultravico(ask, make_lora):
    """What is asked for beside such a LoRA stays refused."""
    lora = (str(make_lora(10, about={**ABOUT, "frames": [17, 161]})),)
    preset = {"num_frames": 161, "usual_ultravico": 0.9, "trained_frames": None}
    alone = ask(**preset).resolve()
    assert (alone.logit.alpha, alone.notices) == (0.9, ())
    beside = ask(**preset, loras=lora).resolve()
    assert beside.logit is None
    assert beside.notices == (
        "The preset's UltraViCo is left out: 161 frames at once are no more than the 161 of training, a LoRA's "
        "included.",
    )
    longer = ask(**{**preset, "num_frames": 201}, loras=lora).resolve()
    assert (longer.logit.trained, longer.notices) == (41, ())
    assert ask(**{**preset, "ultravico": 0.5}).resolve().logit.alpha == 0.5
    with pytest.raises(GenerationError, match=r"ultravico is for videos, or windows, longer than the 161 frames"):
        ask(**{**preset, "ultravico": 0.9}, loras=lora).resolve()
    assert ask(**{**preset, "trained_frames": 161}).resolve().logit is None


def test_a_preset_with_a_lora(make_lora, monkeypatch, model_folder):
    """By names, as on the command line; the file of the LoRA is for the small model."""
    from videosparse.generation.runfile import merged_sources, request_from

    lora = str(make_lora(11, about={**ABOUT, "frames": [161]}))
    small = {"model": str(model_folder), "height": 64, "width": 64, "device": "cpu", "prompt": "a cat"}
    chosen, preset = {**small, "lora": [lora]}, ["wan2.1-14b-720p-2x"]
    settings = request_from(merged_sources(chosen, preset, None)[0]).resolve()
    assert (settings.logit, settings.num_frames) == (None, 161)
    with pytest.raises(GenerationError, match="ultravico is for videos"):
        request_from(merged_sources({**chosen, "ultravico": 0.9}, preset, None)[0]).resolve()


def test_a_plan_goes_by_the_lora_as_a_run_does(make_lora, model_folder):
    from videosparse.generation.planning import plan_request

    lora = str(make_lora(12, about={**ABOUT, "shift": 5.0}))
    request = GenerationRequest("a", model=str(model_folder), loras=(lora,), height=64, width=64, steps=8, device="cpu")
    plan, settings = plan_request(request), request.resolve()
    assert plan.grid == settings.grid
    assert plan.method["decay"] == 0.7
    assert plan.schedule.dense_steps(8) == (4, 0)
    other = plan_request(replace(request, shift=12.0))
    assert other.schedule.dense_steps(8) == (6, 0)
