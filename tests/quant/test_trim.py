"""Drafts with a trimmed vocabulary: the same model on fewer ids, and which ids those are."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from making import edgespec, names
from tiny import write_tiny

from edgespec.core import EdgespecError
from edgespec.models.gguf.check import check_gguf
from edgespec.models.gguf.model import LlamaModel
from edgespec.models.gguf.native import LlamaOptions
from edgespec.models.gguf.trimmed import Embeddings, TrimmedModel, open_draft
from edgespec.quant import draft
from edgespec.quant.draft import Timing, make_draft
from edgespec.quant.requant import draft_path, made_draft, requantize
from edgespec.quant.trim import coverage, trim
from edgespec.quant.vocabulary import as_use, choose, count_use, shipped_use

OPTIONS = LlamaOptions(context=128, batch=16)
IDS = np.array([*range(40, 120), 200, 256])
TEXT = list(b"the sea is large {and} old, \xe9t\xe9")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "small.gguf", "llama")


@pytest.fixture
def trimmed(source: Path) -> Path:
    return trim(source, source, IDS, draft_path(source, "v82"))


def logits_of(model: LlamaModel, tokens: list[int], last: int) -> np.ndarray:
    sequence = model.sequence()
    rows = sequence.forward(tokens, last).copy()
    sequence.close()
    return rows


# --- the same model ---


def test_logits_are_those_of_the_whole_model_and_none_elsewhere(source, trimmed):
    with LlamaModel(source, OPTIONS) as whole, open_draft(trimmed, OPTIONS) as model:
        assert isinstance(model, TrimmedModel)
        # More tokens than one batch, among them ids that were trimmed away, and more than one row.
        expected, got = logits_of(whole, TEXT, 5), logits_of(model, TEXT, 5)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got[:, IDS], expected[:, IDS], rtol=1e-4, atol=1e-4)
    gone = np.setdiff1d(np.arange(expected.shape[1]), IDS)
    assert np.isneginf(got[:, gone]).all()


def test_rows_one_by_one_on_ik(ik, source, trimmed):
    """Its first pass of one row reads a token id where the batch has embeddings."""
    options = LlamaOptions(context=128, batch=16, engine=ik, sequences=2)
    with LlamaModel(source, options) as whole, open_draft(trimmed, options) as model:
        expected, sequences = whole.sequence(), [model.sequence(), model.sequence()]
        for token in TEXT[:6]:
            row = expected.forward([token])[0]
            for sequence in sequences:
                np.testing.assert_allclose(sequence.forward([token])[0][IDS], row[IDS], rtol=1e-3, atol=1e-3)


def test_it_is_a_language_model(trimmed):
    with open_draft(trimmed, OPTIONS) as model:
        sequence = model.sequence()
        assert sequence.vocab_size == 257
        sequence.forward(TEXT[:-3])
        first = sequence.forward(TEXT[-3:], 2).copy()
        assert sequence.tokens == TEXT
        sequence.rollback(4)
        sequence.forward([7, 7, 7])
        sequence.rollback(4)
        assert sequence.tokens == TEXT[:4]
        np.testing.assert_allclose(sequence.forward(TEXT[4:], 2), first, rtol=1e-4, atol=1e-4)
        for wrong in ([257], [-1], []):
            with pytest.raises(ValueError, match=r"vocabulary|rows wanted"):
                sequence.forward(wrong)


def test_it_passes_for_its_source_in_the_vocabulary_check(source, trimmed):
    with open_draft(trimmed, OPTIONS) as model:
        assert model.summary.tokenizer_digest == check_gguf(source).tokenizer_digest
    assert check_gguf(trimmed).tokenizer_digest != check_gguf(source).tokenizer_digest


def test_the_starter_says_the_same_with_a_third_of_its_vocabulary(tmp_path, starter_path, starter):
    whole = requantize(starter_path, tmp_path / "whole.gguf", "q4_0")
    text = starter.vocab.tokenize(
        "The sea is large and old. The sea is deep and cold. The sea is full of fish."
    )
    ids = draft.useful_ids(whole, 16384)
    trim(whole, whole, ids, tmp_path / "trimmed.gguf")  # its own embeddings, to compare with itself
    options = LlamaOptions(context=128)
    with LlamaModel(whole, options) as one, open_draft(tmp_path / "trimmed.gguf", options) as other:
        expected, got = logits_of(one, text, len(text)), logits_of(other, text, len(text))
    np.testing.assert_allclose(got[:, ids], expected[:, ids], rtol=1e-3, atol=1e-2)
    sayable = np.isin(expected.argmax(1), ids)
    assert sayable.mean() > 0.7
    assert (expected.argmax(1) == got.argmax(1))[sayable].all()
    assert (tmp_path / "trimmed.gguf").stat().st_size < 0.9 * whole.stat().st_size


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "f16", "bf16"])
def test_embeddings_of_every_type(tmp_path, source, kind):
    path = requantize(source, tmp_path / "out.gguf", kind)
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "token_embd.weight")
    rows = Embeddings(path, check_gguf(path)).rows([0, 256, 97, 97])
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(
        rows, gguf.quants.dequantize(tensor.data, tensor.tensor_type)[[0, 256, 97, 97]]
    )


# --- files that do not belong together ---


def test_without_its_source(source, trimmed):
    source.unlink()
    with pytest.raises(EdgespecError, match=r"small\.gguf"):
        open_draft(trimmed, OPTIONS)


def test_another_model_in_place_of_its_source(source, trimmed):
    write_tiny(source, "llama", replaced=(65, "Zebra"))
    with pytest.raises(EdgespecError, match=r"not made from small\.gguf"):
        open_draft(trimmed, OPTIONS)
    assert made_draft(source) is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"small.gguf", b"../xx.gguf"),  # a name that leads out of the folder
        (b"\x03\0\0\0\0\0\0\x00100", b"\x03\0\0\0\0\0\0\x00x00"),  # a row named after no id
        (b"\x03\0\0\0\0\0\0\x00200", b"\x03\0\0\0\0\0\0\x00999"),  # an id beyond the vocabulary
    ],
)
def test_a_hostile_draft(trimmed, old, new):
    data = trimmed.read_bytes()
    assert data.count(old) == 1
    trimmed.write_bytes(data.replace(old, new))
    with pytest.raises(EdgespecError, match="create it again"):
        open_draft(trimmed, OPTIONS)


def test_rows_of_another_width(tmp_path, source, trimmed):
    data = trimmed.read_bytes()
    key = b"llama.embedding_length\x04\0\0\0"
    at = data.index(key) + len(key)
    other = tmp_path / "other.gguf"
    # The draft as it was, but for a source whose rows are half as wide.
    reader = check_gguf(source)
    shape = reader.tensors["token_embd.weight"]
    assert data[at : at + 4] == (32).to_bytes(4, "little")
    writer = gguf.GGUFWriter(other, "llama")
    writer.add_embedding_length(16)
    writer.add_block_count(1)
    fields = gguf.GGUFReader(source).fields
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(fields["tokenizer.ggml.tokens"].contents())
    writer.add_token_types(fields["tokenizer.ggml.token_type"].contents())
    writer.add_token_merges(["a b"])
    writer.add_tensor("token_embd.weight", np.zeros((shape.shape[1], 16), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert check_gguf(other).tokenizer_digest == reader.tokenizer_digest
    with pytest.raises(EdgespecError, match=r"not made from other\.gguf"):
        open_draft(trimmed, OPTIONS, source=other)


def test_an_architecture_that_cannot_be_trimmed(tmp_path):
    source = write_tiny(tmp_path / "mamba.gguf", "mamba")
    with pytest.raises(EdgespecError, match=r"mamba.*--vocabulary"):
        trim(source, source, IDS, tmp_path / "out.gguf")
    assert names(tmp_path) == {"mamba.gguf"}


# --- which ids ---


def test_control_tokens_and_bytes_come_first_then_use(starter):
    vocab = starter.vocab
    needed = {token for token in range(vocab.size) if len(vocab.piece(token)) <= 1}
    assert {vocab.eos, vocab.tokenize("a")[0]} <= needed
    favourite = vocab.tokenize(" Zanzibar")
    ids = choose(vocab, count_use(vocab, [" Zanzibar" * 50]), len(needed) + len(set(favourite)))
    assert set(ids) == needed | set(favourite)
    assert list(ids) == sorted(ids)
    assert set(choose(vocab, None, 1)) == needed
    assert set(choose(vocab, None, len(needed) + 1)) - needed == {
        next(token for token in range(vocab.size) if token not in needed)
    }


def test_use_counts_every_token(starter):
    use = count_use(starter.vocab, ["a a a a", "b" * 200_000, ""])
    assert use[starter.vocab.tokenize(" a")[0]] == round(8 * np.log2(4))
    assert (as_use(np.array([0, 1, 1 << 40])) == [0, 8, 255]).all()


def test_the_shipped_use_covers_more_than_the_first_ids(starter):
    use = shipped_use(starter.summary.tokenizer_digest)
    assert use is not None
    assert use.shape == (starter.vocab.size,)
    prose = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    tokens = starter.vocab.tokenize(prose + Path(__file__).read_text("utf-8"))
    covered = {size: coverage(choose(starter.vocab, use, size), tokens) for size in (8192, 16384)}
    assert covered[16384] > covered[8192] > coverage(choose(starter.vocab, None, 8192), tokens)
    assert covered[16384] > 0.93
    assert shipped_use("0" * 64) is None


# --- make_draft ---


@pytest.mark.parametrize(("seconds", "kept"), [(5.0, "q4_0-v258"), (7.9, "q4_0"), (9.0, "q4_0")])
def test_the_trimmed_one_is_kept_only_where_it_is_faster(source, monkeypatch, seconds, kept):
    write_tiny(source, "llama", extra=8)
    times = {"as it is": 10.0, "q4_0": 8.0, "q4_0-v258": seconds}
    monkeypatch.setattr(
        draft, "measure",
        lambda source, made, progress: tuple(
            Timing(name, 1, times[name], 1.0) for name in ("as it is", *made)
        ),
    )  # fmt: skip
    report = make_draft(source, vocabulary=258)
    assert report.kept == made_draft(source) == draft_path(source, kept)
    assert report.best.token == times[kept]
    assert len(names(source.parent)) == 2
    with open_draft(report.kept, OPTIONS) as model:
        assert isinstance(model, TrimmedModel) == (kept == "q4_0-v258")
        assert logits_of(model, TEXT, 1).shape == (1, 265)


def test_ids_of_a_corpus_and_a_real_measurement(tmp_path, source, monkeypatch):
    write_tiny(source, "llama", extra=8)
    monkeypatch.setattr(draft, "GAIN", 0.0)  # the last one is kept whatever it measured
    monkeypatch.setattr(draft, "UNDISTURBED", 0.0)
    text = tmp_path / "corpus.txt"
    text.write_text("aaa")
    report = make_draft(source, vocabulary=258, corpus=[text])
    assert [one.kind for one in report.timings] == ["as it is", "q4_0", "q4_0-v258"]
    assert report.kept == draft_path(source, "q4_0-v258")


def test_a_vocabulary_that_is_not_smaller(source):
    with pytest.raises(EdgespecError, match="only 257 tokens"):
        make_draft(source, vocabulary=257)
    assert names(source.parent) == {"small.gguf"}


def test_a_corpus_that_is_not_there(tmp_path, source):
    done = edgespec(
        "quant", "draft", str(source), "--vocabulary", "256", "--corpus", str(tmp_path / "no.txt")
    )
    assert done.returncode == 1
    assert "no.txt" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert names(tmp_path) == {"small.gguf"}


def test_a_copied_pair_still_belongs_together(tmp_path, source, trimmed):
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in (source, trimmed):
        shutil.copy(path, folder)
    assert made_draft(folder / source.name) == folder / trimmed.name
