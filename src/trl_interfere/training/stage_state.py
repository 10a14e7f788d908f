"""Every private name of TRL and transformers that stages touch."""

import contextlib
import copy
import json
from collections import defaultdict, deque
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from trl import GRPOTrainer

from ..domain import DOMAIN_COLUMN
from ..run import write_atomically
from .distillation import TEACHER, Distillation
from .merged_parameters import merged_parameters
from .reward_masking import RewardError, mask_reward, reward_name
from .schedule import Stage
from .stage_adapters import activate_stage_adapters, freeze_earlier_adapters
from .stage_weights import writing


# Generation batches in a row without a single reward, after which a run stops: one such prompt may fill a batch.
_UNREWARDED_BATCHES = 3


class StageTrainer(GRPOTrainer):
    """A [`~trl.GRPOTrainer`] with `train()` for one stage after the other; [`SequentialGRPOTrainer`] is its loop."""

    def __init__(self, domains: list, **kwargs):
        # The union of all rewards is registered once: TRL prepares reward models and its event loop at construction.
        rewards = [(domain.name, reward) for domain in domains for reward in domain.reward_funcs]
        self._stage: tuple[int, Stage] | None = None  # position and stage that is being trained
        self._distillation: Distillation | None = None  # of a stage that has teachers
        self._stage_name = ""
        self._unfinished = False  # whether a stage was left with weights that no record stands for
        self._epochs_done = 0
        self._rewarded, self._unrewarded = False, 0
        self._on_train_ends: list = []
        kwargs["args"].reward_weights = [weight for domain in domains for weight in domain.reward_weights] or None
        super().__init__(
            reward_funcs=[mask_reward(reward, name, len(domains) > 1) for name, reward in rewards], **kwargs
        )
        self.args.reward_weights = None
        own = [name for name, _ in rewards]
        self._reward_domains = own + [None] * (len(self.reward_funcs) - len(own))  # an environment has its own
        lists = ("reward_funcs", "reward_func_names", "reward_processing_classes")
        self._rewards = {name: getattr(self, name) for name in lists}, self.reward_weights
        self._active = self._reward_domains
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.use_vllm and is_peft_model(self.model) and not sharded:
            # TRL adds the adapter to the weights and takes it away again, which rounds them a little each time.
            self.vllm_generation._iter_named_params = partial(merged_parameters, self.model)
        if any(isinstance(domain.train_dataset, IterableDataset) for domain in domains):
            self.accelerator.dataloader_config.dispatch_batches = False  # TRL looks at the first dataset only
        scaler = self.accelerator.scaler
        self._scaler_state = None if scaler is None else copy.deepcopy(scaler.state_dict())

    def sync_weights(self) -> None:
        """
        Hand the present weights to the vLLM engine with the next generation. Call it after changing `trainer.model` by
        anything but training, such as a repair: TRL takes weights for the same while the step is the same.
        """
        self._last_loaded_step = -1

    def _reset(self) -> None:
        """What TRL and transformers carry from one `train()` to the next."""
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
        queue = partial(deque, maxlen=self.args.generation_batch_size)
        for name, values in self._logs.items():
            self._logs[name] = queue() if isinstance(values, deque) else defaultdict(queue)
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

    def _set_args(self, settings: dict[str, Any]) -> None:
        """Change the configuration, and what TRL copied out of it when it was built."""
        for name, value in settings.items():
            setattr(self.args, name, value)
        self._train_batch_size = self.args.train_batch_size
        for name in ("num_generations", "num_iterations", "loss_type", "scale_rewards"):
            setattr(self, name, getattr(self.args, name))
        self.num_generations_eval = self.args.num_generations_eval or self.args.num_generations
        self.epsilon_low = self.args.epsilon
        self.epsilon_high = self.args.epsilon if self.args.epsilon_high is None else self.args.epsilon_high
        if "max_completion_length" in settings:
            self.max_completion_length = self.args.max_completion_length
            if self.use_vllm:
                self.vllm_generation.max_completion_length = self.max_completion_length
            else:
                self.generation_kwargs["max_new_tokens"] = self.max_completion_length
                self.generation_config.max_new_tokens = self.max_completion_length

    def _train_stage(self, checkpoint: str | None, **kwargs):
        self._epochs_done = 0
        if checkpoint is not None:  # whole passes over the prompts before it
            self._epochs_done = int(TrainerState.load_from_json(f"{checkpoint}/{TRAINER_STATE_NAME}").epoch or 0)
        self._rewarded, self._unrewarded = checkpoint is not None, 0
        self._use_rewards({*self._stage[1].domains, *_domains_of(self.train_dataset), *_domains_of(self.eval_dataset)})
        output = GRPOTrainer.train(self, resume_from_checkpoint=checkpoint, **kwargs)
        if self._unrewarded and not self._rewarded:
            self._raise_unrewarded()
        return output

    def _stopped_early(self) -> bool:
        return self.control.should_training_stop and self.state.global_step < self.state.max_steps

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        if self._stopped_early() and self.args.save_strategy != "no":
            self.control.should_save = True  # where the run goes on
        return super()._maybe_log_save_evaluate(*args, **kwargs)

    def _use_rewards(self, domains: set[str]) -> None:
        """
        Let the rewards of some domains run and no others: a stage then sums what a GRPOTrainer of its domain sums.
        """
        keep = [i for i, name in enumerate(self._reward_domains) if name is None or name in domains]
        lists, weights = self._rewards
        for name, values in lists.items():
            setattr(self, name, [values[i] for i in keep])
        self.reward_weights = weights[keep]
        self._active = [self._reward_domains[i] for i in keep]

    @contextlib.contextmanager
    def _rewarded_by(self, dataset: Any):
        """Also let the rewards of the domains of a dataset run."""
        before = {name for name in self._active if name} if self._stage is not None else set()
        try:
            self._use_rewards(before | _domains_of(dataset))
            yield
        finally:
            if before:
                self._use_rewards(before)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        if self._taught() and not self._reward_weight():  # rewards may be dear, and would change nothing
            rows = self.accelerator.num_processes * len(prompts)
            return torch.full((rows, len(self.reward_funcs)), torch.nan, device=self.accelerator.device)
        try:
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        except RewardError as error:
            raise ValueError(f"{self._where()}, {error}") from error
        if any(isinstance(reward, nn.Module) for reward in self.reward_funcs):  # these cannot be masked by wrapping
            rows = gather_object([row[DOMAIN_COLUMN] for row in inputs])
            for column, name in enumerate(self._active):
                if name is None:
                    continue
                rewards[[row != name for row in rows], column] = torch.nan
                own = rewards[[row == name for row in rows], column]
                if isinstance(self.reward_funcs[column], nn.Module) and not own.isfinite().all():
                    where = f"{self._where()}, domain {name!r}: reward model {self.reward_func_names[column]!r}"
                    raise ValueError(f"{where} returned {own[~own.isfinite()][0].item()}, expected finite numbers")
        for column in self._logs["extra"]:  # a domain that is not in this batch logs nothing
            self._pending_extra_logs.setdefault(column, [None] * len(prompts))
        if self._stage is not None and self.model.training:
            self._unrewarded = self._unrewarded + 1 if rewards.isnan().all() else 0
            self._rewarded = self._rewarded or self._unrewarded == 0
            if self._unrewarded == _UNREWARDED_BATCHES:
                self._raise_unrewarded()
        return rewards

    def _log_completion_extra(self, column: str, values: list):
        # Functions of several domains may fill the same column, each the rows of its own.
        if self._pending_extra_logs.get(column):
            filled = zip(self._pending_extra_logs[column], values, strict=True)
            self._pending_extra_logs[column] = [new if old is None else old for old, new in filled]
        else:
            super()._log_completion_extra(column, values)

    def _generate_and_score_completions(self, inputs):
        outputs = super()._generate_and_score_completions(inputs)
        for values in self._logs["extra"].values():
            values.extendleft([None] * (len(self._logs["prompt"]) - len(values)))
        if self.args.adapter_per_stage:
            freeze_earlier_adapters(self.accelerator.unwrap_model(self.model))
        if self._taught():
            outputs[TEACHER] = self._distillation.mark(inputs)
        return outputs

    def _taught(self) -> bool:
        return self._distillation is not None and self.model.training

    def _reward_weight(self) -> float:
        return self._stage[1].overrides.get("reward_weight", 0.0)

    def _compute_loss(self, model, inputs):
        if not self._taught():
            return super()._compute_loss(model, inputs)
        loss, weight = self._distillation.loss(model, inputs), self._reward_weight()
        return loss + weight * super()._compute_loss(model, inputs) if weight else loss

    def _where(self) -> str:
        if self._stage is None:
            return "evaluation"
        step = self.state.global_step
        at = f"step {step + 1}" if self.model.training else f"evaluation after step {step}"
        return f"stage {self._stage_name}, {at}"

    def _raise_unrewarded(self) -> None:
        domains = self._stage[1].domains
        names = [reward_name(reward) for name in domains for reward in self.domains[name].reward_funcs]
        raise ValueError(
            f"{self._where()}, domain {', '.join(map(repr, domains))}: expected rewards, found None from all of "
            f"{names} for all completions of {self._unrewarded} generation batches in a row"
        )

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        if sampler.shuffle:
            # TRL's sampler draws a new order for each pass from one generator, which a resume begins anew.
            for _ in range(self._epochs_done):
                torch.randperm(sampler.num_samples, generator=sampler.generator)
        return sampler

    def _run_epoch(self, **kwargs):
        checkpoint = kwargs["resume_from_checkpoint"]
        if checkpoint is not None and self.state.global_step >= self.state.max_steps:
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
        with writing(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(model, trial)

    def _load_plain_weights(self, folder: Path) -> None:
        # A stage folder holds plain weights and no FSDP checkpoint; nothing is sharded before the first stage.
        sharded, self.is_fsdp_enabled = self.is_fsdp_enabled, False
        try:
            self._load_from_checkpoint(str(folder))
        finally:
            self.is_fsdp_enabled = sharded

    def init_hf_repo(self, *args, **kwargs) -> None:
        """Nothing is made on the Hub before there is something to push."""

    def create_model_card(self, *args, **kwargs) -> None:
        """TRL's card knows one data set and one checkpoint; [`HubCallback`] writes that of the run."""

    def _push_from_checkpoint(self, *args) -> None:
        """[`HubCallback`] does this: transformers would push the state of the optimizer, which is a pickle."""

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if DOMAIN_COLUMN not in self._signature_columns:
            self._signature_columns.append(DOMAIN_COLUMN)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        self._save_resume_state(Path(output_dir))
        # The main process writes trainer_state.json next, which must stand for the files of every process.
        self.accelerator.wait_for_everyone()

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            self._load_resume_state(Path(checkpoint))

    def _save_resume_state(self, folder: Path) -> None:
        """What [`~trl.GRPOTrainer`] keeps in memory between two optimizer steps, in files of each process."""
        rank = self.args.process_index
        folder.mkdir(parents=True, exist_ok=True)
        block = self.args.steps_per_generation * self.num_iterations
        buffered = self._buffered_inputs if self._step % block else None
        tensors, values = {}, []
        for position, inputs in enumerate(buffered or []):
            values.append({key: value for key, value in inputs.items() if not isinstance(value, torch.Tensor)})
            for key, value in inputs.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{position}/{key}"] = value.detach().cpu().clone().contiguous()
        if tensors:
            save_file(tensors, folder / f"generation_buffer_{rank}.safetensors")
        state = {
            "step": self._step,
            "buffer": values if tensors else None,
            "metrics": {
                mode: {name: [None if v is None else float(v) for v in series] for name, series in metrics.items()}
                for mode, metrics in self._metrics.items()
            },
            "loss": [self._tr_loss.item(), self._total_loss_scalar, self._globalstep_last_logged],
            "entropy": [self.entropy_coef, self._last_world_entropy],
            "overrides": self._stage[1].overrides,
        }
        write_atomically(folder / f"resume_state_{rank}.json", json.dumps(state) + "\n")

    def _load_resume_state(self, folder: Path) -> None:
        rank, world = self.args.process_index, self.args.world_size
        path = folder / f"resume_state_{rank}.json"
        if (folder / f"resume_state_{world}.json").exists() or not path.exists():
            raise ValueError(
                f"{path}: expected a checkpoint of {world} processes, as many as now, found another number"
            )
        state = json.loads(path.read_text(encoding="utf-8"))
        # What a callback asks for is in no other file before the stage ends.
        wanted, found = json.loads(json.dumps(self._stage[1].overrides)), state.get("overrides")
        if found is not None and wanted != found:
            names = [name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name)]
            changes = ", ".join(
                f"{name} {found.get(name, 'unset')}, found {wanted.get(name, 'unset')}" for name in names
            )
            raise ValueError(f"{folder}: expected the settings that the stage was stopped with, {changes}")
        device = self.accelerator.device
        if state["buffer"] is not None:
            self._buffered_inputs = state["buffer"]
            for name, tensor in load_file(folder / f"generation_buffer_{rank}.safetensors").items():
                position, key = name.split("/", 1)
                self._buffered_inputs[int(position)][key] = tensor.to(device)
        self._step = state["step"]
        self._metrics = {mode: defaultdict(list, metrics) for mode, metrics in state["metrics"].items()}
        loss, self._total_loss_scalar, self._globalstep_last_logged = state["loss"]
        self._tr_loss = torch.tensor(loss, device=device)
        self.entropy_coef, self._last_world_entropy = state["entropy"]

    def _run_step(self) -> int:
        """Position on the axis of the whole run."""
        before = sum(record.steps for record in self.run.stages)
        return before if self._stage is None else before + self.state.global_step

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Rewards of domains that were in no batch have no value, nor has any where teachers alone train.
        for metrics in self._metrics.values():
            for name in [name for name in metrics if name.startswith("reward")]:
                metrics[name] = [value for value in metrics[name] if value == value]
                if not metrics[name]:
                    del metrics[name]
        metrics = self._metrics["train"]
        if "reward" not in metrics:
            metrics.pop("frac_reward_zero_std", None)
        if self._stage is not None:
            index, stage = self._stage
            logs |= {"stage": index, "run_step": self._run_step()}
            if "reward" in metrics and stage.domain is not None:
                metrics[f"{stage.domain}/reward"] = list(metrics["reward"])
        super().log(logs, start_time)

    def _join_trackers(self) -> None:
        """One folder, one axis of steps and one end for what `report_to` names, not one for each stage."""
        kinds = tuple(get_reporting_integration_callbacks(self.args.report_to))
        for callback in self.callback_handler.callbacks:
            if type(callback) not in kinds or "on_log" in vars(callback):
                continue
            if getattr(callback, "logging_dir", "") is None:
                callback.logging_dir = str(self.run.folder / "runs")

            def on_run_log(args, state, control, on_log=callback.on_log, **kwargs):
                return on_log(args, replace(state, global_step=self._run_step()), control, **kwargs)

            self._on_train_ends.append(callback.on_train_end)
            callback.on_log, callback.on_train_end = on_run_log, lambda *args, **kwargs: None

    def _end_trackers(self) -> None:
        for on_train_end in self._on_train_ends:
            on_train_end(self.args, self.state, self.control, model=self.model, processing_class=self.processing_class)


def _domains_of(dataset: Any) -> set[str]:
    known = isinstance(dataset, Dataset) and DOMAIN_COLUMN in dataset.column_names
    return set(dataset.unique(DOMAIN_COLUMN)) if known else set()
