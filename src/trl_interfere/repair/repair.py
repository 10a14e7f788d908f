"""Repair: a change of the weights of one checkpoint, as a LoRA adapter."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..checkpoint import Checkpoint, published_name
from ..models import adapter_base, load_model, local_folder
from ..revision import split_revision
from ..run import read_json, write_atomically
from .block_stream import skeleton
from .layers import is_experts


REPAIR_NAME = "repair.json"
SCHEMA_VERSION = 1
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


CARD = """# Repair of `{base}`

A LoRA adapter that gives `{base}` back what later stages of its training took, without training. How it was
made, and what it did, stands in `repair.json`.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{repo}")
```
"""


class Repair:
    """
    A change of weights of one checkpoint. On disk it is a PEFT LoRA adapter over that checkpoint, and `repair.json`
    beside it, which says how it was made, of which checkpoints, and what it did. Not to load it undoes it.

    The repair of a checkpoint that is an adapter itself holds both, one beside the other in the rank, over the same
    base model.

    Args:
        factors (`dict[str, tuple[torch.Tensor, torch.Tensor]]`):
            For each module or tensor of experts `B` of shape `(outputs, r)` and `A` of shape `(r, inputs)`; for
            experts with a first axis of their number.
        checkpoint ([`~trl_interfere.checkpoint.Checkpoint`]):
            The checkpoint that is repaired.
        record (`dict`):
            Content of `repair.json`.
    """

    def __init__(
        self, factors: Factors, checkpoint: Checkpoint | None, record: dict[str, Any], folder: Path | None = None
    ):
        self.factors, self.checkpoint, self.folder = factors, checkpoint, folder
        self.record = {"schema_version": SCHEMA_VERSION, **record}
        if checkpoint is not None and checkpoint.adapter is not None:
            self.factors = _beside(checkpoint, factors)

    @classmethod
    def from_pretrained(cls, name: str | Path, revision: str | None = None) -> "Repair":
        """
        Read a repair.

        Args:
            name (`str` or `pathlib.Path`):
                Folder or Hub id.
            revision (`str`, *optional*):
                Branch, tag or commit of a Hub id.

        Returns:
            [`Repair`]: The repair.

        Raises:
            `ValueError`: If there is no repair, or one of another schema version.
        """
        folder = local_folder(name, revision)
        if not (folder / REPAIR_NAME).is_file():
            raise ValueError(f"{name}: expected a repair ({REPAIR_NAME} beside an adapter), found none")
        return cls({}, None, read_json(folder / REPAIR_NAME, SCHEMA_VERSION), folder)

    def apply(self, model: PreTrainedModel) -> PeftModel:
        """
        Load the repair over a model.

        Args:
            model ([`~transformers.PreTrainedModel`]):
                The checkpoint that is repaired; of one that is an adapter, its base model. It is changed in place.

        Returns:
            [`~peft.PeftModel`]: The healed model.
        """
        if self.folder is not None:
            return PeftModel.from_pretrained(model, str(self.folder)).eval()
        return self._adapted(model).eval()

    def merge(self, model: PreTrainedModel | None = None) -> PreTrainedModel:
        """
        The healed model in whole weights.

        Args:
            model ([`~transformers.PreTrainedModel`], *optional*):
                As for [`~Repair.apply`]. Defaults to loading it.

        Returns:
            [`~transformers.PreTrainedModel`]: The model.
        """
        if model is None:
            model = load_model(*self._base()) if self.checkpoint is None else load_model(self.checkpoint.folder)
        return self.apply(model).merge_and_unload()

    @property
    def base(self) -> str:
        """Model that the adapter stands on."""
        return self._base()[0]

    def _base(self) -> tuple[str, str | None]:
        if self.checkpoint is None:
            return adapter_base(self.folder)
        if self.checkpoint.adapter is None:
            return split_revision(self.checkpoint.name)
        config = self.checkpoint.adapter.config
        return config.base_model_name_or_path or str(self.checkpoint.folder), config.revision

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs) -> None:
        """
        Write the adapter and `repair.json`.

        Args:
            save_directory (`str` or `pathlib.Path`):
                Folder.
            push_to_hub (`bool`, *optional*, defaults to `False`):
                Whether to push it too, under `repo_id` or the name of the folder.
            **kwargs:
                Arguments of [`~Repair.push_to_hub`].
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        if self.folder is None:
            (folder / REPAIR_NAME).unlink(missing_ok=True)
            model = skeleton(self.checkpoint)
            model.name_or_path = self.base
            self._adapted(model).save_pretrained(str(folder), save_embedding_layers=False)
            (folder / "README.md").unlink()  # PEFT's, of which all is still to be filled in
        elif self.folder.resolve() != folder.resolve():
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                (folder / name).write_bytes((self.folder / name).read_bytes())
        # Last, so that a folder with it is whole.
        write_atomically(folder / REPAIR_NAME, json.dumps(self.record, indent=2) + "\n")
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload repair",
        revision: str | None = None,
    ) -> str:
        """
        Push the repair to the Hub as an adapter.

        Args:
            repo_id (`str`):
                `user/name`.
            private (`bool`, *optional*):
                Whether a new repository is private.
            token (`str` or `bool`, *optional*):
                Token of the Hub.
            commit_message (`str`, *optional*, defaults to `"Upload repair"`):
                Message.
            revision (`str`, *optional*):
                Branch.

        Returns:
            `str`: Address of the commit.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            config = Path(folder) / "adapter_config.json"
            base = published_name(self.base)
            config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": base}))
            place = {} if Path(self.base).is_dir() else {"base_model": self.base}
            data = ModelCardData(library_name="peft", tags=["trl-interfere", "repair"], **place)
            text = f"---\n{data.to_yaml()}\n---\n\n" + CARD.format(repo=repo_id, base=base)
            ModelCard(text).save(Path(folder) / "README.md")
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=commit_message, revision=revision
            )
        return commit.commit_url

    def _adapted(self, model: PreTrainedModel) -> PeftModel:
        # PEFT takes a dense MLP beside experts for experts in their older form, unless it is named by its weights.
        dense = ("gate_proj", "up_proj", "down_proj") if any(map(is_experts, model.modules())) else ()
        factors = {
            f"{name}.weight" if left.ndim == 2 and name.endswith(dense) else name: (left, right)
            for name, (left, right) in self.factors.items()
        }
        modules = [name for name in self.factors if name in factors and self.factors[name][0].ndim == 2]
        ranks = {name: left.shape[-1] for name, (left, _) in factors.items()}
        most = max(ranks.values())
        smaller = {name: rank for name, rank in ranks.items() if rank != most}
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=most,
            lora_alpha=most,
            target_modules=modules or None,
            target_parameters=sorted(factors.keys() - set(modules)) or None,
            rank_pattern=smaller,
            alpha_pattern=smaller,
            fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in modules[:1]),
            init_lora_weights=False,
        )
        adapted = get_peft_model(model, config, revision=self._base()[1], low_cpu_mem_usage=True)
        for name, module in adapted.base_model.model.named_modules():
            if isinstance(module, LoraLayer) and "default" in module.lora_A:
                key = name
                if isinstance(module, ParamWrapper):
                    key = f"{name.replace('.base_layer', '')}.{module.parameter_name}"
                left, right = factors[key]
                if left.ndim == 3:  # PEFT lays the experts of A one above the other, and those of B side by side
                    left, right = left.permute(1, 2, 0).flatten(1), right.flatten(0, 1)
                place = next(module.get_base_layer().parameters())
                for layer, value in ((module.lora_A, right), (module.lora_B, left)):
                    value = value.to("cpu" if place.is_meta else place.device, torch.float32)
                    layer["default"].weight = nn.Parameter(value.contiguous())
        return adapted


def recorded(final: Checkpoint, peaks: dict[str, Checkpoint]) -> dict[str, Any]:
    """What a record says of checkpoints: where they lie, and a digest of each."""

    def entry(checkpoint: Checkpoint) -> dict[str, str]:
        return {"path": published_name(checkpoint.name), "digest": checkpoint.digest()}

    return {"final": entry(final), "peaks": {name: entry(peak) for name, peak in peaks.items()}}


def _beside(checkpoint: Checkpoint, factors: Factors) -> Factors:
    """Factors of an adapter and of its repair, one beside the other in the rank."""
    joined = dict(factors)
    for weight in checkpoint.adapter.names:
        name = weight.removesuffix(".weight")
        left, right = checkpoint.adapter.factors(weight)
        if checkpoint.adapter.config.fan_in_fan_out:
            left, right = right.T, left.T
        if name in joined:
            left, right = torch.cat([left, joined[name][0].to(left)], 1), torch.cat([right, joined[name][1].to(right)])
        joined[name] = (left, right)
    return joined
