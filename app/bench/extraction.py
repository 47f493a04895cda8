"""JSON by schema: with speculation, without, and on llama-server, in one interleaved run."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from statistics import median
from typing import Any

from edgespec.app.bench.measure import Prompt, answered
from edgespec.app.bench.peers import LlamaServer
from edgespec.app.engine.engine import Engine
from edgespec.app.engine.request import GenerationStats, Request
from edgespec.core import Constraint, EdgespecError
from edgespec.extras import how_to_get
from edgespec.models.prompting.grammar import GrammarCompiler

TASKS = ("rag", "summarization")
_MOST_TOKENS = 600  # per answer: the schemas bound every string and array
_WAYS = {"edgespec": True, "edgespec plain": False}


@dataclass(frozen=True, slots=True)
class Extraction:
    """A schema, of the given number, to extract from the text of a prompt."""

    prompt: Prompt
    number: int
    schema: Mapping[str, Any]

    @property
    def text(self) -> str:
        return (
            "Extract what the JSON schema asks for from the text below. Answer with the JSON alone.\n\n"
            f"Schema: {json.dumps(self.schema)}\n\nText:\n{self.prompt.text}"
        )


@dataclass(frozen=True, slots=True)
class ExtractionOutcome:
    """One answer: speed after the first token, total time, and whether it conforms to its schema."""

    tokens_per_second: float
    seconds: float
    written: int
    valid: bool


def extractions(prompts: Sequence[Prompt]) -> list[Extraction]:
    """An extraction for each prompt of the tasks in `TASKS`, with the schemas in turn.

    Raises EdgespecError if the suite has no such task.
    """
    schemas = json.loads((resources.files(__package__) / "schemas.json").read_text("utf-8"))
    found = [prompt for prompt in prompts if prompt.task in TASKS]
    if not found:
        raise EdgespecError(f"no task {' or '.join(TASKS)} in the suite: name one with --suite")
    return [Extraction(one, i % len(schemas), schemas[i % len(schemas)]) for i, one in enumerate(found)]


def measure_json(
    engine: Engine,
    asked: Sequence[Extraction],
    peers: Sequence[LlamaServer] = (),
    progress: Callable[[str], None] | None = None,
    repetitions: int = 1,
) -> dict[str, Any]:
    """Answer each extraction with and without speculation, and with `peers`, which this starts, in turn."""
    validate = _validator()
    compiler = GrammarCompiler(engine.model.vocab)
    prompts = [engine.chat_prompt([{"role": "user", "content": one.text}]) for one in asked]
    grammars = [compiler.compile("json_schema", json.dumps(one.schema)) for one in asked]
    servers = {peer.name: peer for peer in peers}
    ways = [*_WAYS, *servers]
    turns: list[tuple[int, dict[str, ExtractionOutcome]]] = []

    def ask(way: str, i: int) -> ExtractionOutcome:
        if way in servers:
            answer = servers[way].ask(prompts[i], _MOST_TOKENS, asked[i].schema)
            valid = validate(answer.text, asked[i].schema)
            return ExtractionOutcome(answer.tokens_per_second, answer.seconds, answer.written, valid)
        result = _answer(engine, prompts[i], grammars[i].start, speculate=_WAYS[way])
        valid = validate(result.text, asked[i].schema)
        return ExtractionOutcome(result.tokens_per_second, result.seconds, result.written, valid)

    try:
        for peer in peers:
            peer.start()
        for way in ways:
            ask(way, 0)  # warm-up
        for turn in range(repetitions * len(asked)):
            repetition, i = divmod(turn, len(asked))
            if progress:
                progress(f"{turn + 1} of {repetitions * len(asked)}: schema {asked[i].number}")
            start = (i + repetition) % len(ways)
            turns.append((asked[i].number, {way: ask(way, i) for way in [*ways[start:], *ways[:start]]}))
    finally:
        for peer in peers:
            peer.stop()
    return json_report(engine, ways, turns)


def _answer(
    engine: Engine, prompt: Sequence[int], start: Callable[[], Constraint], *, speculate: bool
) -> GenerationStats:
    engine.forget()
    request = Request(prompt, max_tokens=_MOST_TOKENS, speculate=speculate, constraint=start)
    return answered(engine, request)


def _validator() -> Callable[[str, Mapping[str, Any]], bool]:
    try:
        from jsonschema import Draft202012Validator
    except ImportError:
        raise EdgespecError(f"`bench json` needs jsonschema: {how_to_get('dev')}") from None

    def validate(text: str, schema: Mapping[str, Any]) -> bool:
        try:
            return bool(Draft202012Validator(schema).is_valid(json.loads(text)))
        except ValueError:
            return False

    return validate


def json_report(
    engine: Engine, ways: Sequence[str], turns: Sequence[tuple[int, Mapping[str, ExtractionOutcome]]]
) -> dict[str, Any]:
    """The report: ratios are medians over turns for each schema, and overall geometric means over schemas."""
    by_schema: dict[int, list[Mapping[str, ExtractionOutcome]]] = defaultdict(list)
    for number, row in turns:
        by_schema[number].append(row)

    def ratios(other: str) -> dict[int, float]:
        return {
            number: median(
                row["edgespec"].tokens_per_second / max(row[other].tokens_per_second, 1e-9) for row in rows
            )
            for number, rows in sorted(by_schema.items())
        }

    compared = {way: ratios(way) for way in ways if way != "edgespec"}
    return {
        "model": engine.model.path.name,
        "draft": engine.draft.path.name if engine.draft else None,
        "answers": len(turns),
        "valid": {way: sum(row[way].valid for _, row in turns) / len(turns) for way in ways},
        "tokens_per_second": {
            way: round(median(row[way].tokens_per_second for _, row in turns), 2) for way in ways
        },
        "seconds": {way: round(median(row[way].seconds for _, row in turns), 3) for way in ways},
        "ratio_by_schema": {
            way: {str(number): round(ratio, 3) for number, ratio in found.items()}
            for way, found in compared.items()
        },
        "ratio": {
            way: round(math.exp(sum(map(math.log, found.values())) / len(found)), 3)
            for way, found in compared.items()
        },
    }


def json_table(report: Mapping[str, Any]) -> str:
    """Format the report for people."""
    lines = [f"{'':<28}{'tokens/s':>10}{'seconds':>10}{'valid':>8}"]
    for way, speed in report["tokens_per_second"].items():
        lines.append(f"{way:<28}{speed:10.1f}{report['seconds'][way]:10.2f}{report['valid'][way]:8.0%}")
    for way, ratio in report["ratio"].items():
        schemas = ", ".join(f"{one:.2f}" for one in report["ratio_by_schema"][way].values())
        lines.append(f"to {way}: {ratio:.2f} (by schema {schemas})")
    lines.append(f"{report['model']}, draft {report['draft'] or 'none'}, {report['answers']} answers each")
    return "\n".join(lines)
