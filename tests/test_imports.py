"""app → quant → models → edgespec, and never back; nothing hides another package's name."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "edgespec": "edgespec",
    "models": "edgespec.models",
    "quant": "edgespec.quant",
    "app": "edgespec.app",
}
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
RUNTIME = {"models/llamacpp.py"}


def module_name(path: Path) -> str:
    """The name under which a file is imported, with a last part for packages too."""
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([FOLDERS[folder], *rest])


def imported(source: str, module: str) -> Iterator[str]:
    """Every module that `source`, known as `module`, names: in imports of any form and in whole strings."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{name}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # "edgespec.app.worker" given to import_module or to `python -m`
            yield from re.findall(r"^edgespec(?:\.\w+)+$", node.value)


def level(name: str) -> int:
    """How high a module stands: 0 for edgespec itself, -1 for what is not ours."""
    if top(name) != "edgespec":
        return -1
    part = name.split(".")[1:2]
    return list(FOLDERS).index(part[0]) if part and part[0] in FOLDERS else 0


def top(name: str) -> str:
    return name.split(".")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_points_back(path: Path) -> None:
    module = module_name(path)
    names = set(imported(path.read_text("utf-8"), module))
    assert {name for name in names if level(name) > level(module)} == set()
    assert {name for name in names if top(name) in {"models", "quant", "app", "tests", "packaging"}} == set()


@pytest.mark.parametrize(
    ("source", "module", "found"),
    [
        ("import edgespec.app.cli", "edgespec.core", "edgespec.app.cli"),
        ("from edgespec import app", "edgespec.core", "edgespec.app"),
        ("from edgespec.quant import tune as t", "edgespec.models.llama", "edgespec.quant.tune"),
        ("def f():\n    from . import models", "edgespec.core", "edgespec.models"),
        ("from ..app import cli", "edgespec.quant.tune", "edgespec.app.cli"),
        ("from .. import app", "edgespec.quant.__init__", "edgespec.app"),
        ("import_module('edgespec.models.llama')", "edgespec.core", "edgespec.models.llama"),
    ],
)
def test_imports_of_every_form_are_found(source: str, module: str, found: str) -> None:
    names = list(imported(source, module))
    assert found in names
    assert max(map(level, names)) > level(module)


def test_every_folder_is_read() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(FOLDERS)
    assert [
        level(name) for name in ("edgespec.core", "edgespec.models.x", "edgespec.quant", "edgespec.app.y")
    ] == [
        0,
        1,
        2,
        3,
    ]


def importers(package: str, folders: tuple[str, ...]) -> set[str]:
    files = {path.relative_to(ROOT).as_posix(): path for path in FILES}
    return {
        name
        for name, path in files.items()
        if name.startswith(folders)
        and package in map(top, imported(path.read_text("utf-8"), module_name(path)))
    }


def test_the_engine_knows_the_machine_in_one_file() -> None:
    assert importers("psutil", tuple(FOLDERS)) == {"edgespec/sensors.py"}


def test_the_runtime_is_known_where_it_is_wrapped() -> None:
    assert importers("llama_cpp", tuple(FOLDERS)) == RUNTIME
    assert importers("onnxruntime", tuple(FOLDERS)) == {"models/providers.py"}
    assert importers("tokenizers", tuple(FOLDERS)) == {"models/onnx_vocab.py"}


@pytest.mark.parametrize(
    "arguments", [["--version"], ["models"], ["run", "--help"], ["doctor", "--help"], ["chat", "--help"]]
)
def test_runtimes_are_loaded_only_where_models_are(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from edgespec.app import cli\n"
        "try: cli.app(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('onnxruntime', 'tokenizers', 'llama_cpp') if m in sys.modules])"
    )
    python = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert python.stdout.splitlines()[-1] == "[]"


def test_a_gguf_needs_no_onnxruntime(tiny_llama: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from edgespec.models.runtime import load_model\n"
        "load_model(Path(sys.argv[1])).close()\n"
        "print([m for m in ('onnxruntime', 'tokenizers') if m in sys.modules])"
    )
    python = subprocess.run(
        [sys.executable, "-c", code, str(tiny_llama)], capture_output=True, text=True, check=True
    )
    assert python.stdout.splitlines()[-1] == "[]"


def test_the_engine_needs_numpy_alone() -> None:
    names = {
        top(name)
        for path in (ROOT / "edgespec").glob("*.py")
        if path.name != "sensors.py"
        for name in imported(path.read_text("utf-8"), module_name(path))
    }
    assert names - sys.stdlib_module_names == {"numpy", "edgespec"}


@pytest.mark.parametrize("name", ["models", "quant", "app"])
def test_no_folder_is_importable_by_its_bare_name(name: str, tmp_path: Path) -> None:
    def run(code: str) -> str:
        python = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        return python.stdout + python.stderr

    assert f"No module named '{name}'" in run(f"import {name}")
    assert run(f"import edgespec.{name} as m; print(m.__name__)").strip() == f"edgespec.{name}"


def test_packaging_does_not_hide_the_package_of_that_name() -> None:
    assert not (ROOT / "packaging" / "__init__.py").exists()
    code = "import packaging.version as v; print(v.__file__)"
    python = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "site-packages" in python.stdout


def test_every_package_is_shipped() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    packages = {module_name(path).removesuffix(".__init__") for path in FILES if path.name == "__init__.py"}
    assert set(settings["packages"]) == packages
    assert settings["package-dir"] == {package: folder for folder, package in FOLDERS.items()}  # and below
    assert {module_name(path).rpartition(".")[0] for path in FILES} == packages  # no file outside a package
