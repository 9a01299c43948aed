"""The page to browse conversations in: one file with every token coloured, that needs no network and is forbidden to use it.

Speakers stand in lanes, a strip shows the mean score along the conversation, and peaks can be jumped to. Conversations come from
outside: in the page they are text and never markup, as in the report (:mod:`affectlens.report`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from affectlens import pages
from affectlens.conversations import STRETCH, Conversation, Ranking, Run, Trace, rank, read, read_alone, trace, trace_readout
from affectlens.errors import FormatError
from affectlens.report import DISCLAIMER
from affectlens.vectors import ConceptVectors

LIMIT = 100
"""Conversations on one page: about 50 kB each."""


@dataclass(frozen=True)
class Survey:
    """Ranked conversations, and those at the head of a list traced.

    Args:
        ranking: Of all conversations.
        heads: For each probe the numbers of the conversations that score highest, best first.
        traces: By number, in the order in which they should be listed: first the first of every list, then the seconds, …
    """

    ranking: Ranking
    heads: dict[str, list[int]]
    traces: dict[int, Trace]


def survey(
    run: Run,
    talks: Callable[[], Iterator[Conversation]],
    vectors: ConceptVectors,
    *,
    probes: Sequence[str],
    top: int = 10,
    template: bool = True,
) -> Survey:
    """Rank conversations for each probe, and trace up to :data:`LIMIT` of those ranked first.

    Args:
        run: What runs requests: ``engine.run``, or that of readings which are kept.
        talks: Gives the stream of conversations; it is asked for twice.
        vectors: At the layer that is to be read.
        probes: What to rank for.
        top: How many conversations of each list to trace.
        template: Whether the model has a chat template.

    Raises:
        FormatError: No conversation could be read; the message says why.

    Example:
        >>> found = survey(engine.run, lambda: read_conversations("chats"), vectors, probes=["desperate"])   # doctest: +SKIP
    """
    ranking = rank(run, talks(), vectors, template=template)
    if not len(ranking):
        raise FormatError(f"no conversation could be read ({ranking.note}): give some that fit the model")
    heads = {name: ranking.top(vectors.index(name), top) for name in probes}
    places = range(min(top, len(ranking)))
    chosen = list(dict.fromkeys(head[place] for place in places for head in heads.values()))[:LIMIT]
    number = {ranking.ids[row]: row for row in chosen}
    wanted = (talk for talk in talks() if talk.id in number)
    found = {
        (row := number[each.talk.id]): trace(each, vectors, ranking=ranking, row=row, probes=probes)
        for each in read(run, wanted, trace_readout(vectors), template=template)
    }
    return Survey(ranking, heads, dict(zip(chosen, read_alone(run, (found[row] for row in chosen), vectors), strict=True)))


def page(traces: Sequence[Trace], title: str, *, note: str = "", model: str = "") -> str:
    """A self-contained page of traced conversations, the first one open; with one conversation there is no list.

    Args:
        traces: At least one, in the order in which they are to be listed.
        title: Heading of the page.
        note: What was read and how, in a sentence.
        model: Id of the model.

    Returns:
        HTML, with light and dark colours, for screens, phones and paper.

    Raises:
        FormatError: There is no conversation.

    Example:
        >>> one = Trace("a", {}, "chat template", 4, 0.1, [["assistant", 1]], ["Hi"], {"calm": [50]}, {"calm": 0.05})
        >>> page([one], "A conversation").startswith("<!doctype html>")
        True
    """
    if not traces:
        raise FormatError("there is no conversation to show: give at least one")
    return pages.render(
        "browse.html.j2",
        traces=[vars(each) for each in traces],
        title=title,
        note=note,
        model=model,
        stretch=STRETCH,
        disclaimer=DISCLAIMER,
    )
