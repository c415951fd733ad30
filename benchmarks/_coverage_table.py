"""Write the tables of docs/coverage.md, and a digest of failures and frozen parameters by cause."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from _coverage_models import CNN, KINDS, ZOO, Subject
from _record import table

Row = dict[str, Any]
Rows = dict[str, Row]
REMOVED = 0.05


def verdict(row: Row) -> str:
    """Return ``ok``, ``whole`` (hardly anything prunable), ``not installed``, or the stage at which ours failed."""
    if row["stage"] in ("not installed", "build", "forward"):
        return "not built" if row["stage"] != "not installed" else "not installed"
    if row["stage"] != "done":
        return f"failed in {row['stage']}"
    return "ok" if row["kept_params"] <= 1 - REMOVED else "whole"


def peer_verdict(row: Row | None) -> str:
    """Return the verdict on the peer: constructor and step, run, train, same output shapes, fewer parameters."""
    if row is None:
        return "not run"
    if row["stage"] in ("not installed", "build", "forward"):
        return "not built" if row["stage"] != "not installed" else "not installed"
    if row["stage"] != "done":
        return f"failed in {row['stage']}"
    if not row["same_shapes"]:
        return "output shape changed"
    return "ok" if row["kept_params"] <= 1 - REMOVED else "whole"


def seconds(row: Row) -> float:
    """Return the seconds of trace and cut, including verification."""
    return row["trace_s"] + row["cut_s"]


def digest(ours: Rows) -> str:
    """List failures, axes frozen by verification, whole models and frozen parameters by cause, as plain text."""
    done = {name: row for name, row in ours.items() if verdict(row) not in ("not installed", "not built")}
    verdicts = {name: verdict(row) for name, row in ours.items()}
    good = sum(v == "ok" for v in verdicts.values())
    first = sum(bool(r.get("first_try")) and verdicts[n] == "ok" for n, r in done.items())
    lines = [f"{len(ours)} models run, {len(done)} built; {good} ok, {first} of them at the first try", ""]
    failed = {n: r for n, r in ours.items() if verdicts[n] not in ("ok", "whole")}
    lines += ["== FAILED, by stage and message"]
    lines += _grouped(failed, lambda r: [f"{verdict(r)}: {r.get('error') or r.get('train', '')}"[:170]], detail="place")
    lines += ["", "== WHOLE (under 5 % of the parameters removed), by the largest reason"]
    whole = {n: r for n, r in ours.items() if verdicts[n] == "whole"}
    lines += _grouped(whole, lambda r: [f["why"] for f in r["frozen"][:1]] or [f"refrozen: {r['refrozen'][:1]}"])
    lines += ["", "== NOT AT THE FIRST TRY: frozen by verification"]
    retried = {n: r for n, r in ours.items() if r.get("refrozen")}
    lines += _grouped(retried, lambda r: [why for why, _ in r["refrozen"]])
    lines += ["", "== FROZEN PARAMETERS by reason: models with the share of their parameters, sum of shares first"]
    lines += _shares(done)
    lines += ["", "== NOT EXACT IN FLOAT64 (1e-12)"]
    inexact = {n: r for n, r in done.items() if isinstance(r.get("exact64"), str) or (r.get("exact64") or 0) > 1e-12}
    lines += [f"  {name}: {row['exact64']}" for name, row in inexact.items()]
    lines += ["", "== SLOWEST trace + cut, s"]
    timed = sorted((r for r in done.values() if "cut_s" in r), key=seconds, reverse=True)[:15]
    lines += [
        f"  {r['model']}: trace {r['trace_s']:.1f} cut {r['cut_s']:.1f} ({r['params'] / 1e6:.0f} M)" for r in timed
    ]
    return "\n".join(lines) + "\n"


def _grouped(rows: Rows, causes: Callable[[Row], Sequence[str]], detail: str = "") -> list[str]:
    groups: dict[str, list[str]] = defaultdict(list)
    places: dict[str, str] = {}
    for name, row in rows.items():
        for cause in causes(row):
            groups[cause].append(name.partition("/")[2])
            places.setdefault(cause, row.get(detail, "") if detail else "")
    lines: list[str] = []
    for cause, names in sorted(groups.items(), key=lambda pair: -len(pair[1])):
        lines.append(f"{len(names):4d}  {cause}" + (f"  [{places[cause]}]" if places[cause] else ""))
        lines.append("        " + " ".join(names))
    return lines


def _shares(rows: Rows) -> list[str]:
    groups: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for name, row in rows.items():
        for entry in row.get("frozen", []):
            if entry["share"] >= 0.003:
                groups[entry["why"]].append((entry["share"], name.partition("/")[2]))
    lines: list[str] = []
    for why, found in sorted(groups.items(), key=lambda pair: -sum(share for share, _ in pair[1])):
        lines.append(f"{sum(share for share, _ in found):6.2f}  {why} ({len(found)} models)")
        lines.append("        " + " ".join(f"{n}:{share:.0%}" for share, n in sorted(found, reverse=True)[:25]))
    return lines


def document(every: list[Subject], ours: Rows, peer: Rows, known: Row) -> str:
    """Return the text of docs/coverage.md."""
    order = [s for s in every if s.key in ours]
    versions = ", ".join(f"{name} {number}" for name, number in known["versions"].items())
    text = (
        "# Coverage\n\nGenerated by `python benchmarks/coverage.py`; the rows are in `benchmarks/results/coverage/`. "
        f"Last run: {known['date']}, `{known['command']}`, commit {known['commit']}, Python {known['python']}, "
        f"{versions}, {known['cpu']} ({known['cores']} cores, shared), one thread; processor seconds.\n\n"
        "Every model has random weights made loud (no silent branch). **ok**: traced, half of every prunable axis "
        "removed (at least 5 % of the parameters), sliced equal to masked on the example (or"
        " its middle, where the model makes the very same calls on that), forward and backward in "
        "training mode run. **First try**: verification froze nothing. **Whole**: under 5 % could be removed; still a "
        "correct model. For Torch-Pruning, which verifies nothing, ok means that constructor, step, forward and "
        "backward run, output shapes stay and at least 5 % of the parameters are gone; its settings are those of its "
        "README and example scripts (see `benchmarks/_coverage_peer.py`). Both have the "
        "same limits of time and memory.\n\n"
    )
    text += "## Summary\n\n" + _summary(order, ours, peer) + "\n" + _ratios(order, ours, peer)
    text += "\n## Worst cases\n\n" + _worst(order, ours)
    return text + "\n## All models\n\n" + _all(order, ours, peer)


def _summary(order: list[Subject], ours: Rows, peer: Rows) -> str:
    header = ["class", "models", "ok", "first try", "whole", "failed", "prunable parameters, median (min)"]
    header += ["prunable MACs, median (min)", "Torch-Pruning ok"]
    rows: list[list[str]] = []
    for kind in (*KINDS, None):
        mine = [ours[s.key] for s in order if kind == s.kind or (kind is None and s.kind != ZOO)]
        built = [r for r in mine if verdict(r) not in ("not built", "not installed")]
        if not built:
            continue
        verdicts = [verdict(r) for r in built]
        theirs = [peer_verdict(peer[r["model"]]) for r in built if r["model"] in peer]
        rows.append(
            [
                kind or f"**all but {ZOO}**",
                str(len(built)),
                _of(verdicts.count("ok"), len(built)),
                _of(
                    sum(bool(r.get("first_try")) and v == "ok" for r, v in zip(built, verdicts, strict=True)),
                    len(built),
                ),
                str(verdicts.count("whole")),
                str(sum(v.startswith("failed") for v in verdicts)),
                _spread([r["final_parameter_share"] for r in built if "final_parameter_share" in r]),
                _spread([r["mac_share"] for r in built if "mac_share" in r]),
                _of(theirs.count("ok"), len(theirs)) if theirs else "not run",
            ]
        )
    return table(header, rows)


def _ratios(order: list[Subject], ours: Rows, peer: Rows) -> str:
    both = [
        (ours[s.key], peer[s.key])
        for s in order
        if s.key in peer and s.kind != ZOO and verdict(ours[s.key]) == "ok" == peer_verdict(peer[s.key])
    ]
    lines: list[str] = []
    if both:
        full = statistics.geometric_mean(seconds(a) / b["prune_s"] for a, b in both)
        bare = statistics.geometric_mean((a["trace_s"] + a["slice_s"]) / b["prune_s"] for a, b in both)
        lines.append(
            f"Trace + cut takes {full:.2f} times Torch-Pruning's constructor + step in the geometric mean over the "
            f"{len(both)} models that both can do ({bare:.2f} without the forward passes of the verification)."
        )
    timed = sorted((ours[s.key] for s in order if "cut_s" in ours[s.key]), key=seconds, reverse=True)
    small = [row for row in timed if row["params"] <= 60e6]
    for title, rows in (("Slowest model", timed), ("Slowest model of at most 60 M parameters", small)):
        if rows:
            row = rows[0]
            lines.append(
                f"{title}: {row['model']}, trace {row['trace_s']:.1f} s + cut {row['cut_s']:.1f} s "
                f"({row['params'] / 1e6:.0f} M parameters, forward {row['forward_s']:.2f} s)."
            )
    large = [row for row in timed if row["params"] >= 250e6]
    if large:
        worst = max(large, key=lambda row: row["trace_s"])
        memory = max(row["trace_peak_mb"] for row in large)
        lines.append(
            f"Models of at least 250 M parameters ({', '.join(row['model'] for row in large)}): the slowest trace "
            f"takes {worst['trace_s']:.1f} s ({worst['model']}), the most memory beyond the weights is {memory:.0f} MB."
        )
    shares = {s.name: ours[s.key].get("final_parameter_share") for s in order if s.kind == CNN}
    low = {name: share for name, share in shares.items() if share is not None and share < 0.9}
    if shares:
        named = ", ".join(f"{name} {share:.0%}" for name, share in sorted(low.items(), key=lambda pair: pair[1]))
        lines.append(
            f"CNNs with at least 90 % of their parameters on prunable axes: {len(shares) - len(low)} of {len(shares)}"
            + (f"; below: {named}." if low else ".")
        )
    missing = [s.name for s in order if verdict(ours[s.key]) in ("not installed", "not built")]
    if missing:
        lines.append(f"Not built on this machine: {', '.join(missing)}.")
    return "\n".join(f"- {line}" for line in lines) + "\n"


def _worst(order: list[Subject], ours: Rows) -> str:
    """List models that failed, were retried, stayed whole or are less than half prunable, by reason."""
    groups: dict[str, list[str]] = defaultdict(list)
    for subject in order:
        row = ours[subject.key]
        result = verdict(row)
        if result.startswith("failed"):
            groups[f"{result}: {row.get('error') or row.get('train', '')}"[:220]].append(subject.name)
        elif row.get("refrozen"):
            groups[f"not at the first try: {row['refrozen'][0][0]}"].append(subject.name)
        elif "final_parameter_share" in row and row["final_parameter_share"] < 0.8:
            why = row["frozen"][0]["why"] if row["frozen"] else "not known"
            share = f"{subject.name} ({row['final_parameter_share']:.0%} prunable)"
            groups[f"stays whole: {why}"].append(share)
    rows = sorted(groups.items(), key=lambda pair: -len(pair[1]))
    return table(["cause", "models"], [[_cell(cause), ", ".join(names)] for cause, names in rows])


def _all(order: list[Subject], ours: Rows, peer: Rows) -> str:
    header = ["model", "M params", "result", "first try", "prunable params", "prunable MACs", "kept params", "max rel"]
    header += ["forward s", "trace s", "cut s", "trace MB", "Torch-Pruning", "its s", "ratio"]
    rows: list[list[str]] = []
    for kind in KINDS:
        group = [s for s in order if s.kind == kind]
        rows += [[f"**{kind}**", *[""] * (len(header) - 1)]] if group else []
        rows += [_line(ours[s.key], peer.get(s.key)) for s in group]
    return table(header, rows)


def _line(row: Row, other: Row | None) -> list[str]:
    theirs = peer_verdict(other)
    result = verdict(row) + (" (batch 1)" if row.get("train", "").endswith("at batch 1") else "")
    cells = [row["model"], f"{row['params'] / 1e6:.1f}" if "params" in row else "", result]
    cells.append({True: "yes", False: "no", None: ""}[row.get("first_try")])
    cells += [f"{row[k]:.0%}" if k in row else "" for k in ("parameter_share", "mac_share", "kept_params")]
    cells.append(f"{row['max_rel']:.0e} ({row['dtype']})" if "max_rel" in row else "")
    cells += [f"{row[k]:.2f}" if k in row else "" for k in ("forward_s", "trace_s", "cut_s")]
    cells.append(f"{row['trace_peak_mb']:.0f}" if "trace_peak_mb" in row else "")
    cells.append(theirs)
    cells.append(f"{other['prune_s']:.2f}" if other and "prune_s" in other else "")
    both = other and theirs == "ok" and verdict(row) == "ok"
    return [*cells, f"{seconds(row) / other['prune_s']:.2f}" if both and other else ""]


def _of(count: int, total: int) -> str:
    return f"{count} ({count / total:.1%})" if total else ""


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1%} ({min(values):.1%})" if values else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
