"""The Space: the page of trl_interfere.app with the run of the lab that lies beside this file."""

import os
from pathlib import Path


# Before torch is loaded: the lab's model gains nothing by more threads, and loses much where cores are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from trl_interfere.app.page import build_page, launch  # noqa: E402


demo = build_page(lab=Path(__file__).parent / "data" / "lab")

if __name__ == "__main__":
    launch(demo)
