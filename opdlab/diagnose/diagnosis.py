"""The result of `opdlab.doctor`: a verdict on a pair of models, with everything it rests on."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from rich.console import Group

from opdlab.data.rollout import Rollout
from opdlab.diagnose.checks import Check
from opdlab.diagnose.cost import Cost
from opdlab.diagnose.first_tokens import FirstTokens
from opdlab.diagnose.overlap import Overlap
from opdlab.diagnose.terminal import Verdict, draw_diagnosis, draw_html, render_text
from opdlab.models.same_tokens import RenderedChat


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """Say whether on-policy distillation can work on a pair of models.

    Attributes:
        checks: The checks, in order.
        templates: A chat as both read it.
        overlap: Their agreement on the student's texts.
        probe: The teacher's scores, alone and from half of the student's text; see
            `exposure.continuation`.
        cost: The predicted cost of a step.
        first_tokens: The teacher's first tokens, as the student sees them.
        rollout: The student's texts.
        method: A method that suits what was found, as the argument `method=…` of `distill`; "" if
            none does.
        names: The names of the student and of the teacher.
    """

    checks: tuple[Check, ...]
    templates: RenderedChat | None = None
    overlap: Overlap | None = None
    probe: pd.DataFrame | None = None
    cost: Cost | None = None
    first_tokens: FirstTokens | None = None
    rollout: Rollout | None = None
    method: str = ""
    names: tuple[str, str] = ("student", "teacher")

    @property
    def verdict(self) -> Verdict:
        """Go; prepare, if warnings say what to do first; or stop."""
        states = {check.state for check in self.checks}
        return "stop" if "stop" in states else "prepare" if "warn" in states else "go"

    @property
    def reasons(self) -> tuple[str, ...]:
        """The findings that decided: every stop and warning, or else those that speak for it."""
        good = [check for check in self.checks if check.name in ("overlap", "student", "teacher")]
        return tuple(f"{check.name}: {check.finding}" for check in self._bad or good)

    @property
    def table(self) -> pd.DataFrame:
        """One row per check: `state`, `finding`, `remedy`."""
        return pd.DataFrame([vars(check) for check in self.checks]).set_index("name")

    @property
    def sentence(self) -> str:
        """The verdict, its reasons and their remedies."""
        remedies = dict.fromkeys(check.remedy for check in self._bad if check.remedy)
        return " ".join([f"{self.verdict}: {'; '.join(self.reasons)}.", *remedies, *self._advice])

    @property
    def _advice(self) -> list[str]:
        return [f"Begin with {self.method}."] if self.method else []

    @property
    def _bad(self) -> list[Check]:
        return [check for check in self.checks if check.state in ("stop", "warn")]

    def __rich__(self) -> Group:
        return draw_diagnosis(self.verdict, self.names, self.checks, self.templates, self.method)

    def __str__(self) -> str:
        return render_text(self)

    def __repr__(self) -> str:
        bad = ", ".join(f"{check.name} {check.state}" for check in self._bad)
        return f"Diagnosis({self.verdict}{': ' * bool(bad)}{bad})"

    def _repr_html_(self) -> str:
        return draw_html(self.verdict, self.names, self.checks, self.method)
