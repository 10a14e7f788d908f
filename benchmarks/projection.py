"""Prevention: each step of a later stage without what it would do to the activations of the earlier domains."""

import torch
from torch import nn

from trl_interfere import Domain, Scorer, StageCallback
from trl_interfere.lab import MODEL_FOLDER
from trl_interfere.lab.pipeline import MAX_COMPLETION_LENGTH
from trl_interfere.models import load_tokenizer
from trl_interfere.repair.peak_samples import reference_prompts


RIDGE, PROMPTS = 0.01, 64


class Projected(StageCallback):
    """
    Turns the step δ of every linear layer into `δ ρ (C + ρ I)⁻¹`, with C the mean over the earlier domains of the
    second moments of the layer's inputs at the beginning of the stage, and ρ a share of its mean eigenvalue: the null
    space that NSPO (arXiv 2512.11391) projects on, softly. The domains are those of the whole order.
    """

    def __init__(self, domains: list[Domain]):
        self.domains, self.earlier = domains, []
        self.scorer = Scorer(
            load_tokenizer(MODEL_FOLDER), max_new_tokens=MAX_COMPLETION_LENGTH, batch_size=PROMPTS, temperature=1.0
        )

    def on_stage_begin(self, index, stage):
        names = [domain.name for domain in self.domains]
        self.earlier = self.domains[: names.index(stage.domain)]

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        modules = model.model.layers.named_modules() if self.earlier else ()
        self.layers = {name: layer for name, layer in modules if isinstance(layer, nn.Linear)}
        with torch.random.fork_rng():
            moments = [self._moments(model, domain) for domain in self.earlier]
        self.keep = {}
        for name in self.layers:
            mean = torch.stack([of_domain[name] for of_domain in moments]).mean(0)
            ridge = RIDGE * mean.diagonal().mean() * torch.eye(len(mean), dtype=mean.dtype)
            self.keep[name] = torch.linalg.solve(mean + ridge, ridge).float()

    @torch.no_grad()
    def _moments(self, model: nn.Module, domain: Domain) -> dict[str, torch.Tensor]:
        training = model.training
        model.eval()
        prompts = list(reference_prompts(domain, PROMPTS))
        completions = self.scorer.complete_ids(model, prompts)
        sums = {name: 0.0 for name in self.layers}
        hooks = [
            layer.register_forward_hook(
                lambda _, inputs, output, name=name: sums.__setitem__(
                    name, sums[name] + inputs[0][0].double().T @ inputs[0][0].double()
                )
            )
            for name, layer in self.layers.items()
        ]
        tokens = 0
        for prompt, completion in zip(prompts, completions, strict=True):
            ids = [*self.scorer.encode_prompt(prompt), *completion]
            model(torch.tensor([ids]))
            tokens += len(ids)
        for hook in hooks:
            hook.remove()
        model.train(training)
        return {name: total / tokens for name, total in sums.items()}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.before = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs):
        for name, layer in self.layers.items():
            step = layer.weight - self.before[name]
            layer.weight.copy_(self.before[name] + step @ self.keep[name])
