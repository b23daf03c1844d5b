"""lib/stop.py: text in pieces, up to a stop text."""
import itertools
import random

import pytest

from lib.stop import StopText


def feed(stop, pieces):
    """(what is printed after each piece, what the end adds)."""
    cut = StopText(stop)
    return [cut(piece) for piece in pieces], cut.flush(), cut.found


@pytest.mark.parametrize("text, stop", [
    ("one\n\ntwo", "\n\n"), ("aabaabaaab!", "aabaaab"), ("ababac", "abac"), ("xaaaa", "aaa"),
    ("stop", "stop"), ("almost sto", "stop"), ("no", "stop"), ("aaaa", "a"), ("sstop", "stop"), ("", "x")])
def test_every_way_to_cut_a_text_into_pieces(text, stop):
    """The pieces together end where the stop text begins. Nothing of it is printed on the way, and nothing is
    held back but what may be its beginning."""
    before, found, _ = text.partition(stop)
    for cuts in itertools.product([False, True], repeat=max(0, len(text) - 1)):
        places = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(text)]
        cut, printed = StopText(stop), ""
        for a, b in zip(places, places[1:]):
            printed += cut(text[a:b])
            seen = text[:b]
            if stop in seen:
                assert printed == before
            else:
                waiting = seen.removeprefix(printed)
                assert printed + waiting == seen and stop.startswith(waiting)
                assert not any(seen.endswith(stop[:n]) for n in range(len(waiting) + 1, len(stop)))
        assert printed + cut.flush() == before and cut.found == bool(found)
        assert cut("more") == ("" if found else "more")


def test_without_a_stop_text_all_passes_at_once():
    text = "".join(random.Random(0).choices("ab\n", k=50))
    assert feed(None, text) == (list(text), "", False)


def test_empty_pieces_change_nothing():
    """Of tokens that end inside a character."""
    assert feed("ab", ["a", "", "b", "c"]) == (["", "", "", ""], "", True)
    assert feed("ab", ["a", "", "c"]) == (["", "", "ac"], "", False)


def test_an_empty_stop_text_is_refused():
    with pytest.raises(ValueError, match="empty"):
        StopText("")
