"""The pages say what the rows and the tree say, and lead where they say they lead."""

import ast
import builtins
import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import videosparse

ROOT = Path(__file__).parents[1]
FOLDERS = ("eval", "lora", "pipelines")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / name / "README.md" for name in FOLDERS), *ROOT.glob("assets/*/*.md")])
MARK = re.compile(r"<!-- table:(\w+) -->")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


@cache
def slugs(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them of its headings."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> list[list[str]]:
    """The words of every shell command in the blocks of a page, comments left out."""
    found = []
    for language, block in BLOCK.findall(page.read_text()):
        if language in ("", "bash", "sh"):
            lines = block.replace("\\\n", " ").splitlines()
            found += [words for line in lines if (words := shlex.split(line, comments=True))]
    return found


def options(command: str) -> set[str]:
    """The flags of a command of `videosparse`."""
    import typer

    from videosparse.cli import app

    known = typer.main.get_command(app).commands
    assert command in known, f"there is no videosparse {command}; there are {', '.join(known)}"
    return {flag for parameter in known[command].params for flag in (*parameter.opts, *parameter.secondary_opts)}


def unknown_to_program(program: str, flags: set[str]) -> set[str]:
    """Flags that a program does not take: not in its source, and not in what it says of itself, which takes seconds."""
    missing = flags - set(re.findall(r'"(--?[a-z][\w-]*)"', (ROOT / program).read_text()))
    return missing - (told_by(program) if missing else set())


@cache
def told_by(program: str) -> set[str]:
    done = subprocess.run([sys.executable, program, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", done.stdout.partition("options:")[2]))


def test_tables_are_made_from_the_committed_rows():
    done = subprocess.run(
        [sys.executable, "eval/readme_tables.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_table_stands_on_one_page_that_is_kept_up_to_date():
    source = (ROOT / "eval/readme_tables.py").read_text()
    made = re.findall(r'^    "(\w+)": \(', source, re.M)
    marks = {page: MARK.findall(page.read_text()) for page in PAGES}
    assert sorted(name for names in marks.values() for name in names) == sorted(made)
    kept = re.search(r"^PAGES = \((.*?)^\)", source, re.M | re.S)[1]
    assert {str(page.relative_to(ROOT)) for page in PAGES if marks[page]} <= set(re.findall(r'"([\w/.-]+)"', kept))


@each_page
def test_links_lead_somewhere(page):
    missing = []
    for link in re.findall(r'(?:\]\(|src=")([^)\s"]+)[)"]', BLOCK.sub("", page.read_text())):
        path, _, anchor = link.partition("#")
        if "://" not in link:
            target = page.parent / path if path else page
            if not target.exists() or (anchor and anchor not in slugs(target.resolve())):
                missing.append(link)
    assert not missing


@each_page
def test_programs_and_rows_that_are_named_exist(page):
    folders = "|".join((*FOLDERS, "assets", "tests", "videosparse"))
    named = re.findall(rf"\b(?:{folders})/[\w/.-]+\.(?:py|csv|json|png|toml)\b", page.read_text())
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


@each_page
def test_tests_that_are_named_exist(page):
    named = set(re.findall(r"`(test_\w+)`", page.read_text()))
    there = {
        name for file in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    there |= {file.stem for file in (ROOT / "tests").rglob("test_*.py")}
    assert named <= there


@pytest.mark.parametrize(
    "path", sorted(p for f in ("eval", "lora", "pipelines") for p in (ROOT / f).glob("*.py")), ids=str
)
def test_every_program_shows_its_manual(path):
    """Instead of starting at once, and writing over the rows of before."""
    assert before_parsing(path.read_text()) == []


def before_parsing(source: str) -> list[str]:
    """What `main` of a program does before it parses its arguments, itself or by a function, but make the parser."""
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    parsing = {name for name, node in functions.items() if name != "main" and ".parse_args(" in ast.unparse(node)}
    done = []
    for statement in functions["main"].body:
        called = [ast.unparse(node.func) for node in ast.walk(statement) if isinstance(node, ast.Call)]
        if any(name in parsing or name.endswith(".parse_args") for name in called):
            return done
        if not re.match(r"parser = argparse\.|parser\.add_", ast.unparse(statement)):
            done.append(ast.unparse(statement))
    return [*done, "no arguments are parsed"]


def test_programs_that_work_before_they_parse_are_found():
    program = (
        "def main():\n    parser = argparse.ArgumentParser()\n    {}\n    args = parser.parse_args()\n    work()\n"
    )
    assert before_parsing(program.format("parser.add_argument('--rows')")) == []
    assert before_parsing(program.format("measure()")) == ["measure()"]
    assert before_parsing("def parse():\n    return parser.parse_args()\ndef main():\n    args = parse()") == []
    assert before_parsing("def main():\n    work()") == ["work()", "no arguments are parsed"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_program_is_named_on_the_page_of_its_folder(folder):
    text = (ROOT / folder / "README.md").read_text()
    assert not [path.name for path in (ROOT / folder).glob("*.py") if f"`{path.name}`" not in text]


@each_page
def test_commands_can_be_given(page):
    """Programs and commands that a block shows exist, with the flags that it gives them."""
    for words in commands(page):
        program = next((word for word in words if word.endswith(".py")), None)
        given = words[words.index(program) + 1 :] if program else words[2:]
        flags = {word.partition("=")[0] for word in given if re.match(r"--?[a-z]", word)}
        if words[0] == "videosparse":
            assert flags <= options(words[1]), words
        elif program:
            assert not unknown_to_program(program, flags), words
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), words


@each_page
def test_options_of_methods_can_be_set(page):
    from videosparse.generation.methods import parse_overrides

    text = page.read_text()
    given = re.findall(r"--set ((?:radial|adaspa|paro|dense)\.[\w.]+=[\w.,]+)", text)
    assert all(parse_overrides([assignment]) for assignment in given)


@each_page
def test_extras_that_are_named_can_be_installed(page):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"(?:videosparse|\.)\[([a-z0-9,]+)\]", page.read_text())
    assert {extra for names in named for extra in names.split(",")} <= set(extras)


@each_page
def test_examples_in_python_can_be_parsed(page):
    for language, block in BLOCK.findall(page.read_text()):
        if language == "python":
            compile(block, str(page), "exec")


# what a reader has made before a snippet begins
GIVEN = {"pipe", "video", "dense"}


@each_page
def test_names_in_examples_in_python_are_there(page):
    """Imports of a page work, what they are asked for is there, and nothing is used that no snippet before defines."""
    known = {*dir(builtins), *GIVEN}
    for language, block in BLOCK.findall(page.read_text()):
        if language != "python":
            continue
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]
            if isinstance(node, ast.Import | ast.ImportFrom):
                known |= {alias.asname or alias.name for alias in node.names}
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                known.add(node.id)
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert names <= known, f"import or make {names - known}"
        # a folder of the package is there only once it was imported, which another test may have done
        of_package = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "videosparse"
        }
        assert of_package <= set(videosparse.__all__)


@pytest.mark.parametrize(("page", "method"), [("README.md", "radial"), ("assets/tiny-wan/README.md", "dense")])
def test_examples_of_the_embedded_model_make_what_the_shell_makes(page, method, monkeypatch):
    from videosparse.generation import GenerationRequest, generate

    monkeypatch.chdir(ROOT)
    blocks = [block for language, block in BLOCK.findall((ROOT / page).read_text()) if language == "python"]
    block = next(block for block in blocks if "assets/tiny-wan" in block)
    for usual, small in (("128", "32"), ("33", "5"), ("20", "2")):
        assert usual in block
        block = block.replace(usual, small)
    made = {}
    exec(compile(block, page, "exec"), made)
    prompt = re.search(r'"(a red circle[^"]*)"', block)[1]
    size = {"num_frames": 5, "height": 32, "width": 32, "steps": 2}
    shell = generate(GenerationRequest(prompt, method=method, device="cpu", **size))
    assert np.array_equal(made["video"], shell.frames.permute(0, 2, 3, 1).numpy())


def test_weights_are_asked_for_by_the_name_that_diffusers_has_kept():
    """The older one works, with a warning on every run."""
    files = [file for folder in (*FOLDERS, "videosparse") for file in (ROOT / folder).rglob("*.py")]
    assert not [str(file) for file in (*files, *PAGES) if "torch_dtype=" in file.read_text()]


def test_the_readme_is_read_in_five_minutes():
    text = re.sub(r"<details>.*?</details>\n", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    lines = text.splitlines()
    assert len(lines) <= 330, "move details to the pages of the folders, or fold them"
    wide = [line for line in lines if line.startswith("|") and line.count("|") > 9]
    assert not wide, "tables of more than 8 columns belong to the pages of assets/results"


@each_page
def test_blocks_of_commands_need_no_scrolling(page):
    blocks = [block for language, block in BLOCK.findall(page.read_text()) if not language]
    assert not [line for block in blocks for line in block.splitlines() if len(line) > 110]
