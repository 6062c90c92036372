"""What somebody may have meant by a name that is not known."""

import difflib
from collections.abc import Iterable

# Names that are not alike but mean the same.
SYNONYMS = {
    "gpu": "cuda",
    "8bit": "int8",
    "4bit": "nf4",
    "int4": "nf4",
    "fp4": "nf4",
    "bf16": "bfloat16",
    "fp32": "float32",
    "float": "float32",
    "float16": "bfloat16",
    "fp16": "bfloat16",
    "half": "bfloat16",
}
# What lm-eval's options are for that have no counterpart of the same form, by their names without dashes.
LM_EVAL_REMARKS = {
    "model_args": "give what lm-eval has as pretrained=NAME as --model NAME, revision= as --revision",
    "batch_size": "--memory decides how many rows are computed together",
    "max_batch_size": "--memory decides how many rows are computed together",
    "log_samples": "answers.parquet in the run folder holds every answer's score",
    "use_cache": "a run folder continues by itself",
}
# With less, tpu is taken for cpu.
LEAST_LIKE = 0.7


def nearest(name: str, known: Iterable[str], *, least_like: float = LEAST_LIKE) -> str | None:
    """Return the known name that was probably meant; None where none is near."""
    names = list(known)
    if SYNONYMS.get(name.lower()) in names:
        return SYNONYMS[name.lower()]
    by_lower_case = {each.lower(): each for each in names}
    close = difflib.get_close_matches(name.lower(), by_lower_case, n=1, cutoff=least_like)
    return by_lower_case[close[0]] if close else None


def lm_eval_remark(name: str) -> str:
    """Return what is there in place of an option of lm-eval's, after a semicolon; empty for other names."""
    remark = LM_EVAL_REMARKS.get(name.lstrip("-").replace("-", "_"))
    return "" if remark is None else f"; {remark}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for a name that is not known; empty where none is near."""
    near = nearest(name, known)
    return "" if near is None else f"; did you mean '{near}'?"
