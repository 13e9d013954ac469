"""Text from a trained model."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from photon.errors import PhotonError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def generate_text(
    export: Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    device: str = "cpu",
    iterations: int | None = None,
) -> str:
    """Continue a prompt with an exported model; the same arguments give the same text.

    Parameters
    ----------
    export
        Hugging Face folder with model and tokenizer.
    prompt
        Text to continue; empty starts a new document.
    max_new_tokens
        Most tokens to add. Fewer are added where the document ends or the model runs out of positions.
    temperature
        Divisor of the logits; 0 always takes the likeliest token.
    top_k
        Tokens to choose among at each step.
    seed
        Of the choices. The global random state is left as it was.
    device
        Where to run.
    iterations
        Passes through the body of a model that iterates; None: as many as in training.

    Returns
    -------
    str
        The prompt and what follows it.

    Raises
    ------
    PhotonError
        If the folder is not a model with a tokenizer, a setting makes no sense, or the prompt leaves the
        model no room.
    """
    if max_new_tokens < 1 or temperature < 0 or top_k < 1:
        raise PhotonError(
            f"max_new_tokens={max_new_tokens}, temperature={temperature}, top_k={top_k}: the first and the "
            "last must be at least 1, the temperature at least 0"
        )
    import torch
    from transformers import GenerationConfig

    from photon.evaluation.iterations import iterating
    from photon.models.pretrained import load_pretrained, quiet_transformers

    tokenizer = load_tokenizer(export)
    model = torch.nn.Module.to(load_pretrained(export), device).eval()
    start = tokenizer.encode(prompt, add_special_tokens=False) or _document_start(tokenizer, export)
    settings = GenerationConfig(
        max_new_tokens=min(max_new_tokens, _room(model, len(start))),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        **({"do_sample": True, "temperature": temperature, "top_k": top_k} if temperature else {}),
    )
    input_ids = torch.tensor([start], device=device)
    passes = nullcontext() if iterations is None else iterating(model, iterations)
    with passes, torch.random.fork_rng(), torch.no_grad(), quiet_transformers():
        torch.manual_seed(seed)
        output: Any = model.generate(
            input_ids, attention_mask=torch.ones_like(input_ids), generation_config=settings, use_cache=True
        )
    # A character may be split between tokens, so prompt and continuation are decoded together.
    text: str = tokenizer.decode(output[0], skip_special_tokens=True)
    return text


def load_tokenizer(export: Path) -> Any:
    """Load the tokenizer of an exported model.

    Raises
    ------
    PhotonError
        If the folder is not a model with a tokenizer.
    """
    from transformers import AutoTokenizer

    from photon.models.pretrained import first_line, read_model_config

    read_model_config(export)
    if not (export / "tokenizer.json").is_file():  # AutoTokenizer would make one that knows no words
        raise PhotonError(f"{export}: no tokenizer.json in it; export the model again")
    try:
        return AutoTokenizer.from_pretrained(export, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # what a broken tokenizer raises depends on what is broken in it
        raise PhotonError(f"{export}: cannot load the tokenizer ({first_line(error)})") from error


def _document_start(tokenizer: Any, export: Path) -> list[int]:
    if tokenizer.eos_token_id is None:
        raise PhotonError(f"{export}: its tokenizer has no end-of-text token, so the prompt may not be empty")
    return [tokenizer.eos_token_id]


def _room(model: "PreTrainedModel", prompt_tokens: int) -> int:
    """Return how many tokens still fit behind the prompt."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None:
        return 1 << 30
    if prompt_tokens >= positions:
        raise PhotonError(
            f"the prompt has {prompt_tokens} tokens and the model {positions} positions; shorten the prompt"
        )
    return int(positions) - prompt_tokens
