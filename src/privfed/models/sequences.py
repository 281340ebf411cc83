"""From texts, prompts with responses, and conversations to sequences of tokens of which some are learned.

Truncation keeps what is learned: the front of a prompt goes first, and of a response too long by itself the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from privfed.errors import DataError, ModelError
from privfed.models.language import TokenSequence, last_stretch

Pieces = list[tuple[str, bool]]
Turns = Sequence[tuple[str, str]]


def from_texts(texts: Sequence[str], tokenizer: Any, max_length: int) -> list[TokenSequence]:
    """Return texts of which every token is learned, from the start token to the end token."""
    return [_sequence([(text, True)], tokenizer, max_length) for text in texts]


def from_responses(
    prompts: Sequence[str], responses: Sequence[str], tokenizer: Any, max_length: int
) -> list[TokenSequence]:
    """Return prompts with their responses and the end token; only the latter two are learned.

    A prompt that does not end in white space gets a line break.
    """
    return [
        _sequence(
            [(prompt if prompt[-1:].isspace() else f"{prompt}\n", False), (response, True)], tokenizer, max_length
        )
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def from_conversations(conversations: Sequence[Turns], tokenizer: Any, max_length: int) -> list[TokenSequence]:
    """Return conversations as the tokenizer's chat template writes them; what the assistant says is learned.

    Raises:
        ModelError: If the tokenizer has no chat template, or one that does not add turns at the end.
        DataError: If the template refuses a conversation.
    """
    check_chat_template(tokenizer)
    return [
        _sequence(_said(turns, tokenizer, row), tokenizer, max_length, bare=True)
        for row, turns in enumerate(conversations, start=1)
    ]


def check_chat_template(tokenizer: Any) -> None:
    """Check that conversations can be written out.

    Raises:
        ModelError: If not.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            "data.messages needs a tokenizer with a chat template, and this model's has none: use an instruction-tuned "
            "model, set tokenizer.chat_template and save it, or give data.prompt and data.response instead."
        )


def _sequence(pieces: Pieces, tokenizer: Any, max_length: int, *, bare: bool = False) -> TokenSequence:
    """Return tokens and targets; ``bare`` where the text holds its own start and end."""
    lead = [tokenizer.bos_token_id] if not bare and tokenizer.bos_token_id is not None else []
    ids, learned = list(lead), [False] * len(lead)
    for text, wanted in pieces:
        found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids += found
        learned += [wanted] * len(found)
    if not bare and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
        learned.append(True)
    whole = TokenSequence(np.asarray(ids, dtype=np.int64), np.asarray(learned, dtype=bool))
    return _cut(whole, len(lead), max_length, int(tokenizer.pad_token_id))


def _cut(whole: TokenSequence, lead: int, max_length: int, pad: int) -> TokenSequence:
    """Return at most ``max_length`` tokens: the start token, the end of what comes before, the last learned stretch."""
    start, end = last_stretch(whole.learned)
    if start == end:  # nothing is learned
        start = end = max(lead, min(len(whole.ids), max_length))
    context = start > lead
    room = max_length - lead
    end = min(end, start + room - (1 if context and not lead else 0))  # a first token needs one that predicts it
    begin = max(lead, start - (room - (end - start)))
    places = np.r_[:lead, begin:end]
    ids, learned = whole.ids[places], whole.learned[places].copy()
    if not len(ids):
        return TokenSequence(np.asarray([pad], dtype=np.int64), np.zeros(1, dtype=bool))
    learned[0] = False
    return TokenSequence(ids, learned)


def _said(turns: Turns, tokenizer: Any, row: int) -> Pieces:
    """Return a conversation's text in pieces: what is learned is what each of the assistant's turns adds."""
    answers = [i for i, (role, _) in enumerate(turns) if role == "assistant" and i > 0]
    if not answers:
        return [(_written(turns, tokenizer, row), False)]
    whole = _written(turns[: answers[-1] + 1], tokenizer, row)
    pieces = _pieces(whole, turns, answers, tokenizer, row)
    if pieces is None:  # such as templates that drop the thoughts of earlier turns
        pieces = _pieces(whole, turns, answers[-1:], tokenizer, row)
    if pieces is None:
        raise ModelError(
            "The chat template of this model's tokenizer does not write a turn after the ones before it, so what the "
            "assistant says cannot be told apart: give data.prompt and data.response instead."
        )
    return pieces


def _pieces(whole: str, turns: Turns, answers: list[int], tokenizer: Any, row: int) -> Pieces | None:
    pieces: Pieces = []
    done = ""
    for turn in answers:
        before = _written(turns[:turn], tokenizer, row, ask=True)
        after = _written(turns[: turn + 1], tokenizer, row)
        if not (before.startswith(done) and after.startswith(before) and whole.startswith(after)):
            return None
        pieces += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    return pieces


def _written(turns: Turns, tokenizer: Any, row: int, *, ask: bool = False) -> str:
    from jinja2.exceptions import TemplateError

    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))
    except TemplateError as error:
        raise DataError(
            f"The chat template of this model's tokenizer refuses conversation {row} of its split ({error}): "
            "change or remove the row."
        ) from error
