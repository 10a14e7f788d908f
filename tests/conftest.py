"""Tiny random float64 models, a tokenizer of single characters, and references that share no code with `src`."""

import copy
import os
import shutil

from hub_server.server import TOKEN, URL, Hub


# Before the first import of a library that reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_ENDPOINT"] = URL

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, FAMILIES, FURTHER, TINY, VOCABULARY
from datasets import Dataset, disable_progress_bars
from dense_routes import contributions, dense_sums, owned_slices  # noqa: F401 (fixtures)
from finished_run import make as make_finished_run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from trl_interfere.analysis.references import References
from trl_interfere.analysis.report import InterferenceReport
from trl_interfere.domain import Domain


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
def bubblewrap():
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed (apt-get install bubblewrap)")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, _datasets_cache):
    """Folder of a trained run that has lost math; not to be changed."""
    return make_finished_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="session")
def _hub():
    hub = Hub()
    hub.start()
    return hub


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
        settings = TINY | settings | overrides
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
