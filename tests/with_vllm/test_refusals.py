"""What vLLM must not be left to do: go on with other weights, break, or answer less than was asked."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.generation.vllm_engine import VLLMEngine
from rlhf_lightning.generation.vllm_server import VLLMServerEngine
from tests.with_vllm.problem import LONGEST, SMALL, VERSIONS, change, drawn, needs_vllm, policy

pytestmark = [needs_vllm, pytest.mark.slow]
FEW = SamplingParameters(max_new_tokens=4)


def test_weights_that_do_not_arrive_are_noticed(take, engine, network, monkeypatch):
    take(network)
    change(network, seed=1, by=0.01)
    with monkeypatch.context() as broken:
        broken.setattr(engine.transfer, "send", lambda *_: None)
        with pytest.raises(UserError, match=r"does not compute with the policy's weights.*nats a token"):
            engine.take_weights(network, None, next(VERSIONS))
    take(network)  # and nothing is broken


def test_a_prompt_too_long_for_the_engine_is_refused(take, network):
    engine = take(network)
    with pytest.raises(UserError, match=r"longer|maximum|context"):
        drawn(engine, network, FEW, prompts=[[4] * (LONGEST + 1)])
    with pytest.raises(UserError, match=r"cut response 0 off after 2 of 4 tokens.*max_model_len"):
        drawn(engine, network, FEW, prompts=[[4] * (LONGEST - 2)])
    drawn(engine, network, FEW)


@pytest.mark.parametrize("other", [{"vocab_size": 30}, {"hidden_size": 32}, {"num_hidden_layers": 1}])
def test_a_server_with_another_model_is_refused_and_left_alone(server, other):
    with pytest.raises(UserError, match="holds another model: vocabulary 24, width 64, 2 layers, the policy has"):
        VLLMServerEngine(server.url).take_weights(policy(**other), None, 0)
    VLLMServerEngine(server.url).take_weights(policy(), None, 0)


def test_weights_of_another_run_on_the_same_server_are_noticed(server, network):
    ours, theirs = VLLMServerEngine(server.url), VLLMServerEngine(server.url)
    ours.take_weights(network, None, 0)
    theirs.take_weights(policy(seed=8), None, 0)
    with pytest.raises(UserError, match="someone else's"):
        ours.take_weights(network, None, 0)


def test_a_server_on_a_cpu_that_does_not_renew_a_tied_head_is_refused(server, network, monkeypatch):
    monkeypatch.setattr("rlhf_lightning.generation.vllm_server.EXTENSION", "some.other.Extension")
    with pytest.raises(UserError, match=r"tied to the embedding; add --worker-extension-cls some.other.Extension"):
        VLLMServerEngine(server.url).take_weights(network, None, 0)


def test_a_server_without_that_way_for_weights_is_refused(server, network):
    from rlhf_lightning.generation.vllm_weights import NCCL

    with pytest.raises(UserError, match="takes no weights by nccl; add --weight-transfer-config"):
        VLLMServerEngine(server.url, transfer=NCCL("127.0.0.1")).take_weights(network, None, 0)


def test_a_server_that_dies_is_named_with_the_command_that_starts_it(start_server, network):
    server = start_server()
    engine = VLLMServerEngine(server.url)
    engine.take_weights(network, None, 0)
    server.end()
    again = f"no vLLM server answers at {server.url}.*VLLM_SERVER_DEV_MODE=1 .*--port {server.port}"
    with pytest.raises(UserError, match=again):
        drawn(engine, network, FEW)
    with pytest.raises(UserError, match=again):
        engine.take_weights(network, None, 1)


def test_an_engine_whose_process_dies_is_named(network):
    engine = VLLMEngine(kv_cache_gib=0.125, options=SMALL)
    known = set(psutil.Process().children(recursive=True))
    engine.take_weights(network, None, 0)
    for process in set(psutil.Process().children(recursive=True)) - known:
        if "resource_tracker" not in " ".join(process.cmdline()):
            os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(UserError, match="vLLM failed"):
        drawn(engine, network, FEW)
    engine.close()


STARTS = """
import psutil, time
from rlhf_lightning.generation.vllm_engine import VLLMEngine
from tests.with_vllm.problem import SMALL, policy
if __name__ == "__main__":
    VLLM = VLLMEngine(kv_cache_gib=0.125, options=SMALL)
    VLLM.take_weights(policy(), None, 0)
    print(*(process.pid for process in psutil.Process().children(recursive=True)), flush=True)
    time.sleep(600)
"""


def test_nothing_of_vllm_outlives_a_run_that_is_killed(tmp_path):
    root = Path(__file__).parents[2]
    (tmp_path / "starts.py").write_text(STARTS)
    run = subprocess.Popen(
        [sys.executable, tmp_path / "starts.py"],
        env=os.environ | {"PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    started = [int(pid) for pid in run.stdout.readline().split()]
    assert len(started) >= 2
    run.kill()
    run.wait()
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in started if psutil.pid_exists(pid)], timeout=30)
    assert alive == []


def test_an_engine_that_can_not_start_says_why(network):
    engine = VLLMEngine(kv_cache_gib=0.125, options=SMALL | {"max_model_len": LONGEST * 10})
    with pytest.raises(UserError, match=r"vLLM failed: .*max_model_len"):
        engine.take_weights(network, None, 0)


def test_an_option_that_vllm_has_not_is_named(network):
    with pytest.raises(UserError, match="no engine argument max_lenght"):
        VLLMEngine(options={"max_lenght": 3}).take_weights(network, None, 0)
