"""Makes the helpers of these tests importable; see `tests/pipes.py`."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

# by its path, not by its name: Python 3.11 has a module of that name in its library
_PIPES = Path(__file__).parents[1] / "pipes.py"
if getattr(sys.modules.get("pipes"), "__file__", None) != str(_PIPES):
    _spec = spec_from_file_location("pipes", _PIPES)
    sys.modules["pipes"] = module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["pipes"])

from pipes import built, one_thread, pipe_of, tiny_of  # noqa: E402, F401  fixtures

from searches import planned  # noqa: E402, F401  likewise
