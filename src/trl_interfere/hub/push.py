"""Publication of runs and reports. Each branch gets one commit; stopped and started again, a push goes on."""

import re
import shlex
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError

from ..analysis.report import REPORT_FOLDER, REPORT_NAME
from ..revision import split_revision, stage_revision
from ..run import STAGES_NAME, Run
from .plan import Files, PushPlan, model_files, plan_report, plan_run


# The error of the HTTP library below huggingface_hub, whichever it is: versions 1 and 2 have different ones.
_TransportError = next(base for base in HfHubHTTPError.__mro__ if base.__module__.startswith("httpx"))
_WAITS = (1.0, 4.0, 16.0)
_LONGEST_WAIT = 60.0
_REASONS = {
    401: "the token is missing, invalid or has expired: run `hf auth login` or set HF_TOKEN",
    412: "somebody else has committed at the same time",
    429: "the Hub asks for fewer requests: wait a few minutes",
}
# Files that a push removes from a branch if they are not among its own.
_MODEL = ("*.safetensors", "*.safetensors.index.json", "adapters/*")
_MANAGED = {"main": (*_MODEL, "repair/*", f"{REPORT_FOLDER}/*", ".eval_results/*")}

Result = TypeVar("Result")


class PushError(OSError):
    """A push that stopped. The message says what is done and how to go on."""


@dataclass
class PushResult:
    """
    Where a push has gone.

    Args:
        repo_id (`str`):
            The repository.
        url (`str`):
            Its address.
        commits (`dict[str, str]`):
            The commit that each branch is at.
        collection (`str`, *optional*):
            Slug of the collection that the model is in.
    """

    repo_id: str
    url: str
    commits: dict[str, str] = field(default_factory=dict)
    collection: str | None = None


def push_folder(
    folder: str | Path,
    repo_id: str,
    stages: bool = True,
    private: bool | None = None,
    collection: str | None = None,
    token: str | None = None,
    license: str | None = None,
    overwrite: bool = False,
    only: Iterable[str] | None = None,
    dry_run: bool = False,
    page: str | None = None,
) -> PushResult | PushPlan:
    """
    Publish a run. The branches of the stages come first, and `main` gets everything in one commit. A report goes under
    `interference/` of `main`.

    Args:
        folder (`str` or `pathlib.Path`):
            Folder of the run, or of a report.
        repo_id (`str`):
            The repository, `user/repo`; it is made if there is none.
        stages (`bool`, *optional*, defaults to `True`):
            Whether each stage becomes a branch, such as `stage-1-math`.
        private (`bool`, *optional*):
            Whether a new repository is private. Defaults to what the account or organisation has set.
        collection (`str`, *optional*):
            Title of a collection that the model is added to; it is made if there is none.
        token (`str`, *optional*):
            Token. Defaults to the one of the environment or of `hf auth login`.
        license (`str`, *optional*):
            Licence for the card. Defaults to that of the base model, if the Hub knows it.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace a model on `main` that was not published by this function.
        only (`Iterable[str]`, *optional*):
            Names of stages to publish as branches, without `main`.
        dry_run (`bool`, *optional*, defaults to `False`):
            Whether to return the plan and send nothing.
        page (`str`, *optional*):
            HTML of a page that the card links.

    Returns:
        [`PushResult`] or `PushPlan`: Where it has gone; with `dry_run` what would go where.

    Raises:
        `ValueError`: If there is nothing to publish, a file lies outside the folder, or the repository holds another
            model.
        [`PushError`]: If the Hub fails. The message has the command that goes on.
    """
    folder, api = Path(folder), HfApi(token=token)
    command = ["trl-interfere", "push", str(folder), repo_id, *(["--private"] if private else [])]
    command += [] if collection is None else ["--collection", collection]
    is_report = (folder / REPORT_NAME).is_file() and not (folder / STAGES_NAME).is_file()
    if not dry_run and "/" not in repo_id:  # cards name the repository
        user = Target(api, repo_id).call("asking for the name of the account", api.whoami)["name"]
        command[3] = repo_id = f"{user}/{repo_id}"
    target = Target(api, repo_id, shlex.join(command))
    if is_report:
        plan = plan_report(folder, repo_id)
    else:
        run = Run(folder)
        if not dry_run:
            license = license or base_license(str(run.identity.get("base_model", "")), api)
        plan = plan_run(run, repo_id, stages, license, only, page)
    if dry_run:
        return plan
    target.create(private)
    if is_report:
        remote = target.remote_files("main")[0]
        if "README.md" in remote and any(path.endswith(".safetensors") and "/" not in path for path in remote):
            del plan.branches["main"]["README.md"]  # the card of a model is left alone
    elif only is None and not overwrite:
        target.refuse_another_model()
    for branch, files in plan.branches.items():
        message = f"Branch {branch}" if branch != "main" else "Report" if is_report else "Model, analysis and card"
        target.send(branch, files, message, () if is_report else _MANAGED.get(branch, ("[!.]*",)))
    if collection is not None:
        target.add_to_collection(collection)
    return target.result


def push_checkpoint(folder: Path, repo_id: str, stage: str, message: str, args) -> None:
    """Bring the weights of a checkpoint in the middle of a stage to the branch of the stage."""
    target = Target(HfApi(token=args.hub_token), repo_id)
    target.create(args.hub_private_repo)
    target.send(stage_revision(stage), model_files(folder, folder), message, _MODEL)


def base_license(base_model: str, api: HfApi) -> str | None:
    """Identifier of the licence of a base model, if its card has one and can be read."""
    base, revision = split_revision(base_model)
    if "/" not in base:
        return None
    try:
        local = Path(base) / "README.md"
        card = local if local.is_file() else api.hf_hub_download(base, "README.md", revision=revision)
        return ModelCard.load(card).data.license
    except (OSError, ValueError, HfHubHTTPError):  # no card, no network, or metadata that are no YAML
        return None


class Target:
    """A repository that branches are sent to, and what has arrived."""

    def __init__(self, api: HfApi, repo_id: str, command: str | None = None):
        self.api, self.command = api, command
        self.result = PushResult(repo_id, "")

    def call(self, label: str, function: Callable[[], Result]) -> Result:
        """Call a function of the Hub; a busy server is asked again."""
        for wait in (*_WAITS, None):
            try:
                return function()
            except (HfHubHTTPError, _TransportError, RuntimeError) as error:
                cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
                response = getattr(cause, "response", None)
                status = getattr(response, "status_code", None)
                asked = getattr(response, "headers", {}).get("Retry-After", "")
                wait = float(asked) if wait and asked.isdecimal() else wait
                if wait is None or wait > _LONGEST_WAIT or status not in (None, 429, 500, 502, 503, 504):
                    raise PushError(self._message(label, cause, status)) from error
                time.sleep(wait)
        raise AssertionError("unreachable")

    def create(self, private: bool | None = None) -> None:
        name = self.result.repo_id
        url = self.call("making the repository", lambda: self.api.create_repo(name, private=private, exist_ok=True))
        self.result.repo_id, self.result.url = url.repo_id, str(url)

    def remote_files(self, branch: str) -> tuple[list[str], str]:
        """Paths of a branch, and its commit."""

        def read() -> tuple[list[str], str]:
            head = self.api.repo_info(self.result.repo_id, revision=branch).sha
            return self.api.list_repo_files(self.result.repo_id, revision=head), head

        return self.call(f"reading {branch}", read)

    def refuse_another_model(self) -> None:
        remote, _ = self.remote_files("main")
        if any(path.endswith(".safetensors") for path in remote) and f"{REPORT_FOLDER}/{STAGES_NAME}" not in remote:
            raise ValueError(
                f"{self.result.repo_id}: expected no model or that of a pushed run, found another one; choose another "
                "name, or replace it with --overwrite (`overwrite=True`)"
            )

    def send(self, branch: str, files: Files, message: str, managed: Iterable[str] = ()) -> None:
        """Bring a branch to its planned state in one commit; files that are there already are not sent again."""
        repo_id = self.result.repo_id
        if branch != "main":
            self.call(f"making {branch}", lambda: self._create_branch(branch))

        def commit() -> str:
            remote, head = self.remote_files(branch)
            outdated = [path for path in remote if path not in files and any(fnmatch(path, part) for part in managed)]
            operations = [CommitOperationDelete(path, is_folder=False) for path in outdated] + [
                CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
                for path, content in files.items()
            ]
            options = {"commit_message": message, "revision": branch, "parent_commit": head}
            return self.api.create_commit(repo_id, operations, **options).oid

        self.result.commits[branch] = self.call(f"uploading {branch}", commit)

    def _create_branch(self, branch: str) -> None:
        if branch not in {ref.name for ref in self.api.list_repo_refs(self.result.repo_id).branches}:
            # From the first commit, which is empty: a stage shall not inherit the files of main.
            first = self.api.list_repo_commits(self.result.repo_id)[-1].commit_id
            self.api.create_branch(self.result.repo_id, branch=branch, revision=first, exist_ok=True)

    def add_to_collection(self, title: str) -> None:
        """Add the repository to a collection, which is made if there is none."""

        def add() -> str:
            namespace = self.result.repo_id.split("/")[0]
            slug = self.api.create_collection(title, namespace=namespace, exists_ok=True).slug
            self.api.add_collection_item(slug, self.result.repo_id, item_type="model", exists_ok=True)
            return slug

        self.result.collection = self.call(f"adding to the collection {title!r}", add)

    def _message(self, label: str, cause: BaseException, status: int | None) -> str:
        refused = status is not None and status < 500
        reason = _REASONS.get(status, "the Hub refuses it" if refused else "the Hub cannot be reached")
        detail = str(getattr(cause, "server_message", None) or ("" if status else cause))
        # Signatures, with which anybody could write, are cut.
        detail = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1?...", detail)
        done = ", ".join(self.result.commits) or "none"
        text = f"{self.result.repo_id}: {label} failed, {reason}" + (f" ({detail})" if detail else "")
        text += f". Finished branches: {done}" + ("" if "main" in self.result.commits else "; main is as it was")
        return f"{text}; to continue, " + (f"run again:\n  {self.command}" if self.command else "push again")
