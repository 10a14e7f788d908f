"""Cards: valid, complete, text as text, and every number in them is one of the run's files."""

import json
import re
import shutil

import pytest
from space_run import DATA

from trl_interfere.analysis.report import InterferenceReport
from trl_interfere.evaluation.score_matrix import ScoreMatrix
from trl_interfere.reporting.card import analysis_card, report_card, report_markdown, stage_card
from trl_interfere.reporting.verdict import losses, read_repair, verdict
from trl_interfere.run import Run


NUMBER = r"(?<![\w.])[+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?"
HOSTILE = "<script>x</script>|![i](http://a/b.png)|[l](javascript:x)|`c`|**b**\n```mermaid\ngraph\n```"


@pytest.fixture
def run(tmp_path):
    """A healed run of the lab."""
    folder = shutil.copytree(DATA, tmp_path / "lab", ignore=shutil.ignore_patterns("delta.safetensors"))
    (folder / "results.json").write_text("{}")  # what tells a run of the lab
    return Run(folder)


def test_verdict(run):
    matrix, repair = ScoreMatrix.from_run(run), read_repair(run)
    lost = losses(run, matrix)
    assert list(lost) == ["math"] and run.final.name == "4-writing"
    math, peak = lost["math"], matrix.interval(2, "math").value
    expected = f"math lost {math.value:.1f} of {peak:.1f} points [{math.low:.1f}, {math.high:.1f}]"
    assert verdict(run, matrix) == f"{expected}."
    price = "the worst change of another domain is -0.1 points."
    share = "99% [83, 119] of all that was lost"
    healed = f"{expected}, and is healed to 61.1. Without training, {share} came back; {price}"
    assert verdict(run, matrix, repair) == healed
    repair["domains"]["math"]["peak"] = 60.0  # its own stage, after the base model had done better
    assert f"{share} since each domain's own stage came back" in verdict(run, matrix, repair)
    run.stages = run.stages[:1]
    assert verdict(run, ScoreMatrix.from_run(run)).startswith("Nothing was lost beyond chance")


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["domains"]["math"].update(healed=float("nan")),
        lambda content: content["domains"]["math"].update(peak="63"),
        lambda content: content["domains"]["math"].pop("final"),
        lambda content: content.update(domains=[]),
    ],
)
def test_a_broken_repair_is_refused(run, change):
    path = run.repair / "repair.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"repair\.json"):
        read_repair(run)


def test_card_of_a_healed_run(run):
    card = analysis_card(run, "u/r", license="mit", figures={"scores": "figures/scores.png"}, revisions=True)
    text = str(card)
    for part in ("**math lost", "## Measurements", "## How it was made", "## Limits", "## Citation"):
        assert part in text
    assert "| math (n=512) | 63.5 | 38.5 | 61.1 | 91% [78, 105] |" in text and "(figures/scores.png)" in text
    assert "512 sequences forward, 0 backward, and 20 seconds" in text
    assert "trl-interfere lab --seed 0 --order code,math,qa,writing --steps 100" in text
    assert "[2-math](https://huggingface.co/u/r/tree/stage-2-math)" in text
    load = text.split("```python\n")[1].split("```")[0].strip().splitlines()
    assert len(load) == 3 and load[2] == 'model = PeftModel.from_pretrained(model, "u/r", subfolder="repair")'
    assert card.data.license == "mit" and "nan" not in text and str(run.folder.parent) not in text
    # No table is wider than a phone that is turned sideways.
    rows = [re.sub(r"\(https[^)]*\)", "", line) for line in text.splitlines() if line.startswith("|")]
    assert max(map(len, rows)) <= 80
    shutil.rmtree(run.repair)
    assert "| math (n=512) | 63.5 | 38.5 | 25.0 [20.5, 29.7] |" in str(analysis_card(run))


def test_metadata_and_the_card_of_a_stage(run):
    data = analysis_card(run).data.to_dict()
    assert {"trl-interfere", "trl", "grpo"} <= set(data["tags"]) and "base_model" not in data
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    run.identity["base_model"] = "Qwen/Qwen3-0.6B@stage-1-math"
    run.about["benchmarks"] = {"math": "a/b:c", "qa": "a/b"}
    data = analysis_card(run, "u/r").data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("Qwen/Qwen3-0.6B", "finetune")
    assert data["datasets"] == ["a/b"]
    card = stage_card(run, run.stages[1], "u/r", "mit")
    text = str(card)
    assert 'revision="stage-1-code"' in text and card.data.license == "mit"
    assert re.search(r"\| 1-code \|.* 57\.4 \[", text) and "| 0-base |" in text and "| 2-math |" not in text


def test_foreign_text_is_text(run, monkeypatch):
    """Domains, prompts and completions that hold HTML, images, links and a diagram."""
    for path in run.folder.glob("scores/*/math.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [{**row, "prompt": f"asks {HOSTILE}", "completions": [f"says {HOSTILE}"]} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(Run, "order", [HOSTILE, "qa"])
    run.identity["config"]["seed"] = HOSTILE
    for record in run.stages:
        record.scores[HOSTILE] = record.scores.pop("qa")
        record.domain = HOSTILE if record.domain == "qa" else record.domain
    text = str(analysis_card(run, figures={}))
    shown = re.sub(r"^(`{3,})(?!`).*?^\1$", "", text.split("## Citation")[0], flags=re.DOTALL | re.MULTILINE)
    assert "script" in shown and "asks" in text and "says" in text  # they are shown
    for part in ("<script", "![i]", "](javascript", "```", "**b**"):
        assert part not in shown, part


def test_no_number_comes_from_elsewhere(run):
    """Each number of the text is, in one of the ways in which numbers are written there, one of the run's files."""
    paths = [run.path, run.repair / "repair.json", *run.folder.glob("analysis/*/report.json")]
    allowed = set(re.findall(NUMBER, " ".join(path.read_text() for path in paths)))
    values, matrix = [float(number) for number in allowed], ScoreMatrix.from_run(run)
    for interval in [*losses(run, matrix).values(), matrix.interval(2, "math")]:
        values += [interval.value, interval.low, interval.high]
    values += [100 * one.mean() for row in matrix.values for one in row.values()]
    for folder in run.reports.values():
        report = InterferenceReport.from_pretrained(folder)
        order = sorted(report.routes["damage"], reverse=True)
        values += [report.damage, report.residual, float(sum(order[: round(0.02 * len(order))]) / sum(order))]
        values += [sum(entry["shares"]) for entry in (report.subspace or {}).values() if isinstance(entry, dict)]
    values += [100 * value for value in values]
    specs = ("g", ".0f", ".1f", "+.1f", ".2f", ".3f", "+.3f", ".4f", "+.4f", "+.2e", ".1e", "+.1e", ".2g", ".3g")
    allowed |= {"2", "0", "1", "3", "100", "95"}  # labels, the scale of the scores, the level of intervals
    allowed |= {f"{value:{spec}}" for value in values for spec in specs}
    text = re.sub(r"`{3,}.*?`{3,}", " ", str(analysis_card(run)).split("---\n", 2)[2], flags=re.DOTALL)
    text = re.sub(r"arXiv \d+\.\d+|`[^`]*`|\]\([^)]*\)|&#\d+;", " ", text.split("## Limits")[0])
    text = re.sub(r"\b\d-[a-z]+(-[a-z]+)?\b|layers\.\d+|\bn=", " ", text)
    numbers = re.findall(NUMBER, text)
    assert len(numbers) > 100
    assert {number for number in numbers if number not in allowed} == set()


def test_cards_and_pages_of_a_report(make_report):
    report = make_report(20)
    text = str(report_card(report, "u/r", {"module_cosines": "interference/figures/module_cosines.png"}))
    assert "(interference/figures/module_cosines.png)" in text and 'from_pretrained("u/r")' in text
    for shown in (text, report_markdown(report)):
        assert "- damage: +0.6000 nats per token" in shown and "Control:" in shown
        assert "- weights outside routes: 25.1% (embed&#95;tokens 25.0%)" in shown
