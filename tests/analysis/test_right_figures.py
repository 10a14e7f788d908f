"""Cases in which a figure was wrong without a word, each with the right one, and inputs that are refused by name."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_families import dense_figures

from trl_interfere.analysis.analyzer import InterferenceAnalyzer
from trl_interfere.analysis.config import InterferenceConfig
from trl_interfere.analysis.gradients import mean_loss, num_tokens
from trl_interfere.analysis.objectives import ForwardKL, grpo, nll
from trl_interfere.analysis.references import collect_references
from trl_interfere.domain import Domain


CONFIG = InterferenceConfig(reference="dataset", quadrature_nodes=12, batch_size=8)


def analyze(before, after, make_domain, tokenizer, **settings):
    analyzer = InterferenceAnalyzer(before, after, tokenizer, config=replace(CONFIG, **settings))
    return analyzer.analyze(make_domain("math"), make_domain("qa", prompts=["ab?"])), analyzer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_half_precision_are_summed_in_float32(dtype, make_model, moved, sequences, make_batches):
    model, reference = (make_model("gemma2", dtype=dtype, seed=seed) for seed in (0, 1))
    (batch,) = make_batches(sequences, batch_size=8)
    batch["advantages"] = torch.linspace(-1, 1, len(batch["input_ids"]))
    chosen = batch["labels"][:, 1:] != -100
    targets = batch["labels"][:, 1:][chosen]
    with torch.no_grad():
        rows, others = (
            part(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1][chosen].double()
            for part in (model, reference)
        )
    losses = torch.logsumexp(rows, -1) - rows.gather(1, targets[:, None])[:, 0]
    weights = batch["advantages"][:, None].expand_as(chosen)[chosen].double()
    divergence = (others.softmax(-1) * (others.log_softmax(-1) - rows.log_softmax(-1))).sum()
    expected = {nll: losses.sum(), grpo: (weights * losses).sum(), ForwardKL(reference): divergence}
    for objective, value in expected.items():
        assert objective(model, batch).item() == pytest.approx(value.item(), rel=1e-5)


@pytest.mark.parametrize("family, seed", [*(("qwen3-moe", seed) for seed in range(10)), ("phimoe", 0), ("phimoe", 1)])
def test_routers_that_switch_experts(family, seed, make_model, moved, make_domain, tokenizer):
    experts = "num_local_experts" if family == "phimoe" else "num_experts"
    before = make_model(family, seed=seed, num_experts_per_tok=2, **{experts: 8})
    after = moved(before, scale=0.05, seed=seed)
    nodes = 24 if family == "phimoe" else 12
    report, analyzer = analyze(before, after, make_domain, tokenizer, subspace_size=2, quadrature_nodes=nodes)
    references = analyzer.references(make_domain("math"), [])["math"]
    sequences = list(zip(references.prompts, references.completions, strict=True))
    _, second, damage = dense_figures(before, after, sequences)
    assert report.damage == pytest.approx(damage, rel=1e-9)
    assert abs(report.second_order - second) < report.second_order_error < 0.1 * abs(second)
    # What is attributed, what lies outside and what the switches do are the whole damage, at few nodes already.
    assert abs(report.residual) < 1e-3 * max(abs(damage), abs(report.switching), 0.01)
    assert 0 <= report.switched <= report.references["math"]["tokens"]
    assert report.switched > 0 or report.switching == pytest.approx(0, abs=1e-12)
    with torch.no_grad():  # the operator of the subspace leaves what lies outside routes where it is
        for name, parameter in after.named_parameters():
            if analyzer.route_map.cut(name) is None:
                parameter.copy_(before.get_parameter(name))
    _, inside, _ = dense_figures(before, after, sequences)
    assert report.subspace["update"]["second_order"] == pytest.approx(inside, rel=1e-2, abs=1e-5)


def test_routing_is_free_again_afterwards(make_model, moved, make_domain, tokenizer):
    before = make_model("mixtral")
    ids = torch.tensor([[4, 9, 13, 5, 20, 7]])
    expected = before(ids).logits
    before.set_experts_implementation("grouped_mm")  # which knows no float64: the analysis takes another
    analyze(before, moved(before), make_domain, tokenizer)
    assert torch.equal(before(ids).logits, expected)


@pytest.mark.parametrize("family, buffer", [("gemma4_text", "layer_scalar"), ("glm4_moe", "e_score_correction_bias")])
def test_buffers_that_change_count_as_outside(family, buffer, make_model, make_domain, tokenizer):
    before = make_model(family)
    after = copy.deepcopy(before)
    for name, tensor in after.named_buffers():
        if name.endswith(buffer):
            tensor += torch.linspace(0.1, 0.5, tensor.numel()).reshape(tensor.shape)
    report, analyzer = analyze(before, after, make_domain, tokenizer)
    batches = analyzer.batches(analyzer.references(make_domain("math"), []))["math"]
    assert report.damage == pytest.approx(mean_loss(after, batches) - mean_loss(before, batches), rel=1e-9)
    assert report.attributed == 0 and report.damage != 0
    assert report.outside_routes + (report.switching or 0) == pytest.approx(report.damage, rel=1e-4)


def test_without_a_prompt_the_first_token_is_not_counted(make_model, make_batches, token_loss):
    model = make_model("llama")
    batches = make_batches([([], [5, 6, 7]), ([4, 5], [6])])
    assert num_tokens(batches) == 3
    expected = token_loss(model, [([5], [6, 7]), ([4, 5], [6])]).item()
    assert mean_loss(model, batches) == pytest.approx(expected, rel=1e-9)


def test_a_subspace_where_nothing_but_embeddings_changed(make_model, make_domain, tokenizer):
    before = make_model("llama")
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.get_input_embeddings().weight += 0.01
    report, _ = analyze(before, after, make_domain, tokenizer, subspace_size=2)
    assert report.subspace["update"]["eigenvalues"] == [] and len(report.directions) == 0


def domain_of(rows, name="math"):
    return Domain(name, selection_dataset=Dataset.from_list(rows), metric=lambda completions, **_: [1.0])


ROWS = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "2+3=", "completion": "5"}]


def test_conversational_completions_are_their_text(make_model, tokenizer):
    rows = [{**row, "completion": [{"role": "assistant", "content": row["completion"]}]} for row in ROWS]
    found, plain = (collect_references(make_model(), tokenizer, domain_of(part), CONFIG) for part in (rows, ROWS))
    assert found.completions == plain.completions
    with pytest.raises(ValueError, match="column 'completion': expected text or messages, found None"):
        nothing = [*ROWS, {"prompt": "1+1=", "completion": None}]
        collect_references(make_model(), tokenizer, domain_of(nothing), CONFIG)


def test_a_tokenizer_that_makes_nothing_or_has_no_end(make_model, tokenizer, monkeypatch):
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(ValueError, match="tokenizer: expected an eos_token"):
        collect_references(make_model(), endless, domain_of(ROWS), CONFIG)
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *_, **__: {"input_ids": []})
    with pytest.raises(ValueError, match="'math': column 'prompt': expected tokens for '1\\+1=', found none"):
        collect_references(make_model(), tokenizer, domain_of(ROWS), CONFIG)


def test_text_that_the_tokenizer_does_not_give_back_is_warned_of(make_model, tokenizer):
    with pytest.warns(UserWarning, match="column 'completion': the tokenizer makes"):
        collect_references(make_model(), tokenizer, domain_of([{"prompt": "1+1=", "completion": "zwei"}]), CONFIG)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"vocab_size": 12}, "expected token ids below 12"),
        ({"max_position_embeddings": 4}, "expected at most 4 tokens of prompt and completion"),
    ],
)
def test_references_beyond_the_embeddings(settings, message, make_model, moved, tokenizer):
    before = make_model("gpt2", **settings)
    analyzer = InterferenceAnalyzer(before, moved(before), tokenizer, config=CONFIG)
    with pytest.raises(ValueError, match=f"domain 'math': {message}"):
        analyzer.analyze(domain_of(ROWS), domain_of(ROWS, "qa"))


def test_weights_that_are_not_finite_and_losses_that_overflow(make_model, moved, make_domain, tokenizer):
    before = make_model("llama", dtype=torch.float32)
    broken = moved(before)
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = np.nan
    with pytest.raises(ValueError, match="after checkpoint: tensor lm_head.weight: expected finite values"):
        InterferenceAnalyzer(before, broken, tokenizer)
    large = make_model("llama", dtype=torch.float16)
    with torch.no_grad():
        large.lm_head.weight.fill_(6e4)
    with pytest.raises(ValueError, match="before: expected a finite loss on 'math', found (nan|inf) in float16"):
        analyze(large, moved(large), make_domain, tokenizer)


def test_a_checkpoint_that_is_the_one_before(make_model, moved, tokenizer):
    before = make_model("llama")
    with pytest.raises(ValueError, match="base: expected another checkpoint than before"):
        InterferenceAnalyzer(before, moved(before), tokenizer, base=make_model("llama"))
    with pytest.raises(ValueError, match="after: expected another checkpoint than before"):
        InterferenceAnalyzer(before, make_model("llama"), tokenizer)
