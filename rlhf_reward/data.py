"Every public name of `comparison`, `rows` and `loading`, from one module."
from .comparison import (
    BadResponse,
    Comparison,
    Text,
    exact_key,
    is_ids,
    normalized,
    ranked_pairs,
    ranks_of,
    shared_length,
    text_key,
    whole_texts,
    without_prompt,
)
from .loading import KINDS, as_table, hold_out, load_rows
from .rows import FORMS, UNREADABLE, read_row, row_form, to_comparison, to_responses
from .verdicts import RANKS_BY_WINNER

__all__ = [
    "BadResponse",
    "Comparison",
    "FORMS",
    "KINDS",
    "RANKS_BY_WINNER",
    "Text",
    "UNREADABLE",
    "as_table",
    "exact_key",
    "hold_out",
    "is_ids",
    "load_rows",
    "normalized",
    "ranked_pairs",
    "ranks_of",
    "read_row",
    "row_form",
    "shared_length",
    "text_key",
    "to_comparison",
    "to_responses",
    "whole_texts",
    "without_prompt",
]
