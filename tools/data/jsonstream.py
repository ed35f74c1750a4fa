"""Reads JSON texts of any size value by value, in constant memory and strictly.

A repeated key and infinity refuse their row. NaN, which Python and pandas write for a value that is
missing, is read as null. Integers keep all digits.
"""

import json
import math
from collections.abc import Iterator
from typing import IO, Any

from tools.common import unique

LONGEST = 16 * 2**20  # characters of a row
CHUNK = 2**18
WHITE = " \t\r\n\f\ufeff"

MOST_DIGITS = 4300  # of an integer, which Python converts


def parse_float(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"{text[:40]} is too large for a number")
    return number


def parse_constant(text: str) -> None:
    """None of NaN; raises ValueError for infinity."""
    if text == "NaN":
        return
    raise ValueError(f"JSON has no number {text}")


def parse_int(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits; at most {MOST_DIGITS} are read")
    return int(text)


# Tabs, line ends and page breaks in a text are read, though JSON wants them escaped.
STRICT = json.JSONDecoder(
    object_pairs_hook=unique,
    parse_constant=parse_constant,
    parse_float=parse_float,
    parse_int=parse_int,
    strict=False,
)
# Tells where a value ends that the strict one refuses.
LENIENT = json.JSONDecoder(parse_int=float, strict=False)


def parse_row(text: str) -> dict[str, Any]:
    """The object in a JSON text; raises ValueError that says what is wrong with it."""
    try:
        row = STRICT.decode(text.strip(WHITE))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("not JSON that is read here: nested too deep") from None
    return check_row(row, text)


def check_row(row: Any, text: str) -> dict[str, Any]:
    """The row, where it is an object and its texts can be written; raises ValueError."""
    if not isinstance(row, dict):
        raise ValueError(f"an object is needed, not {type(row).__name__}")
    if "\\u" in text:  # half a surrogate pair can be spelt in JSON, and is no character
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it holds half a surrogate pair, which is no character") from None
    return row


class Malformed(ValueError):
    """A text is not JSON from a line on."""


class JsonStream:
    """A position in a text of JSON values."""

    def __init__(self, file: IO[str]):
        self.file, self.buffer, self.at, self.lines, self.ended = file, "", 0, 0, False

    def fill(self) -> bool:
        """Drops what was read, and reads on; False at the end of the text."""
        if self.ended:
            return False
        self.lines += self.buffer.count("\n", 0, self.at)
        rest = self.buffer[self.at :]
        chunk = self.file.read(max(CHUNK, len(rest)))
        self.buffer, self.at, self.ended = rest + chunk, 0, not chunk
        return not self.ended

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            while self.at < len(self.buffer) and self.buffer[self.at] in WHITE:
                self.at += 1
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self.fill():
                return ""

    def take(self, expected: str) -> str:
        """Takes the next character, which is one of `expected`."""
        character = self.peek()
        if not character or character not in expected:
            what = f'"{character}"' if character else "the end of the file"
            wanted = " or ".join(f'"{option}"' for option in expected)
            raise self.fail(f"{wanted} is expected, not {what}", self.at)
        self.at += 1
        return character

    def fail(self, reason: str, place: int) -> Malformed:
        line = self.lines + self.buffer.count("\n", 0, place) + 1
        return Malformed(f"line {line}: not JSON: {reason}")

    def take_value(self, strict: bool = True) -> Any:
        """Takes the next value. A value that breaks a rule is taken and returned as ValueError."""
        self.peek()
        while True:
            try:
                value, end = (STRICT if strict else LENIENT).raw_decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                if len(self.buffer) - self.at > LONGEST or not self.fill():
                    raise self.fail(error.msg, error.pos) from None
                continue
            except RecursionError:
                raise self.fail("nested too deep", self.at) from None
            except ValueError as error:
                refusal: ValueError = ValueError(str(error))
                self.take_value(strict=False)
                return refusal
            if end == len(self.buffer) and self.fill():  # a number may go on
                continue
            start, self.at = self.at, end
            try:
                return check_row(value, self.buffer[start:end]) if strict else value
            except ValueError as error:
                return error

    def take_list(self) -> Iterator[Any]:
        """Takes a list, value by value."""
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return
        while True:
            yield self.take_value()
            if self.take(",]") == "]":
                return

    def take_members(self) -> Iterator[str]:
        """Takes an object; yields each key, and the caller takes the key's value."""
        self.take("{")
        if self.peek() == "}":
            self.take("}")
            return
        while True:
            key = self.take_value(strict=False)
            if not isinstance(key, str):
                raise self.fail("the key of an object is a text", self.at)
            self.take(":")
            yield key
            if self.take(",}") == "}":
                return

    def require_end(self) -> None:
        if self.peek():
            raise self.fail("more text follows the end of the rows", self.at)
