"""Where in its text a silo was asked to train, and whether somebody chose that place."""

from photon.state.places import Place, chosen, updates_since


def test_places_of_a_run() -> None:
    first, second = Place("alpha", 0, 8, 1), Place("alpha", 8, 16, 2)
    assert chosen(Place("alpha", 5, 9), [first, second], remembers=True)
    assert chosen(Place("pool", 8, 9), [first, second], remembers=True), "another order of the text"
    assert chosen(Place("alpha", 5, 9), [], remembers=True) is None, "counted by an earlier Photon"
    places = {"run": [first, second]}
    assert updates_since(Place("alpha", 7, 9, 5), "run", places) == 3
    assert updates_since(Place("alpha", 16, 24, 5), "run", places) is None
    assert updates_since(Place("alpha", 8, 16, 5), "run", places) is None
    assert updates_since(Place("alpha", 8, 16, 5), "other", places) == 3
