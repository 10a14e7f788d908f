"""Numbers as answers write them, with a unit."""

import math
import re
import unicodedata
from fractions import Fraction


LONGEST = 300  # characters of an answer

# One way to write each thing.

_SIGNS = str.maketrans({
    "−": "-", "–": "-", "⁻": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "∞": r"\infty ",
    "°": r"^\circ ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∈": r"\in ", "∪": r"\cup ", "±": r"\pm ",
    "∓": r"\mp ", "≡": r"\equiv ", "∅": r"\emptyset ", "’": "'",
})  # fmt: skip
END = r"(?![A-Za-z])"
# Before Unicode's own normal form forgets what they are.
_RAISED = (
    (r"[⁰¹²³⁴-⁻ⁿ]+", r"^{\g<0>}"),
    (r"[₀-₉]+", r"_{\g<0>}"),
    (r"√\s*(?:\(([^()]*)\)|(\d+|\w))", r"\\sqrt{\1\2}"),
    (r"[¼-¾⅐-⅞]", r" \g<0> "),
    (r"[α-ω]", lambda match: "\\" + unicodedata.name(match[0]).split()[-1].lower().replace("lamda", "lambda") + " "),
)
_SAME = tuple((re.compile(pattern), replacement) for pattern, replacement in (
    (r"(\d+)⁄(\d+)", r"\\frac{\1}{\2}"),
    (rf"\\(?:left|right|[bB]igg?[lr]?|displaystyle){END}|\\!", ""),
    (r"(?<=\d)(?:,?\\[,;: ]|\{,\})(?=\d{3})", ""),
    (rf"\\(le|ge|ne)q{END}", r"\\\1"),
    (rf"\\([lg]t){END}", lambda match: "<" if match[1] == "lt" else ">"),
    (rf"\\(?:c?dots|dotsc){END}|\.\.\.+", r"\\ldots "),
    (r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree", " degrees "),
    (r"\\%", "%"),
    (r"\\\$|(?<!\\)\$(?=\s*\d[\d,.]*(?:[^$]*$))", " dollars "),
    (r"\\(?:text\w*|math(?:bb|bf|it|rm|sf)|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 "),
    (rf"(?<!\\)\\[,;: ]|~|\\q?quad{END}|\\[()\[\]](?!\s*\d+pt)|\$|\*\*|__", " "),
    (r"(?<![\d.,])(\d{1,3}(?: \d{3})+)(?![\d,])", lambda match: match[1].replace(" ", "")),
    (r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))", r"\\frac{\1\2}{\3\4}"),
    (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"),
    (r"\\begin\{[pbB]?matrix\}(.*?)\\end\{[pbB]?matrix\}",
     lambda match: "({})".format(match[1].strip().removesuffix(r"\\").replace("&", ",").replace(r"\\", ";"))),
    (r"\s+", " "),
))  # fmt: skip


def plain(text: str) -> str:
    """A text in LaTeX without what changes no value: spaces, sizes of brackets, fonts, signs of Unicode."""
    for pattern, replacement in _RAISED:
        text = re.sub(pattern, replacement, text)
    text = unicodedata.normalize("NFKC", text.translate(_SIGNS))
    for pattern, replacement in _SAME:
        text = pattern.sub(replacement, text)
    return re.sub(r"(?<!\.)\.$", "", text.strip("*_` \n")).strip("*_` \n")


# Numbers, with a unit.

_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
_SHORT = (
    (rf"\\frac ?\{{ ?([+-]?{_DIGITS}) ?\}} ?\{{ ?([+-]?{_DIGITS}) ?\}}", r" \1/\2"),
    (r"(?<![\d.,])10 ?\^ ?\{? ?([+-]?\d{1,3}) ?\}?", r"1e\1"),
    (r" ?(?:\\times|\\cdot|\*) ?1e", "e"),
)
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12, "percent": -2, "per cent": -2}
_QUANTITY = re.compile(
    rf"\s*([+-]?)\s*(?:(\d+) +(?=\d+ ?/))?([+-]?{_DIGITS})(?:e([+-]?\d{{1,3}}))?(?: ?/ ?([+-]?{_DIGITS}))?"
    rf"(?: ?(?:({'|'.join(_SCALES)})\b|(%)))?(.*)",
    re.IGNORECASE,
)
_NAMES = dict(pair.split(":") for pair in (
    "mm:millimeter cm:centimeter m:meter km:kilometer ft:foot feet:foot in:inch inche:inch mi:mile yd:yard "
    "mg:milligram g:gram kg:kilogram lb:pound oz:ounce l:liter L:liter ml:milliliter mL:milliliter s:second "
    "sec:second min:minute h:hour hr:hour deg:degree rad:radian mph:mile/hour kmh:kilometer/hour Hz:hertz J:joule "
    "N:newton Pa:pascal V:volt W:watt €:euro £:sterling people:people children:children men:men women:women "
    "fish:fish yen:yen"
).split())  # fmt: skip
# Words behind a number that change its value, or say that it is not the answer.
_NO_UNIT = re.compile(
    r"\b(?:(?:hundred|thousand|\w*illion|lakh|crore|dozen|score|ten|half|third|quarter)s?|halves|gross|basis|"
    r"per\s?cent(?:s|ages?)?|(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|\w+teen|\w+tie|hundred|thousand|\w*illion)"
    r"ths?|and|are|as|but|by|equals|fewer|has|if|is|its|less|minus|mod|modulo|more|no|not|or|out|over|plus|than|this|"
    r"times(?=\s)|to|unless|was|were)\b",
    re.IGNORECASE,
)
_LEFT = re.compile(r"(?:^| )(?:left|altogether|in total|in all|total|each|overall)$")
_PART = re.compile(
    r"(?:(sq(?:uare)?|cu(?:bic)?)\.? )?([A-Za-z]+\.? )??([A-Za-z]+|[€£])( of [a-z]+| celsius| fahrenheit| [CF])?"
    r"(?: ?\^ ?\{? ?([23]) ?\}?)?"
)

EQUALS = re.compile(rf"(?<![<>!])=|\\equiv{END}")
SUBSCRIPTS = re.compile(r"_\{[^{}]*\}|_\w|(?<=[A-Za-z'}])\([^()]*\)")
_NO_NAME = re.compile(rf"\d|\\(?:sqrt|pi|infty|not|ne|[lg]e){END}|[<>!]|^\s*[-+]")


def number(text: str) -> Fraction | None:
    """
    The number that a text writes down: an integer, a decimal, a quotient, a mixed number or in powers of ten, with a
    unit (`42 cm^2`, `42 square feet`) or a name (`AB = 12`). `42 dozen eggs`, `42 or more` and expressions are none.
    """
    if len(text) > LONGEST:
        return None
    name, *values = EQUALS.split(plain(text))
    if len(values) > 1 or (values and not is_name(name)):
        return None
    found = quantity((values or [name])[0])
    return None if found is None else found[0]


def quantity(text: str) -> tuple[Fraction, str] | None:
    """Value and unit of a number in plain form."""
    text = re.sub(r"^\s*\{([^{}]*)\}\s*$", r"\1", text).strip()
    if currency := re.match(r"([+-]?) ?(dollars|[€£]) ?", text):
        text = currency[1] + text[currency.end() :]
    if match := re.fullmatch(r"(\d{1,4})!", text):
        return Fraction(math.factorial(int(match[1]))), ""
    for pattern, replacement in _SHORT:
        text = re.sub(pattern, replacement, text)
    match = _QUANTITY.fullmatch(text)
    if match is None:
        return None
    sign, whole, *parts, exponent, bottom, scale, percent, unit = match.groups()
    top, bottom = (Fraction(part.replace(",", "")) for part in (parts[0], bottom or "1"))
    if bottom == 0 or (sign and top < 0) or (whole and not 0 <= top < bottom):
        return None
    power = int(exponent or 0) + (-2 if percent else _SCALES.get((scale or "").lower(), 0))
    value = (int(whole or 0) + top / bottom) * Fraction(10) ** power * (-1 if sign == "-" else 1)
    spaced = unit[:1] in ("", " ") or re.match(rf"(?:[ckm]m|kg){END}", unit)
    name = unit_name(unit, singular=abs(value) <= 1) if spaced else None
    return None if name is None else (value, unit_name(currency[2]) if currency else name)


def unit_name(text: str, singular: bool = False) -> str | None:
    """A unit in one way of writing, empty for no unit; `None` for words that are none."""
    text, names = _LEFT.sub("", text.strip()), []
    if not text or _NO_UNIT.search(text):
        return None if text else ""
    for part in re.split(" ?/ ?| per | an? ", text):
        match = _PART.fullmatch(part)
        if match is None:
            return None
        power, kind, noun, of, exponent = match.groups("")
        name = _NAMES.get(noun)
        if name is None or (kind and name != noun):
            noun = re.sub("(met|lit)re", r"\1er", noun.lower())
            if not noun.endswith("s") and (len(noun) < 2 or not (singular or names)):
                return None
            noun = noun.removesuffix("s")
            name = _NAMES.get(noun, noun)
        exponent = exponent or {"sq": "2", "cu": "3"}.get(power[:2], "")
        names.append(f"{kind}{name}{of}" + (f"^{exponent}" if exponent else ""))
    return "/".join(names)


def is_name(text: str) -> bool:
    """Whether the left side of an equation names a quantity: variables, and no number but in indices and arguments."""
    text = SUBSCRIPTS.sub("", text)
    return re.search(r"[^\W\d_]", text) is not None and _NO_NAME.search(text) is None
