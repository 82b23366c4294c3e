"""The tables of a comparison on the page of results, from a few rows."""

import pytest

from videosparse.evaluation.method_table import (
    PAIRS,
    SIZES,
    earlier_weights,
    fidelity,
    gains,
    methods,
    missing_sizes,
    paro_videos,
    side_by_side,
)
from videosparse.evaluation.settings import parse_setting

SETTINGS = {
    # setting: method, quant, density, PSNR
    "dense": ("dense", "", "1.0", ""),
    "ceiling": ("ceiling", "", "", ""),
    "other noise": ("other-noise", "", "1.0", "14"),
    "radial": ("radial", "", "0.4436", "35"),
    "radial, int8": ("radial", "int8", "0.4436", "34"),
    "adaspa 0.2": ("adaspa", "", "0.2", "31"),
    "adaspa 0.2, head_adaptive=no": ("adaspa", "", "0.2", "30"),
    "random 0.5": ("random", "", "0.5", "24"),
    "paro 0.5": ("paro", "", "0.5", "36"),
    "paro 0.5, raster order": ("paro-raster", "", "0.5", "33"),
    "paro 0.2, int8": ("paro", "int8", "0.2", "29"),
}

NAMES = {
    parse_setting(text).name
    for text in (
        *[
            "radial",
            "radial+int8",
            "adaspa@radial",
            "adaspa@0.2",
            "adaspa@0.1",
            "random@radial",
            "random@0.2",
            "random@0.1",
        ],
        *["adaspa@0.2:head_adaptive=no", "adaspa@0.2:refresh=never", "adaspa@0.2:block=128x64", "paro@radial"],
        *(f"{method}@{density}" for method in ("paro", "paro-mass", "paro-raster") for density in (0.5, 0.3, 0.2)),
        *["paro@0.5+int8", "paro@0.2+int8", "paro@0.2+int8-fp8"],
    )
}


@pytest.fixture
def rows():
    """Two prompts of every setting at 81 frames, and three settings at 33 frames of another shape."""
    found = []
    for frames, height, width, settings in (("81", "128", "128", SETTINGS), ("33", "120", "136", list(SETTINGS)[1:4])):
        size = {"model": "tiny", "frames": frames, "height": height, "width": width, "steps": "20", "block": "64x64"}
        for setting in settings:
            method, quant, density, psnr = SETTINGS[setting]
            for number, prompt in enumerate(("a red circle", "a blue star")):
                found.append({
                    **size, "guidance": "4.0", "setting": setting, "method": method, "quant": quant, "prompt": prompt,
                    "seed": str(1000 * (setting == "other noise")), "video_density": density,
                    "average_density": density, "psnr_db": psnr and str(float(psnr) + 2 * number), "ssim": "0.9",
                    "latent_l1": "0.1", "all_right": str(int(setting != "radial" and number == 0)),
                    "colour_right": "1", "shape_right": str(number), "motion_right": "", "permanence": "0.985",
                    "temporal_flickering": "0.9877", "motion_smoothness": "0.99", "dynamic_degree_dis": "1",
                })  # fmt: skip
    return found


def test_sizes_stand_side_by_side(rows):
    """Only what is there at more than one size, with what was not measured as a dash."""
    likeness, truth = side_by_side(rows).split("\n\n**all that")
    assert likeness.splitlines() == [
        "**PSNR against dense, dB**",
        "",
        "|  | 33x120x136 | 81x128x128 |",
        "| --- | --- | --- |",
        "| video density of Radial | 0.4436 | 0.4436 |",
        "| other noise | 15.0 (14.0 to 16.0) | 15.0 (14.0 to 16.0) |",
        "| radial | 36.0 (35.0 to 37.0) | 36.0 (35.0 to 37.0) |",
    ]
    assert "| ceiling | 50 (0 to 100) | 50 (0 to 100) |" in truth
    assert "adaspa" not in likeness + truth
    one = side_by_side([row for row in rows if row["frames"] == "81"])
    assert "| adaspa 0.2, equal heads | 31.0 (30.0 to 32.0) |" in one


def test_every_size_has_likeness_and_what_its_videos_show(rows):
    parts = methods(rows).split("\n\n")
    whats = ("likeness to dense", "what detectors see", "dimensions of VBench")
    assert parts[::2] == [f"**{size}: {what}**" for size in ("33x120x136", "81x128x128") for what in whats]
    likeness, shown, dimensions = (part.splitlines() for part in parts[7::2])
    assert len(likeness) == 2 + len(SETTINGS) - 2, "dense and the ceiling have no dense twin"
    assert (
        "| radial | 2 | 0.4436 | 0.4436 | 36.0 (35.0 to 37.0) | 0.900 (0.900 to 0.900) | 0.100 (0.100 to 0.100) |"
        in (likeness)
    )
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in shown[2:]}
    assert list(cells) == [
        "dense", "ceiling", "other noise", "random 0.5", "paro 0.5", "paro 0.5, raster order", "radial",
        "radial, int8", "adaspa 0.2", "adaspa 0.2, equal heads", "paro 0.2, int8",
    ], "anchors, then the densest first"  # fmt: skip
    assert cells["radial"][1:6] == ["0 (0 to 0)", "-50 (-100 to +0)", "100 (100 to 100)", "50 (0 to 100)", "-"]
    assert cells["dense"][2] == "-", "nothing beside itself"
    assert cells["other noise"][2] == "-", "other seeds are not paired"
    assert "| radial | 98.77 (98.77 to 98.77) | 99.00 (99.00 to 99.00) | 100 (100 to 100) |" in dimensions
    assert cells["ceiling"][2] == "+0 (+0 to +0)"


def test_pages_of_single_methods_take_their_settings_of_the_usual_size(rows):
    """The densest first; integers stand with PAROAttention's plans only."""
    assert [line[0] for line in fidelity(rows)[1]] == [
        "other noise", "random 0.5", "radial", "adaspa 0.2", "adaspa 0.2, equal heads",
    ]  # fmt: skip
    assert [line[0] for line in paro_videos(rows)[1]] == [
        "random 0.5", "paro 0.5", "paro 0.5, raster order", "paro 0.2, int8",
    ]  # fmt: skip
    assert {line[1] for line in fidelity(rows)[1]} == {"2"}, "no video of another size"


def test_gains_are_differences_prompt_by_prompt(rows):
    """An interval of no width where every prompt gains the same, though PSNR differs among prompts."""
    found = {line[0]: line[1:] for line in gains(rows)[1]}
    zero = "+0 (+0 to +0)"
    assert found == {
        "each head its own density": [
            "adaspa 0.2", "adaspa 0.2, equal heads", "+1.00 (+1.00 to +1.00)", zero, "+0.56",
        ],
        "token orders": ["paro 0.5", "paro 0.5, raster order", "+3.00 (+3.00 to +3.00)", zero, "+2.8"],
        "queries and keys as INT8": ["radial, int8", "radial", "-1.00 (-1.00 to -1.00)", "+50 (+0 to +100)", "-"],
    }  # fmt: skip


def test_the_pairs_are_settings_as_the_program_names_them():
    for _, *pair, _ in PAIRS:
        for name in pair:
            assert name in NAMES, name


def test_sizes_of_earlier_weights_are_named(rows):
    now = {"run": "2026-11-23T00:00:00Z", "weights": "sha256:b"}
    before = {"run": "2026-11-22T00:00:00Z", "weights": "sha256:a", "frames": "33", "height": "120", "width": "136"}
    mixed = [{**rows[0], **now}, {**rows[0], **before}]
    assert earlier_weights(mixed) == "Of the model before its last rounds of training: 33x120x136."
    assert earlier_weights(mixed[:1]) == earlier_weights(rows) == earlier_weights([]) == ""


def test_sizes_without_rows_are_named(rows):
    assert missing_sizes(rows) == "Not measured yet: 161x128x128, 321x128x128."
    every = [{**rows[0], "frames": f, "height": h, "width": w} for f, h, w in (size.split("x") for size in SIZES)]
    assert missing_sizes(every) == ""


def test_nothing_was_measured():
    assert side_by_side([]) == methods([]) == ""
    assert fidelity([])[1] == paro_videos([])[1] == gains([])[1] == []
