"""One process per stage, for engines that cannot be entered twice in a process."""

import os
import signal
import subprocess
import sys
from itertools import count

from accelerate.utils.other import get_free_port
from torch.distributed import TCPStore


STAGES_LEFT = 75
"""Exit code of `trl-interfere train --max-stages` when stages are left (EX_TEMPFAIL of sysexits.h)."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def train_in_processes(arguments: list[str], resume: bool = False) -> int:
    """
    Run each stage of `trl-interfere train` in a process of its own, until none is left. SIGINT and SIGTERM end the
    stage. Under `accelerate launch` each process calls this, and its children form the process groups.
    """
    command = [sys.executable, "-m", __package__.partition(".")[0], *arguments, "--max-stages", "1"]
    received: list[int] = []
    child: subprocess.Popen | None = None

    def end_child(signum, frame):
        received.append(signum)
        if child is not None:
            child.terminate()  # also on SIGINT: on a terminal the child has had that one already

    handlers = {signum: signal.signal(signum, end_child) for signum in _SIGNALS}
    try:
        for number in count():
            child = subprocess.Popen(
                command + (["--resume"] if resume or number else []), env={**os.environ, **_rendezvous(number)}
            )
            if received:  # while the child was being started
                child.terminate()
            code = child.wait()
            if received:
                return 128 + received[0]
            if code != STAGES_LEFT:
                return code if code >= 0 else 128 - code
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def _rendezvous(number: int) -> dict[str, str]:
    """Environment in which the processes of one stage find each other and nothing of the stage before."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # The launcher's store would hand out the addresses of the stage before: it only agrees on another port.
        agreed = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        key = f"trl_interfere/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{number}"
        if os.environ["RANK"] == "0":
            agreed.set(key, str(get_free_port()))
        return {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": agreed.get(key).decode()}
    if "MASTER_PORT" in os.environ:
        # Rank 0 of the stage before may still be listening when another rank is already at the next stage.
        return {"MASTER_PORT": str(int(os.environ["MASTER_PORT"]) + number)}
    return {}
