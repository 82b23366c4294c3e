"""LoRA runs: what is trained, that it is resumed exactly, what is refused, and that the file gives the same output."""

import json
from pathlib import Path

import lora_runs
import pytest
import torch
from safetensors.torch import load_file

from videosparse.training import checkpoint
from videosparse.training.adapters import to_comfy
from videosparse.training.clips import Size, synthetic_clips
from videosparse.training.config import ConfigError
from videosparse.training.encoding import prepare


def weights_of(run):
    return {name: p.detach().clone() for name, p in run.parameters.items()}


def steps(run, count):
    return [run.train_step().loss for _ in range(count)]


def test_only_adapters_are_trained_and_all_of_them_move(lora_run):
    run = lora_run()
    before = weights_of(run)
    frozen = {n: p.detach().clone() for n, p in run.transformer.named_parameters() if not p.requires_grad}
    assert {n.split(".attn1.")[1].split(".lora")[0] for n in before} == {"to_q", "to_k", "to_v", "to_out.0"}
    steps(run, 2)
    assert all(not torch.equal(before[n], p) for n, p in weights_of(run).items())
    now = dict(run.transformer.named_parameters())
    assert all(torch.equal(value, now[n]) for n, value in frozen.items())


def test_four_clips_are_overfitted(lora_run, tmp_path):
    """The embedded model, at a size that it has forgotten: rendered, encoded, and learned with sparse attention."""
    model = Path(__file__).parents[2] / "assets" / "tiny-wan"
    prepare(synthetic_clips(4), tmp_path / "four", str(model), [Size(17, 64, 64)], device="cpu")
    run = lora_run(
        model=model,
        data=tmp_path / "four",
        data_={"holdout": 0, "caption_dropout": 0.0},
        lora={"rank": 16, "alpha": 16.0},
        train={"frames": [17], "steps": 14, "lr": 1e-2, "batch_size": 4},
    )

    @torch.no_grad()
    def loss():
        (bucket,) = run.data.train
        batches = [run.sampler.held_out(e, 17, level) for e in bucket.entries for level in (0.3, 0.7)]
        return sum(float(run.loss(batch, dense=False)) for batch in batches) / len(batches)

    before = loss()
    steps(run, 14)
    assert loss() < 0.7 * before


@pytest.mark.parametrize("more", [{}, {"train": {"ema": 0.9, "accumulate": 2}}], ids=["plain", "ema, accumulate"])
def test_resumed_runs_are_the_same_bit_for_bit(lora_run, more):
    straight = lora_run("a", **more)
    losses = steps(straight, 6)
    first = lora_run("b", **more)
    begun = steps(first, 3)
    first.save()
    second = lora_run("b", **more)
    assert second.resume() == 3
    assert begun + steps(second, 3) == losses
    for name, value in weights_of(straight).items():
        assert torch.equal(value, second.parameters[name])
    if straight.average is not None:
        assert all(torch.equal(v, second.average.values[n]) for n, v in straight.average.values.items())


def test_checkpoints_are_whole_and_the_newest_are_kept(lora_run):
    run = lora_run(output={"keep": 2})
    for _ in range(4):
        run.train_step()
        run.save()
    names = [p.name for p in checkpoint.checkpoints(run.folder)]
    assert names == ["step-000003", "step-000004"]
    assert sorted(p.name for p in (run.folder / "checkpoints").iterdir()) == names, "nothing half-written"
    broken = run.folder / "checkpoints" / "step-000009"
    broken.mkdir()
    assert lora_run().resume() == 4, "a folder without a state is no checkpoint"
    (run.folder / "checkpoints" / "step-000004" / "optimizer.safetensors").write_bytes(b"no")
    with pytest.raises(ConfigError, match=r"step-000004 is damaged .*delete it"):
        lora_run().resume()


def test_another_run_is_not_resumed(lora_run):
    run = lora_run()
    run.train_step()
    run.save()
    with pytest.raises(ConfigError, match=r"lora.alpha was 8.0 in .* and is 4.0 now"):
        lora_run(lora={"alpha": 4.0}).resume()
    assert lora_run(train={"steps": 9}).resume() == 1


def test_other_numbers_of_processes_are_another_run(lora_run):
    run = lora_run()
    run.train_step()
    run.save()
    more = lora_run()
    more.sampler.in_step = 2  # as with two processes
    with pytest.raises(ConfigError, match=r"A step had 1 samples in .* and has 2 now; start as many processes"):
        more.resume()


def test_a_loss_that_is_no_number_changes_nothing(lora_run):
    from videosparse.training.run import Diverged

    run = lora_run()
    run.train_step()
    before = weights_of(run)
    with torch.no_grad():
        run.transformer.proj_out.weight.fill_(float("nan"))
    with pytest.raises(Diverged, match=r"The loss is not finite at step 1 .*lower train.lr"):
        run.train_step()
    assert all(torch.equal(before[n], p) for n, p in run.parameters.items())
    assert run.done == 1


def test_attention_is_sparse_or_dense_by_the_noise_level(lora_run):
    """Both sides occur as often as their noise levels do, and plans follow."""
    from videosparse.attach import tracker_of

    run = lora_run(train={"steps": 400}, attention={"first_steps": 0.3})
    sampler = run.sampler
    drawn = [sampler.step(n) for n in range(400)]
    assert sum(s.dense for s in drawn) / 400 == pytest.approx(sampler.dense_share, abs=0.06)
    assert 0.1 < sampler.dense_share < 0.6
    for step in drawn[:40]:
        assert (sampler.level(step, 0) > sampler.threshold) == step.dense
    modes = set()
    for number in (next(s.number for s in drawn if s.dense), next(s.number for s in drawn if not s.dense)):
        step = sampler.step(number)
        run.model.train()
        run.loss(sampler.batch(step, [0]), step.dense).backward()
        plans = [layer.plan.mode.value for _, layer in tracker_of(run.transformer).layers]
        assert plans == (["dense"] * 3 if step.dense else ["dense", "sparse", "sparse"])
        modes.add(plans[-1])
    assert modes == {"dense", "sparse"}


def test_what_is_dense_follows_the_shift_of_the_videos(lora_run):
    """Not that of the levels in training: a run of shift 12 has most of its steps at high noise."""
    from videosparse.training.noise import shifted

    own, other = lora_run("a"), lora_run("b", attention={"shift": 12.0}, train={"shift": 3.0})
    assert own.sampler.threshold == pytest.approx(shifted(0.7, 3.0))  # the model's scheduler has 3
    assert other.sampler.threshold == pytest.approx(shifted(0.7, 12.0))
    assert other.sampler.dense_share < own.sampler.dense_share
    assert other.levels == own.levels
    for step in map(other.sampler.step, range(40)):
        assert (other.sampler.level(step, 0) > other.sampler.threshold) == step.dense
    told = other.about()
    assert (told["shift"], told["dense_above"]) == (12.0, other.sampler.threshold)
    assert told["recipe"]["attention"]["shift"] == 12.0


def test_a_scheduler_without_a_shift_needs_to_be_told(lora_run, wan_folder, tmp_path):
    import shutil

    shutil.copytree(wan_folder, tmp_path / "odd")
    file = tmp_path / "odd/scheduler/scheduler_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in config.items() if name != "flow_shift"}))
    with pytest.raises(ValueError, match=r"UniPCMultistepScheduler. has no fixed shift .*attention.shift"):
        lora_run(model=tmp_path / "odd")
    assert lora_run(model=tmp_path / "odd", attention={"shift": 5.0}).schedule.shift == 5.0


@pytest.mark.parametrize("in_step", [1, 3])
def test_clips_of_all_buckets_come_equally_often(lora_run, wan_folder, tmp_path, in_step):
    """Two shapes of 5 and 3 clips, one batch of one shape each."""
    from collections import Counter

    data = lora_runs.random_data(tmp_path / "both", wan_folder, clips=7)
    lora_runs.random_data(data, wan_folder, clips=5, size=48)
    run = lora_run(data=data, train={"frames": [17, 33], "steps": 96, "batch_size": in_step})
    assert sorted(len(bucket.entries) for bucket in run.data.train) == [3, 5]
    sampler = run.sampler
    assert sampler.in_step == in_step
    seen = Counter()
    for number in range(48):  # those of 17 frames
        step = sampler.step(number)
        for place in range(in_step):
            seen[str(step.bucket.size), sampler._entry(step, place).key] += 1
        of = {size: [seen[str(b.size), e.key] for e in b.entries] for b in run.data.train for size in [b.size]}
        assert all(max(counts) - min(counts) <= 1 for counts in of.values()), "once before any comes again"
        assert max(seen.values()) - min(min(counts) for counts in of.values()) <= 1 + -(-in_step // 3)
    assert set(seen.values()) == {48 * in_step // 8}
    later = lora_run(data=data, train={"frames": [17, 33], "steps": 96, "batch_size": in_step}).sampler
    for number in (70, 3):  # nothing is kept between steps
        assert later.step(number) == sampler.step(number)
        assert later._entry(later.step(number), 0) == sampler._entry(sampler.step(number), 0)


def test_plans_of_paroattention(lora_run, wan_folder, tmp_path):
    """Static maps and token orders, in training and on held-out clips."""
    from videosparse.attach import tracker_of
    from videosparse.generation.calibrating import CalibrationRequest, calibrate

    plan = tmp_path / "plan.safetensors"
    asked = CalibrationRequest(
        ["a cat"], model=str(wan_folder), num_frames=33, height=64, width=64, steps=4, device="cpu", density=0.4,
        block=(64, 64), buckets=1,
    )  # fmt: skip
    calibrate(asked, plan)
    data = lora_runs.random_data(tmp_path / "large", wan_folder, clips=4, size=64)
    run = lora_run(
        data=data, attention={"method": "paro", "options": {"plan": str(plan)}, "first_steps": 0.0},
        train={"frames": [33]},
    )  # fmt: skip
    before = run.held_out(33)
    steps(run, 2)
    plans = [layer.plan for _, layer in tracker_of(run.transformer).layers]
    assert [p.mode.value for p in plans] == ["dense", "sparse", "sparse"]
    assert plans[1].order is not None
    assert run.held_out(33) != before


def test_gradients_of_the_sparse_path_are_those_of_the_reference(lora_run, wan_folder, tmp_path, monkeypatch):
    """Every attention call by `attention_reference` with the same map, plain autograd behind it."""
    from videosparse import processors
    from videosparse.reference import attention_reference

    data = lora_runs.random_data(tmp_path / "large", wan_folder, clips=3, frames=49, size=64)
    run = lora_run(data=data, train={"frames": [49]})
    step = next(s for s in map(run.sampler.step, range(20)) if not s.dense)
    batch = run.sampler.batch(step, [0])
    with torch.no_grad():
        for name, p in run.parameters.items():
            if "lora_B" in name:
                p.normal_(std=0.1)

    def gradients():
        run.transformer.zero_grad()
        run.model.train()
        run.loss(batch, False).backward()
        return {n: p.grad.clone() for n, p in run.parameters.items()}

    ours = gradients()

    def plain(plan, q, k, v):
        found = run.processor.resolve(run.source.described, grid=plan.layout.grid).policy
        keep = found.static_map(plan.layout, q.device)
        assert keep.density < 0.9
        return attention_reference(q, k, v, layout=plan.layout, block_map=keep)[0]

    monkeypatch.setattr(processors, "_attend", plain)
    for name, expected in gradients().items():
        assert (ours[name] - expected).norm() <= 1e-4 * expected.norm().clamp_min(1e-8), name


def test_checkpointing_and_accumulation_change_no_gradient(lora_run):
    one = lora_run("a", train={"batch_size": 2})
    two = lora_run("b", train={"accumulate": 2, "checkpointing": True})
    assert steps(one, 2) == pytest.approx(steps(two, 2), rel=1e-5)
    for name, value in weights_of(one).items():
        torch.testing.assert_close(two.parameters[name].detach(), value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("alpha", [4.0, 6.0], ids=["alpha = rank", "alpha != rank"])
@pytest.mark.parametrize("norms", [False, True], ids=["", "norms"])
def test_plain_diffusers_gives_the_trained_output(lora_run, alpha, norms):
    from diffusers import WanPipeline

    from videosparse import restore
    from videosparse.generation.lora import load_norms

    run = lora_run(lora={"rank": 4, "alpha": alpha, "norms": norms})
    steps(run, 4)
    folder = run.export()
    batch = run.sampler.batch(run.sampler.step(0), [0])
    inputs = run.family.inputs(run.transformer.config, batch.noisy, batch.levels, batch.text)
    restore(run.transformer)
    with torch.no_grad():
        trained = run.transformer.eval()(**inputs, return_dict=False)[0]
        pipe = WanPipeline.from_pretrained(run.source.location)
        stock = pipe.transformer(**inputs, return_dict=False)[0]
        pipe.load_lora_weights(folder)
        if norms:
            load_norms(pipe.transformer, folder / "qk_norms.safetensors")
        loaded = pipe.transformer(**inputs, return_dict=False)[0]
    assert not torch.allclose(stock, trained, atol=1e-3)
    assert torch.equal(loaded, trained)
    assert (folder / "qk_norms.safetensors").exists() == norms


def test_the_file_says_what_it_is_for(lora_run):
    from safetensors import safe_open

    run = lora_run(attention={"options": {"decay": 0.7}})
    run.train_step()
    with safe_open(run.export() / "pytorch_lora_weights.safetensors", "pt") as file:
        about = json.loads(file.metadata()["videosparse"])
    assert about["frames"] == [17, 33]
    assert (about["method"], about["options"], about["first_steps"]) == ("radial", {"decay": 0.7}, 0.3)
    assert about["recipe"]["train"]["lr"] == 1e-2
    assert (about["family"], about["layers"], about["heads"], about["steps"]) == ("wan", 3, 2, 1)


def test_the_original_layout_loads_as_the_same_lora(lora_run):
    from diffusers import WanPipeline

    run = lora_run(lora={"alpha": 6.0})
    steps(run, 3)
    folder = run.export()
    to_comfy(folder / "pytorch_lora_weights.safetensors", folder / "comfy.safetensors")
    assert any(n.endswith("self_attn.q.lora_down.weight") for n in load_file(folder / "comfy.safetensors"))
    batch = run.sampler.batch(run.sampler.step(0), [0])
    inputs = run.family.inputs(run.transformer.config, batch.noisy, batch.levels, batch.text)
    outs = []
    for name in ("pytorch_lora_weights.safetensors", "comfy.safetensors"):
        pipe = WanPipeline.from_pretrained(run.source.location)
        pipe.load_lora_weights(folder, weight_name=name)
        with torch.no_grad():
            outs.append(pipe.transformer(**inputs, return_dict=False)[0])
    torch.testing.assert_close(*outs, rtol=0, atol=1e-6)


def test_the_original_layout_goes_by_the_lora_and_not_by_its_folder(lora_run):
    file = lora_run(lora={"norms": True}).export() / "pytorch_lora_weights.safetensors"
    norms = file.with_name("qk_norms.safetensors")
    with pytest.raises(ConfigError, match=r"comfy cannot hold trained norms"):
        to_comfy(file, file.with_name("comfy.safetensors"))
    stale = norms.read_bytes()
    lora_run().export()
    assert not norms.exists(), "these weights have no norms"
    norms.write_bytes(stale)
    to_comfy(file, file.with_name("comfy.safetensors"))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"norms": True}, "comfy cannot hold trained norms"),
        ({"target": r"blocks\.\d+\.attn2\.to_q"}, r"comfy knows self-attentions of Wan only .got blocks.0.attn2.to_q"),
    ],
)
def test_what_a_format_cannot_hold_is_told_before_the_first_step(program, lora_run, monkeypatch, lora, message):
    from videosparse.training.run import LoraRun

    run = lora_run(lora=lora)
    monkeypatch.setattr(LoraRun, "train_step", lambda self: pytest.fail("a step was trained"))
    with pytest.raises(ConfigError, match=message):
        program(run.config, format="comfy")


def test_held_out_losses_are_the_same_every_time_and_fall(lora_run):
    run = lora_run(train={"steps": 30, "batch_size": 2}, data_={"caption_dropout": 0.0})
    first = run.held_out(17)
    assert set(first) == {0.1, 0.3, 0.5, 0.7, 0.9}
    assert run.held_out(17) == first
    steps(run, 30)
    assert run.held_out(17) != first


def test_frozen_weights_in_eight_bits_give_nearly_the_same_gradient(lora_run):
    run = lora_run("a", train={"checkpointing": True})
    small = lora_run("b", model_={"fp8": True}, train={"checkpointing": True})
    stored = {p.dtype for p in small.transformer.blocks.parameters()}
    assert torch.float8_e4m3fn in stored
    a, b = steps(run, 3), steps(small, 3)
    assert b == pytest.approx(a, rel=0.1)
    assert b != a
    with pytest.raises(ConfigError, match=r"fp8 needs train.checkpointing"):
        lora_run("c", model_={"fp8": True})


def test_norms_are_trained_where_asked(lora_run):
    run = lora_run(lora={"norms": True})
    names = [n for n in run.parameters if "norm" in n]
    assert len(names) == 6
    before = weights_of(run)
    steps(run, 2)
    assert all(not torch.equal(before[n], run.parameters[n]) for n in names)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"lora": {"target": "nothing"}}, "lora.target matches no module"),
        ({"lora": {"target": "("}}, "lora.target is no regular expression"),
        ({"attention": {"options": {"first_steps": 2}}}, "attention.options must not have first_steps"),
        ({"attention": {"options": {"decy": 2}}}, "Did you mean 'decay'"),
        ({"train": {"frames": [65]}}, "has clips of .33.; prepare longer ones"),
        ({"train": {"frames": [18]}}, "train.frames must be 4k.1"),
        ({"data_": {"fps": 24.0}}, "was prepared at 16 frames a second, and data.fps is 24; prepare it again"),
        ({"train": {"sequence_parallel": 2}}, "must divide the number of processes"),
        ({"train": {"optimizer": "adamw8bit"}}, "needs bitsandbytes"),
        ({"model_": {"component": "transformer_2"}}, "has one transformer"),
        ({"data_": {"holdout": 8}}, "data.holdout keeps 8"),
        ({"data_": {"path": "nowhere"}}, "No data set at nowhere"),
    ],
)
def test_what_does_not_go_together_is_refused(lora_run, sections, message):
    import importlib.util

    if "bitsandbytes" in message and importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is here")
    with pytest.raises(ValueError, match=message):
        lora_run(**sections)


@pytest.mark.parametrize("rope", ["ntk", "pi"])
def test_the_rotary_embedding_is_stretched_beyond_the_trained_length(lora_run, rope):
    plain = lora_run("a", train={"frames": [17, 33]})
    stretched = lora_run("b", model_={"rope": rope, "trained_frames": 17}, train={"frames": [17, 33]})
    assert stretched.held_out(17) == plain.held_out(17)
    assert stretched.held_out(33) != plain.held_out(33)
    about = stretched.about()
    assert (about["rope"], about["trained_frames"]) == (rope, 17)


@pytest.mark.parametrize("name", ["hunyuan", "mochi"])
def test_other_families(name, tmp_path):
    """Train, write, load in plain Diffusers: the same output."""
    import diffusers

    from videosparse import restore
    from videosparse.training.run import LoraRun, change, make_accelerator

    torch.set_num_threads(1)
    folder = lora_runs.save_pipe(name, tmp_path / "model")
    frames = [19, 37] if name == "mochi" else [17, 33]
    data = lora_runs.random_data(tmp_path / "data", folder, frames=frames[-1], size=64)
    config = lora_runs.make_config(folder, data, tmp_path / "out", train={"frames": frames, "lr": 1e-1})
    run = LoraRun(config, make_accelerator(config, "cpu"))
    assert all("refiner" not in n and "pooler" not in n for n in run.parameters)
    before = run.held_out(frames[-1])
    steps(run, 6)
    assert run.held_out(frames[-1]) != before
    out = run.export()
    batch = run.sampler.batch(run.sampler.step(0), [0])
    inputs = run.family.inputs(run.transformer.config, batch.noisy, batch.levels, batch.text)
    restore(run.transformer)
    with torch.no_grad():
        trained = run.transformer.eval()(**inputs, return_dict=False)[0]
        pipe = getattr(diffusers, run.source.pipeline_class).from_pretrained(folder)
        stock = pipe.transformer(**inputs, return_dict=False)[0]
        pipe.load_lora_weights(out)
        loaded = pipe.transformer(**inputs, return_dict=False)[0]
    assert not torch.equal(stock, trained)
    assert torch.equal(loaded, trained)
    with pytest.raises(ConfigError, match="Wan only"):
        to_comfy(out / "pytorch_lora_weights.safetensors", tmp_path / "x.safetensors")
    if name == "mochi":
        with pytest.raises(ConfigError, match="Mochi learned the frequencies"):
            LoraRun(change(config, model={"rope": "ntk"}), make_accelerator(config, "cpu"))


def test_each_expert_is_trained_at_its_noise_levels(tmp_path):
    """Wan 2.2: the low-noise expert, written, loaded into the second transformer, the first one left alone."""
    from diffusers import WanPipeline

    from videosparse import restore
    from videosparse.generation.lora import find_lora, load_loras
    from videosparse.training.run import LoraRun, make_accelerator

    torch.set_num_threads(1)
    folder = lora_runs.save_pipe("wan22", tmp_path / "model")
    data = lora_runs.random_data(tmp_path / "data", folder, size=64)
    config = lora_runs.make_config(
        folder, data, tmp_path / "out", model_={"component": "transformer_2"},
        train={"noise_to": 0.875, "lr": 1e-1}, attention={"first_steps": 0.0},
    )  # fmt: skip
    run = LoraRun(config, make_accelerator(config, "cpu"))
    levels = [run.sampler.level(run.sampler.step(n), 0) for n in range(200)]
    assert 0.7 < max(levels) <= 0.875
    steps(run, 3)
    lora = find_lora(str(run.export()))
    assert lora.component == "transformer_2"
    batch = run.sampler.batch(run.sampler.step(0), [0])
    inputs = run.family.inputs(run.transformer.config, batch.noisy, batch.levels, batch.text)
    restore(run.transformer)
    pipe = WanPipeline.from_pretrained(folder)
    with torch.no_grad():
        trained = run.transformer.eval()(**inputs, return_dict=False)[0]
        stock = [t(**inputs, return_dict=False)[0] for t in (pipe.transformer, pipe.transformer_2)]
        load_loras(pipe, (lora,))
        loaded = [t(**inputs, return_dict=False)[0] for t in (pipe.transformer, pipe.transformer_2)]
    assert torch.equal(loaded[0], stock[0])
    assert torch.equal(loaded[1], trained)
    assert not torch.equal(trained, stock[1])


def test_an_expert_trains_with_the_attention_of_the_pair(tmp_path):
    """Radial Attention's defaults are other ones for two experts; generation takes those."""
    from videosparse.attach import tracker_of
    from videosparse.processors import RadialProcessor
    from videosparse.training.config import ConfigError
    from videosparse.training.run import LoraRun, make_accelerator

    torch.set_num_threads(1)
    folder = lora_runs.save_pipe("wan22", tmp_path / "model")
    data = lora_runs.random_data(tmp_path / "data", folder, size=64)
    config = lora_runs.make_config(folder, data, tmp_path / "out")
    run = LoraRun(config, make_accelerator(config, "cpu"))
    run.loss(run.sampler.batch(run.sampler.step(0), [0]), dense=False)
    resolved = tracker_of(run.transformer).session.processor.binding.resolved
    assert resolved.variant == "wan2.2-a14b"
    assert resolved.policy.decay == RadialProcessor().resolve(run.source.spec, experts=2).policy.decay
    videos = lora_runs.make_config(folder, data, tmp_path / "out", validate={"prompts": ["a cat"]})
    with pytest.raises(ConfigError, match="needs both of its experts"):
        LoraRun(videos, make_accelerator(videos, "cpu"))
