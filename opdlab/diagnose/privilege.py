"""Where does a hinted teacher's lead come from: what it can do, or what it was told? (section 1 of
DOPD, arXiv 2606.30626)

With T the teacher, S the student, p the hint, on tokens y that the bare student S(.|x) wrote, the
total gap G = log T(y|x,p) - log S(y|x) telescopes exactly, in two ways:

    G = [log T(y|x,p) - log S(y|x,p)] + [log S(y|x,p) - log S(y|x)]      capability given p + information seen by the student
    G = [log T(y|x,p) - log T(y|x)]   + [log T(y|x)   - log S(y|x)]      information seen by the teacher + capability without p

Their difference is the interaction (large where using the hint takes a skill), their mean the
Shapley split. Over whole distributions KL(S_x || T_xp) = KL(S_x || S_xp) + E_{y~S_x} log S_xp/T_xp,
whose second term may be negative. The paper states the problem and uses the first bracket; the two
splits, the floor and the illusion index are opdlab's readings of it.

No student without the hint can bring E_p KL(T_xp || S_x) under the floor I_T(Y;P|x), the
information that the hint gives the teacher. `floor` here is KL(T_xp || T_x), which is that number
where the teacher without the hint is the average of the teachers with it, and more where it is not
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
from opdlab.diagnose.probe import by_type, frame, grade, render, write
from opdlab.engine.rows import Rows
from opdlab.errors import MissingHint, MissingPolicy
from opdlab.losses.divergences import entropy, forward_kl, reverse_kl
from opdlab.methods.dopd import DOPD, Route, route, thresholds
from opdlab.models.graded import States
from opdlab.models.policy import Policy
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


@dataclass(frozen=True, eq=False)
class Privilege:
    """`tokens`: one row a token, every number of `split`.

    `table`: means by ground-truth type (all tokens in the row "all").

    `controls`: what other hints do, by type: how far each kind of hint moves the teacher and the
    hinted student (forward KL from the same policy without a hint), and the gap under it. `leak`:
    share of prompts whose rendering for the deployed student changes with the hint; anything but 0
    means that the student reads what it will not have.
    """

    tokens: pd.DataFrame
    controls: pd.DataFrame
    leak: float

    @property
    def table(self) -> pd.DataFrame:
        shares = pd.get_dummies(self.tokens["route"].map({int(r): r.name for r in Route})).reindex(
            columns=[r.name for r in Route]
        )
        return by_type(
            pd.concat([self.tokens, shares.fillna(0).astype(float)], axis=1),
            [*SHOWN, *shares.columns],
        )

    @property
    def sentence(self) -> str:
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
            f"The gap log T(y|x,p) - log S(y|x) is {m['gap']:+.3f} nats a token: capability"
            f" {m['capability']:+.3f}, information {m['information']:+.3f} (interaction"
            f" {m['interaction']:+.3f}). KL(T_xp || S_x) is {m['forward_kl']:.3f}; what the hint"
            f" tells the teacher, {m['floor']:.3f}{under}. DOPD would give the teacher a weight of"
            f" {m['teacher_weight']:.2f}. {leak}"
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
        return render(self.sentence, self.table)


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
    """Score T(x), T(x,p), S(x), S(x,p) on a `rollout` of the student's (written here if there is
    none) and split the gap.

    hint: what the privileged sides are told, as in `Policy.seeing`; by default what the teacher
        already sees, else each prompt's
    own hint. controls: also try another prompt's hint (two more passes). method: whose routes and
    weights count as the teacher's (DOPD's defaults). Raises MissingHint, MissingPolicy,
    TokenizerMismatch.
    """
    expect_teacher(teacher, "privilege")
    if not isinstance(teacher, Policy):
        raise MissingPolicy(
            f"privilege tells the teacher hints, and {type(teacher).__name__} takes none. Load it"
            " with Policy.load(…)."
        )
    rollout = rollout or write(student, task, prompts, n, seed, split)
    policies = _four(student, teacher, hint)
    logp = grade(
        rollout,
        lambda rows: {name: rows.logp_of(name) for name in ("teacher+hint", "student+hint")},
        policies,
    )
    told_teacher, told_student = (
        torch.tensor(logp[name]) for name in ("teacher+hint", "student+hint")
    )
    method = method or DOPD()
    limits = thresholds(
        told_teacher, told_student, torch.ones(len(told_teacher), dtype=torch.bool), method.trim
    )
    columns = grade(rollout, lambda rows: split_gap(rows, limits, method), policies)
    tokens = frame(rollout, columns, task, student.tokenizer)
    moved = _controls(rollout, policies, tokens) if controls else pd.DataFrame()
    return Privilege(tokens, moved, _leak(student, rollout))


def split_gap(rows: Rows, limits: tuple[float, float], method: DOPD) -> dict[str, Tensor]:
    """Everything about a token, `[n]` each, nats.

    `limits`: the batch means that DOPD routes by (`dopd.thresholds`).

    `teacher_weight`: E_{y~S_x} of the weight with which DOPD would send y to the teacher, exact
    over the vocabulary; 1 in plain distillation.
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
    routes = route(
        tp, sp, torch.ones_like(s, dtype=torch.bool), limits=limits
    )  # [n, V]: what y would be routed to, were it sampled
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
    """I_T(Y;P|x) at every token, `[tokens]`, nats: mean_k KL(T(.|x,p_k) || mean_j T(.|x,p_j)), for
    equally likely `hints` p_k.

    The hints are draws of p given x, as in `Policy.seeing`. With few draws it is too low, and never
    above log K.
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

    return grade(
        rollout, information, {f"hint{k}": teacher.seeing(hint) for k, hint in enumerate(hints)}
    )["floor"]


def _four(student: Policy, teacher: Policy, hint: Hint) -> dict[str, Policy]:
    told = hint if hint is not None else teacher.context
    bare = teacher if hint is not None else teacher.without_context()
    return {
        "student": student,
        "teacher": bare,
        "teacher+hint": teacher.seeing(told),
        "student+hint": student.seeing(told),
    }


def _controls(rollout: Rollout, policies: dict[str, Policy], tokens: pd.DataFrame) -> pd.DataFrame:
    """One row a type and kind of hint: its own, another prompt's (where that changes what is read),
    none.
    """
    others = replace(rollout, prompts=_swapped(rollout.prompts))
    told = policies["teacher+hint"]
    kinds = {"own": rollout, "another's": others, "none": None}
    if all(
        told.encode(a) == told.encode(b)
        for a, b in zip(rollout.prompts, others.prompts, strict=True)
    ):
        del kinds["another's"]
    parts = []
    for kind, hinted in kinds.items():
        columns = _moves(rollout, hinted, policies)
        parts.append(by_type(tokens[["type"]].assign(**columns), list(columns)).assign(hint=kind))
    table = pd.concat(parts).rename_axis("type").set_index("hint", append=True)
    return table.reindex([(name, kind) for name in parts[0].index for kind in kinds])


def _moves(
    rollout: Rollout, hinted: Rollout | None, policies: dict[str, Policy]
) -> dict[str, np.ndarray]:
    """How far the hints of `hinted` (None: no hints) move teacher and student, and the gap that is
    left, `[tokens]` each.
    """
    bare: dict[str, Any] = {name: policies[name] for name in ("student", "teacher")}
    told: dict[str, Any] = (
        bare
        if hinted is None
        else {name: _Elsewhere(policies[f"{name}+hint"], hinted) for name in bare}
    )

    def measure(rows: Rows) -> dict[str, Tensor]:
        moves = {f"{name}_moves": forward_kl(rows[name], rows[f"{name}+hint"]) for name in bare}
        return moves | {"gap": rows.logp_of("teacher+hint") - rows.logp}

    return grade(rollout, measure, bare | {f"{name}+hint": policy for name, policy in told.items()})


@dataclass(frozen=True)
class _Elsewhere:
    """A policy that grades the same completions behind other prompts."""

    policy: Policy
    rollout: Rollout

    def grade(self, _: Rollout) -> States:
        return States(self.policy.hidden(self.rollout), self.policy.head)


def _swapped(prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
    """Each prompt with the hint of the next one that has another hint; its own where all are alike."""
    hints = [p.hint for p in prompts]
    turned = [
        next((h for h in hints[i + 1 :] + hints[:i] if h != hint), hint)
        for i, hint in enumerate(hints)
    ]
    return tuple(replace(p, hint=h) for p, h in zip(prompts, turned, strict=True))


def _leak(student: Policy, rollout: Rollout) -> float:
    def reads(prompt: Prompt, other: Prompt) -> bool:
        try:
            return (
                not student.encode(prompt)
                == student.encode(other)
                == student.encode(replace(prompt, hint=None))
            )
        except MissingHint:
            return True

    pairs = zip(rollout.prompts, _swapped(rollout.prompts), strict=True)
    return float(np.mean([reads(prompt, other) for prompt, other in pairs]))
