"""Numbers as answers write them, with a unit."""

import math
import re
import unicodedata
from fractions import Fraction


LONGEST = 300  # characters of an answer

# One way to write each thing.

_SIGNS = str.maketrans({
    "−": "-", "–": "-", "⁻": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "π": r"\pi ",
    "∞": r"\infty ", "°": r"^\circ ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∈": r"\in ", "∪": r"\cup ",
    "±": r"\pm ", "∓": r"\mp ", "≡": r"\equiv ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "…": r"\ldots ", "’": "'",
    "α": r"\alpha ", "β": r"\beta ", "θ": r"\theta ", "λ": r"\lambda ", "μ": r"\mu ", "φ": r"\varphi ",
    "ω": r"\omega ",
})  # fmt: skip
# Before Unicode's own normal form forgets what they are.
_RAISED = (
    (r"[⁰¹²³⁴-⁻ⁿ]+", r"^{\g<0>}"),
    (r"[₀-₉]+", r"_{\g<0>}"),
    (r"√\s*(?:\(([^()]*)\)|(\d+|\w))", r"\\sqrt{\1\2}"),
    (r"[¼-¾⅐-⅞]", r" \g<0> "),
)
END = r"(?![A-Za-z])"
_PLAIN = dict(lt="<", gt=">", varnothing=r"\emptyset ", lbrace=r"\{", rbrace=r"\}", langle="(", rangle=")")
_SAME = tuple((re.compile(pattern), replacement) for pattern, replacement in (
    (rf"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits){END}|\\!", ""),
    (r"(?<=\d)(?:,?\\[,;: ]|\{,\})(?=\d{3})", ""),
    (rf"\\(le|ge|ne)q{END}", r"\\\1"),
    (rf"\\(?:c?dots|dotsc|dotsb){END}|\.\.\.+", r"\\ldots "),
    (rf"\\(lt|gt|varnothing|[lr]brace|[lr]angle){END}", lambda match: _PLAIN[match[1]]),
    (r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree", " degrees "),
    (r"\\%", "%"),
    (r"\\\$|(?<!\\)\$(?=\s*\d[\d,.]*(?:[^$]*$))", " dollars "),
    (r"\\(?:text\w*|math(?:bf|it|rm|sf)|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 "),
    (rf"(?<!\\)\\[,;: ]|~|\\q?quad{END}|\\[()\[\]](?!\s*\d+pt)|\$|\*\*|__", " "),
    (r"(?<![\d.,])(\d{1,3}(?: \d{3})+)(?![\d,])", lambda match: match[1].replace(" ", "")),
    (r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))", r"\\frac{\1\2}{\3\4}"),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"),
    (r"\\(max|min|gcd|lcm)\s*\\\{([^{}]*)\\\}", r"\\\1(\2)"),
    (r"\\begin\{[pbB]?matrix\}(.*?)\\end\{[pbB]?matrix\}",
     lambda match: "({})".format(match[1].strip().removesuffix(r"\\").replace("&", ",").replace(r"\\", ";"))),
    (r"\^\s*\{?\s*(st|nd|rd|th)\b\s*\}?", r"\1"),
    (r"([\^_])\s*\{\s*(\w)\s*\}", r"\1\2"),
    (r"\s+", " "),
))  # fmt: skip


def plain(text: str) -> str:
    """A text in LaTeX without what changes no value: spaces, sizes of brackets, fonts, signs of Unicode."""
    for pattern, replacement in _RAISED:
        text = re.sub(pattern, replacement, text)
    text = unicodedata.normalize("NFKC", text.translate(_SIGNS))
    text = re.sub(r"(\d+)⁄(\d+)", r"\\frac{\1}{\2}", text)
    for pattern, replacement in _SAME:
        text = pattern.sub(replacement, text)
    return re.sub(r"(?<!\.)\.$", "", text.strip("*_` \n")).strip("*_` \n")


# Numbers, with a unit.

_NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
_TEN = r"10\s*\^\s*\{?\s*([+-]?\d{1,3})\s*\}?"
_SCIENTIFIC = re.compile(rf"([+-]?)\s*(?:{_TEN}|({_NUMBER})(?:e([+-]?\d{{1,3}})|\s*(?:\\times|\\cdot|\*)\s*{_TEN})?)")
_PART = rf"\s*\{{\s*([+-]?(?:{_NUMBER}))\s*\}}"
_QUOTIENT = re.compile(rf"([+-]?)\s*(?:(\d+)(?:\s+|(?=\\)))?(?:\\frac{_PART}{_PART}|({_NUMBER})\s*/\s*({_NUMBER}))")
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE = re.compile(rf"\s*(?:({'|'.join(_SCALES)})\b|(%|percent\b|per cent\b)(?!age))", re.IGNORECASE)
_CURRENCY = re.compile(r"([+-]?) ?(dollars |€|£) ?")
# Words behind a number that change its value, or say that it is not the answer.
_NO_UNIT = (
    r"\b(?:(?:hundred|thousand|\w*illion|lakh|crore|dozen|score|ten|half|third|quarter)s?|halves|gross|basis|"
    r"per\s?cent(?:s|ages?)?|(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|\w+teen|\w+tie|hundred|thousand|\w*illion)"
    r"ths?|and|are|as|but|by|equals|fewer|has|if|is|its|less|minus|mod|modulo|more|no|not|or|out|over|plus|than|this|"
    r"times(?=\s)|to|unless|was|were)\b"
)
_PLURAL = r"[a-z]+s|[a-z]*(?:people|children|men|feet|mice|geese|teeth|fish|sheep)|yen|yuan"
_POWER = r"(?:\s?\^\s?\{?\s?[23]\s?\}?)?"
_SYMBOL = (
    r"(?:[cdkmµμ]?m|[kmµμ]?g|[cdm]?[lL]|m?s|k?(?:Hz|J|N|Pa|V|W)|deg|ft|h|hrs?|in|kmh|lbs?|mi|min|mph|oz|rad|sec|yd)"
    + _POWER
)
_LEFT = r"left|altogether|in\stotal|in\sall|total|each|overall"
_BEHIND = rf"(?:\s(?:per|of|a)\s[a-z]+|\s(?:{_LEFT}|celsius|fahrenheit|[CF]))*"
_NOUN = rf"(?i:(?!.*{_NO_UNIT})(?:[a-z]+\.?\s)?(?:%s){_POWER}){_BEHIND}"
UNIT = re.compile(rf"(?:(?:cu|sq)\.?\s)?{_SYMBOL}(?:\s?/\s?{_SYMBOL})?|{_NOUN % _PLURAL}|{_LEFT}")
_UNIT_OF_ONE = re.compile(_NOUN % "[a-z]{2,}")
_ALIASES = (
    (rf"\b(?:{_LEFT})\b", ""),
    (r"\b(?:square|sq\.?)\s+(\S+)", r"\1^2"),
    (r"\b(?:cubic|cu\.?)\s+(\S+)", r"\1^3"),
    (r"\s*\^\s*\{?\s*([23])\s*\}?", r"^\1"),
    (r"\s*/\s*|\s+per\s+|\s+an?\s+(?=hour|day|week|month|year|minute|second)", "/"),
    (r"(met|lit)re", r"\1er"),
    (r"\binch(?:es)?\b", "in"),
    *((rf"\b(?:{pair.split(':')[0]})\b", pair.split(":")[1]) for pair in (
        "mm:millimeter cm:centimeter m:meter km:kilometer foot|feet:ft mi:mile mg:milligram g:gram kg:kilogram "
        "l:liter ml:milliliter s|sec:second min:minute h|hrs?:hour deg:degree kmh:kilometer/hour mph:mile/hour "
        "rad:radian oz:ounce lbs?:pound yd:yard in:inche"
    ).split()),
    (r"s\b", ""),
)  # fmt: skip


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
    text = re.sub(r"^\{([^{}]*)\}$", r"\1", text.strip()).strip()
    currency = ""
    if match := _CURRENCY.match(text):
        currency = {"€": "euro", "£": "pound"}.get(match[2], "dollar")
        text = match[1] + text[match.end() :]
    if match := re.fullmatch(r"(\d{1,4})!", text):
        return Fraction(math.factorial(int(match[1]))), ""
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
        if spaced and (not unit or UNIT.fullmatch(unit) or (abs(value) <= 1 and _UNIT_OF_ONE.fullmatch(unit))):
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


def is_name(text: str) -> bool:
    """Whether the left side of an equation names a quantity: variables, and no number but in indices and arguments."""
    text = SUBSCRIPTS.sub("", text)
    return re.search(r"[^\W\d_]", text) is not None and _NO_NAME.search(text) is None
