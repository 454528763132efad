"""One exception per kind of failure, in one sentence: what is wrong, on which stage and rank, what to do."""


class PipelineError(RuntimeError):
    """Any failure of the pipeline; ends the server."""


class SettingsError(PipelineError):
    """Invalid environment variable."""


class ContractError(PipelineError):
    """Unknown SGLang internals, or a failed patch."""


class CertificateError(ContractError):
    """A certificate that does not count, or cannot be made."""


class AgreementError(PipelineError):
    """Ranks with different plugins or settings."""


class DifferenceError(AgreementError):
    """Statements of all ranks, but not all equal."""


class TransportError(PipelineError):
    """A lane did not open: directory, port, key or connection."""


class PeerLostError(PipelineError):
    """Another stage ended, froze or lost its network."""


class MessageError(PipelineError):
    """A damaged or unknown message."""


class SequenceError(PipelineError):
    """Wrong number, microbatch or iteration."""


class WaitLimitError(PipelineError):
    """A live peer did not deliver in time."""
