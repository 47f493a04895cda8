"""Writes tiny GGUF models with random weights whose layers all have attention: a sliding window, experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import finish
from tiny_hybrids import Writer, attention

WINDOW = 24


def write_gemma3(path: Path, *, width: int = 64, window: int = WINDOW, **options: Any) -> Path:
    """Write a Gemma 3 of two layers: the first sees `window` positions, the second all."""
    out, heads, head = Writer(path, "gemma3", **options), 2, 32
    out.keys({
        **_shape(heads, head, width), "attention.sliding_window": window,
        "attention.sliding_window_pattern": 2, "rope.freq_base": 1e6,
    })  # fmt: skip
    out.tensor("token_embd.weight", out.vocab, width)
    out.norms("", width, "output_norm")
    for i in range(2):
        block = f"blk.{i}."
        out.norms(block, width, "attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
        attention(out, block, width, head, heads * head)
        out.norms(block, head, "attn_q_norm", "attn_k_norm")
        out.feed_forward(block, width, 96)
    finish(out.out)
    return path


def write_qwen3moe(path: Path, *, width: int = 64, experts: int = 8, **options: Any) -> Path:
    """Write a Qwen3 of two layers with a mixture of experts, two of which each token uses."""
    out, heads, head = Writer(path, "qwen3moe", **options), 2, 32
    out.keys({
        **_shape(heads, head, width), "expert_count": experts, "expert_used_count": 2,
        "expert_feed_forward_length": 32, "rope.freq_base": 1e6,
    })  # fmt: skip
    out.tensor("token_embd.weight", out.vocab, width)
    out.norms("", width, "output_norm")
    out.tensor("output.weight", out.vocab, width)
    for i in range(2):
        block = f"blk.{i}."
        out.norms(block, width, "attn_norm", "ffn_norm")
        attention(out, block, width, head, heads * head)
        out.norms(block, head, "attn_q_norm", "attn_k_norm")
        out.experts(block, width, 32, experts)
    finish(out.out)
    return path


def _shape(heads: int, head: int, width: int) -> dict[str, Any]:
    return {
        "block_count": 2, "context_length": 32768, "embedding_length": width, "feed_forward_length": 96,
        "attention.head_count": heads, "attention.head_count_kv": 1, "attention.key_length": head,
        "attention.value_length": head, "attention.layer_norm_rms_epsilon": 1e-6,
    }  # fmt: skip


FULL_CACHES = {"gemma3": write_gemma3, "qwen3moe": write_qwen3moe}
"""Models whose caches can be cut at any length."""
