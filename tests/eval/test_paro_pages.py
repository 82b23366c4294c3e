"""Tables and figure of PAROAttention and integers, from a few rows."""

from pathlib import Path

import pytest
from eval_programs import load

from videosparse.benchmark.rows import write_rows

ROOT = Path(__file__).parents[2]
WAN = "wan2.1-14b 720x1280x81"


@pytest.fixture
def results(tmp_path):
    """A folder of rows as the programs write them."""
    ranged = {"error": "0.1", "error_low": "0.09", "error_high": "0.11", "recall": "0.8", "cosine_worst": "0.9995"}
    judged = {"frames": "81", "calls": "96", "asked_density": "0.3", "density": "0.3095", **ranged}
    write_rows(tmp_path / "reordering.csv", [
        {**judged, "method": "raster, static", "quant": ""},
        {**judged, "method": "reordered, static", "quant": "", "error": "0.05"},
        {**judged, "method": "reordered, static", "quant": "int8", "error": "0.06"},
        {**judged, "method": "dense", "quant": "int8", "asked_density": "1.0", "density": "1.0", "error": "0.01"},
    ])  # fmt: skip
    size = {"model": "tiny", "frames": "81", "height": "128", "width": "128", "steps": "20", "guidance": "4"}
    video = {
        "ssim": "0.95",
        "latent_l1": "0.1",
        "video_density": "0.3095",
        "average_density": "0.45",
        "all_right": "1",
        **size,
    }
    settings = [
        ("random 0.3", "random", "", "20"), ("paro 0.3", "paro", "", "30"), ("paro 0.3", "paro", "", "34"),
        ("paro 0.3, raster order", "paro-raster", "", "28"), ("paro 0.3, int8", "paro", "int8", "31"),
    ]  # fmt: skip
    rows = [
        {**video, "setting": setting, "method": method, "quant": quant, "psnr_db": psnr, "block": "64x64"}
        for setting, method, quant, psnr in settings
    ]
    others = [{**rows[1], "frames": "33", "psnr_db": "90"}, {**rows[1], "setting": "radial", "method": "radial"}]
    write_rows(tmp_path / "method_comparison.csv", [*rows, *others])
    calls = [
        ("cudnn", "dense", "1.0000", "200", ""), ("ours", "dense", "1.0000", "180", "1e-3"),
        ("int8", "dense", "1.0000", "160", "0.012"), ("ours", "uniform", "0.3000", "60", "1e-3"),
        ("int8", "uniform", "0.3000", "50", "0.011"), ("quantize int8", "dense", "1.0000", "0.61", "0.007"),
    ]  # fmt: skip
    # of the dense calls one has a single stretch, and one is of before there were several
    repeated = {
        ("ours", "60"): ("55", "5", "1500"), ("int8", "50"): ("44", "5", "1700"),
        ("quantize int8", "0.61"): ("0.6", "2", "1800"), ("ours", "180"): ("170", "", "1490"),
        ("int8", "160"): ("150", "1", "1690"),
    }  # fmt: skip
    columns = ("steady_ms", "stretches", "sm_mhz")
    write_rows(tmp_path / "attention.csv", [
        {
            "set": f"forward {WAN} integers", "case": WAN, "kernel": kernel, "policy": policy, "density": density,
            "p50_ms": ms, "error": error, "run": "2",
        } | dict(zip(columns, repeated.get((kernel, ms), ("", "", "")), strict=True))
        for kernel, policy, density, ms, error in calls
    ] + [
        {
            "set": f"forward {WAN} integers", "case": WAN, "kernel": "int8", "policy": "uniform", "density": "0.3000",
            "p50_ms": "40", "error": "0.011", "run": "1",
        },
    ] + [
        {
            "set": f"forward {WAN} integer values", "case": WAN, "kernel": kernel, "policy": "uniform",
            "density": "0.3000", "p50_ms": ms, "error": "1e-3", "run": "1",
        }
        for kernel, ms in (("ours", "66"), ("int8-int8", "88"))
    ])  # fmt: skip
    write_rows(tmp_path / "integer_errors.csv", [
        {"inputs": inputs, "quant": quant, "error": error, "error_worst": "0.0312"}
        for inputs in ("normal", "hard") for quant, error in (("int8", "0.011"), ("int8-int8", "0.0156"))
    ])  # fmt: skip
    parts = [
        ("norm", "raster", "1.0"), ("norm", "ordered", "1.2"), ("values", "ordered", "0.7"),
        ("attention", "raster", "40.0"), ("attention", "ordered", "39.9"), ("sum", "ordered", "0.8"),
    ]  # fmt: skip
    write_rows(tmp_path / "reorder.csv", [
        {"case": WAN, "part": part, "form": form, "p50_ms": ms, "percent": "2.00" if part == "sum" else ""}
        for part, form, ms in parts
    ])  # fmt: skip
    common = {"prompts": "2", "steps": "50"}
    write_rows(tmp_path / "paro_calibration.csv", [
        {"case": "tiny", "kind": "measured", "part": "all", "total_s": "12.34", "plan_mb": "0.2", **common},
        {"case": WAN, "kind": "extrapolated", "part": "dense forward", "total_s": "2400", "plan_mb": "", **common},
        {"case": WAN, "kind": "extrapolated", "part": "plan read", "total_s": "", "plan_mb": "", **common},
        {"case": WAN, "kind": "extrapolated", "part": "all", "total_s": "2500", "plan_mb": "839.6", **common},
    ])  # fmt: skip
    return tmp_path


def test_tables(results, monkeypatch):
    tables = load("readme_tables")
    monkeypatch.setattr(tables, "RESULTS", results)
    assert "| reordered, static | int8 | 0.8, 0.06 |" in tables.made("reordering")
    assert "dense" not in tables.made("reordering")
    assert "| int8 | 81 | 96 | 0.01 (0.09 to 0.11) | 0.9995 |" in tables.made("rounding")
    videos = tables.made("paro_videos")
    assert "| paro 0.3 | 2 | 0.3095 | 0.4500 | 32.0 (30.0 to 34.0) |" in videos
    assert "radial" not in videos
    assert "90" not in videos
    lines = tables.made("integers").splitlines()
    assert "| fastest dense, videosparse | 1.000 | 180.0 |  |  |  |  |  |  |" in lines
    assert "| bf16 | 1.0000 | 180.0 | 1.00x | 1.00x |  |  |  |  |" in lines, "repeated before calls took turns"
    assert "| INT8 | 1.0000 | 160.0 | 1.12x | 1.12x | 0.012 |  |  |  |" in lines, "repeated in a single stretch"
    assert "| INT8 | 0.3000 | 50.0 | 1.20x | 3.60x | 0.011 | 44.0 | 1.25x | 1700 |" in lines
    values = "| INT8, INT8 values | 0.3000 | 88.0 | 0.75x |  | 1e-3 |  |  |  |"
    assert values in lines, "beside bf16 of its own set, and beside no dense call of another run"
    assert lines[-1] == "| rounding alone, INT8 |  | 0.61 |  |  | 0.007 | 0.60 |  | 1800 |"
    assert "| hard | 1.10% (3.12%) | 1.56% (3.12%) |" in tables.made("integer_errors")
    assert f"| {WAN} | 40.0 ms | +0.20 ms | +0.70 ms | -0.10 ms | 2.00 % |" in tables.made("reorder_cost")
    line = f"| {WAN} | extrapolated | 2 | 50 | 2500 s | dense forward, 2400 s | 839.6 MB |"
    assert line in tables.made("calibration")
    assert "| 0.3 | int8 | 5.72x | - | 3.60x | 31.0 (31.0 to 31.0) |" in tables.made("published")
    assert "| 0.5, no reordering | 16 bits | - | 26.3 | - | - |" in tables.made("published")


def test_what_was_not_measured_is_said(results, monkeypatch):
    tables = load("readme_tables")
    monkeypatch.setattr(tables, "RESULTS", results)
    rows = [row | {"set": "forward of another set"} for row in tables.read("attention")]
    write_rows(results / "attention.csv", rows)
    for name in ("integer_errors", "reordering", "reorder", "paro_calibration"):
        (results / f"{name}.csv").unlink()
    for name in ("integers", "integer_errors", "reordering", "rounding", "reorder_cost", "calibration"):
        assert tables.made(name) == "Not measured yet."
    assert "| 0.3 | int8 | 5.72x | - | - | 31.0 (31.0 to 31.0) |" in tables.made("published")
    assert "| 0.3 | 16 bits | 2.71x | 22.9 | - | 32.0 (30.0 to 34.0) |" in tables.made("published")


def test_the_figure_of_all_methods_is_drawn(results, tmp_path):
    """Only with what has rows: a table without ceiling and without longer videos is enough."""
    pytest.importorskip("matplotlib")
    plots = load("plot_methods")
    rows = str(results / "method_comparison.csv")
    groups = [group for size in plots.sizes_of(plots.read_table(Path(rows))) for group in size.groups]
    found = plots.by_density(groups, "psnr_db", 1)
    assert set(found) == {"random", "paro", "paro-raster", "radial"}
    assert (0.3095, (32.0, 30.0, 34.0)) in found["paro"]
    assert plots.main(["--rows", rows, "--output", str(tmp_path / "methods.png")]) == 0
    assert (tmp_path / "methods.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="cannot be read"):
        plots.main(["--rows", str(results / "none.csv")])


def test_the_figure_is_drawn(results, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    plots = load("plot_reordering")
    files = ["--errors", str(results / "reordering.csv"), "--videos", str(results / "method_comparison.csv")]
    assert plots.main([*files, "--output", str(tmp_path / "reordering.png")]) == 0
    assert (tmp_path / "reordering.png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        plots.main(["--errors", str(results / "none.csv")])
    assert "cannot be read" in capsys.readouterr().err
