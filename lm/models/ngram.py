"""N-gram language models: counting a text, and interpolated Kneser-Ney probabilities with three discounts per order.

An n-gram is known by where it stands in a prefix tree: `key = parent * vocab_size + token`, where `parent` is the place of
its first tokens among the sorted keys one order below (0 for order 1). One integer thus names an n-gram of any length, and
looking one up is a binary search per token.
"""

import dataclasses

import numpy as np

from lm.errors import UserError

_FALLBACK_DISCOUNTS = (0.0, 0.5, 1.0, 1.5)  # an arbitrary middle between no discount and losing the whole count
_NO_KEY = np.iinfo(np.int64).max


@dataclasses.dataclass(frozen=True)
class Tables:
    """What scoring looks up, one array per order; made by `Ngram.prepare`.

    Each array ends in one place more, which stands for every n-gram that is not stored. It is nobody's key, its share is 0
    and its weight 1, so a missing n-gram or context leaves the shorter one's probability as it is.

    Attributes:
      keys: int64, sorted; the last is larger than any key.
      shares: float64, by n-gram: (count - discount) / total of its context.
      interpolation_weights: float64, by context, hence one order shorter than the n-grams: how much the distribution one
        order below counts.
    """

    keys: tuple[np.ndarray, ...]
    shares: tuple[np.ndarray, ...]
    interpolation_weights: tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class Ngram:
    """Interpolated Kneser-Ney with modified discounts.

    With c the raw counts at the highest order and, below it, the number of different tokens seen on an n-gram's left:

      p(w | h) = (c(h w) - D(c(h w))) / c(h .) + gamma(h) p(w | h')
      gamma(h) = (D1 N1(h .) + D2 N2(h .) + D3+ N3+(h .)) / c(h .)

    where h' is h without its oldest token, and N1, N2, N3+ are the numbers of different tokens that follow h with a c of one,
    two, three or more. Below order 1 stands the uniform distribution; a context that was never followed by anything has
    gamma = 1. So every token has a positive probability after every history, and they sum to one.

    Papers: Kneser and Ney 1995, "Improved backing-off for m-gram language modeling"; Chen and Goodman 1998, "An empirical
    study of smoothing techniques for language modeling" (TR-10-98; Computer Speech and Language 13, 1999).

    Attributes:
      order: the longest n-gram, in tokens; 1 is a discounted unigram on raw counts.
      vocab_size: number of token ids.
    """

    order: int
    vocab_size: int

    def count(self, tokens: np.ndarray, eos: int) -> dict:
        """Counts the n-grams of a text that one `eos` precedes.

        That leading `eos` is a history and never a target, so its entry in order 1 has count 0 unless the text has more of
        them. The n-grams which it opens have no left neighbour; the beginning of the text counts as one of its own kind, so
        that whatever occurs has a count of at least one at every order.

        Args:
          tokens: int [N], the training split.
          eos: the id that ends a document.

        Returns:
          For each k from 1 to `order`, under "order_k": `keys` int64 [E], sorted, parent * vocab_size + token, where parent
          is the index in order k - 1 of the n-gram's first k - 1 tokens (0 for order 1); `counts` int64 [E], raw at the
          highest order, different left neighbours below it.

        Raises:
          UserError: a token or `eos` is not in the vocabulary.
        """
        self._check("eos", np.asarray([eos]), lowest=0)
        self._check("the training split", tokens, lowest=0)
        text = np.concatenate([np.asarray([eos], np.int64), np.asarray(tokens, np.int64)])
        keys, nodes = np.unique(text, return_inverse=True)  # nodes: for each place where a k-gram may end, its index in keys
        params = {}
        for k in range(1, self.order):
            longer_keys, first, longer_nodes = np.unique(
                nodes[:-1] * self.vocab_size + text[k:], return_index=True, return_inverse=True
            )
            counts = np.bincount(nodes[1:][first], minlength=keys.size)  # each longer n-gram is one left neighbour of its end
            if k > 1:
                counts[nodes[:1]] += 1  # the beginning of the text, left of the first n-gram (a slice: there may be none)
            params[f"order_{k}"] = {"keys": keys, "counts": counts}
            keys, nodes = longer_keys, longer_nodes
        targets = nodes[1:] if self.order == 1 else nodes
        params[f"order_{self.order}"] = {"keys": keys, "counts": np.bincount(targets, minlength=keys.size)}
        return params

    def prepare(self, params: dict) -> Tables:
        """Turns counts into what scoring looks up.

        Args:
          params: what `count` returned.

        Returns:
          The shares and interpolation weights of all orders.
        """
        tables = Tables((), (), ())
        num_contexts = 1
        for k in range(1, self.order + 1):
            keys, counts = params[f"order_{k}"]["keys"], params[f"order_{k}"]["counts"]
            contexts = keys // self.vocab_size
            classes = np.minimum(counts, 3)
            discounts = modified_discounts(counts)
            totals = np.bincount(contexts, weights=counts, minlength=num_contexts)
            # Whole numbers first and one product after: a running sum of discounts would drift away from a total of one.
            sizes = np.bincount(contexts * 4 + classes, minlength=num_contexts * 4).reshape(num_contexts, 4)
            weights = np.divide(sizes @ discounts, totals, out=np.ones(num_contexts), where=totals > 0)
            shares = np.zeros(keys.size)
            np.divide(counts - discounts[classes], totals[contexts], out=shares, where=counts > 0)
            tables = Tables(
                keys=(*tables.keys, np.append(keys, _NO_KEY)),
                shares=(*tables.shares, np.append(shares, 0.0)),
                interpolation_weights=(*tables.interpolation_weights, np.append(weights, 1.0)),
            )
            num_contexts = keys.size
        return tables

    def log_probs(self, tables: Tables, history_NH: np.ndarray, targets_N: np.ndarray) -> np.ndarray:
        """Log probabilities of tokens, each after a history of its own.

        Args:
          tables: what `prepare` returned.
          history_NH: int [N, order - 1], the most recent token last; -1 where nothing is known, and then whatever stands
            further left is not looked at either.
          targets_N: int [N].

        Returns:
          float64 [N], natural logarithms.

        Raises:
          UserError: a target is not in the vocabulary, or a history token is neither in it nor -1.
        """
        self._check("the targets", targets_N, lowest=0)
        self._check("the history", history_NH, lowest=-1)
        # Keys outgrow 32 bits, which arrays of JAX would otherwise force on them.
        history_NH, targets_N = np.asarray(history_NH, np.int64), np.asarray(targets_N, np.int64)
        probs_N = np.full(targets_N.shape, 1.0 / self.vocab_size)
        for k in range(1, self.order + 1):
            context_N = np.zeros_like(targets_N)
            for j in range(1, k):
                context_N = self._find(tables.keys[j - 1], context_N, history_NH[:, j - k])
            entry_N = self._find(tables.keys[k - 1], context_N, targets_N)
            probs_N = tables.shares[k - 1][entry_N] + tables.interpolation_weights[k - 1][context_N] * probs_N
        return np.log(probs_N)

    @staticmethod
    def num_entries(params: dict) -> int:
        """Number of stored n-grams, over all orders, with a count other than zero; `params` is what `count` returned."""
        return sum(int(np.count_nonzero(entries["counts"])) for entries in params.values())

    def _find(self, keys, parents_N, tokens_N):
        """Indices of n-grams in `keys`; its last place for what is not there, which as a parent is again found nowhere."""
        keys_N = parents_N * self.vocab_size + tokens_N
        index_N = np.searchsorted(keys, keys_N)
        # Token -1 would fall on the key of the parent before.
        return np.where((keys[index_N] == keys_N) & (tokens_N >= 0), index_N, keys.size - 1)

    def _check(self, name, ids, lowest):
        ids = np.asarray(ids)
        wrong = ids[(ids < lowest) | (ids >= self.vocab_size)]
        if wrong.size:
            raise UserError(
                f"{name}: token id {wrong[0]} is outside the vocabulary, ids must be from {lowest} to {self.vocab_size - 1}"
            )


def modified_discounts(counts: np.ndarray) -> np.ndarray:
    """The discounts of one order, from how many of its n-grams have a count of one, two, three and four (n1 to n4).

      Y = n1 / (n1 + 2 n2),   D1 = 1 - 2 Y n2 / n1,   D2 = 2 - 3 Y n3 / n2,   D3+ = 3 - 4 Y n4 / n3

    These never exceed the count, but they need n1, n2 and n3, and D2 and D3+ can fall to zero or below. A small text or
    vocabulary does that; then all three are 0.5, 1 and 1.5, since a discount of zero would leave nothing for unseen tokens.

    Args:
      counts: int [E], all counts of the order; zeros do not matter.

    Returns:
      float64 [4]: the discount of an n-gram with count 0 (which is 0), 1, 2, and 3 or more.

    Paper: Chen and Goodman 1999, section 3 (equation 26 of TR-10-98).
    """
    n = np.bincount(np.minimum(counts, 5), minlength=6).astype(np.float64)
    if n[1:4].all():
        y = n[1] / (n[1] + 2 * n[2])
        discounts = np.array([0.0, *(j - (j + 1) * y * n[j + 1] / n[j] for j in (1, 2, 3))])
        if (discounts[1:] > 0).all():
            return discounts
    return np.array(_FALLBACK_DISCOUNTS)
