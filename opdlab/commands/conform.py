"""Certify losses by name: a function in a file, the zoo, or those of an installed peer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from opdlab.commands.flags import is_code, load_function
from opdlab.commands.output import Output
from opdlab.conformance.case import Case
from opdlab.conformance.conforming import conform, is_method
from opdlab.conformance.report import MARKS, Conformance, save_all
from opdlab.conformance.spec import Spec
from opdlab.conformance.zoo import CASES
from opdlab.errors import OpdlabError
from opdlab.support.expect import shortened

PEERS = ("zoo", "trl", "liger")


def run(
    target: str,
    output: Output,
    spec: dict[str, Any],
    spec_name: str | None,
    out: Path | None,
    seed: int,
    seconds: float,
) -> bool:
    """Certify what was named, print the reports, and write files for CI.

    Args:
        target: FILE.py:FUNCTION, "zoo", "trl" or "liger".
        output: Where to print.
        spec: Fields of `Spec` that were given as flags.
        spec_name: Name of a `Spec` in the same file, or None.
        out: Folder for the files, or None.
        seed: Seed of the toy models.
        seconds: The longest time for each loss.

    Returns:
        Whether all passed.

    Raises:
        OpdlabError: There is no such thing.
    """
    cases = _cases(target, spec, spec_name)
    reports = [
        conform(case, seed=seed, seconds=seconds, quiet=output.is_json or len(cases) > 1)
        for case in _announced(cases, output)
    ]
    if len(reports) == 1:
        output.say(repr(reports[0]))
    else:
        output.console.print(table_of(reports))
    if out is not None:
        files = save_all(reports, out)
        output.say(f"files: {', '.join(str(path) for path in files[:3])}")
    found = [report.to_dict() for report in reports]
    output.result = found[0] if len(found) == 1 else found
    return all(report.passes for report in reports)


def _announced(cases: Sequence[Case], output: Output) -> list[Case]:
    if len(cases) > 1:
        output.say(f"opdlab conform: {len(cases)} losses, some seconds each …")
    return list(cases)


def table_of(reports: Sequence[Conformance]) -> Table:
    """Make a table of several reports.

    Args:
        reports: The reports.

    Returns:
        One row per loss, with the mistakes and cautions that have a name.
    """
    table = Table("", "loss", "passed", "failed", "mistakes (in brackets: to know)")
    for report in reports:
        own = [name for name in report.named if name not in report.mistakes]
        named = [*report.mistakes, *(f"({name})" for name in own)]
        words = ", ".join(named).replace("_", " ")
        failed = sum(one.status.value == "fail" for one in report.findings)
        passed = sum(one.status.value == "pass" for one in report.findings)
        mark = next(
            sign
            for status, sign in MARKS.items()
            if status.value == ("pass" if report.passes else "fail")
        )
        table.add_row(mark, escape(report.name), str(passed), str(failed), escape(words))
    return table


def _cases(target: str, spec: dict[str, Any], spec_name: str | None) -> list[Case]:
    if is_code(target):
        return [_case_of_file(target, spec, spec_name)]
    if spec or spec_name:
        raise OpdlabError(
            f"conform got flags of a spec for {target!r}, which has its own. Leave them out."
        )
    try:
        if target == "zoo":
            return list(CASES)
        if target == "trl":
            from opdlab.bridges.trl_losses import cases

            return cases()
        if target == "liger":
            from opdlab.bridges.liger_losses import cases as of_liger

            return of_liger()
    except ImportError as error:
        raise OpdlabError(str(error)) from error
    raise OpdlabError(
        f"conform got {shortened(target)}. Give FILE.py:FUNCTION, or one of {', '.join(PEERS)}."
    )


def _case_of_file(target: str, spec: dict[str, Any], spec_name: str | None) -> Case:
    """Load a function, and the spec that the flags or the file give."""
    loss = load_function(target, "conform")
    file, _, name = target.rpartition(":")
    if isinstance(loss, Case):
        if spec or spec_name:
            raise OpdlabError(f"{target} is a case with its own spec. Leave its flags out.")
        return loss
    if is_method(loss):
        made = f"{name}()" if isinstance(loss, type) else name
        raise OpdlabError(
            f"conform got {target}, which is an opdlab method. This command certifies losses"
            f" of other code bases; use opdlab.audit in Python: opdlab.audit({made})."
        )
    if not callable(loss) or isinstance(loss, type):
        raise OpdlabError(
            f"conform got {target}, which is {shortened(loss)}. Name a function of the student's"
            " and the teacher's logits and a mask."
        )
    if spec_name is None:
        return Case(name, loss, Spec(**spec))
    if spec:
        raise OpdlabError("conform got --spec beside other flags of a spec. Use one of the two.")
    found = load_function(f"{file}:{spec_name}", "--spec")
    if not isinstance(found, Spec):
        raise OpdlabError(
            f"--spec got {spec_name}, which is {shortened(found)}. Make it an"
            " opdlab.conformance.Spec."
        )
    return Case(name, loss, found)
