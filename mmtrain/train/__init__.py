"""Training: a frozen config in a run directory goes in; checkpoints, metrics and a compute ledger come out.

The loop never waits for tracking, and no step is ever lost or repeated in silence. Nothing is imported here: who only
asks how a run is doing (`train.status`) must not wait for torch.
"""
