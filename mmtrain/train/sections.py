import contextlib
class Sections:
    def __init__(self, device, on_enter=None): pass
    def __call__(self, name): return contextlib.nullcontext()
    def take(self): return {}
def stragglers(a,b): return []
