"""Float32 master weights: bfloat16 weights learn at 1e-6, and a resumed run equals the uninterrupted one bit for bit."""

import copy
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from rlhf_lightning.cli import main
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules import DPOModule
from rlhf_lightning.modules.master_weights import MasterWeights, check_learning_rate
from rlhf_lightning.modules.optimization import Schedule
from tests.precision.methods import METHODS, TINY, TRAINED, fit

LR = 1e-6


def adamw(params):
    return torch.optim.AdamW(params, lr=LR, weight_decay=0.01)


def with_masters(params):
    return MasterWeights(params, adamw)


def layer(dtype):
    torch.manual_seed(0)
    return nn.Linear(16, 16).to(dtype)


def run(weights, optimizer, steps, start=0):
    """Steps on gradients that depend on the step alone."""
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        for weight in weights:
            gradient = torch.randn(weight.shape, generator=generator).bfloat16()
            weight.grad = gradient.to(weight.dtype)
        optimizer.step()
        optimizer.zero_grad()


def test_rounded_weights_follow_the_float32_run():
    exact, rounded = layer(torch.bfloat16).float(), layer(torch.bfloat16)
    reference, optimizer = adamw(exact.parameters()), with_masters(rounded.parameters())
    run(list(exact.parameters()), reference, 50)
    run(list(rounded.parameters()), optimizer, 50)
    for master, weight, other in zip(optimizer.masters, rounded.parameters(), exact.parameters(), strict=True):
        assert torch.equal(master, other)
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, other.bfloat16())


@pytest.mark.parametrize(("factory", "share"), [(adamw, (0, 0.02)), (with_masters, (0.99, 1))])
def test_how_many_weights_have_moved_after_fifty_steps(factory, share):
    """The masters where there are some; the weights themselves where not: at 1e-6 next to none."""
    network = layer(torch.bfloat16)
    before = [weight.detach().clone() for weight in network.parameters()]
    optimizer = factory(network.parameters())
    run(list(network.parameters()), optimizer, 50)
    now = optimizer.masters if isinstance(optimizer, MasterWeights) else list(network.parameters())
    moved = torch.cat([(a.flatten() != b.flatten()).float() for a, b in zip(now, before, strict=True)]).mean().item()
    assert share[0] <= moved <= share[1]


def test_enough_small_steps_move_the_weights_themselves():
    network = layer(torch.bfloat16)
    before = network.weight.detach().clone()
    optimizer = MasterWeights(network.parameters(), lambda params: torch.optim.SGD(params, lr=1e-5))
    for _ in range(400):
        network.weight.grad = torch.ones_like(network.weight)
        optimizer.step()
    torch.testing.assert_close(network.weight.float(), before.float() - 4e-3, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize(
    "inner", [adamw, lambda p: torch.optim.SGD(p, lr=LR), lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9)]
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(inner, tmp_path):
    whole, part = layer(torch.bfloat16), layer(torch.bfloat16)
    one, two = MasterWeights(whole.parameters(), inner), MasterWeights(part.parameters(), inner)
    run(list(whole.parameters()), one, 20)
    run(list(part.parameters()), two, 12)
    torch.save({"weights": part.state_dict(), "optimizer": two.state_dict()}, tmp_path / "file")
    saved = torch.load(tmp_path / "file", weights_only=True)
    later = layer(torch.bfloat16)
    later.load_state_dict(saved["weights"])
    three = MasterWeights(later.parameters(), inner)
    three.load_state_dict(saved["optimizer"])
    run(list(later.parameters()), three, 8, start=12)
    for expected, found in zip(one.masters, three.masters, strict=True):
        assert torch.equal(expected, found)
    for expected, found in zip(whole.parameters(), later.parameters(), strict=True):
        assert torch.equal(expected, found)
    assert any(
        (master != weight.float()).any() for master, weight in zip(three.masters, later.parameters(), strict=True)
    )


def test_a_checkpoint_without_masters_is_taken_up_from_the_weights():
    network = layer(torch.bfloat16)
    plain = torch.optim.AdamW(network.parameters(), lr=LR)
    run(list(network.parameters()), plain, 3)
    optimizer = with_masters(network.parameters())
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    for master, weight in zip(optimizer.masters, network.parameters(), strict=True):
        assert torch.equal(master, weight.float())
    assert {value.dtype for state in optimizer.inner.state.values() for value in state.values()} == {torch.float32}


def test_groups_schedules_and_float32_weights_among_them():
    half, full = layer(torch.bfloat16), layer(torch.float32)
    groups = [{"params": list(half.parameters())}, {"params": list(full.parameters()), "lr": 1e-2}]
    optimizer = MasterWeights(groups, adamw)
    assert [group["lr"] for group in optimizer.param_groups] == [LR, 1e-2]
    assert [master is weight for master, weight in zip(optimizer.masters[2:], full.parameters(), strict=True)] == [
        True
    ] * 2
    scheduler = Schedule(warmup=0, decay="linear").attach(optimizer, 4)
    twin = copy.deepcopy(full)
    reference = torch.optim.AdamW([{"params": list(twin.parameters()), "lr": 1e-2}], lr=LR, weight_decay=0.01)
    schedule = Schedule(warmup=0, decay="linear").attach(reference, 4)
    for step in range(4):
        run([*half.parameters(), *full.parameters()], optimizer, 1, start=step)
        generator = torch.Generator().manual_seed(step)
        for weight in half.parameters():
            torch.randn(weight.shape, generator=generator)
        for weight in twin.parameters():
            weight.grad = torch.randn(weight.shape, generator=generator).bfloat16().float()
        reference.step()
        scheduler.step()
        schedule.step()
    assert optimizer.inner.param_groups[1]["lr"] == pytest.approx(1e-2 * 0.25)  # of the last step that was taken
    for a, b in zip(full.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_weights_added_later_have_masters_too():
    first, second = layer(torch.bfloat16), layer(torch.bfloat16)
    optimizer = with_masters(first.parameters())
    optimizer.add_param_group({"params": list(second.parameters()), "lr": 1e-3})
    run([*first.parameters(), *second.parameters()], optimizer, 2)
    assert len(optimizer.masters) == len(optimizer.state_dict()["state"]) == 4
    assert not torch.equal(second.weight, layer(torch.bfloat16).weight)


def test_weights_without_a_gradient_stay():
    network = layer(torch.bfloat16)
    optimizer = with_masters(network.parameters())
    before = network.weight.detach().clone()
    network.bias.grad = torch.ones_like(network.bias)
    optimizer.step()
    assert torch.equal(network.weight, before)


def test_nothing_to_copy_is_logged(caplog):
    with_masters(layer(torch.float32).parameters())
    assert "float32 already" in caplog.text


# ---------------------------------------------------------------- what a run is refused for


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lr", [1e-6, 9.9e-5])
def test_half_precision_below_a_learning_rate_names_two_ways_out(dtype, lr):
    with pytest.raises(UserError, match=r"do not learn at a learning rate of .*bf16-mixed.*MasterWeights") as found:
        check_learning_rate(torch.optim.AdamW(layer(dtype).parameters(), lr=lr))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(("dtype", "lr"), [(torch.bfloat16, 1e-4), (torch.bfloat16, 0.0), (torch.float32, 1e-9)])
def test_what_learns_or_is_not_to_learn_is_accepted(dtype, lr):
    check_learning_rate(torch.optim.AdamW(layer(dtype).parameters(), lr=lr))


def test_one_group_that_does_not_learn_is_enough():
    groups = [
        {"params": list(layer(torch.bfloat16).parameters()), "lr": 1e-3},
        {"params": list(layer(torch.bfloat16).parameters())},
    ]
    with pytest.raises(UserError, match="at a learning rate of 1e-06"):
        check_learning_rate(torch.optim.AdamW(groups, lr=LR))


def module_of(name, spec, base):
    """A method with its default optimizer, or one at 1e-6."""
    module = METHODS[name].build(spec, base)
    module.optimizer_factory = adamw
    return module


OF_TRAINER = ("bf16-true", {}), ("32-true", {"dtype": "bfloat16"}), ("bf16-mixed", {"dtype": "bfloat16"})


@pytest.mark.parametrize(("precision", "spec"), OF_TRAINER)
@pytest.mark.parametrize("name", TRAINED)
def test_no_method_trains_weights_that_stay_where_they_are(name, precision, spec, tmp_path):
    module = module_of(name, ModelSpec(architecture=TINY, **spec), str(tmp_path))
    with pytest.raises(UserError, match="bfloat16 weights do not learn at a learning rate of 1e-06"):
        fit(module, METHODS[name].rows, precision)


def test_a_frozen_reference_in_bfloat16_is_no_error(caplog):
    spec = ModelSpec(architecture=TINY)
    module = DPOModule(spec, reference=ModelSpec(architecture=TINY, dtype="bfloat16"), optimizer=adamw)
    fit(module, "pairs", "32-true")
    assert module.reference.network.network.dtype == torch.bfloat16
    assert "the reference's weights are bfloat16, the policy's float32" in caplog.text


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("name", ["sft", "ppo, shared trunk"])
def test_a_run_in_bf16_true_moves_its_weights(name, tmp_path):
    module = module_of(name, ModelSpec(architecture=TINY), str(tmp_path))
    module.optimizer_factory = lambda params: MasterWeights(params, lambda p: torch.optim.AdamW(p, lr=3e-5))
    module.schedule = Schedule(decay="constant")
    fit(module, METHODS[name].rows, "bf16-true", steps=12)
    optimizer = module.optimizers().optimizer
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    assert {weight.dtype for weight in weights} == {torch.bfloat16}
    torch.manual_seed(0)
    moved = torch.cat([(m - w.float()).abs().flatten() > 0 for m, w in zip(optimizer.masters, weights, strict=True)])
    assert moved.float().mean() > 0.9  # masters are between the values that bfloat16 has
    assert all(torch.equal(m.bfloat16(), w) for m, w in zip(optimizer.masters, weights, strict=True))


YAML = """
trainer: {precision: bf16-true, accelerator: cpu, devices: 1, max_steps: STEPS, log_every_n_steps: 1,
  enable_progress_bar: false, num_sanity_val_steps: 0}
model:
  class_path: DPOModule
  init_args:
    policy: {architecture: {model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,
      num_attention_heads: 2}}
    optimizer:
      class_path: rlhf_lightning.modules.master_weights.MasterWeights
      init_args: {optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-5}}}
    schedule: {decay: constant}
data:
  class_path: PreferenceDataModule
  init_args:
    source: {class_path: HHHWorld, init_args: {preferences: 16, demonstrations: 4, prompts: 4, held_out: 4}}
    batch_size: 4
    split: {validation: 0}
samples: {every_n_steps: 0}
"""


def from_yaml(folder, steps, *more):
    config = folder.parent / f"{folder.name}-{steps}.yaml"
    config.write_text(YAML.replace("STEPS", str(steps)))
    main(["fit", "-c", str(config), "--trainer.default_root_dir", str(folder), "--wandb", "disabled", *more])
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def test_from_yaml_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    """Through the command line, with checkpoints of the project's own."""
    whole = from_yaml(tmp_path / "whole", 4)
    from_yaml(tmp_path / "part", 2)
    resumed = from_yaml(tmp_path / "part", 4, "--ckpt_path", "last")
    for name, weight in whole["state_dict"].items():
        assert torch.equal(weight, resumed["state_dict"][name]), name
    states = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (whole, resumed)]
    assert states[0].keys() == states[1].keys()
    for one, other in zip(*(state.values() for state in states), strict=True):
        assert one["master"].dtype == torch.float32
        assert (one["master"] != one["master"].bfloat16()).any()
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml")), ids=lambda file: file.name
)
def test_no_config_of_ours_trains_weights_that_stay_where_they_are(file):
    arguments = ((yaml.safe_load(file.read_text()) or {}).get("model") or {}).get("init_args", {})
    for name in ("policy", "network", "critic"):
        spec = arguments.get(name) or {}
        if spec.get("dtype", "float32") != "float32" and "adapter" not in spec:
            assert arguments["optimizer"]["class_path"].endswith("MasterWeights")
