"""The formula of a loss, as a method declares it: one line that can be read, filled in and checked.

    -advantage * exp(student_logp - sampler_logp)
    sum(student * log(student / teacher))

Names are columns of a trace, or fields of the method that are numbers, which a trace keeps as the
method's values. Inside `sum(…)`, which runs over the vocabulary, the name of a policy is its
probability of each token; names that are no identifiers stand in quotes, as `"teacher+hint"`, and
`target` is the soft target in the columns `target` and `target_weight`, the mass that it gives to
each token. There are + - * /, comparisons, exp, log, sqrt, abs, min, max and
where(condition, then, otherwise). There is no power: write a product. `0 * log(0)` counts as 0
inside of a sum.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from opdlab.errors import InvalidValue, UnknownColumn
from opdlab.support.expect import shortened

# A part of a formula as JSON holds it: ["name", "advantage"], ["number", 0.5], ["+", a, b], …
Part: TypeAlias = list[Any]

LONGEST = 2000  # characters; longer ones cannot be read by anybody
_BINARY: dict[type, str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
_COMPARE: dict[type, str] = {
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Eq: "==",
    ast.NotEq: "!=",
}
# What is in other languages and not in formulas, and what to write in its place.
_SIGNS: dict[type, tuple[str, str]] = {
    ast.BitXor: ("^", "For a power write a product, as x * x."),
    ast.Pow: ("**", "For a power write a product, as x * x, or exp(p * log(x))."),
    ast.FloorDiv: ("//", "Divide by /."),
    ast.Mod: ("%", ""),
    ast.MatMult: ("@", "Products of single numbers are *."),
}
_ALLOWED = (
    "A formula has names, numbers, + - * /, comparisons, exp(x), log(x), sqrt(x), abs(x), sum(x),"
    " min(x, y), max(x, y) and where(condition, then, otherwise)."
)
_SHOWN = 100  # characters of a formula's part that an error quotes
_TAKES = {"exp": 1, "log": 1, "sqrt": 1, "abs": 1, "sum": 1, "min": 2, "max": 2, "where": 3}
_ACTS: dict[str, Callable[..., Any]] = {
    "+": np.add,
    "-": np.subtract,
    "*": np.multiply,
    "/": np.divide,
    ">": np.greater,
    ">=": np.greater_equal,
    "<": np.less,
    "<=": np.less_equal,
    "==": np.equal,
    "!=": np.not_equal,
    "neg": np.negative,
    "exp": np.exp,
    "log": np.log,
    "sqrt": np.sqrt,
    "abs": np.abs,
    "min": np.minimum,
    "max": np.maximum,
    "where": np.where,
}


@dataclass(frozen=True)
class Formula:
    """A formula that was read.

    Attributes:
        text: The line as it was declared.
        tree: Its parts, as JSON holds them: `["name", name]`, `["number", value]`, or a sign or a
            function with its arguments.
    """

    text: str
    tree: Part

    @property
    def names(self) -> list[str]:
        """The names that it reads outside of sums, in order."""
        return list(dict.fromkeys(_names(self.tree, inside=False)))

    @property
    def policies(self) -> list[str]:
        """The names that it reads inside of sums, in order."""
        return list(dict.fromkeys(_names(self.tree, inside=True)))

    def evaluate(
        self, columns: Mapping[str, np.ndarray], probabilities: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        """Compute the formula for every token.

        Args:
            columns: `[n]` by name.
            probabilities: Of each policy on the tokens that a sum runs over, `[n, S]`.

        Returns:
            `[n]` in float64; NaN where a number is missing.

        Raises:
            UnknownColumn: A name is not there.
        """
        with np.errstate(all="ignore"):
            return np.asarray(_evaluate(self.tree, columns, probabilities), float)


def read_formula(text: Any, where: str = "formula") -> Formula:
    """Read a formula.

    Args:
        text: One line; see the module.
        where: Its owner, for the error.

    Returns:
        The formula.

    Raises:
        InvalidValue: It cannot be read. The message says which part.
    """
    if not isinstance(text, str) or not text.strip() or len(text) > LONGEST:
        raise InvalidValue(
            f"{where} got {shortened(text)}. Use one line, as 'sum(student * log(student /"
            " teacher))'."
        )
    try:
        tree = _read(ast.parse(text.strip(), mode="eval").body, where, is_in_sum=False)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, InvalidValue):
            raise
        raise InvalidValue(
            f"{where} got {shortened(text)}, which is no formula ({type(error).__name__}). Use"
            " names, numbers, + - * /, comparisons and functions."
        ) from None
    return Formula(text.strip(), tree)


def fill_names(text: str, values: Mapping[str, float]) -> str:
    """Put numbers in the place of names.

    Args:
        text: A formula that can be read.
        values: The numbers by name.

    Returns:
        The formula; the same text where it has none of the names.
    """
    tree = ast.parse(text.strip(), mode="eval")

    class Fill(ast.NodeTransformer):
        is_changed = False

        def visit_Call(self, node: ast.Call) -> ast.AST:  # Python's name
            node.args = [self.visit(one) for one in node.args]  # the function's name stays
            return node

        def visit_Name(self, node: ast.Name) -> ast.AST:  # Python's name
            if node.id not in values:
                return node
            self.is_changed = True
            return ast.copy_location(ast.Constant(float(f"{values[node.id]:.12g}")), node)

    fill = Fill()
    filled = fill.visit(tree)
    return ast.unparse(filled) if fill.is_changed else text


def _read(node: ast.AST, where: str, is_in_sum: bool) -> Part:
    """A node of Python's tree as a part; all but a few kinds are refused."""
    if isinstance(node, ast.Name):
        return ["name", node.id]
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value:
        return ["name", node.value]
    if isinstance(node, ast.Constant) and not isinstance(node.value, (str, bool)):
        if not isinstance(node.value, (int, float)):
            raise InvalidValue(f"{where} has {shortened(node.value)}, which is no real number.")
        return ["number", float(node.value)]
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        sides = (_read(side, where, is_in_sum) for side in (node.left, node.right))
        return [_BINARY[type(node.op)], *sides]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return ["neg", _read(node.operand, where, is_in_sum)]
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARE:
        sides = (_read(side, where, is_in_sum) for side in (node.left, node.comparators[0]))
        return [_COMPARE[type(node.ops[0])], *sides]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        name = node.func.id
        if _TAKES.get(name) == len(node.args) and not (name == "sum" and is_in_sum):
            return [name, *(_read(one, where, is_in_sum or name == "sum") for one in node.args)]
    raise InvalidValue(f"{where} has {_name_part(node)} {_ALLOWED}")


def _name_part(node: ast.AST) -> str:
    """Name a part that no formula has, and say what to write in its place."""
    said = " ".join(ast.unparse(node).split())
    quoted = f"`{said if len(said) <= _SHOWN else said[: _SHOWN - 1] + '…'}`"
    if isinstance(node, ast.BinOp):
        sign, advice = _SIGNS.get(type(node.op), ("", ""))
        if sign:
            return f"the sign {sign} in {quoted}, which no formula has. {advice}".rstrip()
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        name = node.func.id
        if name in _TAKES and _TAKES[name] != len(node.args):
            return f"{quoted}, but {name} takes {_TAKES[name]} and not {len(node.args)} values."
        if name == "sum":
            return f"{quoted} inside of another sum."
        return f"the function {name} in {quoted}, which no formula has."
    return f"{quoted}, which no formula has."


def _names(part: Part, inside: bool, is_in_sum: bool = False) -> list[str]:
    """The names of a part, those inside of sums or those outside."""
    kind, *arguments = part
    if kind == "name":
        return [arguments[0]] if is_in_sum == inside else []
    if kind == "number":
        return []
    return [name for one in arguments for name in _names(one, inside, is_in_sum or kind == "sum")]


def _evaluate(
    part: Part,
    columns: Mapping[str, np.ndarray],
    probabilities: Mapping[str, np.ndarray],
    is_in_sum: bool = False,
) -> Any:
    kind, *arguments = part
    if kind == "number":
        return arguments[0]
    if kind == "name":
        return _look_up(arguments[0], columns, probabilities, is_in_sum)
    values = [
        _evaluate(one, columns, probabilities, is_in_sum or kind == "sum") for one in arguments
    ]
    if kind != "sum":
        return _ACTS[kind](*values)
    terms = np.asarray(values[0], float)
    # 0 log 0 and the like: a token that a policy rules out adds nothing.
    return np.where(np.isnan(terms), 0.0, terms).sum(-1)


def _look_up(
    name: str,
    columns: Mapping[str, np.ndarray],
    probabilities: Mapping[str, np.ndarray],
    is_in_sum: bool,
) -> np.ndarray:
    if is_in_sum and name in probabilities:
        return np.asarray(probabilities[name], float)
    if name not in columns:
        known = [*(probabilities if is_in_sum else ()), *columns]
        raise UnknownColumn(
            f"The formula reads {name!r}; there is {', '.join(known) or 'nothing'}."
        )
    values = np.asarray(columns[name], float)
    return values[:, None] if is_in_sum else values
