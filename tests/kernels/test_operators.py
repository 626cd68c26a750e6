"""The operators that stay one call under `torch.compile`, against the forms that eager mode runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import adapted, fill_blocks, max_error
from torch import Tensor, library, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition

import misscompile as mc
from misscompile.kernels import bat, device, shards  # internal: the functions of sites, their operators and thresholds
from misscompile.kernels.shards import add_update

IN, OUT, R, M = 24, 48, 8, 4
MANY, FEW = 2 * device.MANY_TOKENS, device.MANY_TOKENS // 2


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (0.5 * torch.randn(shape)).to(dtype).requires_grad_()


def two_linears(init_weights: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(IN, OUT), nn.Linear(OUT, IN)).bfloat16()
    return adapted(model, init_weights, r=R, mini_r=M)


def compiled(function: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=False)


def graph_targets(function: Any, *operands: Any) -> list[Any]:
    """What Dynamo's graph calls."""
    torch._dynamo.reset()
    found: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        found.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*operands)
    return found


def step(run: Any, operands: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    """The output and the gradient of every operand."""
    y = run(*operands)
    return [y, *torch.autograd.grad(y, operands, cotangent)]


def assert_as_eager(function: Any, operands: list[Tensor], units: int) -> None:
    """Within so many units in the last place of the largest value."""
    cotangent = torch.randn(function(*operands).shape).to(operands[0].dtype)
    for ours, eager in zip(*(step(run, operands, cotangent) for run in (compiled(function), function)), strict=True):
        assert (ours.shape, ours.dtype) == (eager.shape, eager.dtype)
        assert max_error(ours, eager) <= units * torch.finfo(cotangent.dtype).eps * float(eager.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [(MANY,), (FEW,), (2, MANY), ()])
@pytest.mark.parametrize("variant", ["balance", "mini", "wide mini", "bat"])
def test_values_and_gradients_are_those_of_eager(dtype: torch.dtype, tokens: tuple[int, ...], variant: str) -> None:
    x, y = leaf(*tokens, IN, dtype=dtype), leaf(*tokens, OUT, dtype=dtype)
    if variant == "bat":
        operands = [x, leaf(OUT, IN, dtype=dtype), leaf(OUT, dtype=dtype), leaf(OUT // R, R, R)]
        function = lambda x, weight, bias, block: bat.bat_linear(x, weight, bias, [block], False)  # noqa: E731
        operator = bat.BAT_LINEAR
    elif variant == "balance":
        operands = [y, x, leaf(R, OUT)]
        function = lambda y, x, d: add_update(y, shards.sum_shards(x, R, True), d, IN // R)  # noqa: E731
        operator = shards.ADD_PRODUCT
    else:
        operands = [y, x, leaf(R, M if variant == "mini" else OUT // 2)]
        function = lambda y, x, d: add_update(y, shards.sum_shards(x, R), d, IN // R)  # noqa: E731
        operator = shards.ADD_GROUPS
    assert operator in graph_targets(function, *operands)
    assert_as_eager(function, operands, units=2)


@pytest.mark.parametrize("wanted", range(4))
def test_only_what_is_asked_for_gets_a_gradient(wanted: int) -> None:
    shapes, low = ((MANY, OUT), (MANY, R), (R, OUT), (OUT // R, R, R)), torch.bfloat16
    values = [torch.randn(shape).to(low if i < 2 else torch.float32) for i, shape in enumerate(shapes)]
    operands = [value.requires_grad_(i == wanted) for i, value in enumerate(values)]

    def run(y: Tensor, s: Tensor, d: Tensor, b: Tensor) -> Tensor:
        return bat.bat_linear(add_update(y, s, d, 3), torch.ones(R, OUT).to(y), None, [b[:1, :, :]], False)

    compiled(run)(*operands).float().square().sum().backward()
    assert [operand.grad is not None for operand in operands] == [i == wanted for i in range(4)]
    gradient = operands[wanted].grad.clone()
    operands[wanted].grad = None
    run(*operands).float().square().sum().backward()
    assert max_error(gradient, operands[wanted].grad) <= 0.02 * float(gradient.abs().max())


def test_operators_declare_what_they_do() -> None:
    y, s, d = leaf(MANY, OUT, dtype=torch.bfloat16), leaf(MANY, R, dtype=torch.bfloat16), leaf(R, OUT)
    library.opcheck(shards.ADD_PRODUCT, (y, s, d, 3))
    library.opcheck(shards.ADD_GROUPS, (y, leaf(MANY, M)))
    x, weight = leaf(MANY, IN, dtype=torch.bfloat16), leaf(OUT, IN, dtype=torch.bfloat16)
    blocks = [leaf(OUT // R, R, R), leaf(OUT // 4, 4, 4)]
    library.opcheck(bat.BAT_LINEAR, (x, weight, None, "two products", blocks))


def test_an_output_of_other_strides() -> None:
    y = leaf(OUT, MANY, dtype=torch.bfloat16).t()
    for s, d in ((leaf(MANY, R, dtype=torch.bfloat16), leaf(R, OUT)), (leaf(MANY, R), leaf(R, M))):
        assert max_error(compiled(add_update)(y, s, d, 3), add_update(y, s, d, 3)) <= 2**-7 * float(y.abs().max())


def test_equal_dtypes_are_plain_operations() -> None:
    """Nothing has to be prepared, and Inductor may choose and fuse."""
    y, s, d = leaf(MANY, OUT), leaf(MANY, R), leaf(R, OUT)
    assert torch.addmm in graph_targets(add_update, y, s, d, 3)
    assert shards.ADD_GROUPS not in graph_targets(add_update, y, s, leaf(R, 16), 3)


@pytest.mark.parametrize(("dtype", "m"), [(torch.float32, 8), (torch.float64, 4)])
def test_groups_shorter_than_a_vector_are_one_call(dtype: torch.dtype, m: int) -> None:
    """As plain operations Inductor adds them value by value."""
    operands = [leaf(MANY, OUT, dtype=dtype), leaf(MANY, R, dtype=dtype), leaf(R, m, dtype=dtype)]
    function = lambda y, s, d: add_update(y, s, d, 3)  # noqa: E731
    assert shards.ADD_GROUPS in graph_targets(function, *operands)
    assert_as_eager(function, operands, units=4)
    assert torch.equal(compiled(function)(*operands), function(*operands))


def test_a_region_of_autocast_decides_the_dtypes_of_bat() -> None:
    x, weight, block = leaf(MANY, IN), leaf(OUT, IN), leaf(OUT // R, R, R)

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return bat.bat_linear(x, weight, None, [block], False)

    assert compiled(run)(x).dtype == run(x).dtype == torch.bfloat16
    assert max_error(compiled(run)(x), run(x)) < 0.05


def test_an_exported_graph_needs_no_library() -> None:
    model = nn.Sequential(nn.Linear(IN, OUT), nn.Linear(OUT, IN)).bfloat16()
    for index, init_weights in enumerate((True, "bat")):
        mc.adapt(model, mc.MissConfig(r=R, init_weights=init_weights, target_modules=[str(index)]), adapter_name=f"a{index}")
    mc.set_adapter(model, ["a0", "a1"])
    x = torch.randn(MANY, IN).bfloat16()
    for strict in (False, True):
        program = torch.export.export(fill_blocks(model), (x,), strict=strict)
        targets = {str(node.target) for node in program.graph.nodes}
        assert any("addmm" in target for target in targets)
        assert not any("misscompile" in target for target in targets)


@pytest.mark.parametrize("init_weights", [True, "mini", "bat"])
def test_blocks_of_a_16_bit_model_are_read_by_operators_alone(init_weights: Any) -> None:
    """A cast of a block would be a kernel of its own, forward and backward, and its result would be kept."""
    model = two_linears(init_weights)
    graphs: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    run = torch.compile(model, backend=backend, fullgraph=True)
    run(torch.randn(MANY, IN).bfloat16().requires_grad_()).sum().backward()
    assert len(graphs) == 2
    nodes = [node for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("misscompile" in str(node.target) for node in nodes) >= 4
    casts = [node.meta["val"].shape for node in nodes if "_to_copy" in str(node.target)]
    assert all(MANY in shape for shape in casts)  # the gradient of a float32 sum, which fuses


def test_a_tensor_subclass_takes_plain_operations() -> None:
    class Wrapped(Tensor):
        pass

    y = leaf(MANY, OUT, dtype=torch.bfloat16).detach()
    assert not device.takes_operators(y)  # eager
    for given, expected in ((y, True), (y.as_subclass(Wrapped), False)):
        torch._dynamo.reset()
        answers: list[bool] = []
        torch.compile(lambda x, answers=answers: answers.append(device.takes_operators(x)), backend="eager")(given)
        assert answers == [expected]


@pytest.mark.parametrize("init_weights", [True, "mini", "bat"])
def test_a_compiled_transform_takes_plain_operations(init_weights: Any) -> None:
    """Of a block in a later layer too: its input depends on the blocks before it."""
    model = two_linears(init_weights)
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    x = torch.randn(2, MANY, IN).bfloat16()

    def loss(values: dict[str, Tensor]) -> Tensor:
        output: Tensor = torch.func.functional_call(model, values, (x,))
        return output.float().square().mean()

    def each(x: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (x,))  # type: ignore[no-any-return]

    expected, found = torch.func.grad(loss)(values), compiled(torch.func.grad(loss))(values)
    for name in (name for name in values if "miss" in name):
        assert max_error(found[name], expected[name]) <= 0.01 * float(expected[name].abs().max())
    torch._dynamo.reset()
    batched = torch.compile(torch.func.vmap(each), backend="aot_eager", fullgraph=True)(x)
    assert max_error(batched, each(x)) <= 0.02 * float(batched.abs().max())


@pytest.mark.parametrize(
    ("out_features", "m", "width"), [(768, 8, 64), (130, 2, 130), (104, 8, 104), (48, 4, 48), (192, 3, 96), (96, 1, 1)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_are_added_and_summed_whatever_they_are_widened_to(
    out_features: int, m: int, width: int, dtype: torch.dtype
) -> None:
    y, update = leaf(2, MANY, out_features, dtype=dtype), leaf(2, MANY, m)
    assert device.group_width(y, m) == width
    assert device.group_width(y[:, :1], m) == m  # few tokens
    z = shards.add_groups(y, update)
    assert torch.equal(z, y + update.to(dtype).repeat(1, 1, out_features // m))
    cotangent = torch.randn(2, MANY, out_features).to(dtype)
    dy, dupdate = torch.autograd.grad(z, [y, update], cotangent)
    expected = cotangent.double().view(2, MANY, -1, m).sum(2)
    assert torch.equal(dy, cotangent)
    for ours in (dupdate, shards._groups_gradient(cotangent, m, torch.float32)):
        assert ours.dtype == torch.float32
        assert max_error(ours, expected) <= 2 * torch.finfo(dtype).eps * float(expected.abs().max())
