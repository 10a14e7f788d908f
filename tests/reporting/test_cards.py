"""Cards: valid, complete, text as text, and every number in them is one of the run's files."""

import json
import re
import shutil
from pathlib import Path

import pytest

from trl_interfere.analysis.report import InterferenceReport
from trl_interfere.evaluation.score_matrix import ScoreMatrix
from trl_interfere.reporting.card import analysis_card, report_card, report_markdown, stage_card
from trl_interfere.reporting.verdict import losses, read_repair, verdict
from trl_interfere.run import Run


DATA = Path(__file__).parents[2] / "space" / "data" / "lab"
NUMBER = r"(?<![\w.])[+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?"
HOSTILE = "<script>x</script>|![i](http://a/b.png)|[l](javascript:x)|`c`|**b**\n```mermaid\ngraph\n```"
REPAIR = {
    "schema_version": 1,
    "method": "subspace",
    "rank": 64,
    "references": 64,
    "domains": {
        name: {"peak": peak, "final": final, "healed": healed, "recovered": share, "low": low, "high": high}
        | {"n": 512, "lost": 7, "regained": 5, "newly_lost": 3}
        for name, peak, final, healed, share, low, high in (
            ("math", 63.9, 38.1, 62.9, 0.96, 0.83, 1.08),
            ("qa", 70.1, 68.9, 68.4, None, None, None),
        )
    },
    "recovered_all": {"value": 0.91, "low": 0.77, "high": 1.04},
    "worst": -0.5,
    "cost": {"sequences_forward": 512, "sequences_backward": 0, "seconds": 9.2},
}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "lab"
    shutil.copytree(DATA, folder, ignore=shutil.ignore_patterns("delta.safetensors", "repair", "5-heal"))
    (folder / "results.json").write_text("{}")  # what tells a run of the lab
    content = json.loads((folder / "stages.json").read_text())
    content["stages"] = content["stages"][:5]
    (folder / "stages.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def healed(folder):
    """A run with a repair, and a stage of kind heal that brings prompts 0, 1 and 2 of math back."""
    (folder / "repair").mkdir()
    (folder / "repair" / "repair.json").write_text(json.dumps(REPAIR))
    content = json.loads((folder / "stages.json").read_text())
    heal = json.loads(json.dumps(content["stages"][-1]))
    heal |= {"index": len(content["stages"]), "kind": "heal", "domain": None, "folder": None}
    for name, entry in heal["scores"].items():
        rows = [json.loads(line) for line in (folder / entry["file"]).read_text().splitlines()]
        entry["file"] = f"scores/5-heal/{name}.jsonl"
        (folder / entry["file"]).parent.mkdir(exist_ok=True)
        (folder / entry["file"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    content["stages"].append(heal)
    (folder / "stages.json").write_text(json.dumps(content))
    for stage, score in (("2-math", 1.0), ("4-writing", 0.0), ("5-heal", 1.0)):
        path = folder / "scores" / stage / "math.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for number in range(3):
            rows[number] |= {"score": score, "completions": [f"{stage} says {number} {HOSTILE}"]}
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Run(folder)


def lines_of(card) -> list[str]:
    return str(card).splitlines()


def test_verdict(healed):
    matrix = ScoreMatrix.from_run(healed)
    lost = losses(healed, matrix)
    assert list(lost) == ["math"] and healed.final.name == "4-writing"
    text = verdict(healed, matrix, read_repair(healed))
    math = lost["math"]
    peak = matrix.interval(2, "math").value
    expected = (
        f"math lost {math.value:.1f} of {peak:.1f} points [{math.low:.1f}, {math.high:.1f}], and is healed to 62.9."
    )
    assert text.startswith(expected)
    assert text.endswith(
        "91% [77, 104] of all that was lost came back; the worst change of another domain is -0.5 points."
    )
    assert "Without" not in verdict(healed, matrix)
    repair = read_repair(healed)
    repair["domains"]["math"]["peak"] = 60.0  # its own stage, after the base model had done better
    assert "all that was lost since each domain's own stage came back" in verdict(healed, matrix, repair)


def test_nothing_was_lost(folder):
    content = json.loads((folder / "stages.json").read_text())
    content["stages"] = content["stages"][:1]
    (folder / "stages.json").write_text(json.dumps(content))
    run = Run(folder)
    assert verdict(run, ScoreMatrix.from_run(run)).startswith("Nothing was lost beyond chance")


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["domains"]["math"].update(healed=float("nan")),
        lambda content: content["domains"]["math"].update(peak="63"),
        lambda content: content["domains"]["math"].pop("final"),
        lambda content: content.update(worst=None, domains=[]),
        lambda content: content.pop("cost"),
        lambda content: content.update(recovered_all={"value": True}),
    ],
)
def test_a_broken_repair_is_refused(healed, change):
    path = healed.repair / "repair.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"repair\.json"):
        read_repair(healed)


def test_card_of_a_healed_run(healed):
    card = analysis_card(healed, "u/r", license="mit", figures={"scores": "figures/scores.png"}, revisions=True)
    text = str(card)
    order = [
        "**math lost",
        "## Scores",
        "## What was lost",
        "## How it was healed",
        "from peft import",
        "## Measurements",
    ]
    places = [text.index(part) for part in [*order, "## How it was made", "## Limits", "## Citation"]]
    assert places == sorted(places)
    assert "| math (n=512) | 63.9 | 38.1 | 62.9 | 96% [83, 108] |" in text and "(figures/scores.png)" in text
    assert "512 sequences forward, 0 backward, and 9 seconds" in text
    assert "trl-interfere lab --seed 0 --order code,math,qa,writing --steps 100" in text
    assert "[2-math](https://huggingface.co/u/r/tree/stage-2-math)" in text
    load = text.split("```python\n")[1].split("```")[0].strip().splitlines()
    assert len(load) == 3 and load[2] == 'model = PeftModel.from_pretrained(model, "u/r", subfolder="repair")'
    assert card.data.license == "mit" and "nan" not in text and str(healed.folder.parent) not in text


def test_no_table_is_wider_than_a_phone_turned_sideways(healed):
    rows = [re.sub(r"\(https[^)]*\)", "", line) for line in lines_of(analysis_card(healed, "u/r", revisions=True))]
    assert max(len(row) for row in rows if row.startswith("|")) <= 80


def test_metadata(folder):
    run = Run(folder)
    data = analysis_card(run).data.to_dict()
    assert {"trl-interfere", "trl", "grpo"} <= set(data["tags"]) and "base_model" not in data
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    run.identity["base_model"] = "Qwen/Qwen3-0.6B@stage-1-math"
    run.about["benchmarks"] = {"math": "a/b:c", "qa": "a/b"}
    data = analysis_card(run, "u/r").data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("Qwen/Qwen3-0.6B", "finetune")
    assert data["datasets"] == ["a/b"]


def test_foreign_text_is_text(healed, monkeypatch):
    """Domains, prompts and completions that hold HTML, images, links and a diagram."""
    monkeypatch.setattr(type(healed), "order", [HOSTILE, "qa"])
    healed.identity["config"]["seed"] = HOSTILE
    for record in healed.stages:
        record.scores[HOSTILE] = record.scores.pop("qa")
        record.domain = HOSTILE if record.domain == "qa" else record.domain
    text = str(analysis_card(healed, figures={}))
    outside, fence = [], None
    for line in text.split("## Citation")[0].splitlines():
        mark = re.match(r"`{3,}", line)
        if mark and (fence is None or line.strip() == fence):
            fence = mark[0] if fence is None else None
        elif fence is None:
            outside.append(line)
    shown = "\n".join(outside)
    assert "script" in shown and "says 0" in text  # they are shown
    for part in ("<script", "![i]", "](javascript", "```mermaid", "**b**"):
        assert part not in shown, part
    assert fence is None


def test_no_number_comes_from_elsewhere(healed):
    """Each number of the text is, in one of the ways in which numbers are written there, one of the run's files."""
    values, texts = [], []

    def collect(content):
        if isinstance(content, bool) or content is None:
            return
        if isinstance(content, (int, float)):
            values.append(content)
        elif isinstance(content, str):
            texts.append(content)  # of a claim, with the figures of the paper
        else:
            for value in content.values() if isinstance(content, dict) else content:
                collect(value)

    for path in [healed.path, healed.repair / "repair.json", *healed.folder.glob("analysis/*/report.json")]:
        collect(json.loads(path.read_text()))
    matrix = ScoreMatrix.from_run(healed)
    collect([vars(interval) for interval in losses(healed, matrix).values()])
    collect([matrix.interval(2, "math").value])
    collect([[100 * one.mean() for one in row.values()] for row in matrix.values])
    for folder in healed.reports.values():
        report = InterferenceReport.from_pretrained(folder)
        order = sorted(report.routes["damage"], reverse=True)
        values += [report.damage, report.residual, 100 * float(sum(order[: round(0.02 * len(order))]) / sum(order))]
        values += [100 * sum(entry["shares"]) for entry in (report.subspace or {}).values() if isinstance(entry, dict)]
    values += [100 * value for value in values if isinstance(value, float)]
    specs = ("d", "g", ".0f", ".1f", "+.1f", ".2f", ".3f", "+.3f", ".4f", "+.4f", "+.2e", ".1e", "+.1e", ".2g", ".3g")
    allowed = {"2", "0", "1", "3", "100", "95"}  # labels, the scale of the scores, the level of intervals
    for value in values:
        allowed |= {f"{value:{spec}}" for spec in specs if spec != "d" or isinstance(value, int)}
    text = re.sub(r"`{3,}.*?`{3,}", " ", str(analysis_card(healed)).split("---\n", 2)[2], flags=re.DOTALL)
    text = re.sub(r"arXiv \d+\.\d+|`[^`]*`|\]\([^)]*\)|&#\d+;", " ", text.split("## Limits")[0])
    text = re.sub(r"\b\d-[a-z]+(-[a-z]+)?\b|layers\.\d+|\bn=", " ", text)
    allowed |= {number for part in texts for number in re.findall(NUMBER, part)}
    numbers = re.findall(NUMBER, text)
    assert len(numbers) > 100
    assert {number for number in numbers if number not in allowed} == set()


def test_stage_cards(folder):
    run = Run(folder)
    card = stage_card(run, run.stages[1], "u/r", "mit")
    text = str(card)
    assert 'revision="stage-1-code"' in text and card.data.license == "mit"
    assert re.search(r"\| 1-code \|.* 57\.4 \[", text) and "| 0-base |" in text and "| 2-math |" not in text


def test_cards_and_pages_of_a_report(make_report):
    report = make_report(20)
    text = str(report_card(report, "u/r", {"module_cosines": "interference/figures/module_cosines.png"}))
    assert "(interference/figures/module_cosines.png)" in text and 'from_pretrained("u/r")' in text
    for shown in (text, report_markdown(report)):
        assert "- damage: +0.6000 nats per token" in shown and "Control:" in shown
        assert "- weights outside routes: 25.1% (embed&#95;tokens 25.0%)" in shown
