"""Configurations: every key is documented, and mistakes are told before anything loads."""

from pathlib import Path

import pytest

from videosparse.training.config import ConfigError, describe, load_config, parse_config

RECIPES = sorted((Path(__file__).parents[2] / "lora" / "recipes").glob("*.toml"))
GOOD = {"data": {"path": "d"}, "output": {"folder": "o"}, "train": {"frames": [33, 65]}}


def with_key(name, value):
    section, entry = name.split(".")
    return {**GOOD, section: {**GOOD.get(section, {}), entry: value}}


def test_every_key_is_documented():
    keys = list(describe())
    assert len(keys) > 40
    assert all(len(doc) > 10 for _, _, doc in keys)
    assert len({doc for _, _, doc in keys}) == len(keys)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipes_are_valid(recipe):
    config = load_config(recipe)
    assert config.train.frames == tuple(sorted(config.train.frames))
    assert f"lora/recipes/{recipe.name}" in recipe.read_text(), "its first lines say how it is run"


@pytest.mark.parametrize("recipe", [r for r in RECIPES if not r.stem.startswith("tiny")], ids=lambda p: p.stem)
def test_recipes_fit_their_models_and_presets(recipe):
    """Lengths and sizes that the model can take, the multiple in the name, and the shift of runs at that size."""
    import re

    from videosparse.generation.presets import PRESETS
    from videosparse.generation.sources import find_spec

    config, text = load_config(recipe), recipe.read_text()
    source = find_spec(config.model.path)
    frames, height, width = (
        int(x) for x in re.search(r"--frames (\d+) --size (\d+)x(\d+)", text.replace("\\\n#", "")).groups()
    )
    assert frames == config.train.frames[-1]
    for length in config.train.frames:
        source.grid(length, height, width)
    times = int(re.search(r"-(\d)x", recipe.stem)[1])
    assert frames == pytest.approx(times * source.defaults.num_frames, rel=0.02)
    sizes = [
        preset.values.get("shift") for preset in PRESETS.values()
        if preset.values["model"] == config.model.path and preset.values.get("height") == height
    ]  # fmt: skip
    (shift,) = set(sizes)
    own = {"wan2.1-1.3b": 3.0, "hunyuan-video": 7.0, "mochi": None}.get(config.model.path)
    assert (config.attention.shift or own) == shift


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("train.lrr", 1e-4, "Section train has no key 'lrr'; it has .* Did you mean 'lr'?"),
        ("train.rank", 8, "Section train has no key 'rank'.* Did you mean 'lora.rank'?"),
        ("trian.lr", 1e-4, "Unknown section 'trian'.* Did you mean 'train'?"),
        ("train.lr", "fast", "train.lr must be a number .got 'fast'."),
        ("train.lr", 0.0, "train.lr must be above 0 and finite"),
        ("train.steps", 1.5, "train.steps must be a whole number"),
        ("train.steps", True, "train.steps must be a whole number"),
        ("train.checkpointing", 1, "must be true or false"),
        ("train.frames", [], "train.frames is missing"),
        ("train.shares", [1.0], "one number above 0 for each of train.frames"),
        ("train.noise_from", 1.0, "train.noise_from must be below train.noise_to"),
        ("train.draw", "uniformm", "train.draw must be .* Did you mean 'uniform'?"),
        ("data.caption_dropout", 1.5, "data.caption_dropout must be 0 to 1"),
        ("data.path", "", "data.path is missing"),
        ("output.folder", "", "output.folder is missing"),
        ("output.trackers", ["tensorbord"], "Did you mean 'tensorboard'?"),
        ("lora.rank", 0, "lora.rank must be at least 1"),
        ("attention.method", "adaspa", "searches for its maps while a video is made"),
        ("attention.method", "paro", "needs attention.options.plan"),
        ("attention.options", "decay", "attention.options must be a table"),
        ("model.rope", "riflx", "model.rope must be .* Did you mean 'riflex'"),
        ("validate.video_every", 5, "needs validate.prompts"),
        ("train.shift", -1.0, "train.shift must be at least 0"),
        ("attention.shift", -1.0, "attention.shift must be at least 0"),
        ("data.fps", -16, "data.fps must be at least 0"),
    ],
)
def test_mistakes_are_told_in_one_line(name, value, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config(with_key(name, value))
    assert "\n" not in str(caught.value)


def test_the_experts_of_a_pair_share_all_noise_levels():
    """And everything else but where the LoRA goes."""
    high, low = (load_config(RECIPES[0].parent / f"wan2.2-a14b-2x{part}.toml") for part in ("", "-low"))
    assert (high.model.component, low.model.component) == ("transformer", "transformer_2")
    assert (low.train.noise_from, low.train.noise_to) == (0.0, high.train.noise_from)
    assert high.train.noise_to == 1.0
    differ = {
        f"{section}.{name}" for section, values in high.as_dict().items() for name, value in values.items()
        if low.as_dict()[section][name] != value
    }  # fmt: skip
    assert differ == {
        "model.component", "train.noise_from", "train.noise_to", "attention.first_steps", "output.folder",
    }  # fmt: skip


def test_a_section_must_be_a_table():
    with pytest.raises(ConfigError, match=r"write \[train\]"):
        parse_config({**GOOD, "train": 3})


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="give a TOML file"):
        load_config(tmp_path / "no.toml")
    (tmp_path / "bad.toml").write_text("[train\n")
    with pytest.raises(ConfigError, match="no valid TOML"):
        load_config(tmp_path / "bad.toml")


def test_assignments_change_keys(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('[data]\npath = "d"\n[output]\nfolder = "o"\n[train]\nframes = [33]\n')
    changes = ["train.lr=5e-4", "train.frames=[33, 65]", "attention.options.decay=0.5", "model.path=some/where"]
    config = load_config(path, changes)
    assert (config.train.lr, config.train.frames, config.model.path) == (5e-4, (33, 65), "some/where")
    assert config.attention.options == {"decay": 0.5}
    with pytest.raises(ConfigError, match="--set expects"):
        load_config(path, ["lr=1"])


def test_lengths_follow_one_another():
    config = parse_config({**GOOD, "train": {"frames": [33, 65, 129], "shares": [1, 2, 1], "steps": 8}})
    assert [config.frames_at(step) for step in range(8)] == [33, 33, 65, 65, 65, 65, 129, 129]
