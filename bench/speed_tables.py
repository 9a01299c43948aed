"""Tables of what was timed, as Markdown, and the figures that they and ``bench/targets.py`` take from the raw results."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from host import QUIET

if TYPE_CHECKING:
    from affectlens.stats import Estimate

Result = dict[str, Any]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def spread(values: Sequence[float], digits: int = 0) -> str:
    """The median, and the range in brackets: ``120 (115–131)``."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f}–{high:,.{digits}f})"


def on(machine: dict[str, Any]) -> str:
    """What something was measured on, with a warning where others used it, too."""
    kind = ", ".join(machine["bf16"]) or "no bf16 instructions"
    said = f"{machine['processor']} family {machine['family']} ({kind}), {machine['cores']} cores"
    busy = machine.get("others", 0.0)
    return said if busy <= QUIET else f"{said}, **not quiet: others kept {busy:.1f} of them busy when this began or ended**"


def when(result: Result) -> str:
    """On which date, at which commit and in how much time something was measured."""
    said = f"Measured on {result['date'][:10]}" if "date" in result else "On a date that was not kept"
    said += f" at commit {known}" if (known := commit(result)) else ", at a commit that was not kept"
    return said + (f", in {result['duration'] / 60:.0f} minutes." if "duration" in result else ".")


def commit(result: Result) -> str:
    """The commit that something was measured at, in short; a plus for changes to it that were not committed."""
    found = result.get("provenance", {}).get("commit") or ""
    return found[:8] + "+" * found.endswith("-dirty")


def packages(result: Result) -> str:
    """Names and versions of what matters for speed; the result itself names more."""
    known = result["provenance"]["packages"]
    return ", ".join(f"{name} {known[name]}" for name in ("affectlens", "torch", "transformers", "vllm", "ray") if name in known)


# ── reading ──


@dataclass(frozen=True)
class Reading:
    """Figures of ``bench/extraction.py``, for each subject and task (``one`` layer or ``all``).

    Args:
        tokens: Of all texts.
        runs: What was measured, a run each.
        speed: Tokens a second, the median.
        memory: MB above the loaded model, the median.
        bound: Tokens a second at the matrix-multiply peak, for each task.
        wrong: Subjects whose numbers are wrong, or that failed.
        own: Keys of affectlens.
        loop: Key of the ordinary loop.
    """

    tokens: int
    runs: dict[tuple[str, str], list[dict[str, Any]]]
    speed: dict[tuple[str, str], float]
    memory: dict[tuple[str, str], float]
    bound: dict[str, float]
    wrong: set[str]
    own: list[str]
    loop: str

    @classmethod
    def of(cls, result: Result) -> Reading:
        runs: dict[tuple[str, str], list[dict[str, Any]]] = {(key, t): [] for key in result["subjects"] for t in ("one", "all")}
        for run in (run for entry in result["rounds"] for run in entry["runs"]):
            if "seconds" in run:
                runs[run["subject"], run["task"]].append(run)
        peak, tokens, clock = _peak(result, result["dtype"]), result["texts"]["tokens"], result["clock"]
        return cls(
            tokens=tokens,
            runs=runs,
            speed={key: tokens / statistics.median(run[clock] for run in own) for key, own in runs.items() if own},
            memory={key: statistics.median(run["above_mb"] for run in own) for key, own in runs.items() if own},
            bound={task: peak * 1e12 / (flops / tokens) for task, flops in result["flops"].items()},
            wrong={key for key in result["subjects"] if not _right(result, key)},
            own=result["ours"],
            loop=result["ordinary"],
        )

    @property
    def ours(self) -> str | None:
        """How affectlens reads one layer fastest."""
        return self._fastest([key for key, _ in self.speed if key in self.own])

    @property
    def best_peer(self) -> str | None:
        """Who reads one layer fastest of all others that are right."""
        return self._fastest([key for key, _ in self.speed if key not in self.own])

    def _fastest(self, keys: Sequence[str]) -> str | None:
        right = [key for key in keys if key not in self.wrong and (key, "one") in self.speed]
        return max(right, key=lambda key: self.speed[key, "one"], default=None)

    def times(self, other: str | None) -> float | None:
        """How many times as fast as another subject affectlens reads one layer; None where either is missing or wrong."""
        if self.ours is None or other is None or other in self.wrong or (other, "one") not in self.speed:
            return None
        return self.speed[self.ours, "one"] / self.speed[other, "one"]


def extraction(result: Result) -> str:
    """The table of ``bench/extraction.py``."""
    found = Reading.of(result)
    heads = [
        "way",
        f"layer {result['layer']}: tokens/s (range)",
        "× loop",
        "% of bound",
        "MB above the model",
        "every layer: tokens/s (range)",
        "× loop",
        "MB above the model",
        "numbers",
    ]
    rows = []
    for key, subject in result["subjects"].items():
        cells = [subject["label"]]
        for task in ("one", "all"):
            own = found.runs[key, task]
            if not own:
                cells += ["–"] * (4 if task == "one" else 3)
                continue
            cells.append(spread([found.tokens / run[result["clock"]] for run in own]))
            against = found.speed.get((found.loop, task))
            cells.append(f"{found.speed[key, task] / against:.2f}" if against else "–")
            if task == "one":
                cells.append(f"{100 * found.speed[key, task] / found.bound[task]:.0f}")
            cells.append(f"{found.memory[key, task]:,.0f}")
        rows.append([*cells, _numbers(result, key)])
    return "\n".join([_caption(result, found), "", *table(heads, rows), "", _versions(result), "", _notes(result)])


def one_line(run: dict[str, Any], tokens: int) -> str:
    """One run, for the progress on stderr."""
    if "seconds" not in run:
        return f"failed: {run['error']}"
    verdict = "" if run["right"] else f", WRONG (cosine {run['cosine']:.4f})"
    return (
        f"{tokens / run['seconds']:7,.0f} tokens/s, {tokens / run['cpu_seconds']:7,.0f} per processor second, "
        f"{run['above_mb']:6,.0f} MB{verdict}"
    )


def _peak(result: Result, dtype: str) -> float:
    # A peak is a maximum: a round in which the machine was busy must not make the subjects look closer to it.
    return max(entry["peak_tflops"][dtype][result["clock"]] for entry in result["rounds"])


def _runs_of(result: Result, subject: str) -> list[dict[str, Any]]:
    return [run for entry in result["rounds"] for run in entry["runs"] if run["subject"] == subject]


def _right(result: Result, subject: str) -> bool:
    runs = _runs_of(result, subject)
    return all(run.get("right", False) for run in runs) and result["exact"].get(subject, {}).get("right", True)


def _numbers(result: Result, key: str) -> str:
    if failures := [run["error"] for run in [*_runs_of(result, key), result["exact"].get(key, {})] if "error" in run]:
        return f"failed: {failures[0][:80]}"
    subject = result["subjects"][key]
    notes = ["last token, not the mean"] if subject["reads"] == "last" else []
    notes += ["last layer after the final norm"] if subject["end"] else []
    return ("right" if _right(result, key) else "**wrong**") + (f" ({'; '.join(notes)})" if notes else "")


def _caption(result: Result, found: Reading) -> str:
    texts, rounds = result["texts"], len(result["rounds"])
    every = sum(any(run["task"] == "all" for run in entry["runs"]) for entry in result["rounds"])
    return (
        f"Mean residual from the 50th token on, of {texts['count']} texts of {texts['shortest']} to {texts['longest']} tokens "
        f"({texts['tokens']:,} tokens; {texts['source']}; padded batches of 8 in arrival order run "
        f"{texts['padded_tokens_in_8'] / texts['tokens']:.2f} times as many). {result['model']}, {result['dtype']}, "
        f"{result['threads']} thread(s), {rounds} round(s){f' ({every} at every layer)' if every < rounds else ''}, medians"
        f"{'' if result['clock'] == 'seconds' else ', seconds of processor time because the machine was shared'}. "
        f"{on(result['machine'])}, {result['machine']['memory_gb']} GB. Matrix-multiply peak, best of the rounds: "
        f"{_peak(result, result['dtype']):.2f} TFLOP/s in {result['dtype']} ({_peak(result, 'float32'):.2f} in float32), which "
        + " and ".join(
            f"bounds reading {'one layer' if task == 'one' else 'every layer'} at {bound:,.0f} tokens/s"
            for task, bound in found.bound.items()
        )
        + "."
        + ("" if result["exact"] else " The check of all numbers in float32 was left out.")
        + (f" {result['note']}" if "note" in result else "")
    )


def _versions(result: Result) -> str:
    named, torch = set(), set()
    for entry in result["rounds"]:
        for versions in (run["versions"] for run in entry["runs"] if "versions" in run):
            package = next(iter(versions))
            beside = "" if package == "transformers" else f" on transformers {versions['transformers']}"
            named.add(f"{package} {versions[package]}{beside}")
            torch.add(f"torch {versions['torch']}")
    return f"Versions: {'; '.join([*sorted(named), *sorted(torch)])}."


def _notes(result: Result) -> str:
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


PROFILED = {"plain": "plain", "compiled": "compiled blocks"}


def profile_reading(result: Result) -> str:
    """The tables of ``bench/profile_reading.py``."""
    ways = result["ways"]
    heads = ["part", *(f"{PROFILED[way]}: share of the time" for way in ways)]
    names = {key: name for found in ways.values() for key, (name, _) in found["parts"].items()}
    parts = [[name, *(f"{found['parts'][key][1]:.1%}" for found in ways.values())] for key, name in names.items()]
    lines = [
        f"Reading layer {result['layer']} of {result['texts']} texts ({result['tokens']:,} tokens) with affectlens: "
        f"{result['model']}, {result['dtype']}, one thread, on {on(result['machine'])}, whose peak is "
        f"{result['peak_tflops']:.2f} TFLOP/s."
    ]
    for way, found in ways.items():
        fast, share = found["tokens a second"], found["multiplying_tflops"] / result["peak_tflops"]
        lines.append(
            f"{PROFILED[way].capitalize()}: under the profiler {found['seconds']:.2f} s, without it {fast:,.0f} tokens/s, "
            f"{fast / result['bound']:.0%} of the bound; matrix products run at {share:.0%} of the peak; "
            f"tensors take {found['tensors_mb']:,.0f} MB at most."
        )
    lines += ["", *table(heads, parts)]
    for way, found in ways.items():
        operators = [[f"`{name}`", f"{share:.0%}", f"{calls:,}"] for name, share, calls in found["operators"]]
        lines += ["", *table([f"operator, {PROFILED[way]}", "share of what operators take", "calls"], operators)]
    return "\n".join(lines)


# ── generating ──


def generation(result: Result) -> str:
    """The table of ``bench/generation.py``."""
    low, high = result["lengths"]
    rows = []
    plain = _median_of(result, "one")
    for key, way in result["ways"].items():
        if "problem" in way:
            rows.append([way["label"], f"failed: {way['problem'][:80]}", "–", "–", "–"])
            continue
        seconds = [entry[key] for entry in result["rounds"]]
        exact, same = f"{way['exact']} of {result['compared in float32']}", f"{way['same']} of {result['replies']}"
        if way["same"] < result["replies"]:
            same += f", the others {way['apart']:.1f} steps apart at most"
        rows.append(
            [
                way["label"],
                spread([result["tokens"] / each for each in seconds]),
                f"{plain / statistics.median(seconds):.2f}",
                *(("–", "–") if key == "one" else (exact, same)),
            ]
        )
    steps = {int(n): 1000 * seconds for n, seconds in result["step"].items()}
    taken = " and ".join(f"{ms:.0f} ms over {n} row{'s' * (n > 1)}" for n, ms in steps.items())
    peak = result["peak_tflops"][result["dtype"]]["seconds"]
    caption = (
        f"{result['replies']} replies of {low} to {high} tokens, {result['tokens']:,} in all, greedy. {result['model']}, "
        f"{result['dtype']}, {result['threads']} thread(s), {len(result['rounds'])} round(s), medians (ranges), "
        f"on {on(result['machine'])}. Matrix-multiply peak {peak:.2f} TFLOP/s. A step of the model alone "
        f"takes {taken}. Versions: {packages(result)}."
    )
    heads = ["way", "tokens/s (range)", "× one at a time", "same tokens in float32", f"same tokens in {result['dtype']}"]
    return "\n".join([caption, "", *table(heads, rows)])


def _median_of(result: Result, way: str) -> float:
    return statistics.median(entry[way] for entry in result["rounds"])


MONITORING_TARGETS = {
    "steer-one": ("steering at one layer", 0.01),
    "read-one": ("all emotions at one layer", 0.02),
    "read-all": ("all emotions at every layer", 0.06),
    "both": ("everything together", 0.08),
}
"""Of ``bench/monitoring.py``: how much slower than plain generation each may be. These are timed more often than the others."""


def monitoring_costs(result: Result, only: str | None = None) -> dict[tuple[str, int], Estimate]:
    """By way (all, or one) and batch: the time of each over that of plain generation in the same round, minus one."""
    from affectlens.stats import bootstrap

    over: dict[tuple[str, int], list[float]] = {}
    for entry in result["rounds"]:
        timed: dict[tuple[str, int], list[float]] = {}
        for run in entry["runs"]:
            timed.setdefault((run["way"], run["batch"]), []).append(run[result["clock"]])
        for (way, batch), own in timed.items():
            if only not in (None, way):
                continue
            # The n-th time in a round is held against the n-th time of plain generation there: they lie next to each other.
            ratios = [mine / plain - 1 for mine, plain in zip(own, timed["plain", batch], strict=False)]
            over.setdefault((way, batch), []).extend(ratios)
    return {
        key: bootstrap(lambda index, ratios=ratios: statistics.median(ratios[i] for i in index), len(ratios))
        for key, ratios in over.items()
    }


def percent(cost: Estimate) -> str:
    """``+2.1 % [-3.5, +4.0]``."""
    return f"{100 * cost.value:+.1f} % [{100 * cost.low:+.1f}, {100 * cost.high:+.1f}]"


def monitoring(result: Result) -> str:
    """The table of ``bench/monitoring.py``: tokens per second, and the time of each way over that of plain generation."""
    clock, batches = result["clock"], result["batches"]
    seconds: dict[tuple[str, int], list[float]] = {}
    for run in (run for entry in result["rounds"] for run in entry["runs"]):
        seconds.setdefault((run["way"], run["batch"]), []).append(run[clock])
    costs = monitoring_costs(result)
    rows = []
    for key, way in result["ways"].items():
        cells = [way["label"]]
        for batch in batches:
            if (key, batch) not in seconds:
                cells += ["–", "–"]
                continue
            rate = batch * result["tokens"] / statistics.median(seconds[key, batch])
            cells += [f"{rate:,.0f}", "" if key == "plain" else percent(costs[key, batch])]
        same = "–" if way["same_tokens"] is None else f"{way['like']}: {way['same_tokens']:.0%}"
        error = "" if way["score_error"] is None else f", scores within {way['score_error']:.0e}"
        rows.append([*cells, f"{same}{error}"])
    low, high = result["prompt_tokens"]
    peak = result["peak_tflops"][result["dtype"]][clock]
    used = [
        2 * result["parameters"] * batch * result["tokens"] / statistics.median(seconds["plain", batch]) / (1e12 * peak)
        for batch in batches
    ]
    often, seldom = max(map(len, seconds.values())), min(map(len, seconds.values()))
    caption = (
        f"{result['tokens']} new tokens behind prompts of {low} to {high} tokens, greedy. {result['model']}, {result['dtype']}, "
        f"{result['threads']} thread(s), {len(result['rounds'])} rounds, medians with intervals of 95 % over the times measured "
        f"({often} of each way that has a target, {seldom} of others)"
        f"{'' if clock == 'seconds' else ', processor time because the machine was shared'}. "
        f"{on(result['machine'])}. Matrix-multiply peak {peak:.2f} TFLOP/s in {result['dtype']}, of which plain generation uses "
        f"{', '.join(f'{share:.1%}' for share in used)}. Versions: {packages(result)}."
    )
    heads = [head for batch in batches for head in (f"batch {batch}: tokens/s", "time over plain")]
    return "\n".join([caption, "", *table(["way", *heads, "same tokens as"], rows)])


PAIRS_OURS = "affectlens"
"""The way of ``bench/preferences.py`` that has a target."""


def pairs_times(result: Result) -> float:
    """How many times as many pairs a second as with one forward pass a pair."""
    clock, first = result["clock"], next(iter(result["ways"].values()))
    plain, ours = (
        statistics.median(one["answers"] / one[clock] for one in way["rounds"]) for way in (first, result["ways"][PAIRS_OURS])
    )
    return ours / plain


def preferences(result: Result) -> str:
    """The table of ``bench/preferences.py``: pairs per second, each way against one forward pass a pair."""
    clock, peak = result["clock"], result["peak"][result["clock"]]
    unit = "pairs per processor second" if clock == "cpu_seconds" else "pairs/s"
    rounds = max(len(way["rounds"]) for way in result["ways"].values())
    first: dict[str, float] = {}
    rows = []
    for name, way in result["ways"].items():
        speeds = [one["answers"] / one[clock] for one in way["rounds"]]
        speed = statistics.median(speeds)
        against = speed / first.setdefault(way["task"], speed)
        share = 100 * speed * way["operations"] / (peak * 1e12)
        cells = [name, spread(speeds, 1), f"{against:.1f}", f"{way['operations'] / 1e9:.2f}", f"{share:.0f}"]
        rows.append([*cells, f"{result['difference'][name]:.3f}"])
    caption = (
        f"{result['model']}, {result['dtype']}, {result['threads']} thread(s), {on(result['machine'])}; "
        f"medians of {rounds} rounds (ranges). Plain: {result['pairs']} pairs; steered: "
        f"{result['steered_pairs']} pairs along {result['directions']} directions. Peak {peak:.2f} TFLOP/s by the same clock. "
        "Operations: linear layers. Difference: of the probability of A from that of one pass a pair, mean."
    )
    heads = ["way", f"{unit} (range)", "× one pass a pair", "operations per pair, GFLOP", "% of peak", "difference"]
    return "\n".join([caption, "", *table(heads, rows)])


# ── serving and the store ──


def serving_rate(result: Result, way: str, callers: int) -> float | None:
    """Tokens a second over all callers."""
    found = result["ways"].get(way, {"callers": {}})["callers"].get(str(callers))
    return found["tokens"] / found["seconds"] if found else None


def serving_costs(result: Result) -> dict[int, Estimate]:
    """By how many requests there are at a time: what readings and steering cost of a token's time."""
    from affectlens.stats import bootstrap

    found = {}
    for together, pairs in result["passes"].items():
        ratios = [pair["full"][0] / pair["full"][1] / (pair["plain"][0] / pair["plain"][1]) - 1 for pair in pairs]
        found[int(together)] = bootstrap(lambda index, ratios=ratios: statistics.median(ratios[i] for i in index), len(ratios))
    return found


def serving(result: Result) -> str:
    """The tables of ``bench/serving.py``."""
    ways = result["ways"]
    counts = sorted({int(count) for way in ways.values() for count in way["callers"]})
    heads = [head for n in counts for head in (f"{n} caller{'s' * (n > 1)}: tokens/s", "first token, s (p95)")]
    rows = []
    for key, way in ways.items():
        cells = [way["label"]]
        for count in counts:
            found, rate = way["callers"].get(str(count)), serving_rate(result, key, count)
            if found is None or rate is None:
                cells += [way.get("problem", "–"), "–"]
            else:
                cells += [f"{rate:,.0f}", f"{found['first']['median']:.2f} ({found['first']['p95']:.2f})"]
        rows.append(cells)
    most = max(serving_rate(result, key, count) or 0.0 for key in ways for count in counts)
    peak = result["peak_tflops"][result["dtype"]]["seconds"]
    caption = (
        f"Replies of up to {result['tokens']} tokens, streamed. {result['model']}, {result['dtype']}, {result['threads']} "
        f"thread(s), clients on the same machine. {on(result['machine'])}. Matrix-multiply peak "
        f"{peak:.2f} TFLOP/s, of which the fastest row uses {2 * result['parameters'] * most / (1e12 * peak):.1%}. "
        f"A reply has the same bits alone and in company here: {'yes' if result['exact'] else 'no'}. "
        f"Versions: {packages(result)}."
    )
    costs = [[str(n), f"{percent(cost)}, {cost.n} rounds"] for n, cost in serving_costs(result).items()]
    what = f"readings of {result['emotions']} emotions and mixed steering, of a token's time"
    return "\n".join([caption, "", *table(["way", *heads], rows), "", *table(["requests at a time", what], costs)])


def store(result: Result) -> str:
    """The tables of ``bench/store.py``."""
    kinds = [kind for kind in ("sqlite", "postgresql") if kind in result]
    names = [{"sqlite": "SQLite", "postgresql": "PostgreSQL"}[kind] for kind in kinds]
    asked = [
        [question, *("{median:.1f} ({p95:.1f})".format(**result[kind]["reading, ms"][question]) for kind in kinds)]
        for question in result[kinds[0]]["reading, ms"]
    ]
    written = [
        [words, *("{median:.1f} ({p95:.1f})".format(**result[kind]["commit, ms"][what]) for kind in kinds)]
        for what, words in (("alone", "from put to the commit, one caller"), ("32 callers", "the same, 32 callers at once"))
    ]
    rates = [f"{result[kind]['commit, ms']['records a second']:.0f}" for kind in kinds]
    sizes = [f"{result[kind]['bytes a record on disk'] / 1000:.0f} kB" for kind in kinds]
    long = result[kinds[0]]["bytes of the scores of a long record"]
    rest = [["records a second, 32 callers", *rates], [f"on disk, a reply of {result['tokens']} tokens", *sizes]]
    return "\n".join(
        [
            f"{result['records']:,} made-up records of {result['tokens']} tokens with {result['emotions']} emotions each; "
            f"affectlens {result['provenance']['packages']['affectlens']}, {on(result['machine'])}. "
            "Milliseconds, the median and the 95th percentile.",
            "",
            *table(["question, a page of 50", *names], asked),
            "",
            *table(["writing, replies of 300 tokens", *names], [*written, *rest]),
            "",
            f"The scores of a reply of 300 tokens are {long['float32'] / 1000:.0f} kB as float32, and "
            f"{long['kept'] / 1000:.0f} kB as they are kept, to the bit.",
        ]
    )
