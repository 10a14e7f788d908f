"""
On-policy distillation: the model answers prompts of its damaged domains, and the checkpoint at which each domain was
at its peak corrects every token.

    L(θ) = 1/N Σ_i Σ_t KL( π_θ(· | x_i, y_i,<t) ‖ π_d(i)(· | x_i, y_i,<t) ),    y_i ~ π_θ(· | x_i)

the reverse KL divergence over the whole vocabulary, N tokens in the step, without a gradient through the sampling
(GKD, arXiv 2306.13649). The prompts of several domains are mixed, and d(i), the domain of a prompt, says which teacher
corrects it (multi-teacher on-policy distillation, MOPD, arXiv 2606.30406).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset, interleave_datasets
from peft import PeftModel, load_peft_weights
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from ..domain import DOMAIN_COLUMN, Domain
from ..models import load_model, load_tokenizer
from ..repair.repair import Repair
from ..run import StageRecord


if TYPE_CHECKING:
    from .trainer import SequentialGRPOTrainer

TEACHER = "teacher"  # position of the domain of each completion, in a batch
Weights = dict[str, torch.Tensor]


class Distillation:
    """
    The teachers of one stage, and its loss. A teacher is no second model but weights (of a LoRA, its adapters) that
    take the place of the student's for one forward pass. Several wait in main memory, one is on the device.
    """

    def __init__(self, trainer: "SequentialGRPOTrainer", teachers: dict[str, str]):
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError("method='distill': not supported with FSDP or DeepSpeed, which shard the student")
        self.trainer, self.domains = trainer, list(teachers)
        weights = {
            name: teacher_weights(trainer, trainer.run.stage(name)) for name in dict.fromkeys(teachers.values())
        }
        self.weights = {domain: weights[name] for domain, name in teachers.items()}
        self.device = trainer.accelerator.device
        if len(weights) == 1:
            (only,) = weights.values()
            only.update({name: tensor.to(self.device) for name, tensor in only.items()})

    def mark(self, rows: list[dict[str, Any]]) -> torch.Tensor:
        """Position of the domain of each row."""
        return torch.tensor([self.domains.index(row[DOMAIN_COLUMN]) for row in rows], device=self.device)

    def loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """The loss of a batch, as a share of the loss of its step; `kl/<domain>` is logged."""
        if "pixel_values" in inputs:
            raise ValueError("method='distill': expected prompts of text, found images")
        trainer = self.trainer
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        student = self._logits(model, inputs)
        # A sum for each domain: one may be missing in the batch of one process and not in that of another.
        kind = torch.promote_types(student.dtype, torch.float32)
        sums = torch.zeros(len(self.domains), dtype=kind, device=self.device)
        counts = torch.zeros_like(sums)
        for position, domain in enumerate(self.domains):
            rows = (inputs[TEACHER] == position).nonzero().flatten()
            if len(rows):
                divergence = reverse_kl(student[rows], self._teacher(model, domain, inputs, rows), trainer.temperature)
                sums[position] = (divergence * mask[rows]).sum()
                counts[position] = mask[rows].sum()
        self._log(sums.detach(), counts)
        # As TRL normalises: by the tokens of all processes, and of one step.
        tokens = inputs["num_items_in_batch"].clamp(min=1) / trainer.accelerator.num_processes
        share = trainer.current_gradient_accumulation_steps / trainer.args.steps_per_generation
        return sums.sum() / (tokens * share)

    def _log(self, sums: torch.Tensor, counts: torch.Tensor) -> None:
        sums, counts = self.trainer.accelerator.reduce(torch.stack([sums, counts]), reduction="sum")
        for domain, total, count in zip(self.domains, sums.tolist(), counts.tolist(), strict=True):
            if count:
                self.trainer._metrics["train"][f"kl/{domain}"].append(total / count)

    def _logits(self, forward: Any, inputs: dict[str, Any], rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """Logits from which the tokens of the completions were to be drawn."""
        ids, mask = (
            torch.cat([inputs[f"prompt_{part}"][rows], inputs[f"completion_{part}"][rows]], dim=1)
            for part in ("ids", "mask")
        )
        keep = inputs["completion_ids"].size(1)
        with self.trainer.accelerator.autocast():
            output = forward(input_ids=ids, attention_mask=mask, logits_to_keep=keep + 1, use_cache=False)
        return output.logits[:, :-1]

    @torch.no_grad()
    def _teacher(self, model: torch.nn.Module, domain: str, inputs: dict, rows: torch.Tensor) -> torch.Tensor:
        model = self.trainer.accelerator.unwrap_model(model)
        weights = {name: tensor.to(self.device) for name, tensor in self.weights[domain].items()}
        training = model.training
        model.eval()  # a teacher has no dropout
        try:
            return self._logits(lambda **inputs: functional_call(model, weights, kwargs=inputs), inputs, rows)
        finally:
            model.train(training)


def reverse_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """
    KL(student ‖ teacher) of each token, in nats, from logits of shape `(batch, tokens, vocabulary)`. It is computed in
    float32 or more, one completion at a time and again in the backward pass: the logits alone lie in memory.
    """
    pairs = zip(student.split(1), teacher.split(1), strict=True)
    return torch.cat([checkpoint(_reverse_kl, *pair, temperature, use_reentrant=False) for pair in pairs])


def _reverse_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    kind = torch.promote_types(student.dtype, torch.float32)
    p, q = ((logits.to(kind) / temperature).log_softmax(-1) for logits in (student, teacher))
    return (p.exp() * (p - q)).sum(-1)


def teacher_weights(trainer: "SequentialGRPOTrainer", record: StageRecord) -> Weights:
    """Weights of a finished stage by the names that they have in the student, in main memory."""
    student = trainer.accelerator.unwrap_model(trainer.model)
    if record.kind != "heal" and trainer._tokenizer.get_vocab() != _vocabulary(trainer, record):
        raise ValueError(f"teacher {record.name}: expected the vocabulary of the model, found another one")
    if is_peft_model(student):
        folder = None if record.folder is None else Path(trainer.run.weights(record))
        found = _adapter_weights(student, folder, trainer.args.adapter_per_stage, record.name)
    else:
        whole = Repair.from_pretrained(trainer.run.weights(record)).merge() if record.kind == "heal" else None
        teacher = whole or load_model(trainer.run.weights(record), dtype=student.dtype)
        found = {name: parameter.detach() for name, parameter in teacher.named_parameters()}
    own = dict(student.named_parameters())
    for name, tensor in found.items():
        if name not in own or own[name].shape != tensor.shape:
            expected = tuple(own[name].shape) if name in own else "no such tensor"
            raise ValueError(f"teacher {record.name}: tensor {name}: expected {expected}, found {tuple(tensor.shape)}")
    return {name: tensor.to("cpu", own[name].dtype) for name, tensor in found.items()}


def _vocabulary(trainer: "SequentialGRPOTrainer", record: StageRecord) -> dict[str, int]:
    return load_tokenizer(trainer.run.weights(record), base=trainer.run.base_model).get_vocab()


def _adapter_weights(student: PeftModel, folder: Path | None, per_stage: bool, stage: str) -> Weights:
    """Weights of the active adapters at a stage; what it did not have yet adds nothing to the model."""
    found = {}
    for adapter in student.active_adapters:
        own = folder / "adapters" / adapter if folder is not None and per_stage else folder
        stored = load_peft_weights(str(own), device="cpu") if own is not None and own.is_dir() else {}
        for name, parameter in student.named_parameters():
            if f".{adapter}." not in f"{name}.":
                continue
            key = f"{name}.".replace(f".{adapter}.", ".").replace(".modules_to_save.", ".").removesuffix(".")
            if key in stored:
                found[name] = stored[key]
            elif not stored and "_B." in name:
                found[name] = torch.zeros_like(parameter)
            elif stored or "_A." not in name:
                raise ValueError(f"teacher {stage}: expected the tensor {key} of adapter {adapter!r}, found none")
    return found


def mixed(domains: list[Domain]) -> Dataset | IterableDataset:
    """Training prompts of several domains, in equal shares."""
    parts = [domain.train_dataset for domain in domains]
    return parts[0] if len(parts) == 1 else interleave_datasets(parts)
