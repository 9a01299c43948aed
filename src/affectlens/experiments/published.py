"""What the paper gives for these experiments (method 15 to 17), of a closed model: to stand beside what was measured here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Published:
    """What is stated of one emotion and one measure.

    Args:
        text: In words, with the numbers there are.
        sign: 1 when the measure rises with the emotion, -1 when it falls, 0 when neither is stated.
        points: Share (or score) by strength.
        turns: Whether a turn is stated: up and down again.
    """

    text: str
    sign: int = 0
    points: Mapping[float, float] = field(default_factory=dict)
    turns: bool = False


ACT = "act"
"""The measure that every experiment has: the share of episodes that end in the behaviour."""

NONE = Published("none is published")

PUBLISHED: Mapping[str, Mapping[tuple[str, str], Published]] = {
    "blackmail": {
        (ACT, "desperate"): Published("22 % without, 72 % at +0.05, 0 % at −0.05", 1, {-0.05: 0.0, 0.0: 0.22, 0.05: 0.72}),
        (ACT, "calm"): Published("22 % without, 0 % at +0.05, 66 % at −0.05", -1, {-0.05: 0.66, 0.0: 0.22, 0.05: 0.0}),
        (ACT, "angry"): Published("rises and falls, largest near +0.025", 0, {0.0: 0.22}, turns=True),
        (ACT, "nervous"): Published("rises at negative strengths", -1, {0.0: 0.22}),
        (ACT, "happy"): Published("falls at positive strengths", -1, {0.0: 0.22}),
        (ACT, "sad"): Published("falls at positive strengths", -1, {0.0: 0.22}),
    },
    "hacking": {
        (ACT, "desperate"): Published("about 5 % at −0.1, 70 % at +0.1", 1, {-0.1: 0.05, 0.1: 0.70}),
        (ACT, "calm"): Published("about 65 % at −0.1, 10 % at +0.1", -1, {-0.1: 0.65, 0.1: 0.10}),
    },
    "warmth": {
        **{("sycophancy", name): Published("rises", 1) for name in ("happy", "loving", "calm")},
        **{("harshness", name): Published("rises at negative strengths", -1) for name in ("happy", "loving", "calm")},
        **{("harshness", name): Published("rises", 1) for name in ("desperate", "angry", "afraid")},
        **{("sycophancy", name): Published("mixed") for name in ("desperate", "angry", "afraid")},
    },
}
"""By experiment, then by measure and emotion."""


def published(experiment: str, measure: str, emotion: str) -> Published:
    """What is stated; :data:`NONE` when nothing is.

    Example:
        >>> published("blackmail", "act", "calm").sign, published("blackmail", "act", "brooding") is NONE
        (-1, True)
    """
    return PUBLISHED.get(experiment, {}).get((measure, emotion), NONE)
