"""`photon unlearn`: an exported model is made to refuse some questions, by LUNAR (2502.07218)."""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from photon.data.prepared import PreparedData
from photon.errors import PhotonError, printable
from photon.evaluation.load import check_export, check_tokenizer_beside, open_trained
from photon.evaluation.perplexity import evaluate_data
from photon.evaluation.sparse_file import NAME as SPARSE
from photon.files.atomic import atomic_directory, remove_leftovers
from photon.state.received import tensors_hash
from photon.state.unlearned import NAME, Changed, Unlearned, read_unlearned, write_unlearned
from photon.unlearning.attacks import quantised, relearned, skipped, subtracted
from photon.unlearning.capture import sites_of
from photon.unlearning.problem import Choice, Edit, Problem, check_finite
from photon.unlearning.questions import Question, hash_of_questions
from photon.unlearning.request import Request, check_told, exam_of
from photon.unlearning.scan import (
    Asked,
    Exam,
    Found,
    Seen,
    applied,
    best_of_layers,
    choices,
    middle_half,
    scan,
)

#: Less than this share of refusals is none.
_LEAST = 0.5
#: So many answers are shown to a model that is to learn again what it was made to forget.
RELEARNED = (1, 5)
#: Files of an export that say how good it was, or are written anew.
_STALE = ("tasks.json", NAME)


@dataclass(frozen=True)
class Outcome:
    """What was done, and found.

    Attributes
    ----------
    before, after
        Figures of all questions, by set.
    seen
        The candidates, the best first.
    chosen
        What was changed.
    attacks
        Name to the figures of what is to be forgotten.
    notes
        What the one who asks should know.
    """

    before: Found
    after: Found
    seen: Sequence[Seen]
    chosen: Sequence[Choice]
    attacks: Found
    notes: Sequence[str]


def unlearn(
    export: Path, output: Path, request: Request, told: Callable[[Seen], None] = lambda _: None
) -> Outcome:
    """Write a copy of an exported model in which one matrix is another (or ``top`` of them are).

    Parameters
    ----------
    export
        Folder of the model.
    output
        Folder to write; must not exist.
    request
        What is asked for.
    told
        Called with each candidate of the scan.

    Raises
    ------
    PhotonError
        If the export, the questions or the settings cannot be used, the model does not refuse what it does
        not know, or no candidate refuses what is to be forgotten. Then nothing is written.
    """
    if output.exists() or output.is_symlink():
        raise PhotonError(f"{printable(output)}: exists already; choose a new folder")
    request.sets.check()
    check_told(request)
    _check_plain(export)
    earlier = read_unlearned(export)
    notes = list(_unprotected(earlier, [request.sets.forgotten, *request.earlier]))
    model = nn.Module.to(open_trained(export).model, request.device).eval()
    exam, prompts = exam_of(export, model, request)
    sites = sites_of(model)
    layers = middle_half(len(sites)) if request.layers is None else list(request.layers)
    if unknown := [layer for layer in layers if layer not in range(len(sites))]:
        raise PhotonError(f"--layers {unknown[0]}: the model has blocks 0 to {len(sites) - 1}")
    perplexity = _perplexity(model, export, request)
    before = exam.take(model)
    _check_refuses(before)
    problem = Problem(
        model,
        [sites[layer] for layer in layers],
        prompts["forget"],
        [*prompts["retain"], *prompts["forgotten"]],
        prompts["reference"],
        request.method,
    )
    ridges = request.ridges if request.method.solver == "closed" else [0.0]
    candidates = choices(layers, ridges, request.coefficients)
    # Of sets that are no larger the figures are known.
    whole = request.limit is None or all(
        len(asked.questions) <= request.limit for asked in exam.sets.values()
    )
    base = before if whole else exam.take(model, limit=request.limit)
    seen = scan(problem, exam, base, candidates, limit=request.limit, told=told)
    _check_found(seen, notes)
    chosen = best_of_layers(seen, request.top)
    edits = [_as_written(problem.edit(choice), export, model.base_model_prefix) for choice in chosen]
    with applied(edits):
        after = exam.take(model)
        perplexity_after = _perplexity(model, export, request)
        attacks = _attacked(exam, model, edits, request) if request.attacks else {}
    entry = _entry(
        request, edits, model, {**_flat(before), **perplexity}, {**_flat(after), **perplexity_after}, attacks
    )
    _write(export, output, model, edits, [*earlier, entry])
    return Outcome(before, after, seen, chosen, attacks, notes)


def _check_plain(export: Path) -> None:
    """Refuse exports whose file has no matrix that could be exchanged."""
    check_export(export)
    if (export / SPARSE).is_file():
        raise PhotonError(
            f"{printable(export)}: a sparse export, and what is added is not sparse; export the run again "
            "without --sparse"
        )
    if (export / "adapter_config.json").is_file():
        raise PhotonError(
            f"{printable(export)}: has adapters beside the model; export the run again with --adapter merge"
        )


def _unprotected(earlier: Sequence[Unlearned], forgotten: Sequence[Sequence[Question]]) -> Iterator[str]:
    """Yield a line for each earlier request of which not all questions were given again."""
    given = {known for some in forgotten for known in (hash_of_questions(some), *_by_edge(some))}
    for number, one in enumerate(earlier, 1):
        known = one.questions.get("forget")
        if known not in given:
            yield (
                f"request {number} of this model ({one.prompts.get('forget', 0)} questions, asked by "
                f"{printable(one.asked_by)}) may come undone: its questions were not given with --forgotten"
            )


def _by_edge(questions: Sequence[Question]) -> Iterator[str]:
    for edge in dict.fromkeys(one.edge for one in questions):
        yield hash_of_questions([one for one in questions if one.edge == edge])


def _check_refuses(before: Found) -> None:
    refused = before["unknown"]["refused"]
    if refused < _LEAST:
        raise PhotonError(
            f"unlearning: the model refuses {refused:.0%} of the questions that it should not know, so there "
            "is no direction of refusal; tune it on such questions answered with a refusal first"
        )


def _check_found(seen: Sequence[Seen], notes: list[str]) -> None:
    """Refuse if no candidate makes the model refuse; where only one was asked for, it is a note."""
    best = max(seen, key=lambda one: one.found["forget"]["refused"])
    refused = best.found["forget"]["refused"]
    if refused >= _LEAST:
        return
    saw = (
        f"of {len(seen)} candidates none refuses more than {refused:.0%} of what is to be forgotten (layer "
        f"{best.choice.layer}, ridge {best.choice.ridge:g}, coefficient {best.choice.coefficient:g}; ROUGE-1 "
        f"{best.found['forget']['rouge1']:.2f} there, {best.found['retain']['rouge1']:.2f} on what stays)"
    )
    if len(seen) == 1:
        notes.append(f"the model does not refuse: {saw}")
        return
    raise PhotonError(
        f"unlearning: {saw}; try other --layers, --ridges and --coefficients, or name one of each to have it "
        "written all the same"
    )


def _as_written(edit: Edit, export: Path, prefix: str) -> Edit:
    """Return a change whose sum with the matrix is exactly what the file will have."""
    _, name = _file_of(export, edit.site.name, prefix)
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}.get(name[1], torch.float32)
    before = edit.site.weight.double().cpu()
    after = before + edit.delta
    check_finite(after, dtype, edit.choice)
    return edit._replace(delta=after.to(dtype).double() - before)


def _file_of(export: Path, weight: str, prefix: str) -> tuple[Path, tuple[str, str]]:
    """Return the file of an export that has a weight, and its name and type there.

    Raises
    ------
    PhotonError
        If none has.
    """
    for file in sorted(export.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in (weight, weight.removeprefix(f"{prefix}.")):
                if name in opened.keys():  # noqa: SIM118
                    return file, (name, opened.get_slice(name).get_dtype())
    raise PhotonError(f"{printable(export)}: no file has {weight}; save the model again with save_pretrained")


def _perplexity(model: Any, export: Path, request: Request) -> dict[str, float]:
    if request.data is None:
        return {}
    check_tokenizer_beside(export, request.data)
    data = PreparedData.open(request.data)
    scores = evaluate_data(
        model, data, batch_size=request.batch_size, device=request.device, precision="fp32", limit=64
    )
    return {f"perplexity/{silo}": score.perplexity for silo, score in scores.items()}


def _attacked(exam: Exam, model: Any, edits: Sequence[Edit], request: Request) -> dict[str, dict[str, float]]:
    """Return what is answered to what was to be forgotten after each attack on the changed model."""
    asked = exam.sets["forget"]
    found = {}
    with subtracted(edits):
        found["subtract r"] = exam.figures(model, "forget", asked)
    with skipped(edits):
        found["skip the block"] = exam.figures(model, "forget", asked)
    found["4-bit weights"] = exam.figures(quantised(model), "forget", asked)
    for count in RELEARNED:
        rest = Asked(asked.questions[count:], asked.encoded[count:])
        if rest.questions:
            name = f"relearn {count} answer{'s' if count > 1 else ''}"
            found[name] = exam.figures(relearned(model, asked.encoded[:count]), "forget", rest)
    return found


def _flat(found: Found) -> dict[str, float]:
    return {f"{name}/{figure}": value for name, some in found.items() for figure, value in some.items()}


def _entry(
    request: Request,
    edits: Sequence[Edit],
    model: Any,
    before: dict[str, float],
    after: dict[str, float],
    attacks: Found,
) -> Unlearned:
    """Return what the model's ledger says of the request."""

    def changed(edit: Edit) -> dict[str, Any]:
        name, choice = edit.site.name, edit.choice
        old = {name: model.get_parameter(name).detach().cpu().clone()}
        with applied([edit]):
            new = {name: model.get_parameter(name).detach().cpu().clone()}
        hashes = {"hash_before": tensors_hash(old), "hash_after": tensors_hash(new)}
        return {"weight": name, **choice._asdict(), **hashes}

    sets = {name: getattr(request.sets, name) for name in ("forget", "retain", "reference", "forgotten")}
    first, *others = map(changed, edits)
    return Unlearned(
        asked_by=request.asked_by,
        reason=request.reason,
        time=time.time(),
        positions=request.method.positions,
        solver=request.method.solver,
        prompts={name: len(questions) for name, questions in sets.items() if questions},
        questions={name: hash_of_questions(questions) for name, questions in sets.items() if questions},
        before=before,
        after=after,
        attacks={name: figures["rouge1"] for name, figures in attacks.items()},
        also=tuple(Changed(**other) for other in others),
        **first,
    )


def _write(
    export: Path, output: Path, model: Any, edits: Sequence[Edit], entries: Sequence[Unlearned]
) -> None:
    """Copy an export, with other matrices and a ledger."""
    with applied(edits):
        new = {edit.site.name: model.get_parameter(edit.site.name).detach().cpu().clone() for edit in edits}
    exchanged: dict[Path, dict[str, Tensor]] = {}
    for weight, tensor in new.items():
        file, (name, _) = _file_of(export, weight, model.base_model_prefix)
        exchanged.setdefault(file, {})[name] = tensor
    try:
        remove_leftovers(output.absolute().parent, output.name)
        with atomic_directory(output.absolute()) as folder:
            for file in sorted(export.iterdir()):
                if file in exchanged:
                    _exchange(file, folder / file.name, exchanged[file])
                elif file.is_file() and file.name not in _STALE:
                    shutil.copyfile(file, folder / file.name)
            write_unlearned(folder, entries)
    except OSError as error:
        raise PhotonError(f"{printable(output)}: cannot write it ({error.strerror or error})") from error


def _exchange(source: Path, target: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file of tensors with some others, of the types that they had."""
    with safe_open(source, framework="pt") as opened:
        metadata = opened.metadata()
    stored = load_file(source)
    stored |= {name: tensor.to(stored[name].dtype).contiguous() for name, tensor in tensors.items()}
    save_file(stored, target, metadata=metadata)
    target.chmod(source.stat().st_mode & 0o777)
