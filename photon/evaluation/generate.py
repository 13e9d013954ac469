"""Text from a trained model."""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from photon.errors import PhotonError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: A temperature up to which the likeliest token is taken: others have no chance, and logits become infinite.
COLDEST = 1e-4


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
    if max_new_tokens < 1 or top_k < 1:
        raise PhotonError(f"max_new_tokens={max_new_tokens}, top_k={top_k}: both must be at least 1")
    check_temperature(temperature)
    import torch
    from transformers import GenerationConfig

    from photon.evaluation.iterations import iterating
    from photon.models.pretrained import load_pretrained, quiet_transformers

    tokenizer = load_tokenizer(export)
    model = torch.nn.Module.to(load_pretrained(export), device).eval()
    start = _encoded(prompt, tokenizer, model, export)
    settings = GenerationConfig(
        max_new_tokens=min(max_new_tokens, _room(model, len(start))),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        **({"do_sample": True, "temperature": temperature, "top_k": top_k} if temperature > COLDEST else {}),
    )
    input_ids = torch.tensor([start], device=device)
    passes = nullcontext() if iterations is None else iterating(model, iterations)
    with passes, torch.random.fork_rng(), torch.no_grad(), quiet_transformers():
        torch.manual_seed(seed)
        try:
            output: Any = model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                generation_config=settings,
                use_cache=True,
            )
        except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise cannot_write(export, model, error) from error
    # A character may be split between tokens, so prompt and continuation are decoded together.
    text: str = tokenizer.decode(output[0], skip_special_tokens=True)
    return text


def _encoded(prompt: str, tokenizer: Any, model: "PreTrainedModel", export: Path) -> list[int]:
    if not is_text(prompt):
        raise PhotonError("prompt: it has bytes that are no UTF-8; give it as text")
    start: list[int] = tokenizer.encode(prompt, add_special_tokens=False)
    start = start or _document_start(tokenizer, export)
    if max(start) >= model.config.vocab_size:
        raise PhotonError(
            f"{export}: its tokenizer has the token {max(start)}, and the model {model.config.vocab_size} "
            "of them; they are not of one model, so export it again"
        )
    return start


def check_temperature(temperature: float) -> None:
    """Check that a temperature is one.

    Raises
    ------
    PhotonError
        If it is not.
    """
    if not 0 <= temperature < math.inf:
        raise PhotonError(f"temperature={temperature}: it must be at least 0, and finite")


def is_text(text: str) -> bool:
    """Return whether a text can be written down: half of a character, or a byte that is none, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def cannot_write(export: Path, model: "PreTrainedModel", error: Exception) -> PhotonError:
    """Return what is said of a model in which writing ends with an error."""
    import torch

    if not all(bool(torch.isfinite(weight).all()) for weight in model.parameters()):
        return PhotonError(
            f"{export}: has weights that are no finite numbers, so it cannot write; take an earlier round, "
            "or export it again"
        )
    return PhotonError(
        f"{export}: cannot write ({str(error).strip().partition(chr(10))[0]:.200}); look at its "
        "generation_config.json"
    )


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
    from photon.models.pretrained import positions_of

    positions = positions_of(model.config)
    if positions is None:
        return 1 << 30
    if prompt_tokens >= positions:
        raise PhotonError(
            f"the prompt has {prompt_tokens} tokens and the model {positions} positions; shorten the prompt"
        )
    return int(positions) - prompt_tokens
