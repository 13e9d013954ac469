"""AbbIE: a causal language model whose middle blocks, the body, are applied several times (2507.08567).

    tokens → embedding → head, once → body, r times → tail, once → unembedding

It has the parameters of the plain model with as many blocks, under the same names, whatever r is. An export
brings this file along: it needs torch and transformers, and nothing else.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.utils.output_capturing import capture_outputs

#: More iterations than anybody has tried; of each, keys and values are kept while text is generated.
MAX_ITERATIONS = 64


def _checked(iterations: int) -> int:
    if not 1 <= iterations <= MAX_ITERATIONS:
        raise ValueError(f"{iterations} iterations of AbbIE's body: expected 1 to {MAX_ITERATIONS}")
    return iterations


@dataclass(kw_only=True, repr=False)
class AbbieFields:
    """What the configuration has beside that of its blocks.

    Attributes
    ----------
    head_blocks, body_blocks, tail_blocks
        How the blocks are divided; None: a third each, the body has what is left over.
    variant
        ``"C"``: h_{k+1} = B(h_k), where B is one pass through the body; ``"D"``: the state that went in is
        brought in once more, as ``residual_mode`` says.
    residual_mode
        Of D. ``"inter"``: h_1 = B(h_0), then h_{k+1} = B(h_k) + h_k; ``"post"``: h_{k+1} = B(h_k) + h_k from
        the first; ``"input"``: h_1 = B(h_0), then h_{k+1} = B(h_k + h_0).
    train_iterations
        r in training, and wherever ``iterations`` is None.
    iterations
        r from now on, whatever it was in training.
    """

    head_blocks: int | None = None
    body_blocks: int | None = None
    tail_blocks: int | None = None
    variant: str = "D"
    residual_mode: str = "inter"
    train_iterations: int = 2
    iterations: int | None = None

    def __post_init__(self, **others: Any) -> None:
        """Divide the blocks where nobody has, and refuse what cannot be."""
        # The configuration of the blocks, which comes after this class, takes what is left.
        super().__post_init__(**others)  # type: ignore[misc]
        layers = cast(Any, self).num_hidden_layers
        if self.head_blocks is None:
            self.head_blocks = layers // 3
        if self.tail_blocks is None:
            self.tail_blocks = layers // 3
        if self.body_blocks is None:
            self.body_blocks = layers - self.head_blocks - self.tail_blocks
        parts = self.head_blocks, self.body_blocks, self.tail_blocks
        if min(parts) < 0 or self.body_blocks < 1 or sum(parts) != layers:
            raise ValueError(
                f"AbbIE's head, body and tail have {parts[0]} + {parts[1]} + {parts[2]} blocks, and the "
                f"model has {layers}: let them add up, with one in the body at least"
            )
        if self.variant not in ("C", "D"):
            raise ValueError(f"AbbIE's variant={self.variant!r} is neither C nor D")
        if self.residual_mode not in ("inter", "post", "input"):
            raise ValueError(f"AbbIE's residual_mode={self.residual_mode!r} is none of inter, post, input")
        if getattr(self, "add_cross_attention", False):
            raise ValueError("AbbIE has no cross-attention")
        _ = _checked(self.train_iterations), self.passes

    @property
    def passes(self) -> int:
        """How often the body is applied, r."""
        return _checked(self.train_iterations if self.iterations is None else self.iterations)


class AbbieGPT2Config(AbbieFields, GPT2Config):
    """Of AbbIE with blocks of GPT-2."""

    model_type = "abbie_gpt2"


class AbbieLlamaConfig(AbbieFields, LlamaConfig):
    """Of AbbIE with blocks of Llama."""

    model_type = "abbie_llama"


class Carry(nn.Module):
    """What the next pass begins with; whoever hooks its forward sees every h_k and h_{k+1}."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.mode = "none" if config.variant == "C" else config.residual_mode

    def entry(self, index: int, state: Tensor, first: Tensor) -> Tensor:
        """Return what the body is given in a pass (counted from 0) for the state h_k and for h_0."""
        return state + first if self.mode == "input" and index > 0 else state

    def forward(self, index: int, state: Tensor, made: Tensor) -> Tensor:
        """Return h_{k+1} for h_k and what the body has made of it; all (batch, tokens, width)."""
        again = self.mode == "post" or (self.mode == "inter" and index > 0)
        return made + state if again else made


class _Slots:
    """The part of a cache that belongs to one pass through the body after the first."""

    def __init__(self, cache: DynamicCache, offset: int) -> None:
        self._cache, self._offset = cache, offset

    def update(self, keys: Tensor, values: Tensor, layer: int, *others: Any, **named: Any) -> Any:
        """Add keys and values of a block, and return all that there are of this pass."""
        return self._cache.update(keys, values, layer + self._offset, *others, **named)


class _Abbie:
    """What every model here has in common."""

    @classmethod
    def is_custom_code(cls) -> bool:
        """Say no: the initialisation is that of transformers' own class, down to the residual branches.

        With what it does not know transformers passes over modules without parameters of their own, and it
        is there that GPT-2 scales what is added back.
        """
        return False


class _Iterated(_Abbie):
    """What both models of blocks have in common."""

    config: Any
    carry: Carry

    def body(self) -> list[nn.Module]:
        """Return the blocks that are applied several times."""
        start = self.config.head_blocks
        return list(self._blocks())[start : start + self.config.body_blocks]

    def _blocks(self) -> nn.ModuleList:
        """Return all blocks, which each shape keeps under a name of its own."""
        raise NotImplementedError

    def _cache(self, cache: DynamicCache | None, use_cache: bool | None) -> DynamicCache | None:
        """Return a cache with room for every pass, or None."""
        config = self.config
        if cache is None:
            if not (config.use_cache if use_cache is None else use_cache):
                return None
            cache = DynamicCache(config=config)
        if not isinstance(cache, DynamicCache):
            raise ValueError(
                f"AbbIE keeps keys and values of every iteration, and a {type(cache).__name__} has no room "
                "for them; use a DynamicCache"
            )
        slots = config.num_hidden_layers + (config.passes - 1) * config.body_blocks
        if cache.get_seq_length() and len(cache.layers) != slots:
            raise ValueError(
                f"the cache was filled with another number of iterations than {config.passes}; use a new one"
            )
        # It was made with a slot for each block; from now on it gets one more whenever it is asked for it.
        cache.layer_class_to_replicate = DynamicLayer
        return cache

    def _through(self, state: Tensor, cache: DynamicCache | None, **given: Any) -> Tensor:
        """Return what comes out of all blocks for what goes in, (batch, tokens, width)."""
        config, blocks = self.config, list(self._blocks())
        start, end = config.head_blocks, config.head_blocks + config.body_blocks
        for block in blocks[:start]:
            state = block(state, past_key_values=cache, **given)
        first = state
        for index in range(config.passes):
            # Each pass after the first has its slots behind those that the plain model has.
            offset = config.num_hidden_layers - start + (index - 1) * config.body_blocks
            slots = cache if cache is None or index == 0 else _Slots(cache, offset)
            made = self.carry.entry(index, state, first)
            for block in blocks[start:end]:
                made = block(made, past_key_values=slots, **given)
            state = self.carry(index, state, made)
        for block in blocks[end:]:
            state = block(state, past_key_values=cache, **given)
        return state

    def _positions(self, embeddings: Tensor, cache: DynamicCache | None, given: Tensor | None) -> Tensor:
        if given is not None:
            return given
        seen = 0 if cache is None else int(cache.get_seq_length())
        return (torch.arange(embeddings.shape[1], device=embeddings.device) + seen).unsqueeze(0)


class AbbieGPT2Model(_Iterated, GPT2Model):
    """The blocks of `AbbieGPT2LMHeadModel`, with embeddings and final norm."""

    config_class = AbbieGPT2Config

    def __init__(self, config: AbbieGPT2Config) -> None:
        super().__init__(config)
        self.carry = Carry(config)

    def _blocks(self) -> nn.ModuleList:
        return self.h

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Return the states after the final norm, (batch, tokens, width), as GPT-2 does."""
        for name in ("token_type_ids", "encoder_hidden_states", "encoder_attention_mask"):
            if others.pop(name, None) is not None:
                raise ValueError(f"AbbIE has no use for {name}")
        cache = self._cache(past_key_values, use_cache)
        embeddings = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        positions = self._positions(embeddings, cache, position_ids)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=embeddings,
            attention_mask=attention_mask,
            past_key_values=cache,
            position_ids=positions,
        )
        state = self.drop(embeddings + self.wpe(positions))
        state = self._through(state, cache, attention_mask=mask, position_ids=positions, **others)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.ln_f(state), past_key_values=cache
        )


class AbbieGPT2LMHeadModel(_Abbie, GPT2LMHeadModel):
    """AbbIE with blocks of GPT-2."""

    config_class = AbbieGPT2Config

    def __init__(self, config: AbbieGPT2Config) -> None:
        # GPT-2's own would draw the weights of a plain model first.
        super(GPT2LMHeadModel, self).__init__(config)
        self.transformer = AbbieGPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()


class AbbieLlamaModel(_Iterated, LlamaModel):
    """The blocks of `AbbieLlamaForCausalLM`, with embeddings and final norm."""

    config_class = AbbieLlamaConfig

    def __init__(self, config: AbbieLlamaConfig) -> None:
        super().__init__(config)
        self.carry = Carry(config)

    def _blocks(self) -> nn.ModuleList:
        return self.layers

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Return the states after the final norm, (batch, tokens, width), as Llama does."""
        cache = self._cache(past_key_values, use_cache)
        state = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        positions = self._positions(state, cache, position_ids)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=state,
            attention_mask=attention_mask,
            past_key_values=cache,
            position_ids=positions,
        )
        rotations = self.rotary_emb(state, position_ids=positions)
        state = self._through(
            state,
            cache,
            attention_mask=mask,
            position_ids=positions,
            position_embeddings=rotations,
            **others,
        )
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.norm(state), past_key_values=cache
        )


class AbbieLlamaForCausalLM(_Abbie, LlamaForCausalLM):
    """AbbIE with blocks of Llama."""

    config_class = AbbieLlamaConfig

    def __init__(self, config: AbbieLlamaConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self.model = AbbieLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def body_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model that are applied several times; of any other model than AbbIE none."""
    blocks = getattr(model, "base_model", None)
    return blocks.body() if isinstance(blocks, _Iterated) else []
