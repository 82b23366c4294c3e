"""Rows survive a killed run, are made once, and become one table."""

import errno
import json

import pytest

from videosparse.evaluation.table import RowStore, check_table_name, number, read_table, write_table
from videosparse.files import whole

COLUMNS, KEY = ("setting", "seed", "psnr_db"), ("setting", "seed")


def row(setting, seed, psnr=20.5):
    return {"setting": setting, "seed": seed, "psnr_db": psnr}


def test_rows_of_all_processes_become_one_table_in_order(tmp_path):
    output = tmp_path / "rows.csv"
    stores = [RowStore(output, COLUMNS, KEY, process) for process in range(2)]
    stores[1].add([row("radial", 1), row("dense", 1, None)])
    stores[0].add([row("dense", 0)])
    order = [("dense", "0"), ("dense", "1"), ("radial", "0"), ("radial", "1")]
    rows = stores[0].merge(order)
    assert [(r["setting"], r["seed"]) for r in rows] == [("dense", "0"), ("dense", "1"), ("radial", "1")]
    assert read_table(output, COLUMNS) == rows
    assert rows[1]["psnr_db"] == ""
    assert list(tmp_path.iterdir()) == [output], "no part is left"


def test_what_has_a_row_is_known_wherever_it_is(tmp_path):
    output = tmp_path / "rows.csv"
    first = RowStore(output, COLUMNS, KEY)
    first.add([row("dense", 0)])
    first.merge([])
    RowStore(output, COLUMNS, KEY, 3).add([row("dense", 1)])
    again = RowStore(output, COLUMNS, KEY)
    assert again.has(row("dense", 0))
    assert again.has(row("dense", 1))
    assert not again.has(row("dense", 2))
    assert len(again.merge([])) == 2


def test_a_torn_line_is_dropped_and_written_again(tmp_path):
    output = tmp_path / "rows.csv"
    store = RowStore(output, COLUMNS, KEY)
    store.add([row("dense", 0), row("dense", 1)])
    with store.own.open("a") as file:
        file.write('{"setting": "den')
    again = RowStore(output, COLUMNS, KEY)
    assert again.has(row("dense", 1))
    assert not again.has(row("den", 2))
    again.add([row("dense", 2)])
    assert [json.loads(line)["seed"] for line in again.own.read_text().splitlines()] == [0, 1, 2]


def test_damage_elsewhere_is_told(tmp_path):
    store = RowStore(tmp_path / "rows.csv", COLUMNS, KEY)
    store.folder.mkdir()
    store.own.write_text('{"setting"\n{"setting": "dense", "seed": 0}\n')
    with pytest.raises(ValueError, match=r"rows-0.jsonl is damaged .* delete it"):
        RowStore(tmp_path / "rows.csv", COLUMNS, KEY)
    store.own.unlink()
    store.output.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has no column setting"):
        RowStore(tmp_path / "rows.csv", COLUMNS, KEY)
    with pytest.raises(ValueError, match="cannot be read"):
        read_table(tmp_path / "none.csv")
    for cells in ("1", "1,2,3"):
        store.output.write_text(f"setting,seed\n0,0\n{cells}\n")
        with pytest.raises(ValueError, match="line 3 has not as many cells as the first"):
            read_table(store.output)


def test_parquet_has_numbers_and_reads_as_csv_does(tmp_path):
    arrow = pytest.importorskip("pyarrow.parquet")
    rows = [row("dense", 0, None), row("radial", 1, 20.5)]
    for name in ("rows.csv", "rows.parquet"):
        write_table(tmp_path / name, rows, COLUMNS)
    table = arrow.read_table(tmp_path / "rows.parquet")
    assert [str(field.type) for field in table.schema] == ["string", "int64", "double"]
    assert read_table(tmp_path / "rows.parquet", COLUMNS) == read_table(tmp_path / "rows.csv", COLUMNS)
    (tmp_path / "broken.parquet").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"broken.parquet cannot be read"):
        read_table(tmp_path / "broken.parquet")


def test_other_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.csv or \.parquet"):
        check_table_name(tmp_path / "rows.txt")


def test_cells_as_numbers():
    assert number({"a": "0.5"}, "a") == 0.5
    assert number({"a": ""}, "a") is None
    assert number({}, "a") is None


def test_parquet_keeps_every_text(tmp_path):
    """Numbers become numbers only where they are written the same way again: a commit may look like one."""
    pytest.importorskip("pyarrow")
    texts = {
        "commit": ["12e4567", "0012345"],
        "seed": ["3", str(2**70)],
        "psnr_db": ["20.5", "inf"],
        "drift": ["", "1"],
    }
    rows = [dict(zip(texts, cells, strict=True)) for cells in zip(*texts.values(), strict=True)]
    write_table(tmp_path / "rows.parquet", rows, list(texts))
    assert read_table(tmp_path / "rows.parquet") == rows


def test_a_cell_that_is_no_number_is_named():
    with pytest.raises(ValueError, match=r"Column psnr_db must hold numbers \(got 'abc'\)"):
        number({"psnr_db": "abc"}, "psnr_db")


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet"])
def test_a_table_that_cannot_be_written_leaves_nothing(tmp_path, name):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).mkdir()
    with pytest.raises(OSError, match=name):
        write_table(tmp_path / name, [row("dense", 0)], COLUMNS)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path):
    def full(part):
        part.write_text("half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: .*rows.csv"), whole(tmp_path / "rows.csv") as part:
        full(part)
    assert not list(tmp_path.iterdir())


KIND = ("model", "weights", "convention")


def kind_store(tmp_path, *kinds):
    """A store whose table has a row of each kind."""
    path = tmp_path / "rows.csv"
    write_table(path, [dict(zip(KIND, kind, strict=True)) | row("dense", n) for n, kind in enumerate(kinds)],
                (*COLUMNS, *KIND))  # fmt: skip
    return RowStore(path, (*COLUMNS, *KIND), KEY, fixed=("weights",), shared=("convention",))


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (
            ("wan", "b", "ours"),
            r"rows.csv has rows of wan with weights a, this run with weights b; use another",
        ),
        (("wan", "", "ours"), "rows of wan with weights a, this run with no weights; use another --output"),
        (("mochi", "c", "svg"), "has rows with convention ours, this run with convention svg; use another --output"),
    ],
)
def test_rows_of_another_kind_have_no_place_in_a_table(tmp_path, kind, told):
    store = kind_store(tmp_path, ("wan", "a", "ours"))
    store.check(dict(zip(KIND, ("mochi", "c", "ours"), strict=True)))
    with pytest.raises(ValueError, match=told):
        store.check(dict(zip(KIND, kind, strict=True)))


def test_a_table_of_two_kinds_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"rows of wan with weights a, others with weights b; keep the rows of one"):
        kind_store(tmp_path, ("wan", "a", "ours"), ("wan", "b", "ours"))
