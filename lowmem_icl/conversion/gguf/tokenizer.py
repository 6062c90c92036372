"""The tokenizer of a GGUF file as an ordinary folder, with the rules that transformers' reader drops."""

from pathlib import Path
from typing import Any

from lowmem_icl.conversion.gguf.header import GgufHeader
from lowmem_icl.errors import InputError

RULES_OF_TRANSFORMERS = {"default", "gpt-2"}
"""Of these names nothing is lost: SentencePiece, and plain byte-level pairs."""
ADDING_BOS = {"llama-bpe", "llama3", "llama-v3"}
"""Byte-level vocabularies that llama.cpp puts a BOS before where the file does not say."""
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def adds_bos(header: GgufHeader) -> bool:
    """Tell whether texts begin with BOS; where the file does not say, by llama.cpp's rules."""
    stated = header.metadata.get("tokenizer.ggml.add_bos_token")
    if stated is not None:
        return bool(stated)
    model, rules = (header.metadata.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    return model == "llama" or rules in ADDING_BOS


def save_gguf_tokenizer(path: Path, header: GgufHeader, folder: Path) -> list[str]:
    """Write a file's tokenizer into a folder for AutoTokenizer; return what is to be said of it.

    The folder must hold config.json: AutoTokenizer looks up the tokenizer's class by it. Raises InputError.
    """
    from transformers import AutoTokenizer

    rules = str(header.metadata.get("tokenizer.ggml.pre", "default"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        restored = _restore_rules(tokenizer.backend_tokenizer, rules)
        # Also rewrites what is put around a text.
        tokenizer.add_bos_token = adds_bos(header)
        tokenizer.save_pretrained(folder)
    except Exception as error:
        # Third parties' code over a stranger's vocabulary raises anything.
        raise InputError(
            f"{path}: transformers makes no tokenizer of it ({error}); give the original checkpoint"
        ) from error
    if restored:
        return [f"tokenizer rules '{rules}': {restored}, which transformers' reader drops, is restored"]
    if rules in RULES_OF_TRANSFORMERS | _splits_of_transformers():
        return [f"tokenizer rules '{rules}', as transformers rebuilds them"]
    return [
        f"tokenizer rules '{rules}', as transformers rebuilds them: how the original splits digits and "
        "spaces may be lost"
    ]


def _splits_of_transformers() -> set[str]:
    """Return the names of rules whose splits transformers restores by itself, in versions that do."""
    try:
        from transformers.integrations.gguf import gguf_tokenizer_mapping
    except ImportError:
        return set()
    return set(getattr(gguf_tokenizer_mapping, "GGUF_PRE_TOKENIZER_SPLITS", ()))


def _restore_rules(backend: Any, rules: str) -> str:
    """Give a tokenizer of known rules what its original does before the pairs; return what that is."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    if rules == "smollm":
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        return "digits one by one"
    if rules == "qwen2":
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        return "normal form C before the split"
    return ""
