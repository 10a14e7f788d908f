"""Progress bars of the lab."""

from rich.console import Console
from rich.progress import Progress

from ..training.callbacks import StageCallback
from ..training.progress import progress_bars


class LabProgress(StageCallback):
    """One bar for each part of the lab, on standard error."""

    def __init__(self, quiet: bool = False):
        self.console = Console(stderr=True, quiet=quiet)
        self.bars: Progress | None = None
        self.task = None
        self.label = ""

    def begin(self, label: str, total: int) -> None:
        """Start a bar."""
        self.bars = progress_bars(self.console)
        self.label = label
        self.task = self.bars.add_task(label, total=total)
        self.bars.start()

    def advance(self, detail: str = "", amount: int = 1) -> None:
        """Some work is done or begins."""
        if self.bars is not None:
            self.bars.update(self.task, advance=amount, description=f"{self.label} {detail}".strip())

    def end(self) -> None:
        """Finish the bar."""
        if self.bars is not None:
            self.bars.update(self.task, completed=self.bars.tasks[0].total, description=self.label)
            self.bars.stop()
            self.bars = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.advance(self.stage, amount=state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.advance(self.stage)

    def on_stage_begin(self, index, stage):
        self.stage = f"{stage.domain} (stage {index})"

    def on_stage_end(self, record, score_matrix):
        self.stage = "score"
        scores = ", ".join(
            f"{domain} {score_matrix.interval(-1, domain).value:.1f}" for domain in score_matrix.domains
        )
        self.console.print(f"after {record.name}: {scores}")
