"""``soco.blockwise``: a model in a folder that runs with one block of it in memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from soco.checkpoint import is_compressed
from soco.lending import Lender
from soco.plugin import SocoConfig, SocoQuantizer
from soco.sequential import stages
from soco.stored import StoredModel, empty_model
from soco.surgery import low_rank_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StoredCompressed(StoredModel):
    """A compressed model that stays in its folder."""

    def _empty(self) -> tuple[Any, torch.dtype]:
        """With its compressed layers in place; names and shapes in the files were checked."""
        model, dtype = empty_model(
            self.folder, self.entries, self._dtype_of_files, compressed=True
        )
        described = model.config.quantization_config
        described = described if isinstance(described, dict) else described.to_dict()
        quantizer = SocoQuantizer(SocoConfig.from_dict(described), pre_quantized=True)
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
    (embeddings, head) stays in memory.

    Args:
        folder: of a transformers model in safetensors, dense or compressed by soco.
        dtype: to compute in; None: as the model is stored.
        device: to compute on.

    Returns:
        A context manager that gives the model, frozen and in evaluation mode.

    Raises:
        ValueError: something in the folder is broken or missing, or the model has weights in its
            blocks that are stored in another way than it has them (fused experts).
    """
    stored = stored_model(folder)
    stored.check_complete()
    lender = Lender(stored, None, {}, dtype or stored.dtype, torch.device(device))
    with lender.lent():
        yield cast("PreTrainedModel", stored.model)
