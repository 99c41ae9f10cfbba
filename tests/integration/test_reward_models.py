"""Reward models from rankings, soft labels, ensembles, encoders and outcomes, in process and on tiny networks."""

import json
import math
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM, BertTokenizer

from rlhf_lightning.batches import PreferenceBatch, RankingBatch, UnpairedBatch
from rlhf_lightning.callbacks.export import export_module
from rlhf_lightning.cli import main
from rlhf_lightning.data.preferences import PreferenceDataModule
from rlhf_lightning.data.rankings import RankingDataModule
from rlhf_lightning.data.sources import FileSource
from rlhf_lightning.data.splits import Split
from rlhf_lightning.data.tokenizers import load_tokenizer
from rlhf_lightning.data.unpaired import UnpairedDataModule
from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.calibration import fit_temperature
from rlhf_lightning.losses import BradleyTerryLoss, OutcomeLoss, PlackettLuceLoss
from rlhf_lightning.models.actor_critic import ActorCritic
from rlhf_lightning.models.averaging import average_reward_models
from rlhf_lightning.models.ensemble import Ensemble, ScalarEnsemble
from rlhf_lightning.models.export import export_folder
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model
from rlhf_lightning.models.policy import PolicyNetwork
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.models.spec import LoRA, ModelSpec
from rlhf_lightning.modules import RewardModelModule, reward_model
from rlhf_lightning.modules.reward_batches import diagnostics, differences, pair_hashes, summed_loss
from rlhf_lightning.rewards.ensemble import EnsembleReward, MeanOfMembers, UncertaintyWeighted, WorstCase
from rlhf_lightning.rewards.reward import Samples
from rlhf_lightning.rewards.reward_model import RewardModelReward
from rlhf_lightning.worlds import HHHWorld, world_tokenizer

FIELDS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
LLAMA = ModelSpec(architecture={"model_type": "llama", "max_position_embeddings": 128, **FIELDS})
WORLD = partial(HHHWorld, held_out=6, preferences=8, rankings=8, unpaired=12)
QUESTION = [{"role": "user", "content": "who owns the kite ?"}]
SAMPLES = Samples([QUESTION] * 3, ["the kite", "i do not know .", "office"], [[1]] * 3, [False] * 3)


def adam(lr):
    return lambda params: torch.optim.AdamW(params, lr=lr)


def sgd(params):
    return torch.optim.SGD(params, lr=0.05)


def fit(module, data, folder, **trainer):
    pl.seed_everything(1, verbose=False)
    settings = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    pl.Trainer(
        accelerator="cpu", logger=False, default_root_dir=folder, num_sanity_val_steps=0, **settings, **trainer
    ).fit(module, datamodule=data)
    return module


def pairs(folder, rows):
    """A file of pairs, as a data module that holds nothing out."""
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


# ---------------------------------------------------------------- what a batch says about scores

NOTHING = torch.zeros(0)
CHOSEN, REJECTED = torch.tensor([2.0, 0.5, -1.0, 0.0]), torch.tensor([1.0, 0.7, 1.0, 0.0])
BOTH = torch.cat([CHOSEN, REJECTED])


def pair_batch(**said):
    margin = torch.zeros(4)
    return PreferenceBatch(torch.zeros(8, 1), NOTHING, NOTHING, margin, torch.tensor(1.0), **said)


def ranking_batch(ranks, prompt, weight):
    return RankingBatch(
        NOTHING, NOTHING, NOTHING, torch.tensor(ranks), torch.tensor(prompt), torch.tensor(weight), NOTHING
    )


def test_weights_and_soft_labels_of_pairs_by_a_loop():
    batch = pair_batch(probability=torch.tensor([1.0, 0.3, 0.5, 0.0]), weight=torch.tensor([1.0, 2.0, 0.5, 4.0]))
    expected = 0.0
    for high, low, p, weight in zip(CHOSEN, REJECTED, (1.0, 0.3, 0.5, 0.0), (1.0, 2.0, 0.5, 4.0), strict=True):
        up, down = math.log1p(math.exp(low - high)), math.log1p(math.exp(high - low))
        expected += weight * (p * up + (1 - p) * down)
    assert summed_loss(BradleyTerryLoss(centering_coef=0.0), batch, BOTH).item() == pytest.approx(expected, rel=1e-6)


def test_ties_tell_nothing_of_accuracy_and_unlikely_labels_count_the_other_way_round():
    batch = pair_batch(probability=torch.tensor([1.0, 0.3, 0.5, 0.9]))
    assert differences(batch, BOTH).tolist() == pytest.approx([1.0, 0.2, 0.0])
    total, count = diagnostics(batch, BOTH)["accuracy"]
    assert (total.item(), count) == (2.5, 3)


def test_a_ranking_weighs_as_its_prompt_does_however_many_pairs_it_has():
    batch = ranking_batch([0.0, 1.0, 2.0, 3.0, 1.0, 0.0], [0, 0, 0, 0, 1, 1], [1.0, 3.0])
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.0, 1.0])
    k_wise = summed_loss(BradleyTerryLoss(centering_coef=0.0), batch, scores)
    assert k_wise.item() == pytest.approx(0.207038 + 3 * 0.313262, abs=3e-6)
    listed = summed_loss(PlackettLuceLoss(), batch, scores)
    assert listed.item() == pytest.approx(1.161057 + 3 * 0.313262, abs=3e-6)
    tau, prompts = diagnostics(batch, scores)["kendall_tau"]
    assert (tau.item(), prompts) == (2.0, 2)
    # Margins between 2 and -1: 1, 2, 3, 1, 2, 1, and 1 of the second prompt.
    assert [x if isinstance(x, int) else x.item() for x in diagnostics(batch, scores)["margin"]] == [11.0, 7]


def test_outcomes_are_binary_cross_entropy():
    label = torch.tensor([True, False, True])
    batch = UnpairedBatch(NOTHING, NOTHING, NOTHING, label, NOTHING)
    scores = torch.tensor([0.3, 1.2, -2.0])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(scores, label.float(), reduction="sum")
    torch.testing.assert_close(summed_loss(OutcomeLoss(), batch, scores), expected)
    assert differences(batch, scores).tolist() == pytest.approx([0.3, -1.2, -2.0])


def test_scores_that_are_sampled_from_are_found_again():
    """A table of true scores, 20,000 rankings of four of six drawn from them: all pairs and the whole list both recover it."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([1.5, 0.7, 0.2, -0.4, -0.8, -1.2], dtype=torch.float64)
    items = torch.rand(20_000, 6, generator=generator).argsort(dim=1)[:, :4]
    noise = -(-torch.rand(items.shape, generator=generator, dtype=torch.float64).log()).log()
    ranks = (truth[items] + noise).argsort(dim=1, descending=True).argsort(dim=1)
    found = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([found], max_iter=50, line_search_fn="strong_wolfe")
    # Of lists without ties: the mean over rankings, by sorting, so that 20,000 need no square of comparisons.
    ordered = items.gather(1, ranks.argsort(dim=1))

    def closure():
        optimizer.zero_grad()
        r = found[ordered]
        loss = sum((r[:, k:].logsumexp(1) - r[:, k]).mean() for k in range(3))
        loss.backward()
        return loss

    optimizer.step(closure)
    fitted = (found - found.mean()).detach()
    assert (fitted - (truth - truth.mean())).abs().max() < 0.05  # standard errors of .02
    # And our own loss has its minimum there: on 500 of them the gradient of the fit to those vanishes.
    few, prompt = items[:500], torch.arange(500).repeat_interleave(4)
    table = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    again = torch.optim.LBFGS([table], max_iter=50, line_search_fn="strong_wolfe")

    def ours():
        again.zero_grad()
        batch = ranking_batch([0.0], [0], [0.0])._replace(
            ranks=ranks[:500].flatten().float(), prompt=prompt, weight=torch.ones(500)
        )
        loss = summed_loss(PlackettLuceLoss(), batch, table[few.flatten()]) / 500
        loss.backward()
        return loss

    again.step(ours)
    assert ((table - table.mean()) - (truth - truth.mean())).abs().max() < 0.3  # standard errors of .1


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("loss", [BradleyTerryLoss(), PlackettLuceLoss()], ids=["all pairs", "plackett-luce"])
def test_eight_rankings_are_learnt_by_heart(tmp_path, loss):
    data = RankingDataModule(WORLD(), batch_size=8, split=Split(validation=0))
    module = fit(RewardModelModule(LLAMA, loss, optimizer=adam(1e-2)), data, tmp_path, max_steps=60, max_epochs=-1)
    batch = next(iter(data.train_dataloader()))
    with torch.no_grad():
        found = diagnostics(batch, module(batch))
    assert float(found["kendall_tau"][0] / found["kendall_tau"][1]) == 1.0


def test_an_outcome_verifier_learns_what_was_liked(tmp_path):
    data = UnpairedDataModule(WORLD(), batch_size=12, split=Split(validation=0))
    module = fit(
        RewardModelModule(LLAMA, OutcomeLoss(), optimizer=adam(1e-2)), data, tmp_path, max_steps=80, max_epochs=-1
    )
    batch = next(iter(data.train_dataloader()))
    with torch.no_grad():
        scores = module(batch)
    assert scores.shape == batch.label.shape
    assert torch.equal(scores > 0, batch.label)


def test_a_row_of_weight_two_is_two_rows(tmp_path):
    """The gradient of a first step: one row twice, or once with a weight of 2 among as many rows."""
    row = {"prompt": QUESTION, "chosen": "the teacher .", "rejected": "i do not know ."}
    other = {"prompt": QUESTION, "chosen": "the kite .", "rejected": "the office ."}
    found = []
    for number, rows in enumerate(([row, row, other], [{**row, "weight": 2.0}, {**other, "weight": 1.0}])):
        folder = tmp_path / str(number)
        folder.mkdir()
        data = PreferenceDataModule(pairs(folder, rows), batch_size=8, split=Split(validation=0))
        data.tokenizer = world_tokenizer()
        module = RewardModelModule(LLAMA, BradleyTerryLoss(), optimizer=sgd, normalise=False)
        module.tokenizer = world_tokenizer()
        torch.manual_seed(0)
        module.configure_model()
        data.tokenizer_path = str(export_folder(module.network.network, module.tokenizer, folder / "model"))
        data.prepare_data()
        batch = next(iter(data.loader("train", shuffle=False)))
        loss, _ = module._loss(batch, module(batch))
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.network.parameters()))]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------- ensembles


class Familiar(HHHWorld):
    """Holds out the rows that are learnt, so that there is something to be sure of."""

    def load(self, kind):
        splits = super().load(kind)
        return type(splits)({"train": splits["train"], "validation": splits["train"]})


@pytest.fixture(scope="module", params=["shared", "own"])
def ensemble(request, tmp_path_factory):
    """A trained ensemble of three with its export."""
    folder = tmp_path_factory.mktemp(request.param)
    data = PreferenceDataModule(Familiar(held_out=2, preferences=24), batch_size=8)
    settings = {"ensemble": Ensemble(3, request.param), "calibrate": True}
    module = fit(RewardModelModule(LLAMA, optimizer=adam(1e-2), **settings), data, folder, max_epochs=2)
    return module, data, str(export_module(module, folder / "export"))


def member_scores(path, shared):
    """Normalised scores of the samples by plain transformers, without padding. Shape (3, members)."""
    folders = [path] if shared else [f"{path}/member_{i}" for i in range(3)]
    tokenizer = load_tokenizer(folders[0])
    columns = []
    for folder in folders:
        plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        gain, bias = (torch.tensor(getattr(plain.config, f"reward_{name}")) for name in ("gain", "bias"))
        rows = []
        for text in SAMPLES.completions:
            chat = [*QUESTION, {"role": "assistant", "content": text}]
            ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False).input_ids
            ids = ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]
            with torch.no_grad():
                hidden = plain.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
                rows.append(gain * plain.score(hidden).squeeze(-1 if shared else 0) + bias)
        columns.append(torch.stack(rows).reshape(3, -1))
    return torch.cat(columns, dim=1)


def test_an_ensemble_is_scored_with_after_an_export(ensemble):
    module, _, path = ensemble
    members = member_scores(path, not isinstance(module.network, ScalarEnsemble))
    assert members.shape == (3, 3)
    assert members.std(dim=1).min() > 1e-3  # they differ
    variance = ((members - members.mean(1, keepdim=True)) ** 2).mean(1)
    expected = {
        MeanOfMembers(): members.mean(1),
        WorstCase(): members.min(1).values,
        UncertaintyWeighted(0.7): members.mean(1) - 0.7 * variance,
    }
    for combination, scores in expected.items():
        reward = EnsembleReward(path, combination)
        reward.prepare("cpu")
        torch.testing.assert_close(reward.score(SAMPLES), scores, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(reward.parts()["disagreement"], variance.sqrt(), rtol=1e-3, atol=1e-5)


def test_an_ensemble_is_no_single_reward_and_a_single_one_no_ensemble(ensemble, tmp_path):
    _, _, path = ensemble
    with pytest.raises(UserError, match="EnsembleReward"):
        RewardModelReward(path).prepare("cpu")
    single = load_scalar_model(LLAMA, world_tokenizer(), new_head=True)
    folder = str(export_folder(single, world_tokenizer(), tmp_path / "single"))
    with pytest.raises(UserError, match="a single reward model: score with RewardModelReward"):
        EnsembleReward(folder).prepare("cpu")
    both = EnsembleReward([folder, path], WorstCase())
    both.prepare("cpu")
    alone = RewardModelReward(folder)
    alone.prepare("cpu")
    assert (both.score(SAMPLES) <= alone.score(SAMPLES) + 1e-6).all()


def test_each_member_is_normalised_and_calibrated_by_itself(ensemble):
    module, data, _ = ensemble
    with torch.no_grad():
        batches = list(data.loader("train", shuffle=False))
        raw = torch.cat([module(batch) for batch in batches])
        held_out = [
            (pair_hashes(batch), module._leads(batch, module(batch)))
            for batch in data.loader("validation", shuffle=False)
        ]
        scores = torch.cat([module.network(b.input_ids, b.attention_mask) for b in batches])
    assert raw.shape == (48, 3)
    torch.testing.assert_close(scores.mean(0), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(scores.std(0, correction=0), torch.ones(3), rtol=1e-3, atol=0)
    prompts, lead = torch.cat([keys[:, 0] for keys, _ in held_out]), torch.cat([leads for _, leads in held_out])
    half = sorted(set(prompts.tolist()))[: math.ceil(len(set(prompts.tolist())) / 2)]
    fitted = torch.tensor([prompt in half for prompt in prompts.tolist()])
    assert 0 < fitted.sum() < len(fitted)
    expected = [fit_temperature(own) for own in lead[fitted].unbind(-1)]
    assert module.network.temperature.tolist() == pytest.approx(expected, rel=1e-3)
    assert len(set(expected)) == 3
    assert 0.01 < min(expected) < max(expected) < 100


def test_members_with_trunks_of_their_own_learn_as_they_would_alone(tmp_path):
    """After a few steps of SGD each has the weights that it gets in a run of its own."""
    data = PreferenceDataModule(WORLD(), batch_size=4, split=Split(validation=0))
    together = RewardModelModule(LLAMA, optimizer=sgd, normalise=False, ensemble=Ensemble(2, "own"))
    data.prepare_data()
    together.tokenizer = data.tokenizer
    torch.manual_seed(3)
    together.configure_model()
    starts = [{k: v.clone() for k, v in model.state_dict().items()} for model in together.network.models]
    fit(together, data, tmp_path, max_steps=4, max_epochs=-1)
    for start, model in zip(starts, together.network.models, strict=True):
        alone = RewardModelModule(LLAMA, optimizer=sgd, normalise=False)
        alone.tokenizer = data.tokenizer
        alone.configure_model()
        alone.network.load_state_dict(start)
        fit(alone, data, tmp_path, max_steps=4, max_epochs=-1)
        for name, weight in model.state_dict().items():
            torch.testing.assert_close(weight, alone.network.state_dict()[name], rtol=1e-5, atol=1e-6, msg=name)
    assert not torch.equal(*(m.network.model.embed_tokens.weight for m in together.network.models))


def test_an_ensemble_takes_two_and_no_adapter(tmp_path):
    with pytest.raises(UserError, match="at least 2 members"):
        Ensemble(1)
    folder = str(export_folder(load_causal_lm(LLAMA, world_tokenizer()), world_tokenizer(), tmp_path / "policy"))
    for trunk in ("shared", "own"):
        module = RewardModelModule(ModelSpec(path=folder, adapter=LoRA(rank=2)), ensemble=Ensemble(2, trunk))
        with pytest.raises(UserError, match="adapter"):
            module.configure_model()


# ---------------------------------------------------------------- calibration and means


def test_a_calibrated_score_is_the_raw_one_over_the_temperature(tmp_path):
    network = load_scalar_model(LLAMA, world_tokenizer(), new_head=True)
    model = ScalarModel(network)
    model.normalise(0.3, 2.0)
    model.describe_normalisation()
    plain = str(export_folder(network, world_tokenizer(), tmp_path / "plain"))
    with pytest.raises(UserError, match="holds no temperature"):
        RewardModelReward(plain, calibrated=True).prepare("cpu")
    model.calibrate(torch.tensor([0.25]))
    model.describe_normalisation()
    folder = str(export_folder(network, world_tokenizer(), tmp_path / "calibrated"))
    scores = []
    for calibrated in (False, True):
        reward = RewardModelReward(folder, calibrated=calibrated)
        reward.prepare("cpu")
        scores.append(reward.score(SAMPLES))
    torch.testing.assert_close(scores[1], (2.0 * scores[0] + 0.3) / 0.25, rtol=1e-4, atol=1e-5)


def test_the_mean_of_reward_models_has_the_mean_of_their_weights(tmp_path):
    networks, folders = [], []
    for number in range(3):
        torch.manual_seed(number)
        network = load_scalar_model(LLAMA, world_tokenizer(), new_head=True)
        model = ScalarModel(network)
        model.normalise(-float(number), 1 / (1 + number))
        model.calibrate(torch.tensor([2.0]))
        model.describe_normalisation()
        networks.append(network)
        folders.append(str(export_folder(network, world_tokenizer(), tmp_path / str(number))))
    again = AutoModelForSequenceClassification.from_pretrained(average_reward_models(folders, str(tmp_path / "mean")))
    for name, weight in again.state_dict().items():
        expected = torch.stack([network.state_dict()[name] for network in networks]).mean(0)
        torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-7)
    assert again.config.reward_gain == pytest.approx(2.0)  # 1, 2, 3
    assert again.config.reward_bias == pytest.approx((0 + 2 * 1 + 3 * 2) / 3)
    assert not hasattr(again.config, "reward_temperature")


def test_models_that_have_no_mean_are_refused(tmp_path):
    wider = ModelSpec(architecture={**LLAMA.architecture, "intermediate_size": 8})
    folders = [
        str(
            export_folder(load_scalar_model(spec, world_tokenizer(), new_head=True), world_tokenizer(), tmp_path / name)
        )
        for name, spec in (("one", LLAMA), ("wider", wider))
    ]
    with pytest.raises(UserError, match="no models of one architecture"):
        average_reward_models(folders, str(tmp_path / "mean"))
    with pytest.raises(UserError, match="at least two"):
        average_reward_models(folders[:1], str(tmp_path / "mean"))


# ---------------------------------------------------------------- encoders


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A masked language model with a tokenizer of its own, as a folder."""
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", "user", "assistant", ":"]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    torch.manual_seed(0)
    network = BertForMaskedLM(BertConfig(vocab_size=len(words), max_position_embeddings=32, **FIELDS))
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.3)
    network.save_pretrained(folder)
    return str(folder)


def test_an_encoder_is_trained_exported_and_scored_with(bert, tmp_path):
    rows = [{"prompt": p, "chosen": f"{p} c", "rejected": f"{p} d e"} for p in ("a", "b", "f g", "h a b", "g", "e f")]
    data = PreferenceDataModule(pairs(tmp_path, rows), batch_size=6, split=Split(validation=0), max_length=32)
    module = fit(
        RewardModelModule(ModelSpec(path=bert), optimizer=adam(3e-3)), data, tmp_path, max_steps=40, max_epochs=-1
    )
    batch = next(iter(data.train_dataloader()))
    assert batch.input_ids[:, 0].unique().tolist() == [2]  # [CLS] first, [SEP] last
    ends = batch.attention_mask.sum(1) - 1
    assert batch.input_ids[torch.arange(12), ends].unique().tolist() == [3]
    with torch.no_grad():
        chosen, rejected = module(batch).chunk(2)
    assert (chosen > rejected).all()

    folder = str(export_module(module, tmp_path / "export"))
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    reward = RewardModelReward(folder, batch_size=2)
    reward.prepare("cpu")
    texts = [("a", "a c"), ("h a b", "h a b d e"), ("g", "c")]
    scores = reward.score(Samples([p for p, _ in texts], [c for _, c in texts], [[1]] * 3, [False] * 3))
    tokenizer = load_tokenizer(folder)
    with torch.no_grad():
        raw = torch.cat([plain(**tokenizer(f"{p} {c}", return_tensors="pt")).logits[0] for p, c in texts])
    torch.testing.assert_close(scores, plain.config.reward_gain * raw + plain.config.reward_bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("before", "after"), [(0, 3), (3, 0), (2, 2)])
def test_an_encoders_score_does_not_depend_on_padding(bert, before, after):
    torch.manual_seed(0)
    model = ScalarModel(load_scalar_model(ModelSpec(path=bert), load_tokenizer(bert), new_head=True))
    rows = [[2, 5, 6, 7, 3], [2, 8, 3], [2, 11, 12, 3]]
    width = 5 + before + after
    ids = torch.randint(5, 13, (3, width), generator=torch.Generator().manual_seed(0))  # garbage
    mask = torch.zeros(3, width, dtype=torch.bool)
    for number, row in enumerate(rows):
        ids[number, before : before + len(row)] = torch.tensor(row)
        mask[number, before : before + len(row)] = True
    with torch.no_grad():
        alone = torch.cat([model.network(input_ids=torch.tensor([row])).logits[0] for row in rows])
        scores = model(ids, mask)
    torch.testing.assert_close(scores, alone, rtol=1e-4, atol=1e-5)
    assert scores.std() > 1e-2


def test_what_an_encoder_is_not(bert, tmp_path):
    tokenizer = load_tokenizer(bert)
    with pytest.raises(UserError, match=r"no trained scalar head \(bert\.pooler"):
        load_scalar_model(ModelSpec(path=bert), tokenizer)
    critic = ScalarModel(load_scalar_model(ModelSpec(path=bert), tokenizer, new_head=True))
    policy = PolicyNetwork(load_causal_lm(LLAMA, tokenizer))
    ids, mask = torch.tensor([[2, 5, 6, 3]]), torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(UserError, match="is no critic"):
        ActorCritic(policy, critic)(ids, mask, mask)
    module = RewardModelModule(ModelSpec(path=bert, adapter=LoRA(rank=2)))
    with pytest.raises(UserError, match="no linear `score` head"):
        module.configure_model()


# ---------------------------------------------------------------- what does not go together


@pytest.mark.parametrize(
    ("settings", "data", "message"),
    [
        (
            {"loss": OutcomeLoss()},
            PreferenceDataModule,
            "OutcomeLoss reads UnpairedDataModule, not PreferenceDataModule",
        ),
        ({"loss": PlackettLuceLoss()}, PreferenceDataModule, "PlackettLuceLoss reads RankingDataModule"),
        ({"loss": BradleyTerryLoss()}, UnpairedDataModule, "BradleyTerryLoss reads PreferenceDataModule or Ranking"),
        ({"calibrate": True}, RankingDataModule, "calibrate needs held-out rows"),
    ],
)
def test_losses_and_data_that_do_not_fit_are_told_apart_at_once(tmp_path, settings, data, message):
    class Nothing(HHHWorld):
        def load(self, kind):
            splits = super().load(kind)
            return type(splits)({"train": splits["train"]})

    source = Nothing(held_out=2, preferences=8, rankings=8, unpaired=12)
    with pytest.raises(UserError, match=message):
        fit(RewardModelModule(LLAMA, **settings), data(source, split=Split(validation=0)), tmp_path, max_epochs=1)


def test_the_average_command_writes_what_a_reward_reads(tmp_path, capsys):
    folders = []
    for number in range(2):
        torch.manual_seed(number)
        network = load_scalar_model(LLAMA, world_tokenizer(), new_head=True)
        ScalarModel(network).describe_normalisation()
        folders.append(str(export_folder(network, world_tokenizer(), tmp_path / str(number))))
    main(["average", "--models", json.dumps(folders), "--output", str(tmp_path / "mean")])
    assert capsys.readouterr().out.strip().endswith("mean")
    reward = RewardModelReward(str(tmp_path / "mean"))
    reward.prepare("cpu")
    assert reward.score(SAMPLES).unique().numel() == 3


def calibrated(tmp_path, rows, size=4):
    """A reward model that is calibrated on these rows, with its log of metrics."""
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = FileSource(str(tmp_path / "train.jsonl"), validation_path=str(tmp_path / "train.jsonl"))
    data = PreferenceDataModule(source, batch_size=size)
    data.tokenizer_path = str(
        export_folder(load_causal_lm(LLAMA, world_tokenizer()), world_tokenizer(), tmp_path / "m")
    )
    return fit(
        RewardModelModule(LLAMA, optimizer=adam(1e-3), calibrate=True), data, tmp_path, max_steps=2, max_epochs=-1
    )


ANSWERS = ["the teacher .", "the office .", "i do not know .", "the kite ."]


def test_pairs_of_one_common_prompt_are_divided_by_their_answers(tmp_path, caplog):
    rows = [{"prompt": QUESTION, "chosen": a, "rejected": b} for a in ANSWERS for b in ANSWERS if a != b]
    caplog.set_level("INFO")
    module = calibrated(tmp_path, rows)
    assert float(module.network.temperature) > 0
    assert "fitted to 6 held-out pairs" in caplog.text
    assert "calibration error on the other 6" in caplog.text


def test_pairs_that_cannot_be_divided_are_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"can't be divided; raise data\.split\.validation"):
        calibrated(tmp_path, [{"prompt": QUESTION, "chosen": "the kite .", "rejected": "the office ."}] * 3)


def test_a_validation_of_ties_alone_has_no_calibration_error(tmp_path):
    tie = {"prompt": QUESTION, "chosen": "the kite .", "rejected": "the office .", "chosen_probability": 0.5}
    (tmp_path / "ties.jsonl").write_text((json.dumps(tie) + "\n") * 3)
    source = FileSource(str(tmp_path / "ties.jsonl"), validation_path=str(tmp_path / "ties.jsonl"))
    data = PreferenceDataModule(source, batch_size=2)
    data.tokenizer_path = str(
        export_folder(load_causal_lm(LLAMA, world_tokenizer()), world_tokenizer(), tmp_path / "m")
    )
    module = fit(
        RewardModelModule(LLAMA, optimizer=adam(1e-3)), data, tmp_path, max_steps=1, max_epochs=-1, val_check_interval=1
    )
    logged = module.trainer.callback_metrics
    assert "eval/loss" in logged
    assert "eval/calibration_error" not in logged


@pytest.mark.parametrize(("temperature", "warned"), [(1e3, True), (1e-3, True), (0.5, False)])
def test_a_temperature_at_the_end_of_its_range_is_warned_about(tmp_path, caplog, monkeypatch, temperature, warned):
    monkeypatch.setattr(reward_model, "held_out_calibration", lambda *_: (torch.tensor([temperature]), 0.2, 0.1))
    calibrated(tmp_path, [{"prompt": QUESTION, "chosen": a, "rejected": b} for a in ANSWERS for b in ANSWERS if a != b])
    assert ("a temperature is at the end of its range" in caplog.text) == warned
