"""An error at any call that a verb makes into torch or the file system leaves the model, or the folder, exactly as it was.

Each case is run again and again. The n-th run fails at the n-th call, until one gets through.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import functools
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import VARIANTS, fields, max_error, picture, same, shake, state
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from zoo import normal

import misscompile as mc
from misscompile.hosts import base, opening, owner_class, whole_graph  # internal: the steps between the calls fail too
from misscompile.storage import peft_format
from misscompile.verbs import checkpoint

X = normal(3, 6, dtype=torch.float64)


class OutOfLuckError(OSError):
    """What is raised where a call fails."""

    def __init__(self) -> None:
        super().__init__(errno.ENOSPC, "no luck")


class Net(nn.Module):
    """A linear that two modules share, one with a bias, and one with a buffer that may be trained in full."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.tied, self.down = nn.Linear(6, 4, bias=False), nn.Linear(6, 4), nn.Linear(4, 8)
        self.tied.weight = self.up.weight
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.down(torch.tanh(self.up(x) * self.tied(x))))
        return y


class FailingCall:
    """Fails at the n-th of the calls that are told to it; before the call is made, as a call that fails has done nothing."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def count(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise OutOfLuckError

    def guard(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.count()
            return function(*args, **kwargs)

        return guarded


class Operations(TorchDispatchMode):
    """Every operation of torch; or those alone that take memory, where what they would return has to be made first."""

    def __init__(self, failing: FailingCall, allocations: bool) -> None:
        super().__init__()
        self.failing, self.allocations = failing, allocations

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.allocations:
            self.failing.count()
            return function(*args, **(kwargs or {}))
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        if {t.untyped_storage().data_ptr() for t in tree_leaves(result) if isinstance(t, Tensor)} - given:
            self.failing.count()
        return result


STEPS = [
    (nn.Module, "register_parameter"),
    (nn.Module, "register_buffer"),
    (nn.Module, "add_module"),
    (nn.Module, "__delattr__"),
    (nn.Parameter, "requires_grad_"),
    (owner_class, "_set_class"),
    (owner_class, "run_passes"),
    (whole_graph, "run_passes"),
    (opening, "refresh_owner"),
    (fx.GraphModule, "recompile"),
]
"""Steps of ours on a model, between which a call of torch, or the interpreter, may fail."""
FILES = [
    *((os, name) for name in ("mkdir", "rename", "replace", "link", "unlink", "chmod", "stat", "open", "fsync", "scandir")),
    *(
        (Path, name)
        for name in ("open", "mkdir", "exists", "is_file", "is_dir", "read_bytes", "read_text", "unlink", "stat")
    ),
    *((tempfile, name) for name in ("mkdtemp",)),
    *((shutil, name) for name in ("copytree", "copy2")),
    *((peft_format, name) for name in ("save", "safe_open")),
]


@contextlib.contextmanager
def failing_at(n: int, *, allocations: bool = False, files: bool = False) -> Iterator[FailingCall]:
    failing = FailingCall(n)
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in FILES if files else STEPS:
            patch.setattr(owner, name, failing.guard(getattr(owner, name)), raising=False)
        # safetensors cannot read with a mode on
        patch.setattr(checkpoint, "read_tensors", _disable_current_modes()(checkpoint.read_tensors))
        with Operations(failing, allocations) if not files else contextlib.nullcontext():
            yield failing


ROUTES: dict[str, Callable[[], Any]] = {
    "module": lambda: copy.deepcopy(plain()),
    "captured": lambda: mc.capture(plain(), (X,)),
    "a block for each call": lambda: mc.capture(plain(), (X,)),
    "traced": lambda: fx.symbolic_trace(plain()),
}


@functools.cache
def plain() -> nn.Module:
    torch.manual_seed(0)
    return Net().double().eval().requires_grad_(False)


def config(variant: Any) -> dict[str, Any]:
    return fields(variant, r=2, bias="all", modules_to_save=["norm"])


def adapted(route: str, variant: Any) -> Any:
    """A model with two adapters of non-zero values on it, of which one acts."""
    model = mc.adapt(ROUTES[route](), fields(True, r=3, target_modules=["down"]), "idle")
    return shake(mc.adapt(model, config(variant), "acts", per_call_site=route == "a block for each call"))


def merged(route: str, variant: Any) -> Any:
    return mc.merge(adapted(route, variant), keep_adapters=True)


VERBS: dict[str, tuple[Callable[[str, Any], Any], Callable[[Any, Path], Any], bool]] = {
    "adapt": (adapted, lambda model, folder: mc.adapt(model, config(True) | {"target_modules": ["down"]}, "new"), True),
    "load_adapter": (adapted, lambda model, folder: mc.load_adapter(model, folder, "new"), True),
    "save_adapter": (adapted, lambda model, folder: mc.save_adapter(model, folder, "acts"), False),
    "merge": (adapted, lambda model, folder: mc.merge(model), True),
    "merge one": (adapted, lambda model, folder: mc.merge(model, "acts"), False),
    "merge and keep": (adapted, lambda model, folder: mc.merge(model, keep_adapters=True), True),
    "unmerge": (merged, lambda model, folder: mc.unmerge(model), True),
    "unload": (adapted, lambda model, folder: mc.unload(model), False),
    "unload what is merged": (merged, lambda model, folder: mc.unload(model), False),
    "set_adapter": (adapted, lambda model, folder: mc.set_adapter(model, ["idle", "acts"]), False),
    "delete_adapter": (adapted, lambda model, folder: mc.delete_adapter(model, "acts"), False),
    "disable_adapter": (merged, lambda model, folder: disabled.enter_context(mc.disable_adapter(model)), False),
}
"""Name to what the model is before, the call, and whether it does something else for each variant."""
disabled = contextlib.ExitStack()
"""The contexts of `disable_adapter`, which would be left when they are collected."""
IN_PLACE = ("merge", "merge one")
CASES = [
    (verb, route, variant)
    for verb, (*_, by_variant) in VERBS.items()
    for route in ROUTES
    for variant in (VARIANTS if by_variant and route != "traced" else ["bat"])
    if (by_variant or route != "traced")
    if (verb, route) not in ((in_place, "module") for in_place in IN_PLACE)
]


def until_it_succeeds(call: Callable[[], Any], patch: pytest.MonkeyPatch, **kinds: bool) -> Iterator[bool]:
    """Make a call of ours fail at its first call, its second one, and so on; yields after each whether it failed."""
    for n in itertools.count(1):
        patch.setattr(owner_class, "_scopes", {})  # so that everything is made each time
        patch.setattr(owner_class, "_classes", {})
        with failing_at(n, **kinds) as failing, contextlib.suppress(OutOfLuckError, mc.CheckpointError):
            call()
        yield failing.calls >= n
        if failing.calls < n:
            assert n > 5
            return


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("verb", "route", "variant"), CASES)
def test_a_verb_that_fails_leaves_the_model(
    verb: str, route: str, variant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, call, _ = VERBS[verb]
    mc.save_adapter(adapted(route, variant), tmp_path, "acts")
    model, reference = make(route, variant), make(route, variant)
    before = picture(model, X)
    for failed in until_it_succeeds(lambda: call(model, tmp_path), monkeypatch):
        assert not failed or picture(model, X) == before
    call(reference, tmp_path)
    assert same(state(model), state(reference))
    assert torch.equal(model(X), reference(X))
    disabled.close()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("verb", IN_PLACE)
def test_a_merge_in_place_that_fails_leaves_the_model(verb: str, variant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes memory, and each step of ours. The writes themselves take none, and come last."""
    call = VERBS[verb][1]
    model, reference = adapted("module", variant), adapted("module", variant)
    before = picture(model, X)
    for failed in until_it_succeeds(lambda: call(model, Path()), monkeypatch, allocations=True):
        assert not failed or picture(model, X) == before
    assert look(model) == look(call(reference, Path()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", VARIANTS)
def test_where_a_write_in_place_fails_all_the_same_each_module_is_adapted_or_merged(
    variant: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that is lost, say. The model computes the same, and merging again finishes it."""
    start = adapted("module", variant)
    output, before, after = start(X), look(start), look(mc.merge(adapted("module", variant)))
    for at in (1, 2):
        model, failing = copy.deepcopy(start), FailingCall(at)
        with monkeypatch.context() as patch:
            patch.setattr(base, "fold_in_place", failing.guard(base.fold_in_place))
            with pytest.raises(OutOfLuckError):
                mc.merge(model)
        found = look(model)
        assert all(found[name] in (before[name], after[name]) for name in before)
        assert (found == before) == (at == 1)
        assert max_error(model(X), output) < 1e-12
        mc.merge(model)
        assert look(model) == after


def look(model: nn.Module) -> dict[str, Any]:
    """What is on each module: what it says of its adapters, and its tensors bit by bit."""
    return {
        name: (module.extra_repr(), {n: t.detach().numpy().tobytes() for n, t in module.named_parameters(recurse=False)})
        for name, module in model.named_modules()
    }


# Files


def content(folder: Path) -> dict[str, bytes] | None:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else None


@pytest.mark.parametrize("exchange", [True, False], ids=["renameat2", "one by one"])
@pytest.mark.parametrize("there", ["no folder", "an adapter", "the same config"])
@pytest.mark.parametrize("route", ["module", "captured"])
def test_a_save_that_fails_leaves_the_folder(
    route: str, there: str, exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = tmp_path / "adapter", adapted(route, "bat")
    if there != "no folder":
        mc.save_adapter(model, folder, "acts" if there == "the same config" else "idle")
        (folder / "README.md").write_text("mine")
        shake(model, seed=2)
    if not exchange:
        monkeypatch.setattr(sys, "platform", "elsewhere")
    mc.save_adapter(model, tmp_path / "reference", "acts")
    wanted = content(tmp_path / "reference") | ({} if there == "no folder" else {"README.md": b"mine"})
    before, looks = content(folder), picture(model, X)
    kept = tmp_path / "kept"
    shutil.copytree(folder, kept) if before is not None else None
    for _ in until_it_succeeds(lambda: mc.save_adapter(model, folder, "acts"), monkeypatch, files=True):
        found = content(folder)
        assert found in (before, wanted)
        assert picture(model, X) == looks
        if found == wanted:  # where it can do without what failed
            shutil.rmtree(folder)
            shutil.copytree(kept, folder) if before is not None else None
    mc.save_adapter(model, folder, "acts")
    assert content(folder) == wanted


@pytest.mark.parametrize("route", ["module", "captured"])
def test_a_load_that_cannot_read_leaves_the_model(route: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(route, "bat")
    mc.save_adapter(model, tmp_path, "acts")
    before, files = picture(model, X), content(tmp_path)
    loaded: list[Any] = []
    for failed in until_it_succeeds(lambda: loaded.append(mc.load_adapter(model, tmp_path, "new")), monkeypatch, files=True):
        assert content(tmp_path) == files
        assert not failed or picture(model, X) == before
    assert torch.equal(loaded[0](X), adapted(route, "bat")(X))
