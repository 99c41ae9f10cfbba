"""The scalar model against plain transformers, whatever the padding; its head; its normalisation through an export."""

import logging

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.export import export_folder
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.models.spec import ModelSpec


def plain_scores(network, rows):
    """The head on the last hidden state of each row alone."""
    scores = []
    with torch.no_grad():
        for row in rows.tokens:
            hidden = network.base_model(input_ids=torch.tensor([row])).last_hidden_state
            scores.append((hidden[0, -1] * network.score.weight[0]).sum())
    return torch.stack(scores)


def test_right_padded_scores_are_those_of_transformers(scalar):
    ids = torch.tensor([[4, 5, 6, 7], [8, 9, 0, 0]])  # no pad id among real tokens: transformers pools by id
    mask = ids != 0
    expected = scalar(input_ids=ids, attention_mask=mask.long()).logits[:, 0]
    torch.testing.assert_close(ScalarModel(scalar)(ids, mask), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_score_is_read_at_the_last_attended_token(scalar, rows, side, extra):
    """EOS inside the prompt, the pad id as a real token, padding on any side: none of it moves the place."""
    ids, attention, _ = rows.laid_out(side, extra, garbage=6)
    scores = ScalarModel(scalar)(ids, attention)
    torch.testing.assert_close(scores, plain_scores(scalar, rows), rtol=1e-5, atol=1e-5)
    assert scores.std() > 0.1


def test_unpooled_values_are_those_of_every_position(scalar, rows):
    ids, attention, _ = rows.laid_out("right")
    values = ScalarModel(scalar)(ids, attention, pooled=False)
    hidden = scalar.base_model(input_ids=torch.tensor([rows.tokens[0]])).last_hidden_state
    torch.testing.assert_close(values[0], scalar.score(hidden)[0, :, 0], rtol=1e-5, atol=1e-5)


def test_normalised_scores_have_mean_zero_and_unit_spread(scalar, rows):
    ids, attention, _ = rows.laid_out("right")
    model = ScalarModel(scalar)
    raw = model(ids, attention)
    model.normalise(raw.mean().item(), raw.std().item())
    scores = model(ids, attention)
    torch.testing.assert_close(scores, (raw - raw.mean()) / raw.std(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(ids, attention, normalised=False), raw, rtol=0, atol=0)


def test_gain_and_bias_survive_an_export(scalar, rows, tokenizer, tmp_path):
    ids, attention, _ = rows.laid_out("left")
    model = ScalarModel(scalar)
    model.normalise(mean=-3.0, std=0.25)
    expected = 4 * model(ids, attention, normalised=False) + 12
    model.describe_normalisation()
    folder = export_folder(scalar, tokenizer, tmp_path / "export")
    again = ScalarModel(load_scalar_model(ModelSpec(path=str(folder)), tokenizer))
    torch.testing.assert_close(again(ids, attention), expected, rtol=1e-5, atol=1e-5)
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    torch.testing.assert_close(plain_scores(plain, rows), plain_scores(scalar, rows), rtol=0, atol=1e-6)


def test_a_language_model_is_no_reward_model_unless_a_new_head_is_asked_for(causal, tokenizer, tmp_path):
    path = str(export_folder(causal, tokenizer, tmp_path / "policy"))
    with pytest.raises(UserError, match=r"no trained scalar head.*score\.weight"):
        load_scalar_model(ModelSpec(path=path), tokenizer)
    network = load_scalar_model(ModelSpec(path=path), tokenizer, new_head=True)
    for (name, own), (_, trained) in zip(
        network.base_model.named_parameters(), causal.base_model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(own, trained, rtol=0, atol=0, msg=name)


def test_a_network_from_scratch_is_no_reward_model_either(spec, tokenizer):
    with pytest.raises(UserError, match="from scratch"):
        load_scalar_model(spec, tokenizer)


def test_a_new_head_is_drawn_with_variance_one_over_width_plus_one(tokenizer):
    width = 1024
    spec = ModelSpec(architecture={"model_type": "gpt2", "n_embd": width, "n_layer": 1, "n_head": 2, "n_positions": 8})
    torch.manual_seed(0)
    head = load_scalar_model(spec, tokenizer, new_head=True).score
    assert head.weight.shape == (1, width)
    assert head.weight.std().item() == pytest.approx((width + 1) ** -0.5, rel=0.1)  # 4.5 standard errors
    assert abs(head.weight.mean().item()) < 4.5 / width


def test_an_architecture_without_a_scalar_head_is_refused(tokenizer):
    t5 = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    with pytest.raises(UserError, match="no linear `score` head"):
        load_scalar_model(ModelSpec(architecture=t5), tokenizer, new_head=True)


@pytest.mark.parametrize("load", [load_causal_lm, load_scalar_model])
def test_a_pad_token_that_is_eos_is_refused(load, spec, tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    arguments = {"new_head": True} if load is load_scalar_model else {}
    with pytest.raises(UserError, match="pad token"):
        load(spec, tokenizer, **arguments)


def test_new_tokens_grow_the_embeddings_and_leave_the_others(causal, tokenizer, tmp_path, caplog):
    path = str(export_folder(causal, tokenizer, tmp_path / "policy"))
    tokenizer.add_special_tokens({"extra_special_tokens": ["<new>"]})
    with caplog.at_level(logging.WARNING, logger="rlhf_lightning"):
        grown = load_causal_lm(ModelSpec(path=path), tokenizer)
    assert "from 12 to 13" in caplog.text
    ids = torch.tensor([[4, 5, 6]])
    assert grown(input_ids=ids).logits.shape[-1] == 13
    torch.testing.assert_close(grown(input_ids=ids).logits[..., :12], causal(input_ids=ids).logits, rtol=0, atol=1e-6)
