"""Concurrent agents against one after another: total speed, time to the first token, differences of answers.

An agent calls functions step by step. Their results are scripted, and every run continues from the same
earlier calls, whichever run made them first: so each answer has a counterpart in the other run.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from statistics import median, quantiles
from time import perf_counter
from typing import Any

from edgespec.app.bench.measure import first_difference
from edgespec.app.engine.constraints import FREE, ConstraintCompiler, OutputConstraint
from edgespec.app.engine.engine import Engine
from edgespec.app.engine.request import GenerationStats, Request, Step
from edgespec.app.engine.scheduler import Scheduler
from edgespec.models.prompting.output_events import Arguments, Called, OutputEvent
from edgespec.models.prompting.tool_calls import ToolChoice, read_tools
from edgespec.sampling import Sampling

AGENTS, STEPS = 8, 20
_MOST_TOKENS = 200  # per call: the schemas bound every argument to less
_NEAR = 20  # likeliest tokens among which a difference is looked up


@dataclass(frozen=True, slots=True)
class AgentStep:
    """One answer of one agent. `first` and `seconds` are seconds since the request."""

    agent: int
    number: int
    prompt: Sequence[int]
    result: GenerationStats
    first: float
    seconds: float


class AgentScript:
    """The prompts of agents, the results of functions, and the calls; the calls of the first run are kept."""

    def __init__(self) -> None:
        world = json.loads((resources.files(__package__) / "agents.json").read_text("utf-8"))
        self.tools: list[dict[str, Any]] = world["tools"]
        self._system, self._tasks, self._results = world["system"], world["tasks"], world["results"]
        self._calls: dict[tuple[int, int], dict[str, Any]] = {}

    def messages(self, agent: int, step: int) -> list[Mapping[str, Any]]:
        """The conversation before step number `step`, counted from 0."""
        task = self._tasks[agent % len(self._tasks)]
        found: list[Mapping[str, Any]] = [
            {"role": "system", "content": self._system},
            {"role": "user", "content": task["task"]},
        ]
        for i in range(step):
            result = self._results[i % len(self._results)].replace("{module}", task["module"])
            call = {"id": f"call_{i}", "type": "function", "function": self._calls[agent, i]}
            found.append({"role": "assistant", "content": "", "tool_calls": [call]})
            content = result.replace("{name}", task["name"])
            found.append({"role": "tool", "tool_call_id": f"call_{i}", "content": content})
        return found

    def note(self, agent: int, step: int, events: Sequence[OutputEvent]) -> None:
        """Keep the call of an agent in a step, unless it is known from another run."""
        name = next(event.name for event in events if isinstance(event, Called))
        arguments = "".join(event.text for event in events if isinstance(event, Arguments))
        self._calls.setdefault((agent, step), {"name": name, "arguments": json.loads(arguments)})


class Table:
    """An engine and its scheduler, which agents share. Closes neither."""

    def __init__(self, engine: Engine, script: AgentScript) -> None:
        self.engine, self.scheduler, self._script = engine, Scheduler(engine), script
        vocab = engine.model.vocab
        shaper = ConstraintCompiler(vocab, engine.model.chat_template)
        choice = ToolChoice("required", parallel=False)
        self.shape: OutputConstraint = shaper.shape(read_tools(script.tools), choice, None)
        self._rendering = threading.Lock()  # one conversation at a time

    def run(self, agent: int, steps: int) -> list[AgentStep]:
        """The steps of one agent, one after the other."""
        return [self._step(agent, number) for number in range(steps)]

    def prompt(self, agent: int, number: int) -> list[int]:
        with self._rendering:
            return self.engine.chat_prompt(self._script.messages(agent, number), self._script.tools)

    def ask(
        self, prompt: Sequence[int], max_tokens: int, client: str, sampling: Sampling | None = None
    ) -> _AgentListener:
        """Wait for the answer to `prompt`; with `sampling`, one that need not be a call."""
        ear = _AgentListener()
        shape = self.shape if sampling is None else FREE
        request = Request(prompt, sampling or Sampling(), max_tokens, constraint=shape.start, form=shape.form)
        self.scheduler.submit(request, ear, client)
        ear.done.wait()
        if ear.error is not None:
            raise ear.error
        return ear

    def _step(self, agent: int, number: int) -> AgentStep:
        start = perf_counter()
        prompt = self.prompt(agent, number)
        ear = self.ask(prompt, _MOST_TOKENS, str(agent))
        self._script.note(agent, number, ear.events)
        return AgentStep(agent, number, prompt, ear.result, ear.first - start, ear.last - start)


class _AgentListener:
    """A listener that keeps the times of an answer."""

    def __init__(self) -> None:
        self.first = self.last = 0.0
        self.events: list[OutputEvent] = []
        self.result = GenerationStats()
        self.error: Exception | None = None
        self.done = threading.Event()

    def stepped(self, step: Step) -> None:
        self.first = self.first or perf_counter()
        self.events += step.events

    def ended(self, stats: GenerationStats, error: Exception | None) -> None:
        self.last = perf_counter()
        self.first = self.first or self.last
        self.result, self.error = stats, error
        self.done.set()


def measure_agents(
    one: Engine,
    many: Engine,
    progress: Callable[[str], None] | None = None,
    agents: int = AGENTS,
    steps: int = STEPS,
    repetitions: int = 1,
) -> dict[str, Any]:
    """Run the agents one after another on `one`, half before and half after all of them at once on `many`.

    Takes over both engines and closes them.
    """
    script = AgentScript()
    alone, together = Table(one, script), Table(many, script)
    show = progress or (lambda _: None)
    found: dict[str, list[AgentStep]] = {"alone": [], "together": []}
    spent = {"alone": 0.0, "together": 0.0}
    try:
        for table in (alone, together):  # warm-up
            table.ask(table.prompt(0, 0), 8, "")
        for turn in range(repetitions):
            half = [range(agents // 2), range(agents // 2, agents)]
            for part in (half[0], None, half[1]):
                _forget(alone, together)
                show(f"{turn + 1} of {repetitions}: {'together' if part is None else 'one after another'}")
                start = perf_counter()
                if part is None:
                    with ThreadPoolExecutor(agents) as pool:
                        ran = list(pool.map(lambda agent: together.run(agent, steps), range(agents)))
                else:
                    ran = [alone.run(agent, steps) for agent in part]
                way = "together" if part is None else "alone"
                spent[way] += perf_counter() - start
                found[way] += [step for run in ran for step in run]
        show("cold")
        cold = _cold(alone, found["together"], agents, steps)
        differences = _differences(alone, found)
        return _report(one, found, spent, cold, differences)
    finally:
        for table in (alone, together):
            table.scheduler.close(30.0)


def _forget(*tables: Table) -> None:
    """Empty the slots and the prompt cache. There is no request meanwhile, so no thread uses them."""
    for table in tables:
        table.engine.forget()
        table.engine.pool.close()


def _cold(table: Table, steps: Sequence[AgentStep], agents: int, count: int) -> list[tuple[AgentStep, float]]:
    """For one step of each agent, from the second to the last: seconds to the first token without a cache."""
    picked = {agent: 1 + agent * (count - 2) // max(1, agents - 1) for agent in range(agents)}
    cold = []
    for step in steps:
        if picked.get(step.agent) == step.number:
            picked.pop(step.agent)
            _forget(table)
            start = perf_counter()
            cold.append((step, table.ask(step.prompt, 1, "").first - start))
    return cold


def _differences(table: Table, found: Mapping[str, Sequence[AgentStep]]) -> list[dict[str, Any]]:
    """Where answers to one prompt differ, with the gap in log-probability between the two tokens there."""
    first = {(step.agent, step.number): step for step in reversed(found["alone"])}
    differences = []
    for step in found["together"]:
        other = first[step.agent, step.number].result.tokens
        at = first_difference(other, step.result.tokens)
        if at is None:
            continue
        gap = None
        if at < min(len(other), len(step.result.tokens)):
            ear = table.ask([*step.prompt, *other[:at]], 1, "", Sampling(logprobs=_NEAR))
            likely = dict(ear.result.logprobs[0].top)
            ours, theirs = likely.get(step.result.tokens[at]), likely.get(other[at])
            gap = round(abs(ours - theirs), 4) if ours is not None and theirs is not None else None
        differences.append({"agent": step.agent, "step": step.number + 1, "position": at, "gap": gap})
    return differences


def _report(
    engine: Engine,
    found: Mapping[str, Sequence[AgentStep]],
    spent: Mapping[str, float],
    cold: Sequence[tuple[AgentStep, float]],
    differences: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    written = {way: sum(len(one.result.tokens) for one in steps) for way, steps in found.items()}
    speed = {way: written[way] / spent[way] for way in found}
    return {
        "model": engine.model.path.name,
        "engine": engine.model.options.engine,
        "answers": len(found["together"]),
        "prompt_tokens": [
            min(len(one.prompt) for one in found["together"]),
            max(len(one.prompt) for one in found["together"]),
        ],
        "tokens_per_second": {way: round(value, 2) for way, value in speed.items()},
        "seconds": {way: round(value, 1) for way, value in spent.items()},
        "ratio": round(speed["together"] / speed["alone"], 3),
        "tokens_per_round": {
            way: round(written[way] / max(1, sum(one.result.rounds for one in steps)), 3)
            for way, steps in found.items()
        },
        "read_again": {
            way: round(median(one.result.prompt_tokens - one.result.cached_tokens for one in steps), 1)
            for way, steps in found.items()
        },
        "seconds_to_first_token": {way: _spread(steps) for way, steps in found.items()},
        "warm_to_cold": {
            "median": round(median(step.first / seconds for step, seconds in cold), 3),
            "largest": round(max(step.first / seconds for step, seconds in cold), 3),
            "cold_seconds": round(median(seconds for _, seconds in cold), 3),
        },
        "differences": list(differences),
    }


def _spread(steps: Sequence[AgentStep]) -> dict[str, float]:
    """Median and 95th percentile of the steps after the first."""
    times = [one.first for one in steps if one.number]
    return {"median": round(median(times), 3), "p95": round(quantiles(times, n=20)[-1], 3)}


def agents_table(report: Mapping[str, Any]) -> str:
    """Format the report for people."""
    lines = [f"{'':<20}{'tokens/s':>10}{'seconds':>10}{'per step':>10}{'first token':>14}{'p95':>8}"]
    for way, name in (("alone", "one after another"), ("together", "all at once")):
        first = report["seconds_to_first_token"][way]
        lines.append(
            f"{name:<20}{report['tokens_per_second'][way]:10.1f}{report['seconds'][way]:10.1f}"
            f"{report['tokens_per_round'][way]:10.2f}{first['median']:12.2f} s{first['p95']:6.2f} s"
        )
    warm = report["warm_to_cold"]
    lines.append(f"total speed {report['ratio']:.2f} times that of one after another")
    lines.append(
        f"first token of later steps after {warm['median']:.0%} of the time without a cache "
        f"({warm['largest']:.0%} at most; "
        f"without {warm['cold_seconds']:.2f} s)"
    )
    lines.append(f"{len(report['differences'])} of {report['answers']} answers differ")
    lines += [
        f"  agent {one['agent']}, step {one['step']}, at token {one['position']}: gap {one['gap']}"
        for one in report["differences"]
    ]
    smallest, largest = report["prompt_tokens"]
    lines.append(f"{report['model']} on {report['engine']}, prompts of {smallest} to {largest} tokens")
    return "\n".join(lines)
