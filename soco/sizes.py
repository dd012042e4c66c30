"""Sizes in bytes, as people write them, and the parameters that fit into them."""

import re
from collections.abc import Mapping

from soco.ranks import Shape, layer_params

_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


def parse_bytes(size: int | str) -> int:
    """Bytes from a number, or from text such as "4GiB", "1.5 GB" or "500MB".

    Raises:
        ValueError: it is no such size.

    >>> parse_bytes("4GiB"), parse_bytes("1.5 MB"), parse_bytes(1000)
    (4294967296, 1500000, 1000)
    """
    if isinstance(size, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", size, re.IGNORECASE)
        unit = found and _UNITS.get(found[2].lower())
        if found and unit:
            return int(float(found[1]) * unit)
    elif isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    raise ValueError(
        f'a size is a positive number of bytes, or text such as "4GiB" or "500MB", got {size!r}'
    )


def params_for_bytes(
    size: int | str,
    *,
    fixed: int,
    shapes: Mapping[str, Shape],
    width: int,
    pivoted: bool,
    most: int | None = None,
    least: int | None = None,
) -> int:
    """How many parameters some layers may keep so that the whole model takes no more than ``size``.

    Args:
        size: of all parameters of the model, as ``parse_bytes`` reads it.
        fixed: bytes of everything but the weights of these layers.
        shapes: name to (out, in) of the layers.
        width: bytes of one parameter.
        pivoted: whether they are stored as pivoted factors, whose pivots take 8 bytes a rank: room
            is left for as many as there can be.
        most: the largest count that can be made; None: a little less than all.
        least: the smallest; None: rank 1 everywhere.

    Returns:
        Parameters.

    Raises:
        ValueError: it is too small, or the model fits already.
    """
    wanted = parse_bytes(size)
    indices = sum(8 * min(shape) for shape in shapes.values()) if pivoted else 0
    total = sum(rows * columns for rows, columns in shapes.values())
    if least is None:
        least = sum(layer_params(shape, 1, pivoted) for shape in shapes.values())
    params = (wanted - fixed - indices) // width
    if params < least:
        raise ValueError(
            f"size {size} is too small: what is not compressed takes {fixed:,} bytes, and the "
            f"smallest that can be made is {fixed + indices + least * width:,}"
        )
    limit = total - 1 if most is None else most
    if params > limit:
        if fixed + total * width <= wanted:
            raise ValueError(
                f"size {size} is no limit: the dense model takes {fixed + total * width:,} bytes"
            )
        return limit
    return params
