"""What a training can be told, and what is refused."""

import dataclasses
import math

import pytest

from soco.stages import STAGES, Stage, TrainingSettings


def test_excess_runs_down_to_the_target():
    stage = Stage("coarse", share=1.0, excess_begin=1.0, exponent=3.0, period=4)
    values = [stage.excess(step, 40) for step in range(0, 40, 4)]
    assert values == sorted(values, reverse=True)
    assert values[0] == pytest.approx((1 - 0.1) ** 3)
    assert values[-1] == 0.0


def test_refinement_alternates():
    stage = Stage("refine", 1.0, excess_begin=0.2, excess_end=0.2, period=8, recover=5, ratio=3.0)
    assert [stage.excess(step, 80) for step in range(8)] == pytest.approx([0.2] * 5 + [0.0] * 3)
    assert [stage.ratio_weight(step) for step in range(8)] == [0.0] * 5 + [3.0] * 3


def test_rate_follows_a_cosine():
    stage = Stage("sparsify", 1.0, rate_begin=1.0, rate_end=0.0)
    assert stage.rate(0, 10) == 1.0
    assert stage.rate(5, 10) == pytest.approx(0.5)
    assert stage.rate(10, 10) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("steps", 0, "steps must be a positive whole number, got 0"),
        ("batch_size", 2.5, "batch_size must be a positive whole number, got 2.5"),
        ("micro_batch", 9, r"micro_batch must be from 1 to batch_size \(8\), got 9"),
        ("learning_rate", 0.0, "learning_rate must be positive, got 0.0"),
        ("criterion", "size", 'criterion must be "fisher" or "score", got \'size\''),
        ("later_steps", 0, "later_steps must be at least 1, or None, got 0"),
        ("written", -0.5, "written must be at least 0 and finite, got -0.5"),
        ("written", math.inf, "written must be at least 0 and finite, got inf"),
        ("spacing", 0.0, "spacing must be at least 0.01, or None, got 0.0"),
        ("passes", 0.0, "passes must be positive, or None, got 0.0"),
        ("fisher_prior", -1.0, "fisher_prior must be at least 0, got -1.0"),
        ("fisher_prior", float("nan"), "fisher_prior must be at least 0, got nan"),
        ("spare", -0.5, "spare must be at least 0, got -0.5"),
        ("stages", (), "the shares of the stages must be above 0"),
    ],
)
def test_settings_are_checked(field, value, text):
    with pytest.raises(ValueError, match=text):
        TrainingSettings(**{field: value})


@pytest.mark.parametrize(
    ("spacing", "ratios", "expected"),
    [
        (0.1, (0.2,), (0.2,)),
        (0.25, (0.2, 0.25), (0.2, 0.25)),  # a step of a quarter is not above it
        (0.24, (0.2, 0.25), (0.2, 0.223607, 0.25)),
        (1.0, (0.1, 0.2, 0.8), (0.1, 0.2, 0.4, 0.8)),
        (0.9, (0.1, 0.8), (0.1, 0.168179, 0.282843, 0.475683, 0.8)),  # evenly, 2^(3/4) each
        (0.5, (0.001, 0.002), (0.001, 0.001414, 0.002)),
        (None, (0.2, 0.6), (0.2, 0.6)),
    ],
)
def test_ratios_far_apart_get_others_between_them(spacing, ratios, expected):
    assert TrainingSettings(spacing=spacing).stations(ratios) == expected


def test_no_more_passes_over_the_calibration_than_that():
    settings = TrainingSettings(passes=16, steps=240, batch_size=8)
    assert settings.within_passes(120).steps == 240  # 16 passes of 15 steps
    assert settings.within_passes(119).steps == 238
    short = settings.within_passes(32)
    assert (short.steps_for(0), short.steps_for(1)) == (64, 32)
    given = TrainingSettings(passes=0.01, later_steps=100).within_passes(32)
    assert (given.steps, given.later_steps) == (1, 1)
    assert TrainingSettings(passes=None).within_passes(1).steps == 240


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(240, [48, 48, 144]), (64, [13, 13, 38]), (32, [6, 7, 19]), (3, [1, 1, 1]), (1, [1, 1, 1])],
)
def test_stages_share_all_the_steps(steps, expected):
    """Rounded one by one, 32 steps would be 31."""
    settings = TrainingSettings(steps=steps, later_steps=steps)
    for position in (0, 1):
        found = list(settings.stages_for(position))
        assert [stage for stage, _ in found] == list(STAGES)
        assert [each for _, each in found] == expected


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"share": 0.0}, "share must be in"),
        ({"excess_begin": 1.5}, "excess must be from 0 to 1"),
        ({"recover": 9}, "recover must be 0 to period"),
    ],
)
def test_stages_are_checked(change, text):
    with pytest.raises(ValueError, match=f"stage coarse: {text}"):
        dataclasses.replace(STAGES[0], **change)


def test_later_budgets_take_half_the_steps_unless_told_otherwise():
    assert [TrainingSettings(steps=9).steps_for(i) for i in range(3)] == [9, 4, 4]
    assert [TrainingSettings(steps=9, later_steps=7).steps_for(i) for i in range(3)] == [9, 7, 7]
    assert TrainingSettings(steps=1).steps_for(1) == 1
