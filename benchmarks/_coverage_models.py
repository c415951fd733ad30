"""The models of the coverage benchmark and how each is built, never with downloaded weights.

From timm: for every module under ``timm.models``, and every name family inside it (the letters a name begins with), the
variant with the fewest parameters, counted on the meta device and stored in results/coverage/timm.json (``--list``
counts again). Further models are added because no smallest variant contains their structure.
"""

import importlib
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from _record import RESULTS
from torch import nn

LISTING = RESULTS / "coverage" / "timm.json"
TESTS = Path(__file__).resolve().parents[1] / "tests"
ULTRALYTICS = "COVERAGE_ULTRALYTICS"
"""Environment variable: a folder with ``pip install --no-deps --target`` of ultralytics and what it imports."""


@dataclass(frozen=True)
class Subject:
    """A model of the benchmark.

    Attributes:
        source: ``timm``, ``torchvision``, ``cifar``, ``zoo`` or ``ultralytics``.
        name: The name that source knows it by.
        kind: Class in the summary.
        size: (channels, height, width) of the input.
        family: Module of timm it stands for.
        options: Keyword arguments of its factory.
    """

    source: str
    name: str
    kind: str
    size: tuple[int, ...] = (3, 224, 224)
    family: str = ""
    options: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def key(self) -> str:
        """The unique name of the model."""
        return f"{self.source}/{self.name}"


CNN, ATTENTION, MLP, DENSE, YOLO, ZOO = (
    "CNN",
    "attention or hybrid",
    "MLP",
    "segmentation, detection",
    "YOLO",
    "tests' zoo",
)
KINDS = (CNN, ATTENTION, MLP, DENSE, YOLO, ZOO)


def _words(text: str) -> list[str]:
    return text.split()


MLPS = {"gmlp", "gmixer", "resmlp", "mixer", "sequencer"}
"""Name families (sequencer: an LSTM in the place of token mixing)."""
ATTENTIVE = frozenset(
    _words(
        "beit byoanet cait coat convit crossvit davit deepseek_vit deit edgenext efficientformer "
        "efficientformer_v2 efficientvim efficientvit_mit efficientvit_msra eva fastvit gcvit gemma4_vit hiera "
        "hieradet_sam2 iformer levit lowformer cpubone csatv2 maxxvit metaformer mobilenetv5 mobilevit mvitv2 "
        "naflexvit nest nextvit pit pvt_v2 qwen3_vit shvit swiftformer swin_transformer swin_transformer_v2 "
        "swin_transformer_v2_cr tiny_vit tnt twins visformer vision_transformer vision_transformer_hybrid "
        "vision_transformer_relpos vision_transformer_sam vitamin volo xcit focalnet"
    )
)
"""Modules of timm whose models mix positions with attention, a state space or gates made from the input."""
ALIASES = {"tv", "gluon", "ssl", "swsl", "ig", "jx", "adv", "ens", "wide", "dm", "senet"}
"""Name families that repeat the network of another one with other weights or other widths."""
FURTHER = _words(
    "resnet50_gn resnet18d resnet50 resnetv2_50x1_bit resnetv2_50d_evos resnetv2_50d_frn resnetv2_50d_gn "
    "nf_resnet26 nf_seresnet26 efficientnet_b0 efficientnet_b0_gn efficientnet_b0_g8_gn efficientnet_es "
    "efficientnet_blur_b0 mobilenetv2_100 mobilenetv3_large_100 mobilenetv4_conv_small "
    "mobilenetv4_hybrid_medium_075 ghostnetv2_100 hrnet_w18_small_v2 convnext_tiny fastvit_sa12 fastvit_mci0 "
    "levit_conv_128s coat_lite_tiny twins_pcpvt_small maxvit_tiny_tf_224 maxvit_rmlp_pico_rw_256 "
    "coatnet_0_rw_224 swin_s3_tiny_224 vit_small_patch16_224 vit_relpos_small_patch16_224 "
    "vit_wee_patch16_reg1_gap_256 vit_pwee_patch16_reg1_gap_256 vit_dwee_patch16_reg1_gap_256 "
    "vit_base_patch16_siglip_224 vit_relpos_small_patch16_rpn_224 vit_small_patch16_rope_224 "
    "vit_small_patch16_rope_mixed_224 vit_small_patch16_dinov3 vit_small_patch14_dinov2 "
    "eva02_small_patch14_224 deit3_small_patch16_224 cait_xxs24_224 xcit_tiny_12_p16_224 res2net50_26w_4s "
    "dla34 caformer_s18 regnety_004 repvgg_a0 skresnet34 vit_pe_spatial_tiny_patch16_512"
)


def subjects() -> list[Subject]:
    """List every model, small ones of each source first."""
    found = [_timm(entry) for entry in json.loads(LISTING.read_text())] if LISTING.exists() else []
    return [*_zoo(), *_cifar(), *_torchvision(), *_ultralytics(), *found]


def build(subject: Subject) -> nn.Module:
    """Build a model with random weights, in evaluation mode."""
    return BUILDERS[subject.source](subject).eval()


def _timm(entry: dict[str, Any]) -> Subject:
    family, name = entry["module"], entry["name"]
    prefix = cast("re.Match[str]", re.match(r"[a-z]+", name)).group()
    attentive = family in ATTENTIVE or "hybrid" in name
    kind = MLP if prefix in MLPS else ATTENTION if attentive else CNN
    return Subject("timm", name, kind, tuple(entry["size"]), family, entry.get("options", {}))


def _build_timm(subject: Subject) -> nn.Module:
    import timm

    return timm.create_model(subject.name, pretrained=False, **subject.options)


def _zoo() -> list[Subject]:
    sys.path.append(str(TESTS))
    zoo = importlib.import_module("zoo")
    return [Subject("zoo", name, ZOO, (3, 8, 8)) for name in zoo.ZOO]


def _build_zoo(subject: Subject) -> nn.Module:
    return importlib.import_module("zoo").ZOO[subject.name]().model


def _cifar() -> list[Subject]:
    return [Subject("cifar", name, CNN, (3, 32, 32)) for name in ("cifar_resnet20", "cifar_resnet56")]


def _build_cifar(subject: Subject) -> nn.Module:
    return getattr(importlib.import_module("secateur.models"), subject.name)()


def _torchvision() -> list[Subject]:
    attentive = ("maxvit_t", "swin_t", "swin_v2_t", "vit_b_16")
    plain = [
        "alexnet",
        "convnext_tiny",
        "densenet121",
        "efficientnet_b0",
        "efficientnet_v2_s",
        "mnasnet0_5",
        "mobilenet_v2",
        "mobilenet_v3_small",
        "regnet_x_400mf",
        "regnet_y_400mf",
        "resnet18",
        "resnet50",
        "resnext50_32x4d",
        "wide_resnet50_2",
        "shufflenet_v2_x0_5",
        "squeezenet1_1",
        "vgg11",
        "vgg11_bn",
    ]
    found = [Subject("torchvision", n, CNN) for n in plain] + [Subject("torchvision", n, ATTENTION) for n in attentive]
    aux = {"aux_logits": False, "init_weights": False}
    found.append(Subject("torchvision", "googlenet", CNN, options=aux))
    found.append(Subject("torchvision", "inception_v3", CNN, (3, 299, 299), options={"init_weights": False}))
    whole = {"weights": None, "weights_backbone": None}
    for name in ("lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large", "fcn_resnet50"):
        found.append(Subject("torchvision", name, DENSE, options=whole))
    few = {**whole, "min_size": 224, "max_size": 224}
    region = {**few, "rpn_post_nms_top_n_test": 50, "rpn_post_nms_top_n_train": 50, "box_detections_per_img": 10}
    found += [
        Subject("torchvision", "ssdlite320_mobilenet_v3_large", DENSE, (3, 320, 320), options=whole),
        Subject("torchvision", "retinanet_resnet50_fpn", DENSE, options=few),
        Subject("torchvision", "fcos_resnet50_fpn", DENSE, options=few),
    ]
    for name in ("fasterrcnn_mobilenet_v3_large_320_fpn", "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"):
        found.append(Subject("torchvision", name, DENSE, options=region))
    return found


def _build_torchvision(subject: Subject) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(subject.name, **{"weights": None, **subject.options})


def _ultralytics() -> list[Subject]:
    return [
        Subject("ultralytics", name, YOLO, (3, 256, 256))
        for name in ("yolov5n", "yolov8n", "yolov9t", "yolov10n", "yolo11n", "yolo12n")
    ]


def _build_ultralytics(subject: Subject) -> nn.Module:
    folder = os.environ.get(ULTRALYTICS)
    if folder:
        sys.path.append(folder)
    os.environ["YOLO_OFFLINE"] = "true"
    try:
        tasks = importlib.import_module("ultralytics.nn.tasks")
    except ImportError as error:
        raise NotInstalledError(f"ultralytics is not installed ({error}); set {ULTRALYTICS}") from error
    return tasks.DetectionModel(f"{subject.name}.yaml", verbose=False)


class NotInstalledError(Exception):
    """A source is not installed on this machine."""


BUILDERS: dict[str, Callable[[Subject], nn.Module]] = {
    "timm": _build_timm,
    "zoo": _build_zoo,
    "cifar": _build_cifar,
    "torchvision": _build_torchvision,
    "ultralytics": _build_ultralytics,
}


def write_listing() -> None:
    """Count the parameters of every model of timm on the meta device, choose, and write the listing."""
    import timm
    from timm.models._registry import _module_to_models  # pyright: ignore[reportPrivateUsage]

    best: dict[tuple[str, str], tuple[int, str]] = {}
    chosen: dict[str, dict[str, Any]] = {}
    for family, names in sorted(_module_to_models.items()):
        for name in sorted(names):
            prefix = cast("re.Match[str]", re.match(r"[a-z]+", name)).group()
            if name.startswith("test_") or prefix in ALIASES:
                continue
            try:
                with torch.device("meta"):
                    model = timm.create_model(name, pretrained=False)
            except RuntimeError:
                continue  # a name whose weights were withdrawn
            count = sum(p.numel() for p in model.parameters())
            known = best.get((family, prefix))
            if name in FURTHER:
                chosen[name] = {"name": name, "module": family, "params": count}
            if known is None or (count, name) < known:
                best[family, prefix] = (count, name)
    for (family, _), (count, name) in best.items():
        chosen[name] = {"name": name, "module": family, "params": count}
    for entry in chosen.values():
        entry.update(_input(entry["name"]))
    rows = sorted(chosen.values(), key=lambda entry: (entry["params"] > 100e6, entry["module"], entry["params"]))
    LISTING.parent.mkdir(parents=True, exist_ok=True)
    LISTING.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def _input(name: str) -> dict[str, Any]:
    """Return the native input size; above 256 pixels the smallest that the model accepts."""
    import timm

    with torch.device("meta"):
        native = timm.create_model(name, pretrained=False).pretrained_cfg["input_size"]
    if native[-1] <= 256:
        return {"size": native}
    for side in (224, 256, native[-1]):
        for options in ({"img_size": side}, {}):
            try:
                model = timm.create_model(name, pretrained=False, **options).eval()
                with torch.no_grad():
                    model(torch.zeros(1, native[0], side, side))
            except Exception:
                continue
            return {"size": [native[0], side, side], "options": options}
    return {"size": native}
