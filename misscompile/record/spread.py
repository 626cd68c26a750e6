"""Parameters that several processes hold together: how a whole one is read and written, and what cannot be done to them.

DTensor (FSDP2, tensor parallel)    read by a gather, written by each process in its part: every process makes the call
FSDP1                               whole inside of `summon_full_params` alone
DeepSpeed ZeRO-3                    whole inside of `deepspeed.zero.GatheredParameters` alone

No module of torch is imported for this: what was not imported made no tensor.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from misscompile.errors import StateError

_FSDP2 = "FSDP2 (fully_shard)"
_ADAPT_FIRST = "Adapt the model first (or load the adapter), then distribute it."


def _has_processes() -> bool:
    """Whether this process is one of a group. Without one nothing is wrapped or sharded, and no module is looked at."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _kind(module: str, name: str) -> tuple[type, ...]:
    """A class of torch for `isinstance`; none where nothing imported its module."""
    found = getattr(sys.modules.get(module), name, None)
    return () if found is None else (found,)


def is_spread(tensor: Tensor) -> bool:
    """Whether a tensor is a `DTensor`."""
    return isinstance(tensor, _kind("torch.distributed.tensor", "DTensor"))


def whole(tensor: Tensor) -> Tensor:
    """All values of a tensor as a plain one; of a `DTensor` they are gathered, by every process of its mesh together."""
    if not is_spread(tensor):
        return tensor
    gathered: Any = tensor.detach()
    values: Tensor = gathered.full_tensor()
    return values


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    held: Any = tensor
    return held.to_local() if is_spread(tensor) else tensor  # type: ignore[no-any-return, unused-ignore]


def part_like(stored: Tensor, values: Tensor) -> Tensor:
    """The part of plain `values` that this process holds of `stored`; it takes no memory of the rest."""
    if not is_spread(stored):
        return values
    from torch.distributed.tensor import distribute_tensor

    held: Any = stored
    values = values.to(own_part(stored.detach()).device)
    return own_part(distribute_tensor(values, held.device_mesh, held.placements, src_data_rank=None)).clone()


@contextlib.contextmanager
def one_writer(tensors: Iterable[Tensor]) -> Iterator[bool]:
    """Whether this process writes a file of these tensors: the first of those that hold them. All wait until it is done."""
    meshes = list(dict.fromkeys(tensor.device_mesh for tensor in tensors if is_spread(tensor)))  # type: ignore[attr-defined]
    try:
        yield all(not any(mesh.get_coordinate() or ()) for mesh in meshes)
    finally:
        for mesh in meshes:
            for dimension in reversed(range(mesh.ndim)):
                torch.distributed.barrier(mesh.get_group(dimension))


def _fsdp2_modules(root: nn.Module) -> list[Any]:
    kind = _kind("torch.distributed.fsdp", "FSDPModule")
    return [module for module in root.modules() if isinstance(module, kind)] if kind and _has_processes() else []


def reshard(root: nn.Module) -> None:
    """Let the parameters of FSDP2 be those that stay. What a forward gathered is thrown away with what is written to it."""
    for module in _fsdp2_modules(root):
        module.reshard()


def forget_removed(root: nn.Module) -> None:
    """Let FSDP2 forget the parameters that were removed: its next forward would register them again."""
    for module in _fsdp2_modules(root):
        for group in module._get_fsdp_state()._fsdp_param_groups:
            group.fsdp_params = [
                held for held in group.fsdp_params if held._module_info.param_name in held._module_info.module._parameters
            ]


def check_whole(model: nn.Module, verb: str) -> None:
    """Refuse a verb on a model of which FSDP1 or ZeRO-3 holds the values in parts.

    Raises:
        StateError: naming the verb, and the context in which it works.
    """
    for _ in _fsdp1_parts(model):
        raise StateError(
            f"{verb}: FSDP1 holds the parameters in parts. Call it inside of "
            "FullyShardedDataParallel.summon_full_params(model)."
        )
    for name, parameter in model.named_parameters():
        if _is_partitioned(parameter):
            raise StateError(
                f"{verb}: DeepSpeed ZeRO-3 holds {name} in parts. Call it inside of "
                "deepspeed.zero.GatheredParameters(list(model.parameters()))."
            )


def _fsdp1_parts(model: nn.Module) -> list[Any]:
    """The modules of FSDP1 in a model outside of `summon_full_params`."""
    kind = _kind("torch.distributed.fsdp", "FullyShardedDataParallel")
    found: list[Any] = [module for module in model.modules() if isinstance(module, kind)] if kind else []
    return [module for module in found if module.training_state.name != "SUMMON_FULL_PARAMS"]


def _is_partitioned(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_shape") and tuple(parameter.ds_shape) != tuple(parameter.shape)


def gradient_wrapper(model: nn.Module) -> str | None:
    """The wrapper around a model, or inside of it, that sums the gradients of the parameters that it met, if any."""
    for found in dict.fromkeys(type(module) for module in model.modules()):
        names = [kind.__name__ for kind in found.__mro__ if kind.__module__.startswith(("torch.", "deepspeed."))]
        for name in ("DistributedDataParallel", "DeepSpeedEngine"):
            if name in names:
                return name
    return None


def check_before_wrapping(model: object, verb: str, trains: bool) -> None:
    """Refuse a new adapter where its blocks would be outside of what sums gradients, so that processes drift apart.

    Raises:
        StateError: naming the verb and the wrapper.
    """
    if not isinstance(model, nn.Module) or not _has_processes():
        return
    kind = _kind("torch.distributed.fsdp", "FullyShardedDataParallel")
    if kind and any(isinstance(module, kind) for module in model.modules()):
        raise StateError(f"{verb}: the model is wrapped in FSDP1, which would not know the new blocks. {_ADAPT_FIRST}")
    wrapper = gradient_wrapper(model) if trains else None
    if wrapper is not None:
        raise StateError(
            f"{verb}: the model is wrapped in {wrapper}, which sums the gradients of the parameters that it met: those "
            f"of the new blocks would differ between the processes. {_ADAPT_FIRST}"
        )


def check_before_spreading(root: nn.Module, modules: Mapping[str, nn.Module], trains: bool) -> None:
    """Refuse to adapt modules whose parameters are held in parts. With FSDP2 alone, blocks that do not train are right.

    Args:
        root: the model.
        modules: those chosen, by name.
        trains: whether what they get would train, or is a copy of their tensors.

    Raises:
        StateError: naming a module and who holds its parameters.
    """
    reshard(root)
    groups = [group for module in _fsdp2_modules(root) for group in module._get_fsdp_state()._fsdp_param_groups]
    gathered = {id(held.sharded_param) for group in groups for held in group.fsdp_params if not held.is_dtensor}
    for name, module in modules.items():
        for held, parameter in module._parameters.items():
            who = None if parameter is None else _holder(parameter, gathered)
            if who is not None and (trains or who != _FSDP2):
                raise StateError(f"{name or 'the model itself'}: {who} holds its {held} in parts. {_ADAPT_FIRST}")


def _holder(parameter: Tensor, gathered: Collection[int]) -> str | None:
    """Who holds a parameter in parts; `gathered` are the ids of those that FSDP2 makes whole in a forward."""
    if hasattr(parameter, "_fsdp_flattened"):
        return "FSDP1"
    if _is_partitioned(parameter):
        return "DeepSpeed ZeRO-3"
    if not is_spread(parameter):
        return None
    return _FSDP2 if id(parameter) in gathered else "tensor parallelism (a DTensor)"
