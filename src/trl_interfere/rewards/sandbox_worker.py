"""
Runs inside the sandbox, as the first process of its namespaces: forks one child for each program.

It sees neither programs nor their input and output: the pipes of a program come with the request and go to its child.
Only the standard library is there; this file is bound into the sandbox by itself.
"""

import _io
import atexit
import builtins
import ctypes
import gc
import json
import os
import random
import resource
import select
import signal
import socket
import sys
import threading
import traceback
import weakref
from _sitebuiltins import Quitter
from importlib import import_module


# What programs use is imported once, before the fork.
for _name in (
    "array bisect cmath collections copy dataclasses datetime decimal enum fractions functools hashlib heapq io "
    "itertools math operator queue re statistics string struct textwrap time typing"
).split():
    import_module(_name)

_SET_NO_NEW_PRIVILEGES, _SET_SECCOMP, _SET_DUMPABLE, _FILTER = 38, 22, 4, 2
_LIBC = ctypes.CDLL(None, use_errno=True)
_STREAMS = {"stdin": 0, "stdout": 1, "stderr": 2}
_OPENED = weakref.WeakSet()
_PATHS = {
    path: number
    for name, number in _STREAMS.items()
    for path in (f"/dev/{name}", f"/dev/fd/{number}", f"/proc/self/fd/{number}")
}


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def _prctl(option: int, *arguments) -> None:
    arguments = [*arguments, *(ctypes.c_ulong(0) for _ in range(4 - len(arguments)))]
    if _LIBC.prctl(option, *arguments) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option}")


def _confine(limits: dict, instructions: bytes) -> None:
    for name, value in (
        ("AS", limits["memory"]),
        ("CPU", limits["cpu_seconds"]),
        ("NPROC", limits["threads"]),
        ("NOFILE", 32),
        ("FSIZE", 0),
        ("CORE", 0),
        ("MEMLOCK", 0),
        ("MSGQUEUE", 0),
        ("STACK", 64 * 2**20),
    ):
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    if limits["uid"] is not None:
        os.setgroups([])
        os.setresgid(*[limits["uid"]] * 3)
        os.setresuid(*[limits["uid"]] * 3)
    _prctl(_SET_DUMPABLE, ctypes.c_ulong(0))
    _prctl(_SET_NO_NEW_PRIVILEGES, ctypes.c_ulong(1))
    program = _Program(len(instructions) // 8, instructions)
    _prctl(_SET_SECCOMP, ctypes.c_ulong(_FILTER), ctypes.byref(program))


def _child(pipes: list[int], limits: dict, instructions: bytes) -> None:
    code = 70  # of a child that could not confine itself
    try:
        source, *streams = (os.dup(pipe) for pipe in pipes)
        for target, stream in enumerate(streams):
            os.dup2(stream, target)
        os.dup2(source, 3)
        os.closerange(4, 256)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        _confine(limits, instructions)
        for name, number in _STREAMS.items():
            mode, buffering = "r" if name == "stdin" else "w", 1 if name == "stderr" else -1
            stream = open(number, mode, buffering, encoding="utf-8", errors="replace", closefd=False)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        with open(3, encoding="utf-8", errors="replace") as stream:
            text = stream.read()
        del stream
        # What the module `site` would add, and the paths that lead to `/proc`, which is not there.
        builtins.exit, builtins.quit = Quitter("exit", "Ctrl-D"), Quitter("quit", "Ctrl-D")
        builtins.open = _io.open = sys.modules["io"].open = _open
        random.seed(0)
        sys.argv = ["program.py"]
        code = _run(text)
        code = _finish() or code
    except BaseException:
        code = code or 1
    finally:
        os._exit(code)


def _open(file, *arguments, _open=open, _dup=os.dup, **keywords):
    """Open a file. The standard streams have paths too."""
    path = file.__fspath__() if isinstance(file, os.PathLike) else file
    if isinstance(path, str) and path in _PATHS:
        file = _dup(_PATHS[path])
    opened = _open(file, *arguments, **keywords)
    _OPENED.add(opened)
    return opened


_open.__name__ = _open.__qualname__ = "open"


def _run(text: str) -> int:
    module = type(sys)("__main__")
    sys.modules["__main__"] = module
    try:
        exec(compile(text, "program.py", "exec"), module.__dict__)
    except SystemExit as error:
        if error.code is None:
            return 0
        if isinstance(error.code, int):
            return error.code & 255
        print(error.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc(limit=-4)
        return 1
    return 0


def _finish() -> int:
    """
    What the interpreter does at its end, whatever ended the program: wait for threads, call what asked for it, and
    write what files still hold. Returns a code if standard output could not be written.
    """
    for step in (threading._shutdown, atexit._run_exitfuncs):
        try:
            step()
        except BaseException:
            traceback.print_exc(limit=-4)
    code = 0
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name, None)
        try:
            if stream is not None and not getattr(stream, "closed", False):
                stream.flush()
        except BaseException:
            code = 120 if name == "stdout" else code
    files = [sys.__stdout__, sys.__stderr__, *_OPENED, *vars(sys.modules["__main__"]).values()]
    for kind in (_io.TextIOWrapper, _io.BufferedWriter, _io.BufferedRandom):
        for file in files:
            if type(file) is kind:
                try:
                    file.flush()
                except BaseException:  # a file that the program has spoilt says nothing about what it printed
                    continue
    return code


def _wait(channel: socket.socket, child: int, seconds: float) -> str | None:
    """Wait for the child, its deadline or the word to end it; `None` if it ended by itself."""
    descriptor = os.pidfd_open(child)
    try:
        ready, _, _ = select.select([descriptor, channel], [], [], seconds)
        if descriptor in ready:
            return None
        if not ready:
            return "timeout"
        if not channel.recv(1):
            sys.exit(0)
        return "stopped"
    finally:
        os.close(descriptor)


def main() -> None:
    channel = socket.socket(fileno=0)
    instructions = bytes.fromhex(sys.argv[1])
    gc.freeze()
    channel.sendall(b"ready\n")
    while True:
        request, pipes, _, _ = socket.recv_fds(channel, 4096, 8)
        if not request:
            sys.exit(0)
        request = request.lstrip(b"x")  # the word to end a program, which had ended by itself by then
        if not request:
            continue
        limits = json.loads(request)
        child = os.fork()
        if child == 0:
            _child(pipes, limits, instructions)
        for pipe in pipes:
            os.close(pipe)
        ended = _wait(channel, child, limits["seconds"])
        # Everything in the namespace but this process. The filter leaves a program nothing to start; if there were
        # something, it would end here.
        try:
            os.kill(-1, signal.SIGKILL)
        except ProcessLookupError:
            pass
        _, status, usage = os.wait4(child, 0)
        try:
            while True:
                os.waitpid(-1, 0)
        except ChildProcessError:
            pass
        report = {
            "ended": ended,
            "code": os.waitstatus_to_exitcode(status),
            "memory": usage.ru_maxrss * 1024,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
        }
        channel.sendall(json.dumps(report).encode() + b"\n")


if __name__ == "__main__":
    main()
