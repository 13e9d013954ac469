"""A fit in a group of processes, one per device of the silo: what the group is told."""

from photon.code import command
from photon.config.schema import RunConfig
from photon.data.loader import stream_seed
from photon.data.prepared import PreparedData, array_file
from photon.link.messages import TrainRequest
from photon.models.vocabulary import pack_vocabulary
from photon.silo.runtime import as_trained
from photon.silo.site import SiloSite
from photon.strategy.local import Start
from photon.training.device_job import GroupJob, GroupState
from photon.training.devices import GroupResult, train_in_group
from photon.training.draws import draw_seed
from photon.training.hardware import resolve_device, set_up_torch
from photon.training.precision import resolve_precision


def fit_in_group(
    request: TrainRequest, start: Start, data: PreparedData, config: RunConfig, site: SiloSite
) -> GroupResult:
    """Train in ``training.processes`` processes, one per device."""
    # A process of the group has its share of the threads that this one would train with.
    set_up_torch(config.training, config.federation.silos_in_parallel)
    device = resolve_device(config.training.device)
    arrays = {
        name: [array_file(data.path, member, "train", name) for member in request.members]
        for name in data.array_names
    }
    job = GroupJob(
        config=as_trained(config.text),
        vocab_size=data.manifest.vocab_size,
        batch_size=request.batch_size,
        precision=resolve_precision(config.training.precision, device),
        device="cuda" if device.type == "cuda" else "cpu",
        arrays=arrays,
        sequence_length=data.manifest.sequence_length,
        stream_seed=stream_seed(config.seed, request.members),
        position=request.position,
        global_step=request.global_step,
        steps=request.steps,
        rows=None if start.rows is None else pack_vocabulary(start.rows),
        draw_seed=draw_seed(config.seed, request.round, request.silo, "train"),
    )
    return train_in_group(
        job,
        GroupState(start.params, start.optimizer or {}, start.scalars, start.context, start.collected),
        folder=site.state / request.silo / "group",
        program=command("photon.silo.group_process"),
    )
