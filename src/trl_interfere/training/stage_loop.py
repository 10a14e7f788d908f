"""The loop over the stages of a run: train, save, score, record, heal, and go on after a crash."""

import contextlib
import copy
import logging
import os
import shutil
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, is_peft_model, set_seed
from datasets import IterableDataset
from transformers.trainer_utils import TrainOutput
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import get_config_model_id

from .. import __version__
from ..evaluation.bootstrap import score
from ..repair.heal import heal_run
from ..stage_record import StageRecord, stage_name
from .callbacks import StageCallback
from .distillation import Distillation, mixed
from .resume import last_whole_checkpoint
from .schedule import Stage
from .stage_adapters import add_stage_adapter, set_reference_adapter
from .stage_state import StageTrainer
from .stage_weights import load_stage, save_stage, writing


logger = logging.getLogger(__name__)
_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")


class StageLoop(StageTrainer):
    """Runs what [`SequentialGRPOTrainer.next_stage`] names until it names nothing."""

    def _trained(self) -> int:
        return sum(record.kind == "train" for record in self.run.stages)

    def _run_stages(self, max_stages: int | None, **kwargs) -> TrainOutput:
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
                break
            ran += 1
        return output

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
            if self._unfinished:  # left in its middle: back to the weights that it starts from
                last = self.run.stages[-1]
                if last.folder is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
                    raise ValueError(f"stage {name}: its start is not in memory; to resume, build a new trainer")
                load_stage(self, last)
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
                raise ValueError(f"stage {name}: expected prompts for one generation batch, found too few for a step")
        self._finish_stage(stage, steps=output.global_step, seconds=seconds)
        return output

    def _heal(self, stage: Stage) -> None:
        """Repair what the stages before have damaged, and go on with the repaired weights."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("heal: not supported with FSDP or DeepSpeed; heal the finished run instead")
        if is_peft_model(self.model) and self._trained() < len(self.schedule):
            raise ValueError("heal: with an adapter expected at='end', since a healed adapter has another rank")
        if self.accelerator.is_main_process:
            scorer = copy.copy(self.scorer)  # in the precision of the stages
            scorer.score = self.accelerator.autocast()(self.scorer.score)
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

    def _finish_stage(self, stage: Stage, steps: int, seconds: float) -> None:
        index = len(self.run.stages)
        folder = None if stage.kind == "base" else f"stages/{stage_name(index, stage.kind, stage.domain)}"
        if folder is not None:
            with writing(self.run.folder / folder):
                save_stage(self, self.run.folder / folder)
        self._unfinished = False
        self.run.current = StageRecord(
            index=index,
            kind=stage.kind,
            domain=stage.domain,
            folder=folder,
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
        logs = {**score_logs(record), "run_step": self._run_step()}
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)
        for callback in self._stage_callbacks():
            callback.on_stage_end(record, self.score_matrix)
        self._remove_checkpoints(record)

    def _remove_checkpoints(self, record: StageRecord) -> None:
        """Remove what a finished stage no longer needs; what callbacks wrote stays."""
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
            for record in self.run.records:  # a broken file of scores is named before anything is trained
                for name in record.scores:
                    self.run.scores(record, name)
            last = self.run.records[-1] if self.run.records else None
            if last is not None and last.folder is not None:
                load_stage(self, last)
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

    def _stage_seed(self, index: int) -> int:
        return self.args.seed + max(index - 1, 0)

    @contextlib.contextmanager
    def _stage_args(self, stage: Stage, folder: Path, seed: int) -> Iterator[None]:
        settings = {"output_dir": str(folder), "seed": seed, "eval_on_start": self.args.eval_on_start}
        settings |= self.args.stage_settings(stage.settings)
        if any(isinstance(self.domains[name].train_dataset, IterableDataset) for name in stage.domains):
            # Several workers would tear groups of completions apart; TRL looks at the first dataset only.
            settings.update(
                dataloader_num_workers=0, dataloader_persistent_workers=False, dataloader_prefetch_factor=None
            )
        before = {name: getattr(self.args, name) for name in settings}
        self._set_args(settings)
        if self.accelerator.is_main_process:  # callbacks write to it
            os.makedirs(folder / "completions" if self.log_completions else folder, exist_ok=True)
        try:
            yield
        finally:
            self._set_args(before)

    def _stage_callbacks(self) -> list[StageCallback]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, StageCallback)]


def score_logs(record: StageRecord) -> dict[str, float]:
    """What is logged of the scores of a stage."""
    scores = {f"{domain}/score": entry["value"] for domain, entry in record.scores.items()}
    return {"stage": record.index, **scores}
