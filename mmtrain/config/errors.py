"""The one exception that stands for a user's mistake."""


class UserError(Exception):
    """A mistake that the user can mend: one sentence that says what is wrong, where, and how to mend it.

    The command line prints the sentence without a traceback and exits with code 2
    (`MMTRAIN_DEBUG=1` shows the traceback).
    """
