"""GRPO on one domain after the other, in one trainer."""

import contextlib
import copy
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, is_peft_model, set_seed
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import TrainOutput
from trl.data_utils import is_conversational
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import get_config_model_id

from .. import __version__
from ..domain import DOMAIN_COLUMN, Domain
from ..evaluation.bootstrap import score
from ..evaluation.score_matrix import ScoreMatrix
from ..evaluation.scorer import Scorer
from ..models import local_folder
from ..repair.heal import heal_run
from ..run import Run, StageRecord, lock_folder, stage_name
from .callbacks import StageCallback
from .checks import check_run, with_prompts
from .config import STAGE_OPTIONS, SequentialGRPOConfig
from .distillation import Distillation, mixed
from .identity import about_run, run_identity
from .resume import last_whole_checkpoint
from .schedule import Stage, build_schedule
from .stage_adapters import add_stage_adapter, check_stage_adapters, set_reference_adapter
from .stage_state import StageTrainer
from .stage_weights import load_stage, save_stage, writing


logger = logging.getLogger(__name__)
_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")


class SequentialGRPOTrainer(StageTrainer):
    """
    Trainer that runs Group Relative Policy Optimization (GRPO) on one domain after the other.

    One trainer, one `train()`: it loops over the stages, scores every domain after each of them, keeps the weights of
    each stage under `output_dir/stages/` and what has finished in `output_dir/stages.json`. Optimizer, learning-rate
    schedule, data order and random state start anew with each stage; the KL reference stays the base model unless
    `args.kl_reference` says otherwise. With one domain it does what [`~trl.GRPOTrainer`] does.

    Metrics go where `args.report_to` says, under TRL's names, with `stage` (position in the run), `<domain>/reward`
    (the reward while the domain is trained) and `<domain>/score` (after each stage) added to them.

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
            Configuration for this trainer. If `None`, a default configuration is used.
        domains (`list[Domain]`):
            The domains, with unique names. Those with a `train_dataset` can be trained, those with an `eval_dataset`
            are scored after every stage.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer. Defaults to the one of the model.
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            Callbacks. A [`StageCallback`], such as [`RefreshCallback`], is asked after each stage what to do next.
        peft_config ([`~peft.PeftConfig`], *optional*):
            PEFT configuration used to wrap the model: one adapter through all stages, or one for each of them with
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
            with lock_folder(args.output_dir):
                pass  # a folder that cannot be written to, or is written to, is named before the model is loaded
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
        if getattr(self.processing_class, "chat_template", None) is None:
            self._check_plain_prompts()
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

    def _check_plain_prompts(self) -> None:
        for domain in self.domains.values():
            for field in ("train_dataset", "eval_dataset"):
                dataset = getattr(domain, field)
                if isinstance(dataset, Dataset) and is_conversational({"prompt": dataset[0].get("prompt", "")}):
                    raise ValueError(
                        f"domain {domain.name!r}, {field}: expected plain prompts, since the tokenizer has no chat "
                        "template, found conversational ones; set `processing_class` to a tokenizer with a template"
                    )

    @property
    def score_matrix(self) -> ScoreMatrix:
        """Scores of every domain after every finished stage."""
        return ScoreMatrix.from_run(self.run, [name for name, domain in self.domains.items() if domain.eval_dataset])

    @property
    def log_history(self) -> list[dict[str, Any]]:
        """Everything that was logged, over all stages: entries as in `state.log_history`, and the scores."""
        entries = []
        for record in self.run.stages:
            path = self.run.folder / (record.folder or "") / "log_history.json"
            if record.kind in ("train", "refresh"):
                entries += json.loads(path.read_text(encoding="utf-8"))
            entries.append({"step": record.steps, **_score_logs(record)})
        return entries + (self.state.log_history if self._stage is not None else [])

    def train(
        self, resume_from_checkpoint: bool | None = None, max_stages: int | None = None, **kwargs
    ) -> TrainOutput:
        """
        Run all stages that are not finished.

        A callback that sets `control.should_training_stop` before the last step of a stage, such as one with a budget
        of time, ends the run there. The stage counts as unfinished, and a resumed run goes on with it.

        Args:
            resume_from_checkpoint (`bool`, *optional*):
                If `True`, continue the run in `args.output_dir`, wherever it stopped; an empty folder starts a new
                run. Otherwise the folder must not hold a run.
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
            raise ValueError(
                f"resume_from_checkpoint: expected True or False, found {str(resume_from_checkpoint)!r}; "
                "the stages in output_dir decide where a run continues"
            )
        if self.args.push_to_hub:
            self._pusher()  # refuses a run that nothing would publish
        with self.run.lock() if self.accelerator.is_main_process else contextlib.nullcontext():
            self._open_run(bool(resume_from_checkpoint))
            self._join_trackers()
            for callback in self._stage_callbacks():
                callback.on_run_begin(self.args, self.run)
            output, stopped = self._run_stages(max_stages, **kwargs)
            self._end_trackers()
            if self.run.stages and not stopped and self.next_stage() is None:
                for callback in self._stage_callbacks():
                    callback.on_run_end(self.args, self.run)
                self.accelerator.wait_for_everyone()
        return output

    def _run_stages(self, max_stages: int | None, **kwargs) -> tuple[TrainOutput, bool]:
        output = TrainOutput(0, 0.0, {})
        if self.run.current is not None:
            self._score_stage()
        elif not self.run.stages:
            self._finish_stage(Stage(domain=None, kind="base"), steps=0, seconds=0.0)
        ran = 0
        while ran != max_stages and (stage := self.next_stage()) is not None:
            for callback in self._stage_callbacks():
                callback.on_stage_begin(len(self.run.stages), stage)
            if stage.kind == "heal":
                self._heal(stage)
            else:
                output = self._run_stage(stage, **kwargs)
            if self._unfinished:
                return output, True
            ran += 1
        return output, False

    def evaluate(self, eval_dataset=None, **kwargs) -> dict[str, float]:
        """
        Evaluate the rewards of a domain, as [`~transformers.Trainer.evaluate`] does.

        Args:
            eval_dataset (`str` or [`~datasets.Dataset`], *optional*):
                Name of a domain, or a dataset. Defaults to the domain that is being trained, or was trained last; a
                dataset without the column `domain` is taken to be of that domain too.
            **kwargs:
                Further arguments of [`~transformers.Trainer.evaluate`].

        Returns:
            `dict[str, float]`: Metrics; `eval_reward` is the mean reward.
        """
        if isinstance(eval_dataset, str):
            if eval_dataset not in self.domains or self.domains[eval_dataset].eval_dataset is None:
                names = [name for name, domain in self.domains.items() if domain.eval_dataset is not None]
                raise ValueError(
                    f"eval_dataset: expected a domain with an eval_dataset {names}, found {eval_dataset!r}"
                )
            eval_dataset = self.domains[eval_dataset].eval_dataset
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
            [`Stage`] or `None`: A stage that a [`StageCallback`] asks for, with the `stage_overrides` of its (first)
            domain beneath its own, else the next one of the schedule, else nothing.
        """
        trained = sum(record.kind == "train" for record in self.run.stages)
        for callback in self._stage_callbacks():
            last = trained == len(self.schedule)
            stage = callback.request_stage(self.run.stages, self.score_matrix, schedule_finished=last)
            if stage is not None and stage.kind == "heal":
                if self._nothing_to_heal != len(self.run.stages):
                    return stage
            elif stage is not None:
                first = stage.domains[0]
                build_schedule(self.domains, stage.domains, {first: stage.settings}, STAGE_OPTIONS)
                own = (self.args.stage_overrides or {}).get(first, {})
                return replace(stage, overrides={**own, **stage.overrides})
        return self.schedule[trained] if trained < len(self.schedule) else None

    def _run_stage(self, stage: Stage, **kwargs) -> TrainOutput:
        index = len(self.run.stages)
        name = self._stage_name = stage_name(index, stage.kind, stage.domain)
        if is_peft_model(self.model) and self.run.stages[-1].kind == "heal":
            raise ValueError(f"stage {name}: a healed adapter has another rank, and cannot be trained on")
        folder = self.run.folder / "checkpoints" / name
        with self._stage_args(stage, folder, self._stage_seed(index)):
            self._reset()
            domains = [self.domains[name] for name in stage.domains]
            self.train_dataset = mixed(domains)
            evaluated = {domain.name: domain.eval_dataset for domain in domains if domain.eval_dataset is not None}
            self.eval_dataset = evaluated if len(domains) > 1 else domains[0].eval_dataset
            checkpoint = self._from_main(last_whole_checkpoint(folder))
            self.args.eval_on_start &= checkpoint is None  # else it was evaluated before
            if self._unfinished:
                self._restore_stage_start()
            self._unfinished = True
            self._begin_adapter(index, name)
            teachers = stage.overrides.get("teachers")
            self._distillation = None if teachers is None else Distillation(self, teachers)
            # As TRL does at construction: processes that share a group of completions must not sample the same ones.
            set_seed(self.args.seed, device_specific=True)
            self._stage = index, stage
            start = time.perf_counter()
            try:
                output = self._train_stage(checkpoint, **kwargs)
            finally:
                self._stage = self._distillation = None
            seconds = time.perf_counter() - start
            if self._stopped_early():
                return output
            if output.global_step == 0:
                raise ValueError(
                    f"stage {name}: no step could be made, since domain {stage.domains[0]!r} has too few prompts for "
                    f"one generation batch ({self.args.generation_batch_size // self.num_generations})"
                )
        self._finish_stage(stage, steps=output.global_step, seconds=seconds)
        return output

    def _heal(self, stage: Stage) -> None:
        """Repair what the stages before have damaged, and go on with the repaired weights."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("heal: not supported with FSDP or DeepSpeed; heal the finished run instead")
        if is_peft_model(self.model) and len([r for r in self.run.stages if r.kind == "train"]) < len(self.schedule):
            raise ValueError(
                "heal: with an adapter expected at='end', since the stages after a heal would have to go on training "
                "an adapter of another rank"
            )
        scorer = copy.copy(self.scorer)

        def scored(*args, **kwargs):  # in the precision of the stages
            with self.accelerator.autocast():
                return self.scorer.score(*args, **kwargs)

        scorer.score = scored
        if self.accelerator.is_main_process:
            heal_run(self.run, list(self.domains.values()), scorer=scorer, **stage.overrides)
        self.run.stages = self._from_main(self.run.stages)
        record = self.run.stages[-1]
        if record.kind != "heal":
            logger.warning("heal: nothing that was lost on the test split is worse on the selection split too")
            self._nothing_to_heal = len(self.run.stages)
            return
        load_stage(self, record)
        self._announce(record)

    def _begin_adapter(self, index: int, name: str) -> None:
        """What a stage starts from besides the weights: its adapter and the KL reference."""
        if self.args.adapter_per_stage and index > 1:
            set_seed(self.args.seed)
            add_stage_adapter(self.accelerator.unwrap_model(self.model), name)
            self.model_wrapped = self.model  # to be wrapped again, with the new parameters
        if self.args.kl_reference == "stage" and self.beta != 0.0 and index > 1:
            model = self.accelerator.unwrap_model(self.model)
            if is_peft_model(model):
                set_reference_adapter(model)
            else:
                self.accelerator.unwrap_model(self.ref_model).load_state_dict(model.state_dict())

    def _restore_stage_start(self) -> None:
        """Go back to the weights that a stage starts from, after one was left in its middle."""
        records = [record for record in self.run.stages if record.folder is not None]
        if not records or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                f"{self.run.folder}: a stage was left in its middle and its start is not in memory; "
                "build a new trainer and call train(resume_from_checkpoint=True)"
            )
        load_stage(self, records[-1])

    def _finish_stage(self, stage: Stage, steps: int, seconds: float) -> None:
        index = len(self.run.stages)
        folder = None if stage.kind == "base" else Path("stages") / stage_name(index, stage.kind, stage.domain)
        if folder is not None:
            with writing(self.run.folder / folder):
                save_stage(self, self.run.folder / folder)
        self._unfinished = False
        self.run.current = StageRecord(
            index=index,
            kind=stage.kind,
            domain=stage.domain,
            folder=None if folder is None else folder.as_posix(),
            steps=steps,
            seconds=round(seconds, 3),
            scores={},
            seed=self._stage_seed(index),
            overrides=stage.overrides,
            reason=stage.reason,
            versions={"trl-interfere": __version__, **{package: version(package) for package in _PACKAGES}},
        )
        self._save_run()
        self._score_stage()

    def _save_run(self) -> None:
        if self.accelerator.is_main_process:
            with writing(self.run.path):
                self.run.save()

    def _score_stage(self) -> None:
        """Score the domains that the current stage lacks, and record it as finished."""
        record = self.run.current
        unwrapped = unwrap_model_for_generation(
            self.model_wrapped, self.accelerator, gather_deepspeed3_params=self.args.ds3_gather_for_generation
        )
        # The base model is not prepared yet, and would be scored in another precision than the stages.
        with unwrapped as model, self.accelerator.autocast():
            for domain in self.domains.values():
                if domain.eval_dataset is None or domain.name in record.scores:
                    continue
                try:
                    result = self.scorer.score(model, domain, domain.eval_dataset, accelerator=self.accelerator)
                except ValueError as error:
                    raise ValueError(f"stage {record.name}, scores after step {record.steps}, {error}") from error
                entry = None
                if self.accelerator.is_main_process:
                    with writing(self.run.folder / "scores" / record.name):
                        kept = result.samples, result.completions, result.prompts
                        file = self.run.write_scores(record.name, domain.name, *kept)
                    entry = {**score(result.values).to_dict(), "file": file}
                record.scores[domain.name] = self._from_main(entry)  # callbacks must decide alike in every process
                self._save_run()
        self.run.stages.append(record)
        self.run.current = None
        self._save_run()
        self._announce(record)

    def _announce(self, record: StageRecord) -> None:
        """Tell trackers and callbacks that a stage has finished."""
        self.accelerator.wait_for_everyone()
        logs = {**_score_logs(record), "run_step": self._run_step()}
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)
        for callback in self._stage_callbacks():
            callback.on_stage_end(record, self.score_matrix)
        self._remove_checkpoints(record)

    def _remove_checkpoints(self, record: StageRecord) -> None:
        """Remove what a finished stage no longer needs. Completions move to its folder; what callbacks wrote stays."""
        if self.args.keep_checkpoints or not self.accelerator.is_main_process:
            return
        folder = self.run.folder / "checkpoints" / record.name
        if record.folder is not None and (folder / "completions").exists():
            os.replace(folder / "completions", self.run.folder / record.folder / "completions")
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint, ignore_errors=True)
        for empty in (folder, folder.parent):
            with contextlib.suppress(OSError):
                empty.rmdir()

    def _from_main(self, value: Any) -> Any:
        # Processes that look at the disk while another one writes may see different things.
        return broadcast_object_list([value])[0]

    def _open_run(self, resume: bool) -> None:
        exists = self._from_main(self.run.exists())
        if (exists or self.run.stages) and not resume:
            raise ValueError(
                f"{self.run.path}: this folder holds a run. Pass resume_from_checkpoint=True (on the command line "
                "--resume) to continue it, or choose another output_dir"
            )
        if exists and not self.run.stages:  # else it is a second train() of this object, and the weights are live
            self.run.resume()
            self._check_records()
            records = [record for record in self.run.records if record.folder is not None]
            if records:
                load_stage(self, records[-1])
            for record in self.run.stages:  # a process may have been killed just before it did
                self._remove_checkpoints(record)
        elif not exists and self.accelerator.is_main_process:
            self.run.save()
            model = get_config_model_id(self.model.config)
            if os.path.isdir(model):
                self.run.keep_local(base_model=os.path.abspath(model))
        # transformers ends the run of trackio with each `train()`, and finds it again by its name alone.
        self.args.run_name = self.run.run_name
        self.accelerator.wait_for_everyone()

    def _check_records(self) -> None:
        """Refuse stages that are not those of the schedule, which only an edit can bring about."""
        schedule = iter(self.schedule)
        for index, record in enumerate(self.run.records):
            expected = StageRecord(**{**vars(record), "index": index})
            if index == 0:
                expected.kind, expected.domain = "base", None
            elif record.kind not in ("refresh", "heal"):
                stage = next(schedule, None)
                expected.kind, expected.domain = "train", stage and stage.domain
            if record.kind != "heal":
                expected.folder = f"stages/{expected.name}" if index else None
            for field in ("index", "kind", "domain", "folder"):
                if getattr(record, field) != getattr(expected, field):
                    raise ValueError(
                        f"{self.run.path}: stage {index}, {field}: expected {getattr(expected, field)!r} as the "
                        f"schedule says, found {getattr(record, field)!r}"
                    )
            for name in [*record.scores, *([] if record.domain is None else [record.domain])]:
                if name not in self.domains:
                    raise ValueError(
                        f"{self.run.path}: stage {index}: expected one of {list(self.domains)}, found {name!r}"
                    )
                if name in record.scores:
                    self.run.scores(record, name)

    def _stage_seed(self, index: int) -> int:
        return self.args.seed + max(index - 1, 0)

    @contextlib.contextmanager
    def _stage_args(self, stage: Stage, folder: Path, seed: int) -> Iterator[None]:
        settings = {"output_dir": str(folder), "seed": seed, **self.args.stage_settings(stage.settings)}
        if any(isinstance(self.domains[name].train_dataset, IterableDataset) for name in stage.domains):
            # Several workers would tear groups of completions apart; TRL looks at the first dataset only.
            settings.update(
                dataloader_num_workers=0, dataloader_persistent_workers=False, dataloader_prefetch_factor=None
            )
        settings["eval_on_start"] = self.args.eval_on_start
        before = {name: getattr(self.args, name) for name in settings}
        self._set_args(settings)
        if self.accelerator.is_main_process:  # callbacks write to it
            os.makedirs(folder / "completions" if self.log_completions else folder, exist_ok=True)
        try:
            yield
        finally:
            self._set_args(before)

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> Any:
        """
        Publish the finished stages: each as a revision, the last one on `main`, and the analysis.

        Args:
            commit_message (`str`, *optional*):
                Not used: the messages name the stages.
            blocking (`bool`, *optional*, defaults to `True`):
                Must be `True`: `main` is written after everything else.
            token (`str`, *optional*):
                Token. Defaults to `args.hub_token`.
            revision (`str`, *optional*):
                Must be `None`: each stage has a revision of its own.
            private (`bool`, *optional*):
                Whether a new repository is private. Defaults to `args.hub_private_repo`.
            **kwargs:
                Further arguments of [`HubCallback.push`].

        Returns:
            What [`HubCallback.push`] returns; `None` in all but the main process.

        Raises:
            `ValueError`: If the trainer has no [`HubCallback`], or an argument cannot be honoured.
        """
        if not blocking or revision is not None:
            raise ValueError("push_to_hub: expected blocking=True and no revision, since main is written last")
        callback = self._pusher()
        callback.on_run_begin(self.args, self.run)
        result = None
        if self.is_world_process_zero():
            result = callback.push(token=token, private=private, **kwargs)
        self.accelerator.wait_for_everyone()
        return result

    def _pusher(self) -> StageCallback:
        for callback in self._stage_callbacks():
            if hasattr(callback, "push"):
                return callback
        raise ValueError("push_to_hub: expected trl_interfere.HubCallback() among the callbacks, found none")

    def _stage_callbacks(self) -> list[StageCallback]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, StageCallback)]


def _score_logs(record: StageRecord) -> dict[str, float]:
    scores = {f"{domain}/score": entry["value"] for domain, entry in record.scores.items()}
    return {"stage": record.index, **scores}
