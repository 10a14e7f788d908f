"""Lab domain `code`: emit a Python expression in x that satisfies input/output examples. The reward runs it."""

import ast
import json
import operator
import random


_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
MAX_CHARACTERS = 64


def sample(rng: random.Random) -> dict:
    """Draw one problem: two examples to show and three to keep for the verifier."""
    a, b = rng.randrange(2, 10), rng.randrange(1, 10)
    expression = rng.choice([f"x+{b}", f"x-{b}", f"x*{a}", f"x*{a}+{b}", f"x*{a}-{b}", f"x*x+{b}", f"{b}-x"])
    inputs = rng.sample(range(0, 10), 5)
    tests = [[x, run_expression(expression, x)] for x in inputs]
    shown = " ".join(f"{x}>{y}" for x, y in tests[:2])
    return {
        "prompt": f"Q: {shown} A:",
        "answer": f" {expression}",
        "alternatives": [f" The answer is {expression}.", f" The answer is {expression}!"],
        "tests": json.dumps(tests),
    }


def run_expression(expression: str, x: int) -> int:
    """
    Value of an arithmetic expression at `x`.

    Nothing is handed to `eval`: the syntax tree is walked, and only integer constants, the name `x` and `+ - * // %`
    are known, so that neither attributes, calls, texts nor powers can be reached.
    """
    if len(expression) > MAX_CHARACTERS:
        raise ValueError(f"expected at most {MAX_CHARACTERS} characters, found {len(expression)}")
    try:
        return _value(ast.parse(expression, mode="eval").body, x)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ValueError(f"not an arithmetic expression in x: {expression!r} ({error})") from error


def _value(node: ast.expr, x: int) -> int:
    match node:
        case ast.Constant(value) if type(value) is int:
            return value
        case ast.Name("x"):
            return x
        case ast.UnaryOp(ast.USub(), operand):
            return -_value(operand, x)
        case ast.BinOp(left, operation, right) if type(operation) in _OPERATORS:
            return _OPERATORS[type(operation)](_value(left, x), _value(right, x))
    raise ValueError(f"expected integers, x and + - * // %, found {type(node).__name__}")


def code_reward(completions: list[str], tests: list[str], **kwargs) -> list[float]:
    """1 if the expression reproduces every example, shown and kept, 0 otherwise."""
    rewards = []
    for completion, cases in zip(completions, tests, strict=True):
        try:
            rewards.append(float(all(run_expression(completion.strip(), x) == y for x, y in json.loads(cases))))
        except ValueError:
            rewards.append(0.0)
    return rewards
