"""Which names a config selects: a table, the sentences about what matched nothing, and PEFT's own matcher."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

import peft
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from support import says

from misscompile import MissConfig, MissError, NoMatchError
from misscompile.rules.names import Selection, layer_index, select_names  # internal: which names are chosen, and the notes


def with_parents(*leaves: str) -> tuple[str, ...]:
    """The names that `named_modules` gives for a tree with these leaves, without the root's."""
    found: dict[str, None] = {}
    for leaf in leaves:
        parts = leaf.split(".")
        found.update(dict.fromkeys(".".join(parts[: i + 1]) for i in range(len(parts))))
    return tuple(found)


def layer(prefix: str) -> tuple[str, ...]:
    projections = [f"{prefix}.attn.{p}_proj" for p in ("q", "k", "v", "o")]
    return (*projections, f"{prefix}.mlp.gate", f"{prefix}.mlp.up", f"{prefix}.input_norm")


TREES = {
    "lm": with_parents("model.embed", *layer("model.layers.0"), *layer("model.layers.1"), "model.norm", "lm_head"),
    "root": with_parents("layers.0.q_proj", "layers.0.proj", "layers.1.q_proj", "layers.10.q_proj", "layers.2", "head"),
    "moe": with_parents(
        *(f"model.layers.{i}.{m}" for i in (0, 1) for m in ("q", "experts.0.w1", "experts.1.w1", "experts.1.w2", "gate"))
    ),
    "mixed": with_parents(
        "enc.block.0.q", "enc.block.1.q", "dec.layer.0.q", "dec.layer.1.q", "dec.layer.1.sub.3.q", "q", "aq"
    ),
    "sequential": with_parents("0", "2", "10", "4.0", "4.2"),
    "root linear": ("",),
}
ALL_LINEAR = {
    "lm": [n for n in TREES["lm"] if n.endswith(("_proj", ".gate", ".up"))],
    "root": [n for n in TREES["root"] if n.endswith("proj")],
    "moe": [n for n in TREES["moe"] if n[-2:] in ("w1", "w2", ".q")],
    "mixed": [n for n in TREES["mixed"] if n.endswith("q")],
    "sequential": ["0", "2", "10", "4.0"],
    "root linear": [""],
}

Q0, Q1 = "model.layers.0.attn.q_proj", "model.layers.1.attn.q_proj"
V0, V1 = "model.layers.0.attn.v_proj", "model.layers.1.attn.v_proj"
UP0, UP1 = "model.layers.0.mlp.up", "model.layers.1.mlp.up"
GATE0, GATE1 = "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"
W0 = ["model.layers.0.experts.0.w1", "model.layers.0.experts.1.w1"]
W1 = ["model.layers.1.experts.0.w1", "model.layers.1.experts.1.w1"]
HEAD = "lm_head"
NO_Q_NO_UP = [n for n in ALL_LINEAR["lm"] if not n.endswith((".q_proj", ".up"))]
SUB = "dec.layer.1.sub.3.q"
BLOCKS, IN_1 = ["enc.block.0.q", "enc.block.1.q"], ["enc.block.1.q", "dec.layer.1.q", SUB]

SHORT = {
    "exclude": "exclude_modules",
    "save": "modules_to_save",
    "layers": "layers_to_transform",
    "pattern": "layers_pattern",
}


def on(targets: Any, **rules: Any) -> dict[str, Any]:
    """The fields of a config, under shorter names."""
    return {"target_modules": targets} | {SHORT[name]: rule for name, rule in rules.items()}


Row = tuple[str, dict[str, Any], list[str]]

TABLE: list[Row] = [
    # a list: the whole name, or the last segments after a dot
    *[
        ("lm", on(rule), [Q0, Q1])
        for rule in (["q_proj"], ("q_proj",), ["q_proj", "q_proj"], ["attn.q_proj"], r".*\.q_proj", r"(?i).*Q_PROJ")
    ],
    ("lm", on({"q_proj", "v_proj"}), [Q0, V0, Q1, V1]),
    ("lm", on(["v_proj", "q_proj"]), [Q0, V0, Q1, V1]),  # in the order of the model, not of the list
    ("lm", on([HEAD]), [HEAD]),
    *[
        ("lm", on(rule), [])
        for rule in (["head"], ["proj"], ["_proj"], [".q_proj"], ["q_proj."], ["Q_PROJ"], ["ttn.q_proj"])
    ],
    ("root", on(["proj"]), ["layers.0.proj"]),  # proj is not q_proj
    ("lm", on(["0.attn.q_proj"]), [Q0]),
    ("lm", on(["layers.1.attn.q_proj", "0.mlp.up"]), [UP0, Q1]),
    ("lm", on([Q1]), [Q1]),
    ("lm", on(["attn"]), ["model.layers.0.attn", "model.layers.1.attn"]),  # itself, not what is inside
    ("lm", on(["model.layers"]), ["model.layers"]),
    ("sequential", on(["0"]), ["0", "4.0"]),
    ("sequential", on(["4.0"]), ["4.0"]),
    ("sequential", on(["1"]), []),
    # an entry of a list is no expression
    *[("lm", on([rule]), []) for rule in (r".*q_proj", r"q_pro.", "q_proj|v_proj", "all-linear")],
    ("lm", on(["(", "up"]), [UP0, UP1]),
    # a string: an expression for the whole name
    ("lm", on(r"q_proj"), []),
    ("lm", on(r".*q_pro"), []),
    ("lm", on(r"model\.layers\.1\..*_proj"), [n for n in TREES["lm"] if "layers.1" in n and "_proj" in n]),
    ("lm", on(r".*\.(q|v)_proj$"), [Q0, V0, Q1, V1]),
    ("lm", on(r".*q_proj|lm_head"), [Q0, Q1, HEAD]),
    ("lm", on(r".*(?<!attn)\.up"), [UP0, UP1]),
    ("lm", on(HEAD), [HEAD]),
    ("root linear", on(r".*"), []),
    # all-linear, in any case
    *[("lm", on(name), ALL_LINEAR["lm"]) for name in ("all-linear", "All-Linear", "ALL-LINEAR")],
    ("root linear", on("all-linear"), [""]),
    ("lm", on("all-linear", exclude=["q_proj", "up"]), NO_Q_NO_UP),
    ("lm", on("all-linear", save=["attn"]), [GATE0, UP0, GATE1, UP1]),
    # excludes win
    ("lm", on(["q_proj"], exclude=["0.attn.q_proj"]), [Q1]),
    ("lm", on(["q_proj", "up"], exclude=("up",)), [Q0, Q1]),
    ("lm", on([Q0, Q1], exclude=[Q0]), [Q1]),
    ("lm", on(["q_proj"], exclude=["q_proj"]), []),
    ("lm", on(["q_proj"], exclude=r".*\.1\..*"), [Q0]),
    *[  # the module itself, not what is inside; and all-linear has no meaning there, it is an expression
        ("lm", on(["q_proj"], exclude=rule), [Q0, Q1]) for rule in (["proj"], ["attn"], r"layers\.1", "all-linear")
    ],
    ("lm", on(r".*(q_proj|up)", exclude={"up"}), [Q0, Q1]),
    # modules_to_save: by plain suffix, with all that is inside
    ("lm", on(["q_proj", HEAD], save=[HEAD]), [Q0, Q1]),
    ("lm", on([HEAD, "up"], save=["ead"]), [UP0, UP1]),
    ("lm", on(["q_proj", "up"], save=["1.attn"]), [Q0, UP0, UP1]),
    ("lm", on(["q_proj"], save=["layers.0"]), [Q1]),
    ("lm", on(["q_proj", "input_norm"], save=["norm"]), [Q0, Q1]),
    ("lm", on(["q_proj"], save=["model"]), []),
    ("mixed", on(["q"], save=["dec.layer.1"]), [*BLOCKS, "dec.layer.0.q", "q"]),
    ("root", on(["q_proj"], save=["layers.1"]), ["layers.0.q_proj", "layers.10.q_proj"]),
    # layers: the first numbered segment, wherever it stands
    ("lm", on(["q_proj"], layers=1), [Q1]),
    ("lm", on(["q_proj"], layers=0), [Q0]),
    ("lm", on(["q_proj", "up"], layers=[1]), [Q1, UP1]),
    ("lm", on(["q_proj"], layers=[1, 0]), [Q0, Q1]),
    ("lm", on(["q_proj"], layers=[7]), []),
    ("lm", on(["q_proj", "norm"], layers=[0]), [Q0]),
    ("moe", on(["w1"], layers=1), W1),  # not the number of the expert
    ("moe", on(["w1"], layers=[0]), W0),
    ("root", on(["q_proj"], layers=0), ["layers.0.q_proj"]),
    ("root", on(["q_proj"], layers=[1]), ["layers.1.q_proj"]),
    ("root", on(["q_proj"], layers=(10, 2)), ["layers.10.q_proj"]),
    ("sequential", on(["0"], layers=4), ["0", "4.0"]),  # 0 is an exact name
    ("sequential", on(["2"], layers=4), ["2", "4.2"]),
    # an exact full name is not filtered by the layers
    ("lm", on([Q0, "v_proj"], layers=1), [Q0, V1]),
    ("lm", on([HEAD, "q_proj"], layers=[0]), [Q0, HEAD]),
    ("lm", on([Q0], layers=1, pattern="nothing"), [Q0]),
    # the number after layers_pattern
    *[
        ("lm", on(["q_proj"], layers=1, pattern=pattern), [Q1])
        for pattern in ("layers", ["layers"], r"l\w+s", "model.layers", "(?i:LAYERS)")
    ],
    ("lm", on(["q_proj"], layers=1, pattern="ayers"), []),
    ("lm", on(["q_proj"], layers=1, pattern="h"), []),
    ("root", on(["q_proj"], layers=1, pattern="layers"), ["layers.1.q_proj"]),
    ("root", on(["q_proj"], layers=10, pattern="layers"), ["layers.10.q_proj"]),
    ("moe", on(["w1"], layers=1, pattern="experts"), [W0[1], W1[1]]),
    ("moe", on(["w1"], layers=1, pattern="h|layers"), W1),
    ("mixed", on(["q"], layers=0, pattern="block"), ["enc.block.0.q", "q"]),
    ("mixed", on(["q"], layers=[1], pattern=["block", "layer"]), [*IN_1, "q"]),
    ("mixed", on(["sub.3.q", "aq"], layers=3, pattern=["sub", "layer"]), [SUB, "aq"]),
    ("mixed", on(["sub.3.q"], layers=3, pattern=["layer", "sub"]), []),
    # everything together
    ("lm", on(["q_proj", "v_proj", "up", "gate"], exclude=["1.mlp.gate"], save=["attn"], layers=[1]), [UP1]),
]


def select(tree: Collection[str] | str, config: MissConfig) -> Selection:
    names = list(TREES[tree] if isinstance(tree, str) else tree)
    assert config.target_modules is not None
    return select_names(config, names, config.target_modules, ALL_LINEAR[tree] if isinstance(tree, str) else ())


def choose(tree: Collection[str] | str, config: MissConfig) -> list[str]:
    try:
        return list(select(tree, config).chosen)
    except NoMatchError:
        return []


def test_the_table_is_long_enough() -> None:
    assert len(TABLE) >= 60
    assert len({repr(row[:2]) for row in TABLE}) == len(TABLE)


@pytest.mark.parametrize(("tree", "fields", "expected"), TABLE, ids=str)
def test_table(tree: str, fields: dict[str, Any], expected: list[str]) -> None:
    assert choose(tree, MissConfig(**fields)) == expected


def test_the_names_of_the_model_type_table_stand_for_none() -> None:
    config = MissConfig(layers_to_transform=[1])
    names = TREES["lm"]
    assert select_names(config, names, ("q_proj", "v_proj"), ()).chosen == (Q1, V1)
    assert select_names(config, names, r".*\.(q|v)_proj", ()).chosen == (Q1, V1)
    assert select_names(MissConfig(), names, r".*\.(q|v)_proj", ()).chosen == (Q0, V0, Q1, V1)


def test_saved_modules_are_reported() -> None:
    found = select("lm", MissConfig(target_modules=["q_proj"], modules_to_save=["norm", HEAD]))
    assert found.saved == ("model.layers.0.input_norm", "model.layers.1.input_norm", "model.norm", HEAD)
    assert select("lm", MissConfig(target_modules=["q_proj"])).saved == ()


def test_a_pattern_that_cannot_stand_inside_another_is_refused_by_name() -> None:
    with pytest.raises(MissError, match=r"layers_pattern='\(\?i\)LAYERS'"):
        select("lm", MissConfig(target_modules=["q_proj"], layers_to_transform=1, layers_pattern="(?i)LAYERS"))


def nothing(field: str, entry: str, *closest: str) -> str:
    hint = f"; closest: {', '.join(map(repr, closest))}" if closest else ""
    return f"{field} entry {entry!r} matches no module{hint}"


@pytest.mark.parametrize(
    ("fields", "notes"),
    [
        ({}, []),
        (on(["q_proj", "w1"]), [nothing("target_modules", "w1")]),
        (on(["q_proj", "u_proj"]), [nothing("target_modules", "u_proj", "v_proj", "q_proj", "o_proj")]),
        (
            on(["q_proj", "attn.qproj"]),
            [nothing("target_modules", "attn.qproj", "attn.q_proj", "attn.v_proj", "attn.o_proj")],
        ),
        (on(["zzz", "q_proj", "aaaa"]), [nothing("target_modules", "aaaa"), nothing("target_modules", "zzz")]),
        ({"exclude_modules": ["up"]}, []),
        ({"exclude_modules": ["lm_hed"]}, [nothing("exclude_modules", "lm_hed", "lm_head", "embed")]),
        ({"exclude_modules": r"zz\.9"}, [nothing("exclude_modules", r"zz\.9")]),
        ({"modules_to_save": ["scores", "norm"]}, [nothing("modules_to_save", "scores")]),
        (
            on(["q_proj", "x1"], exclude=["x2"], save=["x3"]),
            [nothing("exclude_modules", "x2"), nothing("modules_to_save", "x3"), nothing("target_modules", "x1")],
        ),
    ],
    ids=str,
)
def test_notes(fields: dict[str, Any], notes: list[str]) -> None:
    found = select("lm", MissConfig(**(on(["q_proj"]) | fields)))
    assert sorted(found.notes) == notes
    assert found.chosen == (Q0, Q1)


@pytest.mark.parametrize(
    ("layers", "pattern", "told"),
    [([1, 99], None, "...layers_to_transform...99..."), ([1], ["layers", "blocks"], "...layers_pattern...'blocks'...")],
    ids=["a layer", "a layers_pattern"],
)
def test_what_is_not_there_is_told(layers: list[int], pattern: Any, told: str) -> None:
    found = select("lm", MissConfig(target_modules=["q_proj"], layers_to_transform=layers, layers_pattern=pattern))
    assert found.chosen == (Q1,)
    assert any(says(note, told) for note in found.notes)


HOW = ". A list entry matches a whole name or its last segments; a string is a regular expression for the whole name."


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (on(["u_proj"]), f"['u_proj'] matches no module of the model; closest: 'v_proj', 'q_proj', 'o_proj'{HOW}"),
        (on(r"q_proj"), f"'q_proj' matches no module of the model; closest: 'q_proj', 'v_proj', 'o_proj'{HOW}"),
        (on(("zz", "xx")), f"['xx', 'zz'] matches no module of the model{HOW}"),
        (
            on(["q_proj"], exclude=r".*"),
            f"['q_proj'] matches {Q0!r} and 1 more, but exclude_modules='.*' and modules_to_save=None take all of it away.",
        ),
        (
            on([HEAD], save=[HEAD]),
            "['lm_head'] matches 'lm_head', but exclude_modules=None and modules_to_save=['lm_head'] take all of it away.",
        ),
        (
            on(["q_proj"], layers=[7, 8]),
            f"['q_proj'] matches {Q0!r} and 1 more, but none is in layers_to_transform=[7, 8] (layers_pattern=None).",
        ),
        (
            on(["0.mlp.up"], layers=0, pattern="h"),
            f"['0.mlp.up'] matches {UP0!r}, but none is in layers_to_transform=0 (layers_pattern='h').",
        ),
    ],
    ids=str,
)
def test_no_match(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(NoMatchError) as caught:
        select("lm", MissConfig(**fields))
    assert str(caught.value) == f"target_modules={message}"


EXPERT = "model.layers.12.experts.7.w"


@pytest.mark.parametrize(
    ("name", "patterns", "expected"),
    [
        ("layers.3.q", (), 3),
        (EXPERT, (), 12),
        *[(EXPERT, patterns, 7) for patterns in (("experts",), ("h", "experts", "layers"))],
        *[(name, (), 7) for name in ("7", "a.7")],
        ("a.7", ("a",), 7),
        ("a.b7.3", (), 3),
        *[(name, (), None) for name in ("a7.b", "a.7b.c", "q_proj", "")],
        *[(name, ("layers",), None) for name in ("xlayers.3.q", "layers.x.3")],
    ],
)
def test_layer_index(name: str, patterns: tuple[str, ...], expected: int | None) -> None:
    assert layer_index(name, patterns) == expected


# PEFT's own matcher

# No word is the end of another but `proj` of `q_proj`, which is never in modules_to_save: there PEFT's matcher wants a dot.
SAVED = ["attn", "mlp", "norm", "q_proj"]
WORDS = [*SAVED, "proj", "w1"]
FILTERS = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
BEFORE = [["model", "layers"], ["dec", "block"], ["model", "dec", "layers"]]


@st.composite
def trees(draw: st.DrawFn) -> tuple[str, ...]:
    leaves = []
    for _ in range(draw(st.integers(1, 6))):
        tail = [*draw(st.lists(st.sampled_from([*WORDS, "0", "1"]), max_size=2)), draw(st.sampled_from(WORDS))]
        numbered = draw(st.booleans())  # PEFT wants two segments before the number and one after it
        head = [*draw(st.sampled_from(BEFORE)), str(draw(st.integers(0, 2)))] if numbered else ["model"]
        leaves.append(".".join([*head, *(tail if numbered else tail[-1:])]))
    return with_parents(*leaves)


@st.composite
def rules(draw: st.DrawFn, names: tuple[str, ...], strings: bool = True) -> Any:
    """A list of ends of real names and of noise, or an expression made of such."""
    ends = []
    for _ in range(draw(st.integers(1, 3))):
        parts = draw(st.sampled_from(names)).split(".")
        end = ".".join(parts[draw(st.integers(0, len(parts) - 1)) :])
        ends.append(draw(st.sampled_from([end] * 6 + [end[1:] or "x", f"{end}x", f".{end}", r".*" + end])))
    if not strings or draw(st.booleans()):
        return draw(st.sampled_from([list, set, tuple]))(ends)
    return draw(st.sampled_from([r".*{}", r".*\.{}", r"{}", r".*{}.*", r"model\..*{}"])).format("|".join(ends))


def test_selects_what_peft_selects() -> None:
    met: Counter[str] = Counter()

    @settings(max_examples=350, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(st.data())
    def compare(data: st.DataObject) -> None:
        names = data.draw(trees())
        fields: dict[str, Any] = {"target_modules": data.draw(rules(names))}
        if data.draw(st.booleans()):
            fields["exclude_modules"] = data.draw(rules(names))
        if data.draw(st.booleans()):
            fields["modules_to_save"] = data.draw(st.lists(st.sampled_from([*SAVED, "mlp.norm"]), min_size=1, max_size=2))
        if not isinstance(fields["target_modules"], str) and data.draw(st.sampled_from([True, True, True, False])):
            fields["layers_to_transform"] = data.draw(
                st.integers(0, 2) | st.lists(st.integers(0, 2), min_size=1, max_size=2)
            )
            if data.draw(st.booleans()):
                pattern = st.sampled_from(["layers", "block", "mlp", "ayers", r"l\w*s"])
                fields["layers_pattern"] = data.draw(pattern | st.lists(pattern, min_size=1, max_size=2))
        theirs = peft.MissConfig(**{key: list(v) if isinstance(v, tuple) else v for key, v in fields.items()})
        expected = [name for name in names if check_target_module_exists(theirs, name)]
        found = choose(names, MissConfig(**fields))
        if "layers_to_transform" in fields:  # PEFT finds no layer in a name that ends with its number; the numbers are ours
            found, expected = ([n for n in chosen if not n.rpartition(".")[2].isdigit()] for chosen in (found, expected))
        assert found == expected
        met.update([*fields] if expected else ["nothing chosen"])

    compare()
    assert min(met[rule] for rule in FILTERS) > 10, met  # the interesting cases were there
    assert met["nothing chosen"] > 20, met
