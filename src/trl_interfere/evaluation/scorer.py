"""Scoring a model on domains."""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl.data_utils import is_conversational

from ..domain import Domain, parameters_of
from .vllm_engine import VLLMEngine


@dataclass
class DomainScores:
    """
    Scores of one model on one domain, prompt by prompt.

    Args:
        prompts (`list`):
            The prompts, plain or conversational, in the order of the dataset.
        completions (`list[str]`):
            What the model wrote: the completions of the first prompt, then those of the second, and so on.
        samples (`numpy.ndarray` of shape `(n, k)`):
            Score of each completion.
    """

    prompts: list[Any]
    completions: list[str]
    samples: np.ndarray

    @property
    def values(self) -> np.ndarray:
        """Score of each prompt: the mean of its samples."""
        return self.samples.mean(axis=1)


@dataclass(eq=False, repr=False)
class Scorer:
    """
    Scores of a model on domains.

    Prompts are sorted by length, batched, completed and handed to the metric of the domain: its `metric`, or the
    weighted sum of the rewards that it is trained with. The same weights always get the same scores: greedy
    completions have no randomness, sampled ones a seed of their own.

    A model is one of transformers, or a checkpoint in a [`VLLMEngine`]; where methods take a `model`, they take both.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Maximum length of a completion.
        batch_size (`int`, *optional*, defaults to `64`):
            Number of prompts generated for at once.
        chat_template_kwargs (`dict`, *optional*):
            Arguments of the chat template, for conversational prompts.
        temperature (`float`, *optional*, defaults to `0.0`):
            Temperature of sampling; 0 is greedy.
        num_samples (`int`, *optional*, defaults to `1`):
            Completions of each prompt, whose scores are averaged. More than one needs a temperature.
        seed (`int`, *optional*, defaults to `0`):
            Seed of sampling.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar over prompts.
        autocast (`torch.dtype`, *optional*):
            Data type that the model's products are computed in. Defaults to that of its weights.

    Raises:
        `ValueError`: If an argument is out of range, or several greedy completions are asked for.
    """

    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int = 256
    batch_size: int = 64
    chat_template_kwargs: dict | None = None
    temperature: float = 0.0
    num_samples: int = 1
    seed: int = 0
    progress: bool = False
    autocast: torch.dtype | None = None

    def __post_init__(self):
        for name in ("max_new_tokens", "batch_size", "num_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: expected 0 or more, found {self.temperature}")
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(f"num_samples: expected 1 with temperature 0 (greedy), found {self.num_samples}")

    def score(
        self,
        model: PreTrainedModel | VLLMEngine,
        domain: Domain,
        dataset: Dataset,
        accelerator: Accelerator | None = None,
    ) -> DomainScores:
        """
        Score a model on one dataset of a domain.

        Args:
            model ([`~transformers.PreTrainedModel`] or [`VLLMEngine`]):
                The model.
            domain ([`Domain`]):
                Supplies the metric.
            dataset ([`~datasets.Dataset`]):
                Prompts, with the columns that the metric needs.
            accelerator ([`~accelerate.Accelerator`], *optional*):
                Shares the prompts out between its processes. Every process gets all scores; the metric is called by
                the main process alone, since it may cost something, such as the calls of an LLM judge.

        Returns:
            [`DomainScores`]: One row of samples per prompt.

        Raises:
            `ValueError`: In every process, if the metric fails or returns the wrong number of values.
        """
        check_scorable(domain)
        prompts = [prompt for prompt in dataset["prompt"] for _ in range(self.num_samples)]
        if accelerator is None or accelerator.num_processes == 1:
            return self._scores(domain, dataset, self.complete_ids(model, prompts))
        # A forward pass of a sharded model (FSDP, ZeRO-3) waits for every process, so all need as many batches.
        shards, found = np.array_split(np.arange(len(prompts)), accelerator.num_processes), None
        mine = [prompts[index] for index in shards[accelerator.process_index]]
        surplus = [prompts[0]] * (len(shards[0]) - len(mine))
        completion_ids = gather_object(self.complete_ids(model, mine + surplus)[: len(mine)])
        if accelerator.is_main_process:
            try:
                found = self._scores(domain, dataset, completion_ids)
            except ValueError as error:
                found = error
        (found,) = broadcast_object_list([found])
        if isinstance(found, ValueError):
            raise found
        return found

    def _scores(self, domain: Domain, dataset: Dataset, completion_ids: list[list[int]]) -> DomainScores:
        rows = [row for row in dataset for _ in range(self.num_samples)]
        completions = self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        values = apply_metric(domain, rows, completions, completion_ids)
        return DomainScores(list(dataset["prompt"]), completions, values.reshape(-1, self.num_samples))

    def complete(self, model: PreTrainedModel | VLLMEngine, prompts: list[Any]) -> list[str]:
        """Complete plain or conversational prompts, one text per prompt."""
        return self.tokenizer.batch_decode(self.complete_ids(model, prompts), skip_special_tokens=True)

    def complete_ids(self, model: PreTrainedModel | VLLMEngine, prompts: list[Any]) -> list[list[int]]:
        """Complete prompts, as token ids up to and including the end token."""
        with_vllm = isinstance(model, VLLMEngine)
        end_ids = model.end_ids if with_vllm else model.generation_config.eos_token_id
        end_ids = list(end_ids) if isinstance(end_ids, (list, tuple)) else [] if end_ids is None else [end_ids]
        if self.tokenizer.eos_token_id not in end_ids:
            end_ids.append(self.tokenizer.eos_token_id)
        encoded = [self.encode_prompt(prompt) for prompt in prompts]
        if with_vllm:
            sampling = {"temperature": self.temperature, "seed": self.seed, "progress": self.progress}
            return model.complete_ids(encoded, self.max_new_tokens, end_ids, **sampling)
        pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else end_ids[0]
        sampling = {"do_sample": True, "temperature": self.temperature, "top_k": 0} if self.temperature else {}
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            **sampling,
            pad_token_id=pad_id,
            eos_token_id=end_ids,
            bos_token_id=self.tokenizer.bos_token_id,
            disable_compile=True,
        )
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
        completed: list[list[int]] = [[]] * len(encoded)
        precision = nullcontext() if self.autocast is None else torch.autocast(model.device.type, self.autocast)
        with _generating(model, config), torch.random.fork_rng(), torch.no_grad(), precision:
            torch.manual_seed(self.seed)
            starts = range(0, len(order), self.batch_size)
            for start in tqdm(starts, desc="score", unit="batch", leave=False, disable=not self.progress):
                batch = order[start : start + self.batch_size]
                rows = [torch.tensor(encoded[index], dtype=torch.long) for index in batch]
                ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side="left")
                mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
                output = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))
                for index, new in zip(batch, output[:, ids.shape[1] :].tolist(), strict=True):
                    end = next((i for i, token in enumerate(new) if token in end_ids), len(new) - 1)
                    completed[index] = new[: end + 1]
        return completed

    def encode_prompt(self, prompt: Any) -> list[int]:
        """Token ids of a prompt, by the chat template where it is conversational."""
        if is_conversational({"prompt": prompt}):
            settings = {"add_generation_prompt": True, "return_dict": False, **(self.chat_template_kwargs or {})}
            return self.tokenizer.apply_chat_template(prompt, **settings)
        return self.tokenizer(prompt)["input_ids"]


@contextmanager
def _generating(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """A model without dropout, and with no settings of generation but these: its own would fill in what they leave."""
    training, held = model.training, model.generation_config
    model.eval()
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = held
        model.train(training)


def check_scorable(domain: Domain) -> None:
    """Refuse a domain without `metric`, and with rewards of models or environments, that completions cannot score."""
    for function in domain.reward_funcs if domain.metric is None else ():
        model = isinstance(function, (str, nn.Module))
        if model or "environments" in parameters_of(function):
            raise ValueError(
                f"domain {domain.name!r}: scores are those of one completion per prompt, and its rewards come with "
                f"{'a reward model' if model else 'environments'}; set `metric`, a function of the completions"
            )


def apply_metric(
    domain: Domain, rows: list[dict], completions: list[str], completion_ids: list[list[int]] | None = None
) -> np.ndarray:
    """
    Values of a domain's metric for given completions: one per row, for rewards their weighted sum. Functions get what
    [`~trl.GRPOTrainer`] gives them; `trainer_state` is `None`, `log_extra` and `log_metric` do nothing.
    """
    check_scorable(domain)
    prompts = [row["prompt"] for row in rows]
    if is_conversational({"prompt": prompts[0]}):
        completions = [[{"role": "assistant", "content": completion}] for completion in completions]
    arguments: dict[str, Any] = {key: [row[key] for row in rows] for key in rows[0]}
    arguments.update(prompts=prompts, completions=completions, trainer_state=None)
    arguments.update(log_extra=lambda column, values: None, log_metric=lambda name, value: None)
    for key in ("prompt", "completion", "completion_ids"):  # TRL keeps these names to itself
        arguments.pop(key, None)
    if completion_ids is not None:
        arguments["completion_ids"] = completion_ids
    if domain.metric is not None:
        return _call(domain.name, domain.metric, len(rows), arguments)
    pairs = zip(domain.reward_funcs, domain.reward_weights, strict=True)
    return sum(weight * _call(domain.name, function, len(rows), arguments) for function, weight in pairs)


def _call(name: str, function: Callable, n: int, arguments: dict[str, Any]) -> np.ndarray:
    label = f"domain {name!r}, {getattr(function, '__name__', type(function).__name__)}"
    try:
        values = function(**arguments)
        if asyncio.iscoroutine(values):
            with ThreadPoolExecutor(1) as thread:  # a notebook already runs an event loop in its own
                values = thread.submit(asyncio.run, values).result()
    except Exception as error:
        raise ValueError(f"{label}: raised {type(error).__name__}: {error}") from error
    if isinstance(values, torch.Tensor):
        values = values.tolist()
    try:
        values = np.array([0.0 if value is None else float(value) for value in values], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{label}: expected a list with one number per completion ({error})") from error
    if len(values) != n or not np.isfinite(values).all():
        raise ValueError(f"{label}: expected {n} finite values, one per completion, found {values.tolist()!r:.200}")
    return values
