"""Real vLLM on the shipped market models: engines in this process, and servers beside it.

These tests run in an environment of their own: `make test-vllm`. Elsewhere they are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
from with_vllm.servers import HERE, Server, vllm_server

KEY = "sesame-open-1234"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("vllm")
            if find_spec("vllm") is None:
                item.add_marker(
                    pytest.mark.skip(reason="vLLM has tests of its own: make test-vllm")
                )


@pytest.fixture(scope="session")
def student_server(tmp_path_factory) -> Iterator[Server]:
    """The student, which takes up adapters and asks for a key."""
    server = vllm_server(
        "student",
        tmp_path_factory.mktemp("servers"),
        *("--enable-lora", "--max-lora-rank", "16"),
        VLLM_ALLOW_RUNTIME_LORA_UPDATING="True",
        VLLM_API_KEY=KEY,
    )
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def teacher_server(tmp_path_factory) -> Iterator[Server]:
    """The teacher, as anybody serves it."""
    server = vllm_server("teacher", tmp_path_factory.mktemp("servers"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def second_teacher_server(tmp_path_factory) -> Iterator[Server]:
    """The same teacher once more."""
    server = vllm_server("teacher", tmp_path_factory.mktemp("servers"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def key(monkeypatch) -> str:
    monkeypatch.setenv("OPDLAB_API_KEY", KEY)
    return KEY
