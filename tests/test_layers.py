"""Imports point downward, heavy libraries stay where they belong, and importing costs what it should."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "videosparse"

LAYERS = {
    "interrupts": 0, "checking": 0, "wording": 0, "layout": 0, "blocks": 0, "ordering": 0, "reference": 0, "logits": 0,
    "cases": 0, "uploading": 0, "copies": 0, "writing": 0,
    "kernels": 1,
    "policies": 2,
    "models": 3,
    "processors": 4, "searching": 4, "attach": 4, "dense_plans": 4, "report": 4, "clock": 4, "_diffusers": 4,
    "sharing": 4, "parallel": 4, "stretching": 4, "defaults": 4, "components": 4, "windows": 4,
    "remarks": 4,
    "files": 5, "generation": 5, "training": 5, "metrics": 5, "synthetic": 5, "benchmark": 5,
    "evaluation": 5, "mp4": 5, "program": 5,
    "cli": 6, "__main__": 6, "__init__": 6,
}  # fmt: skip

# The families and the layers above them may know Diffusers; below, other hosts can use the code.
DIFFUSERS_FROM = 3


def layer_of(module: str) -> int:
    return LAYERS[module.split(".")[1]]


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield path, "videosparse." + ".".join(p for p in parts if p != "__init__" or len(parts) == 1)


def imports_of(path: Path):
    """(module, at import time) for every import in a file; those inside functions and type checks come later."""
    tree = ast.parse(path.read_text())
    late = set()
    for node in ast.walk(tree):
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        if typing_only or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            late.update(id(child) for child in ast.walk(node))
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full, not relative"
            # "from videosparse import blocks" names a submodule
            names = [f"{node.module}.{a.name}" for a in node.names] if node.module == "videosparse" else [node.module]
        yield from ((name, id(node) not in late) for name in names)


def test_every_module_has_a_layer():
    assert {name.split(".")[1] for _, name in modules()} <= set(LAYERS)


def test_the_table_for_contributors_has_every_module():
    table = (PACKAGE.parent / "CONTRIBUTING.md").read_text().partition("| layer |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| L(\d) \|([^|]*)", table, re.M)
    told = {name.rstrip("/"): int(layer) for layer, names in rows for name in re.findall(r"`([\w/]+)`", names)}
    assert told == {name: layer for name, layer in LAYERS.items() if name not in ("__init__", "__main__")}


def test_imports_only_point_downward():
    wrong = [
        f"{name} (layer {layer_of(name)}) imports {used} (layer {layer_of(used)})"
        for path, name in modules()
        for used, _ in imports_of(path)
        if used.startswith("videosparse.") and used.split(".")[1] in LAYERS and layer_of(used) > layer_of(name)
    ]
    assert not wrong, "\n".join(wrong)


def test_parts_of_programs_do_not_import_one_another_in_a_circle():
    """Within the highest layers, where a package may know another: what it knows must not know it."""
    known = {part: set() for part in LAYERS if LAYERS[part] == 5}
    for path, name in modules():
        for used, _ in imports_of(path):
            part, other = name.split(".")[1], used.split(".")[1] if used.startswith("videosparse.") else ""
            if part in known and other in known and part != other:
                known[part].add(other)
    assert "metrics" in known["generation"], "nothing was looked at"
    tuple(TopologicalSorter(known).static_order())  # raises CycleError, which names the circle


def test_names_that_another_module_uses_are_public():
    private = re.compile(r"from videosparse[\w.]* import [^#\n]*\b_(?!diffusers\b)[a-z]", re.I)
    for folder in ("videosparse", "tests", "eval", "lora", "pipelines"):
        for path in (PACKAGE.parent / folder).rglob("*.py"):
            imports = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom))
            found = [line for line in map(ast.unparse, imports) if private.match(line)]
            assert not found, f"{path}: {found}"


def test_families_know_no_method_and_methods_know_no_family():
    for path, name in modules():
        used = [module for module, _ in imports_of(path)]
        if layer_of(name) == 3:
            methods = [m for m in used if m.startswith("videosparse.policies.") and not m.endswith(".base")]
            assert not methods, f"{name} knows a method: {methods}"
        if layer_of(name) == 2:
            assert not [m for m in used if m.startswith("videosparse.models")], f"{name} knows a model"


def test_lower_layers_know_no_diffusers_and_no_triton():
    for path, name in modules():
        for used, at_import in imports_of(path):
            top = used.split(".")[0]
            if layer_of(name) < DIFFUSERS_FROM:
                assert top not in ("diffusers", "transformers", "accelerate", "peft"), f"{name} imports {used}"
            if top == "triton":
                assert layer_of(name) == 1, f"{name} imports triton; only the kernels do"
            if layer_of(name) == 0 and at_import:
                assert top in {*sys.stdlib_module_names, "torch", "videosparse"}, f"{name} imports {used}"


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"diffusers", "triton"}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Block())
"""


@pytest.mark.parametrize("module", ["layout", "blocks", "ordering", "reference", "cases", "kernels", "policies"])
def test_lower_layers_import_without_diffusers_and_triton(module):
    run_python(BLOCKED + f"import videosparse.{module}")


def test_import_costs_what_diffusers_costs_and_touches_no_gpu():
    """Counted in modules, which does not depend on the machine: only our own may come on top."""
    count = "import sys; print('\\n'.join(sys.modules))"
    base = set(run_python(f"from diffusers import DiffusionPipeline; {count}").split())
    ours = set(run_python(f"import videosparse; {count}").split())
    extra = sorted(m for m in ours - base if not m.startswith("videosparse"))
    extra = [m for m in extra if m.split(".")[0] not in sys.stdlib_module_names]
    assert not extra, extra
    out = run_python("import videosparse, torch; print(torch.cuda.is_initialized())")
    assert out.strip() == "False"
