"""Run a command whose notebooks start warm: `python -m tests.warm_start pytest --nbmake notebooks`.

Kernels of the command are `ipykernel` of this environment, run by the Python of `warm_start`. They
are found before any other kernel named `python3`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from . import python


def main() -> int:
    """Run the command of the arguments, and return its exit code."""
    if not sys.argv[1:]:
        sys.exit("usage: python -m tests.warm_start COMMAND [ARGUMENT …]")
    with tempfile.TemporaryDirectory(prefix="opdlab-kernels-") as folder:
        place = Path(folder) / "kernels" / "python3"
        place.mkdir(parents=True)
        kernel = {
            "argv": [python(), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            "display_name": "Python 3",
            "language": "python",
        }
        (place / "kernel.json").write_text(json.dumps(kernel), encoding="utf-8")
        paths = os.pathsep.join(filter(None, [folder, os.environ.get("JUPYTER_PATH")]))
        command = sys.argv[1:]
        return subprocess.run(
            command, env={**os.environ, "JUPYTER_PATH": paths}, check=False
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
