"""One network on one route, the steps that are taken on it, and what is looked at after each."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from models import INNER, WIDTH, Spec
from oracle import Adapter, Plain, canonical, effect, held_tensors
from safetensors.torch import load_file
from support import max_error, reference_delta, snapshot
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import misscompile as mc
from misscompile.record.state import STATE, copy_name

EXACT = 1e-10
ROUTES: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "module": lambda model, x: model,
    "captured": lambda model, x: mc.capture(model, (x,)),
    "traced": lambda model, x: fx.symbolic_trace(model),
    "exported": lambda model, x: torch.export.export(model, (x,)),
    "decomposed": lambda model, x: torch.export.export(model, (x,)).run_decompositions(),
}
PROGRAMS = ("exported", "decomposed")
"""Routes on which a module of two names has become two."""


class NotMadeError(Exception):
    """The network cannot take this route, for reasons of torch's."""


class Injected(BaseException):
    """Not an `Exception`: a tracer that meets one takes the forward for one that it cannot follow."""


class FailAt(TorchDispatchMode):
    """Raises `Injected` in the place of the k-th operation."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            raise Injected
        return func(*args, **(kwargs or {}))


class World:
    """An adapted network and its oracle. A method of a verb's name takes a step; its keywords are what hypothesis draws."""

    def __init__(self, spec: Spec, route: str, rows: int = 3, training: bool = False) -> None:
        self.spec, self.route = spec, route
        self.x = torch.randn(rows, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        self.values = torch.Generator().manual_seed(2)
        self.plain = Plain(dataclasses.replace(spec, exported=route in PROGRAMS))
        self.ended = self.written_over = self.given_changed = False
        self.fail_at = 0
        self.given: Any = self._make(route, training)
        self.model: Any = self.given.module() if isinstance(self.given, torch.export.ExportedProgram) else self.given
        for parameter in self.model.parameters():  # torch chooses other kernels for weights that train
            parameter.requires_grad_(False)
        self.frozen = training and route != "captured"
        self.start = None
        if not self.frozen:
            try:
                self.start = self.run()
            except AttributeError as error:  # torch's own code for names that Python normalises
                raise NotMadeError from error
            self.close(self.start, self.plain.output(self.x), "the output before anything was done")
        self.to_adapt: Any = self.given  # an exported program until it is adapted

    def _make(self, route: str, training: bool = False) -> Any:
        model = self.spec.build()
        with torch.no_grad():
            for name, tensor in held_tensors(model).items():
                tensor.copy_(self.plain.base[canonical(self.plain.spec, name)])
        try:
            made = ROUTES[route](model.train(training), self.x)
        except Exception as error:
            raise NotMadeError from error
        if training and route == "captured":
            try:
                made.eval()
            except mc.StateError as error:
                raise NotMadeError from error
        return made

    # --- steps -----------------------------------------------------------------------------------------------------------

    def step(self, verb: str, fail_at: int = 0, **drawn: Any) -> None:
        """Take a step. A refusal, or a failure in the middle, has to leave everything as it was."""
        if self.ended or (verb != "adapt" and self.to_adapt is not self.model):
            return
        before, expected = snapshot(self.model), self.plain.now()
        self.fail_at = fail_at
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                getattr(self, verb)(**drawn)
        except (mc.MissError, Injected) as error:
            if self.frozen:
                self.ended = True
            else:
                self._undone(verb, before, expected, error)
            return
        if any("on every path" in str(warning.message) for warning in told):
            self.ended = True  # the user was told that the numbers may be others
            return
        self.check()

    def finish(self) -> None:
        """A graph that was adapted is as it was: every adapter went onto a copy of it."""
        if self.route != "module" and self.start is not None and not self.given_changed:
            plain = self.given.module() if isinstance(self.given, torch.export.ExportedProgram) else self.given
            with torch.no_grad():
                self.close(plain(self.x), self.start, "the output of the graph that was given")

    def _call(self, verb: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A verb of misscompile, in which the failure that was drawn happens."""
        with FailAt(self.fail_at) if self.fail_at else contextlib.nullcontext():
            return verb(*args, **kwargs)

    def _undone(self, verb: str, before: Any, expected: dict[str, Tensor], error: BaseException) -> None:
        told = f"after {verb} raised {type(error).__name__}: {error}"
        same = [key for key, value in snapshot(self.model).items() if value != before[key]]
        if isinstance(error, Injected) and verb == "merge" and same:  # each module is merged and plain, or still adapted
            self.ended = True
        else:
            assert not same, f"{same} changed {told}"
        self.close(self.run(), self.plain.output(self.x, expected), f"the output {told}")

    def adapt(self, name: str, variant: Any, r: int, targets: Any, bias: str = "none", saved: int | None = None) -> None:
        rules: dict[str, Any] = {"r": r, "mini_r": 4, "init_weights": variant, "target_modules": self._names(targets)}
        if saved is not None and self.spec.pieces:
            rules["modules_to_save"] = [self._names([saved])[0]]
        before, places = None if self.frozen else self.run(), {k: t.data_ptr() for k, t in self._held().items()}
        self.model = self.to_adapt = self._call(mc.adapt, self.to_adapt, rules | {"bias": bias}, name)
        held = {key: tensor.data_ptr() for key, tensor in self._held().items() if isinstance(tensor, nn.Parameter)}
        moved = [key for key in held.keys() & places.keys() & self.plain.base.keys() if held[key] != places[key]]
        assert not moved, f"{moved} are not the base's own values any more"
        if self.frozen:  # a program of training mode: evaluation mode is refused, or computed
            self.model.eval()
            self.frozen = False
        elif before is not None and variant is not False and not self.plain.active:
            assert torch.equal(self.run(), before), "zero blocks change the output"
        self._fill(name, variant, bias)

    def _names(self, targets: Any) -> Any:
        linears = self.spec.linears()
        if isinstance(targets, str) or not linears:
            return "all-linear"
        return [linears[index % len(linears)] for index in targets]

    def _fill(self, name: str, variant: Any, bias: str = "none", known: Adapter | None = None) -> None:
        """Give what an adapter registered random values, or hold it against those that are `known`; and note it."""
        adapter, shared = Adapter(variant, {}, [], {}), {}
        for path, module in self.model.named_modules():
            block = module._parameters.get(f"miss_block_{name}")
            if block is not None:
                if id(block) not in shared:
                    block.data.copy_(torch.randn(block.shape, generator=self.values, dtype=torch.float64) * 0.2)
                    shared[id(block)] = block.detach().clone()
                adapter.blocks[path] = shared[id(block)]
                adapter.effects.append((*effect(self.plain.spec, path), path))
            record = vars(module).get(STATE)
            for held in record.copies.get(name, ()) if record else ():
                copied = getattr(module, copy_name(name, held))
                if copied.is_floating_point():
                    copied.data.copy_(torch.rand(copied.shape, generator=self.values, dtype=torch.float64) + 0.5)
                adapter.copies[canonical(self.plain.spec, f"{path}.{held}".lstrip("."))] = copied.detach().clone()
        if bias == "all":
            left = [key for key in self.plain.base if "bias" in key.rpartition(".")[2] and key not in adapter.copies]
            assert not left, f"bias='all' leaves out {left}"
        self.plain.adapters[name] = adapter
        self.plain.active = (name,)

    def set_adapter(self, names: list[str]) -> None:
        self._call(mc.set_adapter, self.model, names)
        self.plain.active = tuple(dict.fromkeys(names))

    def disable(self, inside: str = "") -> None:
        """The base, and what is done inside the context."""
        copied = None
        with mc.disable_adapter(self.model):
            if not (self.written_over and self.plain.merged):
                self.close(self.run(), self.plain.output(self.x, self.plain.base), "the output while disabled")
            if inside == "deepcopy":
                copied = copy.deepcopy(self.model)
            elif inside == "dtype":
                self._to_float32()
            elif inside:
                self._refused(inside, None)
        if copied is not None and not self.plain.merged:
            self.model = self.to_adapt = copied

    def disable_part(self) -> None:
        """One piece computes its base, or the context is refused."""
        name = self.spec.order[0] if self.spec.order else ""
        now = self.plain.now()
        off = {key: value for key, value in self.plain.base.items() if key.startswith(f"{name}.") or not name}
        with mc.disable_adapter(self.model.get_submodule(name)):
            if not self.plain.merged:
                self.close(self.run(), self.plain.output(self.x, now | off), f"the output while {name} is disabled")

    def _refused(self, verb: str, names: Any) -> None:
        verbs: dict[str, Callable[[], Any]] = {
            "adapt": lambda: mc.adapt(self.model, {"r": 2, "target_modules": "all-linear"}, "inside"),
            "merge": lambda: mc.merge(self.model, names),
            "unload": lambda: mc.unload(self.model),
        }
        try:
            verbs[verb]()
        except mc.MissError:
            return
        raise AssertionError(f"{verb} was accepted")

    def merge(self, names: list[str] | None, keep: bool, inference: bool = False) -> None:
        plain = self.plain
        with torch.inference_mode() if inference else contextlib.nullcontext():
            self._call(mc.merge, self.model, names, keep_adapters=keep)
        folded = plain.active if names is None else tuple(dict.fromkeys(names))
        merged = plain.weights(folded)
        if keep:
            plain.merged, plain.written = folded, merged
        else:
            plain.base = merged
            for name in list(plain.adapters) if names is None else folded:
                del plain.adapters[name]
            plain.active = tuple(name for name in plain.active if name in plain.adapters)
        self.written_over = False
        self._adopt()

    def _adopt(self) -> None:
        """Go on from the bits that were written, where they are those of the oracle but for the last ones."""
        values = self.plain.base if self.plain.written is None else self.plain.written
        for name, tensor in self._held().items():
            if name in values:
                self.close(tensor, values[name], f"the merged {name}")
                values[name] = tensor.detach().clone()

    def _held(self) -> dict[str, Tensor]:
        """The base's values in the model, by the oracle's names."""
        ours = [f"miss_block_{name}" for name in self.plain.adapters]
        found = {}
        for name, tensor in held_tensors(self.model).items():
            if name.rpartition(".")[2] not in ours:
                found[canonical(self.plain.spec, name)] = tensor
        return found

    def unmerge(self) -> None:
        self._call(mc.unmerge, self.model)
        assert not (self.written_over and self.plain.merged), "unmerge threw away what was written"
        self.plain.merged, self.plain.written = (), None

    def delete(self, name: str) -> None:
        self._call(mc.delete_adapter, self.model, name)
        del self.plain.adapters[name]
        self.plain.active = tuple(other for other in self.plain.active if other != name)

    def unload(self) -> None:
        plain = self.plain
        self._call(mc.unload, self.model)
        if plain.written is not None and self.written_over:  # nothing that was written may be lost
            plain.base = plain.written
        plain.adapters, plain.active, plain.merged, plain.written = {}, (), (), None

    def deepcopy(self) -> None:
        """A copy, which knows nothing of what becomes of the original."""
        original, self.model = self.model, copy.deepcopy(self.model)
        self.to_adapt = self.model
        for name, parameter in original.named_parameters():
            if "miss_block" in name:
                parameter.data.zero_()

    def dtype(self) -> None:
        self._to_float32()

    def _to_float32(self) -> None:
        """There and back; all values lose bits."""
        self.model.float()
        self.model.double()
        plain = self.plain
        tables = [plain.base, *(table for a in plain.adapters.values() for table in (a.blocks, a.copies))]
        for table in [*tables, *([] if plain.written is None else [plain.written])]:
            for value in table.values():
                value.copy_(value.float())

    def rewrite(self, how: str) -> None:
        """Write other base values over those that are there."""
        given, seen = {}, {}
        for name, value in self.plain.spec.build().state_dict().items():
            if name in self.model.state_dict():
                key = canonical(self.plain.spec, name)
                seen.setdefault(key, value * 0.75 if value.is_floating_point() else value)
                given[name] = seen[key].clone()
        if how in ("load", "assign"):
            self.model.load_state_dict(given, strict=False, assign=how == "assign")
        else:
            for name, tensor in self.model.state_dict(keep_vars=True).items():
                if name in given and how == "data":
                    tensor.data = given[name]
                elif name in given:
                    tensor.data.copy_(given[name])
        target = self.plain.base if self.plain.written is None else self.plain.written
        target.update(seen)
        self.written_over = self.given_changed = True

    def save_and_load(self, name: str, route: str) -> None:
        """The adapter on a new model of the same base, on another route, computes the same there."""
        if any(kind == "Alias" for _, kind in self.spec.pieces) and (route in PROGRAMS) != (self.route in PROGRAMS):
            return
        with tempfile.TemporaryDirectory() as folder:
            mc.save_adapter(self.model, folder, name)
            try:
                other = self._make(route)
            except NotMadeError:
                return
            loaded = mc.load_adapter(other, folder)
        expected = self.plain.output(self.x, self.plain.weights([name]))
        self.close(loaded(self.x), expected, f"the output after loading {name!r} as {route}")

    def save_as_lora(self, name: str) -> None:
        adapter = self.plain.adapters.get(name)
        with tempfile.TemporaryDirectory() as folder:
            told = mc.save_as_lora(self.model, folder, name, rank=INNER if adapter and adapter.variant == "bat" else None)
            written = load_file(Path(folder) / "adapter_model.safetensors")
        assert adapter is not None
        exact = {fidelity.module for fidelity in told if fidelity.relative_error < 1e-6}
        for weight, part, owner in adapter.effects:
            if owner in exact:
                down, up = (written[f"base_model.model.{owner}.lora_{which}.weight".replace("..", ".")] for which in "AB")
                expected = reference_delta(adapter.variant, adapter.blocks[owner], part(self.plain.base[weight]))
                self.close(up.double() @ down.double(), expected, f"the LoRA of {owner}", 1e-5)

    def nan(self, name: str) -> None:
        """A block that holds a NaN is saved and loaded as it is, and never merged."""
        if name not in self.plain.adapters or self.plain.merged:
            return
        block = self._trained(name, next(iter(self.plain.adapters[name].blocks)))
        kept = block.detach().clone()
        block.data.view(-1)[0] = float("nan")
        try:
            with tempfile.TemporaryDirectory() as folder:
                mc.save_adapter(self.model, folder, name)
                loaded = mc.load_adapter(self._make(self.route), folder)
            assert any(bool(p.isnan().any()) for n, p in loaded.named_parameters() if "miss_block" in n), "the NaN is lost"
            self._refused("merge", name)
        finally:
            block.data.copy_(kept)

    def strict(self, name: str) -> None:
        """A state that lacks one of several blocks does not load strictly."""
        values = self.model.state_dict()
        ours = [key for key in values if key.endswith(f".miss_block_{name}")]
        if len(ours) > 1 and ours[0].count(".") == ours[1].count("."):
            del values[ours[0]]
            try:
                self.model.load_state_dict(values, strict=True)
            except RuntimeError:
                return
            raise AssertionError(f"a strict load without {ours[0]} tells nothing")

    def compile(self) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(self.model, backend="aot_eager")
        self.check(compiled)

    # --- what is looked at -----------------------------------------------------------------------------------------------

    def run(self) -> Tensor:
        with torch.no_grad():
            y: Tensor = self.model(self.x)
        return y

    def close(self, actual: Tensor, expected: Tensor, what: str, bound: float = EXACT) -> None:
        limit = bound * max(1.0, float(expected.abs().max()))
        error = max_error(actual, expected)
        assert error <= limit, f"{what}: error {error:.1e}"

    def check(self, running: Any = None) -> None:
        """Values, adapters, output and gradients."""
        plain = self.plain
        running = self.model if running is None else running
        assert set(mc.adapters(self.model)) == set(plain.adapters)
        assert set(mc.active_adapters(self.model)) == set(plain.active)
        expected = plain.base if plain.written is None else plain.written
        for name, tensor in self._held().items():
            assert name not in expected or torch.equal(tensor, expected[name]), f"the base value {name} is lost"
        with torch.no_grad():
            self.close(running(self.x), plain.output(self.x), "the output")
        gradients = plain.gradients(self.x)
        if gradients:
            self._check_gradients(running, gradients)

    def _check_gradients(self, running: Any, gradients: dict[tuple[str, str], Tensor]) -> None:
        self.model.zero_grad()
        running(self.x).pow(2).sum().backward()
        for (name, key), expected in gradients.items():
            live = self._trained(name, key)
            if live.requires_grad:
                found = torch.zeros_like(live) if live.grad is None else live.grad
                self.close(found, expected, f"the gradient of {key} in {name!r}")

    def _trained(self, name: str, key: str) -> Tensor:
        modules = dict(self.model.named_modules(remove_duplicate=False))
        if key in self.plain.adapters[name].blocks:
            return modules[key].get_parameter(f"miss_block_{name}")
        module, _, held = key.rpartition(".")
        return getattr(modules[module], copy_name(name, held))
