"""A folder of weights: the architectures that the dimensions use, tiny, with random weights."""

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("cv2")

from videosparse.metrics.vbench.models import Models
from videosparse.metrics.vbench.weights import NEEDED, Weights

WORDS = ("<|startoftext|>", "<|endoftext|>", "oil", "painting", "black", "white")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def weights_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    save_dino(folder / NEEDED["dino"].name)
    save_clip(folder / NEEDED["clip-b32"].source, width=24)  # as `hf download` into a folder by owner would leave it
    save_clip(folder / NEEDED["clip-l14"].name, width=768)
    torch.save(torch.nn.Linear(768, 1).state_dict(), folder / NEEDED["laion-head"].name)
    return folder


@pytest.fixture
def models(weights_folder):
    return Models(Weights(weights_folder, download=False), batch=4)


def save_dino(folder):
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=64, patch_size=16
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)


def save_clip(folder, width):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = {**small, "vocab_size": len(WORDS), "max_position_embeddings": 77, "eos_token_id": 1, "bos_token_id": 0}
    vision = {**small, "image_size": 224, "patch_size": 112}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=WORDS[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": WORDS[1], "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
