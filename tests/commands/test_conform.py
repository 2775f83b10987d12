"""`opdlab conform`: a function in a file, files for CI, exit codes, and words for what is wrong."""

import json

import pytest

from opdlab.commands import conform
from opdlab.commands.flags import read_number, read_pairs
from opdlab.commands.output import Output
from opdlab.errors import OpdlabError

FILE = """
import torch
from opdlab.conformance import Case, Spec
from opdlab.losses import reverse_kl


def mine(student, teacher, mask, *, count, weight=1):
    value = weight * reverse_kl(student.log_softmax(-1), teacher.log_softmax(-1))
    return torch.where(mask, value, 0.0).sum() / count


SPEC = Spec(trains="reverse_kl", reduction="token", keywords={"count": "count"})
CASE = Case("mine", mine, SPEC)


class Method:
    needs = ("teacher",)

    def loss(self, rows):
        return rows.logp


METHOD = Method()
NUMBER = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "losses.py"
    path.write_text(FILE)
    return path


def run(target, spec=None, spec_name=None, out=None):
    output = Output(is_json=True)
    passes = conform.run(str(target), output, spec or {}, spec_name, out, 0, 60.0)
    return passes, output.result


def test_a_function_with_flags_with_a_spec_and_as_a_case(file, tmp_path):
    flags = {"trains": "reverse_kl", "keywords": {"count": "count"}, "options": {"weight": 1}}
    passes, found = run(f"{file}:mine", flags, out=tmp_path / "out")
    assert passes
    assert found["claim"] == "reverse KL"
    saved = json.loads((tmp_path / "out" / "conformance.json").read_text(encoding="utf-8"))
    assert saved == found
    assert run(f"{file}:mine", spec_name="SPEC")[0]
    assert run(f"{file}:CASE")[0]
    passes, found = run(f"{file}:mine", {**flags, "options": {"weight": 2}})
    assert not passes
    assert found["mistakes"] == ["wrong_scale"]


@pytest.mark.parametrize(
    ("target", "arguments", "said"),
    [
        ("verl", {}, "FILE.py:FUNCTION, or one of zoo, trl, liger"),
        ("zoo", {"spec": {"trains": "reverse_kl"}}, "which has its own"),
        ("FILE:CASE", {"spec_name": "SPEC"}, "Leave its flags out"),
        ("FILE:mine", {"spec_name": "CASE"}, "Make it an opdlab.conformance.Spec"),
        ("FILE:mine", {"spec_name": "SPEC", "spec": {"kind": "logits"}}, "one of the two"),
        ("FILE:Method", {}, r"is an opdlab method.*use opdlab.audit in Python: .*Method\(\)"),
        ("FILE:METHOD", {}, r"is an opdlab method.*opdlab.audit\(METHOD\)"),
        ("FILE:Spec", {}, "Name a function"),
        ("FILE:NUMBER", {}, "which is 3. Name a function"),
        ("FILE:none", {}, "defines no none"),
        ("no.py:mine", {}, "there is no file"),
    ],
)
def test_what_cannot_be_is_said(file, target, arguments, said):
    with pytest.raises(OpdlabError, match=said):
        run(target.replace("FILE", str(file)), **arguments)


def test_pairs_and_numbers():
    assert read_pairs(("a=b=c", "k=3"), "--option") == {"a": "b=c", "k": "3"}
    with pytest.raises(OpdlabError, match="NAME=VALUE"):
        read_pairs(("a",), "--option")
    assert [read_number(text) for text in ("3", "0.5", "true", "x")] == [3, 0.5, True, "x"]
