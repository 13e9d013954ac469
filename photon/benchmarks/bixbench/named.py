"""Who answers and who judges, from the names and files of a command line."""

from contextlib import ExitStack
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from photon.benchmarks.bixbench.judge import ModelJudge
from photon.benchmarks.bixbench.model_solver import ModelSolver
from photon.benchmarks.bixbench.settings import RunSettings
from photon.benchmarks.bixbench.solvers import RandomSolver, RefusingSolver, ScriptedSolver, Solver
from photon.components import nearest
from photon.endpoints.agent import Agent, read_agents
from photon.endpoints.client import Client
from photon.errors import PhotonError, printable

_SOLVERS = ("model", "reference", "random", "refusing")


def solver_named(
    stack: ExitStack,
    name: str,
    settings: RunSettings,
    *,
    agents: Path | None,
    agent: str | None,
    code: Path | None,
    cache: Path | None,
) -> Solver:
    """Return a solver.

    Parameters
    ----------
    stack
        Ends the client of a model.
    name
        ``model``, ``reference``, ``random`` or ``refusing``.
    agents, agent
        Of a model: the file of agents, and the name of one; by default its only one.
    code
        Of the reference: a JSON file of questions' names to cells.
    cache
        Of a model: folder of its answers.

    Raises
    ------
    PhotonError
        If something is missing, unknown, or not of this solver.
    """
    if name not in _SOLVERS:
        known = ", ".join(_SOLVERS)
        raise PhotonError(f"--solver {printable(name)}: expected one of {known}{nearest(name, _SOLVERS)}")
    if (code is None) == (name == "reference"):
        raise PhotonError("--code has the cells of --solver reference; give both, or neither")
    if name == "model":
        chosen = _agent(agents, agent, "--agent")
        client = stack.enter_context(Client(cache, concurrency=settings.parallel))
        client.check([chosen])
        return ModelSolver(chosen, client, settings)
    for option, value in (("--agents", agents), ("--agent", agent), ("--cache", cache)):
        if value is not None:
            raise PhotonError(f"{option} is of --solver model, not of {name}")
    if code is not None:
        return ScriptedSolver(_cells(code))
    return RandomSolver() if name == "random" else RefusingSolver()


def judge_named(
    stack: ExitStack, name: str | None, *, agents: Path | None, cache: Path | None
) -> ModelJudge | None:
    """Return a judge, or None where none is named.

    Raises
    ------
    PhotonError
        If the agent is not known, or agents are given and none of them judges.
    """
    if name is None:
        if agents is not None:
            raise PhotonError("--agents says where models are; name the one that judges with --judge")
        return None
    chosen = _agent(agents, name, "--judge")
    client = stack.enter_context(Client(cache))
    client.check([chosen])
    return ModelJudge(chosen, client)


def _agent(agents: Path | None, name: str | None, option: str) -> Agent:
    if agents is None:
        raise PhotonError(f"{option} needs --agents FILE, which says where the models are")
    known = {agent.name: agent for agent in read_agents(agents)}
    if name is None:
        if len(known) > 1:
            raise PhotonError(f"{printable(agents)} has {len(known)} agents; name one of them with {option}")
        return next(iter(known.values()))
    if name not in known:
        raise PhotonError(
            f"{option} {printable(name)}: no such agent in {printable(agents)}{nearest(name, known)}"
        )
    return known[name]


def _cells(file: Path) -> dict[str, list[str]]:
    try:
        return TypeAdapter(dict[str, list[str]]).validate_json(file.read_bytes())
    except OSError as error:
        raise PhotonError(f"--code {printable(file)}: cannot be read ({error.strerror})") from None
    except ValidationError:
        raise PhotonError(
            f"--code {printable(file)}: expected a JSON object of names to lists of cells"
        ) from None
