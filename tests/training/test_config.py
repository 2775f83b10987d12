"""Config files: paths start from the file, and what is unknown is refused by name."""

from __future__ import annotations

import pytest

from opdlab.errors import InvalidValue, OpdlabError
from opdlab.training.config import parse_toml, read_config, write_toml
from opdlab.training.configured import make_sampler


def test_every_path_starts_from_the_folder_of_the_file(tmp_path):
    config = read_config(
        parse_toml("""
            [student]
            source = "./student"
            adapter = "../adapter"

            [teacher]
            kind = "logprobs"
            url = "http://127.0.0.1:9/v1"
            cache = "answers.sqlite"

            [task]
            records = "questions.jsonl"

            [sampler]
            kind = "vllm-server"
            url = "http://127.0.0.1:8/v1"
            adapter_folder = "adapters"

            [run]
            folder = "run"
        """),
        tmp_path / "here",
    )
    here = str(tmp_path / "here")
    assert config.student.source == f"{here}/student"
    assert config.student.adapter == str(tmp_path / "adapter")
    assert config.teacher.cache == f"{here}/answers.sqlite"
    assert config.task.records == f"{here}/questions.jsonl"
    assert config.sampler.options["adapter_folder"] == f"{here}/adapters"
    assert config.run.folder == f"{here}/run"
    assert read_config(parse_toml(write_toml(config)), tmp_path / "elsewhere") == config


def test_the_base_of_a_sampler_is_a_folder_or_a_name_of_the_hub(tmp_path):
    for base, want in {"./quantised": str(tmp_path / "quantised"), "Qwen/Q": "Qwen/Q"}.items():
        tables = {"student": {"source": "student"}, "sampler": {"kind": "vllm", "base": base}}
        sampler = read_config(tables, tmp_path).sampler
        assert sampler.options == {"base": want}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "vlm"}, "Did you mean 'vllm'?"),
        ({"kind": "vllm-server"}, "missing a required argument: 'url'"),
        ({"kind": "vllm-server", "url": "http://127.0.0.1:8/v1", "retry": 2}, "'retry'"),
        ({"kind": "vllm", "gpu_memory_utilization": 3.0}, "Use a number above 0, at most 1."),
    ],
)
def test_a_sampler_that_cannot_be_made_is_refused(options, said):
    config = read_config({"student": {"source": "student"}, "sampler": options})
    with pytest.raises(OpdlabError, match=said.replace("?", r"\?")):
        make_sampler(config.sampler)


def test_a_sampler_without_a_kind_is_refused():
    tables = {"student": {"source": "student"}, "sampler": {"url": "http://127.0.0.1:8/v1"}}
    with pytest.raises(InvalidValue, match=r"\[sampler\] has no kind"):
        read_config(tables)
