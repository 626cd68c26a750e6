"""The words: Block, Adapter, Refusal, WeightPath, Site, Scope, Target and Plan. Data only, no behaviour."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

from torch import Tensor, fx, nn

from misscompile.rules.config import MissConfig

Layout = Literal["out_in", "in_out", "conv", "opaque"]


@dataclasses.dataclass(frozen=True)
class Block:
    """What one adapter registered for one site: enough to derive the rewritten graph, nothing more."""

    adapter: str
    variant: str
    """A key of `misscompile.variants.VARIANTS`."""
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
    """A name that looked like a target, and why an adapter on it could not take effect."""

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


class View(NamedTuple):
    """Where a weight operand lies in its contiguous parameter, as `torch.as_strided` takes it."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclasses.dataclass(frozen=True)
class WeightPath:
    """The parameter behind a weight operand, and the view of it as `(out, in)`."""

    parameter: str
    """Dotted name of the parameter below the root of the scope."""
    view: View


@dataclasses.dataclass
class Site:
    """One use of a weight in a scope: the node that computes `y`, its operands, and the blocks that act on it."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node | None
    """The operand as the call takes it, in `layout`; None where no node gives it."""
    added: fx.Node | None
    """What the call adds to the product: a bias, or with `addmm` any tensor."""
    layout: Layout
    in_features: int
    out_features: int
    path: WeightPath | None
    """From the stored parameter to the weight as `(out, in)`; None where the site is opaque."""
    owner: str = ""
    """Dotted name, below the root of the scope, of the module on which the blocks are registered."""
    blocks: tuple[Block, ...] = ()
    columns: tuple[int, int, int] | None = None
    """`(start, stop, of how many)`: the outputs of the call that are this site's, where it computes several's (q, k, v)."""
    is_whole: bool = False
    """Whether the call is `x Wᵀ` plus at most a bias, so that one product with `W + ΔW` can take its place."""
    call: int | None = None
    """The number of this call of its weight, where a merge gives each call a weight of its own."""
    strides: tuple[int, ...] = ()
    """Of a 1×1 convolution, one for each dimension of its positions."""


@dataclasses.dataclass(eq=False)
class Scope:
    """One graph, and the module below which its names resolve: a traced owner, or a whole model."""

    root: nn.Module
    """Has the shapes and dtypes of what the graph reads; of a traced owner it is a copy without values."""
    graph: fx.Graph
    label: str
    """What messages call it."""
    shape: tuple[int, int] | None = None
    """`(in_features, out_features)` of a traced owner."""
    opaque: str | None = None
    """Why a traced owner's forward stays one node, or None where it was traced."""
    sites: list[Site] = dataclasses.field(default_factory=list)
    refusals: list[Refusal] = dataclasses.field(default_factory=list)
    """Calls that look like linears and cannot take a block."""
    unnamed: list[str] = dataclasses.field(default_factory=list)
    """Weights of linear calls of which nothing tells the owner."""
    copies: tuple[tuple[str, str], ...] = ()
    """`(tensor, the copy that stands for it)` below the root, of all that the active adapters train in full."""
    evaluation: fx.Graph | None = None
    """The graph of the same model in evaluation mode, where both were traced."""
    follows_mode: bool = False
    """Whether the graph reads the mode of its module."""


@dataclasses.dataclass
class Target:
    """One site, or all sites of one weight, chosen by the rules: where its block is registered, and which it is."""

    name: str
    owner: nn.Module
    in_features: int
    out_features: int
    block: Block
    weight: Tensor | None
    """Tells the block's dtype and device."""
    shared_by: object
    """Targets with the same value share one block: those of one weight."""
    scope: Scope | None = None
    """That of the owner's forward, where blocks act in it."""
    stands_for: str | None = None
    """The name that the rules chose, beside the owner, where the owner has another one."""


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
    """The new block of each target, by target name."""
    copies: dict[nn.Module, dict[str, Tensor]] = dataclasses.field(default_factory=dict)
    """The new copy of each tensor in `copied`."""
