"""Sections `compile` and `fusion`: guards, graphs, compile time, and the generated kernel that computes a shard sum."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache, run_and_get_code
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import misscompile as mc
from misscompile.benchmark.contestants import BASE, Contestant, build_model, contestants
from misscompile.benchmark.settings import VARIANTS, Settings
from misscompile.benchmark.tables import Row, Table, change, columns, ratio, seconds, text
from misscompile.benchmark.timing import Trial, ratios, spread, take_turns
from misscompile.benchmark.training import TrainingStep, line_up

TOKENS = 64  # the guards, the graphs and the time to compile do not depend on them, the time of the step does

KERNEL = re.compile(r"^(\w+?_fused_?(\w*)_\d+) = async_compile\.", re.MULTILINE)
PRODUCER = "rsqrt"  # of the norm, and in no other kernel
SHARD_SUM = "sum"  # the norm takes a mean


def count_table(settings: Settings) -> Table:
    """Guards, graphs and recompilations of every contestant."""
    model, dtype = settings.model_of("yardstick-4"), settings.dtypes[0]
    steps = line_up(build_model(model, dtype, settings.device), contestants(settings), settings, TOKENS)
    rows = [_count(entry, step) for entry, step in steps.items()]
    for row in rows:
        row["guards_over_base"] = row["guards"] / rows[0]["guards"] - 1
    note = (
        f"`{model}`, {dtype}, r {settings.r}. Guards: nodes of Dynamo's guard tree. "
        "Recompiles: graphs compiled in further steps of the same shape; then with the adapter off, and on again."
    )
    shown = columns(text, contestant="contestant") + columns(str, guards="guards")
    shown += columns(change, guards_over_base="over the base") + columns(str, graphs="graphs", breaks="graph breaks")
    shown += columns(str, recompiles="recompiles", recompiles_off="adapter off", recompiles_on="on again")
    return Table("guards", "Guards, graphs and recompiles", note, shown, rows)


def _count(entry: Contestant, eager: TrainingStep) -> Row:
    torch._dynamo.reset()
    step = eager.compiled("eager")  # guards and graphs are Dynamo's, whatever compiles the graph
    graphs, breaks = count_graphs(step)
    row: Row = {"contestant": entry.label, "graphs": graphs, "breaks": breaks, "guards": step.guards()}
    row["recompiles"], _ = count_graphs(step)
    if entry != BASE:
        model: Any = step.model.get_submodule("model")
        with mc.disable_adapter(model) if entry.provider == "misscompile" else model.disable_adapter():
            row["recompiles_off"], _ = count_graphs(step)
        row["recompiles_on"], _ = count_graphs(step)
    return row


def count_graphs(step: TrainingStep) -> tuple[int, int]:
    """The graphs that Dynamo compiles while `step` runs once, and the breaks between them."""
    counters.clear()
    step.clear().run()
    return int(counters["stats"]["unique_graphs"]), int(sum(counters["graph_break"].values()))


def time_table(settings: Settings) -> Table:
    """Seconds to compile each of misscompile's contestants, beside the base."""
    model, dtype, rounds = settings.model_of("yardstick"), settings.dtypes[0], max(2, settings.rounds // 4)
    entries = [entry for entry in contestants(settings) if entry.provider != "peft"]
    steps = line_up(build_model(model, dtype, settings.device), entries, settings, TOKENS)
    trials = {entry.label: Trial(step.clear, _compile_anew) for entry, step in steps.items()}
    taken = take_turns(trials, rounds, settings.device, warmup=0)
    base = taken[BASE.label]
    rows = [{"contestant": label, "seconds": spread(own), "ratio": ratios(own, base)} for label, own in taken.items()]
    note = (
        f"`{model}`, {dtype}, r {settings.r}, {rounds} rounds. The first step, forward and backward, with "
        "every cache of the compiler empty."
    )
    shown = columns(text, contestant="contestant") + columns(seconds, seconds="s")
    shown += columns(ratio, ratio="ratio to the base")
    return Table("compile", "Compile time", note, shown, rows)


def _compile_anew(step: TrainingStep) -> None:
    torch._dynamo.reset()
    with fresh_cache():
        step.compiled("inductor").run()


def fusion(settings: Settings) -> list[Table]:
    """One table, read and not timed: a row for each variant that has a shard sum, in the first dtype."""
    features = settings.r * max(2, 768 // settings.r)  # a width that every rank divides, of the size of the yardstick's
    codes = {variant: _forward_code(variant, features, settings) for variant in settings.variants if variant != "bat"}
    rows = [{"dtype": settings.dtypes[0], "variant": variant, **describe_kernels(code)} for variant, code in codes.items()]
    note = (
        f"RMSNorm, then q and k of {features} features, {settings.tokens} tokens, r {settings.r}: the kernels "
        "that Inductor generates for the forward. bat has no shard sum."
    )
    shown = columns(text, dtype="base", variant="variant", sum_kernels="kernels with the shard sum")
    shown += columns(lambda fused: "yes" if fused else "no", fused="in the norm's kernel")
    shown += columns(lambda names: str(len(names)), kernels="kernels in all")
    return [Table("fusion", "The shard sum in generated code", note, shown, rows)]


def _forward_code(variant: str, features: int, settings: Settings) -> str:
    """What Inductor generates for the forward of an RMSNorm and of two projections with `variant`, in training."""
    torch.manual_seed(0)
    dtype = getattr(torch, settings.dtypes[0])
    linears = {name: nn.Linear(features, features, bias=False) for name in ("q_proj", "k_proj")}
    layers = nn.ModuleDict({"norm": LlamaRMSNorm(features), **linears}).to(settings.device, dtype)
    fields: dict[str, Any] = {"r": settings.r, "mini_r": settings.mini_r, "init_weights": VARIANTS[variant]}
    mc.adapt(layers, {**fields, "target_modules": ["q_proj", "k_proj"]})

    @torch.compile(dynamic=False)
    def project(x: Tensor) -> tuple[Tensor, Tensor]:
        normed = layers["norm"](x)
        return layers["q_proj"](normed), layers["k_proj"](normed)

    x = torch.randn(settings.tokens, features, device=settings.device, dtype=dtype, requires_grad=True)
    with fresh_cache():  # code that comes from a cache is not generated again and would not be seen
        _, (code,) = run_and_get_code(project, x)
    return str(code)


def describe_kernels(code: str) -> Row:
    """The generated kernels in `code`, those that hold a shard sum, and whether each of these also holds the norm."""
    kernels = {name: set(ops.split("_")) for name, ops in KERNEL.findall(code)}
    sums = [name for name, ops in kernels.items() if SHARD_SUM in ops]
    fused = all(PRODUCER in kernels[name] for name in sums) if sums else None
    return {"kernels": list(kernels), "sum_kernels": sums, "fused": fused}
