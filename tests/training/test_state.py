"""Schedules, rounds, backups and exported pipelines as a start, and the model card."""

from __future__ import annotations

import errno
import json
from dataclasses import replace

import pytest
import torch

from videosparse.files import write_tensors
from videosparse.training.tiny import checkpoint
from videosparse.training.tiny.card import accuracy, fill_card, update_card
from videosparse.training.tiny.checkpoint import read_backup, read_pipeline, write_backup
from videosparse.training.tiny.optimizing import Progress, adamw
from videosparse.training.tiny.plan import STAGES, Plan, large, mixed, with_long_share
from videosparse.training.tiny.rounds import all_rounds, begin_round, describe_stages, summary


def test_progress_ends_by_steps_or_minutes():
    progress = Progress(steps=4, minutes=10.0, warmup=1)
    rates = []
    while progress.fraction < 1:
        rates.append(progress.lr_factor())
        progress.advance()
    assert len(rates) == 4
    assert rates == sorted(rates, reverse=True)
    assert progress.ended_by == "steps"
    late = Progress(steps=1000, minutes=1.0, step=3, before=61.0)
    assert late.fraction == 1.0
    assert late.ended_by == "minutes"
    assert late.lr_factor() == pytest.approx(0, abs=1e-9)


def test_a_gradient_that_is_not_finite_changes_nothing():
    layer = torch.nn.Linear(3, 3)
    before = layer.weight.clone()
    optimizer = adamw([layer], 0.1)
    for parameter in layer.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(layer.weight, before)


def test_backup_files_are_small_and_read_back(tmp_path):
    tensors = {f"t{i}": torch.randn(64, 64) for i in range(5)}
    write_backup(tmp_path, tensors, {"phase": "vae"}, limit=40_000)
    assert all(path.stat().st_size < 42_000 for path in tmp_path.glob("*.safetensors"))
    again, meta = read_backup(tmp_path)
    assert meta == {"phase": "vae"}
    assert all(torch.equal(again[k], v) for k, v in tensors.items())


def test_a_backup_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    write_backup(tmp_path, {"a": torch.ones(2), "b": torch.ones(2)}, {"step": 1}, limit=8)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    written = []

    def full(tensors, path):
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(write_tensors(tensors, path))

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(OSError, match=r"No space left on device: .*weights-1.safetensors"):
        write_backup(tmp_path, {"a": torch.zeros(2), "b": torch.zeros(2)}, {"step": 2}, limit=8)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def state():
    return {
        "vae": {"step": 10, "elapsed": 60.0, "finished": True, "variant": "last-fused", "lr": 2e-4},
        "dit": {
            "step": 5,
            "elapsed": 90.0,
            "finished": False,
            "what": "5 steps at 64x64 with 33 frames",
            "how": "AdamW at 0.0006",
        },
        "latents_mean": [0.0],
        "latents_std": [1.0],
        "numbers": {"vae_psnr": {"64": 30.0}, "held_out_loss": {}},
        "spent_before": 3.0,
        "device": "CPU",
    }


def test_rounds_add_up():
    meta = state()
    begin_round(meta, keep_vae=True)
    assert meta["vae"] == {"step": 0, "elapsed": 0.0, "finished": True, "variant": "last-fused", "lr": 2e-4}
    assert meta["dit"] == {"step": 0, "elapsed": 0.0, "finished": False}
    assert meta["numbers"] == {"vae_psnr": {"64": 30.0}}
    assert meta["latents_mean"] == [0.0]
    assert len(all_rounds(meta)) == 1, "a round without a step is none"
    meta |= {"dit": state()["dit"] | {"step": 7}, "spent_before": 2.5, "device": "GPU"}
    total = summary(all_rounds(meta))
    assert (total["minutes"], total["device"]) == (5.5, "CPU and GPU")
    assert total["steps"] == {"vae": 10, "dit": 12, "decoder": 0}
    assert total["rounds"][0]["what"].startswith("VAE: 10 steps in 1.0 minutes, rate 0.0002; DiT: 5 steps at 64x64")
    assert total["rounds"][1]["what"] == "DiT: 5 steps at 64x64 with 33 frames in 1.5 minutes, AdamW at 0.0006"


def test_a_decoder_trained_beside_a_round_adds_steps_and_no_minutes():
    decoder = {"step": 1200, "elapsed": 90.0, "minutes": 2.0, "device": "GPU", "lr": 5e-4, "how": "81 frames"}
    (both,) = all_rounds(state() | {"decoder": decoder})
    words = "1,200 steps in 1.5 minutes, rate 0.0005, 81 frames"
    assert both["what"].endswith(f"; the VAE's decoder alone: beside the DiT, on another GPU, {words}")
    assert (both["steps"], both["minutes"]) == ({"vae": 10, "dit": 5, "decoder": 1200}, 3.0)
    assert summary([both, *all_rounds(state())])["steps"] == {"vae": 20, "dit": 10, "decoder": 1200}
    (alone,) = all_rounds({"decoder": decoder, "spent_before": 0.0})
    assert alone == {
        "what": f"the VAE's decoder alone: {words}",
        "steps": {"vae": 0, "dit": 0, "decoder": 1200},
        "minutes": 2.0,
        "device": "GPU",
    }


def test_a_round_of_both_forgets_the_latents():
    meta = state()
    begin_round(meta, keep_vae=False)
    assert meta["vae"] == {"step": 0, "elapsed": 0.0, "finished": False}
    assert not {"latents_mean", "latents_std", "numbers"} & set(meta)
    assert summary([])["minutes"] == 0


def test_mixed_lengths_come_from_one_pool():
    plan = mixed(Plan())
    (pool,) = plan.pools
    assert (pool.frames, pool.count, plan.vae_frames, plan.vae_batches) == (81, 16384, 49, ((128, 3),))
    assert describe_stages(plan, {"0": 7}) == "7 steps at 128x128 with 81 and 33 frames"


def test_stages_are_described_as_the_card_says_them():
    assert describe_stages(Plan(), {}) == ""
    words = describe_stages(large(Plan()), {"0": 6415, "1": 1131})
    assert words == "6,415 steps at 128x128 with 33 and 1 frames and 1,131 steps at 128x128 with 81 and 33 frames"


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_draws_from_a_pool_of_its_plan(name):
    plan = STAGES[name](Plan())
    pools = {pool.name: pool for pool in plan.pools}
    assert plan.sample_pool in pools
    assert plan.stages[-1][0] == 1.0
    used = {shape.pool for _, shapes in plan.stages for shape in shapes}
    assert used == set(pools)
    for _, shapes in plan.stages:
        assert all(4 * shape.latent_frames - 3 <= pools[shape.pool].frames for shape in shapes)


def test_the_longest_clips_have_a_share_of_the_last_stage():
    plan = with_long_share(Plan(), 0.75)
    assert [(shape.latent_frames, shape.weight) for shape in plan.stages[-1][1]] == [(21, 0.75), (9, 0.25)]
    assert plan.stages[:-1] == Plan().stages[:-1]
    assert [s.weight for s in plan.stages[-2][1]] == [s.weight for s in Plan().stages[-2][1]]
    first = replace(Plan(), stages=Plan().stages[1:2])
    weights = [shape.weight for shape in with_long_share(first, 0.5).stages[-1][1]]
    assert weights == pytest.approx([0.5, 0.26, 0.24])


def test_a_pipeline_is_read_as_a_backup(pipeline, tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"not a pipeline that `export` wrote: model_index.json is missing"):
        read_pipeline(tmp_path)
    pipeline.tokenizer("used", padding="max_length", max_length=48, truncation=True)
    pipeline.save_pretrained(tmp_path)
    told = {"rounds": all_rounds(state()), "vae_psnr": {"64": 30.0}, "accuracy": {}}
    (tmp_path / "training.json").write_text(json.dumps(told))
    tensors, meta = read_pipeline(tmp_path)
    for prefix, module in (("raw.transformer.", pipeline.transformer), ("ema.text.", pipeline.text_encoder)):
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensors[prefix + name], tensor)
    assert json.loads(meta["tokenizer"])["padding"] is None
    assert json.loads(meta["tokenizer"])["truncation"] is None
    assert meta["latents_std"] == [2.0] * 8
    assert meta["numbers"] == {"vae_psnr": {"64": 30.0}}, "accuracy is of the old weights"
    assert all_rounds(meta) == told["rounds"]
    # Tied and shared weights must have become copies, or a backup could not be written.
    write_backup(tmp_path / "backup", tensors, meta)
    again, _ = read_backup(tmp_path / "backup")
    assert again.keys() == tensors.keys()


def test_card_numbers_are_filled_again_and_again():
    text = "PSNR <!-- n:vae_psnr.128 -->old<!-- /n --> dB, <!-- n:none -->x<!-- /n -->"
    once = fill_card(text, {"vae_psnr": {"128": 35.1}})
    assert "35.1" in once
    assert "not measured" in once
    assert fill_card(once, {"vae_psnr": {"128": 36.2}}).count("36.2") == 1


def test_card_takes_the_accuracy_from_rows(tmp_path):
    questions = ("colour", "shape", "motion", "count", "background")
    how = ("method", "settings", "frames", "steps", "guidance", "count_expected", "permanence")
    rows = [",".join([*(f"{q}_right" for q in questions), *how])]
    rows += ["1,1,0,1,1,dense,,81,20,4.0,2,0.9"] * 3 + ["1,0,0,1,1,dense,,81,20,4.0,2,1.0"]
    (tmp_path / "rows.csv").write_text("\n".join(rows) + "\n")
    found = accuracy(tmp_path / "rows.csv")
    assert found["videos"] == 4
    assert found["shape"]["right"] == 3
    assert found["shape"]["low"] < 0.75 < found["shape"]["high"]
    (tmp_path / "training.json").write_text(json.dumps({"rounds": all_rounds(state())}))
    (tmp_path / "README.md").write_text(
        "<!-- n:accuracy.shape -->x<!-- /n --> <!-- rounds --><!-- /rounds -->\n<!-- measured --><!-- /measured -->"
    )
    for _ in range(2):
        update_card(tmp_path, [tmp_path / "rows.csv"])
        card = (tmp_path / "README.md").read_text()
        assert "75.0 % (" in card
        assert card.count("| rows.csv | 4 | 81 | 20 | 4.0 | 100.0 % | 75.0 % | 0.0 % | 0.0 % | 75.0 % | 92.5 % |") == 1
        assert card.count("| 3.00 | CPU |") == 1
    update_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == card
