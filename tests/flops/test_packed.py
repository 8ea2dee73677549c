"""The ledger of packed batches is the sum over their documents counted one by one, exactly."""

from mmtrain.flops import Ledger, read_account, step_flops
from mmtrain.flops.count import document_lengths
from mmtrain.flops.journal import Journal
from mmtrain.train.token_learner import TokenLearner
from mmtrain.train.window import Window
from tests.train.small_run import VOCABULARY, WORLD, FixedStream, small_config


def test_packed_batches_cost_what_their_documents_cost_one_by_one(tmp_path):
    config = small_config(3)
    stream = FixedStream(config.stream)
    learner = TokenLearner(config, VOCABULARY, WORLD.device)
    window = Window(WORLD, learner, 64, ("fixed",))
    apart = 0
    for step in range(3):
        batch, counts = stream.prepare(step)
        window.add_step(counts)
        window.add_work(learner.inputs(batch, counts, "train")[1])
        for length in document_lengths(batch["document"]):
            apart += step_flops(config.model, VOCABULARY.size, [int(length)], 1, int(length)).model_causal
    totals = window.reduce()
    assert totals.flops.model_causal == apart > 0
    journal, ledger = Journal(tmp_path), Ledger()
    journal.start(ledger, 0, {})
    ledger.book_training(totals.flops_by_kind)
    journal.write(ledger, 3)
    assert read_account(tmp_path).ledger.training_total == apart
