"""What each kind of cache takes back: every state against a fresh one, and checkpoints of recurrent layers.

Caches of keys can be cut at any length, with a sliding window too.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import write_tiny
from tiny_attention import FULL_CACHES
from tiny_hybrids import HYBRIDS, Qwen35, write_falcon_h1, write_granite, write_lfm2, write_qwen35

from edgespec.core import Cancelled, EdgespecError
from edgespec.models.gguf.check import check_gguf
from edgespec.models.gguf.footprint import running_state
from edgespec.models.gguf.model import LlamaModel, LlamaOptions, LlamaSequence
from edgespec.models.gguf.running_state import RunningState, pack, unpack
from edgespec.models.state import load_state, save_state

WRITERS = {**HYBRIDS, **FULL_CACHES}
# All in float32, which flash attention is not, so that rounding does not select another expert.
OPTIONS = LlamaOptions(context=256, sequences=3, threads=1, type_k="f32", type_v="f32", flash_attention=False)
NEAR = 1e-3  # logits of other batch sizes differ by up to 3e-5; wrong states by 0.1 to 5
SNAPSHOTS = {
    "qwen35": 4, "lfm2": 12, "lfm2moe": 12, "granitehybrid": 0, "falcon-h1": 0, "mamba2": 0, "mamba": 0
}  # fmt: skip
hybrids = pytest.mark.parametrize("name", list(SNAPSHOTS), indirect=True, scope="module")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("hybrids")
    found = {name: write(folder / f"{name}.gguf") for name, write in WRITERS.items()}
    return {**found, "mamba": write_tiny(folder / "mamba.gguf", "mamba")}


@pytest.fixture(scope="module", params=[*SNAPSHOTS, *FULL_CACHES])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str, paths: dict[str, Path]) -> Iterator[LlamaModel]:
    with LlamaModel(paths[name], OPTIONS) as model:
        yield model


@pytest.fixture
def fresh(model: LlamaModel) -> Iterator[Callable[[list[int], int], np.ndarray]]:
    """The last rows of a text that an empty sequence evaluates in one pass."""
    other = model.sequence()

    def evaluate(text: list[int], last: int = 1) -> np.ndarray:
        other.rollback(0)
        return other.forward(text, last).copy()

    yield evaluate
    other.close()


def random_text(length: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


def test_how_many_rows_can_be_taken_back(model, name):
    assert model.undo == SNAPSHOTS.get(name)
    assert model.is_hybrid == (name in SNAPSHOTS)
    assert model.shares_passes == (name in FULL_CACHES)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 8, 12, 14])
def test_every_number_of_rows_taken_back(model, sequence, fresh, rows):
    """Of each pass any number of rows, also those of which the engine only reports that it took them back."""
    text, after = random_text(40), random_text(3, 2)
    most = rows if model.undo is None else min(model.undo, rows - 1)
    for taken in range(1, rows + 1):
        sequence.rollback(0)
        sequence.mark_at([40])
        sequence.forward(text)
        sequence.forward(random_text(rows, 3), rows)
        kept = [*text, *random_text(rows, 3)[: rows - taken]]
        assert sequence.reachable(len(kept)) == (len(kept) if taken <= most else 40)
        sequence.rollback(len(kept))
        assert list(sequence.tokens) == (kept if taken <= most else text)
        logits = sequence.forward([*kept[len(sequence.tokens) :], *after], 3)
        np.testing.assert_allclose(logits, fresh([*kept, *after], 3), atol=NEAR)


def test_random_rounds_are_those_of_a_fresh_cache(model, sequence, fresh):
    random, text = np.random.default_rng(5), random_text(30)
    sequence.forward(text)
    replayed = 0
    for _ in range(200):
        lacking = text[len(sequence.tokens) :]
        replayed += len(lacking)
        drafted = int(random.integers(0, 9)) if len(lacking) <= 2 else 0  # as `decode` does
        new = [*lacking, *random.integers(0, 256, 1 + drafted).tolist()]
        rows = sequence.forward(new, 1 + drafted).copy()
        accepted = int(random.integers(0, drafted + 1))
        text += new[len(lacking) : len(lacking) + 1 + accepted]
        np.testing.assert_allclose(rows[accepted], fresh(text)[0], atol=NEAR)
        sequence.rollback(len(text))
        assert list(sequence.tokens) == text[: len(sequence.tokens)]
        if len(text) > 230:
            text = text[:30]
            sequence.rollback(30)
    assert replayed < 900  # the whole text would be 200 times as much
    assert sequence.reachable(len(sequence.tokens)) == len(sequence.tokens)


def test_two_rollbacks_in_a_row(model, sequence, fresh):
    text = random_text(20)
    sequence.forward(text)
    sequence.forward(random_text(8, 2), 8)
    sequence.rollback(26)
    sequence.rollback(25)  # the engine would return True, and the state would be that of 26 tokens
    kept = [*text, *random_text(8, 2)][: len(sequence.tokens)]
    assert list(sequence.tokens) == kept
    np.testing.assert_allclose(sequence.forward([7])[0], fresh([*kept, 7])[0], atol=NEAR)


def test_an_aborted_pass_leaves_a_state_that_is_known(model, sequence, fresh):
    text = random_text(60)
    sequence.mark_at([40])
    sequence.forward(text)
    model.cancel()
    with pytest.raises(Cancelled):
        sequence.forward(random_text(6, 2), 6)
    kept = len(sequence.tokens)
    assert list(sequence.tokens) == text[:kept]
    assert kept >= 40
    np.testing.assert_allclose(sequence.forward([*text[kept:], 9])[0], fresh([*text, 9])[0], atol=NEAR)


def test_an_aborted_prompt(model, sequence, fresh):
    model.cancel()
    with pytest.raises(Cancelled):
        sequence.forward(random_text(200))
    assert list(sequence.tokens) == []
    np.testing.assert_allclose(sequence.forward(random_text(20))[0], fresh(random_text(20))[0], atol=NEAR)


@hybrids
def test_marks_lie_where_they_were_asked_for(model, sequence, fresh):
    text = random_text(200)
    sequence.mark_at([150, 40, 199, 500])
    sequence.forward(text)
    for length, left in ((199, 199), (170, 150), (150, 150), (149, 40), (40, 40), (39, 0)):
        assert sequence.reachable(length) == left
        sequence.rollback(length)
        assert list(sequence.tokens) == text[:left]
        np.testing.assert_allclose(sequence.forward([9])[0], fresh([*text[:left], 9])[0], atol=NEAR)


@hybrids
def test_sharing_and_saved_states(model, sequence, fresh, tmp_path, name):
    text = random_text(100)
    sequence.mark_at([50])
    sequence.forward(text)
    other = model.sequence()
    assert other.share(sequence, 60)
    assert list(other.tokens) == text[:50]
    np.testing.assert_allclose(other.forward([9])[0], fresh([*text[:50], 9])[0], atol=NEAR)
    assert not other.share(sequence, 30)
    assert save_state(sequence, tmp_path / "state")
    assert load_state(other, tmp_path / "state")
    assert list(other.tokens) == text
    np.testing.assert_allclose(other.forward([9])[0], fresh([*text, 9])[0], atol=NEAR)
    other.rollback(70)
    assert list(other.tokens) == text[:50]
    np.testing.assert_allclose(other.forward([9])[0], fresh([*text[:50], 9])[0], atol=NEAR)
    other.close()


def test_sequences_do_not_see_each_other(model, fresh):
    one, two = model.sequence(), model.sequence()
    texts = random_text(30), random_text(20, 2)
    first = [rows.copy() for rows in model.forward([(one, texts[0], 1), (two, texts[1], 1)])]
    alone = [fresh_row(model, one, two, text) for text in texts]
    for rows, row in zip(first, alone, strict=True):
        np.testing.assert_allclose(rows[0], row, atol=NEAR)


def fresh_row(model: LlamaModel, one: LlamaSequence, two: LlamaSequence, text: list[int]) -> np.ndarray:
    one.close()
    two.close()
    other = model.sequence()
    row = other.forward(text)[0].copy()
    other.close()
    return row


@hybrids
def test_the_size_of_a_state(model, sequence, name, paths):
    sequence.forward(random_text(10))
    sequence.mark_at([10])
    (mark,) = sequence._states.marks.values()
    assert (
        running_state(check_gguf(paths[name])) <= len(mark) <= running_state(check_gguf(paths[name])) + 2000
    )
    sequence.forward(random_text(100))
    assert len(sequence.state()) <= model.state_bytes


def test_a_batch_that_is_smaller_than_the_snapshots(paths):
    for batch in (1, 2, 4):
        with LlamaModel(paths["qwen35"], LlamaOptions(context=64, batch=batch, threads=1)) as model:
            assert model.undo == max(0, batch - 2)
            assert np.isfinite(model.sequence().forward(random_text(20))).all()


def test_a_sliding_window_is_rolled_back_beyond_itself(paths):
    text = random_text(700)
    with LlamaModel(paths["gemma3"], replace(OPTIONS, context=1024)) as model:
        sequence, fresh = model.sequence(), model.sequence()
        sequence.forward(text)
        for length in (500, 499, 20):
            sequence.rollback(length)
            assert list(sequence.tokens) == text[:length]
            fresh.rollback(0)
            rows = sequence.forward([9, 8], 2).copy()
            np.testing.assert_allclose(rows, fresh.forward([*text[:length], 9, 8], 2), atol=NEAR)


class Recorded:
    """The native cache of a sequence: what was called."""

    def __init__(self) -> None:
        self.saved, self.cuts = 0, []

    def cut(self, length: int) -> bool:
        self.cuts.append(length)
        return True

    def save(self, *, partial: bool, into: np.ndarray | None = None) -> np.ndarray:
        self.saved += 1
        return np.zeros(64 << 20, np.uint8) if into is None else into

    def load(self, data: np.ndarray, *, partial: bool) -> bool:
        return partial


def test_checkpoints_of_large_states_are_few_and_keep_the_first_and_the_newest():
    state = RunningState(Recorded(), 0)
    lengths = [100, 110, 400, 800, 1600, 1700, 3000]
    state.mark_at(0, lengths)
    for length in lengths:
        state.decoded(length, 10)
    assert sorted(state.marks) == [100, 800, 1700, 3000]


def test_no_checkpoint_is_taken_twice():
    cache = Recorded()
    state = RunningState(cache, 4)
    state.prepare(100, 4)  # the engine takes back four rows
    assert cache.saved == 0
    state.prepare(100, 5)
    assert state.rollback(106, 102) == 100
    state.prepare(100, 8)  # the state is that of the checkpoint
    assert cache.saved == 1


def test_packed_states():
    parts = {5: np.arange(7, dtype=np.uint8), 9: np.zeros(0, np.uint8)}
    data = pack(parts)
    assert {length: part.tolist() for length, part in unpack(data).items()} == {5: list(range(7)), 9: []}
    for damaged in (data[:-1], data[:4], data[:20], np.full(40, 255, np.uint8), data[:0]):
        assert unpack(damaged) == {}


@pytest.mark.parametrize(
    ("write", "missing"),
    [
        (write_falcon_h1, "ssm_conv1d.bias"),
        (write_qwen35, "attn_qkv.weight"),
        (write_qwen35, "attn_gate.weight"),
        (write_granite, "ssm_conv1d.bias"),
    ],
)
def test_files_without_tensors_whose_absence_crashes_the_engine(write, missing, tmp_path):
    path = write(tmp_path / "m.gguf", without=missing)
    with pytest.raises(EdgespecError, match=rf"m\.gguf.*{missing}"):
        check_gguf(path)


_LEFT_OUT = """
import sys
from pathlib import Path
sys.path[:] = {paths}
from edgespec.core import EdgespecError
from edgespec.models.gguf import trial
from edgespec.models.gguf.model import LlamaModel, LlamaOptions
trial.trust("")
for path in Path({folder}).iterdir():
    print(path.name, flush=True)
    try:
        with LlamaModel(path, LlamaOptions(context=64, threads=1)) as model:
            model.sequence().forward([1, 2, 3], 2)
    except EdgespecError:
        pass
print("end")
"""


def test_no_missing_tensor_crashes_the_engine(tmp_path, paths):
    """Each tensor of each architecture left out in turn, in a process of its own."""
    for architecture, write in WRITERS.items():
        names = {re.sub(r"^blk\.\d+\.", "", name) for name in check_gguf(paths[architecture]).tensors}
        for name in names:
            write(tmp_path / f"{architecture} without {name}", without=name)
    code = _LEFT_OUT.format(paths=sys.path, folder=repr(str(tmp_path)))
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.split("\n")[-2:] == ["end", ""], found.stdout[-60:] + found.stderr[-300:]


def test_other_missing_tensors_are_the_engines_to_refuse(tmp_path):
    path = write_lfm2(tmp_path / "m.gguf", without="shortconv.conv.weight")
    with pytest.raises(EdgespecError, match=r"m\.gguf.*shortconv\.conv"):
        LlamaModel(path, LlamaOptions(context=64))


def test_a_checkpoint_before_a_draft_takes_the_same_memory_again(ik, tmp_path):
    """The state of ik_llama.cpp grows by a few bytes per token; new memory costs more than the copy."""
    path = write_qwen35(tmp_path / "model.gguf", Qwen35(width=256, state=128))
    with LlamaModel(path, LlamaOptions(context=256, threads=1, engine="ik")) as model:
        sequence = model.sequence()
        sequence.forward([1, 2, 3])
        places = set()
        for token in range(20):
            sequence.forward([token, token + 1], 2)
            places.add(sequence._states._draft_state.ctypes.data)
        assert len(places) == 1
