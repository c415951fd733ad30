"""Searches that learn take mixed images as they take others: labels are probabilities then."""

from dataclasses import replace

import pytest
import swp_runs
import tas_runs
from slow_search import data as noise

from secateur.data import Augment, ImageData
from secateur.nas import Labels
from secateur.search import SearchResult

STRATEGIES = {
    "tas": (tas_runs.net, tas_runs.quick()),
    "swp": (swp_runs.staged, swp_runs.quick()),
    "swp with labels alone": (swp_runs.staged, swp_runs.quick(supervision=Labels(), cuts=())),
}


def told(found: SearchResult) -> str:
    """What was learned on the way, without the times."""
    notes = found.notes.get("training") or found.notes["search"]
    return repr([{name: value for name, value in epoch.items() if name != "seconds"} for epoch in notes])


def searched(kind: str, data: ImageData) -> SearchResult:
    make, strategy = STRATEGIES[kind]
    return tas_runs.run(make(), strategy, data=data)


@pytest.mark.parametrize("kind", STRATEGIES)
def test_a_search_learns_from_mixed_images(kind: str) -> None:
    mixed = replace(noise(), augment=Augment(padding=1, auto_augment="rand-m5", erase=0.3, mixup=0.3, cutmix=1.0))
    found, again = searched(kind, mixed), searched(kind, mixed)
    assert found.cost.macs <= 0.5 * found.original.macs
    assert again.architecture == found.architecture
    assert told(again) == told(found)
    assert told(searched(kind, noise())) != told(found)
