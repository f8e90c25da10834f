"""Which labels the result of a PromQL expression has, and whether it asks for any that its metrics do not have.

Prometheus takes such an expression without a word and answers nothing, for ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import promql_parser as promql

Known = Mapping[str, frozenset[str]]
"""The labels of each metric, by its name as it is selected."""

SETS = ("and", "or", "unless")


class Mistake(Exception):
    """An expression that cannot have the answer that its author wanted."""


def labels(expression: str, known: Known) -> frozenset[str]:
    """The labels of the result.  Raises Mistake, or ValueError for what is no PromQL."""
    return _labels(promql.parse(expression), known) or frozenset()


def selectors(expression: str) -> list[Any]:
    """All vector selectors of an expression."""
    found: list[Any] = []

    def visit(expr: Any) -> None:
        if isinstance(expr, promql.VectorSelector):
            found.append(expr)

    promql.walk(promql.parse(expression), visit)
    return found


def _labels(expr: Any, known: Known) -> frozenset[str] | None:
    """None for a number."""
    match expr:
        case promql.NumberLiteral() | promql.StringLiteral():
            return None
        case promql.VectorSelector():
            return _of_metric(expr, known)
        case promql.MatrixSelector():
            return _of_metric(expr.vector_selector, known)
        case promql.AggregateExpr():
            return _aggregated(expr, known)
        case promql.BinaryExpr():
            return _joined(expr, known)
        case promql.Call():
            return _called(expr, known)
    return _labels(expr.expr, known)  # in parentheses, negated, or a subquery


def _of_metric(selector: Any, known: Known) -> frozenset[str]:
    if selector.name not in known:
        raise Mistake(f"{selector.name} is not exported")
    _require(known[selector.name], {matcher.name for matcher in selector.matchers.matchers}, selector)
    return known[selector.name]


def _aggregated(expr: Any, known: Known) -> frozenset[str]:
    inner = _labels(expr.expr, known) or frozenset()
    if expr.modifier is None:
        return frozenset()
    _require(inner, expr.modifier.labels, expr)
    named = frozenset(expr.modifier.labels)
    return named if expr.modifier.type == promql.AggModifierType.By else inner - named


def _joined(expr: Any, known: Known) -> frozenset[str] | None:
    left, right = _labels(expr.lhs, known), _labels(expr.rhs, known)
    if left is None or right is None:
        return left or right
    matching = expr.modifier and expr.modifier.matching
    if matching is None:
        if left != right:
            only_one = ", ".join(sorted(left ^ right))
            raise Mistake(f"the sides of `{expr.op}` never match, only one has {only_one}, in {_text(expr)}")
        return left
    _require(left & right, matching.labels, expr)
    if str(expr.op) in SETS or expr.modifier.group_labels is not None:
        return left | frozenset(expr.modifier.group_labels or ())
    return frozenset(matching.labels)


def _called(expr: Any, known: Known) -> frozenset[str] | None:
    inner = [found for argument in expr.args if (found := _labels(argument, known)) is not None]
    if expr.func.name == "histogram_quantile":
        _require(inner[0], {"le"}, expr)
        return inner[0] - {"le"}
    return inner[0] if inner else None


def _require(there: frozenset[str], asked: Any, where: Any) -> None:
    if missing := set(asked) - there:
        raise Mistake(f"no label {', '.join(sorted(missing))} in {_text(where)}")


def _text(expr: Any) -> str:
    return " ".join(expr.prettify().split())
