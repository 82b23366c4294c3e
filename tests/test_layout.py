import pytest
import torch

from videosparse.cases import CASES, MODELS
from videosparse.layout import TokenLayout, VideoGrid


def test_grid_counts():
    grid = VideoGrid(21, 45, 80)
    assert (grid.frame_tokens, grid.tokens, str(grid)) == (3600, 75600, "21x45x80")


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, -2, 1)])
def test_grid_refuses_sizes_below_one(sizes):
    with pytest.raises(ValueError, match="at least 1"):
        VideoGrid(*sizes)


def test_grid_refuses_floats():
    with pytest.raises(TypeError, match="must be an int"):
        VideoGrid(2.0, 1, 1)


def test_without_text_there_is_no_gap():
    layout = TokenLayout(VideoGrid(3, 5, 7))
    assert layout.length == layout.text_start == layout.aligned((64, 64)).length == 105


def test_alignment_moves_text_and_its_ends():
    lens = torch.tensor([105, 109, 115], dtype=torch.int32)
    layout = TokenLayout(VideoGrid(3, 5, 7), 10, seq_lens=lens)
    aligned = layout.aligned((128, 64))
    assert (aligned.text_start, aligned.length) == (128, 138)
    assert aligned.seq_lens.tolist() == [128, 132, 138]
    assert aligned.aligned((128, 64)) == aligned
    assert aligned.key_mask(3, "cpu").sum(1).tolist() == [105, 109, 115]
    assert not aligned.key_mask(3, "cpu")[:, 105:128].any()


def test_layouts_compare_by_geometry():
    grid = VideoGrid(3, 5, 7)
    assert TokenLayout(grid, 4) == TokenLayout(grid, 4, seq_lens=torch.tensor([108], dtype=torch.int32))
    assert hash(TokenLayout(grid, 4)) == hash(TokenLayout(grid, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": -1}, "at least 0"),
        ({"text": 4, "text_start": 50}, "inside the video"),
        ({"text": 4, "seq_lens": torch.tensor([3])}, "int32"),
        ({"text": 4, "seq_lens": torch.zeros(1, 1, dtype=torch.int32)}, "shape"),
    ],
)
def test_layout_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenLayout(VideoGrid(3, 5, 7), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": 2.5}, r"TokenLayout.text must be an int \(got float 2.5\)"),
        ({"text": 4, "text_start": 105.0}, r"TokenLayout.text_start must be an int \(got float 105.0\)"),
        ({"text": 4, "seq_lens": [106]}, r"seq_lens must be None or an int32 tensor .*got list\); pass torch.tensor\("),
        ({"grid": (3, 5, 7)}, r"grid must be a VideoGrid \(got \(3, 5, 7\)\); pass VideoGrid\("),
    ],
)
def test_layout_refuses_other_types(arguments, message):
    with pytest.raises(TypeError, match=message):
        TokenLayout(**{"grid": VideoGrid(3, 5, 7)} | arguments)


def test_layout_of_another_batch_is_refused():
    layout = TokenLayout(VideoGrid(3, 5, 7), 4, seq_lens=torch.tensor([108], dtype=torch.int32))
    with pytest.raises(ValueError, match="batch of 1"):
        layout.key_mask(2, "cpu")


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("wan2.1-1.3b 480x832x81", 32_760),
        ("wan2.1-14b 720x1280x81", 75_600),
        ("wan2.1-14b 720x1280x321", 291_600),
        ("wan2.2-5b 704x1280x121", 27_280),
        ("hunyuan-video 720x1280x509", 460_800),
        ("mochi 480x848x163", 44_520),
        ("tiny-wan 128x128x321", 20_736),
    ],
)
def test_cases_have_the_published_token_counts(name, tokens):
    assert CASES[name].grid.tokens == tokens


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((80, 480, 832), r"4k\+1 for wan2.1-14b \(got 80\); use 77 or 81"),
        ((0, 480, 832), "use 1"),
        ((81, 481, 832), r"height must be a multiple of 16 .* \(got 481\); use 480 or 496"),
        ((81, 480, 8), "width .* use 16"),
    ],
)
def test_sizes_a_model_cannot_take_name_the_nearest(size, message):
    with pytest.raises(ValueError, match=message):
        MODELS["wan2.1-14b"].grid(*size)


def test_aligned_is_made_once():
    layout = TokenLayout(VideoGrid(3, 9, 10), 40, seq_lens=torch.tensor([280, 300], dtype=torch.int32))
    assert layout.aligned((128, 64)) is layout.aligned((128, 128))
    assert layout.aligned((64, 64)) is not layout.aligned((128, 128))
    assert layout == TokenLayout(VideoGrid(3, 9, 10), 40)


@pytest.mark.parametrize("lens", [torch.tensor([270, 0, 300, 0])[::2], torch.tensor([290]).expand(2)])
def test_seq_lens_are_kept_one_after_another(lens):
    """Kernels read the second sample's right behind the first one's."""
    layout = TokenLayout(VideoGrid(3, 9, 10), 40, seq_lens=lens.int() if lens.stride(0) != 0 else lens.int().expand(2))
    assert layout.seq_lens.is_contiguous()
    assert layout.seq_lens.tolist() == lens.tolist()
