"""The first line of every notebook: versions, device, profile, and the expected time."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from opdlab.errors import OpdlabError

PROFILES = ("ci", "cpu", "gpu")  # from small to large


@dataclass(frozen=True)
class Context:
    """The profile and the device that `setup` found.

    Attributes:
        profile: "ci", "cpu" or "gpu"; it decides models, steps and lengths.
        device: "cpu" or "cuda".
    """

    profile: str
    device: str

    @property
    def gpu(self) -> bool:
        """Tell whether there is a GPU to use."""
        return self.device.startswith("cuda")

    def pick(self, **sizes: Any) -> Any:
        """Pick the value for this profile, as in `ctx.pick(ci=8, cpu=64, gpu=512)`.

        Args:
            sizes: Values by profile. A profile that is left out takes that of the next smaller.

        Returns:
            The value.

        Raises:
            OpdlabError: There is no value for this profile or a smaller one.
        """
        up_to_this = PROFILES[: PROFILES.index(self.profile) + 1]
        known = [profile for profile in up_to_this if profile in sizes]
        if not known:
            raise OpdlabError(f"pick has no size for profile {self.profile!r}. Name at least ci=….")
        return sizes[known[-1]]


def setup(minutes: Mapping[str, float] | None = None) -> Context:
    """Print versions, device, profile and expected time; set the look of charts.

    Loading bars are silenced, and Plotly draws in the template "opdlab" unless told otherwise.

    The environment variable `OPDLAB_PROFILE` sets the profile; without it, it is "gpu" where there
    is a GPU, else "cpu".

    Args:
        minutes: The expected time of the notebook, by profile.

    Returns:
        The profile and the device.

    Raises:
        OpdlabError: `OPDLAB_PROFILE` is not a profile.
    """
    import plotly.io
    import transformers

    import opdlab.viz.plotly_template  # registers the Plotly template "opdlab"

    profile = os.environ.get("OPDLAB_PROFILE", "gpu" if torch.cuda.is_available() else "cpu")
    if profile not in PROFILES:
        raise OpdlabError(f"OPDLAB_PROFILE is {profile!r}. Use ci, cpu or gpu.")
    plotly.io.templates.default = "opdlab"
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*IProgress not found.*")
    device = "cuda" if profile == "gpu" and torch.cuda.is_available() else "cpu"
    expected = f" · about {minutes[profile]:g} min" if minutes and profile in minutes else ""
    torch_version = torch.__version__.split("+")[0]
    versions = (
        f"opdlab {opdlab.__version__} · torch {torch_version}",
        f"transformers {transformers.__version__} · Python {platform.python_version()}",
    )
    print(f"{' · '.join(versions)}\nprofile {profile} · {device}{expected}")
    return Context(profile, device)
