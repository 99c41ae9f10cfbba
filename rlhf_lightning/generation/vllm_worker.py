"""What vLLM's worker lacks, mixed into it by name; this file is imported in vLLM's processes."""

import os
import signal
import threading
import time
from typing import Any

EXTENSION = "rlhf_lightning.generation.vllm_worker.WorkerExtension"
LOOKS = 1.0  # seconds


class WorkerExtension:
    """A ``worker_extension_cls``; one of your own inherits from it."""

    model_runner: Any

    def renew_tied_head(self) -> None:
        """Bring a head that is the embedding up to date with it.

        On a CPU vLLM packs each layer's weights for its matrix product. New weights are packed anew where they are loaded;
        a tied head is never loaded, and would go on with the packed copy of old weights. On other devices nothing happens.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        for layer in self.model_runner.get_model().modules():
            if isinstance(layer, ParallelLMHead):
                layer.quant_method.process_weights_after_loading(layer)

    def end_with(self, pid: int) -> None:
        """End vLLM's processes when that one is gone: if it is killed, they would stay, and the GPU's memory with them."""
        import psutil  # vLLM depends on it

        engine = (
            os.getppid()
        )  # the process that this worker was started by; the other one itself, if vLLM needs only one

        def watch() -> None:
            while psutil.pid_exists(pid):
                time.sleep(LOOKS)
            if engine not in (pid, 1):
                _kill(engine)
            _kill(os.getpid())

        threading.Thread(target=watch, name=f"ends with {pid}", daemon=True).start()


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:  # another worker was faster
        return
