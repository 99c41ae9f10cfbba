"""Weights through vLLM's own weight-transfer interface, over the road that the GPU engines take."""

import pytest
import torch

from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.generation.vllm_engine import VLLMEngine
from rlhf_lightning.generation.vllm_server import VLLMServerEngine
from tests.with_vllm.problem import PROMPTS, SMALL, change, drawn, logprobs_of, needs_vllm, policy

pytestmark = [needs_vllm, pytest.mark.slow]
EXTENSION = "tests.with_vllm.cpu_transfer.Registered"


@pytest.fixture(params=["colocated", "server"])
def engine(request, start_server):
    from tests.with_vllm.cpu_transfer import BACKEND, Bytes

    if request.param == "server":
        options = ["--worker-extension-cls", EXTENSION, "--weight-transfer-config", f'{{"backend": "{BACKEND}"}}']
        yield VLLMServerEngine(start_server(*options, tie_word_embeddings=False).url, transfer=Bytes())
        return
    engine = VLLMEngine(kv_cache_gib=0.125, transfer=Bytes(), options=SMALL | {"worker_extension_cls": EXTENSION})
    yield engine
    engine.close()


def test_weights_arrive_in_memory(engine):
    network = policy(tie_word_embeddings=False)
    for version in range(3):
        engine.take_weights(network, None, version)
        generation = drawn(engine, network, SamplingParameters(max_new_tokens=8))
        for row, prompt in enumerate(PROMPTS):
            expected = logprobs_of(network, prompt, generation.tokens[row].tolist())
            torch.testing.assert_close(generation.logprobs[row], expected, rtol=0, atol=1e-4)
        assert engine.transfer.sender.ready == (version > 0 or isinstance(engine, VLLMServerEngine))
        assert engine.transfer.sender.weights == {}
        change(network, seed=version, by=0.05)
