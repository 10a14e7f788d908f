"""The system calls that a program in the sandbox may make; all others are refused."""

import errno
import platform
import struct


# Name and number in the kernel's tables of x86_64 and aarch64 ("-": the call does not exist there).
_CALLS = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, lseek 8 62, close 3 57, fstat 5 80,
newfstatat 262 79, stat 4 -, lstat 6 -, statx 332 291, access 21 -, faccessat 269 48, faccessat2 439 439, open 2 -,
openat 257 56, readlink 89 -, readlinkat 267 78, getdents64 217 61, getcwd 79 17, fcntl 72 25, ioctl 16 29,
dup 32 23, dup2 33 -, dup3 292 24, pipe 22 -, pipe2 293 59, poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72,
epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -, epoll_pwait 281 22, eventfd2 290 19, sendto 44 206,
recvfrom 45 207, shutdown 48 210, getsockname 51 204, getsockopt 55 209, setsockopt 54 208, ftruncate 77 46,
fsync 74 82, fdatasync 75 83, umask 95 166, mmap 9 222, munmap 11 215, mprotect 10 226, mremap 25 216,
madvise 28 233, brk 12 214, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136,
rt_sigtimedwait 128 137, rt_sigsuspend 130 133, sigaltstack 131 132, restart_syscall 219 128, pause 34 -, alarm 37 -,
getitimer 36 102, setitimer 38 103, futex 202 98, get_robust_list 274 100, set_robust_list 273 99, rseq 334 293,
set_tid_address 218 96, arch_prctl 158 -, membarrier 324 283, sched_yield 24 124, sched_getaffinity 204 123,
getcpu 309 168, clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115, nanosleep 35 101,
gettimeofday 96 169, time 201 -, times 100 153, getrusage 98 165, getpid 39 172, getppid 110 173, gettid 186 178,
getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177, getgroups 115 158, getresuid 118 148,
getresgid 120 150, getpgrp 111 -, getpgid 121 155, getsid 124 156, setgroups 116 159, setresgid 119 149,
setresuid 117 147, getrlimit 97 163, setrlimit 160 164, uname 63 160, sysinfo 99 179, getrandom 318 278,
execve 59 221, wait4 61 260, waitid 247 95, exit 60 93, exit_group 231 94
"""
_CLONE, _CLONE3, _PRLIMIT, _SOCKETPAIR = (56, 220), (435, 435), (302, 261), (53, 199)
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the tables, AUDIT_ARCH_*
_CLONE_THREAD, _AF_UNIX = 0x10000, 1
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER, _ARCH, _ARGUMENT = 0, 4, 16  # offsets in `struct seccomp_data`


def seccomp_filter(machine: str | None = None) -> bytes:
    """The filter as instructions of classic BPF. Threads may be made, processes may not."""
    machine = machine or platform.machine()
    if machine not in _ARCHITECTURES:
        raise ValueError(f"sandbox: expected a machine of type {sorted(_ARCHITECTURES)}, found {machine!r}")
    column, architecture = _ARCHITECTURES[machine]
    allow, deny = (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERRNO | errno.EPERM)
    program = [(_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NUMBER)]

    def case(numbers: tuple[int, int], *body: tuple[int, int, int, int]) -> None:
        program.extend([(_EQUAL, 0, len(body), numbers[column]), *body])

    for entry in _CALLS.replace("\n", " ").split(","):
        number = entry.split()[1 + column]
        if number != "-":
            program.extend([(_EQUAL, 0, 1, int(number)), allow])
    # The C library falls back to `clone`, whose flags can be looked at.
    case(_CLONE3, (_RETURN, 0, 0, _ERRNO | errno.ENOSYS))
    argument = (_LOAD, 0, 0, _ARGUMENT)
    case(_CLONE, argument, (_ANY_BIT, 0, 1, _CLONE_THREAD), allow, deny)
    case(_PRLIMIT, argument, (_EQUAL, 0, 1, 0), allow, deny)  # limits of process 0: one's own
    case(_SOCKETPAIR, argument, (_EQUAL, 0, 1, _AF_UNIX), allow, deny)
    program.append(deny)
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
