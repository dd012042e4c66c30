"""Small random models of many architectures, and the plainest way to compress one of them."""

import re

import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)

from soco.checkpoint import mark_compressed
from soco.linalg import Factors
from soco.modules import LowRankLinear, PivotedLinear, share_basis
from soco.pivots import pivot_factors
from soco.surgery import bias_of, find_linears, low_rank_layers, replace_module, weight_of

IS_5 = int(transformers.__version__.split(".")[0]) >= 5
NEEDS_5 = pytest.mark.skipif(not IS_5, reason="needs transformers 5")

_LLAMA = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_BERT = _LLAMA | dict(type_vocab_size=2)
_MIXTURE = _LLAMA | dict(num_experts_per_tok=2)

CONFIGS = {
    "llama": _LLAMA | dict(tie_word_embeddings=False),
    "llama-tied": _LLAMA | dict(tie_word_embeddings=True),
    "mistral": _LLAMA | dict(sliding_window=None),
    "qwen2": _LLAMA,
    "phi3": _LLAMA,
    "gpt2": dict(
        vocab_size=96,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "opt": _LLAMA | dict(ffn_dim=48, word_embed_proj_dim=32),
    "gpt_neox": _LLAMA,
    "gptj": dict(
        vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_inner=48
    ),
    "bloom": dict(vocab_size=96, hidden_size=32, n_layer=2, n_head=4),
    "mamba": dict(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4, time_step_rank=4
    ),
    "mixtral": _MIXTURE | dict(num_local_experts=4),
    "qwen2_moe": _MIXTURE
    | dict(num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=24),
    "t5": dict(
        vocab_size=96,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    ),
    "bert": _BERT,
    "roberta": _BERT | dict(pad_token_id=1),
    "albert": _BERT | dict(embedding_size=16, num_hidden_groups=1, inner_group_num=1),
}
# Mixtures whose experts transformers 5 keeps as fused parameters, every form of them: with a gate
# and without, with biases and without, transposed and not.
MIXTURES = {
    "mixtral": CONFIGS["mixtral"],
    "qwen2_moe": CONFIGS["qwen2_moe"],
    "qwen3_moe": _MIXTURE | dict(num_experts=4, moe_intermediate_size=16, head_dim=8),
    "olmoe": _MIXTURE | dict(num_experts=4),
    "deepseek_v3": _MIXTURE
    | dict(
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    "gpt_oss": _MIXTURE
    | dict(num_local_experts=4, head_dim=8, rope_parameters=dict(rope_type="default")),
    "nemotron_h": _MIXTURE
    | dict(
        n_routed_experts=4,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
        layers_block_type=["attention", "moe"],
        head_dim=8,
        n_group=1,
        topk_group=1,
    ),
}
_MASKED = ("bert", "roberta", "albert")


def tiny_model(name, dtype=torch.float32, seed=0, **changes):
    """A model with random weights; ``name`` is a key of ``CONFIGS`` or ``MIXTURES``."""
    torch.manual_seed(seed)
    settings = (CONFIGS | MIXTURES)[name] | changes
    config = AutoConfig.for_model(name.split("-")[0], **settings)
    auto = AutoModelForCausalLM
    if name in _MASKED:
        auto = AutoModelForMaskedLM
    elif name == "t5":
        auto = AutoModelForSeq2SeqLM
    return auto.from_config(config, dtype=dtype).eval()


@torch.no_grad()
def tiny_mixture(name, **options):
    """The same for a key of ``MIXTURES``: its experts run eagerly, and their biases are not 0."""
    model = tiny_model(name, experts_implementation="eager", **options)
    generator = torch.Generator().manual_seed(2)
    for key, parameter in model.named_parameters():
        if key.endswith("_proj_bias"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    return model


def token_inputs(model, rows=2, length=8):
    """What a forward call needs, for decoders, encoders and both."""
    tokens = torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(1))
    if getattr(model.config, "is_encoder_decoder", False):
        return {"input_ids": tokens, "decoder_input_ids": tokens[:, :4]}
    return {"input_ids": tokens}


@torch.no_grad()
def logits(model):
    """The logits for fixed tokens."""
    return model(**token_inputs(model)).logits


@torch.no_grad()
def compress(model, rank=4, include=None, exclude=None, report=None):
    """Truncated SVD of every layer, in place, and marked; returns the model."""
    for name, layer in find_linears(model, include, exclude).items():
        weight = weight_of(layer)
        left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
        kept = slice(min(rank, *weight.shape))
        up, down = left[:, kept] * values[kept], right[kept]
        factors = up.to(weight.dtype), down.to(weight.dtype)
        replace_module(model, name, LowRankLinear.from_factors(factors, bias_of(layer)))
    mark(model, report)
    return model


def mark(model, report=None):
    """Tell transformers, with the ranks of the layers that are there."""
    ranks = {name: layer.rank for name, layer in low_rank_layers(model).items()}
    mark_compressed(model, ranks, report)


@torch.no_grad()
def compress_pivoted(model, rank=4, include=None, exclude=None):
    """As ``compress``, with pivots wherever the rank is less than the outputs."""
    compress(model, rank, include, exclude)
    for name, layer in low_rank_layers(model).items():
        if layer.rank < layer.out_features:
            factors = Factors(layer.up.weight, layer.down.weight)
            made = PivotedLinear.from_factors(pivot_factors(factors, name=name), layer.bias)
            replace_module(model, name, made)
    mark(model)
    return model


@torch.no_grad()
def compress_shared(model, rank=4, include=None, exclude=None):
    """One basis for the layers of all blocks that have the same name in their block."""
    groups = {}
    for name, layer in find_linears(model, include, exclude).items():
        groups.setdefault(re.sub(r"\d+", "#", name), {})[name] = layer
    for group in groups.values():
        stacked = torch.cat([weight_of(layer) for layer in group.values()])
        left, values, right = torch.linalg.svd(stacked, full_matrices=False)
        ups = (left * values)[:, :rank].split([len(weight_of(layer)) for layer in group.values()])
        made = [
            LowRankLinear.from_factors((up, right[:rank]), bias_of(layer))
            for up, layer in zip(ups, group.values(), strict=True)
        ]
        for name, layer in zip(group, made, strict=True):
            replace_module(model, name, layer)
        share_basis(made)
    mark(model)
    return model


def drawn(draw, seeds, *shape):
    """What is drawn for sequences by their seeds, (sequences, *shape), one after the other."""
    rows = [draw(*shape, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
    return torch.stack(rows)
