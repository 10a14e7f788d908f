"""
Three supervised stages with TRL's SFTTrainer: checkpoints that this package did not train. docs/heal.md heals them.

    python recipes/sft_stages.py models/smollm2-135m-instruct --output_dir sft

Writes the stages `0-sums`, `1-reverse`, `2-spell`, their data, and `domains.yaml`, which names the domains: sums of
two numbers, digits in reverse, digits as words. Each has exact answers, and prompts of its own in each split.
"""

import argparse
import json
import random
from pathlib import Path

import yaml
from datasets import Dataset
from trl import SFTConfig, SFTTrainer


WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZES = {"train": 2048, "selection": 128, "test": 256}


def task(name: str, rng: random.Random) -> tuple[str, str]:
    a, b, digits = rng.randrange(10, 100), rng.randrange(10, 100), rng.choices(range(1, 10), k=4)
    text = "".join(map(str, digits))
    return {
        "sums": (f"What is {a} + {b}?\n", str(a + b)),
        "reverse": (f"Write {text} in reverse.\n", text[::-1]),
        "spell": (f"Write {text} in words.\n", " ".join(WORDS[digit] for digit in digits)),
    }[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--output_dir", type=Path, default=Path("sft"), help="folder of stages, data and recipe")
    parser.add_argument("--steps", type=int, nargs=3, default=(80, 60, 30), help="steps of each stage")
    parser.add_argument("--learning_rate", type=float, default=3e-5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder, model, domains = arguments.output_dir, arguments.model, []
    folder.mkdir(parents=True)
    for stage, (name, steps) in enumerate(zip(("sums", "reverse", "spell"), arguments.steps, strict=True)):
        rng, answers = random.Random(f"{name} {arguments.seed}"), {}
        while len(answers) < sum(SIZES.values()):
            answers.update([task(name, rng)])
        rows = [{"prompt": prompt, "answer": answer} for prompt, answer in answers.items()]
        for split, size in SIZES.items():
            part, rows = rows[:size], rows[size:]
            (folder / f"{name}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        files = {"train_dataset": "train", "selection_dataset": "selection", "eval_dataset": "test"}
        files = {field: f"{name}-{split}.jsonl" for field, split in files.items()}
        domains.append({"name": name, "reward_funcs": "exact_match", **files})
        train = Dataset.from_json(str(folder / f"{name}-train.jsonl")).rename_column("answer", "completion")
        args = SFTConfig(str(folder / f"{stage}-{name}"), max_steps=steps, learning_rate=arguments.learning_rate,
                         lr_scheduler_type="constant", per_device_train_batch_size=12, save_strategy="no",
                         report_to=[], seed=arguments.seed, bf16=False, gradient_checkpointing=False,
                         model_init_kwargs={"dtype": "float32"})  # fmt: skip
        trainer = SFTTrainer(model, args, train_dataset=train)
        trainer.train()
        trainer.save_model()
        model = args.output_dir
    recipe = {
        "model": "0-sums",
        "domains": domains,
        "training": {"max_completion_length": 16, "bf16": False},  # scores in the precision of the stages
        "analysis": {"reference": "dataset", "reference_column": "answer", "max_prompts": 32},
    }
    (folder / "domains.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))


if __name__ == "__main__":
    main()
