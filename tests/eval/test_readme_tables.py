"""The program that writes tables into the pages, and what makers of tables have in common."""

from __future__ import annotations

import sys

import pytest
from eval_programs import load

from videosparse.benchmark.rows import write_rows
from videosparse.benchmark.tables import markdown, mean, ranged, split
from videosparse.evaluation.table import write_table

TABLE = (["size", "rule", "error"], [["a", "any", "1"], ["b", "any", "2"], ["a", "majority", "3"]])


@pytest.fixture
def program(tmp_path, monkeypatch):
    """The program on a repository of one page, whose only rows are those of the CPU."""
    tables = load("readme_tables")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "PAGES", ("page.md",))
    row = {"tokens": "2304", "density": "0.7", "dense_ms": "3", "sparse_ms": "2", "speedup": "1.5", "error": "1e-7"}
    write_rows(tmp_path / "cpu_attention.csv", [row])
    (tmp_path / "page.md").write_text("before\n<!-- table:cpu -->\nold\n<!-- /table -->\nafter\n")
    return tables


def run(tables, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["readme_tables.py", *arguments])
    return tables.main()


def test_a_table_is_split_by_its_first_column():
    assert markdown(TABLE).splitlines()[:3] == ["| size | rule | error |", "| --- | --- | --- |", "| a | any | 1 |"]
    assert split(TABLE).split("\n\n") == [
        "**a**", "| rule | error |\n| --- | --- |\n| any | 1 |\n| majority | 3 |",
        "**b**", "| rule | error |\n| --- | --- |\n| any | 2 |",
    ]  # fmt: skip


def test_a_column_that_is_empty_for_a_value_is_left_out():
    parts = split((["size", "rule", "error"], [["a", "any", ""], ["a", "all", ""], ["b", "any", "1"], ["b", "", "2"]]))
    assert parts == "**a**\n\n| rule |\n| --- |\n| any |\n| all |\n\n**b**\n\n" + markdown(
        (["rule", "error"], [["any", "1"], ["", "2"]])
    )


def test_a_table_without_lines_was_not_measured():
    assert markdown((["size"], [])) == "Not measured yet."
    assert split((["size"], [])) == ""


def test_cells_with_intervals():
    assert ranged({"x": "1", "x_low": "0", "x_high": "2"}, "x") == "1 (0 to 2)"
    assert mean([2.0, 2.0], 1) == "2.0 (2.0 to 2.0)"


def test_a_stale_page_is_told_and_then_written(program, tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    old = page.read_text()
    assert run(program, monkeypatch, "--check") == 1
    assert capsys.readouterr().err == "Out of date: page.md; run python eval/readme_tables.py\n"
    assert page.read_text() == old
    assert run(program, monkeypatch) == 0
    assert "| 2304 | 0.7 | 3 | 2 | 1.5x | 1e-7 |\n<!-- /table -->\nafter" in page.read_text()
    assert run(program, monkeypatch, "--check") == 0


def test_a_table_that_nobody_makes_is_named(program, tmp_path, monkeypatch):
    (tmp_path / "page.md").write_text("<!-- table:cpus -->\n<!-- /table -->\n")
    with pytest.raises(SystemExit, match="Unknown table 'cpus'; there are figure, "):
        run(program, monkeypatch)


def test_rows_of_which_no_table_can_be_made_are_one_line_and_the_page_stays(program, tmp_path, monkeypatch):
    old = (tmp_path / "page.md").read_text()
    for text, said in (
        ("tokens,density\n1,1\n", "Table cpu: cpu_attention in .* has no column or row 'dense_ms'"),
        ("tokens,density\n1\n", "cpu_attention.csv cannot be read"),
    ):
        (tmp_path / "cpu_attention.csv").write_text(text)
        with pytest.raises(ValueError, match=said):
            run(program, monkeypatch)
        assert (tmp_path / "page.md").read_text() == old


def test_every_table_of_rows_says_so_where_there_are_none(program):
    """But for those that list what there is to measure, and those made of the code itself."""
    listed = {name for name, (files, *_) in program.TABLES.items() if not files} | {
        "cards",
        "published",
        "models",
        "model_steps",
    }
    told = {name for name in program.TABLES if program.made(name) == "Not measured yet."}
    assert told >= set(program.TABLES) - listed - {"cpu"}


def test_methods_by_size_with_intervals(program, tmp_path):
    size = {"model": "tiny", "height": "128", "width": "128", "steps": "20", "guidance": "4", "block": "64x64"}
    video = {"method": "radial", "setting": "radial", "prompt": "a", "seed": "0", "video_density": "0.44", **size}
    write_rows(tmp_path / "method_comparison.csv", [
        {**video, "frames": "33", "psnr_db": "30", "all_right": "1"},
        {**video, "frames": "33", "psnr_db": "30", "all_right": "1", "prompt": "b"},
        {**video, "frames": "81", "psnr_db": "20", "all_right": ""},
    ])  # fmt: skip
    titles = [line for line in program.made("methods").splitlines() if line.startswith("**")]
    assert titles == [
        "**PSNR against dense, dB**", "**all that the prompt says is right, %**",
        *(f"**{frames}x128x128: {what}**" for frames in (33, 81)
          for what in ("likeness to dense", "what detectors see", "dimensions of VBench")),
    ]  # fmt: skip
    assert "| radial | 1 | 0.4400 | - | 20.0 (20.0 to 20.0) | - | - |" in program.made("fidelity")


def test_rows_may_be_parquet(program, tmp_path):
    pytest.importorskip("pyarrow")
    row = {"model": "tiny", "frames": "81", "height": "128", "width": "128", "steps": "20", "guidance": "4"}
    row |= {"method": "radial", "setting": "radial", "prompt": "a", "seed": "0", "video_density": "0.44", "block": "64"}
    write_table(tmp_path / "method_comparison.parquet", [{**row, "psnr_db": "20"}], [*row, "psnr_db"])
    assert "| radial | 1 | 0.4400 | - | 20.0 (20.0 to 20.0) | - | - |" in program.made("fidelity")
