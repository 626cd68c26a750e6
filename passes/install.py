"""Generate a forward from a rewritten graph and install it as the class of its owners.

    type(q_proj) is nn.Linear   ->   type(q_proj) is a cached subclass of nn.Linear whose forward is the generated code

as FSDP2 and `torch.nn.utils.parametrize` do. Owners of equal structure share the class, hence also one compiled graph.
The class is always derived from the owner's `OwnerState`: copies and unpickled modules derive it again.
"""

from __future__ import annotations

import itertools
import linecache
import types
from collections.abc import Callable, Mapping
from typing import Any

from misscompile.passes.find import weight_dtype
from misscompile.passes.trace import BASE_FORWARD
from torch import nn

from misscompile.errors import StateError
from misscompile.plan import Scope
from misscompile.state import STATE, OwnerState, swap_base_values

_serial = itertools.count()
_namespace: dict[str, Any] = {}


def generate_forward(scope: Scope) -> None:
    """Compile `scope.graph` to Python: `scope.code` and `scope.forward(self, …)`, visible to tracebacks and debuggers."""
    python = scope.graph.python_code(root_module="self")
    scope.code = readable_code(python.src)
    filename = f"<misscompile {scope.base_class.__name__} {next(_serial)}>"
    linecache.cache[filename] = (len(python.src), None, python.src.splitlines(keepends=True), filename)
    namespace = _namespace_with(python.globals)
    exec(compile(python.src, filename, "exec"), namespace)  # noqa: S102 - torch.fx wrote this source
    scope.forward = namespace.pop("forward")


def _namespace_with(names: Mapping[str, Any]) -> dict[str, Any]:
    """The globals for a generated forward: one dict for all, since Dynamo guards what each of them reads.

    Two graphs may call different functions by one name; then the later one has globals of its own.
    """
    if any(_namespace.get(name, value) is not value for name, value in names.items()):
        return dict(names)
    _namespace.update(names)
    return _namespace


def readable_code(source: str) -> str:
    """Generated source without the lines that only tell torch.fx which functions are leaves."""
    return "\n".join(line for line in source.splitlines() if not line.startswith("torch.fx._symbolic_trace.wrap")).strip()


class AdaptedOwner(nn.Module):
    """What an adapted module can do beside its own class's behaviour. Always the first base of a specialised class."""

    scope: Scope | None
    """The scope whose forward this class carries; None for a module that is no linear."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        constructor, arguments, state, *rest = tuple(super().__reduce_ex__(protocol))
        if arguments and arguments[0] is type(self):
            arguments = (getattr(self, STATE).base_class, *arguments[1:])
        return (_reconstruct, (constructor, arguments), state, *rest)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        record: OwnerState = getattr(self, STATE)
        self.__class__ = record.base_class  # type: ignore[assignment]
        if record.disabled:  # copied inside disable_adapter: the context will not come back for the copy
            record.disabled = 0
            swap_base_values(self)
        from misscompile.pipeline import refresh_owner  # the pipeline imports this pass

        refresh_owner(self)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._follow_dtype()
        return result

    def _follow_dtype(self) -> None:
        """Derive the class again if the dtype of the weight changed: which form of bat is exact depends on it."""
        scope = type(self).scope
        if scope is not None and weight_dtype(self) != scope.weight_dtype:
            from misscompile.pipeline import refresh_owner

            refresh_owner(self)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        missing_keys: list[str] = args[2]
        ours = {prefix + name for name in getattr(self, STATE).all_registered()}
        self._follow_dtype()  # assign=True may bring another one
        missing_keys[:] = [key for key in missing_keys if key not in ours]  # a base checkpoint has no adapters

    def extra_repr(self) -> str:
        state: OwnerState = getattr(self, STATE)
        parts = [f"{b.adapter}: {b.variant} r={b.r}" for b in state.blocks.values()]
        blocks = ", ".join(parts + [f"{name}: {', '.join(tensors)}" for name, tensors in state.copies.items()])
        off = " (merged)" if state.merged else " (disabled)" if state.disabled else ""
        return ", ".join(part for part in (super().extra_repr(), f"miss=[{blocks}]{off}") if part)


class _Unpickled(AdaptedOwner):
    """Stands in for the class of an adapted module until its state is back."""


def _reconstruct(constructor: Callable[..., nn.Module], arguments: tuple[Any, ...]) -> nn.Module:
    module = constructor(*arguments)
    base = type(module)
    module.__class__ = type(base.__name__, (_Unpickled, base), {"__module__": base.__module__})
    return module


def make_class(base: type[nn.Module], scope: Scope | None, copies: tuple[tuple[str, str], ...]) -> type[AdaptedOwner]:
    """A subclass of `base` for an adapted module.

    Args:
        base: the class of the module without adapters.
        scope: its `forward` becomes that of the class where blocks act.
        copies: `(tensor, copy)`: the attribute `tensor` of the class gives the registered `copy`, as
            `torch.nn.utils.parametrize` does it, so that every code that reads it gets what the adapter trained.
    """
    members: dict[str, Any] = {"scope": scope, "__module__": base.__module__, "__qualname__": base.__qualname__}
    if scope is not None and scope.blocks:
        members |= {"forward": scope.forward, BASE_FORWARD: base.forward}
    members |= {tensor: _alias(copied) for tensor, copied in copies}
    return type(base.__name__, (AdaptedOwner, base), members)


def _alias(copied: str) -> property:
    def read(self: nn.Module) -> Any:  # a function, since Dynamo does not follow operator.attrgetter
        return getattr(self, copied)

    return property(read)


def set_class(owner: nn.Module, new_class: type[nn.Module], foreign: Any, inserted: bool) -> None:
    """Give `owner` a class, and make whatever holds its old forward hold the new one.

    Args:
        owner: the module.
        new_class: its base class, or a class made by `make_class`.
        foreign: the forward that somebody else had set on the instance, or None.
        inserted: whether `new_class` carries a generated forward (then `foreign` becomes its opaque base node).

    accelerate's hooks keep the forward they wrap as a bound method in `_old_forward`.
    """
    members = vars(owner)
    old_class = type(owner)
    slot = forward_slot(owner)
    held = members.get(slot)
    ours = isinstance(held, types.MethodType) and held.__func__ in (vars(old_class).get("forward"), old_class.forward)
    object.__setattr__(owner, "__class__", new_class)  # that of nn.Module would look for a tensor in it first
    if foreign is not None:
        members.pop(BASE_FORWARD, None)
        if inserted:
            members[BASE_FORWARD] = foreign
            members[slot] = types.MethodType(new_class.forward, owner)
        else:
            members[slot] = foreign
    elif ours:
        members[slot] = types.MethodType(new_class.forward, owner)


def forward_slot(owner: nn.Module) -> str:
    """The instance attribute that holds the innermost forward: below accelerate's hook where there is one."""
    return "_old_forward" if "_hf_hook" in vars(owner) and "_old_forward" in vars(owner) else "forward"


def find_foreign_forward(owner: nn.Module) -> Any:
    """A forward on the instance that is not the one its class defines, or None."""
    held = vars(owner).get(forward_slot(owner))
    if isinstance(held, types.MethodType) and held.__self__ is owner and held.__func__ is type(owner).forward:
        return None
    return held


def check_class(owner: nn.Module, name: str) -> None:
    """Refuse an adapted owner whose class somebody changed after adapting (FSDP2, parametrize)."""
    if type(owner) is not vars(owner)[STATE].base_class and "scope" not in vars(type(owner)):
        raise StateError(
            f"{name}: its class became {type(owner).__qualname__} after it was adapted; undo that first "
            "(or apply it to the module that contains it), then call this again."
        )
