"""AdaSpa against a literal form of the paper, the figures that it gives, and the steps of its runs."""

import math
from dataclasses import replace

import pytest
import torch

from videosparse.blocks import PackedIndex
from videosparse.cases import CASES
from videosparse.kernels import KernelOptions, attend, block_sums
from videosparse.kernels.selection import expand
from videosparse.layout import TokenLayout, VideoGrid, ceil_div
from videosparse.policies import AdaSpaPolicy, DenseSchedule, Mode, RunStep

CPU = torch.device("cpu")
TORCH = KernelOptions(backend="torch")


def tokens_of(layout, sample):
    """Positions of the valid tokens of a sample."""
    end = layout.length if layout.seq_lens is None else int(layout.seq_lens[sample])
    return [i for i in range(layout.length) if i < layout.video or layout.text_start <= i < end]


def paper_masses(q, k, layout, block):
    """W[p, q] of the paper: the softmax of all scores, summed over the tokens of each tile. fp64 [B, H, M, N]."""
    batch, length, heads, dim = q.shape
    size = [ceil_div(length, b) for b in block]
    masses = torch.zeros(batch, heads, *size, dtype=torch.float64)
    for b in range(batch):
        valid = tokens_of(layout, b)
        for h in range(heads):
            scores = q[b, valid, h].double() @ k[b, valid, h].double().T / math.sqrt(dim)
            weights = torch.softmax(scores, -1)
            for row, position in enumerate(valid):
                columns = torch.tensor([key // block[1] for key in valid])
                masses[b, h, position // block[0]].index_add_(0, columns, weights[row])
    return masses


def paper_rows(masses, per_row, layout, block):
    """The kept columns of every row: the `per_row[b][h]` of largest mass among video columns, and all text columns."""
    batch, heads, rows, columns = masses.shape
    video_rows, video_columns = ceil_div(layout.video, block[0]), ceil_div(layout.video, block[1])
    kept = {}
    for b in range(batch):
        for h in range(heads):
            for r in range(rows):
                row = masses[b, h, r].tolist()
                largest = sorted(range(video_columns), key=lambda c: (-row[c], c))[: per_row[b][h]]
                text = range(video_columns, columns)
                kept[b, h, r] = sorted([*largest, *text]) if r < video_rows else list(range(columns))
    return kept


def paper_head_rows(masses, policy, layout):
    """How many blocks a row of each head keeps, by the head-adaptive rule, rounded so that the mean is the base."""
    batch, heads, _, _ = masses.shape
    video_rows, columns = (ceil_div(layout.video, b) for b in policy.block)
    count = lambda share: max(1, math.floor(share * columns + 0.5))  # noqa: E731
    base = count(policy.density)
    if not policy.head_adaptive:
        return [[base] * heads for _ in range(batch)]
    kept = paper_rows(masses, [[base] * heads] * batch, layout, policy.block)
    result = []
    for b in range(batch):
        recall = []
        for h in range(heads):
            mass = [masses[b, h, r].tolist() for r in range(video_rows)]
            recall.append(sum(mass[r][c] for r in range(video_rows) for c in kept[b, h, r]) / sum(map(sum, mass)))
        n = min(heads // 2, sum(value > policy.recall_threshold for value in recall))
        ranked = sorted(range(heads), key=lambda h: (-recall[h], h))
        low, high = ranked[:n], ranked[heads - n :]
        counts = dict.fromkeys(range(heads), base)
        counts.update(dict.fromkeys(low, count(policy.density / 2)))
        counts.update(dict.fromkeys(high, 2 * base - count(policy.density / 2)))
        result.append([counts[h] for h in range(heads)])
    return result


def lists_of(index):
    samples, heads, rows, _ = index.shape
    pointers, ids = index.row_ptr.tolist(), index.ids.tolist()
    numbers = [(b, h, r) for b in range(samples) for h in range(heads) for r in range(rows)]
    return {number: ids[pointers[i] : pointers[i + 1]] for i, number in enumerate(numbers)}


def peaked(layout, heads=5, batch=2, dim=16):
    """q and k whose heads differ in how much of their attention stays near by."""
    torch.manual_seed(0)
    q, k = (torch.randn(batch, layout.length, heads, dim) for _ in range(2))
    place = torch.randn(ceil_div(layout.length, 64), heads, dim).repeat_interleave(64, 0)[: layout.length]
    return q + torch.linspace(0, 3, heads).flip(0)[:, None] * place, k + place


def ragged(text, lens=None, grid=(2, 9, 13)):
    grid = VideoGrid(*grid)
    ends = None if lens is None else torch.tensor(lens, dtype=torch.int32) + grid.tokens
    return TokenLayout(grid, text, seq_lens=ends)


LAYOUTS = {"video": ragged(0), "text": ragged(37), "ragged text": ragged(70, [5, 69]), "no text": ragged(9, [0, 0])}


@pytest.mark.parametrize("block", [(128, 64), (64, 64), (64, 128)])
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("head_adaptive", [True, False])
def test_maps_are_those_of_the_paper(kind, block, head_adaptive):
    policy = AdaSpaPolicy(density=0.5, block=block, head_adaptive=head_adaptive, recall_threshold=0.6)
    layout = LAYOUTS[kind]
    aligned = layout.aligned(block)
    q, k = peaked(aligned)
    _, lse = attend(q, k, k, layout=aligned, return_lse=True, options=TORCH)
    sums = block_sums(q, k, lse, layout=aligned, block=block, options=TORCH)
    index = policy.select(sums, layout)
    masses = paper_masses(q, k, aligned, block)
    torch.testing.assert_close(sums.double(), masses, rtol=1e-4, atol=1e-5)
    per_row = paper_head_rows(masses, policy, aligned)
    assert head_adaptive or {n for row in per_row for n in row} == {policy.selection(aligned).base}
    assert lists_of(index) == paper_rows(masses, per_row, aligned, block)
    if head_adaptive and block[1] == 64:
        assert len({n for row in per_row for n in row}) == 3, "inputs that leave the rule for heads untested"
    assert index.block == block
    assert (index.q_len, index.kv_len) == (aligned.length, aligned.length)


def test_what_a_head_keeps_is_never_empty():
    policy = AdaSpaPolicy(density=0.001)
    sums = torch.rand(1, 4, 2, 4)
    index = policy.select(sums, ragged(0))
    assert index.row_ptr.diff().tolist() == [1] * 8


@pytest.mark.parametrize("density", [0.05, 0.2, 0.35, 2 / 3, 0.8, 0.97, 1.0])
def test_the_mean_over_heads_is_the_density(density):
    layout = CASES["wan2.1-14b 720x1280x81"].layout()
    chosen = AdaSpaPolicy(density=density).selection(layout)
    assert chosen.base == pytest.approx(density * 1182, abs=0.5)
    assert chosen.low + chosen.high == 2 * chosen.base
    assert chosen.high == pytest.approx(min(1182, 1.5 * density * 1182), abs=1.5)


def test_full_density_keeps_everything():
    layout = LAYOUTS["text"]
    policy = AdaSpaPolicy(density=1.0)
    sums = torch.rand(1, 4, *(ceil_div(layout.aligned(policy.block).length, b) for b in policy.block))
    index = policy.select(sums, layout)
    assert index.row_ptr[-1] == sums.numel()


def test_the_published_run():
    """50 steps: 1 to 9 dense, 10 dense and searching, 30 refreshes (steps from 1; indices from 0)."""
    policy, schedule, state = AdaSpaPolicy(), DenseSchedule(first_steps=0.2), {}
    assert policy.refresh_steps(50) == [30]
    modes = []
    for index in range(50):
        run = RunStep("cond", index, 50)
        asked = not schedule.is_dense(run, 0, 4) or schedule.searches_at(run, 0, 4)
        modes.append(policy.plan(ragged(0), run, 0, state, device=CPU).mode if asked else Mode.DENSE)
    expected = [Mode.DENSE] * 9 + [Mode.SEARCH] + [Mode.SPARSE] * 19 + [Mode.REFRESH] + [Mode.SPARSE] * 20
    assert modes == expected


@pytest.mark.parametrize(
    ("total", "search", "refresh"), [(1, 1, 1), (2, 1, 2), (3, 1, 2), (4, 1, 3), (8, 2, 5), (40, 8, 24), (100, 20, 60)]
)
def test_runs_of_any_length(total, search, refresh):
    schedule = DenseSchedule(first_steps=0.2)
    assert max(1, schedule.dense_steps(total)[0]) == search
    assert AdaSpaPolicy().refresh_steps(total) == [refresh]
    AdaSpaPolicy().check_run(schedule, total)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.6, 0.7, 0.9])
def test_fractions_of_a_run_are_not_a_step_late(share):
    for total in range(10, 101, 10):
        assert AdaSpaPolicy(refresh=(share,)).refresh_steps(total) == [round(share * total)]


def test_plans_depend_on_state_alone():
    """A search that comes late, as that of a second expert, leaves only later refreshes to do."""
    policy, state = AdaSpaPolicy(refresh=(0.3, 0.5, 45)), {}
    plans = [policy.plan(LAYOUTS["text"], RunStep("cond", i, 50), 0, state, device=CPU) for i in range(20, 50)]
    modes = [plan.mode for plan in plans]
    assert modes[0] == "search"
    assert [i + 20 for i, mode in enumerate(modes) if mode == "refresh"] == [24, 44]
    assert modes.count("sparse") == 27
    assert len({id(plan.index) for plan in plans}) == 1
    assert [plan.lse is None for plan in plans] == [mode == "sparse" for mode in modes]
    assert plans[0].lse is plans[4].lse


def test_buffers_of_a_search():
    policy = AdaSpaPolicy(lse_dtype="bfloat16")
    layout = LAYOUTS["ragged text"]
    plan = policy.plan(layout, RunStep("cond", 0, 4), 0, {}, device=CPU, samples=2, heads=6)
    aligned = layout.aligned(policy.block)
    assert isinstance(plan.index, PackedIndex)
    assert plan.index.shape[:2] == (2, 6)
    assert plan.lse.shape == (2, 6, aligned.length)
    assert plan.lse.dtype == torch.bfloat16
    assert not plan.index.bits.any()
    kept = policy.state_bytes(layout, 2, 6)
    assert kept["lse"] == plan.lse.numel() * 2
    assert kept["bits"] + kept["lists"] == plan.index.bytes


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("density", [0.1, 0.35, 0.9])
def test_the_capacity_bounds_every_outcome(kind, density):
    """However recalls fall: as many heads with more as with less, so that the density is what was told before."""
    policy, layout = AdaSpaPolicy(density=density), replace(LAYOUTS[kind], grid=VideoGrid(3, 11, 13), text_start=-1)
    aligned = layout.aligned(policy.block)
    shape = (2, 7, *(ceil_div(aligned.length, b) for b in policy.block))
    for share in torch.linspace(0, 1, 8):
        sums = torch.rand(shape)
        sums[:, : int(share * 7)] **= 40
        index = policy.select(sums, layout)
        assert int(index.row_ptr[-1]) == index.ids.numel() == policy.selection(aligned).capacity(shape)
        found = (index.row_ptr[-1] / math.prod(shape)).item()
        assert policy.densities(layout)[0] == pytest.approx(found)


def test_memory_of_wan_14b():
    """A branch of 40 layers: 461 MiB of fp32 lse and 133 MiB of bits; lists would take three times that."""
    layout = CASES["wan2.1-14b 720x1280x81"].layout()
    kept = AdaSpaPolicy().state_bytes(layout, 1, 40)
    assert kept["lse"] * 40 == 75_600 * 40 * 4 * 40
    assert kept["bits"] * 40 == 591 * 148 * 40 * 40
    assert AdaSpaPolicy(lse_dtype="bfloat16").state_bytes(layout, 1, 40)["lse"] * 2 == kept["lse"]


def test_what_searching_costs():
    schedule = DenseSchedule(first_steps=0.2)
    exact = AdaSpaPolicy(sample=None)
    assert exact.search_work(schedule, 50, 1) == (0, 1.0)
    assert replace(exact, refresh=()).search_work(schedule, 50, 1) == (0, 0.5)
    assert AdaSpaPolicy().search_work(schedule, 50, 1) == (0, 0.125), "16 of 128 rows"
    assert exact.search_work(schedule, 40, 2) == (1, 1.5)
    assert exact.search_work(DenseSchedule(), 40, 1) == (1, 1.0)
    assert exact.search_work(DenseSchedule(first_steps=1.0), 40, 1) == (0, 0.0)
    assert exact.search_work(DenseSchedule(), 1, 1) == (1, 0.0), "one step is dense, and searches for nobody"
    assert replace(exact, refresh=(0.9,)).search_work(replace(schedule, last_steps=0.2), 50, 1) == (0, 0.5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"density": 0}, ValueError, r"density must lie in 0\.\.1, 0 excluded \(got 0\)"),
        ({"density": 1.2}, ValueError, "density must lie"),
        ({"density": float("nan")}, ValueError, "density must lie"),
        ({"density": "all"}, TypeError, r"density must be a number \(got 'all'\)"),
        ({"recall_threshold": 0.0}, ValueError, r"recall_threshold must lie in 0\.\.1"),
        ({"recall_threshold": 1.5}, ValueError, "recall_threshold must lie"),
        (
            {"sample": 12},
            ValueError,
            r"sample must be one of 8, 16, 32, 64 rows of a block, or None for all \(got 12\)",
        ),
        ({"sample": 128}, ValueError, "sample must be one of"),
        ({"lse_dtype": "float16"}, ValueError, r"lse_dtype must be float32 or bfloat16 \(got 'float16'\)"),
        ({"block": (96, 64)}, ValueError, "each 64 or 128"),
        ({"refresh": (0,)}, ValueError, r"steps from 1 on, or fractions of the run in 0\.\.1 \(got 0\)"),
        ({"refresh": (1.5,)}, ValueError, "refresh must be made of steps"),
        ({"refresh": ("late",)}, TypeError, r"refresh must be made of numbers \(got 'late'\)"),
        ({"refresh": 0.6}, TypeError, "refresh must be a tuple"),
        ({"head_adaptive": 1}, TypeError, "head_adaptive must be True or False"),
        ({"offload_state": "yes"}, TypeError, "offload_state must be True or False"),
    ],
)
def test_values_that_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        AdaSpaPolicy(**arguments)


@pytest.mark.parametrize(
    ("refresh", "first_steps", "total", "message"),
    [
        (0.1, 0.2, 50, r"refresh=0\.1 is step 5 of 50, .* search at step 10, the last dense one of first_steps=0\.2"),
        (10, 10, 50, "refresh=10 is step 10 of 50, which is not after the search at step 10"),
        (1, 0, 50, "refresh=1 is step 1, and step 1 searches; refresh at step 2 or later"),
        (3, 4, None, "refresh=3 is step 3, which is not after the search at step 4"),
        (0.6, 4, None, "refresh=0.6 is a fraction of the run, .* pass num_steps="),
    ],
)
def test_refreshes_that_come_too_early(refresh, first_steps, total, message):
    with pytest.raises(ValueError, match=message):
        AdaSpaPolicy(refresh=(refresh,)).check_run(DenseSchedule(first_steps=first_steps), total)


def test_a_run_without_sparse_steps_has_nothing_to_refresh():
    AdaSpaPolicy(refresh=(1,)).check_run(DenseSchedule(first_steps=1.0), 8)
    AdaSpaPolicy(refresh=(2,)).check_run(DenseSchedule(first_steps=4, last_steps=4), 8)


def test_another_size_for_the_same_state():
    policy, state = AdaSpaPolicy(), {}
    policy.plan(LAYOUTS["text"], RunStep("cond", 0, 9), 0, state, device=CPU, samples=2, heads=4)
    with pytest.raises(RuntimeError, match=r"AdaSpa searched .* in branch cond, and now gets .* one run is one size"):
        policy.plan(LAYOUTS["video"], RunStep("cond", 1, 9), 0, state, device=CPU, samples=2, heads=4)
    with pytest.raises(RuntimeError, match=r"of 2 samples and 4 heads in branch cond, and now gets .* of 1 and 4"):
        policy.plan(LAYOUTS["text"], RunStep("cond", 1, 9), 0, state, device=CPU, samples=1, heads=4)


def test_sums_of_another_map():
    with pytest.raises(ValueError, match=r"sums must be float32 \[1, 2, 2, 4\]"):
        AdaSpaPolicy().select(torch.rand(1, 2, 2, 3), LAYOUTS["video"])


def test_lse_is_kept_while_a_refresh_will_read_it():
    policy, layout, state = AdaSpaPolicy(refresh=(0.4, 0.8)), LAYOUTS["video"], {}
    plan = lambda index: policy.plan(layout, RunStep("cond", index, 10), 0, state, device=CPU)  # noqa: E731
    assert plan(1).lse is not None
    assert plan(3).lse is state["lse"]
    assert plan(7).lse is not None
    assert state["lse"] is None, "nobody reads it after the last refresh"
    assert plan(9).mode is Mode.SPARSE
    never, state = AdaSpaPolicy(refresh=()), {}
    assert never.plan(layout, RunStep("cond", 1, 10), 0, state, device=CPU).lse is None
    assert never.state_bytes(layout, 1, 4)["lse"] == 0


def test_what_a_search_writes_is_plain_tensors():
    """Steps of one run may be in inference mode and out of it."""
    with torch.inference_mode():
        plan = AdaSpaPolicy().plan(LAYOUTS["video"], RunStep("cond", 1, 10), 0, {}, device=CPU)
    assert not any(t.is_inference() for t in (plan.lse, plan.index.bits, plan.index.row_ptr, plan.index.order))


def test_lists_that_gradients_need_outlive_a_search():
    layout, policy = LAYOUTS["video"], AdaSpaPolicy()
    index = policy.plan(layout, RunStep("cond", 1, 10), 0, {}, device=CPU).index
    lists = expand(index)
    index.row_ptr.fill_(3)
    assert not (lists.row_ptr == 3).any()
    with torch.no_grad():
        assert expand(index).row_ptr is index.row_ptr


def test_a_sequence_that_is_too_long_is_refused():
    layout = TokenLayout(VideoGrid(301, 45, 80))
    with pytest.raises(ValueError, match=r"rows of at most 16384 \(got 16932\)"):
        AdaSpaPolicy().state_bytes(layout, 1, 40)


def test_a_step_that_is_refreshed_twice_costs_once():
    schedule = DenseSchedule(first_steps=0.2)
    assert AdaSpaPolicy(refresh=(0.6, 30, 0.6), sample=None).search_work(schedule, 50, 1) == (0, 1.0)


@pytest.mark.parametrize(
    ("refresh", "last", "said"),
    [
        (60, 0, "refresh=60 is a step that is not sparse: 50 of 50 is the last one"),
        (48, 5, "refresh=48 is a step that is not sparse: 45 of 50 is the last one"),
    ],
)
def test_refreshes_that_never_come(refresh, last, said):
    schedule = DenseSchedule(first_steps=0.2, last_steps=last)
    with pytest.raises(ValueError, match=said):
        AdaSpaPolicy(refresh=(refresh,)).check_run(schedule, 50)


@pytest.mark.parametrize(("name", "value"), [("sample", 8.0), ("lse_dtype", []), ("lse_dtype", "float16")])
def test_odd_types_are_refused_at_once(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        AdaSpaPolicy(**{name: value})
