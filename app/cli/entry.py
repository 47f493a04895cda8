"""Where the frozen program begins: as itself, or as the child process that its first argument names.

There is no Python that could be started for a child, so the program starts itself. The commands are those of
`chat_template.worker_command`, `trial.worker_command`, `requant.worker_command`, `download.pip_command` and
`busy.worker_command`.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Imports only what the part to be played needs: a child should start quickly and stay small."""
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
