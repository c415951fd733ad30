"""Numbers that describe the widths of a model and that its forward pass does not read, after a cut.

Many models hold such ints: ``num_features``, from which a new classifier is built; the number of channels of each
feature map; the sizes in a configuration. The graph knows what the forward pass reads, and sets that. These here are
judged by what both models show: the shapes of the tensors around the int, before and after the cut.

An int follows the cut if the tensors *nearest* to it that had this size all have the same new size. Nearest are those
of the module that holds it, then those of its children, and so on; an entry of a dict that names a module is about the
output of that module. Nothing is proven if some of these tensors differ, or if anything else in the model has this
size, such as a kernel, a feature map's height, or the number of layers. Such an int stays as it is and is listed.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from secateur.graph._shadow import mentioned_names, shadow_copy
from secateur.graph._size_ints import Attribute, steps_of
from secateur.graph._size_records import held_numbers, set_number
from secateur.graph.graph import CallShapes, ChannelGraph, SizeItem
from secateur.prune.cut_record import add_places_
from secateur.prune.model_runs import ComparisonRun
from secateur.prune.narrow_branches import ExpandChannels, original_names

_MOST_SHOWN = 6


@dataclass(frozen=True)
class DescribedWidth:
    """An int of a module that has the size of something that was cut.

    Attributes:
        place: Where it is, such as ``num_features`` or ``feature_info[0].num_chs``.
        before: Its value in the original.
        after: Its value in the cut model; the same as before if it is stale.
    """

    place: str
    before: int
    after: int


@dataclass(frozen=True)
class DescribedWidths:
    """What became of the ints that describe widths.

    Attributes:
        followed: Those that were set to the width after the cut.
        stale: Those of which it could not be proven what they count; they have the value of the original.
    """

    followed: tuple[DescribedWidth, ...] = ()
    stale: tuple[DescribedWidth, ...] = ()

    def undone(self) -> "DescribedWidths":
        """What there is to say of a model in which none of them was set."""
        return DescribedWidths((), (*self.stale, *(replace(width, after=width.before) for width in self.followed)))

    @property
    def warning(self) -> str:
        """A sentence about the stale ones; empty if there are none."""
        if not self.stale:
            return ""
        shown = ", ".join(f"{width.place} = {width.before}" for width in self.stale[:_MOST_SHOWN])
        more = f" and {len(self.stale) - _MOST_SHOWN} more" if len(self.stale) > _MOST_SHOWN else ""
        return (
            f"These numbers of the model may describe widths before the cut, because it could not be proven what they "
            f"count: {shown}{more}. The forward pass does not read them; set them before you use code that does."
        )


def update_described_widths_(model: nn.Module, small: nn.Module, graph: ChannelGraph) -> DescribedWidths:
    """Set the ints of a cut model that describe widths and are not read by its forward pass, in place.

    No code of the model names them, but code may read what it does not name: compare the outputs afterward.

    Args:
        model: The model that was cut; not changed.
        small: The cut model; the changed ints are added to its `CutRecord`.
        graph: The graph of ``model``.

    Returns:
        What was set, and what could not be decided; nothing if the cut model does not run.
    """
    names = original_names(small)
    try:
        after = _module_calls(small, graph)
    except Exception:  # A wrong cut: the comparison with the original says what is wrong.
        return DescribedWidths()
    sizes = _observe(model, small, names, graph, after)
    if not sizes.changed:
        return DescribedWidths()
    decided = _by_analogy(_undecided(model, small, names, sizes), sizes)
    follow = {one: new for one, new in decided.items() if new is not None and new != one.value}
    stale = [one for one, new in decided.items() if new is None]
    for one, new in follow.items():
        set_number(small.get_submodule(one.module), one.attribute, one.item, new)
    add_places_(small, [(one.module, one.attribute, one.item) for one in follow])
    return DescribedWidths(
        tuple(DescribedWidth(one.text, one.value, new) for one, new in follow.items()),
        tuple(DescribedWidth(one.text, one.value, one.value) for one in stale),
    )


@dataclass
class _Sizes:
    """The sizes of all dimensions before and after the cut, by the name of the module in the original.

    Attributes:
        outputs: Of the channels of what a module returns.
        others: Of its own tensors, and of the channels of what it is given.
        plain: Sizes of anything around a module that is not channels: kernels, feature maps, numbers of layers.
        channels: All sizes that are lengths of weights, or were cut, before the cut.
    """

    outputs: dict[str, set[tuple[int, int]]] = field(default_factory=lambda: defaultdict(set))
    others: dict[str, set[tuple[int, int]]] = field(default_factory=lambda: defaultdict(set))
    plain: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    channels: set[int] = field(default_factory=set[int])

    @property
    def changed(self) -> set[int]:
        """The sizes, before the cut, of which at least one dimension was cut."""
        pairs = (pair for sizes in (self.outputs, self.others) for found in sizes.values() for pair in found)
        return {before for before, after in pairs if before != after}

    def nearest(self, module: str, size: int) -> tuple[set[int], bool]:
        """Return the new sizes of the nearest dimensions that had this size, and whether anything else has it too."""
        by_depth: dict[int, set[int]] = defaultdict(set)
        for sizes in (self.outputs, self.others):
            for name, pairs in sizes.items():
                if (depth := _depth(module, name)) is not None:
                    by_depth[depth].update(after for before, after in pairs if before == size)
        for depth, found in sorted(by_depth.items()):
            if found:
                return found, size in self._plain_around(module, max(depth, 1))
        return set(), False

    def of_modules(self, modules: Sequence[str], size: int) -> set[int]:
        """Return the new sizes of the channels that these modules return, or else take, that had this size."""
        for sizes in (self.outputs, self.others):
            found = {after for name in modules for before, after in sizes.get(name, ()) if before == size}
            if found:
                return found
        return set()

    def _plain_around(self, module: str, most: int) -> set[int]:
        """Return all sizes in and around a module that are not channels, also how often one fits into another."""
        near = (name for name in self.plain if (depth := _depth(module, name)) is not None and depth <= most)
        plain = {size for name in near for size in self.plain[name]}
        return plain | {whole // part for whole in plain for part in plain if part and not whole % part}


def _depth(module: str, name: str) -> int | None:
    """Return how many levels a module is inside of another; None if it is not."""
    if name == module:
        return 0
    start = f"{module}." if module else ""
    return name[len(start) :].count(".") + 1 if name.startswith(start) else None


def _observe(
    model: nn.Module,
    small: nn.Module,
    names: Mapping[str, str],
    graph: ChannelGraph,
    after: Mapping[str, Sequence[CallShapes]],
) -> _Sizes:
    """Compare the shapes of all tensors of both models on the example; ``after`` are those of the cut one."""
    sizes, before = _Sizes(), graph.module_calls
    ours, theirs = dict(small.named_modules()), dict(model.named_modules())
    # What a branch returns has two widths: its own, and that of the stream to which it is expanded.
    wrappers = {name: name for name, module in ours.items() if isinstance(module, ExpandChannels)}
    for name, origin in (*names.items(), *wrappers.items()):
        for full, less in zip(before.get(origin, ()), after.get(name, ()), strict=False):
            _compare_call(full, less, sizes, origin, graph)
        if name in names and origin in theirs:
            _compare_weights(theirs[origin], ours[name], sizes, origin)
            sizes.plain[origin].add(len(list(theirs[origin].children())))
    sizes.channels |= sizes.changed
    return sizes


def _compare_call(full: CallShapes, less: CallShapes, sizes: _Sizes, name: str, graph: ChannelGraph) -> None:
    compared = (
        (full.taken, less.taken, sizes.others, frozenset[int]()),
        (full.returned, less.returned, sizes.outputs, _channel_dims(graph, name)),
    )
    for shapes, cut, held, known in compared:
        if [len(shape) for shape in shapes] != [len(shape) for shape in cut]:
            continue
        for number, pair in enumerate(zip(shapes, cut, strict=True)):
            for dim, (size, new) in enumerate(zip(*pair, strict=True)):
                if size != new or (number == 0 and dim in known):
                    held[name].add((size, new))
                else:
                    sizes.plain[name].add(size)


def _compare_weights(original: nn.Module, cut: nn.Module, sizes: _Sizes, name: str) -> None:
    for key, tensor in (*original.named_parameters(recurse=False), *original.named_buffers(recurse=False)):
        twin = getattr(cut, key, None)
        if not isinstance(twin, Tensor) or twin.dim() != tensor.dim():
            continue
        pairs = list(zip(tensor.shape, twin.shape, strict=True))
        sizes.others[name].update(pairs)
        sizes.channels |= set(tensor.shape[:2])
        sizes.plain[name] |= {size for size, new in pairs[2:] if size == new}


def _channel_dims(graph: ChannelGraph, name: str) -> frozenset[int]:
    activation = graph.activations.get(name)
    return frozenset() if activation is None else frozenset({activation.dim, *(o.dim for o in activation.others)})


def _module_calls(model: nn.Module, graph: ChannelGraph) -> dict[str, list[CallShapes]]:
    """Return what every module took and returned on the example."""
    found: dict[str, list[CallShapes]] = defaultdict(list)

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            found[name].append(CallShapes.of(args, kwargs, out))

        return hook

    # A copy runs: a forward pass may write to parameters and buffers.
    runner = shadow_copy(model)
    for name, module in runner.named_modules():
        # Scripted parts cannot be watched; they hold no numbers that Python reads.
        if not isinstance(module, torch.jit.ScriptModule):
            module.register_forward_hook(watch(name), with_kwargs=True)
    ComparisonRun().outputs(runner, graph.example)
    return found


@dataclass(frozen=True)
class _Number:
    """An int that a module holds.

    Attributes:
        module: The name of the module, in the cut model.
        origin: The same, in the original.
        attribute: See `SizeEdit`.
        item: See `SizeEdit`.
        value: Its value.
        about: The modules that the dict around it names.
        column: What all numbers that are of the same kind have in common; None if it stands alone.
        kind: The class of the module.
    """

    module: str
    origin: str
    attribute: str
    item: SizeItem
    value: int
    about: tuple[str, ...]
    column: tuple[object, ...] | None
    kind: type[nn.Module]

    @property
    def text(self) -> str:
        """Its place in the original."""
        return str(Attribute(self.origin, self.attribute, self.item))

    @property
    def key(self) -> str:
        """The last name on the way to it."""
        return next((step for step in reversed(steps_of(self.item)) if isinstance(step, str)), self.attribute)


def _undecided(
    model: nn.Module, small: nn.Module, names: Mapping[str, str], sizes: _Sizes
) -> dict[_Number, int | None]:
    """Return the ints of a size that was cut, which the cut has not set and the forward pass does not read.

    Returns:
        The new value of each: its old one if it is no width, None if that cannot be decided.
    """
    read, changed = mentioned_names(model), sizes.changed
    originals = dict(model.named_modules())
    known = {name.replace(".", "_"): name for name in originals if name}
    seen: set[int] = set()
    decided: dict[_Number, int | None] = {}
    for name, origin in names.items():
        module, original = small.get_submodule(name), originals.get(origin)
        # PyTorch's own layers have had the sizes of their weights since the cut.
        if original is None or type(module).__module__.startswith("torch."):
            continue
        before = {(key, item): value for key, item, value in held_numbers(original)}
        columns: dict[object, list[_Number]] = defaultdict(list)
        for number in _numbers(module, original, (name, origin), known, seen):
            columns[number.column or number].append(number)
        for column in columns.values():
            for one in column:
                same = before.get((one.attribute, one.item)) == one.value
                if same and one.value in changed and one.key not in read:
                    decided[one] = _new_value(one, column, sizes)
    return decided


_FEWEST_LIKE_IT = 2


def _by_analogy(decided: dict[_Number, int | None], sizes: _Sizes) -> dict[_Number, int | None]:
    """Decide the numbers whose size is, by chance, also that of a feature map or a kernel.

    If this attribute of other modules of the same class follows, it is a width here too.
    """
    like = Counter((one.kind, one.attribute, one.item) for one, new in decided.items() if new not in {None, one.value})
    found = dict(decided)
    for one, new in decided.items():
        if new is None and not one.column and like[one.kind, one.attribute, one.item] >= _FEWEST_LIKE_IT:
            nearest, _ = sizes.nearest(one.origin, one.value)
            found[one] = nearest.pop() if len(nearest) == 1 else None
    return found


def _numbers(
    module: nn.Module, original: nn.Module, names: tuple[str, str], known: Mapping[str, str], seen: set[int]
) -> Iterator[_Number]:
    """Yield the ints of a module, without those in objects that another module or the original holds too."""
    found = [one for one in held_numbers(module) if not isinstance(getattr(module, one[0], None), Tensor)]
    keys = dict.fromkeys(key for key, _, _ in found)
    shared = {key for key in keys if _is_shared(getattr(module, key), getattr(original, key, None), seen)}
    for key, item, value in found:
        if key in shared:
            continue
        steps = steps_of(item)
        held: Any = _holder(module, key, steps) if steps else None
        around = list(cast(dict[str, Any], held).values()) if isinstance(held, dict) else []
        # Module names have points or underscores between their parts.
        texts = (each.replace(".", "_") for each in around if isinstance(each, str))
        about = tuple(known[text] for text in texts if text in known)
        shape: list[object] = [None if isinstance(step, int) else step for step in steps]
        if around and all(type(each) is int for each in around):
            shape[-1] = None
        yield _Number(*names, key, item, value, about, (key, *shape) if None in shape else None, type(module))


def _is_shared(value: Any, original: Any, seen: set[int]) -> bool:
    """Return whether an object was met in another module, or belongs to the original too and must not be changed."""
    if isinstance(value, int | tuple):
        return False
    known = value is original or id(value) in seen
    seen.add(id(value))
    return known


def _holder(module: nn.Module, key: str, steps: Sequence[int | str]) -> Any:
    """Return what holds the last step."""
    held: Any = getattr(module, key)
    for step in steps[:-1]:
        held = held[step] if isinstance(step, int) or isinstance(held, dict) else getattr(held, step)
    return held


def _new_value(one: _Number, column: Sequence[_Number], sizes: _Sizes) -> int | None:
    # A column in which one number is no width does not list widths.
    if one.about:
        found = sizes.of_modules(one.about, one.value)
        widths = all(sizes.of_modules(other.about, other.value) for other in column)
        return one.value if not found or not widths else found.pop() if len(found) == 1 else None
    values = [other.value for other in column]
    # Neither does the shape of an image: channels, height and width, the last two often the same.
    if len(values) > 1 and (not set(values) <= sizes.channels or (len(values) < 4 and values[-1] == values[-2])):
        return one.value
    found, elsewhere = sizes.nearest(one.origin, one.value)
    if found <= {one.value}:
        return one.value
    return None if len(found) > 1 or elsewhere or values.count(one.value) > 1 else found.pop()
