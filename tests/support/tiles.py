"""Whether compiled code fills the configuration of the AMX tiles before it loads it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

_LOAD = re.compile(r"\sldtilecfg\s+(-?0x[0-9a-f]+)?\((%r\w+)\)")
_STORE = re.compile(r"\s(?:v?mov|vextract)\w*\s+\S+,(-?0x[0-9a-f]+)?\((%r\w+)\)")
_FIELDS = {"the columns' bytes": 0x10, "the rows": 0x30}
"""What a configuration must say, by its place in the 64 bytes."""
_BEFORE = 60  # instructions


def disassembled(file: Path) -> str:
    """The code of a library or an object file, by binutils."""
    command = ["objdump", "--disassemble", "--no-show-raw-insn", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def loads(listing: str) -> int:
    """How many tile configurations are loaded."""
    return len(_LOAD.findall(listing))


def never_stored(listing: str) -> list[str]:
    """What is loaded without having been stored: GCC may take the stores for dead.

    A store of zeros to the whole configuration does not count: it ends in a fault at the first product.
    """
    missing = []
    lines = listing.splitlines()
    for number, line in enumerate(lines):
        if (load := _LOAD.search(line)) is None:
            continue
        base, register = int(load[1] or "0", 16), load[2]
        stores = [
            found for before in lines[max(0, number - _BEFORE) : number] if (found := _STORE.search(before))
        ]
        places = {int(one[1] or "0", 16) for one in stores if one[2] == register}
        missing += [f"{name}: {line.strip()}" for name, at in _FIELDS.items() if base + at not in places]
    return missing
