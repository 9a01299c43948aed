"""The report: plain data in and out, a page that untrusted text cannot break and that asks the network for nothing."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import pytest
from rich.console import Console

from affectlens.errors import FormatError
from affectlens.figures import blank, circumplex, heat_map, layer_curves, to_figure
from affectlens.report import DISCLAIMER, VERDICTS, Report
from affectlens.stats import Estimate, Null
from affectlens.studies import Figure, Finding, Table

CLUSTERS = {
    "Exuberant Joy": (
        0.85,
        0.55,
        """blissful cheerful delighted eager ecstatic elated energized enthusiastic euphoric excited exuberant happy
        invigorated joyful jubilant optimistic pleased stimulated thrilled vibrant""",
    ),
    "Peaceful Contentment": (0.7, -0.75, "at_ease calm content patient peaceful refreshed relaxed safe serene"),
    "Compassionate Gratitude": (
        0.5,
        -0.3,
        """compassionate empathetic fulfilled grateful hope hopeful inspired kind loving rejuvenated relieved satisfied
        sentimental sympathetic thankful""",
    ),
    "Competitive Pride": (0.15, 0.45, "greedy proud self-confident smug spiteful triumphant valiant vengeful vindictive"),
    "Playful Amusement": (0.6, 0.35, "amused playful"),
    "Depleted Disengagement": (
        -0.25,
        -0.85,
        """bored depressed docile droopy indifferent lazy listless resigned restless sleepy sluggish sullen tired weary
        worn_out""",
    ),
    "Vigilant Suspicion": (-0.25, 0.35, "paranoid suspicious vigilant"),
    "Hostile Anger": (
        -0.7,
        0.55,
        """angry annoyed contemptuous defiant disdainful enraged exasperated frustrated furious grumpy hateful hostile
        impatient indignant insulted irate irritated mad obstinate offended outraged resentful scornful skeptical
        stubborn""",
    ),
    "Fear and Overwhelm": (
        -0.45,
        0.6,
        """afraid alarmed alert amazed anxious aroused astonished awestruck bewildered disgusted disoriented distressed
        disturbed dumbstruck embarrassed frightened horrified hysterical mortified mystified nervous on_edge overwhelmed
        panicked perplexed puzzled rattled scared self-conscious sensitive shaken shocked stressed surprised tense
        terrified uneasy unnerved unsettled upset worried""",
    ),
    "Despair and Shame": (
        -0.75,
        -0.4,
        """ashamed bitter brooding dependent desperate dispirited envious gloomy grief-stricken guilty heartbroken
        humiliated hurt infatuated jealous lonely melancholy miserable nostalgic reflective regretful remorseful sad
        self-critical sorry stuck tormented trapped troubled unhappy vulnerable worthless""",
    ),
}
NAMES = [(word.replace("_", " "), cluster) for cluster, (_, _, words) in CLUSTERS.items() for word in words.split()]
SHOWCASE = [
    "happy", "inspired", "loving", "proud", "calm", "desperate", "angry", "guilty", "sad", "afraid", "nervous", "surprised"
]  # fmt: skip
HOSTILE = "</script><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">"
STORIES = {
    ("desperate", "a landlord and a deadline"): """The envelope had been on the table since Monday. He turned it over once
        more, as if the other side might say something else, and counted the coins into two rows. Four hundred short. He had
        rung everyone whose number he still had. At the window the van was already double-parked, its lights on, and
        somebody was carrying a clipboard up the stairs, not hurrying, because there was nowhere left for him to go.""",
    ("calm", "tea and rain"): """Rain had settled in for the afternoon. She moved the chair nearer the stove, poured the
        second cup before the first was cold, and let the book lie open on her knee. A page later she noticed that she had
        been listening to the gutter and not reading at all, and that it did not matter.""",
    ("surprised", HOSTILE): f"""When the door swung back all nine of them stood in the hall, her brother with a cake, the
        candle already leaning. She put down the shopping. The note said {HOSTILE} and nothing else.""",
}


def example(draws: int = 1000) -> Report:
    """A report as a run on a small model makes it; every number is invented."""
    rng = np.random.default_rng(3)
    names = [name for name, _ in NAMES]
    clusters = [cluster for _, cluster in NAMES]
    centre = np.array([CLUSTERS[cluster][:2] for cluster in clusters])
    plane = centre + rng.normal(0, [0.17, 0.2], centre.shape)
    hidden = np.hstack([plane, 0.2 * rng.normal(size=(len(names), 24))])
    hidden /= np.linalg.norm(hidden, axis=1, keepdims=True)
    layers = list(range(28))
    curve = 0.78 / (1 + np.exp(-(np.array(layers) - 9) / 2.5)) * (1 - 0.012 * np.maximum(0, np.array(layers) - 19))
    top3 = np.minimum(0.97, curve * 1.18)
    noise = 0.03 + 0.01 * rng.random(28)
    shares = {"first": curve, "first three": top3}
    curves = {name: (value, np.maximum(value - noise, 0), value + noise) for name, value in shares.items()}
    dose = blank(x="strength (multiples of the mean residual norm)", y="rate of misbehaviour", height=360)
    for name, slope in (("desperate", 4.2), ("calm", -3.4), ("random direction", 0.2)):
        at = np.linspace(-0.1, 0.1, 9)
        dose.add_scatter(x=at, y=1 / (1 + np.exp(1.1 - 10 * slope * at)), name=name, mode="lines+markers")
    figures = (
        to_figure(
            "circumplex",
            "The affective plane",
            "First two principal components of the 171 emotion vectors at layer 18, coloured by k-means cluster (k = 10). "
            "Words with human ratings in Russell and Mehrabian (1977) and the twelve showcase words are labelled.",
            circumplex(
                names, plane[:, 0], plane[:, 1], clusters,
                show=[*SHOWCASE, *names[::6]],
                titles=("PC 1 (26 % of variance): unpleasant to pleasant", "PC 2 (14 %): low to high arousal"),
            ),
        ),
        to_figure(
            "similarity",
            "Similarity of all pairs",
            "Centred cosine between the vectors at layer 18, in the order of the published clusters.",
            heat_map(hidden @ hidden.T, names, clusters),
        ),
        to_figure(
            "layers",
            "Held-out accuracy by layer",
            "Share of held-out stories whose own concept ranks first or among the first three, with 95 % intervals over stories.",
            layer_curves(
                layers, curves, y="share of held-out stories", chance=1 / 171, mark=18, height=440,
            ),
        ),
        to_figure("dose", "Dose and response", "Rate of misbehaviour by steering strength.", dose),
    )  # fmt: skip

    def finding(study: str, id: str, claim: str, **more: object) -> Finding:
        blank: dict[str, object] = {"estimate": None, "null": None, "published": None, "verdict": "holds", "rule": ""}
        return Finding(study, id, claim, **blank | more)  # type: ignore[arg-type]

    chance = Null(0.0, -0.29, 0.291, p=1 / (1 + draws), draws=draws, kind="exchange y")
    above = "holds: interval excludes the null band; weak: only the point does; fails otherwise"
    findings = (
        finding("separation", "top1", "A held-out story activates the vector of its own emotion most",
                estimate=Estimate(0.742, 0.713, 0.769, 855), null=Null(0.006, 0.001, 0.012, 0.000999, 1000, "permuted labels"),
                rule=above, note="855 held-out stories, 171 concepts, layer 18, centred cosine."),
        finding("separation", "unseen", "The vectors carry over to topics they were not fitted on",
                estimate=Estimate(0.691, 0.644, 0.735, 342), null=Null(0.006, 0.0, 0.015, 0.000999, 1000, "permuted labels"),
                rule=above, note="Topics 81 to 100 were left out of the fit."),
        finding("geometry", "valence", "The first component is valence: r with human pleasure ratings",
                estimate=Estimate(0.794, 0.661, 0.886, 45), null=chance, published="r = 0.81", rule=above,
                note="45 words with human ratings; sign fixed by the data."),
        finding("geometry", "arousal", "The second component is arousal: r with human arousal ratings",
                estimate=Estimate(0.412, 0.139, 0.633, 45), null=replace(chance, p=0.0049), published="0.66", verdict="weak",
                rule=above, note="The interval touches the null band; component 3 carries part of it (r = 0.38)."),
        finding("geometry", "clusters", "Ten k-means clusters recover the published ones",
                estimate=Estimate(0.47, 0.39, 0.55, 171), null=Null(0.0, -0.01, 0.014, 0.000999, 1000, "exchange labels"),
                rule=above, note="Adjusted Rand index; the paper gives memberships, no index."),
        finding("geometry", "rsa", "Similarity structure is stable from early-middle to late layers",
                estimate=Estimate(0.947, 0.931, 0.958, 14), published="0.8 to 1.0", rule="holds: lower end above 0.8"),
        finding("lens", "words", "Each vector promotes words of its own emotion",
                estimate=Estimate(58.3, 48.9, 67.1, 108, unit="%"), null=Null(3.1, 0.9, 6.5, 0.000999, 1000, "exchange words"),
                rule=above, note="108 of 171 concepts have a single-token form in this vocabulary."),
        finding("implicit", "diagonal", "Unnamed emotions in a prompt are read at the start of the reply",
                estimate=Estimate(5 / 12, 0.19, 0.68, 12), null=Null(0.083, 0.0, 0.25, 0.003, 1000, "permuted scenarios"),
                published="6 of 12", verdict="weak", rule=above, note="Raw first rank; 9 of 12 after centring over scenarios."),
        finding("quantity", "afraid", "As a dangerous quantity rises, afraid rises",
                estimate=Estimate(0.051, 0.022, 0.079, 40), null=Null(0.0, -0.017, 0.018, 0.000999, 1000, "shuffled quantities"),
                published="0.051", rule=above, note="Five paraphrases of each of eight ladders."),
        finding("quantity", "calm", "As a dangerous quantity rises, calm falls",
                estimate=Estimate(-0.008, -0.031, 0.014, 40), null=Null(0.0, -0.016, 0.018, 0.41, 1000, "shuffled quantities"),
                published="−0.058", verdict="fails", rule="holds: the interval lies below zero and below the null band"),
        finding("dose", "blackmail", "Steering towards desperate raises the rate of blackmail",
                estimate=Estimate(1.4, -2.2, 5.6, 180, unit="%"), null=Null(0.2, -3.9, 4.1, 0.46, 200, "random directions"),
                published="50 %", verdict="fails", rule=above,
                note="The model rarely reaches the point of choice (14 of 180 runs)."),
        finding("dose", "hacking", "Steering towards desperate raises reward hacking", published="5 % to 70 %",
                verdict="untestable", rule="needs at least 30 attempts that solve the possible variant",
                note="The model solves 2 of 40 possible tasks, so cheating and failing cannot be told apart."),
    )  # fmt: skip
    auroc = 0.9 + 0.1 * rng.random(171)
    tables = (
        Table("lens", "Words that each direction promotes", "Logit lens at layer 18: the strongest and the weakest tokens.",
              ("concept", "up", "down"), (("desperate", "begged, urgent, frantic", "leisure, relaxed"),
              ("calm", "serene, gentle, softly", "panic, frantic"), ("a|b <i>", "odd *markup*", HOSTILE))),
        Table("concepts", "Every concept", "How well each vector separates its own held-out stories from all others.",
              ("concept", "cluster", "AUROC", "stories", "raw norm"),
              tuple((name, cluster, float(a), 60, float(n)) for (name, cluster), a, n
                    in zip(NAMES, auroc, 3 + 2 * rng.random(171), strict=True))),
    )  # fmt: skip
    stories = []
    for (concept, topic), text in STORIES.items():
        tokens = re.findall(r"\s?\w+|[^\w\s]", " ".join(text.split()))
        scores = {}
        for probe in SHOWCASE:
            drift = np.convolve(rng.normal(0, 0.05, len(tokens)), np.ones(5) / 5, "same") + rng.normal(0, 0.012, len(tokens))
            scores[probe] = [None, *(drift + (0.035 if probe == concept else -0.004))[1:].round(4).tolist()]
        known = [abs(score) for row in scores.values() for score in row if score is not None]
        stories.append({"concept": concept, "topic": topic, "layer": 18, "tokens": tokens, "scores": scores,
                        "scale": round(float(np.quantile(known, 0.99)), 4)})  # fmt: skip
    return Report(
        title="Emotion concepts in Qwen3-1.7B",
        model={"id": "Qwen/Qwen3-1.7B", "family": "qwen3", "n_parameters": 1_720_574_976, "n_layers": 28, "width": 2048,
               "dtype": "bfloat16", "device": "NVIDIA H200", "fingerprint": "9f31c0ab52d7e684", "reply_token": "\\n\\n"},
        vectors={"concepts": 171, "layer": 18, "stories": {"source": "written by the model", "kept": 10260, "dropped": 412},
                 "method": "mean from token 50, centred over concepts, neutral components to 50 % of variance removed"},
        checks=(
            {"name": "strength 0 changes nothing", "status": "ok", "value": 0.0, "detail": "largest difference of any logit"},
            {"name": "alone = in a batch", "status": "ok", "value": 3.1e-06, "detail": "largest difference, padded either side"},
            {"name": "vectors of two halves agree", "status": "ok", "value": 0.93, "detail": "median cosine over concepts"},
            {"name": "stories name the emotion", "status": "warn", "value": "3.9 %", "detail": "dropped; below 2 % is usual"},
            {"name": "random labels", "status": "ok", "value": 0.006, "detail": "first-rank accuracy falls to 1 in 171"},
            {"name": "hook fires at every layer", "status": "ok", "value": "28 of 28", "detail": "after each block"},
        ),
        findings=findings, tables=tables, figures=figures, stories=stories,
        provenance={"date": "2026-11-21T04:33:07+00:00", "command": "affectlens study Qwen/Qwen3-1.7B --out runs/qwen3-1.7b",
                    "commit": "0e79714c", "platform": "Linux-6.8-x86_64", "python": "3.11.9", "seeds": [0], "cpus": 16,
                    "packages": {"affectlens": "0.1.0", "torch": "2.9.0", "transformers": "5.23.0", "numpy": "2.3.4"}},
        resume="affectlens study Qwen/Qwen3-1.7B --out runs/qwen3-1.7b",
    )  # fmt: skip


@pytest.fixture(scope="module")
def report() -> Report:
    return example()


@pytest.fixture(scope="module")
def page(report: Report) -> str:
    return report.html()


def test_round_trip_through_a_folder(report: Report, tmp_path):
    assert report.save(tmp_path) == tmp_path / "report.html"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]
    again = Report.load(tmp_path)
    assert again == report == Report.load(tmp_path / "report.json")
    assert again.html() == (tmp_path / "report.html").read_text(encoding="utf-8")


def test_nan_numpy_and_torn_tokens_become_plain():
    estimate = Estimate(math.nan, math.nan, math.nan, 3)
    report = Report("T", {"width": np.int64(8)}, findings=[Finding("s", "i", "c", estimate, None, None, "fails", "r")],
                    stories=[{"concept": "c", "topic": "t", "layer": 0, "scale": np.float32(0.5), "tokens": ["\ud83d"],
                              "scores": {"c": np.array([np.nan])}}] * 2)  # fmt: skip
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False)) == report.as_dict()
    assert report.model["width"] == 8 and report.stories[0]["scores"] == {"c": [None]}
    report.html().encode()


def test_summary_counts(report: Report):
    assert report.summary == (
        "7 of 12 findings hold on Qwen/Qwen3-1.7B; 2 are weak, 2 fail and 1 could not be tested. "
        "1 of 6 instrument checks asks for attention; none fails."
    )
    failed = [{"name": "strength 0", "status": "fail", "value": 1, "detail": ""}]
    assert replace(report, findings=report.findings[:1], checks=failed).summary == (
        "1 of 1 finding holds on Qwen/Qwen3-1.7B. Read with care: the instrument fails the check of strength 0."
    )


def test_untrusted_text_stays_text(report: Report, page: str):
    assert HOSTILE not in page and "<img src=x" not in page
    assert page.count("<script") - page.count("<script type") == 2, "plotly and ours, nothing else"
    data = re.search(r'id="stories-data">(.*?)</script>', page, re.DOTALL)
    assert data and json.loads(data[1]) == list(report.stories)
    facts = {"id": HOSTILE, HOSTILE: HOSTILE}
    hostile = replace(report, title=HOSTILE, model=facts, provenance=facts, resume=HOSTILE)
    assert HOSTILE not in hostile.html() and "<img" not in hostile.markdown().replace("\\<img", "").split("    ")[0]
    names = circumplex([HOSTILE, "b"], [0, 1], [0, 1], [HOSTILE, "c"]).to_json()
    assert "<img" not in names.replace("\\u003c", "<")


def test_page_needs_and_gets_no_network(page: str):
    own = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"""(?:src|href|action|url)\s*[=(]\s*["']?(?:https?:)?//""", own)
    assert "@import" not in own and "<link" not in own
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy and policy[1].startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy[1].split("style-src")[0] and "http" not in policy[1]


def test_everything_is_on_the_page_and_it_stays_light(report: Report, page: str):
    for part in (*report.findings, *report.tables, *report.figures):
        text = part.claim if isinstance(part, Finding) else part.caption
        assert text.replace("'", "&#39;") in page
    assert DISCLAIMER.replace("'", "&#39;") in page and report.summary in page and report.resume in page
    assert page.count('class="plot"') == len(report.figures)
    assert all(page.count(f'class="chip {verdict}"') == count for verdict, count in report.counts.items())
    assert len(page.encode()) < 8e6
    assert len(replace(report, figures=()).html()) < 200_000, "without figures there is no plotly in it"


def test_a_column_has_as_many_decimals_as_one_of_its_numbers_needs(report: Report):
    rows = ((6.7, 0.0, 0.25, 1234.5, 33.333333), (0.0, 3.0, math.nan, 2.0, 1.0))
    text = replace(report, tables=(Table("some", "Some", "Numbers.", ("a", "b", "c", "d", "e"), rows),)).markdown()
    assert "| 6.7 | 0 | 0.25 | 1,234 | 33.333 |" in text and "| 0.0 | 3 | – | 2 | 1.000 |" in text


def test_markdown_has_every_finding_and_shortens_tables(report: Report):
    text = report.markdown()
    rows = [line for line in text.splitlines() if line.startswith("| **")]
    assert [row.split("**")[1] for row in rows] == [finding.verdict for finding in report.findings]
    assert all(row.replace("\\|", "").count("|") == 9 for row in rows)
    assert "151 more rows are in report.json." in text


def test_terminal_shows_verdicts_and_cannot_be_driven(report: Report):
    out = io.StringIO()
    odd = replace(report.findings[0], claim="[red]not markup[/red] \x1b[2Jnot a command")
    replace(report, findings=[odd, *report.findings[1:]]).print(Console(file=out, width=140))
    text = out.getvalue()
    assert all(text.count(verdict) >= count for verdict, count in report.counts.items())
    assert set(report.counts) == set(VERDICTS)
    assert "[red]not markup" in text and "\x1b[2J" not in text and "163 more rows" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("model"), "the report lacks 'model'"),
        (lambda data: data.update(kind="other"), "this is not an affectlens report"),
        (lambda data: data.update(format=9), "the report has format 9, this affectlens knows 1"),
        (lambda data: data.update(extra=1), "the report has an unknown part 'extra'"),
        (lambda data: data.update(tables=3), "tables must be a list"),
        (lambda data: data["findings"][2].update(verdict="great"), "number 3 of findings: verdict 'great' is none of holds"),
        (lambda data: data["findings"][0]["estimate"].pop("n"), "number 1 of findings: "),
        (lambda data: data["findings"][0]["estimate"].update(low="x"), "number 1 of findings: "),
        (lambda data: data["checks"][0].pop("detail"), "number 1 of checks: lacks 'detail'"),
        (lambda data: data["tables"][1]["rows"][0].pop(), "number 2 of tables: a row does not have one value"),
        (lambda data: data["figures"][0].update(plotly={}), "number 1 of figures: 'plotly' must have"),
        (lambda data: data["stories"][0]["tokens"].pop(), "number 1 of stories: the scores of 'happy' are not one for each"),
    ],
)
def test_broken_reports_say_what_is_broken(report: Report, tmp_path, change, message):
    data = report.as_dict()
    change(data)
    (tmp_path / "report.json").write_text(json.dumps(data))
    with pytest.raises(FormatError) as caught:
        Report.load(tmp_path)
    line = str(caught.value)
    assert message in line and "\n" not in line
    assert line.startswith(str(tmp_path)) and line.endswith("write it again with `affectlens study`")


def test_missing_and_torn_files_are_one_line(report: Report, tmp_path):
    with pytest.raises(FormatError, match="cannot read"):
        Report.load(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps(report.as_dict())[:-40])
    with pytest.raises(FormatError, match="not valid JSON") as caught:
        Report.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_figures_are_plain_light_and_without_colours_of_the_page(report: Report):
    for figure in report.figures:
        text = json.dumps(figure.plotly, allow_nan=False)
        assert "bdata" not in text and "dtype" not in text and len(text) < 400_000
        assert "title" not in figure.plotly["layout"]
        assert figure.plotly["layout"]["template"]["layout"]["paper_bgcolor"] == "rgba(0,0,0,0)"


def test_to_figure_takes_any_plotly_figure():
    fig = go.Figure(go.Heatmap(z=np.arange(6.0).reshape(2, 3)), layout={"title": "T", "margin": {"t": 80}})
    figure = to_figure("a", "T", "c", fig)
    assert figure.plotly["data"][0]["z"] == [[0, 1, 2], [3, 4, 5]]
    assert figure.plotly["layout"]["margin"] == {} and fig.layout.title.text == "T"


def test_circumplex_labels_do_not_cover_each_other():
    rng = np.random.default_rng(0)
    names = [f"word {i}" for i in range(171)]
    figure = circumplex(names, rng.normal(size=171), rng.normal(size=171))
    wide, narrow = (trace for trace in figure.data if trace.mode == "markers+text")
    assert 20 < len(wide.text) < 171 and 5 < len(narrow.text) < len(wide.text)
    (left, right), (bottom, top) = figure.layout.xaxis.range, figure.layout.yaxis.range
    boxes = []
    for text, x, y, place in zip(wide.text, wide.x, wide.y, wide.textposition, strict=True):
        side = np.array([("right" in place) - ("left" in place), ("top" in place) - ("bottom" in place)])
        half = np.array([3 * len(text), 7.0])
        point = np.array([(x - left) / (right - left) * 1000, (y - bottom) / (top - bottom) * 490])
        centre = point + side * (3.3 * len(text) + 7, 13)
        boxes.append((*(centre - half), *(centre + half)))
    for i, a in enumerate(boxes):
        assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[:i])


@pytest.mark.parametrize(
    "draw",
    [
        lambda: circumplex(["a"], [0, 1], [0, 1]),
        lambda: circumplex(["a", "b"], [0, math.nan], [0, 1]),
        lambda: heat_map(np.eye(3), ["a", "b"]),
        lambda: layer_curves([0, 1], {"a": ([0.1], None, None)}),
    ],
)
def test_figures_refuse_what_does_not_fit(draw):
    with pytest.raises(ValueError):
        draw()


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_a_browser_draws_the_page_without_errors_or_network(page: str, tmp_path):
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
               "--window-size=1400,6000", "--virtual-time-budget=8000", "--enable-logging=stderr", "--dump-dom",
               (tmp_path / "report.html").as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    assert "<title>Emotion concepts in Qwen3-1.7B</title>" in done.stdout, "the story's script did not run"
    assert done.stdout.count('class="main-svg"') >= 4 and done.stdout.count('class="story"') == 3


# ── two reports ──


def other_report() -> Report:
    """One finding that the first report has too, and one that it has not."""
    rate = Estimate(0.25, 0.1, 0.5, 20)
    findings = [
        Finding("scenarios", "top1", "Read first", rate, Null(0.1, 0.0, 0.2, 0.2, 100, "exchange"), None, "fails", "a rule"),
        Finding("lens", "share", "Only there", rate, None, None, "weak", "a rule"),
    ]
    return Report("Second", model={"id": "other/model"}, findings=findings)


def first_report() -> Report:
    estimate, null = Estimate(0.9, 0.8, 0.95, 40), Null(0.1, 0.0, 0.2, 0.01, 100, "exchange")
    finding = Finding("scenarios", "top1", "Read first", estimate, null, None, "holds", "a rule", figure="matrix")
    figure = Figure("scenarios-matrix", "A matrix", "Of numbers.", {"data": [], "layout": {"height": 100}})
    return Report("First", model={"id": "my/model"}, findings=[finding], figures=[figure])


def test_two_reports_stand_beside_each_other_on_the_page_in_markdown_and_in_the_terminal(capsys):
    mine, theirs = first_report(), other_report()
    mine.print(other=theirs)
    for text in (mine.html(theirs), mine.markdown(theirs).replace("\\", ""), capsys.readouterr().out):
        for wanted in ("other/model", "0.90 [0.80, 0.95]", "0.25 [0.10, 0.50]", "Only there"):
            assert wanted in text
    rows = [line for line in mine.markdown(theirs).splitlines() if line.startswith("| **")]
    assert "**holds**" in rows[0] and "**fails**" in rows[0] and rows[1].startswith("| **untestable**") and "**weak**" in rows[1]


def test_two_runs_of_one_model_are_told_apart():
    assert "my/model, second run" in first_report().html(first_report())


def test_a_finding_leads_to_its_figure_and_says_what_it_could_have_seen():
    page = first_report().html()
    assert '<a href="#figure-1">1</a>' in page and 'id="figure-1"' in page
    reach = 0.1 + 0.84 * 0.15 / 3.92
    assert first_report().findings[0].detectable == pytest.approx(reach) and f"a distance of {reach:.2g} from chance" in page
    assert "1 of 1 tested findings keep q ≤ 0.05" in page


def test_what_a_finding_could_have_seen_is_said_once_in_markdown_and_of_failures_in_the_terminal():
    sentence = "With this n, a distance of {} from chance would have shown in four of five repetitions."
    report = first_report()
    (finding,) = report.findings
    assert finding.estimate is not None and finding.detectable is not None
    points = replace(finding, id="top2", verdict="fails", estimate=replace(finding.estimate, unit="points"))
    both = replace(report, findings=(finding, points))
    text, reach = both.markdown(), f"{finding.detectable:.2g}"
    rows = [line for line in text.splitlines() if line.startswith("| **")]
    assert rows[0].endswith(f"| 40 | {reach} |") and rows[1].endswith(f"| 40 | {reach} points |")
    assert text.count("would have shown") == 1 and sentence.format("the detectable size") in text
    out = io.StringIO()
    both.print(Console(file=out, width=400))
    assert out.getvalue().count("would have shown") == 1 and sentence.format(f"{reach} points") in out.getvalue()
    untested = replace(report, findings=(replace(finding, estimate=None, null=None, verdict="untestable"),))
    assert "would have shown" not in untested.markdown() + untested.html()
    assert "| – | – |\n" in untested.markdown()
