"""Answers on disk: whole or absent, shared by threads and connections, and never unpickled or
believed when damaged.
"""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opdlab.errors import DamagedFile, OpdlabError
from opdlab.teachers.cache import Cache, key_of, rescue

ANSWERS = st.dictionaries(
    st.text(max_size=9), st.one_of(st.text(max_size=30), st.integers(), st.none()), max_size=4
)


@given(ANSWERS)
def test_what_goes_in_comes_out(answer):
    cache = Cache()
    assert cache.get("k") is None
    cache.put("k", {"old": 1})
    cache.put("k", answer)
    assert cache.get("k") == answer


def test_it_outlives_the_object(tmp_path):
    Cache(tmp_path / "a" / "c.sqlite").put("k", {"text": "é\n🙂"})
    assert Cache(tmp_path / "a" / "c.sqlite").get("k") == {"text": "é\n🙂"}


def test_threads_and_objects_share_a_file(tmp_path):
    caches = [Cache(tmp_path / "c.sqlite") for _ in range(2)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: caches[i % 2].put(str(i), {"i": i}), range(60)))
    assert [caches[1 - i % 2].get(str(i)) for i in range(60)] == [{"i": i} for i in range(60)]


def test_many_make_the_same_file_at_once(tmp_path):
    for n in range(20):
        caches, gate = [Cache(tmp_path / f"{n}.sqlite") for _ in range(8)], Barrier(8)

        def first(i, caches=caches, gate=gate):
            gate.wait()
            caches[i].put(str(i), {"i": i})

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(first, range(8)))
        assert [caches[0].get(str(i)) for i in range(8)] == [{"i": i} for i in range(8)]


def test_nothing_is_made_before_it_is_needed(tmp_path):
    Cache(tmp_path / "c.sqlite")
    assert list(tmp_path.iterdir()) == []


def test_damage_is_an_error_and_not_an_answer(tmp_path):
    (tmp_path / "text").write_text("not a database, but long enough to look at " * 40)
    with pytest.raises(
        DamagedFile,
        match=(
            r"text is not a cache of teachers' answers as it was written"
            r" \(file is not a database\)\. Delete it, give"
        ),
    ):
        Cache(tmp_path / "text").get("k")
    cache = Cache(tmp_path / "c.sqlite")
    cache.put("k", {"text": "right"})
    with sqlite3.connect(tmp_path / "c.sqlite") as other:
        other.execute("UPDATE answers SET answer = replace(answer, 'right', 'wrong')")
    with pytest.raises(DamagedFile, match="a row is not what was written"):
        cache.get("k")
    cache.put("k", {"text": "right"})
    with sqlite3.connect(tmp_path / "c.sqlite") as other:
        other.execute("INSERT INTO answers SELECT 'moved', answer, checksum FROM answers")
    with pytest.raises(DamagedFile, match="a row is not what was written"):
        cache.get("moved")


def test_a_place_that_cannot_be_written_to_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OpdlabError, match=r"cannot be used \(.*\)\. Make room, or give the teacher another cache="
    ):
        Cache(tmp_path / "file" / "c.sqlite").put("k", {})
    (tmp_path / "folder").mkdir()
    with pytest.raises(OpdlabError, match="cannot be used"):
        Cache(tmp_path / "folder").get("k")


def test_keys_tell_all_questions_apart():
    asked = {"model": "a", "messages": [{"role": "user", "content": "b"}], "temperature": 1.0}
    assert key_of(asked) == key_of(dict(reversed(asked.items())))
    others = [
        asked | {"model": "b"},
        asked | {"temperature": 0.5},
        asked | {"messages": []},
        [asked, 0],
        [asked, 1],
    ]
    assert len({key_of(x) for x in [asked, *others]}) == 6


def test_the_file_is_private(tmp_path):
    (tmp_path / "old.sqlite").touch(0o644)
    for name in ("new.sqlite", "old.sqlite"):
        Cache(tmp_path / name).put("k", {"text": "secret"})
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600


def test_a_cache_says_how_many_answers_are_lost_and_saves_the_others(tmp_path):
    cache = Cache(path := tmp_path / "c.sqlite")
    for i in range(20):
        cache.put(str(i), {"i": i})
    with sqlite3.connect(path) as other:
        other.execute("DROP TRIGGER count_down")
        other.execute("DELETE FROM answers WHERE key IN ('3', '4')")
        other.execute("UPDATE answers SET answer = '{}' WHERE key = '7'")
    with pytest.raises(DamagedFile, match=r"3 of its 20 answers are lost.*rescue\(path, to\)"):
        Cache(path).get("1")
    assert rescue(path, tmp_path / "new.sqlite") == 17
    saved = Cache(tmp_path / "new.sqlite")
    lost = {3, 4, 7}
    assert [saved.get(str(i)) for i in range(20)] == [
        None if i in lost else {"i": i} for i in range(20)
    ]
    with pytest.raises(OpdlabError, match="exists already"):
        rescue(path, tmp_path / "new.sqlite")


def test_a_cache_of_the_earlier_form_is_taken_up(tmp_path):
    with sqlite3.connect(path := tmp_path / "c.sqlite") as old:
        old.execute("PRAGMA journal_mode=WAL")
        old.execute("CREATE TABLE answers (key TEXT PRIMARY KEY, answer TEXT, checksum TEXT)")
        old.execute("INSERT INTO answers VALUES ('k', '{}', ?)", (key_of(["k", "{}"]),))
    old.close()
    cache = Cache(path)
    assert cache.get("k") == {}
    cache.put("l", {"a": 1})
    assert Cache(path).get("l") == {"a": 1}
    assert [one.name for one in tmp_path.iterdir()] == ["c.sqlite"]
