# ruff: noqa: E501
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from trl_interfere.rewards.sandbox import Limits, Sandbox, SandboxError, _Worker
from trl_interfere.rewards.seccomp import seccomp_filter


SOURCES = Path(__file__).parents[2] / "src" / "trl_interfere" / "rewards"
SHORT = Limits(seconds=1.0)
# What every attempt begins with: a system call by its number, which no wrapper of Python stands before.
CALL = """
import ctypes, errno, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    ctypes.set_errno(0)
    result = libc.syscall(number, *arguments)
    return result if result >= 0 else -ctypes.get_errno()
def refused(result):
    print("refused" if result == -errno.EPERM else f"SUCCEEDED {result}")
"""

# Attempts to get out. Each prints "refused" if it was held, and ends with an error or prints anything else if not.
ESCAPES = {
    "write a file": "try: open('/escape', 'w')\nexcept OSError: print('refused')",
    "write a file in /tmp": "try: open('/tmp/escape', 'w')\nexcept OSError: print('refused')",
    "write a device": (
        "import os\nfor path in ('/dev/shm/x', '/dev/x'):\n"
        "    try: open(path, 'w')\n    except OSError: continue\n    else: print('SUCCEEDED')\nprint('refused')"
    ),
    "write to the interpreter": (
        "import os\ntry: open(os.__file__, 'a')\nexcept OSError: print('refused')\nelse: print('SUCCEEDED')"
    ),
    "read the user's files": (
        "import os\nfound = [path for path in ('/etc/passwd', '/etc/shadow', '/home', '/tmp', '/var', '/proc/1/environ',"
        " '/proc/self/mem', '/sys', '/root/.ssh', '/root/.bashrc', {here!r}) if os.access(path, os.R_OK)]\n"
        "print('refused' if not found else found)"
    ),
    "read the environment": "import os\nprint('refused' if not os.environ.get('SECRET_OF_THE_USER') else 'SUCCEEDED')",
    "connect to the network": (
        "import socket\ntry: socket.create_connection(('127.0.0.1', {port}), 1)\nexcept OSError: print('refused')"
    ),
    "raw socket": CALL + "refused(call(41 if sys.maxsize and os.uname().machine == 'x86_64' else 198, 2, 3, 0))",
    "fork": "import os\ntry: os.fork()\nexcept OSError: print('refused')\nelse: print('SUCCEEDED')",
    "clone without the library": CALL + "refused(call(56 if os.uname().machine == 'x86_64' else 220, 17, 0, 0, 0, 0))",
    "vfork": CALL + "refused(call(58) if os.uname().machine == 'x86_64' else -1)",
    "clone3": (
        CALL + "buffer = ctypes.create_string_buffer(88)\n"
        "print('refused' if call(435, buffer, 88) == -errno.ENOSYS else 'SUCCEEDED')"
    ),
    "multiprocessing": (
        "import multiprocessing\ntry: multiprocessing.Process(target=print).start()\nexcept OSError: print('refused')"
    ),
    "start a shell": "import os\nprint('refused' if os.system('true') != 0 else 'SUCCEEDED')",
    "replace the program": (
        "import os, sys\ntry: os.execv(sys.executable, [sys.executable, '-c', 'print(1)'])\n"
        "except OSError: print('refused')"
    ),
    "end the worker": (
        "import os, signal\ntry: os.kill(os.getppid(), signal.SIGKILL)\nexcept OSError: print('refused')"
    ),
    "end everything": "import os, signal\ntry: os.kill(-1, signal.SIGKILL)\nexcept OSError: print('refused')",
    "signal the worker's thread": (
        CALL + "refused(call(234 if os.uname().machine == 'x86_64' else 131, os.getppid(), os.getppid(), 9))"
    ),
    "trace the worker": CALL + "refused(call(101 if os.uname().machine == 'x86_64' else 117, 16, os.getppid(), 0, 0))",
    "read the worker's memory": (
        CALL + "refused(call(310 if os.uname().machine == 'x86_64' else 270, os.getppid(), 0, 0, 0, 0, 0))"
    ),
    "open the worker's descriptors": CALL + "refused(call(434, os.getppid(), 0))",
    "starve the worker": (
        CALL + "import resource\nlimit = (ctypes.c_ulong * 2)(1, 1)\n"
        "refused(call(302 if os.uname().machine == 'x86_64' else 261, os.getppid(), 9, limit, 0))"
    ),
    "become root": (
        "import os\nif os.getuid() == 0: print('SUCCEEDED')\n"
        "try: os.setuid(0)\nexcept OSError: print('refused')\nelse: print('SUCCEEDED')"
    ),
    "a namespace of users": CALL + "refused(call(272 if os.uname().machine == 'x86_64' else 97, 0x10000000))",
    "mount": CALL + "refused(call(165 if os.uname().machine == 'x86_64' else 40, b'x', b'/usr', b'tmpfs', 0, 0))",
    "change the root": CALL + "refused(call(161 if os.uname().machine == 'x86_64' else 51, b'/usr'))",
    "shared memory that stays": (
        CALL + "refused(call(29 if os.uname().machine == 'x86_64' else 194, 0x5EC, 2**20, 0o1666))"
    ),
    "messages that stay": CALL + "refused(call(68 if os.uname().machine == 'x86_64' else 186, 0x5EC, 0o1666))",
    "keys that stay": (
        CALL + "refused(call(248 if os.uname().machine == 'x86_64' else 217, b'user', b'x', b'y', 1, -3))"
    ),
    "memory as a file": CALL + "refused(call(319 if os.uname().machine == 'x86_64' else 279, b'x', 0))",
    "io_uring": CALL + "refused(call(425, 8, ctypes.create_string_buffer(256)))",
    "load a program into the kernel": (
        CALL
        + "refused(call(321 if os.uname().machine == 'x86_64' else 280, 0, ctypes.create_string_buffer(128), 128))"
    ),
    "raise the limits": (
        "import resource\ntry: resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)\n"
        "except (OSError, ValueError): print('refused')\nelse: print('SUCCEEDED')"
    ),
    "the worker's channel": (
        "import os\nopen_ = []\nfor fd in range(4, 64):\n    try: os.fstat(fd)\n    except OSError: continue\n"
        "    open_.append(fd)\nprint('refused' if not open_ else open_)"
    ),
    "forge the worker's report": (
        "import os\nfor fd in range(0, 64):\n"
        "    if fd in (1, 2): continue\n"
        '    try: os.write(fd, b\'{{"ended": null, "code": 0, "memory": 0, "cpu_seconds": 0}}\\n\')\n'
        "    except OSError: continue\n    print('SUCCEEDED', fd)\nprint('refused')"
    ),
}

# Attempts to use up the machine, and how they end.
EXHAUSTIONS = {
    "loop": ("while True: pass", {"timeout"}),
    "sleep": ("import time; time.sleep(60)", {"timeout"}),
    "wait for input": ("import threading; threading.Event().wait()", {"timeout"}),
    "ignore signals": (
        "import signal, time\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\ntime.sleep(60)",
        {"timeout"},
    ),
    "memory at once": ("x = bytearray(4 * 2**30)", {"error"}),
    "memory by and by": ("x = []\nwhile True: x.append(bytearray(2**20))", {"error"}),
    "memory of objects": ("x = 1\nwhile True: x = [x, x * 1, [0] * 10**6]", {"error", "timeout"}),
    "a huge power": ("print(9 ** 9 ** 9)", {"timeout", "error"}),
    "output": ("while True: print('x' * 1000)", {"output"}),
    "errors": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", {"output"}),
    "output without the library": ("import os\nwhile True: os.write(1, b'x' * 65536)", {"output"}),
    "processes": (
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        {"timeout"},
    ),
    "threads": (
        "import threading, time\nwhile True:\n    try: threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "    except RuntimeError: break\nprint(threading.active_count())",
        {"timeout", "ok"},
    ),
    "descriptors": ("import os\nwhile True: os.dup(0)", {"error"}),
    "recursion": ("def f(): return f()\nf()", {"error"}),
    "recursion without a limit": (
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1) + sorted([n], key=lambda x: f(x))[0]\nf(0)",
        {"error", "timeout"},
    ),
    "a program that does not compile": ("(" * 100_000, {"error"}),
    "a program of many parentheses": ("x = " + "-" * 50_000 + "1", {"error", "ok"}),
    "a crash": ("import ctypes\nctypes.string_at(0)", {"error"}),
}


def processes(sandbox) -> list[psutil.Process]:
    """All processes of a sandbox: those of bubblewrap, and what runs in them."""
    found = []
    for worker in sandbox._open:
        process = psutil.Process(worker.process.pid)
        found += [process, *process.children(recursive=True)]
    return found


@pytest.fixture
def left_nothing(sandbox):
    """After a test there is what there was before it: a bubblewrap and an interpreter for each of two workers."""
    sandbox.map(lambda _: sandbox.run("import time; time.sleep(0.05)"), range(4))  # every worker is there
    before = sorted(process.pid for process in processes(sandbox))
    yield
    deadline = time.monotonic() + 10
    while (after := sorted(process.pid for process in processes(sandbox))) != before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert after == before
    assert len(sandbox._open) == 2 and len(after) <= 3 * len(sandbox._open)


@pytest.mark.parametrize("attempt", ESCAPES)
def test_escapes(attempt, sandbox, left_nothing, monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET_OF_THE_USER", "1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = (
            ESCAPES[attempt].replace("{port}", str(server.getsockname()[1])).replace("{here!r}", repr(str(tmp_path)))
        )
        execution = sandbox.run(program.replace("{{", "{").replace("}}", "}"))
        server.settimeout(0.01)
        with pytest.raises(TimeoutError):
            server.accept()
    assert execution.stdout == "refused\n", execution
    assert sandbox.run("print(2)").stdout == "2\n"


@pytest.mark.parametrize("attempt", EXHAUSTIONS)
def test_exhaustion(attempt, sandbox, left_nothing):
    program, expected = EXHAUSTIONS[attempt]
    execution = sandbox.run(program, limits=SHORT)
    # On a machine with much else to do, the time may be over before the memory or the output is.
    assert execution.status in expected | {"timeout"}, execution
    assert len(execution.stdout) <= SHORT.output and len(execution.stderr) <= SHORT.output
    assert execution.memory <= SHORT.memory
    assert sandbox.run("print(2)").stdout == "2\n"


def test_the_attempts_are_attempts():
    """Outside the sandbox some of the same programs do get somewhere: they would notice if they were not held."""
    for attempt in ("write a file in /tmp", "fork", "start a shell", "read the user's files", "multiprocessing"):
        program = ESCAPES[attempt].replace("{here!r}", "'/'")
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
        assert run.stdout != "refused\n", attempt
    Path("/tmp/escape").unlink(missing_ok=True)


def test_memory_is_limited(sandbox):
    execution = sandbox.run("x = bytearray(200 * 2**20)\nprint('fine')", limits=Limits(seconds=30))
    assert execution.stdout == "fine\n" and execution.memory >= 200 * 2**20
    execution = sandbox.run("x = bytearray(200 * 2**20)", limits=Limits(seconds=30, memory=150 * 2**20))
    assert execution.status == "error" and "MemoryError" in execution.stderr


def test_output_is_limited(sandbox):
    limits = Limits(seconds=30, output=1000)
    assert sandbox.run("print('x' * 999)", limits=limits).status == "ok"
    execution = sandbox.run("print('x' * 1000)\nwhile True: print('x')", limits=limits)
    assert (execution.status, len(execution.stdout)) == ("output", 1000)


def test_threads_are_limited(sandbox):
    program = EXHAUSTIONS["threads"][0] + "\nimport os, sys\nsys.stdout.flush()\nos._exit(0)"
    execution = sandbox.run(program, limits=Limits(seconds=10, threads=20))
    assert int(execution.stdout.split()[0]) <= 20


def test_what_programs_may_do(sandbox):
    program = (
        "import asyncio, atexit, encodings.idna, sqlite3, threading, unicodedata\n"
        "async def double(x):\n    await asyncio.sleep(0)\n    return 2 * x\n"
        "print(asyncio.run(double(int(input()))))\n"
        "threading.Thread(target=print, args=('thread',)).start()\n"
        "atexit.register(print, 'end')\n"
    )
    execution = sandbox.run(program, "21\n")
    assert (execution.status, execution.stdout) == ("ok", "42\nthread\nend\n"), execution


# What a program prints that is given the line "in", by the ways that programs have to read, print and end.
WAYS = {
    "exit": ("print(1)\nexit()\nprint(2)", "1\n"),
    "quit": ("print(1)\nquit()\nprint(2)", "1\n"),
    "a thread that outlives the program": (
        "import sys, threading, time\ndef f():\n    time.sleep(0.1)\n    print('thread')\n"
        "threading.Thread(target=f).start()\nsys.exit()",
        "thread\n",
    ),
    "a call at the end": ("import atexit, sys\natexit.register(print, 'end')\nsys.exit(0)", "end\n"),
    "a text that is printed at the end": (
        "import atexit, io, sys\nout = sys.stdout = io.StringIO()\n"
        "atexit.register(lambda: sys.__stdout__.write(out.getvalue()))\nprint('x')",
        "x\n",
    ),
    "a file of the output": ("o = open(1, 'w')\no.write('x')", "x"),
    "a file in an object": ("class A:\n    o = open(1, 'w')\nA.o.write('x')", "x"),
    "a file by its descriptor": ("import os\no = os.fdopen(1, 'w')\no.write('x')", "x"),
    "another output": ("import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer)\nprint('x')", "x\n"),
    "a second output": ("import io, sys\no = io.TextIOWrapper(sys.stdout.buffer)\no.write('x')", "x"),
    "bytes": ("import io\no = io.BufferedWriter(io.FileIO(1, 'w'))\no.write(b'x')", "x"),
    "another input": ("import io, sys\nsys.stdin = io.TextIOWrapper(sys.stdin.buffer)\nprint(input())", "in\n"),
    "/dev/stdin": ("print(open('/dev/stdin').read(), end='')", "in\n"),
    "a path": ("import pathlib\nprint(pathlib.Path('/dev/stdin').read_text(), end='')", "in\n"),
    "/dev/stdout": ("with open('/dev/stdout', 'w') as f:\n    f.write('x')\nprint('y')", "xy\n"),
    "the descriptor": ("print(open(0).read(), end='')", "in\n"),
    "an output that is closed": ("import sys\nprint('x')\nsys.stdout.close()", "x\n"),
    "an import from the future": ("from __future__ import annotations\nprint('x')", "x\n"),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_read_and_print(way, sandbox):
    """As by the interpreter outside the sandbox."""
    program, expected = WAYS[way]
    execution = sandbox.run(program, "in\n")
    assert (execution.status, execution.stdout) == ("ok", expected), execution
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, input="in\n", capture_output=True, text=True, timeout=60).stdout == expected


@pytest.mark.parametrize(
    "program, status, code",
    [
        ("pass", "ok", 0),
        ("exit()", "ok", 0),
        ("exit(3)", "error", 3),
        ("quit('text')", "error", 1),
        ("import atexit; atexit.register(print, 'x'); 1 / 0", "error", 1),
        ("import sys; sys.stdout = None; sys.exit()", "ok", 0),
        ("import sys; sys.exit()", "ok", 0),
        ("import sys; sys.exit(3)", "error", 3),
        ("import sys; sys.exit('text')", "error", 1),
        ("1 / 0", "error", 1),
        ("import os; os._exit(7)", "error", 7),
        ("import os; os._exit(0)", "ok", 0),
        ("x =", "error", 1),
    ],
)
def test_exit_codes(program, status, code, sandbox):
    execution = sandbox.run(program)
    assert (execution.status, execution.code) == (status, code), execution


def test_errors_are_told(sandbox):
    assert "ZeroDivisionError" in sandbox.run("1 / 0").stderr


def test_large_input_and_output(sandbox):
    text = "é" * 400_000 + "\n"
    assert sandbox.run("print(input())", text).stdout == text
    unread = sandbox.run("print('done')", "x" * 5_000_000)
    assert (unread.status, unread.stdout) == ("ok", "done\n")


def test_runs_repeat(sandbox):
    program = "import random; print(random.random(), list({'a', 'b', 'c', 'd', 'e'}), hash('text'))"
    assert len({sandbox.run(program).stdout for _ in range(6)}) == 1


def test_programs_know_nothing_of_each_other(sandbox):
    """What one leaves in the interpreter, no other finds, and the memory of the worker holds none of its text."""
    mark = "".join(chr(code) for code in range(97, 117))
    for _ in range(4):
        sandbox.run(f"import builtins, sys\nbuiltins.{mark} = sys.{mark} = '{mark}'\nprint('{mark}')", mark)
    search = (
        "import builtins, gc, sys\n"
        "mark = ''.join(chr(code) for code in range(97, 117))\n"
        "print(hasattr(builtins, mark), hasattr(sys, mark))\n"
        "found = [x for x in gc.get_objects() if isinstance(x, dict) and mark in x and x is not globals()]\n"
        "print(len(found))"
    )
    for _ in range(4):
        assert sandbox.run(search).stdout == "False False\n0\n"


def test_many_at_once(sandbox):
    outputs = sandbox.map(lambda number: sandbox.run("print(int(input()) ** 2)", str(number)).stdout, range(100))
    assert outputs == [f"{number**2}\n" for number in range(100)]


def test_a_worker_that_is_lost_is_replaced(bubblewrap):
    with Sandbox(workers=1) as sandbox:
        (worker,) = sandbox._open
        worker.process.kill()
        worker.process.wait()
        assert sandbox.run("print(1)").stdout == "1\n"
        assert len(sandbox._open) == 1 and worker not in sandbox._open


def test_a_worker_that_is_lost_while_it_runs(bubblewrap):
    with Sandbox(workers=1) as sandbox:
        (worker,) = sandbox._open
        timer = threading.Timer(0.2, worker.process.kill)
        timer.start()
        # The second attempt, on a fresh worker, finds a program that takes too long.
        assert sandbox.run("import time; time.sleep(60)", limits=SHORT).status == "timeout"


def test_a_program_that_ends_every_worker_counts_as_failed(bubblewrap, monkeypatch, caplog):
    """No program can. If one could, it would not end a training."""
    run, ended = _Worker.run, []

    def end(worker, program, *arguments):
        if "end" in program:
            ended.append(worker)
            worker.process.kill()
        return run(worker, program, *arguments)

    with Sandbox(workers=1) as sandbox:
        monkeypatch.setattr(_Worker, "run", end)
        assert sandbox.run("print('end')").status == "lost"
        assert len(set(ended)) == 3 and "it ended 3 times with one program (" in caplog.text
        assert sandbox.run("print(1)").stdout == "1\n"


def test_a_sandbox_that_ends_with_any_program_is_an_error(bubblewrap, monkeypatch):
    def end(worker, *arguments):
        raise OSError("the worker ended")

    monkeypatch.setattr("trl_interfere.rewards.sandbox._PAUSES", (0, 0, 0))
    with Sandbox(workers=1) as sandbox:
        monkeypatch.setattr(_Worker, "run", end)
        with pytest.raises(SandboxError, match=r"it ends with any program \(the worker ended\)"):
            sandbox.run("print(1)")
        monkeypatch.undo()
        assert sandbox.run("print(1)").stdout == "1\n"


def test_a_program_that_the_system_ends_is_run_again(bubblewrap):
    """As where the machine is out of memory, which says nothing of the program."""

    def end():
        time.sleep(0.5)
        (bubble,) = sandbox._open
        programs = [child for child in psutil.Process(bubble.process.pid).children(True) if not child.children()]
        programs[-1].kill()

    with Sandbox(workers=1) as sandbox:
        threading.Thread(target=end).start()
        execution = sandbox.run("import time\ntime.sleep(1.5)\nprint(1)")
    assert (execution.status, execution.stdout) == ("ok", "1\n")


def test_processor_time_is_limited(sandbox):
    """Threads that compute outside the interpreter use more of it than there is wall clock."""
    program = (
        "import hashlib, threading\n"
        "def f(): hashlib.pbkdf2_hmac('sha256', b'x', b'y', 10**9)\n"
        "for _ in range(8): threading.Thread(target=f).start()"
    )
    assert sandbox.run(program, limits=Limits(seconds=3)).status == "timeout"


def test_closing_leaves_no_process(bubblewrap):
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    sandbox = Sandbox(workers=2)
    sandbox.map(lambda _: sandbox.run("pass"), range(8))
    ended = []
    running = threading.Thread(
        target=lambda: ended.append(sandbox.run("while True: pass", limits=Limits(seconds=600)).status)
    )
    running.start()
    time.sleep(0.2)
    assert {process.pid for process in psutil.Process().children(recursive=True)} - before
    sandbox.close()
    running.join(60)
    assert ended == ["lost"]
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before


KILLED = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from trl_interfere.rewards.sandbox import Sandbox, Limits
sandbox = Sandbox(workers=1)
print(" ".join(str(worker.process.pid) for worker in sandbox._open), flush=True)
sandbox.run("while True: pass", limits=Limits(seconds=60))
"""


def test_a_killed_run_leaves_no_process(bubblewrap):
    command = [sys.executable, "-c", KILLED, str(SOURCES.parents[1])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        worker = psutil.Process(int(run.stdout.readline()))
        time.sleep(0.3)
        family = [worker, *worker.children(recursive=True)]
        assert len(family) >= 3  # bubblewrap, worker, program
        run.kill()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_as_another_user(bubblewrap, tmp_path):
    """The sandbox of a user without rights, by the interpreter of the system: the same attempts, held as well."""
    python = shutil.which("python3", path="/usr/bin")
    if python is None or subprocess.run([python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]).returncode:
        pytest.skip("there is no /usr/bin/python3 of 3.11 or newer")
    folder = Path("/tmp") / f"sandbox-as-another-user-{os.getpid()}"
    package = folder / "trl_interfere" / "rewards"
    package.mkdir(parents=True)
    try:
        (folder / "trl_interfere" / "__init__.py").touch()
        for name in ("__init__.py", "sandbox.py", "sandbox_worker.py", "seccomp.py"):
            shutil.copy(SOURCES / name, package / name)
        names = [name for name in ESCAPES if "{port}" not in ESCAPES[name]]
        programs = [ESCAPES[name].replace("{here!r}", "'/x'").replace("{{", "{").replace("}}", "}") for name in names]
        script = (
            "import sys\nsys.path.insert(0, sys.argv[1])\n"
            "from trl_interfere.rewards.sandbox import Sandbox, Limits\n"
            "with Sandbox(workers=1) as sandbox:\n"
            f"    for name, program in zip({names!r}, {programs!r}):\n"
            "        print(name, '|', sandbox.run(program).stdout.strip())\n"
            f"    for program, _ in {list(EXHAUSTIONS.values())!r}:\n"
            "        status = sandbox.run(program, limits=Limits(seconds=0.5)).status\n"
            "        print(status in _ | {'timeout'}, status, repr(program[:80]), '|', 'refused')\n"
        )
        (folder / "script.py").write_text(script)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)
        command = ["setpriv", "--reuid=65533", "--regid=65533", "--clear-groups", "--", python]
        run = subprocess.run(
            [*command, str(folder / "script.py"), str(folder)], capture_output=True, text=True, timeout=120, cwd="/"
        )
    finally:
        shutil.rmtree(folder)
    if "cannot make a sandbox here" in run.stderr:
        pytest.skip(f"users may not make namespaces here: {run.stderr[-200:]}")
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == len(names) + len(EXHAUSTIONS)
    assert [line for line in lines if not line.endswith("| refused") or line.startswith("False")] == []


def test_without_bubblewrap(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxError, match=r"expected bubblewrap .*apt-get install bubblewrap.*http://.*unsafe"):
        Sandbox()


def test_bubblewrap_that_may_not(monkeypatch, tmp_path):
    script = tmp_path / "bwrap"
    script.write_text("#!/bin/sh\necho 'Creating new namespace failed: Operation not permitted' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(SandboxError, match="cannot make a sandbox here .*Creating new namespace failed"):
        Sandbox()


@pytest.mark.parametrize("name", ["seconds", "memory", "output", "threads"])
def test_limits_that_cannot_be(name):
    with pytest.raises(ValueError, match=f"sandbox, {name}: expected a number above 0, found 0"):
        Limits(**{name: 0})


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_filter_is_well_formed(machine):
    """Every jump of the filter stays inside it, and every path ends in a return."""
    instructions = list(struct.iter_unpack("=HBBI", seccomp_filter(machine)))
    assert len(instructions) < 4096
    for position, (code, true, false, _) in enumerate(instructions):
        if code & 7 == 5:
            assert position + 1 + max(true, false) < len(instructions)
    assert instructions[-1][0] & 7 == 6
    with pytest.raises(ValueError, match="expected a machine of type .*found 'riscv64'"):
        seccomp_filter("riscv64")


def test_a_late_word_to_end_harms_no_program(bubblewrap):
    with Sandbox(workers=1) as sandbox:
        (worker,) = sandbox._open
        worker.channel.sendall(b"x")
        assert [sandbox.run(f"print({number})").stdout for number in range(3)] == ["0\n", "1\n", "2\n"]
        assert sandbox._open == {worker}


def test_a_worker_that_hangs_while_a_program_floods_is_ended(bubblewrap, monkeypatch):
    """The time limit holds even if the worker does not enforce it."""
    monkeypatch.setattr("trl_interfere.rewards.sandbox._GRACE", 0.5)
    with Sandbox(workers=1) as sandbox:
        (worker,) = sandbox._open
        for process in psutil.Process(worker.process.pid).children(recursive=True):
            process.suspend()
        # Suspended, it never answers; the program then runs on a fresh worker.
        assert sandbox.run("print(1)", limits=Limits(seconds=0.5)).stdout == "1\n"
        assert worker not in sandbox._open
