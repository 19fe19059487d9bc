"""Numbers that follow the number of ranks, written in a file as ``lr: 0.1 * world_size / 8``.

An expression is text that names ``world_size``. It is evaluated when the configuration is resolved, so that a
run's record holds the number, and its origin the expression. Arithmetic and a few functions are all there is:
the text is parsed and walked here, never given to Python's ``eval``.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, GetJsonSchemaHandler, ValidationInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

NAME = "world_size"
"""The only name in an expression: the number of ranks of the run."""

_MAX_LENGTH = 200
_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    # floats overflow at once where integers would grow for minutes
    ast.Pow: lambda base, exponent: float(base) ** float(exponent),
}
_SIGNS: dict[type[ast.unaryop], Callable[[float], float]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_FUNCTIONS: dict[str, Callable[..., float]] = {
    "ceil": math.ceil,
    "floor": math.floor,
    "max": max,
    "min": min,
    "round": round,
    "sqrt": lambda number: float(number) ** 0.5,
}


def evaluate(text: str, world_size: int) -> float:
    """Returns the value of an expression for a number of ranks.

    Allowed: numbers, ``world_size``, ``+ - * / // **``, parentheses, and ceil, floor, max, min, round, sqrt.

    Raises:
        ValueError: anything else, or a value that is not finite.
    """
    if len(text) > _MAX_LENGTH:
        raise ValueError(f"an expression may have {_MAX_LENGTH} characters; this has {len(text)}")
    try:
        value = _value(ast.parse(text.strip(), mode="eval").body, world_size)
        # too large integers, complex roots and infinities have no place in a configuration
        is_finite = math.isfinite(value)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"{text!r} is not an expression: {_ALLOWED}") from error
    except (ArithmeticError, TypeError) as error:
        raise ValueError(f"{text!r} has no value for {NAME} {world_size}: {error}") from error
    if not is_finite:
        raise ValueError(f"{text!r} is {value} for {NAME} {world_size}")
    return value


def is_expression(value: object) -> bool:
    """Returns whether a value is text that names ``world_size``."""
    return isinstance(value, str) and NAME in value


def _value(node: ast.expr, world_size: int) -> float:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.Name(id="world_size"):
            return world_size
        case ast.BinOp(op=op) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(node.left, world_size), _value(node.right, world_size))
        case ast.UnaryOp(op=sign) if type(sign) in _SIGNS:
            return _SIGNS[type(sign)](_value(node.operand, world_size))
        case ast.Call(func=ast.Name(id=name), keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*(_value(argument, world_size) for argument in node.args))
    raise ValueError(f"{ast.unparse(node)!r} is not allowed in an expression: {_ALLOWED}")


_ALLOWED = f"numbers, {NAME}, + - * / // **, parentheses, {', '.join(_FUNCTIONS)}"


def _evaluated(value: Any, info: ValidationInfo) -> Any:
    """Returns the number that an expression stands for; the ranks come from the validation's context."""
    if not is_expression(value):
        return value
    context: Mapping[str, int] = info.context or {}
    if NAME not in context:
        raise ValueError(f"{value!r} needs the number of ranks, which is not known here")
    return evaluate(value, context[NAME])


class _OrText:
    """Tells the JSON Schema that a number may also be an expression."""

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"anyOf": [handler(schema), {"type": "string", "pattern": NAME}]}


ScaledFloat = Annotated[float, Field(gt=0), BeforeValidator(_evaluated), _OrText()]
"""A positive number, or an expression of the world size."""
ScaledCount = Annotated[int, Field(ge=1), BeforeValidator(_evaluated), _OrText()]
"""A whole number from 1, or an expression of the world size."""
ScaledCountOrNone = Annotated[int, Field(ge=0), BeforeValidator(_evaluated), _OrText()]
"""A whole number from 0, or an expression of the world size."""
ScaledShare = Annotated[float, Field(gt=0, le=1), BeforeValidator(_evaluated), _OrText()]
"""A number above 0 up to 1, or an expression of the world size."""
ScaledShareOrNone = Annotated[float, Field(ge=0, le=1), BeforeValidator(_evaluated), _OrText()]
"""A number from 0 to 1, or an expression of the world size."""
