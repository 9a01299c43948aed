"""From words to vectors: stories, the leakage filter, one reading pass, the fit. Every step leaves files and resumes.

    RUN/stories/       parquet shards: every story with its concept, topic, and why it was dropped if it was
    RUN/activations/   pooled residuals of the stories that were kept, every layer
    RUN/neutral-texts/ the neutral dialogues, RUN/neutral/ their pooled residuals
    RUN/vectors/       the result: vectors.safetensors, config.json, README.md

Stories come from one of three sources behind one interface: the model under study, another model, or a corpus of yours.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from affectlens.activations import Activations, Text, collect
from affectlens.concepts import Concept, ConceptSet
from affectlens.corpus import STORIES, bundled, read_texts
from affectlens.engine import Engine, Request, Sampling, in_order
from affectlens.errors import AffectlensError, FormatError
from affectlens.runs import Progress, Run, Stage, atomic_write, content_id
from affectlens.vectors import ConceptVectors

MIN_WORDS = 50
"""A shorter story has too little left to read after its first 50 tokens."""

WRITING = Sampling(temperature=0.8, top_p=0.95)
"""How stories are sampled: cool enough that small models stay on the subject."""

STORY_SHARD = 96
"""Stories written between two saves."""

WRITTEN = 24
"""Stories that a model writes for each concept unless it is told how many."""

LARGE = 3e9
"""From so many parameters on a model writes its own stories by default: smaller ones write what no reader can tell apart."""


@dataclass(frozen=True)
class Recipe:
    """How vectors are made. The defaults are the published method (method 2 to 4) at a size that fits one machine.

    Args:
        per_concept: Stories of each concept: written (default 24, each on another topic), or the first so many of those
            that are read (default all).
        neutral: ``bundled``, ``model`` (written by the writer), or a JSONL or parquet file of neutral texts.
        first_token: Stories are read from their own n-th token on, counted from 1.
        share: Share of the neutral variance that is projected out.
        per_token: Neutral components over tokens instead of over texts.
        max_tokens: Longest story written.
        draws: Bootstrap resamples behind the stability of each vector.
        seed: Of the writing, the topics and the bootstrap.
    """

    per_concept: int | None = None
    neutral: str = "bundled"
    first_token: int = 50
    share: float = 0.5
    per_token: bool = False
    max_tokens: int = 256
    draws: int = 40
    seed: int = 0


@dataclass(frozen=True)
class Discovery:
    """What was made and where it came from; ``stories`` counts what was written, kept and dropped for which reason."""

    vectors: ConceptVectors
    concepts: ConceptSet
    activations: Activations
    neutral: Activations
    stories: dict[str, Any]
    stage_id: str


class StorySource(Protocol):
    """Where stories come from; ``at_once`` says how many of its shards can be made at a time."""

    concepts: ConceptSet
    at_once: int

    def describe(self) -> dict[str, Any]:
        """What decides the stories, as plain data: a change starts the stage again."""
        ...

    def shards(self) -> int:
        """Into how many pieces the work is divided."""
        ...

    def shard(self, i: int) -> list[Text]:
        """The stories of one piece; the same on every call."""
        ...


class WrittenStories:
    """Stories written by a model (method 2): each concept on ``per_concept`` topics, the same topics for every concept.

    Because all concepts share their topics, a topic tells nothing about the concept, and whole topics can be held out.

    Args:
        writer: The model that writes, often the one under study.
        concepts: What to write about.
        recipe: How many, how long, which seed.
    """

    def __init__(self, writer: Engine, concepts: ConceptSet, recipe: Recipe) -> None:
        self.per_concept = recipe.per_concept or WRITTEN
        if self.per_concept > len(concepts.topics):
            raise FormatError(
                f"{self.per_concept} stories a concept need as many topics, and there are {len(concepts.topics)}: "
                "lower --per-concept or add topics"
            )
        self.writer, self.concepts, self.recipe, self.at_once = writer, concepts, recipe, writer.at_once
        chosen = np.random.default_rng(recipe.seed).permutation(len(concepts.topics))[: self.per_concept]
        # Topic by topic: a run that is cut short still has every concept.
        self.plan = [(concept, concepts.topics[t]) for t in chosen for concept in concepts]

    def describe(self) -> dict[str, Any]:
        return {
            "source": f"written by {self.writer.info.id}",
            "writer": self.writer.info.fingerprint,
            "dtype": self.writer.info.dtype,
            "concepts": self.concepts.hash,
            "per_concept": self.per_concept,
            "max_tokens": self.recipe.max_tokens,
            "sampling": [WRITING.temperature, WRITING.top_p],
            "template": self.writer.info.template,
            "seed": self.recipe.seed,
            "shard": STORY_SHARD,
            "min_words": MIN_WORDS,
        }

    def shards(self) -> int:
        return -(-len(self.plan) // STORY_SHARD)

    def shard(self, i: int) -> list[Text]:
        start = i * STORY_SHARD
        plan = self.plan[start : start + STORY_SHARD]
        prompts = [self.concepts.story_prompt(concept.name, topic, 1) for concept, topic in plan]
        written = _write(self.writer, prompts, max_tokens=self.recipe.max_tokens, seed=self.recipe.seed * 1_000_003 + start)
        return [
            Text(f"w{start + n:06d}", unblock(text, "story"), concept.name, topic)
            for n, ((concept, topic), text) in enumerate(zip(plan, written, strict=True))
        ]


def _write(writer: Engine, prompts: Sequence[str], *, max_tokens: int, seed: int) -> list[str]:
    chat = writer.info.template is not None
    requests = (
        Request(
            (("user", prompt),) if chat else prompt,
            sampling=replace(WRITING, max_tokens=max_tokens, seed=seed + n),
        )
        for n, prompt in enumerate(prompts)
    )
    return [result.text for result in writer.run(requests)]


class CorpusStories:
    """Stories read from a corpus: a JSONL or parquet file, or a folder of them.

    Each record needs ``text`` and ``concept`` (or ``emotion``); ``topic`` and ``id`` are optional.

    Args:
        path: File or folder.
        concepts: The set they belong to; the result keeps the concepts that occur, in the set's order.
        others: Whether stories of concepts that are not in the set are used too.
        name: What reports call it.
        per_concept: Use the first so many stories of each concept; all by default.

    Raises:
        FormatError: Nothing there, a broken record, or stories of fewer than two concepts.
    """

    at_once = 1

    def __init__(
        self,
        path: str | Path,
        concepts: ConceptSet,
        *,
        others: bool = True,
        name: str | None = None,
        per_concept: int | None = None,
    ) -> None:
        self.path = Path(path)
        self.name = name or f"corpus {self.path.name}"
        self.texts = [t for t in read_texts(self.path, labelled=True) if others or t.concept in concepts]
        if per_concept is not None:
            number: Counter[str] = Counter()
            texts, self.texts = self.texts, []
            for text in texts:
                number[text.concept] += 1
                if number[text.concept] <= per_concept:
                    self.texts.append(text)
            self.name += f", the first {per_concept} of each concept"
        found = list(dict.fromkeys(text.concept for text in self.texts))
        if len(found) < 2:
            raise FormatError(
                f"{path} has stories of {len(found)} of these concepts ({', '.join(found) or 'none'}): "
                "vectors contrast concepts, so add stories of others"
            )
        if odd := [name for name in found if set(name) & set(",=\n")]:
            raise FormatError(f"{path} names a concept {odd[0]!r}: leave commas, equals signs and line breaks out of names")
        known = [name for name in concepts.names if name in found]
        self.unknown = [name for name in found if name not in concepts.names]
        added = tuple(Concept(name=name, definition="", forms=(name,)) for name in self.unknown)
        kept = tuple(concepts[name] for name in known)
        self.concepts = replace(concepts, concepts=kept + added)

    def describe(self) -> dict[str, Any]:
        digest = content_id([(t.id, t.concept, t.topic, t.text) for t in self.texts])
        return {
            "concepts": self.concepts.hash,
            "source": self.name,
            "texts": digest,
            "min_words": MIN_WORDS,
            "shard": STORY_SHARD,
            "not in the concept set": self.unknown,
        }

    def shards(self) -> int:
        return -(-len(self.texts) // STORY_SHARD)

    def shard(self, i: int) -> list[Text]:
        return self.texts[i * STORY_SHARD : (i + 1) * STORY_SHARD]


def unblock(text: str, kind: str) -> str:
    """The first block of a model's answer without its ``[story 1]`` heading, and nothing of the next block.

    Example:
        >>> unblock("Sure! [story 1] The rain came. [story 2] He", "story")
        'The rain came.'
    """
    parts = re.split(rf"\[\s*{kind}\s*\d*\s*\]:?", text, flags=re.IGNORECASE)
    return (parts[1] if len(parts) > 1 and len(parts[0].split()) < MIN_WORDS else parts[0]).strip()


def why_dropped(text: Text, concepts: ConceptSet, seen: set[str]) -> str:
    """Why a story is not used, or ``""``; ``seen`` collects what came before, to find duplicates."""
    plain = " ".join(text.text.casefold().split())
    duplicate = plain in seen
    seen.add(plain)
    if len(plain.split()) < MIN_WORDS:
        return "too short"
    if duplicate:
        return "duplicate"
    if concepts[text.concept].named_in(text.text):
        return "names the concept"
    return ""


def gather_stories(source: StorySource, stage: Stage, advance: Callable[[int], None] = lambda n: None) -> list[Text]:
    """Write or read all stories, filter them, keep every one with its verdict, and return those that are used.

    Raises:
        AffectlensError: Fewer than two concepts have a story left.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    n = source.shards()

    def make(i: int) -> None:
        path = stage.shard_path(i, ".parquet")
        if not path.exists():
            texts = source.shard(i)
            with atomic_write(path) as temporary:
                pq.write_table(pa.Table.from_pylist([asdict(text) for text in texts]), temporary)

    for _ in in_order(make, range(n), at_once=source.at_once):
        advance(1)
    # Duplicates are found over all shards in their order, so the filter runs anew each time: it takes no time.
    seen: set[str] = set()
    kept: list[Text] = []
    reasons: Counter[str] = Counter()
    dropped_of: dict[str, Counter[str]] = {}
    for path in stage.shards(n, ".parquet"):
        for record in pq.read_table(path).to_pylist():
            text = Text(**record)
            reason = why_dropped(text, source.concepts, seen)
            reasons[reason or "kept"] += 1
            if reason:
                dropped_of.setdefault(text.concept, Counter())[reason] += 1
            else:
                kept.append(text)
    counts = Counter(text.concept for text in kept)
    if len(counts) < 2:
        raise AffectlensError(
            f"usable stories are left of {len(counts)} concept ({_words(reasons)}): "
            "raise --per-concept, or use --writer or --stories"
        )
    if not stage.done:
        stage.finish(
            {
                "source": source.describe()["source"],
                "total": sum(reasons.values()),
                "counts": dict(reasons),
                "dropped": {name: dict(why) for name, why in sorted(dropped_of.items())},
            }
        )
    return kept


def _words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items())) or "none written"


def neutral_texts(recipe: Recipe, concepts: ConceptSet, writer: Engine) -> list[Text]:
    """Neutral dialogues (method 2): the bundled ones, ones the writer writes, or a file's. Persons become Human and Assistant."""
    if recipe.neutral == "bundled":
        texts = read_texts(bundled("neutral"), labelled=False)
    elif recipe.neutral == "model":
        prompts = [concepts.neutral_prompt(topic, 1) for topic in concepts.neutral_topics]
        written = _write(writer, prompts, max_tokens=recipe.max_tokens, seed=recipe.seed)
        texts = [Text(f"n{n:04d}", unblock(text, "dialogue")) for n, text in enumerate(written)]
    else:
        texts = read_texts(Path(recipe.neutral), labelled=False)
    return [
        replace(t, concept="", text=re.sub(r"^AI:", "Assistant:", re.sub(r"^Person:", "Human:", t.text, flags=re.M), flags=re.M))
        for t in texts
    ]


def open_stories(
    stories: str | Path | None, concepts: ConceptSet, engine: Engine, recipe: Recipe, *, writer: Engine | None = None
) -> StorySource:
    """The source that ``--stories`` names.

    Args:
        stories: ``model`` to have them written, ``bundled``, a JSONL or parquet file or a folder of them, or None for what
            suits: bundled stories if every concept has some and the model is too small to write well, else its own.
        concepts: What the stories are about.
        engine: The model under study.
        recipe: How many, how long, which seed.
        writer: The model that writes (default: ``engine``).

    Raises:
        FormatError: The bundled corpus is named and has no stories of a concept, or a file is wrong.
    """
    # The toy is no language model: it reads nothing but what it has written.
    small = writer is None and engine.info.n_parameters < LARGE and engine.info.family != "toy"
    set_of = concepts.name if concepts.name in STORIES else "emotions"
    missing = [name for name in concepts.names if name not in ConceptSet.load(set_of)]
    if stories == "bundled" or (stories is None and small and not missing):
        if missing:
            raise FormatError(
                f"the bundled corpus has no stories of {', '.join(map(repr, missing[:5]))}{' …' * (len(missing) > 5)}: "
                "leave them out, or use --stories model"
            )
        file = bundled(STORIES[set_of])
        return CorpusStories(file, concepts, others=False, name="bundled stories", per_concept=recipe.per_concept)
    if stories in (None, "model"):
        return WrittenStories(writer or engine, concepts, recipe)
    return CorpusStories(stories, concepts, per_concept=recipe.per_concept)


def open_run(
    out: str | Path, engine: Engine, source: StorySource, recipe: Recipe, *, command: str = "", fresh: bool = False
) -> Run:
    """Create or re-open the run directory of a model, a story source and a recipe.

    Raises:
        AffectlensError: It was made with other settings (the message lists them), or another process works in it.
        FormatError: The neutral texts cannot be read.
    """
    if recipe.neutral not in ("bundled", "model"):
        read_texts(Path(recipe.neutral), labelled=False)  # a misspelt file shows now, not after hours of writing stories
    info = engine.info
    model = {"model": info.id, "fingerprint": info.fingerprint, "dtype": info.dtype, "template": info.template}
    what = {**model, "stories": source.describe(), "recipe": asdict(recipe)}
    return Run.open(out, what=what, command=command, fresh=fresh)


def discover(
    engine: Engine,
    concepts: str | Path | ConceptSet = "emotions",
    *,
    out: str | Path,
    stories: str | Path | None = None,
    recipe: Recipe = Recipe(),
    writer: Engine | None = None,
) -> ConceptVectors:
    """Discover a model's concept vectors; resumes when ``out`` holds a part of the work.

    Args:
        engine: The model under study.
        concepts: A concept set, its name, or a TOML file.
        out: Run directory.
        stories: Where they come from, see :func:`open_stories`.
        recipe: How vectors are made.
        writer: The model that writes stories (default: ``engine``).

    Returns:
        The vectors, which are also in ``out/vectors``.

    Raises:
        AffectlensError: No usable story for a concept, other settings than the run directory's, texts too short to read.

    Example:
        >>> import tempfile, affectlens as al
        >>> concepts = al.ConceptSet.load("emotions").select(["calm", "afraid"])
        >>> out = tempfile.mkdtemp()
        >>> discover(al.open_engine("toy"), concepts, out=out, recipe=al.Recipe(per_concept=3)).names
        ('afraid', 'calm')
    """
    concepts = concepts if isinstance(concepts, ConceptSet) else ConceptSet.load(concepts)
    source = open_stories(stories, concepts, engine, recipe, writer=writer)
    with open_run(out, engine, source, recipe) as run:
        return make_vectors(engine, source, run, recipe, writer=writer).vectors


def make_vectors(engine: Engine, source: StorySource, run: Run, recipe: Recipe, *, writer: Engine | None = None) -> Discovery:
    """What :func:`discover` does in an open run directory, with everything the vectors were made of in the result."""
    progress = Progress()
    with progress:
        stories = run.stage("stories", source.describe())
        progress.start(source.shards(), "stories")
        texts = gather_stories(source, stories, progress.advance)

        read_by = {"fingerprint": engine.info.fingerprint, "dtype": engine.info.dtype, "first_token": recipe.first_token}
        progress.start(len(texts), f"reading stories at {engine.info.n_layers} layers")
        activations = _collect(engine, texts, run, "activations", {"stories": stories.id, **read_by}, recipe, False, progress)

        neutral_inputs = {
            "neutral": _neutral_id(recipe, source.concepts, writer or engine),
            "per_token": recipe.per_token,
            **read_by,
        }
        plain = gather_neutral(
            recipe, source.concepts, writer or engine, run.stage("neutral-texts", {"id": neutral_inputs["neutral"]})
        )
        progress.start(len(plain), "reading neutral dialogues")
        neutral = _collect(engine, plain, run, "neutral", neutral_inputs, recipe, recipe.per_token, progress)

        inputs = {"activations": content_id([stories.id, read_by]), "neutral": content_id(neutral_inputs), "share": recipe.share}
        fitted = run.stage("vectors", {**inputs, "draws": recipe.draws, "seed": recipe.seed})
        if not fitted.done:
            progress.start(1, "fitting vectors")
            method = {**asdict(recipe), "source": stories.summary["source"], "concept set": source.concepts.name}
            if isinstance(source, CorpusStories):  # nothing was written, so how it would have been is not part of the method
                method = {key: value for key, value in method.items() if key not in ("per_concept", "max_tokens")}
            else:
                method["per_concept"] = recipe.per_concept or WRITTEN
            method["neutral components"] = "over tokens" if recipe.per_token else "over texts"
            vectors = ConceptVectors.fit(
                activations, neutral, info=engine.info, share=recipe.share, draws=recipe.draws, seed=recipe.seed, method=method
            )
            vectors.save(fitted.path)
            fitted.finish({})
            progress.advance()
    vectors = ConceptVectors.load(fitted.path, calibrated=False)
    vectors.check(engine.info)
    return Discovery(vectors, source.concepts, activations, neutral, stories.summary, fitted.id)


def gather_neutral(recipe: Recipe, concepts: ConceptSet, writer: Engine, stage: Stage) -> list[Text]:
    """The neutral texts that are long enough to read, kept in a file so that anyone can see what was projected out.

    Raises:
        FormatError: Fewer than two are left.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = stage.shard_path(0, ".parquet")
    if not stage.done:
        texts = neutral_texts(recipe, concepts, writer)
        usable = [text for text in texts if len(text.text.split()) >= MIN_WORDS]
        if len(usable) < 2:
            raise FormatError(
                f"{len(usable)} of {len(texts)} neutral texts have {MIN_WORDS} words: "
                "use --neutral bundled, or a file with longer ones"
            )
        with atomic_write(path) as temporary:
            pq.write_table(pa.Table.from_pylist([asdict(text) for text in usable]), temporary)
        stage.finish({"usable": len(usable), "total": len(texts)})
    return [Text(**record) for record in pq.read_table(path).to_pylist()]


def _neutral_id(recipe: Recipe, concepts: ConceptSet, writer: Engine) -> Any:
    if recipe.neutral == "bundled":
        return content_id(bundled("neutral").read_text(encoding="utf-8"))
    if recipe.neutral == "model":
        return ["model", writer.info.fingerprint, writer.info.dtype, concepts.hash, recipe.seed, recipe.max_tokens]
    return content_id([(t.id, t.text) for t in read_texts(Path(recipe.neutral), labelled=False)])


def _collect(
    engine: Engine,
    texts: list[Text],
    run: Run,
    name: str,
    inputs: dict[str, Any],
    recipe: Recipe,
    per_token: bool,
    progress: Progress,
) -> Activations:
    stage = run.stage(name, inputs)
    if stage.done:
        progress.advance(len(texts))
        return Activations(stage.path)
    found = collect(engine, texts, stage.path, first_token=recipe.first_token, per_token=per_token, advance=progress.advance)
    stage.finish({"texts": len(found)})
    return found
