"""Sizes as people write them, and what fits into them."""

from typing import Any

import pytest

from soco.ranks import layer_params
from soco.sizes import params_for_bytes, parse_bytes

SHAPES = {"q": (8, 8), "up": (24, 8)}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (7, 7), ("7", 7), ("7 B", 7), ("2kB", 2000), ("2KiB", 2048), ("1.5 MiB", 1572864),
        ("500MB", 500_000_000), ("4GiB", 4 * 2**30), (" 4 gib ", 4 * 2**30), ("0.5TB", 5 * 10**11),
    ],
)  # fmt: skip
def test_sizes_are_read(text, value):
    assert parse_bytes(text) == value


@pytest.mark.parametrize(
    "text", ["", "GiB", "4 PiB", "4 GiB of it", "-4GB", "1e3", 0, -4, True, 4.0, None]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="a size is a positive number of bytes, or text such as"):
        parse_bytes(text)


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("pivoted", [False, True])
def test_what_fits_and_not_one_parameter_more(width, pivoted):
    indices = 8 * (8 + 8) if pivoted else 0
    fixed = 1000
    for params in (60, 100, 255):
        for spare in (0, width - 1):
            size = fixed + indices + params * width + spare
            found = params_for_bytes(size, fixed=fixed, shapes=SHAPES, width=width, pivoted=pivoted)
            assert found == params
    least = sum(layer_params(shape, 1, pivoted) for shape in SHAPES.values())
    with pytest.raises(ValueError, match="is too small: what is not compressed takes 1,000 bytes"):
        params_for_bytes(
            fixed + indices + least * width - 1,
            fixed=fixed, shapes=SHAPES, width=width, pivoted=pivoted,
        )  # fmt: skip


def test_a_size_that_the_dense_model_has_is_no_limit():
    for size in (1000 + 256 * 4, "1GB"):
        with pytest.raises(ValueError, match="is no limit: the dense model takes 2,024 bytes"):
            params_for_bytes(size, fixed=1000, shapes=SHAPES, width=4, pivoted=False)
    found = params_for_bytes(2023, fixed=1000, shapes=SHAPES, width=4, pivoted=False)
    assert found == 255


def test_no_more_than_can_be_made():
    options: dict[str, Any] = dict(
        fixed=0, shapes=SHAPES, width=4, pivoted=False, most=200, least=100
    )
    assert params_for_bytes(900, **options) == 200
    assert params_for_bytes(500, **options) == 125
    with pytest.raises(ValueError, match="the smallest that can be made is 400"):
        params_for_bytes(399, **options)
