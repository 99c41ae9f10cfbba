"""Ranks that share every layer do what one process does."""

import csv
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.tensor_parallel import plan_of, split
from rlhf_lightning.modules.handoff import shard_if_asked
from rlhf_lightning.modules.optimization import norm_of
from rlhf_lightning.modules.tensor_parallel import TensorParallelStrategy, clip_by_norm
from tests.gloo import on_ranks
from tests.resume.runs import Crew, differences

TENSOR_PARALLEL = ("--trainer.strategy", "tensor_parallel", "--trainer.accumulate_grad_batches", "1")
ONE = ("--trainer.accumulate_grad_batches", "1")
FIELDS = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 50,
}


@pytest.fixture(scope="module")
def crew(tmp_path_factory):
    return Crew(tmp_path_factory.mktemp("tensor_parallel"))


def metrics(folder):
    with (folder / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", *[pytest.param(m, marks=pytest.mark.exhaustive) for m in ("reward", "dpo")]])
def test_two_ranks_are_one_process_and_go_on_bit_for_bit(crew, method):
    one = crew.finish(method, f"{method}-one", *ONE)
    two = crew.finish(method, f"{method}-two", *TENSOR_PARALLEL, ranks=2)
    rows, others = metrics(one), metrics(two)
    assert [row.keys() for row in rows] == [row.keys() for row in others]
    for row, other in zip(rows, others, strict=True):
        assert other == pytest.approx(row, rel=1e-5, abs=1e-6)
    weights, same = (load_file(folder / "export" / "model.safetensors") for folder in (one, two))
    for name, weight in weights.items():
        torch.testing.assert_close(same[name], weight, rtol=0, atol=1e-5)
    if method == "sft":
        AutoModelForCausalLM.from_pretrained(two / "export")
        shutil.copytree(two, crew.folder / "again")
        previous = str(crew.folder / "again" / "checkpoints" / "previous.ckpt")
        run, again = crew.run(method, "again", *TENSOR_PARALLEL, "--ckpt_path", previous, ranks=2)
        assert run.join() == [0, 0], run.log.read_text()[-3000:]
        assert differences(two, again) == []


def llama(**fields):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(FIELDS | fields)))


def gradients_in_parts(rank):
    """Loss, largest difference of a gradient, the two norms, and a clipped one; and how much of a matrix this rank has."""
    ids = torch.arange(24).view(2, 12) % 50
    one, parts = llama(), llama()
    split(parts, init_device_mesh("cpu", (2,), mesh_dim_names=("tensor_parallel",)))
    losses = [network(ids, labels=ids).loss for network in (one, parts)]
    for loss in losses:
        loss.backward()
    whole, cut = ([p.grad for p in network.parameters()] for network in (one, parts))
    full = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in cut]
    far = max(float((a - b).abs().max()) for a, b in zip(whole, full, strict=True))
    norms = [float(norm_of(cut)), float(torch.nn.utils.get_total_norm(whole))]
    clip_by_norm(torch.optim.SGD(parts.parameters(), lr=1.0), norms[1] / 2)
    query = parts.model.layers[0].self_attn.q_proj.weight.to_local()
    return [float(x) for x in losses], far, norms, float(norm_of(cut)), query.shape[0]


def test_losses_gradients_norms_and_clipping_are_those_of_whole_layers(tmp_path):
    for (one, parts), far, (norm, expected), clipped, rows in on_ranks(gradients_in_parts, tmp_path):
        assert parts == pytest.approx(one, rel=1e-6)
        assert far < 1e-6
        assert norm == pytest.approx(expected, rel=1e-6)
        assert clipped == pytest.approx(expected / 2, rel=1e-5)
        assert rows == FIELDS["hidden_size"] / 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 4, "num_key_value_heads": 1}, "num_key_value_heads 1 can't be dealt out to 2"),
        ({"intermediate_size": 25}, "intermediate_size 25"),
    ],
)
def test_heads_that_can_t_be_dealt_out_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        plan_of(llama(**change).model, 2)


@pytest.mark.parametrize(("plan", "message"), [({}, "brings no plan"), ({"a": "moe_thing"}, "cut moe_thing")])
def test_a_model_without_a_plan_that_is_known_is_refused(plan, message):
    model = llama().model
    model.config.base_model_tp_plan = plan
    with pytest.raises(UserError, match=message):
        plan_of(model, 2)


def test_ppo_is_refused():
    module = SimpleNamespace(automatic_optimization=False, _trainer=SimpleNamespace(strategy=TensorParallelStrategy()))
    with pytest.raises(UserError, match=r"no tensor parallelism yet; use -c configs/strategy/fsdp2\.yaml"):
        shard_if_asked(module, nn.Linear(1, 1))


def test_ranks_that_make_no_groups_are_refused():
    strategy = TensorParallelStrategy(size=2)
    strategy.num_nodes, strategy.parallel_devices = 1, [torch.device("cpu")] * 3
    with pytest.raises(UserError, match="groups of 2 can't be formed from 3"):
        strategy.setup_environment()
