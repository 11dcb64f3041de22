"""Per-layer embeddings of E2B and E4B that stay in the files of the base, so that no GPU holds them.

E4B has a second table of embeddings, 262,144 x 10,752: 5.25 GiB, more than all its layers in 4 bits. A batch looks up
a few thousand rows of it. Where the base is frozen they are read from the base's file, which is memory-mapped: all
ranks of a node share its pages, and no process holds a copy. The loader's threads gather the rows of a micro-batch
ahead of time, each distinct token once, and they travel with it (`ROWS`, `INDEX`). In the model a module without
parameters stands in the place of the table: DDP and ZeRO have nothing to copy there. A model that is called without
rows, as `generate` does, looks them up by itself.

The numbers are those of the table on the GPU, bit for bit: the same rows, in the same dtype, times the same factor.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import torch

from gemma_dist.errors import CheckpointError, setting
from gemma_dist.files import naming
from gemma_dist.model.folder import local_folder, weight_files
from gemma_dist.tensorfile import TORCH_DTYPES, Entry, TensorFile, open_tensors

TABLE = "embed_tokens_per_layer"
ROWS, INDEX = "per_layer_rows", "per_layer_index"  # of a batch, beside its input_ids


class PerLayerTable:
    """The table in the file of a base. Threads may share it."""

    def __init__(self, file: TensorFile, name: str, config: Any, dtype: torch.dtype) -> None:
        """Args:
            config: the whole model's, which says at which tokens the model looks up the padding's row instead.
            dtype: in which the model holds its weights.

        Raises:
            CheckpointError: the tensor is not the table that the config describes.
        """
        entry, text = file.entries[name], config.get_text_config()
        _require_table(file, entry, name, text)
        self.path, self.dtype = file.path, dtype
        self._opened: BinaryIO = file.path.open("rb")
        self._state = self._state_of_file()
        mapped = np.memmap(self._opened, np.uint8, mode="r", offset=entry.begin, shape=(entry.num_bytes,))
        with warnings.catch_warnings():  # nothing may be written to it, and nothing is
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            self._table = torch.from_numpy(mapped).view(TORCH_DTYPES[entry.dtype]).view(entry.shape)
        self._pad = text.pad_token_id
        ids = [getattr(config, f"{kind}_token_id", None) for kind in ("image", "video", "audio")]
        self._soft_tokens = torch.tensor([token for token in ids if token is not None])

    def gather(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of `input_ids` (B, T) with U distinct tokens.

        Returns:
            `rows` (U, layers x width of a layer) as the table has them, in page-locked memory where there is a GPU to
            copy them to, and `index` (B, T) int64: which row each token has.

        Raises:
            CheckpointError: the file was written to since it was opened.
        """
        if self._state_of_file() != self._state:
            raise CheckpointError(
                f"{self.path} changed while per-layer embeddings were read from it; restore the base and run the same "
                f"command again, or set {setting('ple', 'gpu')}, which reads them once, at the start"
            )
        ids = input_ids.cpu()
        ids = ids.masked_fill(torch.isin(ids, self._soft_tokens), self._pad)  # as the model does
        distinct, index = ids.unique(return_inverse=True)
        rows = self._table.index_select(0, distinct).to(self.dtype)
        return rows.pin_memory() if torch.cuda.is_available() else rows, index

    def add_rows(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`batch` with the rows of its `input_ids`. Raises CheckpointError as `gather`."""
        rows, index = self.gather(batch["input_ids"])
        return batch | {ROWS: rows, INDEX: index}

    def _state_of_file(self) -> tuple[int, int]:
        """Its size and when it was last written. To read behind the end of a mapped file would kill the process."""
        with naming(self.path):
            found = os.fstat(self._opened.fileno())
        return found.st_size, found.st_mtime_ns


class PerLayerEmbedding(torch.nn.Module):
    """In the place of the table: the rows that came with the batch, or those of `table`."""

    def __init__(self, table: PerLayerTable | None, replaced: Any) -> None:
        """Args:
        table: None for a model that is never called without rows.
        replaced: the `Gemma4TextScaledWordEmbedding` that would hold the table.
        """
        super().__init__()
        self.table, self._scale = table, replaced.scalar_embed_scale
        self._handed: tuple[torch.Tensor, torch.Tensor] | None = None
        # Follows the model to its device and dtype, as the table would.
        self.like: torch.Tensor
        self.register_buffer("like", torch.empty(0, dtype=replaced.weight.dtype), persistent=False)

    def hand_over(self, rows: torch.Tensor, index: torch.Tensor) -> None:
        """Give the rows of the next call of `forward`."""
        self._handed = rows, index

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, T) -> (B, T, layers x width of a layer). Raises CheckpointError as `PerLayerTable.gather`."""
        handed, self._handed = self._handed, None
        if handed is None:
            assert self.table is not None, "a model without a table was called without rows"
            handed = self.table.gather(input_ids)
        rows, index = handed
        assert index.shape == input_ids.shape, (index.shape, input_ids.shape)
        rows = rows.to(self.like, non_blocking=True)
        scaled = rows * torch.tensor(self._scale, dtype=rows.dtype)
        return torch.nn.functional.embedding(index.to(rows.device), scaled)


def open_table(model: str, config: Any, dtype: torch.dtype) -> PerLayerTable | None:
    """The table in the files of a model folder or hub name; None where the model has none.

    Raises:
        CheckpointError: the files hold no such tensor, or not as the config describes it.
    """
    if not getattr(config.get_text_config(), "hidden_size_per_layer_input", 0):
        return None
    folder = local_folder(model, f"the model {model!r}")
    for path in weight_files(folder):
        file = open_tensors(path)
        for name in file.entries:
            if name.endswith(f"{TABLE}.weight"):
                return PerLayerTable(file, name, config, dtype)
    raise CheckpointError(f"{folder} holds no {TABLE}.weight in safetensors; get a complete copy of the model")


@contextlib.contextmanager
def table_left_out(table: PerLayerTable | None) -> Iterator[None]:
    """Within, a Gemma 4 that is built has `PerLayerEmbedding` in the place of its table, which is never loaded.

    The replacement comes when the table is put into its model, by torch's own hook: before weights are read or
    quantized, and nothing of transformers is replaced.
    """

    def replace(module: torch.nn.Module, name: str, submodule: torch.nn.Module | None) -> torch.nn.Module | None:
        if name == TABLE and submodule is not None and not isinstance(submodule, PerLayerEmbedding):
            return PerLayerEmbedding(table, submodule)
        return None

    hook = torch.nn.modules.module.register_module_module_registration_hook(replace)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


def take_rows_of_batch(model: Any) -> None:
    """Let a `Gemma4ForConditionalGeneration` that was built in `table_left_out` take `ROWS` and `INDEX`."""
    model.model.register_forward_pre_hook(_hand_over, with_kwargs=True)


def _hand_over(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before each forward pass of `Gemma4Model`, which knows no such arguments."""
    rows, index = kwargs.pop(ROWS, None), kwargs.pop(INDEX, None)
    if rows is not None:
        model.language_model.embed_tokens_per_layer.hand_over(rows, index)
    return args, kwargs


def _require_table(file: TensorFile, entry: Entry, name: str, text: Any) -> None:
    """Raises CheckpointError unless the tensor has the shape of the table and a dtype that rows can be taken from."""
    width = text.num_hidden_layers * text.hidden_size_per_layer_input
    if entry.shape != (text.vocab_size_per_layer_input, width):
        raise CheckpointError(
            f"{name} in {file.path} has the shape {entry.shape}, and config.json describes "
            f"{(text.vocab_size_per_layer_input, width)}; get a complete copy of the model"
        )
    if entry.dtype not in TORCH_DTYPES:
        raise CheckpointError(
            f"{name} in {file.path} is stored as {entry.dtype}; per-layer embeddings stay in their file as one of "
            f"{list(TORCH_DTYPES)} alone: set {setting('ple', 'gpu')}"
        )
