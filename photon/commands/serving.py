"""``photon chat`` and ``photon serve``."""

from pathlib import Path
from typing import Annotated

import typer

from photon.commands.given import LARGEST_SEED, Model

_Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]


def chat(
    model: Model,
    system: Annotated[
        str | None, typer.Option(help="What the system says first, by the chat template.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.8,
    top_p: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of probability to choose from.")
    ] = 0.95,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=LARGEST_SEED, help="Seed of the choices; default: another one each time."),
    ] = None,
    device: _Device = "auto",
) -> None:
    """Talk to a trained model, of a run the newest; one without a chat template continues the text.

    Ctrl-C ends an answer, Ctrl-D the conversation. An empty line lets the model go on.
    """
    import sys

    from photon.evaluation.opened import opened_export
    from photon.serving.chat import Conversation, converse
    from photon.serving.model import Settings, open_served
    from photon.training.hardware import resolve_device

    where = resolve_device(device)
    settings = Settings(most=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    with opened_export(model, lambda line: typer.echo(line, err=True)) as export:
        served = open_served(export, where)

    def say(text: str) -> None:
        typer.echo(text, nl=False)
        sys.stdout.flush()

    conversation = Conversation(served, settings, system, say=lambda line: typer.echo(line, err=True))
    asked = "> " if sys.stdin.isatty() else ""
    converse(conversation, lambda: input(asked), say)


def serve(
    model: Model,
    host: Annotated[
        str, typer.Option(help="Address to listen at; others than loopback need a key.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes a free one.")
    ] = 8000,
    key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File of the key that clients must show; or set PHOTON_SERVE_KEY."),
    ] = None,
    device: _Device = "auto",
) -> None:
    """Answer clients of OpenAI's API with a trained model, of a run the newest, until Ctrl-C."""
    from photon.evaluation.opened import opened_export
    from photon.serving.listen import address_of, listen, read_key
    from photon.serving.listen import serve as answer
    from photon.training.hardware import resolve_device

    where = resolve_device(device)
    key = read_key(key_file)
    with listen(host, port, key) as listener:
        from photon.serving.model import open_served

        with opened_export(model, lambda line: typer.echo(line, err=True)) as export:
            served = open_served(export, where)
        told = f"{served.name} answers at {address_of(listener)}/v1"
        answer(served, listener, key, lambda: typer.echo(told))
