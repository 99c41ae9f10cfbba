"""Under FSDP2 the first rank alone reads or draws the weights; the others get their shards of the very same."""

import json
import resource
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.export import export_folder
from rlhf_lightning.models.first_rank import FirstRankBuilds, tensors_of
from rlhf_lightning.models.frozen import Frozen
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model
from rlhf_lightning.models.policy import PolicyNetwork
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.models.sharding import is_sharded, shard
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.worlds import world_tokenizer
from tests.gloo import on_ranks

CPU = torch.device("cpu")
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}
UNTIED, TIED = LLAMA | {"tie_word_embeddings": False}, LLAMA | {"tie_word_embeddings": True}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}  # ties, biases and buffers


def larger_tokenizer():
    """With tokens that no folder has embeddings for."""
    tokenizer = world_tokenizer()
    tokenizer.add_tokens(["<quark>", "<gluon>", "<boson>"])
    return tokenizer


def built(case, folder):
    """A network of every kind that the modules build."""
    torch.manual_seed(5)
    policy = ModelSpec(path=str(Path(folder, "policy")))
    if case in ("tied", "untied", "gpt2"):
        fields = {"tied": TIED, "untied": UNTIED, "gpt2": GPT2}[case]
        return PolicyNetwork(load_causal_lm(ModelSpec(architecture=fields), world_tokenizer()))
    if case == "folder":
        return PolicyNetwork(load_causal_lm(policy, world_tokenizer()))
    if case == "new tokens":
        return PolicyNetwork(load_causal_lm(policy, larger_tokenizer()))
    if case == "bfloat16":
        return PolicyNetwork(load_causal_lm(ModelSpec(path=policy.path, dtype="bfloat16"), world_tokenizer()))
    if case == "reference":
        network = PolicyNetwork(load_causal_lm(ModelSpec(architecture=TIED), world_tokenizer()))
        other = PolicyNetwork(load_causal_lm(ModelSpec(architecture=TIED), world_tokenizer()))
        other.load_state_dict(network.state_dict())
        return Frozen(other).network
    if case == "new head":
        return ScalarModel(load_scalar_model(policy, world_tokenizer(), new_head=True))
    assert case == "reward model"
    return ScalarModel(load_scalar_model(ModelSpec(path=str(Path(folder, "reward"))), world_tokenizer()))


CASES = ("tied", "untied", "gpt2", "folder", "new tokens", "bfloat16", "reference", "new head", "reward model")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A policy whose generation config knows a second EOS, and a normalised reward model."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), world_tokenizer()
    torch.manual_seed(1)
    export_folder(load_causal_lm(ModelSpec(architecture=UNTIED), tokenizer), tokenizer, folder / "policy")
    config = folder / "policy" / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": [2, 7]}))
    model = ScalarModel(load_scalar_model(ModelSpec(architecture=UNTIED), tokenizer, new_head=True))
    model.normalise(3.0, 0.25)
    model.describe_normalisation()
    export_folder(model.network, tokenizer, folder / "reward")
    return folder


def forward(network):
    """Something that depends on every weight and buffer."""
    ids = torch.arange(24).view(2, 12) % 11
    mask = torch.arange(12) < torch.tensor([[12], [7]])
    if isinstance(network, ScalarModel):
        return network(ids, mask).detach()
    return network(ids, mask, mask & (torch.arange(12) > 2)).logprobs.detach()


def whole_tensors(network):
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for n, t in tensors_of(network).items()}


def sharded(rank, folder):
    mesh, found = init_device_mesh("cpu", (dist.get_world_size(),)), {}
    for case in CASES:
        with FirstRankBuilds():
            network = built(case, folder)
            empty = any(tensor.is_meta for tensor in tensors_of(network).values())
            shard(network, mesh, CPU)
        assert empty == (rank > 0), case
        assert is_sharded(network)
        generation = getattr(network.network, "generation_config", None)
        found[case] = {
            "tensors": whole_tensors(network),
            "random": torch.get_rng_state(),
            "forward": forward(network),
            "trained": {name: parameter.requires_grad for name, parameter in network.named_parameters()},
            "attention": network.network.config._attn_implementation,
            "eos": generation and generation.eos_token_id,
        }
    return found


@pytest.fixture(scope="module")
def ranks(folders, tmp_path_factory):
    return on_ranks(sharded, tmp_path_factory.mktemp("ranks"), str(folders))


@pytest.mark.parametrize("case", CASES)
def test_both_ranks_have_what_one_process_would_have(ranks, folders, case):
    network = built(case, folders)
    generation = getattr(network.network, "generation_config", None)
    for rank in ranks:
        got = rank[case]
        expected = whole_tensors(network)
        assert got["tensors"].keys() == expected.keys()
        assert [name for name, tensor in expected.items() if not torch.equal(tensor, got["tensors"][name])] == []
        assert got["trained"] == {name: parameter.requires_grad for name, parameter in network.named_parameters()}
        assert torch.equal(got["random"], torch.get_rng_state())
        torch.testing.assert_close(got["forward"], forward(network), rtol=1e-5, atol=1e-5)
        assert got["attention"] == network.network.config._attn_implementation
        assert got["eos"] == (generation and generation.eos_token_id)
    assert case != "folder" or ranks[1][case]["eos"] == [2, 7]


def failing(rank, folder):
    """The first rank finds what the others, without weights, can't see; then both go on together."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    said = []
    for path in ("policy", "none"):  # no scalar head in it; nothing there, which every rank sees
        try:
            with FirstRankBuilds():
                network = ScalarModel(load_scalar_model(ModelSpec(path=f"{folder}/{path}"), world_tokenizer()))
                shard(network, mesh, CPU)
        except UserError as error:
            said.append(str(error))
    with FirstRankBuilds():
        network = built("tied", folder)
        shard(network, mesh, CPU)
    return said, float(forward(network).sum())


def test_where_the_first_rank_fails_all_do_with_its_message(folders, tmp_path):
    first, second = on_ranks(failing, tmp_path / "ranks", str(folders))
    assert first == second
    assert "no trained scalar head" in first[0][0]
    assert "none" in first[0][1]


LARGE = UNTIED | {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16}
MEGABYTE = 2**20


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MB


def grown(rank, folder):
    """How much more memory a rank has had at a time, and how much its shards take."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with FirstRankBuilds():  # whatever is loaded late is loaded by now
        shard(PolicyNetwork(load_causal_lm(ModelSpec(path=f"{folder}/policy"), world_tokenizer())), mesh, CPU)
    before = peak()
    with FirstRankBuilds():
        network = PolicyNetwork(load_causal_lm(ModelSpec(path=f"{folder}/large"), world_tokenizer()))
        shard(network, mesh, CPU)
    return peak() - before, sum(p.to_local().nbytes for p in network.parameters()) / MEGABYTE


@pytest.mark.slow
def test_no_rank_but_the_first_ever_holds_the_whole_model(folders, tmp_path):
    tokenizer = world_tokenizer()
    network = load_causal_lm(ModelSpec(architecture=LARGE), tokenizer)
    whole = sum(parameter.nbytes for parameter in network.parameters()) / MEGABYTE
    assert whole > 300
    export_folder(network, tokenizer, folders / "large")
    del network
    (_, share), (second, other) = on_ranks(grown, tmp_path / "ranks", str(folders))
    assert share + other == pytest.approx(whole, rel=0.01)
    assert other < second < 0.7 * whole, f"a model of {whole:.0f} MB, {second:.0f} MB on the second rank"
