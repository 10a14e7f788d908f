import pytest
import torch

from trl_interfere.repair.interpolation import interpolated


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0, 1.5])
def test_interpolated(dtype, share, make_model, moved):
    before = make_model(dtype=dtype)
    after = moved(before)
    start, end = dict(before.named_parameters()), dict(after.named_parameters())
    kept = {name: tensor.detach().clone() for name, tensor in end.items()}
    with interpolated(after, start, share) as model:
        assert model is after
        for name, parameter in model.named_parameters():
            expected = share * start[name].double() + (1 - share) * kept[name].double()
            tolerance = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(parameter.double(), expected, rtol=tolerance, atol=tolerance)
            if share in (0.0, 1.0):
                assert torch.equal(parameter, start[name] if share else kept[name]), name
    for name, parameter in after.named_parameters():
        assert torch.equal(parameter, kept[name])


def test_restores_after_an_error(make_model, moved):
    after = make_model()
    kept = {name: tensor.detach().clone() for name, tensor in after.named_parameters()}
    before = {name: torch.ones_like(tensor) for name, tensor in kept.items()}
    with pytest.raises(RuntimeError, match="inside"), interpolated(after, before, 0.5) as model:
        assert not any(torch.equal(parameter, kept[name]) for name, parameter in model.named_parameters())
        raise RuntimeError("inside")
    for name, parameter in after.named_parameters():
        assert torch.equal(parameter, kept[name])
