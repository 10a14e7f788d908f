"""GRPO on one domain after the other, in one trainer."""

import contextlib
import json
import os
from dataclasses import replace
from typing import Any

from accelerate.utils import set_seed
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import TrainOutput
from trl.trainer.utils import get_config_model_id

from ..domain import DOMAIN_COLUMN, Domain
from ..evaluation.score_matrix import ScoreMatrix
from ..evaluation.scorer import Scorer
from ..models import local_folder
from ..run import Run, lock_folder
from .callbacks import StageCallback
from .checks import check_run, check_template, with_prompts
from .config import SequentialGRPOConfig
from .identity import about_run, run_identity
from .schedule import Stage, build_schedule
from .stage_adapters import check_stage_adapters
from .stage_loop import StageLoop, score_logs


class SequentialGRPOTrainer(StageLoop):
    """
    Trainer that runs Group Relative Policy Optimization (GRPO) on one domain after the other.

    `train()` loops over the stages, scores every domain after each of them, keeps the weights of each stage under
    `output_dir/stages/` and what has finished in `output_dir/stages.json`. Optimizer, learning-rate schedule, data
    order and random state start anew with each stage. With one domain it does what [`~trl.GRPOTrainer`] does.

    To TRL's metrics are added `stage` (position in the run), `<domain>/reward` (the reward while the domain is
    trained) and `<domain>/score` (after each stage).

    Example:

    ```python
    >>> from trl_interfere import Domain, SequentialGRPOConfig, SequentialGRPOTrainer

    >>> trainer = SequentialGRPOTrainer(
    ...     model="Qwen/Qwen3-0.6B",
    ...     args=SequentialGRPOConfig(output_dir="out", max_steps=100),
    ...     domains=[Domain("code", code_prompts, code_reward), Domain("math", math_prompts, math_reward)],
    ... )
    >>> trainer.train()
    >>> trainer.score_matrix
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to be trained, as for [`~trl.GRPOTrainer`].
        args ([`SequentialGRPOConfig`], *optional*):
            Configuration for this trainer.
        domains (`list[Domain]`):
            The domains, with unique names. Those with a `train_dataset` can be trained, those with an `eval_dataset`
            are scored after every stage.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer. Defaults to the one of the model.
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            Callbacks. A [`StageCallback`], such as [`RefreshCallback`], is asked after each stage what to do next.
        peft_config ([`~peft.PeftConfig`], *optional*):
            PEFT configuration of the adapter that goes through all stages, or of one for each with
            `args.adapter_per_stage`.
        **kwargs:
            Further arguments of [`~trl.GRPOTrainer`].

    Raises:
        `ValueError`: If domains, schedule or settings do not fit together.
    """

    _tag_names = ["trl", "grpo", "trl-interfere"]
    _name = "Sequential GRPO"

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: SequentialGRPOConfig | None = None,
        domains: list[Domain] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        peft_config: Any | None = None,
        **kwargs,
    ):
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = SequentialGRPOConfig(f"{name.split('/')[-1]}-SequentialGRPO")
        for name in ("reward_funcs", "train_dataset", "eval_dataset"):
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"{name}: belongs to the domains, pass `domains=[Domain(...)]` instead")
        if kwargs.get("optimizers", (None, None)) != (None, None):
            raise ValueError("optimizers: each stage builds its own, set `args.optim` and `args.lr_scheduler_type`")
        if args.reward_weights is not None:
            raise ValueError("reward_weights: belong to the domains, set `Domain(..., reward_weights=...)`")
        domains = with_prompts(domains or [], args, kwargs.get("environment_factory"))
        self.domains = {domain.name: domain for domain in domains}
        self.schedule = check_run(domains, args, kwargs)
        self._base_model = str(model) if isinstance(model, str) and "@" in model else None  # a revision of the Hub
        if args.process_index == 0:
            with lock_folder(args.output_dir):  # one that cannot be written to is named before the model is loaded
                pass
        model = str(local_folder(model)) if isinstance(model, str) else model
        if peft_config is not None:
            set_seed(args.seed)  # for the adapter's initial values
        first = self.domains[self.schedule[0].domain]
        super().__init__(
            domains=domains,
            model=model,
            args=args,
            train_dataset=first.train_dataset,
            eval_dataset=first.eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            peft_config=peft_config,
            **kwargs,
        )
        check_template(domains, self.processing_class)
        if args.adapter_per_stage:
            check_stage_adapters(self.model)
        if args.kl_reference == "stage" and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("kl_reference: 'stage' is not supported with FSDP or DeepSpeed")
        self._nothing_to_heal: int | None = None  # number of stages after which a heal found nothing
        self.run = Run.new(args.output_dir, run_identity(self), args.run_name, about_run(self))
        self.scorer = Scorer(
            self._tokenizer,
            max_new_tokens=args.score_max_new_tokens or args.max_completion_length,
            batch_size=args.score_batch_size,
            chat_template_kwargs=args.chat_template_kwargs,
            temperature=args.score_temperature,
            num_samples=args.score_samples,
            progress=not args.disable_tqdm,
        )

    @property
    def score_matrix(self) -> ScoreMatrix:
        """Scores of every domain after every finished stage."""
        return ScoreMatrix.from_run(self.run, list(self._scored()))

    def _scored(self) -> dict[str, Dataset]:
        found = {name: domain.eval_dataset for name, domain in self.domains.items()}
        return {name: dataset for name, dataset in found.items() if dataset is not None}

    @property
    def log_history(self) -> list[dict[str, Any]]:
        """Everything that was logged, over all stages: entries as in `state.log_history`, and the scores."""
        entries = []
        for record in self.run.stages:
            path = self.run.folder / (record.folder or "") / "log_history.json"
            if record.kind in ("train", "refresh"):
                entries += json.loads(path.read_text(encoding="utf-8"))
            entries.append({"step": record.steps, **score_logs(record)})
        return entries + (self.state.log_history if self._stage is not None else [])

    def train(
        self, resume_from_checkpoint: bool | None = None, max_stages: int | None = None, **kwargs
    ) -> TrainOutput:
        """
        Run all stages that are not finished. A callback that sets `control.should_training_stop` before the last step
        of a stage ends the run there, and a resumed run goes on with the stage.

        Args:
            resume_from_checkpoint (`bool`, *optional*):
                If `True`, continue the run in `args.output_dir`, or start one in an empty folder. Otherwise the folder
                must not hold a run.
            max_stages (`int`, *optional*):
                Return after so many stages; the scoring of the base model does not count. Defaults to all of them.
            **kwargs:
                Further arguments of [`~transformers.Trainer.train`].

        Returns:
            [`~transformers.trainer_utils.TrainOutput`]: Result of the last stage that ran.

        Raises:
            `ValueError`: If the folder holds a run and `resume_from_checkpoint` is not `True`, or holds another run.
        """
        if isinstance(resume_from_checkpoint, (str, os.PathLike)):
            raise ValueError(f"resume_from_checkpoint: expected True or False, found {resume_from_checkpoint!r}")
        if self.args.push_to_hub:
            self._pusher()  # refuses a run that nothing would publish
        with self.run.lock() if self.accelerator.is_main_process else contextlib.nullcontext():
            self._open_run(bool(resume_from_checkpoint))
            self._join_trackers()
            for callback in self._stage_callbacks():
                callback.on_run_begin(self.args, self.run)
            output = self._run_stages(max_stages, **kwargs)
            self._end_trackers()
            if self.run.stages and not self._unfinished and self.next_stage() is None:
                for callback in self._stage_callbacks():
                    callback.on_run_end(self.args, self.run)
                self.accelerator.wait_for_everyone()
        return output

    def evaluate(self, eval_dataset=None, **kwargs) -> dict[str, float]:
        """
        Evaluate the rewards of a domain.

        Args:
            eval_dataset (`str` or [`~datasets.Dataset`], *optional*):
                Name of a domain, or a dataset. Defaults to the domain that is being trained, or was trained last; a
                dataset without the column `domain` counts as one of that domain.
            **kwargs:
                Further arguments of [`~transformers.Trainer.evaluate`].

        Returns:
            `dict[str, float]`: Metrics; `eval_reward` is the mean reward.
        """
        if isinstance(eval_dataset, str):
            scored = self._scored()
            if eval_dataset not in scored:
                raise ValueError(f"eval_dataset: expected one of {list(scored)}, found {eval_dataset!r}")
            eval_dataset = scored[eval_dataset]
        if isinstance(eval_dataset, dict):
            return super().evaluate(eval_dataset, **kwargs)
        eval_dataset = self.eval_dataset if eval_dataset is None else self._marked(eval_dataset)
        with self._rewarded_by(eval_dataset):
            return super().evaluate(eval_dataset, **kwargs)

    def predict(self, test_dataset: Dataset, *args, **kwargs):
        """As [`~transformers.Trainer.predict`]; the dataset as for [`~SequentialGRPOTrainer.evaluate`]."""
        test_dataset = self._marked(test_dataset)
        with self._rewarded_by(test_dataset):
            return super().predict(test_dataset, *args, **kwargs)

    def _marked(self, dataset: Any) -> Any:
        if not isinstance(dataset, Dataset) or DOMAIN_COLUMN in dataset.column_names:
            return dataset
        trained = [name for record in self.run.stages for name in record.domains]
        name = self._stage[1].domains[-1] if self._stage is not None else [self.schedule[0].domain, *trained][-1]
        return dataset.add_column(DOMAIN_COLUMN, [name] * len(dataset))

    def next_stage(self) -> Stage | None:
        """
        What the run does next, derived from the finished stages alone.

        Returns:
            [`Stage`] or `None`: A stage that a [`StageCallback`] asks for, with the `stage_overrides` of its first
            domain beneath its own, else the next one of the schedule.
        """
        trained = self._trained()
        finished = trained == len(self.schedule)
        for callback in self._stage_callbacks():
            stage = callback.request_stage(self.run.stages, self.score_matrix, schedule_finished=finished)
            if stage is not None and stage.kind == "heal":
                if self._nothing_to_heal != len(self.run.stages):
                    return stage
            elif stage is not None:
                first = stage.domains[0]
                build_schedule(self.domains, stage.domains, {first: stage.settings})
                own = (self.args.stage_overrides or {}).get(first, {})
                return replace(stage, overrides={**own, **stage.overrides})
        return None if finished else self.schedule[trained]

    def push_to_hub(self, token: str | None = None, private: bool | None = None, **kwargs) -> Any:
        """
        Publish the finished stages, each as a revision and the last one on `main`, and the analysis.

        Args:
            token (`str`, *optional*):
                Token. Defaults to `args.hub_token`.
            private (`bool`, *optional*):
                Whether a new repository is private. Defaults to `args.hub_private_repo`.
            **kwargs:
                Further arguments of [`HubCallback.push`].

        Returns:
            What [`HubCallback.push`] returns; `None` in all but the main process.

        Raises:
            `ValueError`: If the trainer has no [`HubCallback`].
        """
        callback, result = self._pusher(), None
        callback.on_run_begin(self.args, self.run)
        if self.is_world_process_zero():
            result = callback.push(token=token, private=private, **kwargs)
        self.accelerator.wait_for_everyone()
        return result

    def _pusher(self) -> StageCallback:
        for callback in self._stage_callbacks():
            if hasattr(callback, "push"):
                return callback
        raise ValueError("push_to_hub: expected trl_interfere.HubCallback() among the callbacks, found none")
