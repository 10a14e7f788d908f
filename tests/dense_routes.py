"""What routes own and write, written out by hand: dense references that share no code with `src`."""

import numpy as np
import pytest
import torch


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
