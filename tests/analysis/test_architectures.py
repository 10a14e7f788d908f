import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from trl_interfere.analysis.activity import route_activity
from trl_interfere.analysis.analyzer import InterferenceAnalyzer
from trl_interfere.analysis.architectures import ARCHITECTURES
from trl_interfere.analysis.config import InterferenceConfig
from trl_interfere.analysis.routes import KINDS, RouteMap
from trl_interfere.repair.route_rollback import RouteRollback


PAGE = Path(__file__).parents[2] / "docs" / "science" / "interference.md"
CONFIG = InterferenceConfig(reference="dataset", quadrature_nodes=16, difference_step=1e-3, batch_size=2)


@pytest.fixture(scope="module")
def gpt_neox():
    """The description on the page."""
    section = PAGE.read_text(encoding="utf-8").split("## Architectures\n")[1].split("\n## ")[0]
    (example,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    variables = {}
    exec(example, variables)
    return variables["gpt_neox"]


@pytest.fixture
def make_neox():
    def make():
        config = AutoConfig.for_model(
            "gpt_neox",
            **{"vocab_size": 25, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2},
            **{"num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.3},
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()

    return make


def states(model, ids):
    """What dense and dense_4h_to_h get and put out."""
    kept, handles = {}, []
    for layer, block in enumerate(model.gpt_neox.layers):
        for kind, module in (("query", block.attention.dense), ("mlp", block.mlp.dense_4h_to_h)):

            def keep(module, inputs, output, key=(kind, layer)):
                kept[key] = inputs[0][0], output[0]

            handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return kept


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("kind, position", [("mlp", 0), ("mlp", 7), *((kind, 2) for kind in ("query", "key_value"))])
def test_example_of_the_page(kind, position, layer, gpt_neox, make_neox):
    model, ids = make_neox(), [4, 9, 13, 5, 20, 7]
    route_map = RouteMap(model.config, description=gpt_neox)
    before = states(model, ids)
    chosen = np.eye(route_map.num_routes)[np.flatnonzero(route_map.of_layer(kind, layer))[position]]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = route_map.spread(name, chosen, parameter)
            if spread is not None and not route_map.cut(name).writes:
                parameter.add_(spread * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    after = states(model, ids)
    size = 1 if kind == "mlp" else 4
    for key in before:
        changed = (before[key][0] != after[key][0]).any(dim=0).nonzero().ravel().tolist()
        if key == ("mlp" if kind == "mlp" else "query", layer):
            assert changed == list(range(position * size, (position + 1) * size))
        elif key[1] <= layer and not (kind != "mlp" and key == ("mlp", layer)):
            assert changed == [], key


def test_activity_and_partition_of_the_example(gpt_neox, make_neox, sequences, make_batches):
    model = make_neox()
    route_map = RouteMap(model.config, description=gpt_neox)
    ones = {name: torch.ones_like(tensor) for name, tensor in model.named_parameters()}
    sums, outside = route_map.sum_by_route(ones)
    # A channel: 16 + 1 weights of its row, 16 of its column. A head: 4 rows of 16 + 1 and 4 columns, or 8 rows.
    sizes = {"mlp": 33, "query": 4 * 17 + 4 * 16, "key_value": 8 * 17}
    for kind in KINDS:
        assert set(sums[route_map.of_kind(kind)]) == {sizes[kind]}
    assert sums.sum() + outside == sum(tensor.numel() for tensor in ones.values())

    expected, tokens = 0, 0
    for prompt, completion in sequences:
        hidden = states(model, prompt + completion)["mlp", 1][0][len(prompt) - 1 : -1]
        expected, tokens = expected + hidden.abs().sum(dim=0), tokens + len(completion)
    expected = expected / tokens * model.gpt_neox.layers[1].mlp.dense_4h_to_h.weight.norm(dim=0)
    activity = route_activity(model, make_batches(sequences), route_map)
    np.testing.assert_allclose(activity[route_map.of_layer("mlp", 1)], expected.detach(), rtol=1e-6)


def test_analysis_and_rollback_with_a_description(gpt_neox, make_neox, moved, make_domain, tokenizer, tmp_path):
    for name, model in (("before", make_neox()), ("after", moved(make_neox()))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    folders = {name: tmp_path / name for name in ("before", "after")}
    with pytest.raises(ValueError, match="no route map for model type 'gpt_neox'"):
        InterferenceAnalyzer.from_pretrained(**folders, config=CONFIG)
    analyzer = InterferenceAnalyzer.from_pretrained(**folders, config=CONFIG, dtype="float64", description=gpt_neox)
    report = analyzer.analyze(make_domain("math"), make_domain("qa", prompts=["ab?"]))
    assert abs(report.residual) < 1e-6 * abs(report.damage)
    repair = RouteRollback(budget=0.5, scope="joint").fit(report, description=gpt_neox)
    repaired, after = repair.merge(), analyzer.after
    changed = {
        name: (value != after.get_parameter(name).float()).float() for name, value in repaired.named_parameters()
    }
    routes, outside = RouteMap(after.config, gpt_neox).sum_by_route(changed)
    assert (routes > 0).sum() == 20 and outside == 0


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "phi3", "gpt2", "smollm3", "qwen3-moe"])
def test_analysis_of_every_architecture(architecture, make_model, moved, make_domain, tokenizer):
    before = make_model(architecture)
    after = moved(before, scale=1e-3)
    report = InterferenceAnalyzer(before, after, tokenizer, config=CONFIG).analyze(
        make_domain("math"), make_domain("qa", prompts=["ab?"])
    )
    # Attention in float32, and the routing of experts, keep some of them from more digits.
    assert abs(report.residual) < 1e-3 * abs(report.damage)
    assert all(np.isfinite(values).all() for values in report.routes.values())
    assert (report.routes["edit_size"] > 0).all()


def test_page_names_every_model_type():
    page = PAGE.read_text(encoding="utf-8")
    assert [name for name in ARCHITECTURES if f"`{name}`" not in page] == []
