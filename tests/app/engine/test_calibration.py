"""What was learned is found again; a file that is not ours is not there; writers never meet half a file."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from cgroups import tree
from tiny_attention import write_qwen3moe

from edgespec.acceptance import Acceptance
from edgespec.app.engine import calibration
from edgespec.costs import SIZES, CostCurve
from edgespec.machine import sensors
from edgespec.machine.cgroup import Limits
from edgespec.models import machine_cache
from edgespec.models.gguf.check import check_gguf
from edgespec.models.gguf.model import LlamaModel, LlamaOptions, LlamaSequence

GOOD = {"number": 1.5, "list": [1, 2], "text": "ü"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the store is now: not there yet."""
    monkeypatch.setattr(machine_cache, "cache_folder", lambda: tmp_path / "cache" / "machine")
    return tmp_path / "cache" / "machine"


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Iterator[LlamaModel]:
    with LlamaModel(tiny_llama, LlamaOptions(context=256, max_rows=12)) as model:
        yield model


@pytest.fixture(scope="module")
def sequence(model: LlamaModel) -> LlamaSequence:
    return model.sequence()


def the_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_what_was_saved_is_loaded(folder: Path) -> None:
    assert calibration.load("costs", "abc") is None
    calibration.save("costs", "abc", GOOD)
    loaded = calibration.load("costs", "abc")
    assert loaded is not None
    assert GOOD.items() <= loaded.items()
    assert calibration.load("costs", "abd") is None
    assert calibration.load("acceptance", "abc") is None
    calibration.save("costs", "abc", {"number": 2})
    loaded = calibration.load("costs", "abc")
    assert loaded is not None
    assert loaded["number"] == 2
    assert "list" not in loaded
    assert len(list(folder.iterdir())) == 1


def test_the_store_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    monkeypatch.delenv("EDGESPEC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    if os.name == "posix" and os.uname().sysname == "Linux":
        assert machine_cache.cache_folder().is_relative_to(tmp_path / "xdg" / "edgespec")


def whole(**changes: object) -> bytes:
    return json.dumps({"version": machine_cache.VERSION, **GOOD, **changes}).encode()


FOREIGN = {
    "empty": b"",
    "cut": whole()[:-5],
    "cut in a character": "ü".encode()[:1].join([whole()[:-1], b"}"]),
    "zeros": bytes(4096),
    "not text": bytes(range(256)),
    "another version": whole(version=machine_cache.VERSION + 1),
    "a version in words": whole(version="1"),
    "no version": json.dumps(GOOD).encode(),
    "a list": b"[1]",
    "a number": b"1",
    "null": b"null",
    "a web page": b"<!doctype html>",
    "deep": b"[" * 90_000,
    "a long number": b'{"version": 1, "pace": ' + b"1" * 50_000 + b"}",
    "large": whole(text="x" * 200_000),
    "two": whole() + whole(),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_not_there(folder: Path, name: str) -> None:
    calibration.save("costs", "abc", GOOD)
    the_file(folder).write_bytes(FOREIGN[name])
    assert calibration.load("costs", "abc") is None
    calibration.save("costs", "abc", GOOD)  # and are replaced
    assert calibration.load("costs", "abc") is not None


def test_every_cut_is_noticed(folder: Path) -> None:
    calibration.save("costs", "abc", GOOD)
    data = the_file(folder).read_bytes()
    for length in range(len(data)):
        the_file(folder).write_bytes(data[:length])
        assert calibration.load("costs", "abc") is None


def test_a_huge_file_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration.save("costs", "abc", GOOD)
    with the_file(folder).open("wb") as file:
        file.truncate(1 << 36)  # 64 GiB of nothing
    read: list[int] = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda text: (read.append(len(text)), loads(text))[1])
    assert calibration.load("costs", "abc") is None
    assert sum(read) < 1 << 20


def test_what_is_accepted_in_the_way_is_not_an_error(folder: Path) -> None:
    """A folder or a circle of links where the file should be, a file where the folder should be."""
    calibration.save("costs", "abc", GOOD)
    path = the_file(folder)
    path.unlink()
    path.mkdir()
    calibration.save("costs", "abc", GOOD)
    assert calibration.load("costs", "abc") is None
    assert list(folder.iterdir()) == [path]  # no temporary file stays
    path.rmdir()
    path.symlink_to(path)
    assert calibration.load("costs", "abc") is None
    path.unlink()
    folder.rmdir()
    folder.write_text("mine")
    assert calibration.load("costs", "abc") is None
    calibration.save("costs", "abc", GOOD)
    assert folder.read_text() == "mine"
    folder.unlink()
    folder.parent.rmdir()
    folder.parent.write_text("mine")
    calibration.save("costs", "abc", GOOD)
    assert calibration.load("costs", "abc") is None


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o500)
    calibration.save("costs", "abc", GOOD)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), TypeError("odd")])
def test_a_write_that_fails_leaves_what_was_there(
    folder: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration.save("costs", "abc", GOOD)

    def replace(_from: Path, _to: Path) -> None:
        raise error

    monkeypatch.setattr(Path, "replace", replace)
    if isinstance(error, OSError):
        calibration.save("costs", "abc", {"number": 2})
    else:
        with pytest.raises(type(error)):
            calibration.save("costs", "abc", {"number": 2})
    monkeypatch.undo()
    data = json.loads(the_file(folder).read_bytes())  # the only file
    assert data["number"] == 1.5


def test_writers_at_the_same_time_never_leave_half_a_file(folder: Path) -> None:
    """Every reading, by name or of any file with the final name, finds one writer's data whole."""
    calibration.save("costs", "abc", {"writer": 0, "fill": []})
    path = the_file(folder)
    stop, bad = threading.Event(), list[object]()

    def write(writer: int) -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            calibration.save("costs", "abc", {"writer": writer, "fill": [writer] * (100 + 5000 * (turn % 3))})

    def read() -> None:
        for _ in range(300):
            data = calibration.load("costs", "abc")
            if data is None or set(data["fill"]) - {data["writer"]}:
                bad.append(path.read_bytes()[-50:])
        stop.set()

    threads = [threading.Thread(target=write, args=(n,)) for n in (1, 2, 3)]
    threads.append(threading.Thread(target=read))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bad == []
    assert list(folder.iterdir()) == [path]


# Curves and acceptance of a real model.


@pytest.fixture(autouse=True)
def others(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The share of the cores that other programs use, whatever runs next to these tests."""
    share = [0.0]
    monkeypatch.setattr(calibration, "ProcessorLoad", lambda: lambda: {"others": share[0]})
    return share


def test_what_is_measured_among_other_programs_is_not_kept(
    model: LlamaModel, sequence: LlamaSequence, others: list[float]
) -> None:
    said: list[str] = []
    others[0] = 0.9
    calibration.curve(sequence, said.append)
    assert said == [f"other programs use 90% of the processor: {model.path.name} is measured later"]
    assert calibration.known_curve(model.summary, model.options) is None
    others[0] = 0.0
    calibration.curve(sequence, said.append)
    assert calibration.known_curve(model.summary, model.options) is not None
    data = calibration.load("costs", calibration.cost_key(model.summary, model.options))
    assert data is not None
    assert data["load"] == 0.0
    assert data["time"] > 1.7e9
    assert set(data["seen"]) == set(data["shape"])


def test_what_did_not_fit_into_the_first_measurement_is_measured_later(
    sequence: LlamaSequence, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a slow machine there is time for two sizes only."""
    wanted: list[Sequence[int]] = []

    def measure(
        run: Callable[[int], None], sizes: Sequence[int], *_: object
    ) -> tuple[dict[int, float], float]:
        wanted.append(sizes)
        return {1: 1e-3, **dict.fromkeys(sizes[:2], 2e-3)}, 0.05

    monkeypatch.setattr(calibration, "measure", measure)
    for _ in range(3):
        calibration.curve(sequence, lambda _: None)
    assert wanted[0][:2] == [8, 4]
    assert not {8, 4} & set(wanted[1])
    assert len(wanted[1]) < len(wanted[0])


def test_a_curve_is_measured_once(model: LlamaModel, sequence: LlamaSequence) -> None:
    said: list[str] = []
    assert calibration.known_curve(model.summary, model.options) is None
    first = calibration.curve(sequence, said.append)
    assert len(said) == 1
    assert list(sequence.tokens) == []
    assert first.largest == 12
    assert 0.0 < first.slope <= 1e-3
    assert all(0.0 < first.seconds(n) < 5.0 for n in SIZES if n <= 12)
    second = calibration.curve(sequence, said.append)
    assert len(said) == 1
    known = calibration.known_curve(model.summary, model.options)
    assert known is not None
    for curve in (second, known):
        assert curve.largest == 12
        assert [curve.seconds(n) for n in range(1, 13)] == pytest.approx(
            [first.seconds(n) for n in range(1, 13)], rel=0.3
        )


def test_what_a_curve_learned_is_kept(model: LlamaModel) -> None:
    curve = CostCurve({1: 0.5, 2: 0.55}, 1e-5)
    calibration.keep(model, curve, model.threads)
    known = calibration.known_curve(model.summary, model.options)
    assert known is not None
    assert (known.seconds(1), known.seconds(2), known.slope) == pytest.approx((0.5, 0.55, 1e-5), rel=0.02)


@pytest.mark.parametrize("cancel", [True, False])
def test_a_stopped_measurement_keeps_nothing(
    sequence: LlamaSequence, folder: Path, cancel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:

    def measure(run: Callable[[int], None], *_: object) -> dict[int, float]:
        run(2)
        raise KeyboardInterrupt if cancel else RuntimeError("broken")

    monkeypatch.setattr(calibration, "measure", measure)
    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        calibration.curve(sequence, lambda _: None)
    assert list(sequence.tokens) == []
    assert not folder.exists() or list(folder.iterdir()) == []


BROKEN = [
    {"pace": None},
    {"pace": 0},
    {"pace": "x"},
    {"shape": []},
    {"shape": {"x": 1}},
    {"slope": 9},
    {"pace": 10**400},
]


@pytest.mark.parametrize("change", BROKEN, ids=lambda change: str(change)[:20])
def test_damaged_figures_are_measured_again(
    model: LlamaModel, sequence: LlamaSequence, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "measure", lambda *_: ({1: 0.25, 2: 0.5}, 0.1))
    good = CostCurve({1: 0.5}).as_json()
    key = calibration.cost_key(model.summary, model.options)
    calibration.save("costs", key, {**good, **change})
    assert calibration.known_curve(model.summary, model.options) is None
    said: list[str] = []
    assert calibration.curve(sequence, said.append).seconds(1) == pytest.approx(0.25, rel=0.1)
    assert len(said) == 1
    known = calibration.known_curve(model.summary, model.options)
    assert known is not None
    assert known.seconds(1) == pytest.approx(0.25, rel=0.1)


def test_acceptance_is_kept_by_vocabulary(model: LlamaModel) -> None:
    assert calibration.acceptance(model).as_json() == Acceptance().as_json()
    learned = Acceptance()
    for _ in range(100):
        learned.observe("suffix", 0.9, False)
    calibration.keep_acceptance(model, learned)
    assert calibration.acceptance(model).as_json() == learned.as_json()


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"bins": {}},
        {"bins": [], "levels": []},
        {"bins": {"a": [1]}, "levels": {}},
        {"bins": {}, "levels": {"a": 10**400}},
    ],
    ids=lambda data: str(data)[:30],
)
def test_damaged_acceptance_starts_anew(model: LlamaModel, data: dict[str, Any]) -> None:
    calibration.save("acceptance", model.summary.tokenizer_digest[:24], data)
    assert calibration.acceptance(model).as_json() == Acceptance().as_json()


def test_each_machine_model_and_setting_has_its_own_curve(tiny_llama: Path, tiny_mamba: Path) -> None:
    summary, options = check_gguf(tiny_llama), LlamaOptions()
    keys = [
        calibration.cost_key(summary, options),
        calibration.cost_key(check_gguf(tiny_mamba), options),
        *(
            calibration.cost_key(summary, dataclasses.replace(options, **change))
            for change in (
                {"threads": 97}, {"threads_batch": 97}, {"flash_attention": True}, {"type_k": "q8_0"},
                {"type_v": "q8_0"}, {"repack": False}, {"gpu_layers": 0},
            )
        ),
        calibration.cost_key(dataclasses.replace(summary, vocab_size=9), options),
        calibration.cost_key(dataclasses.replace(summary, types={"Q4_0": 5}), options),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert all(key.isalnum() for key in keys)
    assert calibration.cost_key(check_gguf(tiny_llama), LlamaOptions()) == keys[0]
    # Neither the conversation's length nor the name changes what a pass costs.
    assert (
        calibration.cost_key(dataclasses.replace(summary, name="other"), LlamaOptions(context=99)) == keys[0]
    )


def test_another_processor_or_build_has_its_own_curve(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary, keys = check_gguf(tiny_llama), set[str]()
    keys.add(calibration.cost_key(summary, LlamaOptions()))
    monkeypatch.setattr(calibration, "cpu_name", lambda: "another processor")
    keys.add(calibration.cost_key(summary, LlamaOptions()))
    monkeypatch.setattr("edgespec.models.gguf.backends.compute_cores", lambda: 77)
    keys.add(calibration.cost_key(summary, LlamaOptions()))
    assert len(keys) == 3


def test_each_quota_has_curves_and_settings_of_its_own(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two threads throughout: a quota changes what a pass costs even if it changes no thread count."""
    summary, options = check_gguf(tiny_llama), LlamaOptions(threads=2)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)

    def keys(quota: str) -> tuple[str, str, str]:
        files = {"self/cgroup": "0::/", "self/mountinfo": "9 1 0:9 / /cg rw - cgroup2 none rw"}
        limits = Limits(tree(tmp_path, {f"proc/{k}": v for k, v in files.items()} | {"cg/cpu.max": quota}))
        monkeypatch.setattr(sensors, "limits", lambda: limits)
        costs, settings = calibration.cost_key(summary, options), calibration.tuned_key(summary)
        return costs, settings, calibration._providers_key(summary)

    found = [keys(f"{quota} 100000") for quota in ("max", 50_000, 100_000, 125_000, 150_000)]
    assert all(len(set(kind)) == 5 for kind in zip(*found, strict=True))
    assert keys("200000 100000") == found[0]  # as much as there is
    assert keys("300000 200000") == found[-1]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1}, raising=False)
    assert keys("max 100000")[0] not in [costs for costs, *_ in found]


def test_costs_are_measured_on_varied_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts differ by token, so that one repeated token would read the same few again and again."""
    passes: list[list[int]] = []

    def forward(self: LlamaSequence, new: Sequence[int], last: int = 1) -> Any:
        passes.append(list(new))
        return self.model.forward([(self, new, last)])[0]

    monkeypatch.setattr(LlamaSequence, "forward", forward)
    path = write_qwen3moe(tmp_path / "moe.gguf")
    with LlamaModel(path, LlamaOptions(context=256, threads=1)) as model:
        calibration.curve(model.sequence(), lambda _: None)
    _, *timed = passes
    for rows in (1, 2, 4):
        same = [tuple(new) for new in timed if len(new) == rows]
        assert len({*same}) > len(same) // 2
    assert all(len({*new}) > len(new) // 2 for new in timed)
