"""What the files of the product import."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


FOLDERS = {
    "edgespec": "edgespec",
    "models": "edgespec.models",
    "quant": "edgespec.quant",
    "app": "edgespec.app",
}


FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    """The name under which a file is imported, with a last part for packages too."""
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([FOLDERS[folder], *rest])


def imported(source: str, module: str, *, strings: bool = True) -> Iterator[str]:
    """Every module that `source`, known as `module`, names: in imports of any form and in `strings`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{name}.{alias.name}" for alias in node.names)
        elif strings and isinstance(node, ast.Constant) and isinstance(node.value, str):
            # "edgespec.app.engine.worker" given to import_module or to `python -m`
            yield from re.findall(r"^edgespec(?:\.\w+)+$", node.value)


def top(name: str) -> str:
    return name.split(".")[0]


def importers(package: str, folders: tuple[str, ...]) -> set[str]:
    files = {path.relative_to(ROOT).as_posix(): path for path in FILES}
    return {
        name
        for name, path in files.items()
        if name.startswith(folders)
        and package in map(top, imported(path.read_text("utf-8"), module_name(path)))
    }
