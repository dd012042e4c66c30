"""What a compression was asked for: method, allocator and options that go together."""

import inspect
import json
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from soco.allocators import ALLOCATORS, Allocator, Learned
from soco.calibration import OF_GRADIENTS
from soco.methods import (
    METHODS,
    FittedMethod,
    Method,
    RankLearner,
    SequentialMethod,
    SharingMethod,
    SoCo,
    TrainedMethod,
)
from soco.methods.soco import EFFORTS
from soco.refinement import Refinement
from soco.surgeon import SVDSurgeon

_PROBING = ("sensitivity", "lems")  # allocators that try layers out at several ranks

# Allocators that run no model.
_LOCAL = ("uniform", "energy", "v2", "effective-rank", "adacr")


@dataclass(frozen=True)
class Choices:
    """What was asked for, but for model and text."""

    method: Method
    rule: Allocator
    pivoted: bool
    surgeon: SVDSurgeon | None
    refinement: Refinement | None

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        if self.pivoted and isinstance(self.method, SharingMethod):
            raise ValueError(f"method {self.method.name} shares its bases, which cannot be pivoted")
        if self.pivoted and isinstance(self.method, RankLearner):
            raise ValueError(
                f"method {self.method.name} cannot count pivoted factors in its budget"
            )
        if isinstance(self.rule, Learned) and isinstance(self.method, SharingMethod):
            raise ValueError('the allocator "learned" takes a method without shared bases')
        try:
            json.dumps(self.settings(), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"the settings are written into the model's config.json and have to be plain, "
                f"finite values: {error}"
            ) from error

    def settings(self) -> dict[str, Any]:
        """What the result depends on, as plain JSON data."""
        own = asdict(cast(Any, self.method))
        for name in ("pivoted", "refinement"):  # said below, as they are used
            own.pop(name, None)
        if not isinstance(self.method, TrainedMethod | RankLearner):
            fields = asdict(cast(Any, self.rule))
            own["allocator"] = self.rule.name
            own |= {f"{self.rule.name}.{name}": value for name, value in fields.items()}
        for name, part in (("surgeon", self.surgeon), ("refine", self.refinement)):
            if part is not None:
                own[name] = asdict(part)
        return {**own, **({"pivoted": True} if self.pivoted else {})}

    @property
    def needs(self) -> frozenset[str]:
        """The calibration statistics that are read."""
        return self.method.needs | self.rule.needs

    @property
    def reads_text(self) -> bool:
        """Whether there has to be calibration text."""
        trains = isinstance(self.method, TrainedMethod | RankLearner | SequentialMethod)
        probes = self.rule.name in (*_PROBING, "learned")
        later = self.surgeon is not None or self.refinement is not None
        return bool(self.needs) or trains or probes or later

    @property
    def keeps(self) -> bool:
        """Whether statistics or spectra are asked for again after the decomposition."""
        again = isinstance(self.method, FittedMethod) or bool(self.rule.needs)
        again = again or getattr(self.method, "deviation", None) == "mean"
        return again or self.rule.name in _PROBING


def choose(
    method: str | Method,
    allocator: str | Allocator | None = None,
    *,
    effort: str | None = None,
    preset: str | None = None,
    pivoted: bool | None = None,
    surgeon: bool | SVDSurgeon | None = None,
    refine: bool | Refinement | None = None,
    seed: int = 0,
    **_: object,
) -> Choices:
    """What these arguments of ``soco.compress`` come to; its others are no choices.

    Raises:
        ValueError: there is no such method, effort, preset or allocator, or they do not go
            together.
    """
    chosen = find_method(method, seed, effort=effort, preset=preset)
    return Choices(
        chosen,
        _allocator(allocator, chosen),
        bool(getattr(chosen, "pivoted", False)) if pivoted is None else bool(pivoted),
        _surgeon(surgeon, chosen, seed),
        _refinement(refine, chosen, seed),
    )


def find_method(
    method: str | Method, seed: int, *, effort: str | None = None, preset: str | None = None
) -> Method:
    """A method by its name, with a seed where it takes one; an instance is returned as it is.

    Raises:
        ValueError: there is no such method, effort or preset, or the method has none.
    """
    if effort is not None or preset is not None:
        return _preset(method, seed, effort, preset)
    if isinstance(method, str):
        if method not in METHODS:
            known = ", ".join(sorted(METHODS))
            raise ValueError(f"there is no method {method!r}: choose one of {known}")
        seeds = "seed" in inspect.signature(METHODS[method]).parameters
        return METHODS[method](**({"seed": seed} if seeds else {}))
    if not isinstance(method, Method):
        raise ValueError(f"method must be a name or an instance of a method, got {method!r}")
    return method


def _allocator(allocator: str | Allocator | None, method: Method) -> Allocator:
    """The rule that was asked for, or the method's own."""
    if isinstance(method, TrainedMethod | RankLearner):
        if getattr(allocator, "name", allocator) not in (None, method.allocator):
            raise ValueError(
                f"method {method.name} finds its ranks by training and takes no allocator"
            )
        return ALLOCATORS[method.allocator]()
    name = method.allocator if allocator is None else allocator
    if isinstance(name, str):
        if name not in ALLOCATORS:
            known = ", ".join(sorted(ALLOCATORS))
            raise ValueError(f"there is no allocator {name!r}: choose one of {known}")
        return ALLOCATORS[name]()
    if not isinstance(name, Allocator):
        raise ValueError(
            f"allocator must be a name or an instance of an allocator, got {allocator!r}"
        )
    return name


def _surgeon(surgeon: bool | SVDSurgeon | None, method: Method, seed: int) -> SVDSurgeon | None:
    if surgeon is None:
        own = getattr(method, "surgeon", None)
        return own if isinstance(own, SVDSurgeon) else None
    if isinstance(surgeon, bool):
        return SVDSurgeon(seed=seed) if surgeon else None
    if not isinstance(surgeon, SVDSurgeon):
        raise ValueError(f"surgeon must be True, False or an SVDSurgeon, got {surgeon!r}")
    return surgeon


def _preset(method: str | Method, seed: int, effort: str | None, preset: str | None) -> SoCo:
    """SoCo as a preset has it, one of its efforts among them."""
    what = "effort" if preset is None else "preset"
    if effort is not None and preset is not None:
        raise ValueError(f"effort {effort!r} and preset {preset!r} are two presets: give one")
    if method != SoCo.name:
        name = method if isinstance(method, str) else f"a {type(method).__name__} that is made"
        raise ValueError(f'{what} is for method="soco", and {name} has none')
    if effort is not None and effort not in EFFORTS:
        raise ValueError(f"there is no effort {effort!r}: choose one of {', '.join(EFFORTS)}")
    return SoCo.preset(effort or preset or "balanced", seed=seed)


def _refinement(refine: bool | Refinement | None, method: Method, seed: int) -> Refinement | None:
    if refine is None:
        own = getattr(method, "refinement", None)
        return replace(own, seed=seed) if isinstance(own, Refinement) else None
    if isinstance(refine, bool):
        return Refinement(seed=seed) if refine else None
    if not isinstance(refine, Refinement):
        raise ValueError(f"refine must be True, False or a Refinement, got {refine!r}")
    return refine


def check_streamed(choices: Choices) -> None:
    """Refuse what runs the whole model, or trains its factors.

    Raises:
        ValueError: it does.
    """
    method, rule = choices.method, choices.rule
    name = method.name
    if isinstance(method, RankLearner):
        raise ValueError(f"method {name} needs the whole model in memory: stream soco, say")
    if isinstance(method, SharingMethod) and (
        choices.needs & OF_GRADIENTS or isinstance(method, FittedMethod)
    ):
        raise ValueError(f"method {name} shares bases and asks for more than inputs: do not stream")
    if rule.name not in _LOCAL and not isinstance(method, TrainedMethod):
        raise ValueError(
            f"the allocator {rule.name!r} runs the whole model, which is not in memory: give "
            f"allocator= one of {', '.join(_LOCAL)}"
        )
    if choices.surgeon is not None or choices.refinement is not None:
        raise ValueError("surgeon and refine need the whole model in memory")
