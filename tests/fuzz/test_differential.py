"""Random networks and random sequences of verbs: an adapted model computes what a plain one with `W + ΔW` computes.

`make fuzz` runs it for MISSCOMPILE_FUZZ_SECONDS (300) seconds; `make test` runs a short part that is always the same.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, reject, seed, settings
from hypothesis import strategies as st
from models import NAMES, PIECES, Spec
from steps import ROUTES, NotMadeError, World

SECONDS = float(os.environ.get("MISSCOMPILE_FUZZ_SECONDS", 0))
ROUTE_NAMES = list(ROUTES)
KINDS = list(PIECES)
COUNTS = (1, 1, 1, 2, 2, 3, 0)
ADAPTERS = ("a", "a_c", "b-1")
QUIET = settings(deadline=None, database=None, report_multiple_bugs=False, suppress_health_check=list(HealthCheck))
pytestmark = pytest.mark.filterwarnings("ignore")


@dataclasses.dataclass(frozen=True)
class Scenario:
    spec: Spec
    route: str
    rows: int
    training: bool
    steps: tuple[tuple[str, dict[str, Any]], ...]


@st.composite
def specs(draw: Any) -> Spec:
    count = draw(st.sampled_from(COUNTS))
    names = draw(st.permutations(NAMES))[:count] if draw(st.booleans()) else NAMES[:count]
    pieces = tuple((name, draw(st.sampled_from(KINDS))) for name in names)
    again = draw(st.booleans()) if count else False
    return Spec(pieces, (*names, names[0]) if again else tuple(names))


_FILES = ("save_and_load", "save_as_lora", "nan", "strict")
_ANY = (*_FILES, "deepcopy", "dtype", "rewrite", "disable", "disable_part", "unload")
_UNMERGED = ("adapt", "adapt", "set_adapter", "merge", "merge", "merge", "delete", *_ANY)
_MERGED = (*["unmerge"] * 4, *["rewrite"] * 3, "disable", "dtype", *_ANY)
_FAILING = ("adapt", "set_adapter", "merge", "unmerge", "delete", "unload")


class Drawing:
    """Draws steps that mostly have a meaning: it follows which adapters there are if nothing is refused."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.known: list[str] = []
        self.merged = False
        self.first = self.among(1, 1, 2, 2, 3)
        self.beside = self.among(("",), ("", "", "all", "MiSS_only", "saved"), ("all",))

    def among(self, *values: Any) -> Any:
        return self.draw(st.sampled_from(values))

    def step(self) -> tuple[str, dict[str, Any]]:
        self.first -= 1
        if not self.known or self.first >= 0:
            verb = "adapt"
        elif self.among(*[False] * 24, True):
            verb = "compile"
        elif self.among(*[False] * 9, True):
            verb = self.among("merge", *_FAILING)
        else:
            verb = self.among(*(_MERGED if self.merged else _UNMERGED))
        drawn = getattr(self, f"_{verb}", dict)()
        if verb in _FAILING and self.among(*[False] * 7, True):
            drawn["fail_at"] = self.draw(st.integers(1, 25))
        return verb, drawn

    def _adapt(self) -> dict[str, Any]:
        variant = self.among(True, False, "mini", "bat")
        first = self.draw(st.integers(0, 7))
        drawn = {
            "name": self.among(*([name for name in ADAPTERS if name not in self.known] or ADAPTERS)),
            "variant": variant,
            "r": self.among(*(2, 4) if variant == "bat" else (4, 2, 3, 5)),
            "targets": self.among("all-linear", [first], [first], [first, first + 1]),
        }
        extra = self.among(*self.beside)
        if extra == "saved":
            drawn["saved"] = first + self.among(-1, 1, 2)
        elif extra:
            drawn["bias"] = extra
        if not self.merged and drawn["name"] not in self.known:
            self.known.append(drawn["name"])
        return drawn

    def _name(self) -> dict[str, Any]:
        return {"name": self.among(*self.known)}

    def _names(self) -> list[str]:
        some = self.draw(st.lists(st.sampled_from(self.known), min_size=1, max_size=2, unique=True))
        return self.among(some, list(self.known))

    def _set_adapter(self) -> dict[str, Any]:
        return {"names": self._names()}

    def _merge(self) -> dict[str, Any]:
        names = self.among(None, self._names())
        keep, inference = self.among(False, True), self.among(False, False, False, True)
        self.merged = keep
        if not keep:
            self.known = [name for name in self.known if names is not None and name not in names]
        return {"names": names, "keep": keep} | ({"inference": True} if inference else {})

    def _unmerge(self) -> dict[str, Any]:
        self.merged = False
        return {}

    def _delete(self) -> dict[str, Any]:
        drawn = self._name()
        self.known.remove(drawn["name"])
        return drawn

    def _unload(self) -> dict[str, Any]:
        self.known, self.merged = [], False
        return {}

    def _disable(self) -> dict[str, Any]:
        return {"inside": self.among("", "deepcopy", "dtype", "adapt", "merge", "unload")}

    def _rewrite(self) -> dict[str, Any]:
        return {"how": self.among("load", "assign", "data", "copy")}

    def _save_and_load(self) -> dict[str, Any]:
        return self._name() | {"route": self.among(*ROUTE_NAMES)}

    _save_as_lora = _nan = _strict = _name


@st.composite
def scenarios(draw: Any) -> Scenario:
    """A network, a route, and steps of which the first one adapts."""
    drawing = Drawing(draw)
    route = drawing.among(*ROUTE_NAMES, *("module", "traced") * (len(ROUTE_NAMES) > 2))
    training = route != "module" and drawing.among(False, False, False, True)
    spec, rows = draw(specs()), drawing.among(3, 70)
    steps = tuple(drawing.step() for _ in range(draw(st.integers(1, 7))))
    return Scenario(spec, route, rows, training, steps)


def run_scenario(scenario: Scenario) -> None:
    world = World(scenario.spec, scenario.route, scenario.rows, scenario.training)
    for verb, drawn in scenario.steps:
        world.step(verb, **drawn)
    world.finish()


def check(scenario: Scenario) -> None:
    try:
        run_scenario(scenario)
    except NotMadeError:
        reject()


@pytest.mark.skipif(SECONDS > 0, reason="the long run does more of the same")
@settings(QUIET, max_examples=80, derandomize=True, phases=[Phase.generate])  # `make fuzz` shrinks what it finds
@given(scenarios())
def test_random_steps_compute_what_the_plain_model_computes(scenario: Scenario) -> None:
    check(scenario)


@pytest.mark.skipif(SECONDS == 0, reason="make fuzz")
def test_many_random_steps_compute_what_the_plain_model_computes() -> None:
    """Rounds of examples, each from a seed of its own, which a failure prints."""
    first, end = random.SystemRandom().randrange(2**32), time.monotonic() + SECONDS
    for number in itertools.count(int(os.environ.get("MISSCOMPILE_FUZZ_SEED", first))):
        if time.monotonic() > end:
            return
        print(f"MISSCOMPILE_FUZZ_SEED={number}")
        seed(number)(settings(QUIET, max_examples=50)(given(scenarios())(check)))()
