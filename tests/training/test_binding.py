"""Which object moves how, read from the text encoder's output."""

import random

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("tokenizers")

from videosparse.synthetic.captions import caption, named_motions
from videosparse.synthetic.scene import MOTIONS, sample_scene
from videosparse.training.tiny.binding import binding_loss, build_reader, motion_marks, motions_right
from videosparse.training.tiny.text import train_tokenizer

TEXT = "A small red box does not move while a turquoise five-pointed star zigzags quickly over a checkerboard."


@pytest.fixture(scope="module")
def tokenizer():
    rng = random.Random(0)
    return train_tokenizer([caption(sample_scene(rng, split="train"), rng) for _ in range(200)], 700)


def test_motions_stand_where_the_colours_end():
    assert [(TEXT[:end].split()[-1], motion) for end, motion in named_motions(TEXT)] == [
        ("red", "static"),
        ("turquoise", "zigzag"),
    ]
    shared = named_motions("a blue circle and a pink star bounce")
    assert [motion for _, motion in shared] == ["gravity", "gravity"]
    assert named_motions("a red circle on a plain background") == []


def test_marks_are_tokens_of_colours_and_numbers_of_motions(tokenizer):
    marks = motion_marks(tokenizer, [TEXT, "a red circle orbits", "", "a red circle"])
    assert marks.shape == (4, 2, 2)
    assert marks.dtype == torch.int16
    for (place, motion), (word, name) in zip(
        marks[0].tolist(), [("red", "static"), ("turquoise", "zigzag")], strict=True
    ):
        until = tokenizer.decode(tokenizer(TEXT).input_ids[: place + 1])
        assert until.endswith(word)
        assert MOTIONS[motion] == name
    assert (marks[1, 0] >= 0).all()
    assert MOTIONS[marks[1, 0, 1]] == "orbit"
    assert (marks[1, 1] == -1).all()
    assert (marks[2:] == -1).all()


def test_every_caption_of_training_has_its_marks(tokenizer):
    rng = random.Random(1)
    for objects in (1, 2):
        scenes = [sample_scene(rng, split="train", objects=objects) for _ in range(50)]
        marks = motion_marks(tokenizer, [caption(scene, rng) for scene in scenes])
        assert (marks[:, :objects] >= 0).all()
        told = [sorted(mark[:objects, 1].tolist()) for mark in marks]
        assert told == [sorted(MOTIONS.index(o.motion) for o in scene.objects) for scene in scenes]


def test_the_loss_falls_as_motions_are_read_and_ignores_what_is_not_there():
    torch.manual_seed(0)
    reader, text = build_reader(16), torch.randn(3, 48, 16, requires_grad=True)
    marks = torch.tensor([[[2, 0], [7, 4]], [[3, 1], [-1, -1]], [[-1, -1], [-1, -1]]], dtype=torch.int16)
    loss = binding_loss(reader, text, marks)
    assert 0.5 < loss.item() < 5
    (gradient,) = torch.autograd.grad(loss, text)
    touched = gradient.abs().sum(2).nonzero().tolist()
    assert touched == [[0, 2], [0, 7], [1, 3]]
    with torch.no_grad():
        reader.weight.zero_()
        reader.bias.zero_()
        for place, motion in ((2, 0), (7, 4), (3, 1)):
            row = 1 if place == 3 else 0
            text[row, place] = 0
            text[row, place, motion] = 20
            reader.weight[motion, motion] = 1
    assert binding_loss(reader, text, marks).item() < 1e-6
    assert motions_right(reader, text, marks) == 1
    marks[0, 0, 1] = 3
    assert motions_right(reader, text, marks).item() == pytest.approx(2 / 3)
    assert binding_loss(reader, text, torch.full_like(marks, -1)) == 0
