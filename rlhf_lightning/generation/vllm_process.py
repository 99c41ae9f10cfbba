"""A vLLM of our own: its processes, started, asked, given weights and ended."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch

from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.vllm_requests import Answer

# Unless the user says otherwise: no pages of log for every start, no report of its use to its makers, no network.
ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
VISIBLE = "CUDA_VISIBLE_DEVICES"
LOOKS = 2.0  # seconds between two looks at whether vLLM lives


class VLLMProcess:
    """vLLM in processes beside this one. It can also be handed to vLLM's own senders of weights."""

    def __init__(self, folder: str, device: torch.device, arguments: dict[str, Any]) -> None:
        """Start it.

        Args:
            folder: Config and weights; not needed later.
            device: Which GPU it shall use.
            arguments: Of vLLM's engine.

        Raises:
            UserError: If it can't be started like this.
        """
        with _environment(device):
            try:
                from vllm import LLM, EngineArgs

                if unknown := sorted(arguments.keys() - EngineArgs.__dataclass_fields__.keys()):
                    raise UserError(f"options of VLLMEngine: vLLM has no engine argument {', '.join(unknown)}")
                # What is asked for below rests on these.
                self.llm: Any = LLM(
                    model=folder,
                    generation_config="vllm",
                    logprobs_mode="processed_logprobs",
                    **arguments,
                )
            except (RuntimeError, ValueError, ImportError) as error:
                raise _named(error) from error
        self._call(lambda: self.llm.collective_rpc("end_with", args=(os.getpid(),)))

    @property
    def dtype(self) -> torch.dtype:
        """The precision that it computes in."""
        return self.llm.model_config.dtype

    def answers(self, prompts: list[list[int]], fields: list[dict[str, Any]]) -> list[Answer]:
        """One response a prompt."""
        outputs = [o.outputs[0] for o in self._ask(prompts, [each | {"flat_logprobs": True} for each in fields])]
        assert all(o.logprobs.token_ids == list(o.token_ids) for o in outputs)  # of the sampled token alone
        return [Answer(list(o.token_ids), o.logprobs.logprobs, o.finish_reason) for o in outputs]

    def score(self, ids: list[int]) -> list[float]:
        """Log-probabilities of given tokens but the first, at temperature 1."""
        fields = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False}
        places = self._ask([ids], [fields])[0].prompt_logprobs
        return [place[token].logprob for place, token in zip(places[1:], ids[1:], strict=True)]

    def _ask(self, prompts: list[list[int]], fields: Sequence[dict[str, Any]]) -> list[Any]:
        """All requests at once: were they taken up as they come in, batches, and with them last digits, would be of chance."""
        from vllm import SamplingParams

        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        parameters = [SamplingParams(**each) for each in fields]

        def ask() -> list[Any]:
            self.llm.sleep(level=0)
            self.llm.enqueue(inputs, parameters, use_tqdm=False)
            self.llm.wake_up(tags=["scheduling"])
            return self.llm.wait_for_completion(use_tqdm=False)

        return self._call(ask)

    def reload(self, folder: str) -> None:
        self._call(lambda: self.llm.collective_rpc("reload_weights", kwargs={"weights_path": folder}))

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call(lambda: self.llm.init_weight_transfer_engine({"init_info": init_info}))

    def start_weight_update(self) -> None:
        self._call(self.llm.start_weight_update)

    def update_weights(self, update_info: Any) -> None:
        self._call(lambda: self.llm.update_weights({"update_info": update_info}))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call(lambda: self.llm.finish_weight_update(weight_version))

    def renew_tied_head(self) -> None:
        """See :class:`rlhf_lightning.generation.vllm_worker.WorkerExtension`."""
        self._call(lambda: self.llm.collective_rpc("renew_tied_head"))

    def reset_prefix_cache(self) -> None:
        """Forget the keys and values of old weights."""
        self._call(self.llm.reset_prefix_cache)

    def sleep(self) -> None:
        """Move the weights to the host and give up the memory of keys and values."""
        self._call(lambda: self.llm.sleep(level=1))

    def wake_up(self) -> None:
        """Take both back."""
        self._call(self.llm.wake_up)

    def close(self) -> None:
        """End its processes."""
        self.llm.llm_engine.engine_core.shutdown()

    def _call(self, action: Callable[[], Any]) -> Any:
        """What the action returns.

        Raises:
            UserError: If it fails, or vLLM's processes are gone.
        """
        call = Call(action)
        call.start()
        while call.is_alive():
            call.join(LOOKS)
            if call.is_alive() and self.llm.llm_engine.engine_core.resources.engine_dead:
                raise UserError("vLLM failed: its process is gone, killed from outside or for want of memory")
        if call.error is not None:
            raise _named(call.error) from call.error
        return call.result


class Call(threading.Thread):
    """Something to be done with vLLM, in a daemon thread that keeps what was raised.

    vLLM waits for ever for an answer of a process that was killed; nobody has to wait for the thread.
    """

    def __init__(self, action: Callable[[], Any]) -> None:
        super().__init__(name="call to vLLM", daemon=True)
        self.action = action
        self.result: Any = None
        self.error: Exception | None = None

    def run(self) -> None:
        with self:
            self.result = self.action()

    def __enter__(self) -> None:
        """Nothing: only what is raised is of interest."""

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> bool:
        """Raised again where someone waits."""
        self.error = error if isinstance(error, Exception) else None
        return self.error is not None


def _named(error: Exception) -> Exception:
    """What vLLM raises when it can't start or go on, as one line; the cause is in what its processes print."""
    from vllm.exceptions import VLLMError

    # What a worker raised arrives as a plain Exception with its text.
    if type(error) is not Exception and not isinstance(error, RuntimeError | ValueError | ImportError | VLLMError):
        return error
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # pydantic counts its errors first, and closes each with what it was given.
    reason = lines[1].strip().split(" [type=")[0] if "validation error" in lines[0] and len(lines) > 1 else lines[0]
    return UserError(f"vLLM failed: {reason} (its own messages are above; VLLM_LOGGING_LEVEL=INFO shows more)")


@contextmanager
def _environment(device: torch.device) -> Iterator[None]:
    """What is started inside is quiet, offline, and sees one GPU: of several ranks, each would else take the first."""
    before = dict(os.environ)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if device.type == "cuda":
        seen = before.get(VISIBLE)
        os.environ[VISIBLE] = seen.split(",")[device.index or 0] if seen else str(device.index or 0)
    try:
        yield
    finally:  # vLLM sets what other children of ours should not have, such as LD_PRELOAD; its own names it reads again
        for name in [name for name in os.environ if name in ENVIRONMENT or not name.startswith("VLLM_")]:
            del os.environ[name]
        os.environ.update(before)
