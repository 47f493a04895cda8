"""The options that commands share and the settings, each declared once, and the environment variables.

The flags (`app.cli.options`), the settings file (`app.settings`), the help of both and docs/settings.md come
from this table. Type and default of an option are those of the dataclass field of its name: in `EngineSpec`
or `Sampling` for flags, in `Settings` for settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from edgespec.machine.governor import Mode

Theme = Literal["dark", "light", "contrast"]
KvType = Literal["f16", "q8_0", "auto"]


@dataclass(frozen=True, slots=True)
class SharedOption:
    """One row: the flag is `--name` with hyphens; with `setting`, `name` is also a key of the settings file.

    `lowest` and `highest` are inclusive; `Sampling` checks the bounds of sampling options. `default` is shown
    in place of the default value, and `variable` is an environment variable that sets the flag.
    """

    name: str
    help: str
    setting: bool = False
    words: tuple[str, ...] = ()
    lowest: int | None = None
    highest: int | None = None
    short: str = ""
    variable: str = ""
    default: str = ""


_ROWS = (
    SharedOption(
        "mode",
        "Resources to use: performance, balanced, saver (least energy), or auto, which goes by power supply, "
        "battery, heat, memory and other programs.",
        setting=True,
        words=get_args(Mode),
        default="the setting",
    ),
    SharedOption(
        "model",
        "A catalog name, a .gguf file or the folder of an ONNX model.",
        setting=True,
        short="-m",
        variable="EDGESPEC_MODEL",
        default="the largest installed model that fits into memory",
    ),
    SharedOption("system", "System prompt.", setting=True),
    SharedOption("persona", "Name of a system prompt in the table personas of the settings.", setting=True),
    SharedOption("temperature", "Sampling temperature; 0: greedy.", setting=True),
    SharedOption("top_k", "Sample from the k likeliest tokens; 0: off.", setting=True),
    SharedOption("top_p", "Sample from the likeliest tokens that sum to p; 1: off.", setting=True),
    SharedOption("min_p", "Drop tokens less likely than this share of the likeliest; 0: off.", setting=True),
    SharedOption(
        "repetition_penalty", "Above 1, avoid tokens of the prompt and the answer; 1: off.", setting=True
    ),
    SharedOption("frequency_penalty", "Avoid tokens of the answer by their count; 0: off."),
    SharedOption("presence_penalty", "Avoid tokens that occur in the answer; 0: off."),
    SharedOption("seed", "Random seed: the same seed gives the same text on the same machine."),
    SharedOption(
        "max_tokens", "Most tokens to generate; 0: until the context is full.", setting=True, lowest=0
    ),
    SharedOption(
        "context",
        "Context size in tokens; 0: as large as the model's.",
        setting=True,
        lowest=0,
        default="4096, or fewer where memory is short",
    ),
    SharedOption(
        "kv_type",
        "Numbers in the KV cache: f16; q8_0, which takes half the memory and changes the output a little; "
        "auto: q8_0 only where memory is short.",
        setting=True,
        words=get_args(KvType),
    ),
    SharedOption("theme", "Colors of the chat.", setting=True, words=get_args(Theme)),
    SharedOption(
        "personas", 'A table of system prompts by name: reviewer = "You review code."', setting=True
    ),
    SharedOption(
        "draft",
        "auto: whatever gains speed on this machine; none: plain decoding; suffix: repeated text only; or a "
        "draft model with the same vocabulary or made for the model (name, .gguf file or ONNX folder).",
    ),
    SharedOption(
        "max_draft", "Most draft tokens per step; fewer are drafted where that pays.", lowest=0, highest=31
    ),
    SharedOption(
        "exact",
        "Make greedy answers token-identical to plain decoding, near-ties included. Needs a KV cache of 8 "
        "bits and slower kernels; refused where it cannot be shown to hold.",
    ),
    SharedOption(
        "threads", "Compute threads; 0: one per physical core, within a CPU quota.", lowest=0, highest=512
    ),
    SharedOption(
        "engine",
        "Runtime for GGUF files; auto: EDGESPEC_ENGINE, or the fastest one at the first use of a model.",
    ),
    SharedOption(
        "lora",
        "FILE[:SCALE]: apply a LoRA adapter, a GGUF file, to the model, not to its draft model; repeatable. "
        "Needs llama.cpp.",
        setting=True,
    ),
    SharedOption("parallel", "Most requests that are generated at the same time.", lowest=1, highest=64),
    SharedOption("queue", "Most requests that wait; more are refused.", lowest=0, highest=10_000),
    SharedOption(
        "server",
        "Use this OpenAI-compatible server instead of a local model: http://127.0.0.1:8080, or "
        "unix:/path/to/socket. The API key is read from OPENAI_API_KEY.",
        variable="EDGESPEC_SERVER",
    ),
)
OPTIONS = {one.name: one for one in _ROWS}

VARIABLES = {
    "EDGESPEC_MODEL": "Default of --model.",
    "EDGESPEC_SERVER": "Default of --server.",
    "EDGESPEC_ENGINE": "The runtime for GGUF files that --engine auto takes: auto, llama.cpp or ik.",
    "EDGESPEC_CONFIG": "Folder of config.toml, in place of the user's configuration folder.",
    "EDGESPEC_MODELS": "Folder of the models, in place of the one in the user's data folder.",
    "EDGESPEC_DATA": "Folder of conversations and of the server's token, in place of the user's data folder.",
    "EDGESPEC_CORPUS": "Folder of `edgespec corpus`, in place of the one in the user's data folder.",
    "EDGESPEC_CACHE": "Folder of measurements and KV-cache snapshots, in place of the user's cache folder.",
    "EDGESPEC_OFFLINE": "Anything but 0: `edgespec pull` never uses the network.",
    "EDGESPEC_NO_MEMORY_CHECK": "Anything but 0: load models that are larger than the free memory.",
    "OPENAI_API_KEY": "API key for the server of --server.",
    "HF_ENDPOINT": "Address of the Hugging Face Hub for `edgespec pull`.",
    "XDG_RUNTIME_DIR": "Folder of the default socket of `edgespec serve`.",
    "LISTEN_PID": "With LISTEN_FDS: sockets that systemd passes to `edgespec serve`.",
    "LISTEN_FDS": "Number of sockets that systemd passes.",
    "GOMP_SPINCOUNT": "Set by Edgespec while a runtime is loaded, unless it or OMP_WAIT_POLICY is set.",
    "OMP_WAIT_POLICY": "If set, Edgespec leaves the waiting of OpenMP threads alone.",
}
"""Every environment variable that Edgespec reads itself; libraries and pip read their own."""
