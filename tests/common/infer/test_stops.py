import random

import pytest

from common.infer.stops import find_stop, settled, tokens_to_stop


def test_the_first_of_several() -> None:
    assert find_stop("abcabd", ["abd", "ca", "zz"]) == 2
    assert find_stop("abc", ["abcd"]) is None
    assert find_stop("abc", []) is None


@pytest.mark.parametrize("stops", [["\n\n"], ["END", "ENOUGH"], ["aab", "b"], []])
def test_shown_text_never_holds_what_is_cut(stops: list[str]) -> None:
    """Texts that grow by random pieces: what was shown is always a prefix of what remains in the end."""
    rng = random.Random(0)
    for _ in range(300):
        letters = "".join(sorted(set("".join(stops) + "xy")))
        whole = "".join(rng.choice(letters) for _ in range(24))
        place = find_stop(whole, stops)
        final = whole if place is None else whole[:place]
        for end in range(len(whole) + 1):
            if find_stop(whole[:end], stops) is not None:
                break
            assert final.startswith(whole[: settled(whole[:end], stops)])


def test_nothing_is_kept_back_without_need() -> None:
    assert settled("abc", ["xyz"]) == 3
    assert settled("abx", ["xyz"]) == 2
    assert settled("axy", ["xyz", "yq"]) == 1
    assert settled("a\ufffd\ufffd", []) == 1
    assert settled("a" + "\ufffd" * 9, []) == 10  # no unfinished character is so long


def test_fewest_tokens() -> None:
    pieces = ["a", "b", "EN", "D", "END", "c"]

    def write(n: int) -> str:
        return "".join(pieces[:n])

    assert tokens_to_stop(write, 0, 6, ["END"]) == (4, "ab")
    assert tokens_to_stop(write, 3, 6, ["END"]) == (4, "ab")
    assert tokens_to_stop(write, 0, 3, ["END"]) is None
    assert tokens_to_stop(write, 0, 6, ["Dx", "b"]) == (2, "a")
