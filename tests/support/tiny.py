"""Writes GGUF models with random weights, a few kilobytes each, that llama.cpp really runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np

WIDTH = 32


def byte_characters() -> list[str]:
    """The 256 printable stand-ins that byte-level BPE writes for the bytes 0 to 255."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = {byte: 256 + i for i, byte in enumerate(b for b in range(256) if b not in plain)}
    return [chr(shifted.get(byte, byte)) for byte in range(256)]


def write_tiny(
    path: Path,
    architecture: str,
    *,
    replaced: tuple[int, str] | None = None,
    extra: int = 0,
    keys: Mapping[str, str | float | int] | None = None,
    frequencies: float = 0.0,
) -> Path:
    """A one-layer model over bytes with an end token; `replaced` renames a token, `extra` adds some.

    `keys`: further metadata under the architecture's name. `frequencies` of rotation are divided by it.
    """
    out = gguf.GGUFWriter(path, architecture)
    out.add_context_length(256)
    out.add_embedding_length(WIDTH)
    out.add_block_count(1)
    out.add_layer_norm_rms_eps(1e-5)
    vocabulary = add_vocabulary(out, extra, replaced)
    for key, value in (keys or {}).items():
        kinds = {str: out.add_string, float: out.add_float32, int: out.add_uint32}
        kinds[type(value)](f"{architecture}.{key}", value)
    if frequencies:
        out.add_tensor("rope_freqs.weight", np.full(8, frequencies, np.float32))
    random = np.random.default_rng(7)

    def tensor(name: str, *shape: int, value: float | None = None) -> None:
        data = random.normal(0, 0.3, shape) if value is None else np.full(shape, value)
        out.add_tensor(name, data.astype(np.float32))

    tensor("token_embd.weight", vocabulary, WIDTH)
    tensor("output_norm.weight", WIDTH, value=1.0)
    tensor("output.weight", vocabulary, WIDTH)
    tensor("blk.0.attn_norm.weight", WIDTH, value=1.0)
    {"llama": _llama, "mamba": _mamba}[architecture](out, tensor)
    finish(out)
    return path


def add_vocabulary(out: gguf.GGUFWriter, extra: int = 0, replaced: tuple[int, str] | None = None) -> int:
    """Add the bytes, an end token and `extra` ones, of which `replaced` renames one; return their number."""
    tokens = [*byte_characters(), "<|end|>", *(f"<extra{i}>" for i in range(extra))]
    if replaced:
        tokens[replaced[0]] = replaced[1]
    kinds = [gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * extra
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list(tokens)
    out.add_token_types(kinds)
    out.add_token_merges(["a b"])
    out.add_eos_token_id(256)
    return len(tokens)


def finish(out: gguf.GGUFWriter) -> None:
    """Write the file."""
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def _llama(out: gguf.GGUFWriter, tensor) -> None:
    out.add_feed_forward_length(64)
    out.add_head_count(2)
    out.add_head_count_kv(2)
    out.add_rope_dimension_count(16)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        tensor(f"blk.0.{name}.weight", WIDTH, WIDTH)
    tensor("blk.0.ffn_norm.weight", WIDTH, value=1.0)
    tensor("blk.0.ffn_gate.weight", 64, WIDTH)
    tensor("blk.0.ffn_up.weight", 64, WIDTH)
    tensor("blk.0.ffn_down.weight", WIDTH, 64)


def _mamba(out: gguf.GGUFWriter, tensor) -> None:
    inner, state, rank, conv = 2 * WIDTH, 16, 8, 4
    out.add_feed_forward_length(0)
    out.add_head_count(0)
    out.add_ssm_conv_kernel(conv)
    out.add_ssm_inner_size(inner)
    out.add_ssm_state_size(state)
    out.add_ssm_time_step_rank(rank)
    tensor("blk.0.ssm_in.weight", 2 * inner, WIDTH)
    tensor("blk.0.ssm_conv1d.weight", inner, conv)
    tensor("blk.0.ssm_conv1d.bias", inner)
    tensor("blk.0.ssm_x.weight", rank + 2 * state, inner)
    tensor("blk.0.ssm_dt.weight", inner, rank)
    tensor("blk.0.ssm_dt.bias", inner)
    tensor("blk.0.ssm_a", inner, state, value=-1.0)
    tensor("blk.0.ssm_d", inner)
    tensor("blk.0.ssm_out.weight", WIDTH, inner)
