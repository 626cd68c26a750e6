"""Which generated kernel computes a shard sum under torch.compile, and whether it stands alone. Read, not timed."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache, run_and_get_code
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import misscompile
from misscompile.benchmark.contestants import INIT_WEIGHTS
from misscompile.benchmark.settings import Settings, dtype_named
from misscompile.benchmark.tables import Column, Row, Table

KERNEL = re.compile(r"^(\w+?_fused_?(\w*)_\d+) = async_compile\.", re.MULTILINE)
PRODUCER = "rsqrt"  # of the norm, and in no other kernel
SHARD_SUM = "sum"  # the norm takes a mean


class NormedPair(nn.Module):
    """An RMSNorm and the two projections that read it."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm = LlamaRMSNorm(features)
        self.q_proj = nn.Linear(features, features, bias=False)
        self.k_proj = nn.Linear(features, features, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """q and k, each `(tokens, features)`, of `x (tokens, features)`."""
        normed = self.norm(x)
        return self.q_proj(normed), self.k_proj(normed)


def run(settings: Settings) -> list[Table]:
    """One table: a row for each variant that has a shard sum, in the first dtype."""
    dtype = settings.dtypes[0]
    rows = [
        {"dtype": dtype, "variant": variant, **describe_kernels(forward_code(variant, dtype, settings))}
        for variant in settings.variants
        if variant != "bat"
    ]
    note = (
        f"RMSNorm, then q and k of {features_of(settings)} features, {settings.tokens} tokens, r {settings.r}: the kernels "
        "that Inductor generates for the forward. bat has no shard sum."
    )
    columns = (
        Column("dtype", "base"),
        Column("variant", "variant"),
        Column(
            "sum_kernels", "kernels with the shard sum", lambda names: ", ".join(f"`{name}`" for name in names) or "none"
        ),
        Column("fused", "in the norm's kernel", lambda fused: "yes" if fused else "no"),
        Column("kernels", "kernels in all", lambda names: str(len(names))),
    )
    return [Table("fusion", "The shard sum in generated code", note, columns, rows)]


def features_of(settings: Settings) -> int:
    """A width that every rank divides, of the size of the yardstick's."""
    return settings.r * max(2, 768 // settings.r)


def forward_code(variant: str, dtype: str, settings: Settings) -> str:
    """What Inductor generates for the forward of a `NormedPair` with `variant`, in training."""
    torch.manual_seed(0)
    features = features_of(settings)
    model = NormedPair(features).to(settings.device, dtype_named(dtype))
    fields: dict[str, Any] = {"r": settings.r, "mini_r": settings.mini_r, "init_weights": INIT_WEIGHTS[variant]}
    misscompile.adapt(model, {**fields, "target_modules": ["q_proj", "k_proj"]})
    x = torch.randn(settings.tokens, features, device=settings.device, dtype=dtype_named(dtype), requires_grad=True)
    compiled = torch.compile(model, dynamic=False)

    def step() -> None:
        q, k = compiled(x)
        (q.sum() + k.sum()).backward()

    with fresh_cache():  # code that comes from a cache is not generated again and would not be seen
        _, codes = run_and_get_code(step)
    return next(code for code in codes if PRODUCER in " ".join(ops for _, ops in KERNEL.findall(code)))


def describe_kernels(code: str) -> Row:
    """The generated kernels in `code`, those that hold a shard sum, and whether each of these also holds the norm."""
    kernels = {name: set(ops.split("_")) for name, ops in KERNEL.findall(code)}
    sums = [name for name, ops in kernels.items() if SHARD_SUM in ops]
    fused = all(PRODUCER in kernels[name] for name in sums) if sums else None
    return {"kernels": list(kernels), "sum_kernels": sums, "fused": fused}
