"""A silo at work: from an order and the global model to trained state groups and a report.

This is the one place where state, data and the local loop meet. The workbench (model, optimizer, compiled
graph) is built once per process and lent to every silo that the process serves; what belongs to a silo is
read from its own disk before the work and written back after it.
"""

import math
import random
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from photon.components import build, import_target
from photon.config.compose import parse
from photon.config.schema import Component, PrivacySection, RunConfig
from photon.data.loader import WindowStream
from photon.data.prepared import PreparedData, silo_file
from photon.errors import PhotonError
from photon.evaluation.perplexity import OwnTokens, evaluate_windows
from photon.files.memory import LARGE_BYTES, release_freed
from photon.link.coding import PackedGroups, payloads_of
from photon.link.messages import (
    EvaluateOrder,
    EvaluateReport,
    NodeLoss,
    Release,
    SiloInfo,
    TrainOrder,
    TrainReport,
)
from photon.link.records import Shapes
from photon.link.transport import MappedTensors
from photon.link.update import REFERENCE, codings_of, encode_reply, with_codings
from photon.models.build import build_model
from photon.models.loss import causal_loss
from photon.models.sparse import masks_of, prune
from photon.models.vocabulary import choose_rows, pack_vocabulary, token_parameters
from photon.privacy.gaussian import release
from photon.silo.site import SiloSite
from photon.state.checkpoint import weights_sha256
from photon.state.silo import SiloState, SiloStore
from photon.strategy.base import LocalState, Strategy, sparse_training, strategy_of
from photon.strategy.key_layers import INITIAL, PERSONAL, KeyLayers, key_layers, unpack_residuals
from photon.strategy.sparse import prunable
from photon.training.batch_probe import find_micro_batch_size
from photon.training.devices import GroupJob, GroupResult, train_in_group
from photon.training.diagnostics import (
    activation_norms,
    basis_similarities,
    momentum_cosines,
    state_changes,
    state_norms,
)
from photon.training.groups import (
    RECEIVED,
    Refreshing,
    StateGroups,
    read_optimizer,
    read_params,
    reset_optimizer,
    restore_optimizer,
    write_params,
)
from photon.training.hardware import DTYPES, device_facts, resolve_device, set_up_torch
from photon.training.loop import (
    LocalTrainer,
    build_optimizer,
    enable_activation_checkpointing,
    state_group_names,
    state_shapes,
)
from photon.training.precision import Precision, resolve_precision
from photon.training.schedule import Schedule, build_schedule, resolve_schedule
from photon.training.switch import at_switch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


#: Windows on which activations are measured.
DIAGNOSTIC_WINDOWS = 4


#: State groups and scalars of a local optimizer.
OptimizerState = tuple[StateGroups, dict[str, float]]

Tensors = Mapping[str, torch.Tensor]


@dataclass
class Workbench:
    """What a process builds once: model, optimizer and loop for one configuration."""

    model: "PreTrainedModel"
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    device: torch.device
    precision: Precision
    trainers: dict[int, LocalTrainer]


def workbench(config: RunConfig, vocab_size: int) -> Workbench:
    """Return model, optimizer and loop for a configuration; the last one is kept."""
    return _workbench(_as_trained(config.text), vocab_size)


@lru_cache(maxsize=16)
def _as_trained(config_text: str) -> str:
    """Drop in what sub-federations of one run differ: they train the same model on the same bench."""
    config = parse(config_text)
    federation = config.federation.model_copy(
        update={"tree": None, "parent": None, "deadline": None, "quorum": 1, "silos": None}
    )
    schedule = resolve_schedule(config.schedule.as_mapping(), config.total_steps, config.training.batch_size)
    own = {
        "run_dir": None,
        "cohort": None,
        "rounds": 1 if config.switch is None else config.rounds,
        "outer": Component.model_validate({"_target_": "torch.optim.SGD", "lr": 1.0}),
        "schedule": Component.model_validate(schedule),
        "federation": federation,
    }
    return config.model_copy(update=own).text


@lru_cache(maxsize=1)
def _workbench(config_text: str, vocab_size: int) -> Workbench:
    config = parse(config_text)
    set_up_torch(config.training, config.federation.clients_in_parallel)
    device = resolve_device(config.training.device)
    model = build_model(config.model, vocab_size, seed=config.seed, device=device)
    sparse = sparse_training(config)
    if sparse is not None:
        sparse.attach(model)
    if config.training.activation_checkpointing:
        enable_activation_checkpointing(model)
    optimizer = build_optimizer(config.optimizer.as_mapping(), model)
    precision = resolve_precision(config.training.precision, device)
    schedule = build_schedule(config.schedule.as_mapping(), config.total_steps, config.training.batch_size)
    return Workbench(model, optimizer, schedule, device, precision, {})


def describe(site: SiloSite, config: RunConfig) -> list[SiloInfo]:
    """Describe the silos whose text lies in ``site.data``."""
    set_up_torch(config.training, config.federation.clients_in_parallel)
    data = site.prepared()
    device = resolve_device(config.training.device)
    precision = resolve_precision(config.training.precision, device)
    name, flops = device_facts(device, precision)
    shares = site.policy.share_validation
    return [
        SiloInfo(
            name=silo,
            train_tokens=entry.train.tokens,
            validation_tokens=entry.validation.tokens if shares else None,
            unigram_loss=entry.unigram_loss if shares else None,
            vocab_size=data.manifest.vocab_size,
            sequence_length=data.manifest.sequence_length,
            tokenizer_sha256=data.manifest.tokenizer_sha256,
            device=name,
            roofline_flops=flops,
        )
        for silo, entry in sorted(data.manifest.silos.items())
    ]


def check_order(order: TrainOrder, site: SiloSite, config: RunConfig) -> None:
    """Let the silo's policy judge a train order.

    Raises
    ------
    RefusedError
        If a rule forbids it.
    """
    manifest = site.prepared().manifest
    site.policy.check_run(order.silo, config, manifest.vocab_size)
    store = _silo_store(order.silo, site, config)
    if store.reply(order.run_id, order.model_id, order.round) is None:
        site.policy.check_order(order, manifest.sequence_length, store.trained_tokens(order.run_id))


def check_evaluation(order: EvaluateOrder, site: SiloSite, config: RunConfig) -> None:
    """Let the silo's policy judge an evaluate order.

    Raises
    ------
    RefusedError
        If a rule forbids it.
    """
    site.policy.check_evaluation(order.silo)
    site.policy.check_run(order.silo, config, site.prepared().manifest.vocab_size)


def expected_shapes(site: SiloSite, config: RunConfig, local_state: LocalState = "reset") -> Shapes:
    """Return the shapes of what an order may bring: parameters, and what the local optimizer needs.

    Its states come where ``local_state`` is ``"sync"``, and unless it is ``"reset"`` the parameters that the
    last round began with, if the optimizer is `Refreshing`.
    """
    return _expected_shapes(config.text, site.prepared().manifest.vocab_size, local_state)


def shapes_for(config: RunConfig, vocab_size: int) -> Shapes:
    """Return the shapes of the parameters that an order may bring, for a node without text of its own."""
    return _expected_shapes(config.text, vocab_size, "reset")


@lru_cache(maxsize=2)
def _expected_shapes(config_text: str, vocab_size: int, local_state: LocalState) -> Shapes:
    config = parse(config_text)
    model = build_model(config.model, vocab_size, seed=config.seed, device="meta")
    params = {name: parameter.shape for name, parameter in model.named_parameters()}
    expected: dict[str, Mapping[str, torch.Size]] = {"params": params}
    if local_state == "sync":
        expected |= state_shapes(config.optimizer.as_mapping(), params)
    if local_state != "reset" and _refreshes(config):
        expected[RECEIVED] = params
    strategy: Strategy = build(config.strategy.as_mapping(), "strategy", config)
    return {**expected, **strategy.optional_groups(params)}


@lru_cache(maxsize=2)
def _state_groups(config_text: str) -> list[str]:
    return state_group_names(parse(config_text).optimizer.as_mapping())


def train(
    order: TrainOrder, groups: Mapping[str, Mapping[str, torch.Tensor]], site: SiloSite, config: RunConfig
) -> tuple[PackedGroups, TrainReport]:
    """Carry out a train order.

    Parameters
    ----------
    order
        What to train, and from where.
    groups
        The global state groups; ``params`` at least.

    Returns
    -------
    tuple
        The trained state groups, encoded as they travel, and the report.

    Raises
    ------
    PhotonError
        If the silo's data, state or the groups do not fit the order.
    """
    begin = time.perf_counter()
    store = _silo_store(order.silo, site, config)
    if (done := store.reply(order.run_id, order.model_id, order.round)) is not None:
        trained_before, payloads = done
        reply = with_codings(payloads, trained_before.codings)
        return reply, TrainReport.model_validate_json(trained_before.report)

    data = site.prepared()
    kept, state_lost = _kept_state(store, order)
    before = None if order.local_state == "reset" else kept
    if order.base is not None:
        groups = {**groups, "params": _changed(kept, groups["params"], order)}
    state = _state_to_start_from(before, groups, order, config)
    layers, own = key_layers(config), OwnLayers({}, None, {})
    if layers is None:
        params, known = _params_to_start_from(before, groups["params"], order)
    else:
        own = _own_layers(layers, kept, groups, order)
        params, known = own.params, groups["params"]
    if sparse_training(config) is not None:
        state = _without_absent(state, params, prunable(config, data.manifest.vocab_size))
    vocabulary = _vocabulary(order, params, data, config)
    fitted = _fit(order, params, state, data, config, site, vocabulary)
    trained = time.perf_counter()
    result = fitted.result
    due = _due_params(fitted, order)
    diagnostics = own.figures
    if config.telemetry.diagnostics:
        diagnostics = diagnostics | _diagnose(fitted, params, state, data, order, config)
    let_out = None
    # Before the round is saved: a crash between the two counts it twice, and never not at all.
    releases, smallest = store.count_release(order.run_id, site.privacy.noise_multiplier)
    if site.privacy.clip_norm is not None:
        due, norm = _released(due, known, order, site.privacy)
        let_out = Release(clip_norm=site.privacy.clip_norm, noise_multiplier=smallest, releases=releases)
        if config.telemetry.diagnostics:
            diagnostics["update_norm_before_clip"] = norm
    report = TrainReport(
        round=order.round,
        silo=order.silo,
        steps=result.steps,
        tokens=result.tokens,
        position=fitted.position,
        loss=result.loss,
        loss_last=result.loss_last,
        learning_rate=result.learning_rate,
        gradient_norm=result.gradient_norm,
        update_norm=_distance(_shared(due, fitted.params, layers), known),
        seconds={
            "load": trained - begin - result.seconds,
            "training": result.seconds,
            "save": 0.0,
            "total": trained - begin,
        },
        state_lost=state_lost,
        release=let_out,
        scalars=fitted.scalars,
        diagnostics=diagnostics,
        vocabulary=None if vocabulary is None else pack_vocabulary(vocabulary),
    )
    reply, memory = encode_reply(
        _reply(due, fitted, order),
        known,
        config.link,
        kept.link if kept else {},
        seed=f"{config.seed}/{order.round}/{order.silo}",
    )
    if config.link.down_of == "update":
        memory[REFERENCE] = dict(groups["params"])
    resets = order.local_state == "reset"
    # Before the round is saved, as the release above.
    store.count_tokens(order.run_id, result.tokens)
    store.save(
        SiloState(
            run_id=order.run_id,
            model_id=order.model_id,
            round=order.round,
            position=fitted.position,
            scalars={} if resets else fitted.scalars,
            report=report.model_dump_json(),
            codings=codings_of(reply),
            groups=_kept_layers(layers, fitted.params, own.initial)
            | ({} if resets else fitted.groups | _kept_beside(fitted.params, known, order, config)),
            link=memory,
        ),
        payloads_of(reply),
    )
    saved = time.perf_counter()
    seconds = {**report.seconds, "save": saved - trained, "total": saved - begin}
    return reply, report.model_copy(update={"seconds": seconds})


def evaluate(
    order: EvaluateOrder,
    groups: Mapping[str, Mapping[str, torch.Tensor]],
    site: SiloSite,
    config: RunConfig,
) -> EvaluateReport:
    """Evaluate the received model on a silo's validation windows, and the silo's own if it is asked to.

    The received model's softmax is over all tokens. With trimmed embeddings that of the silo's own is over
    the tokens that it was trained on.
    """
    data = site.prepared()
    bench = workbench(config, data.manifest.vocab_size)

    def evaluated(params: Tensors, own_tokens: OwnTokens | None = None) -> NodeLoss:
        write_params(bench.model, params)
        nll, tokens = evaluate_windows(
            bench.model,
            data.windows(order.silo, "validation"),
            batch_size=config.evaluation.batch_size,
            device=bench.device,
            precision=bench.precision,
            limit=config.evaluation.sequences,
            own=own_tokens,
        )
        return NodeLoss(loss=nll / tokens, tokens=tokens)

    received = evaluated(groups["params"])
    layers, per_node = key_layers(config), {}
    if order.own and layers is not None and order.last_round:
        store = _silo_store(order.silo, site, config)
        kept = store.load(order.run_id, order.last_round)
        tokens = None
        if strategy_of(config).trims:
            tokens = OwnTokens.of(data.unigram(order.silo), bench.model.config.vocab_size)
        if kept is not None and (tokens or PERSONAL in kept.groups):
            own = {**groups["params"], **kept.groups.get(PERSONAL, {})}
            per_node[order.silo] = evaluated(own, tokens)
    return EvaluateReport(round=order.round, silo=order.silo, **received, per_node=per_node)


def stream_seed(seed: int, members: list[str]) -> int:
    """Return the seed of the order in which the text of ``members`` is read."""
    return (seed << 32) + zlib.crc32("+".join(members).encode())


def trainer(bench: Workbench, config: RunConfig, batch_size: int) -> LocalTrainer:
    """Return the local loop for a batch size; it is made, and ``auto`` probed for, on first use."""
    if batch_size not in bench.trainers:
        micro = config.training.micro_batch_size
        if micro == "auto":
            micro = _probe_micro_batch(bench, config, batch_size)
        bench.trainers[batch_size] = LocalTrainer(
            bench.model,
            bench.optimizer,
            bench.schedule,
            batch_size=batch_size,
            micro_batch_size=micro,
            clip_norm=config.training.clip_norm,
            precision=bench.precision,
            device=bench.device,
            compile=config.training.compile,
            switch=config.switch,
        )
    return bench.trainers[batch_size]


def _probe_micro_batch(bench: Workbench, config: RunConfig, batch_size: int) -> int:
    """Probe beside all that training holds: gradients, as from the second micro-batch on, and local state."""
    for parameter in bench.model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    fresh = not bench.optimizer.state
    if fresh:
        _allocate_optimizer_state(bench)
    try:
        return find_micro_batch_size(_probe_step(bench, config), batch_size)
    finally:
        bench.optimizer.zero_grad(set_to_none=True)
        if fresh:
            reset_optimizer(bench.optimizer)


def _allocate_optimizer_state(bench: Workbench) -> None:
    """Take a local step and undo what it does to the parameters: only the optimizer knows what it keeps."""
    before = {name: tensor.to("cpu", copy=True) for name, tensor in read_params(bench.model).items()}
    bench.optimizer.step()
    write_params(bench.model, before)


def _probe_step(bench: Workbench, config: RunConfig) -> Callable[[int], None]:
    """Return a forward and backward pass of a given number of sequences, for the batch probe."""
    rows = bench.model.config.vocab_size if strategy_of(config).trims else None
    # A softmax over some rows takes more memory than one over all.
    vocabulary = None if rows is None else torch.ones(rows, dtype=torch.bool, device=bench.device)

    def step(sequences: int) -> None:
        windows = torch.zeros((sequences, config.model.sequence_length), dtype=torch.int64)
        bench.model.train()
        with torch.autocast(
            bench.device.type, dtype=DTYPES[bench.precision], enabled=bench.precision != "fp32"
        ):
            loss = causal_loss(bench.model, windows.to(bench.device), vocabulary)
        loss.backward()

    return step


def _kept_beside(trained: Tensors, known: Tensors, order: TrainOrder, config: RunConfig) -> StateGroups:
    """Return what is kept beside the local optimizer's state groups, for the next sync."""
    if order.due_params is not None and key_layers(config) is None:
        return {"params": dict(trained), RECEIVED: dict(known)}
    return {RECEIVED: dict(known)} if _refreshes(config) else {}


def _refreshes(config: RunConfig) -> bool:
    return issubclass(import_target(config.optimizer.target, "optimizer"), Refreshing)


def _changed(kept: SiloState | None, change: Tensors, order: TrainOrder) -> Tensors:
    """Add a change to the parameters that the silo has decoded in its last accepted round.

    Raises
    ------
    PhotonError
        If it has lost them, or they are others.
    """
    reference = kept.link.get(REFERENCE, {}) if kept else {}
    if set(reference) != set(change) or weights_sha256(reference) != order.base:
        raise PhotonError(
            f"{order.silo} has lost the parameters of round {order.last_round}; its next order after this "
            "failure brings all"
        )
    return {name: reference[name] + tensor for name, tensor in change.items()}


def _params_to_start_from(
    before: SiloState | None, received: Tensors, order: TrainOrder
) -> tuple[Tensors, Tensors]:
    """Return the parameters to start from, and the last global value of each.

    Raises
    ------
    PhotonError
        If the order brings some of them alone, and the silo has lost the others.
    """
    if order.whole:
        return received, received
    if before is None:
        raise PhotonError(
            f"{order.silo} has lost the parameters that it kept; its next order after this failure brings all"
        )
    own = before.groups["params"]
    merged = {name: torch.lerp(own[name], tensor, order.mixing) for name, tensor in received.items()}
    return {**own, **merged}, {**before.groups[RECEIVED], **received}


@dataclass(frozen=True)
class OwnLayers:
    """What a silo with key layers of its own starts from.

    Attributes
    ----------
    params
        All parameters.
    initial
        The key layers that it began with, if changes since then are compared.
    figures
        Figures of the attention.
    """

    params: dict[str, torch.Tensor]
    initial: Tensors | None
    figures: dict[str, float]


def _own_layers(
    layers: KeyLayers, kept: SiloState | None, groups: Mapping[str, Tensors], order: TrainOrder
) -> OwnLayers:
    """Join the received backbone with the silo's key layers, which look at what came with it.

    Raises
    ------
    PhotonError
        If the silo has lost its key layers, and the order brings none to begin anew with.
    """
    received = groups["params"]
    own = kept.groups.get(PERSONAL) if kept and order.own_layers else None
    if own is None and not order.whole:
        raise PhotonError(
            f"{order.silo} has lost its key layers; its next order after this failure brings others"
        )
    if own is None:
        own = {name: received[name] for name in layers.split(received).key_names}
    whole = {**received, **own}
    initial = layers.initial(kept.groups.get(INITIAL) if kept else None, whole)
    residuals = unpack_residuals(groups, order.residuals, layers.split(whole))
    params, figures = layers.pull(own, received, residuals, initial)
    return OwnLayers(params, initial, figures)


def _kept_layers(layers: KeyLayers | None, trained: Tensors, initial: Tensors | None) -> StateGroups:
    """Return what a silo keeps of its key layers, whatever becomes of its local optimizer's state."""
    if layers is None:
        return {}
    own = {name: trained[name] for name in layers.split(trained).key_names}
    return {PERSONAL: own} | ({INITIAL: dict(initial)} if initial else {})


def _shared(due: Tensors, params: Tensors, layers: KeyLayers | None) -> Tensors:
    """Return those of the parameters that leave whose mean the server takes."""
    return due if layers is None else {name: due[name] for name in layers.split(params).backbone}


def _without_absent(state: OptimizerState | None, params: Tensors, names: list[str]) -> OptimizerState | None:
    """Zero the moments of weights that all clients have pruned: they would bring the weights back."""
    if state is None:
        return None
    groups, scalars = state
    return prune(groups, {name: params[name] != 0 for name in names}), scalars


def _pruned(fitted: GroupResult, masks: Tensors) -> GroupResult:
    pruned = prune({"params": fitted.params, **fitted.groups}, masks)
    return replace(fitted, params=pruned.pop("params"), groups=pruned)


def _vocabulary(
    order: TrainOrder, params: Tensors, data: PreparedData, config: RunConfig
) -> torch.Tensor | None:
    """Return which rows of the embedding are of tokens in the training text: bool, (rows,).

    None: the strategy does not trim. An embedding may have more rows than the tokenizer has tokens.
    """
    if not strategy_of(config).trims:
        return None
    vocabulary = torch.zeros(len(params[token_parameters(config.model)[0]]), dtype=torch.bool)
    vocabulary[: data.manifest.vocab_size] = torch.from_numpy(data.vocabulary(order.members))
    return vocabulary


def _trimmed(
    fitted: GroupResult, received: Tensors, vocabulary: torch.Tensor, config: RunConfig
) -> GroupResult:
    """Put rows outside the vocabulary back: no gradient has reached them, but weight decay has."""
    rows = {}
    for name in token_parameters(config.model):
        trained = fitted.params[name]
        rows[name] = choose_rows(vocabulary.to(trained.device), trained, received[name].to(trained.device))
    return replace(fitted, params=fitted.params | rows)


def _due_params(fitted: GroupResult, order: TrainOrder) -> dict[str, torch.Tensor]:
    names = fitted.params if order.due_params is None else order.due_params
    return {name: fitted.params[name] for name in names}


def reply_file(order: TrainOrder, site: SiloSite, config: RunConfig) -> Path:
    """Return the file that `train` keeps the reply to an order in."""
    return _silo_store(order.silo, site, config).reply_file(order.round)


def _silo_store(silo: str, site: SiloSite, config: RunConfig) -> SiloStore:
    # One more than the server's checkpoints, so that a run can go on from any of them.
    return SiloStore(site.state / silo, keep=config.checkpoint.keep + 1)


def _kept_state(store: SiloStore, order: TrainOrder) -> tuple[SiloState | None, bool]:
    """Return what the silo kept from its last accepted round, and whether it has lost that."""
    if order.last_round == 0:
        return None, False
    state = store.load(order.run_id, order.last_round)
    if state is None or state.position != order.position:
        return None, True
    return state, False


def _state_to_start_from(
    before: SiloState | None,
    received: Mapping[str, Mapping[str, torch.Tensor]],
    order: TrainOrder,
    config: RunConfig,
) -> OptimizerState | None:
    """Join what the silo kept with the averages that it received; None: start with a fresh local optimizer.

    A silo that has kept nothing takes the averages only if they are its whole state: with one moment at zero
    and a step counter far from it, bias correction would blow up the first steps.
    """
    states = _state_groups(config.text)
    averaged = {group: dict(tensors) for group, tensors in received.items() if group in (*states, RECEIVED)}
    if before is not None:
        # `RECEIVED` is for a `Refreshing` optimizer, unless it goes with parameters that the silo has kept.
        beside = {PERSONAL, INITIAL} | ({"params", RECEIVED} if "params" in before.groups else set())
        kept = {group: tensors for group, tensors in before.groups.items() if group not in beside}
        groups, scalars = {**kept, **averaged}, before.scalars
    elif averaged and set(averaged) - {RECEIVED} == set(states):
        groups, scalars = averaged, order.scalars
    else:
        return None
    if config.switch is None:
        return groups, scalars
    rounds = {group: order.averaged_rounds[group] for group in averaged if group != RECEIVED}
    return at_switch(
        config.switch,
        groups,
        scalars,
        global_step=order.global_step,
        kept_since=config.steps_after(order.last_round),
        averaged_since={group: config.steps_after(at) for group, at in rounds.items()},
        scalars_of_others=order.scalars,
    )


def _released(
    due: Tensors, known: Tensors, order: TrainOrder, privacy: PrivacySection
) -> tuple[dict[str, torch.Tensor], float]:
    """Clip what leaves and add noise, measured from the last global values, which the aggregator knows.

    What the silo has kept of earlier rounds may be part of the update, which is bounded as a whole.
    """
    generator = None
    if privacy.seed is not None:
        own = random.Random(f"{privacy.seed}/{order.round}/{order.silo}")
        generator = torch.Generator().manual_seed(own.getrandbits(63))
    return release(known, due, privacy, generator)


def _reply(due: dict[str, torch.Tensor], fitted: GroupResult, order: TrainOrder) -> StateGroups:
    available = {"params": due, **fitted.groups}
    if missing := [group for group in order.due if group not in available]:
        raise PhotonError(
            f"the order asks for the state group {missing[0]}, which the local optimizer lacks; there "
            f"are {', '.join(sorted(available))}"
        )
    return {group: available[group] for group in order.due}


def _fit(
    order: TrainOrder,
    params: Tensors,
    state: OptimizerState | None,
    data: PreparedData,
    config: RunConfig,
    site: SiloSite,
    vocabulary: torch.Tensor | None,
) -> GroupResult:
    """Train, here or in a group of processes; undo what the strategy does not want trained."""
    sparse = sparse_training(config)
    if config.training.processes > 1:
        if sparse is not None:
            raise PhotonError("training.processes: a sparse strategy trains in one process; set it to 1")
        fitted = _fit_in_group(order, params, state, data, config, site, vocabulary)
    else:
        fitted = _fit_here(order, params, state, data, config, vocabulary)
    if vocabulary is not None:
        return _trimmed(fitted, params, vocabulary, config)
    if sparse is None:
        return fitted
    names = prunable(config, data.manifest.vocab_size)
    return _pruned(fitted, masks_of(fitted.params, names, sparse.target(order.round), sparse.scope))


def _fit_here(
    order: TrainOrder,
    params: Mapping[str, torch.Tensor],
    state: OptimizerState | None,
    data: PreparedData,
    config: RunConfig,
    vocabulary: torch.Tensor | None,
) -> GroupResult:
    """Train in this process, on the workbench that it keeps."""
    bench = workbench(config, data.manifest.vocab_size)
    write_params(bench.model, params)
    if isinstance(params, MappedTensors):
        # What was received is needed again after training, and not beside the gradients.
        params.release()
    if state is None:
        reset_optimizer(bench.optimizer)
    else:
        restore_optimizer(bench.model, bench.optimizer, *state)
    windows = [data.windows(member, "train") for member in order.members]
    stream = WindowStream(windows, stream_seed(config.seed, order.members), order.position)
    result = trainer(bench, config, order.batch_size).train(
        stream, global_step=order.global_step, steps=order.steps, vocabulary=vocabulary
    )
    groups, scalars = read_optimizer(bench.model, bench.optimizer)
    trained = read_params(bench.model)
    if sum(tensor.nbytes for tensor in trained.values()) > LARGE_BYTES:
        release_freed()  # the gradients
    return GroupResult(trained, groups, scalars, stream.position, result)


def _fit_in_group(
    order: TrainOrder,
    params: Mapping[str, torch.Tensor],
    state: OptimizerState | None,
    data: PreparedData,
    config: RunConfig,
    site: SiloSite,
    vocabulary: torch.Tensor | None,
) -> GroupResult:
    """Train in ``training.processes`` processes, one per device."""
    training = config.training
    device = resolve_device(training.device)
    assert training.micro_batch_size != "auto", "the configuration refuses it"
    job = GroupJob(
        model=config.model,
        vocab_size=data.manifest.vocab_size,
        optimizer=config.optimizer,
        schedule=Component.model_validate(
            resolve_schedule(config.schedule.as_mapping(), config.total_steps, training.batch_size)
        ),
        total_steps=config.total_steps,
        batch_size=order.batch_size,
        micro_batch_size=training.micro_batch_size,
        clip_norm=training.clip_norm,
        precision=resolve_precision(training.precision, device),
        matmul_precision=training.matmul_precision,
        compile=training.compile,
        activation_checkpointing=training.activation_checkpointing,
        switch=config.switch,
        parallel=training.parallel,
        device="cuda" if device.type == "cuda" else "cpu",
        windows=[silo_file(data.path, member, "train") for member in order.members],
        stream_seed=stream_seed(config.seed, order.members),
        position=order.position,
        global_step=order.global_step,
        steps=order.steps,
        vocabulary=None if vocabulary is None else pack_vocabulary(vocabulary),
    )
    groups, scalars = state or ({}, {})
    folder = site.state / order.silo / "group"
    return train_in_group(job, params, groups, scalars, processes=training.processes, folder=folder)


def _diagnose(
    fitted: GroupResult,
    params: Tensors,
    state: OptimizerState | None,
    data: PreparedData,
    order: TrainOrder,
    config: RunConfig,
) -> dict[str, float]:
    """Measure the trained state, what the round changed, and activations on the same few windows each time.

    A group of processes leaves no model here to measure activations on.
    """
    figures = state_norms(fitted.groups)
    if state is not None:
        before = state[0]
        figures |= state_changes(before, fitted.groups)
        figures |= momentum_cosines(params, fitted.params, before)
        figures |= basis_similarities(before.get("basis", {}), fitted.groups.get("basis", {}))
    if config.training.processes == 1:
        bench = workbench(config, data.manifest.vocab_size)
        windows = data.windows(order.members[0], "train")[:DIAGNOSTIC_WINDOWS].astype("int64")
        bench.model.eval()
        figures |= activation_norms(bench.model, torch.from_numpy(windows).to(bench.device))
    return figures


def _distance(after: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor]) -> float:
    """Return ‖after − before‖ over all tensors."""
    squares = (
        float(torch.linalg.vector_norm(tensor.cpu() - before[name])) ** 2 for name, tensor in after.items()
    )
    return math.sqrt(sum(squares))
