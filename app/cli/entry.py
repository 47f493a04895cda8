"""Entry point of the frozen program, and of the child processes that it starts.

A frozen program has no Python to start a child with, so it starts itself, with one of the first arguments
that `processes.command` is called with.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run what the first argument names and import nothing else: a child should start fast and stay small."""
    match sys.argv[1:]:
        case ["_render-worker"]:
            from edgespec.models.prompting import template_worker

            template_worker.main()
        case ["_selftest-worker"]:
            from edgespec.models.gguf import selftest_worker

            sys.exit(selftest_worker.main())
        case ["_quantize-worker", *arguments]:
            from edgespec.quant import quantizer

            sys.exit(quantizer.main(arguments))
        case ["_pip-worker", *arguments]:
            from pip._internal.cli.main import main as pip

            sys.exit(pip(arguments))
        case ["_busy-worker"]:
            from edgespec.app.bench import busy

            busy.busy()
        case _:
            from edgespec.app.cli import main

            main.main()


if __name__ == "__main__":
    main()
