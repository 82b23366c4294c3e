"""Networks, text and losses of the embedded model against Diffusers."""

from __future__ import annotations

import pytest
import torch

from videosparse.training.tiny.models import TinySizes, build_text_encoder, build_transformer, build_vae
from videosparse.training.tiny.objectives import sample_sigmas, ssim
from videosparse.training.tiny.parallel_vae import ParallelVae
from videosparse.training.tiny.text import TEXT_LENGTH, embed_text, tokenize, wrap_tokenizer


@pytest.mark.parametrize("frames", [1, 5, 17])
def test_parallel_vae_is_the_chunked_vae(pipeline, frames):
    vae, parallel = pipeline.vae, ParallelVae(pipeline.vae)
    video = torch.rand(2, 3, frames, 16, 24) * 2 - 1
    with torch.no_grad():
        expected = vae.encode(video).latent_dist
        mean, logvar = parallel.encode(video)
        torch.testing.assert_close(mean, expected.mean, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(logvar, expected.logvar, atol=1e-5, rtol=1e-4)
        decoded = parallel.decode(mean).clamp(-1, 1)
        torch.testing.assert_close(decoded, vae.decode(mean).sample, atol=1e-5, rtol=1e-4)


def test_a_prefix_of_latents_is_the_latent_of_the_prefix(pipeline):
    parallel = ParallelVae(pipeline.vae)
    video = torch.rand(1, 3, 17, 16, 16) * 2 - 1
    with torch.no_grad():
        whole = parallel.encode(video)[0]
        for frames in (1, 9):
            short = parallel.encode(video[:, :, :frames])[0]
            torch.testing.assert_close(whole[:, :, : short.shape[2]], short, atol=1e-5, rtol=1e-4)


def test_text_embedding_is_the_pipelines(pipeline, tokenizer):
    prompts = [
        "a red circle bounces on a plain dark background",
        "  A   Red\tcircle &amp; something é unseen \U0001f600 ",
        "",
        " ".join(["a red circle bounces"] * 40),
    ]
    expected, negative = pipeline.encode_prompt(prompts, max_sequence_length=TEXT_LENGTH)
    ids = tokenize(tokenizer, prompts)
    assert ids.shape == (4, 48)
    assert ids[2].ne(0).sum() == 1
    assert ids[3].ne(0).all()
    embeds = embed_text(pipeline.text_encoder, ids)
    # In one batch the mask of a full row takes part in the same arithmetic, so the match is exact.
    assert torch.equal(embeds, expected)
    alone = embed_text(pipeline.text_encoder, tokenize(tokenizer, [""])).expand_as(negative)
    torch.testing.assert_close(alone, negative, atol=1e-6, rtol=1e-5)


def test_tokenizer_reads_back_and_has_bytes_for_any_text(tokenizer):
    text = "a red circle bounces"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    odd = "zürich \u4e16"
    assert tokenizer.unk_token_id not in tokenizer(odd).input_ids
    assert len(tokenizer("<0x41> </s>").input_ids) > 2
    copy = wrap_tokenizer(tokenizer.backend_tokenizer.to_str())
    assert copy(text).input_ids == tokenizer(text).input_ids
    assert copy.model_max_length == 48


def test_sigmas_are_shifted_and_inside():
    torch.manual_seed(0)
    sigma = sample_sigmas(4096, torch.device("cpu"), uniform_share=0.0)
    assert sigma.min() > 0
    assert sigma.max() < 1
    # The median of the logit-normal is 1/2, which a shift of 3 moves to 3/4.
    assert sigma.median().item() == pytest.approx(0.75, abs=0.01)


def test_ssim_of_a_video_with_itself_is_one():
    video = torch.rand(2, 3, 2, 16, 16)
    assert ssim(video, video).item() == pytest.approx(1.0, abs=1e-5)
    assert ssim(video, 1 - video) < 0.2


def test_published_size_fits():
    sizes = TinySizes()
    with torch.device("meta"):
        modules = [build_vae(sizes), build_transformer(sizes)]
    text = build_text_encoder(sizes, sizes.vocab)
    total = 2 * sum(p.numel() for module in (*modules, text) for p in module.parameters())
    assert total < 19.8e6
