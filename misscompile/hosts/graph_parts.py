"""The modules of a whole graph: which holds the block of a site, and what a `GraphModule` forgets of those it is made of."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from misscompile.passes.unshare_weights import call_name
from misscompile.record.walk import find_module
from misscompile.record.words import Site


def keep_structure(copied: nn.Module, source: nn.Module) -> None:
    """Let `copied` have what a `GraphModule` forgets of `source`.

    A module that has several names there has them here, and the same buffers are left out of the `state_dict`.
    """
    first: dict[nn.Module, str] = {}
    for name, module in source.named_modules(remove_duplicate=False):
        same = first.setdefault(module, name)
        kept = find_module(copied, same)
        if kept is None:
            continue
        if same != name:
            parent, _, last = name.rpartition(".")
            require_container(copied, parent)._modules[last] = kept
        kept._non_persistent_buffers_set = module._non_persistent_buffers_set & set(kept._buffers)


def home_of(root: nn.Module, name: str) -> str:
    """The module that holds the block of a site: that of its name, or one beside the root or parameter that the name has.

    `w` of a parameter `w` is on `w#`, and `w.part0`, a part of it, on `w#part0`.
    """
    segments, module = name.split("."), root
    for index, segment in enumerate(segments):
        if not name or segment in module._parameters:
            return ".".join([*segments[:index], "#".join([segment, ".".join(segments[index + 1 :])])])
        if (child := module._modules.get(segment)) is None:
            break
        module = child
    return name


def call_owner(named: Mapping[str, list[Site]], name: str, index: int) -> str | None:
    """The module that holds the block of one of several calls, or None where a linear of the model has its name."""
    owner = call_name(name, index)
    return None if owner in named else owner


def other_name(owner: str, site: str) -> str | None:
    """A site's name beside the module that holds its block, where that has another one, else None."""
    parent = owner.rpartition(".")[0]
    return None if owner == site else site.removeprefix(f"{parent}.")


def require_container(root: nn.Module, name: str) -> nn.Module:
    """The module of this name, made where no module of the captured model has it."""
    module = root
    for part in name.split(".") if name else ():
        if part not in module._modules:
            module.add_module(part, nn.Module())
        child = module._modules[part]
        assert child is not None
        module = child
    return module
