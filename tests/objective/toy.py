"""A masked objective, small enough to compute by hand, and one that takes no steps."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from photon.data.silo_data import SiloData
from photon.objective.base import Evaluation, Objective, Shapes
from photon.objective.causal_lm import CausalLM
from photon.training.groups import StateGroups
from photon.training.hooks import Batch, Loss


class Masked(Objective):
    """Mean cross-entropy of next tokens, but of those below a bound alone.

    Parameters
    ----------
    below
        Tokens from here on are no targets.
    """

    def __init__(self, below: int = 7) -> None:
        self.below = below

    def _counted(self, tokens: Tensor) -> Tensor:
        return tokens[:, 1:] < self.below

    def count(self, batch: Batch) -> Tensor:
        return self._counted(batch["tokens"]).sum()

    def loss(self, model: nn.Module, batch: Batch, rows: Tensor | None) -> Loss:
        tokens = batch["tokens"]
        logits = model(input_ids=tokens[:, :-1]).logits.flatten(0, 1)
        costs = nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
        counted = self._counted(tokens).flatten()
        mean = (costs * counted).sum() / counted.sum().clamp_min(1)
        right = (logits.argmax(1) == tokens[:, 1:].flatten()) & counted
        return Loss(mean, {"right": right.sum() / counted.sum().clamp_min(1)})

    def evaluate(self, model, data, rows, *, batch_size, device, precision, limit) -> Evaluation:
        total, count = 0.0, 0
        for windows in data.windows("validation"):
            batch = {"tokens": torch.from_numpy(windows[:limit].astype("int64")).to(device)}
            with torch.no_grad():
                items = int(self.count(batch))
                total, count = total + self.loss(model, batch, rows).value.item() * items, count + items
        return Evaluation({"masked": total}, count)

    def sample(self, size: int, sequence_length: int) -> Batch:
        return {"tokens": torch.zeros((size, sequence_length), dtype=torch.int64)}


class Sums(CausalLM):
    """Takes no steps, in two rounds: means of token counts and hidden states, then what varies about them.

    The second round reads what is kept of the first: the hidden states' mean and the tokens' frequencies.
    """

    trains = False

    def sums(self, params: Mapping[str, torch.Size], server_round: int) -> Shapes:
        vocabulary, width = params["transformer.wte.weight"]
        if server_round == 1:
            rows = {
                "tokens": torch.Size([vocabulary]),
                "hidden": torch.Size([width]),
                "count": torch.Size([]),
            }
            return {"shared/means": rows}
        return {"shared/gram": {"gram": torch.Size([width, width]), "surprise": torch.Size([])}}

    def brings(self, params: Mapping[str, torch.Size], server_round: int) -> Shapes:
        vocabulary, width = params["transformer.wte.weight"]
        means = {"shared/means": {"tokens": torch.Size([vocabulary]), "hidden": torch.Size([width])}}
        return means if server_round > 1 else {}

    def keep(self, sums: StateGroups, kept: StateGroups, server_round: int) -> StateGroups:
        if server_round > 1:
            # The last answer stays beside what it was made with.
            return {**kept, **sums}
        means = sums["shared/means"]
        return {"shared/means": {name: means[name] / means["count"] for name in ("tokens", "hidden")}}

    def statistics(
        self, model: nn.Module, data: SiloData, received: StateGroups, *, server_round: int, seed: int
    ) -> StateGroups:
        assert not model.training
        assert not torch.is_grad_enabled()
        first, *others = [self.of_windows(model, windows, received) for windows in data.windows("train")]
        for other in others:
            for group, tensors in other.items():
                first[group] = {name: first[group][name] + tensor for name, tensor in tensors.items()}
        return first

    @staticmethod
    def of_windows(model: nn.Module, windows: np.ndarray, received: StateGroups) -> StateGroups:
        """Return the sums of some windows, one by one so that it does not matter which are together."""
        vocabulary, width = model.transformer.wte.weight.shape
        counts = torch.zeros(vocabulary, dtype=torch.float64)
        hidden, gram = torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
        surprise = torch.zeros((), dtype=torch.float64)
        for window in torch.from_numpy(windows.astype("int64")):
            states = model.transformer(input_ids=window[None]).last_hidden_state[0].double()
            if received:
                means = received["shared/means"]
                away = states - means["hidden"]
                gram += away.T @ away
                surprise -= means["tokens"][window].log().sum()
            else:
                counts += torch.bincount(window, minlength=vocabulary)
                hidden += states.sum(0)
        if received:
            return {"shared/gram": {"gram": gram, "surprise": surprise}}
        count = torch.tensor(windows.size, dtype=torch.float64)
        return {"shared/means": {"tokens": counts, "hidden": hidden, "count": count}}


class Costs(Masked):
    """Tokens are costs, and 0 is not counted; the model's part in the loss is 0."""

    def count(self, batch: Batch) -> Tensor:
        return (batch["tokens"] > 0).sum()

    def loss(self, model: nn.Module, batch: Batch, rows: Tensor | None) -> Loss:
        tokens = batch["tokens"]
        nothing = 0 * model(input_ids=tokens).logits.sum()
        return Loss(nothing + tokens.sum() / self.count(batch).clamp_min(1))


class Weighted(Masked):
    """Needs what no prepared text has."""

    arrays = ("tokens", "weights")
