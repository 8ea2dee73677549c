import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmtrain.config import UserError
from mmtrain.tokens import Vocabulary

sizes = st.builds(Vocabulary, st.integers(1, 70_000), st.integers(0, 20_000), st.integers(0, 600))


@given(sizes)
def test_ranges_follow_each_other_and_size_is_padded(vocabulary):
    assert vocabulary.text_start == vocabulary.eoss + 1 == 6
    assert vocabulary.text_end == vocabulary.image_start
    assert vocabulary.image_end == vocabulary.sentinel_start
    assert vocabulary.sentinel_end == 6 + vocabulary.text_size + vocabulary.image_codes + vocabulary.num_sentinels
    assert vocabulary.size % 128 == 0 and 0 <= vocabulary.size - vocabulary.sentinel_end < 128


@given(sizes)
def test_dtype_holds_every_id(vocabulary):
    assert np.iinfo(vocabulary.dtype).max >= vocabulary.size - 1


@given(sizes)
def test_modality_counts_are_the_sizes_in_numpy_and_torch(vocabulary):
    ids = np.arange(vocabulary.size)
    modality = vocabulary.modality(ids.astype(vocabulary.dtype))
    special = vocabulary.size - vocabulary.text_size - vocabulary.image_codes
    assert np.bincount(modality, minlength=3).tolist() == [special, vocabulary.text_size, vocabulary.image_codes]
    assert vocabulary.modality(torch.from_numpy(ids)).tolist() == modality.tolist()


def test_saved_vocabulary_loads_equal(tmp_path):
    vocabulary = Vocabulary(1024, 1000, 16)
    vocabulary.save(tmp_path / "vocabulary.json")
    assert Vocabulary.load(tmp_path / "vocabulary.json") == vocabulary
    assert vocabulary.fingerprint != Vocabulary(1024, 1000, 17).fingerprint


def test_changed_file_is_refused(tmp_path):
    path = tmp_path / "vocabulary.json"
    Vocabulary(1024, 1000, 16).save(path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"image_codes": 512}))
    with pytest.raises(UserError, match="not as it was written"):
        Vocabulary.load(path)
    path.write_text("{")
    with pytest.raises(UserError, match="cannot read"):
        Vocabulary.load(path)
