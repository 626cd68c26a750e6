"""Random small networks of pieces that reach their weights in ways that models in the wild do.

Every piece maps `(rows, 8)` to `(rows, 8)`. The names of a piece's children and of the pieces in a network may be odd.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

WIDTH, INNER = 8, 12


@dataclasses.dataclass(frozen=True)
class Form:
    """How a piece reads one of its parameters."""

    in_out: bool = False
    """Whether it is stored as `(in, out)`."""
    parts: tuple[tuple[int, int], ...] = ()
    """Rows that are read apart, in the order of the calls."""


class Piece(nn.Module):
    forms: dict[str, Form] = {}  # noqa: RUF012
    """By name below the piece, the parameters that are read in another way than an `nn.Linear` reads its weight."""
    linears: tuple[str, ...] = ()
    """What may be named as a target: modules, and in a whole graph bare parameters."""
    silent_writes = False
    """Whether a value is changed in a way that autograd does not see, so that no gradient is defined."""


class Plain(Piece):
    linears = ("up", "down")

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER, bias=False), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Transposed(Plain):
    forms = {"up.weight": Form(in_out=True), "down.weight": Form(in_out=True)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Conv1D(INNER, WIDTH), Conv1D(WIDTH, INNER)


class CalledTwice(Piece):
    linears = ("step",)

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.step(torch.tanh(self.step(x)))


class Alias(Piece):
    """One module under two names."""

    linears = ("first", "second")

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.sin(self.first(x)))


class AliasApart(Alias):
    """What an exported program holds of an `Alias`: two modules with the same parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(WIDTH, WIDTH)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias


class Tied(Piece):
    """One parameter in two modules."""

    linears = ("up", "other")

    def __init__(self) -> None:
        super().__init__()
        self.up, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.other.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(torch.tanh(self.up(x)))


class TiedByData(Tied):
    """Two parameters over the same values."""

    def __init__(self) -> None:
        super().__init__()
        self.other.weight = nn.Parameter(self.up.weight.data)


class Overlapping(Tied):
    """Two parameters that are views of one storage, with some rows in common."""

    def __init__(self) -> None:
        super().__init__()
        rows = torch.randn(INNER, WIDTH) * 0.3
        self.up.weight, self.other.weight = nn.Parameter(rows[:WIDTH]), nn.Parameter(rows[INNER - WIDTH :])


class TiedTable(Piece):
    """An embedding whose table is the weight of a linear."""

    linears = ("up",)

    def __init__(self) -> None:
        super().__init__()
        self.up, self.table = nn.Linear(WIDTH, INNER), nn.Embedding(INNER, WIDTH)
        self.table.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)[:, :WIDTH] + self.table((x[:, 0] > 0).long())


class Bare(Piece):
    """Products with bare parameters, in either layout, one of them square."""

    linears = ("w", "v", "square")
    forms = {"w": Form(in_out=True), "square": Form(in_out=True)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = (nn.Parameter(torch.randn(shape) * 0.3) for shape in ((WIDTH, INNER), (WIDTH, INNER)))
        self.square = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w) @ self.v.t() + x @ self.square


class Sliced(Piece):
    """Rows of one parameter, read apart."""

    linears = ("w",)
    forms = {"w": Form(parts=((0, INNER), (INNER, INNER + WIDTH)))}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(INNER + WIDTH, WIDTH) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.linear(x, self.w[:INNER]), F.linear(x, self.w[INNER:])
        return torch.tanh(a)[:, :WIDTH] + b


class Residual(Piece):
    """`addmm` with a tensor of two dimensions in the place of a bias; once it is the input of the product too."""

    linears = ("w", "square")
    forms = {"w": Form(in_out=True), "square": Form(in_out=True)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(WIDTH, INNER) * 0.3)
        self.square = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.3)
        self.row = nn.Parameter(torch.randn(1, INNER) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.addmm(x, x, self.square)
        wide = torch.addmm(torch.cat([h, h[:, : INNER - WIDTH]], 1), h, self.w)
        return torch.tanh(wide + torch.addmm(self.row, x, self.w))[:, :WIDTH]


class Einsum(Piece):
    linears = ("w", "square")

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(INNER, WIDTH) * 0.3)
        self.square = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        diagonal = torch.einsum("ii,oi->io", x[:WIDTH, :].t() @ x[:WIDTH, :], self.square)
        return torch.einsum("bi,oi->bo", x, self.w)[:, :WIDTH] + torch.tanh(x @ diagonal)


class Convolved(Piece):
    """A 1×1 convolution, a linear over the channels, which are last in memory; and a norm that sums in that order."""

    linears = ("conv", "down")

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down = nn.Conv2d(WIDTH, INNER, 1), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.stack([x, torch.cos(x)], 1).unsqueeze(1).permute(0, 3, 1, 2)
        h = F.layer_norm(self.conv(h).permute(0, 2, 3, 1), (INNER,))
        return self.down(torch.tanh(h).sum((1, 2)))


class WritesView(Plain):
    """A view of the input of two linears is scaled between them."""

    linears = ("up", "other", "down")

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(WIDTH, INNER)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sin(x)
        a = self.up(h)
        v = h[:, 2:5]
        v.mul_(2.0)
        return self.down(torch.tanh(a + self.other(h)))


class WritesInPlace(WritesView):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.sin(x)
        a = self.up(h)
        F.relu(h, inplace=True)
        return self.down(torch.tanh(a + self.other(h)))


class WritesData(WritesView):
    silent_writes = True

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sin(x)
        a = self.up(h)
        h.data.mul_(1.5)
        return self.down(torch.tanh(a + self.other(h)))


class WritesArray(WritesView):
    silent_writes = True

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sin(x)
        a = self.up(h)
        h.detach().numpy()[:] *= 1.5
        return self.down(torch.tanh(a + self.other(h)))


class Read(Plain):
    """The weight of a child goes into a call of this module's own."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(F.linear(x, self.up.weight)))


class ReadAndCalled(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x) + F.linear(torch.cos(x), self.up.weight)))


class ReadByName(Plain):
    """The read is one that no look at the source of this class finds."""

    def forward(self, x: Tensor) -> Tensor:
        return product_with(self.down, torch.tanh(product_with(self.up, x)))


class ReadByGrandparent(Piece):
    linears = ("inner.up", "inner.down")

    def __init__(self) -> None:
        super().__init__()
        self.inner = Plain()

    def forward(self, x: Tensor) -> Tensor:
        down = self.inner.down
        return down(torch.tanh(x @ self.inner.up.weight.t())) + F.linear(x, down.weight[:, :WIDTH]) * 0.5


def product_with(module: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, module.weight, module.bias)


class Hooked(Plain):
    """Forward hooks on the linears."""

    def __init__(self) -> None:
        super().__init__()
        self.up.register_forward_pre_hook(cosine_of_input)
        self.down.register_forward_hook(twice_the_output)


def cosine_of_input(module: nn.Module, args: Any) -> Any:
    return (torch.cos(args[0]),)


def twice_the_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return torch.tanh(output) * 2


class OddTensors(Plain):
    """Parameters and buffers of the user with names like ours."""

    def __init__(self) -> None:
        super().__init__()
        self.miss_gain, self.permiss_x = nn.Parameter(torch.rand(WIDTH)), nn.Parameter(torch.rand(WIDTH))
        self.register_buffer("miss_shift", torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.miss_gain) + self.permiss_x * x + self.miss_shift


class OddChildren(Piece):
    """Names that PEFT uses in its files."""

    linears = ("base_layer", "modules_to_save")

    def __init__(self) -> None:
        super().__init__()
        for name in self.linears:
            self.add_module(name, nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        for name in self.linears:
            x = torch.sin(self._modules[name](x))
        return x


class Normalised(OddChildren):
    """Names that Python reads as others."""

    linears = ("Ａ", "ﬁ")


class TwoBiases(Piece):
    linears = ("up",)

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.bias, self.c_bias = nn.Parameter(torch.rand(WIDTH)), nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x + self.bias) * self.c_bias


class ScopedLinear(nn.Linear):
    scope = "model"

    def base_forward(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def forward(self, input: Tensor) -> Tensor:
        return self.base_forward(input) + len(self.scope)


class Flagged(nn.Linear):
    flag = False  # with it the forward would be no linear of its input, and the update one of its output alone

    def forward(self, input: Tensor) -> Tensor:
        if self.flag:
            return torch.zeros_like(input)
        return F.linear(input, self.weight, self.bias)


class Subclasses(Piece):
    linears = ("scoped", "flagged")

    def __init__(self) -> None:
        super().__init__()
        self.scoped, self.flagged = ScopedLinear(WIDTH, WIDTH), Flagged(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.flagged(torch.sin(self.scoped(x)))


class Attention(Piece):
    linears = ("attn", "attn.q", "attn.v", "attn.out_proj")

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.stack([x, torch.sin(x)], 1)
        return self.attn(h, h, h, need_weights=False)[0].sum(1)


class Modal(Plain):
    """What computes something else in training."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.leak, self.norm = nn.Dropout1d(0.5), nn.RReLU(), nn.BatchNorm1d(INNER)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.leak(self.norm(self.drop(self.up(x)))))


class ModalAlpha(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.drop, self.norm = nn.AlphaDropout(0.5), nn.InstanceNorm1d(1, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.drop(self.up(x)), 0.25, self.training)
        return self.down(self.norm(h.unsqueeze(1)).squeeze(1))


PIECES: dict[str, type[Piece]] = {
    kind.__name__: kind
    for kind in (
        *(Plain, Transposed, CalledTwice, Alias, Tied, TiedByData, Overlapping, TiedTable, Bare, Sliced, Residual, Einsum),
        *(Convolved, WritesView, WritesInPlace, WritesData, WritesArray, Read, ReadAndCalled, ReadByName, ReadByGrandparent),
        *(Hooked, OddTensors, OddChildren, Normalised, TwoBiases, Subclasses, Attention, Modal, ModalAlpha),
    )
}
EXPORTED = PIECES | {"Alias": AliasApart}
"""The same as an exported program holds them."""
NAMES = ("p0", "p1", "miss_p", "Ａ", "base_layer", "x#0")
"""Of the pieces in a network."""


class Net(nn.Module):
    """Pieces by name, run in an order in which one may come twice."""

    def __init__(self, pieces: dict[str, Piece], order: tuple[str, ...]) -> None:
        super().__init__()
        for name, piece in pieces.items():
            self.add_module(name, piece)
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order:
            x = self._modules[name](x)
        return x


@dataclasses.dataclass(frozen=True)
class Spec:
    """A network: the kind of each piece with its name, and the names in the order in which they run.

    Without pieces the network is one `nn.Linear`.
    """

    pieces: tuple[tuple[str, str], ...]
    order: tuple[str, ...]
    exported: bool = False
    """Whether it is known from an exported program alone."""

    def build(self) -> nn.Module:
        """The network in float64 with the values of a fixed seed, in evaluation mode."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            if not self.pieces:
                return nn.Linear(WIDTH, WIDTH).double().eval()
            kinds = EXPORTED if self.exported else PIECES
            net = Net({name: kinds[kind]() for name, kind in self.pieces}, self.order).double()
        return share_again(net).eval()

    def linears(self) -> list[str]:
        """What may be named as a target."""
        return [f"{name}.{linear}" for name, kind in self.pieces for linear in PIECES[kind].linears]

    def form(self, parameter: str) -> Form:
        """How a parameter is read."""
        name, _, below = parameter.partition(".")
        return PIECES[dict(self.pieces)[name]].forms.get(below, Form()) if self.pieces else Form()

    @property
    def silent_writes(self) -> bool:
        """Whether a value is changed in a way that autograd does not see."""
        return any(PIECES[kind].silent_writes for _, kind in self.pieces)


def share_again(net: nn.Module) -> nn.Module:
    """Let parameters over one storage be so again: a change of dtype gives each its own."""
    for piece in net.children():
        if isinstance(piece, TiedByData):
            piece.other.weight = nn.Parameter(piece.up.weight.data)
        if isinstance(piece, Overlapping):
            rows = torch.cat([piece.up.weight.data, piece.other.weight.data[2 * WIDTH - INNER :]])
            piece.up.weight, piece.other.weight = nn.Parameter(rows[:WIDTH]), nn.Parameter(rows[INNER - WIDTH :])
    return net
