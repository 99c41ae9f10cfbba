"""Keys and values of rows that are being answered, in buffers that are made once."""

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_lightning.models.attention import PackedRows, Rows
from rlhf_lightning.models.packing import Packing


class Store:
    """One slot a row and one column a token; prompts end in the same column, so that all rows write the next one.

    Rows that are finished give up their slot: those still active are always the first ones.
    """

    def __init__(self, lengths: Tensor, columns: int) -> None:
        """Make room, without memory yet: the layers say what they need.

        Args:
            lengths: Tokens in the prompt of each row. Shape (rows,), int64.
            columns: Longest prompt and longest response together.
        """
        self.active, self.column = len(lengths), int(lengths.max())
        self.columns = columns
        self.keys: dict[tuple[int, int], Tensor] = {}
        self.values: dict[tuple[int, int], Tensor] = {}
        hidden = torch.arange(columns, device=lengths.device) < (self.column - lengths)[:, None]
        self.bias = torch.zeros(hidden.shape, device=lengths.device).masked_fill_(hidden, -torch.inf)[:, None, None]
        self.ragged = bool(hidden.any())

    def layer(self, index: tuple[int, int], key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Buffers of a layer, shapes (rows, key heads, columns, head size) and (rows, key heads, columns, value head size).

        Args:
            index: Of the layer, and of the call within it.
            key: Gives the first buffer its sizes and dtype. Shape (tokens, key heads, head size).
            value: Gives the second its own. Shape (tokens, key heads, value head size).
        """
        if index not in self.keys:
            self.keys[index], self.values[index] = (
                x.new_zeros((self.active, x.shape[1], self.columns, x.shape[2])) for x in (key, value)
            )
        return self.keys[index], self.values[index]

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Give some slots what others hold. Shapes (n,), int64."""
        for buffer in (*self.keys.values(), *self.values.values()):
            buffer[target, :, : self.column] = buffer[source, :, : self.column]
        self.bias[target] = self.bias[source]

    def keep(self, going_on: Tensor) -> Tensor:
        """Let the slots of finished rows go to active ones from the end.

        Args:
            going_on: Which of the active rows are. Shape (active,), bool.

        Returns:
            The old slot of each row that is still active, in its new place. Shape (still active,), int64.
        """
        count = int(going_on.sum())
        slots = torch.arange(count, device=going_on.device)
        holes = (~going_on[:count]).nonzero().squeeze(1)
        movers = going_on[count:].nonzero().squeeze(1) + count
        slots[holes] = movers
        if len(movers):
            self.copy(movers, holes)
        self.active = count
        return slots


class _Calls:
    """Counts the calls of each layer in one forward: differential attention, for one, makes two with different values."""

    def __init__(self) -> None:
        self.made: dict[int, int] = {}

    def index(self, layer: int) -> tuple[int, int]:
        """Index of the layer and of this call of it."""
        self.made[layer] = self.made.get(layer, -1) + 1
        return layer, self.made[layer]


class Prefill(Rows):
    """Prompts end to end, each given once; what they leave behind goes into the slot of its first row."""

    def __init__(self, packing: Packing, slots: Tensor, store: Store) -> None:
        """Args: the prompts end to end, the slot of each in their order (prompts,), and where to write."""
        self.packed, self.slots, self.store, self.calls = PackedRows(packing), slots, store, _Calls()

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:
        first, end = 0, self.store.column
        keys, values = self.store.layer(self.calls.index(layer), key, value)
        for run in self.packed.runs:
            slots, tokens = self.slots[first : first + run.rows], slice(run.start, run.start + run.rows * run.length)
            for buffer, new in ((keys, key), (values, value)):
                rows = new[tokens].unflatten(0, (run.rows, run.length)).transpose(1, 2)
                buffer[slots, :, end - run.length : end] = rows
            first += run.rows
        return self.packed.attend(layer, query, key, value, scaling, window)


class Decode(Rows):
    """One new token a row, which sees all that its row has stored."""

    def __init__(self, store: Store) -> None:
        self.store, self.calls = store, _Calls()

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:
        store = self.store
        keys, values = store.layer(self.calls.index(layer), key, value)
        rows, end = store.active, store.column + 1
        keys[:rows, :, end - 1], values[:rows, :, end - 1] = key, value
        start = 0 if window is None else max(end - window, 0)
        # The query heads that share a key head stand side by side, as if they were tokens: nothing is repeated.
        q = query.unflatten(1, (key.shape[1], -1))
        bias = store.bias[:rows, ..., start:end].to(q.dtype) if store.ragged else None
        k, v = keys[:rows, :, start:end], values[:rows, :, start:end]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scaling).flatten(1, 2)
