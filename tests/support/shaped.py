"""Writes GGUF models with the shapes of real ones and random weights in Q4_K_M:
python tests/support/shaped.py 7B FILE

What a forward pass costs depends on shapes and types of the weights alone, so such a file measures as a
real one does. Nothing it writes makes sense: benchmarks that need text plant it
(tests/support/first_start.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from tiny import byte_characters

Blocks = np.ndarray


@dataclass(frozen=True)
class Shape:
    blocks: int
    width: int
    feed_forward: int
    heads: int
    kv_heads: int
    vocabulary: int


SHAPES = {
    "7B": Shape(32, 4096, 14336, 32, 8, 32768),
    "3B": Shape(28, 3072, 8192, 24, 8, 32768),
    "tiny": Shape(2, 256, 512, 4, 2, 512),
}


def q4_k(random: np.random.Generator, rows: int, columns: int) -> Blocks:
    """Blocks of 256 weights around zero: two halves, six-bit scales and minima, four-bit weights."""
    blocks = random.integers(0, 256, (rows, columns // 256, 144), np.uint8)
    halves = np.frombuffer(np.array([4e-5, 3e-4], np.float16).tobytes(), np.uint8)
    blocks[..., :4] = halves
    return blocks.reshape(rows, -1)


def q6_k(random: np.random.Generator, rows: int, columns: int) -> Blocks:
    """Blocks of 256 weights around zero: six-bit weights, sixteen scales, one half."""
    blocks = random.integers(0, 256, (rows, columns // 256, 210), np.uint8)
    blocks[..., 192:208] = random.integers(1, 32, blocks[..., 192:208].shape, np.uint8)
    blocks[..., 208:] = np.frombuffer(np.array([4e-5], np.float16).tobytes(), np.uint8)
    return blocks.reshape(rows, -1)


MAKERS: dict[Type, Callable[[np.random.Generator, int, int], Blocks]] = {Type.Q4_K: q4_k, Type.Q6_K: q6_k}


def write_shaped(path: Path, shape: Shape) -> Path:
    """A llama model of that shape; as Q4_K_M has it, the head and some of the values and down products are
    Q6_K.

    One block's weights serve for all: a file of 4 GB is written in the time that its disk takes.
    """
    random = np.random.default_rng(1)
    head = shape.width // shape.heads
    out = gguf.GGUFWriter(path, "llama")
    tokens = [*byte_characters(), "<|end|>", *(f"<extra{i}>" for i in range(shape.vocabulary - 257))]
    kinds = [gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL]
    out.add_context_length(8192)
    out.add_embedding_length(shape.width)
    out.add_block_count(shape.blocks)
    out.add_feed_forward_length(shape.feed_forward)
    out.add_head_count(shape.heads)
    out.add_head_count_kv(shape.kv_heads)
    out.add_rope_dimension_count(head)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list(tokens)
    out.add_token_types(kinds + [gguf.TokenType.NORMAL] * (shape.vocabulary - 257))
    out.add_token_merges(["a b"])
    out.add_eos_token_id(256)
    made: dict[tuple[Type, int, int], Blocks] = {}

    def tensor(name: str, rows: int, columns: int, kind: Type) -> None:
        key = kind, rows, columns
        if key not in made:
            made[key] = MAKERS[kind](random, rows, columns)
        out.add_tensor(name, made[key], raw_dtype=kind)

    def norm(name: str) -> None:
        out.add_tensor(name, np.ones(shape.width, np.float32))

    tensor("token_embd.weight", shape.vocabulary, shape.width, Type.Q4_K)
    tensor("output.weight", shape.vocabulary, shape.width, Type.Q6_K)
    norm("output_norm.weight")
    for i in range(shape.blocks):
        larger = Type.Q6_K if i < shape.blocks // 8 or i % 3 == 2 else Type.Q4_K
        norm(f"blk.{i}.attn_norm.weight")
        norm(f"blk.{i}.ffn_norm.weight")
        tensor(f"blk.{i}.attn_q.weight", shape.width, shape.width, Type.Q4_K)
        tensor(f"blk.{i}.attn_k.weight", shape.kv_heads * head, shape.width, Type.Q4_K)
        tensor(f"blk.{i}.attn_v.weight", shape.kv_heads * head, shape.width, larger)
        tensor(f"blk.{i}.attn_output.weight", shape.width, shape.width, Type.Q4_K)
        tensor(f"blk.{i}.ffn_gate.weight", shape.feed_forward, shape.width, Type.Q4_K)
        tensor(f"blk.{i}.ffn_up.weight", shape.feed_forward, shape.width, Type.Q4_K)
        tensor(f"blk.{i}.ffn_down.weight", shape.width, shape.feed_forward, larger)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


if __name__ == "__main__":
    write_shaped(Path(sys.argv[2]), SHAPES[sys.argv[1]])
