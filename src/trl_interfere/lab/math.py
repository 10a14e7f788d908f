"""Lab domain `math`: sums and differences of two or three numbers, exact answer, nothing else."""

import random


def sample(rng: random.Random) -> dict:
    """Draw one problem."""
    if rng.random() < 0.35:
        a, b, c = rng.randrange(50), rng.randrange(50), rng.randrange(50)
        problem, result = (f"{a}+{b}+{c}", a + b + c) if rng.random() < 0.5 else (f"{a}+{b}-{c}", a + b - c)
    elif rng.random() < 0.5:
        a, b = rng.randrange(100), rng.randrange(100)
        problem, result = f"{a}+{b}", a + b
    else:
        b, a = sorted((rng.randrange(100), rng.randrange(100)))
        problem, result = f"{a}-{b}", a - b
    return {
        "prompt": f"Q: {problem} A:",
        "answer": f" {result}",
        "alternatives": [f" The answer is {result}.", f" The answer is {result}!"],
    }


def math_reward(completions: list[str], answer: list[str], **kwargs) -> list[float]:
    """1 if the completion is the number and nothing else, 0 otherwise."""
    return [float(text.strip() == right.strip()) for text, right in zip(completions, answer, strict=True)]
