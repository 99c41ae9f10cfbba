"""Online methods with stop strings: responses end there, count as finished, and are learnt from up to there."""

from dataclasses import replace

import pytest

from rlhf_lightning.generation.transformers_engine import TransformersEngine
from rlhf_lightning.modules.grpo_update import Groups
from rlhf_lightning.worlds import world_tokenizer
from tests.integration.test_group_methods import METHODS, WORDS, fit, grpo, policy  # noqa: F401  (a fixture)


@pytest.mark.parametrize("engine", [None, TransformersEngine()], ids=["native", "transformers"])
def test_a_stop_string_is_learnt_as_the_end_of_a_response(policy, tmp_path, engine):  # noqa: F811
    module = grpo(policy, *METHODS["grpo"], groups=Groups(size=4, mask_truncated=True))
    module.sampling = replace(WORDS, stop_strings="green", engine=engine)
    module.engine = engine or module.engine
    fit(module, tmp_path, 25)
    responses = module.drawn.responses
    green = world_tokenizer().convert_tokens_to_ids("green")
    stopped = 0
    for ids, text, cut, mask in zip(
        responses.samples.completion_ids,
        responses.samples.completions,
        responses.truncated.tolist(),
        responses.response_mask,
        strict=True,
    ):
        assert green not in ids[:-1]
        assert int(mask.sum()) == len(ids)
        if ids[-1] == green:
            stopped += 1
            assert not cut
            assert text.endswith("green")
    assert stopped > 0.6 * len(responses.samples.completions)  # at random a tenth of them would
    assert module.drawn.scores.max() == 1
