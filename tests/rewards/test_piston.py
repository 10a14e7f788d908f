import json

import pytest
from local_server import Handler, serve

from trl_interfere.rewards.code import CodeReward
from trl_interfere.rewards.functions import check_function
from trl_interfere.rewards.piston import PistonSandbox
from trl_interfere.rewards.sandbox import Limits, SandboxError


class Piston(Handler):
    """The protocol of Piston over the local sandbox."""

    def do_POST(self):
        server, body = self.server, self.body()
        server.requests.append((self.path, body))
        if server.statuses:
            self.answer({"message": "no"}, server.statuses.pop(0))
            return
        if body["run_timeout"] > server.run_timeout:
            self.answer({"message": f"run_timeout cannot exceed the configured limit of {server.run_timeout}"}, 400)
            return
        limits = Limits(seconds=body["run_timeout"] / 1000, output=server.output_max_size)
        execution = server.sandbox.run(body["files"][0]["content"], body["stdin"], limits)
        status = {"timeout": "TO", "output": "OL"}.get(execution.status)
        run = {"stdout": execution.stdout, "stderr": execution.stderr, "output": execution.stdout + execution.stderr}
        run |= {"code": int(execution.status != "ok"), "signal": None, "status": status}
        self.answer({"language": "python", "version": "3.12.0", "run": run})


@pytest.fixture
def piston(sandbox):
    with serve(Piston, statuses=[], sandbox=sandbox, run_timeout=20_000, output_max_size=2**20) as server:
        yield server


def test_piston(piston):
    sandbox = PistonSandbox(piston.url)
    execution = sandbox.run("print(int(input()) + 1)", "41")
    assert (execution.status, execution.stdout) == ("ok", "42\n")
    path, body = piston.requests[1]  # after one about the output
    assert path == "/api/v2/execute" and body["language"] == "python" and body["stdin"] == "41"
    assert sandbox.run("1 / 0").status == "error"
    assert sandbox.run("while True: pass", limits=Limits(seconds=0.5)).status == "timeout"
    assert sandbox.run("while True: print('x' * 1000)").status == "output"
    # Program and tests of functions run in one process there.
    assert check_function(sandbox, "f = lambda x: x + 1", "assert f(1) == 2", Limits(), "f") == (True, True)
    assert check_function(sandbox, "f = lambda x: x", "assert f(1) == 2", Limits(), "f") == (False, True)
    tests = json.dumps({"inputs": ["1 2"], "outputs": ["3"]})
    reward = CodeReward(sandbox=piston.url)
    assert reward(["print(sum(map(int, input().split())))", "print(4)"], [tests] * 2) == [1, 0]


def test_piston_with_its_default_limits(piston):
    """Every program would fail, for no fault of its own."""
    piston.run_timeout, piston.output_max_size = 3000, 1024
    with pytest.raises(SandboxError, match="PISTON_RUN_TIMEOUT"):
        PistonSandbox(piston.url)
    piston.run_timeout = 5000
    with pytest.raises(SandboxError, match="PISTON_OUTPUT_MAX_SIZE"):
        PistonSandbox(piston.url)
    piston.output_max_size = 2**20
    assert PistonSandbox(piston.url).run("print('x' * 2**21)").status == "output"


def test_piston_that_is_busy(piston, monkeypatch):
    monkeypatch.setattr("urllib3.util.retry.time.sleep", lambda seconds: None)
    piston.statuses += [429, 503]
    sandbox = PistonSandbox(piston.url)
    for statuses in ([500] * 4, [400]):
        piston.statuses += statuses
        with pytest.raises(SandboxError, match=f"status {statuses[0]}"):
            sandbox.run("print(1)")
    with pytest.raises(SandboxError, match="127.0.0.1:9"):
        PistonSandbox("http://127.0.0.1:9", retries=0)
