"""The Python API: `from edgespec import load`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Self

from edgespec.app.engine.constraints import ConstraintCompiler
from edgespec.app.engine.engine import Answering, Engine
from edgespec.app.engine.loading import EngineSpec, load_engine
from edgespec.app.engine.request import GenerationStats, Request
from edgespec.core import Drafter, Progress
from edgespec.models.prompting.chat_template import Message
from edgespec.models.prompting.tool_calls import ToolChoice
from edgespec.sampling import Sampling

Question = str | Sequence[Message]
"""A question, or a conversation of messages with `role` and `content`."""


class LoadedModel:
    """A loaded model, for one request at a time. Close it, or use it in a `with` statement."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def generate(
        self,
        prompt: Question,
        *,
        system: str = "",
        max_tokens: int = 0,
        stop: Sequence[str] = (),
        schema: Mapping[str, Any] | None = None,
        speculate: bool = True,
        **sampling: Any,
    ) -> Answering:
        """Generate an answer: an iterator of `Step`s, whose `text`s add up to it, with its `stats`.

        `schema` is a JSON schema that the answer conforms to. `sampling` are fields of `Sampling`:
        temperature (0, the default, is greedy), top_k, top_p, min_p, seed, ... `max_tokens` 0: until the
        context is full. Raises EdgespecError if the prompt does not fit, or for an unsupported schema.
        """
        messages: list[Message] = [{"role": "system", "content": system}] if system else []
        messages += [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        constraint = None
        if schema is not None:
            shape = self._compiler.shape((), ToolChoice("none"), ("json_schema", schema))
            constraint = shape.start
        request = Request(
            self.engine.chat_prompt(messages),
            Sampling(**sampling),
            max_tokens,
            stop,
            speculate=speculate,
            constraint=constraint,
        )
        return self.engine.generate(request)

    def answer(self, prompt: Question, **options: Any) -> str:
        """Return the whole answer; `options` as for `generate`."""
        return "".join(step.text for step in self.generate(prompt, **options))

    def stats(self, prompt: Question, **options: Any) -> GenerationStats:
        """Return an answer with its figures; `options` as for `generate`."""
        answering = self.generate(prompt, **options)
        for _ in answering:
            pass
        return answering.stats

    def add_drafter(self, make: Callable[[], Drafter]) -> None:
        """Also draft with what `make` returns, one per answer, asked after the built-in drafters."""
        self.engine.drafters.more.append(make)

    def close(self) -> None:
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @cached_property
    def _compiler(self) -> ConstraintCompiler:
        return ConstraintCompiler(self.engine.model.vocab, self.engine.model.chat_template)


def load(
    model: str = "",
    *,
    progress: Progress | None = None,
    **options: Any,
) -> LoadedModel:
    """Load a model: a catalog name, a .gguf file, the folder of an ONNX model; "": the largest that fits.

    `options` are fields of `EngineSpec`: draft, max_draft, exact, context, kv_type, threads, engine, mode,
    lora. Raises EdgespecError.
    """
    return LoadedModel(load_engine(EngineSpec(model=model, **options), progress or (lambda _: True)))
