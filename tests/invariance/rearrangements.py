"""What must not matter: the ways in which the same rows can be laid out, and the peer's bug that each would have caught."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_lightning.batches import PromptBatch

PAD, EOS, VOCABULARY = 0, 2, 12
STEP, REST = 8, 3  # rows of the first optimizer step, and of the second, which is a short one
ROWS = STEP + REST
IN_ORDER = tuple(range(ROWS))


@dataclass(frozen=True)
class Arrangement:
    """How eleven rows go through two optimizer steps.

    Attributes:
        before: Columns of padding that nobody needs, left of the text.
        after: The same, right of it.
        flush_right: The text stands at the right end of its row.
        filler: What padding holds: the pad id, EOS, or any valid ids; and then NaN where it holds numbers.
        order: Of the rows; within each step.
        micro: Rows a forward, on one rank.
        packed: Rows are laid end to end inside the networks; otherwise their padding goes through them.
    """

    before: int = 0
    after: int = 0
    flush_right: bool = False
    filler: Literal["pad", "eos", "garbage"] = "pad"
    order: tuple[int, ...] = IN_ORDER
    micro: int = STEP
    packed: bool = True

    def permuted(self, step: int) -> list[int]:
        """The rows of an optimizer step."""
        return list(self.order[:STEP] if step == 0 else self.order[STEP:])


PLAIN = Arrangement()
REARRANGEMENTS: dict[str, Arrangement] = {
    # trl#2022, #6809: entropy and approxkl summed or averaged over padding, so that they fell as the batch got wider.
    "padding on the right": Arrangement(after=3),
    # open-instruct#756; positions that count the padding (T5 and GPT-2 in trl#1003): other logits under left padding.
    "padding on the left": Arrangement(before=3),
    "padding on both sides": Arrangement(before=2, after=3),
    "text at the right end": Arrangement(flush_right=True),
    # trl#3200, #6357, #6952: what is padding, and where a text ends, decided by id.
    "padding is EOS": Arrangement(before=1, after=2, filler="eos"),
    # OpenRLHF#1240: NaN in a masked slot reaches the loss through 0 * NaN.
    "garbage in the padding": Arrangement(before=1, after=2, filler="garbage"),
    "garbage before the text": Arrangement(flush_right=True, filler="garbage"),
    # verl#1440: values were not put back into order. open-instruct#1484, verl#2506: one row's mask or reward on another's.
    "another order of the rows": Arrangement(order=(5, 2, 7, 0, 6, 1, 4, 3, 10, 8, 9)),
    # trl#2617, #6024; OpenRLHF#1249; ms-swift#10117: means of micro-batch means; division by the accumulation twice.
    "micro-batches of one": Arrangement(micro=1),
    "micro-batches of two": Arrangement(micro=2),
    # transformers with reset positions and use_cache: what stands before a row in its pack is seen by it.
    "padded networks": Arrangement(packed=False),
    "micro-batches of two in another order, padded": Arrangement(
        micro=2, order=(1, 0, 3, 2, 7, 6, 5, 4, 9, 10, 8), before=1, after=1, filler="garbage"
    ),
}


def lay_out(batch: Any, arrangement: Arrangement) -> Any:
    """The same texts in other columns, and with them all that is known of each token."""
    rows, width = batch.attention_mask.shape
    width += arrangement.before + arrangement.after
    ids, attention = filling((rows, width), arrangement), torch.zeros(rows, width, dtype=torch.bool)
    given = {name: value for name, value in batch._asdict().items() if name not in ("input_ids", "attention_mask")}
    old = {n: x for n, x in given.items() if isinstance(x, Tensor) and x.shape == batch.attention_mask.shape}
    new = {name: torch.zeros(rows, width, dtype=value.dtype) for name, value in old.items()}
    for row in range(rows):
        real = batch.attention_mask[row]
        length = int(real.sum())
        start = width - arrangement.after - length if arrangement.flush_right else arrangement.before
        columns = slice(start, start + length)
        ids[row, columns], attention[row, columns] = batch.input_ids[row, real], True
        for name, value in old.items():
            new[name][row, columns] = value[row, real]
    return batch._replace(input_ids=ids, attention_mask=attention, **new)


def lay_out_prompts(batch: PromptBatch, arrangement: Arrangement) -> PromptBatch:
    """Prompts always end in the last column."""
    rows, width = batch.attention_mask.shape
    ids = filling((rows, width + arrangement.before), arrangement)
    attention = torch.nn.functional.pad(batch.attention_mask, (arrangement.before, 0))
    ids[attention] = batch.input_ids[batch.attention_mask]
    return batch._replace(input_ids=ids, attention_mask=attention)


def filling(shape: tuple[int, int], arrangement: Arrangement) -> Tensor:
    """What stands where no token is."""
    if arrangement.filler == "garbage":
        return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(sum(shape)))
    return torch.full(shape, {"pad": PAD, "eos": EOS}[arrangement.filler])
