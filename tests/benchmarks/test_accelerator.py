"""The benchmark of the analysis on an accelerator, on a processor and with a model of two layers."""

from argparse import Namespace

import accelerator
import pytest
import shapes


@pytest.mark.parametrize("spared", [False, True])
def test_analysis(monkeypatch, spared):
    monkeypatch.setitem(shapes.SHAPES, "tiny", (16, 24, 2, 8, True))
    monkeypatch.setattr(shapes, "VOCABULARY", 800)
    arguments = Namespace(
        **{"shapes": ["tiny"], "device": "cpu", "dtype": "float32", "layers": None, "rate": 1.0},
        **{"prompts": 4, "tokens": 12, "batch_size": 2, "offload": spared, "checkpointing": spared},
    )
    found = accelerator.analysis(arguments, {})["tiny"]
    assert found["completion_tokens"] == 4 * 12 and found["offload"] == found["checkpointing"] == spared
    assert found["parameters"] == 800 * 16 + 2 * (3 * 16 * 24 + 16 * 128 * (8 + 8 + 8 + 8) + 2 * 128 + 2 * 16) + 16
    assert found["pair_s"] > found["pass_s"] > 0 and found["pair_passes"] > 1
    assert set(found["parts_passes"]) == set(found["parts_s"])
    assert found["passes_by_count"] == pytest.approx(sum(found["parts_passes"].values()), abs=0.05)
