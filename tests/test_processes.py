"""Several processes train one model: DDP, FSDP1, FSDP2 (`fully_shard`) and tensor parallel, each held against one process.

Two gloo processes run every function of `SCENARIOS` in turn, since starting them takes longer than all of them together.
"""

from __future__ import annotations

import copy
import datetime
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from support import VARIANTS, Trap, adapted, blocks_of, fields, fill_blocks, max_error, picture, shake, with_deltas
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing, checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from zoo import seeded, tiny_llama

import misscompile as mc
from misscompile.hosts.base import Fold  # internal: an error is raised in the middle of a merge
from misscompile.record.state import STATE

WEIGHTS = "adapter_model.safetensors"


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(24, 16)
        self.down = nn.Linear(16, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))  # type: ignore[no-any-return]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)  # type: ignore[no-any-return]


plain = seeded(lambda: Net().double())


def inputs(rank: int | None = None) -> Tensor:
    """A batch of four, or the half of one process."""
    x = torch.randn(4, 3, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return x if rank is None else x[2 * rank : 2 * rank + 2]


def shard(model: nn.Module) -> nn.Module:
    for layer in model.layers:  # type: ignore[union-attr]
        fully_shard(layer)
    return fully_shard(model)


def tensor_parallel(model: nn.Module) -> nn.Module:
    plan: Any = {"layers.*.up": ColwiseParallel(), "layers.*.down": RowwiseParallel()}
    return parallelize_module(model, init_device_mesh("cpu", (2,)), plan)


def values(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[no-any-return]


def refused(kind: type[Exception], call: Callable[[], Any], *words: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    for word in words:
        assert word in str(caught.value), str(caught.value)


def check_gradients(model: nn.Module, expected: nn.Module) -> None:
    expected(inputs()).square().mean().backward()
    found = {name.replace("module.", ""): p.grad for name, p in model.named_parameters() if "miss_block" in name}
    for name, block in blocks_of(expected).items():
        assert block.grad is not None
        assert block.grad.abs().max() > 1e-6
        assert max_error(values(found[name]), block.grad) < 1e-12, name


def check_saved(model: nn.Module, one: nn.Module, folder: Path) -> None:
    """Every process saves, and the folder is the one that a single process writes."""
    mc.save_adapter(model, folder / "many")
    mc.save_adapter(one, folder / f"one{dist.get_rank()}")
    many, single = (load_file(folder / name / WEIGHTS) for name in ("many", f"one{dist.get_rank()}"))
    assert many.keys() == single.keys()
    cut = {} if mc.adapters(one)["default"].variant != "bat" else {"rank": 3}
    mc.save_as_lora(model, folder / "lora", **cut)
    mc.save_as_lora(one, folder / f"lora{dist.get_rank()}", **cut)
    lora, expected = (load_file(folder / name / WEIGHTS) for name in ("lora", f"lora{dist.get_rank()}"))
    assert all(torch.equal(lora[key], expected[key]) for key in expected | lora)
    assert all(torch.equal(many[key], single[key]) for key in single)


def check_swap_and_merge(model: nn.Module, init_weights: Any, folder: Path) -> None:
    """`model` is spread over the processes, and its adapter is `adapted`'s: swap it, merge it, undo that, merge for good."""
    other = fill_blocks(adapted(plain(), init_weights), seed=9)
    if dist.get_rank() == 0:
        mc.save_adapter(other, folder / "other")
    dist.barrier()
    mc.hotswap_adapter(model, folder / "other")
    expected = with_deltas(plain(), other, default=init_weights)(inputs())
    base = plain()(inputs())
    assert max_error(values(model(inputs())), expected) < 1e-12
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fold, "write", Trap(at=2, error=OSError("in the middle")).guard(Fold.write))
        refused(OSError, lambda: mc.merge(model, keep_adapters=True), "in the middle")
    assert not any(vars(module)[STATE].kept for module in model.modules() if STATE in vars(module))
    assert max_error(values(model(inputs())), expected) < 1e-12
    mc.merge(model, keep_adapters=True)
    assert max_error(values(model(inputs())), expected) < 1e-12
    with mc.disable_adapter(model):
        assert max_error(values(model(inputs())), base) < 1e-12
    mc.unmerge(model)
    assert max_error(values(model(inputs())), expected) < 1e-12
    mc.merge(model)
    for _ in range(2):
        assert max_error(values(model(inputs())), expected) < 1e-12
    assert model.state_dict().keys() == plain().state_dict().keys()


# What every process runs


def ddp(folder: Path, init_weights: Any) -> None:
    model = DistributedDataParallel(adapted(plain(), init_weights))
    model(inputs(dist.get_rank())).square().mean().backward()
    check_gradients(model, adapted(plain(), init_weights))
    check_saved(model, adapted(plain(), init_weights), folder)


def fsdp2(folder: Path, init_weights: Any) -> None:
    model = adapted(plain(), init_weights)
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Layer))
    shard(model)
    model(inputs(dist.get_rank())).square().mean().backward()
    expected = adapted(plain(), init_weights)
    expected(inputs()).square().mean().backward()
    grads = {name.replace("_checkpoint_wrapped_module.", ""): p.grad for name, p in blocks_of(model).items()}
    for name, block in blocks_of(expected).items():
        assert max_error(values(grads[name]), block.grad) < 1e-12  # type: ignore[arg-type]
    check_saved(model, adapted(plain(), init_weights), folder)
    check_swap_and_merge(model, init_weights, folder)


def tensor_parallelism(folder: Path, init_weights: Any) -> None:
    model = tensor_parallel(adapted(plain(), init_weights))
    model(inputs()).square().mean().backward()
    check_gradients(model, adapted(plain(), init_weights))
    check_saved(model, adapted(plain(), init_weights), folder)
    check_swap_and_merge(model, init_weights, folder)


def trained_in_full(folder: Path) -> None:
    """Biases and modules to save, which are copies beside the base's own tensors."""
    one, other = (
        shake(adapted(plain(), target_modules=["up"], modules_to_save=["head"], bias="MiSS_only")) for _ in range(2)
    )
    makes: tuple[Callable[[nn.Module], nn.Module], ...] = (shard, tensor_parallel, DistributedDataParallel)
    for number, make in enumerate(makes):
        model, x = make(copy.deepcopy(other)), inputs(None if make is tensor_parallel else dist.get_rank())
        (folder / str(number)).mkdir(exist_ok=True)
        for _ in range(2):
            model.zero_grad()
            model(x).square().mean().backward()
        one.zero_grad()
        one(inputs()).square().mean().backward()
        found = {name.removeprefix("module."): p for name, p in model.named_parameters()}
        for name, parameter in mc.trainable_parameters(one):
            assert parameter.grad is not None
            assert max_error(values(found[name].grad), parameter.grad) < 1e-12, (name, make)
        mc.save_adapter(model, folder / str(number) / "many")
        mc.save_adapter(one, folder / str(number) / f"one{dist.get_rank()}")
        many, single = (load_file(folder / str(number) / kind / WEIGHTS) for kind in ("many", f"one{dist.get_rank()}"))
        assert len(single) == 6
        assert many.keys() == single.keys()
        assert all(torch.equal(many[key], single[key]) for key in single)
        expected = one(inputs())
        mc.merge(model)
        assert max_error(values(model(inputs())), expected) < 1e-12
        assert {name.removeprefix("module.") for name in model.state_dict()} == plain().state_dict().keys()


def fsdp1(folder: Path, init_weights: Any) -> None:
    model = FullyShardedDataParallel(adapted(plain(), init_weights), use_orig_params=True, device_id=torch.device("cpu"))
    model(inputs(dist.get_rank())).square().mean().backward()
    for verb in (lambda: mc.save_adapter(model, folder / "many"), lambda: mc.merge(model)):
        refused(mc.StateError, verb, "FSDP1", "summon_full_params")
    refused(mc.CheckpointError, lambda: mc.save_adapter(model.module, folder / "many"), "needs", "gather")
    refused(mc.StateError, lambda: mc.adapt(model, fields(), "second"), "FSDP1", "Adapt the model first")
    assert not (folder / "many").exists()
    dist.barrier()
    with FullyShardedDataParallel.summon_full_params(model):
        check_saved(model, adapted(plain(), init_weights), folder)
        mc.merge(model)
    expected = with_deltas(plain(), adapted(plain(), init_weights), default=init_weights)
    with FullyShardedDataParallel.summon_full_params(model):
        merged = {name: parameter.detach().clone() for name, parameter in model.module.named_parameters()}
    assert all(max_error(merged[name], parameter) < 1e-12 for name, parameter in expected.named_parameters())


def a_half_precision_base(folder: Path) -> None:
    """FSDP2 without a policy of its own leaves the blocks in float32, beside a base that is in bfloat16."""
    for init_weights in VARIANTS:
        one = adapted(plain().bfloat16(), init_weights)
        model, seen = shard(copy.deepcopy(one)), []
        up = model.layers[0].up  # type: ignore[index, union-attr]
        up.register_forward_hook(lambda module, *_, seen=seen: seen.append(module.miss_block_default.dtype))
        model(inputs(dist.get_rank()).bfloat16()).float().square().mean().backward()
        one(inputs().bfloat16()).float().square().mean().backward()
        assert seen == [torch.float32]
        for name, block in blocks_of(model).items():
            expected = blocks_of(one)[name].grad
            assert expected is not None
            assert max_error(values(block.grad), expected) < 1e-2 * float(expected.abs().max()), name


def adapting_too_late(folder: Path) -> None:
    saved = adapted(plain())
    mc.save_adapter(saved, folder / f"saved{dist.get_rank()}")
    verbs: tuple[Callable[[nn.Module], Any], ...] = (
        lambda model: mc.adapt(model, fields(), "second"),
        lambda model: mc.load_adapter(model, folder / f"saved{dist.get_rank()}", "second", is_trainable=True),
        lambda model: mc.adapt(model, fields(target_modules=["head"], modules_to_save=["layers"]), "second"),
    )
    for make, word in (
        (DistributedDataParallel, "DistributedDataParallel"),
        (shard, "fully_shard"),
        (tensor_parallel, "tensor"),
    ):
        for verb in verbs:
            model = make(adapted(plain()))
            names = [name for name, _ in model.named_parameters()]
            refused(mc.StateError, lambda verb=verb, model=model: verb(model), word, "Adapt the model first")  # type: ignore[misc]
            assert [name for name, _ in model.named_parameters()] == names
    # blocks that do not train are right beside FSDP2
    model = mc.load_adapter(shard(plain()), folder / f"saved{dist.get_rank()}")
    expected = with_deltas(plain(), saved, default=True)(inputs())
    assert max_error(model(inputs()), expected) < 1e-12


def switching(folder: Path) -> None:
    def two() -> nn.Module:
        return fill_blocks(mc.adapt(adapted(plain()), fields("mini"), "second"))

    model = DistributedDataParallel(two())
    refused(mc.StateError, lambda: mc.set_adapter(model, "default"), "DistributedDataParallel")
    assert mc.active_adapters(model) == ("second",)
    assert all(p.requires_grad == ("second" in name) for name, p in model.named_parameters())
    model, one = shard(two()), two()
    model(inputs(dist.get_rank())).square().mean().backward()
    mc.set_adapter(model, "default")
    mc.set_adapter(one, "default")
    model.zero_grad()
    model(inputs(dist.get_rank())).square().mean().backward()
    one(inputs()).square().mean().backward()
    found = blocks_of(model)
    for name, block in blocks_of(one).items():
        assert (block.grad is None) == (found[name].grad is None) == ("second" in name)
        assert block.grad is None or max_error(values(found[name].grad), block.grad) < 1e-12
    mc.delete_adapter(model, "default")
    model(inputs())
    assert not any("default" in name for name in model.state_dict())
    mc.set_adapter(model, "second")
    mc.unload(model)
    assert max_error(model(inputs()), plain()(inputs())) < 1e-12
    assert model.state_dict().keys() == plain().state_dict().keys()


def many_savers(folder: Path) -> None:
    model = adapted(plain())
    for round_ in range(20):
        dist.barrier()
        mc.save_adapter(model, folder / str(round_))
        assert sorted(path.name for path in (folder / str(round_)).iterdir()) == ["adapter_config.json", WEIGHTS]
    dist.barrier()
    assert sorted(path.name for path in folder.iterdir()) == sorted(map(str, range(20)))


SCENARIOS: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {
    f"{function.__name__}-{init_weights}": (function, (init_weights,))
    for function in (ddp, fsdp1, fsdp2, tensor_parallelism)
    for init_weights in VARIANTS
} | {
    function.__name__: (function, ())
    for function in (trained_in_full, a_half_precision_base, adapting_too_late, switching, many_savers)
}


def run_process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    outcomes = {}
    for name, (function, arguments) in SCENARIOS.items():  # a group each: what one leaves unfinished disturbs no other
        store, patience = dist.FileStore(str(folder / f"{name}.store"), 2), datetime.timedelta(seconds=20)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=patience)
        try:
            (folder / name).mkdir(exist_ok=True)
            dist.barrier()
            function(folder / name, *arguments)
            outcomes[name] = ""
        except Exception:  # noqa: BLE001 - whatever it is, the test shows it
            outcomes[name] = traceback.format_exc()
        dist.destroy_process_group()
    (folder / f"outcomes{rank}").write_bytes(pickle.dumps(outcomes))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(run_process, args=(folder,), nprocs=2)
    return [pickle.loads((folder / f"outcomes{rank}").read_bytes()) for rank in range(2)]


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_do_what_one_does(name: str, outcomes: list[dict[str, str]]) -> None:
    for rank, found in enumerate(outcomes):
        assert not found[name], f"process {rank}: {found[name]}"


# What one process shows


class DeepSpeedEngine(nn.Module):
    """Stands for DeepSpeed's, which is told by its name."""

    __module__ = "deepspeed.runtime.engine"

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def checkpoint_layers(model: nn.Module) -> nn.Module:
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Layer))
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "average": AveragedModel,
    "DeepSpeed": DeepSpeedEngine,
    "checkpointed layers": checkpoint_layers,
    "all of them": lambda model: DeepSpeedEngine(AveragedModel(checkpoint_wrapper(checkpoint_layers(model)))),
}


@pytest.mark.parametrize("targets", ["all-linear", ["up"], ["layers.1.down"]], ids=str)
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_folder_has_no_name_that_a_wrapper_adds(tmp_path: Path, wrap: Callable[..., nn.Module], targets: Any) -> None:
    one = adapted(plain(), target_modules=targets)
    mc.save_adapter(one, tmp_path / "one")
    mc.save_adapter(wrap(copy.deepcopy(one)), tmp_path / "wrapped")
    for name in (WEIGHTS, "adapter_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "wrapped" / name).read_bytes()
    loaded = mc.load_adapter(wrap(plain()), tmp_path / "one")
    assert [block.shape for block in blocks_of(loaded).values()] == [block.shape for block in blocks_of(one).values()]


@pytest.mark.parametrize("segment", ["_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_keys_with_the_segments_of_wrappers_are_read(tmp_path: Path, segment: str) -> None:
    one = adapted(plain())
    mc.save_adapter(one, tmp_path)
    found = load_file(tmp_path / WEIGHTS)
    save_file({key.replace(".up.", f".{segment}.up."): value for key, value in found.items()}, tmp_path / WEIGHTS)
    loaded = blocks_of(mc.load_adapter(plain(), tmp_path))
    assert all(torch.equal(loaded[name], block) for name, block in blocks_of(one).items())


def resize_embeddings(model: nn.Module) -> None:
    model.resize_token_embeddings(model.config.vocab_size + 3)  # type: ignore[operator, union-attr]


@pytest.mark.parametrize(
    ("change", "rules", "words"),
    [
        (resize_embeddings, {"target_modules": ["lm_head", "q_proj"]}, ["lm_head", "resize_token_embeddings"]),
        (resize_embeddings, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, ["lm_head", "after adapting"]),
        (resize_embeddings, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, ["embed_tokens"]),
    ],
    ids=["block", "saved head", "saved embedding"],
)
def test_a_model_that_was_resized_after_adapting_is_not_saved(
    tmp_path: Path, change: Callable[[nn.Module], None], rules: dict[str, Any], words: list[str]
) -> None:
    model = adapted(tiny_llama(tie_word_embeddings=False), **rules)
    change(model)
    refused(mc.CheckpointError, lambda: mc.save_adapter(model, tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


def partition(model: nn.Module) -> nn.Module:
    """Leave of each parameter what DeepSpeed ZeRO-3 leaves: no values, and the shape under another name."""
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]
        parameter.data = torch.empty(0, dtype=parameter.dtype)
    return model


def test_what_zero_3_holds_in_parts_is_refused_by_name(tmp_path: Path) -> None:
    model = adapted(plain())
    mc.save_adapter(model, tmp_path / "whole")
    partition(model)
    for verb in (
        lambda: mc.save_adapter(model, tmp_path / "parts"),
        lambda: mc.save_as_lora(model, tmp_path / "parts"),
        lambda: mc.merge(model),
        lambda: mc.hotswap_adapter(model, tmp_path / "whole"),
    ):
        refused(mc.StateError, verb, "ZeRO-3", "GatheredParameters")
    assert not (tmp_path / "parts").exists()
    base = partition(plain())
    before = picture(base)
    for verb in (lambda: mc.adapt(base, fields()), lambda: mc.load_adapter(base, tmp_path / "whole")):
        refused(mc.StateError, verb, "layers.0.up", "ZeRO-3", "Adapt the model first")
    assert picture(base) == before


def test_deepspeeds_engine_takes_no_new_adapter() -> None:
    engine = DeepSpeedEngine(plain())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        refused(mc.StateError, lambda: mc.adapt(engine, fields()), "DeepSpeedEngine", "Adapt the model first")
    finally:
        dist.destroy_process_group()
    assert not blocks_of(engine)
