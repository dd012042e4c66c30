"""What a training of spectral scores can be told: its stages, and everything else."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from soco.steps import check_batches, half_cosine


@dataclass(frozen=True)
class Stage:
    """A stretch of the training: what is minimized, and how many components may live.

    The excess says how far from the target the budget of living parameters is: 1 is what lived
    before (at first everything), 0 is the target. It runs from ``excess_begin`` to ``excess_end``
    over the stage.
    """

    name: str
    share: float  # of all steps, in (0, 1]
    excess_begin: float = 0.0
    excess_end: float = 0.0
    exponent: float = 1.0  # of the way the excess takes: 1 linear, 3 fast at first, gentle at last
    period: int = 4  # steps between two choices of who lives
    recover: int | None = None  # of a period, this many steps recover: they have the excess, and
    # the ratio loss is off; the rest compress: no excess, ratio loss on. None: both at all times.
    choose_until: float = 1.0  # fraction of the stage after which the living ones stay the same
    hard: bool = True  # False: nothing is masked, only the losses press
    rate_begin: float = 1.0  # learning rate as a multiple of the run's, at the beginning
    rate_end: float = 1.0  # and at the end; in between it follows half a cosine
    divergence: float = 1.0  # weight of the distance to the dense model
    cross_entropy: float = 0.0  # weight of the loss on the text itself
    states: float = 0.0  # weight of the squared distance of the last hidden states, relative to
    # the variance of the dense ones
    ratio: float = 0.0  # weight of the squared parameter ratio above the target (differentiable)
    sparsity: float = 0.0  # weight of the regularizer that drives scores apart, to 0 or up
    patience: int | None = None  # stop after so many steps without a lower smoothed loss
    settled: float | None = None  # stop when a choice without excess changes the lot of at most
    # this fraction of the living components

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        if not 0 < self.share <= 1:
            raise ValueError(f"stage {self.name}: share must be in (0, 1], got {self.share}")
        if not 0 <= self.excess_begin <= 1 or not 0 <= self.excess_end <= 1:
            raise ValueError(
                f"stage {self.name}: excess must be from 0 to 1, got {self.excess_begin} and "
                f"{self.excess_end}"
            )
        if self.period < 1 or not 0 <= (self.recover or 0) <= self.period:
            raise ValueError(
                f"stage {self.name}: recover must be 0 to period, got {self.recover} of "
                f"{self.period}"
            )

    def excess(self, step: int, steps: int) -> float:
        """How much of the way from the target to the start may live at ``step`` of ``steps``."""
        done = min(1.0, (step + self.period) / steps)  # what is chosen now lasts for a period
        curve = (
            self.excess_end + (self.excess_begin - self.excess_end) * (1 - done) ** self.exponent
        )
        return curve if self.recover is None or step % self.period < self.recover else 0.0

    def ratio_weight(self, step: int) -> float:
        """The weight of the ratio loss at ``step``."""
        pressing = self.recover is None or step % self.period >= self.recover
        return self.ratio if pressing else 0.0

    def rate(self, step: int, steps: int) -> float:
        """The multiple of the run's learning rate at ``step`` of ``steps``."""
        return half_cosine(step, steps, self.rate_begin, self.rate_end)


STAGES = (
    Stage("coarse", share=0.2, excess_begin=1.0, exponent=3.0),
    Stage("refine", share=0.2, excess_begin=0.15, excess_end=0.02, period=8, recover=5),
    Stage("sparsify", share=0.6, period=6, choose_until=0.6, rate_end=0.0),
)

# The target at once, and a few steps in which the survivors adapt to it.
SHORT_STAGES = (Stage("sparsify", share=1.0, period=6, choose_until=0.6, rate_end=0.0),)

# A choice of components, and no training: for what trains the factors themselves.
CHOICE_STAGES = (Stage("choice", share=1.0, rate_begin=0.0, rate_end=0.0),)

# The published order of losses, without a mask until the end; all numbers are our choice.
SOFT_STAGES = (
    Stage("coarse", share=0.3, hard=False, ratio=100.0),
    Stage("refine", share=0.3, hard=False, ratio=100.0, period=16, recover=8),
    Stage("sparsify", share=0.4, hard=False, ratio=100.0, sparsity=1.0, rate_end=0.0),
)


@dataclass(frozen=True)
class TrainingSettings:
    """Everything the loop can be told; what no field speaks of is not decided anywhere else."""

    stages: tuple[Stage, ...] = STAGES
    steps: int = 240  # optimizer steps over all stages
    later_steps: int | None = None  # over all stages of a second and later budget; None: half
    spacing: float | None = 0.085  # ratios of one training get others between them, so that none is
    # larger than the one before by more than this fraction of it; None: those given, alone
    written: float = 0.5  # sequences that the dense model writes itself, to be trained on beside
    # the calibration's, as a multiple of those; models that do not generate text have none
    passes: float | None = 16.0  # over all these sequences, at most: on few of them more passes
    # over-fit; None: all steps, whatever there is
    criterion: Literal["fisher", "score"] = "fisher"  # what a component is kept for
    offered: float | None = None  # at the start every layer has at most so many components, as a
    # multiple of the rank at which factors are as large as the dense weight; None: all
    spare: float = 0.5  # masked components that are watched, so that they can come back, as a
    # fraction of a layer's living ones
    batch_size: int = 8  # sequences per step
    micro_batch: int | None = None  # sequences at a time in memory; None: the whole batch
    learning_rate: float | None = None  # of Adam, on the logits of the scores; None: measured for
    # every budget (``masters.probed_rate``)
    channel_rate: float = 0.2  # learning rate of channel scales, as a multiple of that one
    deviation_rate: float = 0.05  # and of the deviations
    softening: float = 1.0  # temperature of both distributions in the divergence
    betas: tuple[float, float] = (0.9, 0.99)  # of Adam
    fisher_decay: float = 0.98  # of the running average of the squared score gradients
    fisher_every: int = 2  # steps between two of its updates
    fisher_warmup: int = 4  # batches it sees of the untouched model before the first step
    fisher_prior: float = 0.0  # batches that what the decomposition expects counts as beside those
    # seen, where its squared singular values are in units of the loss (basis "kfac")
    threshold: float = 0.5  # score at which the soft count of living components is one half
    temperature: float = 0.1  # width of that count's sigmoid, in scores
    checkpointing: bool = False  # recompute activations in backward: less memory, a third slower
    seed: int = 0  # of the order of the sequences and of the drawn labels

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        check_batches(self, "steps", "fisher_every", "fisher_warmup")
        if self.criterion not in ("fisher", "score"):
            raise ValueError(f'criterion must be "fisher" or "score", got {self.criterion!r}')
        if self.later_steps is not None and not self.later_steps >= 1:
            raise ValueError(f"later_steps must be at least 1, or None, got {self.later_steps}")
        if self.spacing is not None and not self.spacing >= 0.01:
            raise ValueError(f"spacing must be at least 0.01, or None, got {self.spacing}")
        if not 0 <= self.written < math.inf:
            raise ValueError(f"written must be at least 0 and finite, got {self.written}")
        if self.passes is not None and not self.passes > 0:
            raise ValueError(f"passes must be positive, or None, got {self.passes}")
        if self.offered is not None and not self.offered > 0:
            raise ValueError(f"offered must be positive, or None, got {self.offered}")
        if not 0 <= self.fisher_prior < math.inf:
            raise ValueError(f"fisher_prior must be at least 0, got {self.fisher_prior}")
        if not self.softening > 0:
            raise ValueError(f"softening must be positive, got {self.softening}")
        if not self.spare >= 0:
            raise ValueError(f"spare must be at least 0, got {self.spare}")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if not self.stages or sum(stage.share for stage in self.stages) > 1 + 1e-6:
            raise ValueError("the shares of the stages must be above 0 and sum to at most 1")

    def within_passes(self, sequences: int) -> "TrainingSettings":
        """These settings with no more steps than ``passes`` over so many sequences allow."""
        if self.passes is None:
            return self
        most = max(1, math.ceil(self.passes * sequences / self.batch_size))
        later = self.later_steps and min(self.later_steps, most)
        return replace(self, steps=min(self.steps, most), later_steps=later)

    def stations(self, ratios: Sequence[float]) -> tuple[float, ...]:
        """The ratios that are trained for: those given, ascending, and others between them.

        They are evenly spaced in their logarithm, since the loss grows with a power of the ratio.
        """
        found = list(ratios[:1])
        for low, high in pairwise(ratios):
            parts = 1
            if self.spacing is not None:
                parts = max(1, math.ceil(math.log(high / low) / math.log1p(self.spacing) - 1e-6))
            found += [round(low * (high / low) ** (part / parts), 6) for part in range(1, parts)]
            found.append(high)
        return tuple(found)

    def steps_for(self, position: int) -> int:
        """Optimizer steps for the first budget (0), or for a later one."""
        later = self.later_steps or max(1, self.steps // 2)
        return later if position else self.steps

    def stages_for(self, position: int) -> Iterator[tuple[Stage, int]]:
        """The stages for that budget, each with its steps: at least one, and no step is lost."""
        share, done = 0.0, 0
        for stage in self.stages:
            share += stage.share
            end = max(done + 1, round(share * self.steps_for(position)))
            yield stage, end - done
            done = end

    def steps_in_all(self, budgets: int) -> int:
        """Optimizer steps for so many budgets together."""
        return sum(self.steps_for(position) for position in range(budgets))
