"""`FarLogits` in plain torch, in the ops, and where it is refused."""

import math

import pytest
import torch
from far import FAR, GRID, check_attend, check_stats, check_sums, order_for, tokens_of, with_far
from inputs import TORCH, make_layout, make_map, make_qkv
from test_ops import Graphs, op_arguments

from videosparse.blocks import PackedIndex
from videosparse.kernels import KernelOptions, attend, ops, torch_path
from videosparse.kernels.order_search import OrderMetric, OrderSelection, search_orders
from videosparse.kernels.selection import Selection
from videosparse.layout import TokenLayout, VideoGrid, ceil_div
from videosparse.logits import FarLogits, arguments
from videosparse.reference import attention_reference


def test_the_rule_by_hand():
    """Two tokens a frame, three trained frames: more than 3 apart is far, frame 0 sees frames 0 to 2."""
    grid = VideoGrid(4, 1, 2)
    reach = FarLogits(trained=3, alpha=0.25).reach(grid)
    assert reach == (0.25, 3, 2, 6)
    tokens = torch.arange(9)  # one of text
    scores = torch.full((9, 9), 4.0)
    scores[8], scores[:, 8], scores[5, 0] = 5.0, 6.0, -4.0
    found = reach.change(scores, tokens, tokens, grid.tokens)
    for row in range(9):
        for key in range(9):
            expected = scores[row, key].item()
            if row < 8 and key < 8 and abs(row - key) > 3 and expected > 0:
                expected = 1.0
            if row < 2 and 6 <= key < 8:
                expected = -math.inf
            assert found[row, key].item() == expected, (row, key)


@pytest.mark.parametrize("kind", ["video", "text", "ragged text", "no text at all"])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_torch_path(kind, sparse, ordered, dtype, monkeypatch):
    monkeypatch.setattr(torch_path, "SCORE_ENTRIES", 20_000)  # several strips of rows
    layout = make_layout(kind, grid=GRID)
    layout = layout.aligned((64, 64)) if sparse else layout
    share = "per head" if ordered else "per sample"
    block_map = make_map(layout, (64, 64), share, heads=6) if sparse else None
    q, k, v = make_qkv(layout, dtype, heads=6, dim=16)
    check_attend(layout, block_map, q, k, v, TORCH, order=order_for(layout, 6) if ordered else None)


def test_reference_is_the_rule():
    layout, order = make_layout("ragged text", grid=GRID), order_for(make_layout("video", grid=GRID), 3)
    q, k, v = (x.nan_to_num() for x in make_qkv(layout, torch.float64, dim=8))
    out, lse = attention_reference(q, k, v, layout=layout, logit=FAR)
    turned = [order.apply(x, layout) for x in (q, k, v)]
    again, _ = attention_reference(*turned, layout=layout, logit=FAR, tokens=tokens_of(order, layout))
    torch.testing.assert_close(order.restore(again, layout), out)
    torch.testing.assert_close(attend(q, k, v, layout=layout, options=with_far(TORCH)), out)
    assert lse.isfinite()[:, :, : layout.video].all()


@pytest.mark.parametrize(("block", "sample"), [((64, 64), None), ((128, 64), None), ((128, 64), 16)])
@pytest.mark.parametrize("kind", ["video", "ragged text"])
def test_block_sums(kind, block, sample, monkeypatch):
    monkeypatch.setattr(torch_path, "SCORE_ENTRIES", 60_000)
    check_sums(make_layout(kind, grid=GRID).aligned(block), block, torch.float32, TORCH, sample=sample)


@pytest.mark.parametrize("code", range(6))
def test_block_stats(code):
    check_stats(VideoGrid(8, 3, 7), torch.float32, TORCH, code=code)


@pytest.mark.parametrize("choose", [True, False])
def test_a_search_for_orders_measures_what_attention_sees(choose):
    layout, heads, block = TokenLayout(GRID), 3, (64, 64)
    q, k, v = make_qkv(layout, torch.float32, batch=1, heads=heads, dim=16)
    rows = ceil_div(layout.video, 64)
    counts = Selection(rows, rows, 2, 2, 2, 1.0)
    kept = []
    for options in (TORCH, with_far(TORCH)):
        _, lse = attend(q * 4, k, v, layout=layout, return_lse=True, options=options)
        index = PackedIndex.allocate(layout, block, 1, heads, counts.capacity((1, heads, rows, rows)), "cpu")
        codes = torch.tensor([0, 2, 5], dtype=torch.int32)
        search_orders(q * 4, k, lse, index, codes, OrderSelection(GRID, counts, OrderMetric(), choose), options)
        order = [order_for(layout, 1).__class__(GRID, (int(code),)) for code in codes]
        p = torch.stack([_sums_in(o, q[:, :, h : h + 1] * 4, k[:, :, h : h + 1], lse[:, h : h + 1], layout, options)
                         for h, o in enumerate(order)], 1)[:, :, 0]  # fmt: skip
        keep = index.block_map().keep
        best = torch.zeros_like(keep).scatter(3, p.topk(2, dim=3).indices, True)
        assert torch.equal(keep, best)
        kept.append(keep)
    assert choose or not torch.equal(*kept)


def _sums_in(order, q, k, lse, layout, options):
    """Mass of every block of 64 in an order, fp64."""
    from far import in_blocks, probabilities

    logit = FarLogits(layout.grid.frames) if options.logit is None else options.logit
    q, k = order.apply(q, layout), order.apply(k, layout)
    lse = order.apply(lse.transpose(1, 2)[..., None].contiguous(), layout)[..., 0].transpose(1, 2)
    p = probabilities(q, k, lse, layout, torch.float64, logit, tokens_of(order, layout))
    return in_blocks(p, (64, 64)).sum(4)


@pytest.mark.parametrize("need_lse", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_ops_are_well_formed(need_lse, sparse):
    layout = make_layout("ragged text", grid=GRID).aligned((64, 64))
    index = make_map(layout, (64, 64)).index() if sparse else None
    q, k, v = (x.nan_to_num() for x in make_qkv(layout, torch.float32, dim=8))
    call = (*op_arguments(layout, index, FAR), need_lse, "torch", None)
    torch.library.opcheck(ops.attend_forward, (q, k, v, *call, False, None, None, None))
    table = order_for(layout, 3).table(q.device)
    torch.library.opcheck(ops.attend_in_order, (q, k, v, *call, table, GRID.height, GRID.width))
    sums = (layout.seq_lens, layout.video, layout.text_start, 64, 64, 0.25, "torch", 0, table)
    lse = torch.zeros(2, 3, layout.length)
    torch.library.opcheck(ops.block_sums, (q, k, lse, *sums, *arguments(FAR.reach(GRID))))


@pytest.mark.parametrize("sparse", [False, True])
def test_one_graph(sparse):
    torch._dynamo.reset()
    layout = make_layout("ragged text", grid=GRID).aligned((64, 64))
    graphs = Graphs()

    def block(q, k, v, index, options):
        return attend(q * 2, k, v, layout=layout, index=index, options=options) + 1

    compiled = torch.compile(block, backend=graphs, fullgraph=True)
    for _ in range(2):
        index = make_map(layout, (64, 64)).index(capacity=100) if sparse else None
        inputs = (*make_qkv(layout, torch.float32, dim=16), index, with_far(TORCH))
        torch.testing.assert_close(compiled(*inputs), block(*inputs), rtol=0, atol=0, equal_nan=True)
    assert graphs.count == 1


def test_special_kernels_step_aside():
    pytest.importorskip("triton")
    import importlib

    from videosparse.kernels.call import AttentionCall

    call = AttentionCall(None, None, GRID.tokens, GRID.tokens, 0.1, far=FAR.reach(GRID))
    q = torch.zeros(1, GRID.tokens, 1, 128, dtype=torch.bfloat16)
    for name, rest in (("hopper_forward", ()), ("hopper_sums", ((128, 64),))):
        pytest.importorskip("triton.experimental.gluon")
        module = importlib.import_module(f"videosparse.kernels.{name}")
        tensors = (q, q, q) if not rest else (q, q, torch.zeros(1, 1, GRID.tokens))
        assert module.unsuited(*tensors, call, *rest) == "it takes scores as they are (no logit)"


def test_gradients_are_refused():
    layout = make_layout("video", grid=GRID)
    q, k, v = (x.requires_grad_() for x in make_qkv(layout, torch.float32, dim=8))
    with pytest.raises(NotImplementedError, match="logit is for inference: it has no gradient"):
        attend(q, k, v, layout=layout, options=with_far(TORCH))
    with torch.no_grad():
        out, lse = attend(q, k, v, layout=layout, options=with_far(TORCH), return_lse=True)
    call = (*op_arguments(layout, None, FAR), "torch", None, None, None)
    with pytest.raises(NotImplementedError, match="logit is for inference"):
        ops.attend_backward(out, None, q.detach(), k.detach(), v.detach(), out, lse, *call)


def test_what_is_refused():
    with pytest.raises(TypeError, match=r"logit must be None or FarLogits\(trained=...\) \(got .tanh.\)"):
        KernelOptions(logit="tanh")
    with pytest.raises(ValueError, match='logit looks at the sign of scores, which quant="int8" shifts and rounds'):
        KernelOptions(logit=FAR, quant="int8")
    for backend in ("fa4", "flex"):
        with pytest.raises(ValueError, match=f'backend="{backend}" cannot change scores as logit asks'):
            KernelOptions(logit=FAR, backend=backend)
    with pytest.raises(TypeError, match=r"FarLogits.trained must be an int of latent frames \(got 21.0\)"):
        FarLogits(21.0)
    with pytest.raises(ValueError, match=r"FarLogits.trained must be 1 latent frame or more \(got 0\)"):
        FarLogits(0)
    with pytest.raises(TypeError, match=r"FarLogits\.alpha must be a number"):
        FarLogits(21, True)
    for alpha in (0, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"FarLogits.alpha must lie in 0..1, 0 excluded"):
            FarLogits(21, alpha)


def test_it_is_a_key():
    assert {FarLogits(21): 1}[FarLogits(21, 0.9)] == 1
    assert hash(KernelOptions(logit=FarLogits(21))) != hash(KernelOptions(logit=FarLogits(21, 0.8)))
