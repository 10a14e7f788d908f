"""The sandbox that runs generated programs, and what may stand in for it."""

import json
import logging
import os
import random
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .seccomp import seccomp_filter


logger = logging.getLogger(__name__)

_WORKER = Path(__file__).with_name("sandbox_worker.py")
_GRACE = 5.0  # seconds on top of its own limit after which a worker that does not answer is ended
_ATTEMPTS = 3  # at a program whose worker is lost
_PAUSES = (0, 2, 8)  # seconds before each attempt at a program of ours, longer than those around it run by default
_FOLDERS = ("/usr/lib", "/usr/lib64", "/lib", "/lib64")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
_PROBE = "print(1 + 1)"
_UIDS = range(61184, 65534)  # of programs, where the sandbox is made by root; no account has them


class SandboxError(ValueError):
    """There is no sandbox to run programs in."""


@dataclass(frozen=True)
class Limits:
    """
    What one program may use.

    Args:
        seconds (`float`, *optional*, defaults to `5.0`):
            Wall clock.
        memory (`int`, *optional*, defaults to `536870912`):
            Bytes of address space.
        output (`int`, *optional*, defaults to `1048576`):
            Bytes of standard output, and of standard error.
        threads (`int`, *optional*, defaults to `64`):
            Threads. There is always one process.
    """

    seconds: float = 5.0
    memory: int = 512 * 2**20
    output: int = 2**20
    threads: int = 64

    def __post_init__(self):
        for name in ("seconds", "memory", "output", "threads"):
            if not getattr(self, name) > 0:
                raise ValueError(f"sandbox, {name}: expected a number above 0, found {getattr(self, name)!r}")


@dataclass(frozen=True)
class Execution:
    """
    How a program ended.

    Args:
        status (`str`):
            `"ok"` (ended by itself with exit code 0), `"error"` (ended otherwise), `"timeout"`, `"output"` (it wrote
            more than it may) or `"lost"` (the sandbox itself ended, with this program only).
        stdout (`str`):
            What it wrote to standard output, up to the limit.
        stderr (`str`):
            What it wrote to standard error, up to the limit.
        code (`int`, *optional*):
            Exit code; negative if a signal ended it.
        seconds (`float`):
            Wall clock.
        memory (`int`):
            Largest resident size in bytes, the interpreter included.
    """

    status: str
    stdout: str = ""
    stderr: str = ""
    code: int | None = None
    seconds: float = 0.0
    memory: int = 0


class Sandbox:
    """
    Runs Python programs, each in a fresh process without network, files, or other processes, by bubblewrap.

    A worker is one bubblewrap with an interpreter as its first process, which forks a child for each program. The
    child gives up its rights, takes on limits and a filter of system calls, and only then reads its program. It can
    neither fork nor write a file, so nothing is left of it for the next program.

    Args:
        workers (`int`, *optional*):
            Programs that run at once. Defaults to the number of cores.
        limits ([`Limits`], *optional*):
            Limits of each program.

    Raises:
        [`SandboxError`]: If bubblewrap is not installed or may not make namespaces here.
    """

    same_interpreter = True  # runs programs, as the one that runs this

    def __init__(self, workers: int | None = None, limits: Limits | None = None):
        self.limits = limits or Limits()
        self.workers = workers or len(os.sched_getaffinity(0))
        find_bubblewrap()
        self._local = threading.local()
        self._open: set[_Worker] = set()
        self._closing = threading.Event()
        # A worker ends with the thread that made it, so each thread of the pool makes and keeps its own.
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="sandbox")
        self._finalizer = weakref.finalize(self, _close, self._pool, self._open, self._closing)
        try:
            probe = self._pool.submit(self._attempt, _PROBE, "", self.limits, _GRACE).result()
        except (OSError, ValueError) as error:
            self.close()
            if isinstance(error, SandboxError):
                raise
            raise SandboxError(f"sandbox: it ended with a first program ({error})") from error
        if (probe.status, probe.stdout) != ("ok", "2\n"):
            self.close()
            raise SandboxError(f"sandbox: expected a first program to print 2, found {probe}")

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

        Raises:
            [`SandboxError`]: If the sandbox ends again and again, also with a program that does nothing.
        """
        return self._pool.submit(self._run, program, stdin, limits or self.limits).result()

    def map(self, function, *arguments: Iterable) -> list:
        """
        Call a function for many arguments, as many at a time as there are workers.

        Args:
            function (`Callable`):
                Called with an item of each iterable; may call `run`.
            arguments (`Iterable`):
                Arguments.

        Returns:
            `list`: What the function returned, in order.
        """
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(function, *arguments))

    def close(self) -> None:
        """End all workers. Programs that still run end with them."""
        self._finalizer()

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _run(self, program: str, stdin: str, limits: Limits) -> Execution:
        reason = ""
        for attempt in range(_ATTEMPTS):
            last = attempt == _ATTEMPTS - 1
            if last:
                self._probe(reason)
            if self._closing.is_set():
                return Execution("lost", stderr="the sandbox is closed")
            try:
                return self._attempt(program, stdin, limits, _GRACE * (4 if last else 1))
            except (OSError, ValueError) as error:
                reason = str(error)
        if not self._closing.is_set():
            # No program is known that could do this. Were there one, it should not end a training.
            logger.warning(
                "sandbox: it ended %d times with one program (%s) and not with others: that program counts as failed",
                _ATTEMPTS,
                reason,
            )
        return Execution("lost", stderr=reason)

    def _attempt(self, program: str, stdin: str, limits: Limits, grace: float) -> Execution:
        worker = getattr(self._local, "worker", None)
        if worker is None:
            worker = self._local.worker = _Worker()
            self._open.add(worker)
        try:
            return worker.run(program, stdin, limits, grace)
        except (OSError, ValueError):
            worker.close()
            self._open.discard(worker)
            self._local.worker = None
            raise

    def _probe(self, reason: str) -> None:
        """Raise an error if the sandbox ends with any program."""
        for pause in _PAUSES:
            if self._closing.wait(pause):
                return
            try:
                if self._attempt(_PROBE, "", self.limits, _GRACE).stdout == "2\n":
                    return
            except (OSError, ValueError) as error:
                reason = str(error)
        raise SandboxError(
            f"sandbox: it ends with any program ({reason}). Is the machine out of memory, processes or open files?"
        )


def find_bubblewrap() -> str:
    """
    The command of bubblewrap.

    Returns:
        `str`: Its path.

    Raises:
        [`SandboxError`]: If it is not installed.
    """
    path = shutil.which("bwrap")
    if path is None:
        raise SandboxError(
            "sandbox: expected bubblewrap (the command `bwrap`) to run generated programs in, found none. Install it "
            "(`apt-get install bubblewrap`), or choose where programs run yourself: `sandbox: http://HOST:PORT` for a "
            "Piston server, `sandbox: unsafe` for no isolation at all"
        )
    return path


class _Worker:
    """One bubblewrap. Used by one thread."""

    def __init__(self):
        instructions = seccomp_filter()
        root = os.geteuid() == 0
        self.uid = random.SystemRandom().choice(_UIDS) if root else None
        ours, theirs = socket.socketpair()
        errors = tempfile.TemporaryFile()
        try:
            self.process = subprocess.Popen(
                _command(root, instructions),
                stdin=theirs,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env={},
                cwd="/",
                start_new_session=True,
            )
            theirs.close()
            self.channel = ours
            self.channel.settimeout(30)
            self._lines = b""
            greeting = self._line()
        except (OSError, ValueError) as error:
            ours.close()
            theirs.close()
            process = getattr(self, "process", None)
            if process is not None:
                process.kill()
                process.wait()
            errors.seek(0)
            reason = errors.read(2000).decode(errors="replace").strip() or str(error)
            raise SandboxError(
                f"sandbox: bubblewrap is installed, but cannot make a sandbox here ({reason}). In a container it may "
                "need the right to make namespaces"
            ) from error
        finally:
            errors.close()
        assert greeting == b"ready", greeting

    def close(self) -> None:
        self.channel.close()
        try:
            self.process.wait(0.2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _line(self) -> bytes:
        while b"\n" not in self._lines:
            part = self.channel.recv(65536)
            if not part:
                raise OSError("the worker ended")
            self._lines += part
        line, self._lines = self._lines.split(b"\n", 1)
        return line

    def run(self, program: str, stdin: str, limits: Limits, grace: float) -> Execution:
        start = time.monotonic()
        deadline = start + limits.seconds + grace
        request = {
            "seconds": limits.seconds,
            "cpu_seconds": int(limits.seconds) + 2,
            "memory": limits.memory,
            "threads": limits.threads,
            "uid": self.uid,
        }
        theirs, inputs, outputs = [], {}, {}
        try:
            for text in (program, stdin):
                reader, writer = os.pipe()
                theirs.append(reader)
                inputs[writer] = memoryview(text.encode("utf-8", "surrogatepass"))
            for name in ("stdout", "stderr"):
                reader, writer = os.pipe()
                theirs.append(writer)
                outputs[reader] = (name, bytearray())
            try:
                socket.send_fds(self.channel, [json.dumps(request).encode()], theirs)
            finally:
                for descriptor in theirs:
                    os.close(descriptor)
            report, flooded = self._exchange(inputs, outputs, limits.output, deadline)
        finally:
            for descriptor in (*inputs, *outputs):
                os.close(descriptor)
        texts = {name: bytes(content).decode("utf-8", "replace") for name, content in outputs.values()}
        killed = report["code"] in (-signal.SIGKILL, -signal.SIGXCPU)
        if flooded:
            status = "output"
        elif report["ended"] == "timeout" or killed and report["cpu_seconds"] > request["cpu_seconds"] - 0.5:
            status = "timeout"
        elif killed:
            # Neither by the worker nor by the program, which may not.
            raise OSError("the system ended a program, for want of memory?")
        else:
            status = "ok" if report["code"] == 0 else "error"
        return Execution(
            status=status,
            code=report["code"],
            seconds=time.monotonic() - start,
            memory=report["memory"],
            **texts,
        )

    def _exchange(self, inputs: dict, outputs: dict, limit: int, deadline: float) -> tuple[dict, bool]:
        """Feed and read the pipes of a program until the worker reports its end and the outputs are read."""
        report, flooded = None, False
        with selectors.DefaultSelector() as selector:
            selector.register(self.channel, selectors.EVENT_READ)
            for descriptor in inputs:
                os.set_blocking(descriptor, False)
                selector.register(descriptor, selectors.EVENT_WRITE)
            for descriptor in outputs:
                selector.register(descriptor, selectors.EVENT_READ)
            waiting = set(outputs)
            while report is None or waiting:
                events = selector.select(max(deadline - time.monotonic(), 0))
                # A program that writes without end keeps the pipes busy: their silence is not waited for.
                if not events or time.monotonic() > deadline:
                    raise OSError("the worker does not answer")
                for key, _ in events:
                    if key.fileobj is self.channel:
                        report = json.loads(self._line())
                        selector.unregister(self.channel)
                    elif key.fd in inputs:
                        try:
                            inputs[key.fd] = inputs[key.fd][os.write(key.fd, inputs[key.fd]) :]
                            done = not inputs[key.fd]
                        except BrokenPipeError:
                            done = True
                        if done:
                            selector.unregister(key.fd)
                            os.close(key.fd)
                            del inputs[key.fd]
                    else:
                        content = outputs[key.fd][1]
                        part = os.read(key.fd, 65536)
                        if not part:
                            selector.unregister(key.fd)
                            waiting.discard(key.fd)
                        elif len(content) + len(part) > limit:
                            content += part[: limit - len(content)]
                            if not flooded and report is None:
                                self.channel.sendall(b"x")
                            flooded = True
                        else:
                            content += part
        return report, flooded


def _command(root: bool, instructions: bytes) -> list[str]:
    python, prefix = os.path.realpath(sys.executable), os.path.realpath(sys.base_prefix)
    command = [find_bubblewrap(), "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    command += ["--unshare-cgroup-try", "--die-with-parent", "--new-session", "--as-pid-1", "--clearenv"]
    if root:
        # No namespace of users: it would hold a single one, and programs shall have another than the worker.
        command += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_KILL"]
    else:
        command += ["--unshare-user", "--cap-drop", "ALL"]
    # Folders on the way to what is bound are made for their owner alone, unless they are made before.
    for path in ("/usr/lib", f"{prefix}/lib", python, *_DEVICES):
        for parent in reversed(Path(path).parents[:-1]):
            command += ["--perms", "0755", "--dir", str(parent)]
    # The interpreter and the libraries that it is linked with, and nothing else of this machine.
    for path in dict.fromkeys((*_FOLDERS, f"{prefix}/lib", f"{prefix}/lib64", python)):
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        elif os.path.exists(path):
            command += ["--ro-bind", path, path]
    for device in _DEVICES:
        command += ["--dev-bind", device, device]
    command += ["--ro-bind", str(_WORKER), "/worker.py", "--chdir", "/", "--remount-ro", "/"]
    # Sets have the same order in every run.
    command += ["--setenv", "PYTHONHASHSEED", "0", "--setenv", "OMP_NUM_THREADS", "1", "--"]
    return [*command, python, "-s", "-S", "-P", "-B", "/worker.py", instructions.hex()]


def _close(pool: ThreadPoolExecutor, workers: set[_Worker], closing: threading.Event) -> None:
    closing.set()
    pool.shutdown(wait=False, cancel_futures=True)
    for worker in list(workers):
        worker.process.kill()
        worker.process.wait()
    pool.shutdown(wait=True)
    for worker in list(workers):
        worker.channel.close()
    workers.clear()
