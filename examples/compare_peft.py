"""Steps of the frozen base, of misscompile and of PEFT's MiSS in turn, as ratios to the frozen base; and what else differs.

    python examples/compare_peft.py [--rounds 12] [--dtype bfloat16] [--tokens 1024]

The frozen base is the same model with all weights frozen and one trainable vector added to the embedding's output, so that
its backward runs through every layer. All candidates take turns within a round; a ratio is the median over rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaModel

import misscompile

VARIANTS: dict[str, bool | str] = {"balance": True, "mini": "mini", "bat": "bat"}
SITES_OF_SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}


class Probe(nn.Module):
    """A model whose input carries a gradient: one trainable vector on the embedding's output."""

    def __init__(self, model: nn.Module, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.shift = nn.Parameter(torch.zeros(hidden, dtype=dtype))

    def forward(self, embedded: Tensor) -> Tensor:
        output: Tensor = self.model(inputs_embeds=embedded + self.shift, use_cache=False).last_hidden_state
        return output


def build(kind: str, dtype: torch.dtype, layers: int, r: int, mini_r: int) -> Probe:
    """The frozen base (`kind` "base"), or it with one variant by one library ("misscompile balance", "peft bat", …)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=layers, num_attention_heads=12, vocab_size=64
    )
    model: nn.Module = LlamaModel(config).to(dtype).requires_grad_(False)
    if kind != "base":
        library, variant = kind.split()
        fields = {"r": r, "mini_r": mini_r, "init_weights": VARIANTS[variant], "target_modules": "all-linear"}
        if library == "misscompile":
            misscompile.adapt(model, fields)
        else:
            model = peft.get_peft_model(model, peft.MissConfig(**fields))
    return Probe(model, config.hidden_size, dtype)


def step(model: Callable[[Tensor], Tensor], embedded: Tensor) -> None:
    """One forward and backward."""
    model(embedded).sum().backward()


def saved_bytes(model: nn.Module, embedded: Tensor) -> int:
    """Bytes of distinct storages that a forward keeps for the backward, parameters left out."""
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(embedded)
    del output
    return sum(kept.values())


def counted_flops(models: dict[str, Probe], kind: str, embedded: Tensor) -> float:
    """Counted FLOPs of a step relative to those of the frozen base; nothing can be faster than them."""
    counts = []
    for name in (kind, "base"):
        with FlopCounterMode(display=False) as counter:
            step(models[name], embedded)
        counts.append(counter.get_total_flops())
    return counts[0] / counts[1]


def measure(steps: dict[str, Callable[[Tensor], Tensor]], embedded: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of every candidate in every round; they take turns, so that a slow moment of the machine hits all."""
    for candidate in steps.values():
        step(candidate, embedded)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, candidate in steps.items():
            start = time.perf_counter()
            step(candidate, embedded)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def adapt_seconds() -> tuple[float, float]:
    """Median seconds to adapt the 210 linears of SmolLM2-135M: misscompile, PEFT."""
    config = {"r": 32, "target_modules": "all-linear"}

    def build_base() -> nn.Module:
        with torch.device("meta"):
            return LlamaModel(LlamaConfig(num_hidden_layers=30, vocab_size=64, **SITES_OF_SMOLLM2))

    ours, theirs = [], []
    for _ in range(6):
        model = build_base()
        start = time.perf_counter()
        misscompile.adapt(model, config)
        ours.append(time.perf_counter() - start)
        model = build_base()
        start = time.perf_counter()
        peft.get_peft_model(model, peft.MissConfig(**config))
        theirs.append(time.perf_counter() - start)
    return statistics.median(ours[1:]), statistics.median(theirs[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="interleaved rounds after the warm-up")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="dtype of the base")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--mini-r", type=int, default=8)
    parser.add_argument("--compile", action="store_true", help="measure torch.compile'd models too")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    embedded = torch.randn(1, options.tokens, 768, dtype=dtype)
    kinds = ["base", *(f"{library} {variant}" for variant in VARIANTS for library in ("misscompile", "peft"))]
    models = {kind: build(kind, dtype, options.layers, options.r, options.mini_r) for kind in kinds}
    runs: dict[str, dict[str, list[float]]] = {"eager": measure(dict(models), embedded, options.rounds)}
    if options.compile:
        compiled = {kind: torch.compile(model, dynamic=False) for kind, model in models.items()}
        runs["compiled"] = measure(compiled, embedded, options.rounds)

    console = Console(width=110)
    console.print(
        f"{options.layers} Llama layers, hidden 768, r {options.r}, {options.tokens} tokens, {options.dtype} base, float32 "
        f"blocks; torch {torch.__version__}, peft {peft.__version__}, {torch.get_num_threads()} threads"
    )
    table = Table(title="training step relative to the frozen base (median of rounds, quartiles)")
    for column in ("", "counted FLOPs", *runs, "saved for backward"):
        table.add_column(column, justify="right" if column else "left")
    kept = {kind: saved_bytes(model, embedded) for kind, model in models.items()}
    for kind in kinds[1:]:
        cells = []
        for seconds in runs.values():
            ratios = [own / base for own, base in zip(seconds[kind], seconds["base"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            cells.append(f"{middle:.2f} ({low:.2f}–{high:.2f})")
        table.add_row(kind, f"{counted_flops(models, kind, embedded):.2f}", *cells, f"{kept[kind] / kept['base'] - 1:+.0%}")
    console.print(table)
    ours, theirs = adapt_seconds()
    console.print(
        f"adapting 210 linears: misscompile {1e3 * ours:.0f} ms, peft {1e3 * theirs:.0f} ms, 1/{theirs / ours:.0f}"
    )


if __name__ == "__main__":
    main()
