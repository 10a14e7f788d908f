import json
import os
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from trl_interfere.rewards.code import CodeReward
from trl_interfere.rewards.program_tests import check_calls, check_output
from trl_interfere.rewards.sandbox import Limits, SandboxError
from trl_interfere.rewards.sandboxes import PistonSandbox, UnsafeSandbox, check_sandbox, open_sandbox


class Piston(BaseHTTPRequestHandler):
    """The protocol of Piston over the local sandbox."""

    def log_message(self, *args):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.requests.append((self.path, body))
        if server.statuses:
            self.answer(server.statuses.pop(0), {"message": "no"})
            return
        if body["run_timeout"] > server.run_timeout:
            limit = f"run_timeout cannot exceed the configured limit of {server.run_timeout}"
            self.answer(400, {"message": limit})
            return
        limits = Limits(seconds=body["run_timeout"] / 1000, output=server.output_max_size)
        execution = server.sandbox.run(body["files"][0]["content"], body["stdin"], limits)
        code, status = execution.code, {"timeout": "TO", "output": "OL"}.get(execution.status)
        run = {
            "stdout": execution.stdout,
            "stderr": execution.stderr,
            "output": execution.stdout + execution.stderr,
            "code": None if code is not None and code < 0 else code,
            "signal": "SIGKILL" if code is not None and code < 0 else None,
            "status": status,
        }
        self.answer(200, {"language": "python", "version": "3.12.0", "run": run})

    def answer(self, status, content):
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def piston(sandbox):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Piston)
    server.requests, server.statuses, server.sandbox = [], [], sandbox
    server.run_timeout, server.output_max_size = 20_000, 2**20
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    server.server_close()


def test_piston(piston):
    sandbox = PistonSandbox(piston.url)
    execution = sandbox.run("print(int(input()) + 1)", "41")
    assert (execution.status, execution.stdout, execution.code) == ("ok", "42\n", 0)
    path, body = piston.requests[1]  # after one about the output
    assert path == "/api/v2/execute" and body["language"] == "python" and body["stdin"] == "41"
    assert sandbox.run("1 / 0").status == "error"
    assert sandbox.run("while True: pass", limits=Limits(seconds=0.5)).status == "timeout"
    assert sandbox.run("while True: print('x' * 1000)").status == "output"


def test_tests_by_piston(piston):
    sandbox, limits = PistonSandbox(piston.url), Limits()
    assert check_output(sandbox, "print(input())", ["x"], ["x"], limits).passed
    assert not check_output(sandbox, "print('y')", ["x"], ["x"], limits).passed
    assert check_calls(sandbox, "f = lambda x: x + 1", "assert f(1) == 2", limits).passed
    assert not check_calls(sandbox, "f = lambda x: x", "assert f(1) == 2", limits).passed
    tests = json.dumps({"inputs": ["1 2"], "outputs": ["3"]})
    reward = CodeReward(sandbox=piston.url)
    assert reward(["print(sum(map(int, input().split())))", "print(4)"], [tests] * 2) == [1, 0]


def test_piston_with_its_default_limits(piston):
    """Every program would fail, for no fault of its own."""
    piston.run_timeout, piston.output_max_size = 3000, 1024
    tests = json.dumps({"inputs": ["1 2"], "outputs": ["3"]})
    with pytest.raises(
        SandboxError, match="run_timeout cannot exceed.*Raise PISTON_RUN_TIMEOUT on the server, to 5000 or more"
    ):
        PistonSandbox(piston.url).run("print(1)")
    sandbox = PistonSandbox(piston.url)
    for _ in range(2):
        with pytest.raises(SandboxError, match="1,048,575 characters .*found 1,024 .*PISTON_OUTPUT_MAX_SIZE=1048576"):
            check_calls(sandbox, "f = int", "assert f(1) == 1", Limits(seconds=2))
    piston.run_timeout = 5000
    with pytest.raises(SandboxError, match="PISTON_OUTPUT_MAX_SIZE"):
        CodeReward(sandbox=piston.url)(["print(3)"], [tests])
    piston.output_max_size = 2**20
    assert check_calls(sandbox, "f = int", "assert f(1) == 1", Limits(seconds=5)).passed
    # A program that prints more than it may fails by itself.
    assert sandbox.run("print('x' * 2**21)").status == "output"


def test_a_report_that_is_cut_off(sandbox):
    class Cut:
        def run(self, program, stdin, limits):
            execution = sandbox.run(program, stdin, limits)
            return replace(execution, stdout=execution.stdout[:40])

    with pytest.raises(SandboxError, match="expected the report of a test as JSON.*PISTON_OUTPUT_MAX_SIZE"):
        check_calls(Cut(), "f = int", "assert f(1) == 1", Limits())


def test_piston_that_is_busy(piston, monkeypatch):
    monkeypatch.setattr("trl_interfere.rewards.sandboxes.time.sleep", lambda seconds: None)
    piston.statuses += [429, 503]
    assert PistonSandbox(piston.url).run("print(1)").stdout == "1\n"
    piston.statuses += [500] * 4
    with pytest.raises(SandboxError, match=r"http://127.0.0.1:\d+ does not answer \(status 500\)"):
        PistonSandbox(piston.url).run("print(1)")
    piston.statuses += [400]
    with pytest.raises(SandboxError, match="expected an answer of Piston .*found status 400"):
        PistonSandbox(piston.url).run("print(1)")
    with pytest.raises(SandboxError, match="http://127.0.0.1:9 does not answer"):
        PistonSandbox("http://127.0.0.1:9", retries=0).run("print(1)")


def test_unsafe():
    with pytest.warns(UserWarning, match="unsafe: generated programs run with all rights of this user"):
        sandbox = UnsafeSandbox()
    assert sandbox.run("print(input())", "x").stdout == "x\n"
    assert sandbox.run("1 / 0").status == "error"
    assert sandbox.run("while True: pass", limits=Limits(seconds=0.5)).status == "timeout"
    assert sandbox.run("print('x' * 100)", limits=Limits(output=10)).status == "output"
    assert sandbox.run("exit()").status == "ok"
    assert sandbox.run("print(open('/dev/stdin').read())", "x").stdout == "x\n"
    assert check_calls(sandbox, "f = lambda x: x + 1", "assert f(1) == 2", Limits(seconds=20)).passed


@pytest.mark.filterwarnings("ignore:sandbox. unsafe")
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_without_end_is_ended(stream, monkeypatch):
    """Before the time is over, and before the disk is full."""
    sizes, fstat = [], os.fstat
    monkeypatch.setattr(
        "trl_interfere.rewards.sandboxes.os.fstat", lambda file: sizes.append(fstat(file)) or sizes[-1]
    )
    program = f"import sys, time\nwhile True:\n    sys.{stream}.write('x' * 10**5)\n    time.sleep(0.01)"
    execution = UnsafeSandbox().run(program, limits=Limits(seconds=60))
    assert execution.status == "output" and execution.seconds < 50
    assert len(execution.stdout + execution.stderr) == 2**20 and max(size.st_size for size in sizes) < 2**26


def test_names():
    for name in ("unsafe", "http://localhost:2000", "https://piston.example"):
        check_sandbox(name)
    for name in ("", "docker", "ftp://x", None):
        with pytest.raises(SandboxError, match="expected 'bubblewrap', 'unsafe' or the address of a Piston server"):
            check_sandbox(name)


def test_it_is_never_unsafe_by_itself(monkeypatch, tmp_path):
    """Without bubblewrap nothing is run anywhere else."""
    monkeypatch.setenv("PATH", str(tmp_path))
    open_sandbox.cache_clear()
    with pytest.raises(SandboxError, match="expected bubblewrap"):
        CodeReward()(["print(1)"], [json.dumps({"inputs": [""], "outputs": ["1"]})])
