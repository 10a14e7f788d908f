"""Progress of the lab on standard error."""

import sys

from tqdm.auto import tqdm

from ..training.callbacks import StageCallback


class LabProgress(StageCallback):
    """One bar for each part of the lab, where there is a terminal."""

    bar = tqdm(disable=True)

    def begin(self, label: str, total: int) -> None:
        self.bar.close()
        self.bar, self.label = tqdm(desc=label, total=total, disable=None), label

    def advance(self, detail: str = "", amount: int = 1) -> None:
        self.bar.set_description(f"{self.label} {detail}".strip(), refresh=False)
        self.bar.update(amount)

    def on_train_begin(self, args, state, control, **kwargs):
        self.advance(self.stage, amount=state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.advance(self.stage)

    def on_stage_begin(self, index, stage):
        self.stage = f"{stage.domain} (stage {index})"

    def on_stage_end(self, record, score_matrix):
        self.stage = "score"
        scores = (f"{domain} {score_matrix.interval(-1, domain).value:.1f}" for domain in score_matrix.domains)
        tqdm.write(f"after {record.name}: {', '.join(scores)}", file=sys.stderr)
