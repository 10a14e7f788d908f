"""The closed-form repair against least squares on stacked activations of whole forward passes."""

from contextlib import ExitStack
from functools import partial

import pytest
import torch
from tiny_checkpoints import FAMILIES, ROWS, WIDTH, fit, load, save

from trl_interfere.repair import activation_moments, subspace_rollback
from trl_interfere.repair.activation_moments import (
    ActivationMoments,
    Solution,
    effective_dimension,
    gram,
    random_dimension,
)
from trl_interfere.repair.block_stream import skeleton


def matrix(module):
    """Weight as (outputs, inputs); a view."""
    return module.weight.T if type(module).__name__ == "Conv1D" else module.weight


def seen(model, paths, ids):
    """What modules get and give in a forward pass over one sequence."""
    found = {}

    def note(path, module, args, kwargs, output):
        found[path] = [*args, *kwargs.values()], output

    with ExitStack() as hooks, torch.no_grad():
        for path in paths:
            hook = model.get_submodule(path).register_forward_hook(partial(note, path), with_kwargs=True)
            hooks.enter_context(hook)
        model(input_ids=torch.tensor([ids]))
    return found


def solve(weight, bias, tokens, ridge, rank):
    """Minimiser by QR of all rows, for each domain (weight, inputs, outputs); the change is cut by SVD."""
    inputs = torch.cat([(share / len(x)) ** 0.5 * x for share, x, _ in tokens if len(x)])
    outputs = torch.cat([(share / len(x)) ** 0.5 * (y - bias) for share, x, y in tokens if len(x)])
    rho = ridge * inputs.square().sum() / inputs.shape[1]
    metric = torch.cat([inputs, rho**0.5 * torch.eye(inputs.shape[1], dtype=inputs.dtype)])
    solution = torch.linalg.lstsq(metric, torch.cat([outputs, rho**0.5 * weight.T]), driver="gelsd").solution.T
    if rank is None:
        return solution
    _, triangle = torch.linalg.qr(metric)  # RᵀR is the moments with the ridge
    left, values, right = torch.linalg.svd((solution - weight) @ triangle.T, full_matrices=False)
    values[rank:] = 0
    return weight + torch.linalg.solve(triangle, (left * values @ right).T).T


def expert_functions(module, expert):
    """Views of the two matrices of an expert as (outputs, inputs), their biases, and what lies between."""
    up, down = module.gate_up_proj[expert], module.down_proj[expert]
    if hasattr(module, "gate_up_proj_bias"):  # gpt_oss: transposed, and gate and up take turns

        def gate(x):
            first, second = x[:, ::2].clamp(max=module.limit), x[:, 1::2].clamp(-module.limit, module.limit)
            return (second + 1) * first * torch.sigmoid(first * module.alpha)

        return (up.T, down.T), (module.gate_up_proj_bias[expert], module.down_proj_bias[expert]), gate
    return (up, down), (0, 0), lambda x: torch.nn.functional.silu(x[:, : len(up) // 2]) * x[:, len(up) // 2 :]


def heal_experts(healed, teachers, given, gets, ridge, rank):
    """Solve for each expert, first what it reads with and then what it writes with, by the peaks' routing."""
    switched = routed = 0
    for expert in range(len(healed.down_proj)):
        inner = {}
        for part in (0, 1):
            mine, biases, gate = expert_functions(healed, expert)
            rows = []
            for name, teacher in teachers.items():
                theirs, their_biases, _ = expert_functions(teacher, expert)
                before = torch.cat([call[0].flatten(0, -2) for call in given[name]])
                routing = torch.cat([call[1] for call in given[name]])
                now, chooses = (torch.cat([call[i].flatten(0, -2) for call in gets[name]]) for i in (0, 1))
                switched += int((routing[:, :, None] != chooses[:, None]).all(-1).sum())
                routed += routing.numel()
                chosen = (routing == expert).any(-1)
                x, y = (now[chosen], before[chosen]) if part == 0 else inner[name]
                y = y @ theirs[part].T + their_biases[part]
                rows.append((1.0, x, y))
                inner[name] = [x, gate(y) if part == 0 else y]
            if any(len(x) for _, x, _ in rows):
                mine[part].copy_(solve(mine[part].clone(), biases[part], rows, ridge, rank))
            for name, (_, x, _) in zip(teachers, rows if part == 0 else (), strict=part == 0):
                inner[name][0] = gate(x @ mine[part].T + biases[part])
    return switched / routed


@torch.no_grad()
def heal_densely(folders, layers, rows=ROWS, ridge=0.01, rank=None, sequential=True, weights=None):
    """Weights of the healed model, layer by layer with whole forward passes of whole models, and switched tokens."""
    final, healed = load(folders["final"]), load(folders["final"])
    teachers = {name: load(folders.get(name, folders["final"])) for name in rows}
    blocks = max((m for m in healed.named_modules() if isinstance(m[1], torch.nn.ModuleList)), key=lambda m: len(m[1]))
    switched, numbers = [], range(len(blocks[1]))
    groups = [[f"{blocks[0]}.{number}.{name}" for name in names] for number in numbers for names in layers]
    groups = [paths for paths in groups if paths[0] in dict(healed.named_modules())]
    given = {name: [seen(teachers[name], sum(groups, []), ids) for ids in found] for name, found in rows.items()}
    for paths in groups:
        gets = {name: [seen(healed, paths[:1], ids)[paths[0]][0] for ids in found] for name, found in rows.items()}
        if "experts" in paths[0]:
            theirs = {name: [call[paths[0]][0] for call in calls] for name, calls in given.items()}
            peaks = {name: teacher.get_submodule(paths[0]) for name, teacher in teachers.items()}
            switched.append(heal_experts(healed.get_submodule(paths[0]), peaks, theirs, gets, ridge, rank))
            continue
        for path in paths:
            tokens = []
            for name, calls in given.items():
                source = gets[name] if sequential else [call[path][0] for call in calls]
                outputs = torch.cat([call[path][1][0] for call in calls])
                tokens.append(((weights or {}).get(name, 1.0), torch.cat([x[0][0] for x in source]), outputs))
            module, bias = healed.get_submodule(path), final.get_submodule(path).bias
            old = matrix(module).detach().clone()
            matrix(module).copy_(solve(old, 0 if bias is None else bias, tokens, ridge, rank))
    return healed, sum(switched) / len(switched) if switched else None


def assert_equal_weights(found, expected, tolerance=2e-6):
    assert dict(found.named_parameters()).keys() == dict(expected.named_parameters()).keys()
    for name, value in expected.named_parameters():
        error = (found.get_parameter(name).double() - value).norm() / value.norm().clamp(min=1e-3)
        assert error < tolerance, (name, float(error))


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_equal_least_squares_on_stacked_activations(tmp_path, monkeypatch, family, rank):
    made = []
    monkeypatch.setattr(subspace_rollback, "skeleton", lambda *given: made.append(skeleton(*given)) or made[0])
    folders, layers = save(tmp_path, family), FAMILIES[family][2]
    experts = ["mlp.experts"] in layers
    repair = fit(folders, rank=rank, dtype="float32" if experts else "float64")
    expected, switched = heal_densely(folders, layers, rank=rank)
    assert_equal_weights(repair.merge(load(folders["final"])), expected, 1e-4 if experts else 2e-6)
    assert repair.record["switched_tokens"] == (None if switched is None else pytest.approx(switched))
    assert (switched or 1) > 0
    assert all(parameter.is_meta for parameter in made[0].parameters())  # no weights stay in memory


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
@pytest.mark.parametrize("rank", [None, 3])
def test_one_shot_and_weights_of_domains(tmp_path, family, rank):
    folders, weights = save(tmp_path, family), {"math": 2.5, "qa": 0.5}
    repair = fit(folders, sequential=False, weights=weights, ridge=1e-3, rank=rank)
    expected, _ = heal_densely(folders, FAMILIES[family][2], sequential=False, weights=weights, ridge=1e-3, rank=rank)
    assert_equal_weights(repair.merge(load(folders["final"])), expected)


def test_an_update_is_undone_where_only_its_domain_reads_and_kept_where_only_others_do(tmp_path):
    folders = save(tmp_path, "qwen3", names=("final", "math"))
    rows = {name: [torch.arange(start, start + 18).tolist()] * 3 for name, start in (("math", 2), ("qa", 21))}
    half = WIDTH // 2
    for folder in folders.values():  # the embeddings of one domain use the first half of the width, the rest the other
        model = load(folder, torch.float32)
        weight = model.get_input_embeddings().weight.data
        weight[:20, half:], weight[20:, :half] = 0, 0
        model.save_pretrained(folder)
    repair = fit(folders, rows, sequential=False, ridge=1e-7, modules=["layers.0.self_attn.q_proj"])
    healed, final, math = repair.merge(load(folders["final"])), load(folders["final"]), load(folders["math"])
    name = "model.layers.0.self_attn.q_proj.weight"
    healed, final, math = (model.get_parameter(name) for model in (healed, final, math))
    torch.testing.assert_close(healed[:, :half], math[:, :half], rtol=0, atol=1e-5)
    torch.testing.assert_close(healed[:, half:], final[:, half:], rtol=0, atol=1e-5)
    assert list(repair.factors) == [name.removesuffix(".weight")]
    assert (final - math).abs().mean() > 0.05


def test_modules_that_are_healed_and_what_stays(tmp_path):
    folders = save(tmp_path, "gpt2")
    final, math = (load(folders[name]).state_dict() for name in ("final", "math"))
    sizes = {name: float((final[name] - math[name]).square().sum()) for name in final}
    for modules, expected in (
        ("attention", {f"transformer.h.{i}.attn.{name}" for i in (0, 1) for name in ("c_attn", "c_proj")}),
        ("mlp", {f"transformer.h.{i}.mlp.{name}" for i in (0, 1) for name in ("c_fc", "c_proj")}),
        (["1.mlp.c_fc"], {"transformer.h.1.mlp.c_fc"}),
    ):
        repair = fit(folders, modules=modules)
        assert repair.factors.keys() == expected
        left = sum(size for name, size in sizes.items() if name.removesuffix(".weight") not in expected)
        assert repair.record["left_as_it_is"]["math"] == pytest.approx(left / sum(sizes.values()), rel=1e-5)


def test_an_expert_that_no_token_reaches_stays(tmp_path):
    folders = save(tmp_path, "qwen3-moe", num_experts=16, num_experts_per_tok=1)
    rows = {name: found[:1] for name, found in ROWS.items()}
    healed = fit(folders, rows, dtype="float32", rank=4).merge(load(folders["final"]))
    expected, _ = heal_densely(folders, FAMILIES["qwen3-moe"][2], rows, rank=4)
    assert_equal_weights(healed, expected, 1e-4)
    for name, value in load(folders["final"]).named_parameters():
        if "mlp.experts" in name:
            same, stays = ((model.get_parameter(name) == value).flatten(1).all(1) for model in (healed, expected))
            assert torch.equal(same, stays) and same.any() and not same.all()


def test_sums_are_in_float64(monkeypatch):
    # Spectra of activations reach 1e-8 of their mean; with a small ridge, such directions are solved for too.
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=generator))[0]
    scales = torch.logspace(0, -4, WIDTH, dtype=torch.float64)
    inputs = (torch.randn(300, WIDTH, dtype=torch.float64, generator=generator) * scales @ turn).float()
    weight, target = torch.randn(2, 5, WIDTH, dtype=torch.float64, generator=generator)
    outputs = inputs.double() @ target.T
    expected = solve(weight, 0, [(1.0, inputs.double(), outputs)], 1e-9, None)
    monkeypatch.setattr(activation_moments, "COLUMNS", 5)
    sums = ActivationMoments(WIDTH, 5)
    sums.add(inputs, outputs)
    sums.finish(reduce=False)
    solution = Solution(sums.moments / 300, 1e-9)
    change = solution.change((sums.cross - weight @ sums.moments) / 300)
    torch.testing.assert_close(weight + solution.weights(change), expected, rtol=1e-5, atol=1e-5)


def test_effective_dimension_of_a_random_update():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 12, dtype=torch.float64, generator=generator) * torch.logspace(0, -1, 12)
    moments = inputs.T @ inputs / 200
    solution = Solution(moments, 1e-9)
    changes = [solution.change(draw @ moments) for draw in torch.randn(2000, 8, 12, generator=generator).double()]
    values = torch.linalg.svdvals(torch.stack(changes))
    squares, fourths = values.square().sum(1), (values**4).sum(1)
    assert effective_dimension(gram(changes[0])) == pytest.approx(float(squares[0] ** 2 / fourths[0]))
    assert random_dimension(moments, 8) == pytest.approx(float(squares.square().mean() / fourths.mean()), rel=0.02)
