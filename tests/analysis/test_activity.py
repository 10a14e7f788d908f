import numpy as np
import torch

from trl_interfere.analysis.activity import route_activity
from trl_interfere.analysis.routes import RouteMap


def record_inputs(model, ids):
    """Inputs of every down and o projection, by layer and kind, one sequence at a time and without padding."""
    inputs, handles = {}, []
    for layer, block in enumerate(model.model.layers):
        for kind, module in (("mlp", block.mlp.down_proj), ("query", block.self_attn.o_proj)):
            handles.append(
                module.register_forward_pre_hook(
                    lambda module, args, key=(kind, layer): inputs.__setitem__(key, args[0][0].detach())
                )
            )
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return inputs


def test_activity_by_brute_force(family, make_model, sequences, make_batches, owned_slices):
    model = make_model(family)
    slices = owned_slices(model)
    expected, tokens = np.zeros(len(slices)), 0
    for prompt, completion in sequences:
        inputs = record_inputs(model, prompt + completion)
        for position in range(len(prompt), len(prompt) + len(completion)):
            tokens += 1
            for route, (kind, layer, _, owned) in enumerate(slices):
                if kind == "key_value":
                    continue
                name, index = owned[-1]  # the columns of down or o
                columns = model.get_parameter(name).detach()[index]
                written = columns @ inputs[kind, layer][position - 1][index[1]]
                expected[route] += written.norm().item()
    expected /= tokens
    located = {entry[:3]: route for route, entry in enumerate(slices)}
    for (kind, layer, position), route in located.items():
        if kind == "key_value":  # two query heads read each key/value head
            readers = [located["query", layer, 2 * position + reader] for reader in range(2)]
            expected[route] = np.mean(expected[readers])

    for batch_size in (2, 5):
        activity = route_activity(model, make_batches(sequences, batch_size), RouteMap(model.config))
        np.testing.assert_allclose(activity, expected, rtol=1e-4, atol=1e-6)


def test_hooks_are_removed(make_model, sequences, make_batches):
    model = make_model()
    route_activity(model, make_batches(sequences), RouteMap(model.config))
    assert not any(module._forward_pre_hooks for module in model.modules())
