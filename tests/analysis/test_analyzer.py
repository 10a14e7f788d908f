import copy
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from test_models import lora

from trl_interfere.analysis.analyzer import InterferenceAnalyzer
from trl_interfere.analysis.config import InterferenceConfig
from trl_interfere.analysis.damage import opposed_edits
from trl_interfere.analysis.gradients import mean_gradient
from trl_interfere.analysis.objectives import ForwardKL
from trl_interfere.analysis.overlap import overlaps
from trl_interfere.analysis.report import InterferenceReport
from trl_interfere.analysis.routes import RouteMap
from trl_interfere.analysis.weight_diff import update_statistics
from trl_interfere.checkpoint import Checkpoint
from trl_interfere.evaluation.scorer import Scorer
from trl_interfere.models import load_model


CONFIG = InterferenceConfig(
    reference="dataset", quadrature_nodes=8, later_quadrature_nodes=8, difference_step=1e-3, batch_size=2
)


@pytest.fixture
def models(make_model, moved):
    base = make_model("llama")
    before = moved(base, seed=5)
    return base, before, moved(before, seed=6)


@pytest.fixture
def domains(make_domain):
    return (
        make_domain("math", prompts=["1+2=", "4+4=", "9="], completion=["3", "8", "90"]),
        make_domain("qa", prompts=["ab?", "cde?"], completion=["a b", "cd"]),
        make_domain("writing", prompts=["h", "ff 3", "a"], completion=["hh", "fff", "abc"]),
    )


def as_sequences(tokenizer, domain):
    ids = [
        (tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"])
        for row in domain.selection_dataset
    ]
    return [(prompt, [*completion, tokenizer.eos_token_id]) for prompt, completion in ids]


def flat(tensors):
    return torch.cat([tensor.detach().ravel() for tensor in tensors])


def test_every_figure_of_a_report(models, domains, tokenizer, token_loss, dense_sums):
    _, before, after = models
    math, qa, writing = domains
    start, end = copy.deepcopy(before.state_dict()), copy.deepcopy(after.state_dict())
    analyzer = InterferenceAnalyzer(before, after, tokenizer, config=CONFIG)
    report = analyzer.analyze(earlier=math, later=[qa, writing])
    for model, kept in ((before, start), (after, end)):
        assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())

    losses, gradients = {}, {}
    for domain in domains:
        sequences = as_sequences(tokenizer, domain)
        loss = token_loss(before, sequences)
        losses[domain.name] = loss.item(), token_loss(after, sequences).item()
        gradients[domain.name] = torch.autograd.grad(loss, list(before.parameters()), create_graph=True)
    assert (report.loss_before, report.loss_after) == pytest.approx(losses["math"], rel=1e-9)

    delta = {name: end[name] - start[name] for name, _ in before.named_parameters()}
    math_gradient = flat(gradients["math"])
    assert report.first_order == pytest.approx((math_gradient @ flat(delta.values())).item(), rel=1e-8)
    products = {name: g * delta[name] for name, g in zip(delta, gradients["math"], strict=True)}
    np.testing.assert_allclose(report.routes["first_order"], dense_sums(before, products)[0], rtol=1e-7, atol=1e-9)
    curved = torch.autograd.grad(gradients["math"], list(before.parameters()), grad_outputs=list(delta.values()))
    products = {name: 0.5 * h * delta[name] for name, h in zip(delta, curved, strict=True)}
    expected = dense_sums(before, products)
    np.testing.assert_allclose(report.routes["second_order"], expected[0], rtol=1e-4, atol=1e-5)
    assert report.second_order == pytest.approx(expected[0].sum() + expected[1], rel=1e-4)
    squares = dense_sums(before, {name: tensor**2 for name, tensor in delta.items()})[0]
    np.testing.assert_allclose(report.routes["edit_size"], np.sqrt(squares), rtol=1e-9)

    damage = losses["math"][1] - losses["math"][0]
    assert report.damage == pytest.approx(damage, rel=1e-8)
    assert report.attributed == report.routes["damage"].sum()
    assert abs(report.residual) < 1e-5 * abs(damage)

    mean_later = (flat(gradients["qa"]) + flat(gradients["writing"])) / 2
    cosine = torch.nn.functional.cosine_similarity
    assert report.cosines["global"] == pytest.approx(cosine(math_gradient, mean_later, dim=0).item(), rel=1e-8)
    for name in ("qa", "writing"):
        assert report.later_loss_before[name] == pytest.approx(losses[name][0], rel=1e-9)
        assert report.later_loss_after[name] == pytest.approx(losses[name][1], rel=1e-9)
        assert abs(report.later_residual[name]) < 1e-5 * abs(losses[name][1] - losses[name][0])
        expected = cosine(math_gradient, flat(gradients[name]), dim=0).item()
        assert report.cosines["by_domain"][name]["global"] == pytest.approx(expected, rel=1e-8)

    assert (report.earlier, report.later) == ("math", ["qa", "writing"])
    assert report.references["math"] == {"kind": "dataset", "n": 3, "considered": 3, "tokens": 7}
    assert report.references["writing"] == {"kind": "dataset", "n": 3, "considered": 3, "tokens": 11}
    assert report.config == asdict(CONFIG)
    assert report.versions["torch"] == torch.__version__

    assert set(report.cosines["reliability"]) == {"math", "qa", "writing"}
    assert report.cosines["pairs"]["math"]["qa"] == report.cosines["by_domain"]["qa"]["global"]
    expected = cosine(flat(gradients["qa"]), flat(gradients["writing"]), dim=0).item()
    assert report.cosines["pairs"]["qa"]["writing"] == pytest.approx(expected, rel=1e-8)
    low, high = report.cosines["by_domain"]["qa"]["interval"]
    assert low <= report.cosines["by_domain"]["qa"]["global"] <= high
    assert report.difference_step == 1e-3 and 0 <= report.second_order_error < 1e-3 * abs(report.second_order)
    assert report.subspace is None
    as_earlier = [analyzer.analyze(domain, math).routes["damage"] for domain in (qa, writing)]
    np.testing.assert_allclose(report.routes["later_damage"], np.mean(as_earlier, axis=0), rtol=1e-6, atol=1e-10)


def test_correct_completions_come_from_the_model_that_was_trained_on_them(models, domains, tokenizer):
    _, before, after = models
    analyzer = InterferenceAnalyzer(before, after, tokenizer, config=InterferenceConfig(max_new_tokens=6))
    math, qa, _ = domains
    references = analyzer.references(math, [qa])
    scorer = Scorer(tokenizer, max_new_tokens=6)
    for domain, model, other in ((math, before, after), (qa, after, before)):
        prompts = domain.selection_dataset["prompt"]
        assert references[domain.name].completions == scorer.complete_ids(model, prompts)
        assert references[domain.name].completions != scorer.complete_ids(other, prompts)


@pytest.mark.parametrize("setting", ["offload", "gradient_checkpointing", "data_parallel"])
def test_ways_to_compute_change_nothing(setting, models, domains, tokenizer):
    base, before, after = models
    reports = [
        InterferenceAnalyzer(before, after, tokenizer, base=base, config=replace(CONFIG, **settings)).analyze(
            *domains[:2]
        )
        for settings in ({}, {setting: True})
    ]
    for name, values in reports[0].routes.items():
        np.testing.assert_allclose(reports[1].routes[name], values, rtol=1e-9, atol=1e-12, err_msg=name)
    assert reports[1].cosines["global"] == pytest.approx(reports[0].cosines["global"], rel=1e-9)
    assert reports[1].loss_after == pytest.approx(reports[0].loss_after, rel=1e-12)


def test_divergence_as_the_objective(models, domains, tokenizer):
    base, before, after = models
    config = replace(CONFIG, objective="kl")
    analyzer = InterferenceAnalyzer(before, after, tokenizer, base=base, config=config)
    found = analyzer.analyze(*domains[:2])
    plain = InterferenceAnalyzer(before, after, tokenizer, base=base, config=CONFIG).analyze(*domains[:2])
    batches = analyzer.batches(analyzer.references(domains[0], [domains[1]]))
    gradients = [flat(mean_gradient(before, batches[name], ForwardKL(base))[1].values()) for name in ("math", "qa")]
    expected = torch.nn.functional.cosine_similarity(*gradients, dim=0).item()
    assert found.cosines["global"] == pytest.approx(expected, rel=1e-7)
    assert found.cosines["global"] != pytest.approx(plain.cosines["global"], rel=1e-3)
    assert found.loss_before == pytest.approx(plain.loss_before, rel=1e-12)  # damage stays one of the token loss
    for name in ("damage", "first_order", "second_order"):
        np.testing.assert_allclose(found.routes[name], plain.routes[name], rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="objective: 'kl' needs `base`"):
        InterferenceAnalyzer(before, after, tokenizer, config=config).analyze(*domains[:2])


def test_surrogate_of_grpo_as_the_objective(models, make_domain, tokenizer):
    def digits(completions, **kwargs):
        return [sum(map(str.isdigit, completion)) for completion in completions]

    _, before, after = models
    domains = [
        replace(make_domain(name), metric=None, reward_funcs=[digits], reward_weights=[weight])
        for name, weight in (("math", 1.0), ("opposite", -1.0))
    ]
    config = replace(CONFIG, objective="grpo", num_generations=6, max_new_tokens=8)
    analyzer = InterferenceAnalyzer(before, after, tokenizer, config=config)
    first, again = (analyzer.analyze(*domains).cosines for _ in "12")
    assert first == again
    # The same completions, sampled with one seed, with advantages of opposite sign.
    assert first["global"] == pytest.approx(-1, abs=1e-5)


def test_conflict_subspace_in_a_report(models, domains, tokenizer, tmp_path):
    _, before, after = models
    config = replace(CONFIG, subspace_size=3, subspace_prompts=2)
    report = InterferenceAnalyzer(before, after, tokenizer, config=config).analyze(*domains[:2])
    assert report.subspace["references"] == 2 and report.subspace["seed"] == 0
    assert len(report.subspace["update"]["eigenvalues"]) == len(report.subspace["random"]["eigenvalues"]) == 3
    assert report.subspace["update"] != report.subspace["random"]
    report.save_pretrained(tmp_path)
    assert InterferenceReport.from_pretrained(tmp_path).subspace == report.subspace


def test_model_is_restored_after_a_failure(models, domains, tokenizer):
    _, before, after = models
    start = copy.deepcopy(before.state_dict())

    def fail(part):
        if part == "damage of the later domains":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        InterferenceAnalyzer(before, after, tokenizer, config=CONFIG).analyze(*domains[:2], progress=fail)
    assert all(torch.equal(tensor, start[name]) for name, tensor in before.state_dict().items())


def test_opposed_edits(models, owned_slices, dense_sums):
    base, before, after = (
        {name: parameter.detach() for name, parameter in model.named_parameters()} for model in models
    )
    delta = {name: after[name] - before[name] for name in before}
    with torch.no_grad():  # an edit that the update undoes, one that it doubles, and a route that was not edited
        for route, factor in ((3, -0.5), (27, 1.0), (33, 0.0)):
            for name, index in owned_slices(models[1])[route][3]:
                base[name][index] = before[name][index] - (delta[name][index] / factor if factor else 0)
    found = opposed_edits(RouteMap(models[1].config), models[0], before, delta)
    edit = {name: before[name] - base[name] for name in before}
    inner, _ = dense_sums(models[1], {name: edit[name] * delta[name] for name in edit})
    size = np.sqrt(dense_sums(models[1], {name: tensor**2 for name, tensor in edit.items()})[0])
    np.testing.assert_allclose(found["earlier_edit_size"], size, rtol=1e-9)
    expected = [max(0.0, -a / b) if b else 0.0 for a, b in zip(inner, size, strict=True)]
    np.testing.assert_allclose(found["opposed"], expected, rtol=1e-9, atol=1e-12)
    assert found["opposed"][3] > 0 and found["opposed"][27] == 0 and found["earlier_edit_size"][33] == 0


@pytest.fixture
def folders(models, tokenizer, tmp_path):
    for name, model in zip(("base", "before", "after"), models, strict=True):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return tmp_path


def test_from_folders(folders, models, domains, tokenizer):
    config = InterferenceConfig(reference="dataset")
    analyzer = InterferenceAnalyzer.from_pretrained(
        before=folders / "before", after=folders / "after", base=folders / "base", config=config, dtype="float64"
    )
    report = analyzer.analyze(*domains[:2])
    expected = InterferenceAnalyzer(*models[1:], tokenizer, base=models[0], config=config).analyze(*domains[:2])
    # The norms of transformers compute in float32, those of the fixtures do not.
    assert report.damage == pytest.approx(expected.damage, rel=1e-4)
    for name, values in expected.routes.items():
        np.testing.assert_allclose(report.routes[name], values, rtol=1e-3, atol=1e-3 * np.abs(values).max())
    assert report.routes.keys() >= {"opposed", "earlier_edit_size"} and expected.updates is None
    for name in ("before", "after", "base"):
        assert getattr(report, name) == str(folders / name)
    report.save_pretrained(folders / "report")
    assert InterferenceReport.from_pretrained(folders / "report").to_dict() == report.to_dict()


DOWN = "tensor model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    "label, family, settings, message",
    [
        ("after", "llama", {"intermediate_size": 8}, rf"{DOWN}.weight: expected shape \(16, 12\) .*, found \(16, 8\)"),
        ("base", "llama-biases", {}, rf"{DOWN}.bias: expected shape None as in .*, found \(16,\)"),
        ("after", "mistral", {"head_dim": 4}, "expected model_type 'llama' as in .*, found 'mistral'"),
        ("base", "llama", {"num_key_value_heads": 4}, "expected num_key_value_heads 2 as in .*, found 4"),
    ],
)
def test_other_architecture(family, settings, message, label, make_model, tokenizer):
    checkpoints = {"before": make_model("llama"), "after": make_model("llama", seed=1)}
    checkpoints[label] = make_model(family, seed=2, **settings)
    with pytest.raises(ValueError, match=f"^{label} checkpoint .*: {message}$"):
        InterferenceAnalyzer(tokenizer=tokenizer, **checkpoints)


@pytest.mark.parametrize("damage", [shutil.rmtree, lambda folder: (folder / "config.json").write_text("{")])
def test_broken_checkpoints_are_named(damage, folders):
    damage(folders / "after")
    with pytest.raises(ValueError, match=str(folders / "after")):
        InterferenceAnalyzer.from_pretrained(before=folders / "before", after=folders / "after")


def test_other_domains_are_compared_but_not_attributed(models, domains, tokenizer):
    base, before, after = models
    math, qa, writing = domains
    analyzer = InterferenceAnalyzer(before, after, tokenizer, base=base, config=CONFIG)
    alone = analyzer.analyze(math, qa)
    beside = analyzer.analyze(math, qa, others=[writing])
    assert beside.later == ["qa"] and beside.later_loss_after.keys() == {"qa"}
    assert set(beside.references) == set(beside.cosines["reliability"]) == {"math", "qa", "writing"}
    assert set(beside.cosines["pairs"]["math"]) == {"qa", "writing"}
    assert set(beside.overlaps["active"]["math"]) == {"qa", "writing"}
    np.testing.assert_array_equal(beside.routes["damage"], alone.routes["damage"])
    assert beside.overlaps["active"]["math"]["qa"] == alone.overlaps["active"]["math"]["qa"]
    sizes = [alone.routes[name] for name in ("earlier_edit_size", "edit_size")]
    assert alone.overlaps["changed"]["all"] == overlaps(*sizes, analyzer.route_map)["all"]


@pytest.mark.parametrize("names", [["math", "math"], ["math"]])
def test_domains_that_are_missing_or_occur_twice(models, domains, tokenizer, names):
    _, before, after = models
    by_name = {domain.name: domain for domain in domains}
    analyzer = InterferenceAnalyzer(before, after, tokenizer, config=CONFIG)
    with pytest.raises(ValueError, match="domains: expected an earlier one and at least one later one, each once"):
        analyzer.analyze(by_name[names[0]], [by_name[name] for name in names[1:]])


def test_files_give_the_sparsity(models, domains, folders):
    for name, model in zip(("base", "before", "after"), models, strict=True):
        model.to(torch.bfloat16 if name != "after" else torch.float32).save_pretrained(folders / name)
    folders = {name: folders / name for name in ("base", "before", "after")}
    analyzer = InterferenceAnalyzer.from_pretrained(**folders, config=replace(CONFIG, check_prompts=0))
    report = analyzer.analyze(*domains[:2])
    expected = update_statistics([Checkpoint(folder) for folder in folders.values()])
    assert [report.updates[name] for name in ("earlier", "update")] == [entry.to_dict() for entry in expected]
    assert report.updates["update"]["whole"]["dtype"] == "bfloat16 -> float32"
    assert report.dtype == "bfloat16" and analyzer.before.dtype == torch.float32
    pairs = zip(analyzer.before.parameters(), analyzer.after.parameters(), strict=True)
    same = torch.cat([(a.bfloat16() == b.bfloat16()).ravel() for a, b in pairs])
    assert report.identical_in_bfloat16 == pytest.approx(same.double().mean().item())


@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_are_merged_from_their_own_tensors(models, domains, tokenizer, tmp_path, rslora):
    base, *_ = models
    base.to(torch.float32).save_pretrained(tmp_path / "base")
    folders = {}
    for seed, name in enumerate(("before", "after")):
        torch.manual_seed(seed)
        folders[name] = tmp_path / name
        settings = {"lora_alpha": 3, "target_modules": ["up_proj", "o_proj"], "use_rslora": rslora}
        merged = lora(load_model(tmp_path / "base"), folders[name], **settings)
        tokenizer.save_pretrained(folders[name])
        loaded = load_model(folders[name])
        for (key, parameter), expected in zip(loaded.named_parameters(), merged.parameters(), strict=True):
            torch.testing.assert_close(parameter, expected, msg=key)
    math, qa, _ = domains
    config = replace(CONFIG, check_prompts=0, difference_step=None)
    report = InterferenceAnalyzer.from_pretrained(**folders, base=tmp_path / "base", config=config).analyze(math, qa)
    assert report.after == str(folders["after"])
    assert report.updates["update"]["whole"]["dtype"] in ("float32 + adapter", "mixed")
    statistics = update_statistics([Checkpoint(folder) for folder in folders.values()], RouteMap(base.config))
    np.testing.assert_allclose(report.routes["edit_size"], statistics[0].edit_size, rtol=1e-3, atol=1e-7)
    with pytest.raises(ValueError, match="dtype: expected 'float32' to merge the adapter .*, found 'bfloat16'"):
        load_model(folders["after"], dtype="bfloat16")


@pytest.mark.parametrize(
    "settings", [{}, {"subspace_size": 2, "gradient_checkpointing": True}, {"objective": "kl", "check_prompts": 0}]
)
def test_passes_name_every_part(models, domains, tokenizer, settings):
    base, before, after = models
    math, *later = domains
    analyzer = InterferenceAnalyzer(before, after, tokenizer, base=base, config=replace(CONFIG, **settings))
    begun = []
    analyzer.analyze(math, later, progress=begun.append)
    passes = analyzer.passes(later=2)
    assert list(passes) == begun
    checked = 8 * analyzer.config.check_prompts / CONFIG.max_prompts
    assert passes["damage of the earlier domain"] == pytest.approx(2 + checked + 8)
    defaults = InterferenceAnalyzer(before, after, tokenizer).passes()
    assert sum(defaults.values()) == pytest.approx(10.92, abs=0.01)  # as docs/scaling.md has it
