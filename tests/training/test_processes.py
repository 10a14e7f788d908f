"""A parent and its children: exit codes, signals, the environment of each stage."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from trl_interfere.training import processes


PYTHON = sys.executable
PARENT = "import sys; from trl_interfere.training.processes import train_in_processes as t; sys.exit(t(sys.argv[1:]))"


@pytest.fixture
def child(tmp_path, monkeypatch):
    """Function that puts a program in the place of Python; it gets its number and writes down how it was called."""

    def install(body: str) -> Path:
        program = tmp_path / "child"
        program.write_text(
            f"#!{sys.executable}\nimport json, os, sys, time\nfrom pathlib import Path\n"
            f"log = Path({str(tmp_path / 'log')!r})\n"
            "number = len(log.read_text().splitlines()) if log.exists() else 0\n"
            "with log.open('a') as file:\n    print(json.dumps([sys.argv[1:], dict(os.environ)]), file=file)\n" + body
        )
        program.chmod(0o755)
        monkeypatch.setattr(processes.sys, "executable", str(program))
        return program

    return install


def calls(folder: Path) -> list:
    return [json.loads(line) for line in (folder / "log").read_text().splitlines()]


@pytest.mark.parametrize(("body", "code"), [("sys.exit(0)", 0), ("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137)])
def test_until_no_stage_is_left_or_one_fails(tmp_path, child, body, code):
    child(f"if number < 2:\n    sys.exit(75)\n{body}")
    before = signal.getsignal(signal.SIGTERM)
    assert processes.train_in_processes(["train", "--config", "x.yaml"]) == code
    assert signal.getsignal(signal.SIGTERM) is before
    start = ["-m", "trl_interfere", "train", "--config", "x.yaml", "--max-stages", "1"]
    assert [arguments for arguments, _ in calls(tmp_path)] == [start, [*start, "--resume"], [*start, "--resume"]]
    assert processes.train_in_processes(["train"], resume=True) == code
    assert calls(tmp_path)[-1][0] == ["-m", "trl_interfere", "train", "--max-stages", "1", "--resume"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_child(tmp_path, child, signum):
    program = child("time.sleep(60)")
    code = f"import sys; sys.executable = {str(program)!r}; {PARENT}"
    parent = subprocess.Popen([PYTHON, "-c", code, "train"])
    deadline = time.monotonic() + 20
    while not (tmp_path / "log").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.send_signal(signum)
    assert parent.wait(20) == 128 + signum
    assert len(calls(tmp_path)) == 1
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(program) not in listing


def test_processes_agree_on_the_port_of_each_stage(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert [processes._rendezvous(number)["MASTER_PORT"] for number in range(2)] == ["29500", "29501"]
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # of a launcher
    launcher = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    found = []
    for rank in ("0", "1"):
        for name, value in {**launcher, "RANK": rank}.items():
            monkeypatch.setenv(name, value)
        found.append([processes._rendezvous(number) for number in range(2)])
    assert found[0] == found[1]
    assert all(environment["TORCHELASTIC_USE_AGENT_STORE"] == "False" for environment in found[0])
    assert len({str(store.port), *(environment["MASTER_PORT"] for environment in found[0])}) == 3
