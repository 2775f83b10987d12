"""Files for continuous integration: JUnit XML, which every CI server reads, and a badge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape, quoteattr  # nosec B406  # writes XML, and reads none

# Characters that XML 1.0 does not allow, whatever the escaping.
_FORBIDDEN = {code: "�" for code in range(32) if code not in (9, 10, 13)} | {
    0xFFFE: "�",
    0xFFFF: "�",
    **dict.fromkeys(range(55296, 57344), "�"),
}


def _clean(text: object) -> str:
    return str(text).translate(_FORBIDDEN)


def junit(reports: Sequence[Mapping[str, Any]]) -> str:
    """Write the reports as JUnit XML: a suite for each loss, a test for each question.

    A caution passes, with its sentence as output.

    Args:
        reports: `Conformance.to_dict()` of each.

    Returns:
        The document.
    """
    suites = []
    for report in reports:
        name = _clean(report["name"])
        cases = [_case(name, one) for one in report["findings"]]
        counts = {
            "tests": len(cases),
            "failures": sum(one["status"] == "fail" for one in report["findings"]),
            "skipped": sum(one["status"] == "skip" for one in report["findings"]),
            "time": report["seconds"],
        }
        numbers = " ".join(f'{key}="{value}"' for key, value in counts.items())
        suites.append(
            f"<testsuite name={quoteattr(name)} {numbers}>\n" + "\n".join(cases) + "\n</testsuite>"
        )
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n<testsuites name="opdlab conformance">\n'
        + "\n".join(suites)
        + "\n</testsuites>\n"
    )


def _case(loss: str, one: Mapping[str, Any]) -> str:
    said = _clean(one["said"])
    head = f"<testcase classname={quoteattr(loss)} name={quoteattr(one['check'])}"
    if one["status"] == "fail":
        kind = quoteattr(one["mistake"] or "fails")
        inside = f"<failure type={kind} message={quoteattr(said)}>{escape(said)}</failure>"
    elif one["status"] == "skip":
        inside = f"<skipped message={quoteattr(said)}/>"
    else:
        inside = f"<system-out>{escape(said)}</system-out>"
    return f"{head}>{inside}</testcase>"


LETTER = 6.6  # pixels that a letter takes at most, at 11 pixels
GOOD, BAD = "#1a6b99", "#b34700"  # white text on either has a contrast of at least 5 to 1


def badge(report: Mapping[str, Any]) -> str:
    """Draw a badge for a README: what the loss trains, and whether it conforms.

    Args:
        report: `Conformance.to_dict()`.

    Returns:
        An SVG without scripts, styles or links.
    """
    left = "gradient"
    passed = sum(one["status"] == "pass" for one in report["findings"])
    failed = sum(one["status"] == "fail" for one in report["findings"])
    right = report["claim"] or "conforms"
    if failed:
        right = (report["mistakes"] or ["fails"])[0].replace("_", " ")
    right = f"{_clean(right)} · {passed}/{passed + failed}"
    widths = [LETTER * len(text) + 12 for text in (left, right)]
    total = sum(widths)
    title = escape(f"{_clean(report['name'])}: {left} {right}")
    colour = BAD if failed else GOOD
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total:.0f}" height="20" role="img">'
        f"<title>{title}</title>"
        f'<rect rx="3" width="{total:.0f}" height="20" fill="{colour}"/>'
        f'<path d="M3 0H{widths[0]:.0f}V20H3A3 3 0 0 1 0 17V3A3 3 0 0 1 3 0" fill="#444"/>'
        '<g fill="#fff" text-anchor="middle" font-size="11"'
        ' font-family="Verdana,DejaVu Sans,sans-serif">'
        f'<text x="{widths[0] / 2:.0f}" y="14" textLength="{widths[0] - 12:.0f}"'
        f' lengthAdjust="spacingAndGlyphs">{left}</text>'
        f'<text x="{widths[0] + widths[1] / 2:.0f}" y="14" textLength="{widths[1] - 12:.0f}"'
        f' lengthAdjust="spacingAndGlyphs">{escape(right)}</text></g></svg>\n'
    )
