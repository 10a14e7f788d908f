import hashlib

import pytest
import torch

from trl_interfere.analysis.routes import RouteMap
from trl_interfere.analysis.weight_diff import update_statistics
from trl_interfere.checkpoint import Checkpoint


@pytest.fixture
def checkpoints(make_model, moved, tokenizer, tmp_path):
    """
    Function that writes `before` and `after` with everything that belongs to a checkpoint, and returns their folders
    and the route map.
    """

    def write(family="llama", dtype=torch.float32, shards="5GB", scale=0.02, **settings):
        before = make_model(family, dtype=dtype, **settings)
        after = moved(before, scale=scale)
        for name, model in (("before", before), ("after", after)):
            model.save_pretrained(tmp_path / name, max_shard_size=shards)
            tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / "before", tmp_path / "after", RouteMap(before.config)

    return write


@pytest.fixture(scope="session")
def edit_size():
    """Function of two folders: the size of the edit of each route, which a report on them has."""

    def size(before, after):
        checkpoints = [Checkpoint(before), Checkpoint(after)]
        return update_statistics(checkpoints, RouteMap(checkpoints[0].config))[0].edit_size

    return size


@pytest.fixture(scope="session")
def contents():
    """Function of a folder: the digest of each file in it, by its relative path."""

    def of(folder):
        return {
            path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    return of


@pytest.fixture
def expected_rollback(owned_slices):
    """Function that writes a rollback out slice by slice, in float64, for two models in memory."""

    def expect(before, after, routes, steps):
        start, end = (
            {name: parameter.detach().double() for name, parameter in model.named_parameters()}
            for model in (before, after)
        )
        expected, slices = {name: tensor.clone() for name, tensor in end.items()}, owned_slices(after)
        for route, step in zip(routes, steps, strict=True):
            for name, index in slices[route][3]:
                expected[name][index] = end[name][index] - step * (end[name][index] - start[name][index])
        return expected

    return expect
