"""The form of an answer: numbers and formulas, in brackets, lists, equations and relations."""

import itertools
import re

from .math_expressions import same_value
from .math_numbers import END, EQUALS, LONGEST, SUBSCRIPTS, is_name, plain, quantity, unit_name


_RELATION = re.compile(rf"(<|>|\\(?:le|ge|ne|in){END})")
_FLIPPED = {">": "<", "\\ge": "\\le"}
_SEPARATOR = re.compile(rf"(?<!\d),(?!\d{{3}}\b)|(?<=\d),(?!\d{{3}}(?!\d))|;|\b(?:and|or)\b|\\cup{END}")
_COMMA = re.compile(",|;")
_BRACKETS = re.compile(r"(\\\{|[(\[])(.*?)(\\\}|[)\]])")
_MODULUS = re.compile(r"^(.*?)\(?\s*\\?[pb]?mod(?:ulo)?\s*\{?\s*([^{}()]+?)\s*\}?\s*\)?$")
_FUNCTIONS = "sin|cos|tan|cot|sec|csc|log|ln|exp|max|min|gcd|lcm|mod|deg|det|arcsin|arccos|arctan|sinh|cosh|tanh|lim"
_WORD = re.compile(
    rf"(?<![\\A-Za-z])(?!(?:{_FUNCTIONS})\b)(?:[A-Za-z]{{3,}}|[aApP]\.?[mM]\.?|cm|mm|km|kg|mg|ml|ft|[Nn]o|in|of|to|is){END}"
)
# Primes, bases, times, names of points; towers of powers.
_NO_FORMULA = re.compile(
    r"'|\d\s*_|\d:\d\d(?!\d)|(?<![A-Za-z\\])[A-Z]{2,}(?![A-Za-z])|\\ldots|&|\?|\^\{?\d+\^\{?\d+\^|\d{5,}\s*!|\^\{?\d{7,}"
)


def same_answer(given: str | None, expected: str) -> bool:
    """Whether an answer says what is expected."""
    if not given or len(given) > LONGEST:
        return False
    given, expected = plain(given), plain(expected)
    if _bare(given) == _bare(expected):
        return bool(_bare(given))
    spaced = re.search(r"\d,\d{3}\b", expected + given)  # a thousand, or a list
    readings = [[text, text.replace(",", ", ")] if spaced else [text] for text in (expected, given)]
    return any(_same(_read(one), _read(other)) for one, other in itertools.product(*readings))


def _bare(text: str) -> str:
    return re.sub(r"(?<!\d)\s|\s(?!\d)", "", text)


def _split(text: str, separator: re.Pattern) -> list[str]:
    """Parts between separators that stand in no brackets."""
    depths = list(itertools.accumulate((sign in "([{") - (sign in ")]}") for sign in text))
    parts, start = [], 0
    for match in separator.finditer(text):
        if depths[match.start()] == 0:
            parts.append(text[start : match.start()])
            start = match.end()
    return [part.strip() for part in (*parts, text[start:])]


def _balanced(text: str) -> bool:
    depths = [*itertools.accumulate((sign in "([{") - (sign in ")]}") for sign in text)]
    return min(depths, default=0) >= 0 == (depths or [0])[-1]


def _read(text: str) -> tuple:
    """The form of an answer: its kind, and its parts, those that are compared in order last."""
    text = text.strip()
    if match := _MODULUS.match(text):
        return "bracket", "mod", [_read(match[1]), _read(match[2])]
    parts = [part for part in _split(text, _SEPARATOR) if part]
    if len(parts) > 1:
        return _list(parts)
    sides = _split(text, EQUALS)
    if len(sides) > 1:
        return "equation", sides
    sides = _split(text, _RELATION)
    if len(sides) > 1:
        return _relation(sides, _RELATION.findall(text))
    match = _BRACKETS.fullmatch(text)
    if match and _balanced(match[2]):
        inner = [*map(_read, _split(match[2], _COMMA))]
        if len(inner) == 1 and match[1] != "[":
            return inner[0]
        return ("list", "", inner) if match[1] == "\\{" else ("bracket", match[1] + match[3], inner)
    if "\\pm" in text or "\\mp" in text:
        flipped = text.replace("\\pm", "\\-").replace("\\mp", "\\pm").replace("\\-", "\\mp")
        signs = [form.replace("\\pm", "+").replace("\\mp", "-").strip().removeprefix("+") for form in (text, flipped)]
        return "list", "", [("leaf", form) for form in signs]
    pieces = re.split(r"(?<=[A-Za-z.])\s+(?=\d)", text)
    if len(pieces) > 1 and all(map(quantity, pieces)):
        return "list", "", [("leaf", piece) for piece in pieces]  # 3 hours 20 minutes
    return "leaf", text


def _list(parts: list[str]) -> tuple:
    if any("\\ldots" in part for part in parts):
        return "bracket", "()", [("leaf", part) for part in parts]
    sides = [_split(part, EQUALS) for part in parts]
    if not all(len(side) == 2 and is_name(side[0]) for side in sides):
        return "list", "", [*map(_read, parts)]
    named = {name: _read(value) for name, value in sorted(sides)}
    if len({SUBSCRIPTS.sub("", name) for name in named}) == len(parts):
        return "named", [*named], [*named.values()]
    return "list", "", [_read(value) for _, value in sides]


def _relation(sides: list[str], signs: list[str]) -> tuple:
    if signs == ["\\in"]:
        form = _read(sides[1])
        return ("range", *form[1:]) if form[0] == "bracket" else form
    if signs[0] in _FLIPPED:
        sides, signs = sides[::-1], [_FLIPPED.get(sign, sign) for sign in signs[::-1]]
    if {*signs} <= {*_FLIPPED.values()}:
        if len(sides) == 2 and is_name(sides[0]):
            sides, signs = ["-\\infty", *sides], ["<", *signs]
        elif len(sides) == 2 and is_name(sides[1]):
            sides, signs = [*sides, "\\infty"], [*signs, "<"]
        if len(sides) == 3 and is_name(sides[1]):
            brackets = ("[" if signs[0] == "\\le" else "(") + ("]" if signs[1] == "\\le" else ")")
            return "range", brackets, [_read(sides[0]), _read(sides[2])]
    return "relation", signs, [*map(_read, sides)]


def _same(expected: tuple, given: tuple) -> bool:
    kinds = {expected[0], given[0]}
    if "equation" in kinds:
        return _same_equation(expected, given)
    if kinds == {"leaf"}:
        return _same_leaf(expected[1], given[1])
    if kinds == {"list"}:
        left = list(given[2])
        for form in expected[2]:
            found = next((other for other in left if _same(form, other)), None)
            if found is None:
                return False
            left.remove(found)
        return not left
    if len(kinds) == 2 and "named" in kinds:
        other = given if expected[0] == "named" else expected
        if other[:2] not in (("bracket", "()"), ("list", "")):
            return False
    elif expected[1] != given[1] or (len(kinds) == 2 and kinds != {"bracket", "range"}):
        return False
    return len(expected[2]) == len(given[2]) and all(map(_same, expected[2], given[2]))


def _same_equation(expected: tuple, given: tuple) -> bool:
    one, two = (form[1] if form[0] == "equation" else None for form in (expected, given))
    if one is None:
        *before, last = two
        # Every other side of a chain has the value too, but for the name that it may begin with.
        sides = before[is_name(before[0]) :]
        return _same(expected, _read(last)) and all(
            _same(expected, _read(side)) or _same_formula(last, side) for side in sides
        )
    named = len(one) == 2 and is_name(one[0])
    if two is None or len(two) != 2:
        return named and _same(_read(one[1]), given)
    if len(one) != 2:
        return False
    names = {one[0], two[0]}
    equal = len(names) == 1
    if named and is_name(two[0]) and (equal or max(map(len, names)) > 1) and _same(_read(one[1]), _read(two[1])):
        return True
    # `x = 5` is a value, which `2x = 10` does not state and `y = 5` states of something else.
    if named and (equal or (quantity(one[1]) and not re.search(r"[+-]", one[0]))):
        return False
    return _same_formula(*(f"({side[0]})-({side[1]})" for side in (one, two)), equations=True)


def _same_leaf(expected: str, given: str) -> bool:
    if _bare(expected) == _bare(given):
        return bool(_bare(expected))
    wanted, found = quantity(expected), quantity(given)
    if wanted and found:
        return found[0] == wanted[0] and (found[1] == wanted[1] or "" in (found[1], wanted[1]))
    if wanted and not re.search("[!^]", expected):
        return False
    words, others = (" ".join(_WORD.findall(text)).casefold().replace(".", "") for text in (expected, given))
    if words != others and ((words and others) or unit_name(words or others) is None):
        return False
    first, second = (_WORD.sub(" ", text).strip() for text in (expected, given))
    if not first or not second:
        return first == second
    values = quantity(first), quantity(second)
    if None not in values:
        return values[0] == values[1]
    return (values[0] is None or re.search("[!^]", first) is not None) and _same_formula(first, second)


def _same_formula(first: str, second: str, equations: bool = False) -> bool:
    """Whether two formulas have the same value, as far as the parser drops nothing and powers are not absurd."""
    if any(_NO_FORMULA.search(text) or not _balanced(text) for text in (first, second)):
        return False
    return same_value(first, second, equations)
