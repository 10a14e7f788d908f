"""
Programs a second in the sandbox.

    python benchmarks/sandbox.py --workers 2 --programs 1000

A program reads two numbers, computes and prints. Each figure is of `--programs` of them, the best of `--rounds`:

- `programs_per_second`: `Sandbox.run`, as many at once as there are workers;
- `function_tests_per_second`: `check_function`, two sandboxes for each;
- `spawned_per_second`: `python -I -c pass` without any sandbox, one after the other on each core, for comparison.

Prints the figures as one JSON object on the last line.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

from trl_interfere.rewards.functions import check_function
from trl_interfere.rewards.sandbox import Limits, Sandbox


PROGRAM = "a, b = map(int, input().split())\nprint(sum(range(a, b)))\n"
TESTS = "assert total(2, 5) == 9\nassert total(0, 0) == 0\n"
FUNCTION = "def total(a, b):\n    return sum(range(a, b))\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="programs at once")
    parser.add_argument("--programs", type=int, default=1000, help="programs of a round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each figure")
    arguments = parser.parse_args()
    n, limits = arguments.programs, Limits()
    figures = {"workers": arguments.workers, "cores": os.cpu_count(), "programs": n}
    sandbox = Sandbox(arguments.workers)

    def program(index: int) -> None:
        execution = sandbox.run(PROGRAM, f"{index} {index + 10}")
        if execution.stdout != f"{sum(range(index, index + 10))}\n":
            raise RuntimeError(f"the sandbox gave {execution}")

    def function(index: int) -> None:
        found = check_function(sandbox, FUNCTION, TESTS, limits, "total")
        if found != (True, False):
            raise RuntimeError(f"the sandbox gave {found}")

    def plain(index: int) -> None:
        subprocess.run([sys.executable, "-I", "-c", "pass"], check=True, stdin=subprocess.DEVNULL)

    for name, call in (("programs", program), ("function_tests", function), ("spawned", plain)):
        figures[f"{name}_per_second"] = best(lambda call=call: sandbox.map(call, range(n)), n, arguments.rounds)
    for name, figure in figures.items():
        print(f"{name}: {figure:.4g}")
    print(json.dumps({name: round(figure, 3) for name, figure in figures.items()}))


def best(function: Callable, n: int, rounds: int) -> float:
    """Most calls a second over the rounds."""
    rates = []
    for _ in range(rounds):
        begin = time.perf_counter()
        function()
        rates.append(n / (time.perf_counter() - begin))
    return max(rates)


if __name__ == "__main__":
    main()
