"""lm.data.batches: batches are pure, streams contiguous, windows come once an epoch, documents keep apart; prefetching."""

import gc
import itertools
import threading
import time
from fractions import Fraction

import numpy as np
import pytest
from helpers import changed, corpus_of, model_and_params, refused

from lm.config import Config, resolve
from lm.data import batches as batches_module
from lm.data.batches import Batch, Packed, Padded, Stream, StreamOfRandomLengths, Windows, batches, random_lengths
from lm.data.prefetch import prefetch
from lm.objectives import causal_language_model

EOS = 999
CORPUS = corpus_of(np.arange(101, dtype=np.uint16), vocab_size=1000, eos=EOS)  # each token is its own place


def assert_equal(one, other):
    for name in ("inputs_BT", "targets_BT", "loss_weights_BT", "reset_B", "rows_B"):
        left, right = getattr(one, name), getattr(other, name)
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right, err_msg=name)
    assert one.segments_BT is None and other.segments_BT is None


@pytest.mark.parametrize("kind", [Stream, Windows])
def test_a_batch_is_a_pure_function_of_step_and_rows(kind):
    source, again = (kind(CORPUS, 4, 3, seed=5) for _ in range(2))
    for step in (0, 7, 3, 29, 8, 1000):
        whole = source.batch(step, slice(None))
        assert_equal(whole, again.batch(step, slice(None)))
        assert (whole.inputs_BT.shape, whole.inputs_BT.dtype) == ((4, 3), np.int32)
        assert whole.inputs_BT.shape == source.shapes[0] and len(source.shapes) == 1
        np.testing.assert_array_equal(whole.rows_B, [0, 1, 2, 3])
        np.testing.assert_array_equal(whole.loss_weights_BT, np.ones((4, 3), np.float32))
        for rows in (slice(0, 1), slice(1, 3), slice(3, None), slice(0, 4, 2)):
            part = source.batch(step, rows)
            np.testing.assert_array_equal(part.rows_B, np.arange(4)[rows])
            for name in ("inputs_BT", "targets_BT", "loss_weights_BT", "reset_B", "rows_B"):
                np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[rows])


@pytest.mark.parametrize("kind", [Stream, Windows])
def test_an_input_is_the_token_before_its_target(kind):
    source = kind(CORPUS, 4, 3, seed=5)
    for step in range(60):
        batch = source.batch(step, slice(None))
        # tokens are their own places, so this holds across steps, windows and rows too; before the first stands eos
        np.testing.assert_array_equal(batch.inputs_BT, np.where(batch.targets_BT == 0, EOS, batch.targets_BT - 1))
        np.testing.assert_array_equal(np.diff(batch.targets_BT, axis=1), 1)


def test_a_stream_goes_on_where_the_step_before_ended():
    source = Stream(CORPUS, batch_size=4, seq_len=3, seed=0)  # rows of 25 tokens, 8 steps an epoch
    assert (source.row_length, source.steps_per_epoch, source.carries) == (25, 8, True)
    for step in range(24):
        batch = source.batch(step, slice(None))
        starts = np.array([0, 25, 50, 75]) + step % 8 * 3
        np.testing.assert_array_equal(batch.targets_BT, starts[:, None] + np.arange(3))
        np.testing.assert_array_equal(batch.reset_B, [step % 8 == 0] * 4)
        assert source.epoch(step) == step // 8


def test_a_stream_with_no_token_over():
    source = Stream(corpus_of(np.arange(24), 1000), batch_size=2, seq_len=4, seed=0)
    seen = np.concatenate([source.batch(step, slice(None)).targets_BT.ravel() for step in range(source.steps_per_epoch)])
    np.testing.assert_array_equal(np.sort(seen), np.arange(24))


def windows_of(source, first_example, count):
    """The windows of some examples in order, by their number."""
    found = []
    for example in range(first_example, first_example + count):
        step, row = divmod(example, source.batch_size)
        batch = source.batch(step, slice(row, row + 1))
        assert batch.reset_B.all()
        window, rest = divmod(int(batch.targets_BT[0, 0]), source.seq_len)
        assert rest == 0
        found.append(window)
    return found


@pytest.mark.parametrize("batch_size, seq_len", [(4, 3), (5, 7), (1, 10), (3, 1), (2, 50)])
def test_every_window_comes_once_an_epoch_in_another_order_each(batch_size, seq_len):
    source = Windows(CORPUS, batch_size, seq_len, seed=1)
    n = 101 // seq_len
    assert (source.num_windows, source.steps_per_epoch, source.carries) == (n, Fraction(n, batch_size), False)
    epochs = [windows_of(source, epoch * n, n) for epoch in range(3)]
    for order in epochs:
        assert sorted(order) == list(range(n))
    if n > 5:
        assert len(set(map(tuple, epochs))) == 3
        assert all(order != sorted(order) for order in epochs)
    for step in range(3 * n // batch_size):
        assert source.epoch(step) == step * batch_size // n


def test_another_seed_is_another_order():
    orders = {tuple(windows_of(Windows(CORPUS, 4, 3, seed), 0, 33)) for seed in (0, 1, 2, 2**32 - 1)}
    assert len(orders) == 4


def test_a_single_window():
    source = Windows(corpus_of(np.arange(9), 1000), batch_size=1, seq_len=5, seed=0)
    np.testing.assert_array_equal(source.batch(7, slice(None)).targets_BT, [[0, 1, 2, 3, 4]])


@pytest.mark.parametrize("kind", [Stream, Windows])
def test_too_short_a_split_is_refused(kind):
    assert kind(CORPUS, 20, 5, seed=0).batch(0, slice(None)).targets_BT.shape == (20, 5)
    with refused("made up holds 101 tokens", "17 rows of config.data.seq_len 6", "config.data.batch_size smaller"):
        kind(CORPUS, 17, 6, seed=0)


def test_the_config_chooses():
    for order, kind in (("stream", Stream), ("windows", Windows)):
        config = resolve(changed(Config(), data__order=order, data__seq_len=5, data__batch_size=3, seed=8))
        source = batches(config, CORPUS)
        assert type(source) is kind
        assert_equal(source.batch(3, slice(None)), kind(CORPUS, 3, 5, 8).batch(3, slice(None)))


LONG = corpus_of(np.arange(3001, dtype=np.uint16) % 999, vocab_size=1000, eos=EOS)


def test_a_stream_of_random_lengths_reads_each_row_whole_once_an_epoch():
    """Without its padding it is the plain stream in other pieces, of every epoch."""
    source = StreamOfRandomLengths(LONG, 3, 20, seed=5, std=4.0)
    assert source.steps_per_epoch == len({step for step in range(500) if source.epoch(step) == 1})
    assert source.tokens_per_step * source.steps_per_epoch == 3000
    orders = []
    for epoch in range(3):
        steps = range(epoch * source.steps_per_epoch, (epoch + 1) * source.steps_per_epoch)
        found = [source.batch(step, slice(None)) for step in steps]
        assert [batch.reset_B.tolist() for batch in found] == [[index == 0] * 3 for index in range(len(found))]
        lengths = [int(batch.segments_BT[0].sum()) for batch in found]
        orders.append(tuple(lengths))
        for batch, length in zip(found, lengths, strict=True):
            assert batch.inputs_BT.shape in source.shapes and batch.inputs_BT.shape[1] - length < 8
            there = np.broadcast_to(np.arange(batch.inputs_BT.shape[1]) < length, batch.inputs_BT.shape)
            np.testing.assert_array_equal(batch.segments_BT, there)
            np.testing.assert_array_equal(batch.loss_weights_BT, there)
            assert batch.segments_BT.dtype == np.int32 and batch.loss_weights_BT.dtype == np.float32
        for name, shift in (("targets_BT", 0), ("inputs_BT", 1)):
            rows = np.concatenate([getattr(b, name)[:, :n] for b, n in zip(found, lengths, strict=True)], axis=1)
            wanted = np.concatenate([[EOS] * shift, LONG.tokens])[:3000].reshape(3, 1000)
            np.testing.assert_array_equal(rows, wanted)
    assert len(set(orders)) == 3 and len({tuple(sorted(order)) for order in orders}) == 1  # the same lengths in other orders


def test_a_batch_of_random_length_is_a_pure_function_of_step_and_rows():
    source, again, other = (StreamOfRandomLengths(LONG, 4, 20, seed, std=4.0) for seed in (5, 5, 6))
    differs = False
    for step in (0, 90, 3, 41):
        whole, part, same = source.batch(step, slice(None)), source.batch(step, slice(1, 3)), again.batch(step, slice(None))
        for name in ("inputs_BT", "targets_BT", "loss_weights_BT", "segments_BT", "reset_B", "rows_B"):
            np.testing.assert_array_equal(getattr(whole, name)[1:3], getattr(part, name))
            np.testing.assert_array_equal(getattr(whole, name), getattr(same, name))
        differs |= whole.segments_BT.sum() != other.batch(step, slice(None)).segments_BT.sum()
    assert differs


def test_random_lengths_are_normal_around_the_mean_and_at_times_its_half():
    lengths = random_lengths(1_000_000, 70, 5.0, (0,))
    assert lengths.sum() == 1_000_000 and lengths.min() >= 5
    short = lengths < 53  # between the two by about 3.5 standard deviations each
    assert short.mean() == pytest.approx(0.05, abs=0.006)
    for chosen, mean in ((~short, 69.5), (short, 34.5)):  # half a token is lost to whole numbers
        assert lengths[chosen].mean() == pytest.approx(mean, abs=0.6) and lengths[chosen].std() == pytest.approx(5, abs=0.5)


@pytest.mark.parametrize("total", [1, 4, 5, 9, 23])
def test_random_lengths_leave_no_crumb(total):
    for seed in range(20):
        lengths = random_lengths(total, 5, 2.0, (seed,))
        assert lengths.sum() == total and lengths.min() >= min(5, total)


def test_random_lengths_are_of_one_stream_only():
    for fields in (
        {"data__order": "windows"},
        {"data__mixture": ("x",), "data__mixture_weights": (0.5, 0.5)},
    ):
        with refused("config.data.seq_len_std", "config.data.order='stream'"):
            resolve(changed(Config(), data__seq_len_std=5.0, **fields))
    config = resolve(changed(Config(), data__seq_len_std=5.0))
    assert type(batches(config, LONG)) is StreamOfRandomLengths


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize("depth", [0, 1, 2, 7])
def test_prefetching_changes_nothing(depth):
    assert list(prefetch(lambda step: step * step, 3, 20, depth)) == [step * step for step in range(3, 20)]
    assert list(prefetch(lambda step: step, 5, 5, depth)) == []
    assert not threads()


def test_prefetching_is_so_many_ahead():
    made = []
    running = prefetch(made.append, 0, 100, 3)
    next(running)
    for _ in range(100):
        if len(made) >= 5:
            break
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 5  # one taken, three ready, one waiting to be put
    running.close()
    made.clear()
    next(prefetch(made.append, 0, 100, 0))
    assert made == [0]


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_an_error_in_the_making_is_raised_where_the_batch_is_used(depth):
    def make(step):
        if step == 4:
            raise ValueError("step 4 cannot be made")
        return step

    running = prefetch(make, 0, 10, depth)
    assert list(itertools.islice(running, 4)) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="step 4"):
        next(running)
    assert not threads()


def test_an_abandoned_prefetch_ends_its_thread():
    running = prefetch(lambda step: step, 0, 10**9, 2)
    next(running)
    assert len(threads()) == 1
    running.close()
    assert not threads()

    running = prefetch(lambda step: step, 0, 10**9, 2)
    with pytest.raises(RuntimeError, match="given up"):
        for _ in running:
            raise RuntimeError("given up")
    del running
    gc.collect()
    assert not threads()


# --- documents


def corpus_of_documents(lengths, eos=9):
    """Tokens that are never eos, but for the last of each document."""
    rng = np.random.default_rng(1)
    documents = [np.append(rng.integers(0, eos, length - 1), eos) for length in lengths]
    return corpus_of(np.concatenate(documents).astype(np.uint16), vocab_size=eos + 1, eos=eos), documents


def test_packed_windows_end_a_segment_with_each_document():
    corpus, _ = corpus_of_documents([3, 1, 5, 7, 2, 6])
    packed, windows = Packed(corpus, 2, 6, seed=3), Windows(corpus, 2, 6, seed=3)
    for step in range(8):
        ours, plain = packed.batch(step, slice(None)), windows.batch(step, slice(None))
        np.testing.assert_array_equal(ours.targets_BT, plain.targets_BT)
        np.testing.assert_array_equal(ours.inputs_BT, plain.inputs_BT)
        for row in range(2):
            segment = 1
            for t in range(6):
                assert ours.segments_BT[row, t] == segment
                segment += int(ours.targets_BT[row, t] == corpus.eos)


@pytest.mark.parametrize("closed", [True, False])
def test_padded_rows_hold_every_token_once_an_epoch(closed):
    lengths = [3, 1, 5, 12, 2, 6, 13]
    corpus, documents = corpus_of_documents(lengths)
    if not closed:  # the last document is cut short, without its eos
        corpus, documents[-1] = corpus_of(corpus.tokens[:-1], 10, eos=9), documents[-1][:-1]
    source = Padded(corpus, 2, 6, seed=3)
    pieces = [document[start : start + 6] for document in documents for start in range(0, len(document), 6)]
    assert (source.num_windows, source.steps_per_epoch) == (len(pieces), Fraction(len(pieces), 2))
    assert source.tokens_per_step * source.steps_per_epoch == len(corpus.tokens)
    for epoch in range(2):
        found = []
        for i in range(epoch * len(pieces), (epoch + 1) * len(pieces)):
            batch = source.batch(i // 2, slice(i % 2, i % 2 + 1))
            there = batch.loss_weights_BT[0] > 0
            np.testing.assert_array_equal(batch.segments_BT[0], there)
            assert there.any() and np.all(np.diff(there.astype(int)) <= 0)
            found.append(tuple(batch.targets_BT[0][there]))
            np.testing.assert_array_equal(batch.inputs_BT[0, 1:], batch.targets_BT[0, :-1])
        assert sorted(found) == sorted(map(tuple, pieces))


def test_documents_are_found_wherever_the_pieces_of_a_text_end(monkeypatch):
    lengths = [3, 1, 5, 12, 2, 6, 13]
    whole, pieces = Padded(corpus_of_documents(lengths)[0], 2, 6, seed=3), batches_module.pieces
    monkeypatch.setattr(batches_module, "pieces", lambda tokens: pieces(tokens, 7))
    cut = Padded(corpus_of_documents(lengths)[0], 2, 6, seed=3)
    for step in range(2 * whole.num_windows):
        np.testing.assert_array_equal(cut.batch(step, slice(None)).targets_BT, whole.batch(step, slice(None)).targets_BT)


def test_each_seed_and_epoch_has_an_order_of_its_own():
    """Not that of one seed's second epoch for the next seed's first."""
    corpus = corpus_of(range(400), 401, eos=400)
    one, other = (Windows(corpus, 4, 8, seed=seed) for seed in (0, 1))
    steps = range(int(one.steps_per_epoch))

    def order(source, epoch):
        first = epoch * len(steps)
        return [int(token) for step in steps for token in source.batch(first + step, slice(None)).targets_BT[:, 0]]

    orders = [order(source, epoch) for source in (one, other) for epoch in (0, 1)]
    assert len(set(map(tuple, orders))) == 4


@pytest.mark.parametrize("architecture", ["rnn", "gru", "lstm", "transformer"])
def test_packed_and_padded_documents_give_the_loss_of_one_at_a_time(architecture):
    """Windows of 8 into which the documents go without a rest; dropout is off, the parameters prefer some tokens clearly."""
    import jax

    corpus, documents = corpus_of_documents([3, 5, 8, 1, 2, 5, 6, 2])
    model, params = model_and_params(architecture, vocab_size=10)
    objective = causal_language_model(model)

    def losses(batch):
        sums, _ = objective(params, None, batch, jax.random.key(0), False)
        return float(sums["loss"]), float(sums["weight"])

    one_at_a_time = 0.0
    for document in documents:
        inputs = np.append(corpus.eos, document[:-1])[None].astype(np.int32)
        ones = np.ones(inputs.shape, np.float32)
        batch = Batch(inputs, document[None].astype(np.int32), ones, None, np.ones(1, bool), np.zeros(1, np.int32))
        one_at_a_time += losses(batch)[0]
    for kind, num_rows in ((Packed, 4), (Padded, 8)):
        loss, weight = losses(kind(corpus, num_rows, 8, seed=0).batch(0, slice(None)))
        assert weight == len(corpus.tokens)
        assert loss == pytest.approx(one_at_a_time, rel=2e-6), kind
    whole, _ = losses(Windows(corpus, 4, 8, seed=0).batch(0, slice(None)))
    assert abs(whole - one_at_a_time) > 1e-3 * one_at_a_time  # seeing the document before does make a difference
