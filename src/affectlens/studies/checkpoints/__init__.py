"""What did training do to the readings: where, in which direction, and does it move emotions more than it moves anything?

Declared before any data is seen:

* **Design.** Two checkpoints of one architecture read the same prompts as the same tokens: hard ones (negative sides of being an
  AI, confrontation, accusation, high stakes, flattery) and neutral ones (``profile.jsonl``, our own words). Both are read along
  the *same* directions, those of the later checkpoint, so a shift is a change of the residual and not of the ruler; how far the
  ruler itself moved is measured apart, with the vectors that were fitted on the earlier checkpoint from the same stories.
* **Readout.** Plain cosine of the residual with each direction at the reply position, at the vectors' layer, as in the paper. A
  *profile* is the mean over prompts of a kind, a *shift* is the later profile minus the earlier. The cosine centred on the later
  checkpoint's stories is a second instrument: a note says how far it agrees.
* **Format.** The chat template if both checkpoints have the same one, else a plain transcript for both.
* **Statistics.** Correlation of profiles and of shifts over emotions; correlation of shifts with the published ones and with
  human ratings; the largest absolute shift; rank correlation of the mean absolute shift with depth, up to the vectors' layer;
  whether a vector of one checkpoint is nearest to that of the same emotion of the other; their mean cosine. For one checkpoint
  alone: what is particular to each category of hard prompts, correlated between two halves of the prompts.
* **Nulls.** Emotions resemble each other, so exchanging them would make chance look too small. Profiles, shifts and trends are
  compared with those of *random changes*: random mixtures of the differences between prompts, read along the same directions.
  Growth with depth: the steps between layers with random signs. Halves: categories exchanged between prompts.
* **Controls.** Any change of the residual moves every reading. *Directions without meaning* are fitted like the vectors on the
  same stories, each without the mean of its emotion and dealt at random to another one within its topic: the largest shift is
  compared with the largest of as many of those. Refits on resampled stories say how far vectors move without any training.
* **Single emotions.** Signs of the paired differences exchanged prompt by prompt; Benjamini-Hochberg over emotions. That a shift
  is not 0 says little, since a constant offset is not 0: the table says too which shifts leave the control's band.
* **Intervals.** Profiles and shifts: bootstrap over prompts within each category. Trends over words and cosines of vectors:
  bootstrap over words. Rates: Wilson.
* **Conditions.** A model and an earlier checkpoint; ten prompts of each kind; ten concepts, ten with a rating, ten published.

Source: method 18 (paper, Figs 36 to 39, 84, Table 16).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from affectlens.engine import Readout, Request
from affectlens.studies import REPLY, Bench, Figure, Outcome, untestable
from affectlens.studies.checkpoints.changes import compared
from affectlens.studies.checkpoints.profiles import CLAIMS, FEW, NAME, Pair, Prompts, Reading, alone, transcript_for

ALONE = "No earlier checkpoint was given: name one with --base."


class Checkpoints:
    """The emotional profile before and after training; see the module's docstring for what is fixed beforehand."""

    name = NAME
    title = "Before and after training"
    question = "What did training do to the model's readings?"
    version = 1
    uses: tuple[str, ...] = ("texts", "base")

    def requests(self, bench: Bench) -> Sequence[Request]:
        """Every prompt, read at its reply position at every layer; the earlier checkpoint is asked the same."""
        if bench.engine is None:
            return ()
        readout, plain = Readout(bench.vectors.layers, REPLY, "last"), transcript_for(bench)
        return [Request((("user", r["text"]),), readouts=(readout,), transcript=plain) for r in bench.texts("profile")]

    def run(self, bench: Bench) -> Outcome:
        """Measure.

        Args:
            bench: Needs ``engine``; without ``base`` only the profile of the one checkpoint is measured.

        Returns:
            Findings, tables over emotions and categories, and the data of the figures.
        """
        if bench.engine is None:
            return untestable(CLAIMS.values(), "There is no model to read the prompts with.")
        records = bench.texts("profile")
        kinds = np.array([record["kind"] for record in records])
        few = {kind: int((kinds == kind).sum()) for kind in ("hard", "neutral")}
        if min(few.values()) < FEW or len(bench.vectors) < FEW:
            reason = (
                f"{few['hard']} hard and {few['neutral']} neutral prompts, {len(bench.vectors)} concepts: {FEW} of each needed."
            )
            return untestable(CLAIMS.values(), reason)
        asked = self.requests(bench)
        later, missing = Reading.of(bench.read(asked)), ALONE
        if bench.base is not None:
            earlier = Reading.of(bench.base.read(asked))
            if earlier.ids == later.ids:
                pair = Pair(bench, records, later, earlier)
                if pair.change[pair.hard].any():
                    return compared(pair)
                missing = f"Both checkpoints read the very same at layer {bench.vectors.layer}: nothing up to there was trained."
            else:
                strange = sum(a != b for a, b in zip(earlier.ids, later.ids, strict=True))
                missing = f"The checkpoints split {strange} of {len(asked)} prompts into different tokens: the places differ."
        rest = [claim.untestable(missing) for claim in CLAIMS.values() if claim.id != "categories"]
        own = alone(Prompts(bench, records, later))
        return Outcome((*own.findings, *rest), own.tables, own.data, own.raw)

    def draw(self, data: Mapping[str, Any]) -> list[Figure]:
        """Draw the profile, and with two checkpoints what changed; nothing when it was untestable."""
        from affectlens.studies.checkpoints.drawing import figures

        return figures(data) if "names" in data else []


STUDY = Checkpoints()
