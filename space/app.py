"""The Space: the page of trl_interfere.app with the run of the lab that lies beside this file."""

import os
from pathlib import Path

from trl_interfere.app.page import build_page, launch


# Before torch is loaded: the lab's model gains nothing by more threads, and loses much where cores are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")
DATA = Path(__file__).parent / "data" / "lab"
# Visitors of a public page may ask only the servers that its owner names, separated by spaces.
demo = build_page(lab=DATA, endpoints=os.environ.get("ENDPOINTS", "").split())

if __name__ == "__main__":
    launch(demo)
