"""Generation by a vLLM server on another device or node."""

import http.client
import json
import logging
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.engine import Generation, GenerationEngine, SamplingParameters
from rlhf_lightning.generation.stop_strings import stop_strings_of
from rlhf_lightning.generation.vllm_requests import Answer, generation, prompts_of, requests
from rlhf_lightning.generation.vllm_weights import (
    CLOSE,
    Files,
    WeightTransfer,
    check_probe,
    has_tied_head,
    probe,
    probe_logprobs,
    whole_weights,
)
from rlhf_lightning.generation.vllm_worker import EXTENSION
from rlhf_lightning.models.head import missing_tokens
from rlhf_lightning.models.loading import embedding_weight

log = logging.getLogger(__name__)

START = (
    "VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model FOLDER --dtype float32"
    " --skip-tokenizer-init --enable-scale-out --logprobs-mode processed_logprobs"
)
AT_ONCE = 256  # requests on the way; more wait here instead of there


class VLLMServerEngine(GenerationEngine):
    """vLLM's own server, started by the user with the policy's folder, given the new weights after each update.

    On several ranks all ask the same server, and the first hands it the weights. Requests are taken up as they come in, so
    that the last digits of log-probabilities, and rarely a token, differ from run to run.
    """

    same_numbers = False

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        sleep: bool = False,
        transfer: WeightTransfer | None = None,
        tolerance: float | None = None,
        timeout: float = 600,
    ) -> None:
        """Remember where it is; it is looked for at the first batch.

        Args:
            url: Of the server. Whoever reaches it can change its weights: keep it inside your network.
            sleep: While the policy learns, the server gives up GPU memory; start it with ``--enable-sleep-mode``.
            transfer: The way of new weights; None: through files that both sides see.
            tolerance: How far its log-probabilities may be from the policy's on a probe before each batch, nats a token;
                None: what the precision explains.
            timeout: Seconds after which an answer is no longer waited for.

        Raises:
            UserError: If that is no address, or the transfer is for an engine of our own.
        """
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise UserError(f"VLLMServerEngine: {url!r} is no address; write it as http://host:port")
        if transfer is not None and transfer.backend == "ipc":
            raise UserError("CudaIPC is for a VLLMEngine; a VLLMServerEngine takes its weights through Files or NCCL")
        self.server = Server(url, timeout)
        self.sleep, self.transfer, self.tolerance = sleep, transfer or Files(), tolerance
        self._version: int | None = None
        self._asleep = self._warned = False

    def take_weights(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, version: int) -> None:
        first = not dist.is_initialized() or dist.get_rank() == 0
        weights = whole_weights(network, keep=first) if version != self._version else {}
        expected = probe_logprobs(network)
        _first_rank(lambda: self._refresh(network, weights, expected))
        self._version, self._asleep = version, False

    def _refresh(self, network: PreTrainedModel, weights: dict[str, Tensor], expected: Tensor) -> None:
        """Awake, with these weights if there are any; and in any case with those of the policy."""
        if self._version is None:
            dtype = self.server.check(network, self.transfer.backend)
            self.tolerance = CLOSE[dtype] if self.tolerance is None else self.tolerance
        if self._asleep:
            self.server.post("wake_up")
        if weights:
            self.transfer.send(network, weights, self.server)
            if has_tied_head(network) and self.server.on_cpu:
                self.server.post("collective_rpc", {"method": "renew_tied_head"})
            self.server.post("reset_prefix_cache")
        assert self.tolerance is not None
        check_probe(
            expected, self.server.score(probe(network)), self.tolerance, f"the vLLM server at {self.server.url}"
        )

    def generate(
        self,
        network: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor,
        sampling: SamplingParameters,
        *,
        eos_ids: list[int],
        pad_id: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> Generation:
        prompts = prompts_of(input_ids, attention_mask)
        stops = stop_strings_of(sampling, tokenizer)
        if stops is not None and not self.server.has_tokenizer and not self._warned:
            log.warning(
                "the vLLM server has no tokenizer: it generates on after a stop string, and responses are cut afterwards; to "
                "spare that time start it without --skip-tokenizer-init, from a folder that holds the policy's tokenizer"
            )
            self._warned = True
        missing = missing_tokens(network)
        asked = requests(len(prompts), sampling, eos_ids, missing, can_stop=self.server.has_tokenizer)
        with ThreadPoolExecutor(min(len(prompts), AT_ONCE)) as threads:
            answers = list(threads.map(self.server.answer, prompts, asked))
        return generation(answers, sampling, pad_id, input_ids.device, eos_ids=eos_ids, stops=stops)

    def rest(self) -> None:
        if not self.sleep:
            return
        if dist.is_initialized():
            dist.barrier()  # another rank's requests may still be on the way
        _first_rank(lambda: self.server.post("sleep?level=1"))
        self._asleep = True


class Server:
    """vLLM's server over HTTP. It can also be handed to vLLM's own senders of weights."""

    def __init__(self, url: str, timeout: float) -> None:
        self.url, self.timeout = url.rstrip("/"), timeout
        self.on_cpu = self.has_tokenizer = False

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """One request.

        Returns:
            The JSON that came back; None if there was none.

        Raises:
            UserError: If nobody answers, or with what the server says against it.
        """
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(str(parts.hostname), parts.port, timeout=self.timeout)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request(method, f"{parts.path}/{path}", json.dumps(body) if body is not None else None, headers)
            response = connection.getresponse()
            text = response.read().decode()
        except (OSError, http.client.HTTPException) as error:
            raise UserError(
                f"no vLLM server answers at {self.url} ({error or type(error).__name__}); start it there with the policy's"
                f" folder: {START} --host {parts.hostname} --port {parts.port or 8000}"
            ) from error
        finally:
            connection.close()
        if response.status >= 400:
            raise UserError(f"the vLLM server at {self.url} refused /{path} ({response.status}): {_reason(text)}")
        return json.loads(text) if text else None

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return self.ask("POST", path, body or {})

    def check(self, network: PreTrainedModel, backend: str | None) -> torch.dtype:
        """Refuse a server that would break, or compute something else; a wrong request ends vLLM for good.

        Returns:
            The precision that it computes in.

        Raises:
            UserError: If it is away, was started otherwise, or holds a model of another shape.
        """
        self.ask("GET", "health")
        try:
            config = self.ask("GET", "server_info?config_format=json")["vllm_config"]
        except UserError as error:
            raise UserError(f"{error}; it can't be given weights unless it is started with {START}") from error
        model, transfer = config["model_config"], config["weight_transfer_config"]
        if model["logprobs_mode"] != "processed_logprobs":
            raise UserError(f"the vLLM server at {self.url} gives other log-probabilities; start it with {START}")
        if backend is not None and (transfer or {}).get("backend") != backend:
            option = json.dumps({"backend": backend})
            raise UserError(
                f"the vLLM server at {self.url} takes no weights by {backend}; add --weight-transfer-config '{option}'"
            )
        self.has_tokenizer = not model.get("skip_tokenizer_init", True)
        self.on_cpu = config["device_config"]["device"] == "cpu"
        extension = config["parallel_config"]["worker_extension_cls"]
        if self.on_cpu and has_tied_head(network) and extension != EXTENSION:
            raise UserError(
                f"the vLLM server at {self.url} runs on a CPU, where it does not renew a head that is tied to the embedding;"
                f" add --worker-extension-cls {EXTENSION}, with rlhf_lightning installed there"
            )
        theirs, ours = (
            shape(self.post("collective_rpc", {"method": "get_model_inspection"})["results"][0]),
            own_shape(network),
        )
        if theirs != ours:
            raise UserError(
                f"the vLLM server at {self.url} holds another model: {_words(theirs)}, the policy has {_words(ours)}; start it"
                " with the policy's folder"
            )
        return getattr(torch, model["dtype"].removeprefix("torch."))

    def answer(self, prompt: list[int], fields: dict[str, Any]) -> Answer:
        """One response."""
        choice = self.post("inference/v1/generate", {"token_ids": prompt, "sampling_params": fields})["choices"][0]
        logprobs = [place["logprob"] for place in choice["logprobs"]["content"]]
        return Answer(choice["token_ids"], logprobs, choice["finish_reason"])

    def score(self, ids: list[int]) -> list[float]:
        """Log-probabilities of given tokens but the first, at temperature 1."""
        fields = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False}
        places = self.post("inference/v1/generate", {"token_ids": ids, "sampling_params": fields})["prompt_logprobs"]
        return [place[str(token)]["logprob"] for place, token in zip(places[1:], ids[1:], strict=True)]

    def reload(self, folder: str) -> None:
        self.post("collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.post("init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self.post("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self.post("update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.post("finish_weight_update", {"weight_version": weight_version} if weight_version else None)


def shape(inspection: str) -> tuple[int, int, int]:
    """Vocabulary, width and layers, read from vLLM's picture of its model."""
    vocabulary = re.search(r"org_vocab_size=(\d+)", inspection)
    width = re.search(r"Embedding\(.*?embedding_dim=(\d+)", inspection)
    layers = re.search(r"ModuleList\(\)\(\s*\((?:0-)?(\d+)\)", inspection)
    if vocabulary is None or width is None or layers is None:
        raise UserError("the vLLM server's model has no layers or no vocabulary that this version of vLLM shows")
    return int(vocabulary[1]), int(width[1]), int(layers[1]) + 1


def own_shape(network: PreTrainedModel) -> tuple[int, int, int]:
    """The same of the policy."""
    vocabulary, width = embedding_weight(network).shape
    return vocabulary, width, int(network.config.num_hidden_layers)


def _words(shape: tuple[int, int, int]) -> str:
    return "vocabulary {}, width {}, {} layers".format(*shape)


def _reason(text: str) -> str:
    try:
        content = json.loads(text)
        return content["error"]["message"] if "error" in content else content["detail"]
    except (ValueError, KeyError, TypeError):
        return text[:200] or "no reason given"


def _first_rank(action: Callable[[], Any]) -> None:
    """Done by one rank for all; where it fails, all do, and none waits for ever."""
    failure: list[str | None] = [None]
    if not dist.is_initialized():
        action()
        return
    if dist.get_rank() == 0:
        try:
            action()
        except UserError as error:
            failure = [str(error)]
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise UserError(failure[0])
