"""Each section on a tiny model: the rows it should have, with values that can be so. No time is judged."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import misscompile as mc
from misscompile.benchmark.contestants import build_model, contestants, enter
from misscompile.benchmark.report import SECTIONS, run_sections
from misscompile.benchmark.sections import adapters, compiler
from misscompile.benchmark.settings import SECTIONS as NAMES
from misscompile.benchmark.settings import Settings
from misscompile.benchmark.tables import Row

LABELS = [contestant.label for contestant in contestants(Settings())]
ADAPTED = LABELS[1:]
OPTIONS: dict[str, Any] = {"model": "tiny", "tokens": 16, "r": 4, "mini_r": 8, "rounds": 2, "threads": 1}
BF16_FP32 = ("bfloat16", "float32")


def run(section: str, **fields: Any) -> dict[str, list[Row]]:
    settings = Settings(**OPTIONS | {"dtypes": ("float32",)} | fields, sections=(section,))
    ((name, tables, seconds),) = run_sections(settings)
    assert name == section
    assert seconds > 0
    for table in tables:
        json.dumps(table.rows)
        assert all(table.markdown().count(f"| {column.header} |") for column in table.columns)
    return {table.key: table.rows for table in tables}


def check_spreads(row: Row, *keys: str, rounds: int = 2) -> None:
    for key in keys:
        assert len(row[key]["values"]) == rounds
        assert 0 < row[key]["q1"] <= row[key]["median"] <= row[key]["q3"]


def names(rows: list[Row], key: str) -> list[tuple[str, str]]:
    return [(row[key], row["contestant"]) for row in rows]


def test_what_runs_is_what_was_asked_for() -> None:
    assert tuple(SECTIONS) == NAMES
    ours, lora = Settings(variants=("mini",), against=()), Settings(variants=("mini", "bat"), against=("lora",))
    assert [c.label for c in contestants(ours)] == ["base", "misscompile mini"]
    assert [c.label for c in contestants(lora)] == ["base", "misscompile mini", "misscompile bat", "peft lora"]


def test_steps() -> None:
    rows = run("steps", modes=("eager",), dtypes=BF16_FP32)["steps"]
    after_bat = LABELS.index("misscompile bat") + 1
    bf16 = [*LABELS[:after_bat], "misscompile bat, rounded", *LABELS[after_bat:]]
    assert names(rows, "dtype") == [("bfloat16", label) for label in bf16] + [("float32", label) for label in LABELS]
    for row in rows:
        check_spreads(row, "ratio", "seconds")
        assert row["over_floor"] == row["ratio"]["median"] / row["floor"]
        if row["contestant"] == "base":
            assert (row["floor"], *row["ratio"]["values"]) == (1.0, 1.0, 1.0)
        else:
            assert min(row["floor"] - 1, row["saved_over_base"]) > 0
        assert row["peak"] > row["saved"] > 0


def test_memory_counts_one_shard_sum_for_each_site_and_compiled_keeps_no_more() -> None:
    rows = run("memory", variants=("balance", "mini"), against=())["memory"]
    labels = ["base", "misscompile balance", "misscompile mini"]
    eager = [("eager", label) for label in [*labels, "misscompile balance dropout 0.1"]]
    assert names(rows, "mode") == eager + [("compiled", label) for label in labels]
    saved = {(row["mode"], row["contestant"]): row["saved"] for row in rows}
    assert all(0 < saved["compiled", label] <= saved["eager", label] for label in labels)
    assert all((row["saved_over_base"] > 0) == (row["provider"] != "base") for row in rows)
    layers, sums, tokens, r = 2, 7, 8, 4
    assert saved["eager", "misscompile mini"] - saved["eager", "base"] == 4 * layers * sums * tokens * r


def test_adapt_counts_the_linears_compares_like_with_like_and_allocates_nothing_on_the_meta_device() -> None:
    rows = run("adapt")["adapt"]
    assert [row["contestant"] for row in rows] == ADAPTED
    for row in rows:
        check_spreads(row, "seconds", "python_seconds")
        assert row["first"] > 0
        ours = row["contestant"].startswith("misscompile")
        assert row["sites"] == (14 if ours else None)
        assert (row["times_faster"] is not None) == (row["python_times_faster"] is not None) == ours
    settings = Settings(**OPTIONS)
    for contestant in contestants(settings)[1:]:
        parameters = list(enter(adapters.empty_model(settings, "meta"), contestant, settings).parameters())
        assert any(parameter.requires_grad for parameter in parameters)
        assert all(parameter.is_meta for parameter in parameters)


def test_compile_counts_guards_graphs_and_recompiles(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(compiler, "time_table", calls.append)
    counts = SECTIONS["compile"](Settings(model="tiny", variants=("balance",), against=("peft",), r=4))[0]
    base, ours, peft = counts.rows
    assert len(calls) == 1
    assert base["guards"] > 0 == base["guards_over_base"]
    assert 0 < ours["guards_over_base"] < peft["guards_over_base"]
    for row in counts.rows:
        assert (row["graphs"], row["breaks"], row["recompiles"]) == (1, 0, 0)
    assert "recompiles_off" not in base
    assert (ours["recompiles_off"], ours["recompiles_on"]) == (1, 0)


def test_guards_beyond_those_of_the_blocks_are_few() -> None:
    """A block has 7 nodes of the guard tree, and a bias that is not there 2 fewer, since no generated forward reads it."""
    settings = Settings(model="tiny", against=(), r=4, mini_r=2, dtypes=("bfloat16",))
    base, *ours = compiler.count_table(settings).rows
    for row in ours:
        assert row["guards"] - base["guards"] <= 14 * (7 - 2) + 56


def test_decode_has_ours_with_the_weight_cached_as_well() -> None:
    rows = run("decode", variants=("mini", "bat"), dtypes=BF16_FP32)["decode"]
    ours = [label for v in ("mini", "bat") for label in (f"misscompile {v}", f"misscompile {v}, cached weight", f"peft {v}")]
    assert names(rows, "dtype") == [(dtype, label) for dtype in BF16_FP32 for label in ["base", *ours, "peft lora"]]
    for row in rows:
        check_spreads(row, "ratio", "seconds_a_token")
    more = {(row["dtype"], row["contestant"]): row["bytes_over_base"] for row in rows}
    layers, outputs, r = 2, 5 * 32 + 2 * 64, 4
    base = build_model("tiny", "float32")
    for dtype, itemsize in (("bfloat16", 2), ("float32", 4)):
        assert more[dtype, "base"] == more[dtype, "misscompile bat, cached weight"] == 0
        blocks = 4 * layers * outputs * r  # float32 on either base
        assert more[dtype, "misscompile bat"] == pytest.approx(blocks / (itemsize * base.num_parameters()))


def test_merge_is_measured_against_a_copy_of_the_same_bytes() -> None:
    rows = run("merge")["merge"]
    bat = ADAPTED.index("misscompile bat")
    assert [row["contestant"] for row in rows] == ["copy", *ADAPTED[:bat], adapters.BAT_PRODUCT, *ADAPTED[bat:]]
    sites = 2 * (4 * 32 * 32 + 3 * 32 * 64)
    for row in rows:
        assert row["bytes"] == 4 * sites
        check_spreads(row, "bandwidth_of_copy")
        assert row["gigabytes_a_second"] == pytest.approx(4 * sites / row["seconds"]["median"] / 1e9)


def test_the_product_of_bat_alone_is_that_of_its_merge() -> None:
    r, weights = 4, [torch.randn(8, 12).bfloat16(), torch.randn(6, 8)]  # r does not divide 6: bat would not take it
    product = adapters.multiplying(weights, r)
    with FlopCounterMode(display=False) as counter:
        product.run(product.prepare())
    owner = nn.Linear(12, 8, bias=False)
    model = mc.adapt(nn.Sequential(owner), {"r": r, "init_weights": "bat", "target_modules": ["0"]})
    with FlopCounterMode(display=False) as merging:
        mc.merge(model)
    assert counter.get_total_flops() == merging.get_total_flops() == 2 * 8 * 12 * r


def test_growth_has_a_row_for_each_size_and_the_large_model(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LAYERS": (1, 3), "RANKS": (2, 8), "ROUNDS": 2}.items():
        monkeypatch.setattr(adapters, name, value)
    tables, verbs = run("growth"), ("adapt", "save", "load", "merge")
    assert [row["layers"] for row in tables["growth_layers"]] == [1, 3]
    assert [row["r"] for row in tables["growth_rank"]] == [2, 8]
    for row in tables["growth_layers"] + tables["growth_rank"]:
        check_spreads(row, "ratio", rounds=4)
        check_spreads(row, *verbs)
        assert all(row[f"{verb}_a_layer"] == row[verb]["median"] / row["layers"] for verb in verbs)
    (large,) = tables["growth_large"]
    assert large["sites"] == 80 * 7 < large["lines"]
    assert 70e9 < large["parameters"] < 71e9


FUSED = """
cpp_fused_add_mean_mul_pow_rsqrt_sum_view_0 = async_compile.cpp_pybinding(['float*'], r'''
cpp_fused__to_copy_1 = async_compile.cpp_pybinding(['float*'], r'''
"""
ALONE = FUSED.replace("rsqrt_sum_view", "rsqrt").replace("__to_copy_1", "_sum_view_1")
TWICE = FUSED + "triton_per_fused_sum_2 = async_compile.triton('triton_per_fused_sum_2', '''\n"


@pytest.mark.parametrize(
    ("code", "sums", "fused"),
    [
        (FUSED, ["cpp_fused_add_mean_mul_pow_rsqrt_sum_view_0"], True),
        (ALONE, ["cpp_fused_sum_view_1"], False),
        (TWICE, ["cpp_fused_add_mean_mul_pow_rsqrt_sum_view_0", "triton_per_fused_sum_2"], False),
        (FUSED.replace("_sum", ""), [], None),
    ],
)
def test_fusion_reads_the_kernels_of_generated_code(code: str, sums: list[str], fused: bool | None) -> None:
    found = compiler.describe_kernels(code)
    assert (found["sum_kernels"], found["fused"]) == (sums, fused)


def test_fusion_finds_the_shard_sum_in_what_inductor_generates() -> None:
    for row in run("fusion", variants=("balance", "mini"), dtypes=("bfloat16",), tokens=128, r=64)["fusion"]:
        (kernel,) = row["kernels"]  # for q and k together, and nothing else is generated
        assert row["sum_kernels"] == [kernel]
        assert row["fused"] is True
