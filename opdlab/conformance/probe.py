"""A loss under examination: its readings on several worlds, each made once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from opdlab.conformance.calling import Caller, Seen
from opdlab.conformance.finding import Finding, Status
from opdlab.conformance.reading import Reading, read
from opdlab.conformance.spec import Spec
from opdlab.conformance.texts import Texts, uneven


@dataclass(eq=False)
class Probe:
    """A loss under examination.

    Attributes:
        caller: Calls it.
        name: Its name.
        seed: Seed of all worlds.
    """

    caller: Caller
    name: str
    seed: int = 0

    @property
    def spec(self) -> Spec:
        """Return the spec: the way to call the loss, and its claims."""
        return self.caller.spec

    @cached_property
    def far(self) -> Reading:
        """The loss where the policies know nothing of each other."""
        return read(self.caller, self.name, seed=self.seed)

    @cached_property
    def near(self) -> Reading:
        """The loss where the policies almost agree."""
        return read(self.caller, self.name, seed=self.seed, apart=0.02, gradient_only=True)

    @cached_property
    def equal(self) -> Reading:
        """The loss where the policies are the same."""
        return read(self.caller, self.name, seed=self.seed, apart=0.0, gradient_only=True)

    @cached_property
    def texts(self) -> Texts:
        """Six texts of different lengths."""
        return uneven(self.spec.vocab, self.seed)

    @cached_property
    def batch(self) -> Seen:
        """The loss on these texts."""
        return self.caller(self.texts)

    @cached_property
    def alone(self) -> Tensor:
        """The gradient of each of their tokens as a text of its own, `[B, T, V]`."""
        found = torch.zeros_like(self.texts.student)
        for text, at in self.texts.real.nonzero().tolist():
            found[text, at] = self.caller(self.texts.token(text, at)).gradient[0, 0].double()
        return found


def passed(check: str, said: str) -> Finding:
    """Make a finding that passes.

    Args:
        check: Name of the question.
        said: The answer.

    Returns:
        The finding.
    """
    return Finding(check, Status.PASS, said)


def failed(check: str, mistake: str, said: str) -> Finding:
    """Make a finding that fails.

    Args:
        check: Name of the question.
        mistake: Name of the mistake.
        said: The answer.

    Returns:
        The finding.
    """
    return Finding(check, Status.FAIL, said, mistake)


def cautioned(check: str, mistake: str, said: str) -> Finding:
    """Make a finding that is worth knowing and no reason to fail.

    Args:
        check: Name of the question.
        mistake: Name of the mistake that it is elsewhere, or "".
        said: The answer.

    Returns:
        The finding.
    """
    return Finding(check, Status.CAUTION, said, mistake)


def skipped(check: str, said: str) -> Finding:
    """Make a finding of a question that was not asked.

    Args:
        check: Name of the question.
        said: Why not.

    Returns:
        The finding.
    """
    return Finding(check, Status.SKIP, said)
