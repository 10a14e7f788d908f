"""Runs inside the sandbox: takes on its limits, gives up its rights, and only then reads and runs the program."""

import builtins
import os
import resource
import sys
from _sitebuiltins import Quitter


def confine(seconds: int, memory: int, output: int, threads: int, uid: int) -> None:
    """Limits of this process, which it cannot raise again; a user without rights if it is root."""
    for name, value in (
        ("CPU", seconds),
        ("AS", memory),
        ("FSIZE", output),
        ("NPROC", threads),
        ("NOFILE", 64),
        ("CORE", 0),
        ("MEMLOCK", 0),
        ("MSGQUEUE", 0),
        ("STACK", 64 * 2**20),
    ):
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value + 1 if name == "CPU" and hard != value else value))
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)


def main() -> None:
    ready, *limits = map(int, sys.argv[1:])
    confine(*limits)
    os.write(ready, b"ready")
    os.close(ready)
    with open("/program.py", encoding="utf-8", errors="replace") as file:
        text = file.read()
    if "random" in text:  # the same numbers in every run
        import random

        random.seed(0)
    builtins.exit, builtins.quit = Quitter("exit", "Ctrl-D"), Quitter("quit", "Ctrl-D")
    sys.set_int_max_str_digits(0)
    sys.argv = ["program.py"]
    module = sys.modules["__main__"] = type(sys)("__main__")
    exec(compile(text, "program.py", "exec", dont_inherit=True), module.__dict__)


main()
