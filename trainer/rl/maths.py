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
_TEXT = r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox)\{([^{}]*)\}"
_UNIT = re.compile(rf"(.*[\d}}.])(?:\s*{_TEXT}(?:\^\{{?\d\}}?)?|\s+([A-Za-z]{{3,}}))")
_NO_UNITS = ("hundred", "thousand", "million", "billion", "trillion", "dozen", "percent", "e", "i")
"""What behind a number changes it."""
_LAYOUT = re.compile(r"\\(?:left|right)(?![a-zA-Z])|\\!|\\?\$")
_SPACE = re.compile(r"\\[,;:\s]|~")
_DEGREES = re.compile(r"(?<=\d)\^\{?\\circ\}?")
_BRACE = re.compile(r"\\boxed\{|[{}]")
_LONGEST = 200
"""Characters of an answer that is parsed: beyond them it is compared as text."""


def final_answer(text: str) -> str | None:
    r"""The answer that a text ends in: its last \boxed{...}, else behind the last ####, else its last number."""
    marked = _marked(text)
    if marked is not None:
        return marked
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def expected_answer(text: str) -> str:
    r"""The answer that a row's column gives: where a solution leads up to it, what is in \boxed{...} or behind ####."""
    return _marked(text) or text


def same_answer(found: str, expected: str) -> bool:
    """Whether two answers are the same number, of the same unit where both have one, or else the same text.

    What is empty is the same as nothing.
    """
    (value, unit), (wanted, other) = _with_unit(found), _with_unit(expected)
    if value is None and wanted is None:
        return "" != _normalized(found) == _normalized(expected)
    return value == wanted and (unit == other or "" in (unit, other))


def number_of(text: str) -> Fraction | None:
    """The exact rational number that a text is, without its unit; None: it is none. 50% is 1/2, as it is where a text
    says 0.5."""
    return _with_unit(text)[0]


def _with_unit(text: str) -> tuple[Fraction | None, str]:
    """(number_of, what it is a number of), the latter empty where nothing is said."""
    text = text.strip().rstrip(".")
    if not text or len(text) > _LONGEST:
        return None, ""
    text, unit = _laid_out(text), ""
    if named := _UNIT.fullmatch(text):
        unit = _normalized(named.group(2) or named.group(3) or "")
        if unit in _NO_UNITS:
            return None, ""
        text = named.group(1)
    percent = text.endswith("%")
    text = re.sub(r"(?<!\d) | (?!\d)", "", _DEGREES.sub("", text)).rstrip("\\%.")
    value = _fraction(re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text))
    return (None, "") if value is None else (value / 100 if percent else value, unit)


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


def _laid_out(text: str) -> str:
    """Without what LaTeX needs for layout alone, and with one blank where there are any. A thin one between thousands
    is none."""
    text = re.sub(r"(?<=\d)(?:\{,\}|\\,)(?=\d{3}(?!\d))", ",", _LAYOUT.sub("", text))
    return " ".join(_SPACE.sub(" ", text).split())


def _normalized(text: str) -> str:
    """For comparison as text: in small letters, of \\text{...} what it says, with blanks only where words or numbers
    would otherwise run into one."""
    text = _DEGREES.sub("", _laid_out(text.strip().rstrip(".")).replace("\\%", "%"))
    for _ in range(2):  # \text{\textbf{...}}
        text = re.sub(_TEXT, r"\1", text)
    text = " ".join(text.split())
    return re.sub(r"(?<!\w) | (?!\w)|(?<=\d) (?=[a-zA-Z])", "", text).lower()


def _marked(text: str) -> str | None:
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    marked = _MARK.findall(text)
    return marked[-1].strip() if marked else None


def _last_boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...} whose braces close. One pass: a model may write very many that do not."""
    opened: list[int | None] = []  # where what they hold begins; None: of other braces
    last, found = -1, None
    for brace in _BRACE.finditer(text):
        if brace.group() != "}":
            opened.append(None if brace.group() == "{" else brace.end())
        elif opened and (begin := opened.pop()) is not None and begin > last:
            last, found = begin, text[begin : brace.start()].strip()
    return found
