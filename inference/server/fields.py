"""Reads the fields of a JSON object from a client, of whom nothing is believed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from inference.server.errors import ApiError, wrong


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object that body is. Raises ApiError for anything else, NaN and deep nesting among it."""

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        found = json.loads(body, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:  # of wrong UTF-8 as well
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(found, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return found


class Fields:
    """Takes fields one by one, so that in the end it is known which ones nobody read. null is as good as absent."""

    def __init__(self, fields: dict[str, Any], *, inside: str = "") -> None:
        """inside: the field that this object is the value of, for messages."""
        self._left = {name: value for name, value in fields.items() if value is not None}
        self._inside = f"{inside}." if inside else ""

    def any(self, name: str) -> Any:
        """A value of any type; None: absent."""
        return self._left.pop(name, None)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.any(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "must be true or false")
        return value

    def integer(self, name: str, default: Any, *, least: int, most: int) -> Any:
        value = self.any(name)
        if value is None:
            return default
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(name, f"must be a whole number from {least} to {most}")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.any(name)
        if value is None:
            return default
        if type(value) not in (int, float) or abs(value) > 1e30:
            raise self.wrong(name, "must be a number")
        return float(value)

    def text(self, name: str, *, longest: int) -> str | None:
        value = self.any(name)
        if value is None:
            return None
        if not is_text(value) or len(value) > longest:
            raise self.wrong(name, f"must be a string of at most {longest} characters")
        return value

    def texts(self, name: str, *, most: int, longest: int) -> list[str]:
        """A list of strings, none of them empty."""
        value = self.any(name)
        if value is None:
            return []
        good = isinstance(value, list) and len(value) <= most
        if not good or not all(is_text(text) and 0 < len(text) <= longest for text in value):
            raise self.wrong(name, f"must be at most {most} strings of 1 to {longest} characters")
        return list(value)

    def object(self, name: str) -> dict[str, Any] | None:
        value = self.any(name)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(name, "must be an object")
        return value

    def only(self, name: str, *neutral: Any) -> None:
        """A field of OpenAI's that is not served: only values that change nothing are let through."""
        value = self.any(name)
        if value is not None and value not in neutral:
            raise self.wrong(name, "is not supported by this server with this value; leave it out")

    def ignore(self, names: Sequence[str]) -> None:
        """Fields that say something about the request and ask for nothing."""
        for name in names:
            self._left.pop(name, None)

    def finish(self) -> None:
        """Raises ApiError for fields that nobody read."""
        if self._left:
            name = next(iter(self._left))
            raise self.wrong(name, "is not a field of this request")

    def wrong(self, name: str, rule: str) -> ApiError:
        shown = f"{self._inside}{name}"[:100]
        return wrong(shown, f"{shown} {rule}")


def is_text(value: object) -> bool:
    """Whether it is a string of characters, without halves of surrogate pairs."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
