"""The commands that steer, here or in other programs: ``steer``, ``run``, ``export``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from affectlens.cli.options import (
    FILE,
    WORKERS,
    find_baseline,
    parse_mixture,
    shared,
    vectors_and_engine,
    warn_outside_safe_range,
)

if TYPE_CHECKING:
    from affectlens.activations import Activations
    from affectlens.engine import Engine, Steering
    from affectlens.experiments import Experiment
    from affectlens.experiments.arms import Sweep
    from affectlens.experiments.judging import Judge
    from affectlens.vectors import ConceptVectors


@click.command()
@click.argument("vectors")
@click.argument("prompt")
@click.option(
    "--add",
    "added",
    required=True,
    help="Mixture, for example calm=0.05,desperate=-0.05 (multiples of the mean residual norm); of calibrated vectors a name "
    "alone stands for its largest safe strength.",
)
@click.option("--compare", is_flag=True, help="Print the unsteered reply beside the steered one, and what both read.")
@click.option("--max-tokens", type=click.IntRange(1), default=80, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True)
@click.option("--plain", is_flag=True, help="Continue the prompt as text instead of answering it as a chat.")
@shared("layer", "model", "device", "dtype", "allow", "seed", "json")
def steer(vectors: str, prompt: str, added: str, compare: bool, **options: Any) -> None:
    """Answer PROMPT with VECTORS added to the residual stream."""
    from affectlens.engine import Request, Sampling, Steering

    loaded, engine = vectors_and_engine(vectors, **options)
    mixture = parse_mixture(added, loaded)
    warn_outside_safe_range(mixture, loaded)
    sampling = Sampling(max_tokens=options["max_tokens"], temperature=options["temperature"], seed=options["seed"])
    text = prompt if options["plain"] or engine.info.template is None else (("user", prompt),)
    versions = {"steered": mixture, "unsteered": Steering()} if compare else {"steered": mixture}
    replies = engine.run(Request(text, sampling=sampling, steering=version) for version in versions.values())
    answers = {name: result.text for name, result in zip(versions, replies, strict=True)}
    scores = _scores_of(engine, loaded, text, answers) if compare else {}
    if options["as_json"]:
        named = {name: dict(zip(loaded.names, row.round(6).tolist(), strict=True)) for name, row in scores.items()}
        plain: dict[str, Any] = {"prompt": prompt, "steering": str(mixture), **answers}
        plain |= {"layer": loaded.layer, "scores": named} if compare else {}
        click.echo(json.dumps(plain, ensure_ascii=False, indent=1))
    elif compare:
        _print_beside(mixture, answers, scores, loaded)
    else:
        click.secho(str(mixture), bold=True, err=True)
        click.echo(answers["steered"].strip())


def _scores_of(engine: Engine, vectors: ConceptVectors, prompt: Any, answers: dict[str, str]) -> dict[str, Any]:
    """What the words of each answer read, in their context and with nothing added: what was added is not to be read back."""
    from affectlens.engine import Request, Where

    readout = vectors.readout(where=Where(part="response"), pool="mean")
    said = {name: answer for name, answer in answers.items() if answer.strip()}
    results = engine.run(Request(prompt, prefill=answer, readouts=(readout,)) for answer in said.values())
    return {name: vectors.scores(result.readings[0]) for name, result in zip(said, results, strict=True)}


def _print_beside(
    mixture: Steering, answers: dict[str, str], scores: dict[str, Any], vectors: ConceptVectors, top: int = 5
) -> None:
    """Two replies in two columns, under each what its words read: the concepts that were added, and those that stand out."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    added = list(dict.fromkeys(term.name for term in mixture.terms))

    def read(name: str) -> Text:
        if name not in scores:
            return Text("no words to read")
        best = [vectors.names[i] for i in scores[name].argsort()[::-1][:5]]
        shown = [f"{concept} {scores[name][vectors.index(concept)]:+.3f}" for concept in dict.fromkeys([*added, *best])]
        return Text(", ".join(shown))

    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_lines=True)
    for heading in ("unsteered: nothing added", f"steered: {mixture}"):
        grid.add_column(Text(heading), ratio=1, overflow="fold")
    # Escape sequences would drive the terminal.
    said = {name: "".join(c if c.isprintable() or c == "\n" else " " for c in text.strip()) for name, text in answers.items()}
    grid.add_row(Text(said["unsteered"]), Text(said["steered"]))
    grid.add_row(read("unsteered"), read("steered"))
    Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False).print(grid)
    click.echo(f"readings: centred cosine of the words at layer {vectors.layer}, read again with nothing added", err=True)


@click.command()
@click.argument("experiment")
@click.argument("vectors")
@click.option(
    "--sweep",
    "sweeps",
    multiple=True,
    metavar="NAME=LOW:HIGH:COUNT",
    help="An emotion and its strengths, evenly spaced, or NAME=S,S,…; may be repeated.  [default: the experiment's own]",
)
@click.option("-n", "--episodes", "n", type=click.IntRange(1), help="Episodes of each arm.  [default: the experiment's own]")
@click.option(
    "--level", default="auto", show_default=True, help="Of elicitation; auto takes one at which the behaviour can move."
)
@click.option("--random", type=click.IntRange(0), default=5, show_default=True, help="Random directions of equal norm.")
@click.option(
    "--shuffled",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    help="Vectors of stories whose emotions were dealt at random.",
)
@click.option(
    "--where",
    type=click.Choice(["all", "reply"]),
    default="all",
    show_default=True,
    help="Steer every token, or the reply alone.",
)
@click.option(
    "--judge", metavar="MODEL", help="self, another model, http(s)://…#model, or none.  [default: self where it is asked]"
)
@click.option("--allow-exec", is_flag=True, help="Run code that the model writes, in a sandbox.")
@click.option("--watch", metavar="NAME", multiple=True, help="Read this emotion too, at every token; may be repeated.")
@click.option("--out", type=click.Path(path_type=Path), help="Run directory.  [default: runs/EXPERIMENT-MODEL]")
@click.option("--baseline", type=FILE, help="What z is stated against.  [default: that beside the vectors]")
@shared("seed", "fresh", "layer", "model", *WORKERS, "allow", "json")
def run(experiment: str, vectors: str, sweeps: tuple[str, ...], judge: str | None, **options: Any) -> None:
    """Run EXPERIMENT on the model of VECTORS, steered by each of its sweeps, with controls. Resumes where it stopped.

    EXPERIMENT is one of those that affectlens list experiments names, or module:Class of your own. The run directory holds the
    report, transcripts to browse, and a row for each episode.
    """
    from affectlens.experiments import load_experiment
    from affectlens.experiments.arms import Sweep
    from affectlens.experiments.runner import Plan, open_run, run_experiment

    if ":" in experiment:
        sys.path.insert(0, str(Path.cwd()))  # as other commands that take module:Class do
    chosen = load_experiment(experiment)
    settings = {key: options.pop(key) for key in ("n", "level", "random", "shuffled", "where", "watch")}
    settings["n"] = settings["n"] or chosen.episodes
    plan = Plan(tuple(map(Sweep.parse, sweeps)), seed=options["seed"], **settings)
    allow_exec, as_json = options.pop("allow_exec"), options.pop("as_json")
    plan.check(chosen)
    if chosen.needs_exec and not allow_exec:
        raise click.UsageError(f"{chosen.name} runs code that the model writes: allow it with --allow-exec")
    loaded, engine = vectors_and_engine(vectors, **options)
    _warn_outside_safe_ranges(plan.of(chosen), loaded)
    usual = find_baseline(vectors, loaded, engine, options["baseline"])
    asked = _judge(chosen, judge, engine)
    out = options["out"] or Path("runs") / f"{chosen.name}-{Path(engine.info.id).name}"
    opened = open_run(
        out, chosen, engine=engine, vectors=loaded, plan=plan, baseline=usual, judge=asked.id if asked else "",
        command=click.get_current_context().obj, fresh=options["fresh"],
    )  # fmt: skip
    with opened:
        report = run_experiment(
            chosen, engine, vectors=loaded, run=opened, plan=plan, baseline=usual, activations=_activations(vectors), judge=asked,
            allow_exec=allow_exec,
        )  # fmt: skip
    if as_json:
        click.echo(json.dumps(report.as_dict(), ensure_ascii=False))
    else:
        report.print()
    click.echo(f"\nReport: {out.resolve() / 'report.html'}\nTo resume or repeat: {opened.command}", err=True)


def _warn_outside_safe_ranges(sweeps: Sequence[Sweep], vectors: ConceptVectors) -> None:
    for sweep in sweeps:
        ends = dict.fromkeys((sweep.strengths[0], sweep.strengths[-1]))
        for strength in ends:
            warn_outside_safe_range(strength * vectors[sweep.name], vectors)


def _judge(experiment: Experiment, spec: str | None, engine: Engine) -> Judge | None:
    """The judge that was asked for; by default the model itself where the experiment has questions."""
    from affectlens.experiments import Experiment as Plain

    asks = type(experiment).questions is not Plain.questions
    if spec == "none" or (spec is None and not asks):
        return None
    from affectlens.experiments.judging import open_judge

    return open_judge(spec or "self", engine)


def _activations(vectors: str) -> Activations | None:
    """Of the stories that the vectors of a run were fitted on."""
    from affectlens.activations import Activations
    from affectlens.vectors import vectors_folder

    folder = vectors_folder(vectors).parent / "activations"
    return Activations(folder) if (folder / "done.json").exists() else None


@click.command()
@click.argument("vectors")
@click.option("--add", "added", help="Mixture to export, for example calm=0.05.")
@click.option("--gguf", type=click.Path(path_type=Path), help="Write a control vector of the mixture for llama.cpp and repeng.")
@click.option("--safetensors", type=click.Path(path_type=Path), help="Write it as plain vectors, for steering-vectors.")
@click.option("--lm-eval", type=click.Path(path_type=Path), help="Write it for lm-evaluation-harness (a .pt file).")
@click.option("--hub", metavar="REPO", help="Push the vectors to a Hugging Face Hub repository.")
@click.option("--public", is_flag=True, help="Make a new Hub repository public.")
@shared("layer")
def export(vectors: str, added: str | None, hub: str | None, public: bool, layer: int | None, **files: Path | None) -> None:
    """Export VECTORS, or a mixture of them for other programs to steer with."""
    from affectlens.control import export_gguf, export_lm_eval, export_safetensors
    from affectlens.exchange import load_vectors, push_to_hub

    wanted = {form: path for form, path in files.items() if path}
    if not wanted and not hub:
        raise click.UsageError("name a target: --gguf FILE, --safetensors FILE, --lm-eval FILE or --hub REPO")
    if wanted and not added:
        raise click.UsageError("a file holds a mixture: name it with --add, for example --add calm=0.05")
    loaded = load_vectors(vectors)
    if layer is not None:
        loaded = loaded.with_layer(layer)
    if wanted:
        mixture = parse_mixture(str(added), loaded)
        writers = {"gguf": export_gguf, "safetensors": export_safetensors, "lm_eval": export_lm_eval}
        uses = {
            "gguf": "llama-cli --control-vector-scaled {}:1",
            "safetensors": "add direction.L to the output of block L",
            "lm_eval": "lm_eval --model steered --model_args pretrained=MODEL,steer_path={}",
        }
        for form, path in wanted.items():
            writers[form](mixture, path, model=loaded.model)
            click.echo(f"{path}: {mixture}, at every position ({uses[form].format(path)})")
    if hub:
        click.echo(push_to_hub(loaded, hub, private=not public))
