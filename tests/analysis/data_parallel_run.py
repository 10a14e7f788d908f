"""An analysis in as many processes as it is started with; `test_data_parallel.py` starts it."""

import sys
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset

from trl_interfere import Domain, InterferenceAnalyzer, InterferenceConfig


def main(folder: Path, data_parallel: bool, output: Path) -> None:
    """Analyse the checkpoints of a folder."""

    def length(completions, **kwargs):
        return [float(len(completion)) for completion in completions]

    domains = [
        Domain(name, selection_dataset=Dataset.from_dict({"prompt": prompts}), reward_funcs=length)
        for name, prompts in (("math", ["1+2=", "4+4=", "9=", "3"]), ("qa", ["ab?", "cde?", "h"]))
    ]
    config = InterferenceConfig(
        correct_threshold=0.0, max_new_tokens=4, batch_size=1, subspace_size=1, data_parallel=data_parallel
    )
    analyzer = InterferenceAnalyzer.from_pretrained(
        folder / "before", folder / "after", config=config, dtype="float64"
    )
    analyzer.analyze(*domains).save_pretrained(output)


if __name__ == "__main__":
    root = Path(sys.argv[1])
    main(root, True, root / f"report-{PartialState(cpu=True).process_index}")
