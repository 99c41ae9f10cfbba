"""Generation by a vLLM of our own, which lives beside the policy on the same device."""

import os
import tempfile
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.engine import Generation, GenerationEngine, SamplingParameters
from rlhf_lightning.generation.stop_strings import stop_strings_of
from rlhf_lightning.generation.vllm_process import VLLMProcess
from rlhf_lightning.generation.vllm_requests import generation, prompts_of, requests
from rlhf_lightning.generation.vllm_weights import (
    CLOSE,
    Files,
    WeightTransfer,
    check_probe,
    has_tied_head,
    needs_vllm,
    probe,
    probe_logprobs,
    whole_weights,
    write_model,
)
from rlhf_lightning.generation.vllm_worker import EXTENSION
from rlhf_lightning.models.head import missing_tokens

GIB = 2**30
OURS = {"model", "skip_tokenizer_init", "generation_config", "logprobs_mode"}  # what the log-probabilities rest on


class VLLMEngine(GenerationEngine):
    """Colocated vLLM: started with the policy's weights at the first batch, given the new ones after each update.

    It runs in processes of its own, so that neither random numbers nor threads nor process groups mix with the training's.
    On several ranks each has its own. A script that starts it has its start under ``if __name__ == "__main__"``.
    """

    same_numbers = False

    def __init__(
        self,
        dtype: str | None = None,
        kv_cache_gib: float = 2.0,
        sleep: bool = False,
        transfer: WeightTransfer | None = None,
        tolerance: float | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        """Remember how to start it.

        Args:
            dtype: In which vLLM computes; None: in that of the policy's weights.
            kv_cache_gib: Memory for keys and values, GiB.
            sleep: While the policy learns, vLLM gives the GPU memory of its cache back and moves its weights to the host.
            transfer: The way of new weights; None: through files.
            tolerance: How far its log-probabilities may be from the policy's on a probe after each update, nats a token;
                None: what the precision explains.
            options: Further engine arguments of vLLM's, such as ``max_model_len`` or ``enforce_eager``.

        Raises:
            UserError: If vLLM is not installed, or the option or the transfer is not for it.
        """
        needs_vllm("VLLMEngine")
        if transfer is not None and transfer.backend == "nccl":
            raise UserError(
                "NCCL is for a server on other GPUs; a VLLMEngine takes its weights through Files or CudaIPC"
            )
        if taken := sorted(OURS & (options or {}).keys()):
            raise UserError(f"options of VLLMEngine: {', '.join(taken)} can't be set")
        self.dtype, self.kv_cache_gib, self.sleep = dtype, kv_cache_gib, sleep
        self.transfer, self.tolerance = transfer or Files(), tolerance
        self.options = options or {}
        self.vllm: VLLMProcess | None = None
        self._version: int | None = None
        self._asleep = self._stops_at_strings = False

    def expect(self, sampling: SamplingParameters) -> None:
        if not sampling.stop_strings:
            return
        if self.vllm is not None and not self._stops_at_strings:
            raise UserError("this VLLMEngine was started for sampling without stop strings; make another one for these")
        self._stops_at_strings = True

    def take_weights(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, version: int) -> None:
        if self.vllm is not None and self._asleep:
            self.vllm.wake_up()
            self._asleep = False
        if version == self._version:
            return
        weights = whole_weights(network)
        if self.vllm is None:
            self.vllm = self._start(network, weights, tokenizer)
        else:
            self.transfer.send(network, weights, self.vllm)
            if has_tied_head(network) and network.device.type == "cpu":
                self.vllm.renew_tied_head()
            self.vllm.reset_prefix_cache()
        tolerance = CLOSE[self.vllm.dtype] if self.tolerance is None else self.tolerance
        check_probe(probe_logprobs(network), self.vllm.score(probe(network)), tolerance, "vLLM")
        self._version = version

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
        assert self.vllm is not None  # take_weights came first
        prompts = prompts_of(input_ids, attention_mask)
        missing = missing_tokens(network)
        asked = requests(len(prompts), sampling, eos_ids, missing, can_stop=self._stops_at_strings)
        answers = self.vllm.answers(prompts, asked)
        stops = stop_strings_of(sampling, tokenizer)
        return generation(answers, sampling, pad_id, input_ids.device, eos_ids=eos_ids, stops=stops)

    def rest(self) -> None:
        if self.sleep and self.vllm is not None and not self._asleep:
            self.vllm.sleep()
            self._asleep = True

    def close(self) -> None:
        """End vLLM's processes; they end with this one in any case."""
        if self.vllm is not None:
            self.vllm.close()
            self.vllm, self._version, self._asleep = None, None, False

    def _start(
        self, network: PreTrainedModel, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase
    ) -> VLLMProcess:
        """vLLM with these weights; with the tokenizer only where stop strings need it."""
        arguments = {
            "dtype": self.dtype or str(network.dtype).removeprefix("torch."),
            "kv_cache_memory_bytes": int(self.kv_cache_gib * GIB),
            "gpu_memory_utilization": 0.05,  # only checked against what is free, where the cache is stated in bytes
            "enable_prefix_caching": True,
            "use_tqdm_on_load": False,
            "worker_extension_cls": EXTENSION,
            "skip_tokenizer_init": not self._stops_at_strings,
            # Elsewhere there is nothing to give up, and vLLM refuses to be asked for it.
            "enable_sleep_mode": self.sleep and network.device.type == "cuda",
        }
        if self.transfer.backend is not None:
            arguments["weight_transfer_config"] = {"backend": self.transfer.backend}
            # Handles to memory are no plain data. They go from one of our processes to another.
            os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        with tempfile.TemporaryDirectory(prefix="vllm-start-") as folder:
            write_model(network, weights, folder)
            if self._stops_at_strings:
                tokenizer.save_pretrained(folder)
            return VLLMProcess(folder, network.device, arguments | self.options)
