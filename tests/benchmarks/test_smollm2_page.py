"""The page of the study of SmolLM2 says what its data say."""

import json
import shutil
from pathlib import Path

from smollm2_page import write_page


ROOT = Path(__file__).parents[2]


def test_the_tables_are_those_of_the_data(tmp_path):
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "docs" / "study-smollm2.md", tmp_path)
    data = json.loads((ROOT / "docs" / "data" / "study-smollm2.json").read_text())
    write_page(data["rows"], tmp_path)
    assert (tmp_path / "study-smollm2.md").read_text() == (ROOT / "docs" / "study-smollm2.md").read_text()
    assert json.loads((tmp_path / "data" / "study-smollm2.json").read_text()) == data
    for row in data["rows"]:
        assert {"run", "seed", "command"} <= row.keys()
        assert all(entry["n"] >= 200 for entry in row.get("domains", {}).values())
