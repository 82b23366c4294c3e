"""The pages say what the rows and the tree say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("assets/*/*.md")])


def test_tables_are_made_from_the_committed_rows():
    done = subprocess.run(
        [sys.executable, "eval/readme_tables.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_programs_and_rows_that_are_named_exist(page):
    named = re.findall(r"\b(?:eval|assets|tests|videosparse)/[\w/.-]+\.(?:py|csv|json|png)\b", page.read_text())
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing
