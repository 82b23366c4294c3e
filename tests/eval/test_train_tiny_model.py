"""The training program of the embedded model: its parts against Diffusers, and all of it in seconds."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
tiny = pytest.importorskip("videosparse.training.tiny")

ROOT = Path(__file__).parents[2]
CAPTIONS = [
    "a red circle bounces on a plain dark background",
    "A large blue star orbits quickly over a checker background.",
    "a green triangle and a yellow square drift",
] * 40


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("train_tiny_model", ROOT / "eval" / "train_tiny_model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.train_tokenizer(CAPTIONS, 400)


@pytest.fixture(scope="module")
def pipeline(tokenizer):
    from diffusers import UniPCMultistepScheduler, WanPipeline

    sizes = tiny.SMOKE_SIZES
    torch.manual_seed(0)
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=tiny.build_text_encoder(sizes, len(tokenizer)).eval(),
        vae=tiny.build_vae(sizes).eval(),
        transformer=tiny.build_transformer(sizes).eval(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=tiny.FLOW_SHIFT
        ),
    )


@pytest.mark.parametrize("frames", [1, 5, 17])
def test_parallel_vae_is_the_chunked_vae(pipeline, frames):
    vae, parallel = pipeline.vae, tiny.ParallelVae(pipeline.vae)
    video = torch.rand(2, 3, frames, 16, 24) * 2 - 1
    with torch.no_grad():
        expected = vae.encode(video).latent_dist
        mean, logvar = parallel.encode(video)
        torch.testing.assert_close(mean, expected.mean, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(logvar, expected.logvar, atol=1e-5, rtol=1e-4)
        decoded = parallel.decode(mean).clamp(-1, 1)
        torch.testing.assert_close(decoded, vae.decode(mean).sample, atol=1e-5, rtol=1e-4)


def test_a_prefix_of_latents_is_the_latent_of_the_prefix(pipeline):
    parallel = tiny.ParallelVae(pipeline.vae)
    video = torch.rand(1, 3, 17, 16, 16) * 2 - 1
    with torch.no_grad():
        whole = parallel.encode(video)[0]
        for frames in (1, 9):
            short = parallel.encode(video[:, :, :frames])[0]
            torch.testing.assert_close(whole[:, :, : short.shape[2]], short, atol=1e-5, rtol=1e-4)


def test_text_embedding_is_the_pipelines(pipeline, tokenizer):
    prompts = [
        CAPTIONS[0],
        "  A   Red\tcircle &amp; something é unseen \U0001f600 ",
        "",
        " ".join(["a red circle bounces"] * 40),
    ]
    expected, negative = pipeline.encode_prompt(prompts, max_sequence_length=tiny.TEXT_LENGTH)
    ids = tiny.tokenize(tokenizer, prompts)
    assert ids.shape == (4, 48)
    assert ids[2].ne(0).sum() == 1
    assert ids[3].ne(0).all()
    embeds = tiny.embed_text(pipeline.text_encoder, ids)
    # In one batch the mask of a full row takes part in the same arithmetic, so the match is exact.
    assert torch.equal(embeds, expected)
    alone = tiny.embed_text(pipeline.text_encoder, tiny.tokenize(tokenizer, [""])).expand_as(negative)
    torch.testing.assert_close(alone, negative, atol=1e-6, rtol=1e-5)


def test_tokenizer_reads_back_and_has_bytes_for_any_text(tokenizer):
    text = "a red circle bounces"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    odd = "zürich \u4e16"
    assert tokenizer.unk_token_id not in tokenizer(odd).input_ids
    assert len(tokenizer("<0x41> </s>").input_ids) > 2
    copy = tiny.wrap_tokenizer(tokenizer.backend_tokenizer.to_str())
    assert copy(text).input_ids == tokenizer(text).input_ids
    assert copy.model_max_length == 48


def test_sigmas_are_shifted_and_inside(program):
    torch.manual_seed(0)
    sigma = tiny.sample_sigmas(4096, torch.device("cpu"), uniform_share=0.0)
    assert sigma.min() > 0
    assert sigma.max() < 1
    # The median of the logit-normal is 1/2, which a shift of 3 moves to 3/4.
    assert sigma.median().item() == pytest.approx(0.75, abs=0.01)


def test_progress_ends_by_steps_or_minutes():
    progress = tiny.Progress(steps=4, minutes=10.0, warmup=1)
    rates = []
    while progress.fraction < 1:
        rates.append(progress.lr_factor())
        progress.advance()
    assert len(rates) == 4
    assert rates == sorted(rates, reverse=True)
    assert progress.ended_by == "steps"
    late = tiny.Progress(steps=1000, minutes=1.0, step=3, before=61.0)
    assert late.fraction == 1.0
    assert late.ended_by == "minutes"
    assert late.lr_factor() == pytest.approx(0, abs=1e-9)


def test_a_gradient_that_is_not_finite_changes_nothing():
    layer = torch.nn.Linear(3, 3)
    before = layer.weight.clone()
    optimizer = tiny.adamw([layer], 0.1)
    for parameter in layer.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(layer.weight, before)


def test_ssim_of_a_video_with_itself_is_one():
    video = torch.rand(2, 3, 2, 16, 16)
    assert tiny.ssim(video, video).item() == pytest.approx(1.0, abs=1e-5)
    assert tiny.ssim(video, 1 - video) < 0.2


def test_backup_files_are_small_and_read_back(tmp_path):
    tensors = {f"t{i}": torch.randn(64, 64) for i in range(5)}
    tiny.write_backup(tmp_path, tensors, {"phase": "vae"}, limit=40_000)
    assert all(path.stat().st_size < 42_000 for path in tmp_path.glob("*.safetensors"))
    again, meta = tiny.read_backup(tmp_path)
    assert meta == {"phase": "vae"}
    assert all(torch.equal(again[k], v) for k, v in tensors.items())


def test_published_size_fits():
    sizes = tiny.TinySizes()
    with torch.device("meta"):
        modules = [tiny.build_vae(sizes), tiny.build_transformer(sizes)]
    text = tiny.build_text_encoder(sizes, sizes.vocab)
    total = 2 * sum(p.numel() for module in (*modules, text) for p in module.parameters())
    assert total < 19.8e6


def test_card_numbers_are_filled_again_and_again(program):
    text = "PSNR <!-- n:vae_psnr.128 -->old<!-- /n --> dB, <!-- n:none -->x<!-- /n -->"
    once = program.fill_card(text, {"vae_psnr": {"128": 35.1}})
    assert "35.1" in once
    assert "not measured" in once
    assert program.fill_card(once, {"vae_psnr": {"128": 36.2}}).count("36.2") == 1


def test_all_stops_resumes_exports_and_generates(program, tmp_path, monkeypatch):
    """The whole program at small sizes, stopped once in the DiT phase and exported from the backup alone."""
    work, backup, out = tmp_path / "work", tmp_path / "backup", tmp_path / "out"
    common = ["--smoke", "--device", "cpu", "--workers", "1", "--work", str(work), "--backup", str(backup)]
    calls = iter(range(10**6))
    step = program.Dit.step

    def stop_soon(self, shape, learn=True):
        if learn and next(calls) == 9:
            program.STOP.set()
        return step(self, shape, learn)

    monkeypatch.setattr(program.Dit, "step", stop_soon)
    program.STOP.clear()
    program.main(["all", *common])
    assert program.STOP.is_set()
    first = tiny.read_backup(backup)[1]
    assert first["vae"]["finished"]
    assert not first["dit"]["finished"]
    program.STOP.clear()
    program.main(["all", "--resume", *common])
    tensors, meta = tiny.read_backup(backup)
    assert meta["dit"]["finished"]
    assert meta["dit"]["step"] == 12
    assert any(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    assert {path.name for path in backup.iterdir()} == {"weights-0.safetensors", "state.json", "samples.png"}

    program.main(["export", *common, "--work", str(tmp_path / "none"), "--out", str(out), "--check"])
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(out, local_files_only=True)
    assert pipe.tokenizer.model_max_length == 48
    assert pipe.vae.config.latents_mean == meta["latents_mean"]
    weight = pipe.transformer.blocks[0].attn1.to_q.weight.float()
    assert torch.equal(weight, tensors["ema.transformer.blocks.0.attn1.to_q.weight"].float())
    prompt = "a red circle bounces"
    ids = tiny.tokenize(pipe.tokenizer, [prompt])
    ours = tiny.embed_text(pipe.text_encoder, ids).float()
    theirs = pipe.encode_prompt(prompt, max_sequence_length=48)[0].float()
    torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)
