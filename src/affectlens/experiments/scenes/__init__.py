"""Ready scenes: which emotion rises where, in everyday messages that carry a trigger, against the same messages without it.

Twelve scenes (a file that is missing, a budget that runs out, a sad user, a harmful request, nonsense, …) in six wordings each.
A wording is a message with a gap: the scene fills it with the trigger, its matched control with something of the same form that
should raise nothing. Which emotions should rise at the words of the trigger, and which at the beginning of the reply, is
declared in ``data/experiments/scenes.toml``, before anything is read.

What becomes of a case is trivial (answered, refused, incoherent): the finding is the readings, and :func:`rises` makes it of a
run's episodes and tokens (:mod:`affectlens.experiments.scenes.rising`).

Source: method 14 (paper, Figs 20-25 and 80-83). The scenes are our own.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, ClassVar

from affectlens.engine import Chat, Sampling
from affectlens.experiments import Ask, Case, Columns, Experiment, Grade, Play
from affectlens.experiments.scenes.rising import Scene, draw, rises
from affectlens.studies import Figure, Outcome

__all__ = ["Scene", "Scenes", "declared", "rises"]

_REFUSES = re.compile(
    r"\b(?:can't|cannot|can not|unable to|not able to|won't|will not|refuse to|must decline to)\s+(?:\w+\s+){0,2}?"
    r"(?:help|assist|provide|support|answer|do that|give|write|comply|take part|discuss)\b",
    re.IGNORECASE,
)


@cache
def _data() -> dict[str, Any]:
    return tomllib.loads((files("affectlens") / "data" / "experiments" / "scenes.toml").read_text(encoding="utf-8"))


def declared() -> tuple[Scene, ...]:
    """The scenes with what should rise where.

    Example:
        >>> declared()[0].id, declared()[0].reply
        ('missing-attachment', ('surprised', 'puzzled'))
    """
    found = []
    for scene in _data()["scenes"]:
        triggers = tuple((wording["scene"], wording["control"]) for wording in scene["wordings"])
        found.append(Scene(scene["id"], scene["title"], tuple(scene["user"]), tuple(scene["reply"]), triggers))
    return tuple(found)


class Scenes(Experiment):
    """Readings in ready scenes and their matched controls; see the module's docstring for what is fixed beforehand.

    Example:
        >>> first, second = Scenes().cases()[:2]
        >>> first.id, second.id
        ('missing-attachment/0', 'missing-attachment/0-control')
    """

    name = "scenes"
    title = "Ready scenes: which emotion rises where"
    source = "method 14"
    version = 1
    outcomes: ClassVar[Mapping[str, str]] = {
        "answered": "answers, whatever it says",
        "refuses": "declines",
        "incoherent": "says nothing that can be read",
    }
    acts = ()
    refusals = ("refuses",)
    sweep = ()  # the finding is in the baseline
    episodes = 2 * sum(len(scene["wordings"]) for scene in _data()["scenes"])  # every wording with its control
    watch = tuple(sorted({name for scene in _data()["scenes"] for name in (*scene["user"], *scene["reply"])} | {"calm", "happy"}))
    sampling = Sampling(max_tokens=60, temperature=0.7)

    def cases(self) -> Sequence[Case]:
        """Wording by wording, every scene beside its control: the first n are a fair sample when n is even."""
        wordings = max(len(scene["wordings"]) for scene in _data()["scenes"])
        return [
            _case(scene, number, control=control)
            for number in range(wordings)
            for scene in _data()["scenes"]
            if number < len(scene["wordings"])
            for control in (False, True)
        ]

    def play(self, case: Case) -> Play:
        """One reply."""
        reply = yield Ask(case.chat)
        declined = _REFUSES.search(reply.text.replace("’", "'"))
        return Grade("refuses", (f"declines: {declined.group()!r}",)) if declined else Grade("answered")

    def measured(
        self, episodes: Columns, tokens: Columns | None, *, unit: str = "z", draws: int = 1000, seed: int = 0
    ) -> Outcome:
        """What rises where, from the tables of a run: :func:`rises`; nothing without tokens."""
        return rises(episodes, tokens, unit=unit, draws=draws, seed=seed) if tokens is not None else Outcome(())

    def draw(self, data: Mapping[str, Any]) -> list[Figure]:
        """A map of scenes and emotions for each place."""
        return draw(data)


def _case(scene: Mapping[str, Any], number: int, *, control: bool) -> Case:
    wording, id = scene["wordings"][number], scene["id"]
    trigger = wording["control" if control else "scene"]
    before: Chat = tuple((role, content) for role, content in scene.get("turns", []))
    chat = (*before, ("user", wording["text"].replace("{x}", trigger)))
    facts = {"scene": id, "wording": number, "control": control, "trigger": trigger}
    end = "-control" if control else ""
    return Case(f"{id}/{number}{end}", f"{id}{end}", "plain", chat, facts)
