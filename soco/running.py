"""``soco.blockwise``: a model in a folder that runs with one block of it in memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from soco.checkpoint import CONFIG, is_compressed
from soco.headers import read_json
from soco.lending import Lender
from soco.plugin import SocoConfig, SocoQuantizer
from soco.stored import StoredModel, empty_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StoredCompressed(StoredModel):
    """A compressed model that stays in its folder."""

    def _empty(self) -> tuple[Any, torch.dtype]:
        """With its compressed layers in place; names and shapes in the files were checked."""
        model, dtype = empty_model(self.folder, self.entries, self._dtype_of_files, compressed=True)
        described = read_json(self.folder / CONFIG)["quantization_config"]
        config = cast(SocoConfig, SocoConfig.from_dict(described))
        quantizer = SocoQuantizer(config, pre_quantized=True)
        files = [str(file) for file in self.files]
        quantizer._process_model_before_weight_loading(model, files)
        quantizer._process_model_after_weight_loading(model)
        return model.eval(), dtype


def stored_model(folder: str | PathLike[str]) -> StoredModel:
    """A model in a folder, dense or compressed, of which nothing is read yet.

    Raises:
        ValueError: something in the folder is broken or missing; it is named.
    """
    place = Path(folder)
    return (StoredCompressed if is_compressed(place) else StoredModel)(place)


def compressed_model(folder: str | PathLike[str]) -> StoredModel:
    """The same of a compressed model.

    Raises:
        ValueError: it is another one, too.
    """
    place = Path(folder)
    if not is_compressed(place):
        raise ValueError(f"{place} is not the folder of a model compressed by soco")
    return StoredCompressed(place)


@contextmanager
def blockwise(
    folder: str | PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> Iterator["PreTrainedModel"]:
    """Inside, a model that need not fit into memory runs: each block is read when it begins.

    For what runs a model a few times over many tokens: ``soco.evaluate`` on a text, say, in large
    batches, since every batch reads all weights. The model cannot be trained or saved, and writing
    text costs a reading of all weights for every token. What is outside of the transformer blocks
    (embeddings, head) stays in memory. Experts of a mixture run one after the other.

    Args:
        folder: of a transformers model in safetensors, dense or compressed by soco.
        dtype: to compute in; None: as the model is stored.
        device: to compute on.

    Returns:
        A context manager that gives the model, frozen and in evaluation mode.

    Raises:
        ValueError: something in the folder is broken or missing; it is named.
    """
    stored = stored_model(folder)
    with lent(stored, dtype=dtype, device=device) as model:
        yield model


@contextmanager
def lent(
    stored: StoredModel,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> Iterator["PreTrainedModel"]:
    """``blockwise`` of a model that is at hand; its experts are layers from then on."""
    stored.split_experts()
    stored.check_complete()
    lender = Lender(stored, None, {}, dtype or stored.dtype, torch.device(device))
    with lender.lent():
        yield cast("PreTrainedModel", stored.model)
