"""Non-overlapping splits of a prompt space, decided by the prompt alone."""

import hashlib


# Shares of the prompt space. The base model sees `pretrain` only, GRPO sees `train` only.
SPLITS = {"pretrain": 0.4, "train": 0.3, "selection": 0.1, "test": 0.2}


def split_of(prompt: str) -> str:
    """
    Split to which a prompt belongs: a hash of its text, so that no two splits can share a prompt.

    Args:
        prompt (`str`):
            Prompt text.

    Returns:
        `str`: One of `"pretrain"`, `"train"`, `"selection"`, `"test"`.
    """
    point = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") / 2**64
    for name, share in SPLITS.items():
        if point < share:
            return name
        point -= share
    return name
