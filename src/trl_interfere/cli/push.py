"""`trl-interfere push`."""

from dataclasses import dataclass
from pathlib import Path

from ..run import STAGES_NAME
from .options import Options, option, parse
from .output import show


EXAMPLE = "trl-interfere push out user/model --dry_run"


@dataclass(kw_only=True)
class PushOptions(Options):
    """Publish a run: its last model, each stage as a branch, analysis, repair and card. Run again, it goes on."""

    run: str = option("", "folder of a run, or of a report")
    repo: str = option("", "model repository, user/repo; made if there is none")
    stages: bool = option(True, "publish each stage as a branch, e.g. stage-1-math")
    private: bool = option(False, "make a new repository private")
    collection: str | None = option(None, "title of a collection to add the model to")
    license: str | None = option(None, "licence; by default that of the base model")
    overwrite: bool = option(False, "replace another model in the repository")
    dry_run: bool = option(False, "list files and sizes, and send nothing")


def main(arguments: list[str]) -> None:
    options = parse(PushOptions, arguments, "run repo", EXAMPLE)
    options.prepare()
    from ..app.saved_page import save_page
    from ..app.scored import Scored
    from ..hub.push import push_folder

    folder = Path(options.run)
    page = save_page([Scored(folder.name, folder)]) if (folder / STAGES_NAME).is_file() else None
    names = ("stages", "collection", "license", "overwrite", "dry_run")
    chosen = {name: getattr(options, name) for name in names}
    result = push_folder(options.run, options.repo, private=options.private or None, page=page, **chosen)
    if options.dry_run:
        show(result.to_table(), f"Nothing was sent. Next: trl-interfere push {options.run} {options.repo}")
        return
    for branch, commit in result.commits.items():
        show(f"{branch}: {commit}")
    show(f"Published: {result.url}" + (f", collection {result.collection}" if result.collection else ""))
    show(f"Next: trl-interfere evaluate {result.repo_id} {options.run}")
