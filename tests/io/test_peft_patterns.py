"""Expressions from files: matched as Python matches them, and none takes long."""

import random
import re
import time

import pytest

from minipeft.io.peft import patterns
from minipeft.io.peft.patterns import fitting, layer_numbers

NAMES = [
    f"{root}.layers.{number}.{part}"
    for root in ("model", "model.visual", "encoder")
    for number in (0, 1, 12)
    for part in ("self_attn", "self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "norm")
]
FROM_FILES = [  # of the forms that PEFT's, Unsloth's and ms-swift's adapters hold
    r".*\.(q|v)_proj",
    r"model\.layers\.(\d+)\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj$",
    r"^(?!.*(visual|vision_tower)).*\.(q|k|v)_proj$",
    r"(?:.*?(?:language|model).*?(?:self_attn|attn|mlp).*?(?:q_proj|k_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj)))",
    r"^(model(?=\.).*\.(q_proj|k_proj))$",
    r"(.*\.)?(layers\.[0-4]\..*)",
    r"(?P<root>\w+)\.(layers|blocks)\.1{1,2}[^.]?\.[\w.]+",
    "{'q_proj', 'v_proj'}",
]


@pytest.mark.parametrize("pattern", FROM_FILES)
def test_expressions_of_real_files_match_as_in_python(pattern):
    found = fitting([pattern], NAMES, "file")[pattern]
    assert found == {name for name in NAMES if re.fullmatch(pattern, name)}


def expression(rng: random.Random, depth: int = 3) -> str:
    kind = rng.randrange(5) if depth else 0
    if kind == 0:
        return rng.choice(
            ["a", "b", "1", r"\.", ".", r"\d", r"\w", "[ab]", "[^a]", "^", "$", r"\b"]
        )
    inner = expression(rng, depth - 1)
    if kind == 1:
        return rng.choice(["({}|{})", "(?:{}|{})"]).format(inner, expression(rng, depth - 1))
    if kind == 2:
        how = rng.choice(["*", "+", "?", "{2}", "{1,3}", "{,2}", "{2,}", "*?", "+?", "??"])
        return f"(?:{inner}){how}"
    if kind == 3:
        return inner + expression(rng, depth - 1) + expression(rng, depth - 1)
    return rng.choice(["(?={})", "(?!{})"]).format(inner) if depth == 3 else inner + inner


def test_random_expressions_match_as_in_python():
    rng = random.Random(0)
    names = ["".join(rng.choices("ab.1", k=rng.randrange(9))) for _ in range(40)]
    for _ in range(2000):
        pattern = expression(rng)
        expected = {name for name in names if re.fullmatch(pattern, name)}
        assert fitting([pattern], names, "file")[pattern] == expected, pattern


@pytest.mark.parametrize(
    "pattern",
    [r"((\w|\w)+)+X", "(a*)*b", "(.*.*.*.*.*.*.*.*)X", "((((a?){999}){999}){999}){999}X",
     "(?=.*.*.*.*X).*X", "((((.{1,999}){1,999}){1,999}){1,999}){2,999}X", "(.|.)" * 40 + "X",
     "(((.*)*)*)*X"],
    ids=lambda pattern: pattern[:20],
)  # fmt: skip
def test_expressions_that_hang_python_end_at_once(pattern):
    start = time.perf_counter()
    assert fitting([pattern], [*NAMES, "a" * 60], "file") == {pattern: set()}
    assert time.perf_counter() - start < 5  # a hang would be years; a loaded machine needs 0.1


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "no regular expression"), ("a{99999999999}", "no regular expression"),
        ("(" * 3000 + ")" * 3000, "no regular expression"), ("(?i)foo", r"'\(\?i\)' is not supp"),
        (r"(a)\1", "is not supported"), ("(?<=a)b", "is not supported"), ("a*+", "not supported"),
        ("(?>a)", "is not supported"), ("(?P<x>a)(?P=x)", "is not supported"),
        ("(?=(?=a))", "ahead inside"), ("x" * 11_000 + "*", "more than 10000"),
    ],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_what_is_not_matched_is_refused_by_name(pattern, message):
    with pytest.raises(ValueError, match=rf"file: .*{message}"):
        fitting([pattern], NAMES, "file")


def test_matching_ends_with_the_deadline(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0)
    with pytest.raises(ValueError, match="takes more than 0 s; list the modules' names"):
        fitting([".?" * 1000], NAMES, "file")


@pytest.mark.parametrize(
    ("given", "number"),
    [([], 3), (["blocks"], 3), (["layers", "blocks"], 12), ([r"bl\w*"], 3), (["heads"], None)],
)
def test_the_number_of_a_layer_stands_after_the_first_pattern_that_fits(given, number):
    name = "model.blocks.3.layers.12.up"
    assert layer_numbers(given, [name], "file") == {name: number}
