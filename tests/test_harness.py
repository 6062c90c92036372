"""The tool as a model of lm-evaluation-harness: equal to the harness's own `hf` on the same requests."""

import random
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import make_checkpoint
from demo_scores import DEMO
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model, model_registry
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lowmem_icl.api.mask import Mask
from lowmem_icl.errors import InputError
from lowmem_icl.export.applied import applied
from lowmem_icl.harness import requests as packing
from lowmem_icl.harness.model import StreamedLM
from lowmem_icl.harness.registration import MODEL_NAME, register_beside_torch
from lowmem_icl.harness.requests import TokenRequest, groups_by_prefix, pack_requests
from lowmem_icl.masks.files import fill_of_table, read_mask, write_mask
from lowmem_icl.masks.mask import Mask as MaskUnits
from lowmem_icl.masks.means import UnitMeans
from lowmem_icl.tasks.loading import open_task
from lowmem_icl.tasks.row_layout import OptionPath, shared_length

ROOT = Path(__file__).parents[1]
MASK = ROOT / "masks" / "demo" / "certified-category-4shot.json"
PAIRS = [
    ("the cat saw a", " dog"),
    ("the cat saw a", " wug in the"),
    ("the cat saw a dog and the cat saw", " the dog"),
    ("the cat saw a dog and the cat saw ", "the dog"),
    ("space at its end  ", "here"),
    ("no space", "between"),
    ("", "Anna saw a wug"),
    ("", " dog"),
    ("</s>the cat", " saw"),
    ("unknown § sign", " ¿que?"),
    ("the cat saw a " * 60, "dog"),
    ("the cat saw a " * 59 + "dog and the", " cat saw a wug"),
]
TEXTS = ["", "the cat", "Anna saw a wug. " * 9, "the cat saw a dog and " * 31]


def asked(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=number, metadata=("told", number, 1))
        for number, one in enumerate(arguments)
    ]


def hf(checkpoint: Path, **changes: Any) -> HFLM:
    return HFLM(pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=4, **changes)


@pytest.fixture(scope="module")
def opt_checkpoint(opt_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random OPT with OPT's own tokenizer, which puts </s> before every text."""
    folder = tmp_path_factory.mktemp("opt")
    make_checkpoint(folder, vocab_size=50272)
    shutil.copytree(opt_tokenizer, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def lm(stores: Path) -> StreamedLM:
    return StreamedLM(model="demo", weights="float32", store_dir=str(stores))


def assert_equal(found: Sequence[tuple[float, bool]], expected: Sequence[tuple[float, bool]]) -> None:
    np.testing.assert_allclose([value for value, _ in found], [value for value, _ in expected], atol=1e-4)
    assert [flag for _, flag in found] == [flag for _, flag in expected]


@pytest.mark.parametrize(
    "changes", [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"max_length": 40}]
)
def test_log_likelihoods_are_those_of_hf(opt_checkpoint: Path, stores: Path, changes: dict[str, Any]) -> None:
    theirs = hf(opt_checkpoint, **changes)
    ours = StreamedLM(pretrained=str(opt_checkpoint), weights="float32", store_dir=str(stores), **changes)
    assert ours.max_length == theirs.max_length
    assert ours.prefix_token_id == theirs.prefix_token_id
    for context, continuation in PAIRS:
        if context:
            assert ours._encode_pair(context, continuation) == theirs._encode_pair(context, continuation)
    requests = asked("loglikelihood", [*PAIRS, *PAIRS[::-1]])
    assert_equal(ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True))
    texts = asked("loglikelihood_rolling", [(text,) for text in TEXTS])
    np.testing.assert_allclose(
        ours.loglikelihood_rolling(texts), theirs.loglikelihood_rolling(texts, disable_tqdm=True), rtol=1e-5
    )


def test_the_demos_are_too(lm: StreamedLM) -> None:
    theirs = hf(DEMO)
    requests = asked("loglikelihood", PAIRS)
    assert_equal(lm.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True))


def definitions(folder: Path, data: Path) -> TaskManager:
    folder.mkdir()
    rows = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {split: str(data / "arc_easy" / f"{split}.jsonl") for split in ("train", "test")}
        },
        "test_split": "test",
    }
    choice = {
        **rows,
        "training_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices.text}}",
        "doc_to_target": "{{choices.label.index(answerKey)}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    for fields in (
        {"task": "drawn", **choice},
        {"task": "same", **choice, "fewshot_config": {"sampler": "first_n"}},
        {"task": "last", **rows, "output_type": "loglikelihood", "doc_to_text": "{{question}}",
         "doc_to_target": " {{choices.text[0]}}",
         "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}]},
        {"task": "rolling", **rows, "output_type": "loglikelihood_rolling", "doc_to_text": "",
         "doc_to_target": "{{question}}",
         "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}]},
        {"task": "written", **rows, "doc_to_text": "{{question}}", "doc_to_target": "x"},
    ):  # fmt: skip
        (folder / f"{fields['task']}.yaml").write_text(yaml.safe_dump(fields))
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> TaskManager:
    return definitions(tmp_path_factory.mktemp("harness") / "tasks", shared_data)


def evaluated(model: Any, manager: TaskManager, *tasks: str, shots: int = 0, **more: Any) -> dict[str, Any]:
    found = simple_evaluate(
        model=model, tasks=list(tasks), num_fewshot=shots, limit=6, task_manager=manager,
        bootstrap_iters=0, **more,
    )  # fmt: skip
    assert found is not None
    return dict(found)


@pytest.mark.filterwarnings("ignore")
def test_every_number_of_the_harness_is_that_of_hf(
    opt_checkpoint: Path, stores: Path, manager: TaskManager, tmp_path: Path
) -> None:
    """Demonstrations that documents share among these, responses that are cached, samples that are logged."""
    theirs = hf(opt_checkpoint)
    ours = StreamedLM(pretrained=str(opt_checkpoint), weights="float32", store_dir=str(stores))
    for shots, tasks in ((0, ["drawn", "last", "rolling"]), (2, ["drawn", "same"])):
        cache = {"use_cache": str(tmp_path / f"cache{shots}")}
        expected = evaluated(theirs, manager, *tasks, shots=shots)
        found = evaluated(ours, manager, *tasks, shots=shots, **cache)
        for task in tasks:
            for name, value in expected["results"][task].items():
                if isinstance(value, float):
                    assert found["results"][task][name] == pytest.approx(value, rel=1e-4), (task, name)
            for sample, their in zip(found["samples"][task], expected["samples"][task], strict=True):
                assert sample["arguments"] == their["arguments"]
        before, ours.open.sweep = ours.open.sweep, None  # type: ignore[method-assign, assignment]
        again = evaluated(ours, manager, *tasks, shots=shots, **cache)
        ours.open.sweep = before  # type: ignore[method-assign]
        assert again["results"] == found["results"]
    assert found["config"]["model_weights"] == "float32"
    with pytest.raises(InputError, match="--tasks written: scored by generate_until"):
        evaluated(ours, manager, "written")


def test_a_mask_removes_what_evaluate_removes(stores: Path, lm: StreamedLM) -> None:
    """The demo's tokenizer gives the same tokens to texts together and apart."""
    masked = StreamedLM(model="demo", weights="float32", store_dir=str(stores), mask=str(MASK))
    mask = Mask.read(MASK)
    rows = open_task("category", None).rows(shots=4, part="evaluate", limit=6)
    options = [option for document in rows.documents for option in document.options]
    requests = asked("loglikelihood", options)
    from lowmem_icl.engine.schedule import Job
    from lowmem_icl.session.text_form import text_tokeniser
    from lowmem_icl.tasks.packing import pack

    packed = pack(rows, text_tokeniser(lm.tokenizer), lm.open.limits)
    (scores,) = lm.open.sweep([Job(packed.packed, (Mask().units, mask.units))], progress=False)
    for model, row in ((lm, 0), (masked, 1)):
        answers = list(zip(scores.logprobs[row].tolist(), scores.greedy[row].tolist(), strict=True))
        assert_equal(model.loglikelihood(requests), answers)
    assert np.abs(scores.logprobs[0] - scores.logprobs[1]).max() > 0.1
    info = masked.get_model_info()
    assert (info["mask"], info["heads_removed"]) == (mask.name, len(mask.heads))


def test_a_mask_of_means_is_hfs_model_with_the_mask_applied(stores: Path, tmp_path: Path) -> None:
    source, rng = read_mask(MASK), np.random.default_rng(3)
    heads, ffns = (rng.normal(0, 0.3, (4, 192)).astype(np.float32) for _ in range(2))
    means = UnitMeans(heads, ffns)
    mask = MaskUnits(frozenset({(0, 1), (2, 3), (3, 0)}), frozenset({1}), fill_of_table(means))
    write_mask(tmp_path / "means.json", replace(source, name="means", mask=mask, means=means))
    ours = StreamedLM(
        model="demo", weights="float32", store_dir=str(stores), mask=str(tmp_path / "means.json")
    )
    theirs, requests = hf(DEMO), asked("loglikelihood", PAIRS)
    clean = theirs.loglikelihood(requests, disable_tqdm=True)
    with applied(mask, theirs.model, means):
        expected = theirs.loglikelihood(requests, disable_tqdm=True)
    assert_equal(ours.loglikelihood(requests), expected)
    assert max(abs(one - other) for (one, _), (other, _) in zip(clean, expected, strict=True)) > 0.1


def test_a_continuation_must_fit_and_have_tokens_of_its_own(opt_checkpoint: Path, stores: Path) -> None:
    """Where tokens of both texts together run over from one to the other, `hf` fails too."""
    model = StreamedLM(pretrained=str(opt_checkpoint), weights="float32", store_dir=str(stores))
    for pair, count in ((("no space bet", "ween"), 0), (("a", " b" * 97), 97)):
        with pytest.raises(InputError, match=f"has {count} tokens of its own after .*; expected 1 to 96"):
            model.loglikelihood(asked("loglikelihood", [pair]))


def test_results_do_not_depend_on_what_else_is_asked(lm: StreamedLM) -> None:
    together = lm.loglikelihood(asked("loglikelihood", PAIRS))
    for pair, answer in zip(PAIRS, together, strict=True):
        assert_equal(lm.loglikelihood(asked("loglikelihood", [pair])), [answer])


def test_equal_requests_are_scored_once_and_shared_beginnings_go_through_once() -> None:
    stem = tuple(range(300))
    requests = [TokenRequest((*stem, 400 + n), (500 + option,)) for n in range(5) for option in range(3)]
    packed = pack_requests([*requests, *requests], 2048, 128)
    assert packed.options[:15] == packed.options[15:]
    assert packed.packed.option_count == 15
    assert packed.packed.token_count == 300 + 5, "options of one token are read after their context"
    alone = pack_requests([TokenRequest((1, 2), (n,)) for n in range(4)], 2048, 128)
    assert alone.packed.token_count == 2


def partitions(items: list[int]) -> list[list[list[int]]]:
    if not items:
        return [[]]
    first, *rest = items
    found = []
    for inner in partitions(rest):
        found.append([[first], *inner])
        found += [[*inner[:n], [first, *inner[n]], *inner[n + 1 :]] for n in range(len(inner))]
    return found


def test_groups_save_nearly_all_that_any_partition_could(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "SHORTEST_STEM_TOKENS", 1)
    rng, ratios = random.Random(0), []
    for _ in range(120):
        base = [rng.randrange(2) for _ in range(9)]
        cuts = [rng.randrange(9) for _ in range(rng.randint(2, 6))]
        tokens = sorted({tuple(base[:cut] + [rng.randrange(2) for _ in range(9 - cut)]) for cut in cuts})
        documents = [[OptionPath(n, n, path, (0,))] for n, path in enumerate(tokens)]

        def saved(groups: Sequence[Sequence[int]], tokens: Sequence[tuple[int, ...]] = tokens) -> int:
            return sum((len(group) - 1) * shared_length([tokens[n][:-1] for n in group]) for group in groups)

        found = [[paths[0].number for paths in group] for group in groups_by_prefix(documents)]
        assert sorted(n for group in found for n in group) == list(range(len(tokens)))
        best = max(map(saved, partitions(list(range(len(tokens))))))
        ratios.append(saved(found) / best if best else 1.0)
    assert min(ratios) > 0.8
    assert np.mean(np.array(ratios) == 1) > 0.95


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "expected one of model, store, pretrained .* got none"),
        ({"model": "demo", "store": "x"}, "got model and store"),
        ({"model": "demo", "memry": "3GB"}, "memry: lowmem-icl has no such argument; did you mean 'memory'"),
        ({"model": "demo", "dtype": "float16"}, "dtype: .*; give weights=int8, bfloat16 or float32"),
        ({"model": "demo", "trust_remote_code": True}, "give a model of a known family"),
        ({"model": "demo", "bos": "yes"}, "bos: expected True or False, got 'yes'"),
        ({"model": "demo", "bos": True, "add_bos_token": True}, "got bos and add_bos_token"),
        (
            {"model": "demo", "max_length": 4096},
            "max_length: expected at most 512, the model's context, got 4096",
        ),
        ({"model": "demo", "max_length": "long"}, "max_length: expected a number of tokens"),
        ({"model": "demo", "mask": "/nowhere.json"}, r"mask /nowhere\.json: cannot be read"),
        ({"store": "/nowhere"}, "/nowhere does not exist"),
        ({"model": "demo", "weights": "int3"}, "weights: expected one of int8"),
    ],
)
def test_arguments_that_are_wrong_are_named(stores: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        StreamedLM(**given, store_dir=str(stores))


def test_what_the_harness_always_passes_does_no_harm(
    stores: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "lowmem_icl")
    flags = {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"}
    model = StreamedLM.create_from_arg_string(f"model=demo,device=cpu,store_dir={stores}", flags)
    assert (model.rank, model.world_size, model.device) == (0, 1, torch.device("cpu"))
    assert not caplog.messages
    StreamedLM.create_from_arg_obj({"model": "demo", "store_dir": str(stores)}, flags | {"batch_size": 8})
    assert "batch_size is ignored: memory= says how much is done at once" in caplog.messages
    assert ("no CUDA device here: computing on the CPU" in caplog.messages) != torch.cuda.is_available()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="expected one process, got 2"):
        StreamedLM(model="demo", store_dir=str(stores))


def test_chat_templates_are_the_tokenizers(lm: StreamedLM, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = hf(DEMO)
    with pytest.raises(InputError, match="--apply_chat_template: the model's tokenizer has no chat template"):
        lm.apply_chat_template([{"role": "user", "content": "a cat"}])
    template = (
        "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "<{{ message.role }}>{{ message.content }}{% endfor %}{% if add_generation_prompt %}<me>{% endif %}"
    )
    for model in (lm, theirs):
        monkeypatch.setattr(model.tokenizer, "chat_template", template)
    history = [{"role": "system", "content": "be"}, {"role": "user", "content": "a cat"}]
    for prompt in (True, False):
        assert lm.apply_chat_template(history, prompt) == theirs.apply_chat_template(history, prompt)
    assert lm.chat_template(True) == theirs.chat_template(True) == template
    assert "/" not in lm.tokenizer_name


def test_the_model_has_a_name_in_the_harness() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert declared["lm_eval.models"] == {MODEL_NAME: "lowmem_icl.harness.model:StreamedLM"}
    assert declared["torch.backends"] == {
        MODEL_NAME: f"{register_beside_torch.__module__}:{register_beside_torch.__name__}"
    }
    register_beside_torch()
    assert get_model(MODEL_NAME) is StreamedLM
    assert "hf" in model_registry


def test_the_hook_costs_nothing_without_the_harness() -> None:
    code = (
        # As torch finds it at the end of its own import.
        "import os, sys, types; sys.modules['torch'] = types.ModuleType('torch'); before = dict(os.environ); "
        "import lowmem_icl.harness.registration as named; named.register_beside_torch(); "
        "assert dict(os.environ) == before; assert not {'lm_eval', 'numpy', 'polars'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_command_says_what_is_wrong_in_one_line(tmp_path: Path, shared_data: Path) -> None:
    definitions(tmp_path / "tasks", shared_data)
    command = [
        sys.executable,
        "-m",
        "lowmem_icl.harness",
        "run",
        "--model",
        MODEL_NAME,
        "--model_args",
        "store=/no",
    ]
    command += ["--tasks", "drawn", "--include_path", str(tmp_path / "tasks"), "--limit", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "lowmem-icl: model: folder /no does not exist"
    assert "Traceback" not in done.stderr
