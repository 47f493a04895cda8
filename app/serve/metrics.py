"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from edgespec.app.engine.request import GenerationStats
from edgespec.app.engine.scheduler import Scheduler
from edgespec.core import Reading

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

_SECONDS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)
_SPEEDS = (1, 2, 5, 10, 15, 20, 30, 40, 60, 80, 120, 200, 400)
_LENGTHS = (0, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 31)
_MODES = ("performance", "balanced", "saver")


class Metrics:
    """The figures of one service, all of them kept in one event loop."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._service = scheduler
        self._registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"edgespec_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"edgespec_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"edgespec_{name}", text, buckets=buckets, registry=registry)

        self._requests = counter("requests", "HTTP requests", "path", "status")
        self._answers = counter("answers", "Answers by what ended them", "reason")
        self._prompt = counter("prompt_tokens", "Tokens of prompts")
        self._cached = counter("cached_prompt_tokens", "Tokens of prompts that were not read again")
        self._written = counter("generated_tokens", "Tokens of answers")
        self._rounds = counter("rounds", "Passes of the target model after which tokens were final")
        self._drafted = counter("drafted_tokens", "Tokens guessed", "drafter")
        self._accepted = counter("accepted_tokens", "Guessed tokens that stood", "drafter")
        self._first = histogram(
            "time_to_first_token_seconds", "From the request to the first token", _SECONDS
        )
        self._speed = histogram("tokens_per_second", "Speed of answers after their first token", _SPEEDS)
        self._length = histogram("draft_length", "Tokens guessed a round, mean of each answer", _LENGTHS)
        self._cpu = counter("cpu_seconds", "Processor time of answers after their first token")
        self._joules = counter("energy_joules", "Metered energy of the same, where there is a meter")
        self._running = gauge("running", "Answers under way")
        self._waiting = gauge("waiting", "Requests that wait")
        self._mode = gauge("mode", "1 for what the machine may give now", "mode")
        self._celsius = gauge("temperature_celsius", "Of the processor's hottest sensor")
        self._charge = gauge("battery_percent", "Charge of the battery")

    def answered(self, result: GenerationStats, error: Exception | None, waited: float) -> None:
        """One answer ended, `waited` seconds after it was asked for."""
        self._answers.labels("error" if error is not None else result.stop_reason).inc()
        self._prompt.inc(result.prompt_tokens)
        self._cached.inc(result.cached_tokens)
        self._written.inc(len(result.tokens))
        self._rounds.inc(result.rounds)
        for drafter, (drafted, accepted) in result.drafters.items():
            self._drafted.labels(drafter).inc(drafted)
            self._accepted.labels(drafter).inc(accepted)
        if result.rounds:
            queued = max(0.0, waited - result.seconds)
            self._first.observe(queued + result.seconds_to_first_token)
            self._length.observe(result.drafted / result.rounds)
        if result.tokens_per_second:
            self._speed.observe(result.tokens_per_second)
        if result.energy is not None:
            self._cpu.inc(max(0.0, result.energy.cpu_seconds))
            self._joules.inc(max(0.0, result.energy.joules or 0.0))

    def text(self) -> bytes:
        """Everything, in the text format of Prometheus."""
        load = self._service.load
        self._running.set(load.running)
        self._waiting.set(load.waiting)
        engine = self._service.engine
        for mode in _MODES:
            self._mode.labels(mode).set(engine.decision.mode == mode)
        reading: Reading = engine.resources.watch.latest()
        for gauge, value in ((self._celsius, reading.celsius), (self._charge, reading.charge)):
            gauge.set(float("nan") if value is None else value)
        return generate_latest(self._registry)

    def counting(
        self, app: Callable[..., Awaitable[None]], known: set[str]
    ) -> Callable[..., Awaitable[None]]:
        """`app`, with its requests counted by path (of those `known`) and status."""

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            async def noted(message: Message) -> None:
                if message["type"] == "http.response.start":
                    path = scope["path"] if scope["path"] in known else "other"
                    self._requests.labels(path, str(message["status"])).inc()
                await send(message)

            await app(scope, receive, noted)

        return counted
