"""app → quant → models → edgespec, and never back; nothing hides another package's name."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from imports import FILES, FOLDERS, ROOT, imported, importers, module_name, top

RUNTIME = {"models/gguf/llamacpp.py"}


def level(name: str) -> int:
    """The level of a module: 0 for edgespec itself, -1 for what is not ours."""
    if top(name) != "edgespec":
        return -1
    part = name.split(".")[1:2]
    return list(FOLDERS).index(part[0]) if part and part[0] in FOLDERS else 0


FACADE = ROOT / "edgespec" / "__init__.py"  # `from edgespec import load`, imported when it is used


@pytest.mark.parametrize("path", [path for path in FILES if path != FACADE], ids=str)
def test_no_import_points_back(path: Path) -> None:
    module = module_name(path)
    names = set(imported(path.read_text("utf-8"), module))
    assert {name for name in names if level(name) > level(module)} == set()
    assert {name for name in names if top(name) in {"models", "quant", "app", "tests", "packaging"}} == set()


@pytest.mark.parametrize(
    ("source", "module", "found"),
    [
        ("import edgespec.app.cli.main", "edgespec.core", "edgespec.app.cli.main"),
        ("from edgespec import app", "edgespec.core", "edgespec.app"),
        ("from edgespec.quant import tune as t", "edgespec.models.gguf.model", "edgespec.quant.tune"),
        ("def f():\n    from . import models", "edgespec.core", "edgespec.models"),
        ("from ..app import cli", "edgespec.quant.tune", "edgespec.app.cli"),
        ("from .. import app", "edgespec.quant.__init__", "edgespec.app"),
        ("import_module('edgespec.models.gguf.model')", "edgespec.core", "edgespec.models.gguf.model"),
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


def test_the_engine_knows_the_machine_in_one_file() -> None:
    assert importers("psutil", tuple(FOLDERS)) == {"edgespec/machine/sensors.py"}


def test_the_runtime_is_known_where_it_is_wrapped() -> None:
    assert importers("llama_cpp", tuple(FOLDERS)) == RUNTIME
    assert importers("onnxruntime", tuple(FOLDERS)) == {"models/onnx/providers.py"}
    assert importers("tokenizers", tuple(FOLDERS)) == {"models/onnx/vocab.py"}


@pytest.mark.parametrize(
    "arguments", [["--version"], ["models"], ["run", "--help"], ["doctor", "--help"], ["chat", "--help"]]
)
def test_runtimes_are_loaded_only_where_models_are(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from edgespec.app.cli import main\n"
        "try: main.app(sys.argv[1:])\n"
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


# --- structure ---


def modules() -> dict[str, set[str]]:
    """Every module of the product and the modules it imports, also where only a type checker does.

    A module that is run in another process by its name is not imported.
    """
    names = {module_name(path).removesuffix(".__init__"): path for path in FILES if path != FACADE}
    graph = {}
    for name, path in names.items():
        found = imported(path.read_text("utf-8"), module_name(path), strings=False)
        graph[name] = {
            one if one in names else one.rpartition(".")[0] for one in found if top(one) == "edgespec"
        } & names.keys() - {name}
    return graph


def cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """The nodes of one cycle, none if there is none."""
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return error.args[1]
    return []


def test_no_imports_go_in_a_circle() -> None:
    assert cycle(modules()) == []


@pytest.mark.parametrize(
    "package", sorted({name.rpartition(".")[0] for name in modules()} - {""}), ids=lambda name: name
)
def test_the_parts_of_a_package_import_one_another_in_one_direction(package: str) -> None:
    """A part is a module or a whole package, so that a package is used, or uses, but never both."""

    def part(name: str) -> str:
        rest = name.removeprefix(f"{package}.")
        inside = name.startswith(f"{package}.") and level(name) == level(package)
        return rest.partition(".")[0] if inside else ""

    graph: dict[str, set[str]] = {}
    for name, others in modules().items():
        if part(name):
            graph.setdefault(part(name), set()).update({part(other) for other in others} - {"", part(name)})
    assert cycle(graph) == []


def test_a_circle_is_found() -> None:
    assert set(cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}


def test_app_has_few_parts() -> None:
    assert len({path for path in (ROOT / "app").iterdir() if not path.name.startswith("_")}) <= 10


def test_a_name_of_a_class_or_type_means_one_thing() -> None:
    places: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.parse(path.read_text("utf-8")).body:
            names = [node.name] if isinstance(node, ast.ClassDef) else []
            if isinstance(node, ast.Assign):
                names = [one.id for one in node.targets if isinstance(one, ast.Name)]
            for name in names:
                if re.fullmatch(r"_?[A-Z]\w*[a-z]\w*", name):
                    places.setdefault(name, []).append(str(path.relative_to(ROOT)))
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


LONGEST_FILE, LONGEST_FUNCTION = 400, 60


def test_files_and_functions_are_short() -> None:
    files, functions = {}, {}
    for path in FILES:
        text = path.read_text("utf-8")
        name = str(path.relative_to(ROOT))
        if (lines := text.count("\n")) > LONGEST_FILE:
            files[name] = lines
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if (lines := node.end_lineno - node.lineno + 1) > LONGEST_FUNCTION:
                    functions[f"{name}: {node.name}"] = lines
    assert files == {}
    assert functions == {}
