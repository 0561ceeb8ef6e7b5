r"""Final answers of mathematics: found in a text, and compared as numbers where they are numbers.

Nothing is evaluated: what a model writes is parsed as one exact rational number (integers, decimals, thousands
separators, percentages, a/b, \frac{a}{b}, scientific notation), or else compared as normalised text.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s*/\s*\d+)?%?")
_MARK = re.compile(r"####\s*([^\n]+)")
_PLAIN = re.compile(r"([+-]?)(\d*)(?:\.(\d+))?(?:[eE]([+-]?\d{1,3}))?")
_FRACTION = re.compile(r"([+-]?)\\[dt]?frac\{?([^{}]+?)\}?\{([^{}]+)\}|([+-]?)\\[dt]?frac(\d)(\d)")
_DROPPED = re.compile(
    r"\\(?:left|right|!|,|;|:|\s)|\\text\{[^{}]*\}|\\(?:mathrm|textbf)\{[^{}]*\}|[$\s]|\\%|%|\^\\circ"
)
_LONGEST = 200
"""Characters of an answer that is parsed: beyond them it is compared as text."""


def final_answer(text: str) -> str | None:
    r"""The answer that a text ends in: its last \boxed{...}, else behind the last ####, else its last number."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    if marked := _MARK.findall(text):
        return marked[-1].strip()
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def same_answer(found: str, expected: str) -> bool:
    """Whether two answers are the same number or, where either is none, the same text."""
    numbers = number_of(found), number_of(expected)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return _normalized(found) == _normalized(expected)


def number_of(text: str) -> Fraction | None:
    """The exact rational number that a text is; None: it is none. 50% is 1/2, as it is where a text says 0.5."""
    text = text.strip().rstrip(".")
    if not text or len(text) > _LONGEST:
        return None
    percent = text.rstrip("$ ").endswith("%")
    plain = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", _DROPPED.sub("", text))
    value = _fraction(plain)
    return None if value is None else value / 100 if percent else value


def _fraction(text: str) -> Fraction | None:
    if latex := _FRACTION.fullmatch(text):
        sign, above, below = latex.group(1, 2, 3) if latex.group(2) else latex.group(4, 5, 6)
        return _quotient(sign + above, below)
    if text.count("/") == 1:
        return _quotient(*text.split("/"))
    return _decimal(text)


def _quotient(above: str, below: str) -> Fraction | None:
    numerator, denominator = _decimal(above), _decimal(below)
    if numerator is None or denominator is None or denominator == 0:
        return None
    return numerator / denominator


def _decimal(text: str) -> Fraction | None:
    found = _PLAIN.fullmatch(text)
    if found is None or not (found.group(2) or found.group(3)):
        return None
    sign, whole, part, power = found.groups()
    value = Fraction(int((whole or "0") + (part or "")), 10 ** len(part or ""))
    return (-value if sign == "-" else value) * Fraction(10) ** int(power or 0)


def plain(text: str) -> str:
    """A text with one blank where it has any, and none at its ends; composed characters (NFC)."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def _normalized(text: str) -> str:
    return _DROPPED.sub("", text.strip().rstrip(".")).lower()


def _last_boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...} whose braces close."""
    begin = len(text)
    while (begin := text.rfind("\\boxed{", 0, begin)) >= 0:
        depth = 0
        for place in range(begin + len("\\boxed"), len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[begin + len("\\boxed{") : place].strip()
    return None
