"""Where the tests of this folder find `footage`."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent)]
