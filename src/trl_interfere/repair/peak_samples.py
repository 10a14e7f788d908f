"""References for a repair: what the peak of each domain writes itself."""

from collections.abc import Sequence

from accelerate import PartialState
from datasets import Dataset

from ..analysis.references import References
from ..domain import Domain
from ..evaluation.scorer import Scorer
from ..models import load_model, load_tokenizer


def reference_prompts(domain: Domain, count: int) -> list:
    """The first prompts to train on, else those of the selection split; never those that scores are reported on."""
    dataset = domain.train_dataset if isinstance(domain.train_dataset, Dataset) else domain.selection_dataset
    if dataset is None:
        raise ValueError(f"domain {domain.name!r}: expected a train_dataset or a selection_dataset, found neither")
    return dataset.select(range(min(count, len(dataset))))["prompt"]


def peak_samples(
    final: str,
    peaks: dict[str, str],
    domains: Sequence[Domain],
    count: int,
    base: str | None = None,
    temperature: float = 1.0,
    **settings,
) -> dict[str, References]:
    """
    Completions that the peak of each domain, or the final model where it lost nothing, samples itself; further
    settings are those of a [`Scorer`].
    """
    scorer, found = Scorer(load_tokenizer(final, base=base), temperature=temperature, **settings), {}
    for checkpoint in dict.fromkeys([*peaks.values(), final]):  # each model is loaded once
        of_it = [domain for domain in domains if peaks.get(domain.name, final) == checkpoint]
        model = load_model(checkpoint, base=base).to(PartialState().device) if of_it else None
        for domain in of_it:
            prompts = list(reference_prompts(domain, count))
            completions = scorer.complete_ids(model, prompts)
            encoded = [scorer.encode_prompt(prompt) for prompt in prompts]
            found[domain.name] = References(domain.name, encoded, completions, len(prompts))
    return found
