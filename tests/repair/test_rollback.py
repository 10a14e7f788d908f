import numpy as np
import pytest
import torch
from datasets import Dataset

from trl_interfere.analysis.activity import route_activity
from trl_interfere.analysis.analyzer import InterferenceAnalyzer
from trl_interfere.analysis.config import InterferenceConfig
from trl_interfere.analysis.gradients import mean_loss
from trl_interfere.analysis.references import collect_references
from trl_interfere.analysis.routes import RouteMap
from trl_interfere.domain import Domain
from trl_interfere.repair.rollback import STEPS, RouteRollback, line_search, roll_back, rolled_back, search_step


# The tiny model: 2 x 12 MLP channels, 2 x 4 query heads, 2 x 2 key/value heads.
NUM_ROUTES = 36


@pytest.fixture
def update(architecture, make_model, moved):
    before = make_model(architecture)
    return before, moved(before), RouteMap(before.config)


def parameters(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_step_1_on_all_routes_is_a_restore(update):
    before, after, route_map = update
    start, end = parameters(before), parameters(after)
    roll_back(after, start, route_map, np.arange(route_map.num_routes), step=1.0)
    for name, parameter in after.named_parameters():
        assert torch.equal(parameter, end[name] if route_map.cut(name) is None else start[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_1_restores_to_the_bit(dtype, make_model, moved):
    before = make_model("llama", dtype=dtype)
    after = moved(before)
    route_map = RouteMap(before.config)
    roll_back(after, dict(before.named_parameters()), route_map, np.arange(route_map.num_routes), step=1.0)
    for name, parameter in after.named_parameters():
        if route_map.cut(name) is not None:
            assert torch.equal(parameter, before.get_parameter(name)), name


@pytest.mark.parametrize("architecture", ["qwen3", "llama-biases", "qwen3-moe", "phi3", "gpt2"])
@pytest.mark.parametrize("step", [0.5, 1.0, 4.0, -1.0])
def test_only_the_slices_of_chosen_routes_move(step, update, owned_slices):
    before, after, route_map = update
    start, end = parameters(before), parameters(after)
    chosen = [3, 20, 25, 31, 34]
    expected = {name: tensor.clone() for name, tensor in end.items()}
    for route in chosen:
        for name, index in owned_slices(after)[route][3]:
            expected[name][index] = end[name][index] - step * (end[name][index] - start[name][index])
    roll_back(after, start, route_map, np.array(chosen), step)
    for name, parameter in after.named_parameters():
        moved_elements = expected[name] != end[name]
        assert torch.equal(parameter.detach()[~moved_elements], end[name][~moved_elements]), name
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_context_restores_to_the_bit(dtype, make_model, moved):
    before = make_model("llama", dtype=dtype)
    after = moved(before)
    start, end, route_map = parameters(before), parameters(after), RouteMap(before.config)
    routes = np.arange(route_map.num_routes)
    with rolled_back(after, start, route_map, routes, 2.5) as model:
        assert model is after
        assert not any(torch.equal(model.get_parameter(name), end[name]) for name in end if route_map.cut(name))
    assert all(torch.equal(parameter, end[name]) for name, parameter in after.named_parameters())
    with pytest.raises(RuntimeError, match="inside"), rolled_back(after, start, route_map, routes, 0.3):
        raise RuntimeError("inside")
    assert all(torch.equal(parameter, end[name]) for name, parameter in after.named_parameters())


@pytest.mark.parametrize(
    "scope, budget, count",
    [
        ("mlp", 0.25, 6),
        ("mlp", 0.01, 1),
        ("mlp", 1.0, 24),
        ("attention", 0.5, 6),
        ("attention", 0.3, 4),
        ("joint", 0.1, 4),
        ("joint", 1.0, 36),
    ],
)
def test_number_and_order_of_selected_routes(scope, budget, count, make_model, make_report):
    route_map = RouteMap(make_model("llama").config)
    damage = np.random.default_rng(1).normal(size=NUM_ROUTES)
    selected = RouteRollback(scope=scope, budget=budget).select(make_report(NUM_ROUTES, damage=damage), route_map)
    members = {"mlp": range(24), "attention": range(24, 36), "joint": range(36)}[scope]
    assert selected.tolist() == sorted(members, key=lambda route: -damage[route])[:count]


def test_each_criterion_selects_by_its_own_measure(make_model, make_report):
    route_map = RouteMap(make_model("llama").config)
    measures = {
        name: np.eye(NUM_ROUTES)[route]
        for name, route in [("damage", 2), ("second_order", 5), ("first_order", 9), ("edit_size", 14), ("opposed", 20)]
    }
    report = make_report(NUM_ROUTES, **measures)
    expected = {"damage": 2, "second_order": 5, "first_order": 9, "magnitude": 14, "route_conflict": 20}
    for criterion, route in expected.items():
        assert RouteRollback(criterion=criterion, budget=0.01).select(report, route_map).tolist() == [route]
    # In the layer of route 2, but not route 2 itself.
    matched = RouteRollback(criterion="random_matched", budget=0.01).select(report, route_map)
    assert len(matched) == 1 and matched[0] in {*range(12)} - {2}


def test_protection_changes_the_selection(make_model, make_report):
    route_map = RouteMap(make_model("llama").config)
    routes = {"damage": np.zeros(NUM_ROUTES), "later_damage": np.zeros(NUM_ROUTES)}
    routes["damage"][[4, 6]] = [2.0, 1.0]
    routes["later_damage"][4] = -3.0
    report = make_report(NUM_ROUTES, **routes)
    assert RouteRollback(budget=0.01).select(report, route_map).tolist() == [4]
    assert RouteRollback(budget=0.01, protection=0.5).select(report, route_map).tolist() == [6]


@pytest.mark.parametrize("criterion", ["random", "random_matched"])
def test_random_selections_are_reproducible(criterion, make_model, make_report):
    route_map = RouteMap(make_model("llama").config)
    rng = np.random.default_rng(0)
    report = make_report(NUM_ROUTES, damage=rng.normal(size=NUM_ROUTES), edit_size=rng.uniform(size=NUM_ROUTES))
    selected = [
        tuple(RouteRollback(criterion=criterion, budget=0.2, seed=seed).select(report, route_map))
        for seed in (0, 0, 1, 2, 3)
    ]
    assert selected[0] == selected[1]
    assert len(set(selected)) == 4


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
@pytest.mark.parametrize("best", STEPS)
def test_line_search_finds_the_lowest_step(best, update):
    before, after, route_map = update
    start, end = parameters(before), parameters(after)
    name, index = "model.layers.0.mlp.up_proj.weight", (4, 7)
    tried = []

    def objective(model):
        taken_back = (end[name][index] - model.get_parameter(name)[index]) / (end[name][index] - start[name][index])
        tried.append(taken_back.item())
        return (taken_back.item() - best - 0.1) ** 2

    assert line_search(after, start, route_map, np.array([4]), objective) == best
    assert tried == pytest.approx(STEPS)
    assert all(torch.equal(parameter, end[name]) for name, parameter in after.named_parameters())


def test_line_search_against_losses_of_separate_models(make_model, moved, sequences, make_batches, token_loss):
    before = make_model("llama")
    after, route_map = moved(before), RouteMap(before.config)
    start, routes, batches = parameters(before), np.arange(0, 36, 2), make_batches(sequences)
    losses = []
    for step in STEPS:
        candidate = moved(before)
        roll_back(candidate, start, route_map, routes, step)
        losses.append(token_loss(candidate, sequences).item())
    found = line_search(after, start, route_map, routes, lambda model: mean_loss(model, batches))
    assert found == STEPS[losses.index(min(losses))]


def test_line_search_passes_over_a_step_that_breaks_the_model(make_model, moved):
    before = make_model("llama")
    after, route_map = moved(before), RouteMap(before.config)
    values = iter([3.0, 1.0, 2.0, float("nan"), float("inf")])
    steps = (0.5, 1.0, 1.5, 2.0, 4.0)
    found = line_search(after, parameters(before), route_map, np.array([0]), lambda _: next(values), steps)
    assert found == 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_line_search_without_a_step_that_works(value, make_model, moved):
    before = make_model("llama")
    after, route_map = moved(before), RouteMap(before.config)
    end = parameters(after)
    with pytest.raises(ValueError, match=f"objective: expected a finite value at one of the steps .*{value}"):
        line_search(after, parameters(before), route_map, np.array([0]), lambda _: value)
    assert all(torch.equal(parameter, end[name]) for name, parameter in after.named_parameters())


@pytest.fixture
def saved(make_model, moved, make_report, edit_size, tmp_path):
    """Checkpoints on disk, and a report that names them."""
    before = make_model("llama", dtype=torch.float32)
    after = moved(before)
    for name, model in (("before", before), ("after", after)):
        model.save_pretrained(tmp_path / name)
    places = tmp_path / "before", tmp_path / "after"
    measures = {"damage": np.random.default_rng(2).normal(size=NUM_ROUTES), "edit_size": edit_size(*places)}
    return before, after, make_report(NUM_ROUTES, *map(str, places), **measures)


@pytest.mark.parametrize("in_memory", [False, True])
def test_apply(in_memory, saved, owned_slices):
    before, after, report = saved
    start, end = parameters(before), parameters(after)
    rollback = RouteRollback(criterion="damage", budget=0.25, scope="joint", step=2.0)
    repaired = rollback.apply(report, model=after if in_memory else None)
    assert (repaired is after) == in_memory
    chosen = np.argsort(-report.routes["damage"])[:9]
    expected = {name: tensor.clone() for name, tensor in end.items()}
    for route in chosen:
        for name, index in owned_slices(after)[route][3]:
            expected[name][index] = end[name][index] - 2 * (end[name][index] - start[name][index])
    for name, parameter in repaired.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-6, atol=1e-7)


def test_apply_with_the_optimal_step(saved):
    before, after, report = saved
    target = parameters(before)

    def distance(model):  # lowest where the chosen routes are back
        return sum((parameter - target[name]).norm().item() for name, parameter in model.named_parameters())

    repaired = RouteRollback(budget=1.0, scope="joint", step="optimal").apply(report, objective=distance)
    expected = RouteRollback(budget=1.0, scope="joint", step=1.0).apply(report)
    for name, parameter in repaired.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name


def test_a_given_step_is_taken_even_with_an_objective(saved):
    report = saved[2]
    repaired = RouteRollback(budget=0.5, step=0.5).apply(report, objective=lambda model: 1.0)
    expected = RouteRollback(budget=0.5, step=0.5).apply(report)
    other = RouteRollback(budget=0.5, step=1.0).apply(report, objective=lambda model: 1.0)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(repaired.get_parameter(name), expected.get_parameter(name))
    assert not torch.equal(other.get_parameter(name), expected.get_parameter(name))


def test_optimal_needs_an_objective(saved):
    with pytest.raises(ValueError, match="step: 'optimal' needs an objective"):
        RouteRollback(step="optimal").apply(saved[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_apply_keeps_the_stored_dtype(dtype, make_model, moved, make_report, edit_size, tmp_path):
    before = make_model("llama", dtype=dtype)
    for name, model in (("before", before), ("after", moved(before, scale=0.1))):
        model.save_pretrained(tmp_path / name)
    places = tmp_path / "before", tmp_path / "after"
    report = make_report(NUM_ROUTES, *map(str, places), edit_size=edit_size(*places))
    repaired = RouteRollback(budget=1.0, scope="joint").apply(report)
    assert repaired.config.dtype == dtype


def test_apply_refuses_a_checkpoint_that_was_trained_again(saved, moved):
    before, after, report = saved
    moved(before, seed=7).save_pretrained(report.after)
    with pytest.raises(ValueError, match="the report of math is about, found another one"):
        RouteRollback().apply(report)
    RouteRollback().apply(report, model=after, before=parameters(before))  # what is handed over is not compared


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"criterion": "damag"}, "criterion: expected one of .*found 'damag'"),
        ({"budget": 0}, "budget: expected a share above 0 and up to 1, found 0"),
        ({"budget": 1.01}, "budget: expected a share above 0 and up to 1, found 1.01"),
        ({"budget": float("nan")}, "budget: expected a share above 0 and up to 1, found nan"),
        ({"step": "best"}, "step: expected a number of 0 or more or one of 'optimal', .*, found 'best'"),
        ({"step": None}, "step: expected a number of 0 or more or one of 'optimal', .*, found None"),
        ({"step": float("nan")}, "step: expected a number of 0 or more or one of 'optimal', .*, found nan"),
        ({"scope": "everything"}, "scope: expected one of .*found 'everything'"),
        ({"criterion": "magnitude", "protection": 1.0}, "protection: expected a criterion of .*found 'magnitude'"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        RouteRollback(**settings)


CLOSED = -12.0  # bias of the gate of a channel that is hardly active, noise or not


@pytest.fixture(scope="module")
def trained(make_model, tokenizer):
    """A model of 300 MLP channels, half of them closed, that has learned a random chain of characters."""
    rng = np.random.default_rng(0)
    chances = rng.dirichlet(np.full(16, 0.3), size=(16, 16))
    texts = []
    for _ in range(128):
        states = list(rng.integers(0, 16, size=2))
        while len(states) < 12:
            states.append(rng.choice(16, p=chances[states[-2], states[-1]]))
        texts.append("".join("0123456789abcdef"[state] for state in states))
    rows = {"prompt": [text[:2] for text in texts], "completion": [text[2:] for text in texts]}
    domain = Domain("chain", selection_dataset=Dataset.from_dict(rows), reward_funcs=len)
    sizes = {"hidden_size": 32, "intermediate_size": 150, "head_dim": 8, "initializer_range": 0.1}
    model = make_model("llama", dtype=torch.float32, mlp_bias=True, **sizes)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.bias[::2] = CLOSED
    config = InterferenceConfig(reference="dataset", batch_size=128)
    (batch,) = collect_references(model, tokenizer, domain, config).batches(128, 0, model.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(60):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, domain, [batch], config


@pytest.mark.parametrize("seed", [0, 1])
def test_planted_damage(seed, trained, moved, make_domain, owned_slices, tokenizer):
    model, domain, batches, config = trained
    route_map = RouteMap(model.config)
    activity = route_activity(model, batches, route_map)[route_map.of_kind("mlp")]
    active, inactive = np.split(np.argsort(-activity)[[*range(30), *range(-30, 0)]], 2)
    assert activity[active].min() > 100 * activity[inactive].max()

    generator = torch.Generator().manual_seed(seed)
    slices = owned_slices(model)

    def with_noise(routes):
        """A copy of the model with noise of norm 1 on each route."""
        copied = moved(model, scale=0.0)
        with torch.no_grad():
            for route in routes:
                owned = slices[route][3]
                noise = [
                    torch.randn(copied.get_parameter(name)[index].shape, generator=generator) for name, index in owned
                ]
                norm = sum(part.square().sum() for part in noise).sqrt()
                for (name, index), part in zip(owned, noise, strict=True):
                    copied.get_parameter(name)[index] += part / norm
        return copied

    losses = [mean_loss(with_noise(routes), batches) for routes in ([], active, inactive)]
    assert losses[1] - losses[0] > 10 * abs(losses[2] - losses[0])  # the damage is planted where it should be

    analyzer = InterferenceAnalyzer(model, with_noise([*active, *inactive]), tokenizer, config=config)
    report = analyzer.analyze(domain, make_domain("later"))
    np.testing.assert_allclose(report.routes["edit_size"][[*active, *inactive]], 1, rtol=1e-5)
    found = {
        criterion: np.isin(RouteRollback(criterion=criterion, budget=0.1).select(report, route_map), active).sum()
        for criterion in ("damage", "magnitude")
    }
    assert found["damage"] >= 27
    assert found["magnitude"] <= 22  # half of its 30 by chance
    repaired = [
        RouteRollback(criterion=name, budget=0.1).select(report, route_map) for name in ("damage", "magnitude")
    ]
    start, left = parameters(model), []
    for routes in repaired:
        with rolled_back(analyzer.after, start, route_map, routes, 1.0):
            left.append(mean_loss(analyzer.after, batches) - losses[0])
    assert left[0] < 0.1 * report.damage < left[1]


def test_steps_that_are_out_of_the_question_do_not_end_a_search(update_of_llama):
    before, after, route_map = update_of_llama
    losses, scores = iter([-step for step in STEPS] * 2), iter([-np.inf] * 5 + [0.5])
    arguments = (after, parameters(before), route_map, np.arange(4), lambda model: next(losses))
    step, tried = search_step(*arguments, lambda model: next(scores))
    assert step == 1.0  # 4, 3, 2.5, 2 and 1.5 have lower losses and cost too much
    assert [entry["step"] for entry in tried if "score" not in entry] == [0.25, 0.5]
    with pytest.raises(ValueError, match="score: expected a finite value at one of the steps"):
        search_step(*arguments, lambda model: -np.inf)


@pytest.fixture
def update_of_llama(make_model, moved):
    before = make_model("llama")
    return before, moved(before), RouteMap(before.config)


def test_models_that_do_not_fit_the_report(make_model, moved, make_report):
    from peft import LoraConfig, get_peft_model

    before = make_model("llama")
    start, report = parameters(before), make_report(NUM_ROUTES, "before", "after")
    rollback = RouteRollback(budget=0.25)
    with pytest.raises(ValueError, match="model: expected one of 36 routes as in the report, found one of 40"):
        rollback.apply(report, make_model("llama", intermediate_size=14), before=start)
    with pytest.raises(ValueError, match="before: expected .* of shape .*, found none"):
        rollback.apply(report, moved(before), before={})
    adapted = get_peft_model(moved(before), LoraConfig(r=2, target_modules=["up_proj", "q_proj"]))
    with pytest.raises(ValueError, match="expected whole weights .*, found an adapter on them: merge it first"):
        rollback.apply(report, adapted, before=start)


def test_matched_routes_run_out(make_model, make_report):
    route_map = RouteMap(make_model("llama").config)
    report = make_report(NUM_ROUTES)
    with pytest.raises(ValueError, match="random_matched: expected other routes .* found none at a budget of 1"):
        RouteRollback(criterion="random_matched", budget=1.0).select(report, route_map)
