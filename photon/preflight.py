"""Whether a configuration can run: its components, their combination, and the tree.

The schema checks its own keys. What only the configured code knows is asked here, one floor above all that it
touches: where a run is started, and at each node that is asked to take part. These are the entrances:

* `photon.commands`: ``photon train`` with ``conf/`` or ``--config``, ``photon resume``, each run of a sweep
* `photon.server_app`: ``flwr run``, with overrides or with a resolved configuration
* `photon.node`: a silo, a member of a tree, a gateway and a silo of islands, before they answer

``photon doctor`` and ``photon federation show``, which start no run, ask too.
"""

import inspect
import itertools
import math
from collections.abc import Sequence
from dataclasses import is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, get_type_hints

import torch
from pydantic import ValidationError
from torch import nn
from torch.optim import Optimizer

from photon.components import build, check_arguments, import_target, nearest
from photon.config.compose import load, parse, with_overrides, with_sources
from photon.config.explain import explain_validation
from photon.config.schema import Component, LinkSection, PrivacySection, RunConfig, known_keys
from photon.config.tree import TreeNode
from photon.errors import PhotonError
from photon.link.pipelines import change_pipeline, downlink_pipelines, uplink_pipelines
from photon.objective.base import Objective
from photon.objective.configured import check_adapter, check_arrays, objective_of
from photon.strategy.base import Strategy, check_group, hint_of_plan, strategy_of
from photon.subfederation.config import check_participants, node_sections
from photon.telemetry.listed import check_listed
from photon.telemetry.listener import ListenerRun
from photon.training.schedule import build_schedule
from photon.training.transition import check_transition

#: Nodes of a tree that differ in what they set for themselves.
MAX_SETTINGS = 100


def preflight(config: RunConfig) -> RunConfig:
    """Check that a configuration can run, and return it.

    A text that has passed is not checked again: every message brings the same one.

    Raises
    ------
    PhotonError
        For a component that cannot be imported or built, or is of another kind than its section; an argument
        that it does not take (the nearest valid one is named); a combination that cannot work; or a node of
        the tree with such a setting.
    """
    try:
        _passed(config.text)
    except PhotonError as error:
        raise PhotonError(with_sources(str(error), config._taken)) from error
    return config


def preflight_file(path: Path, overrides: Sequence[str] | None = None) -> RunConfig:
    """Read ``config.yaml`` of a run, change keys of it if there are overrides, and check that it can run.

    Raises
    ------
    PhotonError
        As of `preflight`; what is wrong in the file is told with its path, whatever overrides change.
    """
    config = load(path)
    try:
        preflight(config)
    except PhotonError as error:
        raise PhotonError(f"{path}: {error}") from error
    return config if overrides is None else preflight(with_overrides(path, overrides))


def preflight_gateway(config: RunConfig, node: TreeNode) -> None:
    """Check what a gateway sets for itself, as it is checked of a node of the tree.

    Parameters
    ----------
    config
        The run of the federation above.
    node
        What the gateway sets.

    Raises
    ------
    PhotonError
        For an unknown key, option or value, or a border without a bound.
    """
    _gateway_passed(config.text, node.model_dump_json())


@lru_cache(maxsize=64)
def _gateway_passed(text: str, node: str) -> None:
    try:
        _check_rules(parse(text), TreeNode.model_validate_json(node))
    except ValidationError as error:
        known = {*known_keys(LinkSection), *known_keys(PrivacySection)}
        raise PhotonError(explain_validation(error, known)) from error


@lru_cache(maxsize=64)
def _passed(text: str) -> None:
    config = parse(text)
    if config.objective is not None:
        _check_component(config.objective, "objective")
    for where in ("optimizer", "outer", "schedule", "strategy"):
        _check_component(getattr(config, where), where)
    for where in ("uplink", "downlink", "states"):
        for codec in getattr(config.link, where):
            _check_component(codec, f"link.{where}")
    for codec in itertools.chain.from_iterable(entry.codecs for entry in config.link.uplink_by_name):
        _check_component(codec, "link.uplink_by_name")
    _check_listeners(config)
    _check_lease(config)
    _check_machines(config)
    _try_components(config)
    if config.federation.tree is not None and config.federation.parent is None:
        _check_nodes(config)


def _check_machines(config: RunConfig) -> None:
    """Check that the silos of a run can each have machines that meet at one address."""
    training, federation = config.training, config.federation
    if training.machines == 1:
        return
    if federation.engine == "deployment":
        raise PhotonError(
            f"training.machines={training.machines}: a silo's machines are its own; leave it at 1, and let "
            "silos set machines and rendezvous in their node configs"
        )
    if federation.engine == "simulation" and federation.silos_in_parallel > 1:
        raise PhotonError(
            f"federation.silos_in_parallel={federation.silos_in_parallel}: silos that train at the same time "
            f"cannot meet their machines at one address, {training.rendezvous}; set it to 1"
        )


def _check_lease(config: RunConfig) -> None:
    """Check that standing requests have a way. One that a federation has from above goes without them."""
    federation, link = config.federation, config.link
    if federation.lease is None or federation.parent is not None:
        return
    if federation.engine != "deployment":
        raise PhotonError(
            f"federation.lease={federation.lease:g}: standing requests are of a deployment, and this run has "
            f"federation={federation.engine}; set federation.lease=null"
        )
    if link.transport == "inline" or link.store.url is None or link.store.presigned:
        raise PhotonError(
            f"federation.lease={federation.lease:g}: standing requests go through a store that every node "
            "reaches by itself; set link.store.url (with link.store.presigned=false and link.transport=auto "
            "or store), or federation.lease=null"
        )


def _try_components(config: RunConfig) -> None:
    """Build what can be built without silos, so that a refused value ends the run before it starts."""
    for where in ("optimizer", "outer"):
        # A matrix, because some optimizers take nothing else.
        build(getattr(config, where).as_mapping(), where, [nn.Parameter(torch.zeros(2, 2))])
    build_schedule(config.schedule.as_mapping(), config.total_steps, config.training.batch_size)
    check_arrays(config)
    for pipelines in (
        uplink_pipelines,
        downlink_pipelines,
        *([change_pipeline] if config.link.downlink_payload == "update" else []),
    ):
        pipelines(config.link)
    strategy = build(config.strategy.as_mapping(), "strategy", config)
    _check_sums(config, strategy)
    _check_server_silo(config, strategy)
    if objective_of(config).from_server_silo and not strategy.folds_idle:
        raise PhotonError(
            f"strategy: {type(strategy).__name__} has no part for the aggregator's silo, which "
            f"{type(objective_of(config)).__name__} needs; use strategy=anchor"
        )
    if config.link.downlink_payload == "update" and strategy.sends_parts:
        raise PhotonError(
            "link.downlink_payload=update: the strategy sends parameters in parts; set "
            "link.downlink_payload=parameters"
        )
    if config.link.mean_over == "senders" and not strategy.folds_updates:
        raise PhotonError(
            "link.mean_over=senders: the strategy folds parameters and not their updates, of which no silo "
            "leaves out a value; set link.mean_over=silos"
        )
    if config.privacy.on and strategy.local_state == "sync":
        raise PhotonError(
            "strategy.local_state=sync: states of the local optimizer would leave without noise; with "
            f"privacy.clip_norm set strategy.local_state=keep or reset{hint_of_plan(config)}"
        )
    if config.privacy.secure_aggregation and not (strategy.folds_sums or strategy.folds_mean):
        raise PhotonError(
            "privacy.secure_aggregation: the strategy folds more than the plain mean of the updates; use "
            "strategy=photon or diloco with strategy.weighting=uniform and without local_state=sync, or "
            "worldlm with strategy.backbone_weights=uniform and without strategy.embeddings=restricted"
        )
    if config.privacy.noise_multiplier > 0 and strategy.sparse is not None:
        raise PhotonError("privacy.noise_multiplier: noise would fill a sparse model; use a dense strategy")
    if config.privacy.noise_multiplier > 0 and strategy.local.restricts_rows:
        raise PhotonError(
            "privacy.noise_multiplier: with strategy.embeddings=restricted silos tell their vocabularies, "
            "which no noise hides; use strategy.embeddings=backbone"
        )
    check_group(config)
    sharded = config.training.processes > 1 and config.training.parallel == "fsdp"
    if sharded and not objective_of(config).shards:
        name = type(objective_of(config)).__name__
        raise PhotonError(f"training.parallel=fsdp: {name} needs the whole model on a device; use ddp")
    if config.adapter is not None:
        check_adapter(config)
        _check_adapted(strategy)
    if config.transition is not None:
        check_transition(config.transition, config.optimizer.as_mapping())


def _check_server_silo(config: RunConfig, strategy: Strategy) -> None:
    """Check that a federation can train on text of its own: on that of a silo, or a node's ``data``."""
    name = config.federation.server_silo
    if name is None:
        return
    reason = strategy.no_server_silo
    if config.privacy.secure_aggregation and strategy.schedule != "parallel":
        reason = (
            "privacy.secure_aggregation: it trains by itself, and the sum over one silo is its update; set "
            "strategy.schedule=parallel, which worldlm has, or leave it out"
        )
    if reason is not None:
        raise PhotonError(f"federation.server_silo={name}: {reason}")


def _check_adapted(strategy: Strategy) -> None:
    """Check that a strategy can train adapters."""
    name = type(strategy).__name__
    if strategy.sparse is not None:
        raise PhotonError(
            f"adapter: {name} trains sparse weights, and one half of an adapter begins with zeros, which "
            "would stay; use a dense strategy"
        )
    if strategy.local.restricts_rows:
        raise PhotonError(
            f"strategy.embeddings=restricted: {name} trains rows of the embedding, and with an adapter the "
            "embedding stays as it is; use strategy.embeddings=backbone"
        )
    if strategy.folds_sums:
        raise PhotonError("adapter: the objective takes no steps, so nothing of it would be trained")


def _check_sums(config: RunConfig, strategy: Strategy) -> None:
    """Check that who asks for sums gets them, and gets them as they are."""
    objective = objective_of(config)
    names = type(objective).__name__, type(strategy).__name__
    if objective.trains and strategy.folds_sums:
        raise PhotonError(
            f"strategy: {names[1]} adds up sums, and the objective {names[0]} takes local steps; use "
            f"strategy={'anchor' if objective.from_server_silo else 'photon'}"
        )
    if not objective.trains and not strategy.folds_sums:
        raise PhotonError(
            f"strategy: {names[1]} folds what was trained, and the objective {names[0]} takes no steps; use "
            "strategy=sums"
        )
    _check_ranges(config, strategy)
    if not strategy.folds_sums:
        return
    states = uplink_pipelines(config.link).states
    for refused, why in (
        (config.privacy.on, "privacy.clip_norm: nothing bounds the sums of an objective without steps"),
        (
            objective.rounds not in (None, config.rounds),
            f"{names[0]} takes {objective.rounds} rounds; set rounds={objective.rounds}",
        ),
        (
            objective.needs_all and config.cohort is not None,
            f"{names[0]} asks all silos in every round; set cohort=null",
        ),
        (
            not all(codec.on_bytes for codec in downlink_pipelines(config.link).params),
            "link.downlink: silos would read with another model than the server has; leave out what rounds",
        ),
        (
            config.privacy.secure_aggregation and bool(config.link.states),
            "link.states: what is masked looks like noise, and nothing makes it smaller; leave out codecs",
        ),
        (
            config.link.downlink_payload == "update",
            "link.downlink_payload=update: parameters do not change; use parameters",
        ),
        (
            not all(codec.on_bytes for codec in states),
            "link.states: sums travel exactly; leave out what rounds or drops values",
        ),
    ):
        if refused:
            raise PhotonError(f"strategy: {names[1]}: {why}")


def _check_ranges(config: RunConfig, strategy: Strategy) -> None:
    """Check that ranges of masked sums are of sums that there are."""
    groups = [group.rpartition("/")[2] for group in objective_of(config).groups]
    known = groups if strategy.folds_sums else []
    for name in config.privacy.ranges or ():
        if name not in known:
            near = nearest(name, known)
            raise PhotonError(f"privacy.ranges.{name}: this run has no such sum" + near)


def _check_component(component: Component, where: str) -> None:
    factory = import_target(component.target, where)
    _check_kind(factory, component.target, where)
    arguments = dict(component.model_extra or {})
    if where == "schedule":
        # These two are resolved by build_schedule, which knows the run.
        arguments.pop("tuned_batch_size", None)
        if arguments.get("steps") is None:
            arguments.pop("steps", None)
    # Codecs, schedules and objectives are built from their section alone, all others with what is theirs.
    given = 0 if where.startswith(("link.", "schedule", "objective")) else 1
    check_arguments(factory, arguments, where, given=given)
    for name, value in arguments.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise PhotonError(f"{where}.{name}={value}: not a finite number")


def _check_kind(factory: Any, target: str, where: str) -> None:
    """Let a section call nothing but what it is for: a configuration may come from another organisation."""
    if where in ("optimizer", "outer"):
        fits, kind = inspect.isclass(factory) and issubclass(factory, Optimizer), "a torch.optim.Optimizer"
    elif where == "strategy":
        fits, kind = inspect.isclass(factory) and issubclass(factory, Strategy), "a photon Strategy"
    elif where == "objective":
        fits, kind = inspect.isclass(factory) and issubclass(factory, Objective), "a photon Objective"
    elif where == "schedule":
        fits, kind = inspect.isclass(factory) and is_dataclass(factory), "a schedule (a frozen dataclass)"
    elif where.startswith("telemetry.listeners"):
        fits, kind = _takes_run(factory), "a listener, whose first argument is a ListenerRun"
    else:
        needed = ("name", "encode", "decode")
        fits, kind = inspect.isclass(factory) and all(hasattr(factory, one) for one in needed), "a codec"
    if not fits:
        raise PhotonError(f"{where}._target_={target} is not {kind}; see docs/contributing.md for what fits")


def _takes_run(factory: Any) -> bool:
    """Return whether a function, or a class of what can be called, says that it takes a `ListenerRun`."""
    is_class = inspect.isclass(factory)
    if is_class and not any("__call__" in vars(base) for base in factory.__mro__):
        return False
    try:
        first = next(iter(inspect.signature(factory).parameters), "")
        return get_type_hints(factory.__init__ if is_class else factory).get(first) is ListenerRun
    except (TypeError, ValueError, NameError):
        return False


def _check_listeners(config: RunConfig) -> None:
    """Check the listeners without building them: one may open a file, or take the terminal."""
    listeners = config.telemetry.listeners
    if listeners is None:
        return
    for index, entry in enumerate(listeners):
        where = f"telemetry.listeners.{index}"
        _check_component(entry, where)
        try:
            inspect.signature(import_target(entry.target, where)).bind(None, **(entry.model_extra or {}))
        except TypeError as error:
            raise PhotonError(f"{where}: {entry.target}: {error}") from error
    factories = [import_target(entry.target, "telemetry.listeners") for entry in listeners]
    check_listed(factories, config.telemetry.wandb.mode)


def _check_nodes(config: RunConfig) -> None:
    """Check what the nodes of the tree set for themselves, before anything starts.

    Raises
    ------
    PhotonError
        For an unknown key, option or value, or what needs silos in the place of federations.
    """
    root = config.federation.root
    nodes = [] if root is None else list(root.walk())
    # Nodes that set nothing else are checked once: each check parses a configuration.
    parts = {"outer", "link", "strategy", "privacy"}
    settings = [f"{node.data is not None} {node.model_dump_json(include=parts)}" for node in nodes]
    if len(set(settings)) > MAX_SETTINGS:
        raise PhotonError(
            f"federation.tree: more than {MAX_SETTINGS} nodes that each have settings of their own; let them "
            "share some"
        )
    checked: dict[str, RunConfig] = {}
    for node, own in zip(nodes, settings, strict=True):
        try:
            rules = checked[own] if own in checked else _check_rules(config, node)
            checked[own] = rules
            inner = next((child for child in node.children if not child.is_silo), None)
            if inner is not None:
                check_federation(rules, inner.name)
            check_participants(rules, config.privacy, node)
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(str(part) for part in problem["loc"])
            raise PhotonError(f"federation.tree: {node.name}: {key}: {problem['msg']}") from error
        except PhotonError as error:
            raise PhotonError(f"federation.tree: {node.name}: {error}") from error


def _check_rules(config: RunConfig, node: TreeNode) -> RunConfig:
    """Check the sections that a node sets for itself, and return the configuration with them."""
    sections = node_sections(config, node)
    if node.privacy is not None and config.border_privacy(node).clip_norm is None:
        raise PhotonError("privacy.clip_norm: not set; nothing else bounds an update")
    alone = config.federation.model_copy(
        update={"tree": None, "server_silo": node.data or config.federation.server_silo}
    )
    privacy = config.border_privacy(node) if node.privacy is not None else config.privacy
    own = {**sections, "cohort": node.cohort, "federation": alone, "privacy": privacy}
    rules = preflight(config.model_copy(update=own))
    if "_target_" in (node.strategy or {}):
        raise PhotonError("strategy._target_: it is the run's; remove it")
    if problem := strategy_of(rules).problem_within(strategy_of(config)):
        raise PhotonError(problem)
    return rules


def check_federation(rules: RunConfig, name: str) -> None:
    """Check that a federation may be in the place of a silo: a node of the tree, a gateway or islands.

    Parameters
    ----------
    rules
        The configuration of the federation above it.
    name
        What that calls it.

    Raises
    ------
    PhotonError
        If it cannot do what a silo is asked there.
    """
    strategy = strategy_of(rules)
    if rules.link.downlink_payload == "update":
        raise PhotonError(
            f"link.downlink_payload=update: {name} is a federation, to which parameters do not travel "
            "as a change; set link.downlink_payload=parameters"
        )
    if strategy.silos_only is not None:
        raise PhotonError(f"strategy: {name} is a federation, {strategy.silos_only}")
