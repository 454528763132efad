"""What can go wrong, each as one exception with one sentence.

A message says what is wrong, on which stage and rank, and what to do about it; the classes exist so
that tests and callers can tell the cases apart without reading the sentence.
"""


class PipelineError(RuntimeError):
    """Any failure of the asynchronous pipeline; the server must not go on after one."""


class SettingsError(PipelineError):
    """An environment variable has a value that cannot be used."""


class ContractError(PipelineError):
    """This SGLang is not one whose internals we know, or a patch could not be applied."""


class AgreementError(PipelineError):
    """The ranks of this server do not all run the same plugin in the same way."""


class DifferenceError(AgreementError):
    """All ranks have made their statement, and not all say the same."""


class TransportError(PipelineError):
    """A lane could not be opened: directory, port, key or connection."""


class PeerLostError(PipelineError):
    """Another stage is gone: its process ended, froze, or the network between us did."""


class MessageError(PipelineError):
    """A message is truncated, corrupted or not in our format."""


class SequenceError(PipelineError):
    """A sound message arrived in the wrong place: another number, microbatch or iteration."""


class WaitLimitError(PipelineError):
    """A peer is alive but did not deliver what we wait for within the limit."""
