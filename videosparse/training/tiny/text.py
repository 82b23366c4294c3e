"""Tokenizer and text embedding: token ids [B, S], embeddings [B, S, E], S = 48."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

TEXT_LENGTH = 48
PAD, EOS, UNK = "<pad>", "</s>", "<unk>"


def train_tokenizer(captions: Sequence[str], vocab: int) -> PreTrainedTokenizerFast:
    """A BPE tokenizer with byte fallback (so that any text has ids) that ends every text with `</s>`.

    The end mark matters: the empty prompt of guidance becomes one token instead of none.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = [PAD, EOS, UNK]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token=UNK))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)],
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator((prompt_clean(text) for text in captions), trainer)
    # Byte tokens must be in the vocabulary but must not be matched as literal text.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, tokenizer.token_to_id(EOS))]
    )
    return wrap_tokenizer(tokenizer.to_str())


def wrap_tokenizer(state: str) -> PreTrainedTokenizerFast:
    """The transformers tokenizer of a serialised `tokenizers` tokenizer."""
    from tokenizers import Tokenizer

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(state),
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        model_max_length=TEXT_LENGTH,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def tokenize(tokenizer: PreTrainedTokenizerFast, captions: Sequence[str]) -> Tensor:
    """Ids int16 [N, 48], cleaned, truncated and padded as `WanPipeline.encode_prompt` does; 0 is padding."""
    if not captions:
        return torch.zeros(0, TEXT_LENGTH, dtype=torch.int16)
    ids = tokenizer(
        [prompt_clean(text) for text in captions],
        padding="max_length",
        max_length=TEXT_LENGTH,
        truncation=True,
        add_special_tokens=True,
    ).input_ids
    return torch.tensor(ids, dtype=torch.int16)


def embed_text(text_encoder: UMT5EncoderModel, ids: Tensor) -> Tensor:
    """Embeddings [B, 48, E] of ids [B, 48], as `WanPipeline.encode_prompt(max_sequence_length=48)` makes them.

    The encoder sees the padding mask, and positions past the true length are zero. The mask goes in already
    expanded: given a [B, 48] mask transformers asks the device whether it is all ones, which stalls training.
    """
    valid = ids.ne(0)
    dtype = text_encoder.get_input_embeddings().weight.dtype
    bias = torch.zeros(valid.shape, dtype=dtype, device=ids.device).masked_fill_(~valid, torch.finfo(dtype).min)
    bias = bias[:, None, None, :].expand(-1, 1, ids.shape[1], -1)
    hidden = text_encoder(ids.long(), bias).last_hidden_state
    embeddings: Tensor = hidden * valid.unsqueeze(-1)
    return embeddings
