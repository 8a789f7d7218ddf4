import random

import pytest

from common.infer.stops import find_stop, settled_length, tokens_to_stop


def test_find_stop_returns_the_first_of_several() -> None:
    assert find_stop("abcabd", ["abd", "ca", "zz"]) == 2
    assert find_stop("abc", ["abcd"]) is None
    assert find_stop("abc", []) is None


@pytest.mark.parametrize("stops", [["\n\n"], ["END", "ENOUGH"], ["aab", "b"], []])
def test_shown_text_is_never_cut_later(stops: list[str]) -> None:
    """In texts that grow by random pieces, what was shown is always a prefix of the final text."""
    rng = random.Random(0)
    for _ in range(300):
        letters = "".join(sorted(set("".join(stops) + "xy")))
        whole = "".join(rng.choice(letters) for _ in range(24))
        place = find_stop(whole, stops)
        final = whole if place is None else whole[:place]
        for end in range(len(whole) + 1):
            if find_stop(whole[:end], stops) is not None:
                break
            assert final.startswith(whole[: settled_length(whole[:end], stops)])


def test_only_possible_stops_and_characters_are_held_back() -> None:
    assert settled_length("abc", ["xyz"]) == 3
    assert settled_length("abx", ["xyz"]) == 2
    assert settled_length("axy", ["xyz", "yq"]) == 1
    assert settled_length("a\ufffd\ufffd", []) == 1
    assert settled_length("a" + "\ufffd" * 9, []) == 10  # no unfinished character is that long


def test_tokens_to_stop_returns_the_fewest_tokens() -> None:
    pieces = ["a", "b", "EN", "D", "END", "c"]

    def write(n: int) -> str:
        return "".join(pieces[:n])

    assert tokens_to_stop(write, 0, 6, ["END"]) == (4, "ab")
    assert tokens_to_stop(write, 3, 6, ["END"]) == (4, "ab")
    assert tokens_to_stop(write, 0, 3, ["END"]) is None
    assert tokens_to_stop(write, 0, 6, ["Dx", "b"]) == (2, "a")
