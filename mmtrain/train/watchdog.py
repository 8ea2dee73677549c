from datetime import timedelta
class Watchdog:
    def __init__(self,*a): pass
    def __enter__(self): return self
    def __exit__(self,*a): pass
    def enter(self, s): pass
def limits(h): return {}
def process_group_timeout(h): return timedelta(minutes=30)
