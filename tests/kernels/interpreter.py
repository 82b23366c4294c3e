"""Runs a file where Triton interprets kernels on the CPU, in a process of its own.

The test_interpreted_*.py share the files among them, so that workers of pytest-xdist can.
"""

import os
import subprocess
import sys
from functools import cache, partial
from pathlib import Path


def run_interpreted(name):
    """Assert that the tests of interpreted`name`.py pass."""
    path = Path(__file__).with_name(f"interpreted{name}.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", str(path)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]


def quicken():
    """Spare Triton's interpreter half of its work, which tells nothing here.

    Every call of a function inside a kernel puts the interpreter's operations in the place of the language's once more,
    though they stay until the kernel ends. And every integer operation is done in 64 bits, too, to assert that 32 are
    enough: no GPU does, and the tests of offsets beyond 32 bits look at the results.
    """
    from triton import language
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return  # another version, which is as slow as it is
    replace, in_place = interpreter._patch_lang, set()

    @cache
    def languages(function):
        return {id(x) for x in function.__globals__.values() if x is language or x is language.core}

    def replace_once(function):
        if languages(function) <= in_place:
            return None
        scope = replace(function)
        if not in_place:
            scope.restore = partial(end, scope.restore)
        in_place.update(languages(function))
        return scope

    def end(restore):
        in_place.clear()
        restore()

    interpreter._patch_lang = replace_once
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
