"""Download of a model while the chat stays open."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from edgespec.app.terminal import one_line
from edgespec.core import EdgespecError

if TYPE_CHECKING:
    from edgespec.models.hub.catalog import Entry
    from edgespec.models.hub.download import PullProgress
    from edgespec.models.hub.references import Reference


def fetch(name: str, progress: Callable[[float], None], done: Callable[[str], None]) -> None:
    """Download a model, and the draft model it is paired with, in a thread.

    `progress` gets the downloaded share, `done` an error message, empty on success; both are called in that
    thread. If the program ends, the next download continues with what is there.
    """

    def run() -> None:
        try:
            models = [_known(name)]
            if draft := models[0].draft:
                models.append(_known(draft))
            total, before = sum(one.bytes for one in models), 0
            for one in models:

                def report(got: int, _all: int, _what: str, start: int = before) -> None:
                    progress(min(1.0, (start + got) / total))  # the size of a reference is only about right

                _pull(one, report)
                before += one.bytes
        except EdgespecError as error:
            done(one_line(str(error)))
        except Exception as error:  # noqa: BLE001 - nothing else would report it
            done(one_line(f"cannot download {name}: {type(error).__name__}: {error}"))
        else:
            done("")

    threading.Thread(target=run, name="edgespec-fetch", daemon=True).start()


def _known(name: str) -> Entry | Reference:
    from edgespec.models.hub.catalog import load_catalog
    from edgespec.models.hub.references import load_references

    return load_catalog().get(name) or load_references()[name]


def _pull(model: Entry | Reference, report: PullProgress) -> None:
    from edgespec.models.hub.catalog import Entry
    from edgespec.models.hub.download import pull
    from edgespec.models.hub.listing import pull_repository
    from edgespec.models.hub.store import models_folder

    if isinstance(model, Entry):
        pull(model, models_folder(), progress=report)
    else:
        pull_repository(model.repository, models_folder(), progress=report)
