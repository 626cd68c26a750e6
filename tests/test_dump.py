"""The dump: golden texts of a small fixed model in every state, refusals, and what it refuses itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import adapted, fields
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from zoo import TwoLinears

import misscompile as mc


def text(golden: str) -> str:
    """A golden text as it stands in this file, without its indentation."""
    lines = golden.strip("\n").splitlines()
    return "\n".join(line.removeprefix("    ").rstrip() for line in lines).rstrip()


class Scaled(nn.Linear):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Router(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = super().forward(x)
        return y, y if self.training else -y


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.ones(4, 48, 96))


@pytest.fixture
def mixed() -> nn.Module:
    """Two layouts, an opaque owner, a router that is refused, and a stack of fused weights."""
    layers = {"0": nn.Linear(48, 96), "1": nn.Linear(48, 96), "conv": Conv1D(24, 48), "scaled": Scaled(96, 1024)}
    model = nn.ModuleDict(layers | {"router": Router(48, 4), "fused": Fused()})
    with pytest.warns(mc.MissWarning):
        return mc.adapt(model, mc.MissConfig(r=8, target_modules="all-linear"))


def test_table(mixed: nn.Module) -> None:
    assert mc.dump(mixed) == text("""
    site     kind              adapter    in→out   variant   r   parameters   added FLOPs   share of FLOPs
    ──────────────────────────────────────────────────────────────────────────────────────────────────────
    0        Linear            default     48→96   balance   8          768       +25.00%            4.66%
    1        Linear            default     48→96   balance   8          768       +25.00%            4.66%
    conv     Conv1D            default     48→24   balance   8          192       +25.00%            1.17%
    scaled   Scaled (opaque)   default   96→1024   balance   8        8,192       +12.50%           89.51%

    adapter 'default': 4 sites, 9,920 parameters, 2 refused
      refused: fused (Fused): its gate_up (4×48×96) is a stack of fused weights, not a linear
      refused: router (Router): an adapted module should return a tensor whose last dimension is 4, found a tuple: exclude it from target_modules.
    """)  # noqa: E501


def test_table_of_each_variant_and_of_a_root_that_is_a_linear() -> None:
    root = mc.adapt(nn.Linear(12, 8), mc.MissConfig(r=4, mini_r=2, init_weights="mini", target_modules="all-linear"))
    assert mc.dump(root) == text("""
    site     kind     adapter   in→out    variant   r   parameters   added FLOPs   share of FLOPs
    ─────────────────────────────────────────────────────────────────────────────────────────────
    (root)   Linear   default     12→8   mini m=2   4            8       +12.50%          100.00%

    adapter 'default': 1 site, 8 parameters, 0 refused
    """)
    one = mc.dump(adapted(nn.Linear(512, 512), "bat", r=64))
    two = mc.dump(adapted(nn.Linear(512, 512).bfloat16(), "bat", r=64))
    assert "bat   64       32,768       +59.38%" in one  # (3 bmm of 64 / 1024 tokens + 1 product) / 2
    assert "bat   64       32,768      +109.38%" in two
    few = mc.dump(adapted(nn.Linear(512, 512).bfloat16(), "mini", r=64, mini_r=8))
    assert "mini m=8   64          512        +0.29%" in few  # 1.5 · 64 · 8 / 512²


@pytest.fixture
def two_adapters() -> nn.Module:
    model = adapted(TwoLinears())
    return mc.adapt(model, mc.MissConfig(r=2, mini_r=4, init_weights="mini", target_modules=["down"]), "second")


def test_several_adapters_in_every_state(two_adapters: nn.Module) -> None:
    def statuses(first: str, second: str) -> list[tuple[str, str]]:
        return [("up", f"default{first}"), ("down", f"default{first}"), ("down", f"second{second}")]

    def shown() -> list[tuple[str, str]]:
        rows = mc.dump(model).splitlines()[2:5]
        return [(row.split("   ")[0].strip(), row.split("Linear")[1].strip().split("   ")[0]) for row in rows]

    model = two_adapters
    assert shown() == statuses(" (inactive)", "")
    mc.set_adapter(model, ["default", "second"])
    assert shown() == statuses("", "")
    with mc.disable_adapter(model):
        assert shown() == statuses(" (disabled)", " (disabled)")
    mc.set_adapter(model, "second")
    mc.merge(model, keep_adapters=True)
    assert shown() == statuses(" (inactive)", " (merged)")
    mc.unmerge(model)
    assert mc.dump(two_adapters).splitlines()[-2:] == [
        "adapter 'default': 2 sites, 112 parameters, 0 refused",
        "adapter 'second': 1 site, 8 parameters, 0 refused",
    ]
    with pytest.warns(mc.MissWarning, match="no adapter is active now"):
        mc.delete_adapter(model, "second")
    assert "second" not in mc.dump(model)


def test_a_shared_block_is_counted_once() -> None:
    model = TwoLinears()
    model.other = nn.Linear(12, 8, bias=False)
    model.other.weight = model.up.weight
    mc.adapt(model, mc.MissConfig(r=4, target_modules=["up", "other"]))
    assert sum(parameter.numel() for _, parameter in mc.trainable_parameters(model)) == 32
    assert "adapter 'default': 2 sites, 32 parameters" in mc.dump(model)


def test_the_shares_of_the_sites_add_up_and_count_a_base_once(two_adapters: nn.Module) -> None:
    """The step of `up` is 1.5 times its base, that of `down` 1 + 0.75 + 0.075 times, if both adapters act on it."""
    mc.set_adapter(two_adapters, ["default", "second"])
    up, down = 12 * 8 * 1.5, 8 * 20 * (1 + 0.75 + 3 * 2 * 4 / 2 / 160)
    assert f"{up / (up + down):.2%}" in mc.dump(two_adapters)


CODE = text("""
    # Linear 12→8, 2 owners: 0, 1
    # before
    def forward(self, input : torch.Tensor) -> torch.Tensor:
        input_1 = input
        weight = self.weight
        bias = self.bias
        linear = torch._C._nn.linear(input_1, weight, bias);  input_1 = weight = bias = None
        return linear

    # after
    def forward(self, input : torch.Tensor) -> torch.Tensor:
        input_1 = input
        weight = self.miss_base_weight
        bias = self.bias
        sum_shards = misscompile_kernels_shards_sum_shards(input_1, 4, True)
        miss_block_a = self.miss_block_a
        linear = torch._C._nn.linear(input_1, weight, bias);  input_1 = weight = bias = None
        add_update = misscompile_kernels_shards_add_update(linear, sum_shards, miss_block_a, 3);  linear = sum_shards = miss_block_a = None
        return add_update
""")  # noqa: E501


def test_code_of_one_scope() -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(12, 8))
    mc.adapt(model, mc.MissConfig(r=4, target_modules="all-linear"), "a")
    assert mc.dump(model, format="code") == CODE


def test_code_lists_each_distinct_scope_once_and_tells_why_it_is_opaque() -> None:
    model = adapted(nn.Sequential(*(nn.Linear(12, 8) for _ in range(6)), nn.Linear(8, 12), Scaled(12, 8)))
    parts = [part.splitlines() for part in mc.dump(model, "code").split("\n\n\n")]
    assert [part[0] for part in parts] == [
        "# Linear 12→8, 6 owners: 0, 1, 2, 3, …",
        "# Linear 8→12, 1 owner: 6",
        "# Scaled 12→8, 1 owner: 7",
    ]
    opaque = ["# opaque: its forward reads self.scale, which a trace would freeze or lose", "# before"]
    assert [part[1:3] for part in parts[1:]] == [["# before", parts[0][2]], opaque]
    assert "(miss_base_forward, 8, x, _args, _kwargs)" in "\n".join(parts[2])


def test_names_that_look_like_markup_are_shown_as_they_are() -> None:
    model = nn.ModuleDict({"[mask]": nn.Linear(12, 8), "[/mask]": nn.Linear(8, 12), "[red]": Router(12, 8)})
    with pytest.warns(mc.MissWarning):
        mc.adapt(model, fields())
    shown = mc.dump(model)
    assert [line.split()[0] for line in shown.splitlines()[2:4]] == ["[mask]", "[/mask]"]
    assert "refused: [red] (Router)" in shown
    assert "1 owner: [/mask]" in mc.dump(model, "code")


@pytest.mark.parametrize("captured", [False, True])
def test_code_shows_what_runs_now(captured: bool) -> None:
    model = mc.adapt(mc.capture(TwoLinears(), (torch.ones(3, 12),)) if captured else TwoLinears(), fields())
    acting = mc.dump(model, "code")
    assert acting.count("# after") == (1 if captured else 2)
    assert acting.count("add_update = ") == 2
    with mc.disable_adapter(model):
        assert "add_update" not in mc.dump(model, "code")
    assert mc.dump(model, "code") == acting
    mc.merge(model, keep_adapters=True)
    assert "add_update" not in mc.dump(model, "code")


@pytest.mark.parametrize("format", ["text", "code"])
def test_a_dump_changes_nothing_and_looks_inside_a_wrapper(mixed: nn.Module, format: Any) -> None:
    classes = [type(module) for module in mixed.modules()]
    shown = mc.dump(mixed, format)
    for model in (mixed, nn.DataParallel(mixed), torch.compile(mixed, backend="eager")):
        assert mc.dump(model, format) == shown
    assert [type(module) for module in mixed.modules()] == classes
