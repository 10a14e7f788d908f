"""Independent parts of a study, several at a time."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any


def run_all(work: Callable[..., None], calls: list[tuple[Any, ...]], jobs: int) -> None:
    """
    Call a function with each of several arguments.

    Args:
        work (`Callable`):
            The function, of a module that can be imported.
        calls (`list[tuple]`):
            Arguments of each call.
        jobs (`int`):
            Calls at a time. With 1 they are made here, one after the other, else in as many processes.

    Raises:
        `Exception`: That of the first call that failed, when those that run have ended; others are not begun.
    """
    if jobs == 1:
        for arguments in calls:
            work(*arguments)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        started = [pool.submit(work, *arguments) for arguments in calls]
        try:
            for call in as_completed(started):
                call.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
