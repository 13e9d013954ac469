"""The entry of the ``photon`` command.

Nothing else is imported before signals are taken care of: an interruption at any moment ends the command
without a traceback.
"""

import sys
from typing import Any

from photon.engine.signals import interruptible


def main() -> None:
    """Run the command; bad input exits with 2, anything else that stops it with 1."""
    with interruptible():
        try:
            code = _run()
        except KeyboardInterrupt:
            code = 1
    sys.exit(code)


def _run() -> int:
    import click

    from photon.commands.app import app
    from photon.errors import PhotonError, RunError, printable

    try:
        # Without standalone mode, typer returns the code that an interruption would exit with.
        return 1 if app(standalone_mode=False) else 0
    except PhotonError as error:
        _say(error)
        return 2
    except RunError as error:
        _say(error)
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        # What the system refuses: a name that is too long, a folder that nobody may read, a full disk.
        _say(f"{printable(error.filename)}: {error.strerror}; check the path and who may use it")
        return 2
    except click.NoSuchOption as error:
        from photon.config.renamed import is_called, renamed

        new = renamed().options.get(error.option_name)
        if new is None:
            error.show()
        else:
            _say(is_called(error.option_name, new))
        return 2
    except click.ClickException as error:
        error.show()
        return 2
    except click.Abort:
        return 1


def _say(message: Any) -> None:
    print(f"photon: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
