"""The first line of every notebook: versions, device, profile, and the time to expect."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from opdlab.errors import OpdlabError

PROFILES = ("ci", "cpu", "gpu")


@dataclass(frozen=True)
class Context:
    """What `setup` found: the profile, the device, and whether there is a GPU to use."""

    profile: str
    device: str

    @property
    def gpu(self) -> bool:
        return self.device.startswith("cuda")

    def pick(self, **sizes: Any) -> Any:
        """The value for this profile:

        `ctx.pick(ci=8, cpu=64, gpu=512)`; a profile left out takes the one before it.
        """
        known = [p for p in PROFILES[: PROFILES.index(self.profile) + 1] if p in sizes]
        if not known:
            raise OpdlabError(f"pick has no size for profile {self.profile!r}. Name at least ci=….")
        return sizes[known[-1]]


def setup(minutes: Mapping[str, float] | None = None) -> Context:
    """Print versions, device, profile and the time to expect; quieten progress bars of loading.

    Returns the `Context`.
    """
    import transformers

    import opdlab.viz.curves  # registers the Plotly template "opdlab"

    profile = os.environ.get("OPDLAB_PROFILE", "gpu" if torch.cuda.is_available() else "cpu")
    if profile not in PROFILES:
        raise OpdlabError(f"OPDLAB_PROFILE is {profile!r}. Use ci, cpu or gpu.")
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*IProgress not found.*")
    device = "cuda" if profile == "gpu" and torch.cuda.is_available() else "cpu"
    expect = f" · about {minutes[profile]:g} min" if minutes and profile in minutes else ""
    versions = (
        f"opdlab {opdlab.__version__} · torch {torch.__version__.split('+')[0]} · transformers"
        f" {transformers.__version__}"
    )
    print(f"{versions} · Python {platform.python_version()}\nprofile {profile} · {device}{expect}")
    return Context(profile, device)
