"""The weights that the papers' own code gives to the losses and to the labels beside them.

They hold for the scaling of our losses. Where that differs from the reference code, the weight here is converted, and
``source`` says so. Most are those of CIFAR-100 with 240 epochs, batch 64, SGD at 0.05: a start, not an optimum.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedSetting:
    """How much one loss counts in its paper's reference code.

    total = label_weight * labels + weight * min(1, t / warmup_fraction) * loss, t the fraction of the training done

    Attributes:
        weight: Factor of the loss as ``secateur distill`` computes it (see the loss for its scaling).
        label_weight: Factor of the labels' cross-entropy beside it.
        source: Where the numbers stand, and how they are converted.
        warmup_fraction: Fraction of the training in which the weight rises from 0; 0 means no warm-up.
    """

    weight: float
    label_weight: float
    source: str
    warmup_fraction: float = 0.0


_REP, _MD = "RepDistiller, scripts/run_cifar_distill.sh", "mdistiller, mdistiller/engine/cfg.py"
_WARMUP = 20 / 240

PUBLISHED: Mapping[str, PublishedSetting] = {
    "kd": PublishedSetting(0.9, 0.1, f"{_REP}: -r 0.1 -a 0.9, T = 4. The same in TAS (arXiv:1905.09717)."),
    "dkd": PublishedSetting(
        1.0, 1.0, f"{_MD}: CE_WEIGHT 1, ALPHA 1, BETA 8, T 4, WARMUP 20 of 240 epochs. BETA is 2 for ResNet-56 to 20.",
        _WARMUP,
    ),
    "dist": PublishedSetting(1.0, 1.0, "DIST (arXiv:2205.10536), Section 5: beta = gamma = 2 and T = 4 on CIFAR-100."),
    "standardized": PublishedSetting(
        9.0, 0.1, "logit-standardization-KD, README: --kd-weight 9 --base-temp 2, CE_WEIGHT 0.1."
    ),
    "hint": PublishedSetting(200.0, 1.0, f"{_REP}: -b 100 on a mean squared error of one layer; `hint_loss` is half."),
    "attention": PublishedSetting(1000.0, 1.0, "attention-transfer, README: --beta 1e+3 on the sum over the groups."),
    "vid": PublishedSetting(1.0, 1.0, f"{_REP}: -b 1 on the sum over the groups."),
    "rkd": PublishedSetting(25.0, 1.0, "RepDistiller, distiller_zoo/RKD.py: 25 for distances, 50 for angles, pooled."),
    "sp": PublishedSetting(3000.0, 1.0, f"{_REP}: -b 3000 on the last feature map."),
    "pkt": PublishedSetting(30000.0, 1.0, f"{_REP}: -b 30000 on a mean over pairs of images, pooled."),
    "crd": PublishedSetting(0.8, 1.0, f"{_REP}: -a 0 -b 0.8, pooled."),
    "review": PublishedSetting(
        1.0, 1.0, "ReviewKD, CIFAR-100/train.py: --kd-loss-weight 1 (0.6 to 8), --kd-warm-up 20 of 240 epochs.", _WARMUP
    ),
}  # fmt: skip
"""By the names of ``secateur distill --loss``."""


def published_label_weight(losses: Iterable[str]) -> float:
    """Return the weight of the labels beside losses: the largest of those published with them, 1 for losses unknown.

    So labels count 1 beside a loss of features, also where probabilities are compared too.
    """
    return max((PUBLISHED[name].label_weight if name in PUBLISHED else 1.0 for name in losses), default=1.0)
