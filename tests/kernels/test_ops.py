"""The custom ops: well-formed, one graph, no recompile when a plan's tensors change."""

import dataclasses
import importlib

import pytest
import torch
from inputs import TORCH, make_layout, make_map, make_qkv

from videosparse.kernels import attend, block_sums, ops
from videosparse.logits import arguments


class Graphs:
    """A torch.compile backend that counts graphs."""

    def __init__(self):
        self.count = 0

    def __call__(self, module, inputs):
        self.count += 1
        return module


@pytest.fixture(autouse=True)
def _no_compiled_code_from_elsewhere():
    torch._dynamo.reset()


def op_arguments(layout, index, logit=None):
    lists = (None, None, None) if index is None else (index.row_ptr, index.ids, index.order)
    shape = (0, 0, 1, 1) if index is None else (*index.block, *index.shape[:2])
    far = () if logit is None else arguments(logit.reach(layout.grid))
    return (*lists, layout.seq_lens, layout.video, layout.text_start, *shape, 0.25, *(far or arguments(None)))


def key_major(index):
    if index is None:
        return None, None, None
    index.prepare_backward()
    return index.key_major.row_ptr, index.key_major.ids, index.key_major.order


@pytest.mark.parametrize("need_lse", [False, True])
@pytest.mark.parametrize("need_grad", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_forward_op_is_well_formed(need_lse, need_grad, sparse):
    layout = make_layout("ragged text").aligned((64, 64))
    index = make_map(layout, (64, 64)).index() if sparse else None
    q, k, v = (x.nan_to_num().requires_grad_() for x in make_qkv(layout, torch.float32, dim=8))
    arguments = (*op_arguments(layout, index), need_lse, "torch", None, need_grad, *key_major(index))
    torch.library.opcheck(ops.attend_forward, (q, k, v, *arguments))


def test_backward_op_is_well_formed():
    layout = make_layout("ragged text").aligned((64, 64))
    q, k, v = (x.nan_to_num() for x in make_qkv(layout, torch.float32, dim=8))
    index = make_map(layout, (64, 64)).index()
    lse = torch.zeros(2, 3, layout.length)
    for grad_lse in (None, lse.clone()):
        arguments = (q, k, v, torch.ones_like(q), lse, *op_arguments(layout, index), "torch", *key_major(index))
        torch.library.opcheck(ops.attend_backward, (torch.ones_like(q), grad_lse, *arguments))


def test_block_sums_op_is_well_formed():
    layout = make_layout("ragged text").aligned((64, 64))
    q, k, _ = (x.nan_to_num() for x in make_qkv(layout, torch.float32, dim=8))
    lse = torch.zeros(2, 3, layout.length)
    torch.library.opcheck(
        ops.block_sums,
        (q, k, lse, layout.seq_lens, layout.video, layout.text_start, 64, 64, 0.25, "torch", 0, None, *arguments(None)),
    )


def test_attend_compiles_to_one_graph_that_serves_every_map():
    layout = make_layout("ragged text").aligned((64, 64))
    graphs = Graphs()

    def block(q, k, v, index):
        out, lse = attend(q * 2, k, v, layout=layout, index=index, return_lse=True, options=TORCH)
        return out + 1, lse

    compiled = torch.compile(block, backend=graphs, fullgraph=True)
    for density in (0.2, 0.5, 0.9):
        index = make_map(layout, (64, 64), density=density).index(capacity=100)
        q, k, v = make_qkv(layout, torch.float32, dim=16)
        for found, expected in zip(compiled(q, k, v, index), block(q, k, v, index), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert graphs.count == 1


def test_compiled_lengths_become_dynamic():
    graphs = Graphs()
    compiled = torch.compile(
        lambda q, k, v, layout: attend(q, k, v, layout=layout, options=TORCH),
        backend=graphs,
        fullgraph=True,
        dynamic=True,
    )
    base = make_layout("text")
    for frames in (1, 2, 4, 5):
        grid = dataclasses.replace(base.grid, frames=frames)
        layout = dataclasses.replace(base, grid=grid, text_start=grid.tokens)
        q, k, v = make_qkv(layout, torch.float32, dim=16)
        torch.testing.assert_close(compiled(q, k, v, layout), attend(q, k, v, layout=layout, options=TORCH))
    assert graphs.count <= 2


def test_search_compiles_to_one_graph():
    layout = make_layout("ragged text").aligned((64, 64))

    def search(q, k, v):
        out, lse = attend(q, k, v, layout=layout, return_lse=True, options=TORCH)
        return out, block_sums(q, k, lse, layout=layout, block=(64, 64))

    q, k, v = make_qkv(layout, torch.float32, dim=16)
    compiled = torch.compile(search, backend="aot_eager", fullgraph=True)
    for found, expected in zip(compiled(q, k, v), search(q, k, v), strict=True):
        torch.testing.assert_close(found, expected)


def test_training_compiles():
    layout = make_layout("ragged text").aligned((64, 64))
    index = make_map(layout, (64, 64), "per head").index()
    loss = lambda q, k, v: attend(q.sin(), k, v, layout=layout, index=index, options=TORCH).square().sum()  # noqa: E731
    q, k, v = make_qkv(layout, torch.float32, dim=16)
    grads = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        inputs = [x.nan_to_num().requires_grad_() for x in (q, k, v)]
        grads.append(torch.autograd.grad(function(*inputs), inputs))
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "module",
    ["triton_forward", "triton_backward", "hopper_backward", "triton_sums", "triton_norm"],
)
def test_what_is_not_to_be_specialised_exists(module):
    """Triton ignores names that a kernel does not have: a renamed size would silently be compiled for each value."""
    pytest.importorskip("triton")
    found = importlib.import_module(f"videosparse.kernels.{module}")
    kernels = [k for k in vars(found).values() if getattr(k, "do_not_specialize", None)]
    assert kernels
    for kernel in kernels:
        assert set(kernel.do_not_specialize) <= set(kernel.arg_names), kernel.fn.__name__
