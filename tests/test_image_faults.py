"""The short form of the damaged photos: every kind with every mutation once."""

from tests.faults import images


def test_every_reader_survives_damaged_photos_and_they_agree():
    count = len(images.MUTATIONS) * len(images.seeds())
    tally = images.attack(count)
    assert sum(tally.values()) == count
    outcomes = {outcome for _, outcome in tally}
    assert outcomes == {"read", "refused"}, "whole and damaged ones must both be among them, and none may differ"
    assert tally["empty", "refused"] and not tally["empty", "read"]
