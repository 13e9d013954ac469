from collections import Counter

import numpy as np
import pytest

from photon.data.documents import Document
from photon.data.partition import folder_name, parse_partition, partition_documents
from photon.errors import PhotonError


def sources(**counts: int) -> dict[str, list[Document]]:
    return {name: [Document(name, f"{name} {i}") for i in range(count)] for name, count in counts.items()}


def texts(silos: dict[str, list[Document]]) -> list[str]:
    return sorted(document.text for documents in silos.values() for document in documents)


def heterogeneity(silos: dict[str, list[Document]]) -> float:
    """Return how far, in total variation, the silos' mixtures of sources lie from the whole's, on average."""
    names = sorted({d.source for documents in silos.values() for d in documents})
    counts = np.array(
        [[Counter(d.source for d in documents)[n] for n in names] for documents in silos.values()]
    )
    mixtures, whole = counts / counts.sum(axis=1, keepdims=True), counts.sum(axis=0) / counts.sum()
    return float(np.abs(mixtures - whole).sum(axis=1).mean() / 2)


@pytest.mark.parametrize(
    "spec", ["iid:4", "iid:7", "iid:1", "dirichlet:5:0.1", "dirichlet:5:10", "dirichlet:30:0.01"]
)
def test_every_document_is_used_once_and_no_silo_is_empty(spec):
    whole = sources(a=40, b=3, c=17)
    silos = partition_documents(whole, parse_partition(spec), seed=1)
    assert len(silos) == int(spec.split(":")[1])
    assert texts(silos) == texts(whole)
    sizes = [len(documents) for documents in silos.values()]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 3
    assert partition_documents(whole, parse_partition(spec), seed=1) == silos


def test_iid_silos_hold_the_mixture_of_the_whole_and_change_with_the_seed():
    whole = sources(a=600, b=300)
    silos = partition_documents(whole, parse_partition("iid:3"), seed=0)
    for documents in silos.values():
        assert len(documents) == 300
        assert 170 <= Counter(d.source for d in documents)["a"] <= 230
    assert silos != partition_documents(whole, parse_partition("iid:3"), seed=1)


def test_the_smaller_alpha_the_more_the_silos_differ():
    whole = sources(a=300, b=150, c=150, d=60)

    def mean(alpha: float) -> float:
        partition = parse_partition(f"dirichlet:6:{alpha}")
        return float(
            np.mean([heterogeneity(partition_documents(whole, partition, seed)) for seed in range(5)])
        )

    skewed, middle, even = mean(0.05), mean(1.0), mean(1000.0)
    assert skewed > 1.5 * middle
    assert middle > 3 * even
    assert even < 0.05


def test_dirichlet_mixtures_are_near_those_drawn_where_the_sources_allow():
    # Equal sources and many silos: what is drawn can nearly be dealt, so its variance is that of theory.
    whole = sources(a=4000, b=4000)
    silos = partition_documents(whole, parse_partition("dirichlet:80:2.0"), seed=3)
    shares = [Counter(d.source for d in documents)["a"] / len(documents) for documents in silos.values()]
    # A share of Dirichlet(2, 2) is Beta(2, 2): variance 1/20.
    assert np.var(shares) == pytest.approx(1 / 20, rel=0.35)


def test_by_source_and_by_field_keep_documents_where_they_belong():
    whole = sources(a=2, b=1)
    assert partition_documents(whole, parse_partition("by-source"), 0) == whole
    rows = {"file": [Document("Pile-CC", "x"), Document("USPTO Backgrounds", "y"), Document("Pile-CC", "z")]}
    silos = partition_documents(rows, parse_partition("field:meta.pile_set_name"), 0)
    assert {name: [d.text for d in documents] for name, documents in silos.items()} == {
        "Pile-CC": ["x", "z"],
        "USPTO-Backgrounds": ["y"],
    }


def test_two_values_with_one_silo_name_are_an_error():
    with pytest.raises(PhotonError, match="give the same silo name 'a-b'"):
        partition_documents(
            {"f": [Document("a b", "x"), Document("a/b", "y")]}, parse_partition("field:k"), 0
        )


@pytest.mark.parametrize(
    ("value", "name"), [("../../etc", "etc"), ("en", "en"), ("a  b!c", "a-b-c"), ("x" * 99, "x" * 64)]
)
def test_folder_names(value, name):
    assert folder_name(value) == name


def test_a_value_without_letters_is_no_folder_name():
    with pytest.raises(PhotonError, match="cannot be made a silo name"):
        folder_name("日本")


def test_fewer_documents_than_silos_is_an_error():
    with pytest.raises(PhotonError, match="3 documents cannot fill 4 silos"):
        partition_documents(sources(a=3), parse_partition("iid:4"), 0)


@pytest.mark.parametrize(
    "spec",
    [
        *["", "iid", "iid:", "iid:0", "iid:-1", "iid:two", "iid:2:3", "by-source:2", "random:3", "field"],
        *["field:", "dirichlet:4", "dirichlet:4:0", "dirichlet:4:nan", "dirichlet:4:inf", "dirichlet:0:1"],
    ],
)
def test_specifications_that_are_not_understood(spec):
    with pytest.raises(PhotonError, match="is not understood: use by-source"):
        parse_partition(spec)
