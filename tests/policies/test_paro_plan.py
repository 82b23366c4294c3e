"""The plan file: the same bytes for the same plan, whole or not at all, and every mismatch told in one line."""

import errno
import gc
import os
import re

import pytest
import torch
from random_plans import CONFIG, GRID, make_plan
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from videosparse.blocks import pack_rows, unpack_rows
from videosparse.layout import TokenLayout, VideoGrid, ceil_div
from videosparse.policies.paro_plan import PAROPlan, blocks_kept, bucket_of, fingerprint, full_fingerprint, plain_config

CPU = torch.device("cpu")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "plan.safetensors"


def test_what_is_saved_is_what_is_loaded(path, tmp_path):
    plan = make_plan(method={"alpha": 0.5}, prompts="ab", versions={"torch": "2"})
    plan.save(path)
    found = PAROPlan.load(path)
    assert found.facts == plan.facts
    assert found.source == "plan.safetensors"
    for name in ("codes", "counts", "bits"):
        assert torch.equal(getattr(found, name), getattr(plan, name))
    found.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_nothing_is_overwritten_unasked(path):
    make_plan().save(path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"plan\.safetensors exists; choose another name, or pass --overwrite"):
        make_plan(seed=1).save(path)
    assert path.read_bytes() == before
    make_plan(seed=1).save(path, overwrite=True)
    assert path.read_bytes() != before


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_an_interruption_leaves_nothing(path, monkeypatch, failure):
    def fail(*_):
        raise failure

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(failure)):
        make_plan().save(path)
    assert list(path.parent.iterdir()) == []


def test_a_missing_plan(path):
    with pytest.raises(ValueError, match=r"There is no plan at .*plan\.safetensors; make one with videosparse calibra"):
        PAROPlan.load(path)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_truncated_plan(path, size):
    make_plan().save(path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"plan\.safetensors is no whole safetensors file") as error:
        PAROPlan.load(path)
    assert "\n" not in str(error.value)


def test_a_flipped_bit(path):
    make_plan().save(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="its contents do not match their checksum"):
        PAROPlan.load(path)


@pytest.mark.parametrize(
    "change", [lambda plan: plan.counts[1, 0].fill_(1), lambda plan: plan.bits[1, 2, 0, 1].fill_(0)]
)
def test_bits_and_counts_that_say_different_things(change):
    plan = make_plan()
    plan.counts[1, 0] = 2
    plan.bits[1, 0] = pack_rows(torch.arange(plan.blocks[1]) < 2)
    whole = [plan.codes, plan.counts, plan.bits, plan.facts]
    PAROPlan(*whole)
    change(plan)
    with pytest.raises(ValueError, match="the bits of attention 1 keep other numbers of blocks than its counts"):
        PAROPlan(*whole)


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 31])
def test_blocks_are_counted_up_to_the_last_column(columns):
    keep = torch.rand(2, 3, columns) > 0.5
    bits = pack_rows(keep)
    assert torch.equal(blocks_kept(bits, columns), keep.sum(-1, dtype=torch.int32))
    bits[..., -1] |= 0xFF << ((columns - 1) % 8 + 1) & 0xFF
    assert torch.equal(blocks_kept(bits, columns), keep.sum(-1, dtype=torch.int32))


def test_some_other_safetensors(path):
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is a safetensors file, but no plan"):
        PAROPlan.load(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("videosparse-paro-2", "videosparse-paro-9", "its format is videosparse-paro-9, this version reads"),
        ('"heads": 3', '"heads": 4', r"codes must be torch.uint8 \[2, 4\]"),
        ('"block": [128, 64]', '"block": [32, 64]', "block"),
        ('"layers": 2, ', "", "it lacks 'layers'"),
        ('"grid": [3, 9, 10]', '"grid": [0, 9, 10]', "must be at least 1"),
        ('"others": []', '"others": [{"a": 1}]', r"codes must be torch.uint8 \[4, 3\]"),
        ('"others": [], ', "", "it lacks 'others'"),
    ],
)
def test_a_changed_plan(path, old, new, message):
    make_plan().save(path)
    with safe_open(path, "pt") as file:
        text = file.metadata()["videosparse_plan"]
    assert old in text
    save_file(load_file(path), path, {"videosparse_plan": unsealed(text).replace(old, new)})
    with pytest.raises(ValueError, match=f"is no plan that can be used: .*{message}"):
        PAROPlan.load(path)


def unsealed(text):
    """As plans of before are: without a checksum of what they say."""
    return re.sub(r', "metadata_checksum": \d+', "", text)


def test_plans_of_now_notice_any_other_word(path):
    make_plan(prompts="ab").save(path)
    change(path, '"prompts": "ab"', '"prompts": "ac"')
    with pytest.raises(ValueError, match="is no plan that can be used: its metadata does not match its checksum; cali"):
        PAROPlan.load(path)


def change(path, old, new, of=lambda text: text):
    """Write other metadata beside the same tensors."""
    with safe_open(path, "pt") as file:
        text = file.metadata()["videosparse_plan"]
    assert old in text
    save_file(load_file(path), path, {"videosparse_plan": of(text).replace(old, new)})


CONFIG_TEXT = '"config": {"num_attention_heads": 3, "num_layers": 2, "patch_size": [1, 2, 2]}'


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (CONFIG_TEXT, '"config": null', r"config must be a table that is not empty \(got null\)"),
        (CONFIG_TEXT, '"config": [1]', "config must be a table"),
        (CONFIG_TEXT, '"config": {}', "config must be a table that is not empty"),
        ('"num_layers": 2', '"num_layers": 3', "its config does not match config_hash"),
        ('"method": {"shift": 3.0}', '"method": null', "method must be a table"),
        ('"method": {"shift": 3.0}', '"method": [1]', "method must be a table"),
        ('"shift": 3.0', '"shift": "abc"', "method must be a table whose shift is null or a number"),
        ('"shift": 3.0', '"shift": NaN', "method must be a table whose shift is null or a number"),
        ('"layers": 2', '"layers": 1e999', r"layers must be a whole number, at least 1 \(got Infinity\)"),
        ('"layers": 2', '"layers": true', "layers must be a whole number"),
        ('"heads": 3', '"heads": 0', r"heads must be a whole number, at least 1 \(got 0\)"),
        ('"video": [9, 144, 160]', '"video": [1]', r"video must be three whole numbers \(got \[1\]\)"),
        ('"weights": []', '"weights": ["x"]', "weights must name each of several experts"),
        ('"weights": []', '"weights": [[]]', "weights must be a list of texts"),
        ('"block": [128, 64]', '"block": [32, 32]', r"block must be .*each 64 or 128 \(got \[32, 32\]\)"),
        ('"density": 0.5', '"density": "x"', "density must be null or a number in"),
        ('"density": 0.5', f'"density": 1{"0" * 400}', "density must be null or a number in"),
        ('"model_class": "WanTransformer3DModel"', '"model_class": 3', "model_class must be a text"),
        ('"others": []', '"others": [1]', "others must be a list of tables"),
        ('"versions": {}', '"versions": 1', "versions must be a table"),
        ('"prompts": ""', '"prompts": null', "prompts must be a text"),
        ('"text": 0', '"text": -1', "text must be a whole number"),
    ],
)
def test_a_plan_whose_words_are_of_another_type(path, old, new, message):
    make_plan(method={"shift": 3.0}).save(path)
    change(path, old, new, unsealed)
    with pytest.raises(ValueError, match=rf"plan\.safetensors is no plan that can be used: {message}") as error:
        PAROPlan.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": ' * 50_000, "[1]", "null", "{", '"format"'])
def test_metadata_that_is_no_table(path, text):
    make_plan().save(path)
    save_file(load_file(path), path, {"videosparse_plan": text})
    with pytest.raises(ValueError, match=r"is no plan that can be used: its metadata is no (JSON|table); calib"):
        PAROPlan.load(path)


def test_an_empty_name_is_told():
    with pytest.raises(ValueError, match=r"The name of the plan is empty; give the \.safetensors file, or leave plan"):
        PAROPlan.load("")


def test_a_name_that_is_taken_at_the_last_moment(path, monkeypatch):
    """Where the file system has links, nothing comes between the look and the name."""
    path.write_text("theirs")
    monkeypatch.setattr(os.path, "lexists", lambda path: False)
    with pytest.raises(FileExistsError, match=r"plan\.safetensors exists; choose another name, or pass --overwrite\.$"):
        make_plan().save(path)
    assert path.read_text() == "theirs"
    assert list(path.parent.iterdir()) == [path]


def test_a_file_system_without_links(path, monkeypatch):
    def refuse(source, target):
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    make_plan().save(path)
    assert list(path.parent.iterdir()) == [path]
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="exists; choose another name"):
        make_plan(seed=1).save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_counts_where_it_is_asked_for(dtype):
    model = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.Linear(1, 1)).to(dtype)
    before, of_small = full_fingerprint(model), fingerprint(model)
    with torch.no_grad():
        model[0].weight.mul_(1.25)  # too large for a plan's own
    assert fingerprint(model) == of_small
    assert full_fingerprint(model) != before
    with torch.no_grad():
        model[0].weight.div_(1.25)
        model[1].weight += 1
    assert full_fingerprint(model) != before
    assert full_fingerprint(model.double()) != full_fingerprint(model.float())
    assert full_fingerprint(model.to("meta"))


def test_a_plan_of_the_format_before_is_read(path):
    """Which was for one transformer, and said nothing of others."""
    plan = make_plan()
    plan.save(path)
    with safe_open(path, "pt") as file:
        text = file.metadata()["videosparse_plan"]
    for new, old in (("videosparse-paro-2", "videosparse-paro-1"), (', "others": []', ""), (', "weights": []', "")):
        assert new in text
        text = text.replace(new, old)
    save_file(load_file(path), path, {"videosparse_plan": unsealed(text)})
    found = PAROPlan.load(path)
    assert found.facts == plan.facts
    assert (found.facts.experts, found.facts.attentions) == (1, 2)


def test_another_model_is_refused_with_what_differs():
    plan = make_plan()
    config = {**CONFIG, "_class_name": "WanTransformer3DModel", "_name_or_path": "x", "patch_size": (1, 2, 2)}
    plan.check_model(config)
    plan.check_model({**config, "a_key_of_a_later_version": 1})
    with pytest.raises(ValueError, match="for a WanTransformer3DModel, this model is a MochiTransformer3DModel; calib"):
        plan.check_model({**config, "_class_name": "MochiTransformer3DModel"})
    with pytest.raises(ValueError, match="with num_layers=2, this model has num_layers=40; calibrate for it"):
        plan.check_model({**config, "num_layers": 40})


def test_a_configuration_with_no_name_in_common_is_no_match():
    with pytest.raises(ValueError, match="knows nothing of this model's configuration, so that it cannot be compared"):
        make_plan().check_model({"_class_name": "WanTransformer3DModel", "dim": 3})


def test_other_sizes_are_refused_with_what_differs():
    plan = make_plan()
    plan.check_sizes(2, 3)
    plan.check_grid(GRID)
    with pytest.raises(ValueError, match="a model with 2 layers, this one has 30"):
        plan.check_sizes(30, 3)
    with pytest.raises(ValueError, match="a model with 3 heads, this one has 12"):
        plan.check_sizes(2, 12)
    with pytest.raises(
        ValueError, match=r"for grid 3x9x10 \(9 frames of 144x160\), this video has grid 5x9x10; calibr"
    ):
        plan.check_grid(VideoGrid(5, 9, 10))


def test_configurations_are_compared_as_json():
    assert plain_config({"_x": 1, "a": (1, 2), "quantization_config": object()}) == {"a": [1, 2]}


@pytest.mark.parametrize("text", [0, 40])
@pytest.mark.parametrize("block", [(64, 64), (128, 64), (128, 128)])
def test_maps_get_their_text_on_the_device(text, block):
    plan = make_plan(block=block)
    layout = TokenLayout(GRID, text).aligned(block)
    rows, columns = (ceil_div(layout.length, b) for b in block)
    video_rows, video_columns = plan.blocks
    index = plan.index(layout, 1, 2, CPU)
    keep = index.block_map().keep
    assert keep.shape == (1, 3, rows, columns)
    assert torch.equal(keep[0, :, :video_rows, :video_columns], unpack_rows(plan.bits[1, 2], video_columns))
    assert keep[:, :, video_rows:].all()
    assert keep[:, :, :, video_columns:].all()
    assert torch.equal(index.row_ptr.diff(), keep.sum(3).flatten().int())
    assert index.row_ptr[-1] == index.capacity
    every, video = plan.densities(layout, 1, 2)
    assert every == pytest.approx(float(keep.float().mean()))
    assert video == pytest.approx(float(keep[0, :, :video_rows, :video_columns].float().mean()))


def test_maps_are_shared_while_someone_holds_them():
    plan, layout = make_plan(), TokenLayout(GRID)
    index = plan.index(layout, 0, 0, CPU)
    assert plan.index(layout, 0, 0, CPU) is index
    assert len(plan._uploads) == 1
    del index
    gc.collect()
    assert len(plan._uploads) == 0


def test_steps_fall_into_buckets():
    assert [bucket_of(i, 50, 5) for i in range(50)] == [i // 5 for i in range(25)] + [5] * 25
    assert [bucket_of(i, 4, 5) for i in range(4)] == [0, 2, 5, 5]
    assert [bucket_of(i, 5, 1) for i in range(5)] == [0, 0, 0, 1, 1]
    assert bucket_of(0, 1, 5) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("text", [0, 40])
def test_maps_reach_a_gpu_without_a_wait(text):
    plan, layout = make_plan(), TokenLayout(GRID, text).aligned((128, 64))
    device = torch.device("cuda", torch.cuda.current_device())
    first = plan.index(layout, 0, 0, device)  # compiles and allocates
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = plan.index(layout, 1, 2, device)
        order = plan.order(1, GRID).table(device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = plan.index(layout, 1, 2, CPU)
    for name in ("bits", "row_ptr", "order"):
        assert torch.equal(getattr(found, name).cpu(), getattr(expected, name))
    assert torch.equal(order.cpu(), plan.order(1, GRID).table(CPU))
    assert first is not found
