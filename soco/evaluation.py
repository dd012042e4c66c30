"""Measure a model on a text: perplexity, and how far it is from the dense model."""

import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from soco.data import cut_windows, token_ids
from soco.objectives import TokenDistribution, last_hidden_state, objective_for, run_model
from soco.processes import add_up, gathered, own
from soco.processes import count as processes
from soco.surgery import sequence_length

# Entries of the logits (tokens x vocabulary) that are taken to float64 at a time: 128 MB.
_CHUNK_ENTRIES = 2**24

# Tokens that one batch holds when no batch size is given, and logits, if the vocabulary is large.
_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
_BATCH_ENTRIES = 2**29


@dataclass(frozen=True)
class Evaluation:
    """What ``evaluate`` measured."""

    perplexity: float | None  # None for a model that does not predict the next token
    tokens: int  # scored: length - 1 per window, all of them where there is no perplexity
    windows: int
    length: int  # tokens per window
    dtype: str  # the model's, in which it ran
    kl: float | None  # mean KL(dense || model) in nats per token, given a dense model
    top1: float | None  # fraction of tokens whose likeliest prediction is the dense model's
    distance: float | None  # squared distance of hidden states over their variance (encoders)
    seconds: float  # running the models, without reading the text

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON takes them."""
        return asdict(self)

    def __str__(self) -> str:
        """All numbers in a sentence or two."""
        if self.perplexity is None:
            head = "no perplexity, since the model does not predict the next token:"
        else:
            head = f"perplexity {self.perplexity:.4f} over"
        parts = [
            f"{head} {self.tokens:,} tokens in {self.windows:,} windows of {self.length:,}, "
            f"{self.dtype}, {self.seconds:.1f} s"
        ]
        if self.kl is not None and self.top1 is not None:
            parts.append(
                f"KL to the dense model {small(self.kl)} nats per token, "
                f"same first choice for {self.top1:.2%}"
            )
        if self.distance is not None:
            parts.append(f"relative squared distance of the hidden states {self.distance:.4g}")
        return "; ".join(parts)


def small(value: float) -> str:
    """Three decimals, and of what is below 0.1 three digits.

    >>> small(1.23456), small(0.4), small(0.0312345), small(0.00123456), small(2e-10), small(0.0)
    ('1.235', '0.400', '0.0312', '0.00123', '2.00e-10', '0.000')
    """
    if 0 < value < 1e-4:
        return f"{value:.2e}"
    decimals = 2 - math.floor(math.log10(value)) if 0 < value < 0.1 else 3
    return f"{value:.{decimals}f}"


def evaluate(
    model: nn.Module,
    text: Any,
    *,
    tokenizer: Any = None,
    dense: nn.Module | None = None,
    length: int | None = None,
    windows: int | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> Evaluation:
    """Perplexity of a model on a text, and its distance from the dense model if that is given.

    The text becomes one stream of tokens without special tokens, cut from its start into windows
    that do not overlap; what is left over at the end is dropped. Every window is scored on its own:
    ``length - 1`` predictions, the first token being given. Perplexity is exp of the mean negative
    log likelihood of all predictions. The models run in the dtype they have; probabilities are
    taken from their logits in float64.

    Several processes (``soco.together``) share the batches.

    KL and top-1 agreement are means over the same predictions. A model that does not predict the
    next token has no perplexity: masked language models and encoder-decoders (which get the text on
    both sides) have KL and top-1 over all tokens; encoders, and all models without a head for
    tokens, have the distance of their last hidden states.

    Args:
        model: a transformers model, wherever it is; left in the mode (training or not) it was in.
        text: anything ``soco.data.token_ids`` takes: a path, texts, token ids, a dataset. The rows
            of a 2-D tensor are cut by themselves.
        tokenizer: not needed for token ids.
        dense: the model to compare with, on any device; left in its mode, too.
        length: tokens per window; None: the model's context length, at most 2048,
            and no more than the text has.
        windows: at most so many, from the start of the text, of which no more is read; None: all.
        batch_size: windows at a time; None: as many as hold 2,048 tokens on a CPU and 16,384 on
            CUDA, fewer for a large vocabulary.
        progress: show a bar after two seconds, if stderr is a terminal.

    Returns:
        The measurements; all of them plain numbers.

    Raises:
        FileNotFoundError, IsADirectoryError: the text is a path that is not a file.
        ValueError: the text gives no full window or no ids of the model's vocabulary, ``length`` is
            above the model's context, a count is out of range, the logits hold NaN, or the dense
            model has another vocabulary.
    """
    for title, count, least in (
        ("length", length, 2),
        ("windows", windows, 1),
        ("batch_size", batch_size, 1),
    ):
        if count is not None and count < least:
            raise ValueError(f"{title} must be at least {least}, got {count}")
    chosen = _windows(model, text, tokenizer, length, windows)
    size = batch_size or _batch_size(model, chosen.shape[1])
    with torch.no_grad(), _in_eval_mode(model), _in_eval_mode(dense):
        start = time.perf_counter()
        first = chosen[:1].to(_device(model))
        predicts_tokens = isinstance(objective_for(model, first), TokenDistribution)
        encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        causal = predicts_tokens and not encodes and _can_generate(model)
        by_states = dense is not None and not causal and not (predicts_tokens and encodes)
        sums = _Sums()
        with _bar(len(chosen), progress) as bar:
            batches = chosen.split(size)
            for number in own(len(batches)):
                batch = batches[number]
                if predicts_tokens:
                    scored = batch[:, 1:] if causal else batch
                    others = None if dense is None else _logits(dense, batch, scored.shape[1])
                    sums.add_predictions(_logits(model, batch, scored.shape[1]), scored, others)
                if dense is not None and by_states:
                    sums.add_states(_states(model, batch), _states(dense, batch))
                bar.update(len(batch) * processes())
        sums.gather()
        seconds = time.perf_counter() - start
    tokens = chosen.numel() - (len(chosen) if causal else 0)
    compared = dense is not None
    return Evaluation(
        perplexity=_exp(sums.surprise / tokens) if causal else None,
        tokens=tokens,
        windows=len(chosen),
        length=chosen.shape[1],
        dtype=str(_dtype(model)).removeprefix("torch."),
        kl=sums.divergence / tokens if compared and predicts_tokens else None,
        top1=sums.agreements / tokens if compared and predicts_tokens else None,
        distance=sums.distance() if by_states else None,
        seconds=seconds,
    )


@dataclass
class _Sums:
    """Sums over tokens, taken in float64."""

    surprise: float = 0.0  # negative log likelihood of the text, nats
    divergence: float = 0.0  # KL(dense || model), nats
    agreements: int = 0  # tokens with the same first choice
    squared_distance: float = 0.0  # of the hidden states
    moments: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))

    def add_predictions(self, logits: Tensor, ids: Tensor, dense: Tensor | None) -> None:
        """Add logits and dense logits (windows, tokens, vocabulary) for ids (windows, tokens)."""
        if dense is not None and dense.shape != logits.shape:
            raise ValueError(
                f"the dense model predicts {dense.shape[-1]} tokens, the model {logits.shape[-1]}: "
                "they cannot be compared"
            )
        labels = ids.to(logits.device).flatten()
        rows = max(1, _CHUNK_ENTRIES // logits.shape[-1])
        for i, part in enumerate(logits.flatten(0, 1).split(rows)):
            log_model = part.double().log_softmax(-1)  # (rows, vocabulary)
            here = slice(i * rows, i * rows + len(part))
            self.surprise -= log_model.gather(-1, labels[here, None]).sum().item()
            if dense is not None:
                other = dense.flatten(0, 1)[here].to(part.device)
                log_dense = other.double().log_softmax(-1)
                terms = log_dense.exp() * (log_dense - log_model)
                impossible = log_dense == -math.inf  # 0 log 0 = 0
                self.divergence += terms.masked_fill(impossible, 0).sum().item()
                self.agreements += int((part.argmax(-1) == other.argmax(-1)).sum())
        if math.isnan(self.surprise):
            raise ValueError("the model's logits hold NaN: it is broken, or overflows in its dtype")

    def add_states(self, states: Tensor, dense: Tensor) -> None:
        """Add hidden states (windows, tokens, hidden) of the model and of the dense model."""
        if dense.shape != states.shape:
            raise ValueError(
                f"the dense model has hidden states of {dense.shape[-1]} numbers, the model of "
                f"{states.shape[-1]}: they cannot be compared"
            )
        dense = dense.to(states.device).double()
        self.squared_distance += (states.double() - dense).square().sum().item()
        count = torch.tensor(dense.numel(), dtype=torch.float64)
        self.moments += torch.stack([count, dense.sum().cpu(), dense.square().sum().cpu()])

    def gather(self) -> None:
        """The sums over all processes, each of which ran some of the batches."""
        mine = (self.surprise, self.divergence, self.agreements, self.squared_distance)
        parts = list(zip(*gathered(mine), strict=True))
        self.surprise, self.divergence, self.squared_distance = (
            sum(parts[place]) for place in (0, 1, 3)
        )
        self.agreements = sum(parts[2])
        add_up(self.moments)

    def distance(self) -> float:
        """The squared distance of the states as a fraction of the dense ones' variance."""
        count, total, squares = self.moments.tolist()
        spread = squares - total**2 / count
        return self.squared_distance / spread if spread > 0 else math.inf


def _windows(
    model: nn.Module, text: Any, tokenizer: Any, length: int | None, windows: int | None
) -> Tensor:
    """The windows (n, length) to score; see ``evaluate``."""
    wanted = sequence_length(model, length)
    ids = token_ids(
        text,
        tokenizer,
        tokens=None if windows is None else windows * wanted,
        vocab_size=vocab_size(model),
        name="evaluation",
    )
    if length is None:
        wanted = max(2, min(wanted, ids.shape[-1]))
    cut = cut_windows(ids, wanted, name="evaluation")
    if windows is not None and len(cut) < windows:
        warnings.warn(
            f"the evaluation data has {ids.numel()} tokens: {len(cut)} windows of {wanted}, "
            f"fewer than the {windows} asked for",
            stacklevel=3,
        )
    return cut[:windows]


def _batch_size(model: nn.Module, length: int) -> int:
    """Windows that fit into one batch of a sensible size."""
    tokens = _BATCH_TOKENS.get(_device(model).type, _BATCH_TOKENS["cuda"])
    tokens = min(tokens, _BATCH_ENTRIES // (vocab_size(model) or 1))
    return max(1, tokens // length)


def _logits(model: nn.Module, ids: Tensor, count: int) -> Tensor:
    """The first ``count`` logits of every window, (windows, count, vocabulary)."""
    return run_model(model, ids.to(_device(model))).logits[:, :count]


def _states(model: nn.Module, ids: Tensor) -> Tensor:
    return last_hidden_state(model, ids.to(_device(model)))


def _can_generate(model: nn.Module) -> bool:
    """Whether the model writes text from left to right, by what transformers says of its class."""
    return getattr(model, "can_generate", lambda: False)()


def vocab_size(model: nn.Module) -> int | None:
    """How many tokens the model has embeddings for; None where it has none."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    return None if embeddings is None else embeddings.weight.shape[0]


def _device(model: nn.Module) -> torch.device:
    """Where the model takes its ids: where its first weight is that is not offloaded."""
    devices = (parameter.device for parameter in model.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def _dtype(model: nn.Module) -> torch.dtype:
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(dtypes, torch.float32)


@contextmanager
def _in_eval_mode(model: nn.Module | None) -> Iterator[None]:
    """Inside, dropout is off; afterwards every module is in the mode it was in."""
    modes = [] if model is None else [(module, module.training) for module in model.modules()]
    try:
        if model is not None:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def _bar(windows: int, progress: bool) -> tqdm:
    return tqdm(
        total=windows,
        desc="evaluating",
        unit="window",
        delay=2.0,
        leave=False,
        disable=None if progress else True,  # None: where stderr is no terminal
    )


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
