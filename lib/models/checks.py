"""What is checked of a model before anything is computed with it: its weights against their file, its
tokenizer on a paragraph, and, on a few tokens, that notebooks get from it what the model itself gives."""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from unicodedata import normalize

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..settings import UserError
from .decode import roomy_cache
from .sources import first_line

PARAGRAPH = r"""In 1989, f(x) = \frac{3x^2 - 7}{\sqrt{x + 1}} was 12,345.678 at x = 10^{-3}.

  Wait: is 20% of $450 \approx 90? "Yes", she said -- it's so.
	让我们再检查一遍。これでよい。
\[ \sum_{i=1}^{n} i = \tfrac{n(n+1)}{2} \]
"""
_tried: set[str] = set()  # configurations that this process has seen pass


def check_weights(model: PreTrainedModel, info: Mapping, what: str) -> None:
    """UserError unless every weight of the model is in its file and the reverse, all are numbers, and the
    head is the embedding where the configuration says so; ``info`` as transformers' loader gives it."""
    shapes = [f"{k} is {list(a)}, by config.json {list(b)}" for k, a, b in sorted(info["mismatched_keys"])]
    finite = lambda w: not w.numel() or all(map(torch.isfinite, w.aminmax()))
    kinds = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "of another shape": shapes,
        "not readable": list(info["error_msgs"]),
        "not finite": [k for k, w in model.named_parameters() if not finite(w)],
    }
    first = lambda keys: f"{', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
    if faults := [f"{len(ks)} weights are {kind} ({first(ks)})" for kind, ks in kinds.items() if ks]:
        raise UserError(
            f"the {what} has weights that are not those of its config.json: {'; '.join(faults)}; give a"
            " folder that save_pretrained wrote, of the model itself and not of a wrapper around it"
        )
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if tied and head is not None and not torch.equal(embedding.weight, head.weight):
        raise UserError(
            f"the {what} has a head that is not its embedding, and its config.json says that they are one:"
            " set tie_word_embeddings to false there if it was trained so"
        )


def check_files(folder: Path, model: PreTrainedModel, what: str) -> None:
    """UserError unless the safetensors of a folder are one set of weights, as floating-point numbers of 16
    bits or more: others are read as they are, without the scale that belongs to them."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() and index.is_file():
        raise UserError(f"the {what} has two sets of weights, {single.name} and {index.name}: remove one")
    names = dict(model.named_parameters())
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in names.keys() & weights.keys():
                if (kind := weights.get_slice(name).get_dtype()) not in ("F64", "F32", "F16", "BF16"):
                    raise UserError(
                        f"the {what} has {name} as {kind} in {file.name}, and no quantization_config says"
                        " what the numbers stand for: give the checkpoint that is not quantised"
                    )


def check_round_trip(tokenizers: Mapping[str, PreTrainedTokenizerBase], text: str = PARAGRAPH) -> None:
    """UserError unless a text is the same after it was ids, in each tokenizer whose vocabulary can spell it,
    and the same ids in all; but for added tokens, which may be called otherwise in another."""
    added = {str(token) for t in tokenizers.values() for token in t.added_tokens_decoder.values()}
    advice = "a tokenizer_config.json with another tokenizer_class than its tokenizer.json does this"
    for part in filter(None, re.split("|".join(map(re.escape, sorted(added))) or "(?!)", text)):
        ids = {name: t(part, add_special_tokens=False)["input_ids"] for name, t in tokenizers.items()}
        for name, tokenizer in tokenizers.items():
            unknown = getattr(tokenizer.backend_tokenizer.model, "unk_token", None) or tokenizer.unk_token
            if unknown in tokenizer.convert_ids_to_tokens(ids[name]):
                continue
            back = tokenizer.decode(ids[name], clean_up_tokenization_spaces=False)
            if normalize("NFC", back) != normalize("NFC", part):
                i = _first_difference(back, part)
                raise UserError(
                    f"the tokenizer of {name} does not give back the text that it reads: {part[i:][:12]!r}"
                    f" becomes {back[i:][:12]!r}; {advice}, or name a right one as tokenizer: of the pair"
                )
        (first, reference), *rest = ids.items()
        for name, other in rest:
            if other != reference:
                i = _first_difference(other, reference)
                ours, theirs = (tokenizers[n].decode(ids[n][i : i + 4]) for n in (first, name))
                raise UserError(
                    f"the tokenizers of {first} and {name} read one text as unlike tokens ({ours!r},"
                    f" {theirs!r}): {advice}, or name the right one for both as tokenizer: of the pair"
                )


def _first_difference(a: Sequence, b: Sequence) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def check_architecture(model: PreTrainedModel, blocks: nn.ModuleList, what: str) -> None:
    """UserError unless capture, logits from the layer on and steering with a cache give what the model itself
    gives of a text alone, on a few tokens; once for each configuration. ``blocks``: its decoder layers."""
    key = repr((type(model), model.dtype, model.config.to_dict()))
    if key in _tried:
        return
    refused = f"the {what} is a {type(model).__name__}, with which this study cannot work"
    try:
        differences = _differences(model, blocks)
    except Exception as error:  # whatever an architecture does not have
        raise UserError(f"{refused}: {first_line(error)}") from None
    limit = 1e-2 if model.dtype == torch.float32 else 0.5  # experts may be others by rounding
    if wrong := [step for step, difference in differences.items() if difference > limit]:
        raise UserError(f"{refused}: {', '.join(wrong)} gives something else than the model itself")
    _tried.add(key)


@torch.no_grad()
def _differences(model: PreTrainedModel, blocks: nn.ModuleList) -> dict[str, float]:
    """{what notebooks do: how far it is from the model on each text alone, relative}."""
    config, head, device = model.config.get_text_config(), model.get_output_embeddings(), model.device
    at = max(len(blocks) // 2 - 1, 0)
    if not isinstance(head, nn.Linear):
        raise UserError("its head is not a linear layer")
    noise = torch.Generator().manual_seed(0)
    texts = [torch.randint(config.vocab_size, (n,), generator=noise).to(device) for n in (4, 7)]
    push = torch.randn(config.hidden_size, generator=noise).to(device, model.dtype)
    caught: list[Tensor] = []

    def steer(module, args, output):
        if not isinstance(output, Tensor):
            raise UserError("a decoder layer gives more than the residual stream")
        caught.append(output)
        return output + push

    def alone(text: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(input_ids=text[None], use_cache=False).logits[0]
        return caught[-1][0], logits

    with blocks[at].register_forward_hook(steer):
        (first, a), (second, b) = map(alone, texts)
        if first.shape != (4, config.hidden_size):
            raise UserError(f"a decoder layer gives {list(first.shape)} instead of one vector a token")
        # capture: one batch, padded on the right, without a mask
        right = torch.stack([torch.nn.functional.pad(texts[0], (0, 3)), texts[1]])
        model(input_ids=right, use_cache=False)
        captured = _distance(torch.cat([caught[-1][0, :4], caught[-1][1]]), torch.cat([first, second]))
        # steering: one batch, padded on the left, token by token, until one row has left
        left = torch.stack([torch.nn.functional.pad(texts[0], (3, 0)), texts[1]])
        mask = torch.tensor([[0] * 3 + [1] * 4, [1] * 7], device=device)
        position, cache, found = (mask.cumsum(1) - 1).clamp(min=0), roomy_cache(model.config), []
        for start, stop, rows in ((0, 5, [0, 1]), (5, 6, [0, 1]), (6, 7, [1])):
            if rows == [1]:
                cache.reorder_cache(torch.tensor([1], device=device))
            inputs = dict(input_ids=left[rows, start:stop], attention_mask=mask[rows, :stop])
            inputs |= dict(position_ids=position[rows, start:stop], past_key_values=cache)
            found.append(model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1])
        steered = _distance(torch.cat(found), torch.stack([a[1], b[4], a[2], b[5], b[6]]))
    # logits: the lower layers are not run, and the head sees the last positions alone
    mask = torch.tensor([[1] * 4 + [0] * 3, [1] * 7], device=device)
    hidden = torch.stack([torch.nn.functional.pad(first, (0, 0, 0, 3)), second]) + push
    rows, columns = torch.tensor([0, 1]), torch.tensor([3, 6])
    with contextlib.ExitStack() as stack:
        for block in blocks[: at + 1]:
            stack.enter_context(_instead(block, lambda *args, **kwargs: hidden))
        pick = head.register_forward_pre_hook(lambda module, args: (args[0][rows, columns][None],))
        stack.enter_context(pick)
        logits = model(input_ids=right, attention_mask=mask).logits[0]
    given = _distance(logits, torch.stack([a[-1], b[-1]]))
    return {"capture": captured, "steering with a cache": steered, "logits from a layer on": given}


def _distance(found: Tensor, right: Tensor) -> float:
    """Relative; 0 where the model's own numbers are not finite, which the harvest says."""
    found, right = found.float(), right.float()
    return float((found - right).norm() / right.norm()) if torch.isfinite(right).all() else 0.0


@contextlib.contextmanager
def _instead(module: nn.Module, forward: Callable) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
