"""The result of looking at one thing about a pair of models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "warn", "stop", "none"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: The thing.
        state: "ok"; "note", worth knowing; "warn", mend this first; "stop", on-policy distillation
            cannot work; "none", not looked at.
        finding: The result in words.
        remedy: Advice, in one or more sentences; "" for none.
    """

    name: str
    state: State
    finding: str
    remedy: str = ""
