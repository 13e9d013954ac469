import random

import pytest

from photon.data.alike import clusters, look
from photon.data.documents import Document
from photon.data.split import drop_exact_duplicates, split_documents
from photon.errors import PhotonError


def jaccard(first: str, second: str) -> float:
    """Overlap of the sets of three-word shingles, computed plainly."""
    sets = []
    for text in (first, second):
        words = "".join(c if c.isalpha() else " " for c in text.lower()).split()
        sets.append({tuple(words[i : i + 3]) for i in range(len(words) - 2)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def cluster_near_duplicates(texts, comparison="words"):
    # As in two processes.
    half = len(texts) // 2
    return clusters(
        [look(part, len(part), comparison, seed=0) for part in (texts[:half], texts[half:])]
    ).tolist()


def edited(text: str, changes: int, seed: int) -> str:
    rng = random.Random(seed)
    words = text.split()
    for place in rng.sample(range(len(words)), changes):
        words[place] = "changed" + "xyz"[place % 3]
    return " ".join(words)


NEAR = {
    "white space": lambda text: text.replace(" ", "   ").replace("\n", "\r\n\r\n"),
    "case": str.upper,
    "digits": lambda text: text + " version 12.5",
    "punctuation": lambda text: text.replace(" ", ", ") + "!",
    "two words": lambda text: edited(text, 2, 0),
    "four words": lambda text: edited(text, 4, 1),
    "a word less": lambda text: text.split(" ", 1)[1],
    "a sentence more": lambda text: text + "and one more sentence at the end",
    "a banner": lambda text: "written by somebody in two thousand\n" + text,
}


@pytest.mark.parametrize("kind", NEAR)
def test_near_duplicates_are_one_cluster_and_unrelated_texts_are_not(make_text, kind):
    originals = [make_text(seed, words=150) for seed in range(20)]
    copies = [NEAR[kind](text) for text in originals]
    clusters = cluster_near_duplicates(originals + copies)
    assert clusters == list(range(20)) * 2


def test_what_is_joined_overlaps_and_what_is_not_does_not(make_text):
    base = [make_text(seed, words=200) for seed in range(60)]
    changed = [edited(text, 1 + 2 * (number % 30), number) for number, text in enumerate(base)]
    for first, second in zip(base, changed, strict=True):
        joined = len(set(cluster_near_duplicates([first, second]))) == 1
        overlap = jaccard(first, second)
        if overlap > 0.75:
            assert joined
        if overlap < 0.35:
            assert not joined


@pytest.mark.parametrize(
    ("texts", "clusters"),
    [
        (["", "  ", "a"], [0, 0, 2]),
        (["one two", "One, TWO.", "two one"], [0, 0, 2]),
        (["123", "4 5"], [0, 1]),
        (["++ -- **", "++ --**", "++"], [0, 0, 2]),
        (["日本語の文章を比べる。", "日本語の文章を比べる!", "まったく別の内容が書かれている。"], [0, 0, 2]),
        ([], []),
    ],
)
def test_texts_of_few_or_no_words(texts, clusters):
    assert cluster_near_duplicates(texts) == clusters


def test_exact_duplicates_are_dropped_across_sources():
    sources = {
        "b": [Document("b1", "same"), Document("b2", "own"), Document("b3", "own")],
        "a": [Document("a1", "same\n"), Document("a2", "Same")],
    }
    kept, dropped = drop_exact_duplicates(sources)
    assert {name: [d.source for d in documents] for name, documents in kept.items()} == {
        "a": ["a1", "a2"],
        "b": ["b2"],
    }
    assert dropped == {"a": 0, "b": 2}


def test_no_near_duplicate_straddles_the_split_within_or_across_silos(make_text):
    originals = [make_text(seed) for seed in range(60)]
    silos = {
        "first": [Document(f"{i}", text) for i, text in enumerate(originals)],
        "second": [Document(f"{i}", edited(text, 2, i)) for i, text in enumerate(originals[:40])]
        + [Document(f"{100 + i}", make_text(100 + i)) for i in range(30)]
        + [Document(f"{100 + i}", make_text(100 + i).upper()) for i in range(10)],
    }
    split = split_documents(silos, 0.2, 100, seed=0)
    side_of: dict[str, set[str]] = {}
    for train, validation in split.values():
        for side, documents in (("train", train), ("validation", validation)):
            for document in documents:
                side_of.setdefault(document.source, set()).add(side)
    # A document and its copies carry one number as their source.
    assert {len(sides) for sides in side_of.values()} == {1}
    held_out = [text for _, validation in split.values() for text in validation]
    assert len(held_out) > 20
    for document in held_out:
        for train, _ in split.values():
            assert all(jaccard(document.text, other.text) < 0.5 for other in train)


def test_validation_gets_its_share_and_the_rest_is_train(make_text):
    silos = {
        "large": [Document("l", make_text(i)) for i in range(200)],
        "small": [Document("s", make_text(1000 + i)) for i in range(8)],
    }
    split = split_documents(silos, 0.1, 50, seed=0)
    for name, documents in silos.items():
        train, validation = split[name]
        assert sorted(d.text for d in train + validation) == sorted(d.text for d in documents)
    assert 18 <= len(split["large"][1]) <= 25
    assert 1 <= len(split["small"][1]) <= 2
    assert split_documents(silos, 0.1, 50, seed=0) == split
    assert split_documents(silos, 0.1, 50, seed=1) != split


def test_a_cluster_too_large_for_validation_stays_in_train(make_text):
    copies = [Document("copy", edited(make_text(1), 1, i)) for i in range(30)]
    others = [Document("other", make_text(i)) for i in range(2, 32)]
    for seed in range(5):
        train, validation = split_documents({"s": copies + others}, 0.1, 100, seed)["s"]
        assert {d.source for d in validation} == {"other"}
        assert len(train) > 50


@pytest.mark.parametrize("count", [1, 5])
def test_a_silo_that_is_one_cluster_is_an_error_that_names_it(make_text, count):
    silos = {
        "fine": [Document("f", make_text(i)) for i in range(5)],
        "lonely": [Document("l", edited(make_text(99), 1, i)) for i in range(count)],
    }
    message = "silo 'lonely' has one document" if count == 1 else "silo 'lonely' cannot be split"
    with pytest.raises(PhotonError, match=message):
        split_documents(silos, 0.1, 100, seed=0)


def sums(count):
    draw = random.Random(0)
    pairs = [(draw.randrange(10**5), draw.randrange(10**5)) for _ in range(count)]
    return [f"What is {a} plus {b}? Answer: {a + b}" for a, b in pairs]


def genome(count):
    draw = random.Random(0)
    return [" ".join(draw.choices("ACGT", k=400)) for _ in range(count)]


@pytest.mark.parametrize(("make", "less"), [(sums, ("digits", "none")), (genome, ("none",))])
def test_texts_of_one_template_can_be_split_by_document(make, less):
    silos = {"a": [Document(str(number), text) for number, text in enumerate(make(300))]}
    with pytest.raises(PhotonError, match=f"--near-duplicates.* {less[0]}" if less[1:] else "or none"):
        split_documents(silos, 0.1, 100, seed=0)
    for comparison in less:
        train, validation = split_documents(silos, 0.1, 100, seed=0, comparison=comparison)["a"]
        assert len(train) + len(validation) == 300
        assert 27 <= len(validation) <= 38
        # Not the first of them: the texts differ in what the order of clusters does not look at.
        assert max(int(document.source) for document in validation) > 200


def test_with_digits_texts_that_differ_in_words_or_in_few_digits_are_still_alike(make_text):
    text = make_text(1, words=150)
    texts = [text, edited(text, 2, 0), text + " version 12.5", make_text(2, words=150)]
    assert cluster_near_duplicates(texts, comparison="digits") == [0, 0, 0, 3]
    assert cluster_near_duplicates(texts, comparison="none") == [0, 1, 2, 3]
