"""The ``affectlens`` command. Results go to stdout, progress to stderr; exit 0, 1 (one line says what to fix) or 2 (usage)."""

from __future__ import annotations

import shlex
from typing import Any

import click

from affectlens.cli.making import calibrate, discover, import_, study
from affectlens.cli.scoring import baseline, browse, rules, score, score_corpus
from affectlens.cli.serving import keys, replay, serve
from affectlens.cli.showing import corpus, doctor, features, list_, show
from affectlens.cli.steering import export, run, steer
from affectlens.errors import AffectlensError


class Commands(click.Group):
    """Prints an error that the user can fix as one line; everything else keeps its traceback."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # The command that a run prints as the one that resumes it: --fresh would throw away what it made.
        ctx.obj = shlex.join(["affectlens", *(arg for arg in args if arg != "--fresh")])
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AffectlensError as error:
            click.echo(f"affectlens: {error}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            resumable = ctx.invoked_subcommand in ("study", "discover", "score-corpus", "run")
            click.echo(f"affectlens: interrupted{f'; to go on: {ctx.obj}' if resumable else ''}", err=True)
            ctx.exit(1)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order in which they are named below: the main job first


@click.group(
    cls=Commands,
    commands=[
        study, discover, calibrate, steer, score, score_corpus, baseline, run, rules, browse, show, export, import_, features,
        serve, keys, replay, doctor, corpus, list_,
    ],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)  # fmt: skip
@click.version_option(package_name="affectlens")
def main() -> None:
    """Find, check, map, watch and steer the emotion concepts inside any open-weights language model.

    MODEL is smollm2-135m (the demo model), a Hub id, a folder with safetensors, a GGUF file, or toy.
    """
