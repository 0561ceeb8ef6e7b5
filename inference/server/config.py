"""Settings of the server, and what can be wrong with them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ServeConfig:
    """`serve`: where, and how much at a time."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free
    name: str | None = None  # what clients call the model; None: its folder's name
    max_queue: int = 1024  # sequences that wait beyond engine.max_sequences; with more, requests are answered with 429
    max_choices: int = 128  # prompts times n of one request
    max_body_bytes: int = 4 * 2**20  # of one request
    body_seconds: float = 30.0  # a request's body has to arrive
    write_seconds: float = 30.0  # a client that reads nothing for so long is gone, and its request with it
    max_unread: int = 2**16  # pieces of a stream that wait for a slow client; with more its request ends with an error
    # Requests have to end after SIGTERM, or SIGINT; a second one does not wait. torchrun kills what is left after 30 s
    drain_seconds: float = 20.0


LAST_SECONDS = 5
"""For answers that are being written when the server ends."""
LAUNCHER_SECONDS = 30
"""torchrun's patience with processes that it has told to end."""


def serve_problems(config: ServeConfig, *, launched: bool = False) -> list[str]:
    """Every reason why this cannot be a server; one line each. launched: torchrun started it."""
    found = []
    if not 0 <= config.port < 2**16:
        found.append(f"serve.port={config.port} must be 1 to 65535, or 0 for any that is free")
    for name, least in (
        ("max_queue", 0),
        ("max_choices", 1),
        ("max_body_bytes", 1),
        ("max_unread", 1),
        ("drain_seconds", 0),
    ):
        if getattr(config, name) < least:
            found.append(f"serve.{name}={getattr(config, name)} must be at least {least}")
    for name in ("body_seconds", "write_seconds"):
        if not getattr(config, name) > 0:
            found.append(f"serve.{name}={getattr(config, name)} must be above 0")
    most = LAUNCHER_SECONDS - LAST_SECONDS
    if launched and config.drain_seconds > most:
        found.append(
            f"serve.drain_seconds={config.drain_seconds} cannot be kept under torchrun, which kills what has not ended "
            f"{LAUNCHER_SECONDS} s after it was told to; use at most {most}"
        )
    return found
