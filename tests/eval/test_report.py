"""The page about a comparison: what is in it, and that it works in a browser of the system's packages."""

import base64
import importlib.util
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("scipy")

from videosparse.benchmark.rows import WHERE
from videosparse.evaluation.maps import mosaic, png_of
from videosparse.evaluation.prompts import load_prompts
from videosparse.evaluation.table import read_table, write_table
from videosparse.evaluation.work import COLUMNS
from videosparse.generation.video import write_mp4
from videosparse.metrics.bootstrap import interval
from videosparse.synthetic.render import render

ROOT = Path(__file__).parents[2]
FRAMES, FPS = 33, 16
SETTINGS = {
    "dense": ("dense", "", "", 1.0, None),
    "ceiling": ("ceiling", "", "", None, None),
    "other noise": ("other-noise", "", "", 1.0, 14.0),
    "radial": ("radial", "", "", 0.44, 35.0),
    "adaspa, density of radial": ("adaspa", 0.44, "", 0.44, 39.0),
    "adaspa 0.2": ("adaspa", 0.2, "", 0.2, 31.0),
    "paro 0.2, int8": ("paro", 0.2, "int8", 0.2, 33.0),
    "random 0.2": ("random", 0.2, "", 0.2, 20.0),
}


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def program():
    return load("report", ROOT / "eval" / "report.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows of two sizes and eight settings, and for one size videos of two prompts: rendered, not generated."""
    import torch

    path = tmp_path_factory.mktemp("comparison")
    prompts = load_prompts(ROOT / "eval/prompts/world64.json")[:4]
    videos = render([p.scene() for p in prompts[:2]], FRAMES, 64, 64).transpose(1, 2)
    rows = []
    for frames in (FRAMES, 81):
        for setting, (method, asked, quant, density, psnr) in SETTINGS.items():
            for number, prompt in enumerate(prompts):
                row = {
                    "model": "tiny-wan", "setting": setting, "prompt": prompt.prompt, "seed": prompt.seed,
                    "frames": frames, "height": 64, "width": 64, "steps": 20, "guidance": 4.0, "block": "64x64",
                    "first_steps": 0.2, "method": method, "asked_density": asked, "quant": quant, "tokens": 2304,
                    "video_density": density, "average_density": density and 0.2 + 0.8 * density,
                    "denoise_seconds": density and 0.1 + density, "psnr_db": psnr and psnr + number,
                    "ssim": psnr and 0.9 + number / 100, "all_right": int(number > 0), "permanence": 0.9,
                    "colour_error": 3.0, "temporal_flickering": 0.98, **dict.fromkeys(WHERE, "here <&>"),
                }  # fmt: skip
                for q in range(1, 5):
                    row |= {f"psnr_db_q{q}": psnr and psnr - q, f"permanence_q{q}": 1 - q / 20}
                if frames == 81:
                    row["drift"] = "0:1.0 2:0.9 3.0625:0.8"
                if frames == FRAMES and number < 2:
                    row["video"] = f"{number}/{method}-{asked}.mp4"
                    (path / row["video"]).parent.mkdir(exist_ok=True)
                    write_mp4(path / row["video"], videos[number], FPS)
                if frames == FRAMES and number == 0 and method in ("radial", "adaspa"):
                    row |= {"map": f"{method}.png", "map_shows": "all layers, all heads, blocks of 64x64"}
                    (path / row["map"]).write_bytes(png_of(mosaic([[torch.eye(9).bool()]])))
                rows.append(row)
    write_table(path / "rows.csv", rows, COLUMNS)
    return path


@pytest.fixture(scope="module")
def page(program, folder):
    path = folder / "report.html"
    command = [str(folder / "rows.csv"), "--videos", str(folder), "--output", str(path), "--title", "Two & a half"]
    assert program.main(command) == 0
    return path


class Balance(HTMLParser):
    """Tags that are open, and ids that were seen."""

    VOID = {"meta", "link", "input", "img", "line", "circle", "polyline", "br"}

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.ids += [named["id"]] if "id" in named else []
        self.links += [v for k, v in attrs if k in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_holds_everything(page):
    text = page.read_text()
    found = Balance()
    found.feed(text)
    assert found.open == []
    assert len(found.ids) == len(set(found.ids))
    assert all(link.startswith(("#", "data:")) for link in found.links), "nothing is loaded from elsewhere"
    assert not re.search(r"https?://(?!www\.w3\.org)", text)
    assert all(link[1:] in found.ids for link in found.links if link.startswith("#"))
    assert "<title>Two &amp; a half</title>" in text
    assert "here &lt;&amp;&gt;" in text
    low, high = interval([35, 36, 37, 38])[1:]
    assert f"<td>36.5<small>{low:.1f} to {high:.1f}</small></td>" in text
    assert "<td>75 %<small>" in text
    assert text.count("<svg viewBox") > 10
    assert text.count("<figcaption>Drift</figcaption>") == 1, "of the longer videos"
    assert text.count('<img src="data:image/png') == 3


def test_a_page_without_videos(program, folder, tmp_path):
    path = tmp_path / "report.html"
    assert program.main([str(folder / "rows.csv"), "--output", str(path)]) == 0
    assert 'id="players"' not in path.read_text()


def test_what_is_missing_is_told(program, folder, tmp_path, capsys):
    path = tmp_path / "report.html"
    assert program.main([str(folder / "rows.csv"), "--videos", str(tmp_path), "--output", str(path)]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert program.main([str(tmp_path / "none.csv"), "--output", str(path)]) == 2
    (tmp_path / "empty.csv").write_text(",".join(COLUMNS) + "\n")
    assert program.main([str(tmp_path / "empty.csv"), "--output", str(path)]) == 2
    assert "has no rows" in capsys.readouterr().err
    assert program.main([str(folder / "rows.csv"), "--output", str(tmp_path / "empty.csv" / "report.html")]) == 2
    assert "is not a folder; choose another folder" in capsys.readouterr().err
    assert program.main([str(folder / "rows.csv"), "--output", str(tmp_path)]) == 2
    assert "it is a folder; choose another name" in capsys.readouterr().err
    assert program.main([str(folder / "rows.csv"), "--videos", str(path), "--output", str(path)]) == 2
    assert "is no folder; give the one that --keep-videos made" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == [tmp_path / "empty.csv"], "no page, and no part of one"


def test_a_page_replaces_no_table(program, folder, tmp_path, capsys):
    table = tmp_path / "rows.csv"
    table.write_bytes((folder / "rows.csv").read_bytes())
    (tmp_path / "page.html").hardlink_to(table)
    (tmp_path / "there.html").symlink_to(table)
    (tmp_path / "rows").write_bytes(table.read_bytes())
    for rows, output, told in (
        ("rows.csv", "rows.csv", "is the name of a table"),
        ("rows.csv", "new.parquet", "is the name of a table"),
        ("rows.csv", "page.html", "which it would replace; use another name"),
        ("rows.csv", "there.html", "which it would replace; use another name"),
        ("rows", "../" + tmp_path.name + "/rows", "which it would replace; use another name"),
    ):
        before = sorted(path.name for path in tmp_path.iterdir())
        assert program.main([str(tmp_path / rows), "--output", str(tmp_path / output)]) == 2
        assert told in capsys.readouterr().err
        assert (tmp_path / rows).read_bytes() == (folder / "rows.csv").read_bytes()
        assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.fixture
def told(program, folder, tmp_path, capsys):
    """What is said of tables with changed rows: `told(change, ...)` writes a table for each function of a list."""

    def run(*changes, videos=()):
        paths = [tmp_path / f"{number}.csv" for number in range(len(changes))]
        for path, change in zip(paths, changes, strict=True):
            rows = read_table(folder / "rows.csv")
            change(rows)
            write_table(path, rows, COLUMNS)
        code = program.main([*map(str, paths), "--output", str(tmp_path / "page.html"), *videos])
        said = capsys.readouterr()
        assert (tmp_path / "page.html").exists() == (code == 0)
        return said.out if code == 0 else said.err.replace(f"{tmp_path}/", "")

    return run


@pytest.mark.parametrize(
    ("column", "text", "expected"),
    [
        ("psnr_db", "abc", "a number or empty"),
        ("psnr_db", "nan", "a number or empty"),
        ("ssim", "inf", "a number or empty"),
        ("tokens", "many", "a whole number or empty"),
        ("frames", "5.5", "a whole number"),
        ("drift", "0:1.0 2", "seconds:cosine pairs"),
    ],
)
def test_a_cell_that_is_no_number_is_found(told, column, text, expected):
    said = told(lambda rows: rows[2].update({column: text}))
    assert said.startswith(f"Error: 0.csv, row 3, column {column} must hold {expected} (got ")
    assert said.count("\n") == 1


def test_the_psnr_of_equal_frames_is_shown(told):
    assert told(lambda rows: rows[2].update(psnr_db="inf"))


def test_a_video_of_two_tables_counts_once(told, tmp_path):
    assert told(lambda rows: None).startswith(f"{tmp_path}/page.html: 64 rows")
    alone = (tmp_path / "page.html").read_text()
    assert told(lambda rows: None, lambda rows: [row.update(commit="b", seconds="9") for row in rows])
    assert (tmp_path / "page.html").read_text() == alone
    (tmp_path / "page.html").unlink()
    said = told(lambda rows: None, lambda rows: rows[4].update(ssim="0.5"))
    assert "0.csv, row 5 and " in said
    assert "1.csv, row 5 are of one video (ceiling, seed " in said
    assert "'' and '0.5'; give tables of one comparison" in said


@pytest.mark.parametrize(("column", "of"), [("weights", " of tiny-wan"), ("dtype", " of tiny-wan"), ("convention", "")])
def test_tables_of_two_kinds_are_not_one_page(told, column, of):
    def change(value):
        return lambda rows: [row.update({column: value, "steps": value}) for row in rows]

    said = told(change("a"), change("b"))
    assert f"0.csv has rows{of} with {column} a, 1.csv with {column} b; a page shows rows of one kind" in said


@pytest.mark.parametrize("column", ["video", "map"])
@pytest.mark.parametrize("name", ["../secret", "/etc/passwd"])
def test_files_beyond_the_folder_of_videos_are_not_opened(told, folder, tmp_path, column, name):
    (tmp_path / "secret").write_text("of others")
    (tmp_path / "videos").mkdir()

    def change(rows):
        for row in rows:
            row.update(video="", map="")
        rows[0][column] = name

    said = told(change, videos=("--videos", str(tmp_path / "videos")))
    assert f"A row names {name!r}, which is not in --videos videos" in said


TIMES = "[...document.querySelectorAll('video')].map((video) => video.currentTime)"

# how far apart the videos are, over a second of the page's own clock
SPREADS = f"""new Promise((done) => {{
    const spreads = [], end = performance.now() + 1000;
    const look = () => {{
        const times = {TIMES};
        spreads.push(Math.max(...times) - Math.min(...times));
        performance.now() < end ? requestAnimationFrame(look) : done(spreads);
    }};
    look();
}})"""


@pytest.fixture(scope="module")
def browser_module():
    module = load("browser", ROOT / "tests" / "browser.py")
    if module.find_browser() is None:
        pytest.skip("no Chromium is installed (apt-get install chromium): the page was not opened")
    pytest.importorskip("websockets")
    return module


def test_videos_play_together_and_follow_the_slider(page, browser_module):
    with browser_module.Browser() as browser:
        browser.open(page)
        browser.wait("document.querySelectorAll('video').length === 5")
        browser.wait("[...document.querySelectorAll('video')].every((video) => video.readyState >= 2)")
        assert browser.run(TIMES) == pytest.approx([0.5 / FPS] * 5, abs=1e-3)

        browser.run("document.getElementById('play').click()")
        browser.wait(f"{TIMES}[0] > 0.5")
        spreads = sorted(browser.run(SPREADS))
        assert spreads[len(spreads) * 9 // 10] <= 1 / FPS, "in step within a frame, but for a hiccup of the machine"
        assert browser.run("Number(document.getElementById('scrub').value)") > 4
        assert browser.run("document.getElementById('play').textContent") == "Pause"
        # past the end it begins again
        browser.wait(f"{TIMES}[0] < 0.4")
        assert not browser.run("document.querySelector('video').paused")

        slide = "const s = document.getElementById('scrub'); s.value = 20; s.dispatchEvent(new Event('input'))"
        browser.run(f"(() => {{ {slide} }})()")
        browser.wait("[...document.querySelectorAll('video')].every((video) => !video.seeking && video.paused)")
        assert browser.run(TIMES) == pytest.approx([20.5 / FPS] * 5, abs=1e-3)
        assert browser.run("document.getElementById('frame').textContent") == "21 of 33"
        browser.press("ArrowRight")
        browser.wait(f"{TIMES}.every((time) => Math.abs(time - {21.5 / FPS}) < 1e-3)")
        browser.press(" ")
        browser.wait("!document.querySelector('video').paused")
        browser.press(" ")
        browser.wait("document.querySelector('video').paused")
        assert browser.complaints == []


def test_other_prompts_and_methods_can_be_chosen(page, browser_module):
    with browser_module.Browser(390, 844, dark=True, phone=True) as browser:
        browser.open(page)
        browser.wait("document.querySelectorAll('video').length === 5")
        assert browser.run("document.documentElement.scrollWidth") == 390, "nothing sticks out on a phone"
        told = "document.querySelector('video').getAttribute('aria-label')"
        before = browser.run(told)
        change = (
            "const p = document.getElementById('prompt'); p.selectedIndex = 1; p.dispatchEvent(new Event('change'))"
        )
        browser.run(f"(() => {{ {change} }})()")
        assert browser.run(told) != before
        names = "[...document.querySelectorAll('#players figcaption b')].map((name) => name.textContent)"
        assert browser.run(names) == ["dense", "radial", "adaspa 0.2", "paro 0.2, int8", "random 0.2"]
        browser.run("document.querySelectorAll('#shown input')[1].click()")
        assert browser.run(names)[:2] == ["dense", "ceiling"]
        browser.wait("[...document.querySelectorAll('video')].every((video) => video.readyState >= 2)")
        light = "getComputedStyle(document.body).backgroundColor"
        assert sum(map(int, re.findall(r"\d+", browser.run(light)))) < 3 * 60, "dark where that is preferred"
        unnamed = "[...document.querySelectorAll('button,input,select,video,svg[role]')].filter((x) => "
        unnamed += "!(x.getAttribute('aria-label') || x.labels?.length || x.textContent.trim())).length"
        assert browser.run(unnamed) == 0
        assert browser.complaints == []


def test_the_embedded_videos_are_those_of_the_folder(page, folder):
    data = base64.b64encode((folder / "0" / "radial-.mp4").read_bytes()).decode()
    assert data in page.read_text()
