"""Whether an answer to one of the lab's prompts is right."""

from functools import cache

from .domains import REWARDS, TASKS, lab_rows


SPLITS = ("test", "selection")


@cache
def known_prompts() -> dict[str, tuple[str, dict]]:
    """
    Prompts that no stage was trained on.

    Returns:
        `dict[str, tuple[str, dict]]`: Domain and row of each prompt.
    """
    return {row["prompt"]: (name, row) for name in TASKS for split in SPLITS for row in lab_rows(name, split)}


def verdict(prompt: str, completion: str) -> tuple[str, float] | None:
    """
    What the verifier of a domain says.

    Args:
        prompt (`str`):
            A prompt.
        completion (`str`):
            An answer.

    Returns:
        `tuple[str, float]` or `None`: Domain and reward, 0 to 1; `None` for a prompt that is not of the lab.
    """
    found = known_prompts().get(prompt.strip())
    if found is None:
        return None
    name, row = found
    columns = {key: [value] for key, value in row.items() if key != "prompt"}
    return name, float(REWARDS[name](prompts=[row["prompt"]], completions=[completion], **columns)[0])
