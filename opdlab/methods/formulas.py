"""The formulas of methods, as traces keep them and pictures fill them in.

A method of a user's own declares one as an attribute, `formula = "sum(student * log(student /
teacher))"`, or as an argument of `opdlab.method` (`opdlab.data.formula` says what it may hold).
Forms that no line of columns describes have none: functions of a user's own that declare none, and
losses that put together all tokens outside of a top k. Pictures then show what went into the loss
and what came out.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from math import isfinite
from typing import Any

from opdlab.data.formula import Formula, fill_names, read_formula
from opdlab.methods.combined import Combined
from opdlab.methods.contract import FunctionMethod, HasFormula, name_of
from opdlab.methods.dopd import DOPD, TEACHER, Route
from opdlab.methods.eopd import EOPD
from opdlab.methods.feedback import RLSD, SDAR, SDPO
from opdlab.methods.gopd import GOPD
from opdlab.methods.grpo import GRPO
from opdlab.methods.omniopd import OmniOPD
from opdlab.methods.opd import OPD
from opdlab.methods.opd_plus import OPDPlus
from opdlab.methods.opsa import OPSA
from opdlab.methods.ovd import OVD
from opdlab.methods.self_distillation import ANCHORS, SelfDistillation
from opdlab.methods.soda import SODA
from opdlab.methods.spans import SpanOPD
from opdlab.methods.supervised import SFT, SequenceKD
from opdlab.methods.topd import TOPD
from opdlab.methods.turn_opd import TurnOPD

POLICY_GRADIENT = "-advantage * exp(student_logp - sampler_logp)"
# Columns that only traces of training have.
_LATER = ("sampler_logp", "sampler_gap", "loss", "grad_norm", "share")
_SUM = "sum(student * log(student / teacher))"


def formula_of(method: Any, columns: Collection[str] | None = None) -> str:
    """Return the formula of a method's loss.

    Args:
        method: A method; its own attribute `formula` goes before opdlab's table.
        columns: The columns of the trace that keeps the formula. A name that is none of them and a
            field of the method becomes the field's number, and a name that is neither is warned of.
            None where they are not known yet.

    Returns:
        One line; "" where it has none.

    Raises:
        InvalidValue: The method declares something that is no formula.
    """
    # An attribute of that name that is no text is something of the method's own.
    if isinstance(method, FunctionMethod) and not method.formula:
        return ""
    if isinstance(method, HasFormula) and isinstance(method.formula, str):
        formula = read_formula(method.formula, f"{name_of(method)}.formula")
        return formula.text if columns is None else _fill(formula, method, columns)
    if isinstance(method, Combined):
        return _combined(method, columns)
    write = _FORMULAS.get(type(method))
    return write(method) if write else ""


def _fill(formula: Formula, method: Any, columns: Collection[str]) -> str:
    """Fill in the fields of the method; warn of names that stand for nothing."""
    policies = {"student", *getattr(method, "needs", ())}
    used = dict.fromkeys([*formula.names, *formula.policies])
    fields = {name: getattr(method, name, None) for name in used if name not in columns}
    values = {
        name: float(value)
        for name, value in fields.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)
    }
    inside = {name for name in formula.policies if name in policies or name == "target"}
    for name in [*fields]:
        if name in formula.names and name in policies:
            said = f"reads {name!r}, which is a policy, outside of sum(…). Its log-prob of the"
            said += f" sampled token is {name}_logp"
        elif name not in values and name not in inside and name not in _LATER:
            said = f"reads {name!r}, which is no column of the trace, no policy and no field of the"
            said += " method that is a number."
        else:
            continue
        warnings.warn(
            f"{name_of(method)}.formula {said}. Pictures of this loss show no value.",
            stacklevel=3,
        )
    return fill_names(formula.text, {n: v for n, v in values.items() if n not in policies})


def divergence_formula(name: str, options: Mapping[str, Any], teacher: str = "teacher") -> str:
    """Write a divergence as a sum over the vocabulary.

    Args:
        name: A name of `opdlab.losses.DIVERGENCES`.
        options: Its options, such as `{"beta": 0.9}`.
        teacher: The name of the policy that is learnt from.

    Returns:
        One line; "" for a divergence that is not in the table.
    """
    p, q = "student", _quoted(teacher)

    def kl(a: str, b: str) -> str:
        return f"sum({a} * log({a} / {b}))"

    def mix(a: str, b: str, share: float) -> str:
        return f"({share:g} * {a} + {1 - share:g} * {b})"

    alpha = float(options.get("alpha", 0.5 if name == "alpha_divergence" else 0.1))
    beta = float(options.get("beta", 0.5))
    middle = mix(q, p, 0.5)
    if name == "generalized_jsd":
        is_normal = bool(options.get("normalize"))
        if is_normal and beta in (0, 1):
            return kl(p, q) if beta else kl(q, p)
        m = mix(q, p, beta)
        if is_normal:  # divided by beta (1 - beta)
            return f"{kl(q, m)} / {1 - beta:g} + {kl(p, m)} / {beta:g}"
        return f"{beta:g} * {kl(q, m)} + {1 - beta:g} * {kl(p, m)}"
    if name == "alpha_divergence" and alpha not in (0, 1):
        power = f"exp({alpha:g} * log({q}) + {1 - alpha:g} * log({p}))"
        return f"(sum({power}) - 1) / {alpha * (alpha - 1):g}"
    table = {
        "reverse_kl": kl(p, q),
        "forward_kl": kl(q, p),
        "reverse_kl_k3": f"sum({p} * log({p} / {q}) + {q} - {p})",
        "jeffreys": f"{kl(q, p)} + {kl(p, q)}",
        "jensen_shannon": f"0.5 * {kl(q, middle)} + 0.5 * {kl(p, middle)}",
        "total_variation": f"0.5 * sum(abs({p} - {q}))",
        "squared_hellinger": f"0.5 * sum((sqrt({q}) - sqrt({p})) * (sqrt({q}) - sqrt({p})))",
        "pearson": f"sum(({q} - {p}) * ({q} - {p}) / {p})",
        "neyman": f"sum(({q} - {p}) * ({q} - {p}) / {q})",
        "le_cam": f"sum(({q} - {p}) * ({q} - {p}) / ({q} + {p}))",
        "skew_forward_kl": kl(q, mix(q, p, alpha)),
        "skew_reverse_kl": kl(p, mix(p, q, alpha)),
    }
    return table.get(name, "")


def _opd(method: OPD) -> str:
    if method.estimator == "sampled":
        return POLICY_GRADIENT
    return "" if method.top_k else divergence_formula(method.divergence, method.options)


def _clipped(method: GRPO | OVD | RLSD | SDAR) -> str:
    ratio, clip = "exp(student_logp - sampler_logp)", float(method.clip)
    held = f"min(max({ratio}, {1 - clip:g}), {1 + clip:g})"
    return f"-min({ratio} * advantage, {held} * advantage)"


def _eopd(method: EOPD) -> str:
    weight = "" if method.weight == 1 else f"{method.weight:g} * "
    return f"{_SUM} + {weight}gated * sum(teacher * log(teacher / student))"


def _self_distillation(method: SelfDistillation) -> str:
    if method.top_k:
        return ""
    teacher = ANCHORS[method.anchor]
    if method.clip is None:
        return divergence_formula(method.divergence, method.options, teacher)
    q = _quoted(teacher)
    return f"sum(min({q} * log({q} / student), {method.clip:g}))"


def _sdpo(method: SDPO) -> str:
    if method.top_k:
        return ""
    told = divergence_formula(method.divergence, method.options, ANCHORS[method.anchor])
    return f"scale * ({told})" if told else ""


def _sdar(method: SDAR) -> str:
    told = _quoted(f"{ANCHORS[method.anchor]}_logp")
    return f"{_clipped(method)} + {method.weight:g} * gate * ({told} - student_logp)"


def _dopd(method: DOPD) -> str:
    """The regimes, one inside the other; the top K is written as all tokens."""
    if method.tail != "bucket":
        return ""
    teacher, anchor = TEACHER, ANCHORS[method.anchor]
    if not method.adaptive:
        return divergence_formula("reverse_kl", {}, teacher)
    to_teacher = divergence_formula("reverse_kl", {}, teacher)
    to_anchor = divergence_formula("reverse_kl", {}, anchor)
    both = f"({divergence_formula('jensen_shannon', {}, teacher)})"
    last = {"self": f"{method.light:g} * {to_anchor}", "teacher": both, "none": "0"}[method.hs]
    return (
        f"where(route == {Route.LH:d}, {method.light:g} * {to_teacher},"
        f" where(route == {Route.LL:d}, {method.weak:g} * {to_anchor},"
        f" where(route == {Route.HT:d}, {both}, {last})))"
    )


def _topd(method: TOPD) -> str:
    local = f"downweight * {_SUM}" if method.downweight else _SUM
    return f"{local} - {method.weight:g} * sum(target * log(student))" if method.weight else local


def _omniopd(method: OmniOPD) -> str:
    anchor = f"{method.beta:g} * sum(reference * log(reference / student))"
    return f"where(audited > 0, -weight * student_logp, {anchor})"


def _combined(method: Combined, columns: Collection[str] | None = None) -> str:
    """The weighted sum of the parts' formulas, each reading its own columns."""
    terms = []
    for (name, part), weight in zip(method.parts.items(), method.weights, strict=True):
        own = columns and {*columns, *(one.removeprefix(f"{name}_") for one in columns)}
        text = formula_of(part, own) if weight else ""
        if weight and not text:
            return ""
        if weight:
            renamed = _rename_columns(text, name, ("student", *part.needs))
            terms.append(f"{weight:g} * ({renamed})" if weight != 1 else f"({renamed})")
    return " + ".join(terms)


def _rename_columns(text: str, owner: str, policies: Sequence[str]) -> str:
    """Put a method's name before the columns of its plan; those of the policies stay."""

    def rename(name: str) -> str:
        is_policy = name in policies or any(name.startswith(f"{one}_") for one in policies)
        return name if is_policy else f"{owner}_{name}"

    tree = ast.parse(text, mode="eval")
    functions = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and id(node) not in functions:
            node.id = rename(node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = rename(node.value)
    return ast.unparse(tree)


def _quoted(name: str) -> str:
    return name if name.isidentifier() else f'"{name}"'


def _constant(text: str) -> Callable[[Any], str]:
    def write(method: Any) -> str:
        return text

    return write


_FORMULAS: dict[type, Callable[[Any], str]] = {
    OPD: _opd,
    OPDPlus: _constant(POLICY_GRADIENT),
    GOPD: _constant(POLICY_GRADIENT),
    SpanOPD: _constant(POLICY_GRADIENT),
    GRPO: _clipped,
    OVD: _clipped,
    EOPD: _eopd,
    TurnOPD: _constant(f"turn_weight * {_SUM}"),
    SFT: _constant("-student_logp"),
    SequenceKD: _constant("-student_logp"),
    SODA: _constant("pair_loss"),
    OPSA: _constant(POLICY_GRADIENT),
    SelfDistillation: _self_distillation,
    SDPO: _sdpo,
    RLSD: _clipped,
    SDAR: _sdar,
    DOPD: _dopd,
    TOPD: _topd,
    OmniOPD: _omniopd,
    Combined: _combined,
}
