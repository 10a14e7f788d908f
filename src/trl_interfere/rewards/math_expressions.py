"""
Whether two formulas have the same value, by the parser of math-verify, in a process of its own.

A formula can keep a computer algebra system busy for hours. The process counts the processor time of each question,
so that an answer does not depend on how busy the machine is, and it serves any thread.
"""

import json
import os
import resource
import signal
import subprocess
import sys
from functools import lru_cache
from threading import Lock


_SECONDS = 3  # of processor time for one question; ten times that of wall clock
_MEMORY = 4 * 2**30
# Numerators over 100 of the variables at the points where formulas are compared. Where one of them is negative, roots
# and logarithms may leave the reals, and forms of one formula differ: there only real values are compared.
_POSITIVE = ((37, 171, 293, 529), (211, 83, 137, 59), (500, 700, 300, 200))
_POINTS = (*_POSITIVE, (-61, 229, 173, 47), (300, -200, 500, 100), (83, 59, -137, 211), (229, 61, 47, -173))
_lock, _processes = Lock(), {}  # one of each process that asks


@lru_cache(10_000)
def same_value(first: str, second: str, equations: bool = False) -> bool:
    """Whether two formulas have the same value; with `equations`, whether one is a multiple of the other."""
    with _lock:
        process = _processes.get(os.getpid())
        if process is None or process.poll() is not None:
            command = [sys.executable, "-P", __file__]
            process = subprocess.Popen(command, stdin=-1, stdout=-1, text=True, encoding="utf-8")
            if process.stdout.readline() != "ready\n":
                raise RuntimeError(f"math: expected the process that compares formulas to start, it ended ({command})")
            _processes[os.getpid()] = process
        process.stdin.write(json.dumps([first, second, equations]) + "\n")
        process.stdin.flush()
        reply = process.stdout.readline()
        if not reply:  # it took too long
            process.wait()
        return reply == "yes\n"


def _main() -> None:
    import sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy

    config = ConversionConfig(lowercase_symbols=False)
    unevaluated = (sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit, sympy.Derivative)

    def equal(a, b) -> bool:
        return a == b if a.is_Rational and b.is_Rational else bool(abs(a - b) <= 1e-20 * max(abs(a), abs(b)))

    def same(first: str, second: str, equations: bool) -> bool:
        one, two = (latex2sympy(text, conversion_config=config) for text in (first, second))
        # Integrals and the like of the problem are no answers; written as the expected one they have been accepted.
        if one.has(*unevaluated) or two.has(*unevaluated):
            return False
        one, two = (formula.subs(sympy.Symbol("i"), sympy.I) for formula in (one, two))
        if one == two:
            return one not in (sympy.zoo, sympy.nan)
        names, ratios = sorted(one.free_symbols | two.free_symbols, key=str), []
        for point in _POINTS if names else _POINTS[:1]:
            at = {name: sympy.Rational(point[i % 4] + 11 * i, 100) for i, name in enumerate(names)}
            a, b = (formula.subs(at).doit() for formula in (one, two))
            a, b = (value if value.is_Rational else value.evalf(30) for value in (a, b))
            real = point in _POSITIVE or (a.is_real and b.is_real)
            if not (real and a.is_number and b.is_number and a.is_finite and b.is_finite) or (equations and b == 0):
                continue
            if not equations and not equal(a, b):
                return False
            ratios.append(a / b if equations else sympy.S.One)
        return bool(ratios) and ratios[0] != 0 and all(equal(ratio, ratios[0]) for ratio in ratios)

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends this process, also within a function of C
    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, _SECONDS)
        signal.alarm(10 * _SECONDS)
        try:
            answer = "yes" if same(*json.loads(line)) else "no"
        except Exception:  # what is no formula has no value
            answer = "no"
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        print(answer, flush=True)


if __name__ == "__main__":
    _main()
