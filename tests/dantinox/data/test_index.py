"""The index of a corpus: duplicates, splits and samples, against lists in memory."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dantinox.data import index as module
from dantinox.data.blocks import SKIP
from dantinox.data.index import Index, IndexPlan, records_of
from tests.helpers.corpus_in_memory import Document, distinct, train_val_split


def index_of(folder, texts) -> Index:
    (folder / "index").write_bytes(records_of(dict(enumerate(texts)), len(texts)).tobytes())
    index = Index(folder / "index")
    index.drop_duplicates()
    return index


def split_of(index: Index, texts) -> tuple[list[str], list[str]]:
    """The texts of train and validation by the plan, which is taken in uneven steps."""
    plan, train, val, start = IndexPlan(index), [], [], 0
    for step in np.resize([1, 3, 2], len(texts)).tolist():
        for text, chars in zip(texts[start : start + step], plan.take(min(step, len(texts) - start)).tolist()):
            if chars != SKIP:
                train += [text[:chars]] if chars else []
                val += [text[chars:]] if chars < len(text) else []
        start = min(start + step, len(texts))
    return train, val


@settings(deadline=None)
@given(
    st.lists(st.text("ab é", max_size=9) | st.sampled_from(["aa", "b" * 40]), min_size=1, max_size=30),
    st.floats(0.01, 0.99),
    st.sampled_from([1, 2, 100]),
)
def test_split_is_that_of_lists(tmp_path_factory, texts, fraction, size):
    """In chunks and buckets of a few documents as in one."""
    assume(any(texts))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "CHUNK", size)
        patched.setattr(module, "BUCKET", size)
        index = index_of(tmp_path_factory.mktemp("index"), texts)
        documents = distinct(texts)
        assert index.duplicates == sum(map(bool, texts)) - len(documents)
        if sum(len(document.text) for document in documents) < 2:
            with pytest.raises(ValueError, match="allowed: at least 2"):
                index.split(fraction)
            return
        index.split(fraction)
        train, val = train_val_split(documents, fraction)
        assert split_of(index, texts) == ([d.text for d in train], [d.text for d in val])
        assert [split.docs for split in index.sizes()] == [len(train), len(val)]
        assert train and val


def test_one_large_document_stays_in_train(tmp_path):
    texts = [f"{i:04}" * 25 for i in range(100)] + ["x" * 900]
    index = index_of(tmp_path, texts)
    index.split(0.1)
    assert all("x" not in text for text in split_of(index, texts)[1])


def test_oracle_splits_by_content():
    documents = [Document(str(i), f"{i:04}" * 25) for i in range(100)]
    train, val = train_val_split(documents, 0.1)
    assert len(val) == 10 and set(train).isdisjoint(val)


@pytest.mark.parametrize("length", [50, 5000, 10**6])
def test_sample_is_spread_over_the_training_text(tmp_path, length):
    """Of about the size that is asked for, whatever the length of documents."""
    total, size = 2 * 10**6, 10**5
    records = records_of({}, total // length)
    records["size"] = records["chars"] = length
    records["digest"][:, :8] = np.arange(len(records), dtype="<u8")[:, None].view("u1")
    (tmp_path / "index").write_bytes(records.tobytes())
    index = Index(tmp_path / "index")
    index.drop_duplicates()
    plan = IndexPlan(index, size)
    taken = np.flatnonzero(plan.take(len(records)) != SKIP)
    assert list(plan.offsets) == (taken * length).tolist()
    assert taken[0] == 0 and taken[-1] >= 0.9 * len(records) - 1
    bytes_taken = sum(plan.sample.has(offset + i) for offset in plan.offsets for i in range(0, length, 10)) * 10
    assert 0.9 * size <= bytes_taken <= 1.1 * size
