"""What the machine code of a compiled kernel shows, through the tools that come with Triton."""

import re
import subprocess
from pathlib import Path

import triton

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def disassemble(tool, *arguments):
    """What a tool, given options, prints of `kernel.cubin` in the last argument, a folder."""
    *options, folder = arguments
    command = [BINARIES / tool, *options, folder / "kernel.cubin"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def multiplying_loops(sass, consumers):
    """The instructions of the shortest loop of each consumer that multiplies."""
    labels, lines, loops = {}, [], []
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            lines.append(instruction[1].strip())
    for end, line in enumerate(lines):
        target = re.match(r"(?:@!?U?P\d+ BRA|BRA\.U !?UP\d).*\((\.L_x_\d+)\)", line)
        start = labels[target[1]] if target else end
        if any(re.search(r"GMMA|UTC\w*MMA", x) for x in lines[start:end]) and not any(a >= start for a, _ in loops):
            loops.append((start, end))
    assert len(loops) >= consumers, loops
    shortest = sorted(loops, key=lambda loop: loop[1] - loop[0])[:consumers]
    return [lines[start:end] for start, end in shortest]


def spilled_in_loops(sass, consumers):
    """Loads and stores of spilled registers inside these loops."""
    return [x for loop in multiplying_loops(sass, consumers) for x in loop if re.search(r"\b(LDL|STL)\b", x)]
