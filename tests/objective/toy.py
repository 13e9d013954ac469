"""A masked objective, small enough to compute by hand, and one that takes no steps."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from photon.data.silo_data import SiloData
from photon.objective.base import Evaluation, Objective, Shapes, Work
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
        return {"tokens": torch.zeros((size, sequence_length + 1), dtype=torch.int64)}


class Chosen(CausalLM):
    """Trains on every third window, other ones in each round, with labels that it makes for them."""

    def prepare(
        self,
        model: nn.Module,
        data: SiloData,
        received: StateGroups,
        *,
        server_round: int,
        seed: int,
        own: bool,
    ) -> Work:
        assert not model.training
        assert not torch.is_grad_enabled()
        text = torch.from_numpy(np.concatenate(data.windows("train")).astype("int64"))
        windows = torch.arange(server_round % 3, len(text), 3)
        first = model(input_ids=text[windows][:1, :-1]).logits.float().mean()
        return Work(
            windows, {"labels": text[windows] + 1}, {"chosen": float(len(windows)), "first": first.item()}
        )

    def loss(self, model: nn.Module, batch: Batch, rows: Tensor | None) -> Loss:
        assert torch.equal(batch["labels"], batch["tokens"] + 1), "made for these very windows"
        return super().loss(model, batch, rows)


class Beyond(CausalLM):
    """Chooses a window that is not there."""

    def prepare(
        self,
        model: nn.Module,
        data: SiloData,
        received: StateGroups,
        *,
        server_round: int,
        seed: int,
        own: bool,
    ) -> Work:
        return Work(torch.tensor([10**6]))


class Sums(CausalLM):
    """Takes no steps, in two rounds: means of token counts and hidden states, then what varies about them.

    The second round reads what is kept of the first: the hidden states' mean and the tokens' frequencies.
    """

    trains = False
    groups = ("shared/sums", "shared/gram")

    def sums(self, model: Any, server_round: int) -> Shapes:
        vocabulary, width = model.transformer.wte.weight.shape
        if server_round > 1:
            return {"shared/gram": {"gram": torch.Size([width, width]), "surprise": torch.Size([])}}
        sums = {"tokens": [vocabulary], "count": [], "hidden": [width], "states": []}
        return {"shared/sums": {name: torch.Size(size) for name, size in sums.items()}}

    def keep(self, sums: StateGroups, kept: StateGroups, server_round: int) -> StateGroups:
        if server_round > 1:
            return sums
        of = sums["shared/sums"]
        return {"shared/means": {"tokens": of["tokens"] / of["count"], "hidden": of["hidden"] / of["states"]}}

    def brings(self, model: Any, server_round: int) -> Shapes:
        vocabulary, width = model.transformer.wte.weight.shape
        means = {"tokens": torch.Size([vocabulary]), "hidden": torch.Size([width])}
        return {"shared/means": means} if server_round > 1 else {}

    def statistics(
        self, model: nn.Module, data: SiloData, received: StateGroups, *, server_round: int, seed: int
    ) -> StateGroups:
        assert not model.training
        assert not torch.is_grad_enabled()
        assert set(received) == ({"shared/means"} if server_round > 1 else set())
        return self.of_windows(model, np.concatenate(data.windows("train")), received)

    @staticmethod
    def of_windows(model: nn.Module, windows: np.ndarray, received: StateGroups) -> StateGroups:
        """Return the sums of some windows.

        The model reads some of them, chosen by what is in them, one by one: its float32 is the same whatever
        others there are.
        """
        text = torch.from_numpy(windows.astype("int64"))
        states = [
            model.transformer(input_ids=window[None, :-1]).last_hidden_state[0].double()
            for window in text[text.sum(1) % 16 == 0]
        ]
        hidden = torch.cat(states)
        if received:
            means = received["shared/means"]
            away = hidden - means["hidden"]
            surprise = -means["tokens"].clamp_min(1e-9)[text].log().sum()
            return {"shared/gram": {"gram": away.T @ away, "surprise": surprise}}
        counts = torch.bincount(text.flatten(), minlength=len(model.transformer.wte.weight)).double()
        sums = {"tokens": counts, "count": counts.sum(), "hidden": hidden.sum(0)}
        return {"shared/sums": {**sums, "states": torch.tensor(len(hidden), dtype=torch.float64)}}


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


class Frozen(CausalLM):
    """Causal language modelling with frozen positions."""

    def build(self, model: Any) -> Any:
        model.transformer.wpe.requires_grad_(False)
        return model


class Normed(CausalLM):
    """Causal language modelling with a norm that counts as it goes."""

    def build(self, model: Any) -> Any:
        model.transformer.norm = nn.BatchNorm1d(4)
        return model
