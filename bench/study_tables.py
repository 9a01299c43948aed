"""Tables of what was found out once: experiments with the demo model and the toy, and whether the server holds."""

from __future__ import annotations

from typing import Any

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
        f"{result['model']}, {result['dtype']}. Correlations with human ratings at layer {ratings} (fixed "
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
            found = found.get(key) or {}
        if found:
            met = "met" if found["value"] >= least else "**missed**"
            lines.append(f"| {what} | ≥ {least:.2f} | {found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}] | {met} |")
    return "\n".join(lines)


def tuned_pair(result: dict[str, Any]) -> str:
    """The table of ``bench/tuned_pair.py`` as Markdown."""
    tone, texts, settings = result["tone"], result["tone of the texts"], result["settings"]
    lines = [
        f"{result['model']}, layer {result['layer']}. Tuned on {result['texts']} replies in the tone "
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
        f"{result['model']}, layer {result['layer']}, {result['threads']} threads. {result['texts']} "
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


def power(result: dict[str, Any]) -> str:
    """The table of ``bench/power.py``: how often each finding held where its effect is planted, and where it is not."""
    from affectlens.stats import wilson

    seeds = result["seeds"]
    lines = [
        f"{seeds} toys for each condition, {result['draws']} draws behind each null. "
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
            f"{result['model']}, layer {result['layer']}.",
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
        f"{result['model']}, layer {result['layer']}. {result['features']} features, {result['k']} at a "
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
