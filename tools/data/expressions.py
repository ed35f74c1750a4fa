"""Numbers that remember how they were computed, as an expression that a reader can check.

    rate, years = Quantity(0.05), Quantity(3)
    (1000 * (1 + rate) ** years).text      "1000 * (1 + 0.05) ^ 3"

A rule that computes with quantities needs no change: they are floats.
"""

import cmath
import math
import operator
import random
from collections.abc import Callable
from typing import Any

# How tightly an operator binds; operands that bind less stand in brackets.
SUM, PRODUCT, POWER, ATOM = range(4)
# By symbol: the operation, how tightly it binds, and the least of what stands left and right of it.
OPERATORS: dict[str, tuple[Callable[[Any, Any], Any], int, int, int]] = {
    "+": (operator.add, SUM, SUM, SUM),
    "-": (operator.sub, SUM, SUM, PRODUCT),
    "*": (operator.mul, PRODUCT, PRODUCT, PRODUCT),
    "/": (operator.truediv, PRODUCT, PRODUCT, POWER),
    "^": (operator.pow, POWER, ATOM, ATOM),
}
# Constants that change nothing on the right of an operator.
NEUTRAL = {"+": 0, "-": 0, "*": 1, "/": 1}
STAND_INS = random.Random(0)


class Quantity(float):
    """A number of a text, or what was computed from such numbers.

    `stand_in` is the same computation with a random number in the place of each number of the text.
    Expressions that differ only in the order of their operands have the same; all others differ.
    """

    text: str
    binding: int
    stand_in: complex
    divided: tuple["Quantity", float] | None = None  # what it is a quotient of, by which constant

    def __new__(
        cls, value: float, text: str = "", binding: int = ATOM, stand_in: complex | None = None
    ) -> "Quantity":
        quantity = super().__new__(cls, value)
        quantity.text = text or write_number(value)
        quantity.binding = binding if text or value >= 0 else SUM
        quantity.stand_in = STAND_INS.uniform(1, 2) if stand_in is None else stand_in
        return quantity

    def __neg__(self) -> "Quantity":
        text = bracket(self, PRODUCT)
        return Quantity(-float(self), f"-{text}", SUM, -self.stand_in)


def combine(symbol: str, left: float, right: float) -> Quantity:
    """Computes `left symbol right`; a constant that changes nothing is left out, as in 8 / 4 * 4.

    Raises ArithmeticError as floats do, and where the result is complex.
    """
    operation, binding, least_left, least_right = OPERATORS[symbol]
    value = operation(float(left), float(right))
    if isinstance(value, complex):
        raise ArithmeticError(f"{left} {symbol} {right} is no real number")
    first, second = map(convert_constant, (left, right))
    if not isinstance(right, Quantity) and right == NEUTRAL.get(symbol):
        return first
    if not isinstance(left, Quantity) and symbol in "+*" and left == NEUTRAL[symbol]:
        return second
    for quantity, constant in ((first, right), (second, left)):
        if symbol == "*" and quantity.divided and quantity.divided[1] == constant:
            return quantity.divided[0]
    text = f"{bracket(first, least_left)} {symbol} {bracket(second, least_right)}"
    try:
        stand_in = operation(first.stand_in, second.stand_in)
    except ArithmeticError:
        stand_in = math.nan
    result = Quantity(value, text, binding, stand_in)
    if symbol == "/" and not isinstance(right, Quantity):
        result.divided = first, right
    return result


def define_operator(name: str, symbol: str) -> None:
    """Lets quantities compute with the symbol, on either side of it."""
    setattr(Quantity, f"__{name}__", lambda self, other: combine(symbol, self, other))
    setattr(Quantity, f"__r{name}__", lambda self, other: combine(symbol, other, self))


for _name, _symbol in {"add": "+", "sub": "-", "mul": "*", "truediv": "/", "pow": "^"}.items():
    define_operator(_name, _symbol)


def convert_constant(number: float) -> Quantity:
    """A quantity as it is; a constant of a formula (1, 365) stands for itself."""
    return number if isinstance(number, Quantity) else Quantity(number, stand_in=float(number))


def bracket(quantity: Quantity, least: int) -> str:
    return quantity.text if quantity.binding >= least else f"({quantity.text})"


def write_number(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.12f}".rstrip("0")


def exp(power: float) -> Quantity:
    return call("exp", math.exp(power), cmath.exp, power)


def ln(number: float) -> Quantity:
    return call("ln", math.log(number), cmath.log, number)


def call(name: str, value: float, function: Callable[[Any], complex], number: float) -> Quantity:
    inner = convert_constant(number)
    return Quantity(value, f"{name}({inner.text})", ATOM, function(inner.stand_in))
