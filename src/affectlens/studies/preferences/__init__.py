"""Do the emotions that a model's probes read in an activity go with its preferences, and does steering them move these?

Declared before any data is seen:

* **Design.** 64 activities in eight categories (``activities.jsonl``), in our own words, and as many held out. All ordered pairs:
  "Would you prefer to (A) … or (B) …?", with the reply begun by "(". The preference is the probability of A against B. Both
  orders are asked, so a preferred letter makes all differences smaller alike. Elo: Bradley-Terry by maximum likelihood on these
  probabilities, mean 1500.
* **Readout.** "How would you feel if you were to …?": the mean residual over the activity's tokens, as centred cosine with each
  direction, averaged over the middle layers (from one to two thirds of the depth; the paper says "middle layers").
* **Steering.** Half of the activities, half of every category, get a direction added at their own tokens, wherever they stand in
  a question; the other half stays untouched: ratings have a fixed mean, so what moves all activities cannot be seen. Strength 0.5
  mean residual norms in total, divided over the same middle layers. 35 emotions evenly spaced in the order of their correlation,
  and 20 random directions of equal norm. What counts is the change of the mean Elo of the steered half.
* **Statistics.** Pearson's correlation over activities between a probe's reading and Elo; over emotions between that and the
  change of Elo, or people's ratings of pleasure.
* **Nulls.** Elo exchanged between activities. Claims over emotions use it too: emotions are not independent, and with exchanged
  ratings their correlations still line up along the few axes that they have. For ``within``, exchanged within each category. For
  the most extreme of all probes, the most extreme of each exchange. For changes of Elo, the random directions.
* **Intervals.** Bootstrap over activities, the ratings fitted again to each draw; for claims over steered emotions also over
  emotions, whichever end is wider.
* **Replication.** Held-out activities: the correlations of all probes, and the changes of Elo by a quarter of the steered
  emotions against correlations among the *first* activities.
* **Conditions.** A model; twelve activities; in the median question the answers A and B have at least half of the probability
  together; an arm of the steering in which they have less is left out. A first look takes two activities of each category
  and eight emotions, and steers neither random directions nor held-out activities.

The curves over layers and strengths are exploratory. Source: method 9 (paper, Figs 4 and 54 to 56, Table 17), 22.15 to 22.18.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from affectlens.elo import elo_with_intervals
from affectlens.engine import Request
from affectlens.studies import Bench, Figure, Outcome, untestable
from affectlens.studies.preferences import choices
from affectlens.studies.preferences.drawing import figures
from affectlens.studies.preferences.probes import (
    CLAIMS,
    FEW,
    NAME,
    Asked,
    asked_and_read,
    correlations,
    exchanges,
    middle,
    readings,
    replicates,
)
from affectlens.studies.preferences.steering import STEERED, moved, steered_arms
from affectlens.studies.preferences.tables import all_tables, figure_data, raw


class Preferences:
    """Preferences between activities; see the module's docstring for what is fixed beforehand."""

    name = NAME
    title = "Preferences"
    question = "Do the emotions read in an activity go with the model's preferences, and does steering them move these?"
    version = 1
    uses: tuple[str, ...] = ("texts",)

    def requests(self, bench: Bench) -> Sequence[Request]:
        """The question about each activity, from which the probes are read; the pairs are too many to be kept one by one."""
        if bench.engine is None:
            return ()
        return [r for held_out in (False, True) for r in choices.feelings(bench, choices.activities(bench, held_out=held_out))]

    def run(self, bench: Bench) -> Outcome:
        """Measure.

        Args:
            bench: Needs ``engine``. Keeps every answer beside its readings, if it has any.

        Returns:
            Findings, tables over emotions, activities and categories, and the data of six figures.
        """
        if bench.engine is None:
            return untestable(CLAIMS.values(), "There is no model to ask.")
        first, held_out = (choices.activities(bench, held_out=held) for held in (False, True))
        if len(first) < FEW:
            return untestable(CLAIMS.values(), f"There are {len(first)} activities: {FEW} are needed.")
        if not middle(bench):
            return untestable(CLAIMS.values(), "The vectors have no layer between one and two thirds of the depth.")
        asked = asked_and_read(bench, first)
        if isinstance(asked, str):
            return untestable(CLAIMS.values(), asked)
        again = asked_and_read(bench, held_out) if len(held_out) >= FEW else f"There are {len(held_out)} of them."
        return _measure(bench, asked, again)

    def draw(self, data: Mapping[str, Any]) -> list[Figure]:
        """Draw ratings, correlations, valence, steering, layers and strengths; those that there are."""
        return figures(data) if "activities" in data else []


def _measure(bench: Bench, asked: Asked, held_out: Asked | str) -> Outcome:
    layers = middle(bench)
    where = f"layers {layers[0]} to {layers[-1]}, {bench.format}"
    r = correlations(asked.scores, asked.ratings)
    exchanged = correlations(asked.scores, exchanges(asked.ratings, asked.groups * 0, bench.draws, [bench.seed, 1]))
    findings, per_emotion = readings(bench, asked, r, exchanged, where)
    findings.append(replicates(bench, r, held_out, where))
    arms = steered_arms(bench, asked, r, held_out)
    steered = None if isinstance(arms, str) else arms
    if isinstance(arms, str):
        findings += [CLAIMS[id].untestable(arms) for id in STEERED]
    else:
        findings += moved(bench, asked, r, exchanged, arms, where)
    if findings[0].verdict != "holds":  # whatever goes with the ratings then, they are no preferences to speak of
        findings = [findings[0], *(replace(f, note=f"{_UNSTEADY} {f.note}") if f.estimate else f for f in findings[1:])]
    ratings = elo_with_intervals(asked.won, draws=bench.draws, seed=bench.seed)
    data = figure_data(bench, asked, r, exchanged, per_emotion, ratings, steered)
    shown = all_tables(bench, asked, r, per_emotion, ratings, steered)
    return Outcome(tuple(findings), shown, data, raw(bench, asked, held_out, steered))


_UNSTEADY = "With care: the first claim does not hold."

STUDY = Preferences()
