"""The ledger of packed batches is the sum over their documents counted one by one, exactly."""

import numpy as np

from mmtrain.config import ObjectiveConfig, StreamConfig
from mmtrain.flops import Ledger, read_account, step_flops
from mmtrain.flops.journal import Journal
from mmtrain.shards import TokenShards, write_tokens
from mmtrain.stream import Source, Stream
from mmtrain.train.token_learner import TokenLearner
from mmtrain.train.window import Window
from tests.stream.conftest import VOCABULARY, token_document
from tests.train.small_run import WORLD, small_config


def test_packed_batches_cost_what_their_documents_cost_one_by_one(tmp_path):
    """Through the real stream: CM3 masks, padding, rows of several documents of unequal length."""
    documents = (token_document(i, "a", 2 + i % 11, 16) for i in range(40))
    write_tokens(tmp_path / "tokens", documents, VOCABULARY, "t" * 12, "i" * 12)
    shards = TokenShards(tmp_path / "tokens")
    rows = StreamConfig(sequence_length=64)
    stream = Stream([Source("a", shards)], VOCABULARY, rows, ObjectiveConfig(), None, seed=0)
    config = small_config(3)
    learner = TokenLearner(config, VOCABULARY, WORLD.device)
    window = Window(WORLD, learner, 64, ("a",))
    apart, lengths = 0, []
    for step in range(3):
        batch, counts = stream.prepare(step)
        window.add_step(counts)
        window.add_work(learner.inputs(batch, counts, "train")[1])
        for row in batch["document"].numpy():
            lengths += np.unique(row[row >= 0], return_counts=True)[1].tolist()
    for length in lengths:
        apart += step_flops(config.model, VOCABULARY.size, [length], 1, length).model_causal
    totals = window.reduce()
    assert len(set(lengths)) > 5 and totals.padding > 0 and len(lengths) > totals.rows
    assert totals.flops.model_causal == apart
    journal, ledger = Journal(tmp_path), Ledger()
    journal.start(ledger, 0, {})
    ledger.book_training(totals.flops_by_kind)
    journal.write(ledger, 3)
    assert read_account(tmp_path).ledger.training_total == apart
