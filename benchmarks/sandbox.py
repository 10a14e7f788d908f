"""
Programs a second in the sandbox.

    python benchmarks/sandbox.py --workers 2 --programs 1000

A program reads two numbers, computes and prints. Each figure is of `--programs` of them, the best of `--rounds`:

- `programs_per_second`: `Sandbox.run`, as many at once as there are workers;
- `function_tests_per_second`: `check_calls`, two programs for each (the tests of a problem are looked through once);
- `processor_ms_here`, `processor_ms_inside`: processor time of one program, of this process and of the child that
  runs it; what is left of the time of all cores went to the worker, the kernel and other programs;
- `spawned_per_second`: `python -I -c pass` without any sandbox, one after the other on each core, for comparison;
- `bubblewraps_per_second`: a bubblewrap of its own for each program, likewise.

Prints the figures as one JSON object on the last line.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from trl_interfere.rewards.program_tests import check_calls
from trl_interfere.rewards.sandbox import Limits, Sandbox, _command
from trl_interfere.rewards.seccomp import seccomp_filter


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
    with Sandbox(arguments.workers) as sandbox:

        def program(index: int) -> None:
            execution = sandbox.run(PROGRAM, f"{index} {index + 10}")
            if execution.stdout != f"{sum(range(index, index + 10))}\n":
                raise RuntimeError(f"the sandbox gave {execution}")

        def function(index: int) -> None:
            verdict = check_calls(sandbox, FUNCTION, TESTS, limits)
            if not verdict.passed:
                raise RuntimeError(f"the sandbox gave {verdict}")

        here = time.process_time()
        figures["programs_per_second"] = best(lambda: sandbox.map(program, range(n)), n, arguments.rounds)
        figures["processor_ms_here"] = (time.process_time() - here) / (n * arguments.rounds) * 1e3
        usage = "import resource\nu = resource.getrusage(0)\nprint(u.ru_utime + u.ru_stime)"
        inside = [float(sandbox.run(f"{PROGRAM}{usage}", "1 2").stdout.split()[-1]) for _ in range(100)]
        figures["processor_ms_inside"] = sum(inside) / len(inside) * 1e3
        half = n // 2
        figures["function_tests_per_second"] = best(lambda: sandbox.map(function, range(half)), half, arguments.rounds)
    few = max(n // 10, 10)
    plain = [sys.executable, "-I", "-c", "pass"]
    wrapped = [*_command(os.geteuid() == 0, seccomp_filter())[:-2], "-c", "pass"]
    for name, command in (("spawned_per_second", plain), ("bubblewraps_per_second", wrapped)):
        figures[name] = best(lambda command=command: spawn(command, few, arguments.workers), few, arguments.rounds)
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


def spawn(command: list[str], n: int, workers: int) -> None:
    """Run a command many times."""
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda _: subprocess.run(command, check=True, stdin=subprocess.DEVNULL), range(n)))


if __name__ == "__main__":
    main()
