"""Writes LoRA adapters with random weights for models that the other writers wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from edgespec.models.gguf.check import check_gguf

RANK = 4


def write_lora(
    path: Path,
    model: Path,
    *bases: str,
    keys: Mapping[str, Any] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    without: str = "",
    dtype: Any = np.float32,
    seed: int = 7,
) -> Path:
    """Write an adapter for the matrices `bases` of `model`: all of the attention by default.

    `keys` replaces metadata, `shapes` the shapes of the adapter's tensors, as numpy has them.
    """
    summary, random = check_gguf(model), np.random.default_rng(seed)
    metadata: dict[str, Any] = {
        "general.architecture": summary.architecture, "general.type": "adapter", "adapter.type": "lora",
        "adapter.lora.alpha": 8.0, **(keys or {}),
    }  # fmt: skip
    out = gguf.GGUFWriter(path, metadata.pop("general.architecture"))
    for key, value in metadata.items():
        if isinstance(value, str):
            out.add_string(key, value)
        elif isinstance(value, float):
            out.add_float32(key, value)
        elif isinstance(value, list):
            out.add_array(key, value)
        else:
            out.add_uint32(key, value)
    attention = [name for name in summary.tensors if ".attn_" in name and "norm" not in name]
    for base in bases or attention:
        matrix = summary.tensors[base].shape if base in summary.tensors else (32, 32)
        columns, rows, *experts = matrix if len(matrix) > 1 else (*matrix, 1)
        parts = {"a": (*experts, RANK, columns), "b": (*experts, rows, RANK)}
        if base == "token_embd.weight":
            parts = {"a": (rows, RANK), "b": (columns, RANK)}
        for part, shape in parts.items():
            if (name := f"{base}.lora_{part}") != without:
                data = random.normal(0, 0.5, (shapes or {}).get(name, shape))
                out.add_tensor(name, data.astype(dtype))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path
