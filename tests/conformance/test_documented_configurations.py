"""The configurations that documentation and examples of MiSS give, each on a tiny model of the architecture it is for."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from support import max_error, reference_delta
from torch import Tensor, nn
from zoo import token_batch

import misscompile as mc

pytestmark = pytest.mark.filterwarnings("error::misscompile.MissWarning")

LAYERS = range(2)


def llama(layers: int = 2) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=64, max_position_embeddings=32, initializer_range=0.1)
    return LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=64, n_positions=32, initializer_range=0.1)
    return GPT2LMHeadModel(config).eval()


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = BertConfig(**sizes, vocab_size=64, max_position_embeddings=32, num_labels=3, initializer_range=0.2)
    return BertForSequenceClassification(config).eval()


def _tokens() -> dict[str, Tensor]:
    return {"input_ids": token_batch(), "labels": token_batch()}


def _classes() -> dict[str, Tensor]:
    return {"input_ids": token_batch(), "labels": torch.tensor([0, 2])}


def blocks(model: nn.Module) -> dict[str, nn.Parameter]:
    end = ".miss_block_default"
    return {name.removesuffix(end): p for name, p in mc.trainable_parameters(model) if name.endswith(end)}


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(block.shape) for name, block in blocks(model).items()}


def start(base: nn.Module, fields: dict[str, Any], batch: dict[str, Tensor]) -> nn.Module:
    """`base` adapted; its output is that of the base, bit for bit."""
    with torch.no_grad():
        expected = base(**batch).logits
        model = mc.adapt(base, mc.MissConfig(**fields)).eval()
        assert torch.equal(model(**batch).logits, expected)
    return model


def train(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """One step of training lowers the loss and moves every block."""
    before = {name: block.detach().clone() for name, block in blocks(model).items()}
    with torch.no_grad():
        first = float(model.eval()(**batch).loss)
    optimizer = torch.optim.SGD([parameter for _, parameter in mc.trainable_parameters(model)], lr=1e-3)
    model.train()(**batch).loss.backward()
    optimizer.step()
    with torch.no_grad():
        assert float(model.eval()(**batch).loss) < first
    assert all(not torch.equal(block, before[name]) for name, block in blocks(model).items())


def assert_as_peft(make: nn.Module, fields: dict[str, Any], model: nn.Module, batch: dict[str, Tensor]) -> None:
    """PEFT chooses the same modules, and with the values of `model` it has the output of `model`."""
    theirs = peft.get_peft_model(make, peft.MissConfig(**fields)).eval()
    end, ours = ".miss_block.default", blocks(model)
    reference = {n.removeprefix("base_model.model.").removesuffix(end): p for n, p in theirs.named_parameters() if end in n}
    assert {name: tuple(block.shape) for name, block in reference.items()} == shapes(model)
    with torch.no_grad():
        for name, block in reference.items():
            ours[name].normal_(std=0.03)
            block.copy_(ours[name])
        expected = theirs(**batch).logits
        assert max_error(model(**batch).logits, expected) <= 1e-5 * float(expected.abs().max())


def assert_as_the_formulas(plain: nn.Module, fields: dict[str, Any], model: nn.Module, batch: dict[str, Tensor]) -> None:
    """For GPT-2, on which PEFT raises a TypeError: the output of `plain` with `W + ΔW` as its weights."""
    with pytest.raises(TypeError):
        peft.get_peft_model(gpt2(), peft.MissConfig(**fields))
    with torch.no_grad():
        for name, block in blocks(model).items():
            block.normal_(std=0.03)
            weight = plain.get_submodule(name).weight  # (in, out)
            weight += reference_delta(fields.get("init_weights", True), block, weight.T).T.float()
        expected = plain(**batch).logits
        assert max_error(model(**batch).logits, expected) <= 1e-5 * float(expected.abs().max())


def of_gpt2(**out_features: int) -> dict[str, int]:
    """Module name to a size, in each layer."""
    return {f"transformer.h.{i}.{name.replace('__', '.')}": size for i in LAYERS for name, size in out_features.items()}


def of_llama(*names: str, layers: Any = LAYERS) -> set[str]:
    return {f"model.layers.{i}.{'mlp' if name in MLP else 'self_attn'}.{name}" for i in layers for name in names}


ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
OUT = {"q_proj": 64, "k_proj": 32, "v_proj": 32, "o_proj": 64, "gate_proj": 96, "up_proj": 96, "down_proj": 64}


def balance_shapes(r: int, names: set[str]) -> dict[str, tuple[int, ...]]:
    return {name: (r, OUT[name.rsplit(".", 1)[-1]]) for name in names}


def test_gpt2_attention_and_projections() -> None:
    fields = {"r": 64, "target_modules": ["c_attn", "c_proj"]}
    model = start(gpt2(), fields, _tokens())
    out = of_gpt2(attn__c_attn=192, attn__c_proj=64, mlp__c_proj=64)
    assert shapes(model) == {name: (64, size) for name, size in out.items()}
    train(model, _tokens())
    assert_as_the_formulas(gpt2(), fields, model, _tokens())


def test_mini_on_query_and_value() -> None:
    fields = {"r": 32, "mini_r": 4, "miss_dropout": 0.1, "init_weights": "mini", "target_modules": ["q_proj", "v_proj"]}
    model = start(llama(), fields, _tokens())
    assert shapes(model) == dict.fromkeys(of_llama("q_proj", "v_proj"), (32, 4))
    train(model, _tokens())
    assert_as_peft(llama(), fields, model, _tokens())


def test_bat_with_dropout_on_the_fused_attention() -> None:
    fields = {"r": 64, "miss_dropout": 0.05, "init_weights": "bat", "target_modules": ["attn.c_attn"]}
    model = start(gpt2(), fields, _tokens())
    assert shapes(model) == dict.fromkeys(of_gpt2(attn__c_attn=192), (3, 64, 64))
    train(model, _tokens())
    assert_as_the_formulas(gpt2(), fields, model, _tokens())


def test_an_expression_and_excludes() -> None:
    """Both excludes name modules of the model: no mistake, although the expression leaves them out by itself."""
    fields = {"r": 16, "target_modules": r".*\.(q_proj|v_proj)$", "exclude_modules": ["lm_head", "embed_tokens"]}
    model = start(llama(), fields, _tokens())
    assert shapes(model) == balance_shapes(16, of_llama("q_proj", "v_proj"))
    train(model, _tokens())
    assert_as_peft(llama(), fields, model, _tokens())


def test_all_linear_with_a_mini_r_that_has_no_effect() -> None:
    fields = {"r": 32, "mini_r": 2, "target_modules": "all-linear"}
    model = start(llama(), fields, _tokens())
    assert shapes(model) == balance_shapes(32, of_llama(*ATTENTION, *MLP))
    train(model, _tokens())
    assert_as_peft(llama(), fields, model, _tokens())


def test_some_layers() -> None:
    fields = {"target_modules": list(ATTENTION), "layers_to_transform": [0, 1, 2], "layers_pattern": "layers", "r": 16}
    model = start(llama(4), fields, _tokens())
    assert shapes(model) == balance_shapes(16, of_llama(*ATTENTION, layers=range(3)))
    train(model, _tokens())
    assert_as_peft(llama(4), fields, model, _tokens())


def test_a_sequence_classifier_with_its_head_and_biases() -> None:
    fields = {
        **{"r": 16, "target_modules": ["query", "value"], "modules_to_save": ["classifier"]},
        **{"bias": "MiSS_only", "task_type": "SEQ_CLS"},
    }
    model = start(bert(), fields, _classes())
    adapted = {f"bert.encoder.layer.{i}.attention.self.{name}" for i in LAYERS for name in ("query", "value")}
    assert shapes(model) == dict.fromkeys(adapted, (16, 32))
    trained = {name for name, _ in mc.trainable_parameters(model)}
    assert trained == {
        *(f"{name}.{own}" for name in adapted for own in ("miss_block_default", "miss_copy_default_bias")),
        *(f"classifier.miss_copy_default_{own}" for own in ("weight", "bias")),
    }
    plain = bert()
    assert_as_peft(bert(), fields, model, _classes())
    train(model, _classes())
    parameters = dict(model.named_parameters())
    for name in adapted:
        base = plain.get_submodule(name).bias
        assert torch.equal(parameters[f"{name}.bias"], base)
        assert not torch.equal(parameters[f"{name}.miss_copy_default_bias"], base)
    assert not torch.equal(parameters["classifier.miss_copy_default_weight"], plain.classifier.weight)


def test_gpt2_by_partial_paths_with_dropout() -> None:
    fields = {"r": 32, "miss_dropout": 0.1, "target_modules": ["attn.c_attn", "attn.c_proj", "mlp.c_fc"]}
    model = start(gpt2(), fields, _tokens())
    out = of_gpt2(attn__c_attn=192, attn__c_proj=64, mlp__c_fc=256)
    assert shapes(model) == {name: (32, size) for name, size in out.items()}
    train(model, _tokens())
    assert_as_the_formulas(gpt2(), fields, model, _tokens())


def test_a_llama_with_every_field() -> None:
    fields = {
        **{"task_type": "CAUSAL_LM", "inference_mode": False, "r": 16, "miss_dropout": 0.05, "mini_r": 1, "bias": "none"},
        **{"target_modules": [*ATTENTION, *MLP], "exclude_modules": ["lm_head"], "init_weights": True},
        **{"layers_to_transform": None, "layers_pattern": None, "modules_to_save": None},
        **{"base_model_name_or_path": "tiny", "revision": "main"},
    }
    model = start(llama(), fields, _tokens())
    assert shapes(model) == balance_shapes(16, of_llama(*ATTENTION, *MLP))
    assert mc.adapters(model)["default"] == mc.MissConfig(**fields)
    train(model, _tokens())
    assert_as_peft(llama(), fields, model, _tokens())


def test_parameter_counts_of_the_variants_side_by_side() -> None:
    """Per linear: balance `r·out`, mini `r·m`, bat `r·out` too, as `out/r` blocks of `r×r`."""
    r, m, chosen = 16, 4, of_llama(*ATTENTION, *MLP)
    out = [OUT[name.rsplit(".", 1)[-1]] for name in chosen]
    expected = {True: r * sum(out), "bat": sum((o // r) * r * r for o in out), "mini": r * m * len(out)}
    assert expected == {True: 14336, "bat": 14336, "mini": 896}
    for init_weights, count in expected.items():
        fields: dict[str, Any] = {"r": r, "mini_r": m, "init_weights": init_weights, "target_modules": "all-linear"}
        model = start(llama(), fields, _tokens())
        assert sum(block.numel() for block in blocks(model).values()) == count
        assert peft.get_peft_model(llama(), peft.MissConfig(**fields)).get_nb_trainable_parameters()[0] == count
