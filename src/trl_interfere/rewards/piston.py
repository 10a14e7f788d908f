"""A server that runs generated programs."""

import json
import re
import time

import requests

from .sandbox import Execution, Limits, Sandbox, SandboxError


class PistonSandbox(Sandbox):
    """
    Runs Python programs on a server that speaks the protocol of [Piston](https://github.com/engineer-man/piston).

    Programs, inputs and tests of functions leave this machine; expected outputs do not. How well the programs are
    isolated is up to the server. On its default limits a server refuses runs of more than 3 seconds and cuts outputs
    off after 1024 characters: `PISTON_RUN_TIMEOUT` and `PISTON_OUTPUT_MAX_SIZE` have to be raised, which is checked
    first.

    Args:
        url (`str`):
            Address of the server, without `/api/v2`.
        version (`str`, *optional*, defaults to `"3"`):
            Version of Python there.
        retries (`int`, *optional*, defaults to `3`):
            Attempts after one that the server did not answer, or with 429 or 5xx.

    Raises:
        [`SandboxError`]: If the server cannot be reached or has too low limits.
    """

    def __init__(self, url: str, version: str = "3", retries: int = 3):
        self.url, self.version, self.retries = url.rstrip("/"), version, retries
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
        """
        Run one program.

        Args:
            program (`str`):
                Its text.
            stdin (`str`, *optional*, defaults to `""`):
                Its standard input.
            limits ([`Limits`], *optional*):
                Defaults to those of the sandbox. The server may have lower ones.

        Returns:
            [`Execution`]: How it ended.

        Raises:
            [`SandboxError`]: If the server cannot be reached or refuses the program.
        """
        limits = limits or self.limits
        body = {
            "language": "python",
            "version": self.version,
            "files": [{"name": "program.py", "content": program}],
            "stdin": stdin,
            "run_timeout": int(limits.seconds * 1000),
            "run_memory_limit": limits.memory,
        }
        start = time.monotonic()
        run = self._post(body, limits.seconds)
        late = time.monotonic() - start >= limits.seconds
        stdout, stderr = str(run.get("stdout") or ""), str(run.get("stderr") or "")
        status = "ok" if run.get("code") == 0 and not run.get("signal") else "error"
        if run.get("status") == "TO" or (run.get("signal") == "SIGKILL" and late):
            status = "timeout"
        if run.get("status") in ("OL", "EL") or len(stdout) > limits.output:
            status = "output"
        return Execution(status, stdout[: limits.output], stderr[: limits.output])

    def _post(self, body: dict, seconds: float) -> dict:
        problem, text, limit = "", "", None
        for attempt in range(self.retries + 1):
            try:
                response = requests.post(f"{self.url}/api/v2/execute", json=body, timeout=seconds + 30)
                problem, text = f"status {response.status_code}", response.text
                if response.status_code != 429 and response.status_code < 500:
                    break
            except requests.RequestException as error:
                problem = str(error)
            if attempt < self.retries:
                time.sleep(0.5 * 2**attempt)
        else:
            raise SandboxError(f"sandbox: {self.url} does not answer ({problem})")
        try:
            run = json.loads(text)["run"]
        except (ValueError, KeyError, TypeError):
            run = None
        if not isinstance(run, dict):
            limit = re.search(r"(run_\w+) cannot exceed the configured limit", text)
            raise SandboxError(
                f"sandbox: expected an answer of Piston from {self.url}, found {problem}: {text[:300]}"
                + (f". Raise PISTON_{limit[1].upper()} on the server, to {body[limit[1]]} or more" if limit else "")
            )
        return run
