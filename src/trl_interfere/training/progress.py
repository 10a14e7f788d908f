"""Progress of a run on standard error."""

import math
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .callbacks import StageCallback


def progress_bars(console: Console, **kwargs) -> Progress:
    """Bars with a description, a count, the time that has passed and the time that is left."""
    return Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        **kwargs,
    )


class StageProgress(StageCallback):
    """
    Says on standard error which stage runs and how far it and the run are: on a terminal by bars, elsewhere by a line
    for each log. Add it in the main process only.
    """

    def __init__(self, steps: list[int], bars: bool = True, console: Console | None = None):
        self.steps, self.trained, self.stage_task = steps, 0, None
        self.console = console or Console(stderr=True, soft_wrap=True, highlight=False)
        # The mean over all steps so far, as a step may take minutes.
        off = not (bars and self.console.is_terminal)
        self.bars = progress_bars(self.console, disable=off, speed_estimate_period=math.inf, transient=True)
        self.run_task = self.bars.add_task("run", total=None)

    def request_stage(self, stages, score_matrix, schedule_finished):
        # Nothing is asked for, but this is where a resumed run shows how far it is.
        self.trained = sum(record.kind == "train" for record in stages)
        return None

    def on_stage_begin(self, index, stage):
        if stage.kind == "train":
            self.label = f"stage {self.trained + 1} of {len(self.steps)}: {stage.domain}"
        else:
            self.label = f"{stage.kind}: {stage.domain}" if stage.domain else stage.kind
        if stage.kind == "heal":
            self.console.print(self.label)
        self.ahead = sum(self.steps[self.trained + (stage.kind == "train") :])

    def on_train_begin(self, args, state, control, **kwargs):
        steps = "1 step" if state.max_steps == 1 else f"{state.max_steps} steps"
        self.console.print(f"{self.label}, {steps}" + (f", from {state.global_step}" if state.global_step else ""))
        before = self.bars.tasks[0].completed
        total = before + state.max_steps + self.ahead
        self.bars.update(self.run_task, completed=before + state.global_step, total=total)
        self.stage_task = self.bars.add_task(self.label, total=state.max_steps, completed=state.global_step)
        self.bars.start()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.stage_task is not None and "reward" in (logs or {}):
            text = f"{self.label}, reward {logs['reward']:.3g}"
            self.bars.update(self.stage_task, description=text)
            if self.bars.disable:
                left = self.bars.tasks[0].time_remaining
                left = "" if left is None else f", {timedelta(seconds=round(left))} left of the run"
                self.console.print(f"{text}, step {state.global_step} of {state.max_steps}{left}")

    def on_step_end(self, args, state, control, **kwargs):
        self.bars.advance(self.stage_task)
        self.bars.advance(self.run_task)

    def on_train_end(self, args, state, control, **kwargs):
        self.bars.stop()
        self.bars.remove_task(self.stage_task)
        self.stage_task = None

    def on_stage_end(self, record, score_matrix):
        scored = [domain for domain in score_matrix.domains if domain in score_matrix.values[-1]]
        scores = ", ".join(f"{domain} {score_matrix.interval(-1, domain):.1f}" for domain in scored)
        self.console.print(f"after {record.name}: {scores}", markup=False)
