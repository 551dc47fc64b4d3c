"""Errors that FedMed raises on purpose.

A message says in one or two lines what was expected, what came, where, and what to do. The command line prints it without a traceback.
"""


class FedMedError(Exception):
    """A run could not go on; the message says why and what to do. Exit code 3."""


class UserError(FedMedError):
    """Something handed to FedMed is wrong: a key, a value, a file, a pair of method and task. Exit code 2."""


class QuorumLost(FedMedError):
    """Fewer sites answered than the quorum asks for; the run stopped after writing a checkpoint. Exit code 3."""
