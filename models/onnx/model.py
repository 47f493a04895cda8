"""ONNX models on onnxruntime: a folder with a decoder's graph, its weights and its tokenizer.

An `OnnxModel` owns the weights; each of its `OnnxSequence`s is a LanguageModel with its own KV cache, arrays
in this process's memory. Only `cancel` is thread-safe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt

from edgespec.core import Cancelled, EdgespecError, Logits
from edgespec.machine.sensors import compute_cores
from edgespec.models.hub.store import file_sample
from edgespec.models.memory import first_that_fits, require_memory, shorter
from edgespec.models.onnx import providers
from edgespec.models.onnx.check import OnnxSummary, check_onnx
from edgespec.models.onnx.folder import GENERATION, read_json
from edgespec.models.onnx.rows import WANTED, pick_rows
from edgespec.models.onnx.sequence import OnnxSequence, bind_input, bind_output
from edgespec.models.onnx.vocab import OnnxVocab, chat_template
from edgespec.models.options import Options
from edgespec.models.sampling_defaults import as_metadata
from edgespec.text import printable

__all__ = ["OnnxModel", "OnnxOptions", "OnnxSequence"]

_MOST_REWRITTEN = 256 << 20  # bytes of a model's file; larger ones, which contain weights, are not rewritten
# Threads spin for 10 microseconds, which is the pause between two matrix products, and then sleep: spinning
# as long as onnxruntime's default takes the cores from another model's threads and from other programs.
_WAITING = {"intra_op.allow_spinning": "1", "intra_op.spin_duration_us": "10", "force_spinning_stop": "1"}


@dataclass(frozen=True, slots=True)
class OnnxOptions(Options):
    """Loading options of an ONNX folder. `providers` are tried in order; empty: the CPU's."""

    providers: tuple[str, ...] = ()

    @property
    def engine(self) -> str:
        return "onnxruntime"


def cost_key(options: OnnxOptions) -> tuple[object, ...]:
    """Return what the cost of a forward pass depends on, apart from the model."""
    order = options.providers or (providers.CPU,)
    return build(order[0]), options.threads or compute_cores(), *_WAITING.items()


def build(provider: str) -> str:
    """Return engine, version and provider. Measurements are valid for one build only."""
    return f"onnxruntime {providers.runtime().__version__} {providers.label(provider)}"


class OnnxModel:
    """The weights of one folder, its vocabulary, and the KV caches of its sequences."""

    shares_passes = False
    """Several sequences are evaluated one after the other."""
    fixed_threads = True
    """onnxruntime's threads belong to a loaded model: another count would need loading it again."""
    undo: int | None = None

    def __init__(
        self,
        path: Path,
        options: OnnxOptions | None = None,
        progress: Callable[[float], bool] | None = None,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Check and load the folder `path`. `progress` returns False to stop, before or after loading.

        `note` receives a line for each provider that failed. Raises EdgespecError if the folder is damaged or
        unsupported, or memory is insufficient, Cancelled if stopped.
        """
        options = options or OnnxOptions()
        self.path, self.options = path, options
        self.summary: OnnxSummary = check_onnx(path)
        if progress is not None and not progress(0.0):
            raise Cancelled
        self.vocab = OnnxVocab(self.summary)
        self.context_length = wanted = self._length(options)
        threads = options.threads or compute_cores()
        self.threads = (threads, threads)
        self._note = note
        self._order = list(options.providers or (providers.CPU,))
        if self.on_cpu:  # an accelerator's memory is not checked
            self.options = options = first_that_fits(options.smaller_contexts(), self._require_memory)
            if self.context_length < wanted:
                note(shorter(path.name, wanted, self.context_length))
        self._cancelled = False
        self._session: Any = None
        self._run_options: Any = None
        self._graph = self._read()
        self._batch = options.batch if self._graph is not None else options.max_rows
        self._batch = max(self._batch, options.max_rows)
        vocab = self.vocab.size
        try:
            self._logits = np.empty(max(1, options.max_rows) * vocab, self.summary.logits_type)
            if self._graph is None:
                self._logits = np.empty(self._batch * vocab, self.summary.logits_type)
            self._rows = np.empty((options.max_rows, vocab), np.float32)
        except MemoryError:
            raise EdgespecError(
                f"not enough memory for the logits of {self.summary.name}: close other programs"
            ) from None
        self._ids = np.zeros(self._batch, self.summary.id_type)
        self._mask = np.ones(self.context_length + self._batch, np.int64)
        self._positions = np.arange(self.context_length + self._batch, dtype=np.int64)
        self._sequences: list[OnnxSequence[OnnxModel]] = []
        self._free_ids = list(range(options.sequences))
        self._open()
        if progress is not None and not progress(1.0):
            self.close()
            raise Cancelled

    @property
    def provider(self) -> str:
        """The execution provider in use."""
        return self._order[0]

    @property
    def on_cpu(self) -> bool:
        """Whether the CPU computes all of it."""
        return self.provider == providers.CPU

    @property
    def build(self) -> str:
        return build(self.provider)

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the model's own chat template: untrusted text."""
        return chat_template(self.summary)

    def _length(self, options: OnnxOptions) -> int:
        return min(options.context or self.summary.context_length, self.summary.context_length)

    def _require_memory(self, options: OnnxOptions) -> None:
        """Set the context's length to that of `options`. Raises TooLargeError if it does not fit."""
        self.context_length = self._length(options)
        weights = self.summary.tensor_bytes - self.summary.mapped_bytes
        logits = options.max_rows * self.summary.vocab_size * 4
        require_memory(self.summary.name, weights, options.sequences * self.cache_bytes, logits)

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The sampling settings of the folder, by GGUF key: untrusted."""
        return as_metadata(read_json(self.summary.path.parent, GENERATION) or {})

    @property
    def cache_bytes(self) -> int:
        """Bytes of one full KV cache, doubled for a graph that cannot extend it in place."""
        copies = 1 if self.summary.shares_cache_buffer else 2
        return copies * self.context_length * self.summary.cache.bytes_per_token

    @property
    def state_bytes(self) -> int:
        """The most bytes that the state of a sequence takes."""
        return self.context_length * self.summary.cache.bytes_per_token

    def sequence(self) -> OnnxSequence[OnnxModel]:
        """Return a new, empty sequence. Raises EdgespecError if all are in use or memory is too small."""
        if not self._free_ids:
            raise EdgespecError(f"all {self.options.sequences} sequences of this model are in use: close one")
        sequence = OnnxSequence(self, self._free_ids[0])
        self._free_ids.pop(0)
        self._sequences.append(sequence)
        return sequence

    def set_threads(self, one_row: int, many_rows: int) -> None:
        """Do nothing: see `fixed_threads`."""

    def cancel(self) -> None:
        """Stop the current forward pass, or else the next. Safe in any thread and in signal handlers."""
        self._cancelled = True
        run_options = self._run_options
        if run_options is not None:
            run_options.terminate = True

    def uncancel(self) -> None:
        """Reset a `cancel` that was called between forward passes."""
        self._cancelled = False

    def close(self) -> None:
        """Free all native memory. Sequences of this model must not be used afterwards."""
        for sequence in self._sequences:
            sequence.forget_buffers()
        self._sequences.clear()
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def forward(self, requests: Sequence[tuple[OnnxSequence[OnnxModel], Sequence[int], int]]) -> list[Logits]:
        """Evaluate requests, each (sequence, new tokens, rows wanted), one after the other.

        Returns logits [rows wanted, vocab] for each: views of a buffer that the next call overwrites.
        """
        for sequence, new, last in requests:
            self._refuse_request(sequence, new, last)
        if sum(last for _, _, last in requests) > self.options.max_rows:
            raise ValueError(f"more than {self.options.max_rows} rows of logits in one forward pass")
        answers, start = [], 0
        for sequence, new, last in requests:
            # All rows wanted are of the last pass, which has as many tokens as a pass may have.
            ahead = max(0, len(new) - self._batch)
            for at in range(0, ahead, self._batch):
                self._pass(sequence, new[at : min(at + self._batch, ahead)], 1)
            rows = self._pass(sequence, new[ahead:], last)
            if len(requests) > 1 or rows.dtype != np.float32:
                self._rows[start : start + last] = rows
                rows = self._rows[start : start + last]
            answers.append(cast(Logits, rows))
            start += last
        return answers

    def fingerprint(self) -> tuple[object, ...]:
        """Return what a saved state depends on."""
        summary = self.summary
        files = [(path.stat().st_size, file_sample(path)) for path in (summary.path, summary.weights)]
        return self.build, summary.cache, summary.tokenizer_digest, files

    def new_binding(self) -> Any:
        """Return a new IOBinding of the session."""
        return self._session.io_binding()

    def release(self, sequence: OnnxSequence[OnnxModel]) -> None:
        """Release the id of a closed sequence for another."""
        if sequence in self._sequences:
            self._sequences.remove(sequence)
            self._free_ids.append(sequence.id)

    def _refuse_request(self, sequence: OnnxSequence[OnnxModel], new: Sequence[int], last: int) -> None:
        if not 1 <= last <= len(new):
            raise ValueError(f"{last} rows wanted of {len(new)} new tokens")
        if len(sequence.tokens) + len(new) > self.context_length:
            raise ValueError(f"{len(new)} new tokens do not fit into a context of {self.context_length}")
        # The graph does not check ids.
        if min(new) < 0 or max(new) >= self.vocab.size:
            raise ValueError("a token id outside the vocabulary")

    def _pass(self, sequence: OnnxSequence[OnnxModel], new: Sequence[int], last: int) -> npt.NDArray[Any]:
        """Run the graph once: logits [last, vocab], in the type of the graph."""
        n, held, vocab = len(new), len(sequence.tokens), self.vocab.size
        rows = last if self._graph is not None else n
        logits = self._logits[: rows * vocab].reshape(rows, vocab)
        self._ids[:n] = new
        inputs = {
            "input_ids": self._ids[:n].reshape(1, n),
            "attention_mask": self._mask[: held + n].reshape(1, held + n),
            "position_ids": self._positions[held : held + n].reshape(1, n),
            WANTED: np.arange(n - last, n, dtype=np.int64),
        }
        while True:
            binding = sequence.bind(n)
            for name in inputs.keys() & self._inputs:
                bind_input(binding, name, inputs[name])
            bind_output(binding, "logits", logits.reshape(1, rows, vocab))
            if self._run(binding):
                sequence.took(new)
                return logits[rows - last :]

    def _run(self, binding: Any) -> bool:
        """Run the graph. False if the provider failed and was replaced: bind again.

        Raises Cancelled if stopped, EdgespecError if no provider is left.
        """
        ort = providers.runtime()
        run_options = ort.RunOptions()
        run_options.log_severity_level = 4
        self._run_options = run_options
        try:
            if self._cancelled:
                raise Cancelled
            self._session.run_with_iobinding(binding, run_options)
        except Cancelled:
            self._cancelled = False
            raise
        except Exception as error:  # noqa: BLE001 - the library raises whatever a provider raises
            if self._cancelled:
                self._cancelled = False
                raise Cancelled from None
            failure = EdgespecError(f"onnxruntime cannot evaluate {self.summary.name}: {_reason(error)}")
            if len(self._order) < 2:
                raise failure from None
            failed, *self._order = self._order
            self._note(f"{providers.label(failed)} failed and is no longer used: {_reason(error)}")
            self._open()
            return False
        finally:
            self._run_options = None
        return True

    # --- the session ---

    def _read(self) -> bytes | None:
        """Return the model with an input for the rows wanted, None to use it unchanged."""
        if self.summary.path.stat().st_size > _MOST_REWRITTEN:
            return None
        return pick_rows(self.summary.path.read_bytes())

    def _open(self) -> None:
        """Create the session on the first provider in order that works."""
        name, self._session = providers.first_that_works(self._order, self._make, self._note)
        self._order = self._order[self._order.index(name) :]
        self.options = replace(self.options, providers=tuple(self._order))
        self._inputs = {one.name for one in self._session.get_inputs()}
        for sequence in self._sequences:
            sequence.unbind()

    def _make(self, provider: str) -> Any:
        """Create a session on `provider`. Raises EdgespecError."""
        ort = providers.runtime()
        if provider not in ort.get_available_providers():
            raise EdgespecError("the installed onnxruntime does not have it")
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = self.threads[0]
        settings.inter_op_num_threads = 1
        settings.log_severity_level = 4
        for key, value in _WAITING.items():
            settings.add_session_config_entry(f"session.{key}", value)
        source: bytes | str = str(self.summary.path)
        if self._graph is not None:
            source = self._graph
            folder = str(self.summary.path.parent)
            settings.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        try:
            # The CPU's provider runs nodes that another does not support; without it some models do not load.
            names = [provider] if provider == providers.CPU else [provider, providers.CPU]
            # onnxruntime's own fallback writes to the terminal.
            session = ort.InferenceSession(source, settings, providers=names, enable_fallback=0)
        except Exception as error:  # noqa: BLE001
            raise EdgespecError(f"cannot load {self.summary.name}: {_reason(error)}") from None
        if session.get_providers()[0] != provider:
            raise EdgespecError("its libraries did not load")
        return session


def _reason(error: Exception) -> str:
    """Return onnxruntime's message as one printable line."""
    text = " ".join(str(error).split())
    return printable(text)
