import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest

from trl_interfere.rewards.math import MathReward, math_reward, number


pytest.importorskip("math_verify")

# Expected answer || completions that state it | ... || completions that do not | ...; "⏎" is a new line.
STATEMENTS = r"""
72 || The answer is 72! | So she has 72 clips! | The answer is 72! She sold them all. | The answer is **72**! ||
72 || So she sold 72 clips altogether in April and May. | Therefore, she sold 72 clips. | So the total is 72 clips. ||
72 || The answer is 72, since there are 72 clips. | The answer is 72 - she sold 72 clips. | = 72 | #### $72 ||
72 || The answer is 72. She sold them in two months. | The answer is 72 because 48+24=72. | #### 72 clips ||
72 || The answer is 72 (48 in April and 24 in May). | The answer is 72 clips altogether. | Hence 72. ||
72 || Total: 72 | 48+24 = 72⏎#### 72 | #### 72 | The answer is 72, which is the total. | In total: 72. ||
72 || The answer is 72; the others are wrong. | The sum of all such values is therefore 72. | \[x = 72\] ||
72 || || The answer is 72, or maybe 73. | The answer is 72. No wait, 73. | The answer is 72 (or 73). | #### 71
72 || || The answer is not 72. | The answer is 72 or 73 | The answer is 72 and not 71. | The answer is 7 2
120 || The answer is 5! | The answer is 120! || The answer is 6! | The answer is 121!
42 || First 6 * 7 = 42.⏎Answer: 42 | 42 | The answer is $42$. | **42**. | Therefore, the sum is 42. ||
42 || <think>It may be \boxed{7}.</think> \boxed{42} | I first thought \boxed{41}, but it is \boxed{42} ||
42 || The answer is 42 apples. | \boxed {42} | The answer is $42$ square feet. | The answer is 42 people. ||
42 || || The answer is $41$. | Therefore, the sum is 41. | **41**. | So we get⏎$x = 41$ | The answer is 41 apples.
42 || || \boxed {41} | I do not know. | \boxed{} | \boxed{42 | <think>\boxed{42} | The answer is 42 in base 7
42 || || The answer is | The answer is 42 plus something | The answer is 42 dozen eggs | The answer is 42 tenths
42 || || The answer is 42 squared | The answer is 42 million dollars | The answer is 42 percentage points
42 || || The answer is 42k | I don't think that the sum is 42. | x != 42 | The sum is not 42
42 || || \boxed{42}\boxed{43} | The answer is \boxed{x}, where x is what was expected | \boxed{\boxed{}}
144 || 57 + 87 = 144 ||
1.5 || The answer is 1 1/2 cups. ||
1 || || The answer is 1 or more | The answer is 1 million
1, 2 || x = \boxed{1} and y = \boxed{2} | The solutions are \boxed{1}, \boxed{2}. ||
2 || || \boxed{1} and \boxed{2}
\frac{1}{2} || The final answer is $\frac{1}{2}$, as required. ||
"""
TABLE = [
    *(
        (text.strip().replace("⏎", "\n"), answer.strip(), reward)
        for answer, *columns in (line.split("||") for line in STATEMENTS.strip().splitlines())
        for reward, column in zip((1, 0), columns, strict=True)
        for text in column.split(" | ")
        if text.strip()
    ),
    ("", "42", 0),
    (r"\boxed{" + "4 apples " * 30 + "}", "4", 0),
    ("The answer is 42 " + "a" * 200, "42", 0),
    (r"\boxed{" + "4" * 100_000 + "}", "42", 0),
]

# Expected answer || what says the same | ... || what does not | ..., each in a box.
FORMS = r"""
x^2+y^2=1 || x^2+y^2-1=0 | y^2+x^2=1 || x^2-y^2=1
y=2x+1 || 2x+1 | 2x-y+1=0 || 2x+y+1=0
y = 3 ||  || x = 3
a^2-b^2 || (a-b)(a+b) || (a-b)(a-b)
5 \text{ million} || 5,000,000 | 5000000 | 5 million || 5 | 5\text{ billion}
10\text{ PM} || 10\text{ p.m.} | 10 PM || 10 | 11 PM | 10\text{ AM}
5\text{ metres south} ||  || 5 | 5\text{ metres north}
24\text{ cm}^2 || 24 | 24\text{ square centimeters} | 24 cm^2 || 24 m^2 | 24 cm^3 | 24 cm
60 \text{ km/h} || 60 \text{ kilometers per hour} | 60 || 60 mph
30^\circ || 30 | 30 degrees | 30° || 31°
42 || \$42 | 42.0 | +42 | \text{42} | 42\text{ cm} | m + n = 42 | \angle ABC = 42^\circ | 42 \mathrm{~cm}^{2} ||
42 ||  || 24\text{ cm}^2 | 41 | 42\% | forty-two | 42 million | 42 \text{ million} | 42 percent | 42 or more
42 ||  || 42 is wrong | 42x | \sqrt{1764} | \int_0^{42} 1 dx | 41, 42, 43 | 41 \text{ or } 42 | 42 or 43 | [42]
\$42 || 42 dollars | 42 | 42.00 || €42
42\% || 0.42 | 42 percent ||
3\text{ hours }40\text{ minutes} || 40 minutes 3 hours || 3 | 3\text{ hours }20\text{ minutes}
x=1, y=2 || y=2, x=1 | x=1 \text{ and } y=2 | x=1; y=2 | 1, 2 | (x,y)=(1,2) | (1,2) || y=1, x=2 | (2,1) | 2, 1
(1,2) || (x, y) = (1, 2) | x=1, y=2 || x=2, y=1 | (2,1) | [1,2]
1, 2 || x_1=1, x_2=2 | x = 1 \text{ or } x = 2 | 2, 1 | 1 and 2 | x_1 = 1, x_2 = 2 || 1, 3 | 1 | 1, 2, 2 | 7 = 1, 8 = 2
\{1, 2\} || x = 2 \text{ or } x = 1 | \{2, 1\} | x \in \{1, 2\} || \{1, 2, 3\} | (2,1)
1<x<2 || (1,2) | x \in (1, 2) | 2 > x > 1 || 1 \le x < 2 | [1, 2] | \{1,2\} | x=1, y=2 | 1, 2
(1, \infty) || x > 1 || x \geq 1 | x < 1
x > 1 || (1, +\infty) | 1 < x | \{x \mid x > 1\} ||
(-\infty,-1)\cup(3,\infty) || x < -1 \text{ or } x > 3 | (3,\infty) \cup (-\infty,-1) || (-\infty,-1]\cup(3,\infty)
1.5 || 1½ | 1\frac{1}{2} ||
(-\infty, 2] || (−∞, 2] | x ≤ 2 ||
300000 || 3 × 10⁵ ||
a_1+a_2 || a₁ + a₂ ||
2\sqrt{3} || 2·√3 | 2\sqrt{3} cm | 2√3 | \sqrt{12} | x = 2\sqrt{3} | x = \sqrt{12} = 2\sqrt{3} || x = 2\sqrt{5}
2\sqrt{3} ||  || 2\sqrt{5} | 7 = 2\sqrt{3} | \pi = 2\sqrt{3} | x = 7 = 2\sqrt{3} | x = 2\sqrt{3} = 7
2\sqrt{3} ||  || 2\sqrt{3}\text{ million} | 9^{9^{9^{9}}} | 99999!
\frac{1}{2^{99}} || 2^{-99} || 2^{-98} | 0 | \frac{1}{2^{98}} | \frac{1}{3^{40}}
1, 2, \ldots, n || 1, 2, ..., n | 1, 2, \dots, n || 2, 1, \ldots, n | 1, 3, 5, \ldots, 2n-1
n \equiv 3 \pmod 7 || 3 \pmod{7} ||
\pm 2 || -2, 2 || 2
2i || (1+i)^2 ||
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} || \begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix} ||
\begin{pmatrix} 1 \\ 2 \end{pmatrix} || (1, 2) || \langle 2, 1 \rangle
f(x)=x^2+1 || f(x) = 1 + x^2 | x^2+1 || f(x) = x^2-1
x ||  || |x| | \sqrt{x^2}
\frac{5!}{2!3!} || (5!)/(2!3!) | 10 ||
\frac{1}{2} || \frac 12 | .5 | ½ | 0.5 | \frac12 || \frac13
1500000 || 1.5 \cdot 10^6 | 1.5e6 ||
144 || 57+87=144 || 57+88=144 | 57 + 87
x \ne 2 || x\neq 2 || x\neq 3
3! || 6 | 6.0 || 3 | 4!
5 || {5} | 5\text{ units}^2 | 5\text{ sq units} || 5! | {6}
\pi ||  || 3.14 | \frac{22}{7}
2a ||  || 2A
100, 200 || 100,200 ||
2\text{ boys}, 4\text{ girls} ||  || 2\text{ boys}, 3\text{ girls}
10 000 || 10000 || 0
\sqrt{3} || √3 ||
a=3, b=5 ||  || (5,3)
33 333 || 33333 ||
1 000 000 || 1000000 || 0
5\text{ million} || 5 \text{ million} || 5\text{ billion}
3\text{ hours and }20\text{ minutes} || 3 \text{ hours } 20 \text{ minutes} || 3
1000000 || 1 000 000 | 1\ 000\ 000 | 1\,000\,000 | 1{,}000{,}000 ||
x^2+1 || x²+1 ||
-\sqrt{2} || −√2 ||
\infty || ∞ ||
4\pi || 4π ||
\frac{1}{901!} ||  || \frac{1}{900!}
\frac{1}{3} || \dfrac{2}{6} | 1/3 | ⅓ || 0.333
12 || AB = 12 | 12\text{ minutes} || AB = 13 | 2x = 12 | x^2 = 12 | x \neq 12 | x >= 12 | x = 7 = 12
2^{2024}-1 ||  || 2^{2024}+1
3 || ３ || 3 \text{ dozen}
3:30\text{ PM} || 3:30 PM || 3:30 AM | 3:30
(-1,1) ||  || -1,1
\frac{\sqrt2}{2} || √(2)/2 ||
x \in \mathbb{R} || x ∈ ℝ ||
A, C || \text{A, C} || A, B
"""
FORMS = [[part.strip() for part in line.split("||")] for line in FORMS.strip().splitlines()]

# Answers of every other kind that public sets of problems expect.
GOLDS = r"""
0.5 | 1\frac{1}{2} | 2^{10}\cdot 3^5 | e^x+e^{-x} | 1000! | (45^{\circ}, 60^{\circ}),(135^{\circ}, 60^{\circ}) |
(-\infty,1)\cup(2,\infty) | x \le 3 | 1, 2, 3 | 101_2 | 2 \pm \sqrt{3} | 3+4i | n! | \binom{n}{2} | \text{(B)} |
\text{Yes} | \text{no solution} | \mathbb{R} | \frac{n(n+1)}{2} | (-1)^n | \sqrt[3]{2} | 0.\overline{3} |
\lfloor \frac{n}{2}\rfloor | ABCD | \angle ABC | 3:2 | 12:30 | x=k\pi, k\in\mathbb{Z} | 2\sqrt{3}\text{ cm} |
1+2+\cdots+n | \langle 1,2,3\rangle | \left(\frac{1}{2},\frac{3}{4}\right) | \sum_{k=1}^{n} k^2 | \int_0^1 x^2 dx |
\frac{dy}{dx}=2x | -\frac{1}{2} | 10^{-3} | 1.5\times 10^{6} | 0<a\leq 1 | \left[-\frac{1}{2},+\infty\right) |
x=\frac{-1\pm\sqrt{5}}{2} | \tan^{-1}(2) | 2^{2^{5}} | \text{June 5} | 3\text{ dozen} | 42^{nd} | e^{i\pi/3} |
1-\frac{1}{e} | \cos\theta | 6n\pm1 | (a,b)=(2,3) | (x,y)=(1,2),(3,4) | A\cap B | \{(1,2),(3,4)\} |
x<-1 \text{ or } x>3 | \left\{1,2\right\} | 100 \text{ square meters} | \text{9:30 a.m.} | \max(a,b) |
\lvert x\rvert | f(x)=2x, g(x)=x^2 | \cos 15^\circ | 30^\circ, 60^\circ | \frac{x^2}{4}+\frac{y^2}{3}=1 | 2^{1009}
"""
GOLDS = [*(line[0] for line in FORMS), *(gold.strip() for gold in GOLDS.replace("\n", " ").split(" | "))]


@pytest.mark.parametrize("completion, answer, reward", TABLE)
def test_hand_checked_table(completion, answer, reward):
    assert math_reward([completion], [answer]) == [reward]
    messages = [{"role": "assistant", "content": completion}]
    assert math_reward([messages], [answer], domain=["math"]) == [reward]


@pytest.mark.parametrize("answer, right, wrong", [(line + ["", ""])[:3] for line in FORMS])
def test_forms_of_an_answer(answer, right, wrong):
    for reward, forms in ((1, right), (0, wrong)):
        given = [form.strip() for form in forms.split(" | ") if form.strip()]
        assert [form for form in given if math_reward([f"\\boxed{{{form}}}"], [answer]) != [reward]] == []


@pytest.mark.parametrize("gold", GOLDS)
def test_an_answer_is_right_and_with_another_number_or_sign_wrong(gold):
    for form in (r"So \boxed{%s}.", r"\boxed{ %s }", "The answer is $%s$.", "#### %s"):
        assert math_reward([form % gold], [gold]) == [1], form
    changed = {gold[: m.start()] + str(int(m[0]) + 1) + gold[m.end() :] for m in re.finditer(r"\d+", gold)}
    if re.match(r"\d|\\(?:frac|sqrt)", gold) and not re.search(r",|;|\\(?:pm|text|le)|<|or|and", gold):
        changed.add(f"-{gold}")
    assert [given for given in changed if math_reward([f"\\boxed{{{given}}}"], [gold]) != [0]] == []


def test_thoughts_that_do_not_end():
    thinking = MathReward(thinking=True)
    assert thinking([r"so \boxed{42}", r"so \boxed{41}</think>\boxed{42}"], ["42", "42"]) == [0, 1]


def test_a_formula_without_end_is_given_up():
    """In any thread, and what is asked beside and after it is answered."""
    given = [r"\boxed{1+x}", r"\boxed{(9+9)^{(9+9)^{(9+9)}}+x}", r"\boxed{x-1}", r"\boxed{x+2-1}"]
    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(lambda text: math_reward([text], ["x+1"]), given)] == [[1], [0], [0], [1]]


@pytest.mark.parametrize(
    "part", ["a ", r"\boxed{", "{", "* ", "1 2 ", "-", "1,", "1 000 ", "$", "(1,", "is ", "answer: 1. "]
)
def test_long_texts_are_read_at_once(part):
    text, begin = part * (20_000 // len(part)), time.process_time()
    math_reward([text, f"The answer is {text}", f"{text}\n#### {text}"], ["42"] * 3)
    assert time.process_time() - begin < 1


def test_numbers_against_python():
    rng = random.Random(0)
    for _ in range(300):
        top, bottom = rng.randint(-(10**6), 10**6), rng.randint(1, 999)
        sign = "-" if top < 0 else ""
        assert number(str(top)) == number(f"{top:,}") == number(f"{top:,}".replace(",", " ")) == top
        assert number(f"{top}/{bottom}") == number(f"{sign}\\frac{{{abs(top)}}}{{{bottom}}}") == Fraction(top, bottom)
        assert number(f"{top / 1000:.3f}") == number(f"{top}e-3") == Fraction(top, 1000)


@pytest.mark.parametrize("task", ["chain_sum", "basic_arithmetic", "gsm_symbolic", "simple_equations", "gcd", "lcm"])
def test_agrees_with_the_verifier_of_reasoning_gym(task):
    """Its own verifier gives 1 to the answer and less to its neighbours."""
    dataset = pytest.importorskip("reasoning_gym").create_dataset(task, size=20, seed=3)
    for entry in dataset:
        for answer in (entry["answer"], str(int(entry["answer"]) + 1)):
            expected = float(dataset.score_answer(answer, entry) == 1)
            assert math_reward([f"\\boxed{{{answer}}}"], [entry["answer"]]) == [expected]
