"""Commands in messages work as they are written."""

import re
import tomllib
from pathlib import Path

import pytest

from videosparse.wording import install_extra, nearest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "videosparse").rglob("*.py"))


def test_the_package_is_installed_from_a_clone():
    assert install_extra("fp8") == 'pip install -e ".[fp8]" in the clone'
    wrong = [str(path) for path in SOURCES if re.search(r"pip install \W*videosparse", path.read_text())]
    assert not wrong, f"no index has the package; use wording.install_extra in {wrong}"


def test_extras_in_messages_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {name for path in SOURCES for name in re.findall(r"install_extra\([\"'](\w+)[\"']\)", path.read_text())}
    assert {"fp8", "fa4", "eval", "vbench", "parquet"} == named
    assert named <= set(extras)


@pytest.mark.parametrize(
    ("word", "hint"),
    [("radail", "radial"), ("Ada", "adaspa"), ("paro-onlin", "paro-online"), ("moon", None), ("a", None), ("", None)],
)
def test_a_hint_is_what_was_begun_or_misspelt(word, hint):
    known = ["dense", "none", "radial", "adaspa", "paro", "paro-online"]
    assert nearest(word, known) == ("" if hint is None else f" Did you mean {hint!r}?")


def test_of_words_that_begin_so_the_hint_is_the_shortest():
    assert nearest("in", ["int8-fp8", "int8"]) == " Did you mean 'int8'?"
