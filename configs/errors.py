"""The errors Ingot raises on purpose.

IngotError
├── ConfigError      a recipe or schema says something impossible          exit 2
├── PlanError        the line cannot be wired or selected as asked         exit 2
├── StoreError       the artifact store cannot be read or written          exit 1
│   ├── NoAnswer         a place of objects is silent; it may answer later
│   ├── ArtifactError    an artifact is unfinished, damaged or of another kind
│   └── LeaseLost        another builder holds the slot; this one must not write
├── DataError        a source is unreadable or yields nothing              exit 1
├── MachineError     workers cannot be placed, or died too often           exit 1
│   └── DeadlineError    a wait ran out of time; names the peer
├── TrainingError    a loss or gradient is not finite, or steps are missing exit 1
├── VerifierError    a reward could not be computed                        exit 1
├── ExportError      a bundle does not reproduce its source                exit 1
└── ClientError      a program that loads bundles is absent, or failed     exit 1

A message says what is wrong, the two values that disagree, and what to do. Errors cross process
borders, so none defines a constructor of its own.
"""


class IngotError(Exception):
    """Root of every deliberate error; `exit_code` is what the command line returns for it."""

    exit_code = 1


class ConfigError(IngotError, ValueError):
    """A recipe or schema asks for something impossible."""

    exit_code = 2


class PlanError(IngotError, ValueError):
    """The line cannot be wired or selected as asked."""

    exit_code = 2


class StoreError(IngotError, OSError):
    """The artifact store cannot be read or written."""


class NoAnswer(StoreError):
    """A place of objects does not answer, or says that it cannot at the moment."""


class ArtifactError(StoreError):
    """An artifact is unfinished, damaged, or of another kind."""


class LeaseLost(StoreError):
    """Another builder holds the slot."""


class DataError(IngotError, ValueError):
    """A source is unreadable or yields nothing."""


class MachineError(IngotError, RuntimeError):
    """Workers cannot be placed, or died more often than allowed."""


class DeadlineError(MachineError, TimeoutError):
    """A wait ran out of time."""


class TrainingError(IngotError, RuntimeError):
    """A loss or gradient is not finite, or the steps asked for were not done."""


class VerifierError(IngotError, RuntimeError):
    """A reward could not be computed."""


class ExportError(IngotError, RuntimeError):
    """A bundle does not reproduce the checkpoint it was made from."""


class ClientError(IngotError, RuntimeError):
    """A program that loads bundles is not there, or did not do what it was asked."""
