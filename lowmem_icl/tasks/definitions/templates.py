"""Prompt templates of the paper's tasks that YAML cannot say, and their gold options (paper.md 6.2).

Each takes one row in the field names of its hub dataset. Options come in the order of the hub's labels.
"""

import re
import string
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import datasets
import numpy as np
from lm_eval.utils import general_detokenize

Row = dict[str, Any]


def hellaswag_cleaned(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def hellaswag_text(row: Row) -> str:
    return hellaswag_cleaned(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")


def hellaswag_choices(row: Row) -> list[str]:
    return [hellaswag_cleaned(ending) for ending in row["endings"]]


def hellaswag_gold(row: Row) -> int:
    return int(row["label"])


def piqa_choices(row: Row) -> list[str]:
    return [row["sol1"], row["sol2"]]


def arc_choices(row: Row) -> list[str]:
    return list(row["choices"]["text"])


def arc_gold(row: Row) -> int:
    return list(row["choices"]["label"]).index(row["answerKey"].strip())


def winogrande_gold(row: Row) -> int:
    return int(row["answer"]) - 1


def winogrande_contexts(row: Row) -> list[str]:
    before = row["sentence"][: row["sentence"].index("_")]
    return [before + row["option1"], before + row["option2"]]


def winogrande_with_answer_of(row: Row, other: Row) -> Row:
    # What stands in the gap is the answer: the other row's right option takes the place of this one's.
    return row | {f"option{row['answer']}": other[f"option{other['answer']}"]}


def winogrande_suffix(row: Row) -> str:
    return row["sentence"][row["sentence"].index("_") + 1 :].strip()


def mathqa_choices(row: Row) -> list[str]:
    # "a ) 38 , b ) 27.675 , …, e ) none", cut as the paper's harness cuts it.
    found = re.findall(r"[abcd] \) .*?, |e \) .*?$", row["options"])
    return [choice[4:].rstrip(" ,") for choice in found]


def mathqa_gold(row: Row) -> int:
    return list("abcde").index(row["correct"])


def lambada_text(row: Row) -> str:
    return row["text"].rsplit(" ", 1)[0]


def lambada_word(row: Row) -> str:
    # With its space: of a single continuation lm-eval takes the text as it stands.
    return " " + row["text"].rsplit(" ", 1)[1]


def lambada_rows(**_: object) -> dict[str, datasets.Dataset]:
    # The hub calls the file a test split, the paper's harness its validation split.
    return {"validation": datasets.load_dataset("EleutherAI/lambada_openai", "default", split="test")}


def copa_text(row: Row) -> str:
    connector = {"cause": "because", "effect": "therefore"}[row["question"]]
    return f"{row['premise'].strip()[:-1]} {connector}"


def copa_choices(row: Row) -> list[str]:
    return [row[name][0].lower() + row[name][1:] for name in ("choice1", "choice2")]


def wic_text(row: Row) -> str:
    word = row["sentence1"][row["start1"] : row["end1"]]
    return (
        f"Sentence 1: {row['sentence1']}\nSentence 2: {row['sentence2']}\n"
        f"Question: Is the word '{word}' used in the same way in the two sentences above?\nAnswer:"
    )


def wsc_text(row: Row) -> str:
    # The hub's span indices count words.
    before = " ".join(row["text"].split()[: row["span2_index"]])
    after = row["text"][len(before) + len(row["span2_text"]) + 1 :]
    passage = general_detokenize(f"{before} *{row['span2_text']}*{after}")
    return (
        f"Passage: {passage}\nQuestion: In the passage above, does the pronoun "
        f'"*{row["span2_text"]}*" refer to "*{row["span1_text"]}*"?\nAnswer:'
    )


def multirc_choices(row: Row) -> list[str]:
    return [f"{row['answer']}\nIs the answer correct? {verdict}" for verdict in ("no", "yes")]


def multirc_with_answer_of(row: Row, other: Row) -> Row:
    # The answer is the verdict; the text that it judges belongs to the question.
    return row | {"label": other["label"]}


def multirc_question(row: Row) -> tuple[str, str]:
    return row["paragraph"], row["question"]


def multirc_passage(row: Row) -> str:
    return row["paragraph"]


def multirc_results(row: Row, results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    said_yes = int(np.argmax([logprob for logprob, _ in results]))
    return {"acc": (multirc_question(row), said_yes == row["label"])}


def share_of_whole_questions(answers: Iterable[tuple[tuple[str, str], bool]]) -> float:
    """Return the share of questions of which every answer row is judged right."""
    right: dict[tuple[str, str], bool] = defaultdict(lambda: True)
    for question, correct in answers:
        right[question] = right[question] and correct
    return float(np.mean(list(right.values())))


def macro_f1(pairs: Iterable[tuple[int, int]]) -> float:
    """Return the mean over gold classes of F1 from (gold, predicted) pairs, as SuperGLUE scores CB."""
    golds, predicted = (np.array(side) for side in zip(*pairs, strict=True))
    scores = []
    for label in np.unique(golds):
        hit = np.sum((golds == label) & (predicted == label))
        scores.append(2 * hit / (np.sum(golds == label) + np.sum(predicted == label)))
    return float(np.mean(scores))


def record_text(row: Row) -> str:
    text, *highlights = row["passage"].strip().split("\n@highlight\n")
    return text + "\n\n" + "".join(f"  - {highlight}.\n" for highlight in highlights)


def record_entities(row: Row) -> list[str]:
    return sorted(set(row["entities"]))


def record_choices(row: Row) -> list[str]:
    return [record_line(row, entity) for entity in record_entities(row)]


def record_target(row: Row) -> str:
    # A demonstration shows the first accepted entity.
    return record_line(row, row["answers"][0])


def record_with_answer_of(row: Row, other: Row) -> Row:
    # The answer is the entity; the line that it completes belongs to the question.
    return row | {"answers": other["answers"]}


def record_line(row: Row, entity: str) -> str:
    return f"  - {row['query']}".replace("@placeholder", entity)


def record_gold(row: Row) -> list[int]:
    accepted = {squad_normalised(answer) for answer in row["answers"]}
    return [
        index for index, entity in enumerate(record_entities(row)) if squad_normalised(entity) in accepted
    ]


def record_passage(row: Row) -> str:
    return row["passage"]


def record_results(row: Row, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    said = record_entities(row)[int(np.argmax([logprob for logprob, _ in results]))]
    return {
        "em": max(float(squad_normalised(said) == squad_normalised(answer)) for answer in row["answers"]),
        "f1": max(squad_f1(said, answer) for answer in row["answers"]),
    }


def squad_normalised(text: str) -> str:
    """Return text in lower case without punctuation, articles and extra white space (as SQuAD v1.1)."""
    text = "".join(symbol for symbol in text.lower() if symbol not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def squad_f1(said: str, answer: str) -> float:
    """Return the F1 of shared words (SQuAD v1.1's evaluation)."""
    words, expected = squad_normalised(said).split(), squad_normalised(answer).split()
    if not words or not expected:
        return float(words == expected)
    shared = sum((Counter(words) & Counter(expected)).values())
    return 2 * shared / (len(words) + len(expected))
