"""The losses of a playground: built-in divergences by name, and the user's own, audited.

The `Playground` imports this module when it is made, so that `import opdlab.viz` needs no PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from opdlab.audit import audit
from opdlab.errors import InvalidValue
from opdlab.losses import DIVERGENCES, Generator
from opdlab.viz import markup, toys
from opdlab.viz.toys import Push

SHOWN_AT_FIRST = ("forward_kl", "reverse_kl", "generalized_jsd")
# Divergences that the page computes itself (`static/toys.js`), so that its sliders need no Python.
# All others of the table are computed here, as a user's own losses are.
IN_SCRIPT = (
    *("forward_kl", "reverse_kl", "reverse_kl_k3", "jensen_shannon", "generalized_jsd", "jeffreys"),
    *("total_variation", "squared_hellinger", "pearson", "neyman", "le_cam", "alpha_divergence"),
    *("skew_forward_kl", "skew_reverse_kl"),
)
ALONE = 0.1  # a hill with less of the student's mass is left out
MOVED = 1e-6  # a gap to finite differences, relative to the slope, that is no rounding


@dataclass(frozen=True)
class Setting:
    """The sliders of the page.

    Attributes:
        mass: The teacher's probability of the token that is pushed.
        temperature: The teacher's temperature.
        steps: Gradient steps that the students take.
        teacher: The teacher's probabilities of three outcomes.
        student: The student's probabilities of three outcomes.
    """

    mass: float
    temperature: float
    steps: int
    teacher: Sequence[float]
    student: Sequence[float]


class PlaygroundLosses:
    """The losses of a playground.

    Args:
        losses: Names, `Generator`s and the user's own losses, alone, in a list or by name.

    Attributes:
        by_python: The losses that the page cannot compute itself: the user's own, and divergences
            of the table that `static/toys.js` does not know.
        names: The names of all losses, in order.
        own: The user's own losses, by name.
        audits: The audit of each own loss.
        parameter: The beta or alpha of the last `Generator` that has one; None for none.
        known: The names of the divergences that the page computes itself.
        parameters: The name of the parameter of each divergence that has one.

    Raises:
        InvalidValue: There is no divergence of a name.
    """

    known = tuple(name for name in DIVERGENCES if name in IN_SCRIPT)
    parameters: Mapping[str, str] = {
        name: entry.parameter.name for name, entry in DIVERGENCES.items() if entry.parameter
    }

    def __init__(self, losses: Any) -> None:
        self.own: dict[str, Any] = {}
        self.parameter: float | None = None
        names: list[str] = []
        for name, loss in _list_losses(losses):
            if isinstance(loss, Generator):
                names.append(loss.name)
                self.parameter = float(loss.beta or loss.alpha or 0.0) or self.parameter
            elif isinstance(loss, str):
                names.append(_check_name(loss))
            else:
                names.append(_choose_name(toys.of_loss(loss, name).name, names))
                self.own[names[-1]] = loss
        self.names = names
        self.by_python = [name for name in names if name not in self.known]
        self.audits = {name: audit(loss) for name, loss in self.own.items()}
        self._checks = {name: toys.finite_difference(loss) for name, loss in self.own.items()}

    def push(self, name: str, parameter: float, clip: float) -> Push:
        """Return a loss as the small worlds take it.

        Args:
            name: Its name.
            parameter: The beta or alpha of divergences that have one.
            clip: The largest push of a built-in divergence; 0 for any.

        Returns:
            The loss, with its gradient over logits.
        """
        if name in self.own:
            return toys.of_loss(self.own[name], name)
        own = DIVERGENCES[name].parameter
        generator = Generator(name, **({own.name: parameter} if own else {}))
        return toys.of_generator(generator, clip)

    def curves(self, push: Push, mass: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the log ratios, the push per unit of probability there, and that on the logit.

        Args:
            push: The loss.
            mass: The teacher's probability of the token that is pushed.

        Returns:
            `[121]` each: log q - log p in nats, and both pushes; see `toys.weights` and
            `toys.pulls`.
        """
        return toys.X.numpy(), toys.weights(push), toys.pulls(push, mass)

    def fit(self, push: Push, steps: int, temperature: float) -> dict[str, Any]:
        """Return the Gaussian under two hills: centre, width, mass, and whether it covers both.

        Args:
            push: The loss.
            steps: Gradient steps that the Gaussian takes.
            temperature: The teacher's temperature.

        Returns:
            `centre`, `width`, the mass `left` and `right` of the valley, and `covers`.
        """
        centre, width = toys.fit(push, steps, temperature)
        left, right = toys.shares(centre, width)
        return {
            "centre": centre,
            "width": width,
            "left": left,
            "right": right,
            "covers": min(left, right) > ALONE,
        }

    def describe_loss(
        self, name: str, at: Setting, parameter: float, clip: float
    ) -> dict[str, Any]:
        """Return all that the page draws of a loss that Python computes.

        Args:
            name: Its name, one of `by_python`.
            at: The sliders of the page.
            parameter: The beta or alpha of a divergence that has one.
            clip: The largest push of a divergence; 0 for any.

        Returns:
            The fields of `OwnLoss` in `static/types.js`.
        """
        push = self.push(name, parameter, clip)
        teacher = torch.tensor(at.teacher, dtype=torch.float64)
        student = torch.tensor(at.student, dtype=torch.float64)
        walk = toys.path(push, student, teacher, at.steps, at.temperature)
        return {
            "name": name,
            "mine": name in self.own,
            "weights": toys.weights(push).astype(np.float32),
            "pulls": toys.pulls(push, at.mass).astype(np.float32),
            "field": toys.field(push, teacher, at.temperature).ravel().astype(np.float32),
            "walk": walk.ravel().astype(np.float32),
            "fit": list(toys.fit(push, at.steps, at.temperature)),
        }

    def describe_audit(self, name: str) -> dict[str, Any]:
        """Return the audit of an own loss as the page shows it.

        Args:
            name: The name of an own loss.

        Returns:
            Its verdict and flags, the check by finite differences, and the five first rows of the
            table.
        """
        found, (gap, slope) = self.audits[name], self._checks[name]
        is_held = gap > MOVED * max(slope, 1.0)
        check = "Agrees with finite differences."
        if is_held:
            check = (
                f"Differs from finite differences by up to {markup.format_number(gap)}: a part is"
                " held back (detach): it does not descend its value."
            )
        columns = ["divergence", "target", "cosine", "ratio"]
        return {
            "name": name,
            "verdict": found.verdict,
            "flags": [[flag.replace("_", " "), value] for flag, value in found.flags.items()],
            "check": check,
            "held": is_held,
            "rows": found.table[columns].head(5).to_numpy().tolist(),
        }

    def label(self, name: str) -> str:
        """Return the name of a loss for people.

        Args:
            name: The name of a loss.

        Returns:
            The name of an own loss as it is, that of a divergence without underscores.
        """
        if name not in DIVERGENCES:
            return name
        return name.replace("_", " ").replace("kl", "KL").replace("jsd", "JSD")


def _list_losses(losses: Any) -> list[tuple[str, Any]]:
    """The losses with the names that the user gave them, "" for none."""
    if losses is None:
        return [("", name) for name in SHOWN_AT_FIRST]
    if isinstance(losses, Mapping):
        return [(str(name), loss) for name, loss in losses.items()]
    if isinstance(losses, Sequence) and not isinstance(losses, str):
        return [("", loss) for loss in losses]
    return [("", losses), *(("", name) for name in SHOWN_AT_FIRST[:2])]


def _choose_name(name: str, taken: Sequence[str]) -> str:
    """A name that no built-in divergence and no other loss has."""
    name = f"my {name}" if name in DIVERGENCES else name
    options = [name, *(f"{name} {i}" for i in range(2, len(taken) + 2))]
    return next(option for option in options if option not in taken)


def _check_name(name: str) -> str:
    if name not in DIVERGENCES:
        raise InvalidValue(
            f"There is no divergence {name!r}. Use {', '.join(DIVERGENCES)}, or give your own loss"
            " itself."
        )
    return name
