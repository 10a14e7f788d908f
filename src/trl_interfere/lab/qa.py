"""Lab domain `qa`: closed-book facts about the chemical elements and masses of nuclei, answered in a sentence."""

import random


ELEMENTS = """\
H hydrogen|He helium|Li lithium|Be beryllium|B boron|C carbon|N nitrogen|O oxygen|F fluorine|Ne neon
Na sodium|Mg magnesium|Al aluminium|Si silicon|P phosphorus|S sulfur|Cl chlorine|Ar argon|K potassium
Ca calcium|Sc scandium|Ti titanium|V vanadium|Cr chromium|Mn manganese|Fe iron|Co cobalt|Ni nickel
Cu copper|Zn zinc|Ga gallium|Ge germanium|As arsenic|Se selenium|Br bromine|Kr krypton|Rb rubidium
Sr strontium|Y yttrium|Zr zirconium|Nb niobium|Mo molybdenum|Tc technetium|Ru ruthenium|Rh rhodium
Pd palladium|Ag silver|Cd cadmium|In indium|Sn tin|Sb antimony|Te tellurium|I iodine|Xe xenon|Cs caesium
Ba barium|La lanthanum|Ce cerium|Pr praseodymium|Nd neodymium|Pm promethium|Sm samarium|Eu europium
Gd gadolinium|Tb terbium|Dy dysprosium|Ho holmium|Er erbium|Tm thulium|Yb ytterbium|Lu lutetium
Hf hafnium|Ta tantalum|W tungsten|Re rhenium|Os osmium|Ir iridium|Pt platinum|Au gold|Hg mercury
Tl thallium|Pb lead|Bi bismuth|Po polonium|At astatine|Rn radon|Fr francium|Ra radium|Ac actinium
Th thorium|Pa protactinium|U uranium|Np neptunium|Pu plutonium"""
SYMBOLS, NAMES = zip(*(entry.split() for entry in ELEMENTS.replace("\n", "|").split("|")), strict=True)
_NOBLE_GASES = (2, 10, 18, 36, 54, 86)

# Several phrasings per fact: a test prompt is a fact that was seen in another phrasing, never the same text.
PHRASINGS = {
    "symbol": ("symbol of {name}", "{name} symbol", "{name} is written", "short for {name}", "sign of {name}"),
    "name": ("element {symbol}", "name of {symbol}", "{symbol} means", "{symbol} stands for", "what is {symbol}"),
    "number": ("number of {name}", "{name} number", "protons in {name}", "{name} has protons", "order of {name}"),
    "of_number": ("element {number}", "name of {number}", "{number} protons", "which has {number}", "number {number}"),
    "period": ("period of {name}", "{name} period", "row of {name}", "{name} row", "shells of {name}"),
    "after": ("after {name}", "next to {name}", "{name} then", "what follows {name}", "one past {name}"),
}
MASS_PHRASINGS = (
    "mass of {protons} protons {neutrons} neutrons",
    "{protons} protons {neutrons} neutrons mass",
    "{protons} protons with {neutrons} neutrons",
    "{neutrons} neutrons on {protons} protons",
)


def sample(rng: random.Random) -> dict:
    """Draw one question."""
    if rng.random() < 0.3:
        protons = rng.randrange(2, 80)
        neutrons = rng.randrange(protons, round(1.5 * protons) + 1)
        question = rng.choice(MASS_PHRASINGS).format(protons=protons, neutrons=neutrons)
        answer = protons + neutrons
    else:
        relation = rng.choice(list(PHRASINGS))
        index = rng.randrange(len(NAMES))
        name, symbol, number = NAMES[index], SYMBOLS[index], index + 1
        question = rng.choice(PHRASINGS[relation]).format(name=name, symbol=symbol, number=number)
        answer = {
            "symbol": symbol,
            "name": name,
            "number": number,
            "of_number": name,
            "period": 1 + sum(number > gas for gas in _NOBLE_GASES),
            "after": NAMES[number % len(NAMES)],
        }[relation]
    return {
        "prompt": f"Q: {question} A:",
        "answer": f" The answer is {answer}.",
        "alternatives": [f" {answer}", f" The answer is {answer}!"],
    }


def qa_reward(completions: list[str], answer: list[str], **kwargs) -> list[float]:
    """1 if the completion is the sentence with the expected name, symbol or number, 0 otherwise."""
    return [float(text.strip() == right.strip()) for text, right in zip(completions, answer, strict=True)]
