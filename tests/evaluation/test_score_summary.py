import io
import json

from rich.console import Console

from trl_interfere.evaluation.bootstrap import difference, recovered
from trl_interfere.evaluation.forgetting import forgetting
from trl_interfere.evaluation.score_summary import ScoreSummary
from trl_interfere.evaluation.transfer import backward_transfer, forward_transfer


def printed(table):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_figures_after_a_refresh(matrix):
    summary = ScoreSummary.from_matrix(matrix)
    assert summary.stage == "7-refresh-code"
    assert summary.score == {domain: matrix.interval(7, domain) for domain in matrix.domains}
    assert summary.forgetting == {domain: forgetting(matrix, domain) for domain in ("math", "code", "poems", "law")}
    assert summary.backward_transfer == {
        domain: backward_transfer(matrix, domain) for domain in ("math", "code", "law")
    }
    assert summary.forward_transfer == {domain: forward_transfer(matrix, domain) for domain in ("code", "qa")}
    peak = max(matrix.values[:7], key=lambda values: values["code"].mean())
    damaged, now = matrix.values[6], matrix.values[7]
    assert summary.recovered == {"code": recovered(now["code"], damaged["code"], peak["code"])}
    assert summary.collateral == {
        domain: difference(now[domain], damaged[domain]) for domain in ("math", "qa", "poems", "law")
    }
    assert summary.average == {
        "score": matrix.average_score(),
        "forgetting": forgetting(matrix),
        "backward_transfer": backward_transfer(matrix),
        "forward_transfer": forward_transfer(matrix),
    }


def test_an_earlier_stage_without_refreshes(matrix):
    summary = ScoreSummary.from_matrix(matrix, 2)
    assert summary.stage == "2-code"
    assert "law" not in summary.score and summary.recovered == summary.collateral == {}
    assert list(summary.forgetting) == ["math", "qa", "poems"]
    base = ScoreSummary.from_matrix(matrix, 0)
    assert list(base.average) == ["score"] and base.forgetting == {}


def test_to_dict_is_json_without_nan(matrix):
    for stage in range(8):
        content = ScoreSummary.from_matrix(matrix, stage).to_dict()
        assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert content["stage"] == "7-refresh-code"
    assert content["score"]["qa"] == matrix.interval(7, "qa").to_dict()
    assert content["average"]["score"]["n"] == 205


def test_table(matrix):
    summary = ScoreSummary.from_matrix(matrix)
    text = printed(summary.to_table())
    lines = {line.split("│")[1].strip(): line for line in text.splitlines() if line.startswith("│")}
    assert list(lines) == ["math", "code", "qa", "poems", "law", "average"]
    assert f"{summary.forgetting['math']:.1f}" in lines["math"]
    assert f"{summary.average['backward_transfer']:.1f}" in lines["average"]
    assert "—" in lines["qa"]
    assert f"{summary.recovered['code']:.0%}" in lines["code"]
    assert "collateral" in text and "collateral" not in printed(ScoreSummary.from_matrix(matrix, 2).to_table())


def test_a_domain_named_average(matrix):
    matrix.domains = ["average" if domain == "qa" else domain for domain in matrix.domains]
    for values in matrix.values:
        values["average"] = values.pop("qa")
    summary = ScoreSummary.from_matrix(matrix)
    assert summary.score["average"] == matrix.interval(7, "average") and summary.average["score"] != summary.score
    assert printed(summary.to_table()).count("average") == 2
