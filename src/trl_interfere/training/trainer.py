"""GRPO on one domain after the other, in one trainer."""

import contextlib
import copy
import hashlib
import json
import os
import platform
import shutil
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object, is_peft_model, set_seed
from datasets import Dataset, IterableDataset
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import TrainOutput
from trl import GRPOTrainer
from trl.data_utils import is_conversational
from trl.import_utils import is_vllm_available
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import get_config_model_id

from .. import __version__
from ..domain import DOMAIN_COLUMN, Domain, check_columns
from ..evaluation.bootstrap import score
from ..evaluation.score_matrix import ScoreMatrix
from ..evaluation.scorer import Scorer
from ..models import local_folder
from ..run import Run, StageRecord, stage_name
from .callbacks import StageCallback
from .config import STAGE_OPTIONS, SequentialGRPOConfig
from .merged_parameters import merged_parameters
from .resume import epochs_done, last_whole_checkpoint, load_resume_state, save_resume_state
from .reward_masking import RewardError, mask_reward, reward_name
from .schedule import Stage, build_schedule
from .stage_adapters import (
    activate_stage_adapters,
    add_stage_adapter,
    check_stage_adapters,
    freeze_earlier_adapters,
    load_stage_adapters,
    save_stage_adapters,
    set_reference_adapter,
)


# Settings that cannot change the weights; a resumed run may differ in them.
_HARMLESS_OPTIONS = {
    "average_tokens_across_devices", "dataloader_num_workers", "dataloader_persistent_workers",
    "dataloader_pin_memory", "dataloader_prefetch_factor", "ddp_timeout", "debug", "disable_tqdm",
    "do_eval", "do_predict", "do_train", "hub_always_push", "hub_model_id", "hub_private_repo", "hub_revision",
    "hub_strategy", "hub_token", "keep_checkpoints", "log_completions", "log_completions_hub_repo", "log_level",
    "log_level_replica", "log_on_each_node", "log_unique_prompts", "logging_dir", "logging_first_step",
    "logging_nan_inf_filter", "logging_steps", "logging_strategy", "num_completions_to_print", "order", "output_dir",
    "project", "push_to_hub", "report_to", "resume_from_checkpoint", "run_name", "save_on_each_node",
    "save_only_model", "save_steps", "save_strategy", "save_total_limit", "skip_memory_metrics",
    "stage_overrides", "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id",
    "vllm_enable_sleep_mode", "vllm_gpu_memory_utilization", "vllm_group_port", "vllm_server_base_url",
    "vllm_server_host", "vllm_server_port", "vllm_server_timeout",
}  # fmt: skip

_HOLDS_A_RUN = (
    "this folder holds a run. Pass resume_from_checkpoint=True (on the command line --resume) to continue it, or "
    "choose another output_dir"
)
# Generation batches in a row without a single reward, after which a run stops: one prompt that no reward applies to
# may fill a batch.
_UNREWARDED_BATCHES = 3
_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")


class SequentialGRPOTrainer(GRPOTrainer):
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
        if os.path.exists(args.output_dir) and not os.path.isdir(args.output_dir):
            raise ValueError(f"output_dir: expected a folder, found the file {args.output_dir}")
        if not domains:
            raise ValueError("domains: expected at least one Domain, found none")
        self._base_model = str(model) if isinstance(model, str) and "@" in model else None  # a revision of the Hub
        model = str(local_folder(model)) if self._base_model else model
        self.domains = {domain.name: domain for domain in domains}
        if len(self.domains) != len(domains):
            raise ValueError(f"domains: expected unique names, found {[domain.name for domain in domains]}")

        trainable = [name for name, domain in self.domains.items() if domain.train_dataset is not None]
        for name in args.order or []:
            if name in self.domains and name not in trainable:
                raise ValueError(f"order: domain {name!r} has no train_dataset")
        self.schedule = build_schedule(trainable, args.order, args.stage_overrides, STAGE_OPTIONS)
        for stage in self.schedule:
            if not self.domains[stage.domain].reward_funcs:
                raise ValueError(f"domain {stage.domain!r}: expected reward functions to train on, found none")

        if kwargs.get("rollout_func") is None:  # it may hand more to the rewards than the columns
            for domain in domains:
                check_columns(domain)
        for domain in domains:
            models = domain.metric is None and any(isinstance(r, (str, nn.Module)) for r in domain.reward_funcs)
            if models and domain.eval_dataset is not None:
                raise ValueError(
                    f"domain {domain.name!r}: a reward model cannot score completions outside training, set `metric`"
                )

        # The union of all rewards is registered once: TRL prepares reward models and its event loop at construction,
        # and a batch may then mix domains. Rows are matched to rewards by their `domain` column.
        rewards = [(domain.name, reward) for domain in domains for reward in domain.reward_funcs]
        args.reward_weights = [weight for domain in domains for weight in domain.reward_weights]
        self._reward_domains = [name for name, _ in rewards]
        for stage in self.schedule:
            settings = args.stage_settings(stage.overrides, f"stage_overrides[{stage.domain!r}]")
            domain = self.domains[stage.domain]
            evaluated = settings.get("eval_strategy", args.eval_strategy) != "no"
            if (evaluated or args.eval_on_start) and domain.eval_dataset is None:
                option = "eval_strategy" if evaluated else "eval_on_start"
                raise ValueError(f"{option}: expected an eval_dataset of domain {domain.name!r}, found none")
            prompts = settings.get("generation_batch_size", args.generation_batch_size) // settings.get(
                "num_generations", args.num_generations
            )
            if isinstance(domain.train_dataset, Dataset) and len(domain.train_dataset) < prompts:
                raise ValueError(
                    f"domain {domain.name!r}, train_dataset: expected at least {prompts} prompts, the number in one "
                    f"generation batch, found {len(domain.train_dataset)}"
                )
        if args.kl_reference == "stage" and args.adapter_per_stage:
            raise ValueError(
                "kl_reference: 'stage' is not supported with adapter_per_stage, TRL measures from a single adapter or "
                "from none"
            )
        if args.use_vllm and not is_vllm_available():
            raise ValueError(
                "use_vllm: expected vLLM, which is not installed: pip install 'trl-interfere[vllm]', or leave it out"
            )
        first = self.domains[self.schedule[0].domain]
        self._stage: tuple[int, Stage] | None = None  # position and stage that is being trained
        self._unfinished = False  # whether a stage was left with weights that no record stands for
        self._epochs_done = 0
        self._rewarded, self._unrewarded = False, 0
        if peft_config is not None:
            set_seed(args.seed)  # for the adapter's initial values
        super().__init__(
            model=model,
            reward_funcs=[mask_reward(reward, name, len(domains) > 1) for name, reward in rewards],
            args=args,
            train_dataset=first.train_dataset,
            eval_dataset=first.eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            peft_config=peft_config,
            **kwargs,
        )
        args.reward_weights = None
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.use_vllm and is_peft_model(self.model) and not sharded:
            # TRL adds the adapter to the weights and takes it away again, which rounds them a little each time.
            self.vllm_generation._iter_named_params = partial(merged_parameters, self.model)
        if any(isinstance(self.domains[stage.domain].train_dataset, IterableDataset) for stage in self.schedule):
            self.accelerator.dataloader_config.dispatch_batches = False  # TRL looks at the first dataset only
        scaler = self.accelerator.scaler
        self._scaler_state = None if scaler is None else copy.deepcopy(scaler.state_dict())
        if getattr(self.processing_class, "chat_template", None) is None:
            self._check_plain_prompts()
        if args.adapter_per_stage:
            check_stage_adapters(self.model)
        if args.kl_reference == "stage" and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("kl_reference: 'stage' is not supported with FSDP or DeepSpeed")
        self.run = Run.new(args.output_dir, self._identity(), args.run_name, self._about())
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
                if isinstance(dataset, Dataset) and is_conversational({"prompt": dataset[0]["prompt"]}):
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
            if record.folder is not None:
                path = self.run.folder / record.folder / "log_history.json"
                entries += json.loads(path.read_text(encoding="utf-8"))
            entries.append({"step": record.steps, **_score_logs(record)})
        return entries + (self.state.log_history if self._stage is not None else [])

    def train(
        self, resume_from_checkpoint: bool | None = None, max_stages: int | None = None, **kwargs
    ) -> TrainOutput:
        """
        Run all stages that are not finished.

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
                "the manifest in output_dir decides where a run continues"
            )
        with self.run.lock() if self.accelerator.is_main_process else contextlib.nullcontext():
            return self._train_stages(bool(resume_from_checkpoint), max_stages, **kwargs)

    def _train_stages(self, resume: bool, max_stages: int | None, **kwargs) -> TrainOutput:
        if self.args.push_to_hub:
            self._pusher()  # refuses a run that nothing would publish
        self._open_run(resume)
        for callback in self._stage_callbacks():
            callback.on_run_begin(self.args, self.run)
        output = TrainOutput(0, 0.0, {})
        if self.run.current is not None:
            self._score_stage()
        elif not self.run.stages:
            self._finish_stage(Stage(domain=None, kind="base"), steps=0, seconds=0.0)
        ran = 0
        while ran != max_stages and (stage := self.next_stage()) is not None:
            output = self._run_stage(stage, **kwargs)
            ran += 1
        if self.run.stages and self.next_stage() is None:
            for callback in self._stage_callbacks():
                callback.on_run_end(self.args, self.run)
            self.accelerator.wait_for_everyone()
        return output

    def evaluate(self, eval_dataset=None, **kwargs) -> dict[str, float]:
        """
        Evaluate the rewards of a domain, as [`~transformers.Trainer.evaluate`] does.

        Args:
            eval_dataset (`str` or [`~datasets.Dataset`], *optional*):
                Name of a domain, or a dataset with the column `domain`. Defaults to the domain that is being trained,
                or was trained last.
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
        return super().evaluate(eval_dataset, **kwargs)

    def sync_weights(self) -> None:
        """
        Hand the present weights to the vLLM engine with the next generation.

        Optimizer steps, stages and resumes do so by themselves. Call it after changing `trainer.model` in any other
        way, such as by a [`RouteRollback`], and before [`~SequentialGRPOTrainer.evaluate`]: TRL takes weights for the
        same while the step is the same. Without vLLM there is nothing to do.
        """
        self._last_loaded_step = -1

    def next_stage(self) -> Stage | None:
        """
        What the run does next, derived from the finished stages alone.

        Returns:
            [`Stage`] or `None`: A stage that a [`StageCallback`] asks for, with the `stage_overrides` of its domain
            beneath its own, else the next one of the schedule, else nothing.
        """
        trained = sum(record.kind == "train" for record in self.run.stages)
        for callback in self._stage_callbacks():
            matrix, last = self.score_matrix, trained == len(self.schedule)
            stage = callback.request_stage(self.run.stages, matrix, schedule_finished=last)
            if stage is not None:
                build_schedule(self.domains, [stage.domain], {stage.domain: stage.overrides}, STAGE_OPTIONS)
                own = (self.args.stage_overrides or {}).get(stage.domain, {})
                return replace(stage, overrides={**own, **stage.overrides})
        return self.schedule[trained] if trained < len(self.schedule) else None

    def _run_stage(self, stage: Stage, **kwargs) -> TrainOutput:
        index = len(self.run.stages)
        for callback in self._stage_callbacks():
            callback.on_stage_begin(index, stage)
        name = stage_name(index, stage.kind, stage.domain)
        folder = self.run.folder / "checkpoints" / name
        with self._stage_args(stage, folder, self._stage_seed(index)):
            self._reset()
            self.train_dataset = self.domains[stage.domain].train_dataset
            self.eval_dataset = self.domains[stage.domain].eval_dataset
            checkpoint = self._from_main(last_whole_checkpoint(folder))
            self.args.eval_on_start &= checkpoint is None  # else it was evaluated before
            if self._unfinished:
                self._restore_stage_start()
            self._unfinished = True
            self._begin_adapter(index, name)
            self._epochs_done = 0 if checkpoint is None else epochs_done(checkpoint)
            # As TRL does at construction: processes that share a group of completions must not sample the same ones.
            set_seed(self.args.seed, device_specific=True)
            self._rewarded, self._unrewarded = checkpoint is not None, 0
            self._stage = index, stage
            start = time.perf_counter()
            try:
                output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
                if self._unrewarded and not self._rewarded:
                    self._raise_unrewarded()
            finally:
                self._stage = None
            if output.global_step == 0:
                raise ValueError(
                    f"stage {name}: no step could be made, since domain {stage.domain!r} has too few prompts for one "
                    f"generation batch ({self.args.generation_batch_size // self.num_generations})"
                )
            seconds = time.perf_counter() - start
        self._finish_stage(stage, steps=output.global_step, seconds=seconds)
        return output

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
        folders = [record.folder for record in self.run.stages if record.folder is not None]
        if not folders or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                f"{self.run.folder}: a stage was left in its middle and its start is not in memory; "
                "build a new trainer and call train(resume_from_checkpoint=True)"
            )
        self._load_stage(self.run.folder / folders[-1])

    def _load_stage(self, folder: Path) -> None:
        # A stage folder holds plain weights and no FSDP checkpoint; nothing is sharded before the first stage.
        sharded = self.is_fsdp_enabled
        try:
            if self.args.adapter_per_stage:
                load_stage_adapters(self.accelerator.unwrap_model(self.model), folder)
            else:
                self.is_fsdp_enabled = False
                self._load_from_checkpoint(str(folder))
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{folder}: the weights of this stage cannot be read ({error})") from error
        finally:
            self.is_fsdp_enabled = sharded

    def _finish_stage(self, stage: Stage, steps: int, seconds: float) -> None:
        index = len(self.run.stages)
        folder = None if stage.kind == "base" else Path("stages") / stage_name(index, stage.kind, stage.domain)
        if folder is not None:
            self._save_stage(self.run.folder / folder)
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
        if self.accelerator.is_main_process:
            with _writing(self.run.path):
                self.run.save()
        self._score_stage()

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
                    result = self.scorer.score(model, domain, domain.eval_dataset, self.accelerator)
                except ValueError as error:
                    raise ValueError(f"stage {record.name}, scores after step {record.steps}, {error}") from error
                entry = None
                if self.accelerator.is_main_process:
                    with _writing(self.run.folder / "scores" / record.name):
                        file = self.run.write_scores(
                            record.name,
                            domain.name,
                            result.values,
                            result.completions,
                            domain.eval_dataset["prompt"][:],
                        )
                        entry = {**score(result.values).to_dict(), "file": file}
                record.scores[domain.name] = self._from_main(entry)  # callbacks must decide alike in every process
                if self.accelerator.is_main_process:
                    with _writing(self.run.path):
                        self.run.save()
        if self.accelerator.is_main_process:
            with _writing(self.run.path):
                self.run.append(record)
        else:
            self.run.stages.append(record)
            self.run.current = None
        self.accelerator.wait_for_everyone()
        logs = {**_score_logs(record), "run_step": self._steps_before()}
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)
        for callback in self._stage_callbacks():
            callback.on_stage_end(record, self.score_matrix)
        self._remove_checkpoints(record)

    def _remove_checkpoints(self, record: StageRecord) -> None:
        """Remove what a finished stage no longer needs; its completions move to its folder."""
        if self.args.keep_checkpoints or not self.accelerator.is_main_process:
            return
        checkpoints = self.run.folder / "checkpoints" / record.name
        if record.folder is not None and (checkpoints / "completions").exists():
            os.replace(checkpoints / "completions", self.run.folder / record.folder / "completions")
        shutil.rmtree(checkpoints, ignore_errors=True)

    def _save_stage(self, folder: Path) -> None:
        with _writing(folder):
            self._write_stage(folder)

    def _write_stage(self, folder: Path) -> None:
        partial = folder.with_name(f".{folder.name}.partial")
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.save_model(str(partial), _internal_call=True)  # it is pushed once it is finished
        if self.args.adapter_per_stage and self.args.should_save:
            model = self.accelerator.unwrap_model(self.model)
            for path in [path for path in partial.iterdir() if path.name in model.peft_config]:
                shutil.rmtree(path)  # as PEFT lays out several adapters
            save_stage_adapters(model, partial)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle
            shutil.rmtree(partial / "ref", ignore_errors=True)  # the adapter of the KL reference
            log = json.dumps(self.state.log_history, indent=1)
            (partial / "log_history.json").write_text(log + "\n", encoding="utf-8")
            os.replace(partial, folder)
        self.accelerator.wait_for_everyone()

    def _from_main(self, value: Any) -> Any:
        # Processes that look at the disk while another one writes may see different things.
        return broadcast_object_list([value])[0]

    def _open_run(self, resume: bool) -> None:
        exists = self._from_main(self.run.exists())
        if self.run.stages:  # a second train() of this object: the weights are live
            if not resume:
                raise ValueError(f"{self.run.path}: {_HOLDS_A_RUN}")
        elif exists:
            if not resume:
                raise ValueError(f"{self.run.path}: {_HOLDS_A_RUN}")
            self.run.resume()
            self._check_records()
            folders = [record.folder for record in self.run.records if record.folder is not None]
            if folders:
                self._load_stage(self.run.folder / folders[-1])
            for record in self.run.stages:  # a process may have been killed just before it did
                self._remove_checkpoints(record)
        elif self.accelerator.is_main_process:
            self.run.save()
        # transformers ends the run of trackio with each `train()`, and finds it again by its name alone.
        self.args.run_name = self.run.run_name
        self.accelerator.wait_for_everyone()

    def _check_records(self) -> None:
        """Refuse a manifest whose stages are not those of its schedule, which only an edit can bring about."""
        schedule = iter(self.schedule)
        for index, record in enumerate(self.run.records):
            expected = StageRecord(**{**vars(record), "index": index})
            if index == 0:
                expected.kind, expected.domain = "base", None
            elif record.kind != "refresh":
                stage = next(schedule, None)
                expected.kind, expected.domain = "train", stage and stage.domain
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

    def _identity(self) -> dict[str, Any]:
        model_id = self._base_model or get_config_model_id(self.model.config)
        names = {field.name for field in fields(self.args)} - _HARMLESS_OPTIONS
        config = {name: value for name, value in self.args.to_dict().items() if name in names}
        if is_peft_model(self.model):
            adapters = {name: config.to_dict() for name, config in self.model.peft_config.items()}
            config["peft"] = json.loads(
                json.dumps(adapters, default=lambda v: sorted(v) if isinstance(v, set) else str(v))
            )
        return {
            "base_model": Path(model_id).name if os.path.isdir(model_id) else model_id,
            "schedule": [stage.to_dict() for stage in self.schedule],
            "domains": {
                domain.name: {
                    "train": _digest(domain.train_dataset),
                    "eval": _digest(domain.eval_dataset),
                    "rewards": [reward_name(reward) for reward in domain.reward_funcs],
                    "reward_weights": domain.reward_weights,
                }
                for domain in self.domains.values()
            },
            "config": json.loads(json.dumps(config, default=str)),
        }

    def _about(self) -> dict[str, Any]:
        device = self.accelerator.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"
        benchmarks = {domain.name: domain.benchmark for domain in self.domains.values() if domain.benchmark}
        return {
            "hardware": {"device": name, "processes": self.accelerator.num_processes},
            **({"benchmarks": benchmarks} if benchmarks else {}),
        }

    def _steps_before(self) -> int:
        return sum(record.steps for record in self.run.stages)

    def _stage_seed(self, index: int) -> int:
        return self.args.seed + max(index - 1, 0)

    @contextlib.contextmanager
    def _stage_args(self, stage: Stage, folder: Path, seed: int) -> Iterator[None]:
        settings = {"output_dir": str(folder), "seed": seed, **self.args.stage_settings(stage.overrides)}
        if isinstance(self.domains[stage.domain].train_dataset, IterableDataset):
            # Several workers would tear groups of completions apart; TRL looks at the first dataset only.
            settings.update(
                dataloader_num_workers=0, dataloader_persistent_workers=False, dataloader_prefetch_factor=None
            )
        settings["eval_on_start"] = self.args.eval_on_start
        before = {name: getattr(self.args, name) for name in settings}
        self._set_args(settings)
        if self.log_completions and self.accelerator.is_main_process:
            os.makedirs(folder / "completions", exist_ok=True)
        try:
            yield
        finally:
            self._set_args(before)

    def _set_args(self, settings: dict[str, Any]) -> None:
        for name, value in settings.items():
            setattr(self.args, name, value)
        # What TRL copied out of its configuration when it was built.
        self._train_batch_size = self.args.train_batch_size
        self.num_generations = self.args.num_generations
        self.num_generations_eval = self.args.num_generations_eval or self.args.num_generations
        self.num_iterations = self.args.num_iterations
        self.epsilon_low = self.args.epsilon
        self.epsilon_high = self.args.epsilon if self.args.epsilon_high is None else self.args.epsilon_high
        self.loss_type = self.args.loss_type
        self.scale_rewards = self.args.scale_rewards
        if "max_completion_length" in settings:
            self.max_completion_length = self.args.max_completion_length
            if self.use_vllm:
                self.vllm_generation.max_completion_length = self.max_completion_length
            else:
                self.generation_kwargs["max_new_tokens"] = self.max_completion_length
                self.generation_config.max_new_tokens = self.max_completion_length

    def _reset(self) -> None:
        # What TRL and transformers carry from one `train()` to the next.
        self.optimizer = self.callback_handler.optimizer = None
        self.lr_scheduler = self.callback_handler.lr_scheduler = None
        if self.accelerator.is_fsdp2:
            # Scoring leaves the weights of the root gathered: an optimizer built on those would not train them.
            for module in self.model.modules():
                if hasattr(module, "reshard"):
                    module.reshard()
        self._step = 0
        self._buffered_inputs = None
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        size = self.args.generation_batch_size
        for name, values in self._logs.items():
            self._logs[name] = (
                deque(maxlen=size) if isinstance(values, deque) else defaultdict(lambda: deque(maxlen=size))
            )
        self._pending_metrics.clear()
        self._pending_extra_logs.clear()
        self._eval_dataloaders = {}
        self.sync_weights()
        if self._scaler_state is not None:
            self.accelerator.scaler.load_state_dict(self._scaler_state)
        self._current_train_step_time = 0.0
        self.entropy_coef = self.args.entropy_coef
        self._last_world_entropy = float("inf")
        self._entropy_window_stats = None

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        try:
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        except RewardError as error:
            raise ValueError(f"{self._where()}, {error}") from error
        if any(isinstance(reward, nn.Module) for reward in self.reward_funcs):  # these cannot be masked by wrapping
            rows = gather_object([row[DOMAIN_COLUMN] for row in inputs])
            for column, name in enumerate(self._reward_domains):
                rewards[[row != name for row in rows], column] = torch.nan
                own = rewards[[row == name for row in rows], column]
                if isinstance(self.reward_funcs[column], nn.Module) and not own.isfinite().all():
                    raise ValueError(
                        f"{self._where()}, domain {name!r}: reward model {self.reward_func_names[column]!r} returned "
                        f"{own[~own.isfinite()][0].item()}, expected finite numbers"
                    )
        if self._stage is not None and self.model.training:
            self._unrewarded = self._unrewarded + 1 if rewards.isnan().all() else 0
            self._rewarded = self._rewarded or self._unrewarded == 0
            if self._unrewarded == _UNREWARDED_BATCHES:
                self._raise_unrewarded()
        return rewards

    def _where(self) -> str:
        if self._stage is None:
            return "evaluation"
        index, stage = self._stage
        name = f"stage {stage_name(index, stage.kind, stage.domain)}"
        if self.model.training:
            return f"{name}, step {self.state.global_step + 1}"
        return f"{name}, evaluation after step {self.state.global_step}"

    def _raise_unrewarded(self) -> None:
        domain = self.domains[self._stage[1].domain]
        raise ValueError(
            f"{self._where()}, domain {domain.name!r}: expected a reward for some completions, found None from all "
            f"reward functions {[reward_name(reward) for reward in domain.reward_funcs]} for all completions of "
            f"{self._unrewarded} generation batches in a row"
        )

    def _generate_and_score_completions(self, inputs):
        outputs = super()._generate_and_score_completions(inputs)
        if self.args.adapter_per_stage:
            freeze_earlier_adapters(self.accelerator.unwrap_model(self.model))
        return outputs

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        if sampler.shuffle:
            # TRL's sampler draws a new order for each pass from one generator, which a resume begins anew.
            for _ in range(self._epochs_done):
                torch.randperm(sampler.num_samples, generator=sampler.generator)
        return sampler

    def _run_epoch(self, **kwargs):
        checkpoint = kwargs["resume_from_checkpoint"]
        control = self.state.stateful_callbacks.get("TrainerControl", {}).get("args", {})
        ended = self.state.global_step >= self.state.max_steps or control.get("should_training_stop")
        if checkpoint is not None and ended:
            # transformers would make one more step from the checkpoint at the end of a stage.
            self._load_rng_state(checkpoint)
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.args.adapter_per_stage:
            activate_stage_adapters(self.accelerator.unwrap_model(self.model))

    def _save_checkpoint(self, model, trial):
        with _writing(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(model, trial)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Nothing is made on the Hub before there is something to push."""

    def create_model_card(self, model_name=None, dataset_name=None, tags=None) -> None:
        """TRL's card knows one data set and one checkpoint; [`HubCallback`] writes that of the run."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """[`HubCallback`] does this: transformers would push the state of the optimizer, which is a pickle."""

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

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if DOMAIN_COLUMN not in self._signature_columns:
            self._signature_columns.append(DOMAIN_COLUMN)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        save_resume_state(self, output_dir)
        # The main process writes trainer_state.json next, which must stand for the files of every process.
        self.accelerator.wait_for_everyone()

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            load_resume_state(self, checkpoint)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Rewards of other domains have no value in this stage.
        for metrics in self._metrics.values():
            for name in [name for name in metrics if name.startswith("rewards/")]:
                metrics[name] = [value for value in metrics[name] if value == value]
                if not metrics[name]:
                    del metrics[name]
        metrics = self._metrics["train"]
        if self._stage is not None and "reward" in metrics:
            metrics[f"{self._stage[1].domain}/reward"] = list(metrics["reward"])
        if self._stage is not None:
            logs["stage"] = self._stage[0]
            logs["run_step"] = self._steps_before() + self.state.global_step
        super().log(logs, start_time)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """A failure to write, whatever library met it, as one message that names the place."""
    try:
        yield
    except Exception as error:
        signs = ("No space left", "os error", "PytorchStreamWriter", "inline_container")
        if not isinstance(error, (OSError, SafetensorError)) and not any(sign in str(error) for sign in signs):
            raise
        raise OSError(
            f"{path}: cannot be written ({error}). What had finished before is untouched; mend it (is the disk full?) "
            "and resume the run"
        ) from error


def _score_logs(record: StageRecord) -> dict[str, float]:
    scores = {f"{domain}/score": entry["value"] for domain, entry in record.scores.items()}
    return {"stage": record.index, **scores}


def _digest(dataset: Any) -> dict[str, Any] | None:
    if not isinstance(dataset, Dataset):
        return None
    content = hashlib.sha256(json.dumps(dataset["prompt"][:], ensure_ascii=False).encode()).hexdigest()
    return {"rows": len(dataset), "prompts_sha256": content}
