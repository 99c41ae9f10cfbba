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


# A run of one method on the command line.
RATES = "resume/test_every_run.py::test_each_step_has_the_rate_of_the_schedule[{}]".format
COEFFICIENTS = "resume/test_every_run.py::test_the_kl_coefficient_follows_the_kl_of_each_iteration[{}]".format
NO_TRACE = "resume/test_every_run.py::test_validations_and_samples_leave_no_trace_in_the_training[{}]".format
OPTIMIZATION, ONLINE = "modules/optimization.py", "modules/online.py"

schedule = of_pattern("schedules and controllers")
SCHEDULES: list[Bug] = [
    schedule(
        "a decay over all steps, those of the warm-up included",
        OPTIMIZATION,
        "(step - self.warmup) / max(total - self.warmup, 1)",
        "(step - self.warmup) / max(total, 1)",
        RATES("sft"),
    ),
    schedule(
        "a warm-up that begins at zero",
        OPTIMIZATION,
        "return (step + 1) / (self.warmup + 1)",
        "return step / self.warmup",
        RATES("sft"),
    ),
    schedule(
        "a decay to a share of what is left",
        OPTIMIZATION,
        "return self.final + (1 - self.final) * shape if",
        "return self.final + shape if",
        RATES("dpo"),
    ),
    schedule(
        "a schedule that moves once an epoch",
        OPTIMIZATION,
        'interval = schedule.interval or "step"',
        'interval = schedule.interval or "epoch"',
        RATES("kto"),
    ),
    schedule(
        "a schedule over batches",
        OPTIMIZATION,
        "steps = trainer.estimated_stepping_batches\n",
        "steps = trainer.estimated_stepping_batches * trainer.accumulate_grad_batches\n",
        RATES("process"),
    ),
    schedule(
        "a schedule of iterations over optimizer steps",
        "modules/plan.py",
        '"iteration": plan.iterations, "step"',
        '"iteration": plan.steps, "step"',
        RATES("ppo"),
        RATES("grpo"),
    ),
    schedule(
        "online DPO's schedule stands still",
        "modules/online_dpo.py",
        '        advance_schedule(self, "iteration")\n',
        "        pass\n",
        RATES("online_dpo"),
    ),
    schedule(
        "the critic learns at the policy's rate",
        "modules/ppo.py",
        "parameter_groups(self.update.critic_lr)",
        "parameter_groups(None)",
        RATES("ppo"),
    ),
    schedule(
        "the plan of GRPO without the group size",
        "modules/grpo.py",
        "prompts) * self.groups.size\n",
        "prompts)\n",
        "integration/test_iterations.py::test_rows_of_groups_and_pairs_are_counted[grpo-steps0]",
    ),
    schedule(
        "the plan of online DPO with one response a pair",
        "modules/online_dpo.py",
        "math.ceil(2 * prompts /",
        "math.ceil(prompts /",
        "integration/test_iterations.py::test_rows_of_groups_and_pairs_are_counted[online_dpo-steps1]",
    ),
    schedule(
        "a KL coefficient that reacts to all episodes so far",
        "modules/ppo.py",
        "int(self.all_sum(torch.tensor(len(rollout), device=self.device))))",
        "self.episodes)",
        COEFFICIENTS("ppo"),
    ),
    schedule(
        "a KL coefficient that PPO never changes",
        "modules/ppo.py",
        '        self.kl.update(float(means["objective/kl"])',
        '        _ = (float(means["objective/kl"])',
        COEFFICIENTS("ppo"),
    ),
    schedule(
        "a KL coefficient that reacts to groups",
        "modules/grpo.py",
        "rows = self.all_sum(torch.tensor(len(rollout), device",
        "rows = self.all_sum(torch.tensor(len(rollout) // self.groups.size, device",
        COEFFICIENTS("grpo"),
    ),
    schedule(
        "a KL coefficient that reacts to the KL a token",
        "modules/grpo.py",
        'self.kl.update(float(means["objective/kl"])',
        'self.kl.update(float(means["objective/kl"]) / rollout.response_mask.shape[1]',
        COEFFICIENTS("grpo"),
    ),
]

validation = of_pattern("validation must not touch training")
VALIDATION: list[Bug] = [
    validation(
        "a validation without a fork of the random numbers",
        ONLINE,
        'torch.random.fork_rng(devices=[module.device] if module.device.type == "cuda" else [])',
        "torch.random.fork_rng(enabled=False)",
        NO_TRACE("ppo"),
    ),
    validation(
        "samples without a fork of the random numbers",
        "modules/showing.py",
        'torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])',
        "torch.random.fork_rng(enabled=False)",
        NO_TRACE("sft"),
    ),
    validation(
        "a validation that sets the order of the minibatches",
        ONLINE,
        "        for mode, sampling in modes.items():\n",
        "        module.order.manual_seed(number)\n        for mode, sampling in modes.items():\n",
        NO_TRACE("online_dpo"),
    ),
    validation(
        "validated rows in the means of DPO's training",
        "modules/dpo.py",
        "        self.eval_means.update(self._loss(batch)[1])",
        "        counted = self._loss(batch)[1]\n"
        "        self.eval_means.update(counted)\n"
        "        self.train_means.update(counted)",
        NO_TRACE("dpo"),
    ),
    validation(
        "validated rows in the running mean of BCO",
        "modules/kto.py",
        "        self.eval_means.update(self._loss(batch)[2])",
        "        _, logratio, counted = self._loss(batch)\n"
        "        self.eval_means.update(counted)\n"
        "        self.seen.saw(logratio)",
        NO_TRACE("kto"),
    ),
    validation(
        "means that go on from one validation to the next",
        "modules/metrics.py",
        "    means.reset()\n    fitting",
        "    fitting",
        NO_TRACE("process"),
    ),
    validation(
        "leads that go on from one validation to the next",
        "modules/reward_model.py",
        "        self._eval_differences.clear()\n",
        "",
        NO_TRACE("reward"),
    ),
    validation(
        "a policy that samples leave in eval mode",
        "modules/showing.py",
        "        with gathered(policy):\n            sampling",
        "        with gathered(policy.eval()):\n            sampling",
        NO_TRACE("sft"),
    ),
    validation(
        "a validation counts as an iteration's KL control",
        ONLINE,
        "    log_evaluation(module, module.eval_means, **logged_means(module, logged))",
        "    log_evaluation(module, module.eval_means, **logged_means(module, logged))\n"
        "    if hasattr(module, 'kl'):\n"
        "        module.kl.update(0.0, 1)",
        NO_TRACE("grpo"),
    ),
    validation(
        "what a reward logged in an earlier validation",
        ONLINE,
        "logged, module.scorer.validated = module.scorer.validated, {}",
        "logged = module.scorer.validated",
        "integration/test_logged_by_rewards.py::test_each_call_is_logged_where_it_was_made[ppo]",
    ),
]

key = of_pattern("cache keys and fingerprints")
KEYS: list[Bug] = [
    key(
        "steps cut at another separator",
        "data/steps.py",
        '{"separator": separator, "last_step_only": last_step_only}',
        '{"last_step_only": last_step_only}',
        "unit/data/test_cache_keys.py::test_a_changed_setting_gives_the_rows_of_an_empty_cache[solutions-separator-<user>]",
    ),
    key(
        "labels of the last step alone",
        "data/steps.py",
        '{"separator": separator, "last_step_only": last_step_only}',
        '{"separator": separator}',
        "unit/data/test_cache_keys.py::test_a_changed_setting_gives_the_rows_of_an_empty_cache[solutions-last_step_only-True]",
    ),
    key(
        "rankings of another length",
        "data/rankings.py",
        'settings = {"max_length": max_length, "differing',
        'settings = {"differing',
        "unit/data/test_cache_keys.py::test_a_changed_setting_gives_the_rows_of_an_empty_cache[rankings-max_length-13]",
    ),
    key(
        "answers to prompts that differ",
        "data/tokenization.py",
        'features, settings = Features({**ids, **numbers, **counts}), {"differing_prompts": differing_prompts}',
        "features, settings = Features({**ids, **numbers, **counts}), {}",
        "unit/data/test_cache_keys.py::test_a_changed_setting_gives_the_rows_of_an_empty_cache[preferences-differing_prompts-drop]",
    ),
    key(
        "what is learnt of a demonstration",
        "data/tokenization.py",
        '{"mask": mask, "stop": stop}',
        '{"stop": stop}',
        "unit/data/test_cache_keys.py::test_a_changed_setting_gives_the_rows_of_an_empty_cache[demonstrations-mask-all]",
    ),
    key(
        "variables of the chat template",
        "data/tokenization.py",
        "        settings[KWARGS] = default_variables(tokenizer)\n",
        "",
        "unit/data/test_cache_keys.py::test_another_tokenizer_gives_the_rows_of_an_empty_cache[other_variables]",
    ),
    key(
        "the first block of rows alone",
        "data/cache.py",
        "        digest.update(sink.getvalue())\n    return",
        "        digest.update(sink.getvalue())\n        break\n    return",
        "unit/data/test_cache_keys.py::test_a_hash_of_rows_sees_each_of_them_and_their_types",
    ),
    key(
        "the types of the new columns",
        "data/cache.py",
        ', "features": repr(features)}, cache_dir',
        "}, cache_dir",
        "unit/data/test_cache_keys.py::test_rows_are_not_taken_for_those_of_another_type",
    ),
    key(
        "the code of the data package",
        "data/cache.py",
        '{**key, "code": code_hash()}',
        "key",
        "unit/data/test_cache_keys.py::test_each_source_file_of_the_data_package_is_in_the_key",
    ),
    key(
        "how a file is read",
        "data/files.py",
        ", **asdict(options)}",
        "}",
        "unit/data/test_cache_keys.py::test_every_option_of_reading_and_every_byte_of_a_file_is_in_its_key",
    ),
    key(
        "which format rows were read in",
        "data/formats.py",
        '{"format": converter.format.name, "kind": kind,',
        '{"kind": kind,',
        "unit/data/test_cache_keys.py::test_format_kind_columns_and_rows_are_in_the_key_of_converted_rows",
    ),
    key(
        "the text of a stage's config",
        "commands/stage_fingerprint.py",
        "[arguments, texts, upstream, contents]",
        "[arguments, upstream, contents]",
        "unit/test_stage_fingerprints.py::test_a_changed_stage_is_made_anew_with_all_that_build_on_it[text]",
    ),
    key(
        "the options of a stage",
        "commands/stage_fingerprint.py",
        "[arguments, texts, upstream, contents]",
        "[texts, upstream, contents]",
        "unit/test_stage_fingerprints.py::test_a_changed_stage_is_made_anew_with_all_that_build_on_it[options]",
    ),
    key(
        "the stages before a stage",
        "commands/stage_fingerprint.py",
        "[arguments, texts, upstream, contents]",
        "[arguments, texts, contents]",
        "unit/test_stage_fingerprints.py::test_a_changed_stage_is_made_anew_with_all_that_build_on_it[text]",
    ),
    key(
        "the rows and models that a stage reads",
        "commands/stage_fingerprint.py",
        "[arguments, texts, upstream, contents]",
        "[arguments, texts, upstream]",
        "unit/test_stage_fingerprints.py::test_a_stage_whose_rows_or_model_have_changed_is_made_anew",
    ),
    key(
        "a stage that was finished with other settings",
        "commands/pipeline.py",
        'same = known.get("fingerprint") == fingerprint',
        "same = bool(known)",
        "unit/test_stage_fingerprints.py::test_a_changed_stage_is_made_anew_with_all_that_build_on_it[options]",
    ),
    key(
        "the rows of reference log-probabilities",
        "modules/reference_logps.py",
        "[of_network, dataset_hash(split), str",
        "[of_network, len(split), str",
        "unit/test_reference_keys.py::test_each_part_of_the_key",
    ),
    key(
        "the precision of reference log-probabilities",
        "modules/reference_logps.py",
        "dataset_hash(split), str(trainer.precision)]",
        "dataset_hash(split)]",
        "unit/test_reference_keys.py::test_each_part_of_the_key",
    ),
    key(
        "the config of the reference",
        "modules/reference_logps.py",
        "    digest.update(network.network.config.to_json_string().encode())\n",
        "",
        "unit/test_reference_keys.py::test_each_part_of_the_key",
    ),
]

symmetry = of_pattern("toy data too symmetric to tell")
SYMMETRY: list[Bug] = [
    symmetry(
        "a conversation held out by its answer",
        "data/prompt_split.py",
        'row["messages"][:-1] if',
        'row["messages"] if',
        "unit/data/test_hold_out.py::test_no_prompt_is_on_both_sides[messages]",
    ),
    symmetry(
        "a prompt held out by the name of its column too",
        "data/prompt_split.py",
        '        return prompt_key(row["prompt"])\n',
        "        return prompt_key({name: row[name] for name in row})\n",
        "unit/data/test_hold_out.py::test_a_prompt_is_on_the_same_side_in_every_kind_of_rows",
    ),
    symmetry(
        "the same prompts held out with every seed",
        "data/prompt_split.py",
        'f"{seed}:{key}"',
        'f"{key}"',
        "unit/data/test_hold_out.py::test_seed_and_level_choose_others_and_the_share_only_more",
    ),
    symmetry(
        "the same prompts held out at every level",
        "data/prompt_split.py",
        "salt + row_key(row)",
        "row_key(row)",
        "unit/data/test_hold_out.py::test_seed_and_level_choose_others_and_the_share_only_more",
    ),
    symmetry(
        "scores put back by the order itself",
        "rewards/reward_model.py",
        "[torch.tensor(order).argsort()]",
        "[torch.tensor(order)]",
        "unit/rewards/test_reward_model_reward.py::test_scores_are_those_of_each_text_alone_with_eos_only_where_it_ended[64]",
    ),
    symmetry(
        "greedy baselines dealt out in turns",
        "modules/grpo.py",
        "scores.repeat_interleave(self.groups.size)",
        "scores.repeat(self.groups.size)",
        "integration/test_prompt_rewards.py::test_a_group_method_learns_nothing[greedy]",
    ),
    symmetry(
        "groups dealt out in turns",
        "rollouts/collect.py",
        "device=mask.device) // group_size",
        "device=mask.device) % (len(mask) // group_size)",
        "integration/test_prompt_rewards.py::test_a_group_method_learns_nothing[leave one out]",
    ),
    symmetry(
        "members of a group far from each other",
        "rollouts/buffer.py",
        "firsts[:, None] + torch.arange(together)).flatten()",
        "firsts + torch.arange(together)[:, None]).flatten()",
        "unit/rollouts/test_groups_stay_whole.py::test_minibatches_hold_groups_in_one_piece_and_in_their_order[2]",
    ),
    symmetry(
        "chosen and rejected of three pairs mixed up",
        "modules/online_dpo.py",
        "view(-1, 2).T.flatten()",
        "view(2, -1).T.flatten()",
        "unit/rollouts/test_groups_stay_whole.py::test_the_loss_is_of_each_pair_and_leaves_ties_out",
    ),
    symmetry(
        "the best and the worst of another group",
        "modules/online_dpo.py",
        "torch.arange(len(ranks), device=ranks.device) * self.groups.size",
        "torch.arange(len(ranks), device=ranks.device) * 2",
        "unit/rollouts/test_groups_stay_whole.py::test_a_pair_is_the_best_and_the_worst_of_its_own_group",
    ),
    symmetry(
        "truncation of another call",
        "rollouts/groups.py",
        'truncated=together("truncated"),',
        "truncated=torch.cat([part.truncated for part in wide[::-1]]),",
        "unit/rollouts/test_groups_stay_whole.py::test_calls_of_other_widths_are_joined_column_by_column",
    ),
    symmetry(
        "logged columns of another call",
        "rollouts/groups.py",
        "for part in samples for x in column_of(part, name)]",
        "for part in samples[::-1] for x in column_of(part, name)]",
        "unit/rollouts/test_groups_stay_whole.py::test_calls_of_other_widths_are_joined_column_by_column",
    ),
    symmetry(
        "answers handed to prompts in turns",
        "evaluation/candidates.py",
        '"samples": answers[i * n : (i + 1) * n]',
        '"samples": answers[i :: len(rows["prompt"])]',
        "unit/test_answers_of_prompts.py::test_candidates_are_scored_with_the_columns_of_their_prompt",
    ),
    symmetry(
        "prompts repeated in turns",
        "evaluation/candidates.py",
        "[value for value in values for _ in range(n)]",
        "values * n",
        "unit/test_answers_of_prompts.py::test_candidates_are_scored_with_the_columns_of_their_prompt",
    ),
    symmetry(
        "evaluated columns repeated in turns",
        "evaluation/answers.py",
        "columns={name: repeated(values, width) for",
        "columns={name: values * width for",
        "unit/test_answers_of_prompts.py::test_answers_are_in_the_rows_of_their_prompts",
    ),
    symmetry(
        "a kept sample numbered among those that say something",
        "commands/sample.py",
        '"sample": answer["sample"],',
        '"sample": number,',
        "unit/test_answers_of_prompts.py::test_what_is_kept_says_which_prompt_and_sample_it_was",
    ),
]

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
        "return F.linear(at_least_float32(hidden), at_least_float32(head.weight), bias)",
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
        BOUNDARY + "a_minibatch_that_teaches_nothing_leaves_the_means_of_the_others",
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
        LOOP + "[online cpo]",
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
        "KTO's reference point from half of the rows",
        KTO,
        "[: rows if rows > 1 else 0]",
        "[: rows // 2]",
        LOOP + "[kto]",
    ),
    method(
        "BCO's running mean is shifted",
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
ITSELF: list[Bug] = [
    itself(
        "behaviour and gold of the other kinds",
        "evaluation/world.py",
        "estimate(gold[rows], clusters[rows].tolist())",
        "estimate(gold[~rows], clusters[~rows].tolist())",
        "unit/test_answers_of_prompts.py::test_a_summary_by_kind_takes_the_rows_of_each_kind",
    ),
    itself(
        "the KL of answers from another row",
        "evaluation/answers.py",
        "            log_ratio.sum(1).cpu().numpy(),\n",
        "            log_ratio.sum(1).flip(0).cpu().numpy(),\n",
        "unit/test_answers_of_prompts.py::test_answers_are_in_the_rows_of_their_prompts",
    ),
    itself(
        "the first token of an answer without its KL",
        "evaluation/answers.py",
        "            log_ratio.sum(1).cpu().numpy(),\n",
        "            log_ratio[:, batch.input_ids.shape[1] :].sum(1).cpu().numpy(),\n",
        "unit/test_answers_of_prompts.py::test_the_kl_of_an_answer_is_that_of_plain_transformers",
    ),
]

WIRING: list[Bug] = [*SCHEDULES, *VALIDATION, *KEYS, *SYMMETRY, *NUMERICS, *METHODS, *INTERVALS, *ITSELF]
