"""Causal attention without a mask, for rows that are one text each.

transformers leaves the mask out where a row is one text, and has `scaled_dot_product_attention` be causal
by itself. Under `torch.compile` it cannot look at the positions to see that, and makes a mask of batch ×
tokens × tokens, for which a GPU has no fast kernel. On a GPU that is not compiled, looking means waiting.
Whoever trains knows what the rows are and says so: `one_text_a_row`. Only then, and only where transformers
itself would leave out the mask of such rows, is it left out here. A mask of padding, of texts that share a
row, of a cache that is read, and whatever a model makes of masks by itself stay.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

#: How attention is computed: by torch's one operation, or by matrix products.
Attention = Literal["sdpa", "products"]
#: Name of ours among those of transformers.
PRODUCTS = "photon_products"


class _Rows:
    """What is known of the rows of the batch that a model is called with."""

    one_text = False


_rows = _Rows()


@contextmanager
def one_text_a_row() -> Iterator[None]:
    """Promise that each row of what a model is called with in this block is one text from its beginning."""
    before = _rows.one_text
    _rows.one_text = True
    try:
        yield
    finally:
        _rows.one_text = before


def use_attention(model: nn.Module, attention: Attention) -> None:
    """Have a model compute attention as chosen, if it can; it keeps what it has if it cannot.

    A configuration that is saved does not name it: whoever loads the model has that of transformers.
    """
    if attention == "products" and takes_products(model):
        cast(Any, model).set_attn_implementation(PRODUCTS)


def takes_products(model: nn.Module) -> bool:
    """Return whether a model's attention can be exchanged, which it now leaves to torch's one operation."""
    config: Any = getattr(model, "config", None)
    return (
        getattr(config, "_attn_implementation", None) == "sdpa"
        and not config.sub_configs
        and bool(getattr(model, "_can_set_attn_implementation", lambda: False)())
    )


def _products(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return softmax(q kᵀ · scaling, of the keys up to each query) v by plain products.

    Everything that is more than that is left to transformers.

    Parameters
    ----------
    query
        (batch, heads, tokens, width of a head).
    key, value
        The same with as many heads, or a divisor of them that groups share.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    tokens = query.shape[2]
    more = any(others.get(name) is not None for name in ("position_bias", "cache", "softcap"))
    if attention_mask is not None or not causal or more or tokens != key.shape[2] or tokens == 1:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **others
        )
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = (one.repeat_interleave(groups, 1) for one in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).triu_(1)
    scores = torch.matmul(query * scale, key.transpose(2, 3)).masked_fill(later, -torch.inf)
    # The sums of a softmax are float32 inside, whatever comes in and goes out.
    shares = nn.functional.dropout(scores.softmax(-1), dropout, training=dropout > 0)
    return torch.matmul(shares, value.to(shares.dtype)).transpose(1, 2).contiguous(), None


def _causal_mask(**given: Any) -> Tensor | None:
    """Return the mask that transformers makes, or None where causal attention of whole rows needs none."""
    window, tokens = given.get("local_size"), given["q_length"]
    if (
        _rows.one_text
        and given.get("allow_is_causal_skip", True)
        and given.get("attention_mask") is None
        and type(given.get("q_offset", 0)) is int
        and given.get("q_offset", 0) == given.get("kv_offset", 0) == 0
        and tokens == given["kv_length"]
        and (window is None or tokens < window)
    ):
        return None
    return sdpa_mask(**given)


_packed = masking_utils.find_packed_sequence_indices


def _texts_of_rows(position_ids: Tensor) -> Tensor | None:
    """Return which text of its row each token belongs to; None: they are one, as was promised or is seen."""
    return None if _rows.one_text else _packed(position_ids)


# What is not promised goes the way that it went: these are transformers' own outside of a block.
AttentionMaskInterface.register("sdpa", _causal_mask)
AttentionMaskInterface.register(PRODUCTS, _causal_mask)
AttentionInterface.register(PRODUCTS, _products)
masking_utils.find_packed_sequence_indices = _texts_of_rows
assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is _causal_mask
