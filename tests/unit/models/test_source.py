"""Models by name: building them, and refusing bad names and code."""

import contextlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from secateur.errors import ModelError
from secateur.models import CifarResNet, ModelSource, load_model

USER_CODE = """
from torch import nn

instance = nn.Linear(2, 2)
number = 3

class Net(nn.Module):
    def __init__(self, num_classes=4):
        super().__init__()
        self.head = nn.Linear(6, num_classes)

    def forward(self, x):
        return self.head(x)

def net(num_classes=4):
    return Net(num_classes).train()

def fixed():
    return Net()

def broken():
    raise KeyError("no such layer")

def text():
    return "a model"
"""


MOVING_CODE = """
import os
import tempfile
import torch

os.chdir(tempfile.gettempdir())

def net():
    os.chdir("/")
    return torch.nn.Linear(6, 4)

def broken():
    os.chdir("/")
    raise KeyError("no such layer")
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_nets.py").write_text(USER_CODE)
    (tmp_path / "my_faulty.py").write_text("import torch\nraise OSError('no license')\n")
    (tmp_path / "my_moving.py").write_text(MOVING_CODE)
    (tmp_path / "my_needy.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("my_nets", "my_faulty", "my_needy", "my_moving"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "my_nets"


@pytest.mark.parametrize(
    ("spec", "arguments", "channels", "side", "classes"),
    [
        ("cifar_resnet20", {}, 3, 32, 10),
        ("cifar_resnet20", {"num_classes": 5, "in_channels": 1}, 1, 32, 5),
        ("digits_resnet", {}, 1, 8, 10),
        ("timm:resnet10t", {}, 3, 64, 1000),
        ("timm:resnet10t", {"num_classes": 5, "in_channels": 1}, 1, 64, 5),
        ("torchvision:shufflenet_v2_x0_5", {}, 3, 64, 1000),
        ("torchvision:shufflenet_v2_x0_5", {"num_classes": 5, "in_channels": 3}, 3, 64, 5),
    ],
)
def test_models_by_name(spec: str, arguments: dict[str, int], channels: int, side: int, classes: int):
    model, source = load_model(spec, **arguments)
    assert not any(module.training for module in model.modules())
    with torch.inference_mode():
        assert model(torch.zeros(1, channels, side, side)).shape == (1, classes)
    again = ModelSource.from_json(json.loads(json.dumps(source.to_json())))
    assert again == source
    assert hash(again) == hash(source)
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    assert shapes == {name: t.shape for name, t in again.build().state_dict().items()}


def test_fresh_weights_depend_on_the_seed_only():
    before = torch.get_rng_state()
    first, second, third = (load_model("digits_resnet", seed=seed)[0].conv1.weight for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_a_source_keeps_its_own_arguments():
    arguments = {"num_classes": 5}
    source = ModelSource("secateur", "digits_resnet", arguments)
    arguments["num_classes"] = 6
    assert source.build().linear.out_features == 5
    with pytest.raises(AttributeError):
        source.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cifar_resnet21", r"must be a known name; got 'cifar_resnet21'\. Did you mean .*cifar_resnet20"),
        ("resnet50", r"got 'resnet50'\. Did you mean .*timm:resnet50 or torchvision:resnet50\?"),
        ("qqqqqq", r"got 'qqqqqq'\. Built in are cifar_resnet20, .*, digits_resnet, .*cifar_mobilenetv2_150\."),
        ("timm:resnet51", r"a name that timm knows; got 'resnet51'\. Did you mean timm:resnet"),
        ("timm:qqqqqq", r"got 'qqqqqq'\. See timm\.list_models\(\)"),
        ("timm:hf-hub:timm/resnet18.a1_in1k", "a name that timm knows; got 'hf-hub:timm/resnet18.a1_in1k'"),
        ("timm:local-dir:/tmp/resnet18", "a name that timm knows; got 'local-dir:/tmp/resnet18'"),
        ("torchvision:resnet19", r"model of torchvision for .*; got 'resnet19'\. Did you mean torchvision:res"),
        ("torchvision:raft_large", r"model of torchvision for .*; got 'raft_large'"),
        ("keras:resnet50", r"`model` must be timm:NAME, torchvision:NAME, python:.*; got 'keras:resnet50'"),
        ("timm:", r"`model` must be timm:NAME, torchvision:NAME, python:.*; got 'timm:'"),
        ("", r"`model` must be timm:NAME"),
    ],
)
def test_unknown_names_are_refused_with_a_suggestion(spec: str, message: str):
    with pytest.raises(ModelError, match=message):
        load_model(spec)


def test_torchvision_models_take_three_channels():
    with pytest.raises(ModelError, match=r"`in_channels` must be 3 for torchvision models; got 1 \(resnet18\)"):
        load_model("torchvision:resnet18", in_channels=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "keras"}, "`kind` must be one of"),
        ({"name": ""}, "`name` must be the name of a model; got ''"),
        ({"name": 3}, "`name` must be the name of a model; got 3"),
        ({"arguments": {"num_classes": 0}}, "positive integers among .*; got num_classes=0"),
        ({"arguments": {"num_classes": True}}, "positive integers among .*; got num_classes=True"),
        ({"arguments": {"checkpoint_path": 1}}, "positive integers among .*; got checkpoint_path=1"),
        ({"arguments": [1]}, "must have `kind`, `name` and `arguments`"),
        ({"extra": 1}, "must have `kind`, `name` and `arguments`"),
    ],
)
def test_bad_json_is_refused(changes: dict[str, object], message: str):
    with pytest.raises(ModelError, match=message):
        ModelSource.from_json({"kind": "timm", "name": "resnet10t", "arguments": {}} | changes)


@pytest.mark.parametrize("name", ["net", "Net"])
def test_user_code_runs_when_trusted(user_module: str, name: str):
    model, source = load_model(f"python:{user_module}:{name}", num_classes=7, trust_source=True)
    assert model.head.out_features == 7
    assert not model.training
    assert source == ModelSource("python", f"{user_module}:{name}", {"num_classes": 7})
    assert isinstance(source.build(trust_source=True), nn.Module)


def test_user_code_is_not_even_imported_without_trust(user_module: str):
    with pytest.raises(ModelError, match=r"python:my_nets:net imports and runs code; .*trust_source=True"):
        load_model(f"python:{user_module}:net")
    with pytest.raises(ModelError, match="needs your consent"):
        ModelSource("python", f"{user_module}:net").build()
    assert user_module not in sys.modules


@pytest.mark.parametrize(
    ("spec", "arguments", "message"),
    [
        ("my_nets", {}, "must be python:package.module:factory; got 'python:my_nets'"),
        ("my_nets:", {}, "must be python:package.module:factory; got 'python:my_nets:'"),
        ("my_netz:net", {}, "must name a module that can be imported; No module named 'my_netz'. .*PYTHONPATH"),
        ("..evil:net", {}, "could not be imported: TypeError"),
        ("my_needy:net", {}, "No module named 'a_package_that_is_not_there'"),
        ("my_faulty:net", {}, r"could not be imported: OSError: no license \(.*my_faulty\.py, line 2\)"),
        ("my_nets:nett", {}, r"must name a function of my_nets; there is none\. It has net"),
        ("my_nets:instance", {}, "must be a function or class that makes a model; got a Linear"),
        ("my_nets:number", {}, "must be a function or class that makes a model; got a int"),
        ("my_nets:fixed", {"num_classes": 3}, r"must accept the arguments \{'num_classes': 3\}; got: .*unexpected"),
        ("my_nets:broken", {}, r"python:my_nets:broken failed: KeyError: 'no such layer' \(.*my_nets\.py, line 22\)"),
        ("my_nets:text", {}, r"must return a torch\.nn\.Module; got str"),
    ],
)
def test_errors_in_user_code_are_explained(user_module: str, spec: str, arguments: dict[str, int], message: str):
    with pytest.raises(ModelError, match=message):
        load_model(f"python:{spec}", trust_source=True, **arguments)


def test_failures_inside_timm_are_explained(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> nn.Module:
        raise ValueError("no")

    monkeypatch.setattr("timm.create_model", refuse)
    with pytest.raises(ModelError, match=r"timm could not build resnet10t with \{'num_classes': 3\}; got: no"):
        load_model("timm:resnet10t", num_classes=3)


def test_built_in_models_are_registered_by_their_names():
    assert isinstance(load_model("cifar_resnet32")[0], CifarResNet)


@pytest.mark.usefixtures("user_module")
@pytest.mark.parametrize("name", ["net", "broken"])
def test_code_that_changes_the_working_directory_does_not_move_the_users_paths(name: str):
    before = Path.cwd()
    with contextlib.nullcontext() if name == "net" else pytest.raises(ModelError, match="no such layer"):
        load_model(f"python:my_moving:{name}", trust_source=True)
    assert Path.cwd() == before
