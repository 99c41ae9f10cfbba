"""Bugs where no formula lives: in schedules, caches, splits, buffers and the calls between them.

Each list is one pattern of bugs that tests have missed. Every bug is caught by tests of the default tier (``make test``).
"""

from collections.abc import Callable

from tests.planted.bugs import Bug, bug


def of_pattern(pattern: str) -> Callable[..., Bug]:
    """A function like :func:`.bug` whose bugs have the pattern as their source."""

    def make(name: str, file: str, old: str, new: str, *tests: str) -> Bug:
        return bug(name, pattern, file, old, new, *tests)

    return make


schedule = of_pattern("schedules and controllers")
SCHEDULES: list[Bug] = []

validation = of_pattern("validation must not touch training")
VALIDATION: list[Bug] = []

key = of_pattern("cache keys and fingerprints")
KEYS: list[Bug] = []

symmetry = of_pattern("toy data too symmetric to tell")
SYMMETRY: list[Bug] = []

numerics = of_pattern("numerics at the boundary")
BOUNDARY = "precision/test_boundaries.py::test_"
REWARD_MODEL = "modules/reward_model.py"
NUMERICS: list[Bug] = [
    numerics(
        "a scalar head under autocast",
        "models/scalar_head.py",
        "    with torch.autocast(hidden.device.type, enabled=False):\n",
        "    if True:\n",
        BOUNDARY + "scores_of_a_reward_model_are_those_of_a_float64_head",
    ),
    numerics(
        "a scalar head in the dtype of its weights",
        "models/scalar_head.py",
        "return F.linear(hidden.float(), head.weight.float(), bias)",
        "return F.linear(hidden.to(head.weight.dtype), head.weight, head.bias).float()",
        BOUNDARY + "scores_of_a_reward_model_are_those_of_a_float64_head",
    ),
    numerics(
        "an encoder's own head under autocast",
        "models/scalar_head.py",
        "            last_linear(network).register_forward_hook(_in_float32)\n",
        "            pass\n",
        BOUNDARY + "scores_of_an_encoder_are_those_of_a_float64_head",
    ),
    numerics(
        "values of a shared trunk under autocast",
        "models/actor_critic.py",
        "return float32_linear(self.value_head, states.hidden).squeeze(-1)[states.at]",
        "return self.value_head(states.hidden).float().squeeze(-1)[states.at]",
        BOUNDARY + "values_on_the_policys_trunk_are_those_of_a_float64_head",
    ),
    numerics(
        "chunks computed again without autocast",
        "models/head.py",
        "with torch.autocast(hidden.device.type, enabled=enabled[0], dtype=enabled[1]):",
        "with torch.autocast(hidden.device.type, enabled=False, dtype=enabled[1]):",
        BOUNDARY + "chunks_that_are_computed_again_are_computed_in_the_same_precision",
    ),
    numerics(
        "the entropy of tokens that do not exist",
        "generation/native.py",
        "log_softmax(logits, sampling.temperature).clamp_(min=LEAST)",
        "log_softmax(logits, sampling.temperature)",
        BOUNDARY + "a_sampled_token_has_the_log_probability_of_float64_and_missing_tokens_have_none",
    ),
    numerics(
        "a repetition penalty in bfloat16",
        "generation/sampling.py",
        "wide = logits.float()",
        "wide = logits",
        BOUNDARY + "a_repetition_penalty_is_applied_in_float32",
    ),
    numerics(
        "a token behind the end has no logit",
        "generation/transformers_engine.py",
        "max=self.before.shape[-1] - 1",
        "max=self.before.shape[-1]",
        BOUNDARY + "what_transformers_draws_is_measured_in_float32_also_behind_an_end",
    ),
    numerics(
        "a mean of models in float32",
        "models/averaging.py",
        "weight.double()",
        "weight.float()",
        BOUNDARY + "a_mean_of_models_is_added_up_in_float64",
    ),
    numerics(
        "an adapter merged in its own precision",
        "models/merging.py",
        "(whole(matrices[DEFAULT].weight).float() for matrices",
        "(whole(matrices[DEFAULT].weight) for matrices",
        BOUNDARY + "an_adapter_in_bfloat16_is_merged_in_float32",
    ),
    numerics(
        "moments of scores in float32",
        REWARD_MODEL,
        "scores.double()[:, None] if",
        "scores[:, None] if",
        BOUNDARY + "scores_far_from_zero_are_normalised_with_their_own_deviation",
    ),
    numerics(
        "a deviation of zero divides",
        REWARD_MODEL,
        "(squares / count - mean**2).clamp(min=1e-12).sqrt()",
        "(squares / count - mean**2).clamp(min=0).sqrt()",
        BOUNDARY + "scores_that_are_all_alike_are_not_divided_by_zero",
    ),
    numerics(
        "the spread of scores as a difference of squares",
        "modules/rollout_metrics.py",
        'all_sum((scores - means["objective/scores"]).square().sum()) / count',
        '(all_sum(scores.square().sum()) / count - means["objective/scores"].square()).clamp(min=0)',
        BOUNDARY + "the_spread_of_scores_far_from_zero_is_that_of_float64",
    ),
    numerics(
        "losses of a step summed in float16",
        "modules/guard.py",
        "self.losses.append(loss.detach().float())",
        "self.losses.append(loss.detach())",
        BOUNDARY + "losses_of_a_step_are_summed_in_float32",
    ),
    numerics(
        "zero pairs teach: zero over zero",
        "modules/online_dpo.py",
        "/ teaching.clamp(min=1)",
        "/ teaching",
        BOUNDARY + "an_iteration_that_teaches_nothing_changes_nothing",
    ),
    numerics(
        "a share of no tokens",
        "modules/grpo.py",
        "share = tokens / total.tokens.clamp(min=1)",
        "share = tokens / total.tokens",
        BOUNDARY + "an_iteration_that_teaches_nothing_changes_nothing",
    ),
    numerics(
        "reference log-probabilities kept in bfloat16",
        "modules/reference_logps.py",
        "torch.zeros(len(rows), 2, dtype=torch.float32, device=device)",
        "torch.zeros(len(rows), 2, dtype=torch.bfloat16, device=device)",
        "precision/test_plugins.py::test_reference_log_probabilities_from_before_training_are_those_of_the_policy",
    ),
    numerics(
        "totals kept in float32 from log to log",
        "modules/metrics.py",
        "self.passed[name] += int(values[name])",
        "self.passed[name] = float(torch.tensor(float(self.passed[name])) + values[name])",
        BOUNDARY + "totals_go_on_beyond_what_float32_holds",
    ),
]

method = of_pattern("a method in no list")
ONLINE_DPO, KTO = "modules/online_dpo.py", "modules/kto.py"
LOOP = "ground_truth/test_plain_loops.py::test_every_step_is_that_of_a_plain_loop"
LOGGED = "ground_truth/test_plain_loops.py::test_online_dpo_logs_what_the_loop_counts"
ONLINE_LOOP = LOOP + "[online dpo]"
METHODS: list[Bug] = [
    method(
        "online DPO divides by the pairs of its micro-batch",
        ONLINE_DPO,
        "/ teaching.clamp(min=1)",
        "/ micro.advantages[::2, 0].sum().clamp(min=1)",
        ONLINE_LOOP,
    ),
    method(
        "online DPO divides by all pairs, ties too",
        ONLINE_DPO,
        "/ teaching.clamp(min=1)",
        "/ (len(minibatch) // 2)",
        ONLINE_LOOP,
    ),
    method(
        "online DPO learns from ties",
        ONLINE_DPO,
        "return (teaches * loss).sum()",
        "return loss.sum()",
        ONLINE_LOOP,
    ),
    method(
        "online DPO pairs the best with any other",
        ONLINE_DPO,
        "first + ranks.argmin(1)",
        "first + (ranks.argmax(1) + 1) % self.groups.size",
        ONLINE_LOOP,
    ),
    method(
        "online DPO ranks by the score alone",
        ONLINE_DPO,
        "torch.where(rollout.truncated, -torch.inf, rollout.scores)",
        "rollout.scores",
        ONLINE_LOOP,
    ),
    method(
        "online DPO at temperature 1",
        ONLINE_DPO,
        "return self.policy(ids, attention, mask, temperature=self.sampling.temperature,",
        "return self.policy(ids, attention, mask, temperature=1.0,",
        ONLINE_LOOP,
    ),
    method(
        "online DPO's pairs are neighbours of other pairs",
        ONLINE_DPO,
        "torch.arange(len(rows)).view(-1, 2).T.flatten()",
        "torch.arange(len(rows))",
        ONLINE_LOOP,
    ),
    method(
        "online DPO logs the margin of implied rewards as that of scores",
        ONLINE_DPO,
        "rows.scores[::2] - rows.scores[1::2]",
        "chosen - rejected",
        LOGGED,
    ),
    method(
        "online DPO counts ties in its metrics",
        ONLINE_DPO,
        "{name: ((teaches * x).sum(), count) for",
        "{name: (x.sum(), len(teaches)) for",
        LOGGED,
    ),
    method(
        "online DPO's order of minibatches is not in the checkpoint",
        ONLINE_DPO,
        '            self.order.set_state(of_this_rank(self.trainer, state["order"]))\n',
        "            pass\n",
        "resume/test_killed.py::test_killed_once[online_dpo-die4]",
    ),
    method(
        "each rank of online DPO divides by its own pairs",
        ONLINE_DPO,
        "teaching = self.all_sum(minibatch.advantages[::2, 0].sum())",
        "teaching = minibatch.advantages[::2, 0].sum()",
        "invariance/test_two_ranks.py::test_two_ranks_do_as_one[online dpo]",
    ),
    method(
        "KTO's reference point below zero",
        "functional/unpaired.py",
        ".clamp(min=0)",
        "",
        LOOP + "[kto]",
    ),
    method(
        "BCO's running mean holds its own step",
        KTO,
        "shift = self._mismatched_kl(batch, ref_logps[rows:]) if mismatched else ref_logps.new_tensor(self.seen.value)",
        "shift = self._mismatched_kl(batch, ref_logps[rows:]) if mismatched else ref_logps.new_tensor(self.seen.value) + 0.1",
        LOOP + "[bco, unpaired]",
    ),
    method(
        "an outcome verifier averages its micro-batch",
        "modules/reward_batches.py",
        "return loss.outcomes(scores, batch.label).sum()",
        "return loss.outcomes(scores, batch.label).mean()",
        LOOP + "[outcome verifier]",
    ),
    method(
        "a process reward reads the label of the step before",
        "data/collate.py",
        "labels[row, places] = torch.tensor(values, dtype=torch.float32)",
        "labels[row, places] = torch.tensor(values, dtype=torch.float32).roll(1)",
        LOOP + "[process reward]",
    ),
    method(
        "a validation reads the loss of training rows without their weights",
        REWARD_MODEL,
        "self.eval_means.update(self._loss(batch, scores)[1])",
        "self.eval_means.update({**self._loss(batch, scores)[1], 'loss': (scores.square().sum(), size(batch))})",
        "invariance/test_validation_numbers.py::test_a_validation_of_the_rows_of_a_step_has_its_numbers[reward model]",
    ),
]

interval = of_pattern("intervals over prompts that come more than once")
INTERVALS: list[Bug] = []

itself = of_pattern("tests that compare the code with itself")
ITSELF: list[Bug] = []

WIRING: list[Bug] = [*SCHEDULES, *VALIDATION, *KEYS, *SYMMETRY, *NUMERICS, *METHODS, *INTERVALS, *ITSELF]
