"""Plans of models too large for this machine, by config and tokenizer alone; sizes computed by hand."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
from commands import invoke
from conftest import SHARED
from test_readme_scripts import script

from lowmem_icl.options import RunOptions
from lowmem_icl.planning.measure import Rates
from lowmem_icl.session.prepare import Prepared, prepare
from lowmem_icl.tasks.documents import TaskRows

TOKENIZER = SHARED / "tokenizer" / "opt"
pytestmark = pytest.mark.skipif(not TOKENIZER.is_dir(), reason=f"no tokenizer in {TOKENIZER}")


class Size(NamedTuple):
    """Layers, heads, weights of a layer's products, the vocabulary's rows, their width, how many tables."""

    layers: int
    heads: int
    layer: int
    vocabulary: int
    width: int
    tables: int


SIZES = {
    "llama-3-70b": Size(
        80, 64, 8192 * (8192 + 2 * 8 * 128) + 8192 * 8192 + 3 * 8192 * 28672, 128256, 8192, 2
    ),
    "qwen2.5-72b": Size(
        80, 64, 8192 * (8192 + 2 * 8 * 128) + 8192 * 8192 + 3 * 8192 * 29568, 152064, 8192, 2
    ),
    "gemma-2-27b": Size(
        46, 32, 4608 * (4096 + 2 * 16 * 128) + 4096 * 4608 + 3 * 4608 * 36864, 256000, 4608, 1
    ),
}


@pytest.fixture(autouse=True)
def _no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's speed decides how long a wave is, not what is computed."""
    rates = Rates(0.1, 1e-3, 1e-3, 1e-2, 0.0, 1e-2, 1e9)
    monkeypatch.setattr("lowmem_icl.planning.plan.measure", lambda *_, **__: rates)


def tokens_and_answers(prepared: Prepared, task: TaskRows) -> tuple[int, int]:
    """Return how many tokens a task's rows have, and how many tokens of answers are read."""
    rows = prepared.outline(task).rows
    return sum(map(len, rows)), sum(len(row.reads) for row in rows)


@pytest.mark.parametrize("name", SIZES)
def test_a_large_model_is_planned_by_its_config_alone(name: str, tmp_path: Path) -> None:
    sizes = script("plan_sizes")
    folder = sizes.weightless_checkpoint(tmp_path / name, sizes.CONFIGS[name], TOKENIZER)
    flags = ["--model", folder, "--store-dir", tmp_path / "stores", "--tasks", "antonym", "--shots", 2,
             "--limit", 6, "--train-limit", 1, "--labels", "right", "--experiments", "evaluate,ablate",
             "--device", "cpu", "--memory", "4GB"]  # fmt: skip
    done = invoke("plan", "--json", *flags)
    assert done.exit_code == 0, done.output
    plan, size = json.loads(done.stdout), SIZES[name]
    stages = {stage["experiment"]: stage for stage in plan["stages"]}
    tables = 2 * size.tables * size.vocabulary * size.width
    whole = size.layers * size.layer
    assert plan["store_bytes"] == pytest.approx(whole + tables, rel=0.01)

    prepared = prepare(
        RunOptions(
            model=str(folder), store_dir=tmp_path / "stores", tasks=("antonym",), shots=(2,), limit=6,
            train_limit=1,
        )
    )  # fmt: skip
    per_answer = 2 * size.vocabulary * size.width
    tokens, answers = tokens_and_answers(prepared, prepared.evaluate[0])
    assert stages["evaluate"]["operations"] == pytest.approx(
        2 * whole * tokens + answers * per_answer, rel=0.02
    )
    tokens, answers = tokens_and_answers(prepared, prepared.train[0])
    # Removing a unit changes the layers after its own; a layer has its heads and one FFN. And the clean run.
    units = (size.heads + 1) * size.layers
    layers_run = units * (size.layers - 1) // 2 + size.layers
    expected = 2 * layers_run * size.layer * tokens + (units + 1) * answers * per_answer
    assert stages["ablate"]["operations"] == pytest.approx(expected, rel=0.02)

    assert not plan["memory"]["tables_in_memory"]
    assert plan["memory"]["non_layer_bytes"] < tables / 4
    # The unembedding is read for the answers only as far as they need it.
    assert whole < stages["evaluate"]["read_bytes"] < 1.02 * (whole + tables / size.tables)
    printed = invoke("plan", *flags)
    assert "tables of embeddings are read from disk" in printed.output
