"""Export the ONNX models that tests need into the models folder: packaging/models_onnx.py

Each has a folder NAME-intBITS. A record next to it contains the digest of the exporter, so that the model is
exported again after a change.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from edgespec.models.hub.catalog import load_catalog
from edgespec.models.hub.store import is_onnx, models_folder

NAMES = ("smollm2-135m", "qwen2.5-coder-0.5b")
BITS = (8, 4)
MAKERS = ("quant/exporter.py", "quant/compact.py")


def main() -> None:
    root = Path(__file__).parent.parent
    digest = hashlib.sha256(b"".join((root / maker).read_bytes() for maker in MAKERS))
    for name in NAMES:
        for bits in BITS:
            folder = models_folder() / f"{name}-int{bits}"
            record = models_folder() / f".{folder.name}.made"
            made = f"{digest.hexdigest()} {load_catalog()[name].sha256}"
            if is_onnx(folder) and record.is_file() and record.read_text("utf-8") == made:
                continue
            command = [sys.executable, "-m", "edgespec.app.cli.main", "quant", "onnx", name, "--force"]
            subprocess.run([*command, "--bits", str(bits), "--out", str(folder)], check=True)
            record.write_text(made, "utf-8")


if __name__ == "__main__":
    main()
