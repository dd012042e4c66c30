"""Text that a model writes itself, for when there is none to calibrate on."""

from collections.abc import Callable, MutableMapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from soco.surgery import text_config

CACHE_ROOM = 4 * 2**30  # bytes that the keys and values of a batch may take


def sample_from_model(
    model: nn.Module,
    samples: int,
    length: int,
    *,
    start: int | None = None,
    keep_start: bool = False,
    seed: int = 0,
    batch_size: int | None = None,
    on_batch: Callable[[int], None] = lambda sequences: None,
    drafts: MutableMapping[int, Any] | None = None,
) -> Tensor:
    """Calibration text written by the model itself, for when there is none.

    Args:
        model: a causal language model with ``generate``.
        samples: sequences.
        length: tokens of each.
        start: the id every sequence begins with; None: a random one that the model's config does
            not name as special.
        keep_start: whether it is the first token of the sequence, or comes before it.
        seed: the same seed gives the same text; the global random state is left alone.
        batch_size: sequences at a time; None: 64, or as many as ``CACHE_ROOM`` has room for.
        on_batch: called with the number of sequences done, after each batch.
        drafts: where each batch is kept, by its number, with the state of the random numbers behind
            it: the same call goes on behind those that are there. None: nowhere.

    Returns:
        Token ids (samples, length), on the CPU, drawn at temperature 1 from the whole vocabulary,
        whatever the model's ``generation_config`` says.

    Raises:
        ValueError: the model cannot generate.
    """
    if not _generates(model):
        raise ValueError(
            f'calibration="self" takes a model that can generate text, and {type(model).__name__} '
            f"cannot: give a text instead"
        )
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    ordinary = torch.tensor(sorted(set(range(vocabulary)) - _special_ids(model)))
    generator = torch.Generator().manual_seed(seed)
    batch_size = batch_size or sequences_at_once(model, length)
    parts = []
    own = model.generation_config
    plain = type(own)(  # type: ignore[operator]
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=length - keep_start,
        pad_token_id=0,
        decoder_start_token_id=own.decoder_start_token_id,  # type: ignore[union-attr]
    )
    sources = [torch.default_generator]  # torch.manual_seed would seed every CUDA device
    if device.type == "cuda":
        sources.append(torch.cuda.default_generators[cast(int, device.index)])
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        for source in sources:
            source.manual_seed(seed)
        try:
            model.generation_config = plain  # type: ignore[assignment] # generate fills gaps from it
            for done in range(0, samples, batch_size):
                count, place = min(batch_size, samples - done), done // batch_size
                if drafts is not None and place in drafts:
                    text, states = drafts[place]
                    for source, state in zip((generator, *sources), states, strict=True):
                        source.set_state(state)
                    parts.append(text)
                    on_batch(done + count)
                    continue
                chosen = torch.randint(len(ordinary), (count, 1), generator=generator)
                first = ordinary[chosen] if start is None else torch.full((count, 1), start)
                first = first.to(device)
                ids = model.generate(  # type: ignore[operator]
                    first, attention_mask=torch.ones_like(first), generation_config=plain
                )
                parts.append(ids[:, 0 if keep_start else 1 :].cpu())
                if drafts is not None:
                    states = [source.get_state() for source in (generator, *sources)]
                    drafts[place] = [parts[-1].clone(), states]
                on_batch(done + count)
        finally:
            model.generation_config = own
    return torch.cat(parts)


def sequences_at_once(model: nn.Module, length: int) -> int:
    """Sequences whose keys and values have room, 64 at most."""
    return max(1, min(64, CACHE_ROOM // max(1, cache_bytes(model, length))))


def cache_bytes(model: nn.Module, length: int) -> int:
    """What the keys and values of one sequence take."""
    config = text_config(model)
    layers = getattr(config, "num_hidden_layers", None) or 1
    hidden = getattr(config, "hidden_size", None) or 1
    heads = getattr(config, "num_attention_heads", None) or 1
    width = (getattr(config, "num_key_value_heads", None) or heads) * (
        getattr(config, "head_dim", None) or hidden // heads
    )
    return 2 * layers * width * next(model.parameters()).element_size() * length


def writes_text(model: nn.Module) -> bool:
    """Whether the model writes text of the kind that it reads: not one that translates."""
    translates = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return _generates(model) and not translates


def _generates(model: nn.Module) -> bool:
    can_generate = getattr(model, "can_generate", None)
    return can_generate is not None and can_generate()


def _special_ids(model: nn.Module) -> set[int]:
    """Token ids that the model's config gives a meaning of their own."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    values = [getattr(model.config, name, None) for name in names]
    return {
        each
        for value in values
        for each in (value if isinstance(value, list) else [value])
        if isinstance(each, int)
    }
