"""KTO and its relatives under a real Trainer: they learn, they measure what they say, and refuse what they can't learn from."""

import logging
import math
from dataclasses import replace
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch

from rlhf_lightning.cli import run_trainer
from rlhf_lightning.data.preferences import PreferenceDataModule
from rlhf_lightning.data.splits import Split
from rlhf_lightning.data.unpaired import UnpairedDataModule
from rlhf_lightning.errors import UserError
from rlhf_lightning.losses import APOZeroUnpairedLoss, BCOUnpairedLoss, KTOLoss
from rlhf_lightning.models.export import export_folder
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules import KTOModule
from rlhf_lightning.modules.kto import report_balance
from rlhf_lightning.modules.running_mean import RunningMean
from rlhf_lightning.worlds import HHHWorld, world_tokenizer
from tests.integration.test_modules_learn import adam, eight, fit
from tests.invariance.rearrangements import PLAIN, REARRANGEMENTS, lay_out
from tests.invariance.subjects import SUBJECTS, batches, configured


@pytest.fixture
def base(tmp_path, tiny):
    """A random policy as an exported folder."""
    torch.manual_seed(0)
    export_folder(
        load_causal_lm(ModelSpec(architecture=tiny), world_tokenizer()), world_tokenizer(), tmp_path / "policy"
    )
    return tmp_path


@pytest.fixture(scope="module", autouse=True)
def small_world():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "tests.integration.test_modules_learn.WORLD", HHHWorld(seed=0, unpaired=8, preferences=8, held_out=8)
        )
        yield


LOSSES = [KTOLoss(beta=0.2), APOZeroUnpairedLoss(beta=0.2), BCOUnpairedLoss(beta=0.2)]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_it_overfits_eight_answers_and_leaves_the_reference_alone(base, loss):
    module = KTOModule(ModelSpec(path=str(base / "policy")), loss, optimizer=adam(1e-3))
    data = UnpairedDataModule(eight("unpaired"), batch_size=8, split=Split(validation=0))
    fit(module, data, base, max_steps=60)
    batch = next(iter(data.train_dataloader()))
    rows = slice(8)
    inputs = batch.input_ids[rows], batch.attention_mask[rows], batch.response_mask[rows]
    ratios = (module.policy(*inputs).logprobs - module.reference(*inputs).logprobs).sum(1)
    assert ratios[batch.label].min() > ratios[~batch.label].max() + 5
    untouched = load_causal_lm(module.policy_spec, module.tokenizer).state_dict()
    for name, weight in module.reference.network.network.state_dict().items():
        torch.testing.assert_close(weight, untouched[name], rtol=0, atol=0)


def test_pairs_are_learnt_from_too(base, caplog):
    caplog.set_level(logging.INFO, logger="rlhf_lightning")
    world = eight("preferences")
    module = KTOModule(ModelSpec(path=str(base / "policy")), optimizer=adam(1e-3))
    data = UnpairedDataModule(world, batch_size=16, split=Split(validation=0))
    trainer = fit(module, data, base, max_steps=30)
    assert trainer.callback_metrics["margins"] > 0.5  # of the last step
    assert "each pair as a liked and a disliked answer" in caplog.text
    assert "8 liked and 8 disliked rows" in caplog.text


# ---------------------------------------------------------------- what is computed, row by row


@pytest.fixture(scope="module")
def trained():
    """A module whose policy is not its reference, in float64, and the first of its batches."""
    module = configured(SUBJECTS["apo-zero, unpaired"], "rotary", "", PLAIN)
    module._trainer = SimpleNamespace(world_size=1)
    return module, batches(SUBJECTS["apo-zero, unpaired"], PLAIN)[0]


def log_ratio(module, ids, answer):
    """Of one row alone, without padding: log policy - log reference of its last ``answer`` tokens."""
    logps = []
    for network in (module.policy.network, module.reference.network.network):
        with torch.no_grad():
            logits = network(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -answer - 1 : -1]
        logps.append(logits.log_softmax(-1).gather(1, torch.tensor(ids[-answer:])[:, None]).sum())
    return float(logps[0] - logps[1])


def expected_of(module, batch):
    """Log-ratios of the rows, and of each prompt with the answer of the row before it."""
    rows = len(batch.label)
    texts = [batch.input_ids[i][batch.attention_mask[i]].tolist() for i in range(rows)]
    counts = batch.response_mask[:rows].sum(1).tolist()
    prompts = [ids[:-n] for ids, n in zip(texts, counts, strict=True)]
    answers = [ids[-n:] for ids, n in zip(texts, counts, strict=True)]
    own = [log_ratio(module, p + a, len(a)) for p, a in zip(prompts, answers, strict=True)]
    return own, [log_ratio(module, prompts[i] + answers[i - 1], len(answers[i - 1])) for i in range(rows)]


def test_loss_and_metrics_row_by_row(trained):
    module, batch = trained
    module.loss = KTOLoss(beta=0.3, desirable_weight=1.2, undesirable_weight=0.8)
    own, crossed = expected_of(module, batch)
    z0 = sum(crossed) / len(crossed)
    assert z0 > 0.01
    sign = [1 if liked else -1 for liked in batch.label.tolist()]
    weight = [1.2 if liked else 0.8 for liked in batch.label.tolist()]
    losses = [w / (1 + math.exp(s * 0.3 * (h - z0))) for w, s, h in zip(weight, sign, own, strict=True)]
    loss, _, counted = module._loss(batch)
    assert loss.item() == pytest.approx(sum(losses), rel=1e-9)
    means = {name: float(total) / float(count) for name, (total, count) in counted.items()}
    assert means["kl"] == pytest.approx(z0, rel=1e-9)
    for side, which in (("chosen", 1), ("rejected", -1)):
        ratios = [h for h, s in zip(own, sign, strict=True) if s == which]
        assert means[f"rewards/{side}"] == pytest.approx(0.3 * sum(ratios) / len(ratios), rel=1e-9)
    assert counted["num_tokens"][0] == batch.attention_mask[: len(own)].sum()


def test_a_mean_below_zero_is_cut_off(trained):
    module, batch = trained
    module.loss, swapped = KTOLoss(), replace_networks(module)
    try:
        assert float(module._loss(batch)[2]["kl"][0]) == 0
    finally:
        swapped()


def replace_networks(module):
    """Let policy and reference change places: every log-ratio changes its sign. Returns what puts them back."""
    policy, reference = module.policy.network, module.reference.network.network

    def put(one, other):
        module.policy.network, module.reference.network.network = one, other

    put(reference, policy)
    return lambda: put(policy, reference)


def test_the_reference_point_has_no_gradient(trained):
    """With it held fixed the gradient is the same, though it depends on the policy."""
    module, batch = trained
    weights = list(module.policy.parameters())
    module.loss = KTOLoss(beta=0.3)
    whole = torch.autograd.grad(module._loss(batch)[0], weights)
    z0 = module._loss(batch)[2]["kl"][0].item()
    fixed = replace(module.loss)
    module.loss = SimpleNamespace(
        baseline="none", reward_scale=0.3, rows=lambda h, label, _: fixed.rows(h, label, h.new_tensor(z0))
    )
    for one, other in zip(whole, torch.autograd.grad(module._loss(batch)[0], weights), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_a_row_that_is_alone_has_no_other_answer_and_is_compared_with_zero(trained):
    """The last batch of an epoch may have a single row; its own answer would be its own reference point, and nothing learnt."""
    module, batch = trained
    one = batch._replace(
        **{name: getattr(batch, name)[[0, 0]] for name in ("input_ids", "attention_mask", "response_mask")},
        label=batch.label[:1],
    )
    module.loss = KTOLoss(beta=0.3)
    alone, _, counted = module._loss(one)
    assert float(counted["kl"][0]) == 0
    module.loss = APOZeroUnpairedLoss(beta=0.3)
    assert alone.item() == pytest.approx(module._loss(one)[0].item(), rel=1e-12)


@pytest.mark.parametrize("layout", ["padding on both sides", "text at the right end", "garbage in the padding"])
def test_padding_does_not_choose_the_mismatched_answers(trained, layout):
    module, batch = trained
    module.loss = KTOLoss(beta=0.3)
    loss, _, counted = module._loss(batch)
    again, _, counted_again = module._loss(lay_out(batch, REARRANGEMENTS[layout]))
    assert again.item() == pytest.approx(loss.item(), rel=1e-9)
    assert float(counted_again["kl"][0]) == pytest.approx(float(counted["kl"][0]), rel=1e-9) != 0


# ---------------------------------------------------------------- BCO's shift


def test_the_running_mean_is_over_all_steps_before():
    mean = RunningMean()
    assert mean.value == 0
    for step in ([1.0, 3.0], [8.0]):
        before = mean.value
        mean.saw(torch.tensor(step))
        assert mean.value == before  # a step's micro-batches see the same
        mean.step(lambda x: x)
    assert mean.value == 4
    again = RunningMean()
    again.load_state(mean.state())
    again.saw(torch.tensor([0.0]))
    again.step(lambda counted: counted + torch.tensor([8.0, 1.0]))  # of another rank
    assert again.value == pytest.approx((12 + 8) / 5)


def test_bco_compares_with_the_mean_reward_so_far_and_keeps_it_in_the_checkpoint(base):
    module = KTOModule(ModelSpec(path=str(base / "policy")), BCOUnpairedLoss(beta=0.2), optimizer=adam(1e-3))
    data = UnpairedDataModule(eight("unpaired"), batch_size=8, split=Split(validation=0))
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            with torch.no_grad():
                _, ratios, counted = pl_module._loss(batch)
            seen.append((ratios, float(counted["delta"][0])))

    runner = fit(module, data, base, max_steps=4, max_epochs=-1, callbacks=[Watch()])
    for step in range(4):
        before = torch.cat([ratios for ratios, _ in seen[:step]]) if step else torch.zeros(1)
        assert seen[step][1] == pytest.approx(0.2 * float(before.mean()), rel=1e-4, abs=1e-7)
    assert abs(seen[3][1]) > 1e-3
    runner.save_checkpoint(base / "bco.ckpt")
    again = KTOModule(module.policy_spec, module.loss)
    again.on_load_checkpoint(torch.load(base / "bco.ckpt", weights_only=True))
    assert again.seen.value == module.seen.value != 0


# ---------------------------------------------------------------- what can't be learnt from


def test_a_batch_of_one_is_refused_where_the_kl_is_estimated(base):
    def run(loss):
        module = KTOModule(ModelSpec(path=str(base / "policy")), loss)
        fit(module, UnpairedDataModule(eight("unpaired"), batch_size=1, split=Split(validation=0)), base, max_steps=1)

    with pytest.raises(UserError, match=r"data.batch_size is 1: KTOLoss measures the KL on the answer of another row"):
        run(KTOLoss())
    run(APOZeroUnpairedLoss())


def test_another_data_module_is_named(base):
    module = KTOModule(ModelSpec(path=str(base / "policy")))
    with pytest.raises(UserError, match=r"data is PreferenceDataModule; KTOModule learns from UnpairedDataModule"):
        fit(module, PreferenceDataModule(eight("preferences"), split=Split(validation=0)), base, max_steps=1)


@pytest.mark.parametrize(
    ("weights", "counts", "advice"),
    [
        ((1.0, 1.0), (100, 100), None),
        ((1.0, 1.0), (120, 100), None),
        ((1.0, 1.0), (400, 300), None),
        ((1.0, 3.0), (400, 100), None),
        ((1.0, 1.0), (100, 200), "loss.desirable_weight to 2 to 2.67"),
        ((1.0, 1.0), (141, 100), "loss.desirable_weight to 0.709 to 0.946"),
        ((2.0, 1.0), (100, 100), "loss.desirable_weight to 1 to 1.33"),
    ],
)
def test_likes_and_dislikes_are_counted_and_held_against_their_weights(caplog, weights, counts, advice):
    caplog.set_level(logging.INFO, logger="rlhf_lightning")
    report_balance(KTOLoss(desirable_weight=weights[0], undesirable_weight=weights[1]), *counts)
    (record,) = caplog.records
    assert f"{counts[0]} liked and {counts[1]} disliked rows" in record.getMessage()
    assert record.levelname == ("INFO" if advice is None else "WARNING")
    assert advice is None or record.getMessage().endswith(advice)


def test_by_the_command_line_with_samples_and_predictions(base, monkeypatch, capsys):
    monkeypatch.chdir(base)
    common = ["--model", "KTOModule", "--model.policy.path", str(base / "policy"), "--model.sampling.max_new_tokens", "4",
              "--data", "UnpairedDataModule", "--data.source", "HHHWorld", "--data.source.unpaired", "32",
              "--data.source.held_out", "16", "--data.batch_size", "8", "--trainer.accelerator", "cpu", "--wandb", "disabled",
              "--trainer.default_root_dir", "run", "--trainer.enable_progress_bar", "false"]  # fmt: skip
    cli = run_trainer(["fit", *common, "--model.loss", "BCOUnpairedLoss", "--samples.every_n_steps", "2"])
    metrics = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    names = {"loss", "delta", "entropy", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen",
             "logps/rejected", "logits/chosen", "logits/rejected"}  # fmt: skip
    assert names <= {name.removeprefix("eval/") for name in metrics}
    margin = metrics["eval/rewards/chosen"] - metrics["eval/rewards/rejected"]
    assert metrics["eval/rewards/margins"] == pytest.approx(margin, abs=1e-6)
    assert (base / "run" / "export" / "config.json").is_file()
    assert "KTOModule, step 2" in capsys.readouterr().out
    run_trainer(["predict", *common])
    lines = (base / "run" / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == 16
