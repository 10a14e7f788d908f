import numpy as np
import torch

from trl_interfere.analysis.routes import RouteMap
from trl_interfere.repair.blocks import Blocks, touched_blocks


def test_take_and_put_along_one_axis():
    tensor = torch.arange(24.0).reshape(6, 4)
    rows, columns = Blocks((0,), (3,), np.array([2, 0])), Blocks((1,), (4,), np.array([3, 1]))
    assert rows.take(tensor).tolist() == [[*range(16, 24)], [*range(8)]]
    assert columns.take(tensor).tolist() == [[3, 7, 11, 15, 19, 23], [1, 5, 9, 13, 17, 21]]
    columns.put(tensor, torch.tensor([[-1.0] * 6, [-2.0] * 6]))
    assert tensor[:, 3].eq(-1).all() and tensor[:, 1].eq(-2).all() and tensor[0, :3].tolist() == [0, -2, 2]


def test_take_and_put_along_experts_and_another_axis():
    tensor = torch.arange(2 * 3 * 4.0).reshape(2, 3, 4)
    blocks = Blocks((0, 2), (2, 2), np.array([1, 2]))  # first expert second half, second expert first half
    assert torch.equal(blocks.take(tensor), torch.stack([tensor[0, :, 2:].flatten(), tensor[1, :, :2].flatten()]))
    blocks.put(tensor, torch.full((2, 6), -1.0))
    assert tensor[0, :, 2:].eq(-1).all() and tensor[1, :, :2].eq(-1).all() and tensor.eq(-1).sum() == 12


def test_put_undoes_take_in_tensors_that_are_not_contiguous():
    tensor = torch.arange(24.0).reshape(4, 6).T
    blocks = Blocks((0,), (3,), np.array([1]))
    taken = blocks.take(tensor)
    blocks.put(tensor, -taken)
    assert torch.equal(blocks.take(tensor), -taken) and tensor[0].tolist() == [0, 6, 12, 18]


def test_touched_blocks_are_the_slices_of_the_routes(architecture, make_model, owned_slices):
    model = make_model(architecture)
    route_map, slices = RouteMap(model.config), owned_slices(model)
    routes = np.arange(1, route_map.num_routes, 5)
    steps = np.zeros(route_map.num_routes)
    steps[routes] = routes
    marked = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for name, tensor in marked.items():
        touched = touched_blocks(route_map, name, steps, tensor)
        if touched is not None:
            blocks, owned = touched
            values = torch.as_tensor(owned, dtype=tensor.dtype)[:, None].expand_as(blocks.take(tensor))
            blocks.put(tensor, values)
    expected = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for route in routes:
        for name, index in slices[route][3]:
            expected[name][index] = route
    for name, tensor in marked.items():
        assert torch.equal(tensor, expected[name]), name
