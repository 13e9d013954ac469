"""What a silo tells of itself when it is asked: its text, and the device that it trains on."""

from photon.config.schema import RunConfig
from photon.data.silo_data import SiloData
from photon.data.source import check_steps
from photon.link.messages import SiloInfo
from photon.objective.configured import check_data, objective_of
from photon.silo.choice import as_decided, measured_gain
from photon.silo.site import SiloSite
from photon.silo.work import is_own
from photon.strategy.base import check_group
from photon.training.hardware import decided_here, device_facts, resolve_device, set_up_torch
from photon.training.precision import CLEARLY_FASTER, resolve_precision


def describe(site: SiloSite, config: RunConfig) -> list[SiloInfo]:
    """Describe the silos whose text lies in ``site.data``.

    Raises
    ------
    PhotonError
        If they could not take a step of the run, with the devices that their operator has set.
    """
    data = site.prepared()
    check_data(config, data)
    check_group(config)
    check_steps(site.data, config.training, config.model)
    for silo in data.silo_names:
        objective_of(config).check_silo(SiloData(data, [silo]), own=is_own(silo, config))
    decided = as_decided(config, data.manifest.vocab_size).training
    set_up_torch(config.training, config.federation.silos_in_parallel)
    device = resolve_device(config.training.device)
    precision = resolve_precision(decided.precision, device)
    name, flops = device_facts(device, precision)
    if config.training.precision == "auto" and device.type == "cpu" and objective_of(config).trains:
        measured = f"{measured_gain(config, data.manifest.vocab_size):.2f}"
        name += (
            f" (auto: in bf16 a step of this model is {measured} times as fast as in fp32, and bf16 is taken "
            f"from {CLEARLY_FASTER} on"
            f"{'; attention by products' if decided.attention == 'products' else ''})"
        )
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
            decided=decided_here(decided),
        )
        for silo, entry in sorted(data.manifest.silos.items())
    ]
