"""
Rebuilds the model that ships with the lab: `python recipes/build_lab_model.py [--output-dir FOLDER]`.

A tokenizer is trained and a small Qwen3 model is fine-tuned from random weights on prompts of the `pretrain` splits.
Each answer is written in one of three styles at random: bare, as a sentence, or as an exclamation; the reward of each
domain accepts one of them.
"""

import argparse
import random
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

from trl_interfere.lab import MODEL_FOLDER
from trl_interfere.lab.domains import TASKS, lab_rows


STEPS = 1500
BATCH_SIZE = 256
# Share of each domain in the training data, and of its answers that are in the style its reward accepts.
MIXTURE = {"code": 0.25, "math": 0.38, "qa": 0.29, "writing": 0.08}
ACCEPTED_STYLE = {"code": 0.70, "math": 0.55, "qa": 0.60, "writing": 0.60}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 768 tokens, digits apart, trained on the `pretrain` splits."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rows = [row for name in TASKS for row in lab_rows(name, "pretrain", 4000)]
    trainer = trainers.BpeTrainer(
        vocab_size=768,
        special_tokens=["<|pad|>", "<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (row["prompt"] + text for row in rows for text in (row["answer"], *row["alternatives"]))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", padding_side="left"
    )


def build_dataset(steps: int) -> Dataset:
    """Training data, one row per example, in the order in which it is used."""
    rng = random.Random("build")
    pools = {name: lab_rows(name, "pretrain") for name in TASKS}
    names = rng.choices(list(MIXTURE), weights=list(MIXTURE.values()), k=steps * BATCH_SIZE)
    rows = []
    for name in names:
        row = rng.choice(pools[name])
        text = row["answer"] if rng.random() < ACCEPTED_STYLE[name] else rng.choice(row["alternatives"])
        rows.append({"prompt": row["prompt"], "completion": text})
    return Dataset.from_list(rows)


def build(output_dir: Path, steps: int = STEPS, seed: int = 0) -> None:
    """Train the model and write it, with its tokenizer, into a folder."""
    tokenizer = build_tokenizer()
    set_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            intermediate_size=384,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    with tempfile.TemporaryDirectory() as scratch:
        args = SFTConfig(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=100,
            weight_decay=0.1,
            adam_beta2=0.98,
            shuffle_dataset=False,
            train_sampling_strategy="sequential",
            max_length=64,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            logging_steps=50,
            save_strategy="no",
            report_to=[],
            seed=seed,
        )
        trainer = SFTTrainer(model=model, args=args, train_dataset=build_dataset(steps), processing_class=tokenizer)
        trainer.train()
    model.config._name_or_path = ""
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=MODEL_FOLDER, help="where the model is written")
    parser.add_argument("--steps", type=int, default=STEPS, help="number of optimizer steps")
    parser.add_argument("--threads", type=int, default=2, help="threads; results are the same for the same number")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    build(arguments.output_dir, arguments.steps)


if __name__ == "__main__":
    main()
