"""`_C.Watch`: every change of what it looks at is seen, and nothing else."""

import gc
import weakref

import pytest

from moeprof import _C

pytestmark = pytest.mark.once


class Thing:
    pass


class Other:
    pass


@pytest.fixture
def watched():
    """(a Watch, the dicts and the object that it looks at)."""
    first, second, thing = {"a": "value", "b": None}, {7: 8}, Thing()
    watch = _C.Watch([(first, "a"), (first, "b"), (first, "none")], [second], [thing])
    return watch, first, second, thing


def test_it_is_true_while_all_is_as_it_was(watched):
    watch, first, second, thing = watched
    assert watch
    first["other"], thing.attribute = 1, 2  # what nobody asked about
    second[7] = 9
    assert watch and watch


CHANGES = {
    "another value": lambda first, second, thing: first.update(a="".join(["val", "ue"])),
    "None is a value": lambda first, second, thing: first.pop("b"),
    "a value where there was none": lambda first, second, thing: first.update(none=None),
    "an entry more": lambda first, second, thing: second.update({1: 1}),
    "an entry less": lambda first, second, thing: second.clear(),
    "another type": lambda first, second, thing: setattr(thing, "__class__", Other),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(watched, change):
    watch, *parts = watched
    change(*parts)
    assert not watch


def test_what_is_put_back_is_as_before(watched):
    watch, first, _, _ = watched
    value = first.pop("a")
    assert not watch
    first["a"] = value
    assert watch


def test_nothing_to_watch_is_true():
    assert _C.Watch([], [], [])


@pytest.mark.parametrize(
    "arguments",
    [
        ([("a", "b")], [], []),
        ([({}, "b", 1)], [], []),
        ([{}], [], []),
        ([], [[]], []),
        ((), [], []),
        ([], [], None),
    ],
    ids=str,
)
def test_other_arguments_are_refused(arguments):
    with pytest.raises(TypeError):
        _C.Watch(*arguments)


def test_a_key_that_is_none_is_an_error():
    with pytest.raises(TypeError, match="unhashable"):
        _C.Watch([({}, [])], [], [])


def test_a_comparison_that_fails_is_its_error():
    class Key:
        fails = False

        def __hash__(self):
            return 1

        def __eq__(self, other):
            if self.fails:
                raise OSError("no comparison")
            return self is other

    table = {Key(): 1}
    watch = _C.Watch([(table, Key())], [], [])
    assert watch
    Key.fails = True
    with pytest.raises(OSError, match="no comparison"):
        bool(watch)


def test_what_it_keeps_is_freed_with_it():
    """Also where it stands in a cycle, as a layer's does."""
    value, thing = Thing(), Thing()
    table = {"a": value}
    table["watch"] = _C.Watch([(table, "a")], [table], [thing])
    seen = weakref.ref(value), weakref.ref(thing)
    del value, thing
    gc.collect()
    assert all(ref() is not None for ref in seen)
    table.pop("a")
    assert seen[0]() is not None  # its address can be no other object's meanwhile
    del table
    gc.collect()
    assert all(ref() is None for ref in seen)
