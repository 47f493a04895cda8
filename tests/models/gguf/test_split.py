"""Split models: all parts are checked, and what the engines answer is what the whole file answers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny import write_tiny

from edgespec.core import EdgespecError
from edgespec.models.gguf.check import check_gguf
from edgespec.models.gguf.model import LlamaModel, LlamaOptions
from edgespec.models.gguf.native import BackendName
from edgespec.models.split import part_paths

KEPT_AS_IS = ("GGUF.", "split.", "general.architecture")


def split(
    whole: Path, folder: Path, counts: Sequence[int], *, no: int | None = None, total: int | None = None
) -> Path:
    """Write the tensors of `whole` as parts, `counts` in each but the last; return the first part."""
    reader = gguf.GGUFReader(whole)
    architecture = reader.fields["general.architecture"].contents()
    ends = [0, *np.cumsum(counts).tolist(), len(reader.tensors)]
    paths = part_paths(folder / f"whole-00001-of-{len(counts) + 1:05d}.gguf")
    for number, path in enumerate(paths):
        out = gguf.GGUFWriter(path, architecture)
        if number:  # llama-gguf-split writes no other keys there
            out.kv_data[0].pop("general.architecture")
        for key, field in reader.fields.items() if number == 0 else ():
            if not key.startswith(KEPT_AS_IS):
                sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                out.add_key_value(key, field.contents(), field.types[0], sub_type=sub_type)
        out.add_uint16("split.no", number if no is None or number == 0 else no)
        out.add_uint16("split.count", len(paths))
        out.add_int32("split.tensors.count", len(reader.tensors) if total is None else total)
        for tensor in reader.tensors[ends[number] : ends[number + 1]]:
            out.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()
    return paths[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("whole") / "whole.gguf", "llama")


def refusal(path: Path) -> str:
    with pytest.raises(EdgespecError) as caught:
        check_gguf(path)
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize("counts", [(3, 4), (0, 2), (1,)])
def test_the_summary_covers_all_parts(whole: Path, tmp_path: Path, counts: tuple[int, ...]) -> None:
    first, one = check_gguf(split(whole, tmp_path, counts)), check_gguf(whole)
    assert first.tensors.keys() == one.tensors.keys()
    assert (first.parameters, first.tensor_bytes, first.types) == (
        one.parameters,
        one.tensor_bytes,
        one.types,
    )
    assert len(first.files) == len(counts) + 1
    assert one.files == (whole,)
    for name, tensor in first.tensors.items():
        assert np.array_equal(tensor.mapped(first.files[0]), one.tensors[name].mapped(whole))


def test_faults_of_parts_are_one_line(whole: Path, tmp_path: Path) -> None:
    first = split(whole, tmp_path, (3, 4))
    second = part_paths(first)[1]
    check_gguf(first)
    assert "is not the first of 3 parts; load whole-00001-of-00003.gguf" in refusal(second)
    kept = second.read_bytes()
    os.truncate(second, len(kept) - 40)
    assert "00002-of-00003.gguf: ends in tensor" in refusal(first)
    second.unlink()
    assert refusal(first).endswith(": part 2 of 3 is missing; add whole-00002-of-00003.gguf")
    second.write_bytes(part_paths(first)[2].read_bytes())
    assert "is not part 2 of 3 of this model" in refusal(first)
    second.write_bytes(kept)
    check_gguf(first)
    other = first.rename(tmp_path / "other.gguf")
    assert "is one of 3 parts; name it NAME-00001-of-00003.gguf" in refusal(other)


def test_parts_that_do_not_belong_together_are_refused(whole: Path, tmp_path: Path) -> None:
    assert "tensors instead of 99" in refusal(split(whole, tmp_path, (3,), total=99))
    assert "is not part 2 of 2" in refusal(split(whole, tmp_path, (3,), no=7))
    first = split(whole, tmp_path, (4,))
    head = first.read_bytes()
    split(whole, tmp_path, (2,))
    first.write_bytes(head)
    assert "is in two parts" in refusal(first)


def answers(path: Path, engine: BackendName) -> np.ndarray:
    with LlamaModel(path, LlamaOptions(context=256, engine=engine)) as model:
        sequence = model.sequence()
        return np.array(sequence.forward(model.vocab.tokenize("def f(n):"), 4))


def test_both_engines_answer_as_with_the_whole_file(
    starter_path: Path, tmp_path: Path, engine: BackendName
) -> None:
    first = split(starter_path, tmp_path, (0, 100, 90))
    assert np.array_equal(answers(first, engine), answers(starter_path, engine))
