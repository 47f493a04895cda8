"""Writes folders with ONNX decoders of random weights, a few kilobytes each, that onnxruntime really runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tiny import byte_characters

WIDTH, HEADS, SIZE, POSITIONS, LAYERS = 32, 2, 16, 2048, 2
Attention = Literal["shared", "plain"]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


def write_tiny_onnx(
    folder: Path,
    attention: Attention = "shared",
    *,
    layout: Literal["genai", "optimum"] = "genai",
    half: bool = False,
    external: bool = True,
    head: Literal["plain", "biased"] = "plain",
    replaced: tuple[int, str] | None = None,
    extra: int = 0,
    seed: int = 7,
) -> Path:
    """A two-layer model over bytes with an end token.

    "shared" attention is one node that can extend its cache in place, "plain" is made of products and joins
    its cache. A "biased" head ends in a way that Edgespec leaves alone. `replaced` renames a token, `extra`
    adds some.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [*byte_characters(), "<|end|>", *(f"<extra{i}>" for i in range(extra))]
    if replaced:
        tokens[replaced[0]] = replaced[1]
    graph = _Writer(len(tokens), attention, half, head, seed).graph()
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = {"location": "model.onnx.data", "size_threshold": 128, "convert_attribute": False}
    onnx.save(model, folder / "model.onnx", save_as_external_data=external, **(options if external else {}))
    _write_tokenizer(folder, tokens)
    _write_config(folder, layout, len(tokens))
    (folder / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    return folder


def _write_tokenizer(folder: Path, tokens: list[str]) -> None:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    (folder / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [
                    {
                        "id": 256, "content": "<|end|>", "single_word": False, "lstrip": False,
                        "rstrip": False, "normalized": False, "special": True,
                    }
                ],
                "pre_tokenizer": level,
                "decoder": level,
                "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": []},
            }
        ),
        "utf-8",
    )  # fmt: skip


def _write_config(folder: Path, layout: str, size: int) -> None:
    if layout == "genai":
        decoder = {
            "filename": "model.onnx", "head_size": SIZE, "hidden_size": WIDTH, "num_attention_heads": HEADS,
            "num_hidden_layers": LAYERS, "num_key_value_heads": 1,
        }  # fmt: skip
        model = {"type": "llama", "context_length": POSITIONS, "vocab_size": size, "eos_token_id": 256}
        (folder / "genai_config.json").write_text(json.dumps({"model": {**model, "decoder": decoder}}))
        return
    config = {
        "model_type": "llama", "max_position_embeddings": POSITIONS, "vocab_size": size, "head_dim": SIZE,
        "num_attention_heads": HEADS, "num_key_value_heads": 1, "hidden_size": WIDTH,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [256]}))


class _Writer:
    def __init__(self, size: int, attention: Attention, half: bool, head: str, seed: int) -> None:
        self._size, self._attention, self._head = size, attention, head
        self._float = np.float16 if half else np.float32
        self._type = TensorProto.FLOAT16 if half else TensorProto.FLOAT
        self._random = np.random.default_rng(seed)
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []

    def graph(self) -> onnx.GraphProto:
        shared = self._attention == "shared"
        self._int("axis1", [1])
        self._int("one", 1)
        hidden = self._node("Gather", [self._weight("embed", self._size, WIDTH, scale=1.0), "input_ids"])
        inputs = [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "new"]),
            helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]),
        ]
        if shared:
            self._lengths()
        else:
            inputs.append(helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["batch", "new"]))
            table = self._weight("places", POSITIONS, WIDTH, scale=1.0)
            hidden = self._node("Add", [hidden, self._node("Gather", [table, "position_ids"])])
            self._causal()
        outputs = [
            helper.make_tensor_value_info("logits", self._type, ["batch", "new", self._size]),
        ]
        for i in range(LAYERS):
            for kind in ("key", "value"):
                shape = ["batch", 1, "past", SIZE]
                inputs.append(helper.make_tensor_value_info(f"past_key_values.{i}.{kind}", self._type, shape))
                outputs.append(
                    helper.make_tensor_value_info(
                        f"present.{i}.{kind}", self._type, [*shape[:2], "total", SIZE]
                    )
                )
            x = self._norm(hidden, f"{i}.first")
            q, k, v = (
                self._node("MatMul", [x, self._weight(f"{i}.{name}", WIDTH, width)])
                for name, width in (("q", HEADS * SIZE), ("k", SIZE), ("v", SIZE))
            )
            mixed = self._shared(i, q, k, v) if shared else self._plain(i, q, k, v)
            mixed = self._node("MatMul", [mixed, self._weight(f"{i}.o", HEADS * SIZE, WIDTH)])
            hidden = self._node("Add", [hidden, mixed])
            x = self._norm(hidden, f"{i}.second")
            x = self._node("Relu", [self._node("MatMul", [x, self._weight(f"{i}.up", WIDTH, 64)])])
            hidden = self._node(
                "Add", [hidden, self._node("MatMul", [x, self._weight(f"{i}.down", 64, WIDTH)])]
            )
        x = self._norm(hidden, "last")
        product = [x, self._weight("head", WIDTH, self._size)]
        if self._head == "plain":
            self._node("MatMul", product, outputs=["logits"])
        else:
            bias = self._weight("bias", self._size)
            self._node("Add", [self._node("MatMul", product), bias], outputs=["logits"])
        return helper.make_graph(self._nodes, "tiny", inputs, outputs, self._weights)

    def _lengths(self) -> None:
        """What GroupQueryAttention wants to know: the index of the last token, the length of all."""
        last = self._node("Sub", [self._node("ReduceSum", ["attention_mask", "axis1"], keepdims=0), "one"])
        self._node("Cast", [last], outputs=["seqlens"], to=TensorProto.INT32)
        total = self._node("Gather", [self._node("Shape", ["attention_mask"]), "one"], axis=0)
        self._node("Cast", [total], outputs=["length"], to=TensorProto.INT32)
        angles = np.arange(POSITIONS)[:, None] / 10000 ** (np.arange(SIZE // 2) / (SIZE // 2))
        self._add("cos", np.cos(angles).astype(self._float))
        self._add("sin", np.sin(angles).astype(self._float))

    def _shared(self, i: int, q: str, k: str, v: str) -> str:
        past = [f"past_key_values.{i}.{kind}" for kind in ("key", "value")]
        present = [f"present.{i}.{kind}" for kind in ("key", "value")]
        name = f"{i}.mixed"
        self._nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                [q, k, v, *past, "seqlens", "length", "cos", "sin"],
                [name, *present],
                domain="com.microsoft",
                num_heads=HEADS,
                kv_num_heads=1,
                do_rotary=1,
            )
        )
        return name

    def _causal(self) -> None:
        """What is added to scores [new, total]: nothing, or minus a lot for what comes later."""
        self._int("zero", 0)
        self._int("axis2", [2])
        self._add("nothing", np.zeros((), self._float))
        self._add("never", np.full((), -10000.0, self._float))
        total = self._node("Gather", [self._node("Shape", ["attention_mask"]), "one"], axis=0)
        places = self._node("Range", ["zero", total, "one"])
        mine = self._node("Unsqueeze", ["position_ids", "axis2"])
        seen = self._node("LessOrEqual", [places, mine])
        bias = self._node("Where", [seen, "nothing", "never"])
        self._node("Unsqueeze", [bias, "axis1"], outputs=["causal"])

    def _plain(self, i: int, q: str, k: str, v: str) -> str:
        def heads(x: str, count: int) -> str:
            split = self._node("Reshape", [x, self._int(f"{x}.shape", [0, 0, count, SIZE])])
            return self._node("Transpose", [split], perm=[0, 2, 1, 3])

        keys, values = (
            self._node(
                "Concat",
                [f"past_key_values.{i}.{kind}", heads(x, 1)],
                outputs=[f"present.{i}.{kind}"],
                axis=2,
            )
            for kind, x in (("key", k), ("value", v))
        )
        turned = self._node("Transpose", [keys], perm=[0, 1, 3, 2])
        scale = self._add(f"{i}.scale", np.full((), 1 / math.sqrt(SIZE), self._float))
        scores = self._node("Mul", [self._node("MatMul", [heads(q, HEADS), turned]), scale])
        weights = self._node("Softmax", [self._node("Add", [scores, "causal"])], axis=-1)
        mixed = self._node("Transpose", [self._node("MatMul", [weights, values])], perm=[0, 2, 1, 3])
        return self._node("Reshape", [mixed, self._int(f"{i}.joined", [0, 0, HEADS * SIZE])])

    def _norm(self, x: str, name: str) -> str:
        weight = self._add(f"{name}.norm", np.ones(WIDTH, self._float))
        return self._node("SimplifiedLayerNormalization", [x, weight], axis=-1, epsilon=1e-5)

    def _weight(self, name: str, *shape: int, scale: float = 0.3) -> str:
        return self._add(name, self._random.normal(0, scale, shape).astype(self._float))

    def _int(self, name: str, value: int | list[int]) -> str:
        return self._add(name, np.array(value, np.int64))

    def _add(self, name: str, data: np.ndarray) -> str:
        self._weights.append(numpy_helper.from_array(data, name))
        return name

    def _node(self, op: str, inputs: list[str], outputs: list[str] | None = None, **attributes) -> str:
        outputs = outputs or [f"n{len(self._nodes)}"]
        self._nodes.append(helper.make_node(op, inputs, outputs, **attributes))
        return outputs[0]
