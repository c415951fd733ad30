"""The command that looks at a model."""

from rich.text import Text

from secateur.cli import _options as options
from secateur.cli._boundary import out, told
from secateur.cli._options import AttentionName


@told
def inspect(
    *,
    model: options.Model,
    weights: options.Weights = None,
    data: options.MaybeData = None,
    image_size: options.ImageSize = None,
    divisor: options.Divisor = 1,
    min_width: options.MinWidth = 1,
    min_kept: options.MinKept = 0.25,
    include: options.Include = None,
    exclude: options.Exclude = None,
    keep_whole: options.KeepWhole = None,
    axis_divisor: options.AxisDivisor = None,
    axis_min_width: options.AxisMinWidth = None,
    axis_min_kept: options.AxisMinKept = None,
    attention: options.Attention = AttentionName.DIMENSIONS,
    untied: options.Untied = False,
    tree: options.ShowTree = False,
    draw: options.Draw = None,
    as_json: options.AsJson = False,
    trust_source: options.TrustSource = False,
    seed: options.Seed = 0,
    debug: options.Debug = False,
) -> None:
    """Show what could be cut: the channel axes, what is frozen and why, and the reachable costs."""
    import json

    from secateur.cli import _choices
    from secateur.cli._inputs import Inputs
    from secateur.cli._survey import print_survey, print_tree
    from secateur.cli._tables import print_written
    from secateur.pipeline import survey
    from secateur.report import check_drawing, write_drawing
    from secateur.search import SearchSpace

    if draw is not None:
        check_drawing(draw)
    choices = _choices.choices_of(include, exclude, keep_whole)
    space = SearchSpace(min_width, divisor, min_kept, _choices.rules_of(axis_divisor, axis_min_width, axis_min_kept))
    inputs = Inputs(model, weights, data, image_size=image_size, trust_source=trust_source, seed=seed)
    heads = _choices.heads_of(attention)
    branches = _choices.branches_of(untied)
    found = survey(inputs.opened.model, inputs.example(1), choices=choices, heads=heads, branches=branches, space=space)
    name = inputs.opened.name
    if as_json:
        out().print(Text(json.dumps({"model": name, **found.to_json()}, indent=1)), soft_wrap=True)
    elif tree:
        print_tree(found, name)
    else:
        print_survey(found, name)
    if draw is not None:
        write_drawing(draw, found.graph, name)
    if not as_json:
        print_written([draw] if draw is not None else [])
    if draw is None and not as_json:
        out().print(Text("Wrote nothing: inspect only looks."))
