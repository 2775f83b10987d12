"""Point huggingface_hub, transformers, PEFT and datasets to the imitation, with an empty cache."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from huggingface_hub import constants
from transformers.utils import hub as transformers_hub

from .server import serve
from .store import ImitationHub

KEEPS_QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_DISABLE_XET": "1",
}
# Settings of the user that would lead elsewhere.
LEADS_ELSEWHERE = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


@dataclass(frozen=True)
class Connection:
    """A running imitation and a user's empty home.

    Attributes:
        hub: What is served, and what was asked.
        url: Its address.
        home: The folder for `HF_HOME`.
    """

    hub: ImitationHub
    url: str
    home: Path

    def environment(self, **extra: str) -> dict[str, str]:
        """Return the environment of a command that talks to the imitation.

        Args:
            extra: Further variables, as `HF_TOKEN`.

        Returns:
            This process's environment with the changes.
        """
        kept = {k: v for k, v in os.environ.items() if k not in LEADS_ELSEWHERE}
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(self.home)}
        return kept | KEEPS_QUIET | own | extra


@contextmanager
def running_hub(folder: Path) -> Iterator[Connection]:
    """Start an imitation with an empty home.

    Args:
        folder: An empty folder for both.

    Yields:
        The connection to it.
    """
    served = ImitationHub(folder / "served")
    with serve(served) as url:
        yield Connection(served, url, folder / "home")


def connect(connection: Connection, patch: pytest.MonkeyPatch) -> None:
    """Point the libraries of this process, and commands that it starts, to a connection.

    Args:
        connection: The imitation and the home.
        patch: Takes everything back when the test ends.
    """
    for name in LEADS_ELSEWHERE:
        patch.delenv(name, raising=False)
    for name, value in connection.environment().items():
        patch.setenv(name, value)
    # The libraries read their environment when they are imported.
    cache, token = connection.home / "hub", connection.home / "token"
    changes: Mapping[str, object] = {
        "ENDPOINT": connection.url,
        "HF_HOME": str(connection.home),
        "HF_HUB_CACHE": str(cache),
        "HF_TOKEN_PATH": str(token),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_XET": True,
        "HUGGINGFACE_CO_URL_TEMPLATE": connection.url + "/{repo_id}/resolve/{revision}/{filename}",
    }
    for name, value in changes.items():
        patch.setattr(constants, name, value)
    patch.setattr(huggingface_hub.hf_api.api, "endpoint", connection.url)
    # transformers makes a client once and keeps it.
    patch.setattr(transformers_hub, "_hf_api", None)
    patch.setattr(datasets.config, "HF_ENDPOINT", connection.url)
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", connection.home / "datasets")
    patch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
