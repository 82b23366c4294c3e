"""The optimiser and the schedule of the embedded model's training."""

import copy

import pytest
import torch

from videosparse.training.tiny.objectives import object_mask, object_weight, psnr
from videosparse.training.tiny.optimizing import Muon, Progress, adamw, block_matrices
from videosparse.training.tiny.pools import object_share
from videosparse.training.tiny.ranks import Ranks
from videosparse.training.tiny.update import Update


def test_muon_updates_as_torchs_does():
    torch.manual_seed(0)
    mine = [torch.nn.Parameter(torch.randn(shape)) for shape in ((24, 16), (16, 16), (24, 16), (8, 32))]
    theirs = copy.deepcopy(mine)
    ours = Muon(mine, torch.tensor(0.02), weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        ours.step()
        reference.step()
    for a, b in zip(mine, theirs, strict=True):
        # both compute in bf16, in another order of operations
        assert (a - b).norm() < 0.02 * 3 * 0.2 * a.numel() ** 0.5 * 0.1


def test_muon_passes_over_a_gradient_that_is_not_finite():
    matrix = torch.nn.Parameter(torch.ones(4, 4))
    matrix.grad = torch.full((4, 4), float("nan"))
    Muon([matrix], 0.1, weight_decay=0.0).step()
    assert torch.equal(matrix, torch.ones(4, 4))


def test_every_parameter_has_one_optimiser():
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
    model.out = torch.nn.Linear(4, 2)
    matrices = block_matrices(model)
    rest = [p for group in adamw([model], 0.1, without=matrices).param_groups for p in group["params"]]
    assert [id(p) for p in matrices] == [id(model.blocks[0].weight)]
    assert sorted(map(id, [*matrices, *rest])) == sorted(map(id, model.parameters()))


@pytest.mark.parametrize(("share", "step", "factor"), [(1.0, 50, 0.5), (0.0, 99, 1.0), (0.2, 80, 1.0), (0.2, 90, 0.5)])
def test_the_rate_falls_in_its_share_of_the_phase(share, step, factor):
    progress = Progress(100, 1e6, decay=share, warmup=1)
    progress.step = step
    assert progress.lr_factor() == pytest.approx(factor, abs=1e-3)


def test_weights_favour_objects_where_noise_is_low():
    objects = torch.zeros(2, 1, 1, 2, 2)
    objects[:, :, :, 0, 0] = 1
    weight = object_weight(objects, torch.tensor([0.0, 1.0]), 8.0)
    assert weight.mean() == pytest.approx(1.0)
    assert weight[0, 0, 0, 0, 0] == pytest.approx(9 * float(weight[0, 0, 0, 1, 1]))
    assert torch.equal(weight[1], weight[1, :1, :1, :1, :1].expand(1, 1, 2, 2))


def test_object_share_finds_the_saturated_cells():
    video = torch.zeros(1, 3, 5, 8, 8)
    video[:, 0, 0, :4, :4] = 1.0
    video[:, 1] = video[:, 2] = 0.0
    video[:, 0, 3, 4:, 4:] = 1.0  # one of the four frames of the second latent
    share = object_share(video, torch.Size([1, 8, 2, 2, 2]))
    assert share.shape == (1, 1, 2, 2, 2)
    assert share[0, 0, 0].tolist() == [[0.5, 0.0], [0.0, 0.0]]
    assert share[0, 0, 1].tolist() == [[0.0, 0.0], [0.0, 0.125]]


def test_object_mask_has_rims_in_space_and_time():
    video = torch.zeros(1, 3, 9, 16, 16)
    video[:, 0, 4, 8, 8] = 1.0
    mask = object_mask(video, rim=2, before_and_after=1)
    expected = torch.zeros(9, 16, 16)
    expected[3:6, 6:11, 6:11] = 1.0
    assert torch.equal(mask[0, 0], expected)
    assert not object_mask(torch.full((1, 3, 5, 8, 8), 0.7)).any(), "what is grey is no object"


def test_psnr_of_a_part():
    video = torch.zeros(1, 3, 1, 2, 2)
    decoded = video.clone()
    decoded[..., 0, 0] = 0.2
    part = torch.zeros(1, 1, 1, 2, 2)
    part[..., 0, 0] = 1.0
    assert psnr(decoded, video, part) == pytest.approx(20.0, abs=1e-3)
    assert psnr(decoded, video) == pytest.approx(20.0 + 6.0206, abs=1e-3)
    assert psnr(decoded, video, torch.ones_like(part)) == psnr(decoded, video)


def test_gradients_lie_in_one_buffer_and_make_the_same_step():
    """A channels-last convolution, as the VAE has them, and a bias whose size is odd."""
    torch.manual_seed(0)
    conv = torch.nn.Conv3d(3, 5, 3)
    conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last_3d)
    plain = copy.deepcopy(conv)
    video = torch.randn(1, 3, 4, 5, 5)
    update = Update(list(conv.parameters()), [adamw([conv], 0.1)], Ranks())
    reference = adamw([plain], 0.1)
    for _ in range(2):
        update.backward(conv(video).square().mean())
        assert conv.weight.grad.stride() == conv.weight.stride()
        assert update.gradients.norm() > 0.1
        update()
        reference.zero_grad()
        loss = plain(video).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        reference.step()
        assert update.loss == loss
    for mine, theirs in zip(conv.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_an_update_that_is_not_finite_changes_nothing():
    layer = torch.nn.Linear(2, 2)
    before = layer.weight.clone()
    update = Update(list(layer.parameters()), [adamw([layer], 0.1)], Ranks())
    update.backward(layer(torch.full((1, 2), torch.nan)).sum())
    update()
    assert torch.equal(layer.weight, before)
