"""Sum, largest entry and number of large entries of every block of probabilities, in plain torch, a strip at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from videosparse.kernels import torch_path
from videosparse.kernels.call import AttentionCall
from videosparse.layout import ceil_div


def block_stats(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, call: AttentionCall, block: tuple[int, int], eps: float
) -> torch.Tensor:
    """fp32 [3, B, H, ceil(L / block[0]), ceil(L / block[1])]: sum, largest entry, entries of at least `eps`."""
    batch, length, heads, _ = q.shape
    rows, cols = ceil_div(length, block[0]), ceil_div(length, block[1])
    stats = torch.empty(3, batch, heads, rows, cols, dtype=torch.float32, device=q.device)
    step = max(1, torch_path.SCORE_ENTRIES // (block[0] * cols * block[1]))
    far = torch_path.far_scores(call, q)
    for sample, end in enumerate(torch_path.ends_of_text(call, batch, length)):
        valid = torch_path.valid_tokens(call, end, length, length, q.device)
        for head in range(heads):
            keys = k[sample, :, head].float()
            for row in range(0, rows, step):
                tokens = slice(row * block[0], min(length, (row + step) * block[0]))
                level = torch.where(valid[tokens], lse[sample, head, tokens].float(), -torch.inf)
                scores = q[sample, tokens, head].float() @ keys.T * call.scale
                if far is not None:
                    scores = far.head(scores, head, torch.arange(tokens.start, tokens.stop, device=q.device))
                p = torch_path.mass_of(scores, level, valid)
                p = F.pad(p, (0, cols * block[1] - length, 0, -p.shape[0] % block[0]))
                p = p.view(-1, block[0], cols, block[1])
                place = stats[:, sample, head, row : row + p.shape[0]]
                place[0], place[1] = p.sum((1, 3)), p.amax((1, 3))
                place[2] = (p >= eps).sum((1, 3))
    return stats
