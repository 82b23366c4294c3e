"""Which options a model needs on a card: what `videosparse plan` tells of its transformer, and the other weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from videosparse.benchmark.tables import Row, Table
from videosparse.generation.estimating import Estimate, estimate
from videosparse.generation.planning import plan_request
from videosparse.generation.presets import PRESETS
from videosparse.generation.request import GenerationRequest
from videosparse.generation.runfile import merge, preset_values, request_from

CARDS = 24, 40, 48, 80
"""GB, as cards are sold, of 1024^3 bytes."""

ROOM = 0.9
"""Share of a card that a run may take: libraries need some, and what is worked out is not exact."""

SHOWN = (
    "wan2.1-1.3b-480p", "wan2.1-14b-480p", "wan2.1-14b-720p", "wan2.1-14b-720p-4x", "wan2.2-a14b-720p",
    "wan2.2-5b-720p", "hunyuan-video-720p", "hunyuan-video-720p-2x", "mochi-480p",
)  # fmt: skip
"""Presets of the table: of those that differ in method only one, and none with far scores, whose kernel takes other
memory than those that were measured."""

FITS_NOT = "does not fit"

_GIB = 2**30


@dataclass(frozen=True)
class Rest:
    """Bytes of the weights beside the transformer, as `videosparse generate` loads them on a GPU.

    Args:
        encoders: of text.
        vae: which `--offload group` leaves on the GPU.
        by_blocks: most of an encoder that is there at once under `--offload group`; None for the largest encoder, since
            what lists no blocks of its own, as the stack of a T5, comes whole.
    """

    encoders: tuple[float, ...]
    vae: float
    by_blocks: float | None = None


# Parameters are those of the published configurations, counted: encoders (UMT5-XXL; Llama 3 8B without its head, and
# CLIP-L; T5-XXL) take 2 bytes each, Wan's VAE 4. Of Llama, by blocks, these are its embeddings and two of its layers.
_WAN_TEXT = (2 * 5.681e9,)
_REST = {
    "wan2.1": Rest(_WAN_TEXT, 4 * 0.127e9),
    "wan2.2-a14b": Rest(_WAN_TEXT, 4 * 0.127e9),
    "wan2.2-5b": Rest(_WAN_TEXT, 4 * 0.705e9),
    "hunyuan-video": Rest((2 * 7.505e9, 2 * 0.123e9), 2 * 0.246e9, by_blocks=2 * 0.962e9),
    "mochi": Rest((2 * 4.762e9,), 2 * 0.460e9),
}


@dataclass(frozen=True)
class Peaks:
    """Bytes at the peak of a run of one preset, by options.

    Args:
        plain: as it is, all on the GPU.
        parts: `--offload model`; parts_compiled: the same with `--compile`; parts_fp8: with `--linears fp8`, too.
        blocks: `--offload group`.
    """

    plain: float
    parts: float
    parts_compiled: float
    parts_fp8: float
    blocks: float

    def options(self, room: float) -> str:
        """The options that cost least of those that fit into `room` bytes, in Markdown; "" for none."""
        exact = (
            (self.plain, ""),
            (self.parts, "`--offload model`"),
            (self.parts_compiled, "`--offload model --compile`"),
            (self.blocks, "`--offload group`"),
        )
        found = next((text for size, text in exact if size <= room), FITS_NOT)
        if found in ("`--offload group`", FITS_NOT) and self.parts_fp8 <= room:
            fp8 = "`--offload model --linears fp8 --compile`"
            return fp8 if found == FITS_NOT else f"{found} or {fp8}"
        return found


def peaks(eager: Estimate, compiled: Estimate, fp8: Estimate, group: Estimate, experts: int, rest: Rest) -> Peaks:
    """What a run needs, by what its transformer needs eagerly, compiled, with FP8 linears, too, and by blocks."""
    encoder = max(rest.encoders)  # one part at a time where parts are offloaded, and one expert

    def parts(estimate: Estimate) -> float:
        return max(estimate.weights / experts + estimate.activations, encoder)

    return Peaks(
        plain=eager.weights + eager.activations + sum(rest.encoders) + rest.vae,
        parts=parts(eager),
        parts_compiled=parts(compiled),
        parts_fp8=parts(fp8),
        blocks=max(group.weights + group.activations, rest.by_blocks or encoder) + rest.vae,
    )


def cards(rows: list[Row]) -> Table:
    """A line for each preset: what its transformer needs, worked out and, where it was run whole, measured; options.

    Args:
        rows: of `models.csv`.
    """
    lines = []
    fp8_linears = {"compile": True, "linears": "fp8"}
    for name in SHOWN:
        ways: tuple[dict[str, object], ...] = {}, {"compile": True}, fp8_linears, {"offload": "group"}
        eager, compiled, fp8, group = (_estimate(name, more) for more in ways)
        plan = plan_request(_request(name, {}))
        spec = plan.source.spec
        rest = _REST[spec.variant]
        found = peaks(eager, compiled, fp8, group, spec.experts, rest)
        values = PRESETS[name].values
        case = f"{values['model']} {values['height']}x{values['width']}x{values['frames']}"
        cells = []
        for card in CARDS:
            options = found.options(ROOM * card * _GIB)
            own = f"`--offload {values['offload']}`" if "offload" in values else ""
            cells.append("as it is" if options in ("", own) else options)
        lines.append([
            f"`{name}`", f"{_gib(eager.weights)} + {_gib(eager.activations)}", _measured(rows, case),
            " + ".join(_gib(size) for size in rest.encoders), *cells,
        ])  # fmt: skip
    head = ["preset", "transformer: weights + beside", "measured", "text encoders", *(f"{card} GB" for card in CARDS)]
    return head, lines


def _request(name: str, more: Mapping[str, object]) -> GenerationRequest:
    # dense: as much memory as with a static map, which need not be built for this; what offloading spares is in `peaks`
    plain = {"method": "dense", "offload": "none"}
    return request_from({**merge([preset_values([name]), plain, more]), "prompt": "any"})


def _estimate(name: str, more: Mapping[str, object]) -> Estimate:
    found = estimate(plan_request(_request(name, more)))
    if found is None:
        raise ValueError(f"Nobody has measured what {name} needs; leave it out of SHOWN.")
    return found


def _measured(rows: list[Row], case: str) -> str:
    """The peak of the newest row of Radial in eager blocks whose layers were all there; "" where there is none."""
    whole = [row for row in rows if (row["case"], row["contender"]) == (case, "radial-eager")]
    whole = [row for row in whole if row["layers_timed"] == row["layers"]]
    return _gib(1e9 * float(max(whole, key=lambda row: row["run"])["peak_gb"])) if whole else ""


def _gib(size: float) -> str:
    return f"{size / _GIB:.1f}"
