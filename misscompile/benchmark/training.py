"""The training step that most sections measure: its seconds, bytes, FLOPs and guards, eager or compiled."""

from __future__ import annotations

import copy
import os
import types
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from misscompile.benchmark.contestants import Contestant, enter_filled
from misscompile.benchmark.settings import Settings
from misscompile.benchmark.timing import Trial

Steps = dict[Contestant, "TrainingStep"]

# The profiler writes a line to the standard error at each start and stop, unless this is set before its first start.
os.environ.setdefault("KINETO_LOG_LEVEL", "9")


class Probe(nn.Module):
    """A causal language model whose input carries a gradient: one trainable vector is added to the embeddings.

    The backward of a frozen base thus runs through every layer for its input gradient, as an adapted model's does.
    """

    def __init__(self, model: nn.Module, shift: Tensor) -> None:
        super().__init__()
        self.model, self.shift = model, nn.Parameter(shift)

    def forward(self, embedded: Tensor) -> Tensor:
        """Logits `(1, tokens, vocabulary)` of `embedded (1, tokens, hidden)`."""
        output: Tensor = self.model(inputs_embeds=embedded + self.shift, use_cache=False)[0]
        return output


class TrainingStep:
    """One forward and backward of `model(x)`, under `torch.compile` if there is a `backend`; `model` returns a tensor."""

    def __init__(self, model: nn.Module, x: Tensor, backend: str | None = None) -> None:
        self.model, self.x = model, x
        self._cotangent: Tensor | None = None
        # Dynamo keeps what it compiled by code object. If models of one class shared theirs, each call would first check
        # the guards of the models before it, and the ninth model would reach the limit of recompilations.
        function = type(model).forward
        self._code = function.__code__.replace()
        forward = types.MethodType(types.FunctionType(self._code, function.__globals__), model)
        self._compute = forward if backend is None else torch.compile(forward, backend=backend, dynamic=False)

    def compiled(self, backend: str) -> TrainingStep:
        """The step of the same model on the same input under `torch.compile`."""
        return TrainingStep(self.model, self.x, backend)

    def clear(self) -> Self:
        """Clear the gradients, so that the next run writes them and does not add to them."""
        self.model.zero_grad(set_to_none=True)
        return self

    def run(self) -> None:
        """The forward and the backward, with the same output gradient each time."""
        output: Tensor = self._compute(self.x)
        if self._cotangent is None:
            generator = torch.Generator().manual_seed(3)
            self._cotangent = torch.randn(output.shape, generator=generator).to(output)
        torch.autograd.backward(output, self._cotangent)

    def trial(self) -> Trial:
        """The step from clear gradients, to be timed."""
        return Trial(self.clear, TrainingStep.run)

    def guards(self) -> int:
        """Nodes of Dynamo's guard tree, as `TORCH_LOGS=guards` prints it: the checks, and the reads that lead to them."""
        return sum(str(entry.guard_manager).count("+- ") for entry in _debug_get_cache_entry_list(self._code))

    def flops(self) -> int:
        """FLOPs of a run, as `torch.utils.flop_counter` counts them.

        Attention is counted in its plain form: the counter has no entry for the fused kernel of CPUs, and fused kernels
        recompute in the backward, which is a choice and not work that has to be done.
        """
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self.clear().run()
        return int(counter.get_total_flops())

    def saved_bytes(self) -> int:
        """Bytes of distinct storages that the forward keeps for the backward; those of parameters are there anyway."""
        parameters = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output: Tensor = self.clear()._compute(self.x)
        # A compiled function keeps tensors that need no version check as an attribute of its node, which hooks do not see.
        waiting, seen = [output.grad_fn], set()
        while waiting:
            node = waiting.pop()
            if node is not None and node not in seen:
                seen.add(node)
                waiting += [parent for parent, _ in node.next_functions]
                for tensor in getattr(node, "_tensors_no_vc_check", None) or ():
                    keep(tensor)
        return sum(kept.values())

    def peak_bytes(self) -> int | None:
        """The most bytes that a run holds at a time beyond what is allocated before it; None where torch cannot tell.

        On CPUs this is the running sum of what torch's allocator reports to the profiler, so that the temporaries inside
        kernels and compiled code count too; on other devices it is the allocator's own peak.
        """
        self.clear()
        device = self.x.device.type
        if device == "cpu":
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
                self.run()
            recorded: Any = profiler.profiler
            peak = held = 0
            for event in sorted(recorded.kineto_results.events(), key=lambda event: int(event.start_ns())):
                held += event.nbytes() if event.name() == "[memory]" else 0
                peak = max(peak, held)
            return peak
        backend = getattr(torch, device)
        if not hasattr(backend, "max_memory_allocated"):
            return None
        before = int(backend.memory_allocated())
        backend.reset_peak_memory_stats()
        self.run()
        return int(backend.max_memory_allocated()) - before


def line_up(base: PreTrainedModel, entries: list[Contestant], settings: Settings, tokens: int) -> Steps:
    """The eager step of each contestant on a copy of `base`, all with one random input `(1, tokens, hidden)`."""
    embedding = base.get_input_embeddings().get_parameter("weight")
    generator = torch.Generator().manual_seed(1)
    embedded = torch.randn(1, tokens, embedding.shape[1], generator=generator).to(embedding)
    models = {entry: enter_filled(copy.deepcopy(base), entry, settings) for entry in entries}
    return {entry: TrainingStep(Probe(model, torch.zeros_like(embedded[0, 0])), embedded) for entry, model in models.items()}
