"""The formulas of methods, as traces keep them and pictures fill them in.

A method of a user's own declares one as an attribute, `formula = "sum(student * log(student /
teacher))"` (`opdlab.data.formula` says what it may hold). Methods without a formula, and forms that
no line of columns describes, have none: pictures then show what went into the loss and what came
out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from opdlab.data.formula import read_formula
from opdlab.methods.contract import HasFormula
from opdlab.methods.eopd import EOPD
from opdlab.methods.gopd import GOPD
from opdlab.methods.grpo import GRPO
from opdlab.methods.opd import OPD
from opdlab.methods.opd_plus import OPDPlus
from opdlab.methods.ovd import OVD
from opdlab.methods.soda import SODA
from opdlab.methods.spans import SpanOPD
from opdlab.methods.supervised import SFT, SequenceKD
from opdlab.methods.turn_opd import TurnOPD

POLICY_GRADIENT = "-advantage * exp(student_logp - sampler_logp)"
_SUM = "sum(student * log(student / teacher))"


def formula_of(method: Any) -> str:
    """Return the formula of a method's loss.

    Args:
        method: A method; its own attribute `formula` goes before opdlab's table.

    Returns:
        One line; "" where it has none.

    Raises:
        InvalidValue: The method declares something that is no formula.
    """
    # An attribute of that name that is no text is something of the method's own.
    if isinstance(method, HasFormula) and isinstance(method.formula, str):
        return read_formula(method.formula, f"{type(method).__name__}.formula").text
    write = _FORMULAS.get(type(method))
    return write(method) if write else ""


def divergence_formula(name: str, options: Mapping[str, Any], teacher: str = "teacher") -> str:
    """Write a divergence as a sum over the vocabulary.

    Args:
        name: A name of `opdlab.losses.DIVERGENCES`.
        options: Its options, such as `{"beta": 0.9}`.
        teacher: The name of the policy that is learnt from.

    Returns:
        One line; "" for a divergence that is not in the table.
    """
    p, q = "student", teacher if teacher.isidentifier() else f'"{teacher}"'

    def kl(a: str, b: str) -> str:
        return f"sum({a} * log({a} / {b}))"

    def mix(a: str, b: str, share: float) -> str:
        return f"({share:g} * {a} + {1 - share:g} * {b})"

    alpha = float(options.get("alpha", 0.5 if name == "alpha_divergence" else 0.1))
    beta = float(options.get("beta", 0.5))
    middle = mix(q, p, 0.5)
    if name == "generalized_jsd":
        if options.get("normalize"):
            return ""  # another form at each end
        m = mix(q, p, beta)
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


def _clipped(method: GRPO | OVD) -> str:
    ratio, clip = "exp(student_logp - sampler_logp)", float(method.clip)
    held = f"min(max({ratio}, {1 - clip:g}), {1 + clip:g})"
    return f"-min({ratio} * advantage, {held} * advantage)"


def _eopd(method: EOPD) -> str:
    weight = "" if method.weight == 1 else f"{method.weight:g} * "
    return f"{_SUM} + {weight}gated * sum(teacher * log(teacher / student))"


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
}
