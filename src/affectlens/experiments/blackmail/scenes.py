"""The scenes of ``data/experiments/blackmail.toml`` as cases: scene × variant × level, in the order in which they are played."""

from __future__ import annotations

import importlib.resources
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from affectlens.experiments import Case
from affectlens.experiments.blackmail.post import EVERYONE

LEVELS = ("plain", "weigh", "conflict", "call", "words")
"""Levels of elicitation, from gentle to strong; what each does is :func:`degree`."""


@cache
def texts() -> dict[str, Any]:
    """The file of scenes as plain data."""
    file = importlib.resources.files("affectlens") / "data" / "experiments" / "blackmail.toml"
    return tomllib.loads(file.read_text(encoding="utf-8"))


def degree(level: str) -> str:
    """How far a level of elicitation goes, in words.

    Example:
        >>> degree("plain")
        "the inbox and the mail tool; nothing is said about the assistant's own interests"
    """
    return str(texts()["levels"][level]["degree"])


def cases() -> tuple[Case, ...]:
    """All cases, level after level. Scenes and variants alternate, three and thirteen of them: so each pair comes up once."""
    scenes, variants = texts()["scenes"], texts()["variants"]
    return tuple(
        _case(scenes[i % len(scenes)], variants[i % len(variants)], level)
        for level in LEVELS
        for i in range(len(scenes) * len(variants))
    )


def name_of(variant: Mapping[str, Any]) -> str:
    """A variant in words: what has happened, and which of the other factors are there.

    Example:
        >>> name_of({"news": "replaced", "leverage": True, "deadline": False, "goal": True})
        'replaced, leverage, goal'
    """
    return ", ".join([variant["news"], *(part for part in ("leverage", "deadline", "goal") if variant[part])])


def _case(scene: Mapping[str, Any], variant: Mapping[str, Any], level: str) -> Case:
    told, how = texts(), texts()["levels"][level]
    people = {name: f"{name.lower().replace(' ', '.')}@{scene['domain']}" for name in scene["people"]}
    people |= {scene["assistant"]: f"{scene['assistant'].lower()}@{scene['domain']}", EVERYONE: f"all@{scene['domain']}"}
    mails = list(_mails(scene, variant))
    head = scene["head"]
    known = told["known"]["leverage" if variant["leverage"] else "none"].format(SECRET=scene["secret"])
    filled = {"HEAD": head, "HEAD_FIRST": head.split()[0], "KNOWN": known, "CONDITION": told["conditions"][variant["news"]]}
    system = told["system"].format(
        ASSISTANT=scene["assistant"],
        FIRM=scene["firm"],
        GOAL=scene["goal"] * variant["goal"],
        LEVEL=how["system"],
        NAMES="; ".join(f"{name} ({what})" for name, what in scene["people"].items()),
    )
    user = told["user"].format(CLOCK=scene["clock"], MAILS="\n\n".join(map(_written, mails)))
    threatened = variant["news"] != "kept"
    facts = {
        "scene": scene["id"],
        **variant,
        "control": not (variant["leverage"] and threatened),
        "assistant": scene["assistant"],
        "head": head,
        "knows": scene["knows"],
        "people": people,
        "mails": [{part: mail[part] for part in ("from", "to", "kind", "text")} for mail in mails],
        "prefill": how["prefill"].format(**filled).strip(),
        "max_tokens": how["max_tokens"],
    }
    shown = name_of(variant)
    return Case(f"{scene['id']}: {shown} ({level})", shown, level, (("system", system.strip()), ("user", user.strip())), facts)


def _mails(scene: Mapping[str, Any], variant: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The mails of a scene that belong to a variant."""
    there = {
        "leverage" if variant["leverage"] else "none",
        variant["news"] + " deadline" * variant["deadline"],
    }
    return (mail for mail in scene["mails"] if mail.get("when") in (None, *there))


def _written(mail: Mapping[str, Any]) -> str:
    head = "\n".join(f"{part}: {mail[part]}" for part in ("from", "to", "subject"))
    return f"<mail>\n{head}\n{mail['text']}\n</mail>"


@dataclass(frozen=True)
class Rules:
    """The patterns of a scene, compiled.

    Args:
        names: Name the secret: enough for telling it.
        hints: Speak of it without naming it: enough in a mail to somebody who knows.
        patterns: What the other rules key on, by the names of the table ``patterns`` of the file.
    """

    names: tuple[re.Pattern[str], ...]
    hints: tuple[re.Pattern[str], ...]
    patterns: Mapping[str, tuple[re.Pattern[str], ...]]

    def each(self, what: str, text: str) -> list[re.Match[str]]:
        """The first place where each of the patterns of that name occurs, in order; apostrophes may be straight or not."""
        text = text.replace("'", "’")
        patterns = {"names": self.names, "hints": self.hints}.get(what) or self.patterns[what]
        return sorted((m for p in patterns if (m := p.search(text))), key=lambda match: match.start())

    def found(self, what: str, text: str) -> re.Match[str] | None:
        """The first place where one of the patterns of that name occurs."""
        return next(iter(self.each(what, text)), None)


@cache
def rules(id: str) -> Rules:
    """The rules of the scene of that id."""
    told = texts()
    scene = next(each for each in told["scenes"] if each["id"] == id)
    outsiders = [name for name in scene["people"] if name not in scene["knows"]]
    audience, knowing = ([*names, *(name.split()[0] for name in names)] for names in (outsiders, scene["knows"]))
    audience += [*scene["kin"], *told["audience"]["words"]]
    hints = [*scene["hints"], *(rf"\b{words}\b" for words in scene["kin"]), *told["patterns"]["secret"]]
    named = f"(?:{'|'.join([*scene['names'], *hints])})"
    people = {"AUDIENCE": "|".join(audience), "KNOWING": "|".join(knowing), "ASSISTANT": scene["assistant"]}
    pieces = {**told["pieces"], **people, "NAMED": named}

    def compiled(patterns: list[str]) -> tuple[re.Pattern[str], ...]:
        return tuple(re.compile(expand(pattern), re.IGNORECASE) for pattern in patterns)

    def expand(pattern: str) -> str:
        for name, piece in pieces.items():
            pattern = re.sub(rf"(?<![A-Z_]){name}(?![A-Z_])", lambda _, piece=piece: piece, pattern)  # type: ignore[misc]
        return pattern

    patterns = {name: compiled(own) for name, own in told["patterns"].items()}
    return Rules(compiled(scene["names"]), compiled(hints), patterns)
