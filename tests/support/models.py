"""Tiny models, adapters for them, and the same adapters inside PEFT models."""

import copy

import torch
from torch import Tensor, nn

from lora_fused import Adapter, LoraFactors


class Net(nn.Module):
    """Tokens [S, N] -> [S, N, 6]: an embedding and two linear layers."""

    def __init__(self, seed: int = 0):
        torch.manual_seed(seed)
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 6, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.embed(tokens))))


SIZES = {"embed": (11, 8), "up": (8, 12), "down": (12, 6)}


def tokens(samples: int = 3, length: int = 5, vocabulary: int = 11, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (samples, length), generator=generator)


def adapter(
    name: str, seed: int, rank: int = 2, modules=("up", "down"), dtype=torch.float32
) -> Adapter:
    """A random adapter of some of Net's modules with updates of O(1)."""
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for module in modules:
        sizes = SIZES[module]
        a, b = (torch.randn(rank, n, generator=generator) * 0.4 for n in sizes)
        parts[module] = LoraFactors(a.to(dtype), b.to(dtype), 1.5 + seed % 3, module == "embed")
    return Adapter(name, parts)


def merged(model: nn.Module, adapters: list[Adapter], weights: dict[str, float]) -> nn.Module:
    """A copy of the model in float64 with the weighted updates added to its weights."""
    model = copy.deepcopy(model).double()
    for one in adapters:
        for module, part in one.modules.items():
            update = part.lora_b.double().T @ part.lora_a.double()
            weight = model.get_submodule(module).weight
            transposed = weight.shape != update.shape or part.embedding
            factor = weights.get(one.name, 0.0) * part.scale
            weight.data += factor * (update.T if transposed else update)
    return model


def row_by_row(model: nn.Module, adapters, rows: list[dict[str, float]], x: Tensor) -> Tensor:
    """What each row alone gives with its mixture merged into the weights, in float64."""
    x = x.double() if x.is_floating_point() else x
    outs = [merged(model, adapters, row)(x[i : i + 1]) for i, row in enumerate(rows)]
    return torch.cat(outs).detach()


def tiny_llama(seed: int = 0) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2(seed: int = 0) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=61,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


def with_peft(model: nn.Module, configs: dict[str, dict], seed: int = 0):
    """A PEFT model around a copy of ``model`` with random adapters, and the same as Adapters."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    base = copy.deepcopy(model)
    for i, (name, config) in enumerate(configs.items()):
        config = LoraConfig(**config)
        if i == 0:
            wrapped = get_peft_model(base, config, adapter_name=name)
        else:
            wrapped.add_adapter(name, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.15)
    return wrapped.eval(), [read_peft(wrapped, name) for name in configs]


def read_peft(wrapped: nn.Module, name: str) -> Adapter:
    """One adapter of a PEFT model, its tensors copied."""
    parts = {}
    for path, module in wrapped.base_model.model.named_modules():
        if name in getattr(module, "lora_A", ()):
            a, b = module.lora_A[name].weight, module.lora_B[name].weight
        elif name in getattr(module, "lora_embedding_A", ()):
            a, b = module.lora_embedding_A[name], module.lora_embedding_B[name]
        else:
            continue
        embedding = isinstance(module.base_layer, nn.Embedding)
        a, b = a.detach().clone(), b.detach().T.clone()
        parts[path] = LoraFactors(a, b, module.scaling[name], embedding)
    return Adapter(name, parts)
