"""DPOModule with each of its losses: it learns, loads what the loss needs and no more, and moves its reference when asked."""

import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch.nn import functional

from rlhf_lightning.data.preferences import PreferenceDataModule
from rlhf_lightning.data.splits import Split
from rlhf_lightning.errors import UserError
from rlhf_lightning.losses import (
    AOTLoss,
    CPOLoss,
    DPOLoss,
    LDDPOLoss,
    MixedLoss,
    NLLLoss,
    ORPOLoss,
    SimPOLoss,
    WPOLoss,
)
from rlhf_lightning.losses.dpo import DiscoPOPLoss
from rlhf_lightning.models.spec import LoRA, ModelSpec
from rlhf_lightning.modules import DPOModule, dpo
from rlhf_lightning.modules.moving_reference import MovingReference
from tests.integration.test_modules_learn import adam, base, eight, fit  # noqa: F401
from tests.unit.test_pair_losses import ALL


def data(batch_size=8, **split):
    return PreferenceDataModule(eight("preferences"), batch_size=batch_size, split=Split(**({"validation": 0} | split)))


def module_of(base, loss, lr=1e-3, **settings):  # noqa: F811
    return DPOModule(ModelSpec(path=str(base / "policy")), loss, optimizer=adam(lr), **settings)


class Metrics(pl.loggers.CSVLogger):
    """Keeps what is logged."""

    def __init__(self, folder):
        super().__init__(folder)
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append(metrics)


@pytest.mark.parametrize("loss", ALL, ids=str)
def test_a_few_steps_lower_the_loss_and_raise_the_margin(base, loss):  # noqa: F811
    metrics = Metrics(base / "log")
    fit(module_of(base, loss, lr=3e-4), data(), base, max_steps=6, logger=metrics, log_every_n_steps=1)
    first, *_, last = metrics.rows
    assert last["train/loss"] < first["train/loss"]
    if not isinstance(loss, NLLLoss | DiscoPOPLoss):  # DiscoPOP's slope at the reference points the other way
        assert last["train/rewards/margins"] > first["train/rewards/margins"]
    assert {f"train/{name}" for name in loss.measures} <= last.keys()


@pytest.mark.parametrize("loss", [SimPOLoss(), CPOLoss(), ORPOLoss(), MixedLoss([SimPOLoss(), NLLLoss()], [1, 0.1])])
def test_a_loss_without_a_reference_loads_none(base, monkeypatch, loss):  # noqa: F811
    loaded, load = [], dpo.load_causal_lm
    monkeypatch.setattr(dpo, "load_causal_lm", lambda *args: loaded.append(args) or load(*args))
    monkeypatch.setattr(dpo, "policy_as_it_starts", None)
    module, rows = module_of(base, loss), data()
    fit(module, rows, base, max_steps=1)
    assert module.reference is None
    assert len(loaded) == 1
    (sample, *_) = module.show(next(iter(rows.train_dataloader())), 1)
    assert sample.score < 0


def test_the_rewards_that_are_logged_and_shown_are_the_losss_own(base):  # noqa: F811
    """SimPO's are beta times the mean log-probability of a token."""
    loss, rows, metrics = SimPOLoss(beta=3.0), data(), Metrics(base / "log")
    module = module_of(base, loss, lr=0.0)
    fit(module, rows, base, max_steps=1, logger=metrics, log_every_n_steps=1)
    batch = next(iter(rows.train_dataloader()))
    logits = module.policy.network(batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    logprobs = logits.log_softmax(-1).gather(2, batch.input_ids[:, 1:, None])[..., 0]
    mask = batch.response_mask[:, 1:]
    chosen, rejected = (3 * (logprobs * mask).sum(1) / mask.sum(1)).detach().chunk(2)
    (logged,) = metrics.rows
    assert logged["train/rewards/chosen"] == pytest.approx(chosen.mean().item(), abs=1e-5)
    assert logged["train/rewards/margins"] == pytest.approx((chosen - rejected).mean().item(), abs=1e-5)
    assert logged["train/logps/chosen"] == pytest.approx((logprobs * mask).sum(1)[:8].mean().item(), abs=1e-4)


def test_wpo_weighs_by_the_whole_vocabulary(base):  # noqa: F811
    loss, rows, metrics = WPOLoss(DPOLoss()), data(), Metrics(base / "log")
    module = module_of(base, loss, lr=0.0)
    fit(module, rows, base, max_steps=1, logger=metrics, log_every_n_steps=1)
    batch = next(iter(rows.train_dataloader()))
    known = module.policy.network(batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1].log_softmax(-1)
    own = known.gather(2, batch.input_ids[:, 1:, None])[..., 0] - (2 * known).logsumexp(-1)
    mask = batch.response_mask[:, 1:]
    chosen, rejected = ((own * mask).sum(1) / mask.sum(1)).exp().detach().chunk(2)
    weight = (chosen * rejected).mean().item()
    assert 0 < weight < 1.5
    (logged,) = metrics.rows
    assert logged["train/wpo_weight"] == pytest.approx(weight, rel=1e-5)
    assert logged["train/loss"] == pytest.approx(weight * math.log(2), rel=1e-5)  # at its reference


# ---------------------------------------------------------------- a reference that moves


class Weights(pl.Callback):
    """Keeps policy and reference after every optimizer step."""

    def __init__(self):
        self.policy, self.reference = [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step > len(self.policy):
            for kept, network in ((self.policy, pl_module.policy), (self.reference, pl_module.reference.network)):
                kept.append([p.detach().clone() for p in network.parameters()])


def test_the_reference_follows_every_third_step(base):  # noqa: F811
    """With two batches a step, and an epoch that ends in the middle of one."""
    module, seen = module_of(base, DPOLoss(), moving_reference=MovingReference(every=3, alpha=0.25)), Weights()
    fit(module, data(3), base, max_steps=7, max_epochs=-1, accumulate_grad_batches=2, callbacks=[seen])
    expected = [p.detach().clone() for p in dpo.load_causal_lm(module.policy_spec, module.tokenizer).parameters()]
    assert len(seen.policy) == 7
    for step, (policy, reference) in enumerate(zip(seen.policy, seen.reference, strict=True), start=1):
        if step % 3 == 0:
            expected = [0.25 * new + 0.75 * old for new, old in zip(policy, expected, strict=True)]
        for got, wanted in zip(reference, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)
    apart = [float((a - b).abs().max()) for a, b in zip(seen.policy[-1], expected, strict=True)]
    assert max(apart) > 1e-3
    assert not any(p.requires_grad for p in module.moved.parameters())


def test_a_checkpoint_holds_the_reference_where_it_is(base):  # noqa: F811
    moving = {"moving_reference": MovingReference(every=1, alpha=1.0)}
    module, rows = module_of(base, DPOLoss(), lr=1e-2, **moving), data(4, validation=0.5)
    trainer = fit(module, rows, base, max_steps=2)
    trainer.save_checkpoint(base / "two.ckpt", weights_only=False)
    other = module_of(base, DPOLoss(), **moving)
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "default_root_dir": base}
    pl.Trainer(**settings).validate(other, datamodule=rows, ckpt_path=base / "two.ckpt", verbose=False)
    for name, weight in module.reference.network.state_dict().items():
        assert torch.equal(other.reference.network.state_dict()[name], weight), name
        assert torch.equal(other.policy.state_dict()[name], weight), name  # alpha 1: it has taken the policy's place
    plain = module_of(base, DPOLoss())
    fit(plain, data(), base, max_steps=1)
    assert not any(name.startswith(("moved", "reference")) for name in plain.state_dict())


# ---------------------------------------------------------------- refusals

ADAPTED = {"policy": ModelSpec(path="x", adapter=LoRA())}
REFERENCE = {"reference": ModelSpec(path="x")}
MOVING = {"moving_reference": MovingReference()}
KEPT = {"precompute_reference": True}


@pytest.mark.parametrize(
    ("loss", "settings", "message"),
    [
        (SimPOLoss(), REFERENCE, "SimPOLoss reads no reference; leave out reference$"),
        (CPOLoss(), KEPT, "CPOLoss reads no reference; leave out precompute_reference$"),
        (
            ORPOLoss(),
            MOVING | KEPT,
            "ORPOLoss reads no reference; leave out precompute_reference and moving_reference$",
        ),
        (LDDPOLoss(), KEPT, "LDDPOLoss reads the reference's log-probability of each token, and precompute_reference"),
        (
            MixedLoss([DPOLoss(), LDDPOLoss()], [1, 1]),
            KEPT,
            "MixedLoss reads the reference's log-probability of each token",
        ),
        (DPOLoss(), MOVING | KEPT, "a moving reference has other log-probabilities after each move; leave out"),
        (DPOLoss(), MOVING | ADAPTED, "a moving reference needs weights of its own, and with an adapter it is the"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_loaded(loss, settings, message):
    with pytest.raises(UserError, match=message):
        DPOModule(**{"policy": ModelSpec(path="x"), "loss": loss, **settings})


@pytest.mark.parametrize("settings", [{"every": 0}, {"alpha": 0.0}, {"alpha": 1.5}, {"alpha": math.nan}])
def test_a_reference_that_would_not_move_is_refused(settings):
    with pytest.raises(UserError, match="every is at least 1 and alpha in"):
        MovingReference(**settings)


def test_a_reference_of_another_shape_cannot_move(base, tiny):  # noqa: F811
    other = ModelSpec(architecture=tiny | {"intermediate_size": 96})
    module = module_of(base, DPOLoss(), reference=other, moving_reference=MovingReference())
    with pytest.raises(UserError, match="policy and reference must be of one architecture"):
        fit(module, data(), base, max_steps=1)


def test_fsdp1_has_no_moving_reference(monkeypatch):
    network = torch.nn.Linear(2, 2)
    monkeypatch.setattr(FSDPStrategy, "__init__", lambda self: None)
    with pytest.raises(UserError, match=r"FSDP1 hides which weights correspond; .*fsdp2.yaml"):
        MovingReference().check_networks(network, network, FSDPStrategy())


def test_aot_refuses_to_see_a_step_in_parts(base):  # noqa: F811
    loss = MixedLoss([DPOLoss(), AOTLoss()], [1, 1])
    with pytest.raises(UserError, match="MixedLoss looks at all pairs of an optimizer step at once"):
        fit(module_of(base, loss), data(4), base, max_steps=1, accumulate_grad_batches=2)


def test_nothing_is_computed_that_the_loss_does_not_read(base, monkeypatch):  # noqa: F811
    """One call of the head's scores a batch and network, and no sum of squares unless WPO asks for it."""
    asked = []
    forward = dpo.PolicyNetwork.forward

    def watched(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        asked.append((kwargs.get("collisions", False), output.collisions is not None))
        return output

    monkeypatch.setattr(dpo.PolicyNetwork, "forward", watched)
    for loss, expected in ((DPOLoss(), [False, False]), (WPOLoss(), [True, False]), (SimPOLoss(), [False])):
        asked.clear()
        fit(module_of(base, loss), data(), base, max_steps=1)
        assert asked == [(want, want) for want in expected]


def test_labels_that_are_not_sure_and_weights_of_rows(base):  # noqa: F811
    rows, module = data(), module_of(base, CPOLoss(beta=0.5))
    fit(module, rows, base, max_steps=1)
    batch = next(iter(rows.train_dataloader()))
    order = torch.arange(16).roll(8)
    swapped = batch._replace(**{k: getattr(batch, k)[order] for k in ("input_ids", "attention_mask", "response_mask")})
    sure, opposite = (module._loss(b._replace(probability=None, weight=None))[0].item() for b in (batch, swapped))
    assert abs(sure - opposite) > 0.1
    soft = batch._replace(probability=torch.full((8,), 0.7), weight=None)
    assert module._loss(soft)[0].item() == pytest.approx(0.7 * sure + 0.3 * opposite, rel=1e-5)
    twice = batch._replace(probability=torch.ones(8), weight=torch.full((8,), 2.0))
    assert module._loss(twice)[0].item() == pytest.approx(2 * sure, rel=1e-5)
    module.loss = AOTLoss()
    with pytest.raises(UserError, match="AOTLoss compares pairs with each other and takes sure labels alone"):
        module._loss(soft)


def test_log_probabilities_of_half_a_batch_are_those_of_the_whole(base):  # noqa: F811
    """What is computed once for both halves is not mixed up: DPO by hand from transformers' own logits."""
    rows, module = data(), module_of(base, DPOLoss(beta=0.7), lr=1e-2)
    fit(module, rows, base, max_steps=4)
    batch = next(iter(rows.train_dataloader()))
    mask = batch.response_mask[:, 1:]

    def logps(network):
        known = network(batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1].log_softmax(-1)
        return (known.gather(2, batch.input_ids[:, 1:, None])[..., 0] * mask).sum(1).detach()

    h = logps(module.policy.network) - logps(module.reference.network.network)
    expected = -functional.logsigmoid(0.7 * (h[:8] - h[8:])).mean()
    loss, _ = module._loss(batch)
    assert loss.item() / 8 == pytest.approx(expected.item(), abs=1e-5)
