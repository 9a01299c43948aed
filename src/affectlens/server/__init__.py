"""What ``affectlens serve`` runs: the emotion dials and live readings of one model behind an OpenAI-compatible API.

settings   every limit and switch, as plain data
schemas    what a request may hold: OpenAI's fields and ours
armed      the rules that are watched: those of the file, those added while it runs, what is muted
service    one call: checked, generated, watched, kept; independent of HTTP
shapes     what a reply looks like in OpenAI's shapes
outlet     from threads to sockets: bounded buffers, slow readers, event streams
catalog    what there is to look at: emotions, stored passages, finished studies
keys       API keys and their rates
guard      what stands before every route: who may ask, how much, from where
app        the routes
records, tables, store, export, metrics, telemetry, replay   what is kept of replies, and how others see it
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from affectlens.server.app import create_app
    from affectlens.server.settings import Settings

__all__ = ["Settings", "create_app"]


def __getattr__(name: str) -> Any:
    # What reads a store needs no web server: each is loaded when it is first used.
    if name == "create_app":
        from affectlens.server.app import create_app

        return create_app
    if name == "Settings":
        from affectlens.server.settings import Settings

        return Settings
    raise AttributeError(f"module 'affectlens.server' has no attribute {name!r}")
