"""Reward `math`: the final answer, compared by value."""

import re
import unicodedata
from fractions import Fraction
from typing import Any

from .math_expressions import Expressions
from .text import answer_text


_LONGEST = 300  # characters of an answer
_expressions = Expressions()


class MathReward:
    """
    1 if the final answer has the value of the expected one, 0 otherwise.

    The final answer is the content of the last `\\boxed{}` (of several in a row, all), what follows the last
    `####`, "answer is" or "answer:", or the number that the last line is or ends in, after "=", ":", "is" and so on.

    Where a number is expected, a number must be given, see [`number`]: an expression that has the value, such as the
    one in the problem, is not an answer. Words and units count: `5 million` is 5000000 and not 5, `3 cm` is not
    `3 m`, though a unit may be left out. Order counts in tuples, intervals, sequences and named values
    (`x = 1, y = 2`), not in sets and lists. Formulas are read by the parser of math-verify and compared at points, to
    twenty digits, or exactly where they are rational.

    Args:
        thinking (`bool`, *optional*, defaults to `False`):
            Whether the model thinks before it answers: only what follows `</think>` counts.
    """

    __name__ = "math_reward"

    def __init__(self, thinking: bool = False):
        self.thinking = thinking

    def __call__(self, completions: list, answer: list[str], **kwargs: Any) -> list[float]:
        """
        Rewards of completions.

        Args:
            completions (`list`):
                Completions, plain or conversational.
            answer (`list[str]`):
                Expected answers.

        Returns:
            `list[float]`: One reward per completion.
        """
        return [
            float(same_answer(final_answer(answer_text(completion, self.thinking)), str(expected)))
            for completion, expected in zip(completions, answer, strict=True)
        ]


math_reward = MathReward()

# Where a final answer stands, and where it ends.

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BETWEEN = re.compile(r"[\s$,;.()\[\]\\]*(?:\b(?:and|or)\b)?[\s$,;.()\[\]\\]*(?:[A-Za-z]\w{0,3}\s*=\s*)?\$?")
_STATED = re.compile(r"####\s*([^\n]+)|answer[\s*_]{0,9}(?:is\b\s*:?|:|=)\s*([^\n]+)", re.IGNORECASE)
_CONCLUDES = re.compile(
    r"(?<![<>!])=|:|\\equiv\b|\b(?:is|are|equals|ha[sd]|have|gets?|gives|makes?|needs?|leaves|totals)\b:?(?:\s(?:therefore|thus|hence|then|only|exactly|just|now)\b)?"
    r"|^\W*(?:hence|thus|therefore|so|then|finally|total)\b(?:[^\d=:\\]*\s(?=[\d-]|dollars))?[,:]?",
    re.IGNORECASE,
)
_CLAUSE = re.compile(
    r"[.?;](?=[*_\"')]*\s|[*_\"')]*$)|,\s+(?=(?:which|since|because|so|as|where|the|she|he|it|they|that|when|with|for)\b)"
    r"|\s(?=(?:because|since|which)\b)|\s(?=[-–—]\s[a-z]{2})|\s(?=\([^()]*[a-z]{2}[^()]*\)\W*$)"
)
_HEDGE = re.compile(r"\W*(?:or|no|not|wait|but|maybe|perhaps|possibly|actually|hmm|instead|alternatively)\b", re.I)
_FACTOR = re.compile(r"\d\s?[a-z]\s*$")
_DENIED = re.compile(r"\b(?:not|never|wrong|false|if|unless)\b|n['’]t\b", re.IGNORECASE)


def final_answer(text: str | None) -> str | None:
    """
    The final answer that a text states.

    Args:
        text (`str`, *optional*):
            What a model said after its thoughts.

    Returns:
        `str`: The answer; `None` if there is none.
    """
    if not text:
        return None
    if boxes := list(_BOX.finditer(text))[-9:]:
        found = [_boxed(text, box.end()) for box in boxes]
        answers = found[-1:]
        for (content, end), later in zip(found[-2::-1], boxes[:0:-1], strict=True):
            if (
                content is None
                or not _BETWEEN.fullmatch(text[end : min(later.start(), end + 40)])
                or later.start() > end + 40
            ):
                break
            answers.insert(0, (content, end))
        contents = [content for content, _ in answers]
        return None if None in contents else ", ".join(contents)
    text = text[-2000:]
    if stated := list(_STATED.finditer(text)):
        return _without_clause(stated[-1][1] or stated[-1][2])
    line = text.strip().rsplit("\n", 1)[-1]
    for part in filter(None, (line, _without_clause(line))):
        part = _plain(part)
        last = _CONCLUDES.split(part)[-1]
        if number(last) is not None:
            before = _CONCLUDES.sub(lambda match: match[0].rstrip("=:"), part[: len(part) - len(last)])
            denied = _DENIED.search(re.split(r"[,.;:]", before)[-1]) or _FACTOR.search(before)
            return None if denied else last.strip()
    return None


def _boxed(text: str, begin: int) -> tuple[str | None, int]:
    depth = 1
    for end in range(begin, min(len(text), begin + _LONGEST + 1)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[begin:end].strip(), end + 1
    return None, begin


def _without_clause(text: str) -> str | None:
    """The beginning of a statement, up to a clause that goes on; `None` if that takes it back."""
    clause = _CLAUSE.search(text)
    if clause is None:
        return text.strip()
    return None if _HEDGE.match(text[clause.end() :]) else text[: clause.start()].strip()


# One way to write each thing.

_SIGNS = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ",
    "°": r"^\circ ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∈": r"\in ", "∪": r"\cup ", "±": r"\pm ", "∓": r"\mp ",
    "≡": r"\equiv ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "…": r"\ldots ", "α": r"\alpha ", "β": r"\beta ",
    "θ": r"\theta ", "λ": r"\lambda ", "μ": r"\mu ", "φ": r"\varphi ", "ω": r"\omega ", "’": "'",
}  # fmt: skip
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n", strict=True))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
_SAME = (
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits)(?![A-Za-z])", ""),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\(le|ge|ne)q(?![A-Za-z])", r"\\\1"),
    (r"\\(?:c?dots|dotsc|dotsb)(?![A-Za-z])|\.\.\.+", r"\\ldots "),
    (r"\\lt(?![A-Za-z])", "<"),
    (r"\\gt(?![A-Za-z])", ">"),
    (r"\\(?:varnothing)", r"\\emptyset "),
    (r"\\[lr]brace(?![A-Za-z])", lambda match: "\\{" if match[0] == "\\lbrace" else "\\}"),
    (r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree", " degrees "),
    (r"\\%", "%"),
    (r"\\\$|(?<!\\)\$(?=\s*\d[\d,.]*(?:[^$]*$))", " dollars "),
    (r"\\text\w*\s*\{([^{}]*)\}|\\(?:math(?:bf|it|rm|sf)|mbox|operatorname)\s*\{([^{}]*)\}", r" \1\2 "),
    (r"\\!|(?<=\d)(?:\{,\}|\\[,;: ]|,\\!)(?=\d{3})", ""),
    (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![A-Za-z])|\\[()\[\]](?!\s*\d+pt)|\$|\*\*|__", " "),
    (r"(?<![\d.,])(\d{1,3}(?: \d{3})+)(?![\d,])", lambda match: match[1].replace(" ", "")),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
    (r"(\\frac\{[^{}]*\})\s*(\d)", r"\1{\2}"),
    (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"),
    (r"\\(max|min|gcd|lcm)\s*\\\{([^{}]*)\\\}", r"\\\1(\2)"),
    (r"\^\s*\{?\s*(st|nd|rd|th)\b\s*\}?", r"\1"),
    (r"([\^_])\s*\{\s*(\w)\s*\}", r"\1\2"),
    (r"\s+", " "),
)


def _plain(text: str) -> str:
    """A text in LaTeX without what changes no value: spaces, sizes of brackets, fonts, signs of Unicode."""
    text = "".join(_SIGNS.get(sign, sign) for sign in text)
    text = re.sub(f"[{''.join(_RAISED)}]+", lambda match: f"^{{{''.join(map(_RAISED.get, match[0]))}}}", text)
    text = re.sub(f"[{''.join(_LOWERED)}]+", lambda match: f"_{{{''.join(map(_LOWERED.get, match[0]))}}}", text)
    text = re.sub(r"√\s*(?:\(([^()]*)\)|(\d+|\w))", r"\\sqrt{\1\2}", text)
    text = re.sub("[¼-¾⅐-⅞]", lambda match: " " + unicodedata.normalize("NFKC", match[0]) + " ", text)
    text = re.sub(r"(\d+)⁄(\d+)", r"\\frac{\1}{\2}", unicodedata.normalize("NFKC", text))
    for pattern, replacement in _SAME:
        text = re.sub(pattern, replacement, text)
    return re.sub(r"(?<!\.)\.$", "", text.strip("*_` \n")).strip("*_` \n")


# Numbers, with a unit.

_NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
_TEN = r"10\s*\^\s*\{?\s*([+-]?\d{1,3})\s*\}?"
_SCIENTIFIC = re.compile(rf"([+-]?)\s*(?:{_TEN}|({_NUMBER})(?:e([+-]?\d{{1,3}})|\s*(?:\\times|\\cdot|\*)\s*{_TEN})?)")
_PART = rf"\s*\{{\s*([+-]?(?:{_NUMBER}))\s*\}}"
_QUOTIENT = re.compile(rf"([+-]?)\s*(?:(\d+)(?:\s+|(?=\\)))?(?:\\frac{_PART}{_PART}|({_NUMBER})\s*/\s*({_NUMBER}))")
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE = re.compile(rf"\s*(?:({'|'.join(_SCALES)})\b|(%|percent\b|per cent\b)(?!age))", re.IGNORECASE)
# Words behind a number that change its value, or say that it is not the answer.
_NO_UNIT = (
    r"\b(?:(?:hundred|thousand|\w*illion|lakh|crore|dozen|score|ten|half|third|quarter)s?|halves|gross|basis|"
    r"per\s?cent(?:s|ages?)?|(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|\w+teen|\w+tie|hundred|thousand|\w*illion)"
    r"ths?|and|are|as|but|by|equals|fewer|has|if|is|its|less|minus|mod|modulo|more|no|not|or|out|over|plus|than|this|"
    r"times(?=\s)|to|unless|was|were)\b"
)
_PLURAL = r"[a-z]+s|[a-z]*(?:people|children|men|feet|mice|geese|teeth|fish|sheep)|yen|yuan"
_SQUARED = r"(?:\s?\^\s?\{?\s?[23]\s?\}?)?"
_SYMBOL = (
    r"(?:[cdkmµμ]?m|[kmµμ]?g|[cdm]?[lL]|m?s|k?(?:Hz|J|N|Pa|V|W)|deg|ft|h|hrs?|in|kmh|lbs?|mi|min|mph|oz|rad|sec|yd)"
    + _SQUARED
)
_BEHIND = (
    r"(?:\s(?:per|of|a)\s[a-z]+|\s(?:in\s(?:total|all)|left|altogether|total|each|overall|celsius|fahrenheit|[CF]))*"
)
_NOUN = rf"(?i:(?!.*{_NO_UNIT})(?:[a-z]+\.?\s)?(?:%s){_SQUARED}){_BEHIND}"
_LEFT = "left|altogether|in total|in all|total|each|overall"
_UNIT = re.compile(rf"(?:(?:cu|sq)\.?\s)?{_SYMBOL}(?:\s?/\s?{_SYMBOL})?|{_NOUN % _PLURAL}|{_LEFT}")
_UNIT_OF_ONE = re.compile(_NOUN % "[a-z]{2,}")
_ALIASES = (
    (r"\b(?:in total|in all|left|altogether|total|each|overall)\b", ""),
    (r"\b(?:square|sq\.?)\s+(\S+)", r"\1^2"),
    (r"\b(?:cubic|cu\.?)\s+(\S+)", r"\1^3"),
    (r"\s*\^\s*\{?\s*([23])\s*\}?", r"^\1"),
    (r"\s*/\s*|\s+per\s+|\s+an?\s+(?=hour|day|week|month|year|minute|second)", "/"),
    (r"metre", "meter"),
    (r"litre", "liter"),
    (r"\bfeet\b", "ft"),
    (r"\binch(?:es)?\b", "in"),
    *((rf"\b{pair.split(':')[0]}\b", pair.split(":")[1]) for pair in (
        "mm:millimeter cm:centimeter m:meter km:kilometer foot:ft mi:mile mg:milligram g:gram kg:kilogram l:liter "
        "ml:milliliter s:second sec:second min:minute h:hour hrs?:hour deg:degree kmh:kilometer/hour mph:mile/hour "
        "rad:radian oz:ounce lbs?:pound yd:yard in:inche"
    ).split()),
    (r"s\b", ""),
)  # fmt: skip


def number(text: str) -> Fraction | None:
    """
    The number that a text writes down: an integer, a decimal, a quotient, a mixed number or in powers of ten.

    A unit may follow: a symbol (`cm^2`, `km/h`, `^\\circ`), or a plural noun (`42 apples`, `42 square feet`; a
    singular up to one). `42 million` and `42%` have values of their own; `42 dozen eggs` and `42 or more` are none.

    Args:
        text (`str`):
            The text. A name and "=" may precede, as in `AB = 12`.

    Returns:
        `Fraction`: Its value; `None` if it is anything else, an expression that has a value included.
    """
    if len(text) > _LONGEST:
        return None
    name, *values = _EQUALS.split(_plain(text))
    if len(values) > 1 or (values and not _is_name(name)):
        return None
    found = _quantity((values or [name])[0])
    return None if found is None else found[0]


def _quantity(text: str) -> tuple[Fraction, str] | None:
    """Value and unit of a number in plain form."""
    text = re.sub(r"^\{([^{}]*)\}$", r"\1", text.strip()).strip()
    currency, text = (
        ("dollar", re.sub(r"^([+-]?) ?dollars ", r"\1", text)) if re.match(r"[+-]? ?dollars ", text) else ("", text)
    )
    if re.match(r"[+-]?\s*[€£]", text):
        currency, text = {"€": "euro", "£": "pound"}[text.lstrip("+- ")[0]], re.sub(r"[€£]\s*", "", text)
    for pattern in (_QUOTIENT, _SCIENTIFIC):
        match = pattern.match(text)
        value = match and _value(match)
        if value is None:
            continue
        rest = text[match.end() :]
        if scale := _SCALE.match(rest):
            value = value * 10 ** _SCALES[scale[1].lower()] if scale[1] else value / 100
            rest = rest[scale.end() :]
        unit = rest.strip()
        spaced = not unit or rest[:1] == " " or re.match(r"(?:[ckm]m|kg)(?![a-z])", unit)
        if spaced and (not unit or _UNIT.fullmatch(unit) or (abs(value) <= 1 and _UNIT_OF_ONE.fullmatch(unit))):
            return value, currency or _unit(unit)
    return None


def _unit(text: str) -> str:
    for pattern, replacement in _ALIASES:
        text = re.sub(pattern, replacement, text.strip().casefold())
    return text.strip()


def _value(match: re.Match) -> Fraction | None:
    sign, *parts = match.groups()
    factor = -1 if sign == "-" else 1
    if match.re is _SCIENTIFIC:
        ten, digits, *exponents = parts
        exponent = ten or next(filter(None, exponents), "0")
        return factor * Fraction((digits or "1").replace(",", "")) * Fraction(10) ** int(exponent)
    whole, *parts = parts
    top, bottom = (Fraction(part.replace(",", "")) for part in parts if part is not None)
    if bottom == 0 or (whole and not 0 <= top < bottom):
        return None
    return factor * (int(whole or 0) + top / bottom)


# The form of an answer: numbers and formulas, in brackets, lists, equations and relations.

_EQUALS = re.compile(r"(?<![<>!])=|\\equiv(?![A-Za-z])")
_RELATION = re.compile(r"(<|>|\\(?:le|ge|ne|in)(?![A-Za-z]))")
_SUBSCRIPTS = re.compile(r"_\{[^{}]*\}|_\w|(?<=[A-Za-z'}])\([^()]*\)")
_NO_NAME = re.compile(r"\d|\\(?:sqrt|pi|infty|not|ne|[lg]e)(?![A-Za-z])|[<>!]|^\s*[-+]")
_MODULUS = re.compile(r"^(.*?)\(?\s*\\?[pb]?mod(?:ulo)?\s*\{?\s*([^{}()]+?)\s*\}?\s*\)?$")
_MATRIX = re.compile(r"^\\begin\{([pbBvV]?matrix)\}(.*)\\end\{\1\}$")
_FUNCTIONS = "sin|cos|tan|cot|sec|csc|log|ln|exp|max|min|gcd|lcm|mod|deg|det|arcsin|arccos|arctan|sinh|cosh|tanh|lim"
_WORD = re.compile(
    rf"(?<![\\A-Za-z])(?!(?:{_FUNCTIONS})\b)(?:[A-Za-z]{{3,}}|[aApP]\.?[mM]\.?|cm|mm|km|kg|mg|ml|ft|[Nn]o|in|of|to|is)(?![A-Za-z])"
)


# Primes, bases, times, names of points; towers of powers.
_NO_FORMULA = re.compile(
    r"'|\d\s*_|\d:\d\d(?!\d)|(?<![A-Za-z\\])[A-Z]{2,}(?![A-Za-z])|\\ldots|&|\?|\^\{?\d+\^\{?\d+\^|\d{5,}\s*!|\^\{?\d{7,}"
)


def same_answer(given: str | None, expected: str) -> bool:
    """Whether an answer says what is expected."""
    if not given or len(given) > _LONGEST:
        return False
    given, expected = _plain(given), _plain(expected)
    if _bare(given) == _bare(expected):
        return bool(_bare(given))
    readings = [_read(expected)]
    if re.search(r"\d,\d{3}\b", expected + given):  # a thousand, or a list
        readings.append(_read(expected.replace(",", ", ")))
        return any(_same(form, _read(text)) for form in readings for text in (given, given.replace(",", ", ")))
    return _same(readings[0], _read(given))


def _bare(text: str) -> str:
    return re.sub(r"(?<!\d)\s|\s(?!\d)", "", text)


def _is_name(text: str) -> bool:
    """Whether the left side of an equation names a quantity: variables, and no number but in indices and arguments."""
    text = _SUBSCRIPTS.sub("", text)
    return re.search(r"[^\W\d_]", text) is not None and _NO_NAME.search(text) is None


def _split(text: str, separator: re.Pattern) -> list[str]:
    """Parts between separators that stand in no brackets."""
    depth, depths = 0, []
    for sign in text:
        depth -= sign in ")]}"
        depths.append(depth)
        depth += sign in "([{"
    parts, start = [], 0
    for match in separator.finditer(text):
        if depths[match.start()] == 0:
            parts.append(text[start : match.start()])
            start = match.end()
    return [part.strip() for part in (*parts, text[start:])]


def _read(text: str) -> tuple:
    """The form of an answer: its kind, and its parts."""
    text = text.strip()
    if match := _MODULUS.match(text):
        return "modulus", _read(match[1]), _read(match[2])
    if match := _MATRIX.match(text):
        rows = [
            [_read(entry) for entry in row.split("&")]
            for row in re.split(r"\\\\", match[2].strip().removesuffix("\\\\"))
        ]
        if match[1][0] in "vV":
            return "leaf", text
        return ("ordered", [row[0] for row in rows]) if all(len(row) == 1 for row in rows) else ("matrix", rows)
    for separator, kind in (
        (r"\\cup(?![A-Za-z])", "union"),
        (r"(?<!\d),(?!\d{3}\b)|(?<=\d),(?!\d{3}(?!\d))|;|\b(?:and|or)\b", "list"),
    ):
        parts = [part for part in _split(text, re.compile(separator)) if part]
        if len(parts) > 1:
            return _list(parts, kind)
    sides = _split(text, _EQUALS)
    if len(sides) > 1:
        return "equation", sides
    chain = _split(text, _RELATION) if len(_split(text, _RELATION)) > 1 else []
    if chain:
        return _relation(chain, [match[1] for match in _RELATION.finditer(text)])
    if match := re.fullmatch(r"(\\\{|\\langle|[(\[])(.*?)(\\\}|\\rangle|[)\]])", text):
        inner = _split(match[2], re.compile(r",|;"))
        if _balanced(match[2]):
            if match[1] == "\\{":
                return ("list", [*map(_read, inner)]) if len(inner) > 1 else _read(match[2])
            if len(inner) > 1:
                brackets = match[1].replace("\\langle", "(") + match[3].replace("\\rangle", ")")
                return "bracket", brackets, [*map(_read, inner)]
            if match[1] == "(":
                return _read(match[2])
            return "bracket", "[]", [_read(match[2])]
    if "\\pm" in text or "\\mp" in text:
        flipped = text.replace("\\pm", "\\-").replace("\\mp", "\\pm").replace("\\-", "\\mp")
        signs = [form.replace("\\pm", "+").replace("\\mp", "-").strip().removeprefix("+") for form in (text, flipped)]
        return "list", [("leaf", form) for form in signs]
    pieces = [piece.strip() for piece in re.split(r"(?<=[A-Za-z.])\s+(?=\d)", text)]
    if len(pieces) > 1 and all(_quantity(piece) for piece in pieces):
        return "list", [("leaf", piece) for piece in pieces]  # 3 hours 20 minutes
    return "leaf", text


def _balanced(text: str) -> bool:
    depth = 0
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        if depth < 0:
            return False
    return depth == 0


def _list(parts: list[str], kind: str) -> tuple:
    if any("\\ldots" in part for part in parts):
        return "ordered", [("leaf", part) for part in parts]
    sides = [_split(part, _EQUALS) for part in parts]
    if all(len(side) == 2 and _is_name(side[0]) for side in sides):
        named = {side[0]: _read(side[1]) for side in sides}
        letters = {_SUBSCRIPTS.sub("", name) for name in named}
        if len(letters) == len(parts):
            return "named", named
        return "list", [_read(side[1]) for side in sides]
    forms = [*map(_read, parts)]
    if kind == "list" and all(form[0] == "range" for form in forms):
        kind = "union"
    return (kind, forms) if kind == "list" else ("union", forms)


def _relation(sides: list[str], signs: list[str]) -> tuple:
    if signs == ["\\in"]:
        form = _read(sides[1])
        return ("range", *form[1:]) if form[0] == "bracket" else form
    if len(sides) == 2 and _is_name(sides[1]) and not _is_name(sides[0]):
        sides, signs = sides[::-1], [{"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}.get(signs[0], signs[0])]
    if len(sides) == 2 and _is_name(sides[0]) and signs[0] != "\\ne":
        infinite = ("leaf", "\\infty"), ("leaf", "-\\infty")
        if signs[0] in (">", "\\ge"):
            return "range", "[)" if signs[0] == "\\ge" else "()", [_read(sides[1]), infinite[0]]
        return "range", "(]" if signs[0] == "\\le" else "()", [infinite[1], _read(sides[1])]
    if len(sides) == 3 and _is_name(sides[1]):
        if signs[0] in (">", "\\ge"):
            sides, signs = sides[::-1], [{">": "<", "\\ge": "\\le"}.get(sign, "?") for sign in signs[::-1]]
        if set(signs) <= {"<", "\\le"}:
            brackets = ("[" if signs[0] == "\\le" else "(") + ("]" if signs[1] == "\\le" else ")")
            return "range", brackets, [_read(sides[0]), _read(sides[2])]
    return "relation", signs, [*map(_read, sides)]


def _same(expected: tuple, given: tuple) -> bool:
    kind, other = expected[0], given[0]
    if other == "equation" or kind == "equation":
        return _same_equation(expected, given)
    if {kind, other} <= {"bracket", "range"}:
        return expected[1] == given[1] and _in_order(expected[2], given[2])
    for one, two in ((expected, given), (given, expected)):
        if one[0] == "named":
            values = [one[1][name] for name in sorted(one[1])]
            if two[0] == "named":
                return one[1].keys() == two[1].keys() and all(_same(one[1][name], two[1][name]) for name in one[1])
            ordered = two[0] == "bracket" and two[1] == "()" or two[0] in ("list", "ordered")
            return (
                ordered and _in_order(values, two[-1]) if one is expected else ordered and _in_order(two[-1], values)
            )
        if one[0] == "ordered" and two[0] == "bracket" and two[1] == "()":
            return _in_order(expected[-1], given[-1])
    if kind != other:
        return False
    if kind in ("list", "union"):
        return _in_any_order(expected[1], given[1])
    if kind == "ordered":
        return _in_order(expected[1], given[1])
    if kind == "matrix":
        return len(expected[1]) == len(given[1]) and all(map(_in_order, expected[1], given[1]))
    if kind == "relation":
        return expected[1] == given[1] and _in_order(expected[2], given[2])
    if kind == "modulus":
        return _same(expected[2], given[2]) and _same_residue(expected[1], given[1], expected[2])
    return _same_leaf(expected[1], given[1])


def _in_order(expected: list, given: list) -> bool:
    return len(expected) == len(given) and all(map(_same, expected, given))


def _in_any_order(expected: list, given: list) -> bool:
    left = list(given)
    for form in expected:
        found = next((other for other in left if _same(form, other)), None)
        if found is None:
            return False
        left.remove(found)
    return not left


def _same_equation(expected: tuple, given: tuple) -> bool:
    one, two = (form[1] if form[0] == "equation" else None for form in (expected, given))
    if one is not None and two is not None and len(one) == len(two) == 2:
        names = [side[0].strip() for side in (one, two)]
        named, equal = all(map(_is_name, names)), names[0] == names[1]
        if named and (equal or max(map(len, names)) > 1) and _same(_read(one[1]), _read(two[1])):
            return True
        # `x = 5` is a value, which `2x = 10` does not state and `y = 5` states of something else.
        if (named and equal) or (_quantity(one[1]) and _is_name(one[0]) and not re.search(r"[+-]", one[0])):
            return False
        return _same_formula(*(f"({side[0]})-({side[1]})" for side in (one, two)), equations=True)
    if one is not None:
        return len(one) == 2 and _is_name(one[0]) and _same(_read(one[1]), given if two is None else given)
    *before, last = two
    if not _same(expected, _read(last)):
        return False
    # Every other side of a chain has the value too, but for the name that it may begin with.
    return all(_same(expected, _read(side)) or _same_formula(last, side) for side in before[_is_name(before[0]) :])


def _same_residue(expected: tuple, given: tuple, modulus: tuple) -> bool:
    forms = [
        _read(form[1][-1]) if form[0] == "equation" and _is_name(form[1][0]) else form for form in (expected, given)
    ]
    values = [_quantity(form[1]) if form[0] == "leaf" else None for form in (*forms, modulus)]
    if None in values:
        return _same(*forms)
    (a, _), (b, _), (m, _) = values
    return m != 0 and (a - b) % m == 0


def _same_leaf(expected: str, given: str) -> bool:
    if _bare(expected) == _bare(given):
        return bool(_bare(expected))
    quantity = _quantity(expected)
    if quantity is not None and (_quantity(given) is not None or "^" not in expected):
        found = _quantity(given)
        return (
            found is not None
            and found[0] == quantity[0]
            and (found[1] == quantity[1] or "" in (found[1], quantity[1]))
        )
    words, others = (
        tuple(word.casefold().replace(".", "") for word in _WORD.findall(text)) for text in (expected, given)
    )
    first, second = (_WORD.sub(" ", text).strip() for text in (expected, given))
    if words != others:
        unit = " ".join(words or others)
        if (words and others) or not (_UNIT.fullmatch(unit) or unit == "degrees"):
            return False
    if not first or not second:
        return first == second
    values = _quantity(first), _quantity(second)
    if None not in values:
        return values[0] == values[1]
    return (values[0] is None or "^" in first) and _same_formula(first, second)


def _same_formula(first: str, second: str, equations: bool = False) -> bool:
    """Whether two formulas have the same value, as far as the parser drops nothing and powers are not absurd."""
    if any(_NO_FORMULA.search(text) or not _balanced(text) for text in (first, second)):
        return False
    return _expressions.same(first, second, equations)
