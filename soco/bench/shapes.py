"""The shapes of known models, and the groups of layers that get one input in them."""

from dataclasses import dataclass
from typing import Any

from soco.ranks import parameter_budget


@dataclass(frozen=True)
class Shape:
    """A decoder as Llama is built, without biases. Sizes are those of the published config.json."""

    hidden: int
    intermediate: int
    blocks: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False  # the output head has the weights of the embeddings

    @property
    def groups(self) -> dict[str, list[tuple[int, int]]]:
        """Of one block, name to (out, in) of the layers with the same input."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "q,k,v": [(self.hidden, self.hidden), (kv, self.hidden), (kv, self.hidden)],
            "o": [(self.hidden, self.hidden)],
            "gate,up": [(self.intermediate, self.hidden)] * 2,
            "down": [(self.hidden, self.intermediate)],
        }

    def config(self, blocks: int, positions: int) -> Any:
        """A configuration of transformers with so many blocks."""
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=blocks,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=positions,
            attention_bias=False,
            tie_word_embeddings=self.tied,
        )


SHAPES = {
    "llama-2-7b": Shape(4096, 11008, 32, 32, 32, 32000),
    "llama-2-13b": Shape(5120, 13824, 40, 40, 40, 32000),
    "llama-3-8b": Shape(4096, 14336, 32, 32, 8, 128256),
    "llama-3.2-1b": Shape(2048, 8192, 16, 32, 8, 128256, tied=True),
    "mistral-7b": Shape(4096, 14336, 32, 32, 8, 32000),
    "qwen2.5-0.5b": Shape(896, 4864, 24, 14, 2, 151936, tied=True),
    "qwen2.5-7b": Shape(3584, 18944, 28, 28, 4, 152064),
    "tiny": Shape(64, 176, 2, 4, 2, 512),  # for trying out the commands
}


def rank_for(out_features: int, in_features: int, kept: float) -> int:
    """The rank at which a layer keeps this fraction of its parameters, at least 1.

    >>> rank_for(4096, 4096, 0.5), rank_for(11008, 4096, 0.5)
    (1024, 1492)
    """
    budget = parameter_budget({"layer": (out_features, in_features)}, round(1 - kept, 9))
    return max(1, budget // (out_features + in_features))
