"""SoCo: the singular spectrum is learned, and components go by their learned scores."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from soco.methods.bases import Plain, Scaled, TwoSided, Whitened
from soco.methods.protocol import Basis, ClosedForm
from soco.refinement import Refinement
from soco.stages import CHOICE_STAGES, SHORT_STAGES, SOFT_STAGES, TrainingSettings


@dataclass(frozen=True)
class SoCo(TrainingSettings, ClosedForm):
    """Learned spectrum optimization (SoCo): ``W' = U (Sigma * S) V^T`` with a trained diagonal S.

    All layers are trained together against the dense model, in three stages; who stays is decided
    by learned score under one budget, and the scores of those that stay are folded into the
    factors. With every score at 1 and nothing pruned, W' is W.

    The form, the losses and the order of the stages are those of arXiv:2502.15092. What is not
    published is our choice: the score function, the Fisher criterion, the basis, the hard mask, and
    every number (docs/methods.md says why). ``SoCo.preset("paper")`` is the nearest to the
    published description.
    """

    name: ClassVar[str] = "soco"
    allocator: ClassVar[str] = "learned"

    basis: Literal["kfac", "whitened", "scaled", "plain"] = "kfac"  # whose components: KFAC-SVD's,
    # SVD-LLM's, ASVD's, or the weight's own
    sampled: bool = False  # for basis "kfac": gradients of an eighth of the calibration only
    largest_score: float = 2.0  # bound of the scores, which start at 1; inf: there is none
    channels: bool = True  # train a scale for every input and output of a layer, too: two more
    # diagonals, which cost nothing in the end
    deviation: Literal["none", "mean", "vector"] = "none"  # what is added to the outputs of each
    # compressed layer: nothing; what keeps their mean on the calibration text; a trained vector

    pivoted: bool = True  # store layers as pivot rows and what combines them, where nobody says
    # otherwise; the budget counts what is stored
    refinement: Refinement | None = None  # joint training of all factors, at the end

    @classmethod
    def preset(cls, preset: str, **changes: object) -> "SoCo":
        """One of ``PRESETS``, with some fields set otherwise.

        Args:
            preset: "fast" is a choice of components with few steps of training, "balanced" all
                three stages, "best" the choice and a joint training of all factors, for which
                scores that were trained before are a worse beginning; "paper" is plain SVD, soft
                losses and pruning by score, as far as the paper's text goes.
            **changes: fields to set otherwise.

        Raises:
            ValueError: there is no such preset.
        """
        if preset not in PRESETS:
            raise ValueError(f"there is no preset {preset!r}: choose one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[preset], **changes})

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        super().__post_init__()
        for name, known in (
            ("basis", ("kfac", "whitened", "scaled", "plain")),
            ("deviation", ("none", "mean", "vector")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        if not self.largest_score > 1:
            raise ValueError(f"largest_score must be above 1, got {self.largest_score}")

    @property
    def components(self) -> Basis:
        """The basis in which weights are trained."""
        centered = self.deviation == "mean"
        if self.basis == "kfac":
            return TwoSided(centered=centered, sampled=self.sampled)
        if self.basis == "whitened":
            return Whitened(centered=centered)
        return Scaled() if self.basis == "scaled" else Plain()

    @property
    def needs(self) -> frozenset[str]:
        """The statistics of its basis, and the means of the inputs where they are kept."""
        return self.components.needs | ({"mean"} if self.deviation == "mean" else set())

    def settings(self) -> TrainingSettings:
        """How the scores are trained."""
        own = {f.name: getattr(self, f.name) for f in fields(TrainingSettings)}
        return TrainingSettings(**own)


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "fast": {
        "sampled": True,
        "written": 0.0,
        "batch_size": 4,
        "fisher_warmup": 4,
        "fisher_prior": 8.0,
        "steps": 14,
        "stages": SHORT_STAGES,
    },
    "balanced": {},
    "best": {
        "written": 0.0,
        "fisher_warmup": 32,
        "steps": 1,
        "stages": CHOICE_STAGES,
        "channels": False,
        "refinement": Refinement(steps=400, written=1.0),
    },
    "paper": {
        "basis": "plain",
        "criterion": "score",
        "stages": SOFT_STAGES,
        "channels": False,
        "deviation": "vector",
        "pivoted": False,
        "written": 0.0,
        "steps": 600,
        "passes": None,
    },
}
EFFORTS = ("fast", "balanced", "best")
