"""The class of an adapted owner: generated from its rewritten graph, and derived from its record.

    type(q_proj) is nn.Linear   ->   type(q_proj) is a cached subclass of nn.Linear whose forward is the generated code

FSDP2 and `torch.nn.utils.parametrize` do the same. Owners of equal structure share a scope and a class, hence also one
compiled graph. Whenever a record changes (switch, disable, merge, copy, unpickle), the class is derived from it again.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import itertools
import linecache
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx, nn
from torch.nn.utils import parametrize

from misscompile.errors import StateError
from misscompile.hosts.handed_out import BASE_WEIGHT, assign_to_copies, copy_attribute, weight_attributes
from misscompile.passes.find_sites import find_sites, linear_shape
from misscompile.passes.runner import ADAPT, run_passes
from misscompile.passes.trace import BASE_FORWARD, opaque_scope, trace_owner
from misscompile.record.state import STATE, OwnerState, apply_with_kept, base_class_of, describe, forgive_base
from misscompile.record.transaction import Undo, swap_kept
from misscompile.record.words import Block, Scope

Copies = tuple[tuple[str, str], ...]
"""`(tensor, its registered copy)` for everything that the active adapters train in full on one module."""


@dataclasses.dataclass(frozen=True, eq=False)
class Specialised:
    """Where the forward of a generated class comes from."""

    base: Scope
    blocks: tuple[Block, ...]
    graph: fx.Graph


REWRITE = "_miss_rewrite"
"""Name of the class attribute that holds the `Specialised`, or None where the forward is that of the base class."""

_scopes: weakref.WeakKeyDictionary[type[nn.Module], dict[Any, Scope]] = weakref.WeakKeyDictionary()
"""By base class and structure."""
_classes: weakref.WeakValueDictionary[Any, type[nn.Module]] = weakref.WeakValueDictionary()
"""By base class, scope and what acts. The record of an owner keeps those of its adapters: they leave with the adapter."""
_latest: collections.deque[type[nn.Module]] = collections.deque(maxlen=64)
"""The last ones made, so that a model like the one before is neither rewritten nor compiled again."""
_serial = itertools.count()
_namespace: dict[str, Any] = {}


def _subclass(base: type[nn.Module], members: Mapping[str, Any]) -> type[nn.Module]:
    """A subclass of `base` with what an adapted module can do beside, and with these members.

    It has no second base: where the first base of a class is ABC or Generic, Python lays instances out in another way than
    those of `nn.Module`, and none can become one of a class that has both for bases.
    """

    class Adapted(base):  # type: ignore[misc, valid-type]
        def __reduce_ex__(self, protocol: Any) -> Any:
            constructor, arguments, state, *rest = tuple(super().__reduce_ex__(protocol))
            if arguments and arguments[0] is type(self):
                arguments = (getattr(self, STATE).base_class, *arguments[1:])
            return (_reconstruct, (constructor, arguments), state, *rest)

        def __setstate__(self, state: dict[str, Any]) -> None:
            super().__setstate__(state)
            record: OwnerState = getattr(self, STATE)
            self.__class__ = record.base_class  # type: ignore[assignment]
            if record.disabled:  # copied inside disable_adapter: the context will not come back for the copy
                record.disabled = 0
                swap_kept(self, Undo((), ()))
            refresh_owner(self)

        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            return apply_with_kept(self, fn, functools.partial(super()._apply, fn, recurse))

        def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
            acting = type(self)
            self.__class__ = getattr(self, STATE).base_class
            try:
                self._load_from_state_dict(state_dict, prefix, *args)
            finally:
                self.__class__ = acting
            forgive_base(self, prefix, state_dict, missing_keys=args[2])

        def extra_repr(self) -> str:
            return ", ".join(part for part in (super().extra_repr(), describe(getattr(self, STATE))) if part)

    for name, value in members.items():
        setattr(Adapted, name, value)
    for name in ("__name__", "__qualname__", "__module__"):
        setattr(Adapted, name, getattr(base, name))
    return Adapted


def _reconstruct(constructor: Callable[..., nn.Module], arguments: tuple[Any, ...]) -> nn.Module:
    """A module in a class that waits for its state, from which its own class is derived."""
    module = constructor(*arguments)
    module.__class__ = _subclass(type(module), {})
    return module


def owner_scope(owner: nn.Module) -> Scope:
    """The scope of a linear, adapted or not, as its base class defines it, with its sites; equal structures share it."""
    state: OwnerState | None = vars(owner).get(STATE)
    shape = state.shape if state and state.shape else linear_shape(owner)
    assert shape is not None
    base_class = base_class_of(owner)
    foreign = state.foreign_forward if state else find_foreign_forward(owner)
    key = None if foreign is not None else (shape, *_structure(owner))
    known = _scopes.setdefault(base_class, {})
    scope = known.get(key)
    if scope is None:
        scope = trace_owner(owner, base_class, shape, foreign)
        if not find_sites(scope):
            reason = "its forward does not call its own weight as a linear"
            scope = opaque_scope(owner, base_class, shape, foreign, reason)
            find_sites(scope)
        if key is not None:
            known[key] = scope
    return scope


def present_scope(owner: nn.Module) -> Scope:
    """`owner_scope`, or where that is opaque the forward as the owner's plain attributes let it be now, if it is the linear.

    An update of the output of that forward is then one of the weight.
    """
    scope = owner_scope(owner)
    if scope.opaque is None or scope.shape is None:
        return scope
    now = trace_owner(owner, base_class_of(owner), scope.shape, vars(owner)[STATE].foreign_forward, present=True)
    find_sites(now)
    (output,), inputs = now.graph.find_nodes(op="output"), now.graph.find_nodes(op="placeholder")
    plain = now.opaque is None and [(site.node, site.x) for site in now.sites] == [(output.args[0], inputs[0])]
    return now if plain else scope


def refresh_owner(owner: nn.Module, name: str = "the module", base: Scope | None = None) -> None:
    """Derive the class of an owner from its record again, after either changed; `base` is its scope where that is known."""
    state: OwnerState = vars(owner)[STATE]
    check_class(owner, name)
    if isinstance(owner, fx.GraphModule):  # the root of a whole graph reads its copies by name, in a class of its own
        return
    blocks = () if state.in_graph else state.effective_blocks()
    copies = state.effective_copies()
    scope = (base or owner_scope(owner)) if blocks else None
    key = (state.base_class, scope, blocks, copies)
    new_class = _classes.get(key)
    if new_class is None:
        new_class = _make_class(state.base_class, scope, blocks, copies)
        if state.foreign_forward is None:  # a forward that somebody set on an instance is not shared
            _classes[key] = new_class
            if not parametrize.is_parametrized(owner):  # whose class holds its weight
                _latest.append(new_class)
    state.classes[state.acting()] = new_class
    _set_class(owner, new_class, state.foreign_forward, inserted=bool(blocks))


def restore_owner(owner: nn.Module, name: str = "the module") -> None:
    """Remove every trace of adapters from an owner: parameters, record, class, forward."""
    state: OwnerState = vars(owner)[STATE]
    check_class(owner, name)
    for registered in state.all_registered():
        delattr(owner, registered)
    _set_class(owner, state.base_class, state.foreign_forward, inserted=False)
    del vars(owner)[STATE]


def remove_from_owner(owner: nn.Module, adapter_names: Sequence[str], name: str = "the module") -> None:
    """Take what some adapters registered off an owner; with nothing left it is plain again."""
    state: OwnerState = vars(owner)[STATE]
    if not set(state.adapters) - set(adapter_names):
        restore_owner(owner, name)
        return
    state.active = tuple(n for n in state.active if n not in adapter_names)
    state.classes = {acting: kind for acting, kind in state.classes.items() if not set(acting) & set(adapter_names)}
    refresh_owner(owner, name)
    for adapter in adapter_names:
        for registered in state.registered(adapter):
            delattr(owner, registered)
        for record in (state.adapters, state.blocks, state.copies):
            record.pop(adapter, None)


def finish_owner(owner: nn.Module, names: Sequence[str], name: str, keep: bool) -> None:
    """Let the adapters `names` of an owner act no more, since its weights hold the merged values now."""
    state: OwnerState = vars(owner)[STATE]
    if keep:
        state.merged = tuple(n for n in names if n in state.adapters)
        refresh_owner(owner, name)
    else:
        remove_from_owner(owner, names, name)


def check_classes(adapted: Mapping[str, nn.Module]) -> None:
    """Refuse, before anything is changed, a model of which an owner was given another class after adapting."""
    for name, owner in adapted.items():
        check_class(owner, name)


def check_class(owner: nn.Module, name: str) -> None:
    """Refuse an adapted owner whose class somebody changed after adapting (FSDP2, parametrize)."""
    if type(owner) is not vars(owner)[STATE].base_class and REWRITE not in vars(type(owner)):
        raise StateError(
            f"{name}: its class became {type(owner).__qualname__} after it was adapted; undo that first "
            "(or apply it to the module that contains it), then call this again."
        )


def find_foreign_forward(owner: nn.Module) -> Any:
    """A forward on the instance that is not the one its class defines, or None."""
    held = vars(owner).get(_forward_slot(owner))
    if isinstance(held, types.MethodType) and held.__self__ is owner and held.__func__ is type(owner).forward:
        return None
    return held


def _readable_code(graph: fx.Graph) -> str:
    """Generated source without the lines that only tell torch.fx which functions are leaves."""
    source = graph.python_code(root_module="self").src
    return "\n".join(line for line in source.splitlines() if not line.startswith("torch.fx._symbolic_trace.wrap")).strip()


def before_and_after(title: str, before: fx.Graph, after: fx.Graph) -> str:
    """A section of a dump: the code of two graphs."""
    return f"{title}\n# before\n{_readable_code(before)}\n\n# after\n{_readable_code(after)}"


def _make_class(base: type[nn.Module], scope: Scope | None, blocks: tuple[Block, ...], copies: Copies) -> type[nn.Module]:
    """A subclass of `base` with the forward of `scope` in which `blocks` act.

    The attribute `tensor` of the class gives the registered `copy`, as `torch.nn.utils.parametrize` does it, so that every
    code that reads it gets what the adapter trained. What is assigned to it becomes the copy.
    """
    members: dict[str, Any] = {REWRITE: None}
    if scope is not None:
        graph = copy.deepcopy(scope.graph)
        rewritten = Scope(scope.root, graph, scope.label, scope.shape, scope.opaque)
        find_sites(rewritten)
        for site in rewritten.sites:
            site.blocks = blocks
        run_passes(ADAPT, rewritten)
        path = scope.sites[0].path
        for node in graph.find_nodes(op="get_attr", target="weight") if path is not None else ():
            node.target = BASE_WEIGHT
        rewrite = Specialised(scope, blocks, graph)
        members |= {"forward": _compile_forward(graph, base.__name__), BASE_FORWARD: base.forward, REWRITE: rewrite}
        members |= weight_attributes(base, path, blocks) if path is not None else {}
    members |= {tensor: copy_attribute(tensor, copied) for tensor, copied in copies}
    if copies:
        members["__setattr__"] = assign_to_copies(dict(copies), base)
    made = _subclass(base, members)
    if scope is not None:
        weakref.finalize(made, linecache.cache.pop, members["forward"].__code__.co_filename, None)
    return made


def _compile_forward(graph: fx.Graph, name: str) -> Any:
    """`forward(self, …)` of a graph, visible to tracebacks and debuggers.

    All forwards have one dict of globals, since Dynamo guards what each of them reads. Two graphs may call different
    functions by one name; then the later one has globals of its own.
    """
    python = graph.python_code(root_module="self")
    filename = f"<misscompile {name} {next(_serial)}>"
    linecache.cache[filename] = (len(python.src), None, python.src.splitlines(keepends=True), filename)
    clashes = any(_namespace.get(key, value) is not value for key, value in python.globals.items())
    namespace = {} if clashes else _namespace
    namespace.update(python.globals)
    exec(compile(python.src, filename, "exec"), namespace)  # noqa: S102 - torch.fx wrote this source
    return namespace.pop("forward")


def _set_class(owner: nn.Module, new_class: type[nn.Module], foreign: Any, inserted: bool) -> None:
    """Give `owner` a class, and make whatever holds its old forward hold the new one.

    `foreign` is a forward that somebody else had set on the instance. Where updates are `inserted`, it becomes the opaque
    base node of the generated forward.
    """
    members, old_class, slot = vars(owner), type(owner), _forward_slot(owner)
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


def _forward_slot(owner: nn.Module) -> str:
    """The instance attribute that holds the innermost forward; accelerate's hook keeps the one that it wraps."""
    return "_old_forward" if "_hf_hook" in vars(owner) and "_old_forward" in vars(owner) else "forward"


def _structure(owner: nn.Module) -> list[Any]:
    """What a trace of the owner's base forward can depend on; it may read no plain attribute but the shape."""
    state: OwnerState | None = vars(owner).get(STATE)
    ours = state.all_registered() if state else ()
    held: list[Any] = []
    for tensors in (owner._parameters, owner._buffers):
        for name, tensor in tensors.items():
            if name not in ours:
                held.append(name if tensor is None else (name, tensor.shape, type(tensor)))
    held.extend((name, type(child)) for name, child in owner._modules.items())
    return held
