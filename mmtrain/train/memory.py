def choose_stage(*a): return 1, "x"
def is_out_of_memory(e): return False
def out_of_memory(*a): return ""
