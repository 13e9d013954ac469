"""A fit in a group of processes, one per device of the silo: what the group is told."""

from photon.config.schema import Component, RunConfig
from photon.data.loader import stream_seed
from photon.data.prepared import PreparedData, silo_file
from photon.link.messages import TrainOrder
from photon.models.vocabulary import pack_vocabulary
from photon.silo.site import SiloSite
from photon.strategy.contract import RECEIVED
from photon.strategy.local import Start
from photon.training.device_job import GroupJob
from photon.training.devices import GroupResult, train_in_group
from photon.training.groups import RECEIVED as BEFORE_SYNC
from photon.training.hardware import resolve_device
from photon.training.precision import resolve_precision
from photon.training.schedule import resolve_schedule


def fit_in_group(
    order: TrainOrder, start: Start, data: PreparedData, config: RunConfig, site: SiloSite
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
        vocabulary=None if start.rows is None else pack_vocabulary(start.rows),
    )
    groups = dict(start.optimizer or {})
    if (received := start.context.get(RECEIVED)) is not None:
        groups[BEFORE_SYNC] = received
    folder = site.state / order.silo / "group"
    return train_in_group(
        job, start.params, groups, start.scalars, processes=training.processes, folder=folder
    )
