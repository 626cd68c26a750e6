"""Nothing grows: classes, sources, tensors, objects and compiled graphs after many cycles of each verb, under fresh names.

A cycle ends with the model that it began with, or lets one go. `COUNTS` are taken after some cycles and after many more.
`make leaks` runs 1,000 cycles of everything, and counts Python's memory too; `make test` runs fewer of what takes long.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import linecache
import os
import pickle
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from support import fields
from torch import nn
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch.fx import graph_module
from zoo import TwoLinears, normal, seeded, two_linears

import misscompile as mc
from misscompile.hosts import owner_class  # internal: its caches

pytestmark = pytest.mark.filterwarnings("ignore::misscompile.MissWarning", "ignore::DeprecationWarning")
X = normal(3, 12)
Make = Callable[[], Any]
CYCLES = int(os.environ.get("MISSCOMPILE_LEAK_CYCLES", 0))
"""Of everything; by default each test has a number of its own."""


def kept(kind: type | tuple[type, ...]) -> int:
    return sum(issubclass(type(found), kind) for found in gc.get_objects())  # isinstance would ask a proxy


COUNTS: dict[str, Callable[[], int]] = {
    "classes": lambda: kept(type),
    "tensors": lambda: kept(torch.Tensor),
    "objects": lambda: len(gc.get_objects()),
    "classes in the cache": lambda: len(owner_class._classes),
    "scopes in the cache": lambda: sum(map(len, owner_class._scopes.values())),
    "functions that forwards call": lambda: len(owner_class._namespace),
    "lines of sources": lambda: len(linecache.cache),
    "sources of torch.fx": lambda: len(graph_module._loader.eval_cache),
}


@pytest.fixture(autouse=True, scope="module")
def _only_what_these_tests_make() -> Iterator[None]:
    """A collection that walks all of torch takes a second."""
    owner_class._latest.clear()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def counts() -> dict[str, int]:
    owner_class._latest.clear()  # it has a bound
    for _ in range(3):  # what waits for a finalizer takes another round
        gc.collect()
    return {name: count() for name, count in COUNTS.items()}


def growth(cycle: Callable[[str], Any], cycles: int) -> dict[str, int]:
    """What is more after so many cycles, each with a name of its own; of objects and kilobytes what each cycle adds.

    A class takes more than a kilobyte. Less is the names of sources, which tracemalloc keeps itself.
    """
    cycles = CYCLES or cycles
    for number in range(5):
        cycle(f"before_{number}")
    if CYCLES:
        tracemalloc.start()
    before = counts() | {"kilobytes": tracemalloc.get_traced_memory()[0] / 1024}
    for number in range(cycles):
        cycle(f"n{number}")
    after = counts() | {"kilobytes": tracemalloc.get_traced_memory()[0] / 1024}
    tracemalloc.stop()
    more = {name: count - before[name] for name, count in after.items()}
    more |= {"objects": round(more["objects"] / cycles), "kilobytes": int(more["kilobytes"] / cycles)}
    return {name: count for name, count in more.items() if count}


linear = seeded(lambda: nn.Sequential(nn.Linear(12, 8)))


# The verbs


def adapted(make: Make, name: str, **changes: Any) -> Any:
    return mc.adapt(make(), fields(**changes), name)


def adapt(make: Make, name: str, folder: Path) -> None:
    mc.unload(adapted(make, name))


def delete_adapter(make: Make, name: str, folder: Path) -> None:
    mc.delete_adapter(adapted(make, name), name)


def set_adapter(make: Make, name: str, folder: Path) -> None:
    model = mc.adapt(adapted(make, name), fields("mini"), f"{name}_b")
    for chosen in (name, [name, f"{name}_b"], []):
        mc.set_adapter(model, chosen)
    mc.unload(model)


def disable_adapter(make: Make, name: str, folder: Path) -> None:
    model = adapted(make, name)
    with mc.disable_adapter(model):
        pass
    mc.unload(model)


def merge(make: Make, name: str, folder: Path) -> None:
    mc.merge(adapted(make, name))


def unmerge(make: Make, name: str, folder: Path) -> None:
    model = mc.merge(adapted(make, name), keep_adapters=True)
    mc.unload(mc.unmerge(model))


def train(make: Make, name: str, folder: Path) -> None:
    model = adapted(make, name, miss_dropout=0.1, bias="all")
    model(X).sum().backward()
    mc.unload(model)


def copies(make: Make, name: str, folder: Path) -> None:
    model = adapted(make, name, bias="all")
    copy.deepcopy(model)
    mc.unload(model)


def refused(make: Make, name: str, folder: Path) -> None:
    with contextlib.suppress(mc.MissError):
        mc.adapt(make(), fields(r=100), name)


def save_and_load(make: Make, name: str, folder: Path) -> None:
    model = adapted(make, name)
    mc.save_adapter(model, folder, name)
    mc.unload(model)
    model = mc.load_adapter(make(), folder, name)
    mc.hotswap_adapter(model, folder, name)
    mc.save_as_lora(model, folder / "lora", name)
    mc.unload(model)


def dump(make: Make, name: str, folder: Path) -> None:
    model = adapted(make, name)
    mc.dump(model)
    mc.dump(model, "code")
    mc.unload(model)


CHEAP = (adapt, delete_adapter, set_adapter, disable_adapter, merge, unmerge)
DEAR = (train, copies, refused, save_and_load, dump)


@pytest.mark.parametrize("verb", [*CHEAP, *DEAR], ids=lambda verb: verb.__name__)
@pytest.mark.parametrize("which", ["one model", "fresh models"])
def test_nothing_grows_on_modules(tmp_path: Path, which: str, verb: Callable[[Make, str, Path], None]) -> None:
    one, fresh = linear(), which == "fresh models"
    cycles = 1000 if fresh and verb in CHEAP else 100
    assert growth(lambda name: verb(linear if fresh else lambda: one, name, tmp_path), cycles) == {}


@pytest.mark.parametrize("verb", [*CHEAP, *DEAR], ids=lambda verb: verb.__name__)
def test_nothing_grows_on_a_graph(tmp_path: Path, verb: Callable[[Make, str, Path], None]) -> None:
    graph = mc.capture(linear(), (X,))
    assert growth(lambda name: verb(lambda: graph, name, tmp_path), 40) == {}


def test_no_class_and_no_weight_of_a_captured_or_exported_graph_stays() -> None:
    """`torch.export` itself keeps sources, and fake tensors of dynamic sizes: they are in torch's own caches."""
    weights = []

    def cycle(name: str) -> None:
        captured = mc.adapt(mc.capture(TwoLinears(), (X,)), fields(), name)
        program = torch.export.export(mc.adapt(torch.export.export(TwoLinears(), (X,)), fields(), name), (X,))
        weights.extend(weakref.ref(w) for graph in (captured, mc.merge(program)) for w in graph.parameters())

    more = growth(cycle, 8)
    assert not set(more) - {"tensors", "objects", "kilobytes", "lines of sources", "sources of torch.fx"}, more
    assert len(weights) > 50
    assert all(weight() is None for weight in weights)


class Made(nn.Module):
    """Makes a linear of a class of its own in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        kind = type("Own", (nn.Linear,), {"forward": lambda self, x: super(kind, self).forward(x) * 2})
        self.linear = kind(12, 8) if way == "class" else nn.Linear(12, 8)
        if way == "parametrized":
            parametrize.register_parametrization(self.linear, "weight", nn.Identity())
        if way == "forward":
            self.linear.forward = lambda x: nn.functional.linear(x, self.linear.weight)  # type: ignore[method-assign]
        if way == "weight norm":
            nn.utils.parametrizations.weight_norm(self.linear)


@pytest.mark.parametrize("way", ["plain", "class", "parametrized", "weight norm", "forward"])
def test_a_linear_of_its_own_class_is_freed_with_its_model(way: str) -> None:
    def cycle(name: str) -> None:
        model = mc.adapt(Made(way), fields(), name)
        with mc.disable_adapter(model):
            model.linear(X)
        mc.unload(copy.deepcopy(model) if way == "plain" else model)

    assert growth(cycle, 30) == {}
    gone = weakref.ref(mc.adapt(Made(way), fields()).linear.weight if way == "plain" else mc.adapt(Made(way), fields()))
    counts()
    assert gone() is None


# The classes of an owner


def test_a_class_leaves_with_its_adapter_and_stays_as_long_as_that() -> None:
    model: Any = mc.adapt(TwoLinears(), fields(), "first")
    first = weakref.ref(type(model.up))
    for number in range(70):  # more than are kept beside those in use
        mc.adapt(model, fields(), f"n{number}")
        mc.delete_adapter(model, f"n{number}")
    counts()
    mc.set_adapter(model, "first")
    assert type(model.up) is first()
    mc.adapt(model, fields("mini"), "second")
    mc.delete_adapter(model, "first")
    counts()
    assert first() is None
    source = type(model.up).forward.__code__.co_filename
    assert source in linecache.cache
    mc.unload(model)
    counts()
    assert source not in linecache.cache


def test_a_copy_takes_no_class_along() -> None:
    model: Any = adapted(two_linears, "first")
    loaded = pickle.loads(pickle.dumps(model))
    assert type(loaded.up) is type(model.up)
    mc.adapt(loaded, fields(), "second")
    mc.unload(loaded)
    assert torch.equal(model(X), two_linears()(X))


# Compiled graphs


def entries() -> int:
    """The compiled graphs that hang on the forward of `TwoLinears`."""
    return len(_debug_get_cache_entry_list(TwoLinears.forward.__code__))  # type: ignore[no-untyped-call]


def test_a_model_like_the_one_before_is_not_compiled_again() -> None:
    for _ in range(CYCLES or 8):
        model = adapted(two_linears, "first")
        torch.compile(model, backend="eager", fullgraph=True)(X)
        mc.unload(model)
        del model
        gc.collect()
    assert entries() == 1


@pytest.mark.parametrize("verb", [disable_adapter, set_adapter, unmerge], ids=lambda verb: verb.__name__)
def test_going_back_to_what_acted_before_compiles_nothing(verb: Callable[..., None]) -> None:
    model = mc.adapt(adapted(two_linears, "first"), fields("mini"), "second")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(CYCLES or 10):
        mc.set_adapter(model, "first")
        compiled(X)
        if verb is disable_adapter:
            with mc.disable_adapter(model):
                compiled(X)
        elif verb is set_adapter:
            mc.set_adapter(model, ["second", "first"])
            compiled(X)
        else:
            mc.merge(model, keep_adapters=True)
            compiled(X)
            mc.unmerge(model)
    assert entries() == 2
