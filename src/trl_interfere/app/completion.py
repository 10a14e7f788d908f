"""One prompt to several models: checkpoints on this machine, repositories on the Hub, and servers."""

import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError


MAX_PROMPT = 4000  # characters
MAX_TOKENS = 512
MAX_ANSWER_BYTES = 2**20
MAX_MODEL_BYTES = 10 * 2**30
TIMEOUT = 60.0
MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")  # no pickle and no code
_REPO_ID = re.compile(r"([\w][\w.-]{0,95}/[\w][\w.-]{0,95})(?:@([\w][\w./-]{0,95}))?", re.ASCII)


def check_prompt(prompt: str, tokens: int, temperature: float) -> None:
    """
    Refuse a request that is out of bounds.

    Args:
        prompt (`str`):
            The prompt.
        tokens (`int`):
            Longest completion.
        temperature (`float`):
            Temperature of sampling.

    Raises:
        `ValueError`: If it is.
    """
    if not prompt.strip():
        raise ValueError("prompt: expected some text, found none")
    if len(prompt) > MAX_PROMPT:
        raise ValueError(f"prompt: expected at most {MAX_PROMPT:,} characters, found {len(prompt):,}")
    if not 1 <= tokens <= MAX_TOKENS:
        raise ValueError(f"tokens: expected 1 to {MAX_TOKENS}, found {tokens}")
    if not 0 <= temperature <= 2:
        raise ValueError(f"temperature: expected 0 to 2, found {temperature}")


class HubModels:
    """
    Causal language models from the Hub, a few of them kept in memory. Their code is never run.

    Args:
        keep (`int`, *optional*, defaults to `2`):
            Number of models in memory.
    """

    def __init__(self, keep: int = 2):
        self.keep = keep
        self._models: OrderedDict[str, tuple[Any, Any]] = OrderedDict()

    def load(self, name: str) -> tuple[Any, Any]:
        """
        A model and its tokenizer.

        Args:
            name (`str`):
                `user/repo` or `user/repo@revision`. Always of the Hub, also where a folder has this name.

        Returns:
            `tuple`: Model and tokenizer.

        Raises:
            `ValueError`: If there is no such model, it is too large, or it cannot be loaded.
        """
        match = _REPO_ID.fullmatch(name)
        if match is None or ".." in name:
            raise ValueError(f"model: expected user/repo or user/repo@revision, found {name[:80]!r}")
        if name in self._models:
            self._models.move_to_end(name)
            return self._models[name]
        repo_id, revision = match[1], match[2]
        try:
            info = HfApi().model_info(repo_id, revision=revision, files_metadata=True)
            sizes = [file.size or 0 for file in info.siblings or [] if file.rfilename.endswith(".safetensors")]
            if not sizes:
                raise ValueError(f"{name}: expected weights as safetensors, found none")
            if sum(sizes) > MAX_MODEL_BYTES:
                raise ValueError(f"{name}: expected at most {MAX_MODEL_BYTES >> 30} GB, found {sum(sizes) >> 30} GB")
            folder = snapshot_download(repo_id, revision=info.sha, allow_patterns=list(MODEL_FILES))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise ValueError(f"{name}: not readable from the Hub ({str(error).strip()[:200]})") from error
        self._models[name] = load_folder(Path(folder))
        if len(self._models) > self.keep:
            self._models.popitem(last=False)
        return self._models[name]


def load_folder(folder: Path) -> tuple[Any, Any]:
    """
    A causal language model and its tokenizer from a folder.

    Args:
        folder (`pathlib.Path`):
            The folder.

    Returns:
        `tuple`: Model and tokenizer.

    Raises:
        `ValueError`: If they cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{folder.name}: not a model that transformers loads ({str(error)[:200]})") from error
    return model.eval().to(device), tokenizer


def complete(model: Any, tokenizer: Any, prompt: str, tokens: int, temperature: float, seed: int = 0) -> str:
    """
    What a model answers.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer; a chat template is used where it has one.
        prompt (`str`):
            The prompt.
        tokens (`int`):
            Longest completion.
        temperature (`float`):
            Temperature of sampling; 0 is greedy.
        seed (`int`, *optional*, defaults to `0`):
            Seed of sampling.

    Returns:
        `str`: The answer.
    """
    from ..evaluation.scorer import Scorer

    check_prompt(prompt, tokens, temperature)
    asked = [{"role": "user", "content": prompt}] if tokenizer.chat_template else prompt
    scorer = Scorer(tokenizer, max_new_tokens=tokens, temperature=temperature, seed=seed)
    return scorer.complete(model, [asked])[0]


def complete_on_server(
    endpoint: str,
    model: str,
    prompt: str,
    tokens: int,
    temperature: float,
    seed: int = 0,
    key: str = "",
    transport: Callable | None = None,
) -> str:
    """
    What a server with OpenAI's protocol answers (vLLM, TGI, llama.cpp).

    Args:
        endpoint (`str`):
            Its address up to and including `/v1`.
        model (`str`):
            Name of the model there. Empty for the first one that it serves.
        prompt (`str`):
            The prompt, sent as one message of a chat.
        tokens (`int`):
            Longest completion.
        temperature (`float`):
            Temperature of sampling.
        seed (`int`, *optional*, defaults to `0`):
            Seed of sampling.
        key (`str`, *optional*, defaults to `""`):
            Key of the server. It is sent there and nowhere else, and is not kept.
        transport (`httpx.BaseTransport`, *optional*):
            Transport of the requests, for tests.

    Returns:
        `str`: The answer.

    Raises:
        `ValueError`: If the server cannot be reached or answers with something else.
    """
    check_prompt(prompt, tokens, temperature)
    if not re.fullmatch(r"https?://[^\s@]{1,200}", endpoint):
        raise ValueError(f"endpoint: expected http://host:port/v1 or https://..., found {endpoint[:80]!r}")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(timeout=TIMEOUT, headers=headers, transport=transport, follow_redirects=False) as client:
        address = endpoint.rstrip("/")
        if not model:
            served = _ask(client, "GET", f"{address}/models")
            model = _field(served, "data", 0, "id", where=address)
        asked = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": tokens,
            "temperature": temperature,
            "seed": seed,
        }
        answer = _ask(client, "POST", f"{address}/chat/completions", json=asked)
    return _field(answer, "choices", 0, "message", "content", where=address)


def _ask(client: httpx.Client, method: str, address: str, **arguments) -> Any:
    try:
        with client.stream(method, address, **arguments) as response:
            content = b""
            for part in response.iter_bytes():
                content += part
                if len(content) > MAX_ANSWER_BYTES:
                    raise ValueError(f"{address}: expected at most {MAX_ANSWER_BYTES >> 20} MB, found more")
            if response.status_code != 200:
                text = content[:200].decode(errors="replace")
                raise ValueError(f"{address}: expected status 200, found {response.status_code} ({text})")
            return httpx.Response(200, content=content).json()
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        raise ValueError(f"{address}: no answer ({error or type(error).__name__})") from error
    except RecursionError as error:
        raise ValueError(f"{address}: expected JSON of moderate depth") from error
    except ValueError as error:
        if str(error).startswith(address):
            raise
        raise ValueError(f"{address}: expected JSON, found something else") from error


def _field(content: Any, *path: str | int, where: str) -> str:
    for part in path:
        try:
            content = content[part]
        except (IndexError, KeyError, TypeError) as error:
            name = ".".join(map(str, path))
            raise ValueError(f"{where}: expected an answer with {name}, found none") from error
    if not isinstance(content, str):
        raise ValueError(f"{where}: expected text, found {type(content).__name__}")
    return content
