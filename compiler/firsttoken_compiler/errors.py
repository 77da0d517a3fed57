"""The errors a user of the compiler can cause; each says what, where, the value, the limit and the remedy."""


class FirsttokenError(Exception):
    """Base of every error that is the input's fault; the command line prints it and exits with 2."""


class StudentError(FirsttokenError):
    """The ONNX file cannot be read, or holds something the compiler does not support."""


class TargetError(FirsttokenError):
    """A target is unknown, its file is malformed, or a value lies outside its limits."""


class OptionError(FirsttokenError):
    """An option has a value that this student and target cannot honour."""


class AllocationError(FirsttokenError):
    """A buffer does not fit where the target keeps it."""


class ProgramError(FirsttokenError):
    """A program file is malformed, or a program breaks a rule that the verifier checks."""
