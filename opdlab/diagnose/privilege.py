"""Split a hinted teacher's lead into skill and information.

After section 1 of DOPD (arXiv 2606.30626). With T the teacher, S the student and p the hint, on
tokens y that the bare student S(.|x) wrote, the gap G = log T(y|x,p) - log S(y|x) telescopes
exactly, in two ways:

    G = [log T(y|x,p) - log S(y|x,p)]    capability given p
      + [log S(y|x,p) - log S(y|x)]      information seen by the student

    G = [log T(y|x,p) - log T(y|x)]      information seen by the teacher
      + [log T(y|x)   - log S(y|x)]      capability without p

Their difference is the interaction (large if using the hint takes a skill), their mean the Shapley
split. Over whole distributions KL(S_x || T_xp) = KL(S_x || S_xp) + E_{y~S_x} log S_xp/T_xp, whose
second term may be negative. The paper states the problem and uses the first bracket; the two
splits, the floor and the illusion index are opdlab's readings of it.

No student without the hint can bring E_p KL(T_xp || S_x) under the floor I_T(Y;P|x), the
information that the hint gives the teacher. `floor` here is KL(T_xp || T_x). This is the same
number if the teacher without the hint is the average of the teachers with it, and more if it is not
calibrated; `information_floor` computes it from draws of the hint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from opdlab.data.prompt import Prompt
from opdlab.data.rollout import Rollout
from opdlab.diagnose.probe import measure_tokens, write_rollout
from opdlab.diagnose.tables import make_token_table, mean_by_type, to_html
from opdlab.engine.rows import Rows
from opdlab.errors import MissingHint, MissingPolicy
from opdlab.losses.divergences import entropy, forward_kl, reverse_kl
from opdlab.methods.dopd import DOPD, Route, route, thresholds
from opdlab.models.graded import States
from opdlab.models.policy import Policy, as_policy
from opdlab.models.protocols import Grader
from opdlab.support.validation import Count, Flag, Seed, Unchecked, validate_arguments
from opdlab.tasks import Task
from opdlab.tasks.task import Split
from opdlab.teachers.contract import expect_teacher

Hint = str | Callable[[Prompt], Prompt] | None
SHOWN = (
    "gap",
    "capability",
    "information",
    "interaction",
    "reverse_kl",
    "forward_kl",
    "floor",
    "entropy",
    "teacher_weight",
)
# How the effects of the own and of another prompt's hint are read, in nats per token.
MOVED = 0.05  # less hardly moves a policy
MUCH = 2.0  # times as far is much farther


@dataclass(frozen=True, eq=False)
class Privilege:
    """A hinted teacher's lead, split into skill and information.

    Attributes:
        tokens: One row per token, with every number of `split_gap`.
        controls: The effect of other hints, by type: how far each kind of hint moves the teacher
            and the hinted student (forward KL from the same policy without a hint), and the gap
            under it. `another's` near `own`: the teacher repeats its hint, right or wrong.
            `another's` much larger: the teacher did not need its hint, and follows one that is
            wrong; it grades for copying. `sentence` says which it is.
        leak: Share of prompts whose rendering for the deployed student changes with the hint. At
            anything but 0, the student reads a hint that it will not have.
    """

    tokens: pd.DataFrame
    controls: pd.DataFrame
    leak: float

    @property
    def table(self) -> pd.DataFrame:
        """Means by ground-truth type (all tokens in the row "all"), with the shares of routes."""
        names = {int(one): one.name for one in Route}
        shares = pd.get_dummies(self.tokens["route"].map(names)).reindex(columns=names.values())
        columns = pd.concat([self.tokens, shares.fillna(0).astype(float)], axis=1)
        return mean_by_type(columns, [*SHOWN, *shares.columns])

    @property
    def sentence(self) -> str:
        """The split in words."""
        m = self.tokens[[*SHOWN]].mean()
        under = (
            " (it is under that floor: a sign of memorised hints)"
            if m["forward_kl"] < m["floor"] - 1e-6
            else ""
        )
        leak = (
            "The deployed student does not see the hints."
            if not self.leak
            else (f"LEAK: for {self.leak:.0%} of the prompts the deployed student reads the hint.")
        )
        return (
            f"The gap log T(y|x,p) - log S(y|x) is {m['gap']:+.3f} nats per token: capability"
            f" {m['capability']:+.3f}, information {m['information']:+.3f} (interaction"
            f" {m['interaction']:+.3f}). KL(T_xp || S_x) is {m['forward_kl']:.3f}; what the hint"
            f" tells the teacher, {m['floor']:.3f}{under}. DOPD would give the teacher a weight of"
            f" {m['teacher_weight']:.2f}.{self._read_control()} {leak}"
        )

    def _read_control(self) -> str:
        """Say what another prompt's hint does to the teacher; "" where none was tried.

        A type of tokens is named only where it shows a teacher that follows wrong hints and the
        mean over all tokens does not.
        """
        if self.controls.empty or "another's" not in self.controls.index.unique("hint"):
            return ""
        moves = self.controls["teacher_moves"].unstack("hint")
        kinds = [kind for kind in moves.index if _follows_wrong_hints(moves.loc[kind])]
        kind = max(kinds, key=lambda one: moves.loc[one, "another's"], default="all")
        kind = "all" if "all" in kinds else kind
        own, others = moves.loc[kind, "own"], moves.loc[kind, "another's"]
        if kind in kinds:
            reading = (
                "it did not need its hint, and follows one that is wrong. It grades for copying:"
                " one wrong hint teaches an error"
            )
        elif max(own, others) < MOVED:
            reading = "hints hardly move it"
        elif others > own / MUCH:
            reading = "it repeats its hint, right or wrong"
        else:
            reading = "it uses a hint where it fits the prompt"
        where = "" if kind == "all" else f" (tokens of type {kind})"
        return (
            f" Its own hint moves the teacher by {own:.3f}, another prompt's by"
            f" {others:.3f}{where}: {reading}."
        )

    def __str__(self) -> str:
        return self.sentence

    def __repr__(self) -> str:
        m = self.tokens[["gap", "capability", "information"]].mean()
        return (
            f"Privilege({', '.join(f'{name} {value:+.3g}' for name, value in m.items())},"
            f" {len(self.tokens)} tokens)"
        )

    def _repr_html_(self) -> str:
        return to_html(self.sentence, self.table)


@validate_arguments
def privilege(
    student: Policy,
    teacher: Any,
    task: Task | None = None,
    *,
    hint: Unchecked[Hint] = None,
    rollout: Rollout | None = None,
    prompts: Unchecked[int | Sequence[Prompt]] = 32,
    n: Count = 1,
    seed: Seed = 0,
    split: Split = "test",
    controls: Flag = True,
    method: DOPD | None = None,
) -> Privilege:
    """Score T(x), T(x,p), S(x), S(x,p) on texts of the student, and split the gap.

    Args:
        student: The policy that will have no hint.
        teacher: A policy.
        task: Where prompts come from, and the types of tokens if it knows them.
        hint: The hint that the privileged sides read, as in `Policy.seeing`; by default the
            teacher's own context, else each prompt's own hint.
        rollout: Texts of the student; written here by default.
        prompts: The prompts to write to, or how many of the task's.
        n: Texts for each prompt.
        seed: Seed of prompts and texts.
        split: The split that the task's prompts are from.
        controls: Whether to try another prompt's hint too (two more passes).
        method: Its routes and weights are those reported; by default DOPD's.

    Returns:
        The split of every token, the effect of other prompts' hints (empty without `controls`), and
        the share of prompts that leak their hint to the student.

    Raises:
        MissingPolicy: The teacher is no policy.
        MissingHint: A prompt has no hint.
        TokenizerMismatch: The two have other tokens.
    """
    expect_teacher(teacher, "privilege")
    if as_policy(teacher) is None:
        raise MissingPolicy(
            f"privilege tells the teacher hints, and {type(teacher).__name__} takes none. Load it"
            " with Policy.load(…)."
        )
    rollout = rollout or write_rollout(student, task, prompts, n, seed, split)
    policies = _with_and_without(student, teacher, hint)
    told = ("teacher+hint", "student+hint")
    logp = measure_tokens(
        rollout, lambda rows: {name: rows.logp_of(name) for name in told}, policies
    )
    every = torch.ones(rollout.tokens, dtype=torch.bool)
    method = method or DOPD()
    by_teacher, by_student = (torch.tensor(logp[name]) for name in told)
    limits = thresholds(by_teacher, by_student, every, method.trim)
    columns = measure_tokens(rollout, lambda rows: split_gap(rows, limits, method), policies)
    tokens = make_token_table(rollout, columns, task, student.tokenizer)
    moved = _try_other_hints(rollout, policies, tokens) if controls else pd.DataFrame()
    return Privilege(tokens, moved, _find_leak(student, rollout))


def _follows_wrong_hints(moves: pd.Series) -> bool:
    """Tell whether another prompt's hint moves the teacher much farther than its own."""
    own, others = float(moves["own"]), float(moves["another's"])
    return others >= MOVED and others > MUCH * own


def split_gap(rows: Rows, limits: tuple[float, float], method: DOPD) -> dict[str, Tensor]:
    """Compute the gap of every token and its parts.

    Args:
        rows: Tokens with the distributions of student and teacher, with and without the hint.
        limits: The batch means that DOPD routes by (`dopd.thresholds`).
        method: Gives the weights of routes.

    Returns:
        Numbers `[n]` by name, in nats. `teacher_weight` is E_{y~S_x} of the weight with which DOPD
        would send y to the teacher, exact over the vocabulary; it is 1 in plain distillation.
    """
    s, t, tp, sp = (rows[name] for name in ("student", "teacher", "teacher+hint", "student+hint"))
    ls, lt, ltp, lsp = (
        rows.logp_of(name) for name in ("student", "teacher", "teacher+hint", "student+hint")
    )
    out = {
        "gap": ltp - ls,
        "capability_told": ltp - lsp,
        "information_student": lsp - ls,
        "information_teacher": ltp - lt,
        "capability_bare": lt - ls,
    }
    out["interaction"] = out["capability_told"] - out["capability_bare"]
    out["capability"] = (out["capability_told"] + out["capability_bare"]) / 2
    out["information"] = (out["information_student"] + out["information_teacher"]) / 2
    out |= {"reverse_kl": reverse_kl(s, tp), "reverse_kl_information": reverse_kl(s, sp)}
    out["reverse_kl_capability"] = torch.linalg.vecdot(
        s.exp(), (sp - tp).masked_fill(s.isneginf(), 0.0)
    )
    out |= {"forward_kl": forward_kl(s, tp), "floor": forward_kl(t, tp), "entropy": entropy(s)}
    # [n, V]: the route of every token y, were it sampled
    routes = route(tp, sp, torch.ones_like(s, dtype=torch.bool), limits=limits)
    weight = (
        torch.zeros_like(s)
        .masked_fill_(routes == Route.LH, method.light)
        .masked_fill_(routes == Route.HT, 1.0)
    )
    if method.hs == "teacher":
        weight.masked_fill_(routes == Route.HS, 1.0)
    out["teacher_weight"] = (s.exp() * weight).sum(-1)
    out["route"] = route(ltp, lsp, torch.ones_like(rows.token, dtype=torch.bool), limits=limits)
    return out


def information_floor(
    teacher: Policy, rollout: Rollout, hints: Sequence[str | Callable[[Prompt], Prompt]]
) -> np.ndarray:
    """Compute I_T(Y;P|x) at every token: mean_k KL(T(.|x,p_k) || mean_j T(.|x,p_j)).

    With few draws it is too low, and never above log K.

    Args:
        teacher: The teacher.
        rollout: Texts in its tokens.
        hints: K draws of p given x, equally likely, as in `Policy.seeing`.

    Returns:
        The information in nats, `[tokens]`.

    Raises:
        MissingHint: There are fewer than two hints.
    """
    if len(hints) < 2:
        raise MissingHint(
            f"information_floor got {len(hints)} hints. Give at least two draws of what a prompt's"
            " hint could be."
        )

    def information(rows: Rows) -> dict[str, Tensor]:
        each = torch.stack([rows[name] for name in rows.distributions])  # [K, n, V]
        mean = each.logsumexp(0) - np.log(len(each))
        return {"floor": forward_kl(mean[None], each).mean(0)}

    told = {f"hint{k}": teacher.seeing(hint) for k, hint in enumerate(hints)}
    return measure_tokens(rollout, information, told)["floor"]


def _with_and_without(student: Policy, teacher: Policy, hint: Hint) -> dict[str, Policy]:
    """Both policies without the hint and with it, by name."""
    told = hint if hint is not None else teacher.context
    bare = teacher if hint is not None else teacher.without_context()
    return {
        "student": student,
        "teacher": bare,
        "teacher+hint": teacher.seeing(told),
        "student+hint": student.seeing(told),
    }


def _try_other_hints(
    rollout: Rollout, policies: dict[str, Policy], tokens: pd.DataFrame
) -> pd.DataFrame:
    """One row per type and kind of hint: its own, another prompt's, none.

    Another prompt's is left out if it changes nothing that the teacher reads.
    """
    others = replace(rollout, prompts=_swap_hints(rollout.prompts))
    told = policies["teacher+hint"]
    kinds = {"own": rollout, "another's": others, "none": None}
    pairs = zip(rollout.prompts, others.prompts, strict=True)
    if all(told.encode(own) == told.encode(other) for own, other in pairs):
        del kinds["another's"]
    parts = []
    for kind, hinted in kinds.items():
        columns = _measure_moves(rollout, hinted, policies)
        means = mean_by_type(tokens[["type"]].assign(**columns), list(columns))
        parts.append(means.assign(hint=kind))
    table = pd.concat(parts).rename_axis("type").set_index("hint", append=True)
    return table.reindex([(name, kind) for name in parts[0].index for kind in kinds])


def _measure_moves(
    rollout: Rollout, hinted: Rollout | None, policies: dict[str, Policy]
) -> dict[str, np.ndarray]:
    """The moves of teacher and student by hints, and the gap that is left, `[tokens]` each.

    The hints are those of the prompts of `hinted`; None stands for no hints.
    """
    bare: dict[str, Grader] = {name: policies[name] for name in ("student", "teacher")}
    told = bare
    if hinted is not None:
        told = {name: _Elsewhere(policies[f"{name}+hint"], hinted) for name in bare}

    def measure(rows: Rows) -> dict[str, Tensor]:
        moves = {f"{name}_moves": forward_kl(rows[name], rows[f"{name}+hint"]) for name in bare}
        return moves | {"gap": rows.logp_of("teacher+hint") - rows.logp}

    hints = {f"{name}+hint": grader for name, grader in told.items()}
    return measure_tokens(rollout, measure, bare | hints)


@dataclass(frozen=True)
class _Elsewhere:
    """A policy that grades the same completions behind other prompts."""

    policy: Policy
    rollout: Rollout

    def grade(self, asked: Rollout) -> States:
        return States(self.policy.hidden(self.rollout), self.policy.head, asked.ids.device)


def _swap_hints(prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
    """Give each prompt the hint of the next one with another hint; its own if all are alike."""
    hints = [prompt.hint for prompt in prompts]
    turned = [
        next((h for h in hints[i + 1 :] + hints[:i] if h != hint), hint)
        for i, hint in enumerate(hints)
    ]
    return tuple(replace(one, hint=hint) for one, hint in zip(prompts, turned, strict=True))


def _find_leak(student: Policy, rollout: Rollout) -> float:
    """The share of prompts whose hint changes what the student reads."""

    def reads(prompt: Prompt, other: Prompt) -> bool:
        try:
            return (
                not student.encode(prompt)
                == student.encode(other)
                == student.encode(replace(prompt, hint=None))
            )
        except MissingHint:
            return True

    pairs = zip(rollout.prompts, _swap_hints(rollout.prompts), strict=True)
    return float(np.mean([reads(prompt, other) for prompt, other in pairs]))
