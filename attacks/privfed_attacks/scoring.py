"""How good a reconstruction is. Scorers open what is sealed; nothing else of the package does.

Texts: recall and precision of the distinct tokens, recall of the bag of tokens (each counted as often as it is there),
ROUGE-1, ROUGE-2 and ROUGE-L of each true text with the guess that is assigned to it, and how many texts are exact.
Images: peak signal to noise ratio and structural similarity of each picture with the guess assigned to it.

Guesses have no order, so they are assigned to the truth by the assignment that is best in total.

Shape suffixes: N examples, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array

from privfed_attacks.inversion import Reconstruction
from privfed_attacks.sealed import Sealed, unseal

Float = NDArray[np.float64]
Scores = dict[str, float]
_MOST_PAIRS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The truth.

    Attributes:
        texts: Token ids of each text as the model read it, with special tokens, without padding.
        labels: Class of each example; empty where there are none.
        images: Pictures as the model read them [N, C, H, W], or None.
    """

    texts: tuple[tuple[int, ...], ...] = ()
    labels: tuple[int, ...] = ()
    images: NDArray[np.float32] | None = None


def score_texts(guess: Reconstruction, truth: Sealed[Batch], tokenizer: Any) -> Scores:
    """Return the scores of a reconstruction of texts, each between 0 and 1.

    Args:
        guess: What an attack found.
        truth: The texts, sealed.
        tokenizer: Turns tokens into words for ROUGE.
    """
    special = set(tokenizer.all_special_ids)
    texts = [[token for token in text if token not in special] for text in unseal(truth).texts]
    guesses = [[token for token in text if token not in special] for text in guess.sequences]
    there = {token for text in texts for token in text}
    said = set(guess.tokens) | {token for text in guesses for token in text}
    said -= special
    bag, guessed = Counter(t for text in texts for t in text), Counter(t for text in guesses for t in text)
    guessed |= Counter(dict.fromkeys(said, 1))
    recall = len(there & said) / len(there) if there else 1.0
    precision = len(there & said) / len(said) if said else 0.0
    return {
        "token_recall": recall,
        "token_precision": precision,
        "bag_recall": sum((bag & guessed).values()) / max(1, sum(bag.values())),
        **_texts_alone(texts, guesses, tokenizer),
    }


def score_labels(guess: Reconstruction, truth: Sealed[Batch]) -> Scores:
    """Return the share of the labels that were found, as a bag, and whether all were."""
    labels = Counter(unseal(truth).labels)
    found = sum((labels & Counter(dict(guess.labels))).values())
    return {
        "label_recall": found / max(1, sum(labels.values())),
        "labels_exact": float(Counter(guess.labels) == labels),
    }


def score_images(guess: Reconstruction, truth: Sealed[Batch]) -> Scores:
    """Return mean PSNR (in dB) and SSIM; pictures that were not guessed count as a picture of the mean value.

    Raises:
        ValueError: If the truth has no images.
    """
    images = unseal(truth).images
    if images is None:
        raise ValueError("The sealed batch holds no images.")
    guesses = np.zeros((0, *images.shape[1:])) if guess.images is None else guess.images.astype(np.float64)
    missing = len(images) - len(guesses)
    if missing > 0:
        guesses = np.concatenate([guesses, np.full((missing, *images.shape[1:]), float(images.mean()))])
    span = float(images.max() - images.min()) or 1.0
    table = np.array([[ssim(image, each, span) for each in guesses] for image in images])
    rows, columns = linear_sum_assignment(-table)
    peaks = [psnr(images[i], guesses[j], span) for i, j in zip(rows, columns, strict=True)]
    return {"psnr": float(np.mean(peaks)), "ssim": float(table[rows, columns].mean())}


def psnr(image: NDArray[Any], guess: NDArray[Any], span: float) -> float:
    """Return the peak signal to noise ratio in dB, at most 100.

    Args:
        image: The truth.
        guess: Of the same shape.
        span: Largest minus smallest value that a pixel can have.
    """
    error = float(np.mean((image.astype(np.float64) - guess.astype(np.float64)) ** 2))
    return 100.0 if error <= span**2 * 1e-10 else 10 * math.log10(span**2 / error)


def ssim(image: NDArray[Any], guess: NDArray[Any], span: float) -> float:
    """Return the structural similarity of two pictures [C, H, W], mean over pixels and channels.

    Wang, Bovik, Sheikh, Simoncelli 2004, IEEE TIP 13(4), with its Gaussian window (sigma 1.5, 11 pixels) and constants.
    """
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2

    def smooth(x: Float) -> Float:
        found: Float = gaussian_filter(x, sigma=(0, 1.5, 1.5), truncate=3.5)
        return found

    x, y = image.astype(np.float64), guess.astype(np.float64)
    mx, my = smooth(x), smooth(y)
    vx, vy, vxy = smooth(x * x) - mx**2, smooth(y * y) - my**2, smooth(x * y) - mx * my
    found = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return float(found.mean())


def _texts_alone(texts: list[list[int]], guesses: list[list[int]], tokenizer: Any) -> Scores:
    """Return ROUGE and exactness, zeros where an attack gave no texts.

    Each text is held against one guess, so that the sum of ROUGE-1 and ROUGE-L is largest; among very many pairs, so
    that they share most tokens, for ROUGE of every pair takes minutes there.
    """
    names = ("rouge1", "rouge2", "rougeL")
    if not guesses or not texts:
        return dict.fromkeys((*names, "exact"), 0.0)
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(names), use_stemmer=False)
    words = _worded(tokenizer)
    said, heard = [words(text) for text in texts], [words(each) for each in guesses]
    if len(texts) * len(guesses) <= _MOST_PAIRS:
        table = [[scorer.score(text, each) for each in heard] for text in said]
        gains = np.array([[cell["rougeL"].fmeasure + cell["rouge1"].fmeasure for cell in row] for row in table])
    else:
        gains = _shared_tokens(texts, guesses)
    pairs = list(zip(*linear_sum_assignment(-gains), strict=True))
    scores = [scorer.score(said[i], heard[j]) for i, j in pairs]
    found = {name: sum(score[name].fmeasure for score in scores) / len(texts) for name in names}
    return {**found, "exact": sum(texts[i] == guesses[j] for i, j in pairs) / len(texts)}


def _shared_tokens(texts: list[list[int]], guesses: list[list[int]]) -> NDArray[np.float64]:
    """Return the F1 of the different tokens of each text and guess [N, M]."""
    width = 1 + max((max(each, default=0) for each in (*texts, *guesses)), default=0)

    def marked(rows: list[list[int]]) -> csr_array:
        kinds = [sorted(set(row)) for row in rows]
        ends = np.cumsum([0, *map(len, kinds)])
        columns = np.array([token for row in kinds for token in row], dtype=np.int64)
        return csr_array((np.ones(len(columns)), columns, ends), shape=(len(rows), width))

    left, right = marked(texts), marked(guesses)
    sizes = left.sum(axis=1)[:, None] + right.sum(axis=1)[None]
    found: NDArray[np.float64] = 2 * (left @ right.T).toarray() / np.maximum(sizes, 1)
    return found


def _worded(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    return lambda tokens: str(tokenizer.decode(list(tokens), skip_special_tokens=True))
