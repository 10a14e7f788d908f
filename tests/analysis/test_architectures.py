import copy
import re
from pathlib import Path

import pytest
import torch
from test_models import NESTED, lora
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from trl_interfere.analysis.analyzer import InterferenceAnalyzer
from trl_interfere.analysis.architectures import ARCHITECTURES, LLAMA, Architecture, Slices
from trl_interfere.analysis.config import InterferenceConfig
from trl_interfere.analysis.routes import RouteMap
from trl_interfere.models import load_model


PAGE = Path(__file__).parents[2] / "docs" / "science" / "interference.md"
CONFIG = InterferenceConfig(reference="dataset", quadrature_nodes=16, batch_size=2)


@pytest.fixture(scope="module")
def xglm():
    """The description on the page."""
    section = PAGE.read_text(encoding="utf-8").split("## Architectures\n")[1].split("\n## ")[0]
    (example,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    variables = {}
    exec(example, variables)
    return variables["xglm"]


@pytest.fixture
def model():
    config = AutoConfig.for_model(
        "xglm",
        **{"vocab_size": 25, "d_model": 16, "ffn_dim": 12, "num_layers": 2, "attention_heads": 4, "init_std": 0.3},
        **{"pad_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 64},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def test_analysis_with_the_description_of_the_page(xglm, model, moved, make_domain, tokenizer, tmp_path):
    for name, part in (("before", model), ("after", moved(model))):
        part.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    folders = {name: tmp_path / name for name in ("before", "after")}
    with pytest.raises(ValueError, match="no route map for model type 'xglm'"):
        InterferenceAnalyzer.from_pretrained(**folders, config=CONFIG)
    analyzer = InterferenceAnalyzer.from_pretrained(**folders, config=CONFIG, description=xglm)
    report = analyzer.analyze(make_domain("math"), make_domain("qa", prompts=["ab?"]))
    assert abs(report.residual) < 1e-3 * abs(report.damage)
    assert (report.routes["edit_size"] > 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc1.weight": None, "fc1.bias": None}, "mlp routes of layer 0 read"),
        ({"fc2.weight": None}, "mlp routes of layer 0 write"),
        ({"fc1.bias": None}, "tensor model.layers.0.fc1.bias: expected in the description"),
        ({"fc3.weight": Slices(0, ("mlp",))}, "expected the tensor fc3.weight of the description"),
    ],
)
def test_descriptions_that_miss_something(xglm, model, change, message):
    tensors = {name: slices for name, slices in {**xglm.tensors, **change}.items() if slices is not None}
    route_map = RouteMap(model.config, Architecture(tensors, xglm.counts, parents=xglm.parents))
    with pytest.raises(ValueError, match=message):
        route_map.check([name for name, _ in model.named_parameters()], "xglm")
    RouteMap(model.config, xglm).check([name for name, _ in model.named_parameters()], "xglm")


def test_a_description_of_the_names_in_memory_alone(make_model):
    model, known = make_model("mixtral"), ARCHITECTURES["mixtral"]
    tensors = {name: slices for name, slices in known.tensors.items() if "block_sparse_moe" not in name}
    route_map = RouteMap(model.config, Architecture(tensors, known.counts, known.experts))
    on_disk = [f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in range(2) for part in "qkvo"]
    with pytest.raises(ValueError, match="on disk: expected tensors through which the mlp routes of layer 0 read"):
        route_map.check([name for name, _ in model.named_parameters()], "mixtral", on_disk)


def test_nested_models_have_the_map_of_their_language_model():
    for nested in "gemma3 qwen2_5_vl qwen3_vl mistral3 gemma4 gemma3n llama4 qwen3_5 qwen2_vl".split():
        config = AutoConfig.for_model(nested)
        assert RouteMap(config).description is ARCHITECTURES[config.get_text_config().model_type]
    assert RouteMap(AutoConfig.for_model("gemma3")).description is LLAMA


@pytest.mark.parametrize("family", NESTED)
def test_analysis_of_nested_models(family, moved, make_domain, tokenizer):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **copy.deepcopy(NESTED[family]))
    before = AutoModelForImageTextToText.from_config(config).eval()
    report = InterferenceAnalyzer(before, moved(before, 1e-3), tokenizer, config=CONFIG).analyze(
        make_domain("math"), make_domain("qa", prompts=["ab?"])
    )
    assert abs(report.residual) < 1e-3 * abs(report.damage)
    assert (report.routes["edit_size"] > 0).all() and (report.routes["activity_earlier"] > 0).any()


def test_adapters_of_expert_parameters_are_analysed(make_model, make_domain, tokenizer, tmp_path):
    base = make_model("qwen3-moe", dtype=torch.float32, moe_intermediate_size=8)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    options = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    lora(load_model(tmp_path / "base"), tmp_path / "adapter", **options)
    analyzer = InterferenceAnalyzer.from_pretrained(tmp_path / "base", tmp_path / "adapter", config=CONFIG)
    report = analyzer.analyze(make_domain("math"), make_domain("qa", prompts=["ab?"]))
    sizes = report.routes["edit_size"]
    assert (sizes[analyzer.route_map.of_layer("mlp", 0)] > 0).all()
    assert (sizes[analyzer.route_map.of_kind("key_value")] == 0).all()
    kinds = {name: share["norm"] for name, share in report.updates["update"]["by_kind"].items()}
    assert kinds["mlp.experts.*.gate_proj.weight"] > 0 and kinds["self_attn.k_proj.weight"] == 0
    assert sum(size**2 for size in kinds.values()) == pytest.approx((sizes**2).sum(), rel=1e-6)


def test_page_names_every_model_type():
    page = PAGE.read_text(encoding="utf-8")
    assert [name for name in ARCHITECTURES if f"`{name}`" not in page] == []
