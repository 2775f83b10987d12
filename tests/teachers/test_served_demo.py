"""The main job with a teacher behind a server: what `opdlab demo --teacher-url` does, in one
process.
"""

from __future__ import annotations

import re
import sys

import pytest

import opdlab as opd
from opdlab.commands import cli
from opdlab.commands.demo import choose_method, demo
from opdlab.errors import MissingPolicy, OpdlabError, PartialDistribution, TeacherError
from opdlab.losses.divergences import TopK

LINE = r"demo: accuracy \d\.\d\d -> \d\.\d\d \(teacher (\d\.\d\d)\) in \d+ s"


def test_a_text_server_teaches_by_default_through_omniopd(scribe_url, tmp_path, capsys):
    line = demo(teacher_url=scribe_url, steps=1, out=tmp_path, prompts=4, settings={"batch": 2})
    assert float(re.fullmatch(LINE, line)[1]) >= 0.75
    said = capsys.readouterr().out
    assert "distilling with OmniOPD" in said
    assert re.search(r"teacher: [\d,]+ requests, [\d,]+ tokens; answers kept in", said)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "where the teacher was asked to go on, it wrote" in page
    assert "OmniOPD" in page
    trace = opd.Trace.load(tmp_path / "after.parquet")
    assert trace.policies == ["student"]  # its log-probs are all that there is


def test_a_server_with_log_probs_teaches_through_opd(wire, tmp_path, capsys):
    _, _, url = wire
    line = demo(
        teacher_url=url, method="opd", steps=1, out=tmp_path, prompts=4, settings={"batch": 2}
    )
    assert re.fullmatch(LINE, line)
    assert "distilling with OPD" in capsys.readouterr().out


def test_a_local_teacher_of_other_tokens_teaches_by_its_texts(tmp_path):
    line = demo(
        teacher="scribe", method="omniopd", steps=1, out=tmp_path, prompts=4, settings={"batch": 2}
    )
    assert re.fullmatch(LINE, line)


def test_what_cannot_work_is_said_before_anything_is_measured(wire, tmp_path, capsys):
    _, faults, url = wire
    with pytest.raises(PartialDistribution, match="whole distribution of 'teacher'"):
        demo(teacher_url=url, method="eopd", out=tmp_path)
    with pytest.raises(OpdlabError, match="tokenizer differs"):
        demo(teacher="scribe", out=tmp_path)
    with pytest.raises(MissingPolicy, match="must be told hints"):
        demo(teacher_url=url, method="dopd", out=tmp_path)
    faults.always = (503, {})
    with pytest.raises(TeacherError, match="answers 503"):
        demo(teacher_url=url, out=tmp_path)
    assert "student 0." not in capsys.readouterr().out
    assert not (tmp_path / "index.html").exists()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("opd", "OPD"),
        ("opd-plus", "OPDPlus"),
        ("OPDPlus", "OPDPlus"),
        ("topd", "TOPD"),
        ("omniopd", "OmniOPD"),
        ("omni-opd", "OmniOPD"),
        ("dopd", "DOPD"),
        ("sequence-kd", "SequenceKD"),
        ("sequence_kd", "SequenceKD"),
        ("grpo", "GRPO"),
        ("sft", "SFT"),
    ],
)
def test_methods_by_name(name, kind):
    method, _ = choose_method(name)
    assert type(method).__name__ == kind
    assert choose_method(name, profile="gpu")[1] == {}


def test_sizes_suit_the_shipped_world_only():
    assert choose_method("omniopd")[0].length == 1
    assert choose_method("omniopd", profile="gpu")[0].length == 50
    assert choose_method("opd", is_served=True)[0].top_k == TopK(20, by="teacher")
    assert choose_method("opd")[0].top_k is None


def test_an_unknown_method_is_one_line_that_lists_them():
    with pytest.raises(
        OpdlabError,
        match=(
            r"There is no method 'magic'\. Use one of .*DOPD, .*OmniOPD, .*TOPD, .*; capitals and"
        ),
    ):
        choose_method("magic")
    with pytest.raises(OpdlabError):
        choose_method("method")


def test_the_command_line_passes_its_options_on(monkeypatch, wire, tmp_path, capsys):
    server, _, url = wire
    words = [
        "demo",
        "--method",
        "sequence-kd",
        "--teacher-url",
        url,
        "--teacher-model",
        "other",
        "--out",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", ["opdlab", *words])
    with pytest.raises(
        SystemExit, match=r"^opdlab: http.*answers 404: .*The model `other` does not exist"
    ):
        cli.main()
    assert server.requests[-1][1]["model"] == "other"
    monkeypatch.setattr(sys, "argv", ["opdlab", "demo", "--method", "magic"])
    with pytest.raises(SystemExit, match=r"^opdlab: There is no method 'magic'\."):
        cli.main()
