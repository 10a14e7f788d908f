import numpy as np
import pytest
import torch

from trl_interfere.analysis.activity import route_activity
from trl_interfere.analysis.routes import RouteMap


def test_activity_by_brute_force(architecture, make_model, sequences, make_batches, owned_slices, contributions):
    model = make_model(architecture)
    entries = [entry[:3] for entry in owned_slices(model)]
    located = {entry: route for route, entry in enumerate(entries)}
    expected, tokens = np.zeros(len(entries)), 0
    for prompt, completion in sequences:  # one at a time and without padding
        written, _ = contributions(model, prompt + completion)
        tokens += len(completion)
        for (kind, layer), parts in written.items():
            for position, part in enumerate(parts):
                sizes = [part[token - 1].norm() for token in range(len(prompt), len(prompt) + len(completion))]
                expected[located[kind, layer, position]] += sum(sizes).item()
    expected /= tokens
    for (kind, layer, position), route in located.items():
        if kind == "key_value":
            heads = [sum(entry[:2] == (kind, layer) for entry in entries) for kind in ("query", "key_value")]
            readers = range(position * heads[0] // heads[1], (position + 1) * heads[0] // heads[1])
            expected[route] = np.mean([expected[located["query", layer, reader]] for reader in readers])

    for batch_size in (2, 5):
        activity = route_activity(model, make_batches(sequences, batch_size), RouteMap(model.config))
        np.testing.assert_allclose(activity, expected, rtol=1e-4, atol=1e-6)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_activity_of_experts_under_every_implementation(implementation, make_model, sequences, make_batches):
    model = make_model("qwen3-moe", dtype=torch.float32, moe_intermediate_size=8)  # grouped_mm wants 16 bytes
    expected = route_activity(model, make_batches(sequences), RouteMap(model.config))
    model.set_experts_implementation(implementation)
    activity = route_activity(model, make_batches(sequences), RouteMap(model.config))
    np.testing.assert_allclose(activity, expected, rtol=1e-4)
