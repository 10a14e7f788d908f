"""Choosing where generated programs run, and what can stand in for the sandbox."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from urllib.parse import urlparse

import requests

from .sandbox import Execution, Limits, Sandbox, SandboxError, find_bubblewrap


_LOOK = 0.05  # seconds between looks at the output of a program that runs without isolation


def check_sandbox(name: str) -> None:
    """
    Refuse a sandbox that cannot be had, before anything is run in it.

    Args:
        name (`str`):
            `"bubblewrap"`, `"unsafe"` or the address of a Piston server.

    Raises:
        [`SandboxError`]: If it is none of these, or bubblewrap is not installed.
    """
    if name == "bubblewrap":
        find_bubblewrap()
    elif name != "unsafe" and urlparse(str(name)).scheme not in ("http", "https"):
        raise SandboxError(
            "sandbox: expected 'bubblewrap', 'unsafe' or the address of a Piston server (http://HOST:PORT), found "
            f"{name!r}"
        )


@lru_cache
def open_sandbox(name: str = "bubblewrap") -> "Sandbox | PistonSandbox | UnsafeSandbox":
    """
    The sandbox of a name. It is opened once and ends with this process.

    Args:
        name (`str`, *optional*, defaults to `"bubblewrap"`):
            `"bubblewrap"`, `"unsafe"` or the address of a Piston server.

    Returns:
        [`Sandbox`], [`PistonSandbox`] or [`UnsafeSandbox`]: The sandbox.

    Raises:
        [`SandboxError`]: If it cannot be had.
    """
    check_sandbox(name)
    if name == "bubblewrap":
        return Sandbox()
    return UnsafeSandbox() if name == "unsafe" else PistonSandbox(name)


class _Mapping:
    workers = 4

    def map(self, function, *arguments) -> list:
        """
        Call a function for many arguments, as many at a time as there are workers.

        Args:
            function (`Callable`):
                Called with an item of each iterable.
            arguments (`Iterable`):
                Arguments.

        Returns:
            `list`: What the function returned, in order.
        """
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(function, *arguments))


class PistonSandbox(_Mapping):
    """
    Runs Python programs on a server that speaks the protocol of [Piston](https://github.com/engineer-man/piston).

    Programs and inputs leave this machine; expected results do not, except in tests of functions, which run on the
    server as well. How well the programs are isolated is up to the server.

    A server on its default limits refuses runs of more than 3 seconds and cuts outputs off after 1024 characters:
    `PISTON_RUN_TIMEOUT` and `PISTON_OUTPUT_MAX_SIZE` have to be raised. Before the first program it is seen whether
    they were.

    Args:
        url (`str`):
            Address of the server, without `/api/v2`.
        version (`str`, *optional*, defaults to `"3"`):
            Version of Python there.
        retries (`int`, *optional*, defaults to `3`):
            Attempts after one that the server did not answer, or with 429 or 5xx.
    """

    def __init__(self, url: str, version: str = "3", retries: int = 3):
        self.url = url.rstrip("/")
        self.version = version
        self.retries = retries
        self.limits = Limits()
        self._lock, self._roomy = threading.Lock(), False

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
            [`SandboxError`]: If the server cannot be reached, refuses the program or has too low limits.
        """
        limits = limits or self.limits
        with self._lock:
            if not self._roomy:
                self._check_output(limits)
            self._roomy = True
        return self._run(program, stdin, limits)

    def _check_output(self, limits: Limits) -> None:
        """Whether the server gives back as much as a program may print. Asked by a program of ours, which does."""
        n = self.limits.output - 1
        execution = self._run(f"import sys\nsys.stdout.write('x' * {n})\n", "", limits)
        if execution.status != "ok" or len(execution.stdout) != n:
            raise SandboxError(
                f"sandbox: expected {n:,} characters from a program on {self.url} that prints as many, found "
                f"{len(execution.stdout):,} ({execution.status}). Set PISTON_OUTPUT_MAX_SIZE={self.limits.output} and "
                f"PISTON_RUN_TIMEOUT={int(limits.seconds * 1000)}, or more, on the server"
            )

    def _run(self, program: str, stdin: str, limits: Limits) -> Execution:
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
        stdout, stderr = str(run.get("stdout") or ""), str(run.get("stderr") or "")
        status = "ok" if run.get("code") == 0 and not run.get("signal") else "error"
        late = time.monotonic() - start >= limits.seconds
        if run.get("status") == "TO" or (run.get("signal") == "SIGKILL" and late):
            status = "timeout"
        if run.get("status") in ("OL", "EL") or len(stdout) > limits.output:
            status = "output"
        seconds = time.monotonic() - start
        return Execution(status, stdout[: limits.output], stderr[: limits.output], run.get("code"), seconds)

    def _post(self, body: dict, seconds: float) -> dict:
        for attempt in range(self.retries + 1):
            try:
                response = requests.post(f"{self.url}/api/v2/execute", json=body, timeout=seconds + 30)
                if response.status_code != 429 and response.status_code < 500:
                    break
                problem = f"status {response.status_code}"
            except requests.RequestException as error:
                problem = str(error)
            if attempt < self.retries:
                time.sleep(0.5 * 2**attempt)
        else:
            raise SandboxError(f"sandbox: {self.url} does not answer ({problem})")
        try:
            content = response.json()
            run = content["run"]
        except (ValueError, KeyError, TypeError):
            text = response.text[:300]
            limit = re.search(r"(run_\w+) cannot exceed the configured limit", text)
            raise SandboxError(
                f"sandbox: expected an answer of Piston from {self.url}, found status {response.status_code}: {text}"
                + (f". Raise PISTON_{limit[1].upper()} on the server, to {body[limit[1]]} or more" if limit else "")
            ) from None
        if not isinstance(run, dict):
            raise SandboxError(
                f"sandbox: expected an answer of Piston from {self.url}, found {json.dumps(content)[:300]}"
            )
        return run


class UnsafeSandbox(_Mapping):
    """Runs Python programs as ordinary processes of the user, with no isolation but a limit of time and of output."""

    same_interpreter = True

    def __init__(self):
        self.limits = Limits()
        warnings.warn(
            "sandbox: unsafe: generated programs run with all rights of this user, its files and its network",
            stacklevel=2,
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
                Defaults to those of the sandbox.

        Returns:
            [`Execution`]: How it ended.
        """
        limits = limits or self.limits
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            path = os.path.join(folder, "program.py")
            with open(path, "w", encoding="utf-8", errors="surrogatepass") as file:
                file.write(program)
            given, *outputs = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))
            given.write(stdin.encode("utf-8", "surrogatepass"))
            given.seek(0)
            process = subprocess.Popen(
                [sys.executable, "-I", path],
                stdin=given,
                stdout=outputs[0],
                stderr=outputs[1],
                cwd=folder,
                start_new_session=True,
            )
            late = flooded = False
            while not late and not flooded:
                try:
                    process.wait(_LOOK)
                    break
                except subprocess.TimeoutExpired:
                    late = time.monotonic() - start >= limits.seconds
                    flooded = any(os.fstat(file.fileno()).st_size > limits.output for file in outputs)
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
            texts = []
            for file in outputs:
                file.seek(0)
                texts.append(file.read(limits.output + 1))
        status = "timeout" if late else "ok" if process.returncode == 0 else "error"
        status = "output" if any(len(text) > limits.output for text in texts) else status
        stdout, stderr = (text[: limits.output].decode("utf-8", "replace") for text in texts)
        return Execution(status, stdout, stderr, process.returncode, time.monotonic() - start)
