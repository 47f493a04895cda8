"""Native code that crashes, hangs or is wrong does so in a child process; what is used instead, and kept."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faulty
import numpy as np
import pytest
import serving
from faulty import Faulty, make
from typer.testing import CliRunner

from edgespec.app.cli import main
from edgespec.core import Cancelled
from edgespec.machine.sensors import process_runs
from edgespec.models.gguf import selftest, trial
from edgespec.models.gguf.backends import files
from edgespec.models.gguf.check import check_gguf
from edgespec.models.gguf.ik import Ik
from edgespec.models.gguf.model import LlamaModel, LlamaOptions
from edgespec.models.gguf.part import part_of, write_part
from edgespec.models.gguf.selftest_worker import _batches, differences
from edgespec.models.gguf.trial import ChildVerdict, Start
from edgespec.quant.requant import draft_path, requantize
from edgespec.quant.trim import trim

ON = "on this processor: running"
REPACKED = f"with repacked weights {ON} without them, which is slower"
SHORT = ("--raw", "--draft", "none", "--max-tokens", "4")


@pytest.fixture(scope="module")
def crashing(tmp_path_factory: pytest.TempPathFactory) -> Faulty:
    """llama.cpp as it was seen: it crashes in the first product of several rows with repacked weights."""
    return make(tmp_path_factory.mktemp("crashing"), faulty.ILLEGAL)


@pytest.fixture(scope="module")
def tried(crashing: Faulty, starter_path: Path) -> subprocess.CompletedProcess[str]:
    """Its first run."""
    return crashing.edgespec("run", "-m", str(starter_path), *SHORT, "One, two, three,")


def losses(said: str) -> list[str]:
    """The lines on what was given up."""
    return [line for line in said.splitlines() if "processor" in line]


# What the user sees


def test_a_crash_with_repacked_weights_is_one_line(tried: subprocess.CompletedProcess[str]) -> None:
    assert tried.returncode == 0, tried.stderr
    assert losses(tried.stderr) == [f"edgespec: llama.cpp crashed (SIGILL) {REPACKED}"]
    assert "four" in tried.stdout


def test_the_second_start_needs_no_child_until_a_library_is_another(
    crashing: Faulty, tried: subprocess.CompletedProcess[str], starter_path: Path
) -> None:
    command = ["run", "-m", str(starter_path), *SHORT, "One, two, three,"]
    assert crashing.loads() > 1
    again = crashing.edgespec(*command)
    assert (again.stdout, losses(again.stderr)) == (tried.stdout, losses(tried.stderr))
    assert crashing.loads() == 1
    os.utime(crashing.library)
    assert losses(crashing.edgespec(*command).stderr) == losses(tried.stderr)
    assert crashing.loads() > 1


def test_the_chat_says_it_once(crashing: Faulty, starter_path: Path) -> None:
    arguments = ["chat", "--plain", "-m", str(starter_path), "--draft", "none", "--max-tokens", "4"]
    done = crashing.edgespec(*arguments, text="Hi\n", environment={"EDGESPEC_DATA": str(crashing.cache)})
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count(REPACKED) == 1


def test_the_server_says_it_and_serves(
    crashing: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving.sys, "executable", str(crashing.python))
    with serving.running(tmp_path, "--draft", "none", tcp=False, env=crashing.environment()) as server:
        request = {
            "model": serving.MODEL,
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 4,
        }
        with server.client() as client:
            reply = client.post("/v1/chat/completions", json=request).json()
    assert reply["usage"]["completion_tokens"] > 0
    assert losses("".join(server.said)) == [f"edgespec: llama.cpp crashed (SIGILL) {REPACKED}"]


def test_a_draft_is_tested_as_well_and_the_line_is_said_once(
    crashing: Faulty, starter_path: Path, tmp_path: Path
) -> None:
    target = tmp_path / "small.gguf"
    target.symlink_to(starter_path)
    draft = trim(target, target, np.arange(2000), draft_path(target, "v2000"))
    code = """
import sys
from pathlib import Path
from edgespec.app.engine import calibration
from edgespec.app.engine.assembly import open_engine
from edgespec.app.engine.engine import Engine
from edgespec.costs import CostCurve
calibration.curve = lambda one, *_, **__: CostCurve({1: 1.0 if one.model.path == target else 0.01, 8: 1.0})
target, draft = map(Path, sys.argv[1:])
with open_engine(target, draft) as engine:
    print(engine.draft.path.name, engine.draft.options.repack, *engine.notes, sep=chr(10))
"""
    done = crashing.run(["-c", code, str(target), str(draft)])
    lines = [draft.name, "False", f"llama.cpp crashed (SIGILL) {REPACKED}"]
    assert done.stdout.splitlines() == lines, done.stderr


def test_doctor_lists_what_was_tested_and_switched_off(
    crashing: Faulty, tried: subprocess.CompletedProcess[str], starter_path: Path
) -> None:
    report = json.loads(crashing.edgespec("doctor", "--json", "-m", str(starter_path)).stdout)
    found = {one["repack"]: one for one in report["self_tests"] if one["model"] == starter_path.name}
    assert (found[True]["state"], found[True]["reason"]) == ("failed", "crashed (SIGILL)")
    assert found[False]["state"] == "passed"
    assert 0 <= found[False]["difference"] < 0.1
    assert f"{found[True]['name']}: crashed (SIGILL)" in report["switched_off"]
    crashing.loads()
    text = crashing.edgespec("doctor", "-m", str(starter_path)).stdout
    assert f"switched off {found[True]['name']}: crashed (SIGILL)" in text
    assert crashing.loads() == 1
    crashing.edgespec("doctor", "--fresh", "-m", str(starter_path))
    assert crashing.loads() > 2


@pytest.mark.parametrize(
    ("fault", "when", "reason"),
    [(faulty.WRONG, "repacked", "gave wrong logits"), ("exit(0);", "repacked", "ended without a result")],
)
def test_other_faults_lead_to_the_same(
    tmp_path: Path, starter_path: Path, fault: str, when: str, reason: str
) -> None:
    done = make(tmp_path, fault, when).edgespec("run", "-m", str(starter_path), *SHORT, "One, two, three,")
    assert losses(done.stderr) == [f"edgespec: llama.cpp {reason} {REPACKED}"]
    assert "four" in done.stdout


def test_the_other_engine_is_the_last_resort(tmp_path: Path, starter_path: Path, ik: str) -> None:
    broken = make(tmp_path, faulty.ILLEGAL, "1")
    command = ["run", "-m", str(starter_path), *SHORT, "One, two, three,"]
    done = broken.edgespec(*command)
    assert losses(done.stderr) == [f"edgespec: llama.cpp crashed (SIGILL) {ON} on ik instead"]
    assert "four" in done.stdout
    faulty.break_ik(broken)
    for _ in range(2):
        done = broken.edgespec(*command)
        assert (done.returncode, done.stdout) == (1, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"edgespec: {starter_path.name} does not run on this processor (")
        assert "llama.cpp crashed (SIGILL), and ik crashed (SIGILL)): try another" in line


def test_an_engine_that_does_not_even_start(tmp_path: Path, starter_path: Path, ik: str) -> None:
    """ik's ready-made library on a processor without AVX2."""
    broken = make(tmp_path, faulty.ILLEGAL, "0")
    faulty.break_ik(broken)
    done = broken.edgespec("run", "-m", str(starter_path), "--engine", "ik", *SHORT, "One, two, three,")
    assert losses(done.stderr) == [f"edgespec: ik crashed (SIGILL) {ON} on llama.cpp instead"]
    assert "four" in done.stdout
    report = json.loads(broken.edgespec("doctor", "--json", "-m", str(starter_path)).stdout)
    assert report["engines"]["ik"].startswith("not used: ik crashed (SIGILL) when it was started")
    assert report["engines"]["llama.cpp"].startswith("llama.cpp ")


@pytest.mark.parametrize("fault", [faulty.KILLED, faulty.NO_MEMORY])
def test_too_little_memory_is_not_the_kernels_fault(tmp_path: Path, starter_path: Path, fault: str) -> None:
    broken = make(tmp_path, fault, "1")
    done = broken.edgespec("run", "-m", str(starter_path), *SHORT, "Hi")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"edgespec: not enough memory for {starter_path.name}: ")
    assert not list(broken.cache.rglob("selftest-*"))


def test_a_cache_folder_that_cannot_be_written_is_no_obstacle(crashing: Faulty, starter_path: Path) -> None:
    nowhere = {"EDGESPEC_CACHE": str(starter_path)}
    done = crashing.edgespec("run", "-m", str(starter_path), *SHORT, "One, two, three,", environment=nowhere)
    assert losses(done.stderr) == [f"edgespec: llama.cpp crashed (SIGILL) {REPACKED}"]
    assert "four" in done.stdout


def test_what_cannot_be_kept_is_known_to_this_process(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGESPEC_CACHE", str(tiny_llama))  # a file
    monkeypatch.setattr(trial, "_outcomes", {})
    assert selftest.failure(tiny_llama, LlamaOptions()) is None
    monkeypatch.setattr(trial, "run", lambda *_: pytest.fail("a second child"))
    assert selftest.failure(tiny_llama, LlamaOptions()) is None


# Children

HANG = """
import sys, time
from pathlib import Path
from edgespec.models.gguf import trial
from edgespec.models.gguf.native import LlamaOptions
from edgespec.models.gguf.selftest import settle
trial._PATIENCE = float(sys.argv[2])
print(settle(Path(sys.argv[1]), LlamaOptions(), note=print).repack)
"""


@pytest.fixture(scope="module")
def hanging(tmp_path_factory: pytest.TempPathFactory) -> Faulty:
    return make(tmp_path_factory.mktemp("hanging"), faulty.HANG)


def test_a_child_without_a_sign_of_life_hangs(hanging: Faulty, starter_path: Path) -> None:
    done = hanging.run(["-c", HANG, str(starter_path), "0.5"])
    assert done.stdout.splitlines() == [f"llama.cpp hung {REPACKED}", "False"], done.stderr


def test_no_child_is_left_of_a_process_that_was_killed(hanging: Faulty, starter_path: Path) -> None:
    environment = hanging.environment({"EDGESPEC_CACHE": str(hanging.cache / "other")})
    hanging.loads()
    parent = subprocess.Popen([str(hanging.python), "-c", HANG, str(starter_path), "1000"], env=environment)
    log = hanging.cache.parent / "loaded"
    wait_for(log.exists)
    child = int(log.read_text().split()[0])
    time.sleep(0.5)
    assert process_runs(child)
    parent.kill()
    parent.wait()
    wait_for(lambda: not running(child))


def test_a_test_is_given_up_with_the_load(tmp_path: Path, starter_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("EDGESPEC_CACHE", str(tmp_path))
    monkeypatch.setattr(trial, "_outcomes", {})
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        trial.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1]
    )
    with pytest.raises(Cancelled):
        LlamaModel(starter_path, LlamaOptions(), lambda fraction: False)
    (child,) = (process for process in started if process.args == trial.worker_command())
    assert child.returncode == -signal.SIGKILL


def running(pid: int) -> bool:
    """Whether the process is there and not just its exit code."""
    try:
        return not re.search(r"^State:\s+Z", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return False


def wait_for(true: Callable[[], bool]) -> None:
    start = time.monotonic()
    while not true():
        assert time.monotonic() - start < 60
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("code", "noise", "said", "verdict"),
    [
        (0, [], {"difference": 0.0}, ("passed", "")),
        (-signal.SIGSEGV, [], {}, ("failed", "crashed (SIGSEGV)")),
        (-signal.SIGILL, [], {"difference": 0.0}, ("failed", "crashed (SIGILL)")),  # on its way out
        (-signal.SIGABRT, ["GGML_ASSERT(x) failed"], {}, ("failed", "crashed (SIGABRT)")),
        (-signal.SIGABRT, ["ggml_aligned_malloc: insufficient memory"], {}, ("memory", "")),
        (1, ["MemoryError"], {}, ("memory", "")),
        (0, [], {"refused": "llama.cpp says: unable to allocate CPU buffer"}, ("memory", "")),
        (-signal.SIGKILL, [], {}, ("memory", "")),
        (-signal.SIGTERM, [], {}, ("refused", "the test of the engine was terminated (SIGTERM): try again")),
        (0, [], {}, ("failed", "ended without a result")),
        (0, [], {"refused": "it has an encoder"}, ("refused", "it has an encoder")),
        (0, ["out of memory, but it went on"], {"difference": 0.0}, ("passed", "")),
        (0xC000001D, [], {}, ("failed", "crashed (0xC000001D)")),  # Windows
        (
            1,
            ["ModuleNotFoundError: No module named 'x'"],
            {},
            ("failed", "ended with code 1: ModuleNotFoundE"),
        ),
    ],
)
def test_how_a_child_ended(
    code: int, noise: list[str], said: dict[str, Any], verdict: tuple[str, str]
) -> None:
    lines = [*noise, *map(json.dumps, [{"ready": True}, said])]
    pipe = SimpleNamespace(write=lambda _: None, flush=lambda: None)
    stdout = [f"{line}\n".encode() for line in lines]
    process: Any = SimpleNamespace(stdin=pipe, stdout=stdout, wait=lambda _: code)
    found = trial._Listener(process, "difference", lambda: True).judge(dict, 0)
    assert (found.state, found.reason[: len(verdict[1]) or None]) == verdict


# Lower kernels of a portable build


def test_lower_kernels_are_for_all_models_from_then_on(
    tmp_path: Path, starter_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scripted children: only a portable build has several kernels (tests/binary)."""
    monkeypatch.setenv("EDGESPEC_CACHE", str(tmp_path))
    for name, empty in (("_starts", {}), ("_outcomes", {}), ("_loaded", set())):
        monkeypatch.setattr(trial, name, empty)
    asked: list[tuple[str, bool | None]] = []

    def run(request: Callable[[], dict[str, Any]], *_: object) -> ChildVerdict:
        wanted = request()
        asked.append((wanted["kernels"], wanted.get("options", {}).get("repack")))
        if wanted["kernels"] == "?":
            return ChildVerdict("passed", "", {"variants": ["best", "middle", "lower", "lowest"]})
        good = wanted["kernels"] == "lowest"
        return ChildVerdict(
            "passed" if good else "failed",
            "" if good else "crashed (SIGILL)",
            {"build": "b", "difference": 0.0},
        )

    monkeypatch.setattr(trial, "run", run)
    said: list[str] = []
    assert selftest.settle(starter_path, LlamaOptions(), note=said.append) == LlamaOptions()
    line = (
        "llama.cpp crashed (SIGILL) with its best kernels for this processor: running with those for lowest"
    )
    assert said == [f"{line}, which is slower"]
    both = [("", True)] * 2 + [("", False)] * 2  # each failure is seen twice
    assert asked == [*both, ("?", None), *[("middle", True)] * 2, ("lowest", True)]
    assert trial.start("llama.cpp", files("llama.cpp")).kernels == "lowest"
    asked.clear()
    monkeypatch.setattr(trial, "_starts", {})
    monkeypatch.setattr(trial, "_outcomes", {})
    selftest.settle(starter_path, LlamaOptions(), note=said.append)
    assert asked == []
    assert said[1:] == said[:1]
    selftest.settle(starter_path, LlamaOptions(flash_attention=False))
    assert asked == [("lowest", True)]


def test_an_engine_that_is_loaded_keeps_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_loaded", {"llama.cpp"})
    assert trial.lower_kernels("llama.cpp", "", lambda: True) == []


def test_kernels_of_a_portable_build(tmp_path: Path, starter_path: Path) -> None:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgespec" / "wheels"
    wheel = next(cache.glob("portable-*/llama_cpp_python-*.whl"), None)
    if wheel is None:
        pytest.skip("there is no portable build of llama.cpp here: `make binary` makes it")
    names = make(tmp_path / "a", faulty.ILLEGAL, "0", wheel).run(
        ["-c", "from edgespec.models.gguf import kernels; print(*kernels.ranked())"]
    )
    best, lower = names.stdout.split()[:2]
    broken = make(tmp_path / "b", faulty.ILLEGAL, f'has("libggml-cpu-{best}.so")', wheel)
    faulty.without_ik(broken)
    done = broken.edgespec("run", "-m", str(starter_path), *SHORT, "One, two, three,")
    line = (
        f"llama.cpp crashed (SIGILL) with its best kernels for this processor: running with those for {lower}"
    )
    assert losses(done.stderr) == [f"edgespec: {line}, which is slower"]
    assert "four" in done.stdout


# What is compared


def test_differences_are_relative_to_what_logits_say() -> None:
    random = np.random.default_rng(5)
    single = random.normal(0, 4, (3, 500)).astype(np.float32)
    assert (differences(single, single) == 0).all()
    rounded = single + random.normal(0, 0.1, single.shape).astype(np.float32)
    assert 0.02 < differences(single, rounded).max() < 0.03
    assert differences(single, single + np.float32(100)).max() < 1e-3  # no probability changes
    other = single.copy()
    other[1] = -other[1]
    assert differences(single, other).tolist() == [0.0, pytest.approx(2.0, abs=0.01), 0.0]
    nothing = single * np.float32(1e-6)  # a model that says nothing: any change is tiny
    assert differences(nothing, -nothing).max() < 1e-4
    empty = np.zeros_like(single)
    assert differences(empty, empty).max() == 0.0


def test_what_is_not_finite_must_be_so_in_both() -> None:
    single = np.ones((3, 10), np.float32)
    single[:2, 4] = np.nan
    many = np.ones((3, 10), np.float32)
    many[1, 7], many[2, 7] = np.inf, np.nan
    assert differences(single, many).tolist() == [np.inf, 0.0, np.inf]


def test_random_models_pass(tiny_llama: Path, tiny_mamba: Path) -> None:
    for path in (tiny_llama, tiny_mamba):
        found = selftest.test(path, LlamaOptions(), Start(""), lambda: True)
        assert (found.state, found.reason) == ("passed", ""), path
        assert found.reports["difference"] < 0.02


def test_kernels_that_were_seen_to_be_wrong_are_found_out(
    starter_path: Path, ik: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ik's kernel for Q4_1 and 32 rows, which is not used any more."""
    summary, part = check_gguf(starter_path), tmp_path / "part.gguf"
    write_part(starter_path, summary, part_of(summary) or {}, part)

    def worst() -> dict[str, float]:
        with LlamaModel(part, LlamaOptions(context=256, threads=1, engine=ik)) as model:
            batches = _batches(model.sequence())
            return {name: float(differences(one, many).max()) for name, one, many in batches}

    assert max(worst().values()) < selftest._PART_BOUND / 2
    monkeypatch.setattr(Ik, "most_rows", lambda self, types: 1 << 30)
    found = worst()
    assert max(found["prompt"], found["32"]) > 2 * selftest._PART_BOUND


@pytest.mark.parametrize("kind", ["q5_1", "q4_1"])
def test_ik_is_right_with_weights_that_it_reads_few_rows_of(
    kind: str, starter_path: Path, ik: Any, tmp_path: Path
) -> None:
    path = starter_path
    if kind == "q5_1":  # what becomes of this model's widths in llama.cpp's recipe
        path = requantize(starter_path, tmp_path / "q5.gguf", "q5_k_m", pure=False)
    assert kind.upper() in check_gguf(path).types
    assert selftest.failure(path, LlamaOptions(engine=ik)) is None


# The part of a model that is tested


def test_a_part_has_every_kind_of_tensor(starter_path: Path, tmp_path: Path) -> None:
    path = requantize(starter_path, tmp_path / "mixed.gguf", "q4_k_m", pure=False)
    whole = check_gguf(path)
    pieces = part_of(whole)
    assert pieces is not None
    write_part(path, whole, pieces, tmp_path / "part.gguf")
    part = check_gguf(tmp_path / "part.gguf")

    def kinds(summary: Any, rows: int) -> set[tuple[object, ...]]:
        return {
            (
                re.sub(r"\d+", "", name),
                one.type,
                one.shape[:-1],
                one.shape[-1] % 256 if one.shape[-1] == rows else one.shape,
            )
            for name, one in summary.tensors.items()
        }

    assert kinds(part, part.vocab_size) == kinds(whole, whole.vocab_size)
    assert set(part.types) == set(whole.types)
    assert part.tensor_bytes < whole.tensor_bytes / 10
    assert part.vocab_size % 256 == whole.vocab_size % 256
    data = path.read_bytes()
    for name in ("blk.0.attn_q.weight", "output_norm.weight"):
        one, other = whole.tensors[name], part.tensors[name]
        written = (tmp_path / "part.gguf").read_bytes()[other.offset : other.offset + other.bytes]
        assert written == data[one.offset : one.offset + one.bytes]


def test_a_part_has_every_kind_of_attention(starter_path: Path) -> None:
    """ik_llama.cpp dies of a model all of whose layers have a sliding window."""
    whole = check_gguf(starter_path)
    slides = replace(whole, metadata={**whole.metadata, "llama.attention.sliding_window": 512})
    for summary, count in ((whole, 1), (slides, 6)):
        numbers = {name.split(".")[1] for name in part_of(summary) or {} if name.startswith("blk.")}
        assert numbers == set(map(str, range(count)))


def test_a_small_model_is_tested_whole(tiny_llama: Path) -> None:
    assert part_of(check_gguf(tiny_llama)) is None


def test_a_file_that_became_shorter_is_no_part(starter_path: Path, tmp_path: Path) -> None:
    summary = check_gguf(starter_path)
    short = tmp_path / "short.gguf"
    short.write_bytes(starter_path.read_bytes()[:5_000_000])
    with pytest.raises(OSError, match="shorter"):
        write_part(short, summary, part_of(summary) or {}, tmp_path / "part.gguf")


# What identifies a test


def test_another_processor_engine_option_or_shape_is_tested_again(
    tiny_llama: Path, tiny_mamba: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary, options = check_gguf(tiny_llama), LlamaOptions()
    start = trial.unknown_start("llama.cpp", files("llama.cpp"))

    def key(options: LlamaOptions = options, start: Start = start, summary: Any = summary) -> str:
        return selftest._key(summary, options, start)

    changes: list[dict[str, Any]] = [
        {"repack": False}, {"threads": 7}, {"flash_attention": True}, {"type_k": "q8_0"}, {"batch": 64},
    ]  # fmt: skip
    keys = [key(), key(summary=check_gguf(tiny_mamba)), key(start=replace(start, kernels="haswell"))]
    keys += [key(replace(options, **change)) for change in changes]
    monkeypatch.setattr(trial, "cpu_name", lambda: "another")
    keys.append(key(start=trial.unknown_start("llama.cpp", files("llama.cpp"))))
    assert len(set(keys)) == len(keys)
    monkeypatch.undo()
    same = [{"context": 99}, {"sequences": 3}, {"max_rows": 1}]
    assert {key(replace(options, **change)) for change in same} == {key()}


def test_foreign_files_are_tests_that_were_not_made(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGESPEC_CACHE", str(tmp_path))
    monkeypatch.setattr(trial, "_outcomes", {})
    assert selftest.failure(tiny_llama, LlamaOptions()) is None
    (file,) = tmp_path.rglob("selftest-*.json")
    good = json.loads(file.read_text())
    for change in ({"state": 5}, {"reason": "no"}, {"types": [4]}, {"types": None}, {"state": "failed"}):
        file.write_text(json.dumps({**good, **change}))
        monkeypatch.setattr(trial, "_outcomes", {})
        assert selftest.failure(tiny_llama, LlamaOptions()) is None
        assert json.loads(file.read_text()) == {**good, "seconds": json.loads(file.read_text())["seconds"]}


def test_tuning_times_what_it_says(tmp_path: Path, crashing: Faulty, starter_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from edgespec.core import EdgespecError
from edgespec.models.gguf.native import LlamaOptions
from edgespec.quant.timing import Candidate, TimingBench
from edgespec.quant.tune import QUICK, _first
path = Path(sys.argv[1])
with TimingBench(QUICK, 1, lambda *_: True) as bench:
    try:
        bench.open(Candidate(path, LlamaOptions(context=512)), "repacked")
    except EdgespecError as error:
        print(error)
    options = _first(path, "llama.cpp")
    print(options.repack)
    bench.open(Candidate(path, options), "not repacked")
"""
    done = crashing.run(["-c", code, str(starter_path)])
    assert done.stdout.splitlines() == ["llama.cpp crashed (SIGILL)", "False"], done.stderr


def test_the_benchmark_says_what_it_costs(starter_path: Path) -> None:
    arguments = ["bench", "self-test", "-m", str(starter_path), "--engine", "llama.cpp"]
    result = CliRunner().invoke(main.app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)["engines"]["llama.cpp"]
    assert found["outcome"] == "passed"
    assert found["after"] < found["first"]
    assert 20 < found["megabytes"] < 500
    assert "llama.cpp  passed: " in CliRunner().invoke(main.app, arguments).output
