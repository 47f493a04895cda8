"""Writes an ONNX folder from a GGUF file or a checkpoint, in a process of its own: see `export`.

Nothing of a model is run as code: only safetensors are read, and no Python that a checkpoint brings along.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

from edgespec.files import write_whole
from edgespec.models.gguf.check import check_gguf

PROGRESS = "progress"
"""The file in the work folder with the progress: a fraction from 0 to 1, a space, words."""

MODEL = "model"
"""The finished folder in the work folder."""

SCORE = "score"
"""The first argument that requests logits instead."""

TOKENS_FILE, SCORES_FILE = "tokens.npy", "scores.npy"

_SAME = 0.15  # relative difference below which two quantized matrices come of one
_BY_DIGITS = {"smollm", "starcoder", "refact"}  # each digit is a token of its own, the rest as in GPT-2
_SETTINGS = ("is_local", "local_files_only")  # of transformers itself, written with the tokenizer


def main(arguments: list[str]) -> int:
    """SOURCE WORK BITS: write the model at SOURCE, a .gguf file or a folder, to WORK/model.

    score SOURCE WORK: write the logits that the checkpoint SOURCE has after each of WORK/tokens.npy to
    WORK/scores.npy. 0, or what went wrong as the last line on standard error.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            if arguments[0] == SCORE:
                _score(Path(arguments[1]), Path(arguments[2]))
            else:
                _export(Path(arguments[0]), Path(arguments[1]), int(arguments[2]))
    except Exception as error:  # noqa: BLE001 - four libraries: whatever they raise is one line for the user
        lines = str(error).strip().splitlines()
        sys.stderr.write(f"\n{type(error).__name__}: {lines[0] if lines else 'no reason given'}\n")
        return 1
    return 0


def _export(source: Path, work: Path, bits: int) -> None:
    _say(work, 0.0, "loading libraries")
    checkpoint = source
    if source.is_file():
        checkpoint = work / "checkpoint"
        _read_gguf(source, work, checkpoint)
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    tied = bool(config.get("tie_word_embeddings", False))
    out = work / MODEL
    _build(checkpoint, out, work, bits)
    if checkpoint != source:
        shutil.rmtree(checkpoint)  # its disk space is wanted
    _say(work, 0.95, "sharing tables")
    from edgespec.quant.compact import compact

    compact(out, tied)
    if checkpoint != source:
        split = check_gguf(source).metadata.get("tokenizer.ggml.pre")
        _tidy_tokenizer(out, int(config["vocab_size"]), split)
    _say(work, 1.0, "written")


def _read_gguf(source: Path, work: Path, checkpoint: Path) -> None:
    """Write what a GGUF file holds as a checkpoint, its weights as numbers again."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    alone = work / "gguf"  # the file alone: other files in its folder are not part of the model
    alone.mkdir()
    try:
        (alone / "model.gguf").symlink_to(source)
    except OSError:  # Windows wants a privilege for it
        shutil.copyfile(source, alone / "model.gguf")
    _say(work, 0.02, "reading the GGUF file")
    only: dict[str, Any] = {"gguf_file": "model.gguf", "local_files_only": True, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(str(alone), **only)
    model = AutoModelForCausalLM.from_pretrained(
        str(alone), dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **only
    )
    _tie(model)
    _say(work, 0.25, "writing a checkpoint")
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    shutil.rmtree(alone)


def _tie(model: Any) -> None:
    """Make embeddings and output head one matrix where they are roundings of the same.

    Some files have the two in different types although the model has one; the head's is the better one.
    """
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if table is head or table.shape != head.shape:
        return
    if ((table - head).norm() / head.norm()).item() < _SAME:
        model.config.tie_word_embeddings = True
        model.get_input_embeddings().weight = head


def _build(checkpoint: Path, out: Path, work: Path, bits: int) -> None:
    """onnxruntime-genai's model builder, which quantizes with onnxruntime's own quantizers."""
    _say(work, 0.3, "building the graph")
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    precision, cache = f"int{bits}", str(work / "cache")
    options = ["hf_token=false", "hf_remote=false", "shared_embeddings=false", *OPTIONS[bits]]
    where = ("", str(checkpoint), str(out), precision, "cpu", cache)
    layers = int(json.loads((checkpoint / "config.json").read_text("utf-8"))["num_hidden_layers"])
    with contextlib.redirect_stdout(_Layers(work, layers)), _heard(_Products(work, 7 * layers)):
        create_model(*where, **parse_extra_options(*where, options))


OPTIONS = {
    4: ("int4_accuracy_level=4",),
    8: ("int4_accuracy_level=4",),
}
"""Of the builder, by bits. Accuracy level 4: products in whole numbers, as fast as a processor multiplies."""


class _Layers(io.TextIOBase):
    """Reports which layer the builder reads."""

    def __init__(self, work: Path, layers: int) -> None:
        self._work, self._layers = work, layers

    def write(self, text: str) -> int:
        words = text.split()
        if words[:2] == ["Reading", "layer"] and words[2].isdigit():
            _say(self._work, 0.3 + 0.15 * int(words[2]) / self._layers, "building the graph")
        return len(text)


class _Products(logging.Handler):
    """Reports which matrix the quantizer has done."""

    def __init__(self, work: Path, products: int) -> None:
        super().__init__()
        self._work, self._done, self._products = work, 0, products

    def emit(self, record: logging.LogRecord) -> None:
        if "complete quantization" in record.getMessage():
            self._done += 1
            _say(self._work, 0.45 + 0.4 * min(1.0, self._done / self._products), "quantizing")


@contextlib.contextmanager
def _heard(handler: logging.Handler) -> Any:
    logger = logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _score(source: Path, work: Path) -> None:
    """Texts of WINDOW tokens, one after the other: float32 [tokens, vocabulary]."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from edgespec.quant.agreement import windows

    _say(work, 0.0, "loading the source")
    model = AutoModelForCausalLM.from_pretrained(
        str(source), dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    tokens = np.load(work / TOKENS_FILE)
    shape = len(tokens), model.config.vocab_size
    scores = np.lib.format.open_memmap(work / SCORES_FILE, "w+", np.float32, shape)
    place = 0
    with torch.inference_mode():
        for text in windows(tokens.tolist()):
            scores[place : place + len(text)] = model(torch.tensor([text])).logits[0].numpy()
            place += len(text)
            _say(work, place / len(tokens), "reading with the source")
    scores.flush()


def _tidy_tokenizer(folder: Path, vocab_size: int, split: object) -> None:
    """Repair what transformers makes of a GGUF file's tokenizer.

    It adds an unknown token where a file has none, beyond the model's vocabulary, and does not support how
    every family splits a text: `split` is llama.cpp's name for that.
    """
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8"))
    for name in _SETTINGS:
        settings.pop(name, None)
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text("utf-8"))
    tokenizer["added_tokens"] = [one for one in tokenizer["added_tokens"] if one["id"] < vocab_size]
    splitter = tokenizer.get("pre_tokenizer")
    if split in _BY_DIGITS and splitter and splitter["type"] == "ByteLevel":
        digits = {"type": "Digits", "individual_digits": True}
        tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, splitter]}
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), "utf-8")


def _say(work: Path, fraction: float, what: str) -> None:
    """Note how far the work is, in one step: the other process never sees half a line."""
    write_whole(work / PROGRESS, f"{fraction:.3f} {what}".encode())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
