"""flashtile: exact attention that never stores the score matrix, in Python all the way."""

from flashtile.doctor import doctor
from flashtile.errors import FallbackRefused, FlashtileError, InvalidArgument, MissingExtra, UnsupportedProblem
from flashtile.explain import explain
from flashtile.functional import attention, attention_varlen, attention_varlen_with_lse, attention_with_lse
from flashtile.spec.merge import merge_attention
from flashtile.support import support_matrix
from flashtile.warmup import warmup

__version__ = "0.1.0"

__all__ = [
    "FallbackRefused",
    "FlashtileError",
    "InvalidArgument",
    "MissingExtra",
    "UnsupportedProblem",
    "attention",
    "attention_varlen",
    "attention_varlen_with_lse",
    "attention_with_lse",
    "doctor",
    "explain",
    "merge_attention",
    "support_matrix",
    "warmup",
]
