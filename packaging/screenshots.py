"""Render the screenshots of the chat in docs/: packaging/screenshots.py [MODEL]

A real model generates the answer and the figures.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from pathlib import Path

MODEL = sys.argv[1] if len(sys.argv) > 1 else "qwen2.5-coder-1.5b"
DOCS = Path(__file__).parent.parent / "docs"
QUESTION = (
    "Write a Python function that finds the longest repeated substring. Then write it again with type hints."
)
SECONDS = 600


async def main() -> None:
    from edgespec.app import settings
    from edgespec.app.chat.app import ChatApp
    from edgespec.app.chat.chat_model import LocalModel
    from edgespec.app.engine.loading import EngineSpec, load_engine

    def load(progress: object) -> LocalModel:
        return LocalModel(load_engine(EngineSpec(MODEL), progress))  # type: ignore[arg-type]

    app = ChatApp(load, MODEL, settings=settings.Settings(temperature=0.0), max_tokens=240)
    async with app.run_test(size=(100, 32)) as pilot:
        async with asyncio.timeout(SECONDS):
            while app.session.state != "ready":
                await pilot.pause(0.2)
            app.session.send(QUESTION)
            app._wake()
            while app.session.result is None or len(app.session.result.tokens) < 120:
                await pilot.pause(0.05)
            _draw(app, "chat.svg")
            while app.session.state != "ready":
                await pilot.pause(0.2)
            await pilot.press("ctrl+g")
            await pilot.pause(1.0)
            _draw(app, "chat-engine.svg")


def _draw(app: object, name: str) -> None:
    svg: str = app.export_screenshot(title="edgespec chat")  # type: ignore[attr-defined]
    (DOCS / name).write_text(svg, encoding="utf-8")


with tempfile.TemporaryDirectory() as folder:
    os.environ |= {"EDGESPEC_DATA": folder, "EDGESPEC_CONFIG": folder}
    asyncio.run(main())
