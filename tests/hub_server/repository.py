"""Repositories of the local Hub, and the rules that it checks their cards by."""

import hashlib
import json
import re
from dataclasses import dataclass, field

import yaml


DATE = "2026-01-01T00:00:00.000Z"  # of everything
_LICENSES = set("apache-2.0 mit cc-by-4.0 cc0-1.0 bsd-3-clause gpl-3.0 llama3 gemma other unknown".split())


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **content):
        self.status, self.message, self.code, self.content = status, message, code, content


@dataclass(frozen=True)
class Blob:
    """A file of a commit; a large one lies in the storage, and git has a pointer to it."""

    content: bytes
    large: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        return text.encode()

    @property
    def oid(self) -> str:
        data = self.pointer if self.large else self.content
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def entry(self, path: str) -> dict:
        entry = {"type": "file", "path": path, "oid": self.oid, "size": len(self.content)}
        large = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}
        return {**entry, "lfs": large} if self.large else entry


@dataclass
class Commit:
    id: str
    parent: "Commit | None"
    files: dict[str, Blob]
    title: str


@dataclass
class Repo:
    kind: str
    id: str
    private: bool
    sdk: str | None = None
    branches: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    storage: dict[str, bytes] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Blob], title: str) -> Commit:
        parent = self.branches.get(branch)
        content = json.dumps([len(self.commits), parent and parent.id, title, *((p, b.oid) for p, b in files.items())])
        commit = Commit(hashlib.sha1(content.encode()).hexdigest(), parent, files, title)
        self.commits[commit.id] = self.branches[branch] = commit
        return commit

    def resolve(self, revision: str) -> Commit:
        found = self.branches.get(revision) or self.commits.get(revision)
        if found is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def history(self, revision: str) -> list[Commit]:
        """The commit and those before it, the newest first."""
        found = [self.resolve(revision)]
        while found[-1].parent is not None:
            found.append(found[-1].parent)
        return found

    def titles(self, revision: str) -> list[str]:
        return [commit.title for commit in self.history(revision)]

    def about(self, commit: Commit) -> dict:
        metadata = metadata_of(commit.files["README.md"].content.decode()) if "README.md" in commit.files else {}
        siblings = [{"rfilename": path, "size": len(blob.content)} for path, blob in sorted(commit.files.items())]
        about = {"id": self.id, "sha": commit.id, "private": self.private, "tags": metadata.get("tags") or []}
        return {**about, "lastModified": DATE, "siblings": siblings, "sdk": self.sdk}


def metadata_of(card: str) -> dict:
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---", card, re.DOTALL)
    return (yaml.safe_load(match[1]) if match else None) or {}


def problems(metadata: dict) -> list[str]:
    """Errors of a card, after the rules in the Hub's documentation."""
    base = metadata.get("base_model", [])
    ids = [*(base if isinstance(base, list) else [base]), *metadata.get("datasets", [])]
    relation = metadata.get("base_model_relation", "adapter")
    checks = {
        f"license must be one of {sorted(_LICENSES)}": metadata.get("license", "mit") in _LICENSES,
        f"expected ids of models and datasets, found {ids}": all(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", i) for i in ids),
        "base_model_relation is unknown": relation in ("adapter", "merge", "quantized", "finetune"),
        "tags must be a list of strings": all(isinstance(tag, str) for tag in metadata.get("tags") or []),
    }
    return [message for message, holds in checks.items() if not holds]
