"""The words of the report that a newcomer may not know."""

from __future__ import annotations

GLOSSARY: tuple[tuple[str, str], ...] = (
    ("Accuracy", "The share of test examples that the model labels correctly."),
    ("Adapter", "The small set of parameters that was trained; the base model stays as it was."),
    (
        "Client",
        "One holder of data, such as a phone or a hospital. Its data stays with it; it sends updates.",
    ),
    ("Clipping", "Shortening each contribution to a fixed length, so that none can stand out."),
    ("Delta (δ)", "The small chance with which the limit set by epsilon may not hold."),
    (
        "Differential privacy",
        "A provable limit on how much any one contribution can change what others can observe.",
    ),
    (
        "Epsilon (ε)",
        "The size of that limit. Zero reveals nothing; each step up multiplies the odds by about 2.7.",
    ),
    ("Ledger", "The list of every use of the data, written before the result leaves the client."),
    ("Macro-F1", "A score from 0 to 1 that counts every class equally, however rare it is."),
    (
        "Neighbouring data sets",
        "Two data sets that differ in one protected unit; the promise compares the two.",
    ),
    ("Noise multiplier", "How strong the added noise is, compared with the clipped contribution."),
    (
        "Secure aggregation",
        "A way to add up the clients' updates without anyone seeing a single one.",
    ),
    ("Unit", "What one promise protects: one training example, or all the data of one client."),
)

LANGUAGE: tuple[tuple[str, str], ...] = (
    (
        "Perplexity",
        "How surprised a language model is by the test texts: at 20 it is as unsure of each next token as if 20 were "
        "equally likely. Smaller is better; only models with the same tokens can be compared.",
    ),
    ("ROUGE, BLEU", "How many words and runs of words a generated text shares with the reference."),
)
"""Words that only the report of a language model uses."""


def glossary(*, language: bool) -> tuple[tuple[str, str], ...]:
    """Return the words in alphabetical order, with those of language models where the run trained one."""
    return tuple(sorted((*GLOSSARY, *LANGUAGE))) if language else GLOSSARY
