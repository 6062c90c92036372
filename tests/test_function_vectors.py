"""Function vectors: of which heads they are, what stands beside them, and what they add."""

from dataclasses import replace

import numpy as np
import pytest

from lowmem_icl.engine.answers import Scores
from lowmem_icl.experiments.patch.added import (
    ZeroShot,
    methods_of,
    name_of,
    named_vectors,
    other_of,
    records,
    top_heads,
)
from lowmem_icl.experiments.patch.prompts import VectorPrompts
from lowmem_icl.masks.mask import all_heads
from lowmem_icl.tasks.prompt_pairs.made import Prompt

LAYERS = 3


def of_task(task: str, shots: int, prompts: int = 4) -> ZeroShot:
    vectors = VectorPrompts(task, shots, "train", "shuffled", (), (), (), ())
    asked = tuple(Prompt(index, (1, 2), ((3,),), (True,), str(index)) for index in range(prompts))
    return ZeroShot(vectors, "evaluation", asked)


@pytest.mark.parametrize(("layers", "heads", "count"), [(4, 8, 8), (1, 3, 1), (30, 9, 10), (64, 72, 92)])
def test_vectors_are_of_two_percent_of_the_heads_or_ten(layers: int, heads: int, count: int) -> None:
    scores = np.random.default_rng(0).normal(size=layers * heads)
    mask = top_heads(scores, all_heads(layers, heads))
    found = sorted(layer * heads + head for layer, head in mask.heads)
    assert found == sorted(np.argsort(-scores)[:count].tolist())
    assert not mask.ffns


def test_beside_a_vector_stand_a_random_one_as_long_and_that_of_another_task_at_as_many_shots() -> None:
    found = [of_task("a", 5), of_task("a", 10), of_task("b", 5), of_task("b", 10)]
    own = [np.random.default_rng(seed).normal(size=16).astype(np.float32) * 7 for seed in range(4)]
    vectors = named_vectors(found, own, seed=0)
    for index, vector in enumerate(own):
        other = found[other_of(found, index)].vectors
        assert other.task != found[index].vectors.task
        assert other.shots == found[index].vectors.shots
        np.testing.assert_array_equal(vectors[name_of(index, "own")], vector)
        random = vectors[name_of(index, "random")]
        assert np.linalg.norm(random) == pytest.approx(np.linalg.norm(vector), rel=1e-5)
    assert methods_of(found[:2]) == ["own", "random"]
    again = named_vectors([replace(each) for each in found], own, seed=0)
    assert all(np.array_equal(vectors[name], again[name]) for name in vectors)


def test_records_say_how_often_the_answer_comes_at_every_layer_and_what_is_gained() -> None:
    found = [of_task("a", 5), of_task("b", 5)]
    changes = 1 + 3 * LAYERS

    def scores(task: int) -> list[Scores]:
        made = [Scores.empty(changes, 1) for _ in found[task].prompts]
        for number, score in enumerate(made):
            score.greedy[0, 0] = number == 0
            # Its own vector at layer 1 brings all answers.
            score.greedy[1 + 1, 0] = True
        return made

    rows = list(records(found, LAYERS, 10, iter([*scores(0), *scores(1)])))
    of_a = [row for row in rows if row["task"] == "a"]
    (clean,) = [row for row in of_a if "layer" not in row]
    assert clean["value"] == 0.25
    assert clean["mask_task"] is None
    own = {(row["layer"], row["metric"]): row["value"] for row in of_a if row.get("method") == "own"}
    assert own == {
        (layer, metric): value
        for layer in range(LAYERS)
        for metric, value in (
            ("first_token_acc", 1.0 if layer == 1 else 0.0),
            ("first_token_acc_gain", 0.75 if layer == 1 else -0.25),
        )
    }
    others = {row["mask_task"] for row in of_a if row.get("method") == "other_task"}
    assert others == {"b"}


def test_prompts_without_a_vector_are_told_once_for_vectors_of_several_shot_counts() -> None:
    found = [of_task("a", 5), of_task("a", 10)]
    made = [Scores.empty(1 + 2 * LAYERS, 1) for of in found for _ in of.prompts]
    rows = list(records(found, LAYERS, 10, iter(made)))
    assert sum("layer" not in row for row in rows) == 1
    assert {row["mask_shots"] for row in rows if "layer" in row} == {5, 10}
