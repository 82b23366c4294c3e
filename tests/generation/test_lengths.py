"""Videos beyond the trained length: far scores and context windows from a request to a record."""

import json

import folders
import pytest
import torch

from videosparse.generation import GenerationError, generate
from videosparse.generation.generating import generate_to
from videosparse.generation.lengths import context, far_logits, trained_length
from videosparse.generation.output import destination
from videosparse.generation.runfile import merge, request_from
from videosparse.generation.sidecar import fingerprint
from videosparse.generation.sources import find_spec
from videosparse.logits import FarLogits
from videosparse.windows import Windows

LONG = {"num_frames": 17}


@pytest.fixture(scope="module")
def pipe(model_folder):
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def pipe_with_rope(tmp_path_factory):
    """A folder whose heads are wide enough for RIFLEx's published frequency, and its pipeline."""
    from diffusers import DiffusionPipeline

    folder = folders.save_wan(tmp_path_factory.mktemp("models") / "wide", head_dim=128)
    return str(folder), DiffusionPipeline.from_pretrained(folder)


@pytest.mark.parametrize("method", ["dense", "radial", "adaspa", "paro"])
def test_far_scores_change_a_video(ask, pipe, method):
    plain = generate(ask(method=method, **LONG), pipe=pipe).frames
    made = generate(ask(method=method, ultravico=0.2, trained_frames=5, **LONG), pipe=pipe)
    assert made.settings.logit == FarLogits(2, 0.2)
    assert not torch.equal(made.frames, plain)
    assert made.run.report.dense_backend == "videosparse torch"
    assert torch.equal(generate(ask(method=method, **LONG), pipe=pipe).frames, plain)


@pytest.mark.parametrize("method", ["dense", "radial", "adaspa"])
def test_windows_go_to_a_file(ask, pipe, method, tmp_path):
    """While frames are decoded as a stream; and are all of the video where there is one."""
    request = ask(method=method, context_frames=9, context_overlap=4, **LONG)
    settings = request.resolve()
    assert (settings.grid.frames, settings.windows) == (3, Windows(3, 1))
    place = destination(tmp_path, "a", (".mp4", ".json"), False)
    _, paths = generate_to(place, settings, pipe=pipe)
    data = json.loads(paths[".json"].read_text())
    assert data["settings"]["windows"] == {"size": 3, "shared": 1}
    assert data["attention"]["grid"][0] == 3
    assert data["video"]["num_frames"] == 17
    assert type(pipe.transformer).__mro__[0].__name__ == "WanTransformer3DModel"
    assert "_videosparse_windows" not in vars(pipe.transformer)
    plain = generate(ask(method=method, **LONG), pipe=pipe).frames
    assert torch.equal(generate(ask(method=method, context_frames=17, **LONG), pipe=pipe).frames, plain)
    windowed = generate(request, pipe=pipe).frames
    assert windowed.shape == plain.shape
    assert not torch.equal(windowed, plain)


def test_windows_and_ropes_that_change_nothing_are_told(ask, pipe_with_rope):
    """The video is as long as a window, or one that the model was trained on, or too short for RIFLEx to act."""
    model, pipe = pipe_with_rope
    cases = [
        ({"context_frames": 9}, "--context-frames 9 changes nothing: the video has 9 frames, one window."),
        ({"rope": "pi", "trained_frames": 9}, "--rope pi changes nothing for a video of 9 frames"),
        ({"rope": "riflex", "trained_frames": 5}, "--rope riflex changes nothing for a video of 9 frames"),
    ]
    for fields, message in cases:
        (notice,) = generate(ask(model=model, **fields), pipe=pipe).run.notices
        assert notice.startswith(message)
    for fields in ({"context_frames": 5}, {"rope": "pi", "trained_frames": 5}):
        assert not generate(ask(model=model, **fields), pipe=pipe).run.notices


def test_what_decides_a_video_is_in_its_fingerprint(ask):
    asked = [
        {}, {"ultravico": 0.9, "trained_frames": 5}, {"ultravico": 0.8, "trained_frames": 5},
        {"ultravico": 0.9, "trained_frames": 9}, {"context_frames": 9}, {"context_frames": 9, "context_overlap": 4},
    ]  # fmt: skip
    prints = {fingerprint(ask(**LONG, **more).resolve()) for more in asked}
    assert len(prints) == len(asked)


def test_run_files():
    values = {"prompt": "a", "ultravico": 0.9, "trained_frames": 81, "context_frames": 81, "context_overlap": 16}
    request = request_from(values)
    assert (request.ultravico, request.context_frames, request.context_overlap) == (0.9, 81, 16)
    assert merge([values, {"rope": "none"}])["trained_frames"] == 81


def test_numbers_of_published_models():
    wan, mochi = find_spec("wan2.1-14b"), find_spec("mochi")
    assert far_logits(wan, wan.grid(161, 480, 832), 0.9, 81) == FarLogits(21, 0.9)
    assert context(wan, 81, None) == Windows(21, 4)
    assert context(mochi, 163, None) == Windows(28, 3)
    assert context(wan, 5, None) == Windows(2, 1)
    assert context(wan, None, None) is None
    assert trained_length(mochi, None) == trained_length(mochi, 163) == 163
    with pytest.raises(GenerationError, match=r"must be 6k\+1 for mochi \(got 81\); the model's are 163\."):
        trained_length(mochi, 81)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ultravico": 0.9}, r"ultravico is for videos, or windows, longer than the 81 frames .* \(got 17\); drop it"),
        ({"ultravico": 1.5, "trained_frames": 5}, r"ultravico must lie in 0..1, 0 excluded \(got 1.5\)"),
        (
            {"ultravico": 0.9, "trained_frames": 6},
            r"trained_frames must be 4k\+1 for .* \(got 6\); the model's are 81\.",
        ),
        ({"ultravico": 0.9, "trained_frames": 9, "context_frames": 9}, r"or windows, longer than the 9 frames"),
        (
            {"ultravico": 0.9, "trained_frames": 5, "options": {"radial": {"quant": "int8"}}, "dtype": "bf16"},
            "quant=int8 and --ultravico do not go together: one looks at the sign of scores",
        ),
        ({"context_frames": 10}, r"context_frames must be 4k\+1, at least 5 \(got 10\); use 9 or 13\."),
        ({"context_frames": 9, "context_overlap": 3}, "context_overlap must be a multiple of 4 from 4 to 8"),
        ({"context_overlap": 4}, "context_overlap is for --context-frames; drop it, or give both"),
    ],
)
def test_requests_that_cannot_be_carried_out(ask, fields, message):
    with pytest.raises(GenerationError, match=message):
        ask(**LONG, **fields).resolve()
