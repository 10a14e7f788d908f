# ruff: noqa: E501
import os
import platform
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest

from trl_interfere.rewards.sandbox import Limits, Sandbox, SandboxError
from trl_interfere.rewards.seccomp import seccomp_filter


SOURCES = Path(__file__).parents[2] / "src" / "trl_interfere" / "rewards"
SHORT = Limits(seconds=0.5)
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


def attempt(call, imports="os", errors="OSError"):
    return f"import {imports}\ntry: {call}\nexcept {errors}: print('refused')\nelse: print('SUCCEEDED')"


# Attempts to get out. Each prints "refused" if it was held, and ends with an error or prints anything else if not.
ESCAPES = {
    "write a file": attempt("open('/escape', 'w')"),
    "write a file in /tmp": attempt("open('/tmp/escape', 'w')"),
    "write to shared memory": attempt("open('/dev/shm/x', 'w')"),
    "write a device": attempt("open('/dev/x', 'w')"),
    "write to the interpreter": attempt("open(os.__file__, 'a')"),
    "read the user's files": (
        "import os\nfound = [path for path in ('/etc/passwd', '/etc/shadow', '/home', '/tmp', '/var', '/proc/1/environ',"
        " '/proc/self/mem', '/sys', '/root/.bashrc', 'HERE') if os.access(path, os.R_OK)]\n"
        "print('refused' if not found else found)"
    ),
    "read the environment": "import os\nprint('refused' if not os.environ.get('SECRET_OF_THE_USER') else 'SUCCEEDED')",
    "connect to the network": attempt("socket.create_connection(('127.0.0.1', int('PORT')), 1)", "socket"),
    "fork": attempt("os.fork()"),
    "clone3": (
        CALL + "buffer = ctypes.create_string_buffer(88)\n"
        "print('refused' if call(435, buffer, 88) == -errno.ENOSYS else 'SUCCEEDED')"
    ),
    "multiprocessing": attempt("multiprocessing.Process(target=print).start()", "multiprocessing"),
    "start a shell": "import os\nprint('refused' if os.system('true') != 0 else 'SUCCEEDED')",
    "replace the program": (
        "import os, sys\nchild = 'import os\\ntry: os.fork()\\nexcept OSError: print(\\'refused\\')'\n"
        "os.execv(sys.executable, [sys.executable, '-c', child])"
    ),
    "end the worker": attempt("os.kill(os.getppid(), 9)"),
    "end everything": attempt("os.kill(-1, 9)"),
    "become root": "import os\nif os.getuid() == 0: print('SUCCEEDED')\n" + attempt("os.setuid(0)"),
    "raise the limits": attempt(
        "resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)", "resource", "(OSError, ValueError)"
    ),
    "descriptors that are open": (
        "import os\nopen_ = []\nfor fd in range(3, 64):\n    try: os.fstat(fd)\n    except OSError: continue\n"
        "    open_.append(fd)\nprint('refused' if not open_ else open_)"
    ),
}

# Attempts to use up the machine, and how they end.
EXHAUSTIONS = {
    "loop": ("while True: pass", {"timeout"}),
    "sleep": ("import time; time.sleep(60)", {"timeout"}),
    "ignore signals": (
        "import signal, time\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\ntime.sleep(60)",
        {"timeout"},
    ),
    "memory at once": ("x = bytearray(4 * 2**30)", {"error"}),
    "memory of objects": ("x = 1\nwhile True: x = [x, x * 1, [0] * 10**6]", {"error", "timeout"}),
    "a huge power": ("print(9 ** 9 ** 9)", {"timeout", "error"}),
    "output": ("while True: print('x' * 1000)", {"output"}),
    "errors": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", {"output"}),
    "output without the library": ("import os\nwhile True: os.write(1, b'x' * 65536)", {"output"}),
    "processes": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", {"timeout"}),
    "threads": (
        "import threading, time\nwhile True:\n    try: threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "    except RuntimeError: break\nprint(threading.active_count())",
        {"timeout", "ok"},
    ),
    "descriptors": ("import os\nwhile True: os.dup(0)", {"error"}),
    "recursion without a limit": (
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1) + sorted([n], key=lambda x: f(x))[0]\nf(0)",
        {"error", "timeout"},
    ),
    "a program that does not compile": ("(" * 100_000, {"error"}),
    "a crash": ("import ctypes\nctypes.string_at(0)", {"error"}),
}

# System calls that are not on the list, by their number on x86_64: files, processes, networks, namespaces, the kernel.
CALLS = {
    "mkdir": (83, b"/x", 0o777), "mknod": (133, b"/x", 0o20666, 0x103), "symlink": (88, b"/usr", b"/x"), "link": (86, b"/worker.py", b"/x"),
    "rename": (82, b"/program.py", b"/x"), "unlink": (87, b"/program.py"), "chmod": (90, b"/program.py", 0o4777), "chown": (92, b"/program.py", 0, 0),
    "truncate": (76, b"/program.py", 0), "openat2": (437, -100, b"/x", 0, 24), "fallocate": (285, 1, 0, 0, 1 << 40), "chdir": (80, b"/usr"),
    "execveat": (322, -100, b"/usr", 0, 0, 0), "setpgid": (109, 0, 0), "setsid": (112,), "prctl": (157, 15, b"x"), "seccomp": (317, 1, 0, 0),
    "ptrace traceme": (101, 0, 0, 0, 0), "process_vm_writev": (311, 1, 0, 0, 0, 0, 0), "pidfd_getfd": (438, 0, 0, 0), "pidfd_send_signal": (424, 0, 9, 0, 0),
    "tkill": (200, 1, 9), "rt_sigqueueinfo": (129, 1, 9, 0), "kcmp": (312, 1, 1, 0, 0, 0), "sched_setscheduler": (144, 0, 1, 0), "setpriority": (141, 0, 0, -20),
    "sched_setaffinity": (203, 0, 8, b"x" * 8), "ioprio_set": (251, 1, 0, 0), "a namespace by clone": (56, 0x10000011, 0, 0, 0, 0), "clone with shared memory": (56, 0x111, 0, 0, 0, 0),
    "setns": (308, 0, 0), "pivot_root": (155, b"/usr", b"/usr"), "umount": (166, b"/usr", 2), "open_tree": (428, -100, b"/", 0), "fsopen": (430, b"tmpfs", 0),
    "mount_setattr": (442, -100, b"/", 0, 0, 0), "netlink": (41, 16, 3, 0), "abstract socket": (41, 1, 1, 0), "socketpair of the network": (53, 2, 1, 0, b"x" * 8),
    "bind": (49, 0, b"x" * 16, 16), "connect": (42, 0, b"x" * 16, 16), "sendmsg": (46, 1, b"x" * 64, 0), "recvmsg": (47, 0, b"x" * 64, 0), "semget": (64, 7, 1, 0o1666),
    "shmat": (30, 0, 0, 0), "mq_open": (240, b"/x", 0o102, 0o666, 0), "keyctl": (250, 0, -3, 1), "memfd_secret": (447, 0), "userfaultfd": (323, 0), "perf_event_open": (298, 0, 0, -1, -1, 0),
    "io_setup": (206, 1, b"x" * 8), "io_uring_enter": (426, 0, 1, 0, 0, 0), "inotify_init": (294, 0), "fanotify_init": (300, 0, 0), "personality": (135, 0x0040000), "modify_ldt": (154, 1, 0, 0),
    "iopl": (172, 3), "init_module": (175, 0, 0, b""), "kexec_load": (246, 0, 0, 0, 0), "reboot": (169, 0, 0, 0, 0), "clock_settime": (227, 0, b"x" * 16), "sethostname": (170, b"x", 1),
    "syslog": (103, 3, b"x" * 99, 99), "swapoff": (168, b"/x"), "splice": (275, 0, 0, 1, 0, 1, 0), "name_to_handle_at": (303, -100, b"/usr", b"x" * 99, b"x" * 8, 0),
    "open_by_handle_at": (304, -100, b"x" * 99, 0), "the x32 table": (0x40000000 + 39,), "prlimit of another": (302, 1, 7, b"x" * 16, 0),
}  # fmt: skip


@pytest.fixture
def left_nothing(sandbox):
    """After a test there is no process of a sandbox."""
    before = {*psutil.Process().children(recursive=True)}
    yield
    deadline = time.monotonic() + 10
    while {*psutil.Process().children(recursive=True)} - before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert {*psutil.Process().children(recursive=True)} <= before


@pytest.mark.parametrize("name", ESCAPES)
def test_escapes(name, sandbox, left_nothing, monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET_OF_THE_USER", "1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = ESCAPES[name].replace("PORT", str(server.getsockname()[1])).replace("HERE", str(tmp_path))
        execution = sandbox.run(program)
        server.settimeout(0.01)
        with pytest.raises(TimeoutError):
            server.accept()
    assert execution.stdout == "refused\n", execution


@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of x86_64")
@pytest.mark.parametrize("attempt", CALLS)
def test_system_calls(attempt, sandbox):
    number, *arguments = CALLS[attempt]
    execution = sandbox.run(f"{CALL}refused(call({', '.join(map(repr, (number, *arguments)))}))")
    assert execution.stdout == "refused\n", execution


@pytest.mark.skipif(platform.machine() != "x86_64", reason="machine code of x86_64")
def test_the_table_of_32_bits_is_closed(sandbox):
    """`int 0x80` asks by other numbers: the kernel ends the program."""
    code = (
        "import ctypes, mmap\nm = mmap.mmap(-1, 4096, prot=7)\nm.write(bytes.fromhex('b814000000cd80c3'))\n"
        "ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()\nprint('SUCCEEDED')"
    )
    assert (sandbox.run(code).status, sandbox.run(code).stdout) == ("error", "")


WAITING = ("ignore signals", "a huge power", "processes", "threads", "recursion without a limit")


@pytest.mark.parametrize(
    "attempt", [pytest.param(name, marks=pytest.mark.slow) if name in WAITING else name for name in EXHAUSTIONS]
)
def test_exhaustion(attempt, sandbox, left_nothing):
    program, expected = EXHAUSTIONS[attempt]
    execution = sandbox.run(program, limits=SHORT)
    assert execution.status in expected | {"timeout"}, execution
    assert len(execution.stdout) <= SHORT.output + 1 and len(execution.stderr) <= SHORT.output + 1


def test_the_attempts_are_attempts():
    """Outside the sandbox some of the same programs do get somewhere: they would notice if they were not held."""
    for attempt in ("write a file in /tmp", "fork", "start a shell", "read the user's files", "multiprocessing"):
        command = [sys.executable, "-c", ESCAPES[attempt].replace("HERE", "/")]
        run = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert run.stdout != "refused\n", attempt
    Path("/tmp/escape").unlink(missing_ok=True)


def test_limits(sandbox):
    roomy = Limits(seconds=30, output=1000)
    assert sandbox.run("x = bytearray(200 * 2**20)\nprint('fine')", limits=roomy).stdout == "fine\n"
    execution = sandbox.run("x = bytearray(200 * 2**20)", limits=Limits(seconds=30, memory=150 * 2**20))
    assert execution.status == "error" and "MemoryError" in execution.stderr
    assert sandbox.run("print('x' * 998)", limits=roomy).status == "ok"
    execution = sandbox.run("import os\nos.write(1, b'x' * 5000)\nos.pwrite(1, b'y', 10**9)", limits=roomy)
    assert (execution.status, execution.stdout) == ("output", "x" * 1000)
    program = EXHAUSTIONS["threads"][0] + "\nimport os, sys\nsys.stdout.flush()\nos._exit(0)"
    assert int(sandbox.run(program, limits=Limits(threads=20)).stdout.split()[0]) <= 20
    for name in ("seconds", "memory", "output", "threads"):
        with pytest.raises(ValueError, match=name):
            Limits(**{name: 0})


def test_processor_time_is_limited(sandbox):
    """Threads that compute outside the interpreter use more of it than there is wall clock."""
    program = (
        "import hashlib, threading\ndef f(): hashlib.pbkdf2_hmac('sha256', b'x', b'y', 10**9)\n"
        "for _ in range(8): threading.Thread(target=f).start()"
    )
    assert sandbox.run(program, limits=Limits(seconds=1)).status == "timeout"


# What a program prints that is given the line "in", by the ways that programs have to read, print and end.
WAYS = {
    "exit": ("print(1)\nexit()\nprint(2)", "1\n"),
    "a thread that outlives the program": (
        "import sys, threading, time\ndef f():\n    time.sleep(0.1)\n    print('thread')\n"
        "threading.Thread(target=f).start()\nsys.exit()",
        "thread\n",
    ),
    "a call at the end": ("import atexit, sys\natexit.register(print, 'end')\nsys.exit(0)", "end\n"),
    "/dev/stdin": ("print(open('/dev/stdin').read(), end='')", "in\n"),
    "a loop of events": (
        "import asyncio, encodings.idna, sqlite3, unicodedata\nasync def f(): return input()\nprint(asyncio.run(f()))",
        "in\n",
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_read_and_print(way, sandbox):
    """As by the interpreter outside the sandbox."""
    program, expected = WAYS[way]
    execution = sandbox.run(program, "in\n")
    assert (execution.status, execution.stdout) == ("ok", expected), execution
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, input="in\n", capture_output=True, text=True, timeout=60).stdout == expected


def test_ends(sandbox):
    for program in ("pass", "import sys; sys.stdout = None; sys.exit()", "import os; os._exit(0)"):
        assert sandbox.run(program).status == "ok"
    for program in ("exit(3)", "quit('text')", "import os; os._exit(7)", "x =", "1 / 0"):
        assert sandbox.run(program).status == "error"


def test_large_input_and_output(sandbox):
    text = "é" * 400_000 + "\n"
    assert sandbox.run("print(input())", text).stdout == text
    unread = sandbox.run("print('done')", "x" * 5_000_000)
    assert (unread.status, unread.stdout) == ("ok", "done\n")


def test_many_at_once_and_one_again(sandbox):
    outputs = sandbox.map(lambda number: sandbox.run("print(int(input()) ** 2)", str(number)).stdout, range(30))
    assert outputs == [f"{number**2}\n" for number in range(30)]
    assert len(os.listdir("/proc/self/fd")) < 60  # descriptors are closed
    program = "import random; print(random.random(), list({'a', 'b', 'c', 'd', 'e'}), hash('text'))"
    assert len({sandbox.run(program).stdout for _ in range(6)}) == 1


def ends():
    """End the program in a sandbox as the kernel does for want of memory."""
    time.sleep(0.7)
    family = psutil.Process().children(recursive=True)
    [process for process in family if "/worker.py" in process.cmdline() and process.name() != "bwrap"][-1].kill()


def test_a_program_that_the_system_ends_is_run_again(sandbox, caplog):
    thread = threading.Thread(target=ends)
    thread.start()
    execution = sandbox.run("import time\ntime.sleep(1.5)\nprint(1)")
    thread.join()
    assert (execution.status, execution.stdout) == ("ok", "1\n")
    assert sandbox.run("import os, signal\nos._exit(137)").status == "killed"  # three times
    assert "ended a program 3 times" in caplog.text


KILLED = """
import sys
from trl_interfere.rewards.sandbox import Sandbox, Limits
sandbox = Sandbox(workers=1)
print("ready", flush=True)
sandbox.run("while True: pass", limits=Limits(seconds=60))
"""


def test_a_killed_run_leaves_no_process(bubblewrap):
    environment = {**os.environ, "PYTHONPATH": str(SOURCES.parents[1])}
    with subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True, env=environment) as run:
        assert run.stdout.readline() == "ready\n"
        time.sleep(0.5)
        family = psutil.Process(run.pid).children(recursive=True)
        assert len(family) >= 2  # bubblewrap and the program
        run.kill()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


AS_ANOTHER = """
import sys
sys.path.insert(0, sys.argv[1])
from trl_interfere.rewards.sandbox import Sandbox
sandbox = Sandbox(workers=1)
for program in sys.argv[2:]:
    print(sandbox.run(program).stdout, end="")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_as_another_user(bubblewrap):
    """The sandbox of a user without rights, by the interpreter of the system: the same attempts, held as well."""
    python = shutil.which("python3", path="/usr/bin")
    if python is None or subprocess.run([python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]).returncode:
        pytest.skip("there is no /usr/bin/python3 of 3.11 or newer")
    programs = [program.replace("HERE", "/x") for program in ESCAPES.values() if "PORT" not in program]
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        package = Path(folder, "trl_interfere", "rewards")
        package.mkdir(parents=True)
        for name in ("sandbox.py", "sandbox_worker.py", "seccomp.py"):
            shutil.copy(SOURCES / name, package / name)
        subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
        command = ["setpriv", "--reuid=65533", "--regid=65533", "--clear-groups", "--", python, "-c", AS_ANOTHER]
        run = subprocess.run([*command, folder, *programs], capture_output=True, text=True, timeout=120, cwd="/")
    if "cannot make a sandbox here" in run.stderr:
        pytest.skip(f"users may not make namespaces here: {run.stderr[-200:]}")
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["refused"] * len(programs)


def test_bubblewrap_that_may_not(monkeypatch, tmp_path):
    script = tmp_path / "bwrap"
    script.write_text("#!/bin/sh\necho 'Creating new namespace failed: Operation not permitted' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(SandboxError, match="Creating new namespace failed"):
        Sandbox()


def test_filter_is_well_formed():
    """Every jump stays inside it, and every path ends in a return; that of x86_64 is loaded by the tests above."""
    instructions = list(struct.iter_unpack("=HBBI", seccomp_filter("aarch64")))
    assert len(instructions) < 4096
    for position, (code, true, false, _) in enumerate(instructions):
        if code & 7 == 5:
            assert position + 1 + max(true, false) < len(instructions)
    assert instructions[-1][0] & 7 == 6
    with pytest.raises(ValueError, match="riscv64"):
        seccomp_filter("riscv64")
