"""The sandbox that runs generated programs."""

import logging
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import urlparse

from .seccomp import seccomp_filter


logger = logging.getLogger(__name__)

_WORKER = Path(__file__).with_name("sandbox_worker.py")
_ATTEMPTS = 3  # at a program that the system ends
_FOLDERS = ("/usr/lib", "/usr/lib64", "/lib", "/lib64")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
_UIDS = range(61184, 65534)  # of programs, where the sandbox is made by root; no account has them
_SIGNAL = 128  # what bubblewrap adds to the number of the signal that ended a program
_SIGKILL, _SIGXCPU = 9, 24


class SandboxError(ValueError):
    """There is no sandbox to run programs in."""


@dataclass(frozen=True)
class Limits:
    """
    What one program may use.

    Args:
        seconds (`float`, *optional*, defaults to `5.0`):
            Processor time, rounded up. The wall clock may be two seconds more than twice that.
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
            more than it may) or `"killed"` (the system ended it, for want of memory).
        stdout (`str`):
            What it wrote to standard output, up to the limit.
        stderr (`str`):
            What it wrote to standard error, up to the limit.
    """

    status: str
    stdout: str = ""
    stderr: str = ""


class Sandbox:
    """
    Runs Python programs, each in a bubblewrap of its own: without network, files, or other processes.

    A program sees the interpreter and the system's libraries, read-only, and nothing else of the machine. It may make
    a fixed list of system calls, none of which starts a process, opens a socket or signals another process.

    Args:
        workers (`int`, *optional*):
            Programs that run at once. Defaults to the number of cores.
        limits ([`Limits`], *optional*):
            Limits of each program.

    Raises:
        [`SandboxError`]: If bubblewrap is not installed or may not make namespaces here.
    """

    def __init__(self, workers: int | None = None, limits: Limits | None = None):
        self.limits = limits or Limits()
        self.workers = workers or len(os.sched_getaffinity(0))
        probe = self.run("print(1 + 1)")
        if (probe.status, probe.stdout) != ("ok", "2\n"):
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
            [`SandboxError`]: If no sandbox can be made.
        """
        return again(lambda: self.run_once(program, stdin, limits))

    def run_once(
        self, program: str, stdin: str = "", limits: Limits | None = None, pipes: Sequence[int] = ()
    ) -> Execution:
        """Run one program that may also use the ends of pipes in `pipes`, which are closed here."""
        limits, bubblewrap = limits or self.limits, _bubblewrap()
        cpu, uid = math.ceil(limits.seconds), random.SystemRandom().choice(_UIDS) if os.geteuid() == 0 else 0
        files = [_file(program), _file(stdin), _file(stdin), _file(seccomp_filter()), _file(), _file()]
        text, copy, given, instructions, *outputs = files
        reader, ready = os.pipe()
        command = [bubblewrap, *_mounts(uid != 0), "--seccomp", str(instructions)]
        for file, path in ((text, "/program.py"), (copy, "/dev/stdin")):
            command += ["--perms", "0444", "--ro-bind-data", str(file), path]
        command += ["--remount-ro", "/", "--", os.path.realpath(sys.executable), "-sSPB", "/worker.py", str(ready)]
        command += map(str, (cpu, limits.memory, limits.output, limits.threads, uid))
        handed = (text, copy, instructions, ready, *pipes)
        standard = {"stdin": given, "stdout": outputs[0], "stderr": outputs[1], "env": {}, "cwd": "/"}
        try:
            code = subprocess.run(
                command, **standard, start_new_session=True, pass_fds=handed, timeout=2 * limits.seconds + 2
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
        finally:
            stdout, stderr = (os.pread(output, limits.output + 1, 0) for output in outputs)
            for file in (*files, ready, *pipes):
                os.close(file)
            started = os.read(reader, 5) == b"ready"
            os.close(reader)
        if not started:
            reason = stderr.decode(errors="replace").strip()[:2000] or f"exit code {code}"
            raise SandboxError(
                f"sandbox: bubblewrap is installed, but cannot make a sandbox here ({reason}). In a container it may "
                "need the right to make namespaces"
            )
        status = "ok" if code == 0 else "error"
        if max(len(stdout), len(stderr)) >= limits.output:
            status = "output"
        elif code is None or code == _SIGNAL + _SIGXCPU:
            status = "timeout"
        elif code == _SIGNAL + _SIGKILL:
            status = "killed"
        return Execution(status, stdout.decode("utf-8", "replace"), stderr.decode("utf-8", "replace"))

    def map(self, function: Callable, *arguments: Iterable) -> list:
        """What a function that may call `run` returns for many arguments, as many at a time as there are workers."""
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(function, *arguments))


def again(run: Callable[[], Execution]) -> Execution:
    """How a program ended, run again if the system ended it."""
    for _ in range(_ATTEMPTS):
        execution = run()
        if execution.status != "killed":
            return execution
    logger.warning("sandbox: the system ended a program %d times: it counts as failed. Out of memory?", _ATTEMPTS)
    return execution


def check_sandbox(name: str) -> None:
    """Refuse a sandbox that cannot be had, before anything is run in it."""
    if name == "bubblewrap":
        _bubblewrap()
    elif urlparse(str(name)).scheme not in ("http", "https"):
        raise SandboxError(
            f"sandbox: expected 'bubblewrap' or the address of a Piston server (http://HOST:PORT), found {name!r}"
        )


def _bubblewrap() -> str:
    path = shutil.which("bwrap")
    if path is None:
        raise SandboxError(
            "sandbox: expected bubblewrap (the command `bwrap`) to run generated programs in, found none. Install it "
            "(`apt-get install bubblewrap`), or use a Piston server: `sandbox: http://HOST:PORT`"
        )
    return path


def _file(content: str | bytes = b"") -> int:
    """A file in memory, open at its beginning."""
    file = os.memfd_create("sandbox")
    content = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    while content:
        content = content[os.write(file, content) :]
    os.lseek(file, 0, os.SEEK_SET)
    return file


@cache
def _mounts(root: bool) -> tuple[str, ...]:
    """Options of bubblewrap: the interpreter and the libraries that it is linked with, and nothing else from here."""
    python, prefix = os.path.realpath(sys.executable), os.path.realpath(sys.base_prefix)
    command = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    command += ["--unshare-cgroup-try", "--die-with-parent", "--clearenv", "--cap-drop", "ALL"]
    if root:
        # No namespace of users: it would hold a single one, and programs shall have another than root.
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user"]
    # Folders on the way to what is bound are made for their owner alone, unless they are made before.
    for path in ("/usr/lib", f"{prefix}/lib", python, *_DEVICES):
        for parent in reversed(Path(path).parents[:-1]):
            command += ["--perms", "0755", "--dir", str(parent)]
    for path in dict.fromkeys((*_FOLDERS, f"{prefix}/lib", f"{prefix}/lib64", python)):
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        elif os.path.exists(path):
            command += ["--ro-bind", path, path]
    for device in _DEVICES:
        command += ["--dev-bind", device, device]
    command += ["--ro-bind", str(_WORKER), "/worker.py", "--chdir", "/"]
    # Sets have the same order in every run.
    for name, value in (("PYTHONHASHSEED", "0"), ("PYTHONUTF8", "1"), ("OMP_NUM_THREADS", "1")):
        command += ["--setenv", name, value]
    return tuple(command)
