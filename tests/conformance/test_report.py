"""Reports as files: JUnit XML and SVG that parse, whatever the names are."""

import json
from xml.etree import ElementTree

import pytest

from opdlab.conformance import Case, Conformance, Spec, Status, conform, save_all
from opdlab.conformance.zoo import CASES
from opdlab.losses import reverse_kl

STRANGE = "<b>&\"'\x1b[2J\x00\u202e]]>\ud800</b>"


def right(student, teacher, mask):
    return reverse_kl(student, teacher)


@pytest.fixture(scope="module")
def reports() -> list[Conformance]:
    good = Case(STRANGE.replace("\ud800", ""), right, Spec("log_probs", trains="reverse_kl"))
    return [conform(good), conform(CASES[1])]


def test_files(reports, tmp_path):
    for i, report in enumerate(reports):
        files = report.save(tmp_path / str(i))
        assert [path.name for path in files] == ["conformance.json", "junit.xml", "badge.svg"]
        found = json.loads(files[0].read_text(encoding="utf-8"))
        assert found["passes"] is report.passes
        assert [one["check"] for one in found["findings"]] == [one.check for one in report.findings]
        suite = ElementTree.parse(files[1]).getroot()[0]
        assert int(suite.get("tests")) == len(report.findings)
        assert int(suite.get("failures")) == len(report.of(Status.FAIL))
        assert len(suite.findall("testcase/failure")) == len(report.of(Status.FAIL))
        assert len(suite.findall("testcase/skipped")) == len(report.of(Status.SKIP))
        badge = ElementTree.parse(files[2]).getroot()
        words = " ".join(badge.itertext())
        assert ("reverse KL" in words) is report.passes
        assert not {one.tag.rpartition("}")[2] for one in badge.iter()} - {
            *("svg", "title", "rect", "path", "g", "text"),
        }


def test_several_at_once(reports, tmp_path):
    files = save_all(reports, tmp_path)
    assert [path.name for path in files][2:] == ["badge-1.svg", "badge-2.svg"]
    assert len(ElementTree.parse(tmp_path / "junit.xml").getroot()) == 2


def test_what_is_shown_is_safe_and_says_the_mistake(reports):
    assert "\x1b" not in repr(reports[0])
    assert "\u202e" not in repr(reports[0])
    page = reports[0]._repr_html_()
    assert "<b>&" not in page
    assert "mistake k3_as_loss" in repr(reports[1])
    assert "k3 as loss" in reports[1]._repr_html_()
    assert reports[1]["claim"].mistake == "k3_as_loss"
    with pytest.raises(KeyError, match="there are call"):
        reports[1]["no question"]
