"""The card: valid, complete, and every number in it is one of the run's files."""

import json
import re

import pytest
from huggingface_hub import ModelCard

from trl_interfere.analysis.report import InterferenceReport
from trl_interfere.evaluation.metrics import ScoreSummary
from trl_interfere.hub.card_callback import write_card
from trl_interfere.hub.push import plan_push
from trl_interfere.hub.run_folder import RunFolder
from trl_interfere.reporting.card import analysis_card, report_card, stage_card


NUMBER = r"(?<![\w.])[+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?"


def tables(card) -> dict[str, list[list[str]]]:
    """Rows of the first table below each heading."""
    found, heading = {}, ""
    for line in str(card).splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("|") and not set(line) <= set("|-: "):
            found.setdefault(heading, []).append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def interval(entry: dict, spec: str = ".1f") -> str:
    return f"{entry['value']:{spec}} [{entry['low']:{spec}}, {entry['high']:{spec}}]"


@pytest.fixture
def card(run):
    (main,) = plan_push(run, "tester/model", license="apache-2.0").revisions
    return ModelCard(main.files["README.md"].decode())


def test_metadata(card, run):
    data = card.data.to_dict()
    assert {"trl-interfere", "trl", "grpo"} <= set(data["tags"])
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert data["license"] == "apache-2.0" and "base_model" not in data  # the lab's model is not on the Hub
    run.manifest.identity["base_model"] = "Qwen/Qwen3-0.6B@stage-1-math"
    run.manifest.about["benchmarks"] = {"math": "a/b:c", "qa": "a/b"}
    data = analysis_card(run, "u/r").data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("Qwen/Qwen3-0.6B", "finetune")
    assert data["datasets"] == ["a/b"]


def test_scores_are_those_of_the_manifest(card, lab_folder):
    stages = json.loads((lab_folder / "stages.json").read_text())["stages"]
    header, *rows = tables(card)["Sequence and scores"][: 1 + len(stages)]
    assert header == ["stage", "math (n=8)", "qa (n=8)"]
    assert len(rows) == len(stages)
    for row, stage in zip(rows, stages, strict=True):
        assert row[1:] == [interval(stage["scores"][name]) for name in ("math", "qa")]


def test_the_report_is_that_of_the_file(card, lab_folder):
    path = next(lab_folder.glob("analysis/0-*/report.json"))
    report = json.loads(path.read_text())
    shown = dict(row for row in tables(card)["math, after qa"][1:])
    assert shown["loss before, after"] == f"{report['loss_before']:.4f}, {report['loss_after']:.4f} nats per token"
    assert shown["damage"] == f"{report['loss_after'] - report['loss_before']:+.4f}"
    assert shown["first order ∇L·δ"] == f"{report['first_order']:+.4f}"
    assert shown["attributed to routes"] == f"{report['attributed']:+.4f}"
    assert shown["gradient cosine, whole model"] == f"{report['cosines']['global']:+.3f}"


def test_repairs_stand_beside_their_controls(card, lab_folder):
    rows = [row for row in json.loads((lab_folder / "results.json").read_text())["rollback"] if row["pair"] == 0]
    _, *shown = tables(card)["What was repaired"][: 1 + len(rows)]
    assert {cells[1] for cells in shown} == {"repair", "control", "baseline"}
    for cells, row in zip(shown, rows, strict=True):
        assert cells[0].split(" ")[0] == row["criterion"]
        expected = "nothing was lost"
        if row["recovered"] is not None:
            expected = interval({"value": row["recovered"], **row}, ".0%")
        assert cells[4] == expected
        assert cells[5] == ", ".join(f"{name} {value:+.1f}" for name, value in row["collateral"].items())
        assert float(cells[3].split(" ")[0]) == pytest.approx(row["step"], rel=1e-2)


def test_no_number_comes_from_elsewhere(card, lab_folder, run):
    """Each number of the text is, in one of the ways in which numbers are written there, one of the run's files."""
    values, texts = [], []

    def collect(content):
        if isinstance(content, bool) or content is None:
            return
        if isinstance(content, (int, float)):
            values.append(content)
        elif isinstance(content, dict):
            for value in content.values():
                collect(value)
        elif isinstance(content, str):
            texts.append(content)  # of a claim, with the figures of the paper
        elif isinstance(content, list):
            for value in content:
                collect(value)

    for path in (lab_folder / "stages.json", lab_folder / "results.json", *lab_folder.glob("analysis/*/report.json")):
        collect(json.loads(path.read_text()))
    collect(ScoreSummary.from_matrix(run.score_matrix).to_dict())
    for folder in run.reports.values():
        report = InterferenceReport.from_pretrained(folder)
        order = sorted(report.routes["damage"], reverse=True)
        top = sum(order[: max(1, round(0.02 * len(order)))]) / sum(order)
        values += [report.damage, report.residual, 100 * float(top)]
        values += [100 * sum(entry["shares"]) for entry in (report.subspace or {}).values() if isinstance(entry, dict)]
    specs = ("d", "g", ".1f", "+.1f", ".2f", ".3f", "+.3f", ".4f", "+.4f", "+.2e", ".1e", ".2g", ".3g", ".0%")
    allowed = {
        "2",
        "0",
        "100",
        "95",
    }  # the share of routes in a label, the scale of the scores, the level of intervals
    for value in values:
        allowed |= {f"{value:{spec}}".rstrip("%") for spec in specs if spec != "d" or isinstance(value, int)}
    text = re.sub(r"arXiv \d+\.\d+", " ", str(card).split("---\n", 2)[2].split("## Limits")[0])
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|https?://\S+", " ", text)
    text = re.sub(r"\b\d-(?:base|math|qa|refresh-\w+)\b|layers\.\d+", " ", text)
    text = re.sub(r"\bn\s*=\s*", " ", text)
    allowed |= {number for part in texts for number in re.findall(NUMBER, part)}
    numbers = re.findall(NUMBER, text)
    assert len(numbers) > 100
    assert {number for number in numbers if number not in allowed} == set()


def test_a_changed_figure_changes_the_card(copied):
    path = next(copied.glob("analysis/0-*/report.json"))
    before = str(analysis_card(RunFolder.read(copied)))
    content = json.loads(path.read_text())
    content["first_order"] = 0.98765
    path.write_text(json.dumps(content))
    assert "+0.9877" in str(analysis_card(RunFolder.read(copied))) and "+0.9877" not in before


def test_parts(card, run):
    text = str(card)
    for part in ("## Limits", "## How to reproduce", "## Versions and hardware", "## Citation", "@misc{yang2026local"):
        assert part in text
    assert "trl-interfere lab --seed 3 --order math,qa --steps 2" in text
    for package, version in run.stages[-1].versions.items():
        assert f"- {package}: {version}" in text
    assert "- device: cpu" in text
    assert str(run.folder.parent) not in text and "nan" not in text


def test_every_figure_is_a_file_of_the_push(run):
    for stages in (False, True):
        plan = plan_push(run, "tester/model", stages=stages)
        main = plan.revisions[-1]
        shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", main.files["README.md"].decode())
        assert len(shown) >= 4 and set(shown) <= set(main.files)


def test_stage_cards(run):
    text = str(stage_card(run, run.trained[0], "tester/model", "mit"))
    assert 'revision="stage-1-math"' in text and "license: mit" in text
    row = [interval(run.stages[1].scores[name]) for name in ("math", "qa")]
    assert f"| 1-math | {row[0]} | {row[1]} |" in text and "| 0-base |" in text and "| 2-qa |" not in text


def test_report_cards(run, make_report):
    report = make_report(20)
    text = str(report_card(report, "u/r", {"module_cosines": "interference/figures/module_cosines.png"}))
    assert "| damage | +0.6000 |" in text and "(interference/figures/module_cosines.png)" in text


def test_the_card_can_be_made_later_from_a_folder(copied):
    (copied / "README.md").unlink(missing_ok=True)
    text = write_card(copied).read_text()
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (copied / path).is_file()
    assert "What was repaired" in text and "(figures/score_matrix.png)" in text


def test_a_run_without_analysis_and_repair(copied):
    for path in copied.glob("analysis/*/report.json"):
        path.unlink()
    (copied / "results.json").unlink()
    text = str(analysis_card(RunFolder.read(copied)))
    assert "No analysis was made." in text
