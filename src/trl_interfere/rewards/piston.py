"""A server that runs generated programs."""

import re
import time

import requests

from .http import session
from .sandbox import Execution, Limits, Sandbox, SandboxError


class PistonSandbox(Sandbox):
    """
    Runs Python programs on a server that speaks the protocol of [Piston](https://github.com/engineer-man/piston).

    Programs, inputs and tests of functions leave this machine; expected outputs do not. How well the programs are
    isolated is up to the server. The default limits of a server are too low (3 seconds, 1024 characters of output).
    """

    def __init__(self, url: str, version: str = "3", retries: int = 3):
        self.url, self.version, self._client = url.rstrip("/"), version, session(retries)
        self.limits, self.workers = Limits(), 4
        n = self.limits.output - 1
        execution = self.run(f"print('x' * {n}, end='')")
        if execution.status != "ok" or len(execution.stdout) != n:
            raise SandboxError(
                f"sandbox: expected {n:,} characters from a program on {self.url} that prints as many, found "
                f"{len(execution.stdout):,} ({execution.status}). Set PISTON_OUTPUT_MAX_SIZE={self.limits.output} or "
                "more on the server"
            )

    def run(self, program: str, stdin: str = "", limits: Limits | None = None) -> Execution:
        """Run one program, see [`Sandbox.run`]. The server may have lower limits."""
        limits = limits or self.limits
        files = [{"name": "program.py", "content": program}]
        body = {"language": "python", "version": self.version, "files": files, "stdin": stdin}
        body |= {"run_timeout": int(limits.seconds * 1000), "run_memory_limit": limits.memory}
        start = time.monotonic()
        run = self._post(body, limits.seconds + 30)
        late = time.monotonic() - start >= limits.seconds
        stdout, stderr = (str(run.get(name) or "") for name in ("stdout", "stderr"))
        if run.get("status") in ("OL", "EL") or len(stdout) > limits.output:
            status = "output"
        elif run.get("status") == "TO" or (run.get("signal") == "SIGKILL" and late):
            status = "timeout"
        else:
            status = "ok" if run.get("code") == 0 and not run.get("signal") else "error"
        return Execution(status, stdout[: limits.output], stderr[: limits.output])

    def _post(self, body: dict, timeout: float) -> dict:
        try:
            response = self._client.post(f"{self.url}/api/v2/execute", json=body, timeout=timeout)
        except requests.RequestException as error:
            raise SandboxError(f"sandbox: {self.url} does not answer ({error})") from error
        try:
            return {**response.json()["run"]}
        except (ValueError, KeyError, TypeError) as error:
            limit = re.search(r"(run_\w+) cannot exceed the configured limit", response.text)
            raise SandboxError(
                f"sandbox: expected an answer of Piston from {self.url}, found status {response.status_code}: "
                + response.text[:300]
                + (f". Raise PISTON_{limit[1].upper()} on the server, to {body[limit[1]]} or more" if limit else "")
            ) from error
