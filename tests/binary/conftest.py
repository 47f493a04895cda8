"""The bundle as it is shipped, unpacked, and a bare system around it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from bare import USER, Bare, make_root

DIST = Path(__file__).parent.parent.parent / "dist"


@pytest.fixture(scope="session", autouse=True)
def _tools() -> None:
    if os.geteuid() != 0:
        pytest.exit("these tests need root: they make a root file system and mount it", 2)


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that was in the archive; readable by everybody, writable by nobody else."""
    found = sorted(DIST.glob("edgespec-offline-*.tar.zst"))
    assert found, "make bundle first"
    folder = tmp_path_factory.mktemp("opt")
    folder.chmod(0o755)
    subprocess.run(
        ["tar", "-C", str(folder), "--use-compress-program=zstd --long=27", "-xf", str(found[-1])], check=True
    )
    (unpacked,) = folder.iterdir()
    return unpacked


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_root(tmp_path_factory.mktemp("bare") / "root")


@pytest.fixture
def bare(root: Path, program: Path, tmp_path: Path) -> Bare:
    """The program in /opt of the bare system, and a home of the user's own."""
    home = tmp_path / "home"
    home.mkdir(mode=0o755)
    os.chown(home, USER, USER)
    return Bare(root, program.parent, home)


@pytest.fixture
def edgespec(program: Path) -> str:
    """The program's path in the bare system."""
    return f"/opt/{program.name}/edgespec"
