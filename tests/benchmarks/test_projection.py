"""Steps that are projected away from what the earlier domains use."""

import projection
import torch
from tiny_runs import build, math_domain, writing_domain

from trl_interfere.models import load_model


def test_a_later_stage_leaves_what_an_earlier_domain_sees(tmp_path):
    domains = [math_domain(), writing_domain()]
    callback = projection.Projected(domains)
    settings = {"max_steps": 2, "learning_rate": 1e-3}
    projected = build(tmp_path / "projected", domains, [callback], **settings)
    projected.train()
    plain = build(tmp_path / "plain", domains, **settings)
    plain.train()
    ids = torch.tensor([[*callback.scorer.encode_prompt(domains[0].train_dataset[0]["prompt"])]])

    def moved(trainer):
        first, last = (load_model(trainer.run.folder / "stages" / name) for name in ("1-math", "2-writing"))
        layer = "model.layers.0.mlp.down_proj"
        inputs = []
        first.get_submodule(layer).register_forward_hook(lambda module, given, output: inputs.append(given[0]))
        first(ids)
        change = last.get_submodule(layer).weight - first.get_submodule(layer).weight
        return float((inputs[0] @ change.T).norm() / (inputs[0].norm() * change.norm()))

    assert moved(projected) < 0.3 * moved(plain)
