"""ONNX models on onnxruntime: a folder with a decoder's graph, its weights and its tokenizer.

One `OnnxModel` owns the weights; each `OnnxSequence` of it is a LanguageModel with a cache of its own, plain
arrays in this process's memory. Nothing here is safe to call from two threads at once, except `cancel`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt

from edgespec.core import Cancelled, EdgespecError, LanguageModel, Logits
from edgespec.models import providers
from edgespec.models.catalog import file_sample, printable
from edgespec.models.onnx_check import OnnxSummary, check_onnx
from edgespec.models.onnx_rows import WANTED, pick_rows
from edgespec.models.onnx_vocab import OnnxVocab, chat_template
from edgespec.sensors import compute_cores

__all__ = ["OnnxModel", "OnnxOptions", "OnnxSequence"]

_MOST_REWRITTEN = 256 << 20  # bytes of a model's file: larger ones, with weights inside, are left as they are


@dataclass(frozen=True, slots=True)
class OnnxOptions:
    """How a model is loaded; fields mean what LlamaOptions has them mean.

    `providers` are tried in order; none stands for the CPU's. `shared`: other programs, or another model's
    threads, want the cores between passes, so threads do not wait busily for the next one.
    """

    context: int = 4096
    threads: int = 0
    sequences: int = 1
    max_rows: int = 32
    batch: int = 128
    providers: tuple[str, ...] = ()
    shared: bool = False

    @property
    def engine(self) -> str:
        return "onnxruntime"

    def with_threads(self, one_row: int, many_rows: int) -> OnnxOptions:
        return replace(self, threads=one_row)

    def for_texts(self, texts: int) -> OnnxOptions:
        """The same with room for several texts, each in a cache of its own."""
        return replace(self, sequences=texts)

    def kernels(self) -> tuple[object, ...]:
        """What a forward pass costs depends on, the model aside."""
        order = self.providers or (providers.CPU,)
        return build(order[0]), self.threads or compute_cores(), self.shared


def build(provider: str) -> str:
    """Engine, version and provider: a measurement made under one build says nothing of another."""
    return f"onnxruntime {providers.runtime().__version__} {providers.label(provider)}"


class OnnxModel:
    """The weights of one folder, its vocabulary, and the caches of its sequences."""

    shares_cache = False
    """Each sequence has a cache of its own: several are evaluated one after the other."""
    fixed_threads = True
    """onnxruntime's threads belong to a loaded model: another count would mean to load it again."""
    rollback_refusal: str | None = None

    def __init__(
        self,
        path: Path,
        options: OnnxOptions | None = None,
        progress: Callable[[float], bool] | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Check and load the folder `path`. `progress` may stop it by returning False, before or after.

        `say` hears a line of every provider that failed. Raises EdgespecError when the folder is damaged or
        unsupported, or memory does not suffice, Cancelled when stopped.
        """
        options = options or OnnxOptions()
        self.path, self.options = path, options
        self.summary: OnnxSummary = check_onnx(path)
        if progress is not None and not progress(0.0):
            raise Cancelled
        self.vocab = OnnxVocab(self.summary)
        self.context_length = min(options.context or self.summary.context_length, self.summary.context_length)
        threads = options.threads or compute_cores()
        self.threads = (threads, threads)
        self._say = say
        self._order = list(options.providers or (providers.CPU,))
        self._cancelled = False
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
                f"No memory for the logits of {self.summary.name}: close other programs."
            ) from None
        self._ids = np.zeros(self._batch, self.summary.id_type)
        self._mask = np.ones(self.context_length + self._batch, np.int64)
        self._positions = np.arange(self.context_length + self._batch, dtype=np.int64)
        self._sequences: list[OnnxSequence] = []
        self._free_ids = list(range(options.sequences))
        self._open()
        if progress is not None and not progress(1.0):
            self.close()
            raise Cancelled

    @property
    def provider(self) -> str:
        """The execution provider it runs on."""
        return self._order[0]

    @property
    def build(self) -> str:
        return build(self.provider)

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the model's own chat template: untrusted text."""
        return chat_template(self.summary)

    @property
    def cache_bytes(self) -> int:
        """What one text's cache takes when full; a graph that cannot extend it in place needs two."""
        copies = 1 if self.summary.shares_cache_buffer else 2
        return copies * self.context_length * self.summary.cache.bytes_per_token

    def sequence(self) -> OnnxSequence:
        """A new, empty sequence. Raises EdgespecError when all are taken or its cache finds no room."""
        if not self._free_ids:
            raise EdgespecError(f"All {self.options.sequences} conversations of this model are in use.")
        sequence = OnnxSequence(self, self._free_ids[0])
        self._free_ids.pop(0)
        self._sequences.append(sequence)
        return sequence

    def set_threads(self, one_row: int, many_rows: int) -> None:
        """Does nothing: see `fixed_threads`."""

    def cancel(self) -> None:
        """Stop the forward pass under way, or else the next. Any thread or signal handler may call this."""
        self._cancelled = True
        run_options = self._run_options
        if run_options is not None:
            run_options.terminate = True

    def uncancel(self) -> None:
        """Forget a `cancel` that came when nothing was under way."""
        self._cancelled = False

    def close(self) -> None:
        """Free everything native. Sequences of this model are dead afterwards."""
        for sequence in self._sequences:
            sequence._forget_buffers()
        self._sequences.clear()
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def forward(self, requests: Sequence[tuple[OnnxSequence, Sequence[int], int]]) -> list[Logits]:
        """Evaluate (sequence, new tokens, rows wanted) of several sequences, one after the other.

        The logits of each are views into a buffer that the next call overwrites.
        """
        for sequence, new, last in requests:
            self._refuse_request(sequence, new, last)
        if sum(last for _, _, last in requests) > self.options.max_rows:
            raise ValueError(f"more than {self.options.max_rows} rows of logits in one forward pass")
        answers, start = [], 0
        for sequence, new, last in requests:
            # Whatever is wanted comes of the last pass, which reads as many tokens as a pass may.
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

    def forward_texts(self, requests: Sequence[tuple[LanguageModel, Sequence[int], int]]) -> list[Logits]:
        """`forward` for the decoding loop, which knows sequences as LanguageModels."""
        return self.forward([(cast(OnnxSequence, one), new, last) for one, new, last in requests])

    def fingerprint(self) -> tuple[object, ...]:
        """What the state of a sequence fits."""
        summary = self.summary
        files = [(path.stat().st_size, file_sample(path)) for path in (summary.path, summary.weights)]
        return self.build, summary.cache, summary.tokenizer_digest, files

    def _refuse_request(self, sequence: OnnxSequence, new: Sequence[int], last: int) -> None:
        if not 1 <= last <= len(new):
            raise ValueError(f"{last} rows wanted of {len(new)} new tokens")
        if len(sequence.tokens) + len(new) > self.context_length:
            raise ValueError(f"{len(new)} new tokens do not fit into a context of {self.context_length}")
        # An embedding looks up whatever it is given.
        if min(new) < 0 or max(new) >= self.vocab.size:
            raise ValueError("a token id outside the vocabulary")

    def _pass(self, sequence: OnnxSequence, new: Sequence[int], last: int) -> npt.NDArray[Any]:
        """One run of the graph: logits [last, vocab] as the graph has them."""
        while True:
            n, held = len(new), len(sequence._tokens)
            rows = last if self._graph is not None else n
            logits = self._logits[: rows * self.vocab.size].reshape(rows, self.vocab.size)
            self._ids[:n] = new
            binding = sequence._bind(n)
            _bind(binding, "input_ids", self._ids[:n].reshape(1, n))
            _bind(
                binding,
                "attention_mask",
                self._mask[: held + n].reshape(1, held + n),
                self._has("attention_mask"),
            )
            _bind(
                binding,
                "position_ids",
                self._positions[held : held + n].reshape(1, n),
                self._has("position_ids"),
            )
            if self._graph is not None:
                wanted = np.arange(n - last, n, dtype=np.int64)
                _bind(binding, WANTED, wanted)
            _bind_output(binding, "logits", logits.reshape(1, rows, self.vocab.size))
            if self._run(binding):
                sequence._took(new)
                return logits[rows - last :]

    def _run(self, binding: Any) -> bool:
        """Run the graph. False when the provider failed and another was taken: bind again.

        Raises Cancelled when it was stopped, EdgespecError when no provider is left.
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
            failure = EdgespecError(f"onnxruntime could not evaluate {self.summary.name}: {_reason(error)}")
            if len(self._order) < 2:
                raise failure from None
            failed, *self._order = self._order
            self._say(f"{providers.label(failed)} failed and is used no more: {_reason(error)}")
            self._open()
            return False
        finally:
            self._run_options = None
        if self._cancelled:  # it came too late to stop this pass, whose tokens nobody asked for
            self._cancelled = False
            raise Cancelled
        return True

    def _has(self, name: str) -> bool:
        return name in self._inputs

    # --- the session ---

    def _read(self) -> bytes | None:
        """The model with a choice of rows, None for one that is used as it is."""
        if self.summary.path.stat().st_size > _MOST_REWRITTEN:
            return None
        return pick_rows(self.summary.path.read_bytes())

    def _open(self) -> None:
        """Make the session on the first provider in order that works."""
        name, self._session = providers.first_that_works(self._order, self._make, self._say)
        self._order = self._order[self._order.index(name) :]
        self._inputs = {one.name for one in self._session.get_inputs()}
        for sequence in self._sequences:
            sequence._binding = None

    def _make(self, provider: str) -> Any:
        """A session on `provider`. Raises EdgespecError."""
        ort = providers.runtime()
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = self.threads[0]
        settings.inter_op_num_threads = 1
        settings.log_severity_level = 4
        if self.options.shared:
            settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        source: bytes | str = str(self.summary.path)
        if self._graph is not None:
            source = self._graph
            folder = str(self.summary.path.parent)
            settings.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        try:
            # The CPU's provider takes what another leaves; without it some models do not load at all.
            names = [provider] if provider == providers.CPU else [provider, providers.CPU]
            session = ort.InferenceSession(source, settings, providers=names)
            session.disable_fallback()
        except Exception as error:  # noqa: BLE001
            raise EdgespecError(f"{self.summary.name} does not load: {_reason(error)}") from None
        if session.get_providers()[0] != provider:
            raise EdgespecError("its libraries did not load.")
        return session


class OnnxSequence:
    """One conversation of an OnnxModel, with its cache: a LanguageModel."""

    def __init__(self, model: OnnxModel, sequence_id: int) -> None:
        self.model, self.id = model, sequence_id
        self.vocab_size = model.vocab.size
        self._tokens: list[int] = []
        self._binding: Any = None
        shape, summary = model.summary.cache, model.summary
        self._shares = summary.shares_cache_buffer
        self._sizes = [size for _ in range(shape.layers) for size in (shape.key_size, shape.value_size)]
        self._names = [f"{i}.{kind}" for i in range(shape.layers) for kind in ("key", "value")]
        numbers = [shape.heads * model.context_length * size for size in self._sizes]
        try:
            # Pages are taken when they are written: a cache costs what it holds.
            self._now = [np.zeros(n, shape.type) for n in numbers]
            self._next = [] if self._shares else [np.zeros(n, shape.type) for n in numbers]
        except MemoryError:
            raise EdgespecError(
                f"No room for a context of {model.context_length} tokens of {summary.name}: try a smaller one "
                "with --context."
            ) from None
        self._stored = 0  # tokens in the arrays, where they lie one behind the other; at least len(tokens)

    @property
    def tokens(self) -> Sequence[int]:
        return self._tokens

    def forward(self, new: Sequence[int], last: int = 1) -> Logits:
        return self.model.forward([(self, new, last)])[0]

    def rollback(self, length: int) -> None:
        del self._tokens[length:]

    def share(self, other: OnnxSequence, length: int) -> bool:
        """Hold the first `length` tokens of `other`: copied, which is as quick as memory."""
        if other is self:
            return False
        self._take(other._tokens[:length], [part[:, :length] for part in other._held()])
        return True

    def state(self) -> npt.NDArray[np.uint8]:
        """A copy of what the cache holds, for `restore`: as many bytes as its tokens take."""
        parts = [np.ascontiguousarray(part[:, : len(self._tokens)]) for part in self._held()]
        return np.concatenate([part.reshape(-1).view(np.uint8) for part in parts])

    def restore(self, tokens: Sequence[int], data: npt.NDArray[np.uint8]) -> bool:
        """Hold `tokens` again, whose `state` was `data`. False for data of another length: then it is empty."""
        self.rollback(0)
        cache = self.model.summary.cache
        if len(tokens) > self.model.context_length or len(data) != len(tokens) * cache.bytes_per_token:
            return False
        parts, start = [], 0
        for size in self._sizes:
            count = cache.heads * len(tokens) * size
            flat = data[start : start + count * np.dtype(cache.type).itemsize].view(cache.type)
            parts.append(flat.reshape(cache.heads, len(tokens), size))
            start += flat.nbytes
        self._take(list(tokens), parts)
        return True

    def close(self) -> None:
        """Give its memory back."""
        self._forget_buffers()
        if self in self.model._sequences:
            self.model._sequences.remove(self)
            self.model._free_ids.append(self.id)

    def _forget_buffers(self) -> None:
        self._binding = None
        self._now, self._next, self._tokens, self._stored = [], [], [], 0

    def _held(self) -> list[npt.NDArray[Any]]:
        """What lies in the cache: views [heads, positions, size] of each layer's keys and values."""
        length = self.model.context_length if self._shares else self._stored
        heads = self.model.summary.cache.heads
        return [
            flat[: heads * length * size].reshape(heads, length, size)
            for flat, size in zip(self._now, self._sizes, strict=True)
        ]

    def _take(self, tokens: list[int], parts: Sequence[npt.NDArray[Any]]) -> None:
        self._tokens, self._stored = tokens, len(tokens)
        for held, part in zip(self._held(), parts, strict=True):
            held[:, : len(tokens)] = part

    def _bind(self, n: int) -> Any:
        """A binding whose cache can take `n` more tokens."""
        heads = self.model.summary.cache.heads
        if self._shares:
            if self._binding is None:
                self._binding = self.model._session.io_binding()
                for name, part in zip(self._names, self._held(), strict=True):
                    _bind(self._binding, f"past_key_values.{name}", part[None])
                    _bind_output(self._binding, f"present.{name}", part[None])
            return self._binding
        # The graph writes past and new tokens to another place. What was rolled back must go before.
        if self._stored != len(self._tokens):
            parts = [part[:, : len(self._tokens)] for part in self._held()]
            self._now, self._next = self._next, self._now
            self._take(self._tokens, parts)
        binding = self.model._session.io_binding()
        length = self._stored + n
        for name, part, flat, size in zip(self._names, self._held(), self._next, self._sizes, strict=True):
            _bind(binding, f"past_key_values.{name}", part[None])
            present = flat[: heads * length * size].reshape(1, heads, length, size)
            _bind_output(binding, f"present.{name}", present)
        return binding

    def _took(self, new: Sequence[int]) -> None:
        """The graph was run: the cache holds `new`, too."""
        if not self._shares:
            self._now, self._next = self._next, self._now
        self._tokens.extend(new)
        self._stored = len(self._tokens)


def _bind(binding: Any, name: str, array: npt.NDArray[Any], wanted: bool = True) -> None:
    """Let the graph read `array`, which must outlive the run."""
    if wanted:
        binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


def _bind_output(binding: Any, name: str, array: npt.NDArray[Any]) -> None:
    binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


def _reason(error: Exception) -> str:
    """What onnxruntime says, on one line that is safe to show."""
    text = " ".join(str(error).split())
    return f"{printable(text[:300])}"
