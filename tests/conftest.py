"""Tiny random float64 models, a tokenizer of single characters, and dense references that share no code with `src`."""

import copy
import os

from hub_server.listener import LISTENER, URL


# Before the first import of a library that reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_ENDPOINT"] = URL

import numpy as np
import pytest
import torch
from datasets import Dataset, disable_progress_bars
from finished_run import make as make_finished_run
from hub_server.server import TOKEN, Hub
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from trl_interfere.analysis.references import References
from trl_interfere.analysis.report import InterferenceReport
from trl_interfere.domain import Domain


CHARACTERS = " 0123456789+=?abcdefgh"
VOCABULARY = {token: index for index, token in enumerate(["<pad>", "<eos>", "<unk>", *CHARACTERS])}
# Model type and settings: with and without biases, a head size of its own, tied and untied output layers.
FAMILIES = {
    "qwen3": ("qwen3", {"head_dim": 6, "tie_word_embeddings": True}),
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "mistral": ("mistral", {"head_dim": 6}),
}
# The others that the route map knows. Some of them compute parts in float32, or choose experts in jumps.
ARCHITECTURES = {
    **FAMILIES,
    "qwen3-moe": (
        "qwen3_moe",
        {
            "head_dim": 6,
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 5,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3-moe-every-second": (
        "qwen3_moe",
        {"num_experts": 5, "num_experts_per_tok": 1, "moe_intermediate_size": 3, "decoder_sparse_step": 2},
    ),
    "gemma2": ("gemma2", {"head_dim": 6, "query_pre_attn_scalar": 6}),
    "gemma3-text": ("gemma3_text", {"head_dim": 6, "query_pre_attn_scalar": 6, "num_key_value_heads": 1}),
    "gemma3": ("gemma3", {"head_dim": 6, "query_pre_attn_scalar": 6}),
    "phi3": ("phi3", {}),
    "gpt2": ("gpt2", {"n_inner": 12}),
    "gpt2-default-width": ("gpt2", {}),
    "smollm3": ("smollm3", {}),
}


_LINEAR = {
    "head_dim": 6,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
_EXPERTS = {"num_experts": 3, "num_local_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 5}
_SHARED = {
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 5},
    **{"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
}
# The further model types of the route map, with the settings that make them tiny.
FURTHER = {
    "apertus": {},
    "arcee": {},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_state": 4},
    "bloom": {"n_head": 4},
    "cohere": {},
    "cohere2": {},
    "deepseek_v3": _SHARED
    | {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
    | {"num_key_value_heads": 4},
    "ernie4_5": {"head_dim": 6},
    "exaone4": {},
    "falcon_h1": {"head_dim": 6, "mamba_d_ssm": 16, "mamba_n_heads": 4, "mamba_d_head": 4, "mamba_d_state": 4},
    "gemma": {"head_dim": 6},
    "gemma3n_text": {
        "head_dim": 6,
        "vocab_size_per_layer_input": len(VOCABULARY),
        "hidden_size_per_layer_input": 4,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "laurel_rank": 4,
        "intermediate_size": [12, 12],
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gemma4_text": {
        "head_dim": 6,
        "global_head_dim": 6,
        "vocab_size_per_layer_input": len(VOCABULARY),
        "hidden_size_per_layer_input": 4,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "glm": {"head_dim": 4},
    "glm4": {"head_dim": 4},
    "glm4_moe": _SHARED | {"head_dim": 4},
    "gpt_neox": {},
    "gpt_oss": _EXPERTS | {"head_dim": 6},
    "gptj": {"n_inner": 12, "rotary_dim": 4},
    "granite": {},
    "granitemoe": _EXPERTS,
    "helium": {"head_dim": 4},
    "hunyuan_v1_dense": {"head_dim": 6},
    "jamba": _EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 4},
    "llama4_text": _EXPERTS
    | {"head_dim": 6, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 10},
    "ministral": {"head_dim": 6},
    "ministral3": {"head_dim": 6},
    "mixtral": _EXPERTS,
    "mpt": {"d_model": 16, "n_heads": 4, "n_layers": 2},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "opt": {"ffn_dim": 12, "word_embed_proj_dim": 16},
    "phi": {},
    "phimoe": _EXPERTS,
    "qwen3_5_moe_text": _LINEAR | _EXPERTS | {"shared_expert_intermediate_size": 6},
    "qwen3_5_text": _LINEAR,
    "qwen3_next": _LINEAR | _EXPERTS | {"shared_expert_intermediate_size": 6},
    "seed_oss": {"head_dim": 6},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": {"head_dim": 6},
}


@pytest.fixture(autouse=True)
def _threads():
    # A command that runs in the process of a test sets its own, and more than there are cores make all others wait.
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def _datasets_cache(tmp_path_factory):
    disable_progress_bars()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, _datasets_cache):
    """Folder of a trained run that has lost math; not to be changed."""
    return make_finished_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="session")
def _hub():
    hub = Hub(LISTENER)
    hub.start()
    yield hub
    hub.stop()


@pytest.fixture
def hub(_hub, monkeypatch, tmp_path):
    """An empty local Hub; its user is logged in, and the cache is new."""
    _hub.reset()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return _hub


@pytest.fixture(params=FAMILIES)
def family(request):
    """Each family of `FAMILIES`."""
    return request.param


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    """Each architecture of `ARCHITECTURES`."""
    return request.param


@pytest.fixture(scope="session")
def tokenizer():
    """One token per character; decoding puts them together again."""
    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    return tokenizer


@pytest.fixture(scope="session")
def make_model():
    """Function that builds a random model of a type or of a family of `ARCHITECTURES`."""

    def make(family: str = "qwen3", seed: int = 0, dtype: torch.dtype = torch.float64, **overrides):
        model_type, settings = ARCHITECTURES.get(family, (family, FURTHER.get(family, {})))
        settings = {
            "vocab_size": len(VOCABULARY),
            "hidden_size": 16,
            "intermediate_size": 12,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.3,
            "tie_word_embeddings": False,
            "pad_token_id": VOCABULARY["<pad>"],
            "bos_token_id": None,
            "eos_token_id": VOCABULARY["<eos>"],
            **settings,
            **overrides,
        }
        if model_type == "gemma3":
            vision = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4}
            settings = {
                "text_config": {**settings, "model_type": "gemma3_text"},
                "vision_config": {**vision, "image_size": 28, "patch_size": 14},
                "mm_tokens_per_image": 4,
            }
        config = AutoConfig.for_model(model_type, **settings)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            if dtype == torch.float64 and getattr(config, "_experts_implementation", None):
                model.set_experts_implementation("eager")  # the other implementations know no float64
            # The norms of transformers compute in float32, whatever the model's data type: these do not.
            for name, module in list(model.named_modules()):
                if type(module).__name__.endswith("RMSNorm") and getattr(module, "weight", None) is not None:
                    eps = getattr(module, "variance_epsilon", None) or module.eps
                    exact = torch.nn.RMSNorm(module.weight.shape, eps=eps, dtype=dtype)
                    model.set_submodule(name, exact)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 1:  # norms and biases, so that none of them is 1 or 0
                        parameter.add_(0.2 * torch.randn_like(parameter))
        return model.eval()

    return make


@pytest.fixture(scope="session")
def moved():
    """Function that returns a copy of a model after a random update of every parameter."""

    def move(model, scale: float = 0.02, seed: int = 1):
        other = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in other.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(scale * noise.to(parameter.dtype))
        return other

    return move


@pytest.fixture(scope="session")
def sequences():
    """Prompts and completions as token ids, of unequal lengths, with the same text never twice."""
    rng = np.random.default_rng(0)
    lengths = [(3, 2), (5, 4), (1, 3), (4, 1), (2, 6)]
    return [tuple(rng.integers(3, len(VOCABULARY), size).tolist() for size in pair) for pair in lengths]


@pytest.fixture(scope="session")
def make_batches():
    """Function that pads sequences to batches as the package does."""

    def make(sequences, batch_size: int = 3):
        prompts, completions = zip(*sequences, strict=True)
        references = References("numbers", list(prompts), list(completions), len(prompts))
        return references.batches(batch_size, VOCABULARY["<pad>"], torch.device("cpu"))

    return make


@pytest.fixture(scope="session")
def token_loss():
    """Function of a model and sequences: the mean loss of completion tokens, one by one and without padding."""

    def loss(model, sequences, parameters=None):
        parameters = dict(model.named_parameters()) if parameters is None else parameters
        terms = []
        for prompt, completion in sequences:
            inputs = {"input_ids": torch.tensor([prompt + completion])}
            with sdpa_kernel(SDPBackend.MATH):  # plain attention, which can be differentiated twice
                logits = functional_call(model, parameters, (), inputs).logits[0]
            for position, token in enumerate(completion, start=len(prompt)):
                terms.append(torch.logsumexp(logits[position - 1], dim=0) - logits[position - 1, token])
        return sum(terms) / len(terms)

    return loss


@pytest.fixture(scope="session")
def owned_slices():
    """
    Function of a model: for each route, in order, `(kind, layer, position, slices)`, written out by hand. The last
    slice of a channel or of a query head is the one that it writes through.
    """

    def llama_channel(model, layer, channel):
        parts = [f"mlp.{name}_proj.{part}" for name in ("gate", "up") for part in ("weight", "bias")]
        return [(part, np.s_[channel]) for part in parts] + [("mlp.down_proj.weight", np.s_[:, channel])]

    def expert_channel(model, layer, channel):
        width = model.config.moe_intermediate_size
        expert, row = divmod(channel, width)
        rows = [("mlp.experts.gate_up_proj", np.s_[expert, start + row]) for start in (0, width)]
        return rows + [("mlp.experts.down_proj", np.s_[expert, :, row])]

    def phi_channel(model, layer, channel):
        rows = [("mlp.gate_up_proj.weight", np.s_[start + channel]) for start in (0, model.config.intermediate_size)]
        return rows + [("mlp.down_proj.weight", np.s_[:, channel])]

    def gpt_channel(model, layer, channel):
        columns = [("mlp.c_fc.weight", np.s_[:, channel]), ("mlp.c_fc.bias", np.s_[channel])]
        return columns + [("mlp.c_proj.weight", np.s_[channel])]

    def rows_of(name, block):
        return [(f"self_attn.{name}_proj.{part}", np.s_[block]) for part in ("weight", "bias")]

    def write_out(model):
        config, names = model.config.get_text_config(), {name for name, _ in model.named_parameters()}
        kind_of_model = model.config.model_type
        heads = config.num_attention_heads
        keys = heads if kind_of_model == "gpt2" else config.num_key_value_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        routes = []

        def add(kind, layer, position, owned):
            prefix = {"gpt2": "transformer.h", "gemma3": "model.language_model.layers"}
            prefix = f"{prefix.get(kind_of_model, 'model.layers')}.{layer}."
            owned = [(prefix + name, index) for name, index in owned if prefix + name in names]
            routes.append((kind, layer, position, owned))

        def block(head, start=0):
            return slice((start + head) * size, (start + head + 1) * size)

        for layer in range(config.num_hidden_layers):
            if f"model.layers.{layer}.mlp.experts.down_proj" in names:
                count, channel_of = config.num_experts * config.moe_intermediate_size, expert_channel
            elif kind_of_model == "gpt2":
                count, channel_of = 4 * 16 if config.n_inner is None else config.n_inner, gpt_channel
            else:
                count, channel_of = config.intermediate_size, phi_channel if kind_of_model == "phi3" else llama_channel
            for channel in range(count):
                add("mlp", layer, channel, channel_of(model, layer, channel))
        for layer in range(config.num_hidden_layers):
            for head in range(heads):
                if kind_of_model == "gpt2":
                    columns = [("attn.c_attn.weight", np.s_[:, block(head)]), ("attn.c_attn.bias", np.s_[block(head)])]
                    owned = columns + [("attn.c_proj.weight", np.s_[block(head)])]
                else:
                    rows = rows_of("q", block(head)) + [("self_attn.qkv_proj.weight", np.s_[block(head)])]
                    owned = rows + [("self_attn.o_proj.weight", np.s_[:, block(head)])]
                add("query", layer, head, owned)
        for layer in range(config.num_hidden_layers):
            for head in range(keys):
                owned = rows_of("k", block(head)) + rows_of("v", block(head))
                for start in (heads, heads + keys):
                    owned.append(("self_attn.qkv_proj.weight", np.s_[block(head, start)]))
                    owned.append(("attn.c_attn.weight", np.s_[:, block(head, start)]))
                    owned.append(("attn.c_attn.bias", np.s_[block(head, start)]))
                add("key_value", layer, head, owned)
        return routes

    return write_out


@pytest.fixture(scope="session")
def contributions(owned_slices):
    """
    Function of a model and token ids: what each channel and each query head writes into the residual stream,
    `{(kind, layer): (routes, tokens, hidden size)}`, and what the module itself put out, by the same keys.
    """

    def compute(model, ids):
        inputs, outputs, handles = {}, {}, []
        for kind, layer, position, owned in owned_slices(model):
            if kind == "key_value" or position > 0:
                continue
            module = model.get_submodule(owned[-1][0].rpartition(".")[0])

            def keep(module, args, output, key=(kind, layer)):
                inputs[key], outputs[key] = args, output

            handles.append(module.register_forward_hook(keep))
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]))
        for handle in handles:
            handle.remove()
        written = {key: [] for key in inputs}
        for kind, layer, _, owned in owned_slices(model):
            if kind == "key_value":
                continue
            name, index = owned[-1]
            column = model.get_parameter(name).detach()[index]
            if "experts" in name:
                (gate_name, gate), (_, up), _ = owned
                hidden, experts, weights = inputs[kind, layer]
                fused = model.get_parameter(gate_name).detach()
                inner = torch.nn.functional.silu(hidden @ fused[gate]) * (hidden @ fused[up])
                inner = inner * torch.where(experts == index[0], weights, 0).sum(dim=-1)
            else:
                inner = inputs[kind, layer][0][0][:, index[-1] if isinstance(index, tuple) else index]
            if inner.ndim == 1:
                written[kind, layer].append(inner[:, None] * column)
            else:
                written[kind, layer].append(inner @ (column if len(column) == inner.shape[1] else column.T))
        outputs = {key: output.reshape(len(ids), -1) for key, output in outputs.items()}
        return {key: torch.stack(parts) for key, parts in written.items()}, outputs

    return compute


@pytest.fixture(scope="session")
def dense_sums(owned_slices):
    """Function of a model and tensors: the sum of the elements of each route, and of those of no route."""

    def sums(model, tensors):
        routes = np.array(
            [sum(tensors[name][index].sum().item() for name, index in owned) for *_, owned in owned_slices(model)]
        )
        return routes, sum(tensor.sum().item() for tensor in tensors.values()) - routes.sum()

    return sums


@pytest.fixture
def make_domain():
    """Function that makes a domain of prompts with reference completions; every completion scores 1."""

    def make(name: str = "numbers", prompts=("1+2=", "3=", "abc?", "4+4=", "h 7?"), **columns):
        rows = {"prompt": list(prompts), **columns}
        rows.setdefault("completion", [f"{index}{'ab' * index}" for index in range(len(prompts))])
        return Domain(
            name=name,
            selection_dataset=Dataset.from_dict(rows),
            metric=lambda completions, **kwargs: [1.0] * len(completions),
        )

    return make


@pytest.fixture
def make_report():
    """Function that makes a report with given measures over routes, and figures of no meaning."""

    def make(num_routes: int, before: str = "before", after: str = "after", active_share: float = 0.5, **routes):
        for name in ("damage", "first_order", "second_order", "later_damage", "edit_size"):
            routes.setdefault(name, np.zeros(num_routes))
        for name in ("activity_earlier", "activity_later"):
            routes.setdefault(name, np.ones(num_routes))
        return InterferenceReport(
            before=before,
            after=after,
            base=None,
            earlier="math",
            later=["qa", "writing"],
            dtype="float32",
            references={"math": {"kind": "correct", "n": 3, "considered": 4, "tokens": 17}},
            loss_before=0.1,
            loss_after=0.7,
            first_order=0.3,
            second_order=0.25,
            attributed=0.5,
            outside_routes=0.05,
            later_loss_before={"qa": 2.0, "writing": 1.5},
            later_loss_after={"qa": 1.0, "writing": 0.1 + 0.2},
            outside_weights={"embed_tokens": 0.25, "norm": 0.001},
            cosines={
                "global": -0.125,
                "modules": {"layers.0.mlp": -0.5, "layers.0.attention": 0.75, "layers.1.norm": 0.1, "norm": 0.0},
                "tensors": {"model.layers.0.mlp.up_proj.weight": -1 / 3},
                "by_domain": {"qa": {"global": 0.5, "modules": {}, "tensors": {}}},
            },
            config={"reference": "correct", "active_share": active_share},
            versions={"torch": "2"},
            routes=routes,
        )

    return make
