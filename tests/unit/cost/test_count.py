"""The counter that checks the formula: it must know every operator that multiplies and adds, in every torch."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import ZOO

from secateur.cost import CostModel, counted_macs, flop_counter
from secateur.graph import trace

pytestmark = pytest.mark.window

ATEN = torch.ops.aten

# What reads a parameter without multiplying and adding along a dimension: it moves numbers, scales or shifts each, or
# normalizes them. Whatever else reads one must have a formula.
NO_PRODUCT = {
    *("t", "transpose", "permute", "view", "_unsafe_view", "reshape", "expand", "unsqueeze", "squeeze", "slice"),
    *("select", "split", "split_with_sizes", "unbind", "cat", "stack", "index", "index_select", "repeat", "clone"),
    *("copy_", "alias", "detach", "_to_copy", "roll", "flip", "constant_pad_nd", "embedding"),
    *("upsample_bicubic2d", "upsample_bilinear2d", "_prelu_kernel", "_softmax", "var_mean", "mean", "sum"),
    *("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"),
    *("native_layer_norm", "native_group_norm", "_fused_rms_norm"),
}  # fmt: skip


class Readers(TorchDispatchMode):
    """The operators that read numbers of a parameter, or a view of one."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.found: set[Any] = set()
        self._stored = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() in self._stored:
                self.found.add(func)
        return func(*args, **(kwargs or {}))


def unknown(model: nn.Module, *inputs: Tensor) -> set[str]:
    """Operators that read a parameter, may multiply and add, and have no formula."""
    formulas = flop_counter().flop_registry
    with torch.no_grad(), Readers(model) as readers:
        model(*inputs)
    assert readers.found
    return {
        str(func)
        for func in readers.found
        if func._overloadpacket not in formulas
        and torch.Tag.pointwise not in func.tags
        and func._schema.name.removeprefix("aten::") not in NO_PRODUCT
    }


@pytest.mark.parametrize("name", ZOO)
def test_the_counter_knows_every_operator_that_multiplies_by_parameters(name: str):
    model, example = ZOO[name]()
    assert unknown(model, example) == set()


@pytest.mark.parametrize(
    ("name", "size"),
    [("vit_tiny_patch16_224", 64), ("mobilevit_xxs", 64), ("pvt_v2_b0", 64), ("xcit_nano_12_p16_224", 64)],
)
def test_and_those_of_networks_with_attention(name: str, size: int):
    more = {} if name in ("mobilevit_xxs", "pvt_v2_b0") else {"img_size": size}
    with torch.random.fork_rng(devices=[]):
        model = timm.create_model(name, **more).eval()
    assert unknown(model, torch.zeros(1, 3, size, size)) == set()


def test_an_operator_without_a_formula_is_noticed():
    class Distances(nn.Module):
        def __init__(self):
            super().__init__()
            self.centers = nn.Parameter(torch.zeros(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cdist(x, self.centers, p=1.0)

    assert unknown(Distances(), torch.zeros(2, 3)) == {"aten._cdist_forward.default"}


# --- attention, whichever kernel runs it ------------------------------------------------------------------------------


class Attending(nn.Module):
    """Two heads; six queries of three numbers look at five keys, whose values have three numbers."""

    def __init__(self, attend: Callable[..., Tensor]):
        super().__init__()
        self.attend = attend

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(q, k, v)


def under(backend: SDPBackend) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


FORMS: dict[str, Callable[..., Tensor]] = {
    "chosen by torch": F.scaled_dot_product_attention,
    "math": under(SDPBackend.MATH),
    "flash": under(SDPBackend.FLASH_ATTENTION),
    "by hand": lambda q, k, v: (q @ k.transpose(-2, -1)).softmax(-1) @ v,
    "kernel called": lambda q, k, v: ATEN._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0],
    "masked": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(6, 5)),
    "causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_attention_counts_the_same_in_every_form(form: str):
    inputs = (torch.zeros(1, 2, 6, 3), torch.zeros(1, 2, 5, 3), torch.zeros(1, 2, 5, 3))
    assert counted_macs(Attending(FORMS[form]), inputs) == 2 * (6 * 5 * 3 + 6 * 5 * 3)


@pytest.mark.parametrize(
    "kernel",
    [
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
        "_scaled_dot_product_flash_attention_for_cpu",
    ],
)
def test_kernels_of_other_devices_have_the_same_formula(kernel: str):
    formula = flop_counter().flop_registry[getattr(ATEN, kernel)]
    q, k, v = torch.zeros(1, 2, 6, 3), torch.zeros(1, 2, 5, 3), torch.zeros(1, 2, 5, 4)
    assert formula(q, k, v, None, False, out_val=torch.zeros(1, 2, 6, 4)) == 2 * 2 * (6 * 5 * 3 + 6 * 5 * 4)


# --- what torch's counter passes over ---------------------------------------------------------------------------------


class With(nn.Module):
    """A function of some layers and parameters, over features of shape (batch, 3, 64)."""

    def __init__(self, compute: Callable[..., Tensor], **parts: nn.Module | nn.Parameter):
        super().__init__()
        self.compute = compute
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


def filled(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, 0.5))


PRODUCTS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "dot": (lambda: With(lambda m, x: torch.dot(m.w, x[0, :, 0]), w=filled(3)), 3),
    "mv": (lambda: With(lambda m, x: m.w @ x[0, :, 0], w=filled(7, 3)), 7 * 3),
    "addmv": (lambda: With(lambda m, x: torch.addmv(m.b, m.w, x[0, :, 0]), w=filled(7, 3), b=filled(7)), 7 * 3),
    "addbmm": (
        lambda: With(lambda m, x: torch.addbmm(m.b, x[0, :, None], m.w), w=filled(3, 64, 5), b=filled(1, 5)),
        3 * 64 * 5,
    ),
    "bilinear": (lambda: With(lambda m, x: m.w(x[..., 0], x[..., 1]), w=nn.Bilinear(3, 3, 5)), 5 * 3 * 3),
    # Four gates of 6, from 3 features and 6 hidden numbers, at 64 steps, forward and backward; then the head.
    "lstm": (
        lambda: With(
            lambda m, x: m.head(m.lstm(x.transpose(1, 2))[0][:, -1]),
            lstm=nn.LSTM(3, 6, batch_first=True, bidirectional=True),
            head=nn.Linear(12, 4),
        ),
        2 * 64 * 24 * (3 + 6) + 12 * 4,
    ),
    "gru": (
        lambda: With(
            lambda m, x: m.head(m.gru(x.transpose(1, 2))[0][:, -1]),
            gru=nn.GRU(3, 6, batch_first=True),
            head=nn.Linear(6, 4),
        ),
        64 * 18 * (3 + 6) + 6 * 4,
    ),
}  # fmt: skip
"""A model, and its multiply-accumulates by hand."""


@pytest.mark.parametrize("name", PRODUCTS)
def test_vectors_and_recurrent_layers_are_counted_by_both_ways(name: str):
    build, macs = PRODUCTS[name]
    with torch.random.fork_rng(devices=[]):
        model = build().eval()
    x = torch.ones(1, 3, 64)
    assert counted_macs(model, x) == macs
    assert CostModel(trace(model, x)).original.macs == macs


def test_triton_is_not_imported_before_something_is_counted():
    code = "import sys, secateur.cost, secateur.graph; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
