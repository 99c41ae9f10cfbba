"""Several responses a prompt, and drawing until enough prompts have responses that differ."""

import pytest
import torch

from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.generation.engine import Generation
from rlhf_lightning.rewards.reward import Samples
from rlhf_lightning.rollouts.collect import Responses
from rlhf_lightning.rollouts.group_advantages import GroupMean
from rlhf_lightning.rollouts.groups import draw_groups, prompts_of, repeated

PROMPTS = ["a", "b", "c", "d", "e"]
BATCH = PromptBatch(
    torch.tensor([[0, 4], [5, 5], [0, 6], [7, 7], [0, 8]]),
    torch.tensor([[0, 1], [1, 1], [0, 1], [1, 1], [0, 1]]).bool(),
    PROMPTS,
    {"answer": [1, 2, 3, 4, 5]},
)
AGREE = {"a", "c", "d"}


class Drawer:
    """Answers with a response as long as its number in the group, wider in every call; scores differ but for some prompts."""

    def __init__(self, truncated=()):
        self.calls, self.truncated = [], truncated

    def __call__(self, batch):
        self.calls.append(batch.prompts)
        width = 3 + len(self.calls)
        place = [batch.prompts[: row + 1].count(prompt) for row, prompt in enumerate(batch.prompts)]
        mask = torch.arange(width) < torch.tensor(place)[:, None]
        tokens = torch.full(mask.shape, 9).masked_fill(~mask, 0)
        samples = Samples(
            batch.prompts, ["x"] * len(place), [[9] * n for n in place], [False] * len(place), batch.columns
        )
        scores = [0.5 if p in AGREE else n + ord(p) for p, n in zip(batch.prompts, place, strict=True)]
        responses = Responses(
            torch.cat([batch.input_ids, tokens], 1),
            torch.cat([batch.attention_mask, mask], 1),
            torch.cat([torch.zeros_like(batch.attention_mask), mask], 1),
            mask,
            torch.tensor([(prompt, n) in self.truncated for prompt, n in zip(batch.prompts, place, strict=True)]),
            Generation(tokens, -mask.float(), None),
            samples,
        )
        return responses, torch.tensor(scores)


def raw(scores, truncated):
    return scores


def drawn(wanted, least=lambda number: number, processed=raw, truncated=()):
    drawer = Drawer(truncated)
    return drawer, draw_groups(BATCH, 2, wanted, drawer, least, processed)


def test_every_prompt_is_repeated_side_by_side():
    batch = repeated(BATCH, 2)
    assert batch.prompts == list("aabbccddee")
    assert batch.columns == {"answer": [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]}
    assert batch.input_ids[:, 1].tolist() == [4, 4, 5, 5, 6, 6, 7, 7, 8, 8]
    again = prompts_of(Drawer()(batch)[0], 2)
    assert torch.equal(again.input_ids, BATCH.input_ids)
    assert torch.equal(again.attention_mask, BATCH.attention_mask)
    assert (again.prompts, again.columns) == (PROMPTS, BATCH.columns)


def test_all_prompts_without_dynamic_sampling():
    drawer, found = drawn(None)
    assert drawer.calls == [list("aabbccddee")]
    assert found.prompts == 5
    assert found.responses.samples.prompts == list("aabbccddee")


def test_it_goes_on_until_enough_prompts_have_responses_that_differ():
    drawer, found = drawn(2)
    assert drawer.calls == [list("aabb"), list("cc"), list("dd"), list("ee")]
    assert found.prompts == 5
    responses = found.responses
    assert responses.samples.prompts == list("bbee")
    assert responses.samples.columns == {"answer": [2, 2, 5, 5]}
    assert found.scores.tolist() == [99.0, 100.0, 102.0, 103.0]
    # Rows of calls of other widths stand in one tensor, each still whole.
    assert responses.response_mask.sum(1).tolist() == [1, 2, 1, 2]
    assert responses.sequence_mask.sum(1).tolist() == [1, 2, 1, 2]
    assert responses.attention_mask.sum(1).tolist() == [3, 4, 2, 3]
    assert (responses.drawn.tokens == 9).equal(responses.response_mask)
    assert responses.drawn.logprobs.eq(-1).equal(responses.response_mask)


def test_groups_are_judged_by_the_scores_that_advantages_are_made_of():
    """Every score of b and e is above the clip, so that they agree; of those that agree, c alone has a truncated response."""
    estimator = GroupMean(missing_eos_penalty=1.0, score_clip=2.0)
    drawer, found = drawn(1, processed=estimator.processed, truncated=[("c", 2)])
    assert drawer.calls == [list("aa"), list("bb"), list("cc")]
    assert found.responses.samples.prompts == list("cc")
    assert found.scores.tolist() == [0.5, 0.5]  # raw: the estimator processes them once more


def test_it_stops_as_soon_as_there_are_enough():
    drawer, found = drawn(1)
    assert drawer.calls == [list("aa"), list("bb")]
    assert found.responses.samples.prompts == list("bb")
    assert found.prompts == 2


def test_the_batch_is_the_cap_and_groups_that_agree_fill_up():
    drawer, found = drawn(4)
    assert [len(call) for call in drawer.calls] == [8, 2]
    assert found.responses.samples.prompts == list("aabbccee")  # b and e differ, a and c are the first that agree
    assert drawn(9)[1].responses.samples.prompts == list("aabbccddee")


@pytest.mark.parametrize(("other", "calls"), [(-3, [6, 2, 2]), (0, [4, 2, 2, 2])])
def test_all_ranks_draw_as_often_and_as_many(other, calls):
    """``least`` answers as if another rank still missed three groups, then none, ..."""
    told = iter([other, 99, 99, 99, 99, 99, 99, 99, 99, 99])
    drawer, found = drawn(2, lambda number: min(number, next(told)))
    assert [len(call) for call in drawer.calls] == calls
    assert found.responses.samples.prompts == list("bbee")
