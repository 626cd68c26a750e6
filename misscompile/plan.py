"""The words the passes share: Block, Adapter, Site, Scope, Refusal, Target and Plan. Data only, no behaviour."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from misscompile.config import MissConfig, Variant

Layout = Literal["out_in", "in_out", "conv", "opaque"]

Step = tuple[Any, ...]
"""One view between a parameter and a linear call: `("t",)`, `("view", *shape)`, `("rows", start, stop)`, `("flatten",)`."""


@dataclasses.dataclass(frozen=True)
class Block:
    """What one adapter registered on one owner: enough to derive the owner's forward, nothing more."""

    adapter: str
    variant: Variant
    r: int
    mini_r: int
    dropout: float
    round_weight: bool = False
    """bat on a 16-bit weight: one product with the rounded `W + ΔW`."""

    @property
    def parameter(self) -> str:
        """Name of the parameter on the owner."""
        return f"miss_block_{self.adapter}"


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A module that looked like a target, and why an adapter on it could not take effect."""

    name: str
    kind: str
    reason: str


@dataclasses.dataclass
class Adapter:
    """A name, its config, and what its rules passed over. One object, shared by all owners of the adapter."""

    name: str
    config: MissConfig
    trainable: bool = True
    refusals: tuple[Refusal, ...] = ()


@dataclasses.dataclass(frozen=True)
class WeightPath:
    """The parameter behind a weight operand and the views that lead from it to `(out, in)`."""

    parameter: str
    """Dotted name of the parameter below the root of the scope."""
    steps: tuple[Step, ...]


@dataclasses.dataclass
class Site:
    """One linear call site of a scope: the node that computes `y`, its operands, and the blocks that act on it."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node | None
    """The operand as the call takes it, in `layout`; None where no node gives it."""
    layout: Layout
    in_features: int
    out_features: int
    weight_dtype: torch.dtype | None
    blocks: tuple[Block, ...] = ()
    owner: str = ""
    """Dotted name, below the root of the scope, of the module on which the blocks are registered."""
    path: WeightPath | None = None
    """From the stored parameter to the weight as `(out, in)`, where the scope is a whole graph."""
    columns: tuple[int, int, int] | None = None
    """`(start, stop, of how many)`: the outputs of the call that are this site's, where it computes several's (q, k, v)."""
    strides: tuple[int, ...] = ()
    """Of a 1×1 convolution, one for each dimension of its positions."""

    def attribute(self, name: str) -> str:
        """The `get_attr` target of something that the owner holds."""
        return f"{self.owner}.{name}" if self.owner else name


@dataclasses.dataclass(eq=False)
class Scope:
    """One traced graph and the structure of module it stands for: owners of equal structure share a scope."""

    base_class: type[nn.Module]
    in_features: int
    out_features: int
    weight_dtype: torch.dtype | None
    graph: fx.Graph = dataclasses.field(default_factory=fx.Graph)
    opaque: str | None = None
    """Why the base forward stays one opaque node, or None where it was traced."""
    sites: list[Site] = dataclasses.field(default_factory=list)
    shared: bool = False
    """Whether every owner of this structure has this scope; a forward that somebody set on an instance is its own."""
    blocks: tuple[Block, ...] = ()
    base_code: str = ""
    code: str = ""
    forward: Callable[..., Any] | None = None

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.base_class.__name__


@dataclasses.dataclass(eq=False)
class ModelScope:
    """A whole model as one graph, the module that runs it, and every linear call in it."""

    root: nn.Module
    graph: fx.Graph
    sites: list[Site] = dataclasses.field(default_factory=list)
    refusals: list[Refusal] = dataclasses.field(default_factory=list)
    """Calls that look like linears and cannot take a block."""
    unnamed: list[str] = dataclasses.field(default_factory=list)
    """Weights of linear calls of which nothing tells the owner."""

    @property
    def label(self) -> str:
        """What messages call it."""
        return "whole graph"


@dataclasses.dataclass
class Target:
    """One module chosen by the rules: its canonical name, the owner, the block it gets, the scope of its base forward."""

    name: str
    owner: nn.Module
    in_features: int
    out_features: int
    block: Block
    scope: Scope | None = None
    """The scope of its base forward; None in a whole graph."""
    weight: Tensor | None = None
    """The weight, where it is not an attribute of the owner."""
    shared_by: object = None
    """Targets with the same value share one block; by default those of one weight."""


@dataclasses.dataclass
class Plan:
    """Everything an adapt will do, checked before the first change."""

    adapter: Adapter
    modules: dict[nn.Module, str]
    """Every module of the model, with the first of the names under which the model reaches it."""
    targets: list[Target]
    notes: list[str]
    copied: dict[nn.Module, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """The tensors of each module that the adapter trains in full: biases and modules to save."""
    parameters: dict[str, nn.Parameter] = dataclasses.field(default_factory=dict)
    """The new block of each target, by target name; targets that share a weight share the parameter."""
    copies: dict[nn.Module, dict[str, Tensor]] = dataclasses.field(default_factory=dict)
    """The new copy of each tensor in `copied`."""
