"""Half precision in shards: two ranks under FSDP2 begin where one does, and master weights are in shards as well."""

import pytest
import torch
from torch.distributed.tensor import DTensor

from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules import strategies  # noqa: F401  (fsdp2)
from rlhf_lightning.modules.master_weights import MasterWeights
from tests.gloo import on_ranks
from tests.precision.methods import METHODS, fit, folders


def masters(params):
    return MasterWeights(params, lambda groups: torch.optim.AdamW(groups, lr=1e-5))


def steps(rank, policy, scalar, strategy, name):
    """Three steps, or iterations, in bf16-true: what the first logs, and what the optimizer holds."""
    module = METHODS[name].build(ModelSpec(path=policy), scalar)
    module.optimizer_factory = masters
    logged = fit(module, METHODS[name].rows, "bf16-true", steps=3, strategy=strategy, devices=2)
    optimizer = module.trainer.optimizers[0]
    state = module.trainer.strategy.optimizer_state(optimizer)["state"]
    held = [master.full_tensor() if isinstance(master, DTensor) else master for master in optimizer.masters]
    saved = {index: values["master"] for index, values in state.items()}
    return {
        "first": logged[0] if logged else {},
        "sharded": all(isinstance(master, DTensor) for master in optimizer.masters),
        "between": any(bool((master != master.bfloat16()).any()) for master in held),
        "saved": [torch.equal(saved[index], master) for index, master in enumerate(held)] if rank == 0 else [],
    }


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_two_ranks_begin_where_one_does_and_keep_masters(name, strategy, base, tmp_path):
    policy, scalar = folders(base)  # written once, here: two ranks that write one folder lose each other's files
    first, _ = on_ranks(steps, tmp_path / "ranks", policy, scalar, strategy, name)
    assert first["sharded"] == (strategy == "fsdp2")
    assert first["between"]
    assert first["saved"]
    assert all(first["saved"])
    if name == "dpo":
        assert first["first"]["loss"] == pytest.approx(METHODS[name].loss, abs=1e-6)
    else:
        assert first["first"]["objective/kl"] == 0
        assert first["first"]["sampling/sampling_logp_difference/max"] < 0.1
