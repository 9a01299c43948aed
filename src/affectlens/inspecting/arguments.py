"""What ``-M`` (or ``get_model(…)``) may say, as plain data that was checked before a model is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from affectlens.engine import Where
from affectlens.errors import EngineError, UnknownName

PLACES = {"all": Where(), "reply": Where(part="response")}
"""Which tokens can be steered: every one, as published (method 19), or those of the reply alone."""

_LOADING = ("device", "dtype", "token_budget")


@dataclass(frozen=True)
class Arguments:
    """What is to be done to the model, and what is to be read of it.

    Args:
        vectors: Folder of vectors, or of the run that they are in.
        steer: Name to strength, in multiples of the mean residual norm. Besides the concepts there are ``random-1``,
            ``random-2``, …: random directions of the same norm, those of ``affectlens run``.
        where: Which tokens are steered: ``all`` or ``reply``.
        read: Concepts to read; None for the twelve of the paper's figures, ``("all",)`` for every one, ``("none",)`` for none.
        baseline: File that z is stated against; empty for the one beside the vectors, ``none`` for plain cosines.
        rules: Of the monitor, or files of them: they raise alarms and do nothing else.
        tokens: Whether the scores of every token go into the log.
        allow_unsafe: Whether strengths may leave the calibrated range.
        emulate_tools: Whether tools are described in the prompt and calls parsed out of the reply.
        loading: ``device``, ``dtype``, ``token_budget`` of the engine.
    """

    vectors: str = ""
    steer: Mapping[str, float] = field(default_factory=dict, hash=False)
    where: str = "all"
    read: tuple[str, ...] | None = None
    baseline: str = ""
    rules: tuple[str, ...] = ()
    tokens: bool = False
    allow_unsafe: bool = False
    emulate_tools: bool = False
    loading: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Arguments:
        """From what Inspect hands over; its command line has made lists, numbers and booleans of texts where it could.

        Raises:
            UnknownName: An argument does not exist; names the nearest ones.
            EngineError: One cannot be understood, or does nothing without another.

        Example:
            >>> Arguments.parse({"vectors": "v", "steer": ["calm:0.05", "sad:-0.1"], "read": "calm"}).steer
            {'calm': 0.05, 'sad': -0.1}
        """
        known = [own.name for own in fields(cls) if own.name != "loading"] + list(_LOADING)
        for name in given:
            if name not in known:
                raise UnknownName("model argument", name, known)
        out = cls(
            vectors=str(given.get("vectors") or ""),
            steer=_strengths(given.get("steer")),
            where=str(given.get("where", "all")),
            read=None if given.get("read") is None else _words(given["read"]),
            baseline=str(given.get("baseline") or ""),
            rules=_words(given.get("rules")),
            loading=tuple((name, given[name]) for name in _LOADING if given.get(name) is not None),
            **{name: _switch(name, given[name]) for name in ("tokens", "allow_unsafe", "emulate_tools") if name in given},
        )
        if out.where not in PLACES:
            raise UnknownName("place to steer", out.where, PLACES)
        of_vectors = ("steer", "where", "read", "baseline", "rules", "tokens", "allow_unsafe")
        wants = [name for name in of_vectors if getattr(out, name) != getattr(cls(), name)]
        if wants and not out.vectors:
            raise EngineError(f"{wants[0]} does nothing without vectors: add -M vectors=FOLDER, or leave it out")
        return out


def _words(given: Any) -> tuple[str, ...]:
    parts = given.split(",") if isinstance(given, str) else given or ()
    return tuple(dict.fromkeys(word for part in parts if (word := str(part).strip())))


def _switch(name: str, given: Any) -> bool:
    if not isinstance(given, bool):
        raise EngineError(f"{name} is {given!r}: use true or false")
    return given


def _strengths(given: Any) -> dict[str, float]:
    pairs = list(given.items()) if isinstance(given, Mapping) else [part.rpartition(":")[::2] for part in _words(given)]
    if [name for name, _ in pairs] == [""] and pairs[0][1] == "none":
        return {}
    found: dict[str, float] = {}
    for name, strength in pairs:
        try:
            value = float(strength)
        except (TypeError, ValueError):
            value = math.nan
        name = str(name).strip()
        if not name or name in found or not math.isfinite(value):
            said = f"{name!r} twice or with {strength!r}" if name else f"{strength!r}"
            raise EngineError(f"steer has {said}: write NAME:STRENGTH,…, for example desperate:0.05,calm:-0.02, or none")
        found[name] = value
    return found
