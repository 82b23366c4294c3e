"""LPIPS, the learned distance of frames, by the package of its authors (Zhang et al. 2018), where its weights exist."""

from __future__ import annotations

from typing import Any

import torch

from videosparse.checking import check_device
from videosparse.metrics.fidelity import CONVENTION, Perceptual, convention_named
from videosparse.metrics.vbench.weights import MissingError, Weights, fit_state, read_state

_BACKBONES = {"alex": "alexnet", "vgg": "vgg16"}


def load_perceptual(
    weights: Weights, convention: str = CONVENTION, *, device: str = "cpu", batch: int = 8
) -> Perceptual:
    """A function that gives LPIPS of each frame, fp32 [frames] on the CPU, of two videos [frames, 3, height, width].

    The package brings its linear heads; the backbone is torchvision's, whose file is looked for as all weights are.

    Args:
        weights: where the backbone is looked for.
        convention: one of `videosparse.metrics.fidelity.CONVENTIONS`, which says which network is fed what.
        device: that it runs on.
        batch: frames at once.

    Raises:
        MissingError: the backbone's file, lpips or torchvision is missing.
        ValueError: an unknown convention or device.
        TypeError: device is no name.
    """
    chosen, place = convention_named(convention), check_device(device)
    path = weights.file(_BACKBONES[chosen.network])
    from lpips import LPIPS

    # pnet_rand: the backbone without weights, which would otherwise be downloaded
    model = LPIPS(net=chosen.network, pretrained=True, pnet_rand=True, verbose=False)
    _fill_backbone(model.net, read_state(path), path)
    model.to(place).eval().requires_grad_(False)

    @torch.inference_mode()
    def distance(video: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        found = []
        for at in range(0, len(video), batch):
            both = (x[at : at + batch].to(place).float() for x in (video, reference))
            fed = [x * 2 - 1 if chosen.signed else x for x in both]
            found.append(model(*fed).flatten().cpu())
        return torch.cat(found)

    return distance


def _fill_backbone(net: Any, state: dict[str, Any], path: Any) -> None:
    """Load torchvision's `features.N.*` into slices, whose modules keep the number N as their name."""
    features = {name.removeprefix("features."): x for name, x in state.items() if name.startswith("features.")}
    if not features:
        raise MissingError(f"{path} holds no torchvision backbone; fetch it again.")
    for index in range(1, net.N_slices + 1):
        part = getattr(net, f"slice{index}")
        wanted = {name: features[name] for name in part.state_dict() if name in features}
        fit_state(part, wanted, path)
