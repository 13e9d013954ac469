"""What can go wrong when an endpoint is asked, by name."""

from enum import StrEnum


class Fault(StrEnum):
    """Why there is no answer."""

    UNREACHABLE = "unreachable"
    """Nobody listens there, or the connection broke."""
    TIMEOUT = "timeout"
    """No whole answer within the agent's ``timeout``."""
    RATE_LIMITED = "rate_limited"
    """Too many requests (429)."""
    SERVER_ERROR = "server_error"
    """The server failed (5xx, or 408 and 409)."""
    REFUSED = "refused"
    """Asking again is no use (4xx): a wrong key or model, a prompt that is too long."""
    TOO_LARGE = "too_large"
    """The answer has more bytes than an answer may have."""
    NOT_JSON = "not_json"
    """What came back is no JSON object."""
    MALFORMED = "malformed"
    """It is one, but none of a chat completion."""
    EMPTY = "empty"
    """No choices, or a choice with neither text nor tool calls."""
    NOT_RECORDED = "not_recorded"
    """A recording that does not have this question."""


#: Those that may pass by themselves.
PASSING = frozenset({Fault.UNREACHABLE, Fault.TIMEOUT, Fault.RATE_LIMITED, Fault.SERVER_ERROR})


class EndpointError(Exception):
    """An endpoint did not answer; the message is one line that says which and why.

    Attributes
    ----------
    fault
        What kind of failure it is.
    agent
        Name of the agent that was asked.
    wait
        Seconds after which the endpoint wants to be asked again, if it has said so.
    """

    def __init__(self, fault: Fault, agent: str, why: str, wait: float | None = None) -> None:
        super().__init__(f"agent {agent}: {why} ({fault})")
        self.fault, self.agent, self.wait = fault, agent, wait
