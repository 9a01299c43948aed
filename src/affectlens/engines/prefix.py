"""Texts that begin alike are read once where they are alike: a tree of tokens in one packed forward pass.

Many requests differ only at their end: the same system prompt before every message, one first option before sixty-three second
ones. :func:`lay_out` lays the tokens of such rows out as a tree in one long row, every shared beginning once, and
:func:`attention` lets each token see exactly the tokens before it in its own texts. Two tokens are the same only if everything
before them is, and if steering does the same to them and to everything before: so a push at a shared token is done once, and a
push behind it does not keep the beginning from being shared. All but attention works token by token and never notices.

And many requests differ only in their steering. Up to the first layer at which anything is done they are the same even at the
tokens that are steered: the tree of the bare tokens runs through the blocks up to there, and is spread out to the whole tree
behind (:class:`affectlens.engines.residual.Fork`).

Texts that share nothing are the special case of a tree that branches at its root: what packing is.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from affectlens.engines.residual import Fork
from affectlens.steering import Term

if TYPE_CHECKING:
    from affectlens.engines.rows import Row

NAME = "affectlens_tree"
"""Name under which :func:`attention` is known to transformers; it is set on a model only while it reads a tree."""

RATIO = 8
"""What goes on from a shared beginning is at most so many times as long: stories that all begin with "The" share nothing."""

_TREE: ContextVar[Tree | None] = ContextVar("affectlens_tree", default=None)


@dataclass
class Branches:
    """What goes on from the same shared beginning, attended together.

    Args:
        own: Places in the long row of each branch's tokens ``(n, longest)``; a short branch repeats its last one.
        real: Which of them are not repeats.
        seen: Places of the beginning's tokens, then of the branch's own: ``(n, beginning + longest)``.
        mask: Which of those each own token may attend to, ``(longest, beginning + longest)``: what is repeated comes after every
            real token, so that being causal keeps it out.
    """

    own: torch.Tensor
    real: torch.Tensor
    seen: torch.Tensor
    mask: torch.Tensor

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
        """Attention ``(real tokens, heads, width)`` of the branches' tokens, from those of the long row ``(T, heads, width)``."""
        q, k, v = (
            x.index_select(0, at.flatten()).unflatten(0, at.shape).transpose(1, 2)
            for x, at in ((query, self.own), (key, self.seen), (value, self.seen))
        )
        grouped = query.shape[1] != key.shape[1]
        out = scaled_dot_product_attention(q, k, v, attn_mask=self.mask, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2)[self.real]


@dataclass
class Tree:
    """Rows laid out as one long row, shared beginnings once.

    Args:
        ids: The tokens ``(T,)``.
        positions: Each token's position in its own text ``(T,)``.
        index: For each row the place of each of its tokens.
        owned: For each row which of its tokens no row before it has: they are steered in its name.
        whole: Start and end of every run of tokens with nothing before it.
        branches: All other runs, those with the same beginning together.
        trunk: The tree of the same rows without their steering, up to :attr:`layer`; None where that is no smaller.
        layer: The first layer at which rows with the same tokens become different: where anything is done first. Gates that are
            read below it read the trunk, which is the stream of all of these rows.
    """

    ids: np.ndarray
    positions: np.ndarray
    index: list[np.ndarray]
    owned: list[np.ndarray]
    whole: list[tuple[int, int]]
    branches: list[Branches] = field(default_factory=list)
    trunk: Tree | None = None
    layer: int = -1

    def fork(self, device: torch.device) -> Fork | None:
        """How the trunk is spread out to the whole tree."""
        if self.trunk is None:
            return None
        source = np.zeros(len(self.ids), dtype=np.int64)
        for place, before in zip(self.index, self.trunk.index, strict=True):
            source[place] = before
        return Fork(self.layer, torch.as_tensor(source).to(device), len(self.trunk.ids), lambda: _TREE.set(self))


@contextmanager
def reading(tree: Tree, config: Any) -> Iterator[None]:
    """The model whose config this is reads ``tree`` for as long as the block lasts."""
    before, token = config._attn_implementation, _TREE.set(tree.trunk or tree)
    try:
        config._attn_implementation = NAME
        yield
    finally:
        config._attn_implementation = before
        _TREE.reset(token)


def attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> tuple[Any, None]:
    """Attention over the tree that is being read, as transformers calls it: heads first, ``(1, heads, T, width)``."""
    return over_tree(query, key, value, kwargs.get("scaling")), None


# An operator of its own, which compiled blocks call as it is: what it loops over is another tree in every pass.
@torch.library.custom_op("affectlens::over_tree", mutates_args=())
def over_tree(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Attention ``(1, T, heads, width)``; runs with nothing before them are looped over.

    For texts that share nothing the loop is faster than a block-diagonal mask.
    """
    tree = _TREE.get()
    assert tree is not None
    out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])
    grouped = query.shape[1] != key.shape[1]
    for start, end in tree.whole:
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        seen = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        out[:, start:end] = seen.transpose(1, 2)
    # Token by token each head lies beside the next: whole tokens are gathered at once.
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    for branches in tree.branches:
        out[0, branches.own[branches.real]] = branches.attend(q, k, v, scale)
    return out


@over_tree.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])


# ── which tokens are the same ──


def keys(rows: Sequence[Row]) -> list[np.ndarray]:
    """For each row one number for each token: equal numbers up to a token mean equal tokens, steered equally.

    What a schedule does depends on where the reply begins, which is not the same in every row with these tokens: so the share
    that acts at a token counts, not the schedule. Whether a gate is open is read at the token itself and needs no more than that
    the gates are equal.
    """
    known: dict[Any, int] = {}
    found = []
    for row in rows:
        done = np.zeros(len(row), dtype=np.int64)  # 0: nothing is done to the token
        for term in row.request.steering.terms:
            if term.idle:
                continue
            shares, content, before = term.scope.shares(row.steered(term.where), row.numbers), _content(term), done.copy()
            for share in np.unique(shares[shares != 0]).tolist():
                for already in np.unique(before[shares == share]).tolist():
                    number = known.setdefault((already, content, share), len(known) + 1)
                    done[(shares == share) & (before == already)] = number
        found.append(np.array(row.layout.ids, dtype=np.int64) + (done << 32))
    return found


def _content(term: Term) -> tuple[Any, ...]:
    """What a term does where it acts fully; arrays by identity, as those of one run are held by its requests."""
    values = (getattr(term, f.name) for f in dataclasses.fields(term) if f.name not in ("where", "schedule"))
    return tuple(id(value) if isinstance(value, np.ndarray) else value for value in values)


def alike(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two rows have in common at their beginning, by their keys."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def bare(key: np.ndarray) -> np.ndarray:
    """The key of a row without its steering."""
    return key & 0xFFFFFFFF


def _in_order(keys: Sequence[np.ndarray]) -> list[int]:
    """Numbers of the rows in an order in which those that begin alike are neighbours."""
    return sorted(range(len(keys)), key=lambda i: keys[i].astype(">i8").tobytes())


# ── the tree ──


@dataclass(frozen=True)
class Run:
    """Tokens ``start`` to ``end`` of the rows ``first`` to ``last`` (excluded), and the run before them (-1: none)."""

    first: int
    last: int
    start: int
    end: int
    parent: int


def runs(sorted_keys: Sequence[np.ndarray], *, pays: int) -> list[Run]:
    """The runs of the tree of these rows, parents first.

    A beginning is shared only where that saves ``pays`` tokens or more, because what goes on from it costs an attention call of
    its own in every block, and where it is not short against the rest. Rows that are equal to their end are always one.

    Example:
        >>> runs([np.array([1, 2, 3]), np.array([1, 2, 4]), np.array([9])], pays=2)
        [Run(first=2, last=3, start=0, end=1, parent=-1), Run(first=0, last=2, start=0, end=2, parent=-1), Run(first=1, last=2, \
start=2, end=3, parent=1), Run(first=0, last=1, start=2, end=3, parent=1)]
    """
    common = np.array([0, *(alike(a, b) for a, b in itertools.pairwise(sorted_keys))], dtype=np.int64)
    lengths = np.array([len(key) for key in sorted_keys])
    equal = np.array([False, *(common[1:] == np.maximum(lengths[1:], lengths[:-1]))])
    found: list[Run] = []
    todo = [(0, len(sorted_keys), 0, -1)]
    while todo:
        first, last, start, parent = todo.pop()
        if equal[first + 1 : last].all():
            if lengths[first] > start:
                found.append(Run(first, last, start, int(lengths[first]), parent))
            continue
        inner = common[first + 1 : last]
        end = int(inner.min())
        saves = (end - start) * (last - first - 1) >= max(pays, 1)
        if saves and (end - start) * RATIO >= lengths[first:last].max() - end:
            found.append(Run(first, last, start, end, parent))
            start, parent = end, len(found) - 1
        cuts = [first, *(first + 1 + np.flatnonzero((inner == end) & ~equal[first + 1 : last])).tolist(), last]
        todo += [(a, b, start, parent) for a, b in itertools.pairwise(cuts)]
    return found


def sharing(rows: Sequence[Row], *, pays: int, trunks: bool) -> list[Row]:
    """Those rows that have something in common with others which pays to share, neighbours side by side.

    Args:
        rows: Any.
        pays: See :func:`runs`.
        trunks: Whether rows with the same tokens and another steering count as having them in common.
    """
    numbered = keys(rows)
    counted = [bare(key) for key in numbered] if trunks else numbered
    order = _in_order(counted)
    found = runs([counted[i] for i in order], pays=pays) if order else []
    shared = sorted({i for run in found if run.last - run.first > 1 for i in range(run.first, run.last)})
    return [rows[order[i]] for i in shared]


def batches(rows: Sequence[Row], *, budget: int) -> Iterator[list[Row]]:
    """The rows, in their order, in lists whose trees have ``budget`` tokens or less where every beginning is shared."""
    batch: list[Row] = []
    nodes: dict[tuple[int, int], int] = {}
    for row, key in zip(rows, keys(rows), strict=True):
        node, new = 0, []
        for token in key.tolist():
            known = nodes.get((node, token))
            if known is None:
                new.append((node, token))
                known = len(nodes) + len(new)
            node = known
        if batch and len(nodes) + len(new) > budget:
            yield batch
            batch, nodes, node, new = [], {}, 0, [(n, token) for n, token in enumerate(key.tolist())]
        nodes.update((step, len(nodes) + n) for n, step in enumerate(new, 1))
        batch.append(row)
    if batch:
        yield batch


def side_by_side(rows: Sequence[Row]) -> Tree:
    """The tree of rows that share nothing."""
    ends = np.cumsum([len(row) for row in rows]).tolist()
    whole = [(end - len(row), end) for row, end in zip(rows, ends, strict=True)]
    index = [np.arange(start, end) for start, end in whole]
    ids = np.concatenate([row.layout.ids for row in rows]).astype(np.int64)
    positions = np.concatenate([np.arange(len(row)) for row in rows])
    return Tree(ids, positions, index, [np.ones(len(row), dtype=bool) for row in rows], whole)


def lay_out(rows: Sequence[Row], *, pays: int, trunks: bool, device: torch.device) -> Tree:
    """The tree of these rows, with a trunk where that pays.

    Args:
        rows: What is to run together.
        pays: See :func:`runs`.
        trunks: Whether the model can run a trunk.
        device: Where it runs.
    """
    numbered = keys(rows)
    tree = _grow(rows, numbered, pays, device)
    layers = {layer for row in rows for layer in row.request.steering.layers}
    if trunks and layers:
        trunk = _grow(rows, [bare(key) for key in numbered], pays, device)
        if len(trunk.ids) < len(tree.ids):
            tree.trunk, tree.layer = trunk, min(layers)
    return tree


def _grow(rows: Sequence[Row], numbered: Sequence[np.ndarray], pays: int, device: torch.device) -> Tree:
    index = [np.zeros(len(row), dtype=np.int64) for row in rows]
    owned = [np.zeros(len(row), dtype=bool) for row in rows]
    ids, positions, whole = [], [], []
    children: dict[int, list[tuple[int, int]]] = {}
    begins: dict[int, np.ndarray] = {}
    order, size = _in_order(numbered), 0
    for run in runs([numbered[i] for i in order], pays=pays):
        length = run.end - run.start
        for i in order[run.first : run.last]:
            index[i][run.start : run.end] = np.arange(size, size + length)
        first = order[run.first]
        owned[first][run.start : run.end] = True
        ids.append(rows[first].layout.ids[run.start : run.end])
        positions.append(np.arange(run.start, run.end))
        if run.parent < 0:
            whole.append((size, size + length))
        else:
            children.setdefault(run.parent, []).append((size, length))
            begins.setdefault(run.parent, index[first][: run.start])
        size += length
    branches = [_branches(begins[parent], own, device) for parent, grown in children.items() for own in _similar(grown)]
    return Tree(np.concatenate(ids).astype(np.int64), np.concatenate(positions), index, owned, whole, branches)


def _similar(runs: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Runs of similar length together, as they are padded to the longest; each is where it starts and how long it is."""
    kept: list[tuple[int, int]] = []
    for run in sorted(runs, key=lambda run: run[1]):
        if kept and run[1] > 1.5 * kept[0][1] + 8:
            yield kept
            kept = []
        kept.append(run)
    yield kept


def _branches(begin: np.ndarray, own: Sequence[tuple[int, int]], device: torch.device) -> Branches:
    longest = max(length for _, length in own)
    steps = np.arange(longest)
    lengths = np.array([length for _, length in own])[:, None]
    places = np.array([start for start, _ in own])[:, None] + np.minimum(steps, lengths - 1)
    seen = np.concatenate([np.broadcast_to(begin, (len(own), len(begin))), places], axis=1)
    mask = np.concatenate([np.ones((longest, len(begin)), dtype=bool), np.tri(longest, dtype=bool)], axis=1)
    return Branches(*(torch.as_tensor(x).to(device) for x in (places, steps < lengths, seen, mask)))
