from types import SimpleNamespace

import pytest
import torch

from trl_interfere.analysis.room import Room


def model(*devices):
    parameters = [SimpleNamespace(device=torch.device(device)) for device in devices]
    return SimpleNamespace(parameters=lambda: parameters)


class Cuda:
    """Memory of each device: in use, the most that was in use, kept by the allocator, and of the whole device."""

    def __init__(self, monkeypatch, total):
        self.allocated = dict.fromkeys(total, 0)
        self.peak, self.reserved = dict(self.allocated), dict(self.allocated)
        for name, values in (("", "allocated"), ("max_", "peak")):
            monkeypatch.setattr(torch.cuda, f"{name}memory_allocated", lambda device, of=values: self.at(of, device))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: self.at("reserved", device))
        monkeypatch.setattr(
            torch.cuda,
            "mem_get_info",
            lambda device: (total[device.index] - self.at("reserved", device), total[device.index]),
        )

    def at(self, name, device):
        return getattr(self, name)[device.index]

    def use(self, index, allocated, peak):
        self.allocated[index], self.peak[index] = allocated, max(peak, self.peak[index])
        self.reserved[index] = self.peak[index]


@pytest.mark.parametrize(("total", "expected"), [((90, 90), True), ((90, 84), False), ((84, 90), False)])
def test_the_next_pass_must_fit_beside_the_gradient_on_every_device(monkeypatch, total, expected):
    cuda = Cuda(monkeypatch, dict(enumerate(total)))
    for index in (0, 1):
        cuda.use(index, 20, 20)
    room = Room(model("cuda:0", "cuda:1"))
    for index in (0, 1):
        cuda.use(index, 30, 64)  # the gradient takes 10, and at its peak the pass took 44: 30 + 1.25 * 44 = 85
    assert room.for_another() is expected


def test_host_memory_is_where_it_would_go():
    assert Room(model("cpu")).for_another()
    assert not Room(model("xpu:0")).for_another()
