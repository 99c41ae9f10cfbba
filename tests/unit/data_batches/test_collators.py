"""Collators: the exact tensors of small batches."""

import torch
from datasets import Dataset

from rlhf_lightning.data.collate import (
    PlannedRows,
    PreferenceCollator,
    PromptCollator,
    SequenceCollator,
    pad_right,
)
from rlhf_lightning.data.sampler import BatchPlan

PAD = 9


def test_rows_are_padded_on_the_right_and_the_mask_comes_from_lengths():
    ids, mask = pad_right([[PAD, 1, PAD], [2]], PAD)
    assert ids.tolist() == [[PAD, 1, PAD], [2, PAD, PAD]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]
    assert ids.dtype == torch.int64


def test_demonstrations():
    columns = {"input_ids": [[4, 5], [6, PAD, 7, 2]], "response_mask": [[0, 1], [0, 0, 1, 1]]}
    batch = SequenceCollator(PAD)((columns, 2.5))
    assert batch.input_ids.tolist() == [[4, 5, PAD, PAD], [6, PAD, 7, 2]]
    assert batch.attention_mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.response_mask.int().tolist() == [[0, 1, 0, 0], [0, 0, 1, 1]]
    assert batch.response_mask.dtype == batch.attention_mask.dtype == torch.bool
    assert batch.normalizer.item() == 2.5
    assert batch.normalizer.dtype == torch.float32
    assert batch.weights is None


def test_weights_stand_beside_their_rows_where_not_all_are_one():
    columns = {"input_ids": [[4, 5], [6, 2]], "response_mask": [[0, 1], [0, 1]]}
    assert SequenceCollator(PAD)(({**columns, "weight": [1.0, 1.0]}, 2.0)).weights is None
    weights = SequenceCollator(PAD)(({**columns, "weight": [1.0, 0.25]}, 2.0)).weights
    assert weights.tolist() == [1, 0.25]
    assert weights.dtype == torch.float32


def test_pairs_stand_chosen_first_and_share_their_prompt():
    columns = {
        "prompt_ids": [[1], [3, 4, 5]],
        "chosen_ids": [[PAD, 2], [6, 2]],
        "rejected_ids": [[7, 8, PAD, 2], [2]],
        "margin": [0.5, 0],
    }
    batch = PreferenceCollator(PAD)((columns, 2.0))
    assert batch.input_ids.tolist() == [
        [1, PAD, 2, PAD, PAD],
        [3, 4, 5, 6, 2],
        [1, 7, 8, PAD, 2],
        [3, 4, 5, 2, PAD],
    ]
    assert batch.attention_mask.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batch.response_mask.int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 0, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 1, 0]]
    assert batch.margin.tolist() == [0.5, 0.0]
    assert batch.margin.dtype == torch.float32
    assert batch.normalizer.item() == 2.0


def test_prompts_are_padded_on_the_left_and_keep_their_other_columns():
    columns = {"prompt_ids": [[1, 2, PAD], [3]], "prompt": ["one two", "three"], "answer": ["x", "y"], "id": [7, 8]}
    batch = PromptCollator(PAD)((columns, 1.0))
    assert batch.input_ids.tolist() == [[1, 2, PAD], [PAD, PAD, 3]]
    assert batch.attention_mask.int().tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch.prompts == ["one two", "three"]
    assert batch.columns == {"answer": ["x", "y"], "id": [7, 8]}


def test_a_plan_picks_its_rows_in_its_order_and_hands_its_normaliser_on():
    dataset = Dataset.from_dict({"input_ids": [[i] for i in range(5)], "response_mask": [[1]] * 5})
    planned = PlannedRows(dataset)
    assert len(planned) == 5
    batch = SequenceCollator(PAD)(planned.__getitems__(BatchPlan([3, 0, 4], 1.25)))
    assert batch.input_ids.tolist() == [[3], [0], [4]]
    assert batch.normalizer.item() == 1.25
