"""Write the components of the program: `sbom.cdx.json` (CycloneDX), and their licenses to `licences/`.

    python packaging/notices.py PYINSTALLER_WORK_FOLDER PROGRAM_FOLDER

Components are identified by the files that PyInstaller collected: Python packages by their metadata, system
libraries by the package that owns them. A file without a component stops the build.
"""

from __future__ import annotations

import ast
import platform
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path

from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import DisjunctiveLicense
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

PYTHON = Path(sysconfig.get_path("stdlib"))
LLAMA = Path(__file__).with_name("llama.cpp-licence.txt")


@dataclass(frozen=True, slots=True)
class Part:
    """A component. `kind`: as in package URLs; `text`: its full license."""

    kind: str
    name: str
    version: str
    licence: str
    text: str


def collected(work: Path) -> set[Path]:
    """Return the source paths of the files in the program."""
    found = set()
    for name in ("PYZ-00.toc", "COLLECT-00.toc", "EXE-00.toc"):
        stack = [ast.literal_eval((work / name).read_text("utf-8"))]
        while stack:
            one = stack.pop()
            if (
                isinstance(one, tuple)
                and len(one) == 3
                and isinstance(one[1], str)
                and Path(one[1]).is_file()
            ):
                found.add(Path(one[1]))
            elif isinstance(one, list | tuple):
                stack += one
    return {path for path in found if work.resolve() not in path.resolve().parents}


def python_part(dist: Distribution) -> Part:
    """Return the component of a Python package, with the license texts that its metadata lists."""
    data = dist.metadata
    classifiers = [
        c.rpartition(" :: ")[2] for c in data.get_all("Classifier", []) if c.startswith("License ::")
    ]
    short = (data.get("License") or "").strip()
    licence = data.get("License-Expression") or ("" if "\n" in short else short) or " AND ".join(classifiers)
    texts = [
        path.locate().read_text("utf-8", "replace")
        for path in sorted(dist.files or [])
        if path.parent.parts[:1] and path.parts[0].endswith(".dist-info")
        and path.name.upper().startswith(("LICEN", "COPYING", "NOTICE", "AUTHORS"))
    ]  # fmt: skip
    text = "\n\n".join(texts) or data.get("License") or f"See {data.get('Home-page') or 'its project page'}."
    return Part("pypi", data["Name"], dist.version, licence or "see its text", text)


def system_part(path: Path) -> Part | None:
    """Return the component of the Debian package that owns a library, None if there is none."""
    for name in (str(path), str(path.resolve())):
        done = subprocess.run(["dpkg-query", "-S", name], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            package = done.stdout.split(": ")[0]
            break
    else:
        return None
    form = "${source:Package} ${Version}"
    shown = subprocess.run(
        ["dpkg-query", "-W", "-f", form, package], capture_output=True, text=True, check=True
    )
    name, version = shown.stdout.split()
    text = (Path("/usr/share/doc") / package.split(":")[0] / "copyright").read_text("utf-8", "replace")
    return Part("deb", name, version, "see its text", text)


def parts(files: set[Path]) -> list[Part]:
    """Return the components of `files`. Exits if a file has none."""
    site = Path(sysconfig.get_path("purelib"))
    owners = {site / path: dist for dist in distributions() for path in dist.files or []}
    found, used, unknown = set(), set(), []
    for path in files:
        real = path.resolve()
        if dist := owners.get(path):
            used.add(dist)
        elif PYTHON in path.parents or PYTHON.resolve() in real.parents or real.name.startswith("libpython"):
            text = (PYTHON / "LICENSE.txt").read_text("utf-8")
            found.add(Part("generic", "cpython", platform.python_version(), "PSF-2.0", text))
        elif part := system_part(path):
            found.add(part)
        elif path.suffix != ".pyc" and "__pycache__" not in path.parts:
            unknown.append(path)
    if unknown:
        sys.exit(f"edgespec: files without a component: {', '.join(map(str, sorted(unknown)))}")
    found |= {python_part(dist) for dist in used}
    version = next(part.version for part in found if part.name.replace("_", "-") == "llama-cpp-python")
    # Compiled into llama-cpp-python's libraries, but not in its metadata.
    found.add(
        Part("generic", "llama.cpp", f"as in llama-cpp-python {version}", "MIT", LLAMA.read_text("utf-8"))
    )
    return sorted(found, key=lambda part: part.name.lower())


def main() -> None:
    work, program = map(Path, sys.argv[1:])
    found = parts(collected(work))
    folder = program / "licences"
    folder.mkdir()
    bom = Bom()
    bom.serial_number = bom.metadata.timestamp = None  # not reproducible
    bom.metadata.tools.tools.clear()
    for part in found:
        purl = PackageURL(part.kind, name=part.name, version=part.version)
        (folder / f"{part.name}.txt").write_text(part.text.rstrip() + "\n", "utf-8")
        bom.components.add(
            Component(
                type=ComponentType.LIBRARY, name=part.name, version=part.version,
                purl=purl, bom_ref=str(purl),
                licenses=[DisjunctiveLicense(name=part.licence)],
            )
        )  # fmt: skip
    (program / "sbom.cdx.json").write_text(JsonV1Dot6(bom).output_as_string(indent=1) + "\n", "utf-8")
    print(f"{len(found)} components")


if __name__ == "__main__":
    main()
