import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest


DATA = Path(__file__).parents[2] / "space" / "data" / "lab"


def command(*arguments):
    environment = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "False", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "trl_interfere", "compare", "--no-browser", "--no-hub", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def test_page_of_a_folder():
    process = command(DATA)
    try:
        line = next(line for line in process.stdout if "http://" in line)
        address = line[line.index("http://") :].split()[0]
        for _ in range(60):
            try:
                assert "lab" in httpx.get(f"{address}/config").text
                break
            except httpx.ConnectError:
                time.sleep(0.5)
        else:
            pytest.fail("the page does not answer")
    finally:
        process.terminate()
        process.wait(30)


def test_folder_without_a_run(tmp_path):
    process = command(tmp_path)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert output.strip().endswith("expected the folder of a run or of a report, found none")
