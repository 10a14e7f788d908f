"""
Make the data of the Space from a finished run of the lab.

    trl-interfere lab --output_dir lab-out
    python space/pack_lab.py lab-out
"""

import sys
from pathlib import Path

from trl_interfere.lab.packed import pack


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Usage: python space/pack_lab.py RUN")
    try:
        size = pack(Path(sys.argv[1]), Path(__file__).parent / "data" / "lab")
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {error}")
    print(f"{size:,} bytes")
