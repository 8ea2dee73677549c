from dataclasses import dataclass, field
import torch
@dataclass
class Verdict:
    sentences: list = field(default_factory=list); rollback: bool=False; stop: str|None=None
class Health:
    def __init__(self, config, device): pass
    def factor(self, loss): return torch.ones(())
    def observe(self, step, loss, norm): pass
    def verdict(self): return Verdict()
    def row(self): return {}
    def state(self): return {}
    def load(self, s): pass
class Skips:
    def batch_index(self, step): return step
    def state(self): return {}
    def load(self, s): pass
