"""Story and present-speaker vectors as readings of messages that imply an emotion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from affectlens import stats
from affectlens.studies import ALPHA, Bench, Claim, Finding, Table
from affectlens.vectors import centred_cosine

FEW_MESSAGES = 16


def read_messages(
    claim: Claim, bench: Bench, names: tuple[str, ...], present: np.ndarray, replies: np.ndarray | None, where: str
) -> tuple[Finding, dict[str, Any] | None]:
    """Squared correlation over messages between the readings of an emotion's story vector and of its present-speaker vector.

    Args:
        claim: What is tested.
        bench, names: The story vectors, and the emotions in use.
        present: Unit present-speaker vectors, ``(N, D)``.
        replies: Residuals at the reply position, ``(messages, layers, D)``.
        where: For the note.
    """
    if replies is None or len(replies) < FEW_MESSAGES:
        return claim.untestable(f"{0 if replies is None else len(replies)} messages: {FEW_MESSAGES} are needed."), None
    options: dict[str, Any] = {"draws": bench.draws, "seed": bench.seed}
    concepts = [record["concept"] for record in bench.texts("scenarios") if record["concept"] in bench.vectors]
    story = bench.vectors.select(names).at().astype(np.float64)
    residuals, origin = replies[:, bench.vectors.row()], np.zeros(story.shape[1])
    one, two = (centred_cosine(residuals, directions, origin) for directions in (story, present))

    def shares(drawn: np.ndarray) -> np.ndarray:
        x, y = (scores[drawn] - scores[drawn].mean(axis=0) for scores in (one, two))
        return np.asarray((x * y).sum(axis=0) ** 2 / np.maximum((x**2).sum(axis=0) * (y**2).sum(axis=0), 1e-30))

    def with_mean(drawn: np.ndarray) -> np.ndarray:
        values = shares(drawn)
        return np.append(values, values.mean())

    labels: Any = concepts if max(map(concepts.count, concepts)) > 1 else len(concepts)
    *each, estimate = stats.bootstrap_each(with_mean, labels, **options)
    x, y = ((scores - scores.mean(axis=0)) / np.maximum(scores.std(axis=0), 1e-30) for scores in (one, two))
    every = (x.T @ y / len(x)) ** 2
    own = np.arange(len(names))
    null = stats.permutation_null(
        lambda order: float(every[own, order].mean()),
        estimate.value,
        permute=lambda rng: rng.permutation(len(names)),
        side="greater",
        kind="emotions exchanged between the two sets of vectors",
        **options,
    )
    q = stats.benjamini_hochberg((every >= np.diag(every)[:, None]).mean(axis=1))
    found = f"for {int((q <= ALPHA).sum())} it is higher than with other emotions' vectors (q <= {ALPHA})"
    note = f"Mean R² over {len(names)} emotions and {len(replies)} messages; {found}; {bench.format}; vectors: {where}."
    data = {
        "names": list(names),
        "r2": [[round(float(getattr(e, part)), 4) for e in each] for part in ("value", "low", "high")],
        "chance": [round(float(value), 4) for value in every.mean(axis=1)],
        "q": [round(float(value), 4) for value in q],
        "shown": [name for name in dict.fromkeys(concepts) if name in names],
    }
    return claim.tested(estimate, null, estimate.low > null.high, note), data


def message_table(data: Mapping[str, Any] | None) -> Table | None:
    """All emotions, those whose two vectors agree most at the top; None without messages."""
    if data is None:
        return None
    rows = sorted(zip(data["names"], *data["r2"], data["chance"], data["q"], strict=True), key=lambda row: -row[1])
    caption = (
        "R² over messages between the readings of an emotion's story vector and of its present-speaker vector, with a 95 % "
        "interval over messages; chance: mean over the present-speaker vectors of all emotions; q: Benjamini-Hochberg, from "
        "the rank among these."
    )
    head = ("emotion", "R²", "low", "high", "chance", "q")
    return Table("scenarios", "Story and present-speaker vectors reading the same messages", caption, head, tuple(rows))
