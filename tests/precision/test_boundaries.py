"""Where half precision, large offsets or empty sets would break a number: each guard against an outside value in float64.

Scores under autocast, values of a shared trunk, sums of losses, moments of scores far from zero, divisions by nothing.
"""

import math
import statistics
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from rlhf_lightning.generation.engine import Generation, SamplingParameters
from rlhf_lightning.generation.native import NativeEngine
from rlhf_lightning.generation.sampling import penalized
from rlhf_lightning.generation.transformers_engine import DrawnLogprobs
from rlhf_lightning.models.actor_critic import ActorCritic
from rlhf_lightning.models.adapters import DEFAULT
from rlhf_lightning.models.averaging import average_reward_models
from rlhf_lightning.models.export import export_folder
from rlhf_lightning.models.head import head_scores, mask_missing_tokens
from rlhf_lightning.models.loading import last_linear, load_causal_lm, load_scalar_model, scalar_head
from rlhf_lightning.models.merging import merged_weight
from rlhf_lightning.models.policy import PolicyNetwork
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.models.trunk import hidden_states
from rlhf_lightning.modules import RewardModelModule
from rlhf_lightning.modules.guard import StepGuard
from rlhf_lightning.modules.metrics import Means
from rlhf_lightning.modules.rollout_metrics import rollout_means, update_means, update_metrics
from rlhf_lightning.modules.running_mean import RunningMean
from rlhf_lightning.rollouts.buffer import Rollout
from tests.invariance.rearrangements import EOS, PLAIN
from tests.invariance.subjects import (
    LONGEST,
    ROW_OF,
    SUBJECTS,
    Answers,
    Memory,
    batches,
    configured,
    scalar_folder,
    tokenizer,
)
from tests.precision.methods import TINY

BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
HALF = [torch.bfloat16, torch.float16]
IDS = torch.tensor([[4, 5, 6, 7, 8, 9], [9, 4, 11, 5, 0, 0]])
REAL = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool()


def scalar(members=1, architecture=TINY):
    torch.manual_seed(1)
    return ScalarModel(
        load_scalar_model(ModelSpec(architecture=architecture), tokenizer(), new_head=True, members=members)
    )


def in_float64(head, hidden):
    """The head's own numbers: an exact product of the inputs that it was given."""
    bias = 0 if head.bias is None else head.bias.detach().double()
    return hidden.detach().double() @ head.weight.detach().double().T + bias


# ---------------------------------------------------------------- scalar heads under autocast


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize("members", [1, 3])
def test_scores_of_a_reward_model_are_those_of_a_float64_head(members, half, weights):
    model = scalar(members).to(weights)
    with torch.autocast("cpu", dtype=half):
        raw = model(IDS, REAL, normalised=False)
        every = model(IDS, REAL, pooled=False, normalised=False)
        states = hidden_states(model.network, IDS, REAL)
    expected = in_float64(scalar_head(model.network), states.hidden)[states.at]
    assert raw.dtype == every.dtype == torch.float32
    last = expected[torch.arange(2), REAL.sum(1) - 1]
    torch.testing.assert_close(raw.double().view_as(last), last, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(every.double().view_as(expected)[REAL], expected[REAL], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("half", HALF)
def test_the_gradient_of_a_scalar_head_is_not_rounded(half):
    """The gradient of the sum of scores is the sum of hidden states: float16 has no 1e-9, bfloat16 three digits."""
    model = scalar()
    with torch.autocast("cpu", dtype=half):
        hidden = hidden_states(model.network, IDS, REAL)
        loss = 1e-9 * model(IDS, REAL, normalised=False).sum()
    loss.backward()
    last = hidden.hidden[hidden.at[torch.arange(2), REAL.sum(1) - 1]].detach().double().sum(0)
    gradient = scalar_head(model.network).weight.grad[0].double()
    torch.testing.assert_close(1e9 * gradient, last, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("weights", "half"),
    [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16)],
)
def test_scores_of_an_encoder_are_those_of_a_float64_head(half, weights):
    model = scalar(architecture=BERT).to(weights)
    seen = []
    head = last_linear(model.network)
    head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.normalise(0.123, 0.0077)
    with torch.autocast("cpu", dtype=half):
        scores = model(IDS, REAL)
    assert scores.dtype == torch.float32
    expected = (in_float64(head, seen[0])[:, 0] - 0.123) / 0.0077
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("half", HALF)
def test_values_on_the_policys_trunk_are_those_of_a_float64_head(half):
    torch.manual_seed(2)
    network = ActorCritic(PolicyNetwork(load_causal_lm(ModelSpec(architecture=TINY), tokenizer())), None)
    torch.nn.init.normal_(network.value_head.weight)
    response = REAL & (torch.arange(6) > 1)
    with torch.autocast("cpu", dtype=half):
        values = network(IDS, REAL, response).values
        states = hidden_states(network.policy.network, IDS, REAL)
    expected = in_float64(network.value_head, states.hidden)[states.at][:, :-1, 0]
    torch.testing.assert_close(values.double()[response[:, 1:]], expected[response[:, 1:]], rtol=1e-5, atol=1e-6)
    values.sum().backward()
    before = states.hidden[states.at[:, :-1][response[:, 1:]]].detach().double().sum(0)
    torch.testing.assert_close(network.value_head.weight.grad[0].double(), before, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- the head of a language model


@pytest.mark.parametrize("half", HALF)
def test_chunks_that_are_computed_again_are_computed_in_the_same_precision(half, monkeypatch):
    """The backward pass runs outside of autocast; the logits of chunks that were not kept must be those of the forward."""
    network = load_causal_lm(ModelSpec(architecture=TINY), tokenizer())
    hidden = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(64) % 12
    weights = torch.linspace(-1, 1, 64)
    found = []
    for kept in (0, 2**20):
        monkeypatch.setattr("rlhf_lightning.models.head.KEPT", {"cpu": kept})
        monkeypatch.setattr("rlhf_lightning.models.head.ROWS", {"cpu": 16})
        leaf = hidden.clone().requires_grad_()
        with torch.autocast("cpu", dtype=half):
            logprobs = head_scores(network, leaf, tokens).logprobs
        (weights * logprobs).sum().backward()
        found.append(leaf.grad)
    assert torch.equal(*found)


class Seen(NativeEngine):
    """Keeps the logits of the first token."""

    def _prefill(self, *args):
        store, self.logits = super()._prefill(*args)
        return store, self.logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sampled_token_has_the_log_probability_of_float64_and_missing_tokens_have_none(dtype):
    network = load_causal_lm(ModelSpec(architecture=TINY), tokenizer())
    torch.nn.init.normal_(network.get_output_embeddings().weight, generator=torch.Generator().manual_seed(3))
    mask_missing_tokens(network, set(range(12)) - {3, 7})
    engine, _ = Seen(), PolicyNetwork(network)  # which makes it one that packs sequences
    sampling = SamplingParameters(max_new_tokens=1, temperature=0.7)
    drawn = engine.generate(network.to(dtype), IDS[:1], REAL[:1], sampling, eos_ids=[EOS], pad_id=0)
    exact = (engine.logits[0].double() / 0.7).log_softmax(-1)
    assert set(exact.isinf().nonzero().flatten().tolist()) >= {3, 7}
    known = exact[exact.isfinite()]
    assert drawn.logprobs[0, 0].item() == pytest.approx(exact[drawn.tokens[0, 0]].item(), abs=1e-6)
    assert drawn.entropy[0, 0].item() == pytest.approx(-(known.exp() * known).sum().item(), abs=1e-5)


def test_what_transformers_draws_is_measured_in_float32_also_behind_an_end():
    """After its end a row is padded with an id that may have no logit."""
    logits = torch.randn(2, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    kept = DrawnLogprobs(0.7)
    kept(torch.tensor([[4], [5]]), logits)
    kept(torch.tensor([[4, 6], [5, 12]]), logits)
    expected = (logits[0].double() / 0.7).log_softmax(-1)[6].item()
    assert kept.logprobs[0][0].item() == pytest.approx(expected, abs=1e-6)


def test_a_repetition_penalty_is_applied_in_float32():
    logits = torch.tensor([[3.015625, -3.015625, 1.0]]).bfloat16()
    found = penalized(logits, torch.tensor([[True, True, False]]), 1.1)
    wide = logits.double()[0]
    assert found[0].tolist() == pytest.approx([float(wide[0]) / 1.1, float(wide[1]) * 1.1, 1.0], rel=1e-6)


# ---------------------------------------------------------------- weights


def test_a_mean_of_models_is_added_up_in_float64(tmp_path):
    """1e8 + 1 - 1e8 is 0 in float32."""
    folders = []
    for number, value in enumerate((1e8, 1.0, -1e8)):
        model = scalar()
        torch.nn.init.constant_(scalar_head(model.network).weight, value)
        folders.append(str(export_folder(model.network, tokenizer(), tmp_path / str(number))))
    mean = load_scalar_model(ModelSpec(path=str(average_reward_models(folders, str(tmp_path / "mean")))), tokenizer())
    assert scalar_head(mean).weight.unique().tolist() == pytest.approx([1 / 3], rel=1e-6)


def test_an_adapter_in_bfloat16_is_merged_in_float32():
    generator = torch.Generator().manual_seed(0)
    base, up, down = (torch.randn(size, generator=generator).bfloat16() for size in ((24, 20), (24, 8), (8, 20)))
    layer: Any = SimpleNamespace(
        lora_A={DEFAULT: SimpleNamespace(weight=down)},
        lora_B={DEFAULT: SimpleNamespace(weight=up)},
        scaling={DEFAULT: 0.37},
        fan_in_fan_out=False,
    )
    merged = merged_weight(layer, SimpleNamespace(weight=torch.nn.Parameter(base)))
    expected = base.double() + 0.37 * up.double() @ down.double()
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged.double(), expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- moments far from zero


SCORES = [1000 + 0.01 * (number % 7) for number in range(40)]


def measured(scores, monkeypatch):
    """Mean and deviation that a reward model is normalised with, from two batches of scores."""
    module: Any = RewardModelModule(ModelSpec(architecture=TINY))
    found = []
    module.network = SimpleNamespace(normalise=lambda mean, std: found.extend([float(mean), float(std)]))
    module.forward = lambda batch: torch.tensor(batch)
    module.transfer_batch_to_device = lambda batch, *_: batch
    half = len(scores) // 2
    datamodule = SimpleNamespace(batch_size=half, scored_batches=lambda name: iter([scores[:half], scores[half:]]))
    strategy = SimpleNamespace(reduce=lambda moments, reduce_op: moments)
    module._trainer = SimpleNamespace(datamodule=datamodule, world_size=1, strategy=strategy)
    module._normalise()
    return found


def test_scores_far_from_zero_are_normalised_with_their_own_deviation(monkeypatch):
    """Squares of 1000 leave float32 six hundredths; the deviation is two."""
    exact = [float(torch.tensor(score)) for score in SCORES]
    mean, std = measured(SCORES, monkeypatch)
    assert mean == pytest.approx(statistics.fmean(exact), rel=1e-7)
    assert std == pytest.approx(statistics.pstdev(exact), rel=1e-4)


def test_scores_that_are_all_alike_are_not_divided_by_zero(monkeypatch):
    mean, std = measured([0.1] * 40, monkeypatch)
    assert mean == pytest.approx(0.1)
    assert 0 < std < 1e-5


def rollout_of(scores, logprobs=0.0):
    ones = torch.ones(len(scores), 3)
    mask = torch.ones(len(scores), 3, dtype=torch.bool)
    values = dict.fromkeys(Rollout.__dataclass_fields__, 0 * ones)
    masks = {"attention_mask": mask, "sequence_mask": mask, "response_mask": mask}
    values |= {**masks, "logprobs": logprobs * ones, "scores": torch.tensor(scores)}
    values["truncated"] = torch.zeros(len(scores), dtype=torch.bool)
    values["input_ids"] = torch.full((len(scores), 3), 4)
    return Rollout(**values)


def test_the_spread_of_scores_far_from_zero_is_that_of_float64():
    exact = [float(torch.tensor(score)) for score in SCORES]
    found = rollout_means(rollout_of(SCORES), 0.0, lambda x: x)
    assert found["objective/scores"].item() == pytest.approx(statistics.fmean(exact), rel=1e-6)
    assert found["objective/scores_std"].item() == pytest.approx(statistics.pstdev(exact), rel=1e-3)
    assert rollout_means(rollout_of([0.1] * 7), 0.0, lambda x: x)["objective/scores_std"].item() < 1e-6


def test_the_variance_of_ratios_near_one_is_not_lost():
    """1e-8, where float32 has steps of 1e-7 near 1."""
    means, ratios = update_means(), [1 + 1e-4 * sign for sign in (1, -1, 1, -1)]
    ratio = torch.tensor(ratios)
    means.update({"val/ratio": (ratio.sum(), 4), "val/ratio_spread": ((ratio - 1).square().sum(), 4)})
    assert update_metrics(means)["val/ratio_var"].item() == pytest.approx(1e-8, rel=1e-2)


# ---------------------------------------------------------------- sums


def test_losses_of_a_step_are_summed_in_float32():
    """Two of 40,000 are more than float16 can say."""
    guard = StepGuard()
    for _ in range(2):
        guard.saw(None, torch.tensor(40_000.0, dtype=torch.float16))
    assert torch.stack(guard.losses).sum().item() == 80_000  # or the run would be stopped
    guard.check(SimpleNamespace(trainer=SimpleNamespace(precision="32-true", world_size=1)), torch.tensor(1.0))
    assert guard.losses == []


def test_a_running_mean_counts_beyond_what_float32_holds():
    mean = RunningMean()
    mean.load_state({"total": 2.0**24, "count": 2**24})
    for _ in range(3):
        mean.saw(torch.ones(1))
        mean.step(lambda x: x)
    assert (mean.total, mean.count) == (2.0**24 + 3, 2**24 + 3)


def test_totals_go_on_beyond_what_float32_holds():
    means = Means(["loss"], totals=["num_tokens"])
    for count in (2**24, 1, 1, 1):
        means.update({"num_tokens": (torch.tensor(float(count)), 1)})
        seen = means.drain()["num_tokens"]
    assert seen == 2**24 + 3


# ---------------------------------------------------------------- divisions by nothing


class CutOff(Answers):
    """No response ends with EOS."""

    def generate(self, network, input_ids, attention_mask, sampling, *, eos_ids, pad_id):
        rows = torch.arange(len(input_ids))[:, None] + torch.arange(LONGEST)
        return Generation(4 + rows % 7)


class PartlyCutOff(Answers):
    """The responses to the first four prompts do not come to their end."""

    def generate(self, network, input_ids, attention_mask, sampling, *, eos_ids, pad_id):
        answers = super().generate(network, input_ids, attention_mask, sampling, eos_ids=eos_ids, pad_id=pad_id).tokens
        wide = torch.nn.functional.pad(answers, (0, LONGEST - answers.shape[1]), value=pad_id)
        rows = [ROW_OF[tuple(ids[real].tolist())] for ids, real in zip(input_ids, attention_mask, strict=True)]
        return Generation(torch.where(torch.tensor(rows)[:, None] < 4, 4 + torch.arange(LONGEST) % 7, wide))


def iterate(module, name):
    """One iteration on the first eight prompts; what it logs, and the Trainer."""
    module.configure_model = lambda: None
    memory = Memory()
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=memory, limit_val_batches=0, **quiet)
    rows = batches(SUBJECTS[name], PLAIN)[:1]
    trainer.fit(module, DataLoader(rows, batch_size=None, collate_fn=lambda batch: batch))
    return {key: value for row in memory.rows for key, value in row.items()}, trainer


def test_a_minibatch_that_teaches_nothing_leaves_the_means_of_the_others():
    """Half of the minibatches hold one group each whose responses are all masked."""
    pl.seed_everything(0, verbose=False)
    module = configured(SUBJECTS["gspo"], "rotary", "", PLAIN)
    module.engine, module.update = PartlyCutOff(), replace(module.update, minibatch_size=2)
    logged, trainer = iterate(module, "gspo")
    assert trainer.global_step == 2 * 8
    assert math.isfinite(logged["train/policy_loss"])
    assert logged["train/policy_loss"] != 0


@pytest.mark.parametrize("name", ["gspo", "online dpo", "online cpo"])
def test_an_iteration_that_teaches_nothing_changes_nothing(name, tmp_path):
    """Responses that are all masked, pairs that all tie: zero over zero must not reach the weights or the log."""
    pl.seed_everything(0, verbose=False)
    module = configured(SUBJECTS[name], "rotary", scalar_folder(tmp_path, "rotary"), PLAIN)
    module.engine = CutOff()
    before = {name: weight.clone() for name, weight in module.policy.named_parameters()}
    logged, trainer = iterate(module, name)
    assert trainer.global_step == 2
    assert all(torch.equal(weight, before[name]) for name, weight in module.policy.named_parameters())
    assert logged
    assert [key for key, value in logged.items() if not math.isfinite(value)] == []
