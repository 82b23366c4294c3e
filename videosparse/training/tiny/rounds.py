"""The rounds of training that made a set of weights, so that the model card can add them up.

A round is one schedule from warm-up to a rate of zero, in as many calls as it takes. `meta` is the state of a run:
`rounds` holds the past ones, `vae`, `dit`, `spent_before` and `device` describe the present one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from videosparse.training.tiny.plan import Plan


def listing(words: Sequence[Any]) -> str:
    """Words as in a sentence: `33, 17 and 1`; empty without words."""
    *first, last = (str(word) for word in words or [""])
    return f"{', '.join(first)} and {last}" if first else last


def describe_stages(plan: Plan, counts: dict[str, int]) -> str:
    """What the DiT was trained on: steps, size and frames of every stage that was begun."""
    sizes = {pool.name: pool.size for pool in plan.pools}
    parts = []
    for index, count in sorted(counts.items(), key=lambda item: int(item[0])):
        shapes = plan.stages[int(index)][1]
        size = listing([f"{s}x{s}" for s in dict.fromkeys(sizes[shape.pool] for shape in shapes)])
        frames = listing(list(dict.fromkeys(4 * shape.latent_frames - 3 for shape in shapes)))
        parts.append(f"{count:,} steps at {size} with {frames} frames")
    return listing(parts)


def present_round(meta: dict[str, Any]) -> dict[str, Any] | None:
    """The round that a state is in, or nothing before its first step."""
    vae, dit = meta.get("vae", {}), meta.get("dit", {})
    what = []
    if vae.get("step"):
        how = f", {vae['how']}" if "how" in vae else ""
        what.append(f"VAE: {vae['step']:,} steps in {vae['elapsed'] / 60:.1f} minutes, rate {vae['lr']:g}{how}")
    if dit.get("step"):
        what.append(f"DiT: {dit['what']} in {dit['elapsed'] / 60:.1f} minutes, {dit['how']}")
    steps = {"vae": vae.get("step", 0), "dit": dit.get("step", 0)}
    clock = {"minutes": round(meta["spent_before"], 2), "device": meta["device"]} if what else None
    if decoder := meta.get("decoder"):
        steps["decoder"] = decoder["step"]
        what.append(describe_decoder(decoder, beside=bool(what)))
        # beside the rest it adds no minutes
        clock = clock or {"minutes": round(decoder["minutes"], 2), "device": decoder["device"]}
    return {"what": "; ".join(what), "steps": steps} | clock if clock else None


def describe_decoder(decoder: dict[str, Any], beside: bool) -> str:
    """What was done to the decoder alone; `beside` the rest of a round it had a device of its own."""
    where = f"beside the DiT, on another {decoder['device']}, " if beside else ""
    trained = f"{decoder['step']:,} steps in {decoder['elapsed'] / 60:.1f} minutes"
    return f"the VAE's decoder alone: {where}{trained}, rate {decoder['lr']:g}, {decoder['how']}"


def all_rounds(meta: dict[str, Any]) -> list[dict[str, Any]]:
    """The past rounds and the present one."""
    now = present_round(meta)
    return [*meta.get("rounds", []), *([now] if now else [])]


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The rounds, their minutes and steps in all, and where they ran, as `training.json` has them."""
    return {
        "rounds": rounds,
        "minutes": round(sum(entry["minutes"] for entry in rounds), 2),
        "steps": {name: sum(entry["steps"].get(name, 0) for entry in rounds) for name in ("vae", "dit", "decoder")},
        "device": listing(list(dict.fromkeys(entry["device"] for entry in rounds))) if rounds else "none",
    }


def begin_round(meta: dict[str, Any], keep_vae: bool) -> None:
    """Close the present round: all weights stay, schedules and clock start anew.

    Unless the VAE is kept as it is, so do the statistics of the latents, and the VAE's numbers are dropped.
    """
    meta["rounds"] = all_rounds(meta)
    fresh = {"step": 0, "elapsed": 0.0, "finished": False}
    if "dit" in meta:
        meta["dit"] = dict(fresh)
    numbers = meta.pop("numbers", {})
    if keep_vae:
        meta["vae"] = meta["vae"] | {"step": 0, "elapsed": 0.0}
        meta["numbers"] = {k: v for k, v in numbers.items() if k == "vae_psnr"}
    else:
        if "vae" in meta:
            meta["vae"] = dict(fresh)
        for key in ("latents_mean", "latents_std"):
            meta.pop(key, None)
    meta["spent_before"] = 0.0
