r"""Compare a text with a reference answer: `same_answer`, for tasks without a verifier.

Values are read from both texts and compared exactly, with Python's `decimal`, at any length. The
library math-verify was tried first: it rounds to six places (1/3 equals 0.333333333), reads only
the year of a date, compares no words, and takes three seconds to import.

These count as one value each, and those on one line are equal:

    1,047   1047   1047.0   1.047e3   1.047 × 10^3       a number, with its sign (also U+2212)
    1/2     0.5    3/6      \frac{1}{2}    ½             a fraction, or its decimal if it is exact
    9:30    09:30                                        a time or a ratio
    2021-03-04     March 4, 2021     4th of March 2021   a date

Other things in several parts (4/5/2021, 1.2.3, 3x4, 2^10) must agree in all of them. A unit, and am
or pm, counts if both texts name one: 5 km is not 5 m. Digits inside a word (H2O, B12) belong to the
word.
"""

from __future__ import annotations

import decimal
import re
import unicodedata
from contextlib import AbstractContextManager
from dataclasses import dataclass
from decimal import Decimal

from opdlab.data.prompt import Prompt
from opdlab.errors import OpdlabError

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTH = (
    "(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?"
    "|Sept?(?:ember)?|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?)"
)
_DATE = re.compile(
    rf"""
      \b(?P<month>{_MONTH})\.?[ ](?P<day>\d\d?)(?:st|nd|rd|th)?\b(?:,?[ ](?P<year>\d{{4}})\b)?
    | \b(?P<day_first>\d\d?)(?:st|nd|rd|th)?[ ](?:of[ ])?(?P<month_second>{_MONTH})\b\.?
      (?:,?[ ](?P<year_last>\d{{4}})\b)?
    | \b(?P<month_only>{_MONTH})\.?,?[ ](?P<year_only>\d{{4}})\b
    | (?<![\w-])(?P<iso_year>\d{{4}})-(?P<iso_month>\d\d)-(?P<iso_day>\d\d)
      (?:T\d\d:\d\d(?::\d\d)?(?:\.\d+)?Z?)?(?![\w-])
    """,
    re.VERBOSE,
)
# A sign belongs to a number unless it stands between two things, as in 10-5. Units are letters
# right behind a number.
_VALUE = re.compile(
    r"""
    (?P<sign> (?<![\w)\]}]) [-+] )? (?: [$€£¥] \s? (?P<inner_sign>[-+])? )? (?<![^\W_])
    (?:
        (?P<parts>
            \d+ (?: (?::\d+)+ | (?:/\d+){2,} | (?:-\d+){2,} | (?:\.\d+){2,} | (?:[x×]\d+)+ )
        )
        (?: \s?(?P<half>[aApP])\.?[mM]\b )?
      |
        10\s?\^\s?\{?(?P<ten_to>[-+]?\d+)
      |
        (?P<power> \d+ \s?\^\s?\{?[-+]?\d+ )
      |
        (?P<number> (?:\d{1,3}(?:,\d{3})+(?!\d)|\d+) (?:\.\d+)? | \.\d+ )
        (?: [eE](?P<exponent>[-+]?\d+)(?!\w) | \s?[×x*]\s?10\s?\^\s?\{?(?P<times_ten_to>[-+]?\d+) )?
        (?: \s?/\s?(?P<below>\d+(?:\.\d+)?)(?![\d/]) )?
        (?P<unit>
            [%°]?[^\W\d_]+
          | \s?[%°]
          | \s(?: mm|cm|dm|m|km | mg|g|kg|t | ml|cl|l|L | s|ms|min|h | Hz|kHz|MHz|GHz
                | W|kW|MW|V|A|J|kJ|N|Pa|K )\b
        )?
    )
    """,
    re.VERBOSE,
)
_ORDINALS = ("st", "nd", "rd", "th")
_LATEX = (
    (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"\1/\2"),
    (re.compile(r"\\[dt]?frac\s*(\d)\s*(\d)"), r"\1/\2"),
    (re.compile(r"\\times|\\cdot"), "×"),
    (re.compile(r"\{,\}"), ","),
    # thin spaces between thousands
    (re.compile(r"(?<=\d)(?:\\[,;!]|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))"), ","),
    (re.compile(r"\\([%$])"), r"\1"),
)
_VULGAR_FRACTION = re.compile("[\u00bc-\u00be\u2150-\u215e]")
_SAME_AS = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2010\u2011\ufe63\uff0d", "-"),
        "\u2044": "/",
        "\u2215": "/",
        "\uff0b": "+",
    }
)


def same_answer(prompt: Prompt, text: str) -> float:
    r"""Compare the last values of a text with those of the prompt's answer.

    An answer usually holds one value, and the last one of the text must equal it. All values of an
    answer with several (a date, two solutions) must be the last ones of the text, in order. If the
    answer has no values, the texts are compared whole. Of a worked solution only the result counts:
    the part behind `####` or the last `=`, the content of `\boxed{…}`, or the last value if it has
    several lines.

    Args:
        prompt: The question, with its reference answer.
        text: The text to grade.

    Returns:
        1.0 if they are equal, else 0.0.

    Raises:
        OpdlabError: The prompt has no answer.
    """
    if prompt.answer is None:
        raise OpdlabError(
            f"Prompt {prompt.id or prompt.text!r} has no answer that a text could be compared with."
            " Give every prompt an answer=, or the task its own verify=."
        )
    wanted, written = _result(prompt.answer, worked=True), _result(text, worked=False)
    want = read_values(wanted)
    if not want:
        return float(_plain(wanted) in (_plain(written), _plain(text)))
    if "\n" in wanted.strip():
        want = want[-1:]
    got = _last_values(written, len(want), 2 * len(wanted) + 200)
    return float(len(got) == len(want) and all(map(_same, want, got)))


@dataclass(frozen=True)
class Value:
    """One value of a text: a number, or several parts that a mark holds together, as in 9:30.

    Attributes:
        above: The number is `above / below`; None if it is no number.
        below: See `above`.
        parts: The parts, such as those of a date; None for a part that is not said.
        mark: The mark between the parts, or the name of their kind.
        unit: The word behind a number; am or pm behind a time.
    """

    above: Decimal | None = None
    below: Decimal = Decimal(1)
    parts: tuple[Decimal | None, ...] = ()
    mark: str = ""
    unit: str = ""


def read_values(text: str) -> list[Value]:
    """Read the values of a text, in order.

    Args:
        text: A text in plain words or LaTeX.

    Returns:
        Numbers, dates and other values in the order of the text; a mixed number such as `1 1/2` is
        one value.
    """
    text = text.translate(_SAME_AS)
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    text = _VULGAR_FRACTION.sub(_spelled, text)
    values: list[Value] = []
    end_of_last = start = 0
    for date in [*_DATE.finditer(text), None]:
        for found in _VALUE.finditer(text, start, date.start() if date else len(text)):
            value = _value(found)
            is_mixed = (
                bool(values)
                and text[end_of_last : found.start()] == " "
                and _is_proper(value)
                and _is_whole(values[-1])
            )
            if is_mixed:  # 1 1/2
                values[-1] = _sum(values[-1], value)
            else:
                values.append(value)
            end_of_last = found.end()
        if date:
            values.append(_date(date))
            start = end_of_last = date.end()
    return values


def _last_values(text: str, count: int, length: int) -> list[Value]:
    """The last `count` values of a text.

    Texts can be long, so no more of the end is read than must be. The first values of a part may be
    half of a date or of a fraction, so a part must hold three more than are asked for.
    """
    while True:
        cut = max(0, len(text) - length)
        space = text.rfind(" ", 0, cut) if cut else -1
        values = read_values(text[space + 1 :])
        if space < 0 or len(values) >= count + 3:
            return values[-count:]
        length *= 8


def _result(text: str, worked: bool) -> str:
    r"""The result in a text: behind `####`, in `\boxed{…}`, or, if worked, behind the last `=`."""
    marked = text.rpartition("####")[2]
    if marked is not text and re.match(r"\s*[-+$\u2212]?\s?[\d.]", marked):
        return marked
    boxed = _boxed(text)
    if boxed is not None:
        return boxed
    behind = text.rpartition("=")[2]
    return behind if worked and re.search(r"\d", behind) else text


def _boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{…}`, with balanced braces."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start, depth = start + len("\\boxed{"), 1
    for end in range(start, len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return text[start:end]
    return None


def _spelled(fraction: re.Match[str]) -> str:
    """½ as 1/2, with a space before it since 1½ is one and a half."""
    _, *codes = unicodedata.decomposition(fraction[0]).split()
    return " " + "".join(chr(int(code, 16)) for code in codes).replace("\u2044", "/")


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split()).casefold()


def _value(found: re.Match[str]) -> Value:
    sign = -1 if "-" in (found["sign"] or "", found["inner_sign"] or "") else 1
    if found["parts"]:
        mark = next(c for c in found["parts"] if not c.isdigit())
        return Value(
            parts=tuple(map(Decimal, found["parts"].split(mark))),
            mark=mark,
            unit=(found["half"] or "").lower(),
        )
    if found["power"]:
        base, exponent = found["power"].replace("{", "").split("^")
        return Value(parts=(sign * Decimal(base), Decimal(exponent.strip())), mark="^")
    if found["ten_to"]:
        return _number("1", found["ten_to"], sign)
    number = _number(
        found["number"].replace(",", ""), found["exponent"] or found["times_ten_to"] or "0", sign
    )
    unit = (found["unit"] or "").strip()
    below = Decimal(found["below"] or 1)
    if number.above is None or not below:  # 1/0 is no number
        return Value(parts=(number.above, below), mark="/")
    return Value(number.above, below, unit="" if unit in _ORDINALS else unit)


def _number(digits: str, exponent: str, sign: int) -> Value:
    """`sign · digits · 10^exponent`; no number if decimals cannot hold the exponent."""
    try:
        # This is exact, whatever the context's precision.
        return Value(Decimal(f"{'-' if sign < 0 else ''}{digits}e{exponent}"))
    except decimal.DecimalException:
        return Value(parts=(Decimal(digits), None), mark=f"e{exponent}")


def _date(found: re.Match[str]) -> Value:
    """A date as month, day, year; a part that is not said is None."""
    if found["iso_year"]:
        return Value(
            parts=tuple(Decimal(found[name]) for name in ("iso_month", "iso_day", "iso_year")),
            mark="date",
        )
    name = found["month"] or found["month_second"] or found["month_only"]
    day, year = (
        found["day"] or found["day_first"],
        found["year"] or found["year_last"] or found["year_only"],
    )
    month = Decimal(_MONTHS.index(name[:3].lower()) + 1)
    return Value(
        parts=(month, Decimal(day) if day else None, Decimal(year) if year else None), mark="date"
    )


def _same(want: Value, got: Value) -> bool:
    if want.unit and got.unit and want.unit != got.unit:
        return False
    if want.above is None or got.above is None:
        if (
            want.above is not got.above
            or want.mark != got.mark
            or len(want.parts) != len(got.parts)
        ):
            return False
        # The text may say a part that the answer leaves open, as the year of a date.
        return all(a is None or a == b for a, b in zip(want.parts, got.parts, strict=True))
    if want.below == got.below:
        return want.above == got.above
    with _exact():
        return want.above * got.below == got.above * want.below


def _is_whole(value: Value) -> bool:
    """Tell whether a fraction may follow it, as in 1 1/2."""
    return (
        value.above is not None
        and value.below == 1
        and not value.unit
        and value.above.as_tuple().exponent == 0
    )


def _is_proper(value: Value) -> bool:
    return value.above is not None and value.below > value.above > 0 and value.below != 1


def _sum(whole: Value, fraction: Value) -> Value:
    assert whole.above is not None
    assert fraction.above is not None
    with _exact():
        above = abs(whole.above) * fraction.below + fraction.above
        return Value(above.copy_sign(whole.above), fraction.below, unit=fraction.unit)


def _exact() -> AbstractContextManager[decimal.Context]:
    """Decimal arithmetic that rounds nothing, and raises where it would have to."""
    exact = decimal.Context(prec=decimal.MAX_PREC, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN)
    for signal in (decimal.Inexact, decimal.Overflow, decimal.InvalidOperation):
        exact.traps[signal] = True
    return decimal.localcontext(exact)
