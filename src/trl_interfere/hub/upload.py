"""Commits to the Hub that can be repeated: what is there is not sent again, and a failure says how to go on."""

import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile


# The error of the HTTP library below huggingface_hub, whichever it is: versions 1 and 2 have different ones.
_TransportError = next(base for base in HfHubHTTPError.__mro__ if base.__module__.startswith("httpx"))
_ATTEMPTS = 4
_LONGEST_WAIT = 60.0
_REASONS = {
    401: "the token is missing, invalid or has expired: run `hf auth login` or set HF_TOKEN",
    403: "the Hub refuses it",
    404: "the repository does not exist, or the token cannot see it",
    412: "somebody else has committed at the same time",
    429: "the Hub asks for fewer requests: wait a few minutes",
}

Result = TypeVar("Result")


class PushError(OSError):
    """A push that stopped. The message says what is done and how to go on."""


@dataclass
class PlannedRevision:
    """
    What a branch shall hold.

    Args:
        branch (`str`):
            Name of the branch.
        files (`dict[str, pathlib.Path | bytes]`):
            Files by their path in the repository: where they lie, or their content.
        managed (`list[str]`):
            Patterns of files that are removed from the branch if they are not among `files`.
    """

    branch: str
    files: dict[str, Path | bytes] = field(default_factory=dict)
    managed: list[str] = field(default_factory=list)

    def size(self, path: str) -> int:
        """
        Size of a file in bytes.

        Args:
            path (`str`):
                Its path in the repository.

        Returns:
            `int`: Bytes.
        """
        content = self.files[path]
        return len(content) if isinstance(content, bytes) else content.stat().st_size

    @property
    def total(self) -> int:
        """Size of all files in bytes."""
        return sum(map(self.size, self.files))


class Uploader:
    """
    Brings branches of one repository to a planned state, each in one commit.

    Args:
        repo_id (`str`):
            The repository.
        repo_type (`str`, *optional*, defaults to `"model"`):
            `"model"`, `"dataset"` or `"space"`.
        command (`str`, *optional*):
            Command that goes on after a failure, for the message.
        token (`str`, *optional*):
            Token. Defaults to the one of the environment or of `hf auth login`.
    """

    def __init__(self, repo_id: str, repo_type: str = "model", command: str | None = None, token: str | None = None):
        self.api = HfApi(token=token)
        self.repo_id, self.repo_type, self.command = repo_id, repo_type, command
        self.done: list[str] = []

    def step(self, label: str, function: Callable[[], Result]) -> Result:
        """
        Call a function of the Hub; busy servers are asked again.

        Args:
            label (`str`):
                What it does, for the message.
            function (`Callable`):
                Called without arguments, and again after a failure that may pass.

        Returns:
            What the function returns.

        Raises:
            [`PushError`]: If it fails for good.
        """
        for attempt in range(_ATTEMPTS):
            try:
                with _signatures_hidden():
                    return function()
            except (HfHubHTTPError, _TransportError, RuntimeError) as error:
                cause = _cause(error)
                if not isinstance(cause, _TransportError):
                    raise
                response = getattr(cause, "response", None)
                status = None if response is None else response.status_code
                wait = _wait(cause, attempt)
                last = attempt == _ATTEMPTS - 1 or wait > _LONGEST_WAIT
                passing = status is None or status in (429, 500, 502, 503, 504)
                # The client has tried an upload for long enough by itself.
                if last or not passing or isinstance(error, RuntimeError):
                    raise PushError(self._message(label, cause, status)) from error
                time.sleep(wait)
        raise AssertionError("unreachable")

    def create(self, private: bool | None = None, **kwargs) -> str:
        """
        Make the repository, unless it exists.

        Args:
            private (`bool`, *optional*):
                Whether to make it private. Defaults to what the account or organisation has set.
            **kwargs:
                Further arguments of [`~huggingface_hub.HfApi.create_repo`].

        Returns:
            `str`: Its address.

        Raises:
            `ValueError`: If a repository of another type has this name.
        """

        def create() -> str:
            if not self.api.repo_exists(self.repo_id, repo_type=self.repo_type):
                for other in ("model", "dataset", "space"):
                    if other != self.repo_type and self.api.repo_exists(self.repo_id, repo_type=other):
                        raise ValueError(
                            f"{self.repo_id}: expected a {self.repo_type} repository or an unused name, found a "
                            f"{other}; choose another name"
                        )
            url = self.api.create_repo(
                self.repo_id, repo_type=self.repo_type, private=private, exist_ok=True, **kwargs
            )
            self.repo_id = url.repo_id
            return str(url)

        return self.step("making the repository", create)

    def remote_files(self, branch: str) -> tuple[dict[str, RepoFile], str]:
        """
        Files of a branch.

        Args:
            branch (`str`):
                Name of the branch.

        Returns:
            `tuple[dict, str]`: The files by path, and the commit.
        """

        def read() -> tuple[dict[str, RepoFile], str]:
            head = self.api.repo_info(self.repo_id, repo_type=self.repo_type, revision=branch).sha
            entries = self.api.list_repo_tree(self.repo_id, repo_type=self.repo_type, revision=head, recursive=True)
            return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}, head

        return self.step(f"reading revision {branch}", read)

    def upload(self, revision: PlannedRevision, message: str) -> str:
        """
        Bring a branch to its planned state: one commit, or none if there is nothing to change.

        Args:
            revision ([`PlannedRevision`]):
                What the branch shall hold.
            message (`str`):
                Message of the commit.

        Returns:
            `str`: The commit that the branch is at.
        """
        if revision.branch != "main":
            self.step(f"making revision {revision.branch}", lambda: self._create_branch(revision.branch))

        def commit() -> str:
            remote, head = self.remote_files(revision.branch)
            operations = [
                CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
                for path, content in revision.files.items()
                if path not in remote or not _same(content, remote[path])
            ]
            operations += [
                CommitOperationDelete(path, is_folder=False)
                for path in remote
                if path not in revision.files and any(fnmatch(path, pattern) for pattern in revision.managed)
            ]
            if not operations:
                return head
            self._send_once(operations, revision.branch)
            return self.api.create_commit(
                self.repo_id,
                operations,
                commit_message=message,
                repo_type=self.repo_type,
                revision=revision.branch,
                parent_commit=head,
            ).oid

        commit_id = self.step(f"uploading revision {revision.branch}", commit)
        self.done.append(revision.branch)
        return commit_id

    def _send_once(self, operations: list, branch: str) -> None:
        # The client would send a file for each path that it is wanted at.
        contents = [operation for operation in operations if isinstance(operation, CommitOperationAdd)]
        sizes = [operation.upload_info.size for operation in contents]
        twins = [operation for operation, size in zip(contents, sizes, strict=True) if sizes.count(size) > 1]
        first = {operation.upload_info.sha256: operation for operation in twins}
        if len(first) < len(twins):
            self.api.preupload_lfs_files(
                self.repo_id, list(first.values()), repo_type=self.repo_type, revision=branch, free_memory=False
            )

    def _create_branch(self, branch: str) -> None:
        refs = self.api.list_repo_refs(self.repo_id, repo_type=self.repo_type)
        if branch in {ref.name for ref in refs.tags}:
            raise ValueError(f"{self.repo_id}: expected no tag {branch!r}, which a stage needs as a branch; remove it")
        if branch not in {ref.name for ref in refs.branches}:
            # From the first commit, which is empty: a stage shall not inherit the files of main.
            first = self.api.list_repo_commits(self.repo_id, repo_type=self.repo_type)[-1].commit_id
            self.api.create_branch(
                self.repo_id, branch=branch, revision=first, repo_type=self.repo_type, exist_ok=True
            )

    def _message(self, label: str, cause: Exception, status: int | None) -> str:
        reason = _REASONS.get(status, "the Hub has an internal error" if (status or 0) >= 500 else "no connection")
        detail = getattr(cause, "server_message", None) or ("" if status else str(cause) or type(cause).__name__)
        done = ", ".join(self.done) or "none"
        untouched = "" if "main" in self.done else "; main is as it was"
        text = f"{self.repo_id}: {label} failed, {reason}" + (f" ({hide_signatures(detail)})" if detail else "")
        text += f". Finished revisions: {done}{untouched}. Nothing that was uploaded is lost"
        return text + (f"; to continue, run again:\n  {self.command}" if self.command else "; push again to continue")


def hide_signatures(text: str) -> str:
    """
    Cut queries off addresses: those of the storage hold signatures, with which anybody could write.

    Args:
        text (`str`):
            A text.

    Returns:
        `str`: The text without them.
    """
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1?...", text)


class _HideSignatures(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = hide_signatures(record.getMessage()), ()
        return True


@contextmanager
def _signatures_hidden() -> Iterator[None]:
    # The client logs the address of a request that it tries again, the HTTP library that of every one.
    hide = _HideSignatures()
    names = [
        name for name in logging.root.manager.loggerDict if name.startswith(("huggingface_hub", "httpx", "httpcore"))
    ]
    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        logger.addFilter(hide)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(hide)


def _cause(error: BaseException) -> BaseException:
    # An upload in a thread fails with a RuntimeError that has the reason as its cause.
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _wait(cause: BaseException, attempt: int) -> float:
    response = getattr(cause, "response", None)
    try:
        return float(response.headers["Retry-After"])
    except (AttributeError, KeyError, ValueError):  # none, or a date
        return 2.0**attempt


def _same(content: Path | bytes, remote: RepoFile) -> bool:
    data = content if isinstance(content, bytes) else None
    size = content.stat().st_size if data is None else len(data)
    if remote.lfs is not None:
        if size != remote.lfs.size:
            return False
        if data is not None:
            return hashlib.sha256(data).hexdigest() == remote.lfs.sha256
        with open(content, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == remote.lfs.sha256
    if size != remote.size:
        return False
    data = content.read_bytes() if data is None else data
    return hashlib.sha1(b"blob %d\0" % size + data).hexdigest() == remote.blob_id
