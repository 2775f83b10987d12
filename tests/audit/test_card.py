"""The card of an audit: what it shows, and that no name in it becomes code."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from opdlab import OPD, audit
from opdlab import losses as d
from opdlab.audit import in_reward


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.seen.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_card_holds_no_code_whatever_a_loss_is_called():
    def loss(rows):
        return -d.forward_kl(rows.student, rows.teacher)

    loss.__name__ = '<img src=x onerror="alert(1)"><script>alert(2)</script>'
    name = "<svg onload=alert(3)>"
    found = audit(
        loss, sweep={name: lambda x: loss if x in (0, 1) else lambda rows: 2 * loss(rows)}
    )
    html = found._repr_html_()
    tags = Tags()
    tags.feed(html)
    assert not tags.open
    assert tags.seen <= {
        "div",
        "code",
        "b",
        "ul",
        "li",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "span",
    }
    assert tags.attributes <= {"style", "scope", "aria-hidden"}
    assert "&lt;script&gt;" in html
    assert "<script" not in html
    assert "currentColor" in html
    assert "&lt;svg onload" in html
    assert found.flags["ascends"] in html
    assert len(html) < 8000


@pytest.mark.parametrize(
    "loss", [OPD(), in_reward("k3"), lambda rows: -d.forward_kl(rows.student, rows.teacher)]
)
def test_bars_go_right_in_blue_and_left_in_orange(loss):
    found = audit(loss)
    shown = found.table["cosine"].head(6)
    for some, side, colour in ((shown > 0, "left", "#0072B2"), (shown < 0, "right", "#D55E00")):
        assert found._repr_html_().count(f"em;{side}:3em;background:{colour}") == some.sum()
    assert len(set(shown > 0)) == (2 if loss == in_reward("k3") else 1)
