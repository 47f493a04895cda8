"""Folders with ONNX models that are not what they should be: one line each, and nothing outside is read."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from tiny_onnx import LAYERS, SIZE, write_tiny_onnx

from edgespec.core import EdgespecError
from edgespec.models.onnx.check import check_onnx
from edgespec.models.onnx.model import OnnxModel

DATA = "model.onnx.data"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_onnx(tmp_path / "tiny")


def refused(folder: Path, match: str) -> None:
    """Neither checked nor loaded, in one printable line."""
    for attempt in (check_onnx, OnnxModel):
        with pytest.raises(EdgespecError, match=match) as caught:
            attempt(folder)
        text = str(caught.value)
        assert text.isprintable()
        assert len(text) < 500


def edit(folder: Path, change: Callable[[onnx.ModelProto], object]) -> None:
    """Change the model's own file; its weights stay where they are."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    change(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def external(model: onnx.ModelProto) -> onnx.TensorProto:
    return next(one for one in model.graph.initializer if one.external_data)


def set_entry(tensor: onnx.TensorProto, key: str, value: str) -> None:
    for entry in tensor.external_data:
        if entry.key == key:
            entry.value = value
            return
    tensor.external_data.add(key=key, value=value)


def test_what_is_sound_is_described(folder: Path):
    summary = check_onnx(folder)
    assert summary.vocab_size == 257
    assert (summary.cache.layers, summary.cache.heads, summary.cache.key_size) == (LAYERS, 1, SIZE)
    assert summary.cache.bytes_per_token == LAYERS * 2 * SIZE * 4
    assert summary.shares_cache_buffer
    assert not summary.positions
    assert summary.ends == (256,)
    assert summary.context_length == 2048
    model = onnx.load(folder / "model.onnx")
    sizes = [onnx.numpy_helper.to_array(one) for one in model.graph.initializer]
    assert summary.parameters == sum(one.size for one in sizes)
    assert summary.tensor_bytes == sum(one.nbytes for one in sizes)
    assert summary.weights == folder / DATA


def test_both_layouts_say_the_same(tmp_path: Path):
    one = check_onnx(write_tiny_onnx(tmp_path / "a", "plain", layout="genai"))
    two = check_onnx(write_tiny_onnx(tmp_path / "b", "plain", layout="optimum"))
    assert (one.cache, one.ends, one.context_length) == (two.cache, two.ends, two.context_length)
    assert two.positions
    assert not two.shares_cache_buffer


# --- weights outside the model's file ---


def elsewhere(folder: Path) -> Path:
    """The weights, whole, in another folder."""
    other = folder.parent / "elsewhere"
    other.mkdir()
    (folder / DATA).rename(other / DATA)
    return other / DATA


def parent(folder: Path) -> str:
    elsewhere(folder)
    return f"../elsewhere/{DATA}"


def absolute(folder: Path) -> str:
    return str(elsewhere(folder))


def windows(folder: Path) -> str:
    return rf"C:\{DATA}"


def backslash(folder: Path) -> str:
    return rf"..\{DATA}"


def deeper(folder: Path) -> str:
    (folder / "sub").mkdir()
    (folder / DATA).rename(folder / "sub" / DATA)
    return f"sub/{DATA}"


def dots(folder: Path) -> str:
    return ".."


def nowhere(folder: Path) -> str:
    return ""


def device(folder: Path) -> str:
    return "/dev/zero"


def memory(folder: Path) -> str:
    return "*/_ORT_MEM_ADDR_/*"  # onnxruntime's own mark: the offset is an address in this process


def nul(folder: Path) -> str:
    return f"{DATA}\0.txt"


@pytest.mark.parametrize(
    "place", [parent, absolute, windows, backslash, deeper, dots, nowhere, device, memory, nul]
)
def test_weights_lie_next_to_the_model(folder: Path, place: Callable[[Path], str]):
    location = place(folder)

    def change(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            if tensor.external_data:
                set_entry(tensor, "location", location)

    edit(folder, change)
    refused(folder, "refers to weights outside its folder")


def link(folder: Path) -> None:
    (folder / DATA).symlink_to(elsewhere(folder))


def hard_link(folder: Path) -> None:
    os.link(folder / DATA, folder.parent / "another name")


def pipe(folder: Path) -> None:
    (folder / DATA).unlink()
    os.mkfifo(folder / DATA)


def directory(folder: Path) -> None:
    (folder / DATA).unlink()
    (folder / DATA).mkdir()


def missing(folder: Path) -> None:
    (folder / DATA).unlink()


def truncated(folder: Path) -> None:
    os.truncate(folder / DATA, (folder / DATA).stat().st_size - 1)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (link, "is a link"),
        (hard_link, "hard link"),
        (pipe, "not a regular file"),
        (directory, "not a regular file"),
        (missing, "No such file"),
        (truncated, "incomplete"),
    ],
)
def test_they_are_one_whole_regular_file(folder: Path, spoil: Callable[[Path], None], match: str):
    spoil(folder)
    refused(folder, match)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root makes devices")
def test_a_device_of_that_name_is_not_opened(folder: Path):
    (folder / DATA).unlink()
    try:
        os.mknod(folder / DATA, 0o666 | 0o020000, os.makedev(1, 5))  # /dev/zero
    except OSError:
        pytest.skip("devices cannot be made here")
    refused(folder, "not a regular file")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("offset", str(1 << 40), "incomplete"),
        ("offset", "-4096", "invalid offset"),
        ("offset", str(1 << 64), "invalid offset"),
        ("offset", "0x10", "invalid offset"),
        ("length", "4", "instead of"),
        ("length", str(1 << 62), "invalid length|has"),
        ("prepacked_0", "0|1", "unknown kind of location"),
    ],
)
def test_their_places_are_inside_it(folder: Path, key: str, value: str, match: str):
    edit(folder, lambda model: set_entry(external(model), key, value))
    refused(folder, match)


def test_a_place_said_twice_is_said_by_nobody(folder: Path):
    edit(folder, lambda model: external(model).external_data.add(key="location", value="/etc/passwd"))
    refused(folder, "unknown kind of location")


def test_there_is_one_file_of_them(folder: Path):
    (folder / "second").write_bytes((folder / DATA).read_bytes())
    edit(folder, lambda model: set_entry(external(model), "location", "second"))
    refused(folder, "several files")


def test_constants_inside_nodes_are_looked_at_too(folder: Path):
    def change(model: onnx.ModelProto) -> None:
        tensor = TensorProto(name="c", data_type=TensorProto.FLOAT, dims=[4])
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="/etc/passwd")
        inner = helper.make_graph([helper.make_node("Constant", [], ["x"], value=tensor)], "inner", [], [])
        model.graph.node.append(helper.make_node("If", ["one"], ["y"], then_branch=inner, else_branch=inner))

    edit(folder, change)
    refused(folder, "/etc/passwd")


def test_a_location_without_a_place_is_refused(folder: Path):
    edit(folder, lambda model: external(model).ClearField("external_data"))
    edit(folder, lambda model: None)

    def mark(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            if not tensor.HasField("raw_data"):
                tensor.data_location = TensorProto.EXTERNAL

    edit(folder, mark)
    refused(folder, "outside its folder")


# --- the graph ---


def test_operators_of_others_are_not_loaded(folder: Path):
    def change(model: onnx.ModelProto) -> None:
        model.graph.node[0].domain = "evil.example"

    edit(folder, change)
    refused(folder, r"operators that onnxruntime does not have \(evil\.example\)")


def test_libraries_that_a_folder_names_are_not_loaded(folder: Path):
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"] = {"custom_ops_library": str(folder / "evil.so")}
    (folder / "genai_config.json").write_text(json.dumps(config))
    (folder / "evil.so").write_bytes(b"\x7fELF")
    with OnnxModel(folder) as model:
        model.sequence().forward([1, 2])


def test_compiled_programs_are_not_run(folder: Path):
    edit(
        folder,
        lambda model: model.graph.node.append(
            helper.make_node("EPContext", [], ["z"], domain="com.microsoft", ep_cache_context="../x.bin")
        ),
    )
    refused(folder, "EPContext")


def without_cache(model: onnx.ModelProto) -> None:
    kept = [one for one in model.graph.input if not one.name.startswith("past")]
    del model.graph.input[:]
    model.graph.input.extend(kept)


def without_a_layer(model: onnx.ModelProto) -> None:
    kept = [one for one in model.graph.output if not one.name.startswith("present.1")]
    del model.graph.output[:]
    model.graph.output.extend(kept)


def flat_cache(model: onnx.ModelProto) -> None:
    for one in model.graph.input:
        if one.name.startswith("past"):
            del one.type.tensor_type.shape.dim[3]


def fixed_cache(model: onnx.ModelProto) -> None:
    for one in model.graph.input:
        if one.name.startswith("past"):
            one.type.tensor_type.shape.dim[2].dim_value = 128


def whole_numbers(model: onnx.ModelProto) -> None:
    for one in model.graph.input:
        if one.name.startswith("past"):
            one.type.tensor_type.elem_type = TensorProto.INT32


def uneven(model: onnx.ModelProto) -> None:
    model.graph.input[-1].type.tensor_type.shape.dim[1].dim_value = 7


def no_logits(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "scores"


def pictures(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["n"]))


def training(model: onnx.ModelProto) -> None:
    model.training_info.add()


def negative(model: onnx.ModelProto) -> None:
    external(model).dims[0] = -1


def huge(model: onnx.ModelProto) -> None:
    external(model).dims[0] = 1 << 62


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (without_cache, "no inputs for a cache"),
        (without_a_layer, "do not match"),
        (flat_cache, "3 dimensions"),
        (fixed_cache, "fixed length"),
        (whole_numbers, "int32"),
        (uneven, "no shape for its cache"),
        (no_logits, "choose a language model"),
        (pictures, "pixel_values"),
        (training, "training graph"),
        (negative, "unknown type or shape"),
        (huge, "instead of"),
    ],
)
def test_the_graph_is_a_decoder_with_a_cache(folder: Path, change, match: str):
    edit(folder, change)
    refused(folder, match)


@pytest.mark.parametrize("length", [0, 1, 7, 100, 1000, -1])
def test_a_truncated_model_is_refused(folder: Path, length: int):
    path = folder / "model.onnx"
    data = path.read_bytes()
    path.write_bytes(data[:length])
    refused(folder, "no ONNX model|damaged|does not|has no")


def test_random_bytes_are_no_model_and_no_crash(folder: Path):
    import random

    whole = (folder / "model.onnx").read_bytes()
    chance = random.Random(5)
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 3, 20))):
            data[chance.randrange(len(data))] = chance.randrange(256)
        (folder / "model.onnx").write_bytes(data)
        with contextlib.suppress(EdgespecError):
            check_onnx(folder)


def test_a_graph_in_a_graph_in_a_graph_ends(folder: Path):
    def change(model: onnx.ModelProto) -> None:
        graph = helper.make_graph([helper.make_node("Identity", ["one"], ["x"])], "g", [], [])
        for _ in range(20):
            graph = helper.make_graph(
                [helper.make_node("If", ["one"], ["x"], then_branch=graph)], "g", [], []
            )
        model.graph.node.extend(graph.node)

    edit(folder, change)
    refused(folder, "nested too deeply")


def test_a_file_that_claims_more_than_any_model_has_is_not_read_to_its_end(folder: Path):
    (folder / "model.onnx").write_bytes(b"\x08\x07" * 4_000_000)
    refused(folder, "more fields")


def test_a_model_too_large_for_its_format_is_refused_unread(folder: Path):
    with (folder / "model.onnx").open("ab") as file:
        file.truncate((2 << 30) + 1)  # sparse
    refused(folder, "larger than an ONNX file can be")


# --- the other files ---


def test_no_configuration_no_model(folder: Path):
    (folder / "genai_config.json").unlink()
    refused(folder, "neither genai_config.json nor config.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", "[" * 100_000])
def test_a_configuration_that_is_none_is_refused(folder: Path, text: str):
    (folder / "genai_config.json").write_text(text, "latin-1")
    refused(folder, "JSON")


@pytest.mark.parametrize("name", ["../model.onnx", "/etc/passwd", "a/b.onnx", ""])
def test_the_model_is_in_the_folder(folder: Path, name: str):
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["decoder"]["filename"] = name
    (folder / "genai_config.json").write_text(json.dumps(config))
    refused(folder, "must be in the folder")


def test_links_are_not_followed(folder: Path):
    (folder / "model.onnx").rename(folder.parent / "model.onnx")
    (folder / "model.onnx").symlink_to(folder.parent / "model.onnx")
    refused(folder, "is a link")


def test_a_tokenizer_is_needed(folder: Path):
    (folder / "tokenizer.json").unlink()
    refused(folder, "tokenizer.json")


@pytest.mark.parametrize("text", ["", "{}", '{"model": {"type": "BPE", "vocab": 3}}'])
def test_a_tokenizer_that_is_none_is_refused(folder: Path, text: str):
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(EdgespecError, match=r"tokenizer\.json") as caught:
        OnnxModel(folder)
    assert str(caught.value).isprintable()


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path):
    folder = write_tiny_onnx(tmp_path / "small")
    larger = write_tiny_onnx(tmp_path / "large", extra=3)
    (folder / "tokenizer.json").write_bytes((larger / "tokenizer.json").read_bytes())
    with pytest.raises(EdgespecError, match="use the files of one model"):
        OnnxModel(folder)


def test_a_folder_that_changes_is_looked_at_again(folder: Path):
    check_onnx(folder)
    truncated(folder)
    refused(folder, "incomplete")
