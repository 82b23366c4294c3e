"""What an attention call of a method that searches does beside attending: it writes the map that later calls read."""

from __future__ import annotations

from dataclasses import replace

import torch

from videosparse.blocks import PackedIndex
from videosparse.kernels import KernelOptions, attend, block_sums
from videosparse.kernels.options import own_backend
from videosparse.kernels.order_search import OrderSelection, search_orders
from videosparse.kernels.selection import select
from videosparse.policies.base import LayerPlan, Mode


def search(plan: LayerPlan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Dense attention [B, L, H, D] that writes the map found, and its lse where it is kept, into the plan's buffers."""
    out, lse = attend(q, k, v, layout=plan.layout, return_lse=True, options=_own(plan.options))
    if plan.lse is not None:
        plan.lse.copy_(lse.detach())
    _select(plan, q, k, lse)
    return out


def refresh(plan: LayerPlan, q: torch.Tensor, k: torch.Tensor) -> None:
    """Write a new map into the plan's buffers, from the lse that was kept."""
    assert plan.lse is not None
    _select(plan, q, k, plan.lse.float())


def brought(plan: LayerPlan, device: torch.device) -> LayerPlan:
    """A plan whose buffers lie in the memory of the CPU, with copies of them on `device`; the host does not wait."""
    assert isinstance(plan.index, PackedIndex)
    lse = None if plan.lse is None else plan.lse.to(device, non_blocking=True, copy=True)
    return replace(plan, index=plan.index.to(device), lse=lse, offloaded=False)


def take_back(plan: LayerPlan, here: LayerPlan) -> None:
    """Copy what a call has written into the copies that `brought` made to the plan's own buffers."""
    assert isinstance(plan.index, PackedIndex)
    assert isinstance(here.index, PackedIndex)
    if plan.mode is not Mode.SPARSE:
        plan.index.copy_(here.index)
    if plan.mode is Mode.SEARCH and plan.lse is not None and here.lse is not None:
        plan.lse.copy_(here.lse, non_blocking=True)


def _select(plan: LayerPlan, q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor) -> None:
    """Measure the blocks and keep the largest."""
    index, chosen = plan.index, plan.selection
    assert isinstance(index, PackedIndex)
    assert chosen is not None
    if isinstance(chosen, OrderSelection):
        assert plan.codes is not None
        search_orders(q.detach(), k.detach(), lse.detach(), index, plan.codes, chosen, _own(plan.options))
        return
    sums = block_sums(
        q.detach(), k.detach(), lse.detach(), layout=plan.layout, block=index.block, sample=chosen.sample,
        options=_own(plan.options),
    )  # fmt: skip
    select(sums, index, chosen, plan.options.backend)


def _own(options: KernelOptions) -> KernelOptions:
    """Options of what libraries of attention cannot do for every layout: ours where one of them is asked for.

    Never with integers: maps, which stay for many steps, are measured from an exact lse.
    """
    return KernelOptions(backend=own_backend(options.backend), logit=options.logit)
