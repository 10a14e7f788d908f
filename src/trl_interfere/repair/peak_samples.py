"""References for a repair: what the peak of each domain writes itself."""

from collections.abc import Sequence

import torch
from datasets import Dataset

from ..analysis.config import InterferenceConfig
from ..analysis.references import References, collect_references
from ..domain import Domain
from ..evaluation.scorer import Scorer
from ..models import load_model, load_tokenizer


def reference_prompts(domain: Domain, count: int) -> Dataset:
    """
    The first prompts to train on, else those of the selection split; never those that scores are reported on.

    Raises:
        `ValueError`: If the domain has neither.
    """
    dataset = domain.train_dataset if isinstance(domain.train_dataset, Dataset) else domain.selection_dataset
    if dataset is None:
        raise ValueError(f"domain {domain.name!r}: expected a train_dataset or a selection_dataset, found neither")
    return dataset.select(range(min(count, len(dataset))))


def peak_samples(
    final: str,
    peaks: dict[str, str],
    domains: Sequence[Domain],
    count: int,
    base: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    batch_size: int = 32,
    seed: int = 0,
    device: torch.device | None = None,
    progress: bool = False,
) -> dict[str, References]:
    """Completions that the peak of each domain, or the final model where it lost nothing, samples itself."""
    tokenizer = load_tokenizer(final, base=base)
    scorer = Scorer(
        tokenizer,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        temperature=temperature,
        seed=seed,
        progress=progress,
    )
    found = {}
    for checkpoint in dict.fromkeys([*peaks.values(), final]):  # each model is loaded once
        of_it = [domain for domain in domains if str(peaks.get(domain.name, final)) == str(checkpoint)]
        if not of_it:
            continue
        model = load_model(checkpoint, base=base)
        model = model if device is None else model.to(device)
        for domain in of_it:
            prompts = list(reference_prompts(domain, count)["prompt"])
            completions = scorer.complete_ids(model, prompts)
            encoded = [scorer.encode_prompt(prompt) for prompt in prompts]
            found[domain.name] = References(domain.name, encoded, completions, len(prompts))
    return found


def answers(final: str, domains: Sequence[Domain], count: int, column: str) -> dict[str, References]:
    """The data set's own answers, in place of what the peaks write."""
    tokenizer = load_tokenizer(final)
    config = InterferenceConfig(reference="dataset", reference_column=column, max_prompts=count)
    return {
        domain.name: collect_references(None, tokenizer, domain, config, reference_prompts(domain, count))
        for domain in domains
    }
