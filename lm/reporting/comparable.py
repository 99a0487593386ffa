"""Whether figures of different runs may stand side by side; what is computed from them lives elsewhere."""

import itertools
from collections.abc import Mapping, Sequence

from lm.errors import UserError
from lm.reporting.runs import Run


def check_comparable(runs: Sequence[Run], evaluation: str | Mapping[str, str]) -> bool:
    """Refuses to compare what was not measured on the same text in the same way.

    Equal text hash, bytes and words are always needed, so are equal adaptation, dropout samples and temperature; and equal N as
    long as the tokenizers are equal.
    What may differ (a carry or windows, precision, step) belongs in the table beside the number.

    Args:
      runs: the runs to compare.
      evaluation: name of the evaluation, such as "test"; or of each run's, by the run's name.

    Returns:
      Whether all tokenizers are equal: only then are perplexity and nats per token comparable, else bits per byte and word
      perplexity alone.

    Raises:
      UserError: a field differs (the sentence names it, both runs and both values), or a run has no such evaluation.
    """
    same_tokens, names = True, {run.name: evaluation for run in runs} if isinstance(evaluation, str) else evaluation
    for one, other in itertools.combinations(runs, 2):
        ours, theirs = one.evaluation(names[one.name]), other.evaluation(names[other.name])
        same_tokenizer = ours["tokenizer"]["sha256"] == theirs["tokenizer"]["sha256"]
        same_tokens &= same_tokenizer
        pairs = [(field, ours[field], theirs[field]) for field in ("text_sha256", "bytes", "words")]
        for field in ("adaptation", "dropout_samples", "temperature"):
            pairs.append((field, *(side["protocol"].get(field) for side in (ours, theirs))))
        if same_tokenizer:
            pairs.append(("tokens", ours["tokens"], theirs["tokens"]))
        for field, our_value, their_value in pairs:
            if our_value != their_value:
                raise UserError(
                    f"{one.name} and {other.name} cannot be compared on {names[one.name]}: {field} is {our_value!r} for "
                    f"{one.name} and {their_value!r} for {other.name}, but must be equal"
                )
    return same_tokens
