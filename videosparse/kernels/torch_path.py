"""Block-sparse attention in plain torch: exact, on any device, and proportional to the kept blocks.

Shapes: q, k, v [B, L, H, D]; inside, one sample is head-major, [H, L, D]. A *task* is a set of query tokens that read
the same key tokens: one row of the block lists, or several consecutive rows whose lists agree. Each task gathers its
keys once for all heads that share the map, so dropped blocks cost nothing. Reading the lists waits for the device.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F

from videosparse.kernels.call import AttentionCall, Lists, wide
from videosparse.kernels.torch_order import raster_tokens
from videosparse.layout import ceil_div
from videosparse.logits import Reach

SCORE_ENTRIES = 2**22
"""Scores held at a time where they are held at all (lse, backward, block sums): 16 MB of fp32 for each copy."""

LOWEST = -1e30
"""Below every level of a row that has keys."""

Span = tuple[int, int]
Keys = slice | torch.Tensor
"""Key tokens: a slice where they are one run, else int64 positions."""


Change = Callable[[torch.Tensor, int], torch.Tensor]
"""Changes scores [H, M, N] of M rows from a given one on."""


@dataclass(frozen=True)
class _Task:
    heads: slice
    queries: list[Span]
    keys: Keys


@dataclass(frozen=True, eq=False)
class FarScores:
    """How scores of far tokens change: `reach` with tokens int64 [H or 1, L], the raster token of each position."""

    reach: Reach
    tokens: torch.Tensor
    video: int

    def part(self, task: _Task, first: int) -> Change:
        """For the queries of a task from position `first` on."""
        tokens = self.tokens if self.tokens.shape[0] == 1 else self.tokens[task.heads]
        keys = tokens[:, task.keys]

        def change(scores: torch.Tensor, row: int) -> torch.Tensor:
            rows = tokens[:, first + row : first + row + scores.shape[1]]
            return self.reach.change(scores, rows, keys, self.video)

        return change

    def head(self, scores: torch.Tensor, head: int, rows: torch.Tensor) -> torch.Tensor:
        """Scores [M, L] of one head and the queries at positions `rows` [M]."""
        tokens = self.tokens[head if self.tokens.shape[0] > 1 else 0]
        return self.reach.change(scores, tokens[rows], tokens, self.video)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, need_lse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one call.

    Returns:
        out [B, L, H, D] contiguous in the dtype of q, and lse [B, H, L] (fp32, fp64 for fp64 inputs; natural log),
        empty unless `need_lse`. Scores are only held when lse is asked for, or when far ones are changed.
    """
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    # scores that are changed have to be held, and then give lse, too
    held = need_lse or call.far is not None
    lse, far = _lse_like(q, held), far_scores(call, q)
    for sample, tasks in enumerate(_tasks(q, call)):
        qs, ks, vs = (x[sample].transpose(0, 1).contiguous() for x in (q, k, v))
        outs = out[sample].transpose(0, 1)
        for task in tasks:
            key, value = _take(ks, task), _take(vs, task)
            for start, stop in task.queries:
                rows = qs[task.heads, start:stop]
                if held:
                    lse_rows = lse[sample, task.heads, start:stop]
                    change = None if far is None else far.part(task, start)
                    _attend_with_lse(rows, key, value, call.scale, outs[task.heads, start:stop], lse_rows, change)
                else:
                    found = F.scaled_dot_product_attention(rows[None], key[None], value[None], scale=call.scale)
                    outs[task.heads, start:stop] = found[0]
    return out, lse if need_lse else lse.new_empty(0)


def backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    call: AttentionCall,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `forward`, by computing the scores again, a few rows at a time.

    Args:
        grad_out: [B, L, H, D].
        grad_lse: [B, H, L], or None when lse took no part.

    Returns:
        Gradients of q, k and v, [B, L, H, D] contiguous in their dtype. Sums are kept in fp32 (fp64 for fp64).
    """
    dtype = wide(q.dtype)
    grads = tuple(torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
    for sample, tasks in enumerate(_tasks(q, call)):
        qs, ks, vs, gs = (x[sample].transpose(0, 1).to(dtype) for x in (q, k, v, grad_out))
        dq, dk, dv = (x[sample].transpose(0, 1) for x in grads)
        for task in tasks:
            key, value = _take(ks, task), _take(vs, task)
            for start, stop in _chunks(task.queries, key.shape[0] * key.shape[1]):
                rows, grad = qs[task.heads, start:stop], gs[task.heads, start:stop]
                p = torch.softmax(rows @ key.transpose(1, 2) * call.scale, -1)
                dp = grad @ value.transpose(1, 2)
                shift = -(p * dp).sum(-1, keepdim=True)
                if grad_lse is not None:
                    shift = shift + grad_lse[sample, task.heads, start:stop, None]
                ds = p * (dp + shift) * call.scale
                dq[task.heads, start:stop] = ds @ key
                _add(dk, task, ds.transpose(1, 2) @ rows)
                _add(dv, task, p.transpose(1, 2) @ grad)
    dq, dk, dv = (g.to(x.dtype) for g, x in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv


def block_sums(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, call: AttentionCall, block: tuple[int, int], sample: int
) -> torch.Tensor:
    """Attention mass of every block, fp32 [B, H, ceil(L / block[0]), ceil(L / block[1])]; see `kernels.block_sums`."""
    batch, length, heads, _ = q.shape
    rows, cols = ceil_div(length, block[0]), ceil_div(length, block[1])
    sums = torch.zeros(batch, heads, rows, cols, dtype=torch.float32, device=q.device)
    # the visited rows, `sample` of each block one after another
    visited = torch.arange(0, length, block[0] // sample, device=q.device)
    step = max(1, SCORE_ENTRIES // (sample * cols * block[1])) * sample
    far = far_scores(call, q)
    for number, end in enumerate(ends_of_text(call, batch, length)):
        valid = valid_tokens(call, end, length, cols * block[1], q.device)
        factor = _visited_share(valid[:length], block[0], sample)
        for head in range(heads):
            keys = k[number, :, head].float()
            for start in range(0, visited.shape[0], step):
                places = visited[start : start + step]
                level = torch.where(valid[places], lse[number, head, places].float(), -torch.inf)
                scores = q[number, places, head].float() @ keys.T * call.scale
                scores = scores if far is None else far.head(scores, head, places)
                mass = mass_of(scores, level, valid[:length])
                mass = F.pad(mass, (0, cols * block[1] - length, 0, -places.shape[0] % sample))
                found = mass.view(-1, sample, cols, block[1]).sum((1, 3))
                sums[number, head, start // sample : start // sample + found.shape[0]] = found
        sums[number] *= factor[:, None]
    return sums


def _visited_share(valid: torch.Tensor, block: int, sample: int) -> torch.Tensor:
    """Valid rows of each block over the visited ones among them, fp32; `valid` is bool [L]."""
    padded = F.pad(valid, (0, -valid.shape[0] % block)).view(-1, block)
    return padded.sum(1) / padded[:, :: block // sample].sum(1).clamp(min=1)


def mass_of(scores: torch.Tensor, level: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """exp(scores - level) of valid keys; 0 for the other keys, and for rows whose level is -inf."""
    empty = level == -torch.inf
    scores = scores.sub_(level.masked_fill(empty, 0.0)[:, None])
    # masked after the product, so that NaN in padding does not survive
    return scores.masked_fill_(~valid | empty[:, None], -torch.inf).exp_()


def far_scores(call: AttentionCall, q: torch.Tensor) -> FarScores | None:
    """What changes far scores of a call on q [B, L, H, D]; None where nothing does."""
    if call.far is None:
        return None
    length = q.shape[1]
    if call.order is None:
        return FarScores(call.far, torch.arange(length, device=q.device)[None], call.video)
    return FarScores(call.far, raster_tokens(call.order, call.video, length), call.video)


def _lse_like(q: torch.Tensor, need_lse: bool) -> torch.Tensor:
    batch, length, heads, _ = q.shape
    shape = (batch, heads, length) if need_lse else (0,)
    return torch.full(shape, -torch.inf, dtype=wide(q.dtype), device=q.device)


def _attend_with_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    change: Change | None = None,
) -> None:
    """Write the attention of q [H, M, D] over k, v [H, N, D] to out [H, M, D] and lse [H, M]."""
    k, v = k.to(lse.dtype), v.to(lse.dtype)
    for start, stop in _chunks([(0, q.shape[1])], k.shape[0] * k.shape[1]):
        scores = q[:, start:stop].to(lse.dtype) @ k.transpose(1, 2) * scale
        if change is not None:
            scores = change(scores, start)
        level = torch.logsumexp(scores, -1)
        # a row that sees none of these keys has a level of -inf
        out[:, start:stop] = (scores.sub_(level.clamp(min=LOWEST)[..., None]).exp_() @ v).to(out.dtype)
        lse[:, start:stop] = level


def _chunks(spans: list[Span], width: int) -> Iterator[Span]:
    """Cut spans of rows so that rows x width stays near SCORE_ENTRIES."""
    step = max(16, SCORE_ENTRIES // max(1, width))
    for start, stop in spans:
        for first in range(start, stop, step):
            yield first, min(first + step, stop)


def _take(x: torch.Tensor, task: _Task) -> torch.Tensor:
    """The key tokens of a task: [H, L, D] -> [heads, keys, D]."""
    if isinstance(task.keys, slice):
        return x[task.heads, task.keys]
    return x[task.heads].index_select(1, task.keys)


def _add(x: torch.Tensor, task: _Task, update: torch.Tensor) -> None:
    """Add [heads, keys, D] to the key tokens of x [H, L, D]."""
    if isinstance(task.keys, slice):
        x[task.heads, task.keys] += update
    else:
        x[task.heads].index_add_(1, task.keys, update)


def ends_of_text(call: AttentionCall, batch: int, length: int) -> list[int]:
    """Where the text of each sample ends."""
    if call.seq_lens is None:
        return [length] * batch
    return [min(int(n), length) for n in call.seq_lens.tolist()]


def _spans(call: AttentionCall, end: int, length: int) -> list[Span]:
    """The valid tokens of a sample as one or two runs."""
    video = min(call.video, length)
    if end <= call.text_start:
        return [(0, video)]
    return [(0, end)] if call.text_start == video else [(0, video), (call.text_start, end)]


def valid_tokens(call: AttentionCall, end: int, length: int, size: int, device: torch.device) -> torch.Tensor:
    """Bool [size]: True at the valid tokens of a sample."""
    valid = torch.zeros(size, dtype=torch.bool, device=device)
    for start, stop in _spans(call, end, length):
        valid[start:stop] = True
    return valid


def _clip(spans: list[Span], start: int, stop: int) -> list[Span]:
    """What of the spans lies in [start, stop)."""
    cut = [(max(a, start), min(b, stop)) for a, b in spans]
    return [(a, b) for a, b in cut if a < b]


def _tasks(q: torch.Tensor, call: AttentionCall) -> Iterator[Iterator[_Task]]:
    """The tasks of each sample."""
    batch, length = q.shape[:2]
    lists = call.lists
    host = None if lists is None else _on_host(lists, ceil_div(length, lists.block[1]))
    for sample, end in enumerate(ends_of_text(call, batch, length)):
        spans = _spans(call, end, length)
        if lists is None or host is None:
            yield iter([_Task(slice(None), spans, _join(spans, q.device))])
        else:
            yield _sparse_tasks(lists, host[0], host[1], sample, spans, length)


def _on_host(lists: Lists, columns: int) -> tuple[list[int], torch.Tensor]:
    """row_ptr and ids on the CPU.

    Raises:
        ValueError: rows that end beyond the ids, ids of blocks that there are not, or ids that do not ascend within a
            row. Kernels cannot afford to look.
    """
    row_ptr, ids = lists.row_ptr.tolist(), lists.ids.cpu()
    if row_ptr[0] != 0 or any(stop < start for start, stop in pairwise(row_ptr)) or row_ptr[-1] > ids.numel():
        raise ValueError(
            f"BlockIndex.row_ptr must rise from 0 to at most {ids.numel()}, the number of its ids (got {row_ptr[0]} to "
            f"{row_ptr[-1]}); build it with BlockMap.index()."
        )
    used = ids[: row_ptr[-1]]
    if used.numel() and not 0 <= int(used.min()) <= int(used.max()) < columns:
        raise ValueError(
            f"BlockIndex.ids must be numbers of blocks, 0..{columns - 1} (got {int(used.min())} to {int(used.max())}); "
            "build it with BlockMap.index()."
        )
    falls = used[1:] <= used[:-1]
    ends = torch.tensor([stop - 1 for stop in row_ptr[1:-1] if 0 < stop < row_ptr[-1]], dtype=torch.int64)
    falls[ends] = False  # the next row begins anywhere
    if falls.any():
        place = int(falls.int().argmax())
        raise ValueError(
            f"BlockIndex.ids must ascend within a row, each block once (got {int(used[place])} before "
            f"{int(used[place + 1])} in row {bisect_right(row_ptr, place) - 1}); build it with BlockMap.index()."
        )
    return row_ptr, ids


def _sparse_tasks(
    lists: Lists, row_ptr: list[int], ids: torch.Tensor, sample: int, spans: list[Span], length: int
) -> Iterator[_Task]:
    """The tasks of one sample: runs of rows with the same list. Empty rows and rows without a valid token have none."""
    rows = ceil_div(length, lists.block[0])
    valid = torch.zeros(ceil_div(length, lists.block[1]) * lists.block[1], dtype=torch.bool, device="cpu")
    for start, stop in spans:
        valid[start:stop] = True
    for head in range(lists.heads):
        heads = slice(None) if lists.heads == 1 else slice(head, head + 1)
        base = ((sample if lists.samples > 1 else 0) * lists.heads + head) * rows
        own = [ids[row_ptr[base + r] : row_ptr[base + r + 1]] for r in range(rows)]
        first = 0
        while first < rows:
            last = first + 1
            while last < rows and torch.equal(own[first], own[last]):
                last += 1
            queries = _clip(spans, first * lists.block[0], last * lists.block[0])
            if queries and own[first].numel():
                keys = _keys(own[first], lists.block[1], spans, valid, lists.ids.device)
                if keys is not None:
                    yield _Task(heads, queries, keys)
            first = last


def _keys(ids: torch.Tensor, block: int, spans: list[Span], valid: torch.Tensor, device: torch.device) -> Keys | None:
    """The valid key tokens of the blocks `ids` (ascending, on the CPU); None when there are none."""
    first, last = int(ids[0]), int(ids[-1]) + 1
    if last - first == ids.numel():
        run = _clip(spans, first * block, last * block)
        return _join(run, device) if run else None
    tokens = (ids.long()[:, None] * block + torch.arange(block, device="cpu")).flatten()
    tokens = tokens[valid[tokens]]
    return tokens.to(device) if tokens.numel() else None


def _join(spans: list[Span], device: torch.device) -> Keys:
    """Spans as one slice if they are one, else as positions."""
    if len(spans) == 1:
        return slice(*spans[0])
    return torch.cat([torch.arange(*span, device=device) for span in spans])
