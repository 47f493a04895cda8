"""Names and paths reach only verified files, and nothing outside the models folder."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edgespec.core import EdgespecError
from edgespec.models.hub import store
from edgespec.models.hub.catalog import Entry
from edgespec.models.hub.store import check, installed, models_folder, remove, resolve

DATA = b"GGUF" + bytes(range(256)) * 40
ESCAPES = "a\x1b]52;c;aGk=\x07\x9b2J\nb"


def entry(name: str = "tiny-1m", data: bytes = DATA) -> Entry:
    sha256 = hashlib.sha256(data).hexdigest()
    return Entry(
        name=name,
        family="tiny",
        role="chat",
        licence="CC0-1.0",
        parameters=1,
        bytes=len(data),
        sha256=sha256,
        file=f"{name}.gguf",
        draft=None,
        starter=False,
        note="",
        sources=(),
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty models folder and a catalogue of one entry."""
    monkeypatch.setenv("EDGESPEC_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr(store, "load_catalog", lambda: {"tiny-1m": entry()})
    (tmp_path / "models").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "models"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose SHA-256 was computed."""
    seen: list[Path] = []
    real = store.file_sha256

    def spy(path: Path) -> str:
        seen.append(path)
        return real(path)

    monkeypatch.setattr(store, "file_sha256", spy)
    return seen


# --- the shipped catalogue ---


# name: Hub repository, bytes, start of the SHA-256, parameters, packages, licence
def test_models_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("EDGESPEC_MODELS", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    if sys.platform == "linux":
        assert models_folder() == tmp_path / "edgespec" / "models"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("EDGESPEC_MODELS", "~/m")
    assert models_folder() == tmp_path / "home" / "m"


def test_importing_the_store_loads_no_slow_library() -> None:
    code = "import sys, edgespec.models.hub.store, edgespec.models.hub.download as d; d.offline_requested(); "
    code += "print(sys.modules.keys() & {'huggingface_hub', 'httpx2', 'filelock', 'pip', 'llama_cpp'})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# --- resolve ---


def test_resolve_hashes_once_and_again_only_after_a_change(folder: Path, hashed: list[Path]) -> None:
    path = folder / "tiny-1m.gguf"
    path.write_bytes(DATA)  # copied by hand, so there is no record yet
    assert resolve("tiny-1m") == path
    assert hashed == [path]
    assert resolve("tiny-1m") == path
    assert len(hashed) == 1
    path.write_bytes(DATA)
    assert resolve("tiny-1m") == path
    assert len(hashed) == 2


def test_resolve_finds_damage_even_with_size_and_time_restored(folder: Path) -> None:
    path = folder / "tiny-1m.gguf"
    path.write_bytes(DATA)
    assert resolve("tiny-1m") == path
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(1000)
        file.write(b"X")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(EdgespecError, match=r"damaged.*edgespec pull tiny-1m"):
        resolve("tiny-1m")


def test_resolve_refuses_a_file_of_another_size_without_reading_it(folder: Path, hashed: list[Path]) -> None:
    (folder / "tiny-1m.gguf").write_bytes(DATA[:-1])
    with pytest.raises(EdgespecError, match="damaged"):
        resolve("tiny-1m")
    assert hashed == []


@pytest.mark.parametrize("record", [b"", b"\xff\xfe garbage", b"[" * 100_000, b"0" * 64 + b" 1 2 3 4\n"])
def test_a_record_tampered_with_is_not_believed(folder: Path, hashed: list[Path], record: bytes) -> None:
    path, kept = folder / "tiny-1m.gguf", folder / ".tiny-1m.gguf.verified"
    path.write_bytes(DATA)
    resolve("tiny-1m")
    good = kept.read_bytes()
    kept.write_bytes(record)
    assert resolve("tiny-1m") == path
    assert len(hashed) == 2
    assert kept.read_bytes() == good
    path.write_bytes(DATA[:-1] + b"X")
    kept.write_bytes(record)
    with pytest.raises(EdgespecError, match="damaged"):
        resolve("tiny-1m")


def test_a_record_does_not_vouch_for_another_file(folder: Path) -> None:
    path = folder / "tiny-1m.gguf"
    path.write_bytes(DATA)
    resolve("tiny-1m")
    other = folder / "other"
    other.write_bytes(b"GGUF" + bytes(len(DATA) - 4))
    other.replace(path)
    with pytest.raises(EdgespecError, match="damaged"):
        resolve("tiny-1m")


def test_the_file_is_verified_by_whatever_name_it_is_asked_for(folder: Path) -> None:
    (folder / "tiny-1m.gguf").write_bytes(b"GGUF evil")
    asked = ["tiny-1m", "tiny-1m.gguf", str(folder / "tiny-1m.gguf"), "../models/tiny-1m.gguf"]
    for name in asked:
        with pytest.raises(EdgespecError, match="damaged"):
            resolve(name)
    (folder / "tiny-1m.gguf").write_bytes(DATA)
    assert {resolve(name).resolve() for name in asked} == {(folder / "tiny-1m.gguf").resolve()}


def test_resolve_takes_paths_and_stray_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Path("mine.gguf")
    mine.write_bytes(b"GGUF")
    assert resolve("mine.gguf") == mine
    assert resolve(str(mine.absolute())) == mine.absolute()
    monkeypatch.setenv("HOME", str(Path.cwd()))
    assert resolve("~/mine.gguf") == mine.absolute()
    (folder / "stray.gguf").write_bytes(b"GGUF")
    assert resolve("stray.gguf") == folder / "stray.gguf"
    (folder / "mine.gguf").write_bytes(b"GGUF")
    assert resolve("mine.gguf") == mine  # a file in the current folder comes first


def test_resolve_tells_what_to_do_about_a_missing_model(folder: Path) -> None:
    with pytest.raises(EdgespecError, match=r"^tiny-1m is not on this machine: run `edgespec pull tiny-1m`$"):
        resolve("tiny-1m")
    with pytest.raises(EdgespecError, match="did you mean tiny-1m"):
        resolve("tinny-1m")
    with pytest.raises(EdgespecError, match="valid names are tiny-1m"):
        resolve("zzz")
    with pytest.raises(EdgespecError, match="no file"):
        resolve("missing.gguf")


HOSTILE = [
    "",
    ESCAPES,
    f"{ESCAPES}.gguf",
    "a\0b",
    "a\0/b.gguf",
    "x" * 5000,
    "y" * 5000 + ".gguf",
    "~no~body/z",
]


@pytest.mark.parametrize("name", [*HOSTILE, "../absent", "tiny-1m.partial", "\udcff"])
@pytest.mark.parametrize("ask", [resolve, remove])
def test_hostile_names_give_one_printable_line(folder: Path, ask: Callable[[str], object], name: str) -> None:
    (folder / "tiny-1m.partial").mkdir()
    with pytest.raises(EdgespecError) as caught:
        ask(name)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 700


def test_installed_lists_entries_first_and_strays(folder: Path) -> None:
    assert installed() == []
    (folder / "a-stray.gguf").write_bytes(b"GGUF")
    (folder / "tiny-1m.gguf").write_bytes(DATA)
    (folder / "notes.txt").write_bytes(b"x")
    (folder / "folder.gguf").mkdir()
    (folder / "dangling.gguf").symlink_to("nowhere")
    assert installed() == [
        (entry(), folder / "tiny-1m.gguf", len(DATA)),
        (None, folder / "a-stray.gguf", 4),
    ]


def test_installed_without_a_folder_is_empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGESPEC_MODELS", str(tmp_path / "none"))
    assert installed() == []
    with pytest.raises(EdgespecError, match="not on this machine"):
        remove("smollm2-135m")


def test_remove_deletes_file_record_and_what_a_pull_left(folder: Path) -> None:
    (folder / "tiny-1m.gguf").write_bytes(DATA)
    resolve("tiny-1m")
    (folder / "tiny-1m.partial").mkdir()
    (folder / "tiny-1m.partial" / "data").write_bytes(b"x" * 100)
    (folder / "tiny-1m-big.gguf").write_bytes(b"GGUF")
    record = (folder / ".tiny-1m.gguf.verified").stat().st_size
    assert remove("tiny-1m") == len(DATA) + 100 + record
    assert {p.name for p in folder.iterdir()} == {"tiny-1m-big.gguf", ".tiny-1m.lock"}
    with pytest.raises(EdgespecError, match="not on this machine"):
        remove("tiny-1m")


def test_remove_takes_a_stray_by_name_or_path(folder: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (folder / name).write_bytes(b"GGUF" * 5)
    assert remove("a.gguf") == 20
    assert remove(str(folder / "b.gguf")) == 20
    assert list(folder.iterdir()) == []


def test_remove_reaches_nothing_outside_the_folder(folder: Path) -> None:
    outside = [folder.parent / "up.gguf", Path("here.gguf").absolute(), folder / "deep" / "in.gguf"]
    (folder / "deep").mkdir()
    for path in outside:
        path.write_bytes(b"GGUF")
    (folder / "keep.txt").write_bytes(b"x")
    linked = folder / "linked"
    linked.symlink_to(folder.parent, target_is_directory=True)
    for name in [
        "../up.gguf",
        str(folder.parent / "up.gguf"),
        str(Path("here.gguf").absolute()),
        "deep/in.gguf",
        "deep/../../up.gguf",
        "linked/up.gguf",
        "keep.txt",
        ".",
        "..",
        "/",
    ]:
        with pytest.raises(EdgespecError, match="not a model in"):
            remove(name)
    assert all(path.exists() for path in (*outside, folder / "keep.txt"))


def test_remove_of_a_link_leaves_its_target(folder: Path) -> None:
    target = folder.parent / "target.gguf"
    target.write_bytes(DATA)
    (folder / "link.gguf").symlink_to(target)
    remove("link.gguf")
    assert target.read_bytes() == DATA
    assert not (folder / "link.gguf").is_symlink()


# --- models that came with a frozen program ---


@pytest.fixture
def bundled(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`models` next to the executable of a frozen program, reached by a link."""
    program = tmp_path / "program"
    (program / "models").mkdir(parents=True)
    (program / "edgespec").touch()
    (tmp_path / "link").symlink_to(program / "edgespec")
    (program / "models" / "SHA256SUMS").write_text(f"{hashlib.sha256(b'GGUF2').hexdigest()}  own.gguf\n")
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "link"))
    return program / "models"


def test_models_next_to_the_program_come_first(bundled: Path, folder: Path) -> None:
    (folder / "tiny-1m.gguf").write_bytes(DATA)
    assert resolve("tiny-1m") == folder / "tiny-1m.gguf"
    for name in ("tiny-1m.gguf", "own.gguf"):
        (bundled / name).write_bytes(DATA)
        assert resolve(name) == bundled / name
    (folder / "users.gguf").write_bytes(b"GGUF")
    assert resolve("tiny-1m") == bundled / "tiny-1m.gguf"
    assert [one.path for one in installed()] == [
        bundled / "tiny-1m.gguf", bundled / "own.gguf", folder / "users.gguf",
    ]  # fmt: skip
    assert models_folder() == folder  # where pulled models go


def test_a_damaged_model_next_to_the_program_gives_way_to_a_good_one(bundled: Path, folder: Path) -> None:
    (bundled / "tiny-1m.gguf").write_bytes(DATA[:-1] + b"X")
    with pytest.raises(EdgespecError, match=r"program.models.tiny-1m\.gguf is damaged"):
        resolve("tiny-1m")
    (folder / "tiny-1m.gguf").write_bytes(DATA)
    assert resolve("tiny-1m") == folder / "tiny-1m.gguf"
    with pytest.raises(EdgespecError, match="damaged"):
        resolve(str(bundled / "tiny-1m.gguf"))


def test_a_folder_called_models_that_is_not_ours_is_left_alone(bundled: Path) -> None:
    (bundled / "SHA256SUMS").unlink()
    (bundled / "own.gguf").write_bytes(DATA)
    assert installed() == []


def test_a_program_that_is_not_frozen_has_none_next_to_it(
    bundled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bundled / "own.gguf").write_bytes(DATA)
    monkeypatch.setattr(sys, "frozen", False)
    assert installed() == []


def test_check_reads_what_the_catalogue_and_the_manifest_vouch_for(bundled: Path, folder: Path) -> None:
    (folder / "tiny-1m.gguf").write_bytes(DATA)
    (folder / "stray.gguf").write_bytes(DATA)
    (bundled / "own.gguf").write_bytes(b"GGUF2")
    states = {one.path.name: check(one).state for one in installed()}
    assert states == {"tiny-1m.gguf": "good", "own.gguf": "good", "stray.gguf": "unknown"}
    (bundled / "own.gguf").write_bytes(b"GGUF3")
    resolve("tiny-1m")
    with (folder / "tiny-1m.gguf").open("r+b") as file:
        file.seek(1000)
        file.write(b"X")
    assert {check(one).state for one in installed()} == {"damaged", "unknown"}


@pytest.mark.parametrize("text", [b"", b"\xff\0", b"zz  own.gguf\n", b"0" * 64 + b"  ../own.gguf\n"])
def test_a_manifest_that_is_none_vouches_for_nothing(bundled: Path, text: bytes) -> None:
    (bundled / "SHA256SUMS").write_bytes(text)
    (bundled / "own.gguf").write_bytes(b"GGUF2")
    assert [check(one).state for one in installed()] == ["unknown"]
