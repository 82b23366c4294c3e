"""Options as users write them."""

import re
from dataclasses import replace

import pytest
import torch

from videosparse.generation import GenerationError
from videosparse.generation.methods import (
    check_method,
    check_method_fits,
    check_options_used,
    make_processor,
    option_names,
    parse_overrides,
    refusals,
    resolve_method,
    resolved_options,
)
from videosparse.generation.sources import find_spec
from videosparse.layout import VideoGrid

WAN = find_spec("wan2.1-14b")
GRID = WAN.grid(81, 480, 832)


def test_values_are_read_as_what_they_look_like():
    parsed = parse_overrides(
        [
            "radial.decay=0.5", "radial.first_steps=2", "radial.sink=false", "radial.coverage=any",
            "radial.block=(64, 128)", "radial.last_steps = none",
        ]
    )  # fmt: skip
    assert parsed == {
        "radial": {
            "decay": 0.5, "first_steps": 2, "sink": False, "coverage": "any", "block": (64, 128), "last_steps": None,
        }
    }  # fmt: skip
    assert type(parsed["radial"]["first_steps"]) is int


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((f"sink={word}", True) for word in ("yes", "on", "true", "YES", "True")),
        *((f"sink={word}", False) for word in ("no", "off", "false", "No")),
        ("sink=none", None), ("decay=1", 1.0), ("decay=2e-1", 0.2), ("first_steps=0.25", 0.25), ("first_steps=3", 3),
        ("first_layers=2", 2), ("backend=torch", "torch"),
        ("block=64", (64, 64)), ("block=128x64", (128, 64)), ("block=128,64", (128, 64)), ("block=(64, 64)", (64, 64)),
        ("block=64 X 128", (64, 128)),
    ],
)  # fmt: skip
def test_values_are_read_as_the_type_of_the_option(text, value):
    option = text.partition("=")[0]
    read = parse_overrides([f"radial.{text}"])["radial"][option]
    assert (read, type(read)) == (value, type(value))
    make_processor("radial", {option: read})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("refresh=0.6", (0.6,)), ("refresh=30", (30,)), ("refresh=0.4,0.7", (0.4, 0.7)),
        ("refresh=(20, 0.7)", (20, 0.7)),
        ("refresh=(0.6,)", (0.6,)), ("refresh=()", ()),
        ("refresh=never", ()), ("refresh=none", ()), ("density=0.3", 0.3), ("block=64", (64, 64)),
        ("block=128x128", (128, 128)), ("sample=16", 16), ("sample=none", None), ("head_adaptive=no", False),
        ("lse_dtype=bfloat16", "bfloat16"), ("offload_state=yes", True), ("recall_threshold=1", 1),
        ("first_steps=0.3", 0.3), ("backend=torch", "torch"),
    ],
)  # fmt: skip
def test_options_of_adaspa(text, value):
    option = text.partition("=")[0]
    read = parse_overrides([f"adaspa.{text}"])["adaspa"][option]
    assert read == value
    assert make_processor("adaspa", {option: read})


@pytest.mark.parametrize("text", ["refresh=late", "refresh=0.4;0.5", "refresh=,", "refresh=(0.4"])
def test_refreshes_that_are_no_numbers(text):
    value = text.partition("=")[2]
    message = f"adaspa.refresh must be a number or several, such as 0.6 or 0.4,0.7, or never (got {value!r})."
    with pytest.raises(GenerationError, match=re.escape(message)):
        parse_overrides([f"adaspa.{text}"])


def test_a_refresh_that_does_not_fit_the_steps():
    resolve_method(WAN, GRID, "adaspa", {"refresh": 5}, 8)
    with pytest.raises(GenerationError, match="refresh=5 is step 5 of 50, which is not after the search at step 10"):
        resolve_method(WAN, GRID, "adaspa", {"refresh": 5}, 50)
    with pytest.raises(GenerationError, match="refresh=5 is step 5 of 50"):
        check_method_fits(WAN, GRID, "adaspa", {"refresh": 5}, torch.device("cpu"), 50)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sink=maybe", "radial.sink must be yes or no (got 'maybe')."),
        ("sink=1", "radial.sink must be yes or no"),
        ("decay=wide", "radial.decay must be a number, such as 0.5 (got 'wide')."),
        ("decay=nan", "radial.decay must be a number"),
        ("decay=1e999", "radial.decay must be a number"),
        ("decay=yes", "radial.decay must be a number"),
        ("first_steps=few", "radial.first_steps must be a number"),
        ("first_layers=1.5", "radial.first_layers must be a whole number, such as 2 (got '1.5')."),
        ("first_layers=" + "9" * 5000, "radial.first_layers must be a whole number"),
        ("block=64x", "radial.block must be one size or two, such as 64 or 64x128 (got '64x')."),
        ("block=64x64x64", "radial.block must be"),
        ("block=(64", "radial.block must be"),
        ("block=big", "radial.block must be"),
    ],
)
def test_values_of_another_type(text, message):
    with pytest.raises(GenerationError, match=re.escape(message)):
        parse_overrides([f"radial.{text}"])


def test_the_last_of_two_wins():
    assert parse_overrides(["radial.decay=1", "radial.decay=0.2"]) == {"radial": {"decay": 0.2}}


@pytest.mark.parametrize("text", ["radial.decay", "decay=1", "=1", "radial.=1", "radial.decay="])
def test_what_is_no_assignment(text):
    with pytest.raises(GenerationError, match=r"expects method\.option=value"):
        parse_overrides([text])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("radial.dekay=1", r"no option 'dekay'; it has decay.*Did you mean 'decay'\?"),
        ("radial.num_steps=9", "no option 'num_steps'"),
        ("radail.decay=1", r"Unknown method 'radail'.*Did you mean 'radial'\?"),
        ("dense.decay=1", "Method dense has no option 'decay'; it has quant."),
    ],
)
def test_unknown_names(text, message):
    with pytest.raises(GenerationError, match=message):
        parse_overrides([text])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": "wide"}, "decay must be a number"),
        ({"decay": -1}, "decay must be positive"),
        ({"block": 32}, "block must be"),
        ({"coverage": "some"}, "coverage must be"),
        ({"sink": "no"}, "sink must be True or False"),
        ({"first_steps": -1}, "first_steps must be"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"dekay": 1}, "no option 'dekay'"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(GenerationError, match=message):
        make_processor("radial", options)


def test_method_names():
    check_method("dense")
    assert "decay" in option_names("radial")
    with pytest.raises(GenerationError, match=r"Unknown method 'sparse'; use radial, adaspa, paro or dense"):
        check_method("sparse")


def test_options_of_a_method_that_does_not_run():
    check_options_used({"radial": {"decay": 1}}, "radial")
    with pytest.raises(GenerationError, match="this run uses dense"):
        check_options_used({"radial": {"decay": 1}}, "dense")


def test_resolved_options_are_the_models_with_what_was_given():
    options = resolved_options(resolve_method(WAN, GRID, "radial", {"first_steps": 2}))
    assert (options["decay"], options["first_steps"], options["sink"]) == (0.2, 2, True)
    assert resolved_options(resolve_method(WAN, GRID, "dense", None)) == {}
    options = resolved_options(resolve_method(WAN, GRID, "adaspa", {"density": 0.3}, 50))
    assert (options["density"], options["refresh"], options["first_steps"]) == (0.3, (0.6,), 0.2)


def test_more_dense_layers_than_the_model_has():
    with pytest.raises(GenerationError, match="the model has 40"):
        resolve_method(WAN, GRID, "radial", {"first_layers": 50})


def test_a_grid_that_the_method_refuses():
    tiny = VideoGrid(64, 4, 4)
    with pytest.raises(GenerationError, match=r"coverage='majority' leaves query blocks"):
        check_method_fits(WAN, tiny, "radial", {"block": 128, "coverage": "majority"}, torch.device("cpu"))


def test_a_backend_that_cannot_run():
    with pytest.raises(GenerationError, match=r"backend=triton cannot run on cpu.*use backend=auto"):
        check_method_fits(WAN, GRID, "radial", {"backend": "triton"}, torch.device("cpu"))


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (torch.bfloat16, r"quant=int8 cannot run on cpu: it takes head_dim 64 and 128 \(got 12\); drop it\.$"),
        (torch.float32, r"it takes float16 and bfloat16 \(got float32\); drop it, or see --dtype\.$"),
    ],
)
def test_integers_that_cannot_run(dtype, message):
    source = replace(WAN, spec=replace(WAN.spec, head_dim=12))
    with pytest.raises(GenerationError, match=message):
        check_method_fits(source, GRID, "radial", {"quant": "int8"}, torch.device("cpu"), dtype=dtype)


def test_a_long_refusal_keeps_what_to_do():
    with pytest.raises(GenerationError, match=r"; use another\.$"), refusals("Bad option: "):
        raise ValueError(f"this plan is for {'another ' * 60}grid; use another.")
