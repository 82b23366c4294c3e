"""Inputs of the tests of `norm_rotate`: attention modules of every family, whose projections are given tensors.

What nothing may read is NaN: the other thirds of a fused projection, the halves of the angles that a family skips.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from diffusers.models.normalization import MochiRMSNorm, RMSNorm

from videosparse.kernels import KernelOptions, Stream
from videosparse.kernels.accuracy import allowed_error, worst_row
from videosparse.layout import TokenLayout, VideoGrid
from videosparse.models import FAMILIES
from videosparse.policies.base import LayerPlan, Mode

FORMS = ["wan", "wan fused", "hunyuan dual", "hunyuan single", "mochi"]
GRID = VideoGrid(1, 3, 5)
TEXT = 3


@dataclass
class Problem:
    """One call of a family's `project`, and what it is made of.

    `values` are q, k, v of video and text in their own dtype, `weights` those of the norms, `angles` fp32 [S, 1 or H,
    D / 2] or None.
    """

    form: str
    attn: SimpleNamespace
    layout: TokenLayout
    rotary: tuple[torch.Tensor, torch.Tensor] | None
    values: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    angles: torch.Tensor | None
    eps: float

    def project(self, fused_norm, backend="auto"):
        family = FAMILIES[{"wan": "wan", "hun": "hunyuan_video", "moc": "mochi"}[self.form[:3]]]
        options = KernelOptions(backend=backend, fused_norm=fused_norm)
        plan = LayerPlan(Mode.DENSE, self.layout, options=options)
        text = self.values.get("tq")  # whatever: the projections know their results
        with torch.no_grad():
            return family.project(self.attn, self.values["q"], text, self.rotary, plan)

    def streams(self):
        text = None
        if "tq" in self.values:
            text = Stream(*(self.values[n] for n in ("tq", "tk")), *(self.weights[n] for n in ("tq", "tk")), self.eps)
        return Stream(*(self.values[n] for n in "qk"), *(self.weights[n] for n in "qk"), self.eps), text

    def turns(self):
        return None if self.angles is None else (self.angles.cos(), self.angles.sin())

    def turn_views(self):
        """cos and sin as families hand them on: views of what the transformer passes."""
        if self.form == "mochi" or self.rotary is None:
            return self.rotary
        cos, sin = (x.flatten(0, -2)[:, None] for x in self.rotary)
        return cos[..., 0::2], sin[..., 1::2]

    def truth(self):
        """q and k [B, L, H, D] in float64, straight from the formulas."""
        return [self._true(name) for name in "qk"]

    def _true(self, name):
        heads = self.attn.heads
        x = _norm(self.values[name].double(), self.weights[name].double(), self.eps, heads)
        if self.angles is not None:
            # in the precision of the embedding, which is what a model has
            turn = torch.complex(*(a.double() for a in self.turns()))
            pairs = torch.view_as_complex(x.unflatten(3, (-1, 2)).contiguous())
            x = torch.view_as_real(pairs * turn).flatten(3)
        if "t" + name not in self.values:
            return x
        text = _norm(self.values["t" + name].double(), self.weights["t" + name].double(), self.eps, heads)
        gap = x.new_zeros(x.shape[0], self.layout.text_start - x.shape[1], *x.shape[2:])
        return torch.cat([x, gap, text], 1)


def _norm(x, weight, eps, heads):
    rows = x.unflatten(2, (-1, len(weight)))
    rows = rows / (rows.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return rows.flatten(2).unflatten(2, (heads, -1))


def make_problem(
    form, dtype, *, batch=2, heads=3, dim=16, grid=GRID, text=TEXT, gap=0, view="contiguous", rotary=True,
    device="cpu", weight_dtype=None,
):  # fmt: skip
    """view: "contiguous"; "thirds" of one projection; "odd", whose strides and starts no vector load likes."""
    text = 0 if form.startswith("wan") else text
    tokens, width = grid.tokens, heads * dim
    layout = TokenLayout(grid, text, text_start=tokens + gap if text else -1)
    values = dict(zip(["q", "k", "v"], make_projections(batch, tokens, width, dtype, device, view), strict=True))
    if form == "hunyuan single":
        whole = dict(zip(values, make_projections(batch, tokens + text, width, dtype, device, view), strict=True))
        values = {n: x[:, :tokens] for n, x in whole.items()} | {"t" + n: x[:, tokens:] for n, x in whole.items()}
    elif text:
        more = make_projections(batch, text, width, dtype, device, view)
        values |= dict(zip(["tq", "tk", "tv"], more, strict=True))
    norms, eps = make_norms(form, width, dim, text, weight_dtype or dtype, device)
    angles = torch.randn(tokens, heads if form == "mochi" else 1, dim // 2, device=device) * 3 if rotary else None
    attn = SimpleNamespace(heads=heads, **norms)
    if form == "hunyuan single":
        results = {"to_" + n: whole[n] for n in "qkv"}
        attn.add_q_proj = attn.norm_added_q = attn.norm_added_k = None
    else:
        results = {"to_" + n: values[n] for n in "qkv"} | {f"add_{n}_proj": values["t" + n] for n in "qkv" if text}
    for name, result in results.items():
        setattr(attn, name, lambda x, result=result: result)
    if form == "wan fused":
        attn.fused_projections = True
        base = torch.cat([values[n] for n in "qkv"], 2)
        values = dict(zip("qkv", base.chunk(3, -1), strict=True))
        attn.to_qkv = lambda x: base
    weights = {"q": attn.norm_q.weight, "k": attn.norm_k.weight}
    if text:
        added = form != "hunyuan single"
        weights |= {"t" + n: (norms["norm_added_" + n] if added else norms["norm_" + n]).weight for n in "qk"}
    return Problem(form, attn, layout, embedding(form, angles), values, weights, angles, eps)


def make_projections(batch, tokens, width, dtype, device, view):
    """q, k and v [B, tokens, width]; their storage is NaN elsewhere."""
    shape = {"contiguous": (1, batch, tokens, width), "thirds": (batch, tokens, 3, width)}
    found = []
    for i in range(3):
        if view == "odd":
            x = torch.full((batch, 2 * tokens + 1, width + 3), torch.nan, dtype=dtype, device=device)
            x = x[:, 1::2, 1 : width + 1]
        else:
            x = torch.full(shape[view], torch.nan, dtype=dtype, device=device)
            x = x[:, :, i] if view == "thirds" else x[0]
        # rows of very different size, which is what a norm is for
        rows = torch.randn(batch, tokens, width, device=device) * torch.rand(batch, tokens, 1, device=device).exp2() * 4
        found.append(x.copy_(rows))
    return found


def make_norms(form, width, dim, text, dtype, device):
    cls = {"wan": torch.nn.RMSNorm, "hun": RMSNorm, "moc": MochiRMSNorm}[form[:3]]
    size, eps = (width, 1e-6) if form.startswith("wan") else (dim, 1e-5 if form == "mochi" else 1e-6)
    names = ["norm_q", "norm_k"]
    if text and form != "hunyuan single":
        names += ["norm_added_q", "norm_added_k"]
    found = {}
    for name in names:
        found[name] = cls(size, eps=eps)
        torch.nn.init.normal_(found[name].weight, 1.0, 0.5)
        found[name].to(device, dtype).requires_grad_(False)
    return found, eps


def embedding(form, angles):
    """What the transformer passes: Mochi one angle a pair and head, the others each angle twice, of which cos is read
    at even places and sin at odd ones."""
    if angles is None or form == "mochi":
        return None if angles is None else (angles.cos(), angles.sin())
    nan = torch.full_like(angles[:, 0], torch.nan)
    cos, sin = (
        torch.stack([angles[:, 0].cos(), nan], -1).flatten(1),
        torch.stack([nan, angles[:, 0].sin()], -1).flatten(1),
    )
    return (cos[None, :, None], sin[None, :, None]) if form.startswith("wan") else (cos, sin)


def assert_parity(problem, fused):
    """`fused` q, k, v are at most twice as far from the truth as the family's own steps; v and the gap are equal."""
    steps = problem.project("off")
    truth = problem.truth()
    assert torch.equal(fused[2], steps[2])
    for ours, plain, true in zip(fused[:2], steps[:2], truth, strict=True):
        assert ours.shape == plain.shape == true.shape
        assert ours.dtype == plain.dtype
        assert ours.is_contiguous()
        error, allowed = worst_row(ours, true), allowed_error(true, plain)
        assert error <= allowed, f"{problem.form}: error {error:.2e}, allowed {allowed:.2e}"
        layout = problem.layout
        assert (ours[:, layout.video : layout.text_start] == 0).all()
