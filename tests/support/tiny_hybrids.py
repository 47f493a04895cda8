"""Writes GGUF models with recurrent layers and random weights, in the shapes of published models or tiny."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tiny import add_vocabulary, finish


@dataclass(frozen=True)
class Qwen35:
    """A Qwen3.5: every fourth layer has attention, the others a gated delta rule."""

    layers: int = 4
    width: int = 256
    ff: int = 256
    heads: int = 2
    kv: int = 1
    head: int = 64
    rotary: int = 32
    keys: int = 2  # heads of the recurrent layers
    values: int = 2
    state: int = 128  # with 16, ik_llama.cpp computes other logits than llama.cpp


@dataclass(frozen=True)
class Lfm2:
    """An LFM2: short convolutions, and attention in the layers `attention`."""

    layers: int = 3
    width: int = 64
    ff: int = 96
    heads: int = 4
    kv: int = 2
    attention: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class Granite(Lfm2):
    """A Granite 4 hybrid: Mamba-2 layers instead of the convolutions."""

    state: int = 16
    ssm_heads: int = 8


QWEN35_SHAPES = {
    "0.8B": Qwen35(24, 1024, 3584, 8, 2, 256, 64, 16, 16),
    "2B": Qwen35(24, 2048, 6144, 8, 2, 256, 64, 16, 16),
    "4B": Qwen35(32, 2560, 9216, 16, 4, 256, 64, 16, 32),
}
LFM2_350M = Lfm2(16, 1024, 4608, 16, 8, (2, 5, 8, 10, 12, 14))


class Writer:
    """A GGUF file of one architecture over bytes, with an end token and `extra` tokens."""

    def __init__(
        self, path: Path, architecture: str, extra: int = 0, dtype: Any = np.float32, without: str = ""
    ) -> None:
        """`without`: leave out the tensors whose names, without that of their layer, are so."""
        self.out = gguf.GGUFWriter(path, architecture)
        self._prefix, self._dtype, self._without = architecture, dtype, without
        self._random = np.random.default_rng(7)
        self.vocab = add_vocabulary(self.out, extra)

    def keys(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            key = f"{self._prefix}.{name}"
            if isinstance(value, list):
                self.out.add_array(key, value)
            elif isinstance(value, bool):
                self.out.add_bool(key, value)
            elif isinstance(value, float):
                self.out.add_float32(key, value)
            else:
                self.out.add_uint32(key, value)

    def tensor(self, name: str, *shape: int, value: float | None = None) -> None:
        """Add a tensor [..., rows, columns] of `value`, else of normal numbers."""
        if re.sub(r"^blk\.\d+\.", "", name) == self._without:
            return
        if value is None:
            data = self._random.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[-1]))
        else:
            data = np.full(shape, value, np.float32)
        plain = len(shape) == 1 or "conv" in name or name.endswith(("ssm_a", "ssm_d", "norm.weight"))
        self.out.add_tensor(name, data if plain else data.astype(self._dtype))

    def norms(self, prefix: str, size: int, *names: str) -> None:
        for name in names:
            self.tensor(f"{prefix}{name}.weight", size, value=1.0)

    def feed_forward(self, block: str, width: int, ff: int) -> None:
        self.tensor(f"{block}ffn_gate.weight", ff, width)
        self.tensor(f"{block}ffn_up.weight", ff, width)
        self.tensor(f"{block}ffn_down.weight", width, ff)

    def experts(self, block: str, width: int, ff: int, count: int) -> None:
        self.tensor(f"{block}ffn_gate_inp.weight", count, width)
        self.tensor(f"{block}ffn_gate_exps.weight", count, ff, width)
        self.tensor(f"{block}ffn_up_exps.weight", count, ff, width)
        self.tensor(f"{block}ffn_down_exps.weight", count, width, ff)


def write_qwen35(
    path: Path,
    shape: Qwen35 = Qwen35(),
    *,
    heads: int = 0,
    tied: bool = False,
    **options: Any,
) -> Path:
    """Write a Qwen3.5, with `heads` layers for multi-token prediction."""
    s, out = shape, Writer(path, "qwen35", **options)
    third = s.rotary // 6
    out.keys({
        "block_count": s.layers + heads, "context_length": 32768, "embedding_length": s.width,
        "feed_forward_length": s.ff, "attention.head_count": s.heads, "attention.head_count_kv": s.kv,
        "attention.key_length": s.head, "attention.value_length": s.head,
        "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 1e7, "rope.dimension_count": s.rotary,
        "rope.dimension_sections": [third, third, s.rotary // 2 - 2 * third, 0], "ssm.conv_kernel": 4,
        "ssm.inner_size": s.values * s.state, "ssm.state_size": s.state, "ssm.time_step_rank": s.values,
        "ssm.group_count": s.keys, "full_attention_interval": 4,
    })  # fmt: skip
    if heads:
        out.keys({"nextn_predict_layers": heads})
    out.tensor("token_embd.weight", out.vocab, s.width)
    out.norms("", s.width, "output_norm")
    if not tied:
        out.tensor("output.weight", out.vocab, s.width)
    key, value = s.keys * s.state, s.values * s.state
    for i in range(s.layers + heads):
        block = f"blk.{i}."
        out.norms(block, s.width, "attn_norm", "post_attention_norm")
        out.feed_forward(block, s.width, s.ff)
        if i >= s.layers or (i + 1) % 4 == 0:
            out.tensor(f"{block}attn_q.weight", 2 * s.head * s.heads, s.width)  # the query and its gate
            out.tensor(f"{block}attn_k.weight", s.head * s.kv, s.width)
            out.tensor(f"{block}attn_v.weight", s.head * s.kv, s.width)
            out.tensor(f"{block}attn_output.weight", s.width, s.head * s.heads)
            out.norms(block, s.head, "attn_q_norm", "attn_k_norm")
        else:
            recurrent: dict[str, tuple[tuple[int, ...], float | None]] = {
                "attn_qkv.weight": ((2 * key + value, s.width), None),
                "attn_gate.weight": ((value, s.width), None),
                "ssm_conv1d.weight": ((2 * key + value, 4), None),
                "ssm_dt.bias": ((s.values,), 0.5),
                "ssm_a": ((s.values,), -0.3),
                "ssm_beta.weight": ((s.values, s.width), None),
                "ssm_alpha.weight": ((s.values, s.width), None),
                "ssm_norm.weight": ((s.state,), 1.0),
                "ssm_out.weight": ((s.width, value), None),
            }
            for name, (size, number) in recurrent.items():
                out.tensor(block + name, *size, value=number)
        if i >= s.layers:
            out.tensor(f"{block}nextn.eh_proj.weight", s.width, 2 * s.width)
            out.norms(f"{block}nextn.", s.width, "enorm", "hnorm", "shared_head_norm")
    finish(out.out)
    return path


def write_lfm2(path: Path, shape: Lfm2 = Lfm2(), *, experts: int = 0, **options: Any) -> Path:
    """Write an LFM2, in all layers but the first with `experts`."""
    s, out = shape, Writer(path, "lfm2moe" if experts else "lfm2", **options)
    head = s.width // s.heads
    out.keys({
        **_shape(s), "rope.freq_base": 1e6, "shortconv.l_cache": 3,
        "vocab_size": out.vocab,
    })  # fmt: skip
    if experts:
        out.keys({
            "expert_count": experts, "expert_used_count": 2, "leading_dense_block_count": 1,
            "expert_feed_forward_length": 32, "expert_gating_func": 2,
        })  # fmt: skip
    out.tensor("token_embd.weight", out.vocab, s.width)
    out.norms("", s.width, "token_embd_norm")  # the norm before the output
    for i in range(s.layers):
        block = f"blk.{i}."
        out.norms(block, s.width, "attn_norm", "ffn_norm")
        if experts and i:
            out.experts(block, s.width, 32, experts)
            out.tensor(f"{block}exp_probs_b.bias", experts, value=0.0)
        else:
            out.feed_forward(block, s.width, s.ff)
        if i in s.attention:
            attention(out, block, s.width, head * s.kv, s.width)
            out.norms(block, head, "attn_q_norm", "attn_k_norm")
        else:
            for name, size in (
                ("shortconv.conv", (s.width, 3)),
                ("shortconv.in_proj", (3 * s.width, s.width)),
                ("shortconv.out_proj", (s.width, s.width)),
            ):
                out.tensor(f"{block}{name}.weight", *size)
    finish(out.out)
    return path


def write_lfm2moe(path: Path, **options: Any) -> Path:
    """Write an LFM2 with a mixture of experts."""
    return write_lfm2(path, experts=8, **options)


def write_granite(path: Path, shape: Granite = Granite(), **options: Any) -> Path:
    """Write a Granite 4 hybrid."""
    s, out = shape, Writer(path, "granitehybrid", **options)
    inner = 2 * s.width
    out.keys({
        **_shape(s), "rope.dimension_count": s.width // s.heads,
        "ssm.conv_kernel": 4, "ssm.inner_size": inner, "ssm.state_size": s.state,
        "ssm.time_step_rank": s.ssm_heads, "ssm.group_count": 1,
    })  # fmt: skip
    out.tensor("token_embd.weight", out.vocab, s.width)
    out.norms("", s.width, "output_norm")
    for i in range(s.layers):
        block = f"blk.{i}."
        out.norms(block, s.width, "attn_norm", "ffn_norm")
        out.feed_forward(block, s.width, s.ff)
        if i in s.attention:
            attention(out, block, s.width, s.width // s.heads * s.kv, s.width)
        else:
            _mamba2(out, block, s.width, inner, s.state, s.ssm_heads)
    finish(out.out)
    return path


def write_mamba2(path: Path, *, layers: int = 2, width: int = 64, state: int = 16, **options: Any) -> Path:
    """Write a Mamba-2, which has no attention at all."""
    out, inner, heads = Writer(path, "mamba2", **options), 2 * width, 8
    out.keys({
        "block_count": layers, "context_length": 32768, "embedding_length": width, "feed_forward_length": 0,
        "attention.head_count": 0, "attention.layer_norm_rms_epsilon": 1e-5, "ssm.conv_kernel": 4,
        "ssm.inner_size": inner, "ssm.state_size": state, "ssm.time_step_rank": heads, "ssm.group_count": 1,
    })  # fmt: skip
    out.tensor("token_embd.weight", out.vocab, width)
    out.norms("", width, "output_norm")
    for i in range(layers):
        out.norms(f"blk.{i}.", width, "attn_norm")
        _mamba2(out, f"blk.{i}.", width, inner, state, heads)
    finish(out.out)
    return path


def write_falcon_h1(path: Path, shape: Granite = Granite(layers=2), **options: Any) -> Path:
    """Write a Falcon-H1, whose layers have attention and Mamba-2 side by side."""
    s, out = shape, Writer(path, "falcon-h1", **options)
    inner, head = 2 * s.width, s.width // s.heads
    out.keys({
        **_shape(s), "attention.head_count_kv": s.kv, "rope.freq_base": 1e6, "rope.dimension_count": head,
        "attention.key_length": head, "attention.value_length": head,
        "ssm.conv_kernel": 4, "ssm.inner_size": inner, "ssm.state_size": s.state,
        "ssm.time_step_rank": s.ssm_heads, "ssm.group_count": 1, "vocab_size": out.vocab,
    })  # fmt: skip
    out.tensor("token_embd.weight", out.vocab, s.width)
    out.norms("", s.width, "output_norm")
    for i in range(s.layers):
        block = f"blk.{i}."
        out.norms(block, s.width, "attn_norm")
        out.tensor(f"{block}ffn_norm", s.width, value=1.0)
        out.feed_forward(block, s.width, s.ff)
        attention(out, block, s.width, head * s.kv, s.width)
        _mamba2(out, block, s.width, inner, s.state, s.ssm_heads)
    finish(out.out)
    return path


def _shape(s: Lfm2) -> dict[str, Any]:
    return {
        "block_count": s.layers, "context_length": 32768, "embedding_length": s.width,
        "feed_forward_length": s.ff, "attention.head_count": s.heads,
        "attention.head_count_kv": [s.kv if i in s.attention else 0 for i in range(s.layers)],
        "attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip


def attention(out: Writer, block: str, width: int, keys: int, queries: int) -> None:
    out.tensor(f"{block}attn_q.weight", queries, width)
    out.tensor(f"{block}attn_k.weight", keys, width)
    out.tensor(f"{block}attn_v.weight", keys, width)
    out.tensor(f"{block}attn_output.weight", width, queries)


def _mamba2(out: Writer, block: str, width: int, inner: int, state: int, heads: int) -> None:
    out.tensor(f"{block}ssm_in.weight", 2 * inner + 2 * state + heads, width)
    out.tensor(f"{block}ssm_conv1d.weight", inner + 2 * state, 4)
    out.tensor(f"{block}ssm_conv1d.bias", inner + 2 * state)
    out.tensor(f"{block}ssm_dt.bias", heads, value=0.5)
    out.tensor(f"{block}ssm_a", heads, 1, value=-0.3)
    out.tensor(f"{block}ssm_d", heads, 1)
    out.tensor(f"{block}ssm_norm.weight", 1, inner, value=1.0)
    out.tensor(f"{block}ssm_out.weight", width, inner)


HYBRIDS = {
    "qwen35": write_qwen35, "lfm2": write_lfm2, "lfm2moe": write_lfm2moe, "granitehybrid": write_granite,
    "falcon-h1": write_falcon_h1, "mamba2": write_mamba2,
}  # fmt: skip
