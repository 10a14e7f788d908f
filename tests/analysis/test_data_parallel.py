import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_parallel_run import main

from trl_interfere.analysis.report import InterferenceReport


SCRIPT = Path(__file__).with_name("data_parallel_run.py")


def test_two_processes_find_what_one_finds(make_model, moved, tokenizer, tmp_path):
    before = make_model("llama")
    for name, model in (("before", before), ("after", moved(before))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    main(tmp_path, False, tmp_path / "report")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
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
