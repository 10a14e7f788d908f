"""The page of the repair study, from rows that were made up."""

import importlib.util
import json
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SHARES = {
    "damage": (0.3, 0.1),
    "damage_protected": (0.6, 0.2),
    "route_conflict": (0.2, 0.1),
    "random_matched": (0.1, 0.0),
}


@pytest.fixture
def page(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("repair_page", BENCHMARKS / "repair_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Run:
    def __init__(self, seed: int, lost: float, parts: tuple[str, ...] = ("sweep",)):
        self.seed, self.lost, self.parts = seed, lost, parts
        self.order = ["code", "math", "qa"]
        self.labels = {"seed": seed, "order": "code,math,qa"}

    def done(self, part: str) -> bool:
        return part in self.parts

    def rows(self, part: str) -> list[dict]:
        if part not in self.parts:
            return []
        if part == "per_route":
            best = [row for row in self.rows("sweep") if row["step_rule"] == "best" and row["criterion"] != "damage"]
            return [{**row, "criterion": f"{row['criterion']}_per_route_exact", "step": None} for row in best]
        rows = []
        for criterion, shares in SHARES.items():
            for rule in ("fixed", "best"):
                share = shares[self.seed] / (2 if rule == "fixed" else 1)
                fields = {"recovered": share, "low": share - 0.1, "high": share + 0.1, "n": 8, "worst": -0.5}
                fields |= {"collateral": {"code": 0.5, "qa": -0.5}}
                fields |= {"scope": "mlp", "budget": 0.02, "step_rule": rule, "step": 2.0, "protection": 0.0}
                rows.append({**self.labels, "criterion": criterion, **fields, "selection": {"math": share}})
        return rows


def test_page(page, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    means = page.write_page([Run(0, 30.0, ("sweep", "per_route")), Run(1, 10.0), Run(2, 5.0, ())], tmp_path)
    assert means["runs"] == 2 and means["criterion"] == "damage_protected"
    assert means["recovered"] == pytest.approx(0.4)
    assert means["per_route"] == pytest.approx(0.6) and means["per_route_over_route_conflict"] == pytest.approx(3.0)
    assert means["over_route_conflict"] == pytest.approx(0.4 / 0.15)
    text = (tmp_path / "repair.md").read_text()
    # 60% of 30 points and 20% of 10 are half of the 40.
    assert "40.0%; 20.0 to 60.0 | 50.0% |" in text
    assert "| `damage_protected` | 40.0%; 20.0 to 60.0 |\n" in text  # of the one order
    assert "| 0 | code,math,qa | 30.0 |" in text and "2 of the 15 runs" in " ".join(text.split())
    assert "| code +0.50, qa -0.50; one of them lower in 0 of 2 runs, lowest of all -0.50 | yes |" in text
    assert "Not measured yet." in text and "refresh in 0" in text
    for figure in ("sweep.png", "runs-sweep.png"):
        assert (tmp_path / "figures" / "repair" / figure).stat().st_size > 0
    rows = json.loads((tmp_path / "data" / "repair.json").read_text())["rows"]
    assert len(rows) == 2 * 2 * len(SHARES) + 3
    assert "| 1 | code,math,qa | 10.0 |" in text and "not measured |" in text
    assert {"seed", "order", "criterion", "scope", "budget", "step", "recovered", "low", "high"} <= set(rows[0])


def test_without_runs(page, tmp_path):
    with pytest.raises(ValueError, match="expected at least one run with its part 'sweep', found none"):
        page.write_page([Run(0, 30.0, parts=())], tmp_path)


def test_rows_of_another_machine_are_kept(page, tmp_path):
    (tmp_path / "data").mkdir()
    page.write_page([Run(0, 30.0, ("sweep", "per_route")), Run(1, 10.0)], tmp_path)
    first = json.loads((tmp_path / "data" / "repair.json").read_text())
    assert first["lost"] == [
        {"seed": seed, "order": "code,math,qa", "points": lost} for seed, lost in ((0, 30), (1, 10))
    ]
    # Nothing new: the same rows and figures.
    means = page.write_page([Run(0, 0.0, ()), Run(1, 0.0, ())], tmp_path, keep=True)
    assert json.loads((tmp_path / "data" / "repair.json").read_text()) == first
    assert means["runs"] == 2 and means["recovered"] == pytest.approx(0.4)
    # Trained again: its own comparison and points, and the part that it lacks as it was.
    page.write_page([Run(0, 20.0), Run(1, 0.0, ())], tmp_path, keep=True)
    again = json.loads((tmp_path / "data" / "repair.json").read_text())
    assert again["rows"] == first["rows"] and [entry["points"] for entry in again["lost"]] == [20.0, 10.0]
    assert "1 of the runs were trained again" in " ".join((tmp_path / "repair.md").read_text().split())
    # Without it, what this machine has is all there is.
    page.write_page([Run(0, 20.0), Run(1, 0.0, ())], tmp_path)
    assert {row["seed"] for row in json.loads((tmp_path / "data" / "repair.json").read_text())["rows"]} == {0}


def test_seeds_with_all_parts_are_named(page):
    runs = [Run(0, 1.0, page.ROW_PARTS), Run(1, 1.0)]
    assert page._further_text(runs).endswith("`--further-seeds` to more")
    runs[1].parts = page.ROW_PARTS
    assert page._further_text(runs).endswith('here `make repair-study ARGS="--further-seeds 0 1"`')


def test_intervals_over_few_runs_are_left_out(page):
    shares = [0.1, 0.2, 0.3, 0.4, 0.5]
    assert page._cell(shares[:4]) == "25.0%; 10.0 to 40.0" and page._cell(shares[:1]) == "10.0%"
    assert page._cell(shares).startswith("30.0% [") and page._cell(shares).endswith("]; 10.0 to 50.0")
    assert page._ratio_cell(shares[:4], shares[:4]) == "1.00"
    assert page._ratio_cell(shares, [share / 2 for share in shares]) == "2.00 [2.00, 2.00]"


def test_repairs_that_cost_more_than_the_limit_are_counted(page):
    rows = [{"step_rule": "best", "within_max_drop": within} for within in (True, False, False)]
    assert page._over(rows) == "; over the limit in 2 of 3" and page._over(rows[:1]) == ""
    assert page._over([{**row, "step_rule": "fixed"} for row in rows]) == ""
    fields = {"criterion": "damage", "scope": "mlp", "budget": 0.02, "step": 1.0, "recovered": 0.5, "worst": -2.0}
    assert "| 1; over the limit in 2 of 3 | 50.0%;" in page._summary([{**row, **fields} for row in rows])


def test_saved_steps_are_bounded_where_the_plain_refresh_ends(page):
    def curve(seed, label, shares):
        place = {"seed": seed, "order": "a,b", "criterion": label}
        return [{**place, "step": step, "recovered": share} for step, share in zip((0, 2, 10), shares, strict=True)]

    plain = (0.0, 0.2, 0.6)
    rows = [row for seed in range(3) for row in curve(seed, "refresh", plain)]
    for seed, shares in enumerate(((0.1, 0.4, 0.7), (0.2, 0.7, 0.8), (0.4, 0.8, 0.9))):
        rows += curve(seed, "refresh_after_rollback", shares)
    (text,) = page._saved(rows)
    # 0.1, 0.2 and 0.4 are reached after 1, 2 and 6 steps; 0.4 after 6, 0.7 and 0.8 never: 10 steps or more.
    assert "after 0 steps +2.0 (n=3); after 2 steps ≥ +8.0 (n=3, bounds: 2)." in text and "after 10" not in text


def test_an_interval_over_seeds(page):
    rows = [
        {"criterion": "damage_protected", "step_rule": "best", "seed": seed, "recovered": 0.1 * seed + share}
        for seed in range(5)
        for share in (0.0, 0.2)
    ]
    assert "recovers 30.0% [" in page._seeds_text(rows) and "recovers" not in page._seeds_text(rows[:8])
