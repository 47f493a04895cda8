"""The sampling settings that a model's own files recommend: for requests that set none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgespec.core import EdgespecError
from edgespec.sampling import Sampling

_KEYS = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}
"""Fields of Sampling and generation_config.json, and the GGUF keys of the same settings."""


def sampling_defaults(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in `Model.metadata` by field of Sampling. Those that are invalid are left out."""
    found: dict[str, Any] = {}
    for name, key in _KEYS.items():
        value: Any = metadata.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        value = int(value) if name == "top_k" and abs(value) < 2**31 else value
        setting: dict[str, Any] = {name: value}
        try:
            replace(Sampling(), **setting)
        except EdgespecError:
            continue
        found |= setting
    return found


def as_metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a generation_config.json by GGUF key."""
    found = {key: config[name] for name, key in _KEYS.items() if name in config}
    if config.get("do_sample") is False:
        found[_KEYS["temperature"]] = 0.0
    return found
