"""What goes together, what a choice needs, and when it needs text."""

import math

import pytest

from soco.allocators import ALLOCATORS, Energy
from soco.choices import choose, find_method
from soco.methods import METHODS, SVDLLM, SoCo
from soco.refinement import Refinement
from soco.surgeon import SVDSurgeon


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_an_allocator_of_its_own(name):
    choices = choose(name)
    assert choices.method == find_method(name, 0)
    assert choices.rule.name == choices.method.allocator
    assert choices.needs == choices.method.needs | choices.rule.needs


def test_names_and_instances_are_the_same():
    named = choose("svd-llm", "energy", surgeon=True, refine=True, seed=3)
    assert named == choose(
        SVDLLM(), Energy(), surgeon=SVDSurgeon(seed=3), refine=Refinement(seed=3)
    )
    assert choose("soco", seed=3).method == SoCo(seed=3)
    assert choose("svd-surgeon").surgeon is not None
    assert choose("svd-surgeon", surgeon=False).surgeon is None


@pytest.mark.parametrize(
    ("arguments", "reads"),
    [
        ({"method": "svd"}, False),
        ({"method": "svd", "allocator": "energy", "pivoted": True}, False),
        ({"method": "svd", "allocator": "lems"}, True),
        ({"method": "svd", "allocator": "sensitivity"}, True),
        ({"method": "svd", "allocator": "learned"}, True),
        ({"method": "svd", "allocator": "adacr"}, True),
        ({"method": "svd", "surgeon": True}, True),
        ({"method": "svd", "refine": True}, True),
        ({"method": "svd-llm"}, True),
        ({"method": "aa-svd"}, True),
        ({"method": "dobi-svd"}, True),
        ({"method": "soco"}, True),
    ],
)
def test_who_reads_text(arguments, reads):
    assert choose(**arguments).reads_text == reads


@pytest.mark.parametrize(
    ("arguments", "keeps"),
    [
        (("svd-llm",), False),
        (("svd-llm", "energy"), False),
        (("svd-llm", "lems"), True),
        (("asvd",), True),
        (("adasvd", "uniform"), True),
        (("svd", "adacr"), True),
    ],
)
def test_who_asks_again_after_the_decomposition(arguments, keeps):
    assert choose(*arguments).keeps == keeps


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"method": "magic"}, "there is no method 'magic': choose one of aa-svd"),
        ({"method": 3}, "method must be a name or an instance of a method, got 3"),
        ({"method": "svd", "allocator": "magic"}, "there is no allocator 'magic': choose one of"),
        ({"method": "svd", "allocator": 3}, "allocator must be a name or an instance of an"),
        ({"method": "soco", "allocator": "energy"}, "finds its ranks by training and takes no"),
        ({"method": "dobi-svd", "allocator": "energy"}, "finds its ranks by training and takes no"),
        ({"method": "dobi-svd", "pivoted": True}, "dobi-svd cannot count pivoted factors"),
        ({"method": "basis-sharing", "pivoted": True}, "shares its bases, which cannot be pivoted"),
        ({"method": "basis-sharing", "allocator": "learned"}, "a method without shared bases"),
        ({"method": SoCo(learning_rate=math.inf)}, "have to be plain, finite values"),
    ],
)
def test_what_does_not_go_together(arguments, text):
    with pytest.raises(ValueError, match=text):
        choose(**arguments)


@pytest.mark.parametrize("rule", ALLOCATORS)
def test_settings_name_everything(rule):
    settings = choose("svd", rule, pivoted=True, surgeon=True, refine=True).settings()
    assert settings["allocator"] == rule
    assert settings["pivoted"] is True
    assert settings["refine"]["steps"] == Refinement().steps
    assert settings["surgeon"]["damping"] == SVDSurgeon().damping
