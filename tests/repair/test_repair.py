"""A repair as an adapter: on disk, in plain PEFT, over a LoRA run, on the Hub, in two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_models import lora
from tiny_checkpoints import ROWS, domains, fit, load, references, save
from transformers import AutoModelForCausalLM

from trl_interfere.repair.repair import Repair
from trl_interfere.repair.subspace_rollback import SubspaceRollback


IDS = torch.tensor([ROWS["math"][0]])


def add_adapter(base, folder, seed, **settings):
    torch.manual_seed(seed)
    settings = {"lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]} | settings
    return lora(AutoModelForCausalLM.from_pretrained(base), folder, **settings)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("family", ["qwen3", "phi3", "gpt2", "qwen2", "qwen3-moe", "qwen3-moe-mixed", "gpt_oss"])
def test_a_saved_repair_is_an_adapter_that_peft_loads(tmp_path, family, rank):
    folders = save(tmp_path, family)
    repair = fit(folders, rank=rank, dtype="float32")
    repair.save_pretrained(tmp_path / "repair")
    final = AutoModelForCausalLM.from_pretrained(folders["final"])
    before = final(IDS).logits
    expected = repair.merge()(IDS).logits
    plain = PeftModel.from_pretrained(final, tmp_path / "repair").eval()
    torch.testing.assert_close(plain(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain.merge_and_unload()(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    assert (expected - before).abs().max() > 0.1
    loaded = Repair.from_pretrained(tmp_path / "repair")
    assert loaded.record == repair.record and loaded.base == repair.base == str(folders["final"])
    torch.testing.assert_close(loaded.merge()(IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_weights_of_16_bits_and_in_shards(tmp_path):
    folders = save(tmp_path, "llama-wide", dtype=torch.bfloat16, shards="5KB")
    assert len(list(folders["final"].glob("model-*.safetensors"))) > 1
    repair = fit(folders, rank=4)
    whole = {name: tmp_path / "whole" / name for name in folders}
    for name, folder in folders.items():
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).save_pretrained(whole[name])
    expected = fit(whole, rank=4)
    for name, (left, right) in repair.factors.items():
        torch.testing.assert_close(left @ right, expected.factors[name][0] @ expected.factors[name][1])
    # In 16 bits the healed model is as near to the one in 32 as its last bit allows.
    coarse = fit(folders, rank=4, dtype="bfloat16").merge(load(folders["final"]))(IDS).logits
    fine, before = repair.merge(load(folders["final"]))(IDS).logits, load(folders["final"])(IDS).logits
    assert (coarse - fine).norm() < 0.2 * (fine - before).norm()


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_a_run_of_adapters_is_healed_as_its_merged_twin(tmp_path, family):
    base = save(tmp_path, family, names=("base",))["base"]
    targets = ["q_proj", "down_proj"] if family == "qwen3" else ["c_attn", "mlp.c_proj"]
    adapters = {name: tmp_path / name for name in ("final", "math", "code")}
    twins = {name: tmp_path / "twins" / name for name in adapters}
    options = {"final": {"use_rslora": True}, "math": {"r": 3}, "code": {"use_rslora": True, "lora_alpha": 2}}
    for seed, (name, folder) in enumerate(adapters.items()):
        add_adapter(base, folder, seed, target_modules=targets, **options[name]).save_pretrained(twins[name])
    repair, twin = fit(adapters, rank=4), fit(twins, rank=4)
    healed, expected = repair.merge(load(base)), twin.merge(load(twins["final"]))
    for name, value in expected.named_parameters():
        torch.testing.assert_close(healed.get_parameter(name), value, rtol=1e-6, atol=1e-6)
    repair.save_pretrained(tmp_path / "repair")
    assert Repair.from_pretrained(tmp_path / "repair").base == repair.base == str(base)
    plain = PeftModel.from_pretrained(load(base), tmp_path / "repair").merge_and_unload()
    torch.testing.assert_close(plain(IDS).logits, expected(IDS).logits, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "repair" / "adapter_config.json").read_text())
    assert config["r"] == 6 and not config["use_rslora"]  # 2 of the run and 4 of the repair
    elsewhere = base.rename(tmp_path / "elsewhere")
    moved = fit(adapters, rank=4, base=elsewhere)
    torch.testing.assert_close(moved.merge()(IDS).logits.double(), expected(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"target_parameters": ["experts.down_proj"]}]
)
def test_adapters_that_are_no_product_of_two_matrices_are_refused(tmp_path, settings):
    base = save(tmp_path, "qwen3-moe", names=("base",))["base"]
    add_adapter(base, tmp_path / "final", 0, target_modules=["q_proj"], **settings)
    with pytest.raises(ValueError, match="expected"):
        fit({name: tmp_path / "final" for name in ("final", "math")})


PARALLEL = {"qwen3": "float64", "qwen3-moe": "float32"}


def fit_all(root, **settings):
    """Fit a repair of each of two families, one reference at a time."""
    for family, dtype in PARALLEL.items():
        folders = {name: root / family / name for name in ("final", "math", "code")}
        yield fit(folders, rank=3, batch_size=1, dtype=dtype, **settings)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    for family in PARALLEL:
        save(tmp_path / family, family)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    paths = os.pathsep.join([*map(str, Path(__file__).parents[:2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    result = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    first, second = (torch.load(tmp_path / f"found-{rank}.pt") for rank in (0, 1))
    for family, expected, one, two in zip(PARALLEL, fit_all(tmp_path), first, second, strict=True):
        assert one["record"]["layers"] == two["record"]["layers"]
        for name, (left, right) in expected.factors.items():
            assert torch.equal(one["factors"][name][0], two["factors"][name][0])
            product = one["factors"][name][0] @ one["factors"][name][1]
            torch.testing.assert_close(product, left @ right, rtol=1e-5, atol=1e-6)
        for found, row in zip(one["record"]["layers"], expected.record["layers"], strict=True):
            for figure in ("tokens", "change", "output_change", "effective_dimension"):
                assert found.get(figure) == pytest.approx(row.get(figure), rel=1e-9 if family == "qwen3" else 1e-5)
        assert one["record"]["switched_tokens"] == expected.record["switched_tokens"]
    assert expected.record["switched_tokens"] > 0
    for alone, expected in zip(fit_all(tmp_path, data_parallel=True), fit_all(tmp_path), strict=True):
        assert alone.record["layers"] == expected.record["layers"]


def test_push_and_read_back(hub, tmp_path):
    folders = save(tmp_path, "qwen2", names=("final", "math"))
    repair = fit(folders, rank=2)
    repair.save_pretrained(tmp_path / "repair", push_to_hub=True, repo_id="tester/repair", private=True)
    files = hub.files("tester/repair")
    assert {"adapter_config.json", "adapter_model.safetensors", "repair.json"} <= files.keys()
    assert hub.repo("tester/repair").private
    assert not any(str(tmp_path).encode() in content for content in files.values())
    again = Repair.from_pretrained("tester/repair")
    assert again.record == repair.record
    final = AutoModelForCausalLM.from_pretrained(folders["final"])
    torch.testing.assert_close(again.merge(final)(IDS).logits, repair.merge()(IDS).logits)
    assert "resolve" not in again.push_to_hub("tester/copy", revision="main")
    assert hub.files("tester/copy")["adapter_model.safetensors"] == files["adapter_model.safetensors"]
    with pytest.raises(ValueError, match="repair.json"):
        Repair.from_pretrained(folders["final"])
    (folders["final"] / "repair.json").write_text('{"schema_version": 2}')
    with pytest.raises(ValueError, match="schema_version 1, found 2"):
        Repair.from_pretrained(folders["final"])


def test_bad_input(tmp_path):
    folders = save(tmp_path, "qwen2", names=("final", "math", "nan"))
    tensors = load_file(folders["nan"] / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"].fill_(float("nan"))
    save_file(tensors, folders["nan"] / "model.safetensors", {"format": "pt"})
    final, math, nan = folders.values()
    for arguments, message in (
        ({"peaks": {"math": save(tmp_path, "qwen3", ["other"])["other"]}}, "model_type"),
        ({"peaks": {"math": final}}, "peaks.*'math'.*equals the final checkpoint"),
        ({"peaks": {"math": nan}}, "domain 'math', .*block 0: expected finite activations"),
        ({"peaks": {}}, "peaks: expected"),
        ({"peaks": {"maths": math}}, "peaks: .*'maths'"),
        ({"weights": {"math": -1.0}}, r"weights\['math'\]"),
        ({"references": references({"math": ROWS["math"], "code": ROWS["code"]})}, "domain 'qa': expected references"),
        ({"references": None}, "final: expected the files of a tokenizer"),
        ({"rank": 0}, "rank"),
        ({"ridge": 0.0}, "ridge"),
        ({"modules": "linear"}, "modules: .*'linear'"),
        ({"modules": ["query"]}, r"modules: .*\['query'\]"),
    ):
        call = {"peaks": {"math": math}, "references": references(), **arguments}
        places = {name: call.pop(name) for name in ("peaks", "references")}
        with pytest.raises(ValueError, match=message):
            SubspaceRollback(**call).fit(final, domains=domains(), **places)


if __name__ == "__main__":
    process, root = PartialState(cpu=True).process_index, Path(sys.argv[1])
    repairs = [{"factors": found.factors, "record": found.record} for found in fit_all(root, data_parallel=True)]
    torch.save(repairs, root / f"found-{process}.pt")
