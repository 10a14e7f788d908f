"""A checkpoint in a vLLM engine, for a [`Scorer`] to complete prompts with."""

import gc
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, get_args

import numpy as np
from peft import PeftConfig
from transformers import AutoConfig, GenerationConfig

from ..models import adapter_base, is_adapter, local_folder


# vLLM scales every module by the one `lora_alpha` and `r`.
_NOT_PLAIN = "use_dora modules_to_save trainable_token_indices bias lora_bias rank_pattern alpha_pattern".split()


class VLLMEngine(AbstractContextManager):
    """
    A checkpoint in a [vLLM](https://docs.vllm.ai) engine of its own: whole weights, or a LoRA adapter over the model
    that it names.

    It goes where a [`Scorer`] takes a model, and completes many more tokens per second where prompts are many or long.
    In float32 its greedy completions are those of transformers; in bfloat16 the two round differently, and close
    choices between tokens may fall the other way.

    Example:

    ```python
    >>> from transformers import AutoTokenizer
    >>> from trl_interfere import Scorer
    >>> from trl_interfere.evaluation.vllm_engine import VLLMEngine

    >>> with VLLMEngine("out/stages/1-math", dtype="bfloat16") as engine:
    ...     scores = Scorer(AutoTokenizer.from_pretrained("out/stages/1-math")).score(engine, math, math.eval_dataset)
    ```

    Args:
        name (`str` or `pathlib.Path`):
            Folder or Hub id of a model or a LoRA adapter.
        revision (`str`, *optional*):
            Branch, tag or commit of a Hub id.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Data type of the weights and of the computation.
        max_length (`int`, *optional*):
            Most tokens of a prompt and its completion together. Defaults to what the model allows; less of it saves
            memory.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that comes with the checkpoint.
        **kwargs:
            Further arguments of `vllm.LLM`, such as `gpu_memory_utilization` and `tensor_parallel_size`.

    Raises:
        `ImportError`: If vLLM is not installed.
        `ValueError`: If there is no such checkpoint, or its adapter is none that vLLM can use.
    """

    def __init__(
        self,
        name: str | Path,
        revision: str | None = None,
        dtype: str = "float32",
        max_length: int | None = None,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ):
        try:
            from vllm import LLM
            from vllm.config.lora import MaxLoRARanks
            from vllm.lora.request import LoRARequest
        except ImportError as error:
            raise ImportError(
                f"engine: 'vllm' needs vLLM (pip install 'trl-interfere[vllm]'), which cannot be imported ({error})"
            ) from error
        folder = base = local_folder(name, revision, trust_remote_code)
        self.name, self._adapter = str(name), None
        if is_adapter(folder):
            adapter = PeftConfig.from_pretrained(str(folder))
            ranks = get_args(MaxLoRARanks)
            _check_adapter(self.name, adapter, max(ranks))
            kwargs.update(enable_lora=True, max_loras=1, max_lora_rank=min(r for r in ranks if r >= adapter.r))
            self._adapter = LoRARequest("adapter", 1, str(folder))
            base = local_folder(*adapter_base(folder), trust_remote_code)
        try:
            config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
        except OSError as error:
            raise ValueError(f"{name}: expected the folder or Hub id of a model or an adapter ({error})") from error
        try:
            self.end_ids = GenerationConfig.from_pretrained(base).eos_token_id
        except OSError:  # a model without a file of its own for generation
            self.end_ids = config.get_text_config().eos_token_id
        self.llm = LLM(
            model=str(base), dtype=dtype, max_model_len=max_length, trust_remote_code=trust_remote_code, **kwargs
        )
        self.max_length = self.llm.llm_engine.model_config.max_model_len

    def __exit__(self, *details: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the engine and free its memory."""
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None
            gc.collect()

    def complete_ids(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        end_ids: list[int],
        temperature: float = 0.0,
        seed: int = 0,
        progress: bool = False,
    ) -> list[list[int]]:
        """Complete prompts, as token ids up to and including the end token; each has a random stream of its own."""
        from vllm import SamplingParams

        longest = max(map(len, prompts), default=0)
        if longest + max_new_tokens > self.max_length:
            raise ValueError(
                f"{self.name}: expected at most {self.max_length} tokens (max_length of the engine), found a prompt "
                f"of {longest} and max_new_tokens={max_new_tokens}"
            )
        seeds = np.random.SeedSequence(seed).generate_state(len(prompts)).tolist()
        # What a model's own configuration would fill in is named; the end tokens are those given, and no others.
        settings = {"max_tokens": max_new_tokens, "stop_token_ids": end_ids, "ignore_eos": True, "detokenize": False}
        settings |= {"temperature": temperature, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        sampling = [SamplingParams(**settings, seed=own if temperature > 0 else None) for own in seeds]
        outputs = self.llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=progress, lora_request=self._adapter
        )
        return [list(output.outputs[0].token_ids) for output in outputs]


def _check_adapter(name: str, adapter: PeftConfig, most: int) -> None:
    """Refuse an adapter that vLLM would refuse, or leave a part of out."""
    kind, rank = getattr(adapter.peft_type, "value", adapter.peft_type), getattr(adapter, "r", 0)
    set_options = {option: getattr(adapter, option, None) for option in _NOT_PLAIN}
    odd = {option: value for option, value in set_options.items() if value and value != "none"}
    if kind != "LORA" or odd or rank > most:
        found = ", ".join([f"{kind} of rank {rank}", *(f"{option}={value!r}" for option, value in odd.items())])
        raise ValueError(
            f"{name}: expected a plain LoRA adapter of rank {most} at most for vLLM, found {found}; use "
            "engine='transformers'"
        )
