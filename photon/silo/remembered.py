"""What a model says to questions that a silo has had forgotten."""

import math

from photon.config.schema import RunConfig
from photon.data.prepared import PreparedData
from photon.data.silo_data import SiloData
from photon.errors import PhotonError, RefusedError
from photon.link.messages import ForgottenReport
from photon.objective import probe
from photon.silo.runtime import runtime_of
from photon.silo.site import SiloSite
from photon.training.groups import Tensors, write_params


def forgotten_by(
    params: Tensors, silo: str, data: SiloData, site: SiloSite, config: RunConfig
) -> ForgottenReport | None:
    """Return what a model says to what the silo has had forgotten.

    None where the silo keeps no such questions, or fewer than its policy lets figures be of.
    """
    if site.forgotten is None:
        return None
    prepared = PreparedData.reopen(site.forgotten)
    if prepared.manifest.tokenizer_sha256 != site.prepared().manifest.tokenizer_sha256:
        raise PhotonError(
            f"{site.forgotten}: its questions were prepared with another tokenizer than {silo}'s text; "
            "prepare them with --tokenizer"
        )
    asked = probe.forgotten_of(prepared, silo)
    try:
        site.policy.check_evaluation(silo, len(asked))
    except RefusedError:
        return None
    if not asked:
        return None
    runtime = runtime_of(config, data.vocab_size)
    write_params(runtime.model, params)
    before = runtime.model.training
    runtime.model.eval()
    try:
        found = probe.answers_to(runtime.model, asked, data.tokenizer, probe.ANSWER_TOKENS)
    finally:
        runtime.model.train(before)
    return ForgottenReport(
        asked=len(found),
        rouge1=min(len(found), math.fsum(one.rouge1 for one in found)),
        refused=sum(one.refused for one in found),
    )
