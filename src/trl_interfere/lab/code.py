"""Lab domain `code`: emit a Python expression in x that satisfies input/output examples. The reward runs it."""

import ast
import json
import operator
import random

from simpleeval import InvalidExpression, SimpleEval


_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
}
_NODES = {ast.Expr, ast.BinOp, ast.UnaryOp, ast.Constant, ast.Name}
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

    Nothing is handed to `eval`: simpleeval walks the syntax tree, and only integer constants, the name `x` and
    `+ - * // %` are walked, so that neither attributes, calls nor large powers can be reached.
    """
    if len(expression) > MAX_CHARACTERS:
        raise ValueError(f"expected at most {MAX_CHARACTERS} characters, found {len(expression)}")
    try:
        tree = ast.parse(expression, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"not an expression: {expression!r} ({error})") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and type(node.value) is not int:
            raise ValueError(f"expected integers only, found {node.value!r} in {expression!r}")
    evaluator = SimpleEval(operators=_OPERATORS, functions={}, names={"x": x})
    evaluator.nodes = {node: handler for node, handler in evaluator.nodes.items() if node in _NODES}
    try:
        value = evaluator.eval(expression, previously_parsed=tree.body)
    except (InvalidExpression, ArithmeticError, TypeError, ValueError, KeyError, RecursionError) as error:
        raise ValueError(f"not an arithmetic expression in x: {expression!r} ({error})") from error
    if type(value) is not int:
        raise ValueError(f"expected an integer, found {type(value).__name__} from {expression!r}")
    return value


def code_reward(completions: list[str], tests: list[str], **kwargs) -> list[float]:
    """1 if the expression reproduces every example, shown and kept, 0 otherwise."""
    rewards = []
    for completion, cases in zip(completions, tests, strict=True):
        try:
            passed = all(run_expression(completion.strip(), x) == y for x, y in json.loads(cases))
        except ValueError:
            passed = False
        rewards.append(float(passed))
    return rewards
