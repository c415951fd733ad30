"""Any text as a budget, a name or a pattern: understood, or refused with one clear message, and at once."""

import math
from typing import Any

import pytest
from guarded import refusal
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.cli import parsing, words
from secateur.cost import Budget
from secateur.data import load_data
from secateur.errors import SecateurError
from secateur.models import ModelSource, load_model

BUDGETS = [
    "",
    ",",
    "=",
    "macs",
    "macs=",
    "macs==50%",
    "macs=50%%",
    "macs=-50%",
    "macs=1_",
    "macs=1__0",
    "macs=_1",
    "macs=1._5",
    "macs=1e",
    "macs=1e999",
    "macs=1e999999999999999999999",
    "macs=1e-999999999999999999999",
    "latency=1e-400s",
    "latency=0.0000000000000000000001ms",
    "macs=nan",
    "macs=inf%",
    "macs=٣%",
    "macs=五%",
    "macs=5²%",
    "macs=50\u200b%",
    "macs=5\x000%",
    "\uff4d\uff41\uff43\uff53=50%",
    "macs=50\uff05",
    "macs=50%, macs=40%",
    "macs=50%;params=3",
    "__class__=50%",
    "parts=50%",
    "macs=0x10",
    "macs=1" + "0" * 5_000,
    "macs=" + "9" * 100_000 + "%",
    "macs=" + "1." * 10_000,
    "a" * 100_000 + "=1",
    "macs=50%," * 10_000,
    "macs=" + " " * 100_000 + "x",
    "macs" + "<" * 100_000,
    "size=1\u017f",
    "size=5KB",
    "latency=4µs\u0301",
]


@pytest.mark.parametrize("text", BUDGETS, ids=range(len(BUDGETS)))
def test_chosen_budgets(text: str):
    said, found = refusal(Budget.parse, text)
    assert said or Budget.parse(str(found)) == found


def understood_or_refused(read: Any, text: str) -> Any:
    try:
        return read(text)
    except SecateurError:
        return None


NUMBERS = st.from_regex(r"[0-9_.]{0,6}(e[+-]?[0-9]{0,4})?", fullmatch=True)
CLAUSES = st.builds(
    "{}{}{}{}".format,
    st.sampled_from(["macs", "params", "nonzero", "size", "latency", "MACS", "x"]),
    st.sampled_from(["=", "<=", " = ", "<", ">="]),
    NUMBERS,
    st.sampled_from(["%", "", "k", "M", "GiB", "ms", "us", " s", "µs", "µ", "B"]),
)


@settings(max_examples=150)
@given(st.one_of(st.text(max_size=60), st.lists(CLAUSES, max_size=4).map(",".join)))
def test_any_budget(text: str):
    found = understood_or_refused(Budget.parse, text)
    if found is not None:
        assert all(math.isfinite(limit.value) and limit.value > 0 for limit in found.parts)
        assert Budget.parse(str(found)) == found


@settings(max_examples=15)
@given(st.one_of(st.text(max_size=40), st.builds("{}:{}".format, st.sampled_from(["timm", "torchvision"]), st.text())))
def test_any_model(text: str):
    understood_or_refused(load_model, text)


@pytest.mark.parametrize(
    "text",
    [
        "timm:hf-hub:timm/resnet18",
        "timm:hf_hub:timm/resnet18",
        "timm:local-dir:/tmp",
        "timm:../../etc",
        "timm:resnet18.no_such_tag",
        "timm:__class__",
        "torchvision:__init__",
        "torchvision:get_model",
        "torchvision:quantized_resnet18",
        "python:os:system",
        "python:os:abort",
        "python:builtins:exit",
        "python:subprocess:Popen",
        "secateur:__import__",
        "cifar_resnet20\0",
        "a" * 100_000,
        "timm:" + "*" * 1_000,
        "https://example.org/model",
        "file:///etc/passwd",
    ],
)
def test_chosen_models(text: str):
    said, _ = refusal(load_model, text)
    assert said


@settings(max_examples=50)
@given(st.text(max_size=40))
def test_any_data(text: str):
    if text not in ("digits", "/", ".", "..") and "/" not in text:
        understood_or_refused(load_data, text)


@pytest.mark.parametrize(
    "text", ["\0", "a" * 5_000, "torchvision:" + "x" * 5_000, "torchvision:cifar10:\0", "/dev/zero"]
)
def test_chosen_data(text: str):
    said, _ = refusal(load_data, text)
    assert said


@settings(max_examples=50)
@given(st.text(max_size=30))
def test_any_list_of_numbers_formats_and_rules(text: str):
    understood_or_refused(lambda t: words.numbers(t, "--mean"), text)
    understood_or_refused(parsing.formats, text)
    understood_or_refused(lambda t: parsing.axis_rules([t], [t], [t]), text)
    understood_or_refused(parsing.device, text)


@pytest.mark.parametrize(
    "pattern", ["*a" * 40 + "*b", "?" * 10_000, "[" * 1_000, "[a-" * 500, "*" * 10_000 + "b", "\\" * 999]
)
def test_patterns_that_blow_up_others(pattern: str):
    from fnmatch import fnmatchcase

    said, _ = refusal(lambda: fnmatchcase("a" * 2_000, pattern))
    assert said is None


@settings(max_examples=50)
@given(
    st.dictionaries(
        st.sampled_from(["kind", "name", "arguments", "x"]),
        st.one_of(
            st.none(), st.text(), st.integers(), st.lists(st.integers()), st.dictionaries(st.text(), st.integers())
        ),
    )
)
def test_any_source(data: dict[str, Any]):
    understood_or_refused(ModelSource.from_json, data)  # type: ignore[arg-type]
