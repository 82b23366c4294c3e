"""Finding models and reading what they are from their config files."""

import json
import logging
import shutil

import folders
import pytest

from videosparse.cases import MODELS
from videosparse.generation import (
    GenerationError,
    GenerationRequest,
    embedded_model_path,
    find_model,
    generate,
    sources,
)
from videosparse.generation.methods import resolve_method
from videosparse.generation.planning import plan_run
from videosparse.generation.sources import DEFAULTS, HUB_IDS, check_text_to_video, find_spec


@pytest.fixture
def folder(model_folder, tmp_path):
    """A copy whose files a test may spoil."""
    return shutil.copytree(model_folder, tmp_path / "model")


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_folder_is_read_without_weights(folder):
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    source = find_model(str(folder))
    assert (source.spec.layers, source.spec.heads, source.spec.head_dim) == (2, 2, 24)
    assert source.spec.stride == (4, 4)
    assert (source.spec.family, source.spec.text, source.spec.patch) == ("wan", 0, 2)
    assert (source.name, source.pipeline_class, source.longest_axis) == ("model", "WanPipeline", 64)


def test_the_tokenizer_bounds_the_text_length(folder):
    assert find_model(str(folder)).defaults.max_sequence_length == 48
    edit(folder / "tokenizer" / "tokenizer_config.json", model_max_length=1e30)
    assert find_model(str(folder)).defaults.max_sequence_length == 512


@pytest.mark.parametrize("layers", [6, 8])
def test_the_embedded_model_is_known_at_any_depth(folder, layers):
    edit(folder / "transformer" / "config.json", num_attention_heads=4, attention_head_dim=64, num_layers=layers)
    source = find_model(str(folder))
    assert source.name == "tiny-wan"
    assert source.spec.layers == layers
    assert (source.defaults.num_frames, source.defaults.height, source.defaults.steps) == (33, 128, 20)
    assert (source.defaults.guidance, source.defaults.max_sequence_length, source.defaults.fps) == (4.0, 48, 16)


@pytest.mark.parametrize(("experts", "name"), [(False, "wan2.1-14b"), (True, "wan2.2-a14b")])
def test_published_models_are_known_by_their_numbers(folder, experts, name):
    edit(folder / "transformer" / "config.json", num_attention_heads=40, attention_head_dim=128, num_layers=40)
    edit(folder / "vae" / "config.json", scale_factor_spatial=8)
    if experts:
        edit(folder / "model_index.json", transformer_2=["diffusers", "WanTransformer3DModel"])
    assert find_model(str(folder)).spec == MODELS[name]


@pytest.mark.parametrize("name", ["small", "wan2.2-5b-mine", "wan2.2-a14b"])
@pytest.mark.parametrize(
    ("changes", "index", "variant"),
    [
        ({}, {}, "wan2.1"),
        ({"in_channels": 48}, {}, "wan2.2-5b"),
        ({}, {"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "wan2.2-a14b"),
        ({}, {"transformer_2": [None, None], "boundary_ratio": 0.9}, "wan2.2-a14b"),
    ],
)
def test_the_configuration_decides_the_variant_whatever_the_folder_is_called(
    model_folder, tmp_path, name, changes, index, variant
):
    folder = shutil.copytree(model_folder, tmp_path / name)
    edit(folder / "transformer" / "config.json", **changes)
    edit(folder / "model_index.json", **index)
    source = find_model(str(folder))
    assert source.spec.variant == variant
    grid = source.grid(9, 64, 64)
    assert resolve_method(source, grid, "radial", None).variant == variant
    assert plan_run(source, num_frames=9, height=64, width=64).method["decay"] == (0.2 if variant == "wan2.1" else 0.8)


def test_plan_and_run_agree_under_a_misleading_name(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "wan2.2-5b-mine")
    size = {"num_frames": 9, "height": 64, "width": 64, "steps": 2}
    run = generate(GenerationRequest("a circle", str(folder), device="cpu", **size)).run
    assert run.options == plan_run(find_model(str(folder)), **size).method


def test_hunyuan_video_and_mochi_configs(tmp_path):
    for name, pipeline, transformer in (
        ("hunyuan-video", "HunyuanVideoPipeline", {"num_layers": 20, "num_single_layers": 40, "patch_size": 2}),
        ("mochi", "MochiPipeline", {"num_layers": 48, "patch_size": 2}),
    ):
        transformer = {"_class_name": pipeline.replace("Pipeline", "Transformer3DModel"), **transformer}
        files = {
            "model_index.json": {"_class_name": pipeline},
            "transformer/config.json": {"num_attention_heads": 24, "attention_head_dim": 128, **transformer},
            "vae/config.json": {},
        }
        for file, value in files.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(value))
        source = find_model(str(tmp_path / name))
        assert source.spec == MODELS[name]
        assert source.longest_axis is None


def test_every_model_has_defaults_that_it_can_take_and_a_hub_id():
    for name, spec in MODELS.items():
        defaults = DEFAULTS[name]
        spec.grid(defaults.num_frames, defaults.height, defaults.width)
        assert name in HUB_IDS or name == sources.EMBEDDED


def test_a_spec_needs_no_files(folder):
    source = find_spec("Wan2.1-14B")
    assert source.spec == MODELS["wan2.1-14b"]
    assert source.location is None
    assert find_spec(str(folder)).spec.layers == 2


def test_names_of_the_embedded_model(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "_embedded_candidates", lambda: iter([tmp_path / "no", folder]))
    assert embedded_model_path() == folder
    for name in (None, "tiny-wan", "assets/tiny-wan"):
        assert find_model(name).location == str(folder)


def test_embedded_candidates_cover_checkout_wheel_and_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    looked = [path.as_posix() for path in sources._embedded_candidates()]
    assert any(path.endswith("share/videosparse/tiny-wan") for path in looked)
    assert looked[-1] == (tmp_path / "assets" / "tiny-wan").as_posix()
    assert sum(path.endswith("assets/tiny-wan") for path in looked) == 2


def test_a_missing_embedded_model_says_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_embedded_candidates", lambda: iter([tmp_path]))
    with pytest.raises(GenerationError, match=r"tiny-wan was not found.*clone the repository.*--model"):
        embedded_model_path()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/nowhere/model", "No model folder at /nowhere/model"),
        ("wan2.1-14", r"No model folder at wan2.1-14.*Did you mean 'wan2.1-14b'\?"),
        ("no-such/hub-model", "There is no folder no-such/hub-model.*cannot be fetched"),
        ("  ", "--model must not be empty"),
        ("x" * 5000, "Cannot look for the model 'xxx.*too long"),
        ("~no-such-user/model", "Cannot look for the model '~no-such-user/model'"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(GenerationError, match=message):
        find_model(name)


def test_folders_that_are_no_pipeline(folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(GenerationError, match=r"is no Diffusers pipeline: it has no model_index.json"):
        find_model(str(empty))
    with pytest.raises(GenerationError, match="is one part of a model"):
        find_model(str(folder / "transformer"))
    with pytest.raises(GenerationError, match="must be a folder"):
        find_model(str(folder / "model_index.json"))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        moved = (folder / "tokenizer" / file).rename(tmp_path / file)
        with pytest.raises(GenerationError, match=rf"is incomplete: it has no.*tokenizer/{file}"):
            find_model(str(folder))
        moved.rename(folder / "tokenizer" / file)
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(GenerationError, match=r"is incomplete: it has no vae/config.json"):
        find_model(str(folder))


def test_damaged_configs(folder):
    path = folder / "transformer" / "config.json"
    good = path.read_text()
    path.write_text(json.dumps({"num_layers": 2}))
    with pytest.raises(GenerationError, match="num_attention_heads"):
        find_model(str(folder))
    path.write_text(good)
    for changes in ({"num_layers": "2"}, {"num_layers": None}, {"rope_max_seq_len": "x"}, {"patch_size": ["1"]}):
        edit(path, **changes)
        (key,) = changes
        with pytest.raises(GenerationError, match=rf"transformer/config.json: {key} must be a whole number above 0"):
            find_model(str(folder))
        path.write_text(good)
    edit(path, _class_name="MochiTransformer3DModel")
    with pytest.raises(GenerationError, match="which is not the transformer of a wan pipeline"):
        find_model(str(folder))
    path.write_text("{")
    with pytest.raises(GenerationError, match=r"Cannot read .*config.json"):
        find_model(str(folder))
    path.write_text("[]")
    with pytest.raises(GenerationError, match="expected a JSON object"):
        find_model(str(folder))


def test_unsupported_pipelines(folder):
    edit(folder / "model_index.json", _class_name="StableDiffusionPipeline")
    with pytest.raises(GenerationError, match=r"is a StableDiffusionPipeline.*supported: WanPipeline"):
        find_model(str(folder))
    edit(folder / "model_index.json", _class_name=["WanPipeline"])
    with pytest.raises(GenerationError, match="which videosparse does not know"):
        find_model(str(folder))
    edit(folder / "model_index.json", _class_name="WanAnimatePipeline")
    with pytest.raises(GenerationError, match=r"is a WanAnimatePipeline, which videosparse does not know"):
        find_model(str(folder))
    edit(folder / "model_index.json", _class_name="WanImageToVideoPipeline")
    source = find_model(str(folder))
    with pytest.raises(GenerationError, match="needs an image besides the prompt"):
        check_text_to_video(source)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((10, 64, 64), r"num_frames must be 4k\+1 .*got 10.*use 9 or 13"),
        ((9, 60, 64), r"height must be a multiple of 16 .*got 60.*use 48 or 64"),
        ((9, 8, 64), r"height must be a multiple of 16 .*got 8.*use 16"),
        ((9, 64, 3), r"width must be a multiple of 16 .*got 3.*use 16"),
        ((1001, 64, 64), "num_frames must be at most 253"),
        ((100001, 512, 512), r"is \d+ tokens for small, and at most 2097152 are possible; use fewer frames"),
        ((9, 64, 1024), "width must be at most 512"),
    ],
)
def test_sizes_that_the_model_cannot_take(model_folder, size, message):
    with pytest.raises(GenerationError, match=message):
        find_model(str(model_folder)).grid(*size)


def test_saved_folder_really_loads(model_folder):
    from diffusers import DiffusionPipeline

    assert type(DiffusionPipeline.from_pretrained(model_folder)).__name__ == "WanPipeline"
    assert folders.PROMPT


def test_retries_of_the_hub_are_not_told(monkeypatch, caplog):
    """A hub model that cannot be fetched is one error; what the client logs besides is as loud as before."""
    told = logging.getLogger("huggingface_hub.utils")

    def unreachable(*_):
        told.warning("Retrying in 1s [Retry 1/5].")
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    before = logging.getLogger("huggingface_hub").level
    with pytest.raises(GenerationError, match=r"the hub model someone/else cannot be fetched \(ConnectionError\)"):
        find_model("someone/else")
    assert not caplog.records
    assert logging.getLogger("huggingface_hub").level == before


def test_every_family_can_be_generated_with_and_trained():
    from videosparse.generation.families import PIPELINE_FAMILIES
    from videosparse.models import FAMILIES
    from videosparse.training.families import TRAINING_FAMILIES

    assert FAMILIES.keys() == PIPELINE_FAMILIES.keys() == TRAINING_FAMILIES.keys()
    for family in PIPELINE_FAMILIES.values():
        assert MODELS[family.usual].family == family.name
        assert family.usual in sources.DEFAULTS
