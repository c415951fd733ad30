"""Arguments and settings of the wrong type are refused where they are given, by one sentence."""

import dataclasses
import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

import secateur
from secateur._kinds import checked, settings
from secateur.errors import KindError, SecateurError

JUNK = (None, object(), "no\x1b[2J", "", b"x", 3, -1, 1.5, math.nan, [], [None], {1: 2}, int, len, torch.zeros(2))


def setting_classes() -> dict[str, type]:
    found: dict[str, type] = {}
    for module in pkgutil.walk_packages(secateur.__path__, "secateur."):
        if module.name in {"secateur.__main__", "secateur._ray_driver"}:
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            is_own = isinstance(value, type) and value.__module__ == module.name
            if is_own and dataclasses.is_dataclass(value) and hasattr(value.__init__, "__wrapped__"):
                found[f"{module.name}.{name}"] = value
    return found


CLASSES = setting_classes()


def refusal(call: Callable[..., object], **given: object) -> str | None:
    """What the library says to a call; None if it takes it. Any other error is a fault."""
    try:
        call(**given)
    except SecateurError as error:
        return str(error)
    return None


def test_there_are_many_settings():
    assert len(CLASSES) > 80
    assert {"secateur.train.config.TrainConfig", "secateur.pipeline.config.CutConfig"} <= set(CLASSES)


@pytest.mark.parametrize("name", CLASSES)
def test_settings_take_any_junk_or_refuse_it_in_a_sentence(name: str):
    kind = CLASSES[name]
    required = {
        each.name: _something(str(each.type))
        for each in dataclasses.fields(kind)
        if each.init and each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
    }
    for each in dataclasses.fields(kind):
        for junk in JUNK if each.init else ():
            said = refusal(kind, **{**required, each.name: junk})
            assert said is None or (len(said) > 20 and said.replace("\n", "").isprintable())


def _something(hint: str) -> object:
    return {"int": 1, "float": 0.5, "str": "x", "bool": True, "Path": Path("x")}.get(hint, ())


@settings
class Example:
    """One of each kind."""

    count: int = 1
    share: float = 0.5
    on: bool = False
    name: str | None = None
    place: Path | None = None
    shape: tuple[int, int] = (1, 1)
    parts: Sequence[int | str] = ()
    table: Mapping[str, float] = dataclasses.field(default_factory=dict)
    mode: Literal["a", "b"] = "a"
    call: Callable[[int], int] | None = None
    net: nn.Module | None = None
    anything: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.count, int) and self.count < 0:
            raise secateur.SecateurError("`count` must be at least 0.")


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("count", (1, torch.tensor([3]).numpy()[0]), (1.0, True, "1", None)),
        ("share", (1, 0.5, math.inf), ("0.5", None, True)),
        ("on", (True, False), ("no", "False", 0, 1, None, [0])),
        ("name", ("x", None), (3, b"x")),
        ("place", ("x", Path("x"), None), (3, b"x")),
        ("shape", ((1, 2), [1, 2]), (1, (1,), (1, 2, 3), "ab", ("a", "b"))),
        ("parts", ((), [1, "a"], (1,)), ("ab", b"ab", 3, [1.5], [None])),
        ("table", ({}, {"a": 1}), ([], {1: 1.0}, {"a": "b"})),
        ("mode", ("a", "b"), ("c", 1)),
        ("call", (len, None, lambda x: x), (3, "len")),
        ("net", (nn.ReLU(), None), (3, nn.ReLU)),
        ("anything", (3, None, "x", object()), ()),
    ],
)
def test_kinds(field: str, good: tuple[object, ...], bad: tuple[object, ...]):
    for value in good:
        made = Example(**{field: value})
        assert getattr(made, field) == (Path("x") if field == "place" and value is not None else value)
    for value in bad:
        with pytest.raises(KindError, match=f"`{field}` must be .*; got "):
            Example(**{field: value})


def test_what_a_class_says_itself_comes_first_and_the_call_before_that():
    with pytest.raises(SecateurError, match="at least 0"):
        Example(count=-1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'counts'"):
        Example(counts=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Example().count = 2  # pyright: ignore[reportAttributeAccessIssue]


def test_functions():
    @checked
    def loaded(folder: Path | str, *, trust: bool = False) -> int:
        return 3

    assert loaded("x", trust=True) == 3
    with pytest.raises(KindError, match=r"`trust` must be True or False; got 'no' \(str\)\."):
        loaded("x", trust="no")  # pyright: ignore[reportArgumentType]
    with pytest.raises(KindError, match=r"`folder` must be a path or text; got the class Path\. Call it: Path\(\)\."):
        loaded(Path)  # pyright: ignore[reportArgumentType]
    assert list(inspect.signature(loaded).parameters) == ["folder", "trust"]


@pytest.mark.parametrize("consent", ["no", "False", "0", [0], 1, object()])
def test_consent_is_nothing_but_true(consent: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "runs_when_imported.py").write_text("raise SystemExit(99)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KindError, match="`trust_source` must be True or False"):
        secateur.load_model("python:runs_when_imported:net", trust_source=consent)  # pyright: ignore[reportArgumentType]


def test_a_message_cannot_steer_a_terminal():
    error = SecateurError("got \x1b[2J\u202e\x00")
    assert str(error) == "got \\u001b[2J\\u202e\\u0000"


def functions() -> list[str]:
    return [name for name in secateur.__all__ if inspect.isfunction(getattr(secateur, name))]


@pytest.mark.parametrize("name", functions())
def test_functions_refuse_junk_in_a_sentence(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    function = getattr(secateur, name)
    parameters = inspect.signature(function).parameters.values()
    required = [each.name for each in parameters if each.default is inspect.Parameter.empty]
    for junk in JUNK:
        before = torch.get_rng_state()
        said = refusal(function, **dict.fromkeys(required, junk))
        assert said is None or len(said) > 20
        assert torch.equal(before, torch.get_rng_state())
    assert list(tmp_path.iterdir()) == []
