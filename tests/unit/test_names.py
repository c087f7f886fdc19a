from __future__ import annotations

from watchd.service.names import NameBook


def test_a_layer_is_named_by_its_path_and_the_same_at_every_start() -> None:
    first = NameBook({}).take(b"/srv/base", 2)
    assert first == "srv-base"
    assert NameBook({first: b"/srv/base"}).take(b"/srv/base", 77) == first


def test_the_configured_name_wins() -> None:
    assert NameBook({}).take(b"/srv/base", 2, configured="base") == "base"


def test_names_are_fit_for_labels_and_file_names() -> None:
    book = NameBook({})
    assert book.take(b"/", 2) == "root"
    assert book.take(b"/a b/\xff\xfe/{c}=\n", 3) == "a-b-c"
    assert book.take("/überall".encode(), 4) == "berall"


def test_two_layers_at_one_path_are_told_apart() -> None:
    """Two containers see different directories at the same path."""
    book = NameBook({})
    names = [book.take(b"/lower", inode) for inode in (5, 6, 6, 6)]
    assert names == ["lower", "lower-6", "lower-6-1", "lower-6-2"]


def test_paths_that_differ_only_in_unfit_characters_are_told_apart() -> None:
    book = NameBook({})
    assert book.take(b"/a/b", 1) == "a-b"
    assert book.take(b"/a-b", 2) == "a-b-2"


def test_the_name_of_another_path_in_the_journal_is_not_taken_over() -> None:
    """Its records would be taken for this layer's."""
    book = NameBook({"base": b"/srv/old"})
    assert book.take(b"/srv/new", 9, configured="base") == "base-9"
    assert book.take(b"/srv/old", 1, configured="base") == "base"


def test_a_layer_that_comes_back_has_its_name_again_and_no_other_layer_has_it() -> None:
    book = NameBook({})
    name = book.take(b"/srv/base", 2)
    book.release(name)
    assert book.take(b"/elsewhere", 3, configured=name) == f"{name}-3"
    assert book.take(b"/srv/base", 2) == name
