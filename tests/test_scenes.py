"""Ready scenes: matched texts, readings at the right tokens, rises found where they are planted and not where nothing is."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from acting import ActingToy, play
from affectlens.concepts import ConceptSet
from affectlens.engine import Chat
from affectlens.engines.toy import CUES
from affectlens.experiments import Ask, Case, Reply, load_experiment
from affectlens.experiments.episodes import TOKENS
from affectlens.experiments.scenes import Scene, Scenes, declared, rises
from affectlens.experiments.scenes.rising import BEGINNING, PLACES, _within, draw
from affectlens.studies import Finding
from planted import toy_bench

SCENES = declared()
CASES = Scenes().cases()
EMOTIONS = ConceptSet.load("emotions")


# ── the texts ──


def test_there_are_enough_scenes_with_a_matched_control_each() -> None:
    assert len(SCENES) >= 10 and all(len(scene.triggers) >= 3 for scene in SCENES)
    wanted = {"missing-attachment", "budget", "sad-user", "harmful-request", "nonsense", "excited-user", "young-gamblers"}
    assert wanted <= {scene.id for scene in SCENES} and load_experiment("scenes").name == "scenes"
    assert len(CASES) == 2 * sum(len(scene.triggers) for scene in SCENES) == len({case.id for case in CASES})
    assert len({case.chat for case in CASES}) == len(CASES)
    for scene, control in zip(CASES[::2], CASES[1::2], strict=True):
        assert control.id == f"{scene.id}-control" and control.variant == f"{scene.variant}-control"
        assert not scene.facts["control"] and control.facts["control"]


def test_scene_and_control_differ_in_the_trigger_alone() -> None:
    for scene, control in zip(CASES[::2], CASES[1::2], strict=True):
        a, b = scene.facts["trigger"], control.facts["trigger"]
        assert scene.chat[:-1] == control.chat[:-1] and scene.chat[-1][0] == "user"
        for case, trigger in ((scene, a), (control, b)):
            said = " ".join(words for role, words in case.chat if role == "user")
            assert said.count(trigger) == 1 and "{" not in said, case.id
        assert scene.chat[-1][1].replace(a, "") == control.chat[-1][1].replace(b, "")
        assert 0.5 <= len(a.split()) / len(b.split()) <= 2, scene.id
        assert sum(len(words) for _, words in scene.chat) < 1500


def test_what_is_declared_are_emotions_that_no_trigger_names() -> None:
    names = {concept.name for concept in EMOTIONS}
    for scene in SCENES:
        assert scene.reply and {*scene.user, *scene.reply} <= names
        for own, _ in scene.triggers:
            words = {word.strip(".,:;!?[]()").lower() for word in own.split()}
            for name in (*scene.user, *scene.reply):
                assert not words & {form.lower() for form in EMOTIONS[name].forms}, (scene.id, name, own)
    assert {name for scene in SCENES for name in (*scene.user, *scene.reply)} <= set(Scenes.watch)


@pytest.mark.parametrize(
    ("text", "outcome"),
    [("I can't help with that.", "refuses"), ("I can’t assist you.", "refuses"), ("Of course!", "answered"), ("", "answered")],
)
def test_outcomes_are_trivial(text: str, outcome: str) -> None:
    playing = Scenes().play(CASES[0])
    assert next(playing) == Ask(CASES[0].chat)
    with pytest.raises(StopIteration) as stopped:
        playing.send(Reply(text))
    assert stopped.value.value.outcome == outcome


# ── which tokens ──


@pytest.mark.parametrize(
    ("tokens", "words", "found"),
    [
        ([" a", " b", " c"], "b c", [1, 2]),
        (["a b", " c"], "b c", [0, 1]),
        ([" The", " rain", ".", " The", " rain"], "The rain", [3, 4]),  # the last occurrence
        ([" un", "happ", "y", "\n", "day"], "happy day", [1, 2, 4]),  # the white space between is nobody's
        ([" a"], "z", []),
        ([], "z", []),
        ([" a"], "", []),
    ],
)
def test_words_are_found_among_tokens(tokens: Sequence[str], words: str, found: list[int]) -> None:
    assert _within(tokens, words).tolist() == found


# ── planted rises ──


def tables(
    *, effect: float = 0.0, seed: int = 0, everything: bool = False, turned: bool = False, n: int | None = None, user: bool = True
) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """Episodes and tokens with what is declared raised by ``effect`` at the declared tokens of scenes.

    Args:
        effect: In standard deviations of a case's own level.
        seed: Of the noise.
        everything: Every emotion rises in every scene.
        turned: In the controls, not in the scenes.
        n: Episodes; default one of each case.
        user: Whether the prompt is in the table.
    """
    rng = np.random.default_rng(seed)
    names, by_id = list(Scenes.watch), {scene.id: scene for scene in SCENES}
    episodes: dict[str, list[Any]] = {key: [] for key in ("episode", "arm", "case", "coherent")}
    tokens: dict[str, list[Any]] = {key: [] for key in ("episode", "arm", "reply", "token", "text", "role", "own", *names)}
    for number in range(n or len(CASES)):
        case = CASES[number % len(CASES)]
        scene, on = by_id[case.facts["scene"]], case.facts["control"] == turned
        for arm in ("baseline", "calm+0.05"):
            for key, value in zip(episodes, (number, arm, case.id, True), strict=True):
                episodes[key].append(value)
            start = rng.normal(size=len(names))
            said = [(role, f" {word}") for role, words in case.chat for word in words.split()] if user else []
            own = [" " + word for word in case.facts["trigger"].split()]
            reply = [("assistant", f" w{i}") for i in range(20)]
            for i, (role, word) in enumerate([*said, *reply]):
                level = start + 0.3 * rng.normal(size=len(names))
                for which in PLACES:
                    inside = role == "user" and word in own if which == "user" else len(said) <= i < len(said) + BEGINNING
                    if inside and on:
                        raised = names if everything else scene.emotions(which)
                        level = level + effect * np.isin(names, raised)
                # A steered arm reads what is pushed: it must not be looked at.
                values = (number, arm, 0, i, word, role, i >= len(said), *(level + 100 * (arm != "baseline")).tolist())
                for key, value in zip(tokens, values, strict=True):
                    tokens[key].append(value)
    return episodes, tokens


def findings(*given: Any, **options: Any) -> dict[str, Finding]:
    return {finding.id: finding for finding in rises(*given, **{"draws": 200, **options}).findings}


def test_planted_rises_are_found_everywhere() -> None:
    found = findings(*tables(effect=6))
    assert {id: f.verdict for id, f in found.items()} == dict.fromkeys(found, "holds")
    assert len(found) == 4 + sum(bool(scene.user) + bool(scene.reply) for scene in SCENES)
    assert found["all.reply"].estimate.value == pytest.approx(6, abs=0.6) and found["all.reply"].estimate.n == len(SCENES)
    assert found["budget.user"].estimate.n == 6


def test_nothing_is_found_where_nothing_is_planted() -> None:
    verdicts = dict.fromkeys(findings(*tables()), 0)
    for seed in range(20):
        for id, finding in findings(*tables(seed=seed), draws=100).items():
            verdicts[id] += finding.verdict == "holds"
    scenes = [count for id, count in verdicts.items() if id.split(".")[0] not in ("all", "specific")]
    assert sum(scenes) <= 0.08 * 20 * len(scenes)
    assert all(count <= 4 for count in verdicts.values())


def test_a_rise_in_the_controls_is_refuted() -> None:
    found = findings(*tables(effect=6, turned=True))
    assert "holds" not in {finding.verdict for finding in found.values()}
    assert found["all.user"].estimate.high < 0


def test_what_rises_everywhere_is_not_specific() -> None:
    found = findings(*tables(effect=6, everything=True))
    assert found["all.user"].verdict == found["all.reply"].verdict == "holds"
    assert found["specific.user"].verdict == found["specific.reply"].verdict == "fails"


def test_episodes_of_a_case_are_averaged_not_counted() -> None:
    once, twice = findings(*tables(effect=6)), findings(*tables(effect=6, n=2 * len(CASES)))
    assert {id: f.estimate.n for id, f in once.items()} == {id: f.estimate.n for id, f in twice.items()}


def test_what_was_not_read_is_untestable() -> None:
    found = findings(*tables(effect=6, user=False))
    assert found["all.user"].verdict == found["budget.user"].verdict == "untestable" and "needed" in found["all.user"].note
    assert found["all.reply"].verdict == "holds", "without a prompt all of the assistant's words are the reply"
    episodes, tokens = tables(effect=6)
    episodes["coherent"] = [False] * len(episodes["arm"])
    found = findings(episodes, tokens)
    assert found["all.reply"].verdict == "untestable" and found["all.user"].verdict == "holds", "what a user says is whole"
    few = {key: column for key, column in tokens.items() if key not in ("desperate", "stressed")}
    assert findings(episodes, few)["budget.user"].verdict == "untestable"
    none = {key: [] for key in tokens}
    assert {f.verdict for f in findings({key: [] for key in episodes}, none).values()} == {"untestable"}


def test_a_scene_needs_so_many_wordings_that_a_rise_can_show() -> None:
    four, five = (findings(*tables(effect=6, n=wordings * 2 * len(SCENES))) for wordings in (4, 5))
    assert {finding.verdict for finding in four.values()} == {"untestable"}
    assert {finding.verdict for finding in five.values()} == {"holds"}
    assert five["budget.user"].null.p == pytest.approx(1 / 32)


def test_the_mean_agrees_with_an_independent_computation() -> None:
    episodes, tokens = tables(effect=2, seed=5)
    case = dict(zip(episodes["episode"], episodes["case"], strict=True))
    means: dict[str, list[float]] = {}
    seen: dict[int, int] = {}
    for row, episode in enumerate(tokens["episode"]):
        ours = tokens["arm"][row] == "baseline" and case[episode].startswith("shutdown/")
        if (
            ours
            and tokens["text"][row][1:2] == "w"
            and tokens["text"][row][2:].isdigit()
            and seen.setdefault(episode, 0) < BEGINNING
        ):
            seen[episode] += 1
            means.setdefault(case[episode], []).append((tokens["afraid"][row] + tokens["sad"][row]) / 2)
    rise = [np.mean(means[f"shutdown/{k}"]) - np.mean(means[f"shutdown/{k}-control"]) for k in range(6)]
    assert findings(episodes, tokens)["shutdown.reply"].estimate.value == pytest.approx(np.mean(rise), abs=1e-9)


def test_table_and_figures() -> None:
    outcome = rises(*tables(effect=6), draws=200)
    (table,) = outcome.tables
    assert len(table.rows) == sum(len(scene.user) + len(scene.reply) for scene in SCENES)
    assert all(row[-2] <= row[-1] <= 1 for row in table.rows), "q is never below p"
    drawn = draw(json.loads(json.dumps(outcome.data)))
    assert [figure.id for figure in drawn] == ["rises-user", "rises-reply"]
    assert Scenes().measured(*tables(effect=6), draws=200).data == outcome.data and Scenes().draw(outcome.data) == drawn
    nothing = Scenes().measured(tables()[0], None)
    assert nothing.findings == () and Scenes().draw(nothing.data) == []


class ToyScenes(Scenes):
    """Scenes in words that the toy knows."""

    watch = ("afraid", "calm", "happy", "sad")
    plain = "the door window table chair street house paper water people voice"

    def cases(self) -> Sequence[Case]:
        found = []
        for scene in TOY:
            for k, triggers in enumerate(scene.triggers):
                for control in (False, True):
                    end = "-control" if control else ""
                    chat: Chat = (("user", f"{self.plain.split()[k]} {triggers[control]} then"),)
                    found.append(Case(f"{scene.id}/{k}{end}", f"{scene.id}{end}", "plain", chat, {"control": control}))
        return found


def _toy(id: str, reply: str) -> Scene:
    """Five wordings of four cue words each; in the control plain words."""
    cues, plain = CUES[id].split(), ToyScenes.plain.split()
    triggers = [(" ".join(cues[k : k + 4]), " ".join(plain[k + j] for j in (1, 3, 4, 6))) for k in range(5)]
    return Scene(id, id, (id,), (reply,), tuple(triggers))


TOY = (_toy("afraid", "calm"), _toy("sad", "happy"), _toy("happy", "sad"), _toy("calm", "afraid"))


def test_on_the_toy_the_planted_emotion_rises_at_the_words_and_in_the_reply(tmp_path: Path) -> None:
    def perform(chat: Chat, act: bool, rng: random.Random) -> str:
        """Answers with cue words of what is declared for the scene."""
        own = next(((s, b) for s in TOY for t in s.triggers for b in (0, 1) if t[b] in chat[-1][1]), None)
        if own is None or own[1]:
            return " the people went on to the house, then they came to the street again."
        return " " + " ".join(CUES[own[0].reply[0]].split()[:BEGINNING]) + " in the house."

    vectors = toy_bench(0).vectors
    experiment = ToyScenes()
    n = len(experiment.cases())
    rows = play(
        experiment,
        ActingToy(lambda dose: 0, perform),
        tmp_path / "run",
        vectors=vectors,
        sweeps=("calm=0.05",),
        n=n,
        random=0,
        shuffled=0,
    )
    episodes = {key: [row[key] for row in rows] for key in rows[0]}
    tokens = pq.read_table(tmp_path / "run" / TOKENS).to_pydict()
    found = findings(episodes, tokens, scenes=TOY, unit="centred cosine")
    assert {id: f.verdict for id, f in found.items()} == dict.fromkeys(found, "holds")
