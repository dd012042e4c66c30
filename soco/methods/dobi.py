"""Dobi-SVD: the ranks are trained by a truncation of the outputs that has a gradient."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

from torch import Tensor, nn

from soco.keeping import Keeper
from soco.linalg import Factors
from soco.methods.bases import Whitened
from soco.objectives import Objective
from soco.ranks import uniform_ranks
from soco.steps import Step, checkpointed
from soco.surgery import bias_of, replaced, shape_of, transformer_blocks, weight_of
from soco.truncation import (
    PositionSettings,
    TruncatedLinear,
    choose_ranks,
    train_positions,
    update_weights,
)


@dataclass(frozen=True)
class DobiSVD(PositionSettings):
    """Differentiable truncation positions, then ``W' = V_k V_k^T W``.

    Each layer's outputs ``Y = X W^T = U S V^T`` are cut softly to a trainable rank; all ranks are
    trained together against the loss of the whole model and the parameter ratio. Then V_k are the
    leading right singular vectors of all calibration outputs, by incremental PCA. If nothing is
    dropped underway (one batch), W' is the best rank k in ``|(W - W') X|_F``: SVD-LLM's matrix. So
    what the training adds to SVD-LLM is the choice of the ranks.

    Not taken over: the "remapping" of the paper, which stores parts of the factors in 8 bits.
    What differs in the details is said where it is: ``TruncatedLinear`` (whose tokens are cut
    together), ``stable_svd`` (which pairs are close), ``soft_mask`` (half a rank),
    ``parameter_ratio`` (break-even), ``PrincipalDirections`` (weights, no mean).

    Source: Dobi-SVD, ICLR 2025, arXiv:2502.02723.
    """

    name: ClassVar[str] = "dobi-svd"
    allocator: ClassVar[str] = "learned"

    @property
    def components(self) -> Whitened:
        """Those of the outputs, which the incremental PCA finds for itself."""
        return Whitened()

    @property
    def needs(self) -> frozenset[str]:
        """Nothing: it takes its outputs from the model itself."""
        return frozenset()

    def settings(self) -> PositionSettings:
        """How the positions are trained."""
        own = {f.name: getattr(self, f.name) for f in fields(PositionSettings)}
        return PositionSettings(**own)

    def fit(
        self,
        model: nn.Module,
        targets: Mapping[str, nn.Module],
        windows: Tensor,
        budget: int,
        objective: Objective,
        on_step: Callable[[Step], None] = lambda step: None,
        keep: Callable[[str], Keeper | None] = lambda name: None,
    ) -> tuple[dict[str, Factors | None], list[Step]]:
        """Train the positions and make the factors.

        Args:
            model: in evaluation mode; as it was afterwards, also when something fails.
            targets: name to ``nn.Linear`` or ``Conv1D`` in ``model``.
            windows: calibration token ids (sequences, length), on the CPU.
            budget: parameters the targets may keep together (``ranks.parameter_budget``).
            objective: what the compressed model should keep.
            on_step: called after each optimizer step.
            keep: makes what keeps the state of a loop of that name; None: nothing does.

        Returns:
            name to factors in the weight's dtype, or None where the layer stays dense; and the
            steps of the training.

        Raises:
            ValueError: see ``train_positions``; or a target that is no linear layer.

        Warns:
            UserWarning: there are fewer windows than one batch takes; layers saw no token.
        """
        settings = self.settings()
        if len(windows) < settings.batch_size:
            warnings.warn(
                f"the calibration has {len(windows)} sequences, fewer than one batch of "
                f"{settings.batch_size}: training goes on with batches of {len(windows)}",
                stacklevel=2,
            )
            micro = settings.micro_batch and min(settings.micro_batch, len(windows))
            settings = dataclasses.replace(settings, batch_size=len(windows), micro_batch=micro)
        layers = self._layers(targets, budget, settings)
        blocks = transformer_blocks(model) if settings.checkpointing else []
        with replaced(model, layers):
            with checkpointed(blocks):
                history = train_positions(
                    model, layers, windows, budget, objective, settings, on_step,
                    keep("positions"),
                )  # fmt: skip
            ranks = choose_ranks(layers, budget)
            made, unseen = update_weights(
                model, layers, ranks, windows, settings, keep("directions")
            )
        if unseen:
            warnings.warn(
                f"{len(unseen)} layers saw no calibration token: they are cut by their plain SVD "
                f"({', '.join(unseen)})",
                stacklevel=2,
            )
        factors: dict[str, Factors | None] = {}
        for name, module in targets.items():
            pair = made.get(name)
            factors[name] = None if pair is None else pair.to(weight_of(module).dtype)
        return factors, history

    def _layers(
        self, targets: Mapping[str, nn.Module], budget: int, settings: PositionSettings
    ) -> dict[str, TruncatedLinear]:
        """The layers to train, at the same kept fraction each."""
        shapes = {name: shape_of(module) for name, module in targets.items()}
        uniform_ranks(shapes, budget)  # refuses a budget below rank 1 everywhere
        fraction = budget / sum(rows * columns for rows, columns in shapes.values())
        layers = {}
        for name, module in targets.items():
            rows, columns = shapes[name]
            kept = max(1.0, fraction * rows * columns / (rows + columns))
            layers[name] = TruncatedLinear(weight_of(module), bias_of(module), kept, settings)
        return layers
