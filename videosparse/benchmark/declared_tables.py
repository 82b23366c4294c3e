"""Tables of what the code itself declares: the dimensions of VBench, and the presets of speed."""

from __future__ import annotations

from videosparse.benchmark.tables import Table


def dimensions() -> Table:
    """What `eval/score_videos.py` computes."""
    from videosparse.metrics.vbench import DIMENSIONS
    from videosparse.metrics.vbench.weights import NEEDED

    head = ["dimension", "", "how", "range", "weight", "weights needed"]
    return head, [
        [
            d.name, d.kind, d.formula, f"{d.minimum:g} to {d.maximum:g}", f"{d.weight:g} ({d.group})",
            " and ".join(NEEDED[k].name if NEEDED[k].is_file else NEEDED[k].source for k in d.models) or "none",
        ]
        for d in DIMENSIONS.values()
    ]  # fmt: skip


def speeds() -> Table:
    """What each speed combines."""
    from videosparse.generation.presets import SPEEDS

    lines = []
    for speed in SPEEDS.values():
        values = speed.values
        attention = values.get("method", "sparse, the method's defaults")
        if "quant" in values:
            attention = f"sparse, `quant={values['quant']}`"
        flags = {"compile": "compiled blocks", "linears": "`--linears {}`", "step_cache": "`--step-cache {}`"}
        beside = [text.format(values[key]) for key, text in flags.items() if key in values]
        lines.append([f"`{speed.name}`", str(attention), ", ".join(beside)])
    return ["preset", "attention", "beside it"], lines
