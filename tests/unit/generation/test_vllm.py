"""What can be said of the vLLM engines without vLLM: requests, answers, and a server that is away or another."""

import http.server
import importlib.util
import json
import threading
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.generation.vllm_engine import VLLMEngine
from rlhf_lightning.generation.vllm_requests import Answer, generation, prompts_of, requests
from rlhf_lightning.generation.vllm_server import VLLMServerEngine, shape
from rlhf_lightning.generation.vllm_weights import NCCL, CudaIPC, Files, check_probe, probe, probe_logprobs
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.spec import ModelSpec

CPU = torch.device("cpu")


@pytest.mark.parametrize("make", [VLLMEngine, CudaIPC, lambda: NCCL("host")])
@pytest.mark.parametrize(
    "found", [None, SimpleNamespace(origin=None)]
)  # the other: a folder that happens to be called so
def test_without_the_extra_its_name_is_said(monkeypatch, make, found):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(
        UserError, match=r"needs vLLM, which is not installed: pip install 'rlhf_lightning\[vllm\]'.*make vllm"
    ):
        make()


def test_prompts_are_the_real_tokens():
    ids = torch.tensor([[9, 9, 4, 5], [1, 2, 3, 4], [0, 0, 0, 7]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]])
    assert prompts_of(ids, mask) == [[4, 5], [1, 2, 3, 4], [7]]


def test_a_request_leaves_nothing_to_the_model_folder():
    torch.manual_seed(3)
    first, second = requests(2, SamplingParameters(5, temperature=0.7, top_p=0.9, top_k=4), [2, 8])
    assert {k: v for k, v in first.items() if k != "seed"} == {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 4,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": 5,
        "min_tokens": 0,
        "stop_token_ids": [2, 8],
        "ignore_eos": True,
        "logprobs": 0,
        "detokenize": False,
    }
    assert first["seed"] != second["seed"]
    torch.manual_seed(3)
    assert torch.randint(2**62, (2,)).tolist() == [first["seed"], second["seed"]]


def test_the_options_have_the_names_that_vllm_gives_them():
    sampling = SamplingParameters(9, min_p=0.1, repetition_penalty=1.2, min_new_tokens=3, stop_strings=["x", "\n"])
    (request,) = requests(1, sampling, [2], can_stop=True)
    assert {name: request[name] for name in ("min_p", "repetition_penalty", "min_tokens")} == {
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "min_tokens": 3,
    }
    assert request["stop"] == ["x", "\n"]
    assert request["include_stop_str_in_output"]
    assert request["detokenize"]  # vLLM finds stop strings in the text
    assert not request["skip_special_tokens"]
    (without,) = requests(1, sampling, [2], can_stop=False)
    assert "stop" not in without
    assert not without["detokenize"]


def test_an_order_of_filters_that_only_vllm_has_is_refused():
    with pytest.raises(UserError, match=r"vLLM applies min_p before top_p.*set one of"):
        requests(1, SamplingParameters(min_p=0.1, top_p=0.9), [2])
    requests(1, SamplingParameters(min_p=0.1, top_k=5), [2])  # these two commute
    requests(1, SamplingParameters(min_p=0.1, top_p=0.9, temperature=0), [2])  # greedy: neither is applied


def test_an_answer_that_stops_where_no_stop_string_ends_is_refused():
    stops = SimpleNamespace(end=lambda tokens: 2 if tokens[:2] == [7, 8] else None)
    sampling = SamplingParameters(3, stop_strings=["x"])
    good = [
        Answer([7, 8], [-1.0, -1.0], "stop"),
        Answer([5, 2], [-1.0, -0.5], "stop"),
        Answer([6] * 3, [0.0] * 3, "length"),
    ]
    drawn = generation(good, sampling, 0, CPU, eos_ids=[2], stops=stops)
    assert drawn.tokens.tolist() == [[7, 8, 0], [5, 2, 0], [6, 6, 6]]
    with pytest.raises(UserError, match="ended response 0 at a stop string that the policy's tokenizer does not find"):
        generation([Answer([8, 7], [0.0, 0.0], "stop")], sampling, 0, CPU, eos_ids=[2], stops=stops)


def test_greedy_requests_take_no_random_numbers():
    state = torch.get_rng_state()
    assert "seed" not in requests(1, SamplingParameters(temperature=0), [2])[0]
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("temperature", [0.001, 2.5])
def test_temperatures_that_vllm_would_change_or_refuse(temperature):
    with pytest.raises(UserError, match=f"temperatures from 0.01 to 2.0.*{temperature}"):
        requests(1, SamplingParameters(temperature=temperature), [2])


def test_answers_side_by_side():
    answers = [Answer([5, 2], [-1.0, -0.5], "stop"), Answer([6, 7, 8], [-2.0, -1.5, -0.25], "length")]
    drawn = generation(answers, SamplingParameters(3), 0, CPU)
    assert drawn.tokens.tolist() == [[5, 2, 0], [6, 7, 8]]
    assert drawn.logprobs.tolist() == [[-1.0, -0.5, 0.0], [-2.0, -1.5, -0.25]]
    assert generation(answers, SamplingParameters(3, top_k=2), 0, CPU).logprobs is None


def test_answers_that_are_no_answers():
    with pytest.raises(UserError, match=r"gave up response 1 \(abort\)"):
        generation([Answer([5], [0.0], "stop"), Answer([], [], "abort")], SamplingParameters(3), 0, CPU)
    with pytest.raises(UserError, match=r"cut response 0 off after 1 of 3 tokens.*max_model_len"):
        generation([Answer([5], [0.0], "length")], SamplingParameters(3), 0, CPU)


def test_a_transfer_is_for_one_of_the_two(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin="here"))
    with pytest.raises(UserError, match="NCCL is for a server"):
        VLLMEngine(transfer=NCCL("host"))
    with pytest.raises(UserError, match="CudaIPC is for a VLLMEngine"):
        VLLMServerEngine(transfer=CudaIPC())
    with pytest.raises(UserError, match="options of VLLMEngine: logprobs_mode, model can't be set"):
        VLLMEngine(options={"model": "x", "logprobs_mode": "raw_logits", "seed": 1})


class Tokenizer(SimpleNamespace):
    def __len__(self):
        return self.size


@pytest.fixture
def network(tiny):
    torch.manual_seed(0)
    return load_causal_lm(
        ModelSpec(architecture=tiny), Tokenizer(size=40, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    )


def test_the_probe_tells_weights_apart(network):
    ids, logprobs = probe(network), probe_logprobs(network)
    logits = network(input_ids=torch.tensor([ids])).logits[0].detach()
    expected = [float(logits[n].log_softmax(-1)[ids[n + 1]]) for n in range(len(ids) - 1)]
    assert min(ids) == 0
    assert max(ids) == 39
    assert logprobs.tolist() == pytest.approx(expected, abs=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(probe_logprobs(network), logprobs)  # in the policy's own precision
    check_probe(logprobs, logprobs.tolist(), 1e-3, "vLLM")
    check_probe(logprobs, (logprobs + 0.0009).tolist(), 1e-3, "vLLM")
    with pytest.raises(
        UserError, match=r"vLLM does not compute with the policy's weights.*differ by 0.002 nats a token, 0.001 are"
    ):
        check_probe(logprobs, (logprobs + 0.002).tolist(), 1e-3, "vLLM")
    with pytest.raises(UserError, match="nan"):
        check_probe(logprobs, [float("nan")] * len(logprobs), 1e-3, "vLLM")


@pytest.mark.parametrize("first_rank", [True, False])
def test_files_are_plain_transformers_and_gone_afterwards(network, tmp_path, monkeypatch, first_rank):
    # So transformers asks whether to write at all; each rank has a vLLM of its own that needs the files.
    monkeypatch.setattr(type(network), "should_save_on_this_rank", lambda self, is_main_process: first_rank)
    seen = []

    def reload(folder):
        seen.append(AutoModelForCausalLM.from_pretrained(folder).state_dict())

    Files(str(tmp_path)).send(network, dict(network.state_dict()), SimpleNamespace(reload=reload))
    for name, weight in network.state_dict().items():
        assert torch.equal(seen[0][name], weight)
    assert list(tmp_path.iterdir()) == []


INSPECTION = """LlamaForCausalLM()(
  (model): LlamaModel()(
    (embed_tokens): VocabParallelEmbedding(num_embeddings=64, embedding_dim={width}, org_vocab_size={vocabulary}, tp_size=1)
    (layers): ModuleList()(
      ({layers}): {count}LlamaDecoderLayer()(
        (self_attn): LlamaAttention()(
          (qkv_proj): QKVParallelLinear(in_features=128, output_features=256)
"""


@pytest.mark.parametrize(("layers", "count", "number"), [("0-11", "12 x ", 12), ("0", "", 1)])
def test_the_shape_of_the_servers_model_is_read_from_its_picture(layers, count, number):
    picture = INSPECTION.format(width=32, vocabulary=40, layers=layers, count=count)
    assert shape(picture) == (40, 32, number)
    with pytest.raises(UserError, match="no layers or no vocabulary"):
        shape("SomethingElse()")


class FakeServer:
    """Answers as vLLM's server does, as far as a test says; anything else is not found."""

    def __init__(self, answers):
        self.asked = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(handler):
                length = int(handler.headers.get("Content-Length", 0))
                self.asked.append((handler.path, json.loads(handler.rfile.read(length) or "null")))
                status, body = answers.get(handler.path, (404, {"detail": "Not Found"}))
                text = json.dumps(body).encode()
                handler.send_response(status)
                handler.send_header("Content-Length", str(len(text)))
                handler.end_headers()
                handler.wfile.write(text)

            do_POST = do_GET

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


CONFIG = {
    "weight_transfer_config": None,
    "device_config": {"device": "cuda"},
    "parallel_config": {"worker_extension_cls": ""},
}


def info(**model):
    model = {"logprobs_mode": "processed_logprobs", "dtype": "torch.float32"} | model
    return 200, {"vllm_config": {"model_config": model, **CONFIG}}


HEALTHY = {"/health": (200, None)}
INFO, RPC, GENERATE = "/server_info?config_format=json", "/collective_rpc", "/inference/v1/generate"
PICTURE = INSPECTION.format(width=32, vocabulary=40, layers="0-1", count="2 x ")


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (
            HEALTHY,
            r"refused /server_info.* \(404\): Not Found; it can't be given weights unless .*VLLM_SERVER_DEV_MODE=1",
        ),
        (
            HEALTHY | {INFO: info(logprobs_mode="raw_logprobs")},
            "other log-probabilities.*--logprobs-mode processed_logprobs",
        ),
        (
            HEALTHY | {INFO: info(), RPC: (200, {"results": [PICTURE.replace("=40", "=41")]})},
            "another model: vocabulary 41, width 32, 2 layers, the policy has vocabulary 40, width 32, 2 layers",
        ),
        (
            HEALTHY
            | {INFO: info(), RPC: (200, {"results": [PICTURE]}), "/reset_prefix_cache": (200, {"success": True})},
            r"refused /inference/v1/generate \(404\)",
        ),
        (
            {"/health": (500, {"error": {"message": "EngineCore is dead"}})},
            r"refused /health \(500\): EngineCore is dead",
        ),
    ],
)
def test_a_server_that_would_break_is_refused_before_it_is_asked(network, answers, message):
    server = FakeServer(answers)
    with pytest.raises(UserError, match=message):
        VLLMServerEngine(server.url).take_weights(network, None, 0)
    server.server.shutdown()


def test_a_server_that_is_away_is_named_with_the_command_that_starts_it(network):
    engine = VLLMServerEngine("http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"no vLLM server answers at http://127.0.0.1:9 .*api_server .*--port 9"):
        engine.take_weights(network, None, 0)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://"])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(UserError, match="is no address"):
        VLLMServerEngine(url)


def test_an_answer_that_does_not_come_is_not_waited_for(network):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        engine = VLLMServerEngine(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.2)
        with pytest.raises(UserError, match="timed out"):
            engine.take_weights(network, None, 0)
