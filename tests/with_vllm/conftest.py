"""One vLLM of our own and one server for all tests: each takes a while to start."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

from rlhf_lightning.generation.vllm_engine import VLLMEngine
from rlhf_lightning.generation.vllm_server import VLLMServerEngine
from rlhf_lightning.generation.vllm_worker import EXTENSION
from tests.with_vllm.problem import SMALL, VERSIONS, policy

torch.set_num_threads(1)


class RunningServer:
    """vLLM's server as a user starts it, from a folder with other weights than the policy's."""

    def __init__(self, folder, log, options, tokenizer=False):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
        command += ["--dtype", "float32", "--enable-scale-out"]
        command += [] if tokenizer else ["--skip-tokenizer-init"]
        command += ["--logprobs-mode", "processed_logprobs", "--enforce-eager", "--kv-cache-memory-bytes", str(2**27)]
        command += [
            "--max-num-seqs",
            "64",
            "--block-size",
            "32",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            *options,
        ]
        command += ["--worker-extension-cls", EXTENSION] if "--worker-extension-cls" not in options else []
        environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        environment["PYTHONPATH"] = str(Path(__file__).parents[2])
        self.url, self.log = f"http://127.0.0.1:{self.port}", log
        with log.open("w") as lines:  # a session of its own: it starts processes, which must end with it
            self.process = subprocess.Popen(
                command, env=environment, stdout=lines, stderr=lines, start_new_session=True
            )

    def wait(self, seconds=300):
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return self
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        raise RuntimeError(f"the server did not come up: {self.log.read_text()[-3000:]}")

    def end(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="session")
def start_server(tmp_path_factory):
    """Starts servers with the shape of the policy, and ends them all."""
    running = []

    def start(*options, tokenizer=None, **fields):
        scratch = tmp_path_factory.mktemp("server")
        policy(seed=99, **fields).save_pretrained(scratch / "model")
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch / "model")
        running.append(RunningServer(scratch / "model", scratch / "log", options, tokenizer is not None))
        return running[-1].wait()

    yield start
    for server in running:
        server.end()


@pytest.fixture(scope="session")
def server(start_server):
    return start_server()


@pytest.fixture(scope="session")
def colocated():
    engine = VLLMEngine(kv_cache_gib=0.125, options=SMALL)
    yield engine
    engine.close()


@pytest.fixture(scope="session", params=["colocated", "server"])
def engine(request):
    if request.param == "colocated":
        return request.getfixturevalue("colocated")
    return VLLMServerEngine(request.getfixturevalue("server").url)


@pytest.fixture
def network():
    return policy()


@pytest.fixture
def take(engine):
    """Give the engine a network's weights as those of a new version."""

    def give(network):
        engine.take_weights(network, None, next(VERSIONS))
        return engine

    return give
