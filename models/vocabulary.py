"""Whether a model has a row in its embedding for every token of a text."""

from __future__ import annotations

from collections.abc import Sequence

from .workload import LoadedModel


def check_tokens(model: LoadedModel, ids: Sequence[int], where: str) -> None:
    """Refuse token ids beyond the rows of the input embedding.

    Args:
        model: A language model with its tokenizer.
        ids: Token ids.
        where: What has the tokens, for the message.

    Raises:
        ValueError: Names the first such token, its id and the number of rows.
    """
    rows = embedding_rows(model)
    if rows is None or not ids or max(ids) < rows:
        return
    token = next(token for token in ids if token >= rows)
    tokenizer = model.workload.tokenizer
    named = tokenizer.convert_ids_to_tokens(token)
    raise ValueError(
        f"Token {named!r} in {where} has id {token:,}, but the embedding of {model.id} has only "
        f"{rows:,} rows (the tokenizer has {len(tokenizer):,} tokens). Use a text without it, the "
        "tokenizer that the model was trained with, or resize the embedding first "
        f"(model.resize_token_embeddings({len(tokenizer)}))."
    )


def embedding_rows(model: LoadedModel) -> int | None:
    """Rows of the input embedding; None where the model does not say."""
    try:
        embedding = model.module.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    rows = getattr(embedding, "num_embeddings", None)
    if rows is None and getattr(embedding, "weight", None) is not None:
        rows = embedding.weight.shape[0]
    return None if rows is None else int(rows)
