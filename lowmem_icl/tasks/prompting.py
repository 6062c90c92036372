"""A row to its texts, as lm-eval writes them: as it is scored, and as its gradients are taken."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

from lm_eval.api.samplers import ContextSampler
from lm_eval.api.task import ConfigurableTask

from lowmem_icl import protocols
from lowmem_icl.errors import InputError
from lowmem_icl.tasks.documents import OptionTexts
from lowmem_icl.tasks.sources import ROW_ERRORS

Row = dict[str, Any]


class Prompt(NamedTuple):
    """A document's options as (context, continuation), in the order of the hub's labels; which are right."""

    options: OptionTexts
    gold: tuple[bool, ...]


@dataclass(frozen=True)
class PromptKey:
    """What a prompt of a task depends on: whose row it is and from which split, the rows shown before
    it, and its form.

    `answers`: the rows whose answers are shown, one per demonstration; empty where each shows its own.
    `query`: the row that is asked in this one's place, whose options stay this one's; None where it is asked
    itself.
    """

    member: int
    from_train: bool
    index: int
    demonstrations: tuple[int, ...]
    for_gradients: bool = False
    answers: tuple[int, ...] = ()
    query: int | None = None


@dataclass(frozen=True)
class PromptRequest:
    """A row that is to be prompted, with all that lm-eval needs; `key` tells it from others of its task.

    `shown`: the rows that demonstrations are of, by index; `part`: how a message calls the split; `query`:
    the row that is asked in its place, if any.
    """

    key: PromptKey
    part: str
    task: ConfigurableTask = field(repr=False)
    row: Row = field(repr=False)
    shown: Callable[[int], Row] = field(repr=False)
    protocol: protocols.Protocol
    query: Row | None = field(default=None, repr=False)

    @property
    def has_gradient_form(self) -> bool:
        """Whether gradients are taken of a prompt that differs from the scored one."""
        bare = self.protocol.bare_continuations and self.task.config.task in protocols.BARE_TASKS
        return self.part == "train" and (bare or self.protocol.first_answer_only)


class Prompter(Protocol):
    """Gives the prompts of rows; whether texts are made now or were kept from before is its own affair."""

    def prompts(self, requests: Sequence[PromptRequest]) -> list[Prompt]:
        """Return the prompt of every request."""
        ...

    def fits(self, prompt: Prompt) -> bool:
        """Tell whether all options fit the model's context whole."""
        ...


class MeasuringPrompter(Prompter, Protocol):
    """A prompter that knows how long prompts are."""

    def context_tokens(self, prompt: Prompt) -> int:
        """Return the tokens of the first option's context, without BOS and before anything is cut."""
        ...


@dataclass(frozen=True)
class DirectPrompter:
    """Makes prompts when they are asked for; `fits_context` tells whether options fit the model's context."""

    fits_context: Callable[[OptionTexts], bool] = lambda options: True

    def prompts(self, requests: Sequence[PromptRequest]) -> list[Prompt]:
        """Return the prompt of every request."""
        return [all_forms(request)[request.key] for request in requests]

    def fits(self, prompt: Prompt) -> bool:
        """Tell whether all options fit the model's context whole."""
        return self.fits_context(prompt.options)


DIRECT_PROMPTER = DirectPrompter()


def all_forms(request: PromptRequest) -> dict[PromptKey, Prompt]:
    """Return a row's prompt by key, as it is scored and as its gradients are taken.

    Raises InputError for a row that lacks a field or has it in another form.
    """
    key = replace(request.key, for_gradients=False)
    scored = _scored_prompt(request)
    forms = {key: scored}
    if request.has_gradient_form:
        forms[replace(key, for_gradients=True)] = _gradient_prompt(request, scored)
    return forms


class _DrawnSampler(ContextSampler):  # type: ignore[misc]
    """Hands lm-eval the demonstrations that were drawn for the document at hand."""

    drawn: Sequence[Row] = ()

    def sample(self, n: int, eval_doc: Any = None, df: Any = None, **_: Any) -> Sequence[Row]:
        return self.drawn


def _scored_prompt(request: PromptRequest) -> Prompt:
    task, row = request.task, request.row
    if task.config.task in protocols.BARE_DEMONSTRATION_TASKS:
        bare = request.protocol.bare_continuations
        task.fewshot_cfg.target_delimiter = "" if bare else task.config.target_delimiter
    try:
        context = _context(request)
        rendered = task.construct_requests(row, context)
        label = _label(task, row)
    except ROW_ERRORS as error:
        raise _malformed(request, repr(error)) from error
    listed = rendered if isinstance(rendered, list) else [rendered]
    options = tuple((option.args[0], option.args[1]) for option in listed)
    right = label if isinstance(label, list) else [label]
    if not right or not all(isinstance(index, int) and 0 <= index < len(options) for index in right):
        raise _malformed(request, f"no right option among {len(options)}: label {label!r}")
    return Prompt(options, tuple(index in right for index in range(len(options))))


def _context(request: PromptRequest) -> Any:
    """Return what lm-eval puts before a row's continuations, the answers asked for in its demonstrations."""
    task = request.task
    asked = request.row if request.query is None else request.query
    demonstrations = [request.shown(index) for index in request.key.demonstrations]
    others = [request.shown(index) for index in request.key.answers]
    sampler = _DrawnSampler()
    sampler.drawn = demonstrations
    task.sampler = sampler
    if not others:
        return task.fewshot_context(asked, len(demonstrations))
    with_answer_of = with_answer_of_another(task)
    if with_answer_of is not None:
        sampler.drawn = [
            with_answer_of(row, other) for row, other in zip(demonstrations, others, strict=True)
        ]
        return task.fewshot_context(asked, len(demonstrations))
    answers = {id(row): _shown_answer(task, other) for row, other in zip(demonstrations, others, strict=True)}
    own = task.fewshot_cfg.doc_to_target
    task.fewshot_cfg.doc_to_target = lambda row: answers[id(row)]
    try:
        return task.fewshot_context(asked, len(demonstrations))
    finally:
        task.fewshot_cfg.doc_to_target = own


def with_answer_of_another(task: ConfigurableTask) -> Callable[[Row, Row], Row] | None:
    """Return how a task's definition gives a row the answer of another one; None where it does not say."""
    found: Callable[[Row, Row], Row] | None = (task.config.metadata or {}).get("with_answer_of")
    return found


def answer_as_shown(task: ConfigurableTask, row: Row, before: Row) -> str:
    """Return the text that a row's answer has as a demonstration's; where a definition says how a row gets
    the answer of another one, the text that the row `before` has with it.

    Raises InputError for a row that lacks a field.
    """
    with_answer_of = with_answer_of_another(task)
    try:
        return _shown_answer(task, row if with_answer_of is None else with_answer_of(before, row))
    except ROW_ERRORS as error:
        raise InputError(
            f"task {task.config.task}: a row that demonstrations come from does not have the expected fields "
            f"({error!r}): {str(row)[:60]}"
        ) from error


def _shown_answer(task: ConfigurableTask, row: Row) -> str:
    """Return the text that a row shows as its answer where it is a demonstration."""
    shown = task.fewshot_cfg
    choices = task.doc_to_choice(row, shown.doc_to_choice) if shown.doc_to_choice else None
    turn = task.build_qa_turn(q="", c=choices, a=task.doc_to_target(row, shown.doc_to_target))
    return str(turn[-1].content)


def _label(task: ConfigurableTask, row: dict[str, Any]) -> Any:
    """Return the index of a row's right option, or a list of them, from lm-eval's definition."""
    gold_options = (task.config.metadata or {}).get("gold_options")
    if gold_options is not None:
        return gold_options(row)
    if task.OUTPUT_TYPE == "loglikelihood":
        return 0
    label = task.doc_to_text(row) if task.multiple_input else task.doc_to_target(row)
    return task.doc_to_choice(row).index(label) if isinstance(label, str) else label


def _malformed(request: PromptRequest, cause: str) -> InputError:
    return InputError(
        f"task {request.task.config.task}, row {request.key.index + 1} of its {request.part} rows "
        f"does not have the expected fields ({cause})"
    )


def _gradient_prompt(request: PromptRequest, scored: Prompt) -> Prompt:
    """Return the prompt whose gold option is differentiated where that is not the scored one."""
    options, gold = scored
    if request.protocol.first_answer_only and sum(gold) > 1:
        gold = _first_answer(request, scored)
    if request.protocol.bare_continuations and request.task.config.task in protocols.BARE_TASKS:
        options = tuple((context, text.removeprefix(" ")) for context, text in options)
    return Prompt(options, gold)


def _first_answer(request: PromptRequest, scored: Prompt) -> tuple[bool, ...]:
    """Return flags of the one gold option that the row would show as a demonstration."""
    task = request.task
    try:
        target = task.doc_to_target(request.row, task.fewshot_cfg.doc_to_target)
    except ROW_ERRORS as error:
        raise _malformed(request, repr(error)) from error
    shown = f"{task.config.target_delimiter}{target}"
    first = tuple(
        is_gold and text == shown for is_gold, (_, text) in zip(scored.gold, scored.options, strict=True)
    )
    # Where a definition shows something else, every accepted option stays.
    return first if any(first) else scored.gold
