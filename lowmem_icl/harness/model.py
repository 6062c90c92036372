"""The model as lm-evaluation-harness calls it: tokens as its `hf` has them, all requests in one sweep."""

import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import jinja2
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import (
    get_rolling_token_windows,
    make_disjoint_window,
    simple_parse_args_string,
)
from transformers import AutoTokenizer

from lowmem_icl import __version__
from lowmem_icl.api.open_model import OpenModel, open_model
from lowmem_icl.engine.fills import Fills
from lowmem_icl.engine.schedule import Job
from lowmem_icl.errors import InputError, LowmemIclError
from lowmem_icl.harness.arguments import ModelArguments, check_alone, checked_arguments, logger
from lowmem_icl.harness.registration import MODEL_NAME
from lowmem_icl.harness.requests import TokenRequest, pack_requests
from lowmem_icl.masks.given import misfits, tables_of
from lowmem_icl.masks.mask import Mask

P = ParamSpec("P")
R = TypeVar("R")

Answer = tuple[float, bool]


def runs_the_command() -> bool:
    """Tell whether the process is lm-eval's command, and not a program that calls its functions."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return "lm_eval.__main__" in sys.modules or getattr(spec, "name", None) == "lm_eval.__main__"


def in_one_message(function: Callable[P, R]) -> Callable[P, R]:
    """End lm-eval's command with our errors' message alone, where it would print a traceback."""

    @wraps(function)
    def called(*arguments: P.args, **named: P.kwargs) -> R:
        try:
            return function(*arguments, **named)
        except LowmemIclError as error:
            if not runs_the_command():
                raise
            raise SystemExit(f"{MODEL_NAME}: {error}") from None

    return called


@register_model(MODEL_NAME)
class StreamedLM(TemplateLM):  # type: ignore[misc]
    """A model whose layers are streamed from its store, with or without a mask, for lm-evaluation-harness.

    Keyword arguments are those of `--model_args`: `model`, `store` or `pretrained`; `weights`, `memory`,
    `device`, `device_memory`, `revision`, `store_dir`; `mask`, a mask file; `bos`, whether texts begin with
    BOS where the tokenizer's own way is not wanted; `max_length`, the most tokens seen at once. Texts become
    tokens as by the harness's `hf`. Raises InputError naming an argument that is wrong.
    """

    @in_one_message
    def __init__(self, **given: Any) -> None:
        super().__init__()
        check_alone()
        arguments = checked_arguments(given)
        self.open: OpenModel = open_model(arguments.model, **arguments.opening)
        # The harness never closes a model.
        weakref.finalize(self, self.open.close)
        self.tokenizer = _tokenizer(self.open, arguments.bos)
        self._arguments = arguments
        self._device = torch.device("cpu" if self.open.options.device in ("auto", "cpu") else "cuda")
        self.max_length = _max_length(self.open, arguments)
        self._mask, self._fills = _fitted_mask(self.open, arguments)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> "StreamedLM":
        """Return the model of arguments; what --model_args says goes before the harness's own flags.

        The harness says cuda where nobody named a device.
        """
        given = {**(additional_config or {}), **arg_dict}
        is_theirs = "device" not in arg_dict and str(given.get("device")).startswith("cuda")
        if is_theirs and not torch.cuda.is_available():
            logger.info("no CUDA device here: computing on the CPU")
            given["device"] = "cpu"
        return cls(**given)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> "StreamedLM":
        """Return the model of arguments as one text, `model=demo,memory=6GB`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.open.limits.empty_context

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context: BOS, or what ends a text where there is none."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """What tells its tokenizer from others in the harness's caches of requests."""
        source = self.open.store.manifest.source
        return f"{source.id}-{self.open.store.manifest.digest[:12]}".replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return a text's tokens; BOS is not put before a text that begins with it."""
        if add_special_tokens is None:
            add_special_tokens = self._arguments.bos
            if string.startswith(self.tokenizer.decode(self.prefix_token_id)):
                add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **special))

    @in_one_message
    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return messages as one text by the tokenizer's template; without the system's where that fails.

        Raises InputError where there is no template.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError(
                "--apply_chat_template: the model's tokenizer has no chat template; leave it out"
            )

        def templated(history: list[dict[str, str]]) -> str:
            text: str = self.tokenizer.apply_chat_template(
                history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
            return text

        try:
            return templated(chat_history)
        except jinja2.TemplateError:
            return templated([message for message in chat_history if message["role"] != "system"])

    @in_one_message
    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Answer]:
        """Return of every continuation its log-probability after its context, in nats, and whether the model
        would write it.
        """
        answers: list[Answer] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return answers

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **unused: Any,
    ) -> list[Answer]:
        tokens = [TokenRequest(tuple(context), tuple(answer)) for _, context, answer in requests]
        texts = [pair for pair, *_ in requests]
        for (before, text), request in zip(texts, tokens, strict=True):
            if not 0 < len(request.continuation) <= self.max_length:
                raise InputError(
                    f"the continuation {text[:40]!r} has {len(request.continuation)} tokens of its own after "
                    f"{before[-40:]!r}; expected 1 to {self.max_length}, what the model sees at once"
                )
        answers = self._scored(tokens, progress=not disable_tqdm)
        for pair, answer in zip(texts, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, answer)
        return answers

    @in_one_message
    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of every text, in nats, in windows as the harness cuts them."""
        windows = [self._windows(*request.args) for request in requests]
        every = [window for of_text in windows for window in of_text]
        answers = iter(self._scored(every, progress=not disable_tqdm))
        totals: list[float] = []
        for request, of_text in zip(requests, windows, strict=True):
            totals.append(sum(next(answers)[0] for _ in of_text))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    @in_one_message
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Raise InputError: texts are scored here, not written."""
        names = sorted({str(request.task_name) for request in requests})
        raise InputError(
            f"--tasks {','.join(names)}: scored by generate_until, which needs a model that writes; choose "
            "tasks of multiple_choice, loglikelihood or loglikelihood_rolling"
        )

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness's results say of the model."""
        manifest, mask = self.open.store.manifest, self._arguments.mask
        return {
            "model_source_id": manifest.source.id,
            "model_weights": manifest.weights,
            "model_digest": manifest.digest,
            "mask": None if mask is None else mask.name,
            "heads_removed": len(self._mask.heads),
            "ffns_removed": len(self._mask.ffns),
            "max_length": self.max_length,
            "lowmem_icl_version": __version__,
        }

    def _windows(self, text: str) -> list[TokenRequest]:
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [TokenRequest(*map(tuple, make_disjoint_window(window))) for window in windows]

    def _scored(self, requests: Sequence[TokenRequest], *, progress: bool) -> list[Answer]:
        """Return the answers to requests, all of them scored in one sweep over the layers."""
        if not requests:
            return []
        packed = pack_requests(requests, self.max_length, self.open.limits.row_tokens)
        job = Job(packed.packed, (self._mask,), self._fills)
        (scores,) = self.open.sweep([job], progress)
        return [
            (float(scores.logprobs[0, option]), bool(scores.greedy[0, option])) for option in packed.options
        ]


def _tokenizer(model: OpenModel, bos: bool | None) -> Any:
    """Return the model's tokenizer, which puts BOS before texts, or not, where that is asked for."""
    if bos is None:
        return model.tokenizer
    return AutoTokenizer.from_pretrained(Path(model.store.tokenizer_folder), add_bos_token=bos)


def _max_length(model: OpenModel, arguments: ModelArguments) -> int:
    most = model.skeleton.context_tokens
    if arguments.max_length is not None and arguments.max_length > most:
        raise InputError(
            f"--model_args max_length: expected at most {most}, the model's context, "
            f"got {arguments.max_length}"
        )
    return arguments.max_length or most


def _fitted_mask(model: OpenModel, arguments: ModelArguments) -> tuple[Mask, Fills]:
    """Return the removed units and what stands in their place; raise InputError for a mask of other shape."""
    mask = arguments.mask
    if mask is None:
        return Mask(), {}
    origin = mask.origin
    assert origin is not None, "it was read from a file"
    skeleton = model.skeleton
    for warning in misfits([origin], model.mask_model, (skeleton.attention_width, skeleton.width)):
        logger.warning(warning)
    return mask.units, tables_of([origin])
