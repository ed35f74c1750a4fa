"""Scoring functions that the task files name. `results` holds one answer, already filtered."""

from typing import Any

Pair = tuple[str, str]


def normal(label: str) -> str:
    return " ".join(label.lower().split())


def label(doc: dict[str, Any], results: list[str]) -> dict[str, float | Pair]:
    """Accuracy of one row (0 or 1) and the pair (expected, answered) that F1 is computed from."""
    pair = (normal(doc["messages"][1]["content"]), normal(results[0]))
    return {"accuracy": float(pair[0] == pair[1]), "f1_weighted": pair, "f1_macro": pair}


def f1(pairs: list[Pair], average: str) -> float:
    """F1 averaged over the labels that are expected somewhere (scikit-learn's `f1_score`).

    An answer that is no label counts as a miss of its row's label and not as a class of its own.
    """
    from sklearn.metrics import f1_score

    expected, answered = zip(*pairs, strict=True)
    labels = sorted(set(expected))
    return float(f1_score(expected, answered, labels=labels, average=average, zero_division=0))


def f1_weighted(pairs: list[Pair]) -> float:
    return f1(pairs, "weighted")


def f1_macro(pairs: list[Pair]) -> float:
    return f1(pairs, "macro")
