import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate import PartialState
from datasets import Dataset

from trl_interfere import Domain, InterferenceAnalyzer, InterferenceConfig
from trl_interfere.analysis.report import InterferenceReport


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


def test_two_processes_find_what_one_finds(make_model, moved, tokenizer, tmp_path):
    before = make_model("llama")
    for name, model in (("before", before), ("after", moved(before))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    main(tmp_path, False, tmp_path / "report")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    expected, first, second = (
        InterferenceReport.from_pretrained(tmp_path / name) for name in ("report", "report-0", "report-1")
    )
    assert first.references == expected.references
    for name, values in expected.routes.items():
        assert np.array_equal(first.routes[name], second.routes[name]), name
        # The step is that of float32 norms, so that sums in another order show in the second order.
        np.testing.assert_allclose(first.routes[name], values, rtol=1e-3, atol=1e-3 * np.abs(values).max())
    assert first.damage == pytest.approx(expected.damage, rel=1e-6)
    assert first.cosines["global"] == pytest.approx(expected.cosines["global"], rel=1e-6)
    found, wanted = (report.subspace["update"]["eigenvalues"][0] for report in (first, expected))
    assert found == pytest.approx(wanted, rel=1e-2)


if __name__ == "__main__":
    root = Path(sys.argv[1])
    main(root, True, root / f"report-{PartialState(cpu=True).process_index}")
