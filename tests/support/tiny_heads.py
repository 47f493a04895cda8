"""Writes GGUF drafters that evaluate rows of their targets, and the targets, with random weights, tiny."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tiny import finish
from tiny_hybrids import Writer


@dataclass(frozen=True)
class Dense:
    """A Llama or Qwen3."""

    layers: int = 4
    width: int = 64
    ff: int = 96
    heads: int = 4
    kv: int = 2


@dataclass(frozen=True)
class Gemma4(Dense):
    """A Gemma 4 or its assistant: every second layer has a sliding window."""

    layers: int = 4
    head: int = 32  # size of the heads of the other layers
    window: int = 16
    window_head: int = 16


ASSISTANT = Gemma4(width=32, layers=2)


def write_dense(path: Path, architecture: str = "llama", shape: Dense = Dense(), **options: Any) -> Path:
    """Write a model of `architecture`, llama or qwen3."""
    s, out = shape, Writer(path, architecture, **options)
    out.keys({**_shape(s), "block_count": s.layers})
    out.tensor("token_embd.weight", out.vocab, s.width)
    out.norms("", s.width, "output_norm")
    out.tensor("output.weight", out.vocab, s.width)
    for i in range(s.layers):
        _attention(out, f"blk.{i}.", s, s.width)
        if architecture == "qwen3":
            out.norms(f"blk.{i}.", s.width // s.heads, "attn_q_norm", "attn_k_norm")
    finish(out.out)
    return path


def write_eagle3(
    path: Path,
    target: Dense = Dense(),
    shape: Dense = Dense(),
    *,
    taps: tuple[int, ...] = (1, 2, 3),
    ids: np.ndarray | None = None,
    embeddings: bool = False,
    keys: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Write an EAGLE-3 drafter that reads the inputs of the layers `taps`; its output head has only `ids`."""
    s, out = shape, Writer(path, "eagle3", **options)
    out.keys({
        **_shape(s), "block_count": 1, "target_layers": list(taps), "target_hidden_size": target.width,
        **(keys or {}),
    })  # fmt: skip
    if embeddings:
        out.tensor("token_embd.weight", out.vocab, s.width)
    out.tensor("fc.weight", s.width, len(taps) * target.width)
    out.norms("", s.width, "output_norm")
    if ids is not None:
        out.out.add_tensor("d2t", ids.astype(np.int64), raw_dtype=gguf.GGMLQuantizationType.I64)
        out.tensor("output.weight", len(ids), s.width)
    _attention(out, "blk.0.", s, 2 * s.width)
    out.norms("blk.0.", s.width, "attn_norm_2")
    finish(out.out)
    return path


def write_gemma4(path: Path, shape: Gemma4 = Gemma4(), **options: Any) -> Path:
    """Write a Gemma 4."""
    s, out = shape, Writer(path, "gemma4", **options)
    out.keys({**_gemma_shape(s), "final_logit_softcapping": 30.0})
    out.out.add_array("gemma4.attention.sliding_window_pattern", _windows(s))
    out.tensor("token_embd.weight", out.vocab, s.width)
    out.norms("", s.width, "output_norm")
    out.tensor("rope_freqs.weight", s.head // 2, value=1.0)
    for i, is_window in enumerate(_windows(s)):
        head, block = s.window_head if is_window else s.head, f"blk.{i}."
        out.tensor(f"{block}attn_k.weight", head * s.kv, s.width)
        out.tensor(f"{block}attn_v.weight", head * s.kv, s.width)
        out.norms(block, head, "attn_k_norm")
        _gemma_layer(out, block, s, head)
    finish(out.out)
    return path


def write_assistant(
    path: Path,
    target: Gemma4 = Gemma4(),
    shape: Gemma4 = ASSISTANT,
    *,
    keys: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Write an assistant of a Gemma 4, which has no keys and values of its own."""
    s, out = shape, Writer(path, "gemma4-assistant", **options)
    own = {"embedding_length_out": target.width, "nextn_predict_layers": s.layers}
    out.keys({**_gemma_shape(s), **own, **(keys or {})})
    out.out.add_array("gemma4-assistant.attention.sliding_window_pattern", _windows(s))
    out.tensor("token_embd.weight", out.vocab, s.width)
    out.norms("", s.width, "output_norm")
    out.tensor("rope_freqs.weight", s.head // 2, value=1.0)
    out.tensor("nextn.pre_projection.weight", s.width, 2 * target.width)
    out.tensor("nextn.post_projection.weight", target.width, s.width)
    for i, is_window in enumerate(_windows(s)):
        _gemma_layer(out, f"blk.{i}.", s, s.window_head if is_window else s.head)
    finish(out.out)
    return path


def _windows(s: Gemma4) -> list[bool]:
    return [i % 2 == 0 for i in range(s.layers)]


def _gemma_shape(s: Gemma4) -> dict[str, Any]:
    return {
        **_shape(s), "block_count": s.layers, "attention.shared_kv_layers": 0,
        "embedding_length_per_layer_input": 0, "attention.sliding_window": s.window,
        "attention.key_length": s.head, "attention.value_length": s.head,
        "attention.key_length_swa": s.window_head, "attention.value_length_swa": s.window_head,
        "rope.dimension_count": s.head, "rope.dimension_count_swa": s.window_head,
        "rope.freq_base": 1e6, "rope.freq_base_swa": 1e4,
    }  # fmt: skip


def _gemma_layer(out: Writer, block: str, s: Gemma4, head: int) -> None:
    """Add the tensors that the layers of a target and of an assistant have."""
    out.norms(block, s.width, "attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
    out.norms(block, head, "attn_q_norm")
    out.tensor(f"{block}attn_q.weight", head * s.heads, s.width)
    out.tensor(f"{block}attn_output.weight", s.width, head * s.heads)
    out.feed_forward(block, s.width, s.ff)
    out.tensor(f"{block}layer_output_scale.weight", 1, value=0.8)


def write_dspark(
    path: Path,
    shape: Dense = Dense(layers=2),
    *,
    taps: tuple[int, ...] = (0, 2, 3),
    ids: np.ndarray | None = None,
    markov: bool = True,
    confidence: bool = True,
    mask: int = 255,
    keys: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Write a DSpark drafter that reads the inputs of the layers `taps`; without `markov`, a DFlash one."""
    s, out, rank = shape, Writer(path, "dflash", **options), 8
    out.keys(
        {**_shape(s), "block_count": s.layers, "target_layers": list(taps), "block_size": 5, **(keys or {})}
    )
    out.out.add_mask_token_id(mask)
    out.tensor("fc.weight", s.width, len(taps) * s.width)
    out.norms("", s.width, "enc.output_norm", "output_norm")
    if ids is not None:
        out.out.add_tensor("d2t", ids.astype(np.int64), raw_dtype=gguf.GGMLQuantizationType.I64)
        out.tensor("output.weight", len(ids), s.width)
    if markov:
        out.tensor("markov_w1.weight", out.vocab, rank)
        out.tensor("markov_w2.weight", out.vocab if ids is None else len(ids), rank)
    if markov and confidence:
        out.tensor("conf_proj.weight", 1, s.width + rank)
        out.tensor("conf_proj.bias", 1, value=0.5)
    for i in range(s.layers):
        _attention(out, f"blk.{i}.", s, s.width)
        out.norms(f"blk.{i}.", s.width // s.heads, "attn_q_norm", "attn_k_norm")
    finish(out.out)
    return path


def _shape(s: Dense) -> dict[str, Any]:
    return {
        "context_length": 32768, "embedding_length": s.width, "feed_forward_length": s.ff,
        "attention.head_count": s.heads, "attention.head_count_kv": s.kv,
        "attention.layer_norm_rms_epsilon": 1e-5, "rope.dimension_count": s.width // s.heads,
    }  # fmt: skip


def _attention(out: Writer, block: str, s: Dense, width: int) -> None:
    """Add the tensors of a layer whose attention reads rows of `width`."""
    head = s.width // s.heads
    out.norms(block, s.width, "attn_norm", "ffn_norm")
    out.tensor(f"{block}attn_q.weight", s.width, width)
    out.tensor(f"{block}attn_k.weight", head * s.kv, width)
    out.tensor(f"{block}attn_v.weight", head * s.kv, width)
    out.tensor(f"{block}attn_output.weight", s.width, s.width)
    out.feed_forward(block, s.width, s.ff)
