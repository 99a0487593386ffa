"""A short form of tests/soak.py: between looks at valid nothing is compiled again, and no file or thread stays open."""

import statistics

import pytest
from helpers import draft, write_corpus
from soak import Seen, slope, soak


@pytest.mark.parametrize("architecture", ["lstm", "transformer"])
def test_nothing_grows_from_look_to_look(architecture, tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    config = draft(
        corpus,
        architecture,
        model__dropout_rate=0.1,
        training__num_steps=60,
        training__evaluate_every_steps=5,
        training__checkpoint_every_steps=2,
        training__log_every_steps=1,
    )
    seen = soak(config, str(tmp_path / "run"), seconds=600)
    assert [one.step for one in seen] == list(range(5, 61, 5))
    first, *others = seen
    assert first.compilations > 0
    assert {one.compilations for one in others} == {first.compilations}
    early, late = others[: len(others) // 2], others[len(others) // 2 :]
    for what in ("threads", "files"):  # one more a look would be six
        assert statistics.median(getattr(one, what) for one in late) <= statistics.median(getattr(one, what) for one in early) + 1


def test_the_slope_of_what_is_seen():
    seen = [Seen(step, step * 60.0, 100 + step / 60 * 7, 5, 2, 9) for step in range(40)]
    grown, error = slope(seen)
    assert grown == pytest.approx(7, rel=1e-9) and error == pytest.approx(0, abs=1e-9)
