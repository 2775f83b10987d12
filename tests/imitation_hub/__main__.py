"""Run a command against the imitation: `python -m tests.imitation_hub opdlab demo --profile gpu`.

The command finds an empty `HF_HOME` and a server at `HF_ENDPOINT`; both are gone when it ends.
Gated models are served to those who give the token `hf_imitationGranted`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from .connection import running_hub


def main() -> int:
    """Run the command of the arguments, and return its exit code."""
    if not sys.argv[1:]:
        sys.exit("usage: python -m tests.imitation_hub COMMAND [ARGUMENT …]")
    with tempfile.TemporaryDirectory() as folder, running_hub(Path(folder)) as connection:
        return subprocess.run(sys.argv[1:], env=connection.environment(), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
