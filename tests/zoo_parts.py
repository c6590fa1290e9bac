"""What the families of `zoo.py` share: tokenizers, chat templates, sizes, and weights that let every input count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SIDE, PATCH = 32, 8  # pixels: a picture is 4 x 4 patches
HIDDEN = 32
# Enough English for the commonest words to be single tokens; everything else is spelled.
CORPUS = """a picture of the big red apple on the left and the small blue car on the right
two cats and three dogs sit next to a green tree at the top of the picture
what is there in the middle of this image ? describe the picture in detail .
there are four yellow stars above a white house with no background at the bottom
user assistant question answer short caption describe image photo of an animal""".splitlines()


@dataclass(frozen=True)
class Family:
    """One architecture: `build` saves a checkpoint and its processor into an empty folder.

    marker: what a plain prompt must hold for each picture; "" where the processor places it, or nothing does.
    packages: what its processor wants besides torchvision.
    """

    name: str
    build: Callable[[Path], None]
    needs_torchvision: bool
    chat: bool
    notes: str
    marker: str = ""
    packages: tuple[str, ...] = ()


FAMILIES: dict[str, Family] = {}
Builder = Callable[[Path], None]


def family(
    name: str, notes: str, *, torchvision: bool = False, chat: bool = False, marker: str = "",
    packages: tuple[str, ...] = (),
) -> Callable[[Builder], Builder]:  # fmt: skip
    """Enters the decorated builder into `FAMILIES`."""

    def register(build: Builder) -> Builder:
        FAMILIES[name] = Family(name, build, torchvision, chat, notes, marker, packages)
        return build

    return register


@lru_cache(maxsize=1)
def _pieces() -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Vocabulary and merges of a byte-level BPE: what it encodes, it decodes to the byte."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    vocabulary = backend.get_vocab()
    merges: list[tuple[str, str]] = []
    for piece in sorted(vocabulary, key=vocabulary.__getitem__)[256:]:  # each later piece joins two earlier ones
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        merges.append(next(s for s in splits if all(vocabulary.get(p, len(vocabulary)) < vocabulary[piece] for p in s)))
    return tuple(sorted(vocabulary, key=vocabulary.__getitem__)), tuple(merges)


def tokenizer(
    first: Sequence[str], last: Sequence[str] = (), *, single: str = "$A", side: str = "left", **names: Any
) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose special tokens have the first and the last ids.

    single: how one text is framed, as "<s> $A"; names: what they are for, as pad_token or extra_special_tokens.
    """
    pieces, merges = _pieces()
    vocabulary = {piece: i for i, piece in enumerate([*first, *pieces, *last])}
    backend = Tokenizer(models.BPE(vocabulary, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    _frame(backend, single)
    return _wrapped(backend, [*first, *last], side, names)


def word_pieces(side: str = "right") -> PreTrainedTokenizerFast:
    """BERT's kind, lower-cased, with [CLS] before a text and [SEP] after it."""
    special = ["[PAD]", "[unused0]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,?!'-:;()"
    words = dict.fromkeys(word for line in CORPUS for word in line.split() if len(word) > 1)
    pieces = [*special, *letters, *(f"##{letter}" for letter in letters), *words]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    _frame(backend, "[CLS] $A [SEP]")
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return _wrapped(backend, special, side, {f"{name}_token": token for name, token in names.items()})


def sentence_pieces(special: Sequence[str], side: str = "left", **names: Any) -> PreTrainedTokenizerFast:
    """SentencePiece's kind: a mark for a space before every text, even one that opens with a special token."""
    letters = sorted({*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,?!'-:;()\n▁"})
    words = dict.fromkeys(f"▁{word}" for line in CORPUS for word in line.split() if len(word) > 1)
    pieces = [*((token, 0.0) for token in special), *((letter, -9.0) for letter in letters)]
    pieces += [(word, -5.0) for word in words]
    backend = Tokenizer(models.Unigram(pieces, unk_id=special.index("<unk>")))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side=side, model_max_length=1024, **names)


def _frame(backend: Tokenizer, single: str) -> None:
    tokens = [token for token in single.split() if token != "$A"]
    if tokens:
        ids = [(token, backend.token_to_id(token)) for token in dict.fromkeys(tokens)]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)


def _wrapped(backend: Tokenizer, special: list[str], side: str, names: dict[str, Any]) -> PreTrainedTokenizerFast:
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side=side, model_max_length=1024, **names)


def template(image: str, user: str, assistant: str, end: str = "", start: str = "") -> str:
    """A chat template: `start`, then each message as its role's opening, its pictures and texts in order, and `end`."""
    # As expressions: a template's own line ends and spaces next to its tags would be trimmed.
    image, user, assistant, end, start = (
        f"{{{{ {part!r} }}}}" if part else "" for part in (image, user, assistant, end, start)
    )
    part = f"{{% if part['type'] == 'image' %}}{image}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}"
    return (
        f"{start}{{% for message in messages %}}"
        f"{{% if message['role'] == 'user' %}}{user}{{% else %}}{assistant}{{% endif %}}"
        f"{{% if message['content'] is string %}}{{{{ message['content'] }}}}{{% else %}}"
        f"{{% for part in message['content'] %}}{part}{{% endfor %}}{{% endif %}}{end}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{assistant}{{% endif %}}"
    )


def chatml(image: str, start: str = "") -> str:
    return template(image, "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n", start)


def image_processor(name: str, **settings: Any) -> Any:
    """`name`ImageProcessor, by torchvision where it is there, else by PIL."""
    return getattr(transformers, f"{name}ImageProcessor")(**settings)


def square(side: int = SIDE) -> dict[str, int]:
    return {"height": side, "width": side}


def ids_of(words: PreTrainedTokenizerFast, *names: str) -> dict[str, int]:
    """`pad_token_id`, `eos_token_id` and so on, as configs want them."""
    return {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in names or ("pad", "bos", "eos")}


def language(words: PreTrainedTokenizerFast, kind: str = "llama", **changes: Any) -> dict[str, Any]:
    """The text config of a decoder of Llama's kind."""
    sizes = {
        "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": len(words), "max_position_embeddings": 1024,
    }  # fmt: skip
    return {"model_type": kind, **sizes, **ids_of(words), **changes}


def vision(kind: str, **changes: Any) -> dict[str, Any]:
    """The config of a tower of CLIP's or SigLIP's kind; narrower than the language model."""
    sizes = {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": SIDE, "patch_size": PATCH,
    }  # fmt: skip
    return {"model_type": kind, **sizes, **changes}


def video_processor(name: str, **settings: Any) -> Any:
    """`name`VideoProcessor, which wants torchvision and without which the family's processor does not load."""
    return getattr(transformers, f"{name}VideoProcessor")(**settings)


def save(folder: Path, kind: str, processor: Any, ids: dict[str, Any], **config: Any) -> None:
    """Draws a model of this config and saves it with its processor. ids: for `generate`."""
    save_parts(folder, AutoConfig.for_model(kind, **config), [processor], ids)


def save_parts(folder: Path, config: PretrainedConfig, parts: list[Any], ids: dict[str, Any]) -> None:
    with torch.random.fork_rng():  # what a builder draws must not depend on the tests before it, nor change those after
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config)
    stir(model)
    model.generation_config.update(**ids)
    for part in (model, *parts):
        part.save_pretrained(folder)


def stir(model: PreTrainedModel, seed: int = 0) -> None:
    """Draws every weight so that signals keep their size from pixels to logits.

    As initialised (0.02, some gates 0), a small random model hardly sees its picture and gives all tokens equal odds.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            with torch.no_grad():
                if weight.numel() == 1:  # a gate, which starts shut
                    weight.fill_(0.5)
                elif isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and name == "weight":
                    weight.normal_(std=weight[0].numel() ** -0.5, generator=generator)
                elif weight.ndim > 1:  # embeddings, positions, queries, a mixture's experts
                    weight.normal_(std=0.3, generator=generator)
                else:  # biases, and scales around their 0 or 1
                    weight.add_(torch.empty_like(weight).normal_(std=0.1, generator=generator))
