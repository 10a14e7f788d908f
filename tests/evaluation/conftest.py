"""A run of five domains, drawn at random, and a reference for the statistics of it that shares no code with `src`."""

import io

import numpy as np
import pytest
from rich.console import Console

from trl_interfere.evaluation.score_matrix import ScoreMatrix


# Written is never scored, poems never trained, law came when the run was extended.
STAGES = ["0-base", "1-math", "2-code", "3-refresh-math", "4-written", "5-law", "6-qa", "7-refresh-code"]
SIZES = {"math": 40, "code": 60, "qa": 25, "poems": 30, "law": 50}


@pytest.fixture
def matrix():
    """Rows of different means, paired by a difficulty of each prompt."""
    rng = np.random.default_rng(9)
    hardness = {domain: rng.uniform(size=n) for domain, n in SIZES.items()}
    filled = ScoreMatrix(list(SIZES))
    for row, stage in enumerate(STAGES):
        level = rng.uniform(0.2, 0.9, size=len(SIZES))
        values = {
            domain: np.clip(level[column] - 0.5 * hardness[domain] + 0.1 * rng.normal(size=n), 0, 1)
            for column, (domain, n) in enumerate(SIZES.items())
            if domain != "law" or row >= 4
        }
        filled.append(stage, values)
    return filled


@pytest.fixture
def printed():
    """Function that gives the text of a table."""

    def text(table):
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(table)
        return console.export_text()

    return text


@pytest.fixture
def close_to_loops():
    """Function that compares an interval with one from plain loops over resamples of each domain's prompts."""

    def compare(interval, differences):
        rng = np.random.default_rng(0)
        value = sum(100 * sum(sample) / len(sample) for sample in differences) / len(differences)
        means = []
        for _ in range(4000):
            drawn = [sample[rng.integers(0, len(sample), size=len(sample))] for sample in differences]
            means.append(sum(100 * sum(sample) / len(sample) for sample in drawn) / len(drawn))
        low, high = np.percentile(means, [2.5, 97.5])
        assert interval.value == pytest.approx(value)
        assert interval.low == pytest.approx(low, abs=0.07 * (high - low))
        assert interval.high == pytest.approx(high, abs=0.07 * (high - low))
        assert interval.n == sum(len(sample) for sample in differences)

    return compare
