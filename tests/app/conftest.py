"""The page in headless Chromium."""

import json
import os
import re
import shutil
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
SCREENSHOTS = Path(__file__).parent / "screenshots"  # git-ignored; to be looked at
SPACE = Path(__file__).parents[2] / "space"
DATA = SPACE / "data" / "lab"
WAIT = 60_000  # milliseconds; a limit, not a measurement
