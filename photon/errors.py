"""The exceptions that users are meant to read."""


class PhotonError(Exception):
    """Bad input: configuration, data, message, checkpoint or certificate.

    The message is one line that says what is wrong, where, and how to mend it. The command line prints
    it without a traceback and exits with code 2.
    """


class RefusedError(PhotonError):
    """A silo's own policy forbids what it was asked."""


class LostError(PhotonError):
    """A silo does not have what it was not sent because it was to have it."""


class RunError(Exception):
    """A run stopped before its end, through no fault of the input; it can be resumed.

    The command line prints the message and exits with code 1.
    """


def printable(name: object) -> str:
    """Return a name as one line that any terminal and any file can take.

    What cannot be printed is escaped: line ends, control characters, bytes that were no UTF-8.
    """
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(name))
