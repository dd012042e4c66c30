"""SoCo: the singular spectrum is learned, and components go by their learned scores."""

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from soco.methods.bases import Plain, Whitened
from soco.methods.protocol import ClosedForm
from soco.training import SOFT_STAGES, TrainingSettings


@dataclass(frozen=True)
class SoCo(TrainingSettings, ClosedForm):
    """Learned spectrum optimization (SoCo): ``W' = U (Sigma * S) V^T`` with a trained diagonal S.

    All layers are trained together against the dense model, in three stages; who stays is decided
    by learned score under one budget, and the scores of those that stay are folded into the
    factors. With every score at 1 and nothing pruned, W' is W.

    The form, the losses and the order of the stages are those of arXiv:2502.15092. What is not
    published is our choice: the score function, the Fisher criterion, the whitened basis, the hard
    mask, and every number. ``SoCo.paper()`` is the nearest to the published description.
    """

    name: ClassVar[str] = "soco"
    allocator: ClassVar[str] = "learned"

    basis: Literal["whitened", "plain"] = "whitened"  # whose components: SVD-LLM's, or the weight's
    largest_score: float = 2.0  # bound of the scores; they start at 1
    deviation: bool = False  # train a vector that is added to each compressed layer's outputs

    @classmethod
    def paper(cls, **changes: object) -> "SoCo":
        """Plain SVD, soft losses and pruning by score, as far as the paper's text goes.

        Args:
            **changes: fields to set otherwise.
        """
        preset: dict[str, object] = {
            "basis": "plain",
            "criterion": "score",
            "stages": SOFT_STAGES,
            "deviation": True,
            "steps": 600,
        }
        return cls(**{**preset, **changes})  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        super().__post_init__()
        if self.basis not in ("whitened", "plain"):
            raise ValueError(f'basis must be "whitened" or "plain", got {self.basis!r}')
        if not self.largest_score > 1:
            raise ValueError(f"largest_score must be above 1, got {self.largest_score}")

    @property
    def components(self) -> Whitened | Plain:
        """The basis in which weights are trained."""
        return Whitened() if self.basis == "whitened" else Plain()

    def settings(self) -> TrainingSettings:
        """How the scores are trained."""
        own = {f.name: getattr(self, f.name) for f in fields(TrainingSettings)}
        return TrainingSettings(**own)
