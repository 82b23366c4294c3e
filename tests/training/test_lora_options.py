"""What the keys of a recipe do to a LoRA run: optimizer, precision, what is drawn, what is exported, who is told."""

import json
import math
import sys
import types
from pathlib import Path

import lora_runs
import pytest
import torch
from safetensors.torch import load_file

from videosparse.generation.errors import GenerationError
from videosparse.training.checkpoint import load_optimizer, optimizer_tensors
from videosparse.training.config import TrainConfig
from videosparse.training.optimizing import Average, make_optimizer, rate


def test_the_rate_rises_and_falls_along_a_cosine():
    config = TrainConfig(steps=110, lr=2.0, warmup=10, final_lr=0.1)
    rates = [rate(config, step) for step in range(110)]
    assert rates[:11] == pytest.approx([2.0 * (n + 1) / 11 for n in range(11)])
    assert rates[60] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5), rel=1e-6)
    assert rates[35] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))))
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rate(config, 110) == pytest.approx(0.2)


def test_gradients_are_clipped(lora_run):
    run = lora_run(train={"clip": 1e-3})
    kept = run.optimizer.step
    norms = []

    def step():
        norms.append(float(torch.stack([p.grad.norm() for p in run.parameters.values()]).norm()))
        kept()

    run.optimizer.step = step
    assert run.train_step().gradient > 1e-3, "as it was before"
    assert norms == [pytest.approx(1e-3, rel=1e-3)]


def test_an_average_follows_and_is_what_is_exported(lora_run):
    weight = torch.nn.Parameter(torch.zeros(1))
    average = Average({"w": weight}, 0.5)
    with torch.no_grad():
        weight.fill_(1.0)
    average.update(0)  # keeps a tenth at first
    assert float(average.values["w"]) == pytest.approx(0.9)
    average.update(1000)
    assert float(average.values["w"]) == pytest.approx(0.95)

    run = lora_run(train={"ema": 0.9})
    for _ in range(3):
        run.train_step()
    found = load_file(run.export() / "pytorch_lora_weights.safetensors")
    for name, value in run.average.values.items():
        stored = found["transformer." + name.replace(".default.", ".")]
        assert torch.equal(stored, value)
        assert not torch.equal(stored, run.parameters[name].detach())
    with run.averaged():
        assert all(torch.equal(p, run.average.values[n]) for n, p in run.parameters.items())
    assert not any(torch.equal(p, run.average.values[n]) for n, p in run.parameters.items())


def test_half_precision_is_for_the_forward_only(lora_run, monkeypatch):
    """Frozen weights and attention in bf16; adapters, their gradients, the optimizer and the loss in fp32."""
    from accelerate.state import AcceleratorState

    from videosparse import processors

    seen, losses = set(), []
    attend, mse = processors._attend, torch.nn.functional.mse_loss
    exact = lora_run("b", attention={"first_steps": 0.0})
    expected = [exact.train_step().loss for _ in range(3)]
    monkeypatch.setattr(processors, "_attend", lambda plan, q, k, v: seen.add(q.dtype) or attend(plan, q, k, v))
    monkeypatch.setattr(
        "videosparse.training.run.F.mse_loss", lambda a, b: losses.append((a.dtype, b.dtype)) or mse(a, b)
    )
    AcceleratorState._reset_state()  # one precision a process
    try:
        run = lora_run(train={"precision": "bf16"}, attention={"first_steps": 0.0})
        found = [run.train_step().loss for _ in range(3)]
    finally:
        AcceleratorState._reset_state()
    assert losses == [(torch.float32, torch.float32)] * 3
    assert seen == {torch.bfloat16}
    assert run.transformer.blocks[0].ffn.net[0].proj.weight.dtype == torch.bfloat16
    assert {p.dtype for p in run.parameters.values()} == {torch.float32}
    assert {v.dtype for state in run.optimizer.state.values() for v in state.values()} == {torch.float32}
    assert found == pytest.approx(expected, rel=0.02)
    assert found != expected


def test_a_share_of_the_samples_sees_the_empty_caption(lora_run):
    def empty(share):
        sampler = lora_run(str(share), data_={"caption_dropout": share}, train={"steps": 200}).sampler
        texts = [sampler.batch(sampler.step(n), [0]).text["encoder_hidden_states"][0] for n in range(200)]
        return sum(torch.equal(text, sampler.data.empty["encoder_hidden_states"]) for text in texts) / 200

    assert empty(0.0) == 0
    assert empty(0.3) == pytest.approx(0.3, abs=0.1)
    assert empty(1.0) == 1


def test_noise_levels_are_those_of_the_family_or_as_asked(lora_run):
    own = lora_run("a").levels
    assert (own.draw, own.shift) == ("logit-normal", 3.0)
    asked = lora_run("b", train={"draw": "uniform", "shift": 1.0, "noise_from": 0.2}).levels
    assert [asked.level(q) for q in (0.0, 0.5, 1.0)] == pytest.approx([0.2, 0.6, 1.0], abs=1e-5)


def test_messages_name_the_keys_of_a_recipe(lora_run):
    for sections, message in (
        ({"model_": {"path": __file__}}, "^model.path must be a folder"),
        ({"model_": {"path": " "}}, "^model.path must not be empty"),
    ):
        with pytest.raises(GenerationError, match=message):
            lora_run(**sections)


def test_riflex_can_be_trained(lora_run, tmp_path):
    """The embedded model, whose intrinsic frequency is known; the other embeddings: see `test_run.py`."""
    model = Path(__file__).parents[2] / "assets" / "tiny-wan"
    data = lora_runs.random_data(tmp_path / "data", model, clips=2, frames=129)
    more = {"model": model, "data": data, "data_": {"holdout": 1}, "validate": {"quantiles": [0.5]}}
    run = lora_run("a", model_={"rope": "riflex", "trained_frames": 81}, train={"frames": [129]}, **more)
    assert run.held_out(129) != lora_run("b", train={"frames": [129]}, **more).held_out(129)
    assert math.isfinite(run.train_step().loss)
    assert (run.about()["rope"], run.about()["trained_frames"]) == ("riflex", 81)


def test_a_rotary_embedding_that_cannot_be_stretched_is_told_in_one_line(lora_run):
    with pytest.raises(GenerationError, match=r"model.rope: No intrinsic frequency is known for 8 temporal"):
        lora_run(model_={"rope": "riflex"})
    with pytest.raises(GenerationError, match=r"model.rope: trained_frames must be 4k\+1 .got 18"):
        lora_run(model_={"rope": "ntk", "trained_frames": 18})


def test_optimizers_of_eight_bits_are_those_of_bitsandbytes(monkeypatch):
    """With a stand-in for the library, which has states of 8 bits and counts its steps in ints."""

    class AdamW8bit(torch.optim.AdamW):
        pass

    optim = types.SimpleNamespace(AdamW8bit=AdamW8bit)
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.SimpleNamespace(optim=optim, __spec__=object()))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    weight = torch.nn.Parameter(torch.zeros(4))
    optimizer = make_optimizer([weight], TrainConfig(optimizer="adamw8bit", lr=3e-4))
    assert isinstance(optimizer, AdamW8bit)
    assert optimizer.param_groups[0]["lr"] == 3e-4
    states = {"step": 7, "state1": torch.arange(4, dtype=torch.uint8), "qmap1": torch.linspace(-1, 1, 256)}
    optimizer.state[weight] = dict(states)
    stored = optimizer_tensors(optimizer, {"w": weight})
    optimizer.state[weight] = {}
    load_optimizer(optimizer, {"w": weight}, stored)
    back = optimizer.state[weight]
    assert back["step"] == 7
    assert isinstance(back["step"], int)
    assert torch.equal(back["state1"], states["state1"])
    assert back["state1"].dtype == torch.uint8
    assert torch.equal(back["qmap1"], states["qmap1"])


def test_trackers_that_are_not_installed_are_named(lora_run, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run = lora_run(output={"trackers": ["wandb"]})
    assert "Note: wandb is not installed, and nothing is logged to it" in capsys.readouterr().out
    assert run.accelerator.log_with == []


def test_trackers_are_told_what_the_log_says(lora_run, monkeypatch):
    run = lora_run()
    told = []
    monkeypatch.setattr(run.accelerator, "log", lambda values, step: told.append((step, values)))
    run.train_step()
    run.log({"loss": 0.5, "frames": 17, "why": "text is for the file only"})
    assert told == [(1, {"loss": 0.5, "frames": 17})]
    line = json.loads((run.folder / "log.jsonl").read_text())
    assert line == {"step": 1, "loss": 0.5, "frames": 17, "why": "text is for the file only"}


def test_a_length_lora_and_one_for_a_style_add_up_and_fuse(lora_run, tmp_path):
    """In plain Diffusers: both loaded with weights, and both fused into the model, give the same."""
    from diffusers import WanPipeline

    first = lora_run("length", lora={"alpha": 6.0})
    style = lora_run("style", lora={"rank": 2, "alpha": 2.0}, train={"seed": 1})
    for run in (first, style):
        for _ in range(3):
            run.train_step()
        run.export()
    batch = first.sampler.batch(first.sampler.step(0), [0])
    inputs = first.family.inputs(first.transformer.config, batch.noisy, batch.levels, batch.text)
    pipe = WanPipeline.from_pretrained(first.source.location)
    with torch.no_grad():
        stock = pipe.transformer(**inputs, return_dict=False)[0]
        pipe.load_lora_weights(first.folder, adapter_name="length")
        alone = pipe.transformer(**inputs, return_dict=False)[0]
        pipe.load_lora_weights(style.folder, adapter_name="style")
        pipe.set_adapters(["length", "style"], [1.0, 0.5])
        both = pipe.transformer(**inputs, return_dict=False)[0]
        pipe.fuse_lora(components=["transformer"], adapter_names=["length", "style"])
        pipe.unload_lora_weights()
        fused = pipe.transformer(**inputs, return_dict=False)[0]
    torch.testing.assert_close(fused, both, rtol=0, atol=1e-5)
    assert len({float(x.double().sum()) for x in (stock, alone, both)}) == 3
