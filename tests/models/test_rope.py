"""Rotary embeddings beyond the trained length: the formulas, what is left alone, and how it is undone."""

import math
from pipes import TINY, hunyuan_transformer, mochi_transformer, wan_transformer

import pytest
import torch

from videosparse import DenseProcessor, extend_rope, restore, sparsify
from videosparse.models import family_of

# published head sizes, so that the published frequencies exist: Wan has 44 temporal columns, HunyuanVideo 16
BUILD = {
    "wan": lambda: wan_transformer(attention_head_dim=128, num_attention_heads=1, rope_max_seq_len=128),
    "hunyuan_video": lambda: hunyuan_transformer(
        attention_head_dim=128, num_attention_heads=1, rope_axes_dim=(16, 56, 56)
    ),
}
THETA = {"wan": 10000.0, "hunyuan_video": 256.0}
COLUMNS = {"wan": 44, "hunyuan_video": 16}


def embedding(model, frames, rows=2):
    """(cos, sin) [tokens, D] of a video of so many latent frames."""
    cos, sin = model.rope(torch.zeros(1, 4, frames, 2 * rows, 2 * rows))
    return cos.reshape(-1, cos.shape[-1]), sin.reshape(-1, sin.shape[-1])


def by_hand(name, kind, frames, trained, k):
    """cos and sin [frames, columns] by the published formulas, written out frequency by frequency."""
    theta, dim = THETA[name], COLUMNS[name]
    scale = frames / trained
    columns = []
    for number in range(dim // 2):
        base = theta * scale ** (dim / (dim - 2)) if kind == "ntk" else theta
        frequency = base ** (-2 * number / dim)
        if kind == "riflex" and number == k - 1:
            frequency = 0.9 * 2 * math.pi / frames
        positions = [t / scale if kind == "pi" else t for t in range(frames)]
        columns += [torch.tensor([p * frequency for p in positions], dtype=torch.float64)] * 2
    angles = torch.stack(columns, 1)
    return angles.cos().float(), angles.sin().float()


@pytest.fixture(scope="module")
def models():
    return {name: build() for name, build in BUILD.items()}


@pytest.mark.parametrize("kind", ["riflex", "ntk", "pi"])
@pytest.mark.parametrize(("name", "k"), [("wan", 6), ("hunyuan_video", 4)])
def test_formulas(models, name, k, kind):
    model, frames, trained = models[name], 60, 21
    stock = embedding(model, frames)
    extend_rope(model, kind, trained_frames=4 * (trained - 1) + 1)
    ours = embedding(model, frames)
    restore(model)
    columns = COLUMNS[name]
    for new, old, expected in zip(ours, stock, by_hand(name, kind, frames, trained, k), strict=True):
        assert new.shape == old.shape
        assert new.dtype == old.dtype
        assert torch.equal(new[:, columns:], old[:, columns:])  # height and width
        by_frame = new[:, :columns].reshape(frames, -1, columns)
        assert torch.equal(by_frame, by_frame[:, :1].expand_as(by_frame))
        torch.testing.assert_close(by_frame[:, 0], expected, rtol=0, atol=3e-6)
        assert not torch.equal(new, old)
        if kind == "riflex":
            kept = [c for c in range(columns) if c // 2 != k - 1]
            assert torch.equal(new[:, kept], old[:, kept])
    assert all(torch.equal(a, b) for a, b in zip(embedding(model, frames), stock, strict=True))


@pytest.mark.parametrize("kind", ["riflex", "ntk", "pi"])
def test_the_trained_length_is_left_alone(models, kind):
    model = models["wan"]
    stock = embedding(model, 21)
    extend_rope(model, kind, trained_frames=81)
    assert all(torch.equal(a, b) for a, b in zip(embedding(model, 21), stock, strict=True))
    restore(model)


def test_riflex_begins_where_the_period_ends(models):
    """Wan's sixth frequency comes round after 51 latent frames, HunyuanVideo's fourth after 50."""
    for name, last in (("wan", 50), ("hunyuan_video", 50)):
        model = models[name]
        extend_rope(model, "riflex")
        stretched = embedding(model, last), embedding(model, last + 1)
        restore(model)
        stock = embedding(model, last), embedding(model, last + 1)
        assert torch.equal(stretched[0][0], stock[0][0])
        assert not torch.equal(stretched[1][0], stock[1][0])


def test_a_fixed_length_gives_clips_of_any_length_one_embedding(models):
    model = models["wan"]
    extend_rope(model, "pi", trained_frames=81, frames=321)
    long, short = embedding(model, 81), embedding(model, 41)
    restore(model)
    assert torch.equal(short[0], long[0][: len(short[0])])


def test_a_shard_is_stretched_as_its_part_of_the_whole(models):
    """As context parallelism splits the output before this hook sees it."""
    model, frames = models["wan"], 60
    extend_rope(model, "ntk", trained_frames=81)
    whole, _ = embedding(model, frames)
    restore(model)
    split = model.rope.register_forward_hook(lambda m, a, out: tuple(x.chunk(3, 1)[1] for x in out))
    extend_rope(model, "ntk", trained_frames=81)
    part, _ = embedding(model, frames)
    restore(model)
    split.remove()
    assert torch.equal(part, whole.chunk(3)[1])


@pytest.mark.parametrize("first", ["extend", "sparsify"])
def test_the_whole_model_and_the_order_of_calls(first):
    model, tiny = wan_transformer(attention_head_dim=128), TINY["wan"]
    grid, text = (9, 4, 4), (1,)
    stock = tiny.forward(model, grid, text)
    hooks = len(model.rope._forward_hooks)
    dense = DenseProcessor()

    def extended():
        extend_rope(model, "pi", trained_frames=17)

    steps = [extended, lambda: sparsify(model, dense)]
    for step in steps if first == "extend" else steps[::-1]:
        step()
    both = tiny.forward(model, grid, text)
    restore(model)
    assert len(model.rope._forward_hooks) == hooks
    assert torch.equal(tiny.forward(model, grid, text), stock)
    extended()
    extended()  # again replaces
    assert len(model.rope._forward_hooks) == hooks + 1
    alone = tiny.forward(model, grid, text)
    extend_rope(model, "none")
    torch.testing.assert_close(both, alone, atol=1e-5, rtol=0)
    assert not torch.equal(alone, stock)
    assert len(model.rope._forward_hooks) == hooks


def test_gradients_and_regional_compilation():
    model, tiny = wan_transformer(attention_head_dim=128), TINY["wan"]
    extend_rope(model, "riflex", k=4)
    eager = tiny.forward(model, (30, 2, 2), (1,))
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(tiny.forward(model, (30, 2, 2), (1,)), eager)
    torch.manual_seed(1)
    model(**tiny.inputs((30, 2, 2), 1, [1]), return_dict=False)[0].square().mean().backward()
    assert float(model.blocks[0].attn1.to_q.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("yarn", {}, r"kind must be none, riflex, ntk or pi \(got 'yarn'\)"),
        ("pi", {}, "pi needs trained_frames"),
        ("ntk", {"trained_frames": 82}, r"trained_frames must be 4k\+1 \(got 82\); use 81 or 85"),
        ("ntk", {"trained_frames": 0}, "1 or more"),
        ("pi", {"trained_frames": 81, "k": 3}, "k is the number of RIFLEx's frequency"),
        ("riflex", {"k": 99}, "k must be 1 to 22"),
    ],
)
def test_bad_arguments_change_nothing(models, kind, more, message):
    model = models["wan"]
    with pytest.raises(ValueError, match=message):
        extend_rope(model, kind, **more)
    assert not model.rope._forward_hooks


def test_models_that_cannot():
    with pytest.raises(ValueError, match="Mochi learned the frequencies"):
        extend_rope(mochi_transformer(), "riflex")
    restore(mochi_transformer())
    with pytest.raises(ValueError, match="No intrinsic frequency is known for 4 temporal columns; give k"):
        extend_rope(wan_transformer(), "riflex")
    model = hunyuan_transformer()  # one frequency, which tells four frames apart
    extend_rope(model, "pi", trained_frames=1)
    with pytest.raises(ValueError, match="more than the slowest frequency"):
        embedding(model, 5)


def test_the_embedded_model_has_a_known_frequency():
    model = wan_transformer(attention_head_dim=64)
    assert family_of(model).temporal_rotary(model).intrinsic == 3
