"""Tables of the benchmark results, and the pages that show them: no number there is typed by hand.

    python bench/table.py            rewrites what stands between the markers of each result
    python bench/table.py --print    prints the tables

A result ``bench/results/NAME.json`` goes between ``<!-- bench:NAME -->`` and ``<!-- /bench:NAME -->`` of
``docs/benchmarks.md``, or of the page that ``PAGES`` names; markers that a page lacks are added at its end.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs"
PAGES = {"reliability": "reliability.md", "ray": "scale.md"}
"""Where a result stands, if not in ``benchmarks.md``."""

TARGETS = {"ordinary": 4.0, "best_peer": 1.8, "bound": 0.40, "memory": 0.05, "pairs": 4.0}


def extraction(result: dict[str, Any]) -> str:
    """The table of ``bench/extraction.py``, with its targets, as Markdown."""
    runs = _runs(result)
    peak = _peak(result, result["dtype"])
    tokens = result["texts"]["tokens"]
    bound = {task: peak * 1e12 / (flops / tokens) for task, flops in result["flops"].items()}
    speed = {key: tokens / _median(kept, result["clock"]) for key, kept in runs.items() if kept}
    memory = {key: _median(kept, "above_mb") for key, kept in runs.items() if kept}
    wrong = {key for key in result["subjects"] if not _right(result, key)}
    ordinary = result["ordinary"]

    lines = [
        _caption(result, peak, bound),
        "",
        f"| way | layer {result['layer']}: tokens/s (range) | × loop | % of bound | MB above the model "
        "| every layer: tokens/s (range) | × loop | MB above the model | numbers |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for key, subject in result["subjects"].items():
        cells = [subject["label"]]
        for task in ("one", "all"):
            kept = runs[key, task]
            if not kept:
                cells += ["–"] * (4 if task == "one" else 3)
                continue
            low, high = (tokens / pick(run[result["clock"]] for run in kept) for pick in (max, min))
            cells.append(f"{speed[key, task]:,.0f} ({low:,.0f}–{high:,.0f})")
            against = speed.get((ordinary, task))
            cells.append(f"{speed[key, task] / against:.2f}" if against else "–")
            if task == "one":
                cells.append(f"{100 * speed[key, task] / bound[task]:.0f}")
            cells.append(f"{memory[key, task]:,.0f}")
        cells.append(_numbers(result, key))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(
        [*lines, "", *_targets(result, speed, memory, bound["one"], wrong), "", _versions(result), "", _notes(result)]
    )


def profile_reading(result: dict[str, Any]) -> str:
    """The table of ``bench/profile_reading.py`` as Markdown."""
    lines = ["| operator | share of processor time | calls |", "|---|---|---|"]
    lines += [f"| `{name}` | {share:.0%} | {calls:,} |" for name, share, calls in result["operators"]]
    head = (
        f"Reading layer {result['layer']} of {result['texts']} texts ({result['tokens']:,} tokens) with affectlens, one thread, "
        f"under the profiler ({result['seconds']:.1f} s, {result['date'][:10]}):"
    )
    return "\n".join([head, "", *lines])


CORPUS_TARGETS = (
    # what, where, at least
    ("top 5 over all emotions, held-out topics, best layer", ("corpora", "bundled", "at best layer", "top5"), 0.40),
    ("AUROC there", ("corpora", "bundled", "at best layer", "auroc"), 0.89),
    ("correlation of the first component with pleasure", ("corpora", "bundled", "geometry", "valence", "estimate"), 0.80),
    ("correlation of the second component with arousal", ("corpora", "bundled", "geometry", "arousal", "estimate"), 0.60),
    ("top 3 on mufxio's stories, beside their vectors'", ("transfer", "mufxio by bundled", "top3", "share", "estimate"), 0.80),
)  # fmt: skip


def corpus(result: dict[str, Any]) -> str:
    """The tables of ``bench/corpus.py`` as Markdown."""
    corpora, layer, ratings = result["corpora"], result["layer"], result["layer of correlations"]
    lines = [
        f"{result['model']}, {result['dtype']}, {result['date'][:10]}. Correlations with human ratings at layer {ratings} (fixed "
        f"beforehand), the rest at layer {layer}, where the bundled stories separate best. Intervals are of 95 %; p is against "
        "the null of the respective study.",
        "",
        "| stories | concepts | used | top 1 | top 3 | AUROC | stability | first component: pleasure | second: arousal |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in corpora.items():
        best, kinds = found["at best layer"], found["geometry"]
        cells = [name, str(found["concepts"]), f"{found['stories']['kept']:,}"]
        chance = found["at best layer, labels exchanged"]
        cells += [f"{_estimate({'estimate': best[key]})}, null ≤ {chance[key][2]:.2f}" for key in ("top1", "top3", "auroc")]
        cells += [_estimate(found["stability"]), _estimate(kinds.get("valence")), _estimate(kinds.get("arousal"))]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Each at its own best layer over all its concepts; null: 97.5 % of it, labels exchanged within topics. Over the "
        f"{len(result['shared'])} concepts that all of them have, at layer {layer}:",
        "",
        "| stories | read by vectors of | top 1 | top 3 | share of what their own vectors reach (top 3) |",
        "|---|---|---|---|---|",
    ]
    for name, own in result["separation of shared"].items():
        lines.append(f"| {name} | the same stories, held-out topics | {_estimate(own['top1'])} | {_estimate(own['top3'])} | 1 |")
        for pair, moved in result["transfer"].items():
            if pair.startswith(f"{name} by "):
                accuracy = [_estimate(moved[key]["accuracy"]) for key in ("top1", "top3")]
                lines.append(
                    f"| {name} | {pair.split(' by ')[1]} | {' | '.join(accuracy)} | {_estimate(moved['top3']['share'])} |"
                )
    lines += ["", "| vectors of | mean cosine of the vectors of a concept |", "|---|---|"]
    lines += [f"| {pair} | {_estimate(found['mean'])} |" for pair, found in result["agreement"].items()]
    lines += [
        "",
        f"Fewer bundled stories of each emotion, at layer {ratings}: medians (ranges) over random samples. Folds are dealt over "
        "stories here.",
        "",
        "| stories | top 5 | AUROC | first component: pleasure | second: arousal |",
        "|---|---|---|---|---|",
    ]
    for row in result["curve"]:
        cells = [
            "–"
            if row[key] is None
            else "{:.2f} ({:.2f}–{:.2f})".format(*row[key])
            if row["samples"] > 1
            else f"{row[key][0]:.2f}"
            for key in ("top5", "auroc", "valence", "arousal")
        ]
        lines.append(f"| {row['stories']} | {' | '.join(cells)} |")
    if result["curve of transfer"]:
        lines += [
            "",
            f"Top 3 on mufxio's stories, shared concepts, layer {layer}, by vectors of fewer stories of each concept: medians "
            "(ranges) over random samples.",
            "",
            "| stories | bundled vectors | mufxio's own, held-out topics |",
            "|---|---|---|",
        ]
        for row in result["curve of transfer"]:
            cells = ["{:.2f} ({:.2f}–{:.2f})".format(*row[key]) for key in ("other", "own")]
            lines.append(f"| {row['stories']} | {' | '.join(cells)} |")
    lines += ["", "| target, on the demo model | wanted | measured | |", "|---|---|---|---|"]
    for what, path, least in CORPUS_TARGETS:
        found = result
        for key in path:
            found = found.get(key, {})
        if found:
            met = "met" if found["value"] >= least else "**missed**"
            lines.append(f"| {what} | ≥ {least:.2f} | {found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}] | {met} |")
    return "\n".join(lines)


def tuned_pair(result: dict[str, Any]) -> str:
    """The table of ``bench/tuned_pair.py`` as Markdown."""
    tone, texts, settings = result["tone"], result["tone of the texts"], result["settings"]
    lines = [
        f"{result['model']}, layer {result['layer']}, {result['date'][:10]}. Tuned on {result['texts']} replies in the tone "
        f"“{tone}”, or on as many plain ones: {settings['epochs']} epochs, batch {settings['batch']}, rate "
        f"{settings['rate']:g}, {result['training'][tone]['seconds']:.0f} s. In the replies themselves the model as it was reads "
        f"{tone} as number {texts['rank']} of 171 (toned minus plain replies).",
        "",
        f"| pair | prompts | rank of {tone} among the shifts of 171 emotions | its shift (cosine) | largest shifts |",
        "|---|---|---|---|---|",
    ]
    for pair, found in result["pairs"].items():
        for prompts, ranks in found["ranks"].items():
            largest = ", ".join(f"{name} {shift:+.3f}" for name, shift in ranks["up"][:5])
            lines.append(f"| {pair} | {prompts} | {ranks['rank']} | {ranks['shift']:+.3f} | {largest} |")
    lines += ["", "| pair | finding | value | p | verdict |", "|---|---|---|---|---|"]
    for pair, found in result["pairs"].items():
        for finding in found["findings"]:
            if (value := finding["estimate"]) is not None:
                p = f"{finding['null']['p']:.2g}" if finding["null"] else "–"
                cell = f"{value['value']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"
                lines.append(f"| {pair} | {finding['claim']} | {cell} | {p} | {finding['verdict']} |")
    return "\n".join(lines)


def training(result: dict[str, Any]) -> str:
    """The tables of ``bench/training.py`` as Markdown."""
    tone, settings = result["tone"], result["settings"]
    lines = [
        f"{result['model']}, layer {result['layer']}, {result['threads']} threads, {result['date'][:10]}. {result['texts']} "
        f"chats, {settings['epochs']} epochs, batch {settings['batch']}, rate {settings['rate']:g}. {result['prompts']} bundled "
        "prompts; shifts in z with intervals over prompts. Certain: the interval excludes 0; stand out: beyond 95 % of random "
        "directions, too.",
        "",
        f"| tuned to | step | shift of {tone} | 95 % of random directions | its rank among {result['emotions']} | certain "
        "| stand out | distance (still; random) | largest shifts |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for key, rows in result["shifts"].items():
        for row in rows:
            value, distance = row["shift"], row["distance"]
            cells = [
                f"{value['value']:+.2f} [{value['low']:+.2f}, {value['high']:+.2f}]",
                f"{row['random']:.2f}",
                str(row["rank"]),
                str(row["certain"]),
                str(row["all beyond"]),
                f"{distance['value']:.2f} ({row['still']:.2f}; {row['random distance']:.2f})",
                ", ".join(f"{name} {z:+.1f}" for name, z in row["up"][:3]),
            ]
            lines.append(f"| {key} | {row['step']} | {' | '.join(cells)} |")
    lines += ["", "| | wanted | measured | |", "|---|---|---|---|"]
    for kind, step in result["noticed"].items():
        wanted = "within the run" if kind == "beyond the control" else "–"
        met = "" if wanted == "–" else "**missed**" if step is None else "met"
        said = "not noticed" if step is None else f"from step {step} on"
        lines.append(f"| {tone} is noticed, {kind} | {wanted} | {said} | {met} |")
    for key, cost in result["cost"].items():
        met = "met" if cost["overhead"] < result["wanted"] else "**missed**"
        measured = f"{cost['overhead']:.1%} ({cost['seconds']:.0f} of {cost['elapsed']:,.0f} s, {cost['readings']} readings)"
        lines.append(f"| overhead, tuned to {key} | < {result['wanted']:.0%} | {measured} | {met} |")
    lines += [
        "",
        "| tuned to | cosine of the vectors with those of few stories | the same at the start | change | chance | vectors |",
    ]
    lines.append("|---|---|---|---|---|---|")
    for key, found in result["drift"].items():
        values = [found[part] for part in ("kept", "most", "change")]
        shown = [f"{each['value']:.2f} [{each['low']:.2f}, {each['high']:.2f}]" for each in values]
        stories = f"{found['texts']} stories of {found['concepts']} emotions"
        lines.append(f"| {key} ({stories}) | {' | '.join(shown)} | {found['chance']:.2f} | {found['verdict']} |")
    return "\n".join(lines)


def _estimate(found: dict[str, Any] | None) -> str:
    """``0.81 [0.67, 0.90], p = 0.001``."""
    if not found:
        return "–"
    value, null = found["estimate"], found.get("null")
    p = f", p = {null['p']:.2g}" if null else ""
    return f"{value['value']:.2f} [{value['low']:.2f}, {value['high']:.2f}]{p}"


def one_line(run: dict[str, Any], tokens: int) -> str:
    """One run, for the progress on stderr."""
    if "seconds" not in run:
        return f"failed: {run['error']}"
    verdict = "" if run["right"] else f", WRONG (cosine {run['cosine']:.4f})"
    return (
        f"{tokens / run['seconds']:7,.0f} tokens/s, {tokens / run['cpu_seconds']:7,.0f} per processor second, "
        f"{run['above_mb']:6,.0f} MB{verdict}"
    )


def _runs(result: dict[str, Any]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    kept: dict[tuple[str, str], list[dict[str, Any]]] = {(key, t): [] for key in result["subjects"] for t in ("one", "all")}
    for entry in result["rounds"]:
        for run in entry["runs"]:
            if "seconds" in run:
                kept[run["subject"], run["task"]].append(run)
    return kept


def _median(runs: list[dict[str, Any]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def _peak(result: dict[str, Any], dtype: str) -> float:
    # A peak is a maximum: a round in which the machine was busy must not make the subjects look closer to it.
    return max(entry["peak_tflops"][dtype][result["clock"]] for entry in result["rounds"])


def _failures(result: dict[str, Any], subject: str) -> list[str]:
    runs = [run for entry in result["rounds"] for run in entry["runs"] if run["subject"] == subject]
    return [run["error"] for run in [*runs, result["exact"].get(subject, {})] if "error" in run]


def _right(result: dict[str, Any], subject: str) -> bool:
    runs = [run for entry in result["rounds"] for run in entry["runs"] if run["subject"] == subject]
    return all(run.get("right", False) for run in runs) and result["exact"].get(subject, {}).get("right", True)


def _numbers(result: dict[str, Any], key: str) -> str:
    if failures := _failures(result, key):
        return f"failed: {failures[0][:80]}"
    subject = result["subjects"][key]
    notes = ["last token, not the mean"] if subject["reads"] == "last" else []
    notes += ["last layer after the final norm"] if subject["end"] else []
    return ("right" if _right(result, key) else "**wrong**") + (f" ({'; '.join(notes)})" if notes else "")


def _targets(
    result: dict[str, Any],
    speed: dict[tuple[str, str], float],
    memory: dict[tuple[str, str], float],
    bound: float,
    wrong: set[str],
) -> list[str]:
    ours, loop = (result["ours"], "one"), (result["ordinary"], "one")
    if ours not in speed or loop not in speed or loop[0] in wrong:
        return ["Targets: not checked, because affectlens or the ordinary loop was left out, failed or is wrong."]
    rivals = {key: value for (key, task), value in speed.items() if task == "one" and key not in (*wrong, ours[0])}
    best = max(rivals, key=lambda key: rivals[key])
    got = {
        "ordinary": speed[ours] / speed[loop],
        "best_peer": speed[ours] / rivals[best],
        "bound": speed[ours] / bound,
        "memory": memory[ours] / memory[loop],
    }
    rows = [
        ("speed against the ordinary loop", f"≥ {TARGETS['ordinary']:g}×", f"{got['ordinary']:.2f}×", "ordinary"),
        (
            f"speed against the best of all others ({best})",
            f"≥ {TARGETS['best_peer']:g}×",
            f"{got['best_peer']:.2f}×",
            "best_peer",
        ),
        ("share of the peak bound", f"≥ {TARGETS['bound']:.0%}", f"{got['bound']:.0%}", "bound"),
        ("memory against the ordinary loop", f"≤ {TARGETS['memory']:.0%}", f"{got['memory']:.1%}", "memory"),
    ]
    lines = ["| target, at one layer | wanted | measured | |", "|---|---|---|---|"]
    for name, wanted, measured, key in rows:
        met = got[key] <= TARGETS[key] if key == "memory" else got[key] >= TARGETS[key]
        lines.append(f"| {name} | {wanted} | {measured} | {'met' if met else '**missed**'} |")
    if ours[0] in wrong:
        lines.append("\nNone of this counts: the numbers of affectlens are wrong.")
    lines.append(
        f"\nAt the peak bound itself the factor over the ordinary loop would be {bound / speed[loop]:.2f}, and over the best "
        f"of all others {bound / rivals[best]:.2f}: on this machine no way of reading can be further ahead."
    )
    return lines


def _caption(result: dict[str, Any], peak: float, bound: dict[str, float]) -> str:
    machine, texts = result["machine"], result["texts"]
    bf16 = ", ".join(machine["bf16"]) or "no bf16 instructions"
    fp32 = _peak(result, "float32")
    return (
        f"Mean residual from the 50th token on, of {texts['count']} texts of {texts['shortest']} to {texts['longest']} tokens "
        f"({texts['tokens']:,} tokens; {texts['source']}; padded batches of 8 in arrival order run "
        f"{texts['padded_tokens_in_8'] / texts['tokens']:.2f} times as many). {result['model']}, {result['dtype']}, "
        f"{result['threads']} thread(s), {len(result['rounds'])} round(s), medians, {result['date'][:10]}"
        f"{'' if result['clock'] == 'seconds' else ', seconds of processor time because the machine was shared'}. "
        f"{machine['processor']} family {machine['family']} ({bf16}), {machine['cores']} cores, {machine['memory_gb']} GB. "
        f"Matrix-multiply peak, best of the rounds: {peak:.2f} TFLOP/s in {result['dtype']} ({fp32:.2f} in float32), which "
        f"bounds reading at {bound['one']:,.0f} tokens/s for one layer and {bound['all']:,.0f} for every layer."
    )


def _versions(result: dict[str, Any]) -> str:
    named, torch = set(), set()
    for entry in result["rounds"]:
        for versions in (run["versions"] for run in entry["runs"] if "versions" in run):
            package = next(iter(versions))
            beside = "" if package == "transformers" else f" on transformers {versions['transformers']}"
            named.add(f"{package} {versions[package]}{beside}")
            torch.add(f"torch {versions['torch']}")
    return f"Versions: {'; '.join([*sorted(named), *sorted(torch)])}."


def _notes(result: dict[str, Any]) -> str:
    runs = [run for entry in result["rounds"] for run in entry["runs"] if "seconds" in run]
    waited = [run["seconds"] * result["threads"] / run["cpu_seconds"] for run in runs]
    disturbed = sum(share > 1.1 for share in waited)
    note = (
        "Tokenising, batching and the means are in the time; loading and a warm-up are not. Memory is the peak of resident "
        "memory in the measured pass minus what was resident once the weights were loaded and touched."
    )
    if disturbed and result["clock"] == "seconds":
        note += (
            f" **In {disturbed} of {len(runs)} runs the clock ran more than 10 % ahead of the processor time: "
            "the machine was busy with something else, measure again.**"
        )
    return note


def power(result: dict[str, Any]) -> str:
    """The table of ``bench/power.py``: how often each finding held where its effect is planted, and where it is not."""
    from affectlens.stats import wilson

    seeds = result["seeds"]
    lines = [
        f"{seeds} toys for each condition, {result['draws']} draws behind each null, {result['date'][:10]}. "
        "`nothing`: the toy with effect 0; `coupled`: self and other are one; `drift`: another checkpoint without a tone. "
        "Counted is the verdict `holds`.",
        "",
        f"| study | finding | holds where planted, of {seeds} | holds where absent, of {seeds} |",
        "|---|---|---|---|",
    ]
    false = trials = 0
    for row in result["findings"]:
        planted = row.get("planted")
        absent = {name: row[name]["holds"] for name in ("nothing", "coupled", "drift") if name in row and row[name]["false"]}
        false, trials = false + sum(absent.values()), trials + seeds * len(absent)
        shown = "–" if planted is None else f"{planted['holds']}{'' if planted['tested'] else ' (untestable there)'}"
        cells = ", ".join(f"{held} ({name})" for name, held in absent.items()) or "–"
        lines.append(f"| {row['study']} | `{row['finding']}` | {shown} | {cells} |")
    rate = wilson(false, trials)
    share = f"{100 * rate.value:.2f} % [{100 * rate.low:.2f}, {100 * rate.high:.2f}]"
    return "\n".join([*lines, "", f"False findings over all: {false} of {trials}, {share} (wanted: at most 5 %)."])


def alarms(result: dict[str, Any]) -> str:
    """The table of ``bench/alarms.py``: what was stated before a rule was armed, and what came."""

    def shown(estimate: dict[str, Any] | None, digits: int = 0) -> str:
        if estimate is None:
            return "–"
        value, low, high = ("∞" if estimate[end] is None else f"{estimate[end]:.{digits}f}" for end in ("value", "low", "high"))
        return f"{value} [{low}, {high}]"

    def table(title: str, part: dict[str, Any]) -> list[str]:
        stated, came, rules = part["dialogues"]["stated"], part["dialogues"]["came"], part["rules"]
        lines = [
            f"**{title}.** {part['baseline']}. Tried on these {stated} dialogues, each against the others; run on {came} others.",
            "",
            "| rule | false alarms per 1,000 | stated: expected jointly (alone) | came | stories noticed | tokens until then |",
            "|---|---|---|---|---|---|",
        ]
        for row in rules:
            (low, high), (least, most) = row["expected"], row["jointly"]
            noticed = row["delay"] and row["delay"]["noticed"]
            found = f"{round(noticed['value'] * noticed['n'])} of {noticed['n']}" if noticed else "–"
            tokens = shown(row["delay"]["tokens"]) if row["delay"] else "–"
            rate, held = shown(row["per_thousand"]), f"{least} to {most} ({low} to {high}) of {row['held_out']}"
            lines.append(f"| `{row['rule']}` | {rate} | {held} | {row['came']} | {found} | {tokens} |")
        inside = {key: sum(row[key][0] <= row["came"] <= row[key][1] for row in rules) for key in ("expected", "jointly")}
        verdict = "holds" if part["holds"] else "fails"
        n = len(rules)
        judged = f"The statement, all {n} inside jointly, {verdict}: {inside['jointly']} of {n} are. "
        return [*lines, "", judged + f"Inside their own interval: {inside['expected']} of {n}.", ""]

    shares = {key: f"{100 * share:.1f} % (wanted: 95)" for key, share in result["splits"].items()}
    return "\n".join(
        [
            f"{result['model']}, layer {result['layer']}, {result['seconds']:.0f} s.",
            "",
            *table("Stated on the bundled dialogues, came in dialogues by another hand", result["bundled"]),
            *table("Traffic of one's own: stated on one half of it, came in the other", result["own"]),
            "Over a thousand random halves of the bundled dialogues: a rule alone inside its interval in "
            f"{shares['alone']}, all jointly in {shares['jointly']}.",
        ]
    )


def sae(result: dict[str, Any]) -> str:
    """The table of ``bench/sae.py``: how much of each vector a few features make up, beside what chance gives."""
    sizes = [point["k"] for point in result["concepts"][0]["curve"]]
    how, explained = result["training"], result["explained"]
    lines = [
        f"{result['model']}, layer {result['layer']}, {result['date'][:10]}. {result['features']} features, {result['k']} at a "
        f"token, trained on {how['tokens']:,} tokens ({how['steps']} steps). They reconstruct {explained['value']:.2f} "
        f"[{explained['low']:.2f}, {explained['high']:.2f}] of the variance of {result['texts']} other stories. "
        f"Share of the vector that k features make up; in brackets the median for random directions and for contrasts of texts "
        f"with exchanged labels ({result['draws']} draws each); p against the second.",
        "",
        f"| emotion | {' | '.join(f'k = {k}' for k in sizes)} | p at k = {sizes[-1]} | tells its texts best: feature, AUROC, p |",
        "|---|" + "---|" * (len(sizes) + 2),
    ]
    for one in result["concepts"]:
        cells = [f"{p['explained']:.2f} ({p['random']['value']:.2f}, {p['exchanged']['value']:.2f})" for p in one["curve"]]
        best = max(one["features"], key=lambda f: abs(f["auroc"] - 0.5))
        tells = f"{best['id']}, {best['auroc']:.2f}, {best['p']:.2g}"
        lines.append(f"| {one['name']} | {' | '.join(cells)} | {one['curve'][-1]['exchanged']['p']:.2g} | {tells} |")
    return "\n".join(lines)


def preferences(result: dict[str, Any]) -> str:
    """The table of ``bench/preferences.py``: pairs per second, each way against one forward pass a pair."""
    clock, peak = result["clock"], result["peak"][result["clock"]]
    unit = "pairs per processor second" if clock == "cpu_seconds" else "pairs/s"
    rounds = max(len(way["rounds"]) for way in result["ways"].values())
    lines = [
        f"{result['model']}, {result['dtype']}, {result['threads']} thread(s), {result['machine']['processor']}, "
        f"{result['date'][:10]}; medians of {rounds} rounds (ranges). Plain: {result['pairs']} pairs; steered: "
        f"{result['steered_pairs']} pairs along {result['directions']} directions. Peak {peak:.2f} TFLOP/s by the same clock. "
        "Operations: linear layers. Difference: of the probability of A from that of one pass a pair, mean.",
        "",
        f"| way | {unit} (range) | × one pass a pair | operations per pair, GFLOP | % of peak | difference |",
        "|---|---|---|---|---|---|",
    ]
    first: dict[str, float] = {}
    for name, way in result["ways"].items():
        speeds = sorted(measured["answers"] / measured[clock] for measured in way["rounds"])
        speed = statistics.median(speeds)
        against = speed / first.setdefault(way["task"], speed)
        share = 100 * speed * way["operations"] / (peak * 1e12)
        lines.append(
            f"| {name} | {speed:,.1f} ({speeds[0]:,.1f}–{speeds[-1]:,.1f}) | {against:.1f} | {way['operations'] / 1e9:.2f} | "
            f"{share:.0f} | {result['difference'][name]:.3f} |"
        )
    found = statistics.median(m["answers"] / m[clock] for m in result["ways"]["affectlens"]["rounds"]) / first["plain"]
    met = "met" if found >= TARGETS["pairs"] else "missed"
    return "\n".join([*lines, "", f"Target: {TARGETS['pairs']:g} times one forward pass a pair: {found:.1f}, {met}."])


MONITORING_TARGETS = {
    "steer-one": ("steering at one layer", 0.01),
    "read-one": ("all emotions at one layer", 0.02),
    "read-all": ("all emotions at every layer", 0.06),
    "both": ("everything together", 0.08),
}
"""Of ``bench/monitoring.py``: how much slower than plain generation each may be."""


def monitoring(result: dict[str, Any]) -> str:
    """The table of ``bench/monitoring.py`` as Markdown: tokens per second, and the time of each way over that of plain generation
    in the same round."""
    from affectlens.stats import Estimate, bootstrap

    clock, batches, rounds = result["clock"], result["batches"], result["rounds"]
    seconds: dict[tuple[str, int], list[float]] = {}
    over: dict[tuple[str, int], list[float]] = {}
    for entry in rounds:
        timed: dict[tuple[str, int], list[float]] = {}
        for run in entry["runs"]:
            timed.setdefault((run["way"], run["batch"]), []).append(run[clock])
        for (way, batch), own in timed.items():
            seconds.setdefault((way, batch), []).extend(own)
            # The n-th time in a round is held against the n-th time of plain generation there: they lie next to each other.
            ratios = [mine / plain - 1 for mine, plain in zip(own, timed["plain", batch], strict=False)]
            over.setdefault((way, batch), []).extend(ratios)

    def slower(way: str, batch: int) -> Estimate:
        ratios = over[way, batch]
        return bootstrap(lambda index: statistics.median(ratios[i] for i in index), len(ratios))

    def shown(cost: Estimate) -> str:
        return f"{100 * cost.value:+.1f} % [{100 * cost.low:+.1f}, {100 * cost.high:+.1f}]"

    heads = [f"batch {batch}: tokens/s | time over plain" for batch in batches]
    lines = ["", f"| way | {' | '.join(heads)} | same tokens as |", "|---|" + "---|" * (2 * len(batches) + 1)]
    for key, way in result["ways"].items():
        cells = [way["label"]]
        for batch in batches:
            if (key, batch) not in seconds:
                cells += ["–", "–"]
                continue
            rate = batch * result["tokens"] / statistics.median(seconds[key, batch])
            cells += [f"{rate:,.0f}", "" if key == "plain" else shown(slower(key, batch))]
        same = "–" if way["same_tokens"] is None else f"{way['like']}: {way['same_tokens']:.0%}"
        error = "" if way["score_error"] is None else f", scores within {way['score_error']:.0e}"
        lines.append(f"| {' | '.join(cells)} | {same}{error} |")
    lines += [
        "",
        f"| target | wanted | {' | '.join(f'batch {batch}' for batch in batches)} |",
        "|---|" + "---|" * (len(batches) + 1),
    ]
    for key, (what, most) in MONITORING_TARGETS.items():
        if key in result["ways"]:
            costs = [slower(key, batch) for batch in batches]
            met = [f"{shown(cost)} {'met' if cost.value <= most else '**missed**'}" for cost in costs]
            lines.append(f"| {what} | at most {most:.0%} slower | {' | '.join(met)} |")
    machine, low, high = result["machine"], *result["prompt_tokens"]
    peak = result["peak_tflops"][result["dtype"]][clock]
    used = [
        2 * result["parameters"] * batch * result["tokens"] / statistics.median(seconds["plain", batch]) / (1e12 * peak)
        for batch in batches
    ]
    caption = (
        f"{result['tokens']} new tokens behind prompts of {low} to {high} tokens, greedy. {result['model']}, {result['dtype']}, "
        f"{result['threads']} thread(s), {len(rounds)} rounds, medians with intervals of 95 % over the times measured"
        f"{'' if clock == 'seconds' else ', processor time because the machine was shared'}, {result['date'][:10]}. "
        f"{machine['processor']} family {machine['family']} ({', '.join(machine['bf16']) or 'no bf16 instructions'}), "
        f"{machine['cores']} cores. Matrix-multiply peak {peak:.2f} TFLOP/s in {result['dtype']}, of which plain generation uses "
        f"{', '.join(f'{share:.1%}' for share in used)}."
    )
    return "\n".join([caption, *lines])


def store(result: dict[str, Any]) -> str:
    """The tables of ``bench/store.py`` as Markdown."""
    kinds = [kind for kind in ("sqlite", "postgresql") if kind in result]
    names = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}
    packages = result["provenance"]["packages"]
    lines = [
        f"{result['records']:,} made-up records of {result['tokens']} tokens with {result['emotions']} emotions each; affectlens "
        f"{packages['affectlens']}, {result['provenance']['cpus']} cores at a load of {result['load']:.1f}, {result['date'][:10]}"
        ". Milliseconds, the median and the 95th percentile.",
        "",
        f"| question, a page of 50 | {' | '.join(names[kind] for kind in kinds)} |",
        f"|---|{'---|' * len(kinds)}",
    ]
    for question in result[kinds[0]]["reading, ms"]:
        cells = (result[kind]["reading, ms"][question] for kind in kinds)
        lines.append(f"| {question} | " + " | ".join("{median:.1f} ({p95:.1f})".format(**cell) for cell in cells) + " |")
    lines += [
        "",
        f"| writing, replies of 300 tokens | {' | '.join(names[kind] for kind in kinds)} |",
        f"|---|{'---|' * len(kinds)}",
    ]
    for what, words in (("alone", "from put to the commit, one caller"), ("32 callers", "the same, 32 callers at once")):
        cells = (result[kind]["commit, ms"][what] for kind in kinds)
        lines.append(f"| {words} | " + " | ".join("{median:.1f} ({p95:.1f})".format(**cell) for cell in cells) + " |")
    rates = " | ".join(f"{result[kind]['commit, ms']['records a second']:.0f}" for kind in kinds)
    sizes = " | ".join(f"{result[kind]['bytes a record on disk'] / 1000:.0f} kB" for kind in kinds)
    long = result[kinds[0]]["bytes of the scores of a long record"]
    return "\n".join(
        [
            *lines,
            f"| records a second, 32 callers | {rates} |",
            f"| on disk, a reply of {result['tokens']} tokens | {sizes} |",
            "",
            f"The scores of a reply of 300 tokens are {long['float32'] / 1000:.0f} kB as float32, and "
            f"{long['kept'] / 1000:.0f} kB as they are kept, to the bit.",
        ]
    )


SERVING_TIMES, SERVING_COST = 3.0, 0.08


def serving(result: dict[str, Any]) -> str:
    """The table of ``bench/serving.py`` as Markdown."""
    from affectlens.stats import bootstrap

    machine, ways = result["machine"], result["ways"]
    counts = sorted({int(count) for way in ways.values() for count in way["callers"]})
    heads = [f"{count} caller{'s' * (count > 1)}: tokens/s | first token, s (p95)" for count in counts]
    lines = ["", f"| way | {' | '.join(heads)} |", "|---|" + "---|" * (2 * len(counts))]

    def rate(key: str, count: int) -> float | None:
        found = ways.get(key, {"callers": {}})["callers"].get(str(count))
        return found["tokens"] / found["seconds"] if found else None

    for key, way in ways.items():
        cells = [way["label"]]
        for count in counts:
            found = way["callers"].get(str(count))
            if found is None:
                cells += [way.get("problem", "–"), "–"]
            else:
                cells += [f"{rate(key, count):,.0f}", f"{found['first']['median']:.2f} ({found['first']['p95']:.2f})"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| target | wanted | measured | |", "|---|---|---|---|"]
    loop, mine = rate("loop", 8), rate("everything", 8)
    if loop and mine:
        met = "met" if mine / loop >= SERVING_TIMES else "**missed**"
        what = "8 callers who steer and read everything, over the loop"
        lines.append(f"| {what} | at least {SERVING_TIMES:g} times | {mine / loop:.1f} times | {met} |")
    for together, pairs in result["passes"].items():
        ratios = [pair["full"][0] / pair["full"][1] / (pair["plain"][0] / pair["plain"][1]) - 1 for pair in pairs]
        cost = bootstrap(lambda index, ratios=ratios: statistics.median(ratios[i] for i in index), len(ratios))
        what = f"readings of {result['emotions']} emotions and mixed steering, {together} at a time"
        shown = (
            f"{100 * cost.value:+.1f} % [{100 * cost.low:+.1f}, {100 * cost.high:+.1f}] of a token's time, {len(ratios)} rounds"
        )
        met = "met" if cost.value <= SERVING_COST else "**missed**"
        lines.append(f"| {what} | at most {SERVING_COST:.0%} | {shown} | {met} |")
    most = max(rate(key, count) or 0.0 for key in ways for count in counts)
    peak = result["peak_tflops"][result["dtype"]]["seconds"]
    caption = (
        f"Replies of up to {result['tokens']} tokens, streamed. {result['model']}, {result['dtype']}, {result['threads']} "
        f"thread(s), clients on the same machine, {result['date'][:10]}. {machine['processor']} family {machine['family']} "
        f"({', '.join(machine['bf16']) or 'no bf16 instructions'}), {machine['cores']} cores. Matrix-multiply peak "
        f"{peak:.2f} TFLOP/s, of which the fastest row uses {2 * result['parameters'] * most / (1e12 * peak):.1%}. "
        f"A reply has the same bits alone and in company here: {'yes' if result['exact'] else 'no'}."
    )
    return "\n".join([caption, *lines])


def reliability(result: dict[str, Any]) -> str:
    """What each section of ``bench/reliability.py`` does, wants and found."""
    lines: list[str] = []
    for name, section in result["sections"].items():
        done, _, wanted = section["what"].partition("\n\nMet when: ")
        threads = f", {section['threads']} thread(s)" if section["threads"] else ""
        lines += [
            f"## {name}",
            "",
            done,
            "",
            f"**Met when:** {wanted}",
            "",
            f"{section['caption']} {section['date'][:10]}, {section['seconds'] / 60:.0f} minutes{threads}, on "
            f"{section['machine']['cores']} cores that had {section['load_average']:.1f} processes to run (mean of 15 minutes).",
            "",
            "| | wanted | found | |",
            "|---|---|---|---|",
        ]
        for check in section["checks"]:
            verdict = {True: "met", False: "**missed**", None: "untestable"}[check["met"]]
            lines.append(f"| {check['what']} | {check['wanted']} | {check['found']} | {verdict} |")
        for also in section["also"]:
            lines += ["", also]
        lines.append("")
    return "\n".join(lines).rstrip()


def ray(result: dict[str, Any]) -> str:
    """The tables of ``bench/ray.py`` as Markdown."""
    machine, n, labels = result["machine"], result["texts"], result["labels"]
    runs = result["speed"]
    busy = max(result["load_before"], 0.0)
    caption = (
        f"{result['model']}, {result['sizes']['info']['dtype']}, {n} bundled stories, windows of {result['window']}, "
        f"{result['rounds']} round(s), medians (range), Ray {result['ray']}, {result['date'][:10]}. {machine['processor']} "
        f"family {machine['family']}, {machine['cores']} cores that had {busy:.1f} processes to run before it began"
        f"{' (**not quiet**: other things ran)' if busy > 0.5 else ''}."
    )
    lines = [caption, "", f"| way | {' | '.join(f'{label}: items/s' for label in result['tasks'].values())} | start, s |"]
    lines.append("|---|" + "---|" * (len(result["tasks"]) + 1))
    for key, label in labels.items():
        cells = []
        for task in result["tasks"]:
            rates = sorted(n / run[task]["seconds"] for run in runs[key])
            cells.append(f"{statistics.median(rates):.1f} ({rates[0]:.1f}–{rates[-1]:.1f})")
        start = statistics.median(run["start"] for run in runs[key])
        lines.append(f"| {label} | {' | '.join(cells)} | {start:.0f} |")
    lines += [
        "",
        "Peak memory of the process that asks, measured, while two workers read a parquet file of the toy's texts: every token "
        "at every layer, and score-corpus.",
        "",
        "| texts | read, GB that came | peak, MB | score-corpus: peak, MB |",
        "|---|---|---|---|",
    ]
    scored = {row["texts"]: f"{row['peak_mb']:,.0f}" for row in result["scoring"]}
    for row in result["memory"]:
        peak = f"{row['peak_mb']:,.0f}"
        lines.append(f"| {row['texts']:,} | {row['came'] / 1e9:.2f} | {peak} | {scored.get(row['texts'], '–')} |")
    card = result["card"]
    lines += [
        "",
        f"What {result['workers']} workers would need, computed. Of {result['model']} a worker is one thread of this machine, "
        f"and its seconds and bytes are measured. Of {result['large']['name']} it is one {card['name']}: bytes are counted on "
        f"results of its shape, seconds computed from its operations at {card['share']:.0%} of "
        f"{card['peak'] / 1e12:,.0f} TFLOP/s.",
        "",
        "| task | model | items/s of all | into the head, MB/s | out of it, MB/s | cores of the head | memory of the head, GB "
        "| most workers of one head | GB stored per million | hours per million |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["cluster"]:
        cells = [
            result["tasks"][row["task"]], row["model"], f"{row['rate']:,.0f}", f"{row['mb_in']:,.1f}", f"{row['mb_out']:,.1f}",
            f"{row['head_cores']:.1f}", f"{row['head_gb']:.1f}", f"{row['most_workers']:,.0f}", f"{row['gb_per_million']:,.1f}",
            f"{row['hours_per_million']:.1f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "The head is one process: where it would need more than one core, it holds the workers up, and hours are those of the "
        "head. Stored are activations of extraction, and the columns that score-corpus adds, with the texts.",
    ]
    return "\n".join(lines)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "extraction": extraction,
    "profile_reading": profile_reading,
    "corpus": corpus,
    "power": power,
    "tuned_pair": tuned_pair,
    "alarms": alarms,
    "sae": sae,
    "preferences": preferences,
    "monitoring": monitoring,
    "training": training,
    "reliability": reliability,
    "store": store,
    "serving": serving,
    "ray": ray,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--print", action="store_true", help="print the tables and leave the page alone")
    args = parser.parse_args()
    pages: dict[Path, str] = {}
    for name, draw in TABLES.items():
        path = HERE / "results" / f"{name}.json"
        if not path.is_file():
            print(f"no {path}: python bench/{name}.py makes it", file=sys.stderr)
            continue
        drawn = draw(json.loads(path.read_text()))
        if args.print:
            print(drawn)
            continue
        path = DOCS / PAGES.get(name, "benchmarks.md")
        page = pages.get(path) or path.read_text()
        start, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
        if start not in page or end not in page:
            page += f"\n## {name.capitalize()}\n\n{start}\n{end}\n"
        between = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
        pages[path] = between.sub(lambda _, text=f"{start}\n{drawn}\n{end}": text, page, count=1)
    for path, page in pages.items():
        path.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
