"""The local loop: some steps of one model on one stream of batches, on one device.

The loop is a bare PyTorch loop with gradient accumulation, clipping and mixed precision. It is handed the
loss, and what a method adds to a step. It keeps nothing between calls but what the model and the optimizer
keep: the schedule is a function of the global step, and the position in the data belongs to the stream.
"""

import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from photon.components import build, import_target
from photon.config.training import TransitionSection
from photon.errors import PhotonError
from photon.models.sparse import parameter_name
from photon.training.groups import NamedParameters, read_optimizer
from photon.training.hooks import (
    NO_HOOKS,
    Batch,
    CountFunction,
    LossFunction,
    NamedParameterList,
    StepHooks,
    equal_counts,
)
from photon.training.precision import Precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from photon.data.loader import BatchStream


#: The reported loss among the figures of a step.
_LOSS = "loss"
_IMPLEMENTATIONS = ("fused", "foreach", "differentiable")


class TrainingDiverged(PhotonError):  # noqa: N818 - says what happened, as the event log does
    """The loss or the gradient norm is no longer a finite number."""


@dataclass(frozen=True)
class TrainResult:
    """What some local steps did.

    Attributes
    ----------
    steps : int
        Local steps taken.
    tokens : int
        Tokens read: steps · batch size · sequence length.
    loss, loss_last : float
        Mean loss over the steps and loss of the last step, before each step's update, as `Loss` reports it.
    gradient_norm : float
        Mean over the steps of the global gradient norm before clipping.
    learning_rate : float
        Learning rate of the last step (first parameter group).
    seconds : float
        Wall time of the steps alone.
    micro_batch_size : int
        Sequences per forward pass.
    figures : dict[str, float]
        Means over the steps of the figures that came with the loss.
    """

    steps: int
    tokens: int
    loss: float
    loss_last: float
    gradient_norm: float
    learning_rate: float
    seconds: float
    micro_batch_size: int
    figures: dict[str, float] = field(default_factory=dict)


class LocalTrainer:
    """Train one model on one device.

    Parameters
    ----------
    model
        What is trained, on ``device``.
    optimizer
        Any torch optimizer over the model's parameters. The learning rates that its groups have now are the
        peaks of the schedule.
    schedule
        Global step → factor of the peak learning rate.
    loss
        The loss of a micro-batch.
    count
        Items that the loss of a micro-batch is a mean over. Each micro-batch counts by its share of the
        batch's items.
    batch_size
        Sequences per local step.
    micro_batch_size
        Sequences per forward pass, a divisor of ``batch_size``; None takes the whole batch at once. The
        gradient is the mean over the batch either way.
    clip_norm
        Largest global gradient norm, or None to leave gradients as they are.
    precision
        Format of the forward and backward pass; parameters stay float32.
    device
        Where ``model`` is.
    compile_mode
        Run the model through `torch.compile` in this mode; parameter names and the model object stay as they
        are. None: do not.
    transition
        Settings that the optimizer has from a global step on; what they do to its state is not done here.

    Raises
    ------
    PhotonError
        When ``micro_batch_size`` does not divide ``batch_size``.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Callable[[int], float],
        *,
        loss: LossFunction,
        count: CountFunction = equal_counts,
        batch_size: int,
        micro_batch_size: int | None,
        clip_norm: float | None,
        precision: Precision,
        device: torch.device,
        compile_mode: str | None = None,
        transition: TransitionSection | None = None,
    ) -> None:
        micro = batch_size if micro_batch_size is None else micro_batch_size
        if micro < 1 or batch_size % micro != 0:
            raise PhotonError(
                f"micro_batch_size={micro} does not divide batch_size={batch_size}; take a divisor, or null "
                "for the whole batch at once"
            )
        self.model = model
        self.optimizer = optimizer
        self.schedule = schedule
        self.loss = loss
        self.count = count
        self.batch_size = batch_size
        self.micro_batch_size = micro
        self.clip_norm = clip_norm
        self.precision = precision
        self.device = device
        self.transition = transition
        self._parameters = list(model.parameters())
        self._forward = model
        if compile_mode is not None:
            self._forward = cast(nn.Module, torch.compile(model, mode=compile_mode))
        self._scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        for group in optimizer.param_groups:
            # A second trainer over the same optimizer must not take a scheduled rate for the peak.
            for name in ("lr", *(transition.optimizer if transition else ())):
                if name in group:
                    group.setdefault(f"initial_{name}", group[name])

    def train(
        self,
        stream: "BatchStream",
        *,
        global_step: int,
        steps: int,
        on_step: Callable[[int, float], None] | None = None,
        rows: Tensor | None = None,
        hooks: StepHooks = NO_HOOKS,
    ) -> TrainResult:
        """Take ``steps`` local steps on the next ``steps · batch_size`` windows of ``stream``.

        Parameters
        ----------
        stream
            Where the batches come from; its position ends exactly behind the last batch trained on.
        global_step
            Step of the run (counted from 0) that the first of these steps is: it sets the learning rate.
        steps
            Local steps to take, at least 1.
        on_step
            Called with the global step and its loss. On a GPU one step late, so that the device never
            waits for it.
        rows
            Rows of the vocabulary that the softmax runs over: bool, of shape (rows of the head,); None: all.
        hooks
            What a method adds to each step.

        Raises
        ------
        TrainingDiverged
            When a loss or gradient norm is not finite: on a CPU before that step changes the parameters, on a
            GPU (where asking would stall the device) after the last step.
        PhotonError
            When ``steps`` is below 1.
        """
        if steps < 1:
            raise PhotonError(f"cannot train {steps} local steps; ask for at least 1")
        self.model.train()
        rows = None if rows is None else rows.to(self.device)
        record = _Record(global_step, on_step, wait=self.device.type == "cpu")
        self._synchronize()
        started = time.perf_counter()
        batch = self._next_batch(stream)
        tokens = steps * self.batch_size * stream.tokens
        for step in range(global_step, global_step + steps):
            self._configure(step)
            figures = self._backward(batch, rows, hooks)
            if step + 1 < global_step + steps:
                # Fetched while a GPU still works on this step.
                batch = self._next_batch(stream)
            self._scaler.unscale_(self.optimizer)
            if hooks.correct is not None:
                hooks.correct(self._named())
            norm = self._gradient_norm()
            record.add(figures, norm)
            self._update(norm)
        self._synchronize()
        seconds = time.perf_counter() - started
        # A model's worth of memory that what follows a round's training can use.
        self.optimizer.zero_grad(set_to_none=True)
        losses, norms = record.finish(skipped_steps_are_normal=self.precision == "fp16")
        return TrainResult(
            steps=steps,
            tokens=tokens,
            loss=math.fsum(losses) / len(losses),
            loss_last=losses[-1],
            gradient_norm=math.fsum(norms) / len(norms),
            learning_rate=float(self.optimizer.param_groups[0]["lr"]),
            seconds=seconds,
            micro_batch_size=self.micro_batch_size,
            figures=record.figures(),
        )

    def no_steps(self) -> TrainResult:
        """Return the result of taking no steps: there is no loss to tell."""
        return TrainResult(0, 0, math.nan, math.nan, math.nan, math.nan, 1e-6, self.micro_batch_size)

    def _next_batch(self, stream: "BatchStream") -> Batch:
        batch = stream.next_batch(self.batch_size)
        return {name: self._to_device(array) for name, array in batch.items()}

    def _to_device(self, batch: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return batch.to(self.device)
        return batch.pin_memory().to(self.device, non_blocking=True)

    def _configure(self, step: int) -> None:
        """Set the learning rate, and the settings on this side of the transition: functions of the step."""
        factor = self.schedule(step)
        transition = self.transition
        transitioned = transition is not None and step >= transition.step
        if transition is not None and transitioned:
            factor *= transition.lr_scale
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
            for name, value in transition.optimizer.items() if transition is not None else ():
                if name in group:
                    group[name] = value if transitioned else group[f"initial_{name}"]

    def _backward(self, batch: Batch, rows: Tensor | None, hooks: StepHooks) -> dict[str, Tensor]:
        """Leave the mean gradient of ``batch`` in the parameters; return its mean loss and other figures."""
        self.optimizer.zero_grad(set_to_none=True)
        parts = self._micro_batches(batch)
        shares = self._shares(parts)
        figures: dict[str, Tensor] = {}
        for index, part in enumerate(parts):
            last = index + 1 == len(parts)
            self._before_pass(last=last)
            with self._autocast():
                loss = self.loss(self._forward, part, rows)
            value = _weighted(loss.value, shares, index)
            for name, figure in {_LOSS: loss.value, **loss.figures}.items():
                part_of_it = _weighted(figure.detach(), shares, index)
                figures[name] = figures[name] + part_of_it if name in figures else part_of_it
            if last and hooks.term is not None:
                value = value + hooks.term(self.model)
            self._scaler.scale(value).backward()
        self._complete_gradients()
        return figures

    def _complete_gradients(self) -> None:
        """Give what the loss does not depend on a gradient of zero, as the loss's derivative says.

        An optimizer would leave it out, and then parameters would differ in their steps, and in what states
        there are of them: a state group is of all parameters.
        """
        for parameter in self._parameters:
            if parameter.grad is None and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        split = [array.split(self.micro_batch_size) for array in batch.values()]
        return [dict(zip(batch, arrays, strict=True)) for arrays in zip(*split, strict=True)]

    def _shares(self, parts: Sequence[Batch]) -> Tensor | int:
        """Return the weight of each micro-batch, or what to divide all of them by."""
        counts = [self.count(part) for part in parts]
        items = [count for count in counts if count is not None]
        if not items:
            return len(parts)
        stacked = torch.stack(items).float()
        return stacked / self._items(stacked.sum())

    def _items(self, count: Tensor) -> Tensor:
        """Return the counted items of a step: those of each device, if gradients are averaged over some."""
        return count.clamp_min(1.0)

    def _before_pass(self, *, last: bool) -> None:
        """Room for a group of devices, which exchanges gradients in the last pass alone."""

    def _named(self) -> NamedParameterList:
        return [
            (parameter_name(name), parameter)
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        ]

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "fp32":
            return nullcontext()
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype=dtype)

    def _gradient_norm(self) -> Tensor:
        return get_total_norm(
            [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        )

    def _update(self, norm: Tensor) -> None:
        if self.clip_norm is not None and self._may_need_clipping(norm, self.clip_norm):
            clip_grads_with_norm_(self._parameters, self.clip_norm, norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()

    def _may_need_clipping(self, norm: Tensor, clip_norm: float) -> bool:
        # Torch multiplies by min(1, clip / (norm + 1e-6)); on a CPU a look is cheaper than multiplying.
        return self.device.type != "cpu" or norm.item() + 1e-6 > clip_norm

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _weighted(figure: Tensor, shares: Tensor | int, index: int) -> Tensor:
    """Return what a figure of a micro-batch adds to that of the batch."""
    if isinstance(shares, Tensor):
        return figure * shares[index]
    return figure / shares if shares > 1 else figure


class _Record:
    """Figures and gradient norms of the steps, fetched from the device only when that costs nothing."""

    def __init__(self, first_step: int, on_step: Callable[[int, float], None] | None, *, wait: bool) -> None:
        self._first_step = first_step
        self._on_step = on_step
        self._wait = wait
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._others: dict[str, list[Tensor]] = {}
        self._reported = 0

    def add(self, figures: Mapping[str, Tensor], norm: Tensor) -> None:
        self._norms.append(norm)
        for name, figure in figures.items():
            (self._losses if name == _LOSS else self._others.setdefault(name, [])).append(figure)
        if self._wait:
            step = self._first_step + len(self._losses) - 1
            _check_finite(step, self._losses[-1].item(), norm.item())
        self._report(len(self._losses) if self._wait else len(self._losses) - 1)

    def figures(self) -> dict[str, float]:
        """Return the means over the steps."""
        return {name: float(torch.stack(values).double().mean()) for name, values in self._others.items()}

    def finish(self, *, skipped_steps_are_normal: bool) -> tuple[list[float], list[float]]:
        losses = torch.stack(self._losses).double().tolist()
        norms = torch.stack(self._norms).double().tolist()
        finite = [norm for norm in norms if math.isfinite(norm)]
        if skipped_steps_are_normal and finite:
            # The loss scaler of fp16 finds its scale by overflowing, and leaves those steps out.
            norms = [norm if math.isfinite(norm) else finite[0] for norm in norms]
        for index, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
            _check_finite(self._first_step + index, loss, norm)
        self._report(len(losses))
        return losses, norms

    def _report(self, until: int) -> None:
        if self._on_step is None:
            return
        for index in range(self._reported, until):
            self._on_step(self._first_step + index, self._losses[index].item())
        self._reported = max(self._reported, until)


def _check_finite(step: int, loss: float, norm: float) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    raise TrainingDiverged(
        f"training diverged at local step {step}: loss {loss}, gradient norm {norm}; lower the learning "
        "rate, lengthen the warm-up or clip gradients"
    )


def enable_activation_checkpointing(model: "PreTrainedModel") -> None:
    """Recompute activations in the backward pass instead of keeping them: less memory, more time.

    Raises
    ------
    PhotonError
        When the architecture does not support it.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise PhotonError(
            f"{type(model).__name__} has no activation checkpointing; set activation_checkpointing=false"
        )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def build_optimizer(config: Mapping[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    """Build the local optimizer that ``config`` names over the trainable parameters of ``model``.

    Parameters
    ----------
    config
        ``_target_``, the import path of a `torch.optim.Optimizer` class ("torch.optim.AdamW"), and its
        keyword arguments. Torch's own optimizers run fused where they can, unless ``fused``, ``foreach`` or
        ``differentiable`` is given.
    model
        The model, already on its device.

    Raises
    ------
    PhotonError
        When the target is not an optimizer, or refuses an argument.
    """
    # The name may have come over the network: nothing but an optimizer class is ever called.
    optimizer_class = import_target(config["_target_"], "optimizer")
    if not (inspect.isclass(optimizer_class) and issubclass(optimizer_class, torch.optim.Optimizer)):
        raise PhotonError(
            f"optimizer._target_={config['_target_']} is not a torch.optim.Optimizer; name one, such as "
            "torch.optim.AdamW"
        )
    # With their names, because some optimizers treat embeddings unlike hidden matrices.
    named = [
        (parameter_name(name), parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    fused = _runs_fused(optimizer_class, [parameter for _, parameter in named]) and config.keys().isdisjoint(
        _IMPLEMENTATIONS
    )
    optimizer: torch.optim.Optimizer = build(
        {"fused": True, **config} if fused else config, "optimizer", named
    )
    return optimizer


def _runs_fused(optimizer_class: Callable[..., torch.optim.Optimizer], parameters: Sequence[Tensor]) -> bool:
    devices = {parameter.device.type for parameter in parameters}
    fused_on = {"cpu"} if optimizer_class is torch.optim.Adagrad else {"cpu", "cuda"}
    known = {torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad}
    if any(hasattr(parameter, "placements") for parameter in parameters):
        # Torch has no rule for how the others' fused steps go over shards.
        known = {torch.optim.Adam, torch.optim.AdamW}
    return optimizer_class in known and devices <= fused_on


def state_shapes(
    section: Mapping[str, Any], shapes: Mapping[str, torch.Size]
) -> dict[str, dict[str, torch.Size]]:
    """Return the shapes of the state groups of an optimizer, without memory for them.

    Parameters
    ----------
    section
        ``_target_`` and arguments of a local optimizer.
    shapes
        Parameter name to shape.
    """
    model = NamedParameters({name: _meta_parameter(shape) for name, shape in shapes.items()})
    optimizer = build_optimizer(section, model)
    optimizer.step()
    groups, _ = read_optimizer(model, optimizer)
    return {group: {name: t.shape for name, t in tensors.items()} for group, tensors in groups.items()}


def _meta_parameter(shape: torch.Size) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(shape, device="meta"))
    parameter.grad = torch.empty_like(parameter)
    return parameter


def probe_state_shapes(section: Mapping[str, Any]) -> dict[str, dict[str, torch.Size]]:
    """Return the shapes of the state groups of an optimizer on a small stand-in for a language model."""
    square = torch.Size((128, 128))
    probe = {"h.0.mlp.weight": square, "h.0.mlp.bias": torch.Size((128,)), "wte.weight": square}
    return state_shapes(section, probe)


def state_group_names(section: Mapping[str, Any]) -> list[str]:
    """Return the names of the state groups of an optimizer on a language model."""
    return sorted(probe_state_shapes(section))
